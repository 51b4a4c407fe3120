"""sft: what it learns from, its loss by hand, one meaning in every launch, and what it refuses."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_pipeline import sft
from rlhf_pipeline.core.chat import Chat
from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.progress import read_metrics
from rlhf_pipeline.core.storage import open_source
from rlhf_pipeline.core.training.conversations import load_demonstrations
from rlhf_pipeline.sft import Config, RunFlags


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory) -> Path:
    from conftest import PROMPTS

    path = tmp_path_factory.mktemp("demonstrations") / "demonstrations.jsonl"
    rows = [{"prompt": prompt, "response": f"It is {prompt[::-1][: 3 + i % 9]}"} for i, prompt in enumerate(PROMPTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def here(demonstrations, tiny_policy, tmp_path):
    """`here(output="a", **fields)`: tune in this process; returns (folder, metrics)."""
    before = signal.getsignal(signal.SIGTERM)

    def run(output: str = "policy", **fields: Any) -> tuple[Path, list[dict[str, float]]]:
        places = {
            "input_repo": str(demonstrations),
            "output_dir": str(tmp_path / output),
            "base_model": str(tiny_policy),
        }
        folder = sft.main(Config(**{**places, "batch_size": 8, "lr": 1e-3, **fields}))
        return folder, read_metrics(folder / "metrics.jsonl")

    yield run
    signal.signal(signal.SIGTERM, before)


def test_the_loss_is_the_mean_over_response_tokens_alone(here, demonstrations, tiny_policy):
    """All demonstrations in one update: its loss, before the step, against transformers' own logits in float64."""
    from transformers import AutoModelForCausalLM

    _, metrics = here(batch_size=24, epochs=1.0)
    model, chat = AutoModelForCausalLM.from_pretrained(tiny_policy).double(), Chat.load(tiny_policy)
    total, tokens = 0.0, 0
    for row in map(json.loads, demonstrations.read_text().splitlines()):
        prompt, response = chat.prompt_ids(row["prompt"]), chat.response_ids(row["prompt"], row["response"])
        assert response[-1] in chat.end_ids
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        total -= float(logits.log_softmax(-1)[torch.arange(len(response)), torch.tensor(response)].sum())
        tokens += len(response)
    assert metrics[0]["loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_cutting_an_update_into_micro_batches_does_not_change_it(here):
    whole, cut = here("whole")[1], here("cut", per_device_train_batch_size=1)[1]
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in cut] == pytest.approx([line[name] for line in whole], rel=1e-4)
    assert whole[-1]["loss"] < whole[0]["loss"]


def test_zero_3_on_two_processes_equals_one(here, launch, demonstrations, tiny_policy, tmp_path):
    _, expected = here("one")
    args = ("--base_model", tiny_policy, "--input_repo", demonstrations, "--batch_size", 8, "--lr", 1e-3)
    result = launch(2, "deepspeed_config_stage_3.yaml", "sft", *args, "--output_dir", tmp_path / "two")
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = read_metrics(tmp_path / "two" / "metrics.jsonl")
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in metrics] == pytest.approx([line[name] for line in expected], rel=1e-5)


def test_fresh_weights_follow_from_the_seed(here, tiny_policy, tmp_path):
    """From a folder without weights: the same seed gives the same policy, another seed another."""
    import shutil

    start = tmp_path / "start"
    shutil.copytree(tiny_policy, start, ignore=shutil.ignore_patterns("*.safetensors", "fingerprint.json"))
    losses = [
        here(name, base_model=str(start), fresh=True, seed=seed)[1][0]["loss"]
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    ]
    assert losses[0] == losses[1] != losses[2]
    with pytest.raises(BadUse, match=r"--base_model .*start has no \*.safetensors"):
        here("d", base_model=str(start))


def test_every_turn_of_a_conversation_can_be_learned(tmp_path, tiny_policy):
    """user, assistant, user, assistant: the last turn alone, or both, each after all that stands before it. Contents
    may be lists of parts."""
    turns = [("user", "Hello!"), ("assistant", "Hi."), ("user", "Why is the sky blue?"), ("assistant", "Air.")]
    path = tmp_path / "chats.jsonl"
    in_parts = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    path.write_text(json.dumps({"messages": in_parts}) + "\n")
    chat, source = Chat.load(tiny_policy), open_source(str(path), flag="--x")
    last = load_demonstrations(source, chat, max_length=999, every_turn=False)
    every = load_demonstrations(source, chat, max_length=999, every_turn=True)
    decode = chat.tokenizer.decode
    assert [decode(ids) for ids in last.response] == ["Air.<|eot_id|>"]
    assert [decode(ids) for ids in every.response] == ["Hi.<|eot_id|>", "Air.<|eot_id|>"]
    assert decode(every.prompt[0]).count("<|eot_id|>") == 1 and decode(every.prompt[1]).count("<|eot_id|>") == 3


def test_long_demonstrations_are_left_out_and_counted(here, demonstrations):
    folder, _ = here(max_length=26, batch_size=2)
    dropped = json.loads((folder / "provenance.json").read_text())["dropped"]
    assert 0 < dropped["longer than 26 tokens"] < 24


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": "Hello!", "response": " "}, "row 0 of .* has no response; expected a text to learn from"),
        ({"prompt": "Hello!"}, "has neither messages nor prompt and response"),
        ({"messages": [{"role": "user", "content": "Hello!"}]}, "row 0 of .* does not end with an assistant turn"),
    ],
)
def test_demonstrations_without_a_response_are_refused(here, tmp_path, row, sentence):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(BadUse, match=sentence):
        here(input_repo=str(path))


def test_a_template_that_can_not_mark_the_response_is_refused(here, tmp_path):
    """This template says nothing of what the assistant says."""
    path = tmp_path / "mute.jinja"
    path.write_text("{{ bos_token }}{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    with pytest.raises(BadUse, match="can't encode a finished response"):
        here(chat_template=str(path))


@pytest.mark.parametrize("field", ["batch_size", "lr", "epochs"])
def test_a_number_that_must_be_positive_is_refused_by_its_flag(here, field):
    with pytest.raises(BadUse, match=f"--{field} is 0; expected a number above 0"):
        here(**{field: 0})


def test_check_writes_nothing(here, tmp_path):
    folder, _ = here("planned", run=RunFlags(check=True))
    assert not folder.exists()
