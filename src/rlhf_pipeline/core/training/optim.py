"""The optimizer and its schedule, both the same in every launch mode."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch

from rlhf_pipeline.core.command import BadUse

OptimizerName = Literal["adamw", "adam"]
Schedule = Literal["cosine", "constant"]


def make_optimizer(
    parameters: Iterable[torch.nn.Parameter],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 1e-6,
    kind: OptimizerName = "adamw",
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101, algorithm 2) on every trainable parameter.

    "adam" is the same without weight decay (Kingma and Ba 2014, arXiv 1412.6980, algorithm 1). The defaults
    are those REBEL was trained with.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if kind == "adam":
        return torch.optim.Adam(trainable, lr=lr, betas=betas, eps=eps)
    return torch.optim.AdamW(trainable, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


def count_updates(seen: int, batch_size: int, what: str) -> tuple[int, int]:
    """(whole updates of `seen` rows, rows in the incomplete last one, which is dropped).

    Raises BadUse for fewer rows than one update; `what` is the beginning of its sentence.
    """
    if seen < batch_size:
        raise BadUse(
            f"{what}, fewer than one update of {batch_size}: pass --batch_size {max(1, seen)} or less, or more data."
        )
    return seen // batch_size, seen % batch_size


def learning_rate(
    update: int, total_updates: int, *, peak: float, warmup_ratio: float, schedule: Schedule = "cosine"
) -> float:
    """The learning rate of update `update` = 0, 1, ..., total_updates - 1.

    It rises linearly from 0 over the first int(total_updates * warmup_ratio) updates, so with any warm-up the
    first update moves nothing, and then falls as half a cosine that would reach 0 at `total_updates`: the
    schedule of REBEL's code. A function of the update alone: a resumed run needs no schedule state.
    """
    warmup = int(total_updates * warmup_ratio)
    if update < warmup:
        return peak * update / warmup
    if schedule == "constant":
        return peak
    progress = (update - warmup) / max(1, total_updates - warmup)
    return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
