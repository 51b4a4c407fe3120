"""A run's plan as a person reads it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from rlhf_pipeline.core.iteration import plan_table, stages
from rlhf_pipeline.core.iteration.recipes import Recipe
from rlhf_pipeline.core.iteration.stages import Run
from rlhf_pipeline.core.iteration.survey import Look


def test_a_printed_command_is_the_command() -> None:
    """Folded at flags, so that a flag stays with its values, and quoted where a shell needs it."""
    words = ["py", "-m", "x", "--a", "b c", *(word for i in range(30) for word in (f"--flag_{i}", "1", "2"))]
    for width in range(40, 120, 7):
        text = plan_table.pasted(words, width)
        assert shlex.split(text.replace("\\\n", " ")) == words
        assert all(len(line) <= width + len(" \\") for line in text.splitlines())
        assert all(line.lstrip().startswith("--") for line in text.splitlines()[1:])


def test_what_has_not_run_takes_as_long_as_the_last_of_its_kind(tmp_path: Path) -> None:
    run = Run(folder=str(tmp_path), model="./start", prompts="./prompts", iterations=3)
    looks = [Look(stage, "done" if stage.iteration == 1 else "to do", rows=10) for stage in stages.plan(Recipe(), run)]
    seconds = {"iteration_1/generate": 90.0, "iteration_1/train": 3700.0}
    by_name = {look.stage.name: plan_table.expected_seconds(look, looks, seconds) for look in looks}
    assert by_name["iteration_1/generate"] == (90.0, False)
    assert by_name["iteration_3/generate"] == (90.0, True)
    assert by_name["iteration_2/rank"] is None


def test_a_policy_is_as_big_as_the_weights_it_starts_from(tmp_path: Path) -> None:
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "model.safetensors").write_bytes(bytes(1000))
    run = Run(folder=str(tmp_path / "run"), model=str(tmp_path / "start"), prompts="./prompts", iterations=2)
    looks = [Look(stage, "to do") for stage in stages.plan(Recipe(), run) if stage.command == "train"]
    assert plan_table.disk(looks, run.folder, run.model).startswith("disk       at most 2.0 kB still to be written; ")


def test_a_policy_that_is_still_to_be_written_has_no_size_yet(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert plan_table.weights_size("./sft") is None


def test_a_line_of_the_table_names_places_without_the_runs_folder(tmp_path: Path) -> None:
    folder = f"{tmp_path}/run"
    run = Run(folder=folder, model=f"{folder}/sft", prompts="./prompts", iterations=1)
    plan = stages.plan(Recipe(stages={"generate": {"maxlen": 10, "num_responses": 2}}), run)
    head, line = plan_table.lines([Look(plan[0], "to do", rows=600)], folder, run.model, {})
    assert head.split() == ["stage", "reads", "writes", "rows", "tokens", "disk", "time", "state"]
    assert line.split("  ")[0] == "iteration_1/generate"
    words = "./prompts, sft iteration_1/responses 600 <= 12.0 k <= 48.0 kB to do"
    assert " ".join(line.split()).endswith(words), json.dumps(line)
