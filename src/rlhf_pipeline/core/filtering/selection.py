"""From a prompt's N scored responses to its pairs: which responses survive, and which are set against each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

Select = Literal["best_worst", "best_random", "best_next", "all_pairs"]

FAULTS = ("without_reward", "truncated", "empty", "not_encodable", "too_long")
"""Why a response does not survive; of several faults the first counts."""
PROMPT_NOT_ENCODABLE, PROMPT_TOO_LONG = "prompt_not_encodable", "prompt_too_long"
NO_PAIR = ("tied", "same_text", "margin_too_small", "margin_too_large")
"""Why two surviving responses are no pair; of several reasons the first counts."""
REASONS = (PROMPT_NOT_ENCODABLE, PROMPT_TOO_LONG, *(f"response_{fault}" for fault in FAULTS), *NO_PAIR)
"""Why a prompt is dropped, each with one reason."""


@dataclass(frozen=True)
class Rules:
    """What filter's flags of the same names say. Margins in reward units."""

    maxlen: int
    min_responses: int
    select: Select = "best_worst"
    min_margin: float | None = None
    max_margin: float | None = None
    keep_truncated: bool = False
    keep_empty: bool = False
    null_reward: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Response:
    """length: tokens with the end of the turn; None where the chat template can't encode the text."""

    text: str
    reward: float | None
    length: int | None
    truncated: bool


@dataclass(frozen=True)
class Outcome:
    """What became of a prompt: `pairs` of (chosen, rejected) indices, or the `reason` why there is none.

    faults: {response index: its fault}. liftable: `min_responses` 2 would have kept the prompt. tied_best,
    tied_worst: several survivors share the highest, the lowest reward; the first of them counts.
    """

    pairs: tuple[tuple[int, int], ...]
    reason: str | None
    faults: dict[int, str]
    liftable: bool = False
    tied_best: bool = False
    tied_worst: bool = False


def select(responses: Sequence[Response], rules: Rules, prompt_id: str) -> Outcome:
    """The pairs of one prompt. `prompt_id` seeds the choice of best_random, so the order of prompts does not matter."""
    faults = {i: fault for i, response in enumerate(responses) if (fault := find_fault(response, rules))}
    survivors = [i for i in range(len(responses)) if i not in faults]
    if len(survivors) < rules.min_responses:
        first = min(faults.values(), key=FAULTS.index)
        liftable = len(survivors) >= 2 and bool(_pair_up(responses, survivors, rules, prompt_id)[0])
        return Outcome((), f"response_{first}", faults, liftable)
    pairs, reason = _pair_up(responses, survivors, rules, prompt_id)
    rewards = [reward_of(responses[i], rules) for i in survivors]
    return Outcome(
        tuple(pairs),
        reason,
        faults,
        tied_best=rewards.count(max(rewards)) > 1,
        tied_worst=rewards.count(min(rewards)) > 1,
    )


def find_fault(response: Response, rules: Rules) -> str | None:
    """The first of FAULTS that `response` has."""
    if not math.isfinite(reward_of(response, rules)):
        return "without_reward"
    if response.truncated and not rules.keep_truncated:
        return "truncated"
    if not response.text.strip() and not rules.keep_empty:
        return "empty"
    if response.length is None:
        return "not_encodable"
    return "too_long" if response.length > rules.maxlen else None


def reward_of(response: Response, rules: Rules) -> float:
    """The reward that counts; NaN for a response that has none."""
    if response.reward is not None and math.isfinite(response.reward):
        return response.reward
    return math.nan if rules.null_reward is None else rules.null_reward


def _pair_up(
    responses: Sequence[Response], survivors: Sequence[int], rules: Rules, prompt_id: str
) -> tuple[list[tuple[int, int]], str | None]:
    """(pairs, None), or ([], why best and worst, the two furthest apart, are none)."""

    def reward(i: int) -> float:
        return reward_of(responses[i], rules)

    def objection(chosen: int, rejected: int) -> str | None:
        margin = reward(chosen) - reward(rejected)
        if margin <= 0:
            return "tied"
        if responses[chosen].text == responses[rejected].text:
            return "same_text"
        if rules.min_margin is not None and margin < rules.min_margin:
            return "margin_too_small"
        too_large = rules.max_margin is not None and margin > rules.max_margin
        return "margin_too_large" if too_large else None

    best, worst = max(survivors, key=reward), min(survivors, key=reward)  # the first of equals, as numpy's argmax
    below = [i for i in survivors if objection(best, i) is None]
    pairs: list[tuple[int, int]] = []
    if rules.select == "all_pairs":
        pairs = [(i, j) for i in survivors for j in survivors if objection(i, j) is None]
    elif rules.select == "best_worst":
        pairs = [(best, worst)] * (objection(best, worst) is None)
    elif below and rules.select == "best_random":
        pairs = [(best, Random(f"{rules.seed} {prompt_id}").choice(below))]
    elif below:
        pairs = [(best, max(below, key=reward))]
    return pairs, None if pairs else objection(best, worst)
