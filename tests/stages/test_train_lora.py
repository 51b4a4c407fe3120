"""train with LoRA: what is trained, saved and resumed, and that it is the same in every launch."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import PROMPTS
from rlhf_pipeline import train
from rlhf_pipeline.core.command import BadUse, WorkFailed
from rlhf_pipeline.core.progress import read_metrics
from rlhf_pipeline.core.training.lora import Lora
from rlhf_pipeline.core.training.losses import Rebel
from rlhf_pipeline.train import Config
from tiny_pairs import write_pairs

LORA = Lora(r=4, alpha=8)
RATE = 1e-2
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--mixed_precision", "no")


@pytest.fixture(scope="module")
def pairs(tiny_policy, tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs", tiny_policy, PROMPTS)


@pytest.fixture
def here(pairs, tiny_policy, tmp_path):
    """`here(output="a", **fields)`: train with LoRA in this process; returns (folder, metrics)."""
    before = signal.getsignal(signal.SIGTERM)

    def run(output: str = "policy", **fields: Any) -> tuple[Path, list[dict[str, float]]]:
        places = {"input_repo": str(pairs), "output_dir": str(tmp_path / output), "base_model": str(tiny_policy)}
        defaults = {"batch_size": 8, "lr": RATE, "rebel": Rebel(target_gap=3.0), "lora": LORA}
        folder = train.main(Config(**{**places, **defaults, **fields}))
        return folder, read_metrics(folder / "metrics.jsonl")

    yield run
    signal.signal(signal.SIGTERM, before)


def weights(folder: Path, name: str = "model") -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / f"{name}.safetensors")


def test_the_policy_is_the_base_with_the_adapter_put_in_and_peft_loads_the_adapter_alone(here, tiny_policy):
    """transformers reads the merged policy, peft the adapter over the start: the same logits, and not the start's.

    Only the 7 linear layers of each of the 2 decoder layers differ, by a matrix of rank 4.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, metrics = here(warmup_ratio=0.0, epochs=3.0)
    start, whole = weights(tiny_policy), weights(folder)
    moved = {name: whole[name] - start[name] for name in start if not torch.equal(whole[name], start[name])}
    assert whole.keys() == start.keys() and len(moved) == 14
    assert all(name.endswith("_proj.weight") for name in moved)
    assert {int(torch.linalg.matrix_rank(delta, rtol=1e-3)) for delta in moved.values()} == {4}

    ids = torch.arange(20)[None]
    base = AutoModelForCausalLM.from_pretrained(tiny_policy)
    before = base(ids).logits
    adapted = PeftModel.from_pretrained(base, folder / "adapter")(ids).logits
    assert torch.allclose(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, adapted, atol=1e-4)
    assert (adapted - before).abs().max() > 1e-2
    assert metrics[-1]["log_ratio_gap"] > metrics[0]["log_ratio_gap"] + 0.5
    assert json.loads((folder / "provenance.json").read_text())["config"]["lora.r"] == 4
    adapter = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(tiny_policy)
    assert adapter["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (tiny_policy / name).read_bytes()


def test_with_the_adapter_at_zero_the_policy_is_the_reference(here):
    _, metrics = here(batch_size=24, warmup_ratio=0.0)
    assert metrics[0]["chosen_log_ratio"] == pytest.approx(0, abs=1e-5)


def test_a_resumed_run_ends_with_the_same_bits_from_a_checkpoint_of_adapters_alone(here, monkeypatch):
    """Dropout on, so that the random state counts. 4 x (64 + 64) weights on q and v of two layers, twice for Adam."""
    fields: dict[str, Any] = {"save_every": 1, "epochs": 2.0}
    fields["lora"] = Lora(r=4, dropout=0.2, target_modules=("q_proj", "v_proj"))
    whole, metrics = here("whole", **fields)
    stopped = 0

    def stop_once(numbers: dict[str, float], folder: Path) -> None:
        nonlocal stopped
        if numbers["update"] == 3 and not stopped:
            stopped = 1
            raise WorkFailed("stopped")

    monkeypatch.setattr(train.checkpoints, "check_finite", stop_once)
    with pytest.raises(WorkFailed, match="stopped"):
        here("cut", **fields)
    saved = whole.parent / "cut" / "checkpoints" / "update-2"
    kept = weights(saved)
    assert sum(value.numel() for value in kept.values()) == 2 * 2 * 4 * (64 + 64)
    assert all(".lora_" in name for name in kept)
    cut, again = here("cut", **fields)
    assert [line["loss"] for line in again] == [line["loss"] for line in metrics]
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(cut)[name]), name


@pytest.mark.parametrize(
    ("lora", "sentence"),
    [
        (Lora(alpha=16), r"a --lora flag is set, but --lora.r is not: drop it, or pass --lora.r 16"),
        (Lora(r=0), r"--lora.r is 0; expected 1 or more"),
        (Lora(r=4, alpha=0), r"--lora.alpha is 0; expected 1 or more"),
        (Lora(r=4, dropout=1.0), r"--lora.dropout is 1.0; expected a probability"),
        (Lora(r=4, target_modules=("q_proj", "all-linear")), r"--lora.target_modules is q_proj all-linear; expected"),
        (Lora(r=4, target_modules=("lm_head",)), r"--lora.target_modules lm_head is the model's head.*leave it out"),
        (Lora(r=4, target_modules=("query",)), r"query names no layer of LlamaForCausalLM; linear ones are down_proj"),
        (Lora(r=4, target_modules=("embed_tokens",)), r"embed_tokens is no linear layer of LlamaForCausalLM"),
    ],
)
def test_adapters_that_can_not_be_are_refused_before_a_model_is_loaded(here, lora, sentence, monkeypatch):
    monkeypatch.setattr(train.models, "load_policy", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    with pytest.raises(BadUse, match=sentence):
        here(lora=lora)
