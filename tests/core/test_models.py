import json
import os
import shutil

import pytest
import torch

from rlhf_pipeline.core import models
from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.models import (
    choose_attention,
    context_window,
    load_config,
    load_policy,
    resolve_model,
    save_policy,
    stored_dtype,
)


def load(folder, dtype=torch.float32):
    return load_policy(folder, dtype=dtype, attn_implementation="sdpa")


@pytest.fixture
def start(tiny_policy, tmp_path):
    """A copy of the tiny policy that tests may change."""
    return shutil.copytree(tiny_policy, tmp_path / "start", ignore=shutil.ignore_patterns("fingerprint.json"))


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def doubled(model):
    return {name: 2.0 * tensor for name, tensor in model.state_dict().items()}


def test_a_saved_policy_is_the_start_with_other_weights(start, tmp_path):
    """Every file but the weights is a byte copy, and other things in the folder stay."""
    model = load(start)
    (tmp_path / "policy" / "reference").mkdir(parents=True)
    (tmp_path / "policy" / "metrics.jsonl").write_text("{}\n")
    save_policy(model, doubled(model), start=start, folder=tmp_path / "policy")
    names = {path.name for path in start.iterdir()}
    assert {path.name for path in (tmp_path / "policy").iterdir()} == names | {"reference", "metrics.jsonl"}
    for name in names - {"model.safetensors"}:
        assert (tmp_path / "policy" / name).read_bytes() == (start / name).read_bytes(), name
    again = load(tmp_path / "policy").state_dict()
    for name, tensor in model.state_dict().items():
        assert again[name].equal(2.0 * tensor)
    assert resolve_model(str(tmp_path / "policy"), flag="--model", chat_template=True).folder.is_dir()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_saved_in_the_dtype_they_started_from(start, tmp_path, dtype):
    """Trained in float32, with tied embeddings, which stay one tensor in the file."""
    edit_config(start, tie_word_embeddings=True, dtype=str(dtype).removeprefix("torch."))
    tied = load(start)
    tied.to(dtype).save_pretrained(start)
    assert stored_dtype(start) == dtype
    model = load(start)
    assert model.dtype == torch.float32
    save_policy(model, model.state_dict(), start=start, folder=tmp_path / "policy")
    assert stored_dtype(tmp_path / "policy") == dtype
    size = (tmp_path / "policy" / "model.safetensors").stat().st_size
    assert size == pytest.approx(sum(p.numel() for p in model.parameters()) * dtype.itemsize, rel=0.02)
    assert load(tmp_path / "policy").lm_head.weight.equal(model.lm_head.weight)


def test_an_interrupted_save_leaves_nothing_that_loads_and_the_next_one_cleans_up(start, tmp_path, monkeypatch):
    """Killed before each of its renames in turn, over a whole older policy: config.json comes last."""
    model = load(start)
    folder = tmp_path / "policy"
    renames = len([path for path in start.iterdir() if path.is_file()])
    real = os.replace
    for allowed in range(renames):
        monkeypatch.setattr(models.os, "replace", real)
        save_policy(model, model.state_dict(), start=start, folder=folder)
        done: list[str] = []

        def replace(source, target, allowed=allowed, done=done):
            if len(done) == allowed:
                raise KeyboardInterrupt
            done.append(target)
            real(source, target)

        monkeypatch.setattr(models.os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            save_policy(model, doubled(model), start=start, folder=folder)
        with pytest.raises(BadUse, match="run that command again"):
            resolve_model(str(folder), flag="--model")
        with pytest.raises((OSError, ValueError)):
            load(folder)
    monkeypatch.setattr(models.os, "replace", real)
    (folder / models.PARTIAL_POLICY / "vocab.json").touch()  # of a save with another tokenizer
    save_policy(model, doubled(model), start=start, folder=folder)
    assert {path.name for path in folder.iterdir()} == {path.name for path in start.iterdir()}


def test_a_save_over_an_older_policy_removes_its_shards_and_tokenizer(start, tmp_path):
    model = load(start)
    folder = tmp_path / "policy"
    model.save_pretrained(folder, max_shard_size="100KB")
    (folder / "vocab.json").touch()
    assert len(list(folder.glob("*.safetensors"))) > 1
    save_policy(model, doubled(model), start=start, folder=folder)
    assert {path.name for path in folder.iterdir()} == {path.name for path in start.iterdir()}


def test_a_published_generation_config_that_transformers_would_not_save_is_copied(start, tmp_path):
    """temperature without do_sample: loads with a warning, and save_pretrained refuses it."""
    path = start / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.6, "do_sample": False, "eos_token_id": [1, 2]}))
    model = load(start)
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained(tmp_path / "plain")
    save_policy(model, model.state_dict(), start=start, folder=tmp_path / "policy")
    assert (tmp_path / "policy" / "generation_config.json").read_bytes() == path.read_bytes()
    assert model.generation_config.temperature == 0.6


