"""What a reward model is worth on preference pairs: how often it agrees, how surely, and whether by length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rlhf_pipeline.core import schema, stats
from rlhf_pipeline.core.comparisons import texts_of

Array = npt.NDArray[np.float64]

SIDES = ("chosen", "rejected")
SUBSETS = ("subset", schema.CATEGORY)
"""Columns that say what kind of pair a row is; the first that is there counts."""
PERCENTILES = (5, 25, 50, 75, 95)
LENGTH_BINS = 5

SECTIONS = {
    "Chat": ("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"),
    "Chat Hard": (
        "mt-bench-hard",
        "llmbar-natural",
        "llmbar-adver-neighbor",
        "llmbar-adver-GPTInst",
        "llmbar-adver-GPTOut",
        "llmbar-adver-manual",
    ),
    "Safety": (
        "refusals-dangerous",
        "refusals-offensive",
        "xstest-should-refuse",
        "xstest-should-respond",
        "donotanswer",
    ),
    "Reasoning": ("math-prm", "hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"),
}
"""RewardBench's subsets (Lambert et al. 2024, arXiv 2403.13787, table 1)."""
MATH = "math-prm"


@dataclass(frozen=True)
class Judged:
    """P pairs with the rewards of their two responses."""

    rewards: Array
    """(P, 2) chosen, rejected; NaN where there is none"""
    characters: Array
    """(P, 2)"""
    prompt_ids: Sequence[str]
    subsets: Sequence[str | None]
    objectives: Mapping[str, Array] = field(default_factory=dict)
    """{name: (P, 2)} the rewards behind the reward: an ensemble's members, ArmoRM's objectives"""
    errors: Sequence[tuple[str, str, str]] = ()
    """(prompt_id, side, reason) of every response without a reward"""

    def unscored(self) -> list[dict[str, Any]]:
        return [{"prompt_id": prompt_id, "response": side, "reason": reason} for prompt_id, side, reason in self.errors]


def read(files: Sequence[Path]) -> Judged:
    """The pairs in rank's parquet files, a file at a time."""
    import pyarrow.parquet as pq

    rewards, characters, prompt_ids, subsets, objectives, errors = [], [], [], [], [], []
    for path in files:
        for row in pq.read_table(path).to_pylist():
            texts = texts_of(row) or ("", "", "")
            prompt_id = row[schema.PROMPT_ID]
            rewards.append([row[f"{side}_reward"] for side in SIDES])
            characters.append([len(text) for text in texts[1:]])
            prompt_ids.append(prompt_id)
            subsets.append(next((row[name] for name in SUBSETS if name in row), None))
            objectives.append([row.get(f"{side}_objectives") or {} for side in SIDES])
            reasons = [(side, row[f"{side}_reward_error"]) for side in SIDES]
            errors += [(prompt_id, side, reason) for side, reason in reasons if reason is not None]
    names = {name: None for pair in objectives for values in pair for name in values}
    return Judged(
        rewards=np.array(rewards, np.float64),
        characters=np.array(characters, np.float64),
        prompt_ids=prompt_ids,
        subsets=subsets,
        objectives={
            name: np.array([[values.get(name) for values in pair] for pair in objectives], np.float64) for name in names
        },
        errors=errors,
    )


def make(data: Judged) -> dict[str, Any]:
    """The report, as JSON values; None where there is nothing to take a number of.

    accuracy: the share of pairs whose chosen response has the higher reward; a tie counts half. Intervals are 95 % and
    take the pairs of one prompt for alike. Pairs that lack one of their rewards are left out and counted.
    """
    kept = ~np.isnan(data.rewards).any(1)
    margins = data.rewards[kept, 0] - data.rewards[kept, 1]
    prompts = np.array(data.prompt_ids)[kept]
    longer = data.characters[kept, 0] - data.characters[kept, 1]
    subsets = np.array([str(name) for name in data.subsets])[kept]
    report: dict[str, Any] = {
        "read": len(data.rewards),
        "nulls": dict(Counter(reason.partition(":")[0] for _, _, reason in data.errors).most_common()),
        **accuracy(margins, prompts),
        "margin": {
            "mean": float(margins.mean()) if margins.size else None,
            "std": float(margins.std()) if margins.size else None,
            "percentiles": {f"p{p}": float(np.percentile(margins, p)) if margins.size else None for p in PERCENTILES},
        },
        "length": by_length(margins, longer, prompts),
    }
    if any(name is not None for name in data.subsets):
        names = list(dict.fromkeys(subsets.tolist()))
        report["subsets"] = {name: accuracy(margins[subsets == name], prompts[subsets == name]) for name in names}
        if set(names) <= {name for section in SECTIONS.values() for name in section}:
            report["rewardbench"] = rewardbench(margins, prompts, subsets)
    if data.objectives:
        report["objectives"] = {
            name: accuracy((values[:, 0] - values[:, 1])[kept], prompts) for name, values in data.objectives.items()
        }
    return report


