"""What a set of rewards looks like: the numbers that say whether a reward model separates responses, and by
what.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rlhf_pipeline.core import schema

if TYPE_CHECKING:
    import pyarrow as pa

Array = npt.NDArray[np.float64]
PERCENTILES = (5, 25, 50, 75, 95)


@dataclass(frozen=True)
class Rewards:
    """Of P prompts with N responses each."""

    rewards: Array
    """(P, N), NaN where there is none"""
    lengths: Array
    """(P, N), in `length_unit`, NaN where there is no response"""
    length_unit: str = "tokens"
    objectives: Mapping[str, Array] = field(default_factory=dict)
    """(P, N) each"""
    errors: Sequence[tuple[str, int, str]] = ()
    """(prompt_id, response, reason) of every response without a reward"""

    def unscored(self) -> list[dict[str, Any]]:
        return [{"prompt_id": prompt_id, "response": i, "reason": reason} for prompt_id, i, reason in self.errors]


def read(files: Sequence[Path], num_responses: int) -> Rewards:
    """The rewards in rank's parquet files, a file at a time."""
    import pyarrow.parquet as pq

    present = pq.read_schema(files[0])
    has_tokens = schema.response_tokens(0) in present.names
    measured = schema.response_tokens if has_tokens else schema.response
    names: list[str] = []
    if schema.response_objectives(0) in present.names:
        names = [item.name for item in present.field(schema.response_objectives(0)).type]
    parts: list[list[Array]] = []
    errors: list[tuple[str, int, str]] = []
    for path in files:
        columns = [schema.PROMPT_ID]
        for i in range(num_responses):
            columns += [schema.response_reward(i), schema.response_reward_error(i), measured(i)]
            columns += [schema.response_objectives(i)] * bool(names)
        table = pq.read_table(path, columns=columns)
        blocks = [_column(table, schema.response_reward(i)) for i in range(num_responses)]
        measures = [_lengths(table, measured(i)) for i in range(num_responses)]
        objectives = [
            [_column(table, schema.response_objectives(i), member) for i in range(num_responses)]
            for member in range(len(names))
        ]
        parts.append([np.stack(columns, axis=1) for columns in (blocks, measures, *objectives)])
        errors += _errors(table, num_responses)
    whole = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return Rewards(
        rewards=whole[0],
        lengths=whole[1],
        length_unit="tokens" if has_tokens else "characters",
        objectives=dict(zip(names, whole[2:], strict=True)),
        errors=errors,
    )


def _column(table: pa.Table, name: str, member: int | None = None) -> Array:
    """A float column, or the member at an index of a struct column (names may hold dots); null as NaN."""
    import pyarrow.compute as pc

    column = table.column(name) if member is None else pc.struct_field(table.column(name), [member])
    return column.to_numpy().astype(np.float64)


def _lengths(table: pa.Table, name: str) -> Array:
    import pyarrow as pa
    import pyarrow.compute as pc

    column = table.column(name)
    if not pa.types.is_nested(column.type):
        return pc.utf8_length(column.cast(pa.large_string())).to_numpy().astype(np.float64)
    return pc.list_value_length(column).to_numpy().astype(np.float64)


def _errors(table: pa.Table, num_responses: int) -> list[tuple[str, int, str]]:
    ids = table.column(schema.PROMPT_ID).to_pylist()
    columns = [table.column(schema.response_reward_error(i)).to_pylist() for i in range(num_responses)]
    return [
        (prompt_id, i, column[row])
        for row, prompt_id in enumerate(ids)
        for i, column in enumerate(columns)
        if column[row] is not None
    ]


