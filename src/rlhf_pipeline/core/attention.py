"""Attention over packed rows: sequences stand end to end in one row and each sees itself alone.

No layer of the model then computes padding, on any device, and none but attention a shared prompt twice: only there
are prompts put back before each of their responses. On a CUDA GPU torch's own varlen attention computes it, elsewhere
causal attention one sequence after the other. transformers finds it by the name PACKED once `register` was called,
which also teaches flash_attention_2 to take such rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_pipeline.core.batches import Packing, collate
from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.logps import token_logps

PACKED = "packed"
PACKING = (PACKED, "flash_attention_2")
"""The attention implementations that keep the sequences of a packed row apart."""
CHANGES = ("sliding_window", "softcap", "s_aux", "position_bias")
"""What models ask of attention, besides a causal mask and a scale, that PACKED does not do."""
LEAK = 0.05
"""Nats: no kernel's rounding moves a log-prob by more, another sequence within sight does."""


def takes_packed_rows(model: Any) -> bool:
    """Whether a transformers model was loaded with attention that keeps the sequences of a packed row apart."""
    return model.config._attn_implementation in PACKING


def register() -> None:
    """Make PACKED a name that from_pretrained(attn_implementation=) knows; flash_attention_2 takes packed rows too."""
    from transformers import AttentionInterface
    from transformers.integrations.flash_attention import flash_attention_forward
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, _no_mask)
    AttentionInterface.register("flash_attention_2", functools.partial(flash_attention, flash_attention_forward))


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """A packed row needs none; a dense one would grow with the square of its length."""


def flash_attention(
    attend: Callable[..., tuple[Tensor, None]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' `attend` for flash_attention_2 on a packed row, or on what it was made for."""
    if packing is None:
        return attend(module, query, key, value, attention_mask, **kwargs)
    query, key, value = _expanded(packing, query, key, value)
    kwargs |= {"cu_seq_lens_q": packing.boundaries, "cu_seq_lens_k": packing.boundaries}
    kwargs |= {"max_length_q": packing.longest, "max_length_k": packing.longest}
    output, _ = attend(module, query, key, value, None, **kwargs)
    return _kept(packing, output), None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """(1, T, heads, D) of query (1, heads, T, D) and key, value (1, key heads, T, D), causal within each sequence.

    Raises BadUse for what it can't compute, so that no model is ever computed wrongly: a row whose packing did not
    reach it, dropout, and CHANGES.
    """
    asked = [name for name in CHANGES if kwargs.get(name) is not None] + ["dropout"] * (dropout > 0)
    if packing is None:
        asked.append("rows that are not packed")
    if asked or packing is None:
        raise BadUse(
            f"--attn_implementation {PACKED}: {type(module).__name__} wants {', '.join(asked)}, which it can't "
            "compute; pass sdpa or eager."
        )
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings give float32 back
        half = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(half), key.to(half), value.to(half)
    query, key, value = _expanded(packing, query, key, value)
    attend = _attend_varlen if query.is_cuda else _attend_each
    return _kept(packing, attend(query, key, value, packing, scaling)), None


def _expanded(packing: Packing, *parts: Tensor) -> tuple[Tensor, ...]:
    """Each part (1, heads, T, D) as (1, heads, E, D), with every sequence's prompt."""
    return parts if packing.expand is None else tuple(part.index_select(2, packing.expand) for part in parts)


def _kept(packing: Packing, output: Tensor) -> Tensor:
    """(1, T, heads, D) of (1, E, heads, D)."""
    return output if packing.keep is None else output.index_select(1, packing.keep)


def _attend_varlen(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None) -> Tensor:
    """(1, E, heads, D) of query (1, heads, E, D) and key, value (1, key heads, E, D), by torch's kernel."""
    from torch.nn.attention.varlen import varlen_attn

    output = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        packing.boundaries,
        packing.boundaries,
        packing.longest,
        packing.longest,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return torch.unsqueeze(output, 0)  # type: ignore[arg-type]


def _attend_each(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None) -> Tensor:
    """The same, one sequence after the other."""
    lengths = packing.boundaries.diff().tolist()
    attend = functools.partial(
        nn.functional.scaled_dot_product_attention,
        is_causal=True,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    sequences = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    return torch.cat([attend(q, k, v) for q, k, v in sequences], dim=2).transpose(1, 2)


@functools.cache
def varlen_works() -> bool:
    """Whether torch's varlen attention computes forward and backward here, tried once on a tiny row."""
    if not torch.cuda.is_available():
        return False
    from torch.nn.attention.varlen import varlen_attn

    def ones(heads: int) -> Tensor:
        return torch.ones(4, heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    boundaries = torch.tensor([0, 1, 4], device="cuda", dtype=torch.int32)
    try:
        found = varlen_attn(
            ones(2), ones(1), ones(1), boundaries, boundaries, 3, 3, window_size=(-1, 0), enable_gqa=True
        )
        found.sum().backward()  # type: ignore[union-attr]
    except RuntimeError:  # a torch built without the kernel, or a GPU that it does not know
        return False
    return True


@torch.no_grad()
def check_packed(model: nn.Module, device: torch.device) -> None:
    """Raise BadUse if what a sequence gets depends on its neighbour in a packed row.

    Convolutions and recurrent layers, for example, know nothing of boundaries. `model` has `logps.install`; under an
    engine the call is collective.
    """
    prompts = [[1, 2], [1, 2]]
    batches = [collate(prompts, [[neighbour] * 7, [3, 1, 2]], packed=True, device=device) for neighbour in (0, 3)]
    try:
        found = [token_logps(model, batch, 1.0)[7:] for batch in batches]
    except RuntimeError as error:  # of a kernel that does not know the model's sizes
        raise BadUse(f"--attn_implementation: packed rows can't be computed here ({error}); pass sdpa.") from error
    moved = float((found[0] - found[1]).abs().max())
    if not moved < LEAK:
        raise BadUse(
            f"--attn_implementation: in a packed row this model's log-probs depend on the neighbouring sequence "
            f"({moved:.2g} nats), so some of its layers see across boundaries; pass sdpa."
        )
