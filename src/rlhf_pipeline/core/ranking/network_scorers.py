"""Reward models that are networks: which head they need, and how conversations pass through them in batches.

A reward depends on its row alone: padding, batch size and order change it by rounding only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf_pipeline.core.command import BadUse, WorkFailed
from rlhf_pipeline.core.weights import check_head_shapes, check_none_missing, tensor_files

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from rlhf_pipeline.core.chat import Chat

Row = Mapping[str, Any]
Backend = Literal["transformers", "vllm"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
HeadDtype = Literal["float32", "bfloat16", "float16"]

GPU_BATCH_TOKENS, CPU_BATCH_TOKENS = 32768, 2048
"""On a CPU a batch of few thousand tokens is busy, and one of many spends its time on memory: half the
speed.
"""
ARMORM_TENSOR = "regression_layer.weight"
"""By which an ArmoRM checkpoint is recognized: its config.json names a class that only remote code has."""


@dataclass(frozen=True)
class Score:
    """A row's reward, or None and the reason.

    error: "kind: details", so that reasons can be counted by kind. objectives: the named rewards behind the
    reward, ArmoRM's or an ensemble's members'. coefficients: ArmoRM's gate; reward = sum of objective x
    coefficient.
    """

    reward: float | None
    error: str | None = None
    objectives: dict[str, float] | None = None
    coefficients: dict[str, float] | None = None


@dataclass(frozen=True)
class ScoringOptions:
    """How reward models that are networks run."""

    backend: Backend = "transformers"
    dtype: Dtype = "auto"
    head_dtype: HeadDtype = "float32"
    """Of the layers that make the reward from a hidden state."""
    max_length: int | None = None
    """Tokens of a conversation; None: the model's window."""
    batch_tokens: int | None = None
    """Tokens of a batch, padding included; None: GPU_BATCH_TOKENS or CPU_BATCH_TOKENS, or vLLM's choice."""
    trust_remote_code: bool = False
    device: str = "cpu"
    engines: int = 1
    """How many of them share the device at a time."""


def resolve_dtype(options: ScoringOptions) -> torch.dtype:
    """ "auto" is bfloat16 on a GPU and float32 on the CPU."""
    import torch

    if options.dtype == "auto":
        return torch.float32 if options.device == "cpu" else torch.bfloat16
    dtype: torch.dtype = getattr(torch, options.dtype)
    return dtype


def choose_batch_tokens(options: ScoringOptions) -> int:
    default = CPU_BATCH_TOKENS if options.device == "cpu" else GPU_BATCH_TOKENS
    return options.batch_tokens or default


def head_shapes(
    folder: Path, *, armorm: bool, trust_remote_code: bool, flag: str = "--reward_model"
) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the tensors that make a reward from hidden states, as config.json asks for them.

    Raises BadUse for a classifier of another number of labels than one, or of a kind that transformers lacks.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    from rlhf_pipeline.core.models import load_config

    with torch.device("meta"):
        if armorm:
            from rlhf_pipeline.core.ranking.armorm import ArmoHead

            return _shapes(ArmoHead(load_config(folder)).state_dict())
        try:
            config = load_config(folder, trust_remote_code=trust_remote_code)
            model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=trust_remote_code)
        except ValueError as error:
            raise BadUse(
                f"{flag} {folder} is no sequence classifier that transformers knows "
                f"({str(error).splitlines()[0][:200]}); --trust_remote_code runs the repo's own code."
            ) from error
    if config.num_labels != 1:
        raise BadUse(
            f"{flag} {folder} has {config.num_labels} labels (num_labels in its config.json); a reward model has one."
        )
    backbone = model.base_model_prefix + "."
    return {name: shape for name, shape in _shapes(model.state_dict()).items() if not name.startswith(backbone)}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Encoded:
    ids: list[int]
    gate: int = 0
    """ArmoRM: where its gate reads the prompt."""


@dataclass
class TokenBudget:
    """How many tokens, padding included, a batch may have; shrinks when the GPU's memory turns out too
    small.
    """

    tokens: int