def make(data: Rewards, *, members: bool = False) -> dict[str, Any]:
    """The report, as JSON values; None where a number has no meaning (a correlation of constants, a mean of
    nothing).

    members: the objectives are an ensemble's members, whose disagreement is reported.

    Best, worst, margin and ties are over the prompts with at least two rewards: margin = best - worst; a tie
    is a prompt whose highest reward two responses share, so that chance chooses the best.
    """
    rewards = data.rewards
    scored = rewards[~np.isnan(rewards)]
    compared = rewards[(~np.isnan(rewards)).sum(1) >= 2]
    best = np.fmax.reduce(compared, axis=1, initial=np.nan)
    worst = np.fmin.reduce(compared, axis=1, initial=np.nan)
    margins = best - worst
    centered, centered_lengths = _centered(rewards, rewards), _centered(data.lengths, rewards)
    report: dict[str, Any] = {
        "prompts": len(rewards),
        "responses": rewards.size,
        "nulls": rewards.size - scored.size,
        "null_reasons": dict(Counter(reason.partition(":")[0] for _, _, reason in data.errors).most_common()),
        "mean": _mean(scored),
        "std": _std(scored),
        "std_within_prompt": _std(centered),
        "min": float(scored.min()) if scored.size else None,
        "max": float(scored.max()) if scored.size else None,
        "best_of_n": _mean(best),
        "worst_of_n": _mean(worst),
        "margin": {"mean": _mean(margins), "percentiles": _percentiles(margins)},
        "ties": int(((compared == best[:, None]).sum(1) > 1).sum()),
        "all_equal": int((margins == 0).sum()),
        "length_unit": data.length_unit,
        "length_correlation": correlation(rewards, data.lengths),
        "length_correlation_within_prompt": correlation(centered, centered_lengths),
        "mean_by_response": [_mean(column) for column in rewards.T],
    }
    if data.objectives:
        report["objectives"] = {
            name: {"mean": _mean(values), "correlation": correlation(values, rewards)}
            for name, values in data.objectives.items()
        }
    if members and data.objectives:
        report["disagreement"] = disagreement(np.stack(list(data.objectives.values())))
    return report


def disagreement(members: Array) -> dict[str, Any]:
    """How far M members' rewards (M, P, N) are apart, over the responses that all of them scored.

    std_over_members: of a response's M rewards, on average. other_best: prompts with at least two such
    responses on which not all members choose the same best one.
    """
    scored = ~np.isnan(members).any(0)
    compared = np.where(scored, members, -np.inf)[:, scored.sum(1) >= 2]
    chosen = compared.argmax(2)
    return {
        "std_over_members": _mean(members[:, scored].std(0)),
        "other_best": int((chosen != chosen[0]).any(0).sum()),
    }


def lines(report: Mapping[str, Any]) -> list[str]:
    """The report for the console and the card: "name: facts", a line each."""
    margin = report["margin"]
    spread = ", ".join(f"{name} {_text(value)}" for name, value in margin["percentiles"].items())
    reasons = "".join(f", {count} {reason}" for reason, count in report["null_reasons"].items())
    out = [
        f"rewards: mean {_text(report['mean'])}, std {_text(report['std'])} (within a prompt "
        f"{_text(report['std_within_prompt'])}), from {_text(report['min'])} to {_text(report['max'])}",
        f"best and worst of N: {_text(report['best_of_n'])} and {_text(report['worst_of_n'])} on average",
        f"margin: mean {_text(margin['mean'])}, {spread}",
        f"ties: {report['ties']} prompts for the best reward, {report['all_equal']} for all of them",
        f"correlation with length: {_text(report['length_correlation'])}, within a prompt "
        f"{_text(report['length_correlation_within_prompt'])} (length in {report['length_unit']})",
        f"mean by response: {', '.join(map(_text, report['mean_by_response']))}",
        f"no reward: {report['nulls']} of {report['responses']} responses{reasons}",
    ]
    out += [
        f"{name}: mean {_text(item['mean'])}, correlation with the reward {_text(item['correlation'])}"
        for name, item in report.get("objectives", {}).items()
    ]
    if "disagreement" in report:
        item = report["disagreement"]
        out.append(
            f"disagreement: std over members {_text(item['std_over_members'])}, another best response in "
            f"{item['other_best']} prompts"
        )
    return out


def correlation(a: Array, b: Array) -> float | None:
    """Pearson's, over the entries that neither lacks; None where one of them is constant."""
    kept = ~(np.isnan(a) | np.isnan(b))
    x, y = a[kept], b[kept]
    if x.size < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def _mean(values: Array) -> float | None:
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if kept.size else None


def _std(values: Array) -> float | None:
    kept = values[~np.isnan(values)]
    return float(kept.std()) if kept.size else None


def _percentiles(values: Array) -> dict[str, float | None]:
    found = np.percentile(values, PERCENTILES).tolist() if values.size else [None] * len(PERCENTILES)
    return {f"p{p}": value for p, value in zip(PERCENTILES, found, strict=True)}


def _centered(values: Array, rewards: Array) -> Array:
    """`values` minus their mean over the prompt's responses that have a reward; NaN for prompts with one or
    none.
    """
    kept = np.where(np.isnan(rewards), np.nan, values)
    count = (~np.isnan(kept)).sum(1, keepdims=True)
    return np.where(count > 1, kept - np.nansum(kept, axis=1, keepdims=True) / np.maximum(count, 1), np.nan)


def _text(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"
