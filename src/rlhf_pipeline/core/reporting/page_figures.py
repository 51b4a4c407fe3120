"""Which figures a run's page shows, in which sections, and what stands below each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_pipeline.core.reporting import figures
from rlhf_pipeline.core.reporting.evaluation import Answers
from rlhf_pipeline.core.reporting.run_folder import Run, Stage
from rlhf_pipeline.core.reporting.verdict import Row, Summary, judge_of, percent

SAME_SCALE = 4.0
"""Reward models whose spreads differ by more than this factor are drawn in standard deviations."""
TRAINING = (
    ("loss", "Loss", "loss", "Compare its course, not its height: the margin it aims at changes between iterations."),
    (
        "log_ratio_gap",
        "Gap between chosen and rejected",
        "nats",
        "Log-ratio of the chosen minus that of the rejected response. Dashed: what REBEL asks for, eta x margin.",
    ),
    (
        "reward_margin",
        "Margin in the pairs",
        "reward units",
        "Reward of the chosen minus of the rejected response; when it shrinks, little is left to learn from it.",
    ),
    ("chosen_log_ratio", "Log-ratio of the chosen", "nats", "If it falls, even good responses become less likely."),
)
"""(key in metrics.jsonl, title, unit, caption) of the figures of a policy's training."""
Item = dict[str, Any]


def sections_of(run: Run, summary: Summary | None, answers: Sequence[Answers]) -> Iterator[Item]:
    """Sections of figures, each only if there is something to draw."""
    if summary is not None and len(summary["policies"]) > 1:
        yield {
            "id": "rewards",
            "title": "Better, and then?",
            "text": "Training follows one reward; whether the other follows too decides whether the policy got better.",
            "figures": list(reward_figures(summary)),
        }
        if len(answers) > 1:
            yield {
                "id": "responses",
                "title": "All responses, not the mean alone",
                "text": "",
                "figures": list(response_figures(summary, answers)),
            }
        drawn = list(health_figures(run, summary))
        if drawn:
            yield {"id": "health", "title": "Where, and at what price", "text": "", "figures": drawn}
    drawn = list(training_figures(run.stages))
    if drawn:
        text = "Means over the pairs or demonstrations of each update, from each policy's metrics.jsonl."
        yield {"id": "training", "title": "Training", "text": text, "figures": drawn}


def in_sequence(rows: Sequence[Row]) -> bool:
    """Whether the policies are the iterations of one run."""
    return all(row["iteration"] is not None for row in rows)


def units_of(run_summary: Summary, spread: Mapping[str, float]) -> tuple[dict[str, float], str]:
    """({reward model: what to divide its gains by}, the axis's label): one axis is fair to like spreads alone."""
    models = run_summary["reward_models"]
    spreads = [spread[name] for name in models if spread[name] > 0]
    if len(spreads) == len(models) and max(spreads) > SAME_SCALE * min(spreads):
        return {name: spread[name] for name in models}, "gain, in standard deviations of the start's rewards"
    return dict.fromkeys(models, 1.0), "gain, reward units"


def reward_figures(summary: Summary) -> Iterator[Item]:
    rows, models = summary["policies"], summary["reward_models"]
    units, label = units_of(summary, summary["baseline_std"])
    caption = "Difference from the start on the same prompts; the bands are 95 % intervals."
    if in_sequence(rows):
        yield {"svg": figures.gains(rows, models, units, label), "caption": caption}
    else:
        yield {
            "svg": figures.gains_by_name(rows[1:], models, units, label),
            "caption": caption.replace("bands", "bars"),
        }
    if all(row["kl"] is not None for row in rows):
        yield {
            "svg": figures.frontier(rows, models, units, label),
            "caption": "The over-optimisation picture: how much reward each nat of distance bought. Where the lines "
            "part, the policy pleases its reward model and nobody else.",
        }
    yield {
        "svg": figures.win_rates(rows[1:], models),
        "caption": "50 % is a draw. Hollow: what a logistic regression expects of responses as long as the start's.",
    }


