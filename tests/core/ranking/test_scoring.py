"""Scorers: rewards that depend on their row alone, and rows that fail alone."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_pipeline.core.command import BadUse, WorkFailed
from rlhf_pipeline.core.ranking import scoring
from rlhf_pipeline.core.ranking.network_scorers import Score, ScoringOptions
from rlhf_pipeline.core.reward_model import REWARD_OFFSET
from tiny_reward_models import save_shards, write_armorm, write_classifier

PROMPTS: list[str | list[dict[str, str]]] = [
    "What is the capital of France?",
    "List three birds.",
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is a crow?"},
        {"role": "assistant", "content": "A bird."},
        {"role": "user", "content": "And a tit?"},
    ],
]
RESPONSES = [
    "Paris.",
    "Happy to help! " * 4 + "The capital is Paris.",
    "A crow.",
    "A crow, a tit, an owl. " * 7,
]


def row(prompt: Any, response: Any, i: int = 0) -> dict[str, Any]:
    return {
        "prompt_id": f"p{i}",
        "prompt": prompt,
        "response": response,
        "response_tokens": None,
        "finish_reason": "stop",
    }


ROWS = [row(prompt, response, i) for i, prompt in enumerate(PROMPTS) for response in RESPONSES]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def armorm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_armorm(tmp_path_factory.mktemp("armorm"))


def load(text: object, **options: Any) -> scoring.Scorer:
    return scoring.load_scorer(scoring.resolve_reward_model(str(text)), ScoringOptions(**options))


def rewards(scores: list[Score]) -> list[float]:
    assert all(score.reward is not None for score in scores), scores
    return [score.reward for score in scores if score.reward is not None]


def test_what_a_name_means_is_found_in_the_checkpoint(classifier: Path, armorm: Path) -> None:
    """ArmoRM by its tensors: no file of the test's checkpoint has its name."""
    assert scoring.resolve_reward_model(str(classifier)).kind == "sequence classifier"
    assert scoring.resolve_reward_model(str(armorm)).kind == "ArmoRM"
    assert scoring.resolve_reward_model("math:fsum").kind == "Python function"


# Models


def test_a_classifiers_reward_is_transformers_raw_logit_at_the_last_token(classifier: Path) -> None:
    """The oracle is given no pad id, so that it takes the last token of its single row."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    oracle = AutoModelForSequenceClassification.from_pretrained(classifier)
    oracle.config.pad_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    expected = []
    for item in ROWS:
        turns = [{"role": "user", "content": item["prompt"]}] if isinstance(item["prompt"], str) else item["prompt"]
        turns = [*turns, {"role": "assistant", "content": item["response"]}]
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=False)
        with torch.inference_mode():
            expected.append(oracle(ids).logits.item())
    assert max(map(abs, expected)) > 1.0  # a sigmoid would show
    assert rewards(load(classifier).score(ROWS)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["classifier", "armorm"])
def test_batch_size_and_order_do_not_change_a_reward(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    together = rewards(load(folder, batch_tokens=100_000).score(ROWS))
    alone = rewards(load(folder, batch_tokens=1).score(ROWS))
    assert together == pytest.approx(alone, abs=1e-5)
    order = list(range(len(ROWS)))
    random.Random(0).shuffle(order)
    shuffled = rewards(load(folder, batch_tokens=300).score([ROWS[i] for i in order]))
    assert shuffled == pytest.approx([together[i] for i in order], abs=1e-5)
    assert max(together) - min(together) > 0.1


def test_the_stored_offset_is_subtracted(classifier: Path, tmp_path: Path) -> None:
    """Same seed, so the same weights: rewards differ by the offset alone."""
    centered = write_classifier(tmp_path, offset=0.75)
    plain = rewards(load(classifier).score(ROWS))
    assert rewards(load(centered).score(ROWS)) == pytest.approx([value - 0.75 for value in plain], abs=1e-6)
    assert load(centered).engine["reward_offset"] == 0.75


def test_armorm_keeps_objectives_and_coefficients_whose_products_sum_to_the_reward(armorm: Path) -> None:
    for score in load(armorm).score(ROWS):
        assert score.objectives is not None and score.coefficients is not None
        assert list(score.objectives) == list(score.coefficients) and len(score.objectives) == 19
        total = sum(score.objectives[name] * score.coefficients[name] for name in score.objectives)
        assert score.reward == pytest.approx(total, abs=1e-5)


def test_rows_that_cannot_be_scored_say_why_and_leave_the_others_alone(classifier: Path) -> None:
    """A response of 300 birds is about 600 tokens; the tiny model's window is 256."""
    bad = [
        row("List birds.", "A crow. " * 300),
        row("List birds.", "   "),
        row("List birds.", None),
        row("", "A crow."),
        row(None, "A crow."),
        row([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], "A crow."),
        row([{"content": "no role"}], "A crow."),
    ]
    scores = load(classifier).score([*bad, *ROWS])
    assert rewards(scores[len(bad) :]) == pytest.approx(rewards(load(classifier).score(ROWS)), abs=1e-5)
    assert all(score.reward is None for score in scores[: len(bad)])
    kinds = [score.error.partition(":")[0] for score in scores[: len(bad)] if score.error]
    assert kinds == [
        "too long",
        "empty response",
        "empty response",
        "empty prompt",
        "empty prompt",
        "not rendered",
        "not rendered",
    ]
    assert "at most 256 fit" in str(scores[0].error)


