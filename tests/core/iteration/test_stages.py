"""The plan of a run as data, against plans written out by hand, and against what the commands themselves declare."""

from __future__ import annotations

import dataclasses
import importlib
import typing
from collections.abc import Iterator
from typing import Any

import pytest

from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.iteration import estimates, stages
from rlhf_pipeline.core.iteration.recipes import Flags, Recipe
from rlhf_pipeline.core.iteration.stages import Run, Stage, command_line

RUN = Run(folder="runs/a", model="./start", prompts="./prompts.jsonl", iterations=2)


def line(stage: Stage) -> str:
    return " ".join(command_line(stage))


def named(plan: tuple[Stage, ...], name: str) -> Stage:
    return next(stage for stage in plan if stage.name == name)


def test_two_iterations_are_eight_commands_each_from_the_policy_before() -> None:
    """Written out by hand from DESIGN's run folder. Seeds move by 1: 0 -> 1, and train's 555134 -> 555135."""
    plan = stages.plan(Recipe(stages={"rank": {"reward_model": "./rm"}}), RUN)
    assert [line(stage).removeprefix("python -m rlhf_pipeline.") for stage in plan] == [
        "generate --model ./start --prompts ./prompts.jsonl --output_repo runs/a/iteration_1/responses",
        "rank --input_repo runs/a/iteration_1/responses --output_repo runs/a/iteration_1/rewards --reward_model ./rm",
        "filter --input_repo runs/a/iteration_1/rewards --model ./start --output_repo runs/a/iteration_1/pairs",
        "train --base_model ./start --input_repo runs/a/iteration_1/pairs --output_dir runs/a/iteration_1/policy",
        "generate --model runs/a/iteration_1/policy --prompts ./prompts.jsonl "
        "--output_repo runs/a/iteration_2/responses --seed 1",
        "rank --input_repo runs/a/iteration_2/responses --output_repo runs/a/iteration_2/rewards --reward_model ./rm",
        "filter --input_repo runs/a/iteration_2/rewards --model runs/a/iteration_1/policy "
        "--output_repo runs/a/iteration_2/pairs --seed 1",
        "train --base_model runs/a/iteration_1/policy --input_repo runs/a/iteration_2/pairs "
        "--output_dir runs/a/iteration_2/policy --seed 555135",
    ]
    assert plan[3].inputs == ("runs/a/iteration_1/pairs", "./start")


def test_on_the_hub_data_have_names_and_policies_stay_local_too() -> None:
    plan = stages.plan(Recipe(), dataclasses.replace(RUN, repo="me/x", iterations=1))
    assert [stage.output for stage in plan] == [
        "me/x-iter1-responses", "me/x-iter1-rewards", "me/x-iter1-pairs", "runs/a/iteration_1/policy",
    ]  # fmt: skip
    assert plan[3].flags["push_to"] == "me/x-iter1-policy"


def test_an_iterations_own_flags_win_and_its_own_seed_does_not_move() -> None:
    told = Recipe(
        stages={"generate": {"seed": 10, "shuffle_seed": 3}, "train": {"lr": 1, "launch.num_processes": 2}},
        iterations={2: {"generate": {"seed": 77}, "train": {"lr": 2, "launch.num_processes": 4}}},
    )
    plan = stages.plan(told, dataclasses.replace(RUN, iterations=3))
    generates = [named(plan, f"iteration_{t}/generate").flags for t in (1, 2, 3)]
    assert [flags["seed"] for flags in generates] == [10, 77, 12]
    assert [flags["shuffle_seed"] for flags in generates] == [3, 4, 5]
    trains = [named(plan, f"iteration_{t}/train") for t in (1, 2, 3)]
    assert [stage.flags["lr"] for stage in trains] == [1, 2, 1]
    assert [stage.launch for stage in trains] == [{"num_processes": 2}, {"num_processes": 4}, {"num_processes": 2}]


