"""Log-probs of pairs through the engine: with gradients for a micro-batch, without for a whole split."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rlhf_pipeline.core.batches import Batch, MicroBatch, collate, plan_calls
from rlhf_pipeline.core.logps import response_logps
from rlhf_pipeline.core.training.distributed import Engine, sum_over_ranks
from rlhf_pipeline.core.training.losses import Pairs
from rlhf_pipeline.core.training.pairs import PairData

Logps = npt.NDArray[np.float64]
"""(n, 2): natural-log probabilities of the chosen and of the rejected response, nats."""


@dataclass(frozen=True)
class Limits:
    """How much one engine call may hold; changes speed and memory, not results."""

    max_pairs: int | None
    max_tokens: int | None
    """Tokens that are computed, padding included."""


@dataclass(frozen=True)
class Split:
    """Pairs, what the reference says of them, and the same for their mismatched counterparts (KTO)."""

    data: PairData
    reference: Logps | None
    mismatched: PairData | None = None
    mismatched_reference: Logps | None = None


def mismatch(data: PairData) -> PairData:
    """Every prompt with the responses to another: those half the split away, as neighbours may share a prompt."""
    half = len(data) // 2

    def turned(responses: list[Any]) -> list[Any]:
        return responses[half:] + responses[:half]

    return dataclasses.replace(data, chosen=turned(data.chosen), rejected=turned(data.rejected))


def plan_pairs(
    engine: Engine, data: PairData, indices: npt.NDArray[np.int64], limits: Limits
) -> list[list[MicroBatch]]:
    """`plan_calls` of the pairs `indices`; a micro-batch's own indices count in `indices`."""
    return plan_calls(
        data.lengths(packed=engine.packed)[indices],
        world_size=engine.world_size,
        max_pairs=limits.max_pairs,
        max_tokens=limits.max_tokens,
        packed=engine.packed,
    )


def pair_batch(engine: Engine, data: PairData, indices: Sequence[int]) -> Batch:
    """The b chosen, then the b rejected responses of `indices` with their prompts: 2b sequences."""
    prompts = [data.prompt[i] for i in indices]
    responses = [data.chosen[i] for i in indices] + [data.rejected[i] for i in indices]
    return collate(prompts + prompts, responses, packed=engine.packed, device=engine.device)


def pair_logps(
    engine: Engine, data: PairData, indices: Sequence[int], temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(chosen, rejected) log-probs, each (b,) in nats, of the b pairs `indices`, in one engine call."""
    logps = response_logps(engine.model, pair_batch(engine, data, indices), temperature)
    chosen, rejected = logps.chunk(2)
    return chosen, rejected


def split_logps(
    engine: Engine,
    data: PairData,
    indices: npt.NDArray[np.int64],
    *,
    temperature: float,
    limits: Limits,
    advance: Callable[[int], None] = lambda count: None,
) -> Logps:
    """(len(indices), 2) log-probs of those pairs, spread over all ranks, the same on each."""
    return split_pass(
        engine, data, indices, lambda rows: pair_logps(engine, data, rows, temperature), limits=limits, advance=advance
    )


@torch.no_grad()
def split_pass(
    engine: Engine,
    data: PairData,
    indices: npt.NDArray[np.int64],
    compute: Callable[[Sequence[int]], tuple[torch.Tensor, torch.Tensor]],
    *,
    limits: Limits,
    advance: Callable[[int], None] = lambda count: None,
) -> npt.NDArray[np.float64]:
    """(len(indices), 2) of what `compute` says of the (chosen, rejected) of some rows, the same on each rank.

    Collective; `compute` makes one engine call, and every rank makes as many of them.
    """
    plan = plan_pairs(engine, data, indices, limits)
    result = torch.zeros(len(indices), 2, dtype=torch.float64, device=engine.device)
    was_training = engine.model.training
    engine.model.eval()
    for turn, call in enumerate(plan[engine.rank]):
        rows = list(call.indices)
        chosen, rejected = compute(indices[rows].tolist())
        if call.weight:
            result[rows] = torch.stack([chosen, rejected], dim=1).double()
        advance(sum(len(rank[turn].indices) for rank in plan if rank[turn].weight))
    engine.model.train(was_training)
    return sum_over_ranks(engine.accelerator, result).cpu().numpy()


def mismatched_log_ratio(
    engine: Engine, split: Split, indices: npt.NDArray[np.int64], *, temperature: float, limits: Limits
) -> float | None:
    """Mean log_ratio, nats, of the mismatched counterparts of `indices` over all ranks; None where not asked for."""
    if split.mismatched is None or split.mismatched_reference is None:
        return None
    logps = split_logps(engine, split.mismatched, indices, temperature=temperature, limits=limits)
    return float((logps - split.mismatched_reference[indices]).mean())


def as_pairs(
    split: Split,
    indices: Sequence[int],
    logps: tuple[torch.Tensor, torch.Tensor],
    mismatched: float | None,
) -> Pairs:
    """What a loss sees of the pairs `indices`: float32, on the device of `logps`."""
    rows = list(indices)
    data, reference = split.data, split.reference

    def tensor(values: npt.NDArray[Any]) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.float32, device=logps[0].device)

    return Pairs(
        chosen_logp=logps[0],
        rejected_logp=logps[1],
        chosen_length=tensor(np.array([len(data.chosen[i]) for i in rows])),
        rejected_length=tensor(np.array([len(data.rejected[i]) for i in rows])),
        chosen_reward=tensor(data.chosen_reward[rows]),
        rejected_reward=tensor(data.rejected_reward[rows]),
        chosen_reference_logp=None if reference is None else tensor(reference[rows, 0]),
        rejected_reference_logp=None if reference is None else tensor(reference[rows, 1]),
        rewards=None if data.rewards is None else tensor(data.rewards[rows]),
        mismatched_log_ratio=mismatched,
    )