def test_max_length_counts_the_whole_conversation_and_nothing_is_cut(classifier: Path) -> None:
    model = scoring.resolve_reward_model(str(classifier))
    assert model.chat is not None
    length = len(model.chat.conversation_ids(PROMPTS[0], RESPONSES[0]))
    fits = load(classifier, max_length=length).score(ROWS[:1])
    cut = load(classifier, max_length=length - 1).score(ROWS[:1])
    assert rewards(fits) == pytest.approx(rewards(load(classifier).score(ROWS[:1])), abs=1e-6)
    assert cut[0].error == f"too long: {length} tokens, at most {length - 1} fit"


NO_HEADER_AFTER_SYSTEM = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {{- message['content'] + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' if messages[0]['role'] == 'user' else 'Go on: ' }}
{%- endif %}"""


def test_a_prompt_without_the_header_pattern_gets_no_armorm_reward(armorm: Path, tmp_path: Path) -> None:
    """The published code raises here and loses the run."""
    template = tmp_path / "template.jinja"
    template.write_text(NO_HEADER_AFTER_SYSTEM)
    model = scoring.resolve_reward_model(str(armorm), chat_template=str(template))
    single = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a bird."}]
    scores = scoring.load_scorer(model, ScoringOptions()).score([row(single, "A crow."), ROWS[0]])
    assert scores[0].reward is None and str(scores[0].error).startswith("no gate: ")
    assert scores[1].reward is not None


def test_memory_running_out_halves_the_batches_and_changes_no_reward(classifier: Path) -> None:
    """The hook stands for a GPU on which no batch of more than 400 padded tokens fits."""
    expected = rewards(load(classifier).score(ROWS))
    scorer = load(classifier, batch_tokens=5_000)
    sizes: list[int] = []
    fail_above(scorer, 400, sizes)
    assert rewards(scorer.score(ROWS)) == pytest.approx(expected, abs=1e-5)
    assert 1 <= sum(size > 400 for size in sizes) <= 4  # halved, not nibbled at
    first_pass = len(sizes)
    scorer.score(ROWS)
    assert max(sizes[first_pass:]) <= 400  # the smaller budget is kept


def test_one_conversation_beyond_memory_ends_the_run_with_advice(classifier: Path) -> None:
    scorer = load(classifier)
    fail_above(scorer, 10, [])
    with pytest.raises(WorkFailed, match=r"one conversation of \d+ tokens does not fit.*--max_length"):
        scorer.score(ROWS)


def fail_above(scorer: scoring.Scorer, tokens: int, sizes: list[int]) -> None:
    def hook(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        sizes.append(kwargs["input_ids"].numel())
        if sizes[-1] > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    scorer._model.base_model.register_forward_pre_hook(hook, with_kwargs=True)  # type: ignore[attr-defined]


def test_a_language_model_is_refused_by_the_name_of_the_head_it_lacks(tiny_policy: Path) -> None:
    """Without num_labels transformers assumes two; with one it would draw score.weight at random."""
    with pytest.raises(BadUse, match=r"has 2 labels .*num_labels"):
        load(tiny_policy)


def test_a_checkpoint_without_its_head_is_refused_naming_the_key(classifier: Path, tmp_path: Path) -> None:
    copy_without(classifier, tmp_path, "score.weight")
    with pytest.raises(BadUse, match=r"lacks its reward head: no score\.weight"):
        load(tmp_path)


def test_a_checkpoint_without_a_backbone_weight_is_refused_naming_the_key(classifier: Path, tmp_path: Path) -> None:
    copy_without(classifier, tmp_path, "model.norm.weight")
    with pytest.raises(BadUse, match=r"lacks weights .*norm\.weight"):
        load(tmp_path)


def copy_without(folder: Path, target: Path, name: str) -> None:
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_shards(target, [tensors])
    for path in folder.glob("*.json"):
        (target / path.name).write_bytes(path.read_bytes())
    (target / "chat_template.jinja").write_bytes((folder / "chat_template.jinja").read_bytes())


def test_a_not_finite_logit_is_no_reward(classifier: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy_without(classifier, tmp_path, "score.weight")
    weights = load_file(classifier / "model.safetensors")
    weights["score.weight"].fill_(float("inf"))
    for path in tmp_path.glob("model*"):
        path.unlink()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    score = load(tmp_path).score(ROWS[:1])[0]
    assert score.reward is None and str(score.error).startswith("not finite: ")


# Functions


def function(body: Callable[[list[Any]], Any]) -> scoring.PythonFunction:
    return scoring.PythonFunction("./f.py:f", body, {})


def test_a_function_that_raises_loses_only_the_rows_it_raises_for() -> None:
    def inverse_length(rows: list[dict[str, Any]]) -> list[float]:
        return [1 / (len(item["response"]) - 6) for item in rows]  # "Paris." has 6 characters

    scores = function(inverse_length).score([row("p", "Pari"), row("p", "Paris."), row("p", "Paris is")])
    assert [score.reward for score in scores] == [-0.5, None, 0.5]
    assert scores[1].error == "ZeroDivisionError: division by zero" or "ZeroDivisionError" in str(scores[1].error)


def test_a_function_sees_all_rows_at_once_and_may_abstain() -> None:
    seen: list[int] = []

    def rank_in_batch(rows: list[dict[str, Any]]) -> list[float | None]:
        seen.append(len(rows))
        return [None if item["response"] is None else float(i) for i, item in enumerate(rows)]

    scores = function(rank_in_batch).score([row("p", "a"), row("p", None), row("p", "c")])
    assert seen == [3]
    assert [score.reward for score in scores] == [0.0, None, 2.0]
    assert str(scores[1].error).startswith("no reward: ")


def test_values_that_are_no_finite_number_become_reasons() -> None:
    import numpy as np

    values = [float("nan"), float("-inf"), "0.5", True, 3, np.float32(0.5)]
    scores = function(lambda rows: values).score([row("p", "r")] * 6)
    assert [score.reward for score in scores] == [None, None, None, 1.0, 3.0, 0.5]
    assert [str(score.error).partition(":")[0] for score in scores[:3]] == [
        "not finite",
        "not finite",
        "no number",
    ]


@pytest.mark.parametrize("answer", [[1.0], None, 1.0])
def test_a_function_that_gives_no_value_per_row_ends_the_run(answer: Any) -> None:
    with pytest.raises(WorkFailed, match=r"\./f\.py:f returned .* rows"):
        function(lambda rows: answer).score([row("p", "a"), row("p", "b")])


def test_a_function_is_found_in_a_file_and_its_fingerprint_is_the_files(tmp_path: Path) -> None:
    file = tmp_path / "my_reward.py"
    file.write_text("def score(rows):\n    return [len(row['response']) for row in rows]\n")
    first = scoring.resolve_reward_model(f"{file}:score")
    assert rewards(scoring.load_scorer(first, ScoringOptions()).score([row("p", "four")])) == [4.0]
    file.write_text("def score(rows):\n    return [0.0 for row in rows]\n")
    assert scoring.resolve_reward_model(f"{file}:score").identity() != first.identity()


def test_two_functions_of_a_file_are_two_reward_models(tmp_path: Path) -> None:
    file = tmp_path / "my_rewards.py"
    file.write_text("def one(rows):\n    return [1.0] * len(rows)\n\ndef two(rows):\n    return [2.0] * len(rows)\n")
    one, two = (scoring.resolve_reward_model(f"{file}:{name}") for name in ("one", "two"))
    assert one.fingerprint == two.fingerprint
    assert one.identity() != two.identity()


def test_the_fingerprint_notices_an_edit_of_the_file_that_holds_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package hands on a function, an object that can be called, a function with a part of its arguments, and one
    that the package itself has wrapped."""
    package = tmp_path / "rewards_of_ours"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import functools\nfrom rewards_of_ours.impl import judge, score\n"
        "half = functools.partial(score, weight=0.5)\n"
        "@functools.wraps(score)\ndef wrapped(rows):\n    return score(rows)\n"
    )
    impl = package / "impl.py"
    impl.write_text(
        "def score(rows, weight=1.0):\n    return [weight for row in rows]\n\n"
        "class Judge:\n    def __call__(self, rows):\n        return score(rows)\n\njudge = Judge()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    names = [f"rewards_of_ours:{name}" for name in ("score", "judge", "half", "wrapped")]
    before = [scoring.resolve_reward_model(name).fingerprint for name in names]
    impl.write_text(impl.read_text().replace("1.0", "2.0"))
    after = [scoring.resolve_reward_model(name).fingerprint for name in names]
    assert all(new != old for new, old in zip(after, before, strict=True))
    (package / "__init__.py").write_text("# edited\n")
    assert all(scoring.resolve_reward_model(name).fingerprint != old for name, old in zip(names, after, strict=True))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("./no_such_file.py:score", "can't be imported"),
        ("no_such_package.module:score", "can't be imported"),
        ("math:no_such_function", "math has no function no_such_function"),
        ("./no_such_folder", "no such folder"),
    ],
)
def test_a_name_of_nothing_is_refused_in_one_sentence_with_the_flag(name: str, sentence: str) -> None:
    with pytest.raises(BadUse, match=f"--reward_model {name.replace('.', chr(92) + '.')}.*{sentence}"):
        scoring.resolve_reward_model(name)


