"""What training takes of each GPU's memory: arithmetic on a model's config and the lengths of a call, nothing loaded.

Activations are those of a decoder with RMS norms, rotary attention and a gated MLP (Llama, Mistral, Qwen, ...), as
autograd keeps them of transformers' modules. In a layer of T tokens, H hidden, N and K values of all query and of all
key heads, and I inner ones, these are a norm's input, normalized and scaled values, twice; the rotated queries, the
keys, the values and attention's output; and four stages of the MLP:

    2 (3 T H) + (2 T N + 2 T K) + 4 T I

Where prompts are shared, attention's part is of the tokens with all their prompts, and T N more for its output without.
tests/core/training/test_memory.py counts the bytes of real tensors against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlhf_pipeline.core import models
from rlhf_pipeline.core.batches import order_of_rows, plan_calls
from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.logps import CHUNK_BYTES
from rlhf_pipeline.core.progress import read_metrics
from rlhf_pipeline.core.training.pairs import PairData
from rlhf_pipeline.core.training.passes import Limits

LaunchName = Literal["one process", "ddp", "zero 2", "zero 3", "zero 3, offload"]
LAUNCHES: tuple[LaunchName, ...] = ("one process", "ddp", "zero 2", "zero 3", "zero 3, offload")
BUCKET = 5 * 10**8
"""Elements that DeepSpeed reduces at once by default."""
UPDATES_PLANNED = 32
LIVE = 10**9
"""Elements of gathered parameters that ZeRO-3 keeps alive by default."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that decide its memory."""

    parameters: int
    hidden: int
    inner: int
    layers: int
    query: int
    """values of all query heads of a token"""
    key: int
    """values of all key heads of a token"""
    vocabulary: int


@dataclass(frozen=True)
class Call:
    """The largest engine call."""

    tokens: int
    """padding included"""
    labels: int
    """response tokens"""
    attended: int
    """tokens that attention sees: of a packed row, shared prompts as often as they are shared"""


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU in an update."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    """kept from forward to backward"""
    log_probs: int
    """while log-probs and their gradients are computed, on top of all activations"""
    layer: int
    """while a layer is (computed again and) differentiated; the log-probs' share is free again by then"""

    @property
    def total(self) -> int:
        states = self.parameters + self.gradients + self.optimizer
        return states + self.activations + max(self.log_probs, self.layer)


