"""reward: its loss by hand, its offset, one meaning in every launch, and rewards that rank reads back."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_pipeline import reward
from rlhf_pipeline.core import storage
from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.progress import read_metrics
from rlhf_pipeline.core.ranking.scoring import ScoringOptions, load_scorer, resolve_reward_model
from rlhf_pipeline.core.reward_model import REWARD_OFFSET
from rlhf_pipeline.reward import Config, calibration
from tiny_pairs import write_pairs


@pytest.fixture(scope="module")
def pairs(tiny_policy, tmp_path_factory) -> Path:
    from conftest import PROMPTS

    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs", tiny_policy, PROMPTS)


@pytest.fixture
def here(pairs, tiny_policy, tmp_path):
    """`here(output="a", **fields)`: train in this process; returns (folder, metrics)."""
    before = signal.getsignal(signal.SIGTERM)

    def run(output: str = "reward", **fields: Any) -> tuple[Path, list[dict[str, float]]]:
        places = {"input_repo": str(pairs), "output_dir": str(tmp_path / output), "base_model": str(tiny_policy)}
        folder = reward.main(Config(**{**places, "batch_size": 8, "lr": 1e-3, **fields}))
        return folder, read_metrics(folder / "metrics.jsonl")

    yield run
    signal.signal(signal.SIGTERM, before)


def logits_by_transformers(folder: Path, pairs: Path, split: str) -> np.ndarray:
    """(n, 2) float64 logits of chosen and rejected, one conversation at a time, by transformers alone."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder).double()
    found = []
    for row in storage.open_source(str(pairs), flag="--x", split=split).rows():
        prompt = row["prompt_tokens"][-row["prompt_length"] :]
        ids = [prompt + row[f"{side}_tokens"][: row[f"{side}_length"]] for side in ("chosen", "rejected")]
        with torch.no_grad():
            found.append([float(model(torch.tensor([row])).logits[0, 0]) for row in ids])
    return np.array(found)


def test_the_loss_is_the_bradley_terry_likelihood(here, pairs):
    """At learning rate 0 nothing moves: the loss of one update over all pairs is the saved model's, by hand."""
    folder, metrics = here(batch_size=24, lr=1e-30)
    margins = np.subtract(*logits_by_transformers(folder, pairs, "train").T)
    assert metrics[0]["loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), rel=1e-5)
    assert metrics[0]["accuracy"] == pytest.approx((margins > 0).mean())


def test_rewards_are_centred_on_the_training_responses_and_rank_reads_them_so(here, pairs, tiny_policy):
    folder, _ = here(epochs=3.0)
    logits = logits_by_transformers(folder, pairs, "train")
    assert json.loads((folder / "config.json").read_text())[REWARD_OFFSET] == pytest.approx(logits.mean(), abs=1e-5)
    scorer = load_scorer(resolve_reward_model(str(folder)), ScoringOptions())
    row = {"prompt": "Hello!", "response": "Good morning to you.", "prompt_id": "x"}
    score = scorer.score([row])[0].reward
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
    ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, return_dict=False)
    logit = AutoModelForSequenceClassification.from_pretrained(folder)(torch.tensor([ids])).logits[0, 0].detach()
    assert score == pytest.approx(float(logit) - logits.mean(), abs=1e-5)


def test_zero_3_on_two_processes_equals_one(here, launch, pairs, tiny_policy, tmp_path):
    one, expected = here("one")
    args = ("--base_model", tiny_policy, "--input_repo", pairs, "--batch_size", 8, "--lr", 1e-3)
    result = launch(2, "deepspeed_config_stage_3.yaml", "reward", *args, "--output_dir", tmp_path / "two")
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = read_metrics(tmp_path / "two" / "metrics.jsonl")
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in metrics] == pytest.approx([line[name] for line in expected], rel=1e-5)
    held_out = [json.loads((folder / "held_out.json").read_text()) for folder in (one, tmp_path / "two")]
    assert held_out[0]["loss"] == pytest.approx(held_out[1]["loss"], rel=1e-4)
    assert held_out[0]["offset"] == pytest.approx(held_out[1]["offset"], abs=1e-5)


def test_a_batch_of_nothing_is_refused_by_its_flag(here):
    with pytest.raises(BadUse, match="--batch_size is 0; expected a number above 0"):
        here(batch_size=0)


def test_ids_of_another_tokenizer_are_refused(here, tiny_policy, tmp_path):
    """The same model with another chat template: its pairs are other ids."""
    other = tmp_path / "other"
    shutil.copytree(tiny_policy, other)
    template = (other / "chat_template.jinja").read_text()
    (other / "chat_template.jinja").write_text(template + "{# another #}")
    with pytest.raises(BadUse, match=r"tokenized with another chat template .* than that of --base_model"):
        here(base_model=str(other))


def test_calibration_by_hand():
    """Margins ln 3 (confidence .75) right twice and wrong once, and 0 (confidence .5, half right).

    Accuracy (2 + 0 + .5) / 4 = .625. Bins: [.5] |.5 - .5| x 1 and [.75] |.75 - 2/3| x 3, so ECE = .25 / 4 = .0625.
    """
    log_3 = float(np.log(3.0))
    report = calibration(np.array([log_3, log_3, -log_3, 0.0]))
    assert report["accuracy"] == 0.625
    assert report["expected_calibration_error"] == pytest.approx(0.0625)
    assert [row["pairs"] for row in report["reliability"]] == [1, 3]


def test_text_pairs_and_conversations_are_read_alike(tmp_path, tiny_policy):
    from rlhf_pipeline.core.chat import Chat
    from rlhf_pipeline.core.training.pairs import load_comparisons

    def turns(answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": answer}]

    chat, found = Chat.load(tiny_policy), []
    for name, row in (
        ("text", {"prompt": "Hello!", "chosen": "Hi there.", "rejected": "What?"}),
        ("turns", {"chosen": turns("Hi there."), "rejected": turns("What?")}),
    ):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        found.append(load_comparisons(storage.open_source(str(tmp_path / f"{name}.jsonl"), flag="--x"), chat))
    for kind in ("prompt", "chosen", "rejected"):
        assert getattr(found[0], kind)[0].tolist() == getattr(found[1], kind)[0].tolist()
    assert chat.tokenizer.decode(found[0].chosen[0]) == "Hi there.<|eot_id|>"


def test_pairs_with_equal_texts_are_refused_or_dropped(here, tmp_path):
    path = tmp_path / "equal.jsonl"
    rows = [{"prompt": "Hello!", "chosen": "Hi.", "rejected": "Hi." if i == 1 else "No."} for i in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(BadUse, match=r"has 1 pairs whose chosen and rejected response are the same.*--drop_equal"):
        here(input_repo=str(path))
    folder, _ = here(input_repo=str(path), drop_equal=True)
    assert json.loads((folder / "provenance.json").read_text())["dropped"] == {"equal responses": 1}