def test_a_launched_stage_is_an_accelerate_launch_at_any_free_port() -> None:
    told = Recipe(stages={"train": {"launch.config_file": "x.yaml", "launch.num_processes": 2}})
    train = named(stages.plan(told, dataclasses.replace(RUN, train_python="py")), "iteration_1/train")
    assert line(train).startswith(
        "py -m accelerate.commands.launch --main_process_port 0 --config_file x.yaml --num_processes 2 "
        "-m rlhf_pipeline.train --base_model"
    )


def test_a_stages_variables_are_set_in_front_of_its_command() -> None:
    told = Recipe(stages={"rank": {"env.OMP_NUM_THREADS": 1, "reward_model": "./rm"}, "evaluate": {"env.X": "y z"}})
    plan = stages.plan(told, dataclasses.replace(RUN, iterations=1))
    assert line(named(plan, "iteration_1/rank")).startswith("env OMP_NUM_THREADS=1 python -m rlhf_pipeline.rank --in")
    assert command_line(named(plan, "evaluate"))[:2] == ["env", "X=y z"]
    assert "env" not in command_line(named(plan, "iteration_1/train"))


def test_shards_are_disjoint_and_cover_the_prompts_in_one_order() -> None:
    """10 rows in 3 shards: 10 t // 3 is 0, 3, 6, 10. Within 2..10, 8 t // 3 is 0, 2, 5, 8, so 2, 4, 7, 10."""
    run = dataclasses.replace(RUN, iterations=3, shards=3, num_prompts=10)

    def bounds(told: Recipe) -> list[tuple[Any, ...]]:
        plan = stages.plan(told, run)
        flags = [named(plan, f"iteration_{t}/generate").flags for t in (1, 2, 3)]
        return [(flag["start_idx"], flag["end_idx"], flag.get("shuffle_seed")) for flag in flags]

    assert bounds(Recipe()) == [(0, 3, None), (3, 6, None), (6, 10, None)]
    inner: Flags = {"start_idx": 2, "shuffle_seed": 5}
    assert bounds(Recipe(stages={"generate": inner})) == [(2, 4, 5), (4, 7, 5), (7, 10, 5)]
    with pytest.raises(BadUse, match="can't cut 2 prompts into 3 shards"):
        stages.plan(Recipe(stages={"generate": {"end_idx": 2}}), run)


def test_a_target_gap_is_resolved_by_iteration_1_for_all() -> None:
    told = Recipe(stages={"train": {"rebel.target_gap": 3, "lr": 1}}, iterations={3: {"train": {"rebel.eta": 9}}})
    plan = stages.plan(told, dataclasses.replace(RUN, iterations=3))
    first, second, third = (named(plan, f"iteration_{t}/train") for t in (1, 2, 3))
    assert first.eta_from is None and second.eta_from == "runs/a/iteration_1/policy" and third.eta_from is None
    with_eta = stages.with_eta(second, 0.75)
    assert with_eta.flags["rebel.eta"] == 0.75
    assert "rebel.target_gap" not in with_eta.flags and with_eta.eta_from is None


def test_no_target_gap_means_no_eta_to_wait_for() -> None:
    told = Recipe(stages={"train": {"loss": "dpo", "rebel.target_gap": None}})
    assert named(stages.plan(told, RUN), "iteration_2/train").eta_from is None


def test_what_is_none_is_neither_moved_nor_counted() -> None:
    told = Recipe(stages={"generate": {"shuffle_seed": None, "num_prompts": None}})
    plan = stages.plan(told, RUN)
    assert named(plan, "iteration_2/generate").flags["shuffle_seed"] is None
    assert estimates.prompts_taken(plan[0].flags, 7) == 7