def shown(summary: Summary) -> list[str]:
    """The start, the best policy and the last, once each."""
    names = [row["name"] for row in summary["policies"]]
    top = summary["best"] if summary["best"] != names[0] else names[1]
    return list(dict.fromkeys((names[0], top, names[-1])))


def response_figures(summary: Summary, answers: Sequence[Answers]) -> Iterator[Item]:
    models = [name for name in summary["reward_models"] if name in answers[0].rewards]
    chosen = [item for name in shown(summary) for item in answers if item.policy == name]
    for name in models:
        values = {item.policy: item.rewards[name][~np.isnan(item.rewards[name])] for item in chosen}
        counts = ", ".join(f"{len(rewards):,} of {policy}" for policy, rewards in values.items())
        yield {
            "svg": figures.distribution(name, figures.color_of(models, name), values),
            "caption": f"Every response to the held-out prompts: {counts}.",
        }
    judge = judge_of(summary)
    if judge in models:
        points = {}
        for item in chosen:
            known = ~np.isnan(item.rewards[judge])
            points[item.policy] = (item.lengths[known], item.rewards[judge][known])
        yield {
            "svg": figures.lengths(judge, points, figures.color_of(models, judge)),
            "caption": "Each dot is an eighth of a policy's responses, from its shortest to its longest.",
        }


def health_figures(run: Run, summary: Summary) -> Iterator[Item]:
    rows = summary["policies"]
    top = next(item for item in (run.results or {})["policies"] if item["name"] == shown(summary)[1])
    by_category = [(name, item["gains"]) for name, item in top["categories"].items() if item["gains"]]
    if by_category:
        yield {
            "svg": figures.categories(by_category, summary["reward_models"], f"Gain of {top['name']} by category"),
            "caption": "Few prompts each, so the intervals are wide, and one category out of line may be chance.",
        }
    if in_sequence(rows):
        yield {"svg": figures.health(rows), "caption": "Both should stay near zero."}
        yield {
            "svg": figures.variety(rows),
            "caption": "distinct-2 is the share of different word pairs: it falls when all responses sound alike.",
        }


def training_figures(stages: Sequence[Stage]) -> Iterator[Item]:
    """Of the policies' training, then of the reward model's and the first policy's."""
    policies = {stage.name.removesuffix("/policy"): stage.metrics for stage in stages if made_by(stage, "train")}
    policies = {name: lines for name, lines in policies.items() if lines}
    for key, title, ylabel, caption in TRAINING:
        series = {name: points(lines, key) for name, lines in policies.items()}
        if key == "log_ratio_gap":
            series |= {f"{name} target": points(lines, "target_gap") for name, lines in policies.items()}
        series = {name: values for name, values in series.items() if values}
        if series:
            yield {"svg": figures.training(title, ylabel, series, log=spans_decades(series)), "caption": caption}
    for command, title in (("reward", "Reward model"), ("sft", "First policy (sft)")):
        for stage in stages:
            if made_by(stage, command) and stage.metrics:
                held_out = stage.made.get("held_out", {})
                caption = "Negative log-likelihood per response token." if command == "sft" else "Bradley-Terry loss."
                if "accuracy" in held_out:
                    caption += (
                        f" Held out: right in {percent(held_out['accuracy'])} of {held_out['held_out_pairs']} pairs."
                    )
                svg = figures.training(f"{title}: loss", "nats", {stage.name: points(stage.metrics, "loss")})
                yield {"svg": svg, "caption": caption}


def made_by(stage: Stage, command: str) -> bool:
    return bool(stage.made.get("made_by") == f"rlhf_pipeline.{command}")


def points(lines: Sequence[Mapping[str, float]], key: str) -> list[tuple[float, float]]:
    return [(line["update"], line[key]) for line in lines if key in line]


def spans_decades(series: Mapping[str, Sequence[tuple[float, float]]]) -> bool:
    values = [value for of_run in series.values() for _, value in of_run]
    return min(values) > 0 and max(values) > 100 * min(values)
