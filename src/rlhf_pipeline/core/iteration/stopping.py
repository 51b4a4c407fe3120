"""When a run should stop: rules over the held-out numbers of its policies, after each iteration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from rlhf_pipeline.core.command import BadUse, What

Row = Mapping[str, Any]
"""A policy's numbers, as summary.json has them."""


@dataclass(frozen=True)
class Rules:
    reward: What[str | None] = None
    """The reward model of evaluate that judges. None: the second, which is the one to believe, else the first."""
    reward_fall: What[float | None] = None
    """Stop when the mean reward is more than this below the best policy's so far, in reward units; 0: at any fall."""
    kl: What[float | None] = None
    """Stop when the KL to the starting policy passes this, in nats per response."""
    length: What[float | None] = None
    """Stop when responses are on average longer than this factor times the starting policy's."""
    repeated: What[float | None] = None
    """Stop when more than this share of sentences stood before in the same response."""
    truncated: What[float | None] = None
    """Stop when more than this share of responses is cut off at the length limit."""

    @property
    def are_set(self) -> bool:
        return any(getattr(self, field.name) is not None for field in fields(self) if field.name != "reward")


@dataclass(frozen=True)
class Stop:
    iteration: int
    reasons: tuple[str, ...]
    """In words, with the number, the limit and the flag."""


def check_values(rules: Rules) -> None:
    """Raise BadUse for limits that can't be meant."""
    for name, least in (("reward_fall", 0.0), ("kl", 0.0), ("length", 1.0), ("repeated", 0.0), ("truncated", 0.0)):
        value = getattr(rules, name)
        if value is not None and value < least:
            raise BadUse(f"--stop.{name} is {value:g}; expected {least:g} or more.")
    for name in ("repeated", "truncated"):
        value = getattr(rules, name)
        if value is not None and value >= 1:
            raise BadUse(f"--stop.{name} is {value:g}; expected a share below 1, which no policy can pass otherwise.")


def judge_of(rules: Rules, reward_models: Sequence[str]) -> str:
    """The reward model that judges. Raises BadUse for one that evaluate doesn't have."""
    if rules.reward is None:
        return reward_models[:2][-1]
    if rules.reward not in reward_models:
        raise BadUse(f"--stop.reward {rules.reward} is none of evaluate's reward models {', '.join(reward_models)}.")
    return rules.reward


def first_stop(rules: Rules, rows: Sequence[Row], judge: str) -> Stop | None:
    """The first iteration at which a rule fires. rows: of the starting policy and of iteration 1, 2, ..."""
    for iteration in range(1, len(rows)):
        reasons = tuple(reasons_after(rules, rows[: iteration + 1], judge))
        if reasons:
            return Stop(iteration, reasons)
    return None


def reasons_after(rules: Rules, rows: Sequence[Row], judge: str) -> Iterator[str]:
    """Why to stop after the last of `rows`."""
    start, row = rows[0], rows[-1]
    if rules.reward_fall is not None:
        top = max(rows[:-1], key=lambda earlier: earlier[judge]["mean"])
        fall = top[judge]["mean"] - row[judge]["mean"]
        if fall > rules.reward_fall:
            yield (
                f"{judge} fell to {row[judge]['mean']:.3g}, {fall:.3g} below {top['name']}'s {top[judge]['mean']:.3g} "
                f"(--stop.reward_fall {rules.reward_fall:g})"
            )
    if rules.kl is not None and row["kl"] > rules.kl:
        yield f"the KL to {start['name']} is {row['kl']:.3g} nats (--stop.kl {rules.kl:g})"
    if rules.length is not None and row["length"] > rules.length * start["length"]:
        times = row["length"] / start["length"]
        yield (
            f"responses are {times:.2f} times as long as {start['name']}'s, {row['length']:.1f} against "
            f"{start['length']:.1f} tokens (--stop.length {rules.length:g})"
        )
    for name, what in (("repeated", "sentences stood before in the same response"), ("truncated", "responses are cut")):
        limit = getattr(rules, name)
        if limit is not None and row[name] > limit:
            yield f"{row[name]:.1%} of {what} (--stop.{name} {limit:g})"


def best(rows: Sequence[Row], judge: str, stop: Stop | None) -> int:
    """The iteration (0: the start) of the highest mean reward among those before a rule fired; of equals the first."""
    kept = range(len(rows) if stop is None else stop.iteration)
    return max(kept, key=lambda t: rows[t][judge]["mean"])
