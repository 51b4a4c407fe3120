"""The oracle throughout: all logits from the model's own forward, log_softmax over them, gather."""

import copy
import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import REPO, run_process
from random_models import PROMPTS, RESPONSES, VOCABULARY, gradients, make_model
from rlhf_pipeline.core import logps
from rlhf_pipeline.core.batches import collate
from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.logps import install, linear_logps, response_logps, token_logps
from tensor_bytes import peak_bytes


def plain_token_logps(model, batch, temperature):
    lengths = batch.prompt_lengths + batch.response_lengths
    mask = (torch.arange(batch.input_ids.shape[1]) < lengths[:, None]).long()
    logits = model(input_ids=batch.input_ids, attention_mask=mask, use_cache=False).logits
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    table = torch.log_softmax(exact / temperature, dim=-1).flatten(0, 1)
    return table[batch.positions].gather(1, batch.labels[:, None])[:, 0]


@pytest.fixture
def small_chunks(monkeypatch):
    """Four float64 rows of logits a chunk: the ten response tokens above make chunks of 4, 4 and 2."""
    monkeypatch.setitem(logps.CHUNK_BYTES, "cpu", 4 * VOCABULARY * 8)


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied llama": {"tie_word_embeddings": True},
    "phi, biased head": {"family": "phi", "num_key_value_heads": 2},
    "gemma2, logits soft-capped": {
        "family": "gemma2",
        "final_logit_softcapping": 2.0,
        "attention": "eager",
    },
    "cohere, logits multiplied": {"family": "cohere", "logit_scale": 0.0625},
    "granite, logits divided": {"family": "granite", "logits_scaling": 8.0},
    "opt, decoder within the decoder": {"family": "opt", "word_embed_proj_dim": 32, "ffn_dim": 64},
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_log_probs_and_every_gradient_equal_the_full_form(name, temperature, small_chunks):
    """float64, to 1e-10. Every token has another weight in the sum: no two gradients can be confused."""
    model = make_model(**FAMILIES[name]).double()
    batch = collate(PROMPTS, RESPONSES)
    upstream = torch.linspace(-1.0, 2.0, len(batch.labels), dtype=torch.float64)
    expected = plain_token_logps(model, batch, temperature)
    (expected * upstream).sum().backward()
    expected_gradients = gradients(model)

    install(model)
    found = token_logps(model, batch, temperature)
    (found * upstream).sum().backward()
    found_gradients = gradients(model)
    assert found.dtype == torch.float64
    assert (found - expected).abs().max() < 1e-10
    assert found_gradients.keys() == expected_gradients.keys()
    for parameter, gradient in expected_gradients.items():
        assert (found_gradients[parameter] - gradient).abs().max() < 1e-10, parameter


def test_float32_log_probs_and_gradients_equal_the_full_form(small_chunks):
    """Log-probs to 1e-5; gradients, sums of some hundred terms of size one, to 1e-4."""
    model = make_model()
    batch = collate(PROMPTS, RESPONSES)
    expected = plain_token_logps(model, batch, 0.8)
    expected.sum().backward()
    expected_gradients = gradients(model)
    install(model)
    found = token_logps(model, batch, 0.8)
    found.sum().backward()
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-5
    for parameter, gradient in gradients(model).items():
        assert (gradient - expected_gradients[parameter]).abs().max() < 1e-4, parameter


def test_a_response_log_prob_is_the_sum_over_its_tokens_and_zero_without_any():
    model = make_model()
    batch = collate(PROMPTS, [RESPONSES[0], [], RESPONSES[2]])
    tokens = plain_token_logps(model, batch, 1.0)
    install(model)
    expected = torch.stack([tokens[:3].sum(), torch.zeros(()), tokens[3]])
    assert (response_logps(model, batch, 1.0) - expected).abs().max() < 1e-5


def test_padding_and_batching_do_not_change_a_log_prob():
    """float32, to 1e-5: alone, together, and with another id under the padding."""
    model = make_model()
    install(model)
    with torch.no_grad():
        together = response_logps(model, collate(PROMPTS, RESPONSES), 0.8)
        other_fill = response_logps(model, collate(PROMPTS, RESPONSES, fill_id=VOCABULARY - 1), 0.8)
        pairs = zip(PROMPTS, RESPONSES, strict=True)
        alone = torch.cat([response_logps(model, collate([p], [r]), 0.8) for p, r in pairs])
    assert (together - alone).abs().max() < 1e-5
    assert (together - other_fill).abs().max() < 1e-5


