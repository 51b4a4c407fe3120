"""The report of several runs in one page: which got how far, at what distance, and how much of it is the seed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_pipeline.core.reporting import figures
from rlhf_pipeline.core.reporting.page import notes_of, render, table_of, versions_of
from rlhf_pipeline.core.reporting.run_folder import Run
from rlhf_pipeline.core.reporting.verdict import (
    Row,
    Summary,
    best,
    change,
    digits_for,
    judge_of,
    number,
    percent,
    spoken,
)

SEED = re.compile(r"[-_.]?(seed|s)[-_.]?\d+$", re.IGNORECASE)
"""The end of a run's name that says which seed it had."""
Item = dict[str, Any]


def shared_models(summaries: Sequence[Summary]) -> list[str]:
    """The reward models that every run was judged by, in the first run's order."""
    return [name for name in summaries[0]["reward_models"] if all(name in item["reward_models"] for item in summaries)]


def render_runs(runs: Sequence[Run], summaries: Sequence[Summary]) -> str:
    """One page of evaluated runs, which have at least one reward model in common."""
    models = shared_models(summaries)
    judge = models[:2][-1]
    tops = [best_by(summary, judge) for summary in summaries]
    names = [run.name for run in runs]
    title, *sentences = headline(names, tops, judge)
    gains = [(name, top[f"gain_{judge}"]) for name, top in zip(names, tops, strict=True) if top[f"gain_{judge}"]]
    drawable = {
        name: summary["policies"]
        for name, summary in zip(names, summaries, strict=True)
        if all(row["kl"] is not None for row in summary["policies"])
    }
    pictures = [
        {
            "svg": figures.frontiers(drawable, {name: group_of(name) for name in drawable}, model),
            "caption": "Higher at the same distance is better; a line that bends down was over-optimised. Lines of one "
            "colour differ by a seed only.",
        }
        for model in reversed(models[:2])
        if drawable
    ]
    if gains:
        caption = "95 % intervals over prompts. They do not contain what another seed would change."
        pictures.append({"svg": figures.best_of_runs(gains, judge), "caption": caption})
    return render(
        "runs.html",
        title="RLHF report: " + ", ".join(names),
        kicker=f"RLHF report of {len(runs)} runs",
        headline=title,
        sentences=[
            *sentences,
            "Intervals are over prompts, not corrected for the number of runs. Differences within them are no ranking.",
        ],
        best=best_table(runs, tops, models),
        groups=seed_table(names, tops, models),
        pictures=pictures,
        runs=[
            {
                "name": run.name,
                "headline": " ".join([*summary["headline"], *run.early_end]),
                "warnings": [warning["text"] for warning in summary["warnings"]],
                "table": table_of(summary),
            }
            for run, summary in zip(runs, summaries, strict=True)
        ],
        notes=notes_of(summaries[0]),
        versions=versions_of(runs[0]),
    )


def best_by(summary: Summary, judge: str) -> Row:
    """The run's best policy that is not its start (the start, if it is alone)."""
    rows: Sequence[Row] = summary["policies"][1:] or summary["policies"]
    return (
        best(summary)
        if judge == judge_of(summary) and best(summary) in rows
        else max(rows, key=lambda row: row[judge]["mean"])
    )


def headline(names: Sequence[str], tops: Sequence[Row], judge: str) -> list[str]:
    """Which run gained most, and whether that is more than chance: two sentences."""
    found = {name: top[f"gain_{judge}"] for name, top in zip(names, tops, strict=True) if top[f"gain_{judge}"]}
    if not found:
        return ["None of these runs has a policy beside its start."]
    first = max(found, key=lambda name: found[name]["mean"])
    detail = f"{first} gains most by {judge}: {change(found[first])}."
    rivals = [name for name, gain in found.items() if name != first and gain["high"] >= found[first]["low"]]
    if not rivals:
        return [f"{first} is ahead by {judge}.", f"{detail} No other run's interval overlaps with it."]
    overlap = f"{detail} The intervals of {', '.join(rivals)} overlap with it."
    return [f"No run is clearly ahead by {judge}.", overlap]


def best_table(runs: Sequence[Run], tops: Sequence[Row], models: Sequence[str]) -> Item:
    rows = []
    for run, top in zip(runs, tops, strict=True):
        cells = [run.name, spoken(top), loss_of(run)]
        for name in models:
            gain = top[f"gain_{name}"]
            cells.append("none" if gain is None else interval_text(gain))
        wins = top[f"win_rate_{models[:2][-1]}"]
        cells += [
            "none" if wins is None else percent(wins["mean"]),
            "none" if top["kl"] is None else number(top["kl"], 2),
            f"{top['length']:.1f}",
        ]
        rows.append(cells)
    gains = [f"gain by {name}" for name in models]
    return {"columns": ["run", "policy", "loss", *gains, f"wins by {models[:2][-1]}", "KL", "length"], "rows": rows}


def interval_text(item: Mapping[str, float]) -> str:
    digits = digits_for([item])
    mean, low, high = (number(item[key], digits, sign=True) for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def loss_of(run: Run) -> str:
    """What the run's policies were trained with, as their provenance says."""
    names = [stage.made["loss"]["name"] for stage in run.stages if "loss" in stage.made]
    return ", ".join(dict.fromkeys(names)) or "unknown"


def group_of(run: str) -> str:
    """A run's name without its seed."""
    return SEED.sub("", run) or run


def seed_table(names: Sequence[str], tops: Sequence[Row], models: Sequence[str]) -> Item:
    """Mean, lowest and highest over the runs of each group that differs by a seed only."""
    groups: dict[str, list[Row]] = {}
    for name, top in zip(names, tops, strict=True):
        groups.setdefault(group_of(name), []).append(top)
    rows = []
    for group, members in groups.items():
        if len(members) < 2:
            continue
        cells = [group, str(len(members))]
        for key in [f"gain_{name}" for name in models]:
            cells.append(spread_text([row[key]["mean"] for row in members if row[key]], sign=True))
        cells += [spread_text([row["kl"] for row in members if row["kl"] is not None])]
        cells += [spread_text([row["length"] for row in members])]
        rows.append(cells)
    return {"columns": ["runs", "seeds", *(f"gain by {name}" for name in models), "KL", "length"], "rows": rows}


def spread_text(values: Sequence[float], *, sign: bool = False) -> str:
    if not values:
        return "none"
    mean = sum(values) / len(values)
    low, high = (number(value, 2, sign=sign) for value in (min(values), max(values)))
    return f"{number(mean, 2, sign=sign)} ({low} to {high})"