class SequenceClassifier:
    """A transformers ...ForSequenceClassification with one label: the raw logit at the last token.

    That token is found by the row's length. transformers looks for the last id that is not the pad id, which
    is the wrong one where the pad token is also the end of turn.
    """

    objectives: tuple[str, ...] = ()
    has_coefficients = False

    def __init__(self, folder: Path, chat: Chat, options: ScoringOptions, engine: dict[str, Any]):
        import torch

        self._chat = chat
        self._device = options.device
        self._model = _load_classifier(folder, options)
        self._head = self._model.score if _reads_last_token(self._model) else None
        if self._head is not None:
            self._head.to(getattr(torch, options.head_dtype))
        self._budget = TokenBudget(choose_batch_tokens(options))
        self.engine = engine

    def score(self, rows: Sequence[Row]) -> list[Score]:
        return _score_conversations(rows, self._encode, self._forward, self.engine["max_length"], self._budget)

    def close(self) -> None:
        del self._model, self._head
        _free_memory()

    def _encode(self, row: Row) -> Encoded | str:
        return Encoded(self._chat.conversation_ids(row["prompt"], row["response"]))

    def _forward(self, batch: Sequence[Encoded]) -> list[Score]:
        import torch

        input_ids, lengths = _pad(batch, self._device)
        if self._head is None:
            mask = (torch.arange(input_ids.shape[1], device=self._device) < lengths[:, None]).long()
            logits = self._model(input_ids=input_ids, attention_mask=mask).logits
        else:
            # no mask: causal attention sees nothing on its right, and without one it runs in its fastest kernel
            hidden = self._model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
            last = hidden[torch.arange(len(batch), device=self._device), lengths - 1]
            logits = self._head(last.to(self._head.weight.dtype))
        return [finite(reward - self.engine["reward_offset"]) for reward in logits[:, 0].tolist()]


