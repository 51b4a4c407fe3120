"""Held-out log-probs, one update, the same log-probs, a saved policy; test_logps.py runs it in several launches.

python one_update.py START OUTPUT [ATTENTION]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from rlhf_pipeline.core.batches import MicroBatch, collate, plan_calls
from rlhf_pipeline.core.logps import install, response_logps, token_logps
from rlhf_pipeline.core.models import load_policy, save_policy
from rlhf_pipeline.core.training import distributed
from rlhf_pipeline.core.training.optim import make_optimizer

PAIRS = 7
"""Odd, so that with one pair a call one of two ranks has a call of weight 0."""


def sequences(count: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (count,), generator=generator).tolist()
    return [torch.randint(3, 400, (length,), generator=generator).tolist() for length in lengths]


def main(start: Path, output: Path, attention: str = "sdpa") -> None:
    accelerator = distributed.make_accelerator(max_grad_norm=None)
    model: Any = load_policy(start, dtype=torch.float32, attn_implementation=attention)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    install(model)
    optimizer = make_optimizer(model.parameters(), lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    head_fetches = count_head_fetches(accelerator.unwrap_model(model).get_output_embeddings())

    packed = attention == "packed"
    held_out = collate(sequences(6, 1), sequences(6, 2), packed=packed)
    prompts, chosen, rejected = sequences(PAIRS, 3), sequences(PAIRS, 4), sequences(PAIRS, 5)
    lengths = [[len(p) + len(c), len(p) + len(r)] for p, c, r in zip(prompts, chosen, rejected, strict=True)]
    plan = plan_calls(lengths, world_size=accelerator.num_processes, max_pairs=1, packed=packed)
    losses = torch.zeros(())

    def loss_of(call: MicroBatch) -> torch.Tensor:
        mine = [prompts[i] for i in call.indices]
        responses = [chosen[i] for i in call.indices] + [rejected[i] for i in call.indices]
        better, worse = response_logps(model, collate(mine + mine, responses, packed=packed), 0.8).chunk(2)
        loss = call.weight * (better - worse - 5.0).square().sum() / PAIRS
        losses.add_(loss.detach())
        return loss

    with torch.no_grad():
        before = token_logps(model, held_out, 0.8)
    fetches_before = len(head_fetches)
    calls = plan[accelerator.process_index]
    engine = distributed.Engine(accelerator, model, optimizer)
    norm = distributed.one_update(engine, calls, loss_of, max_grad_norm=None)
    fetches_per_call = (len(head_fetches) - fetches_before) / len(calls)
    with torch.no_grad():
        after = token_logps(model, held_out, 0.8)
    loss = distributed.sum_over_ranks(accelerator, losses)
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        save_policy(accelerator.unwrap_model(model), weights, start=start, folder=output / "policy")
        result = {"before": before, "after": after, "loss": loss, "norm": norm, "fetches": fetches_per_call}
        torch.save(result, output / "result.pt")
    distributed.clean_exit(accelerator)


def count_head_fetches(head: torch.nn.Module) -> list[int]:
    """A list that grows by one whenever DeepSpeed gathers the head's partitioned weight."""
    fetches: list[int] = []
    if not hasattr(head.weight, "ds_id"):
        return fetches
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    fetch = PartitionedParameterCoordinator.fetch_sub_module

    def counting(self: Any, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if module is head:
            fetches.append(1)
        return fetch(self, module, *args, **kwargs)

    PartitionedParameterCoordinator.fetch_sub_module = counting
    return fetches


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