def test_responses_are_counted_once_and_evaluate_samples_as_generate_does() -> None:
    told = Recipe(
        stages={
            "generate": {"pairs": 3, "maxlen": 48, "backend": "transformers"},
            "filter": {"num_responses": 2},
            "evaluate": {"reward_models": ["proxy=./rm"], "prompts": "./held", "maxlen": 64},
        }
    )
    plan = stages.plan(told, dataclasses.replace(RUN, iterations=1))
    assert [stage.flags.get("num_responses") for stage in plan[:4]] == [3, 3, 2, None]
    evaluate, report = plan[4:]
    assert evaluate.flags["maxlen"] == 64 and evaluate.flags["backend"] == "transformers"
    assert evaluate.flags["policies"] == ["./start", "iteration_1=runs/a/iteration_1/policy"]
    assert evaluate.inputs == ("./held", "./start", "runs/a/iteration_1/policy", "./rm")
    assert line(report) == "python -m rlhf_pipeline.report runs/a"


def test_with_rules_to_judge_every_iteration_is_evaluated_into_one_growing_evaluation() -> None:
    told = Recipe(stages={"evaluate": {"reward_models": "./rm"}})
    plan = stages.plan(told, dataclasses.replace(RUN, evaluate_each=True))
    evaluations = [stage for stage in plan if stage.command == "evaluate"]
    assert [(stage.name, stage.output, len(stages.as_list(stage.flags["policies"]))) for stage in evaluations] == [
        ("iteration_1/evaluate", "runs/a/evaluation", 2),
        ("evaluate", "runs/a/evaluation", 3),
    ]
    assert [stage.name for stage in plan[-3:]] == ["iteration_2/train", "evaluate", "report"]


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"train": {"base_model": "x"}}, r"train\.base_model is what iterate itself sets"),
        ({"train": {"task.input_repo": "x"}}, r"train\.input_repo is what iterate itself sets"),
        ({"generate": {"model": "x"}}, "own --model is the first policy"),
        ({"rank": {"overwrite": True}}, "pass --overwrite to iterate"),
    ],
)
def test_a_recipe_may_not_set_what_the_run_decides(section: dict[str, Flags], says: str) -> None:
    with pytest.raises(BadUse, match=says):
        stages.plan(Recipe(stages=section), RUN)


def test_what_comes_before_must_say_where_it_writes() -> None:
    with pytest.raises(BadUse, match="before/sft has no output_dir"):
        stages.plan(Recipe(before=(("sft", {"lr": 1}),)), RUN)


def test_a_part_runs_from_the_first_of_its_name_to_the_last() -> None:
    told = Recipe(before=(("generate", {"output_repo": "runs/a/x"}),))
    plan = stages.plan(told, RUN)

    def names(first: str | None, last: str | None) -> list[str]:
        return [stage.name for stage in stages.part(plan, first, last)]

    assert names("iteration_1/rank", "iteration_1/filter") == ["iteration_1/rank", "iteration_1/filter"]
    assert names("rank", "train")[0] == "iteration_1/rank" and names("rank", "train")[-1] == "iteration_2/train"
    assert names("generate", None)[0] == "iteration_1/generate"  # what comes before is named in full
    assert names(None, "before/generate") == ["before/generate"]
    with pytest.raises(BadUse, match="--from rnak is none"):
        names("rnak", None)
    with pytest.raises(BadUse, match="--to iteration_1/rank comes before --from iteration_2/rank"):
        names("iteration_2/rank", "iteration_1/rank")


def test_what_follows_from_a_stage_is_all_that_was_made_from_its_output() -> None:
    told = Recipe(stages={"evaluate": {"reward_models": "./rm"}})
    plan = stages.plan(told, RUN)
    follows = stages.following(plan, named(plan, "iteration_1/train"))
    iteration_2 = [f"iteration_2/{command}" for command in ("generate", "rank", "filter", "train")]
    assert [stage.name for stage in follows] == [*iteration_2, "evaluate", "report"]
    assert [stage.name for stage in stages.following(plan, named(plan, "iteration_2/train"))] == ["evaluate", "report"]