def shape_of(folder: Path, *, trust_remote_code: bool = False) -> Shape | None:
    """The sizes in a model folder's config; None for a model that is no decoder with a gated MLP."""
    config: Any = models.load_config(folder, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if heads is None or getattr(text, "intermediate_size", None) is None or not hasattr(text, "rms_norm_eps"):
        return None
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Shape(
        parameters=models.without_weights(folder, trust_remote_code=trust_remote_code).num_parameters(),
        hidden=text.hidden_size,
        inner=text.intermediate_size,
        layers=text.num_hidden_layers,
        query=heads * head_dim,
        key=(getattr(text, "num_key_value_heads", None) or heads) * head_dim,
        vocabulary=text.vocab_size,
    )


def largest_call(
    data: PairData, batch_size: int, processes: int, limits: Limits, *, packed: bool, seed: int, updates: int
) -> tuple[Call, float, float]:
    """(the largest call, tokens of an update, share that is computed of them) over the first of `updates` updates.

    Tokens are real ones, of prompts with each of their responses. Padding makes the share larger than 1, shared prompts
    make it smaller.

    Without a limit on tokens the call may be of the longest pair of all.
    """
    lengths, costs = data.lengths(), data.lengths(packed=packed)
    responses = np.array([len(c) + len(r) for c, r in zip(data.chosen, data.rejected, strict=True)])
    order = order_of_rows(len(data), min(updates, UPDATES_PLANNED), batch_size, seed)
    computed, largest = 0, Call(0, 0, 0)
    for indices in order:
        plan = plan_calls(
            costs[indices],
            world_size=processes,
            max_pairs=limits.max_pairs,
            max_tokens=limits.max_tokens,
            packed=packed,
        )
        for call in (call for rank in plan for call in rank):
            computed += call.tokens
            rows = indices[list(call.indices)]
            attended = int(lengths[rows].sum()) if packed else call.tokens
            one = Call(call.tokens, int(responses[rows].sum()), attended)
            largest = max(largest, one, key=lambda call: call.tokens)
    real = int(lengths[order].sum())
    return largest, real / len(order), computed / real


def table(shape: Shape, call: Call, *, processes: int, checkpointing: bool, trained: int | None = None) -> list[str]:
    """The estimate of every launch as lines, in GiB; bf16 products."""
    names = ("parameters", "gradients", "optimizer", "activations", "log_probs", "total")
    lines = [f"{'':16}" + "".join(f"{name.replace('_', '-'):>13}" for name in names)]
    for launch in LAUNCHES:
        count = 1 if launch == "one process" else processes
        found = estimate(shape, call, launch, processes=count, half=True, checkpointing=checkpointing, trained=trained)
        lines.append(f"{launch:16}" + "".join(f"{getattr(found, name) / 2**30:13.1f}" for name in names))
    return lines


def tokens_per_second(rate: str) -> float:
    """--rate: a number, or the median of an earlier run's metrics.jsonl. Raises BadUse for neither."""
    if Path(rate).is_file():
        found = [line["tokens_per_second"] for line in read_metrics(Path(rate)) if "tokens_per_second" in line]
        if found:
            return float(np.median(found))
    try:
        value = float(rate)
    except ValueError:
        value = 0.0
    if value <= 0:
        raise BadUse(f"--rate is {rate}; expected tokens per second, or the metrics.jsonl of a run of train.")
    return value


def seconds_of_run(data: PairData, tokens: float, rate: float, *, reference: bool) -> float:
    """Seconds of a run that trains on `tokens` at `rate` tokens per second, and first computes the reference of `data`.

    A forward pass is a third of a forward and a backward.
    """
    forward = float(data.lengths().sum()) / 3 if reference else 0.0
    return (tokens + forward) / rate


def estimate(
    shape: Shape,
    call: Call,
    launch: LaunchName,
    *,
    processes: int,
    half: bool,
    checkpointing: bool,
    trained: int | None = None,
    device: str = "cuda",
) -> Memory:
    """What one of `processes` GPUs holds in an update whose largest call is `call`.

    `half`: bf16 products. `trained`: parameters with gradients, all by default (LoRA: those of its adapters, whose
    inputs are kept in the place of those of frozen layers).
    """
    parameters, gradients, optimizer = states(shape.parameters, trained, launch, processes=processes, half=half)
    zero = launch.startswith("zero")
    kept, layer = activations(shape, call, half=half, autocast=half and not zero, checkpointing=checkpointing)
    return Memory(parameters, gradients, optimizer, kept, log_probs(shape, call, device, half=half), layer)


def states(
    parameters: int, trained: int | None, launch: LaunchName, *, processes: int, half: bool
) -> tuple[int, int, int]:
    """(parameters, gradients, optimizer) in bytes: float32 weights are stepped in every launch.

    One process and DDP hold float32 parameters (frozen ones in bf16 where products are) and their bf16 casts; DDP
    reduces gradients in buckets of the same size. DeepSpeed holds parameters in the products' width, gradients,
    a float32 master and Adam's two moments, of which each process has its share: of the parameters too in stage 3,
    which gathers some of them at a time.
    """
    width = 2 if half else 4
    trained = parameters if trained is None else trained
    frozen = parameters - trained
    if not launch.startswith("zero"):
        casts = 2 * trained if half else 0
        return 4 * trained + width * frozen + casts, (8 if launch == "ddp" else 4) * trained, 8 * trained
    held = width * parameters
    if launch != "zero 2":
        held = held // processes + width * min(parameters, LIVE)
    bucket = width * min(trained, BUCKET)
    if launch == "zero 3, offload":
        return held, bucket, 0
    return held, 4 * trained // processes + bucket, 12 * trained // processes


def activations(shape: Shape, call: Call, *, half: bool, autocast: bool, checkpointing: bool) -> tuple[int, int]:
    """(bytes kept from forward to backward, bytes while one layer is differentiated).

    Norms work in float32 whatever the width. With checkpointing a layer keeps its input only.
    """
    width = 2 if half else 4
    norm_input = 4 if autocast or not half else 2  # what a checkpointed layer keeps
    per_norm = shape.hidden * (4 + width + (4 if autocast else width))
    layer = call.tokens * (2 * per_norm + width * 4 * shape.inner)
    layer += call.attended * width * (2 * shape.query + 2 * shape.key)
    if call.attended > call.tokens:  # attention's output without the prompts that were put back
        layer += call.tokens * width * shape.query
    last_norm = per_norm - width * shape.hidden  # of its scaled values only those before a response token are kept
    each = call.tokens * norm_input * shape.hidden if checkpointing else layer
    kept = shape.layers * each + call.tokens * last_norm + call.labels * shape.hidden * width
    differentiated = call.tokens * 2 * width * shape.inner + (layer if checkpointing else 0)
    return kept, differentiated


def log_probs(shape: Shape, call: Call, device: str, *, half: bool) -> int:
    """Bytes of two chunks of float32 logits in forward, of one and the head's float32 gradient in backward.

    half: the products with the head give and take a chunk in 16 bits besides.
    """
    chunk = min(CHUNK_BYTES[device], 4 * call.labels * shape.vocabulary)
    beside = chunk // 2 if half else 0
    return beside + max(2 * chunk, chunk + 4 * shape.vocabulary * shape.hidden)
