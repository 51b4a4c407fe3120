"""The oracle: the same model with padded rows under transformers' own sdpa."""

from typing import Any

import pytest
import torch

from random_models import PROMPTS, RESPONSES, gradients, make_model
from rlhf_pipeline.core import attention
from rlhf_pipeline.core.attention import check_packed, takes_packed_rows
from rlhf_pipeline.core.batches import collate
from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.logps import install, token_logps
from rlhf_pipeline.core.training.distributed import make_accelerator, make_engine

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "as many key heads as heads": {"num_key_value_heads": 2},
    "mistral": {"family": "mistral", "sliding_window": None},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3"},
    "phi": {"family": "phi", "num_key_value_heads": 2},
    "gemma": {"family": "gemma"},
    "cohere": {"family": "cohere"},
    "granite": {"family": "granite"},
    "olmo2": {"family": "olmo2"},
    "learned positions": {"family": "opt", "word_embed_proj_dim": 32, "ffn_dim": 64},
}


TWICE = PROMPTS + PROMPTS, RESPONSES + RESPONSES[::-1]
"""Prompts that two responses share, one after the other; one of them is much the longest."""


def make_packed(**sizes):
    attention.register()
    model = make_model(**sizes, attention="packed")
    install(model)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_rows_give_the_log_probs_and_gradients_of_padded_ones(name):
    """float32, to 1e-5, and gradients, sums of some hundred terms of size one, to 1e-4."""
    padded, packed = make_model(**FAMILIES[name]), make_packed(**FAMILIES[name])
    install(padded)
    assert (takes_packed_rows(padded), takes_packed_rows(packed)) == (False, True)
    in_a_row = collate(*TWICE, packed=True)
    assert in_a_row.input_ids.numel() == sum(map(len, PROMPTS)) + 2 * sum(map(len, RESPONSES))
    expected = token_logps(padded, collate(*TWICE), 0.8)
    found = token_logps(packed, in_a_row, 0.8)
    assert (found - expected).abs().max() < 1e-5
    for logps in (expected, found):
        (logps * torch.linspace(-1.0, 2.0, len(logps))).sum().backward()
    expected_gradients = gradients(padded)
    for parameter, gradient in gradients(packed).items():
        assert (gradient - expected_gradients[parameter]).abs().max() < 1e-4, parameter


def test_gradient_checkpointing_and_autocast_take_packed_rows():
    """bf16 autocast: to its rounding of logits of size ten, 1 in 128."""
    model = make_packed()
    exact = token_logps(model, collate(*TWICE, packed=True), 1.0)
    exact.sum().backward()
    expected = gradients(model)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    token_logps(model, collate(*TWICE, packed=True), 1.0).sum().backward()
    for parameter, gradient in gradients(model).items():
        assert torch.allclose(gradient, expected[parameter], atol=1e-5), parameter
    with torch.autocast("cpu", torch.bfloat16):
        rounded = token_logps(model, collate(*TWICE, packed=True), 1.0)
    assert (rounded - exact).abs().mean() < 10 / 128


def test_flash_attention_2_gets_whole_sequences_by_transformers_names(monkeypatch):
    """transformers' own code around flash-attn's kernel, for which plain attention of each sequence stands in."""
    from transformers import modeling_flash_attention_utils as flash

    lengths = [len(prompt) + len(response) for prompt, response in zip(*TWICE, strict=True)]
    calls = []

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale):
        assert cu_seqlens_q.diff().tolist() == cu_seqlens_k.diff().tolist() == lengths
        assert (max_seqlen_q, max_seqlen_k, causal) == (max(lengths), max(lengths), True)
        calls.append(len(q))
        attend = torch.nn.functional.scaled_dot_product_attention
        queries, keys, values = (part.transpose(0, 1).split(lengths, 1) for part in (q, k, v))
        outputs = [
            attend(query, key, value, is_causal=True, scale=softmax_scale, enable_gqa=True)
            for query, key, value in zip(queries, keys, values, strict=True)
        ]
        return torch.cat(outputs, 1).transpose(0, 1)

    functions = (None, flash_attn_varlen_func, None, None, None)
    settings = (flash._lazy_define_process_function(flash_attn_varlen_func), None)
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *_: (functions, settings))
    padded, packed = make_model(), make_packed()
    packed.config._attn_implementation = "flash_attention_2"
    install(padded)
    assert takes_packed_rows(packed)
    expected = token_logps(padded, collate(*TWICE), 0.8)
    found = token_logps(packed, collate(*TWICE, packed=True), 0.8)
    assert (found - expected).abs().max() < 1e-5
    assert calls == [sum(lengths)] * packed.config.num_hidden_layers
    assert torch.equal(token_logps(packed, collate(*TWICE, packed=True).to("cpu"), 0.8), found)


def test_torchs_varlen_attention_takes_what_it_is_given():
    """Its kernel runs on CUDA alone; on meta tensors torch checks the arguments of forward and backward, and shapes."""
    packing = collate(*TWICE, packed=True).packing
    assert packing is not None
    total = int(packing.boundaries[-1])
    query, key, value = (
        torch.empty(1, heads, total, 64, dtype=torch.bfloat16, device="meta", requires_grad=True) for heads in (8, 2, 2)
    )
    on_meta = packing._replace(boundaries=packing.boundaries.to("meta"))
    output = attention._attend_varlen(query, key, value, on_meta, 0.125)
    assert output.shape == (1, total, 8, 64)
    output.float().sum().backward()
    assert key.grad is not None
    assert key.grad.shape == key.shape


def test_what_packed_attention_does_not_compute_is_refused_and_never_ignored():
    """Mistral asks for a sliding window; padded rows have no boundaries."""
    batch = collate(PROMPTS, RESPONSES, packed=True)
    with pytest.raises(BadUse, match="MistralAttention wants sliding_window"):
        token_logps(make_packed(family="mistral", sliding_window=4), batch, 1.0)
    with pytest.raises(BadUse, match="LlamaAttention wants rows that are not packed"):
        token_logps(make_packed(), collate(PROMPTS, RESPONSES), 1.0)


def test_a_model_that_sees_its_neighbours_in_a_row_is_refused():
    """Embeddings that are mixed with the token before, as a convolution does, know of no boundaries."""
    model = make_packed()
    check_packed(model, torch.device("cpu"))
    model.model.embed_tokens.register_forward_hook(lambda _module, _args, output: output + output.roll(1, dims=1))
    with pytest.raises(BadUse, match="log-probs depend on the neighbouring sequence"):
        check_packed(model, torch.device("cpu"))


def test_a_kernel_that_does_not_know_a_models_sizes_is_said_in_a_sentence(monkeypatch):
    def unknown(*_args, **_kwargs):
        raise RuntimeError("head size 72 is not supported")

    model = make_packed()
    monkeypatch.setattr(attention, "_attend_each", unknown)
    with pytest.raises(
        BadUse, match=r"packed rows can't be computed here \(head size 72 is not supported\); pass sdpa"
    ):
        check_packed(model, torch.device("cpu"))


def test_only_a_command_that_packs_its_rows_gets_an_engine_that_does():
    """reward pads, also where the attention it loads, flash_attention_2, would take packed rows."""
    for can_pack in (False, True):
        accelerator = make_accelerator(max_grad_norm=None)
        engine = make_engine(
            accelerator, make_packed(), "packed", can_pack=can_pack, gradient_checkpointing=False, lr=1e-3
        )
        assert engine.packed == can_pack
