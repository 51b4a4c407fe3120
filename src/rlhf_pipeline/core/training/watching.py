"""What train writes of every update: the means of quantities per pair, and what REBEL's target amounts to."""

from __future__ import annotations

import torch

from rlhf_pipeline.core.training.losses import Loss, Pairs, Rebel

SATURATED = 0.1
"""A log_ratio_gap below this share of what REBEL asks for is far from it: its loss is nearly linear there."""
WATCHED = (
    "loss",
    "log_ratio_gap",
    "reward_margin",
    "accuracy",
    "chosen_log_ratio",
    "rejected_log_ratio",
    "chosen_logp",
    "rejected_logp",
    "chosen_length",
    "rejected_length",
)
"""Per-pair quantities whose means are written for every update; docs/metrics.md explains each."""


def watch(pairs: Pairs, values: torch.Tensor) -> torch.Tensor:
    """(len(WATCHED),) float64 sums over the pairs of a micro-batch; log-ratios are 0 for a loss without a reference."""
    chosen = rejected = torch.zeros_like(values)
    gap = pairs.chosen_logp - pairs.rejected_logp
    if pairs.chosen_reference_logp is not None:
        chosen, rejected, gap = pairs.chosen_log_ratio, pairs.rejected_log_ratio, pairs.log_ratio_gap
    columns = (
        values,
        gap,
        pairs.reward_margin,
        (gap > 0).float(),
        chosen,
        rejected,
        pairs.chosen_logp,
        pairs.rejected_logp,
        pairs.chosen_length,
        pairs.rejected_length,
    )
    return torch.stack([column.detach().double().sum() for column in columns])


def means(sums: torch.Tensor, pairs: int, loss: Loss) -> dict[str, float]:
    """What is written of an update of `pairs` pairs whose `watch` adds up to `sums`, and what follows from it."""
    numbers = {name: value / pairs for name, value in zip(WATCHED, sums.tolist(), strict=True)}
    if loss.needs_reference:
        numbers["kl"] = -(numbers["chosen_log_ratio"] + numbers["rejected_log_ratio"]) / 2
    if isinstance(loss, Rebel):
        numbers["target_gap"] = loss.eta * numbers["reward_margin"]
    return numbers


def judge_target(numbers: dict[str, float]) -> str | None:
    """Whether REBEL asked for a gap that can be reached, judged by its last update; None for another loss."""
    if "target_gap" not in numbers:
        return None
    asked, found = numbers["target_gap"], numbers["log_ratio_gap"]
    saturated = found < asked * SATURATED
    meaning = (
        "saturated: the learning rate alone sets the pace" if saturated else "reachable: eta holds the policy back"
    )
    return f"eta x margin asks for {asked:.4g} nats, the log_ratio_gap is {found:.4g}, {meaning}"
