"""The sampling loop over a transformers model: one token per row and step, finished rows dropped.

A row's tokens depend on its prompt and its seed alone, not on the rows beside it. Its uniform numbers are
fixed by seed and prompt before it starts; its prompt is left-padded to a width that its own length decides;
and a batch never falls below MIN_ROWS rows, since float32 matrix products of fewer than 4 rows take another
code path on CPU and round differently. (In 16 bits and on GPUs rounding may still differ with the batch.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MIN_ROWS = 8
PAD_MULTIPLE = 16
KEEP_SHARE = 0.7
"""Finished rows leave the batch when fewer than this share of its rows still runs."""
FIRST_LOOK = 32
"""Largest probabilities looked at first for the top-p set; 8 times as many where they fall short of top_p."""


@dataclass
class Row:
    """One response: what it needs, and the tokens it has so far.

    max_tokens: new tokens at most. logps: natural-log probabilities at temperature 1, if they are wanted.
    """

    key: int
    prompt_ids: tuple[int, ...]
    seed: int
    max_tokens: int
    token_ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    stopped: bool = False


def padded_width(length: int) -> int:
    """The width a prompt of `length` tokens is left-padded to: the next multiple of PAD_MULTIPLE."""
    return -(-length // PAD_MULTIPLE) * PAD_MULTIPLE


def decode_batch(
    model: PreTrainedModel,
    rows: Sequence[Row],
    *,
    temperature: float,
    top_p: float,
    stop_ids: Sequence[int],
    want_logps: bool,
) -> Iterator[Row]:
    """Complete `rows`, whose prompts have one padded width, and give each back when its response has ended.

    temperature 0 takes the most probable token. The stop id that ends a response is its last token.
    """
    uniforms = torch.stack([_uniforms(row, max(row.max_tokens for row in rows)) for row in rows])
    batch = _start(model, rows, uniforms.to(model.device))
    stops = set(stop_ids)
    for step in range(uniforms.shape[1]):
        tokens, logps = _next_tokens(batch, step, temperature, top_p, want_logps)
        for index, (row, token) in enumerate(zip(batch.rows, tokens.tolist(), strict=True)):
            if row is None:
                continue
            row.token_ids.append(token)
            row.stopped = token in stops
            if logps is not None:
                row.logps.append(float(logps[index]))
            if row.stopped or len(row.token_ids) == row.max_tokens:
                batch.rows[index] = None
                yield row
        live = [index for index, row in enumerate(batch.rows) if row is not None]
        if not live:
            return
        if len(batch.rows) > MIN_ROWS and len(live) < KEEP_SHARE * len(batch.rows):
            tokens = _keep(batch, live, tokens)
        _advance(model, batch, tokens)


@dataclass
class _Batch:
    """R rows at the same step; a finished row, and one that only fills the batch up to MIN_ROWS, is None.

    uniforms: (R, steps) float64. attention_mask: (R, tokens so far, padding included). lengths: (R, 1),
    tokens so far. logits: (R, V) float32, of the next token.
    """

    rows: list[Row | None]
    uniforms: torch.Tensor
    attention_mask: torch.Tensor
    lengths: torch.Tensor
    logits: torch.Tensor
    cache: Any


def _uniforms(row: Row, count: int) -> torch.Tensor:
    """(count,) numbers in [0, 1) that belong to a row."""
    generator = torch.Generator().manual_seed(row.seed)
    return torch.rand(count, generator=generator, dtype=torch.float64)


@torch.inference_mode()
def _start(model: PreTrainedModel, rows: Sequence[Row], uniforms: torch.Tensor) -> _Batch:
    """Compute every different prompt once, and spread its cache over its rows."""
    prompts = list(dict.fromkeys(row.prompt_ids for row in rows))
    filled = prompts + [prompts[0]] * (MIN_ROWS - len(prompts))
    width = padded_width(len(prompts[0]))
    input_ids = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in filled], device=model.device)
    padding = torch.tensor([[width - len(ids)] for ids in filled], device=model.device)
    places = torch.arange(width, device=model.device)
    attention_mask = (places >= padding).long()
    output = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=(places - padding).clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
    )
    index_of = {ids: index for index, ids in enumerate(prompts)}
    spread = [index_of[row.prompt_ids] for row in rows]
    fillers = MIN_ROWS - len(rows)
    chosen = torch.tensor(spread + [0] * fillers, device=model.device)
    output.past_key_values.batch_select_indices(chosen)
    if fillers > 0:
        uniforms = torch.cat([uniforms, uniforms.new_zeros(fillers, uniforms.shape[1])])
    return _Batch(
        rows=[*rows, *[None] * fillers],
        uniforms=uniforms,
        attention_mask=attention_mask[chosen],
        lengths=(width - padding)[chosen],
        logits=output.logits[chosen, -1].float(),
        cache=output.past_key_values,
    )


@torch.inference_mode()
def _next_tokens(
    batch: _Batch, step: int, temperature: float, top_p: float, want_logps: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The next token of each row (R,), and its log-probability at temperature 1 (R,)."""
    if temperature == 0:
        tokens = batch.logits.argmax(dim=1)
    else:
        probs = torch.softmax(batch.logits / temperature, dim=1)
        tokens = draw(probs, batch.uniforms[:, step], top_p)
    if not want_logps:
        return tokens, None
    return tokens, torch.log_softmax(batch.logits, dim=1).gather(1, tokens[:, None])[:, 0].cpu()


