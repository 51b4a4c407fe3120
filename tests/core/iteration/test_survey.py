"""What a survey finds of a run on disk, and what of it is to be done again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.core import hub, storage
from rlhf_pipeline.core.files import write_json
from rlhf_pipeline.core.iteration import stages
from rlhf_pipeline.core.iteration.checks import Checked, Checker
from rlhf_pipeline.core.iteration.recipes import Recipe
from rlhf_pipeline.core.iteration.stages import Run, Stage
from rlhf_pipeline.core.iteration.survey import Look, folder_of, state_on_disk, survey
from rlhf_pipeline.core.reporting.evaluation import RESULTS


class Changed(Checker):
    """The answers of a run's stages of which generate, say, is told something else than it was."""

    def __init__(self, command: str) -> None:
        super().__init__()
        self.command = command

    def check(self, python: str, command: str, words: Any, **kwargs: Any) -> Checked:
        known = command != self.command or {"--overwrite", "--pending"} & set(words)
        return Checked(0, "") if known else Checked(2, "error: it holds the output of another run.\n")


@pytest.fixture
def run(tmp_path: Path, tiny_prompts: Path) -> Run:
    return Run(folder=str(tmp_path / "run"), model="./start", prompts=str(tiny_prompts), iterations=2)


def finish(stage: Stage, **made: Any) -> None:
    """As if the stage had run."""
    folder = folder_of(stage.output)
    (folder / "data").mkdir(parents=True)
    write_json(folder / storage.PROVENANCE, {"rows_out": 24, "loss": {"eta": 0.5}, **made})


def looks_of(plan: tuple[Stage, ...], checker: Checker, *, overwrite: bool = False) -> dict[str, Look]:
    return {look.stage.name: look for look in survey(plan, plan, checker, overwrite=overwrite)}


def test_an_eta_is_not_taken_of_a_policy_that_is_to_be_trained_again(run: Run) -> None:
    plan = stages.plan(Recipe(stages={"train": {"rebel.target_gap": 3}}), run)
    for stage in plan:
        finish(stage)
    done = looks_of(plan, Changed("nothing"))["iteration_2/train"]
    assert (done.state, done.stage.flags["rebel.eta"]) == ("done", 0.5)
    again = looks_of(plan, Changed("generate"), overwrite=True)["iteration_2/train"]
    assert again.stage.eta_from == f"{run.folder}/iteration_1/policy" and "rebel.eta" not in again.stage.flags


def test_what_belongs_on_the_hub_is_done_once_it_was_pushed_there(run: Run, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for stage in stages.plan(Recipe(), dataclasses.replace(run, repo="owner/run"))[:4]:
        finish(stage)
        assert state_on_disk(stage) == "partial"
        repo = stage.flags.get("push_to", stage.output)
        write_json(folder_of(stage.output) / hub.PUSHED, {"repo_id": repo, "commit": "1"})
        assert state_on_disk(stage) == "done"
    moved = dataclasses.replace(stage, flags={**stage.flags, "push_to": "owner/elsewhere"})
    assert state_on_disk(moved) == "partial"


def test_an_evaluation_is_done_once_it_has_all_policies_and_reward_models_by_name(run: Run) -> None:
    def evaluation(*reward_models: str) -> Stage:
        told = Recipe(stages={"evaluate": {"reward_models": [*reward_models]}})
        return next(stage for stage in stages.plan(told, run) if stage.command == "evaluate")

    finish(evaluation("proxy=./rm"))
    for others, expected in ((["iteration_1", "iteration_2"], "done"), (["iteration_1", "mine"], "partial")):
        policies = [{"name": name} for name in ("start", *others)]
        write_json(Path(run.folder, "evaluation", RESULTS), {"policies": policies, "reward_models": ["proxy"]})
        assert state_on_disk(evaluation("proxy=./rm")) == expected
        assert state_on_disk(evaluation("proxy=./rm", "other=./rm2")) == "partial"
