"""Models of many families with a few thousand random weights, and sequences for them."""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY = 300
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
PROMPTS = [[5, 6, 7, 8], [9, 10], [3] * 11]
RESPONSES = [[11, 12, 2], [13, 14, 15, 16, 17, 2], [21]]


def make_model(family: str = "llama", *, attention: str = "sdpa", seed: int = 0, **sizes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**SIZES, **sizes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """{parameter: gradient}, which are taken away from the model."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found