@torch.inference_mode()
def _keep(batch: _Batch, live: list[int], tokens: torch.Tensor) -> torch.Tensor:
    """Drop the finished rows, and return the live rows' tokens."""
    fillers = MIN_ROWS - len(live)
    chosen = torch.tensor(live + [live[0]] * fillers, device=tokens.device)
    batch.rows = [*(batch.rows[index] for index in live), *[None] * fillers]
    batch.uniforms = batch.uniforms[chosen]
    batch.attention_mask = batch.attention_mask[chosen]
    batch.lengths = batch.lengths[chosen]
    batch.cache.batch_select_indices(chosen)
    return tokens[chosen]


@torch.inference_mode()
def _advance(model: PreTrainedModel, batch: _Batch, tokens: torch.Tensor) -> None:
    """Feed the sampled tokens (R,) and take the logits of the next ones."""
    ones = batch.attention_mask.new_ones(len(tokens), 1)
    batch.attention_mask = torch.cat([batch.attention_mask, ones], dim=1)
    output = model(
        input_ids=tokens[:, None],
        attention_mask=batch.attention_mask,
        position_ids=batch.lengths,
        past_key_values=batch.cache,
        use_cache=True,
    )
    batch.lengths = batch.lengths + 1
    batch.logits, batch.cache = output.logits[:, -1].float(), output.past_key_values


def draw(probs: torch.Tensor, uniforms: torch.Tensor, top_p: float) -> torch.Tensor:
    """Tokens (R,) drawn from the top-p sets of `probs` (R, V) by inverse CDF at `uniforms` (R,).

    The top-p set is the smallest set of most probable tokens whose probabilities add up to top_p or more
    (Holtzman et al. 2019, arXiv 1904.09751, equation 2). The CDF runs over it in the order of token ids, in
    float64.
    """
    size = probs.shape[1]
    if top_p == 1:
        return _inverse_cdf(probs.double(), uniforms)
    tokens = torch.empty(len(probs), dtype=torch.long, device=probs.device)
    left = torch.arange(len(probs), device=probs.device)
    count = FIRST_LOOK
    while len(left):
        count = min(count, size)
        top, ids = probs[left].topk(count, dim=1)
        top = top.double()
        mass = top.cumsum(dim=1)
        ids, order = ids.sort(dim=1)
        inside = torch.where(mass - top < top_p, top, 0.0).gather(1, order)
        drawn = ids.gather(1, _inverse_cdf(inside, uniforms[left])[:, None])[:, 0]
        complete = (mass[:, -1] >= top_p) | (count == size)
        tokens[left[complete]] = drawn[complete]
        left = left[~complete]
        count *= 8
    return tokens


def _inverse_cdf(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """(R,) the first column where the running share of `weights` (R, K), float64, exceeds `uniforms` (R,)."""
    cdf = weights.cumsum(dim=1)
    return torch.searchsorted(cdf / cdf[:, -1:], uniforms[:, None], right=True)[:, 0]
