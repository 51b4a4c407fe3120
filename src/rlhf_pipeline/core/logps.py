"""The only place where logits meet labels: float32 log-probs of response tokens, never all logits at once.

`install` teaches a causal language model to answer one call with the log-probs of given tokens. Everything
that is differentiable happens inside that call, so an engine around the model (DDP, DeepSpeed ZeRO) sees one
forward, gathers the head once in it and once in its backward, and reduces every gradient.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rlhf_pipeline.core.batches import Batch
from rlhf_pipeline.core.command import BadUse

CHUNK_BYTES = {"cpu": 128 * 2**20, "cuda": 512 * 2**20}
"""Memory of one chunk of logits; other devices take the CPU's."""


def token_logps(model: nn.Module, batch: Batch, temperature: float) -> Tensor:
    """(M,) natural-log probabilities of the response tokens under softmax(logits / temperature), in nats.

    One call of `model`, which may be wrapped by an engine. float32 (float64 for a float64 model).
    """
    packed = {} if batch.packing is None else {"position_ids": batch.position_ids, "packing": batch.packing}
    # No attention mask: padding is on the right, where no token under a causal mask looks, and without one
    # kernels are faster.
    result: Tensor = model(
        input_ids=batch.input_ids,
        label_positions=batch.positions,
        label_ids=batch.labels,
        temperature=temperature,
        **packed,
    )
    return result


def response_logps(model: nn.Module, batch: Batch, temperature: float) -> Tensor:
    """(B,) sums of `token_logps` over each response; 0 for an empty one."""
    return sum_by_row(token_logps(model, batch, temperature), batch)


def sum_by_row(values: Tensor, batch: Batch) -> Tensor:
    """(B,) sums of (M,) values of response tokens over each response."""
    return values.new_zeros(len(batch.response_lengths)).index_add(0, batch.rows, values)


