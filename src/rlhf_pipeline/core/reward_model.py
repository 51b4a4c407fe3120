"""Reward models of our own: a policy with a one-label head, read at the last token of a conversation."""

from __future__ import annotations

import shutil
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf_pipeline.core import models
from rlhf_pipeline.core.batches import Batch
from rlhf_pipeline.core.command import BadUse

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REWARD_OFFSET = "rlhf_pipeline_reward_offset"
"""config.json's key for the mean reward on the policy's own responses; scoring subtracts it."""


def draw_reward_model(policy: Path, folder: Path, *, seed: int) -> None:
    """Write `policy` as a sequence classifier with one label; a head it does not have yet is drawn by `seed`.

    Done once and before any launch partitions parameters, so that every launch starts from the same head.
    """
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    config = models.load_config(policy)
    config.num_labels = 1
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # that the head is missing is why we are here
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            policy, config=config, dtype=models.stored_dtype(policy), use_safetensors=True
        )
    logging.set_verbosity(verbosity)
    partial = folder.with_name(f".{folder.name}")
    model.save_pretrained(partial)
    for name in models.files_matching(policy, models.TOKENIZER_FILES):
        shutil.copyfile(policy / name, partial / name)
    partial.rename(folder)


def load_reward_model(folder: Path, *, dtype: torch.dtype, attn_implementation: str) -> PreTrainedModel:
    """The classifier that `draw_reward_model` wrote, without dropout, taught by `install`."""
    from transformers import AutoModelForSequenceClassification

    config = models.load_config(folder)
    models.disable_dropout(config)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        folder, config=config, dtype=dtype, attn_implementation=attn_implementation, use_safetensors=True
    )
    install(model)
    return model


def install(model: nn.Module) -> None:
    """Make `model(input_ids=, last=)` return the float32 rewards (B,) at the flat positions `last` (B,).

    transformers finds the last token by the pad id, which is the wrong one where that also ends a turn, and refuses
    batches of models without a pad id, as Llama 3 is. Raises BadUse for a head other than a linear `score`.
    """
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise BadUse(f"--base_model: {type(model).__name__} has no linear head named score; choose a decoder model.")
    ordinary = model.forward

    def forward(self: Any, *args: Any, last: Tensor | None = None, **kwargs: Any) -> Any:
        if last is None:
            return ordinary(*args, **kwargs)
        hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        return self.score(hidden.flatten(0, 1).index_select(0, last))[:, 0].float()

    model.forward = types.MethodType(forward, model)


def rewards(model: nn.Module, batch: Batch) -> Tensor:
    """(B,) rewards of a batch of conversations, in one call of `model`, which may be wrapped by an engine."""
    width = batch.input_ids.shape[1]
    ends = batch.prompt_lengths + batch.response_lengths - 1
    last = torch.arange(len(ends), device=ends.device) * width + ends
    result: Tensor = model(input_ids=batch.input_ids, last=last)
    return result
