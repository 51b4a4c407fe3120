"""Do pairs, model and reference log-probs belong together? Asked before any model is loaded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf_pipeline.core.chat import Chat
from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.storage import Source
from rlhf_pipeline.core.training.losses import Loss
from rlhf_pipeline.core.training.pairs import PairData

PROMPTS_RENDERED = 16
"""Prompts of a dataset made elsewhere that are rendered again."""


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
