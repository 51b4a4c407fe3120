"""Random-weight reward models in the layouts of the published ones, small enough to score in milliseconds."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaForSequenceClassification, LlamaModel

from rlhf_pipeline.core.world import tiny_llama

TEXTS = [
    "What is the capital of France?",
    "Happy to help! The capital is Paris.",
    "List three birds.",
    "A crow.",
]


def _config(tokenizer: Any, vocab_size: int) -> Any:
    config = tiny_llama.llama_config(
        tokenizer,
        hidden_size=64,
        num_layers=2,
        num_heads=2,
        intermediate_size=96,
        init_std=0.2,
        max_length=256,
    )
    config.vocab_size = vocab_size
    return config


def write_armorm(folder: Path, *, seed: int = 0) -> Path:
    """The published checkpoint's layout: two shards, bfloat16 backbone `model.*`, float32 head, class in
    remote code.

    As in the published one the embedding has a row for one added token, [PAD].
    """
    torch.manual_seed(seed)
    tokenizer = tiny_llama.build_tokenizer(TEXTS, 400)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    config = _config(tokenizer, len(tokenizer))
    backbone = {f"model.{k}": v.to(torch.bfloat16) for k, v in LlamaModel(config).state_dict().items()}
    objectives, width = 19, 32
    transform = torch.eye(objectives)
    transform[4] -= 0.3 * torch.rand(objectives)
    widths = [64, width, width, width, objectives]
    head = {
        "regression_layer.weight": torch.randn(objectives, 64) * 0.1,
        "reward_transform_matrix": transform,
        "gating.logit_scale": torch.tensor([1.3]),
    }
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        head[f"gating.layers.{i}.weight"] = torch.randn(b, a) * (3.0 / a**0.5)
        head[f"gating.layers.{i}.bias"] = torch.randn(b)
    tokenizer.save_pretrained(folder)
    save_shards(folder, [backbone, head])
    values = config.to_dict() | {
        "architectures": ["LlamaForRewardModelWithGating"],
        "auto_map": {"AutoModelForSequenceClassification": "modeling_custom.LlamaForRewardModelWithGating"},
        "gating_hidden_dim": width,
        "gating_n_hidden": 3,
        "gating_temperature": 10,
        "num_objectives": objectives,
        "pad_token_id": tokenizer.pad_token_id,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def save_shards(folder: Path, shards: list[dict[str, torch.Tensor]]) -> None:
    """model-0000i-of-0000N.safetensors and their index."""
    weight_map = {}
    for i, tensors in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_classifier(folder: Path, *, seed: int = 0, offset: float | None = None, num_labels: int = 1) -> Path:
    """A LlamaForSequenceClassification; its pad token is the end of turn, as in many published reward
    models.
    """
    torch.manual_seed(seed)
    tokenizer = tiny_llama.build_tokenizer(TEXTS, 400)
    tokenizer.pad_token = tiny_llama.END_OF_TURN
    config = _config(tokenizer, len(tokenizer))
    config.num_labels = num_labels
    config.pad_token_id = tokenizer.pad_token_id
    if offset is not None:
        config.rlhf_pipeline_reward_offset = offset
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