def _load_classifier(folder: Path, options: ScoringOptions) -> PreTrainedModel:
    from transformers import AutoModelForSequenceClassification

    trust = options.trust_remote_code
    check_head_shapes(folder, tensor_files(folder), head_shapes(folder, armorm=False, trust_remote_code=trust))
    model, report = AutoModelForSequenceClassification.from_pretrained(
        folder,
        dtype=resolve_dtype(options),
        device_map={"": options.device},
        trust_remote_code=trust,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    check_none_missing(folder, report["missing_keys"])
    return model.eval()


def _reads_last_token(model: PreTrainedModel) -> bool:
    """Whether this is transformers' causal decoder with a linear `score` on top, as against an encoder with a
    pooler.
    """
    import torch

    return (
        type(model).__module__.startswith("transformers.")
        and isinstance(getattr(model, "score", None), torch.nn.Linear)
        and getattr(model.config, "is_causal", True)
        and not getattr(model.config, "use_bidirectional_attention", False)
    )


class ArmoRM:
    """ArmoRM: the gated score, its 19 objectives and their coefficients. See core/ranking/armorm.py."""

    has_coefficients = True

    def __init__(self, folder: Path, chat: Chat, options: ScoringOptions, engine: dict[str, Any]):
        import torch

        from rlhf_pipeline.core.ranking import armorm

        self._chat = chat
        self._device = options.device
        self._model = armorm.load_armorm(
            folder,
            dtype=resolve_dtype(options),
            head_dtype=getattr(torch, options.head_dtype),
            device=options.device,
        )
        self.objectives = self._model.head.names
        self._pattern = armorm.header_pattern(chat.prompt_ids("a"), chat.prompt_ids("b"))
        self._budget = TokenBudget(choose_batch_tokens(options))
        self.engine = engine

    def score(self, rows: Sequence[Row]) -> list[Score]:
        return _score_conversations(rows, self._encode, self._forward, self.engine["max_length"], self._budget)

    def close(self) -> None:
        del self._model
        _free_memory()

    def _encode(self, row: Row) -> Encoded | str:
        from rlhf_pipeline.core.ranking.armorm import find_gate

        prompt_ids = self._chat.prompt_ids(row["prompt"])
        ids = self._chat.conversation_ids(row["prompt"], row["response"])
        gate = find_gate(prompt_ids, self._pattern)
        if gate is None or ids[: gate + 1] != prompt_ids[: gate + 1]:
            return "no gate: the rendered prompt does not end in the header that opens an assistant's turn"
        return Encoded(ids, gate)

    def _forward(self, batch: Sequence[Encoded]) -> list[Score]:
        import torch

        input_ids, lengths = _pad(batch, self._device)
        gates = torch.tensor([encoded.gate for encoded in batch], device=self._device)
        output = self._model(input_ids, lengths, gates)
        names = self.objectives
        columns = (output.score.tolist(), output.objectives.tolist(), output.coefficients.tolist())
        return [
            finite(reward, dict(zip(names, objectives, strict=True)), dict(zip(names, coefficients, strict=True)))
            for reward, objectives, coefficients in zip(*columns, strict=True)
        ]


def _score_conversations(
    rows: Sequence[Row],
    encode: Callable[[Row], Encoded | str],
    forward: Callable[[Sequence[Encoded]], list[Score]],
    max_length: int,
    budget: TokenBudget,
) -> list[Score]:
    """Scores in the rows' order, computed in batches of rows of like length."""
    scores, waiting = encode_rows(rows, encode, max_length)
    while waiting:
        for indices in _plan(waiting, budget):
            batch = [waiting[i] for i in indices]
            results = _forward_or_none(forward, batch)
            if results is None:
                _shrink(budget, batch)
                break
            for i, score in zip(indices, results, strict=True):
                scores[i] = score
                del waiting[i]
    return [scores[i] for i in range(len(rows))]


def encode_rows(
    rows: Sequence[Row], encode: Callable[[Row], Encoded | str], max_length: int
) -> tuple[dict[int, Score], dict[int, Encoded]]:
    """By their index: the scores of rows that can't be scored, and the others' ids."""
    encoded = [_encode_or_reason(row, encode, max_length) for row in rows]
    scores = {i: Score(None, item) for i, item in enumerate(encoded) if isinstance(item, str)}
    return scores, {i: item for i, item in enumerate(encoded) if not isinstance(item, str)}


def _encode_or_reason(row: Row, encode: Callable[[Row], Encoded | str], max_length: int) -> Encoded | str:
    if reason := empty(row):
        return reason
    try:
        encoded = encode(row)
    except BadUse as error:
        return f"not rendered: {error}"
    if isinstance(encoded, Encoded) and len(encoded.ids) > max_length:
        return f"too long: {len(encoded.ids)} tokens, at most {max_length} fit"
    return encoded


def empty(row: Row) -> str | None:
    """The reason why there is nothing to score, if there isn't."""
    if not row["prompt"]:
        return "empty prompt"
    return None if row["response"] and row["response"].strip() else "empty response"


def _plan(waiting: Mapping[int, Encoded], budget: TokenBudget) -> list[list[int]]:
    """Batches of keys of `waiting`, longest first, each of at most `budget.tokens` tokens or one row."""
    from rlhf_pipeline.core.batches import plan_calls

    keys = list(waiting)
    [calls] = plan_calls([len(waiting[key].ids) for key in keys], world_size=1, max_tokens=budget.tokens)
    return [[keys[i] for i in call.indices] for call in calls]


def _forward_or_none(
    forward: Callable[[Sequence[Encoded]], list[Score]], batch: Sequence[Encoded]
) -> list[Score] | None:
    """None when the GPU's memory was too small for the batch."""
    import torch

    try:
        with torch.inference_mode():
            return forward(batch)
    except torch.OutOfMemoryError:
        return None


def _shrink(budget: TokenBudget, batch: Sequence[Encoded]) -> None:
    """Halve the budget after `batch` did not fit. Raises WorkFailed if it was one row."""
    longest = max(len(encoded.ids) for encoded in batch)
    if len(batch) == 1:
        raise WorkFailed(
            f"one conversation of {longest} tokens does not fit into the GPU's memory: free it, or pass a "
            "--dtype of fewer bytes or a smaller --max_length (longer rows then get no reward)."
        )
    budget.tokens = longest * len(batch) // 2
    _free_memory()


def _free_memory() -> None:
    """Give the GPU back what torch keeps of it for tensors that are no more."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _pad(batch: Sequence[Encoded], device: str) -> tuple[Tensor, Tensor]:
    """(B, T) ids padded on the right, and (B,) lengths."""
    from rlhf_pipeline.core.batches import collate

    padded = collate([encoded.ids for encoded in batch], [()] * len(batch), device=device)
    return padded.input_ids, padded.prompt_lengths


def finite(
    reward: float, objectives: dict[str, float] | None = None, coefficients: dict[str, float] | None = None
) -> Score:
    """The score of a row; NaN and infinities are none."""
    if not math.isfinite(reward):
        return Score(None, f"not finite: {reward}")
    return Score(reward, None, objectives, coefficients)
