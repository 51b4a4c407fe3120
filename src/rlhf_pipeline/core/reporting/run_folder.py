"""A run folder as the report reads it: what its files say, each of them optional.

runs/NAME/{recipe.yaml, timings.json, stop.json, world/, sft/, reward/, iteration_1/{responses, rewards, pairs,
policy}, ..., evaluation/{results.json, <policy>/{responses, <reward model>, log_probs}}}
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_pipeline.core import storage
from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.files import read_json
from rlhf_pipeline.core.progress import read_metrics
from rlhf_pipeline.core.reporting.evaluation import RESPONSES, RESULTS, Answers, read_answers

EVALUATION = "evaluation"
TIMINGS = "timings.json"
RECIPE = "recipe.yaml"
STOP = "stop.json"
METRICS = "metrics.jsonl"
FIRST_PARTS = ("world", "sft", "", "reward", "iteration", EVALUATION)
"""In which order a run makes them; "" stands for any other."""
SECOND_PARTS = ("responses", "rewards", "pairs", "policy")


@dataclass(frozen=True)
class Stage:
    """An output of the run. name: its path in the run folder, such as iteration_1/pairs."""

    name: str
    made: dict[str, Any]
    """provenance.json"""
    metrics: list[dict[str, Any]]
    """metrics.jsonl, of a training"""


@dataclass(frozen=True)
class Run:
    folder: Path
    results: dict[str, Any] | None
    """evaluation/results.json"""
    answers: dict[str, Answers]
    """{policy: what it answered} of the evaluated policies whose responses and rewards are still there"""
    stages: list[Stage]
    """In the order in which a run makes them; of the evaluation only the whole"""
    evaluated: list[Stage]
    """The evaluation's responses and rewards"""
    timings: dict[str, float]
    """{stage: seconds}"""
    recipe: str | None
    stopped: dict[str, Any] | None
    """Why iterate ended the run early: the iteration after which, of how many, the reasons, the best policy"""

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def early_end(self) -> list[str]:
        """A sentence on which stop rule ended the run, if one did."""
        if self.stopped is None:
            return []
        after, of, reasons = (self.stopped[key] for key in ("iteration", "of", "reasons"))
        return [f"A stop rule ended this run after iteration {after} of {of}: {'; '.join(reasons)}."]


def read_run(text: str) -> Run:
    """The run in the folder `text`. Raises BadUse if there is no such folder, or nothing of a run in it."""
    folder = Path(text).expanduser()
    if not folder.is_dir():
        raise BadUse(f"{text}: no such folder; expected a run folder such as runs/tiny.")
    evaluation = folder / EVALUATION
    results = read_json(evaluation / RESULTS)
    stages = sorted(find_stages(folder), key=lambda stage: order_of(stage.name))
    if results is None and not stages:
        raise BadUse(f"{text} holds nothing of a run: neither {EVALUATION}/{RESULTS} nor an output of any command.")
    names = [item["name"] for item in results["policies"]] if results else []
    recipe = folder / RECIPE
    return Run(
        folder=folder,
        results=results,
        answers={name: answers for name in names if (answers := answers_of(evaluation, name, results)) is not None},
        stages=[stage for stage in stages if not stage.name.startswith(f"{EVALUATION}/")],
        evaluated=[stage for stage in stages if stage.name.startswith(f"{EVALUATION}/")],
        timings=read_json(folder / TIMINGS) or {},
        recipe=recipe.read_text(encoding="utf-8") if recipe.exists() else None,
        stopped=read_json(folder / STOP),
    )


def find_stages(folder: Path) -> Iterator[Stage]:
    """Every output in a run folder, at most three folders deep; hidden folders hold unfinished ones."""
    for depth in ("*", "*/*", "*/*/*"):
        for path in folder.glob(f"{depth}/{storage.PROVENANCE}"):
            name = path.parent.relative_to(folder).as_posix()
            if not any(part.startswith(".") for part in name.split("/")):
                yield Stage(name, read_json(path), read_metrics(path.parent / METRICS))


def order_of(name: str) -> tuple[Any, ...]:
    first, *rest = name.split("/")
    numbered = re.fullmatch(r"(\D+)_(\d+)", first)
    kind, count = (numbered[1], int(numbered[2])) if numbered else (first, 0)
    place = FIRST_PARTS.index(kind) if kind in FIRST_PARTS else FIRST_PARTS.index("")
    second = SECOND_PARTS.index(rest[0]) if rest and rest[0] in SECOND_PARTS else len(SECOND_PARTS)
    return place, count, first, second, rest


def answers_of(evaluation: Path, policy: str, results: dict[str, Any] | None) -> Answers | None:
    """A policy's responses and rewards; None if a part of them has been removed. An ensemble has no file of its own."""
    judges = [name for name in (results or {})["reward_models"] if name != "ensemble"]
    if not all((evaluation / policy / part).is_dir() for part in (RESPONSES, *judges)):
        return None
    return read_answers(evaluation, policy, judges)
