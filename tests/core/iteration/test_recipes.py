"""Recipes: what YAML and the command line may say, and what a command line is made of it."""

from __future__ import annotations

import pytest
import yaml

from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.iteration import recipes

TEXT = """
iterate: {output: runs/a, iterations: 2, stop: {kl: 5}}
before:
  - sft: {lr: 1e-3, fresh: true}
  - rank: {reward_model: [a, b]}
train: {rebel: {eta: 3}, max_grad_norm: null, launch: {num_processes: 8}}
iteration_2: {train: {lr: 1.0e-7}}
"""


def recipe_of(text: str) -> recipes.Recipe:
    return recipes.parse(yaml.safe_load(text), "--recipe r.yaml")


def test_nested_flags_become_dotted_ones() -> None:
    told = recipe_of(TEXT)
    assert told.iterate == {"output": "runs/a", "iterations": 2, "stop.kl": 5}
    assert told.before == (("sft", {"lr": "1e-3", "fresh": True}), ("rank", {"reward_model": ["a", "b"]}))
    assert told.stages == {"train": {"rebel.eta": 3, "max_grad_norm": None, "launch.num_processes": 8}}


def test_names_may_be_written_with_dashes_and_null_as_the_word_none() -> None:
    """As on a command line, so that what iterate looks for is found."""
    told = recipe_of("{train: {rebel: {target-gap: 3}}, generate: {num-responses: 4, num_prompts: None, seed: null}}")
    told = recipes.override(told, ["--train.rebel.target-gap", "None"])
    assert told.stages["train"] == {"rebel.target_gap": None}
    assert told.stages["generate"] == {"num_responses": 4, "num_prompts": None, "seed": None}
    assert recipes.words_of(told.stages["train"]) == ["--rebel.target_gap", "None"]


def test_an_iteration_is_told_what_every_one_is_and_then_its_own() -> None:
    told = recipe_of(TEXT)
    assert "lr" not in told.flags("train", 1)
    assert told.flags("train", 2) == {**told.stages["train"], "lr": 1e-7}
    assert told.flags("generate", 2) == {}


def test_a_written_recipe_reads_as_the_same() -> None:
    told = recipes.override(recipe_of(TEXT), ["--train.lr", "1e-6", "--rank.dtype", "bfloat16"])
    text = recipes.to_yaml(recipes.as_data(told))
    assert recipes.parse(yaml.safe_load(text), "") == told


def test_the_command_line_wins_and_reaches_every_section() -> None:
    words = "--train.rebel.eta=4 --train.lr 1e-6 --rank.reward-model a b --filter.null_reward -1 --generate.token_logps"
    more = "--before.sft.lr 2 --iteration_2.train.lr 3 --iteration_3.filter.seed 7"
    told = recipes.override(recipe_of(TEXT), [*words.split(), *more.split()])
    assert told.stages["train"] | {"rebel.eta": "4", "lr": "1e-6"} == told.stages["train"]
    assert told.stages["rank"] == {"reward_model": ["a", "b"]}
    assert told.stages["filter"] == {"null_reward": "-1"}
    assert told.stages["generate"] == {"token_logps": True}
    assert told.before[0] == ("sft", {"lr": "2", "fresh": True})
    assert told.iterations == {2: {"train": {"lr": "3"}}, 3: {"filter": {"seed": "7"}}}


def test_false_takes_back_a_flag_that_the_recipe_sets_and_no_other() -> None:
    told = recipes.override(recipe_of(TEXT), ["--before.sft.fresh", "false"])
    assert told.before[0] == ("sft", {"lr": "1e-3"})
    with pytest.raises(BadUse, match=r"--before\.sft\.every_turn false takes back"):
        recipes.override(told, ["--before.sft.every_turn", "false"])


@pytest.mark.parametrize("words", [["--bogus", "1"], ["--trian.lr", "1"], ["--train"], ["--before.reward.lr", "1"]])
def test_a_flag_of_no_stage_is_refused_by_name(words: list[str]) -> None:
    with pytest.raises(BadUse, match=words[0]):
        recipes.override(recipe_of(TEXT), words)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("trian: {lr: 1}", "has a section trian; expected one of generate"),
        ("iteration_2: {evaluate: {}}", "iteration_2 has a section evaluate"),
        ("before: {sft: {}}", "expected a list of stages"),
        ("before: [{sft: {}, rank: {}}]", "expected one stage"),
        ("train: {launch: {mixed_precision: no}}", r"launch: mixed_precision is false; .* needs quotes"),
        ("train: 3", "train is 3; expected names with values"),
        ("train: {lr: [[1]]}", "expected a list of words or numbers"),
        ("generate: {date: 2024-05-01}", "date is a date; put it in quotes"),
    ],
)
def test_what_is_no_recipe_is_refused_with_its_place(text: str, says: str) -> None:
    with pytest.raises(BadUse, match=f"--recipe r.yaml.*{says}"):
        recipe_of(text)


def test_words_are_those_that_a_shell_user_would_type() -> None:
    flags: recipes.Flags = {
        "lr": 1e-6,
        "rebel.eta": "1e6",
        "fresh": True,
        "max_grad_norm": None,
        "reward_model": ["a", "b"],
        "n": -1,
    }
    words = "--lr 1e-06 --rebel.eta 1e6 --fresh --max_grad_norm None --reward_model a b --n -1"
    assert recipes.words_of(flags) == words.split()
    assert recipes.words_of({"generate_flags": "--x 1"}) == ["--generate_flags=--x 1"]


def test_run_stands_for_the_folder_everywhere() -> None:
    text = "{iterate: {model: $run/sft}, before: [{sft: {output_dir: $run/sft}}], rank: {reward_model: [x, y=$run/r]}}"
    told = recipes.in_folder(recipe_of(text), "runs/b")
    assert told.iterate == {"model": "runs/b/sft"}
    assert told.before == (("sft", {"output_dir": "runs/b/sft"}),)
    assert told.stages == {"rank": {"reward_model": ["x", "y=runs/b/r"]}}