def test_ordinary_calls_generation_and_state_dict_stay_as_they_were(tmp_path):
    from transformers import AutoModelForCausalLM

    model = make_model(tie_word_embeddings=True)
    ids = torch.tensor([PROMPTS[0]])
    keys, logits, signature = list(model.state_dict()), model(ids).logits, inspect.signature(model.forward)
    sampled = model.generate(ids, max_new_tokens=8, do_sample=False)
    install(model)
    assert list(model.state_dict()) == keys
    assert inspect.signature(model.forward) == signature  # generate makes a mask only for a forward that takes one
    assert model(input_ids=ids).logits.equal(logits)
    assert model.generate(ids, max_new_tokens=8, do_sample=False).equal(sampled)
    copied = copy.deepcopy(model)
    copied.lm_head.weight.data.zero_()  # all words equally likely
    batch = collate(PROMPTS, RESPONSES)
    assert token_logps(copied, batch, 1.0).allclose(-torch.tensor(float(VOCABULARY)).log())
    assert not token_logps(model, batch, 1.0).allclose(token_logps(copied, batch, 1.0))
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits.equal(logits)


def test_a_lora_model_gives_the_full_forms_log_probs_and_adapter_gradients(small_chunks):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(make_model().double(), config)
    batch = collate(PROMPTS, RESPONSES)
    expected = plain_token_logps(model, batch, 0.8)
    expected.sum().backward()
    expected_gradients = gradients(model)
    install(model)
    found = token_logps(model, batch, 0.8)
    found.sum().backward()
    found_gradients = gradients(model)
    assert (found - expected).abs().max() < 1e-10
    assert len(found_gradients) == 8  # A and B of two projections in two layers, nothing else
    for parameter, gradient in expected_gradients.items():
        assert (found_gradients[parameter] - gradient).abs().max() < 1e-10


def test_an_adapter_on_the_head_is_refused_by_name():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(BadUse, match="leave lm_head out of the adapter's target modules"):
        install(model)


