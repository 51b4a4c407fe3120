"""The table of policies on the console."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rlhf_pipeline.core.progress import is_main, say
from rlhf_pipeline.core.reporting import verdict
from rlhf_pipeline.core.reporting.verdict import digits_for, number, percent

WIDTH = 140
"""Characters of a table where the console is no terminal."""


def print_policies(summary: Mapping[str, Any]) -> None:
    """Every policy's numbers with their 95 % intervals below, then the verdict in words. Rank 0 only."""
    from rich.console import Console
    from rich.table import Table

    if not is_main():
        return
    rows, models = summary["policies"], summary["reward_models"]
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("policy", no_wrap=True)
    for name in (*models, *(f"wins by {name}" for name in models), "KL", "length", "cut", "repeated", "distinct-2"):
        table.add_column(name, justify="right")
    digits = {name: digits_for([row[name] for row in rows]) for name in models}
    for row in rows:
        table.add_row(
            row["name"] + (" *" if row["name"] == summary["best"] else ""),
            *(_with_interval(row[name], digits[name]) for name in models),
            *(_with_interval(row[f"win_rate_{name}"], 1, percent=True) for name in models),
            "" if row["kl"] is None else f"{number(row['kl'], 2)}\n+- {number(1.96 * row['kl_standard_error'], 2)}",
            f"{row['length']:.1f}",
            percent(row["truncated"]),
            percent(row["repeated"]),
            f"{row['distinct_2']:.3f}",
        )
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDTH).print(table)
    say(
        f"* best by {verdict.judge_of(summary)}. {summary['prompts']:,} prompts x {summary['responses_per_prompt']} "
        f"responses; 95 % intervals, not corrected for the number of comparisons; wins against {summary['baseline']}."
    )
    for sentence in summary["headline"]:
        say(sentence)
    for warning in summary["warnings"]:
        say(f"warning: {warning['text']}")


def _with_interval(item: Mapping[str, float] | None, digits: int, *, percent: bool = False) -> str:
    if item is None:
        return ""
    scale, unit = (100, " %") if percent else (1, "")
    mean, low, high = (number(scale * item[name], digits) for name in ("mean", "low", "high"))
    return f"{mean}{unit}\n{low} to {high}"
