"""What train, sft and reward ask before any model is loaded: do flags make sense, is there room for what will be
written, do pairs, model and reference log-probs belong together?
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_pipeline.core import models
from rlhf_pipeline.core.chat import Chat
from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.preflight import check_disk, check_importable, check_writable, existing_parent
from rlhf_pipeline.core.progress import amount
from rlhf_pipeline.core.storage import Source
from rlhf_pipeline.core.training.distributed import check_accumulation
from rlhf_pipeline.core.training.losses import Loss
from rlhf_pipeline.core.training.pairs import PairData

PROMPTS_RENDERED = 16
"""Prompts of a dataset made elsewhere that are rendered again."""
STATE_BYTES = 12
"""Of a checkpoint for each trained weight: the weight in float32 and Adam's two moments."""


def check_settings(config: Any) -> None:
    """Raise BadUse for values of the flags that train, sft and reward share which can't be meant."""
    for name in ("batch_size", "lr", "epochs"):
        if getattr(config, name) <= 0:
            raise BadUse(f"--{name} is {getattr(config, name)}; expected a number above 0.")
    if config.max_grad_norm is not None and config.max_grad_norm <= 0:
        raise BadUse(
            f"--max_grad_norm is {config.max_grad_norm}; expected a number above 0, or None to leave gradients alone."
        )
    for name in ("per_device_train_batch_size", "micro_batch_tokens", "keep_checkpoints"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise BadUse(f"--{name} is {value}; expected 1 or more.")
    if config.save_every < 0:
        raise BadUse(f"--save_every is {config.save_every}; expected 0 or more updates.")
    for package, asked in (("tensorboard", config.tensorboard), ("wandb", config.wandb is not None)):
        if asked:
            check_importable(package, flag=f"--{package}")
    steps = getattr(config, "gradient_accumulation_steps", None)
    check_accumulation(config.batch_size, config.per_device_train_batch_size, steps)


def check_room(folder: Path, start: Path, config: Any, *, updates: int, trained: int | None = None) -> str:
    """What a run writes to `folder` and what room there is, in words. Raises BadUse where it would not fit.

    start: the folder of the model to start from. trained: its weights that are trained, all by default. One checkpoint
    more than --keep_checkpoints is there while the next is written.
    """
    trust = getattr(config, "trust_remote_code", False)
    parameters = models.without_weights(start, trust_remote_code=trust).num_parameters()
    # weights may not be here yet, the config is; fresh ones are drawn in float32
    said = None if getattr(config, "fresh", False) else models.load_config(start, trust_remote_code=trust).dtype
    policy = parameters * (said or torch.float32).itemsize
    saves = -(-updates // config.save_every) if config.save_every else 1
    copies = min(config.keep_checkpoints + 1, saves)
    state = STATE_BYTES * (parameters if trained is None else trained)
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    check_writable(folder, flag="--output_dir")
    check_disk(folder, policy + copies * state - there, flag="--output_dir")
    free = shutil.disk_usage(existing_parent(folder)).free
    states = f"{copies} checkpoint{'s' * (copies > 1)} of {amount(state, 'B')}"
    return f"{amount(policy, 'B')} and, until it is done, {states}; {amount(free, 'B')} free"


def check_same_tokenizer(source: Source, chat: Chat, model: str) -> None:
    """Raise BadUse if the pairs were tokenized by another tokenizer or chat template than the model's."""
    made_with = (source.provenance or {}).get("chat")
    if made_with is None:
        return
    ours = chat.describe()
    for key, word in (("tokenizer_hash", "tokenizer"), ("template_hash", "chat template")):
        if made_with[key] != ours[key]:
            raise BadUse(
                f"{source.name} was tokenized with another {word} ({made_with[key][:12]}) than that of --base_model "
                f"{model} ({ours[key][:12]}): run filter with --model {model}, train the model that filter had, or "
                "pass the --chat_template that it had."
            )


def check_same_prompts(source: Source, pairs: PairData, chat: Chat) -> None:
    """Raise BadUse if pairs that don't say what made them have prompts that the template renders otherwise."""
    if "chat" in (source.provenance or {}) or "prompt" not in source.columns:
        return
    prompts = [row["prompt"] for row in source.rows(["prompt"], stop=PROMPTS_RENDERED)]
    for row, ours in enumerate(chat.encode_prompts(prompts)):
        theirs = pairs.prompt[row].tolist()
        if ours != theirs:
            raise BadUse(
                f"{source.name} doesn't say what made it, and its prompt {row} has {len(theirs)} tokens, not the "
                f"{len(ours)} that the chat template of {chat.name} makes of it: pass the --base_model or the "
                "--chat_template that it was made with."
            )


def check_given_reference(source: Source, splits: Sequence[PairData], loss: Loss, loss_name: str) -> None:
    """Raise BadUse if the pairs' own log-probs can't be the reference: not needed, not there, or not numbers."""
    if not loss.needs_reference:
        raise BadUse(f"--reference_from_input is set, but --loss {loss_name} has no reference: drop it.")
    if loss.needs_mismatched:
        raise BadUse(f"--reference_from_input lacks the mismatched pairs that --loss {loss_name} needs: drop it.")
    name = f"--reference_from_input: {source.name}"
    for pairs in splits:
        if pairs.chosen_logp is None or pairs.rejected_logp is None:
            raise BadUse(
                f"{name} has no columns chosen_logp and rejected_logp (or chosen_logprob and reject_logprob) in every "
                "split; drop the flag, and they are computed."
            )
        if not np.isfinite(pairs.chosen_logp + pairs.rejected_logp).all():
            raise BadUse(f"{name} has log-probs that are no numbers; drop the flag, and they are computed.")
