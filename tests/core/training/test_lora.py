"""LoRA: what is trained, in which dtype, from which start, and how it is put into the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlhf_pipeline.core.training import lora
from rlhf_pipeline.core.training.lora import Lora


def make_model(dtype: torch.dtype) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes)).to(dtype)


def downward(model: Any) -> dict[str, torch.Tensor]:
    """The A of every adapter."""
    return {name: value for name, value in model.state_dict().items() if "lora_A" in name}


def test_the_merged_weight_is_w_plus_alpha_over_r_times_b_a():
    """W the identity, A (1 2), B (3 4)^T, alpha / r 2: I + 2 (3 6; 4 8). All else keeps its value and name."""
    layer = "base_model.model.model.layers.0.mlp.up_proj"
    state = {
        f"{layer}.base_layer.weight": torch.eye(2, dtype=torch.bfloat16),
        f"{layer}.base_layer.bias": torch.tensor([5.0, 6.0]),
        f"{layer}.lora_A.default.weight": torch.tensor([[1.0, 2.0]]),
        f"{layer}.lora_B.default.weight": torch.tensor([[3.0], [4.0]]),
        "base_model.model.lm_head.weight": torch.ones(1),
    }
    merged = lora.merged(state, Lora(r=1, alpha=2), dtype=torch.float32)
    assert merged["model.layers.0.mlp.up_proj.weight"].tolist() == [[7.0, 12.0], [8.0, 17.0]]
    assert merged["model.layers.0.mlp.up_proj.bias"].tolist() == [5.0, 6.0]
    assert merged["lm_head.weight"].tolist() == [1.0] and len(merged) == 3


@pytest.mark.parametrize(("float32", "expected"), [(True, torch.float32), (False, torch.bfloat16)])
def test_over_a_bf16_model_adapters_alone_are_trained_and_in_float32_where_they_are_stepped(float32, expected):
    model = lora.attach(make_model(torch.bfloat16), Lora(r=2), seed=1, float32=float32)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert len(trained) == 2 * 7 and all(".lora_" in name for name in trained)
    assert {value.dtype for value in trained.values()} == {expected}
    frozen = [value.dtype for value in model.parameters() if not value.requires_grad]
    assert set(frozen) == {torch.bfloat16}


def test_adapters_begin_as_the_seed_says_and_the_callers_random_numbers_go_on():
    def drawn(seed: int) -> dict[str, torch.Tensor]:
        return downward(lora.attach(make_model(torch.float32), Lora(r=2), seed=seed, float32=True))

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    torch.manual_seed(3)
    expected = torch.rand(1)
    model = make_model(torch.float32)
    torch.manual_seed(3)
    lora.attach(model, Lora(r=2), seed=9, float32=True)
    assert torch.equal(torch.rand(1), expected)


def test_what_is_said_to_be_trained_is_what_is_trained(tiny_policy):
    size = lora.measure(tiny_policy, Lora(r=4, target_modules=("q_proj", "mlp.up_proj")))
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_policy)
    assert size.total == sum(value.numel() for value in model.parameters())
    wrapped = lora.attach(model, Lora(r=4, target_modules=("q_proj", "mlp.up_proj")), seed=1, float32=True)
    assert size.trained == sum(value.numel() for value in wrapped.parameters() if value.requires_grad)
    assert size.layers == 4
