"""The report: one HTML page that opens from disk, without a network and without a script."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_pipeline.core.progress import duration
from rlhf_pipeline.core.reporting import evaluation, figures, samples
from rlhf_pipeline.core.reporting.evaluation import Answers
from rlhf_pipeline.core.reporting.page_figures import sections_of, shown
from rlhf_pipeline.core.reporting.run_folder import Run, Stage
from rlhf_pipeline.core.reporting.verdict import (
    Summary,
    best,
    change,
    digits_for,
    judge_of,
    number,
    percent,
    proxy_of,
    spoken,
)

ENGINE_WORDS = ("name", "version", "kind", "zero_stage", "world_size", "device", "dtype")
TRAINERS = ("sft", "reward", "train")
Item = dict[str, Any]


def render(template: str, **values: Any) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("rlhf_pipeline.core.reporting", "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def render_run(run: Run, summary: Summary | None) -> str:
    """The page of one run; `summary` is None for a run without an evaluation."""
    answers = evaluation.align(list(run.answers.values())) if len(run.answers) > 1 else []
    values: Item = {
        "title": f"{run.name}: RLHF report",
        "kicker": f"RLHF report of the run {run.name}",
        "headline": "This run has not been evaluated yet.",
        "sentences": ["Run rlhf_pipeline.evaluate into its folder evaluation, then this report again."],
        "judges": [],
        "tiles": [],
        "warnings": [],
        "table": None,
        "table_intro": "",
        "samples": [],
        "notes": [],
        "sections": list(sections_of(run, summary, answers)),
        "rows": [item for stage in run.stages if (item := rows_of(stage)) is not None],
        "timings": bars_of(run.timings),
        "total_time": duration(sum(run.timings.values())),
        "lineage": [lineage_of(stage) for stage in run.stages],
        "recipe": run.recipe,
        "versions": versions_of(run),
    }
    if summary is not None:
        first, *rest = summary["headline"]
        values |= {
            "headline": first,
            "sentences": [*rest, *run.early_end],
            "judges": judges_of(run, summary),
            "tiles": tiles_of(summary),
            "warnings": [warning["text"] for warning in summary["warnings"]],
            "table": table_of(summary),
            "table_intro": (
                f"{summary['prompts']:,} prompts that training never saw, {summary['responses_per_prompt']} responses "
                f"to each. Below every mean stands its 95 % interval; wins are against {summary['baseline']}."
            ),
            "samples": samples_of(summary, answers),
            "notes": notes_of(summary, run),
        }
    return render("run.html", **values)


# The first screen


def judges_of(run: Run, summary: Summary) -> list[Item]:
    """What each reward model is, in words."""
    models = summary["reward_models"]
    whole = next((stage for stage in run.stages if stage.name == "evaluation"), None)
    inputs = whole.made["inputs"] if whole else {}
    items = []
    for name in models:
        role = "a further judge"
        if name == "ensemble":
            role = "the mean of several, each on its own scale"
        elif len(models) > 1 and name == models[0]:
            role = "what training tried to raise"
        elif name == judge_of(summary):
            role = "the judge to believe" if len(models) > 1 else "what training tried to raise, and the only judge"
        known = inputs.get(f"reward model {name}")
        source = f" ({known['ref']})" if known else ""
        items.append({"name": name, "text": f"{role}{source}", "color": figures.color_of(models, name)})
    return items


def tiles_of(summary: Summary) -> list[Item]:
    rows, models = summary["policies"], summary["reward_models"]
    if len(rows) == 1:
        return []
    start, top = rows[0], best(summary)
    top = rows[1] if top is start else top
    tiles = []
    for name in dict.fromkeys((judge_of(summary), proxy_of(summary))):
        digits = digits_for([row[name] for row in rows])
        before, after = number(start[name]["mean"], digits), number(top[name]["mean"], digits)
        tiles.append(
            {
                "what": f"{name}, {start['name']} to {spoken(top)}",
                "big": f"{before} \N{RIGHTWARDS ARROW} {after}",
                "small": change(top[f"gain_{name}"]),
                "color": figures.color_of(models, name),
            }
        )
    judge = judge_of(summary)
    wins, equal = top[f"win_rate_{judge}"], top[f"length_controlled_win_rate_{judge}"]
    tiles.append(
        {
            "what": f"comparisons won by {judge}",
            "big": percent(wins["mean"]),
            "small": f"{percent(equal['mean'])} at equal length",
            "color": figures.color_of(models, judge),
        }
    )
    longer = f"length {start['length']:.1f} \N{RIGHTWARDS ARROW} {top['length']:.1f} tokens"
    if top["kl"] is not None:
        tiles.append(
            {
                "what": "distance from the start (KL)",
                "big": f"{number(top['kl'], 2)} nats",
                "small": longer,
                "color": figures.START,
            }
        )
    return tiles


def table_of(summary: Summary) -> Item:
    """Columns and rows of the table; every number carries the key under which summary.json has it."""
    rows, models = summary["policies"], summary["reward_models"]
    columns = [{"title": name, "hint": "mean reward"} for name in models]
    columns += [
        {"title": f"wins by {name}", "hint": "share of comparisons with the start that are won"} for name in models
    ]
    columns += [
        {"title": title, "hint": hint}
        for title, hint in (
            ("KL", "to the start, nats per response, by the estimator k1"),
            ("length", "mean tokens of a response"),
            ("cut off", "share of the responses that reached the length limit"),
            ("repeated", "share of the sentences that stood before in their response"),
            ("distinct-2", "different word pairs among all word pairs"),
        )
    ]
    digits = {name: digits_for([row[name] for row in rows]) for name in models}
    lines = []
    for row in rows:
        cells = [interval_cell(name, row[name], digits[name]) for name in models]
        cells += [interval_cell(f"win_rate_{name}", row[f"win_rate_{name}"], 1, share=True) for name in models]
        kl = scalar_cell("kl", row["kl"], 2)
        if row["kl"] is not None:
            kl["error"] = {"key": "kl_standard_error", "text": number(row["kl_standard_error"], 2), "percent": False}
        cells += [
            kl,
            scalar_cell("length", row["length"], 1),
            scalar_cell("truncated", row["truncated"], 1, share=True),
            scalar_cell("repeated", row["repeated"], 1, share=True),
            scalar_cell("distinct_2", row["distinct_2"], 3),
        ]
        for column, cell in zip(columns, cells, strict=True):
            cell["label"] = column["title"]
        lines.append(
            {"name": row["name"], "label": row["name"], "best": row["name"] == summary["best"], "cells": cells}
        )
    return {"columns": columns, "rows": lines}


def interval_cell(key: str, item: Mapping[str, float] | None, digits: int, *, share: bool = False) -> Item:
    if item is None:
        return {"main": None, "low": None, "error": None}
    cell: Item = {"error": None}
    for place, part in (("main", "mean"), ("low", "low"), ("high", "high")):
        value = 100 * item[part] if share else item[part]
        cell[place] = {"key": f"{key}.{part}", "text": number(value, digits), "percent": share}
    return cell


def scalar_cell(key: str, value: float | None, digits: int, *, share: bool = False) -> Item:
    main = None
    if value is not None:
        main = {"key": key, "text": number(100 * value if share else value, digits), "percent": share}
    return {"main": main, "low": None, "error": None}


# Samples


def samples_of(summary: Summary, answers: Sequence[Answers]) -> list[Item]:
    chosen = [item for name in shown(summary) for item in answers if item.policy == name] if len(answers) > 1 else []
    models = summary["reward_models"]
    if len(chosen) < 2 or judge_of(summary) not in chosen[0].rewards:
        return []
    digits = {name: digits_for([row[name] for row in summary["policies"]]) for name in models}
    groups = samples.choose(chosen, proxy=proxy_of(summary), judge=judge_of(summary))
    return [
        {
            "heading": heading,
            "samples": [
                {
                    "prompt": sample.prompt,
                    "responses": [
                        {
                            "policy": response.policy,
                            "text": response.text,
                            "tokens": response.tokens,
                            "truncated": response.truncated,
                            "chips": [
                                {
                                    "name": name,
                                    "text": number(reward, digits[name]),
                                    "color": figures.color_of(models, name),
                                }
                                for name, reward in response.rewards.items()
                            ],
                        }
                        for response in sample.responses
                    ],
                }
                for sample in group
            ],
        }
        for heading, group in groups.items()
        if group
    ]


# Rows, time, lineage


def rows_of(stage: Stage) -> Item | None:
    made = stage.made
    if not made.get("rows_in"):
        return None
    out = made["rows_out"]
    text = ", ".join(f"{count:,} {name}" for name, count in out.items()) if isinstance(out, Mapping) else f"{out:,}"
    if made["made_by"].removeprefix("rlhf_pipeline.") in TRAINERS:
        text += " learnt from"  # several times each, over the epochs
    return {"name": stage.name, "rows_in": f"{made['rows_in']:,}", "rows_out": text, "notes": list(row_notes(made))}


def row_notes(made: Mapping[str, Any]) -> Iterator[str]:
    for reason, count in made["dropped"].items():
        if count:
            yield f"{count:,} dropped: {reason}"
    for fault, count in made.get("responses_not_surviving", {}).items():
        yield f"{count:,} responses did not survive: {fault}"
    responses = made.get("responses")
    if isinstance(responses, Mapping):
        yield f"mean length {responses['mean_length']:.1f} tokens, {percent(responses['truncated'])} truncated"
    report = made.get("reward_report")
    if report and report["mean"] is not None:
        best = report["best_of_n"]  # None: no prompt has two rewards
        more = "" if best is None else f", best of {number(best, 3)} on average"
        yield f"mean reward {number(report['mean'], 3)}{more}"
        within = report.get("length_correlation_within_prompt")
        if within is not None:
            yield f"reward and length correlate at {number(within, 2)} within a prompt"
        if report["nulls"]:
            yield f"{report['nulls']:,} responses got no reward"
    margin = made.get("data", {}).get("reward_margin")
    if margin:
        yield f"mean margin of a pair {number(margin['mean'], 3)}"


def bars_of(timings: Mapping[str, float]) -> list[Item]:
    longest = max(timings.values(), default=1.0)
    return [
        {"name": name, "text": duration(seconds), "percent": f"{100 * seconds / max(longest, 1e-9):.1f}"}
        for name, seconds in timings.items()
    ]


def lineage_of(stage: Stage) -> Item:
    made = stage.made
    engine = engine_text(made.get("engine", {}))
    return {
        "name": stage.name,
        "summary": made.get("made_by", "").removeprefix("rlhf_pipeline.") + (f", {engine}" if engine else ""),
        "command": made.get("command_line", ""),
        "inputs": [input_text(name, item) for name, item in made.get("inputs", {}).items()],
    }


def engine_text(engine: Mapping[str, Any]) -> str:
    words = []
    for key in ENGINE_WORDS:
        value = engine.get(key)
        if value is not None and value != "none":
            words.append(f"{key.replace('_', ' ')} {value}" if key in ("zero_stage", "world_size") else str(value))
    return ", ".join(words)


def input_text(name: str, item: Any) -> str:
    if not isinstance(item, Mapping):
        return f"{name}: {item}"
    rows = f", {item['rows']:,} rows" if item.get("rows") is not None else ""
    return f"{name}: {item.get('ref', '')}{rows}, fingerprint {str(item.get('fingerprint', ''))[:16]}"


def versions_of(run: Run) -> str:
    """Of the last output that says; of all of them if they differ."""
    seen: dict[str, dict[str, None]] = {}
    for stage in run.stages:
        for name, version in stage.made.get("versions", {}).items():
            seen.setdefault(name, {})[version] = None
    return ", ".join(f"{name} {' and '.join(found)}" for name, found in seen.items())


def notes_of(summary: Summary, run: Run | None = None) -> list[str]:
    notes = [
        "Intervals come from resampling prompts 2,000 times (percentile bootstrap); gains pair the policies by prompt. "
        "They are 95 % each and not corrected for the number of comparisons: of twenty, one misses by chance.",
        "A win rate compares every response with every response of the start to the same prompt; a tie is half a win. "
        "At equal length: the minimal form of AlpacaEval 2's length-controlled win rate, fitted to these prompts.",
        "KL is estimated by k1, the mean log-ratio of the policy's own responses at the sampling temperature; its "
        "standard error is over prompts. summary.json has the estimator k3 beside it.",
        "The best policy is chosen on the prompts that its numbers come from, which flatters it a little.",
        "distinct-2 depends on how much text there is: compare policies of this table only.",
    ]
    sampling = (run.results or {}).get("sampling") if run else None
    if sampling and sampling["top_p"] < 1:
        notes.append(
            f"Responses were sampled at temperature {sampling['temperature']:g} with top-p {sampling['top_p']:g}; the "
            "KL is that of the policies without top-p, estimated on these samples."
        )
    if summary["prompts_left_out"]:
        notes.append(f"{summary['prompts_left_out']:,} prompts are left out, as not every policy answered them.")
    return notes