@pytest.mark.parametrize(("code", "problem"), [("def score(rows:\n", "SyntaxError"), ("undefined\n", "NameError")])
def test_a_file_that_can_not_run_is_refused_in_one_sentence(code: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "broken_reward.py").write_text(code)
    with pytest.raises(BadUse, match=rf"--reward_model .*broken_reward\.py:score can't be imported \({problem}: "):
        scoring.resolve_reward_model(f"{tmp_path}/broken_reward.py:score")


# Ensembles


@pytest.mark.parametrize(("combine", "expected"), [("mean", 3.0), ("min", 1.0), ("median", 2.0)])
def test_an_ensemble_combines_and_keeps_its_members(combine: scoring.Combine, expected: float) -> None:
    members = [function(lambda rows: [1.0]), function(lambda rows: [2.0]), function(lambda rows: [6.0])]
    score = scoring.Ensemble(["a", "b", "c"], members, combine, {}).score([row("p", "r")])[0]
    assert score.reward == expected
    assert score.objectives == {"a": 1.0, "b": 2.0, "c": 6.0}


def test_an_ensemble_gives_no_reward_where_a_member_has_none() -> None:
    members = [function(lambda rows: [1.0, 1.0]), function(lambda rows: [2.0, None])]
    scores = scoring.Ensemble(["a", "b"], members, "min", {}).score([row("p", "r"), row("p", "s")])
    assert scores[0].reward == 1.0
    assert scores[1].reward is None and "(from b)" in str(scores[1].error)
    assert scores[1].objectives == {"a": 1.0}


def test_identity_notices_what_is_not_in_the_weights(classifier: Path, tmp_path: Path) -> None:
    """The offset stands in config.json, the template in its own file: both decide rewards."""
    plain = scoring.resolve_reward_model(str(classifier)).identity()
    write_classifier(tmp_path)
    assert scoring.resolve_reward_model(str(tmp_path)).identity() == plain
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {REWARD_OFFSET: 1.0}))
    changed = scoring.resolve_reward_model(str(tmp_path)).identity()
    assert {key for key in plain if plain[key] != changed[key]} == {"config"}
