"""What a set of pairs looks like, and what was lost on the way to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import pyarrow as pa

PERCENTILES = (5, 25, 50, 75, 95)
COLUMNS = (
    "prompt_length",
    "chosen_length",
    "rejected_length",
    "chosen_reward",
    "rejected_reward",
    "chosen_index",
    "rejected_index",
)
"""The columns that `picture` reads."""


def picture(table: pa.Table, num_responses: int) -> dict[str, Any]:
    """What a set of pairs looks like. Lengths in tokens, rewards and margins in reward units."""
    values = {name: table.column(name).to_numpy() for name in table.column_names}
    values["reward_margin"] = values["chosen_reward"] - values["rejected_reward"]
    indices = {name: values.pop(name) for name in ("chosen_index", "rejected_index")}
    return {
        **{name: _distribution(numbers) for name, numbers in values.items()},
        **{name: np.bincount(i, minlength=num_responses).tolist() for name, i in indices.items()},
        "chosen_longer": float(np.mean(values["chosen_length"] > values["rejected_length"])),
        "chosen_shorter": float(np.mean(values["chosen_length"] < values["rejected_length"])),
    }


def _distribution(numbers: npt.NDArray[Any]) -> dict[str, float]:
    """Mean, extremes and percentiles."""
    points = np.percentile(numbers, PERCENTILES)
    return {
        "mean": float(numbers.mean()),
        "min": float(numbers.min()),
        **{f"p{percent}": float(point) for percent, point in zip(PERCENTILES, points, strict=True)},
        "max": float(numbers.max()),
    }


def lines_of_loss(total: Mapping[str, Any], min_responses: int) -> list[str]:
    """What the console says of the prompts and responses that were lost. total: of pair_blocks.add_up."""
    prompts, dropped = total["prompts"], sum(total["dropped"].values())
    lines = [f"kept       {prompts - dropped:,} of {prompts:,} prompts"]
    lines += [f"dropped    {count:,} ({count / prompts:.1%}) {reason}" for reason, count in total["dropped"].items()]
    if total["refusal"] is not None:
        lines.append(f"           the first that can't be encoded: {total['refusal']}")
    if min_responses > 2 and total["liftable"]:
        lines.append(
            f"           {total['liftable']:,} of them ({total['liftable'] / prompts:.1%}) would stay with "
            "--min_responses 2, from the responses that survive"
        )
    if total["faults"]:
        lines.append(f"responses  that did not survive: {counts(total['faults'])}")
    if total["tied_best"] or total["tied_worst"]:
        lines.append(
            f"ties       for the best in {total['tied_best']:,} prompts, for the worst in {total['tied_worst']:,}; "
            "the first counts"
        )
    return lines


def lines_of_data(data: Mapping[str, Any], rows: Mapping[str, int], total: Mapping[str, Any]) -> list[str]:
    """What the console says of the pairs. data: `picture`; rows: {split: pairs}; total: of pair_blocks.add_up."""
    lines = [
        f"pairs      {rows['train']:,} in train, {rows['test']:,} in test",
        f"margin     mean {data['reward_margin']['mean']:.4g}, median {data['reward_margin']['p50']:.4g}, "
        f"largest {data['reward_margin']['max']:.4g} reward units",
        f"lengths    chosen {data['chosen_length']['mean']:.0f} and rejected {data['rejected_length']['mean']:.0f} "
        f"tokens on average; the chosen one is longer in {data['chosen_longer']:.0%} of pairs, "
        f"shorter in {data['chosen_shorter']:.0%}",
    ]
    if total["sampled_pairs"]:
        lines.append(
            f"ids        in {total['changed_pairs']:,} of {total['sampled_pairs']:,} pairs the text would be encoded "
            "as other ids than were sampled; the sampled ones are kept"
        )
    return lines


def counts(numbers: Mapping[str, int]) -> str:
    """{"a": 1, "b": 2} as a 1, b 2."""
    return ", ".join(f"{name} {count:,}" for name, count in numbers.items())