def test_a_loaded_policy_has_no_dropout_and_its_saved_config_keeps_it(start, tmp_path):
    edit_config(start, attention_dropout=0.5)
    model = load(start).train()
    ids = torch.arange(3, 40)[None]
    assert model(ids).logits.equal(model(ids).logits)
    assert model.model.layers[0].self_attn.attention_dropout == 0.0
    save_policy(model, model.state_dict(), start=start, folder=tmp_path / "policy")
    assert json.loads((tmp_path / "policy" / "config.json").read_text())["attention_dropout"] == 0.5


def sentence(text, **options):
    with pytest.raises(BadUse) as error:
        resolve_model(str(text), flag="--model", **options)
    return str(error.value)


def test_a_folder_that_is_no_model_is_refused_in_one_sentence(start, tmp_path):
    assert "no such folder" in sentence(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "has no config.json (it has nothing)" in sentence(tmp_path / "empty")
    resolve_model(str(start), flag="--model", chat_template=True)
    (start / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer_config = json.loads((start / "tokenizer_config.json").read_text())
    tokenizer_config.pop("chat_template", None)
    (start / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    assert "pass --chat_template FILE" in sentence(start, chat_template=True)
    resolve_model(str(start), flag="--model")
    (start / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00002.safetensors"}}')
    assert "names: model-00002.safetensors" in sentence(start)
    (start / "model.safetensors.index.json").unlink()
    for path in start.glob("tokenizer*"):
        path.unlink()
    assert "has no tokenizer" in sentence(start)
    (start / "model.safetensors").rename(start / "pytorch_model.bin")
    assert "has no *.safetensors" in sentence(start)


def test_quantised_weights_are_refused_by_their_dtype(start):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(4).to(torch.float8_e4m3fn)}, start / "model.safetensors")
    with pytest.raises(BadUse, match="holds F8_E4M3 weights"):
        stored_dtype(start)


def test_attention_is_chosen_without_downloads(start, monkeypatch):
    from transformers import BloomConfig, DeepseekV3Config, Gemma2Config, MistralConfig

    config = load_config(start)
    assert choose_attention("auto", config, half_precision=True) == "sdpa"
    assert choose_attention("eager", config, half_precision=True) == "eager"
    with pytest.raises(BadUse, match="needs a CUDA device, bf16 and an installed flash-attn"):
        choose_attention("flash_attention_2", config, half_precision=True)
    assert choose_attention("auto", config, half_precision=False, can_pack=True) == "packed"
    assert choose_attention("auto", MistralConfig(), half_precision=False, can_pack=True) == "sdpa"
    for asked, can_pack, message in (
        (config, False, "this command pads its rows"),
        (MistralConfig(), True, "mistral has more than plain causal attention"),
        (Gemma2Config(), True, "gemma2 has more than plain causal attention"),
        (DeepseekV3Config(), True, "the values of deepseek_v3's attention are narrower than its queries"),
        (BloomConfig(), True, "lets no attention be plugged into bloom"),
    ):
        with pytest.raises(BadUse, match=message):
            choose_attention("packed", asked, half_precision=True, can_pack=can_pack)
    monkeypatch.setattr(models, "_flash_attention_works", lambda: True)
    assert choose_attention("auto", config, half_precision=True) == "flash_attention_2"
    assert choose_attention("auto", config, half_precision=False) == "sdpa"
    monkeypatch.setattr(models, "_flash_attention_works", lambda: False)
    assert choose_attention("auto", Gemma2Config(), half_precision=True) == "eager"
    with pytest.raises(BadUse, match="sdpa can't compute gemma2's attention"):
        choose_attention("sdpa", Gemma2Config(), half_precision=True)


def test_sdpa_really_drops_the_soft_cap_that_makes_us_refuse_it():
    """The day transformers' sdpa keeps it, this fails and the refusal can go."""
    from transformers import AutoModelForCausalLM, Gemma2Config

    config = Gemma2Config(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, attn_logit_softcapping=0.01,
    )  # fmt: skip
    logits = []
    for attention in ("eager", "sdpa"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=1.0)
        logits.append(model(torch.arange(12)[None]).logits)
    assert (logits[0] - logits[1]).abs().max() > 1e-2


def test_the_context_window_is_the_configs(start):
    assert (
        context_window(load_config(start)) == json.loads((start / "config.json").read_text())["max_position_embeddings"]
    )


def test_a_policy_that_lacks_a_weight_is_refused_by_its_name(tiny_policy, tmp_path):
    """transformers would draw it at random and go on."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "policy"
    shutil.copytree(tiny_policy, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadUse, match=r"lacks weights .*: model.layers.1.mlp.up_proj.weight"):
        models.load_policy(folder, dtype=torch.float32, attn_implementation="sdpa")
