"""Llama-3 shapes with random weights on one CUDA GPU: our calls against fixed blocks, by the best attention there is.

`benchmarks/train.py --gpu` runs it. The 1B model makes whole updates of float32 weights under bf16 autocast; the 8B
model, whose optimizer one GPU does not hold, forward and backward in bf16 with gradient checkpointing. Tokens are real
ones, padding not counted. The FLOPs of MFU are those that the pairs need, whoever computes more: 6 for each weight and
token, a pair's prompt counted once, the head's for response tokens alone, and 6 H (L + 1) for a layer's attention in a
sequence of L tokens; what checkpointing computes again does not count.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

CALL_TOKENS = 16_384
BLOCKS = (1024, 2048)
TEMPERATURE = 0.8
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}
"""Dense bf16, from the makers' data sheets."""


@dataclass(frozen=True)
class Size:
    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    tied: bool
    updates: bool
    """whole updates with an optimizer, or forward and backward alone"""
    vocabulary: int = 128_256


SIZES = {
    "1B": Size(2048, 8192, 16, 32, 8, tied=True, updates=True),
    "8B": Size(4096, 14336, 32, 32, 8, tied=False, updates=False),
}


def make_config(size: Size) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_heads,
        tie_word_embeddings=size.tied,
        max_position_embeddings=8192,
        pad_token_id=0,
    )


def make_engine(size: Size, attention: str, device: torch.device) -> Any:
    """The model as train would have it in one process, in its launch's numbers."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from transformers import AutoModelForCausalLM

    from rlhf_pipeline.core.attention import register, takes_packed_rows
    from rlhf_pipeline.core.logps import install
    from rlhf_pipeline.core.training.distributed import Engine
    from rlhf_pipeline.core.training.optim import make_optimizer

    register()
    dtype = torch.float32 if size.updates else torch.bfloat16
    with device:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(make_config(size), dtype=dtype, attn_implementation=attention)
    model.train()
    install(model)
    if not size.updates:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    AcceleratorState._reset_state(reset_partial_state=True)  # each model has its own precision
    accelerator = Accelerator(mixed_precision="bf16" if size.updates else "no", cpu=device.type == "cpu")
    optimizer = make_optimizer(model.parameters(), lr=1e-6) if size.updates else None
    packed = takes_packed_rows(model)
    if optimizer is not None:
        model, optimizer = accelerator.prepare(model, optimizer)
    return Engine(accelerator, model, optimizer, packed)


def our_calls(engine: Any, pairs: Sequence[Any], tokens: int) -> list[Callable[[], torch.Tensor]]:
    """The sum of the log-probs of each call that train would plan."""
    from rlhf_pipeline.core.batches import collate, plan_calls
    from rlhf_pipeline.core.logps import response_logps

    def compute(indices: Sequence[int]) -> torch.Tensor:
        mine = [pairs[i] for i in indices]
        prompts = [pair.prompt for pair in mine]
        responses = [pair.chosen for pair in mine] + [pair.rejected for pair in mine]
        batch = collate(prompts + prompts, responses, packed=engine.packed, device=engine.device)
        return response_logps(engine.model, batch, TEMPERATURE).sum()

    lengths = [pair.in_a_row if engine.packed else pair.lengths for pair in pairs]
    [plan] = plan_calls(lengths, world_size=1, max_tokens=tokens, packed=engine.packed)
    return [lambda indices=call.indices: compute(indices) for call in plan]  # type: ignore[misc]


def block_calls(engine: Any, pairs: Sequence[Any], blocks: tuple[int, int]) -> list[Callable[[], torch.Tensor]]:
    """A pair per call, prompts left-padded and responses right-padded to `blocks`, all logits, float32 log-softmax."""
    prompt_block, response_block = blocks

    def compute(pair: Any) -> torch.Tensor:
        ids = torch.zeros(2, prompt_block + response_block, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, response in enumerate((pair.chosen, pair.rejected)):
            begin, end = prompt_block - len(pair.prompt), prompt_block + len(response)
            ids[row, begin:end] = torch.tensor(pair.prompt + response)
            mask[row, begin:end] = 1
        ids, mask = ids.to(engine.device), mask.to(engine.device)
        logits = engine.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, prompt_block - 1 : -1]
        table = (logits.float() / TEMPERATURE).log_softmax(-1)
        return (table.gather(2, ids[:, prompt_block:, None])[..., 0] * mask[:, prompt_block:]).sum()

    return [lambda pair=pair: compute(pair) for pair in pairs]  # type: ignore[misc]


def run(engine: Any, calls: Sequence[Callable[[], torch.Tensor]]) -> None:
    """An update, or forward and backward alone where there is no optimizer."""
    from rlhf_pipeline.core.training.distributed import one_update

    if engine.optimizer is not None:
        one_update(engine, calls, lambda call: call(), max_grad_norm=None)
        return
    for call in calls:
        call().backward()
    engine.model.zero_grad(set_to_none=False)


def seconds_of(engine: Any, calls: Sequence[Callable[[], torch.Tensor]], repeats: int) -> float:
    """Median over `repeats` after one run that does not count."""
    found = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        run(engine, calls)
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])


def model_flops(size: Size, pairs: Sequence[Any]) -> float:
    """Of forward and backward of all pairs, by the counting above."""
    head_dim = size.hidden // size.heads
    layer = size.hidden * (2 * size.hidden + 2 * size.key_heads * head_dim + 3 * size.inner)
    lengths = [length for pair in pairs for length in pair.lengths]
    labels = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    attention = sum(6 * size.hidden * length * (length + 1) for length in lengths)
    return (
        6.0 * size.layers * layer * sum(sum(pair.in_a_row) for pair in pairs)
        + size.layers * attention
        + 6.0 * size.vocabulary * size.hidden * labels
    )


def peak_flops(device: torch.device) -> float | None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((tflops * 1e12 for part, tflops in PEAK_TFLOPS.items() if part in name), None)


def compare(name: str, size: Size, pairs: Sequence[Any], device: torch.device, **settings: Any) -> list[str]:
    """A line for ours and one for fixed blocks: real tokens per second, MFU, peak memory."""
    from rlhf_pipeline.core.models import choose_attention

    tokens, repeats = settings.get("tokens", CALL_TOKENS), settings.get("repeats", 5)
    best = choose_attention("auto", make_config(size), half_precision=True, can_pack=True)
    blocks_by = "flash_attention_2" if best == "flash_attention_2" else "sdpa"
    lines, real = [], sum(sum(pair.lengths) for pair in pairs)
    first = pairs[: settings.get("block_pairs", len(pairs))]
    for way, attention, used in (("ours", best, pairs), ("fixed blocks", blocks_by, first)):
        engine = make_engine(size, attention, device)
        calls = (
            our_calls(engine, used, tokens)
            if way == "ours"
            else block_calls(engine, used, settings.get("blocks", BLOCKS))
        )
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = seconds_of(engine, calls, repeats)
        peak, available = peak_flops(device), device.type == "cuda"
        mfu = "?" if peak is None else f"{model_flops(size, used) / seconds / peak:.1%}"
        memory = f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB" if available else "?"
        rate = sum(sum(pair.lengths) for pair in used) / seconds
        lines.append(f"{name:5} {way:13} {attention:18} {rate:10,.0f} tokens/s  MFU {mfu:>6}  peak {memory}")
        del engine, calls
        gc.collect()  # the model's own methods hold it
        if available:
            torch.cuda.empty_cache()
    return [f"{name}: {len(pairs)} pairs, {real:,} real tokens, calls of {tokens:,}", *lines]
