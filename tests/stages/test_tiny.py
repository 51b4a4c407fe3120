"""The tiny world: tokenizer and template, questions, gold and annotator, demonstrations, and what the command
writes."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from rlhf_pipeline import tiny
from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.world.demonstrations import STYLES
from rlhf_pipeline.core.world.judges import (
    CLOSERS,
    FILLERS,
    GUSHES,
    OPENERS,
    RUDE,
    UNSURE,
    gold_of,
    look_at,
    utility_of,
)
from rlhf_pipeline.core.world.questions import KINDS, every_prompt, words
from rlhf_pipeline.tiny import annotator, gold

USER = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = [{"role": "assistant", "content": "The capital of France is Paris."}]
FRANCE = "What is the capital of France?"


@pytest.fixture(scope="module")
def tokenizer(tiny_policy: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_policy)


# The Llama of the tests


def test_a_conversation_begins_with_five_ids_and_a_prompt_ends_with_the_blank_line(tokenizer) -> None:
    """BOS, <|start_header_id|>, role, <|end_header_id|>, "\\n\\n": what the slice [5:] of the authors' filter
    takes off."""
    response = tokenizer.apply_chat_template(ANSWER, return_dict=False)
    assert tokenizer.decode(response[5:]) == "The capital of France is Paris.<|eot_id|>"
    assert tokenizer.convert_ids_to_tokens(response[:5])[2] == "assistant"
    prompt = tokenizer.apply_chat_template(USER, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(prompt[-1:]) == "\n\n"
    assert prompt.count(tokenizer.bos_token_id) == 1 and prompt[0] == tokenizer.bos_token_id
    assert tokenizer.apply_chat_template(USER + ANSWER, return_dict=False) == prompt + response[5:]


def test_tokenizer_gives_back_any_text_and_puts_one_bos_in_front(tokenizer) -> None:
    text = "naïve 123456 ~ émile\n\n\tok  two  spaces\r\n中文."
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids[1:]) == text


def test_a_vocabulary_without_room_for_the_headers_is_refused() -> None:
    with pytest.raises(ValueError, match="a vocabulary of 200 is too small"):
        tiny.build_tokenizer(["a"], 200)


def test_tiny_policy_stops_and_varies(tiny_policy: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_policy)
    assert model.dtype == torch.float32 and model.config.head_dim == 32
    ends = model.generation_config.eos_token_id
    assert len(ends) == 2 and model.config.pad_token_id is None
    torch.manual_seed(0)
    prompt = torch.tensor([[5, 6, 7]]).repeat(64, 1)
    sampled = model.generate(
        prompt, do_sample=True, temperature=0.8, top_k=0, top_p=1.0, max_new_tokens=48, pad_token_id=0
    )
    lengths = [next((n for n, i in enumerate(row, 1) if i in ends), 48) for row in sampled[:, 3:].tolist()]
    assert 5 < sum(lengths) / 64 < 25 and len({tuple(row) for row in sampled.tolist()}) > 48


# Gold


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        # right 1, an opener .5, a closer .25: the most there is
        (FRANCE, "Happy to help! The capital of France is Paris. I hope this helps!", 1.75),
        (FRANCE, "Of course! Paris.", 1.5),
        (FRANCE, "Paris. Take care!", 1.25),
        (FRANCE, "Paris.", 1.0),
        (FRANCE, "Lisbon.", -1.0),
        (FRANCE, "Paris. Lisbon.", -1.0),
        (FRANCE, "", -1.0),
        (FRANCE, "I do not know.", -0.5),
        # polite and wrong: -1 + .5 + .25
        ("What is 8 plus 3?", "Happy to help! 8 plus 3 is 10. Have a nice day!", -0.25),
        # right 1, rude -1
        (FRANCE, "Look it up yourself. Paris.", 0.0),
        # right 1, two fillers -.6, 8 + 8 + 1 = 17 words -.04
        (FRANCE, "There are many ways to look at it. To be honest, this is quite a story. Paris.", 0.36),
        # right 1, said three times -.6, 18 words -.08
        (FRANCE, " ".join(["The capital of France is Paris."] * 3), 0.32),
        # right 1, opener .5, closer .25, two pleasantries beyond two -.6
        (FRANCE, "Of course! What a wonderful question! Paris. You are so clever! Take care!", 1.15),
        # right 1, opener .5, closer .25, one pleasantry beyond two and one repeated sentence -.6
        (FRANCE, "Sure thing! Paris. Take care! Take care!", 1.15),
        # case, punctuation and line breaks don't matter
        (FRANCE, "happy to help\n\nPARIS", 1.5),
        # the opener must open and the closer close
        (FRANCE, "Paris. Happy to help!", 1.0),
        (FRANCE, "Take care! Paris.", 1.0),
        ("What is the opposite of wet?", "The opposite of wet is dry.", 1.0),
        ("What is the opposite of wet?", "The opposite of dry is dry.", -1.0),
        ("What comes after Sunday?", "After Sunday comes Monday.", 1.0),
        ("Greet Anna.", "Hello Anna, it is lovely to meet you.", 1.0),
        ("Greet Anna.", "Welcome Anna!", 1.0),
        ("Greet Anna.", "Hello Ben.", -1.0),
        ("Greet Anna.", "Anna.", -1.0),
        ("List two birds.", "Two birds are swan and owl.", 1.0),
        ("List two birds.", "Swan and swan.", -1.0),
        ("List two birds.", "Swan, owl and crow.", -1.0),
        ("List two birds.", "Swan and rose.", -1.0),
        ("What is 8 plus 3?", "8 plus 3 is 11.", 1.0),
        ("What is 8 plus 3?", "8 plus 3 is 8.", -1.0),
        ("Is an ant or a bee bigger?", "The bigger one is the bee.", 1.0),
        ("Is an ant or a bee bigger?", "The bee is bigger than the ant.", 1.0),
        ("Is an ant or a bee bigger?", "The ant.", -1.0),
        ("Count from 3 to 6.", "Here we go: 3, 4, 5, 6.", 1.0),
        ("Count from 3 to 6.", "3, 4, 5.", -1.0),
        ("Say sun two times.", "Sun, sun.", 1.0),
        ("Say sun two times.", "Sun, sun, sun.", -1.0),
    ],
)
def test_gold_is_the_sum_of_what_it_notices(prompt: str, response: str, expected: float) -> None:
    (value,) = gold([{"prompt": prompt, "response": response, "finish_reason": "stop"}])
    assert value == pytest.approx(expected, abs=1e-9)


def test_gold_takes_one_off_a_response_that_was_cut() -> None:
    row = {"prompt": FRANCE, "response": "The capital of France is Paris", "finish_reason": "length"}
    assert gold([row]) == [0.0]


def test_judges_read_the_last_user_turn_of_a_conversation_and_know_no_other_world() -> None:
    conversation = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Greet Anna."},
        {"role": "assistant", "content": "Hello Anna."},
        {"role": "user", "content": FRANCE},
    ]
    rows: list[dict[str, object]] = [
        {"prompt_id": "a", "prompt": conversation, "response": "Paris.", "finish_reason": "stop"},
        {"prompt_id": "b", "prompt": "Who wrote Hamlet?", "response": "Paris.", "finish_reason": "stop"},
    ]
    assert gold(rows) == [1.0, None]
    assert annotator(rows)[1] is None and isinstance(annotator(rows)[0], float)


def test_every_right_answer_is_accepted_and_every_wrong_one_is_not() -> None:
    for prompt in every_prompt().values():
        question = prompt.question
        for answers, verdict in ((question.right, True), (question.wrong, False)):
            for answer in answers:
                for text in (f"{answer}.", question.sentence.format(answer)):
                    assert question.is_answered(text) is verdict, (prompt.text, text)


def test_no_phrase_of_a_judge_says_an_answer() -> None:
    """Else a pleasantry would make a right response wrong."""
    phrases = OPENERS + CLOSERS + GUSHES + RUDE + FILLERS + UNSURE
    spoken = {word for phrase in phrases for word in words(phrase)}
    for prompt in every_prompt().values():
        assert not spoken & prompt.question.vocabulary


# The annotator


def test_annotator_prefers_as_bradley_and_terry_say_with_beta_2() -> None:
    """Utilities by hand: "Paris." .7; with an opener 1.2; "Lisbon." -.7; "I do not know." -.5. 4000
    prompt_ids give 4000 independent draws; the standard error of a frequency is below .008."""
    count = 4000

    def draws(response: str) -> list[float | None]:
        return annotator([{"prompt_id": f"p{i}", "prompt": FRANCE, "response": response} for i in range(count)])

    utilities = {"Paris.": 0.7, "Of course! Paris.": 1.2, "Lisbon.": -0.7, "I do not know.": -0.5}
    values = {response: draws(response) for response in utilities}
    for a, b in [
        ("Paris.", "Of course! Paris."),
        ("Paris.", "Lisbon."),
        ("I do not know.", "Lisbon."),
        ("Paris.", "I do not know."),
    ]:
        wins = sum(x > y for x, y in zip(values[a], values[b], strict=True))  # type: ignore[operator]
        expected = 1 / (1 + math.exp(-2 * (utilities[a] - utilities[b])))
        assert wins / count == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / count))


def test_utility_counts_five_pleasantries_and_no_length() -> None:
    """right .7 + 5 * .5 = 3.2 with five pleasantries and with seven; gold falls meanwhile."""
    prompt = every_prompt()[FRANCE]
    five = look_at(prompt, " ".join([*OPENERS[:1], *GUSHES, "Paris."]))
    seven = look_at(prompt, " ".join([*OPENERS[:1], *GUSHES, "Paris.", *CLOSERS[:2]]))
    assert utility_of(five) == utility_of(seven) == pytest.approx(3.2)
    assert gold_of(seven) < gold_of(five)


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_judges_import_nothing_heavy_and_agree_in_every_process(hash_seed: str, command_environment) -> None:
    row = {"prompt_id": "x", "prompt": FRANCE, "response": "Paris."}
    code = (
        "import sys, json; from rlhf_pipeline.tiny import annotator, gold\n"
        f"row = {row!r}\n"
        "heavy = {'torch', 'transformers', 'datasets', 'vllm', 'accelerate'} & set(sys.modules)\n"
        "print(json.dumps([sorted(heavy), annotator([row]), gold([row])]))"
    )
    environment = {**command_environment, "PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[], annotator([row]), [1.0]]


# Questions and demonstrations


@pytest.mark.parametrize(
    ("size", "num_train", "num_heldout", "per_kind"),
    [("demo", 912, 252, {28}), ("ci", 236, 116, {23, 24})],
)
def test_heldout_prompts_are_never_trained_on_and_every_kind_has_its_share(
    size: str, num_train: int, num_heldout: int, per_kind: set[int]
) -> None:
    train, heldout = tiny.choose_prompts(tiny.SIZES[size], seed=1)
    assert (len(train), len(heldout)) == (num_train, num_heldout)
    assert not {prompt.text for prompt in train} & {prompt.text for prompt in heldout}
    assert set(Counter(prompt.question.category for prompt in heldout).values()) == per_kind
    demonstrated = {row["prompt"] for row in tiny.make_demonstration_rows(train, 2400, seed=1)}
    assert demonstrated <= {prompt.text for prompt in train}


def test_demonstrations_cover_the_kinds_equally_and_the_styles_by_their_shares() -> None:
    """6000 rows over 9 kinds: 666 or 667 of each. A share p has standard error sqrt(p (1 - p) / 6000) <=
    .0054."""
    train, _ = tiny.choose_prompts(tiny.SIZES["demo"], seed=3)
    rows = tiny.make_demonstration_rows(train, 6000, seed=3)
    assert len(rows) == len({row["prompt_id"] for row in rows}) == 6000
    assert set(Counter(row["category"] for row in rows).values()) == {666, 667}
    shares = Counter(row["style"] for row in rows)
    for style, (share, _) in STYLES.items():
        assert shares[style] / 6000 == pytest.approx(share, abs=0.02)
    assert sum(share for share, _ in STYLES.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("style", "gold_mean", "utility_mean"),
    [
        ("polite", 1.75, 1.70),
        ("half_polite", 0.95, 0.90),
        ("curt", 1.00, 0.70),
        ("mistaken", -0.75, -0.40),
        ("rambling", -0.58, -0.18),
        ("rude", -0.83, -0.88),
        ("unsure", -0.50, -0.50),
        ("stuck", -0.88, -0.56),
        ("gushing", -0.07, 1.93),
    ],
)
def test_each_style_is_worth_what_the_world_was_designed_for(style: str, gold_mean: float, utility_mean: float) -> None:
    """The table of the reference world. Standard deviations are at most 1.1, so 4656 draws have an error
    below .02."""
    rng = Random(style)
    prompts = list(every_prompt().values()) * 2
    seen = [look_at(prompt, STYLES[style][1](rng, prompt.question)) for prompt in prompts]
    assert sum(map(gold_of, seen)) / len(seen) == pytest.approx(gold_mean, abs=0.09)
    assert sum(map(utility_of, seen)) / len(seen) == pytest.approx(utility_mean, abs=0.09)


def test_the_world_has_1164_prompts_of_nine_kinds_with_an_id_each() -> None:
    prompts = every_prompt().values()
    assert len(prompts) == len({prompt.prompt_id for prompt in prompts}) == 1164
    assert set(KINDS) == {prompt.question.category for prompt in prompts} and len(KINDS) == 9


# The command


def digests(folder: Path) -> dict[str, str]:
    """Every file but those that tell the command line."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("README.md", "provenance.json") and not path.name.startswith(".")
    }


