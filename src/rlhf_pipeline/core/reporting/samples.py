"""Which responses a report shows: some drawn at random, and those on which most depends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt

from rlhf_pipeline.core.reporting.evaluation import Answers

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Response:
    policy: str
    text: str
    rewards: dict[str, float]
    """Of the reward models that gave one."""
    tokens: int
    truncated: bool


@dataclass(frozen=True)
class Sample:
    prompt: str
    responses: list[Response]
    """One of each policy."""


def choose(
    answers: Sequence[Answers], *, proxy: str, judge: str, count: int = 3, seed: int = 0
) -> dict[str, list[Sample]]:
    """{heading: samples}. answers: aligned, the start's first, then the best policy's, then the last's if another.

    Response i is set beside response i. gain: of the best policy over the start by the judge. disagreement: of the
    last policy's gain by proxy and by judge, each in standard deviations.
    """
    start, best, last = answers[0], answers[1], answers[-1]
    rng = Random(seed)
    rows, columns = start.rewards[judge].shape
    drawn = [(row, rng.randrange(columns)) for row in sorted(rng.sample(range(rows), min(count, rows)))]
    gain = best.rewards[judge] - start.rewards[judge]
    groups = {
        "Drawn at random": drawn,
        f"Where {best.policy} gained most by {judge}": top(gain, count),
        f"Where {best.policy} lost most by {judge}": top(-gain, count, above=0.0),
    }
    if proxy != judge:
        apart = in_deviations(last.rewards[proxy] - start.rewards[proxy]) - in_deviations(
            last.rewards[judge] - start.rewards[judge]
        )
        groups[f"Where {proxy} likes {last.policy} better than {judge} does"] = top(apart, count)
    return {
        heading: [make_sample(answers, row, column) for row, column in places] for heading, places in groups.items()
    }


def top(values: Floats, count: int, *, above: float = -np.inf) -> list[tuple[int, int]]:
    """(row, column) of the greatest values over `above`, greatest first, one per row; nan is no value."""
    known = np.where(np.isnan(values), -np.inf, values)
    columns = known.argmax(axis=1)
    heights = known[np.arange(len(known)), columns]
    order = np.argsort(-heights, kind="stable")[:count]
    return [(int(row), int(columns[row])) for row in order if heights[row] > above]


def in_deviations(values: Floats) -> Floats:
    spread = float(np.nanstd(values))
    return values / spread if spread > 0 else np.zeros_like(values)


def make_sample(answers: Sequence[Answers], row: int, column: int) -> Sample:
    return Sample(text_of(answers[0].prompts[row]), [make_response(item, row, column) for item in answers])


def make_response(item: Answers, row: int, column: int) -> Response:
    given = {name: float(values[row, column]) for name, values in item.rewards.items()}
    return Response(
        policy=item.policy,
        text=item.texts[row][column],
        rewards={name: reward for name, reward in given.items() if not np.isnan(reward)},
        tokens=int(item.lengths[row, column]),
        truncated=bool(item.truncated[row, column]),
    )


def text_of(prompt: Any) -> str:
    """A prompt to read: a conversation as its turns, one below the other."""
    if isinstance(prompt, str):
        return prompt
    turns = [f"{turn['role']}: {turn['content']}" for turn in prompt]
    return turns[0].partition(": ")[2] if len(turns) == 1 else "\n\n".join(turns)