# Estimates


def test_rows_are_followed_through_the_stages() -> None:
    """100 prompts from row 10: 90, of them at most 60; 10 % of 60 held out leaves 54; 3 responses make 3 pairs each."""
    told = Recipe(
        stages={
            "generate": {"start_idx": 10, "num_prompts": 60, "num_responses": 3, "maxlen": 20},
            "filter": {"select": "all_pairs", "test_size": 0.1, "maxlen": 20, "maxlen_prompt": 30},
        }
    )
    plan = stages.plan(told, dataclasses.replace(RUN, iterations=1))
    rows = estimates.all_rows(plan, {stages.place("./prompts.jsonl"): 100})
    assert [rows[stage.output] for stage in plan] == [60, 60, 54 * 3, 0]
    assert estimates.tokens_written(plan[0], 60) == 60 * 3 * 20
    assert estimates.bytes_written(plan[2], 162) == 162 * (30 + 20 + 20) * 4


# What the tables say of the commands is what the commands say of themselves


def leaves(config_type: Any, prefix: str = "") -> Iterator[tuple[str, Any, tuple[str, ...]]]:
    """(name, default, aliases) of every flag of a Config type."""
    hints = typing.get_type_hints(config_type, include_extras=True)
    for field in dataclasses.fields(config_type):
        marks = getattr(hints[field.name], "__metadata__", ())
        aliases = tuple(alias for mark in marks for alias in getattr(mark, "aliases", None) or ())
        if dataclasses.is_dataclass(field.default):
            yield from leaves(type(field.default), "" if field.name == "run" else f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field.default, aliases


def flags_of(command: str) -> dict[str, tuple[Any, tuple[str, ...]]]:
    config_type = importlib.import_module(f"rlhf_pipeline.{command}").Config
    return {name: (default, aliases) for name, default, aliases in leaves(config_type)}


@pytest.mark.parametrize("command", stages.OUTPUT_FLAG)
def test_the_flags_that_are_set_are_flags_of_the_command(command: str) -> None:
    tables = (stages.DATA_FLAG, stages.MODEL_FLAG, stages.OUTPUT_FLAG)
    used = {table[command] for table in tables if command in table} | set(stages.ONE_RUN)
    used |= {*stages.ALIASES.get(command, {}).values(), *stages.SET_HERE.get(command, ())}
    assert used <= flags_of(command).keys()


@pytest.mark.parametrize("command", ["generate", "rank", "filter", "train", "sft", "reward"])
def test_every_other_spelling_of_a_flag_is_known(command: str) -> None:
    declared = {alias.removeprefix("--"): name for name, (_, aliases) in flags_of(command).items() for alias in aliases}
    assert stages.ALIASES.get(command, {}) == declared


def test_the_defaults_that_plans_and_estimates_reckon_with_are_the_commands_own() -> None:
    assert {command: flags_of(command)["seed"][0] for command in stages.SEEDS} == stages.SEEDS
    assert flags_of("generate")["num_responses"][0] == estimates.NUM_RESPONSES
    assert flags_of("generate")["maxlen"][0] == flags_of("filter")["maxlen"][0] == estimates.MAXLEN
    assert flags_of("filter")["maxlen_prompt"][0] == estimates.MAXLEN_PROMPT
    assert flags_of("filter")["test_size"][0] == estimates.TEST_SIZE
    assert set(stages.SAMPLING) <= flags_of("generate").keys() & flags_of("evaluate").keys()


@pytest.mark.parametrize("size", stages.WORLD)
def test_the_world_has_as_many_rows_as_the_plan_says(size: str) -> None:
    from rlhf_pipeline import tiny

    rows = {name: len(rows) for name, rows in tiny.make_datasets(tiny.Config(size=size)).items()}  # type: ignore[arg-type]
    assert rows | {"start": 0} == stages.WORLD[size]