def test_a_model_that_does_something_unknown_to_its_logits_is_refused_and_left_as_it_was():
    from transformers import LlamaForCausalLM

    class Shifted(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + torch.arange(output.logits.shape[-1])
            return output

    class Scaled(LlamaForCausalLM):
        """Scales the hidden state before the head, as T5 and MiniCPM do."""

        def forward(self, input_ids, **kwargs):
            output = self.model(input_ids=input_ids, **kwargs)
            return type(super().forward(input_ids))(logits=self.lm_head(output.last_hidden_state * 0.5))

    for model_class in (Shifted, Scaled):
        model = model_class(make_model().config)
        ids = torch.tensor([PROMPTS[0]])
        logits = model(ids).logits
        with pytest.raises(BadUse, match=f"{model_class.__name__} does more to its logits"):
            install(model)
        assert model(ids).logits.equal(logits)
        assert "forward" not in vars(model.model)
        assert "forward" not in vars(model.lm_head)


def test_gradient_checkpointing_is_active_and_changes_nothing():
    """Each of two layers runs once forward and once more in backward."""
    model = make_model().double()
    install(model)
    batch = collate(PROMPTS, RESPONSES)
    token_logps(model, batch, 0.8).sum().backward()
    expected = gradients(model)
    runs = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda *_: runs.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    token_logps(model, batch, 0.8).sum().backward()
    assert len(runs) == 4
    for parameter, gradient in gradients(model).items():
        assert (gradient - expected[parameter]).abs().max() < 1e-12


def test_under_bf16_autocast_products_are_bf16_and_sums_are_float32(small_chunks):
    """Against the full form under the same autocast with a float32 log-softmax: equal to float32 rounding.
    Gradients of float32 weights are float32, and differ by bf16's rounding, 1 in 128 of their norm."""
    model = make_model()
    batch = collate(PROMPTS, RESPONSES)
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain_token_logps(model, batch, 1.0)
    expected.sum().backward()
    expected_gradient = gradients(model)["lm_head.weight"]
    install(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = token_logps(model, batch, 1.0)
    found.sum().backward()
    gradient = gradients(model)["lm_head.weight"]
    assert found.dtype == gradient.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-4
    assert (gradient - expected_gradient).norm() < expected_gradient.norm() / 128


def test_autocast_is_the_bf16_computation_with_a_float32_gradient():
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 8), torch.randn(16, 8)
    labels = torch.arange(5)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        leaf = weight.to(dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            values = linear_logps(hidden.to(dtype), leaf, None, labels)
        [gradient] = torch.autograd.grad(values.sum(), [leaf])
        found.append((values, gradient))
    assert found[0][0].equal(found[1][0])
    assert found[0][1].dtype == torch.float32
    assert found[0][1].to(torch.bfloat16).equal(found[1][1])


def test_a_bf16_models_log_probs_are_float32_and_its_head_gradient_is_summed_in_float32(monkeypatch):
    """400 equal tokens in chunks of one. A bf16 running sum stops growing at 256 equal summands; the float64
    sum must be met to bf16's own rounding."""
    monkeypatch.setitem(logps.CHUNK_BYTES, "cpu", 1)
    torch.manual_seed(0)
    hidden = torch.ones(400, 8, dtype=torch.bfloat16)
    weight = torch.randn(16, 8).to(torch.bfloat16).requires_grad_()
    labels = torch.full((400,), 3)
    found = linear_logps(hidden, weight, None, labels)
    found.sum().backward()
    exact = weight.detach().double().requires_grad_()
    torch.log_softmax(hidden.double() @ exact.T, dim=-1)[:, 3].sum().backward()
    assert weight.grad is not None
    assert exact.grad is not None
    assert (found.dtype, weight.grad.dtype) == (torch.float32, torch.bfloat16)
    assert (weight.grad.double() - exact.grad).norm() < exact.grad.norm() / 128


def test_memory_is_a_few_chunks_and_not_the_full_logits(monkeypatch):
    """512 tokens of 16384 words: a float32 copy of all logits is 32 MiB, a chunk 1 MiB. Above the gradients
    of head (4 MiB) and hidden state, the full form holds two copies at least, ours about three chunks."""
    mib = 2**20
    monkeypatch.setitem(logps.CHUNK_BYTES, "cpu", mib)
    weight = torch.randn(16384, 64, requires_grad=True)
    hidden = torch.randn(512, 64, requires_grad=True)
    labels = torch.randint(16384, (512,))
    needed = 4 * (weight.numel() + hidden.numel())

    def full():
        torch.log_softmax(hidden @ weight.T, dim=-1).gather(1, labels[:, None]).sum().backward()

    def ours():
        linear_logps(hidden, weight, None, labels).sum().backward()

    peaks = []
    for form in (full, ours):
        weight.grad = hidden.grad = None
        peaks.append(peak_bytes(form) - needed)
    assert peaks[0] > 64 * mib
    assert peaks[1] < 3.5 * mib


def test_a_pass_without_gradients_keeps_nothing():
    model = make_model()
    install(model)
    batch = collate(PROMPTS, RESPONSES)
    expected = token_logps(model, batch, 0.8)
    with torch.no_grad():
        found = token_logps(model, batch, 0.8)
    assert not found.requires_grad
    assert found.equal(expected)


@pytest.mark.slow
def test_one_process_ddp_and_zero3_agree_on_log_probs_and_on_an_update(tmp_path, command_environment):
    """Tied embeddings, gradient checkpointing, seven pairs in calls of one (so one of two ranks repeats a pair
    at weight 0): losses to 1e-5 relative, per-token log-probs before and after the update to 1e-4, and every
    launch saves a policy that loads; so with packed rows, which the one process has not. ZeRO-3 gathers the
    head's weight once in a call's forward and once in its backward."""
    from transformers import AutoModelForCausalLM

    start = tmp_path / "start"
    make_start(start)
    stage_3 = REPO / "accelerate_cfgs" / "deepspeed_config_stage_3.yaml"
    zero_3 = f"-m accelerate.commands.launch --config_file {stage_3} --mixed_precision no --num_processes 2"
    launches = {
        "one process": "",
        "ddp": "-m torch.distributed.run --standalone --nproc_per_node 2",
        "zero-3": f"{zero_3} --main_process_port 0",
        "zero-3, packed rows": f"{zero_3} --main_process_port 0",
    }
    results = {}
    for name, launcher in launches.items():
        output = tmp_path / name
        output.mkdir()
        environment = {"ACCELERATE_USE_CPU": "true"} if name == "ddp" else {}
        script = Path(__file__).with_name("one_update.py")
        attention = "packed" if "packed" in name else "sdpa"
        command: list[object] = [sys.executable, *launcher.split(), script, start, output, attention]
        done = run_process(command, command_environment, env=environment)
        assert done.returncode == 0, done.stderr
        results[name] = torch.load(output / "result.pt")
        logits = AutoModelForCausalLM.from_pretrained(output / "policy")(torch.tensor([PROMPTS[0]])).logits
        results[name]["logits"] = logits.detach()
    one = results["one process"]
    assert (one["after"] - one["before"]).abs().max() > 1e-2
    for name, other in results.items():
        assert other["loss"].item() == pytest.approx(one["loss"].item(), rel=1e-5)
        assert other["norm"] == pytest.approx(one["norm"], rel=1e-4)
        for key in ("before", "after", "logits"):
            assert (other[key] - one[key]).abs().max() < 1e-4, (name, key)
    assert results["zero-3"]["fetches"] == results["zero-3, packed rows"]["fetches"] == 2


def make_start(folder):
    """A tied Llama's folder with a tokenizer file to copy."""
    make_model(tie_word_embeddings=True, vocab_size=400).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