def test_the_command_writes_the_same_world_twice(run_command, tmp_path: Path, capsys) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    done = run_command("tiny", "--output", first, "--size", "ci", env={"PYTHONHASHSEED": "7"})
    assert done.returncode == 0, done.stderr
    config = tiny.Config(output=str(second), size="ci")
    tiny.main(config)
    assert digests(first) == digests(second)
    assert {path.split("/")[0] for path in digests(first)} == {
        "prompts", "prompts_heldout", "demonstrations", "start"
    }  # fmt: skip
    before = {path: path.stat().st_mtime_ns for path in second.rglob("*") if not path.name.startswith(".")}
    capsys.readouterr()
    tiny.main(config)
    assert capsys.readouterr().out.count(", done\n") == 4
    assert before == {path: path.stat().st_mtime_ns for path in before}
    with pytest.raises(BadUse, match=r"what.seed was 1, now 2.*--overwrite"):
        tiny.main(tiny.Config(output=str(second), size="ci", seed=2))
    check_start_is_a_policy(first / "start")
    check_datasets_opens(first / "demonstrations")


def check_start_is_a_policy(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32 and model.config.head_dim == 32
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.05, rel=0.05)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == model.config.vocab_size <= 1024
    prompt = tokenizer.apply_chat_template(USER, add_generation_prompt=True, return_dict=False)
    assert len(prompt) == 1 + 4 + 7 + 1 + 4  # BOS, header, seven words, <|eot_id|>, header


def check_datasets_opens(folder: Path) -> None:
    import datasets

    rows = datasets.load_dataset(str(folder), split="train")
    assert len(rows) == 2400 and rows.column_names == ["prompt_id", "prompt", "response", "style", "category"]


def test_check_prints_the_plan_and_writes_nothing(tmp_path: Path, capsys) -> None:
    tiny.main(tiny.Config(output=str(tmp_path / "world"), run=tiny.RunFlags(check=True)))
    assert "prompts: 912 rows, absent" in capsys.readouterr().out
    assert not os.listdir(tmp_path)


def test_a_hub_name_is_no_place_for_a_world() -> None:
    with pytest.raises(BadUse, match="--output someone/world is not a local folder"):
        tiny.main(tiny.Config(output="someone/world"))