def accuracy(margins: Array, prompts: npt.NDArray[Any], weights: Array | None = None) -> dict[str, Any]:
    """{pairs, accuracy: {mean, low, high} or None, ties} of (n,) margins, chosen minus rejected."""
    margins, prompts = margins[~np.isnan(margins)], prompts[~np.isnan(margins)]
    right = (np.sign(margins) + 1) / 2
    return {
        "pairs": len(margins),
        "accuracy": asdict(stats.share_interval(right, prompts, weights)) if margins.size else None,
        "ties": int((margins == 0).sum()),
    }


def by_length(margins: Array, longer: Array, prompts: npt.NDArray[Any]) -> dict[str, Any]:
    """Whether the reward is length in disguise. longer: (n,) characters of the chosen minus of the rejected response.

    always_longer: the accuracy of a judge that takes the longer response. prefers_longer: the share of the pairs of
    unequal length whose longer response has the higher reward.
    """
    unequal = longer != 0
    agrees = (np.sign(margins * longer) + 1) / 2
    edges = np.unique(np.quantile(longer, np.linspace(0, 1, LENGTH_BINS + 1))) if longer.size else np.array([])
    bins = np.clip(np.searchsorted(edges, longer, side="right") - 1, 0, max(len(edges) - 2, 0))
    parts = {"chosen longer": longer > 0, "chosen shorter": longer < 0, "equal": ~unequal}
    return {
        "unit": "characters",
        "always_longer": float(((np.sign(longer) + 1) / 2).mean()) if longer.size else None,
        "prefers_longer": asdict(stats.share_interval(agrees[unequal], prompts[unequal])) if unequal.any() else None,
        "correlation": _correlation(margins, longer),
        **{name: accuracy(margins[rows], prompts[rows]) for name, rows in parts.items()},
        "by_difference": [
            {
                "from": float(longer[bins == k].min()),
                "to": float(longer[bins == k].max()),
                **accuracy(margins[bins == k], prompts[bins == k]),
            }
            for k in np.unique(bins)
        ],
    }


def rewardbench(margins: Array, prompts: npt.NDArray[Any], subsets: npt.NDArray[Any]) -> dict[str, Any]:
    """RewardBench's sections and score: the mean over the sections that the data has.

    In a section pairs count equally, but for Reasoning, where math counts as much as all code together. The published
    score counts a tie as wrong, and mixed in a fifth section of prior test sets, with half the weight of the others.
    """
    weights = np.ones_like(margins)
    code = np.isin(subsets, [name for name in SECTIONS["Reasoning"] if name != MATH])
    if (subsets == MATH).any() and code.any():
        weights[subsets == MATH] = code.sum() / (subsets == MATH).sum()
    rows = {name: np.isin(subsets, members) for name, members in SECTIONS.items()}
    sections = {
        name: accuracy(margins[mine], prompts[mine], weights[mine]) for name, mine in rows.items() if mine.any()
    }
    for name in sections:
        weights[rows[name]] /= weights[rows[name]].sum()
    return {"score": accuracy(margins, prompts, weights), "sections": sections}


def _correlation(a: Array, b: Array) -> float | None:
    value = stats.pearson(a, b) if a.size > 1 else float("nan")
    return None if np.isnan(value) else value


def lines(report: Mapping[str, Any]) -> list[str]:
    """The report for the console and the card: "name: facts", a line each."""
    margin, length = report["margin"], report["length"]
    spread = ", ".join(f"{name} {_number(value)}" for name, value in margin["percentiles"].items())
    reasons = "".join(f", {count} {reason}" for reason, count in report["nulls"].items())
    out = [
        f"accuracy: {_shown(report)}, {report['ties']} ties counted as half",
        f"margin: mean {_number(margin['mean'])}, std {_number(margin['std'])}, {spread}",
        f"length: the longer response is preferred in {_percent(length['prefers_longer'])} of the pairs; always taking "
        f"it would be right in {_percent(length['always_longer'])}; correlation of the margin with the difference in "
        f"{length['unit']} {_number(length['correlation'])}",
    ]
    out += [f"{name}: {_shown(length[name])}" for name in ("chosen longer", "chosen shorter") if length[name]["pairs"]]
    out += [
        f"chosen {item['from']:+,.0f} to {item['to']:+,.0f} {length['unit']}: {_shown(item)}"
        for item in length["by_difference"]
    ]
    out += [f"{name}: {_shown(item)}" for name, item in report.get("subsets", {}).items()]
    if "rewardbench" in report:
        found = report["rewardbench"]
        out += [f"RewardBench {name}: {_shown(item)}" for name, item in found["sections"].items()]
        out.append(f"RewardBench score: {_shown(found['score'])}, the mean of {len(found['sections'])} sections")
    out += [f"by {name} alone: {_shown(item)}" for name, item in report.get("objectives", {}).items()]
    return [*out, f"no reward: {report['read'] - report['pairs']} of {report['read']} pairs{reasons}"]


def _shown(item: Mapping[str, Any]) -> str:
    return f"{_percent(item['accuracy'])} of {item['pairs']:,} pairs"


def _percent(value: Mapping[str, float] | float | None) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{100 * value:.1f} %"
    return f"{100 * value['mean']:.1f} % ({100 * value['low']:.1f} to {100 * value['high']:.1f})"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"
