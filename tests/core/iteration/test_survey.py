"""What a survey finds of a run on disk, and what of it is to be done again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.core import storage
from rlhf_pipeline.core.files import write_json
from rlhf_pipeline.core.iteration import stages
from rlhf_pipeline.core.iteration.checks import Checked, Checker
from rlhf_pipeline.core.iteration.recipes import Recipe
from rlhf_pipeline.core.iteration.stages import Run, Stage
from rlhf_pipeline.core.iteration.survey import Look, folder_of, survey


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
