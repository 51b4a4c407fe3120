"""vLLM as rank's back end: the rewards of transformers, and what it can't take refused before anything is loaded."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.ranking import scoring
from rlhf_pipeline.core.ranking.network_scorers import ScoringOptions
from tiny_reward_models import write_armorm, write_classifier

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
PROMPTS = ["What is the capital of France?", "List three birds.", "List three birds. " * 30]
RESPONSES = ["Paris.", "A crow.", "A crow, a tit, an owl. " * 7]


def row(prompt: Any, response: Any) -> dict[str, Any]:
    return {"prompt_id": "p", "prompt": prompt, "response": response, "response_tokens": None, "finish_reason": "stop"}


ROWS = [row(prompt, response) for response in RESPONSES for prompt in PROMPTS]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the layout that the project's own reward models have: with an offset in config.json."""
    return write_classifier(tmp_path_factory.mktemp("classifier"), offset=0.75)


def load(folder: Path, **options: Any) -> scoring.Scorer:
    return scoring.load_scorer(scoring.resolve_reward_model(str(folder)), ScoringOptions(**options))


@pytest.fixture(scope="module")
def in_vllm(classifier: Path) -> Iterator[scoring.Scorer]:
    scorer = load(classifier, backend="vllm")
    yield scorer
    scorer.close()


@needs_vllm
def test_rewards_are_transformers_to_rounding_with_the_offset_and_without_a_sigmoid(
    in_vllm: scoring.Scorer, classifier: Path
) -> None:
    """float32 on a CPU. A sigmoid, which is vLLM's default, less the offset of .75 would not fall below -.75."""
    expected = [score.reward for score in load(classifier).score(ROWS)]
    found = [score.reward for score in in_vllm.score(ROWS)]
    assert found == pytest.approx(expected, abs=2e-5)
    assert min(filter(None, found)) < -1
    assert (in_vllm.engine["backend"], in_vllm.engine["dtype"]) == ("vllm", "float32")


@needs_vllm
def test_a_row_that_cannot_be_scored_is_null_with_its_reason_and_one_as_long_as_the_window_fits(
    in_vllm: scoring.Scorer, classifier: Path
) -> None:
    """vLLM alone would fail a whole call for one long row. A repeated word is one token, or few."""
    chat = scoring.resolve_reward_model(str(classifier)).chat
    assert chat is not None
    text = "A crow." + " crow" * next(
        n for n in range(300) if len(chat.conversation_ids("List birds.", "A crow." + " crow" * n)) >= 256
    )
    length = len(chat.conversation_ids("List birds.", text))
    rows = [row("List birds.", text), row("List birds.", text + " crow"), row("", "A crow."), ROWS[0]]
    whole, long, empty, last = in_vllm.score(rows)
    assert length == 256 and whole.reward is not None
    assert long.error is not None and long.error.startswith("too long: 25")
    assert empty.error == "empty prompt" == in_vllm.score(rows[2:3])[0].error
    assert last.reward == pytest.approx(in_vllm.score(ROWS[:1])[0].reward, abs=2e-5)


def test_what_vllm_has_no_head_for_is_refused_in_one_sentence_before_it_is_loaded(
    classifier: Path, tmp_path: Path
) -> None:
    armorm = scoring.resolve_reward_model(str(write_armorm(tmp_path / "armorm")))
    with pytest.raises(BadUse, match=r"--backend vllm can't run .*armorm: it is an ArmoRM, .*Leave --backend out"):
        scoring.describe_engine([armorm], ScoringOptions(backend="vllm"))
    ours = scoring.resolve_reward_model(str(classifier))
    with pytest.raises(BadUse, match="vLLM runs its own code, not the repo's that --trust_remote_code asks for"):
        scoring.describe_engine([ours], ScoringOptions(backend="vllm", trust_remote_code=True))
    encoder = scoring.resolve_reward_model(str(write_encoder(tmp_path / "encoder", classifier)))
    with pytest.raises(BadUse, match=r"its reward head is .*classifier\.dense\.weight.*linear layer named score"):
        scoring.describe_engine([encoder], ScoringOptions(backend="vllm"))


def write_encoder(folder: Path, classifier: Path) -> Path:
    """A RoBERTa with one label and the classifier's tokenizer."""
    from transformers import AutoTokenizer, RobertaConfig, RobertaForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(classifier)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=1,
    )
    RobertaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["RobertaForSequenceClassification"]
    return folder