def install(model: nn.Module) -> None:
    """Make `model(input_ids=, label_positions=, label_ids=, temperature=)` return log-probs, (M,).

    `model` is a transformers causal LM or a PEFT model around one, before any engine wraps it. Called without
    `label_positions` it does what it did before, so generate and save_pretrained work on. Parameters, their
    names and the state dict are untouched. Raises BadUse for a head that is no plain linear layer (LoRA on
    the head), and for a model that does to its logits what can't be reproduced here.
    """
    base: Any = model
    if hasattr(model, "get_base_model"):
        base = base.get_base_model()
    head = base.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise BadUse(
            f"--model: the head of {type(base).__name__} is a {type(head).__name__}; a plain linear layer is "
            "needed. If an adapter was put on it, leave lm_head out of the adapter's target modules."
        )
    logit_map = _find_logit_map(base, head)
    # Everything is reached through self, so that a deep copy of the model is one.
    ordinary_forward, ordinary_head = type(base).forward, type(head).forward

    def head_forward(
        self: nn.Linear, hidden: Tensor, label_ids: Tensor | None = None, temperature: float = 1.0
    ) -> Tensor:
        if label_ids is None:
            return ordinary_head(self, hidden)
        return linear_logps(hidden, self.weight, self.bias, label_ids, logit_map, temperature)

    @functools.wraps(ordinary_forward)  # generate looks at the signature
    def forward(
        self: Any,
        *args: Any,
        label_positions: Tensor | None = None,
        label_ids: Tensor | None = None,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> Any:
        if label_positions is None:
            return ordinary_forward(self, *args, **kwargs)
        # PEFT names arguments of the ordinary forward, as None
        given = {name: value for name, value in kwargs.items() if value is not None}
        hidden = self.base_model(*args, use_cache=False, **given).last_hidden_state.flatten(0, 1)
        predicting = hidden.index_select(0, label_positions)
        return self.get_output_embeddings()(predicting, label_ids, temperature)

    head.forward = types.MethodType(head_forward, head)  # type: ignore[method-assign]
    base.forward = types.MethodType(forward, base)


@dataclass(frozen=True)
class LogitMap:
    """What a model makes of its head's output x to call it logits: scale * x, or cap * tanh(x / cap)."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, x: Tensor, temperature: float) -> Tensor:
        """The mapped logits over the temperature, computed in place."""
        if self.cap is not None:
            x.div_(self.cap).tanh_().mul_(self.cap)
        elif self.scale != 1.0:
            x.mul_(self.scale)
        return x if temperature == 1.0 else x.div_(temperature)

    def slope(self, logits: Tensor, temperature: float) -> Tensor | float:
        """Derivative of the result of __call__ by x, from that result."""
        if self.cap is not None:
            return (1.0 - (logits * (temperature / self.cap)).square_()).div_(temperature)
        return self.scale / temperature


class _DecoderOutput:
    """Stands for a decoder's output in a dry run: a hidden state, and None for all else it may hold."""

    def __init__(self, hidden: Tensor):
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Tensor:
        return self.last_hidden_state


@torch.no_grad()
def _find_logit_map(model: Any, head: nn.Linear) -> LogitMap:
    """What `model` does to its head's output, found by running its own forward with decoder and head replaced
    by known numbers.

    No parameter is read, so partitioned ones (ZeRO-3) do no harm, and no list of model names can be out of date.
    """
    hidden = torch.ones(1, 1, head.in_features)
    x = torch.linspace(-100.0, 100.0, 201, dtype=torch.float64).view(1, 1, -1)
    x[..., 0], x[..., 1] = 1.0, 1e30
    read_by_head: list[Tensor] = []

    def decoder_stub(*args: Any, **kwargs: Any) -> _DecoderOutput:
        return _DecoderOutput(hidden)

    def head_stub(given: Tensor) -> Tensor:
        read_by_head.append(given)
        return x.clone()

    stubs: dict[Any, Callable[..., Any]] = {
        model.base_model: decoder_stub,
        model.get_decoder(): decoder_stub,  # OPT calls the decoder in its base model directly
        head: head_stub,
    }
    for module, stub in stubs.items():
        module.forward = stub
    try:
        logits = model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False).logits.double()
    finally:
        for module in stubs:
            del module.forward
    at_one, at_infinity = logits[0, 0, 0].item(), logits[0, 0, 1].item()
    logit_map = LogitMap(cap=at_infinity) if at_infinity < 1e20 else LogitMap(scale=at_one)
    untouched = [tensor.to(hidden).equal(hidden) for tensor in read_by_head] == [True]
    if not untouched or not logit_map(x.clone(), 1.0).allclose(logits, rtol=1e-5, atol=1e-6):
        raise BadUse(
            f"--model: {type(model).__name__} does more to its logits than to scale or soft-cap them, which "
            "chunked log-probs can't follow. Choose another model."
        )
    return logit_map


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    label_ids: Tensor,
    logit_map: LogitMap = LogitMap(),
    temperature: float = 1.0,
) -> Tensor:
    """(M,) log-probs of label_ids (M,) from hidden (M, H) and a head's weight (V, H) and bias (V,).

    Matrix products run in the dtype of `hidden`, or autocast's where it is on, as the model's own head would;
    the log-softmax and everything that is summed run in float32 or better. Tokens are taken in chunks of
    CHUNK_BYTES of logits. Backward recomputes a chunk's logits instead of keeping them and adds up one weight
    gradient, so two or three chunks are all the memory it takes.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    result: Tensor = _LinearLogps.apply(hidden, weight, bias, label_ids, logit_map, temperature)
    return result


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        label_ids: Tensor,
        logit_map: LogitMap,
        temperature: float,
    ) -> Tensor:
        head = _Head(weight, bias, hidden.dtype, logit_map, temperature)
        log_normalizer = torch.empty(len(hidden), dtype=head.exact, device=hidden.device)
        logps = torch.empty_like(log_normalizer)
        scratch, normalized = head.scratch(hidden), head.scratch(hidden)
        for chunk in head.chunks(hidden):
            logits, labels = head.logits(hidden[chunk], scratch), label_ids[chunk, None]
            of_labels = logits.gather(1, labels)[:, 0]
            # log_softmax is one fused kernel, logsumexp several
            torch.log_softmax(logits, -1, out=normalized[: len(logits)])
            logps[chunk] = normalized[: len(logits)].gather(1, labels)[:, 0]
            log_normalizer[chunk] = of_labels - logps[chunk]
        ctx.save_for_backward(hidden, weight, bias, label_ids, log_normalizer)
        ctx.logit_map, ctx.temperature = logit_map, temperature
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """With p = softmax(logits): d logp / d x = (onehot(label) - p) * slope, slope = d logits / d x."""
        hidden, weight, bias, label_ids, log_normalizer = ctx.saved_tensors
        head = _Head(weight, bias, hidden.dtype, ctx.logit_map, ctx.temperature)
        with_hidden, with_weight, with_bias = ctx.needs_input_grad[:3]
        hidden_grad = torch.empty_like(hidden) if with_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=head.exact) if with_weight else None
        bias_grad = torch.zeros_like(bias, dtype=head.exact) if with_bias else None
        scratch = head.scratch(hidden)
        for chunk in head.chunks(hidden):
            logits = head.logits(hidden[chunk], scratch)
            slope = ctx.logit_map.slope(logits, ctx.temperature)
            delta = logits.sub_(log_normalizer[chunk, None]).exp_()
            delta[torch.arange(len(delta), device=delta.device), label_ids[chunk]] -= 1.0
            upstream = -grad[chunk, None]
            if isinstance(slope, Tensor):
                delta.mul_(slope)
            else:
                upstream = upstream * slope
            # The upstream gradient scales rows, so it goes to the narrow factor of each product.
            if bias_grad is not None:
                bias_grad += upstream[:, 0] @ delta
            delta = delta.to(hidden.dtype)
            if hidden_grad is not None:
                hidden_grad[chunk] = (delta @ head.weight) * upstream
            if weight_grad is not None:
                _add_product(weight_grad, delta.T, (hidden[chunk] * upstream).to(hidden.dtype))
        return (
            hidden_grad,
            None if weight_grad is None else weight_grad.to(weight.dtype),
            None if bias_grad is None else bias_grad.to(bias.dtype),
            None,
            None,
            None,
        )


class _Head:
    """A linear head's arithmetic for one pass: products in `dtype`, logits in `exact`."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, logit_map: LogitMap, temperature: float
    ):
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.exact = torch.promote_types(dtype, torch.float32)
        self.logit_map, self.temperature = logit_map, temperature

    def logits(self, hidden: Tensor, scratch: Tensor) -> Tensor:
        """(m, V) in `exact`, in the first rows of `scratch`."""
        logits = scratch[: len(hidden)]
        if hidden.dtype == self.exact:
            torch.mm(hidden, self.weight.T, out=logits)
            if self.bias is not None:
                logits.add_(self.bias)
        else:
            logits.copy_(nn.functional.linear(hidden, self.weight, self.bias))
        return self.logit_map(logits, self.temperature)

    def scratch(self, hidden: Tensor) -> Tensor:
        """Room for a chunk of logits, which all chunks share: new memory costs as much as what is written into it."""
        rows = min(self._rows(hidden), len(hidden))
        return torch.empty(rows, len(self.weight), dtype=self.exact, device=hidden.device)

    def chunks(self, hidden: Tensor) -> list[slice]:
        size = self._rows(hidden)
        return [slice(start, start + size) for start in range(0, len(hidden), size)]

    def _rows(self, hidden: Tensor) -> int:
        chunk_bytes = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cpu"])
        return max(1, chunk_bytes // (len(self.weight) * self.exact.itemsize))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, without a temporary where the dtypes agree."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
