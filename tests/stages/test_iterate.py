"""iterate: what a start is told and refuses, that a run goes to its end through kills, and when it ends before."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import REPO
from rlhf_pipeline import evaluate, iterate
from rlhf_pipeline.core.command import BadUse, parse
from rlhf_pipeline.core.iteration import recipes, slurm, stages
from rlhf_pipeline.core.iteration.recipes import Recipe
from rlhf_pipeline.core.iteration.stages import Run
from rlhf_pipeline.iterate import Config
from run_maker import make_run

REWARD = """
def score(rows):
    return [float(len(set(row["response"]))) for row in rows]
"""


@pytest.fixture
def small(tmp_path: Path, tiny_policy: Path, tiny_prompts: Path) -> Path:
    """A recipe of one iteration of a random policy, that takes seconds; its folder is to be given."""
    (tmp_path / "reward.py").write_text(REWARD)
    told = {
        "iterate": {"model": str(tiny_policy), "prompts": str(tiny_prompts), "iterations": 1},
        "generate": {"backend": "transformers", "num_responses": 4, "maxlen": 24},
        "rank": {"reward_model": f"{tmp_path}/reward.py:score"},
        "filter": {"maxlen": 24, "maxlen_prompt": 128, "min_responses": 2, "keep_truncated": True, "test_size": 4},
        "train": {"batch_size": 4, "lr": 1e-3, "save_every": 1, "rebel": {"target_gap": 3}},
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(told))
    return path


# What a start is told


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("iterate: {iterations: 7, shard_prompts: true, model: ./a, stop: {kl: 5}}\ntrain: {lr: 1}")
    config = Config.from_words(["--recipe", str(path), "--model", "./b", "--no_shard_prompts", "--train.lr", "2"])
    assert (config.iterations, config.model, config.shard_prompts, config.stop.kl) == (7, "./b", False, 5)
    assert config.prompts == Config().prompts
    assert config.overrides == ("--train.lr", "2")
    assert iterate.read_recipe(config).stages == {"train": {"lr": "2"}}
    assert iterate.choose_folder(config) == "runs/r"


def test_flags_that_evaluate_hands_on_come_through_iterate() -> None:
    flags = "--engine.max_model_len 4096"
    config = Config.from_words(["--output", "runs/x", f"--evaluate.generate_flags={flags}"])
    evaluation = iterate.read_recipe(config).stages["evaluate"]
    assert (
        parse(
            evaluate.Config, ["--policies", "a", "--reward_models", "b", *recipes.words_of(evaluation)]
        ).generate_flags
        == flags
    )


def test_a_recipe_can_not_say_what_belongs_to_one_start(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    for name in ("from", "check", "slurm", "iteratoins"):
        path.write_text(f"iterate: {{{name}: x}}")
        with pytest.raises(BadUse, match=f"iterate has no {name} in a recipe; expected some of"):
            Config.from_words(["--recipe", str(path)])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--iterations 0", "--iterations is 0"),
        ("--repo alone", "--repo alone is not of the form OWNER/NAME"),
        ("--stop.kl 1", r"needs held-out prompts: pass --evaluate\.prompts"),
        ("--stop.kl 1 --evaluate.no_kl", r"--stop\.kl needs the KL"),
        ("--stop.kl 1 --stop.reward x --evaluate.reward_models a=b c=d", "none of evaluate's reward models a, c"),
    ],
)
def test_values_that_can_not_be_meant_are_refused(words: str, says: str) -> None:
    config = Config.from_words(["--output", "runs/x", *words.split()])
    with pytest.raises(BadUse, match=says):
        iterate.check_values(config, iterate.read_recipe(config))


def test_a_run_needs_a_folder() -> None:
    with pytest.raises(BadUse, match="--output is missing"):
        iterate.choose_folder(Config())
    with pytest.raises(BadUse, match=r"not a local folder, and a run is one"):
        iterate.choose_folder(Config(output="owner/name"))


@pytest.mark.parametrize("path", sorted((REPO / "scripts" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_we_ship_is_a_plan_of_commands_that_parse(path: Path) -> None:
    config = Config.from_words(["--recipe", str(path)])
    told, run = iterate.make_plan(config, iterate.read_recipe(config), iterate.choose_folder(config))
    plan = stages.plan(told, run)
    assert len(plan) >= 4 * config.iterations
    for stage in plan:
        config_type = importlib.import_module(f"rlhf_pipeline.{stage.command}").Config
        words = [*stage.arguments, *recipes.words_of(stage.flags)]
        assert dataclasses.is_dataclass(parse(config_type, words)), stage.name
        assert "config_file" not in stage.launch or (REPO / str(stage.launch["config_file"])).is_file()


def test_a_wrong_flag_of_train_shows_before_anything_starts(small: Path, tmp_path: Path, run_command) -> None:
    folder = tmp_path / "run"
    done = run_command("iterate", "--recipe", small, "--output", folder, "--train.learning_rate", "1")
    assert done.returncode == 2
    assert "iteration_1/train" in done.stderr and "--learning_rate" in done.stderr
    assert "[1 of" not in done.stdout and not (folder / "iteration_1").exists()


def test_check_prints_the_plan_and_leaves_nothing_behind(small: Path, tmp_path: Path, run_command) -> None:
    """24 prompts x 4 responses x 24 tokens is 2304; 4 prompts held out leave 20 pairs."""
    folder = tmp_path / "run"
    done = run_command("iterate", "--recipe", small, "--output", folder, "--check", "--iterations", "2")
    assert done.returncode == 0, done.stderr
    table = {line.split()[0]: " ".join(line.split()) for line in done.stdout.splitlines() if line}
    assert "iteration_1/responses 24 <= 2.3 k" in table["iteration_1/generate"]
    assert "iteration_1/pairs 20 " in table["iteration_1/filter"]
    assert table["iteration_2/train"].endswith("to do, eta of iteration 1")
    assert not folder.exists()


# SLURM


def submit(lines: list[str], tmp_path: Path) -> list[list[str]]:
    """The words of each sbatch of a printed script, with a stand-in that answers with job numbers 101, 102, ..."""
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / "sbatch"
    stand_in.write_text('#!/usr/bin/env bash\nprintf "%q " "$@" >>jobs; echo >>jobs; echo $((100 + $(wc -l <jobs)))\n')
    stand_in.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", "\n".join(lines)], cwd=tmp_path, env=environment, check=True, timeout=20)
    return [shlex.split(line) for line in (tmp_path / "jobs").read_text().splitlines()]


def test_every_slurm_job_waits_for_those_whose_output_it_needs(tmp_path: Path) -> None:
    """By hand: rank after generate 101, filter after rank 102 ...; the second train needs its pairs and the first
    policy, which is also where its eta comes from: jobs 107 and 104."""
    told = Recipe(stages={"train": {"rebel.target_gap": 3}})
    plan = stages.plan(told, Run(folder="runs/a", model="./start", prompts="./my prompts.jsonl", iterations=2))
    jobs = submit(slurm.script(plan, "runs/a"), tmp_path)
    after = [next((word for word in job if word.startswith("--dependency")), None) for job in jobs]
    numbers = [None if word is None else word.removeprefix("--dependency=afterok:") for word in after]
    assert numbers == [None, "101", "102", "103", "104", "105", "106:104", "107:104"]
    scripts = [next(Path(word).stem for word in job if word.endswith(".sbatch")) for job in jobs]
    assert scripts == 2 * ["generate", "rank", "cpu", "train"]
    assert "./my prompts.jsonl" in jobs[0] and "--export=ALL,ETA_FROM=runs/a/iteration_1/policy" in jobs[7]
    assert (tmp_path / "runs" / "a" / "logs").is_dir()


def test_generate_and_rank_become_arrays_whose_jobs_get_their_number(tmp_path: Path) -> None:
    plan = stages.plan(Recipe(), Run(folder="runs/a", model="./start", prompts="./p.jsonl", iterations=1))
    jobs = submit(slurm.script(plan, "runs/a", shards=4), tmp_path)
    assert ["--array=0-3" in job for job in jobs] == [True, True, False, False]
    assert [job[-2:] == ["--num_shards", "4"] for job in jobs] == [True, True, False, False]
    for name in ("generate", "rank"):
        command = ["bash", str(REPO / f"scripts/slurm/{name}.sbatch"), "echo", "--num_shards", "4"]
        for environment, expected in (({"SLURM_ARRAY_TASK_ID": "0"}, " --shard_index 0"), ({}, "")):
            out = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
            assert out.stdout == f"--num_shards 4{expected}\n"


def test_the_train_job_puts_iteration_1s_eta_in_the_place_of_the_target(tmp_path: Path) -> None:
    made = {"config": {"rebel.eta": 1e6}, "loss": {"name": "rebel", "eta": 0.7297297, "target_gap": None}}
    (tmp_path / "provenance.json").write_text(json.dumps(made, indent=2))
    command = ["bash", str(REPO / "scripts/slurm/train.sbatch"), "echo", "--lr", "1", "--rebel.target_gap", "3", "--x"]
    for environment, expected in (({"ETA_FROM": str(tmp_path)}, "--rebel.eta 0.7297297"), ({}, "--rebel.target_gap 3")):
        out = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
        assert out.stdout == f"--lr 1 {expected} --x\n"


def test_rules_that_nobody_would_look_at_are_refused_with_slurm(tmp_path: Path) -> None:
    config = Config(output=str(tmp_path / "run"), slurm=True, remove_intermediate=True)
    with pytest.raises(BadUse, match=r"scripts/slurm/iterate\.sbatch"):
        iterate.main(config)


# What a finished evaluation says


def test_an_evaluation_is_read_by_the_policies_names(tmp_path: Path) -> None:
    """Somebody has evaluated another policy into it, between those of the run."""
    folder = make_run(tmp_path / "run", iterations=3, num_prompts=10)
    told = Recipe(stages={"evaluate": {"reward_models": ["proxy=./reward", "gold=./gold"]}})
    plan = stages.plan(told, Run(folder=str(folder), model="./sft", prompts="./prompts", iterations=3))
    evaluation = next(stage for stage in plan if stage.command == "evaluate")
    policies = ["sft", "iteration_2=./b", "iteration_3=./c"]
    evaluation = dataclasses.replace(evaluation, flags={**evaluation.flags, "policies": policies})
    rows, judge = iterate.measured(Config(), evaluation)
    assert ([row["name"] for row in rows], judge) == (["sft", "iteration_2", "iteration_3"], "gold")


# Whole runs


def start(words: list[Any], environment: dict[str, str], output: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "rlhf_pipeline.iterate", *map(str, words)]
    with output.open("ab") as file:
        return subprocess.Popen(
            command, cwd=REPO, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of a run's rows and weights."""
    files = [*folder.glob("iteration_*/*/data/*.parquet"), *folder.glob("iteration_*/policy/*.safetensors")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.slow
def test_a_run_goes_to_its_end_says_so_and_names_what_a_changed_setting_undoes(
    small: Path, tmp_path: Path, run_command
) -> None:
    folder = tmp_path / "run"
    words = ["--recipe", small, "--output", folder]
    first = run_command("iterate", *words, "--iterations", "2")
    assert first.returncode == 0, first.stderr
    assert "$ " in first.stdout and f"done: {folder}" in first.stdout
    timings = json.loads((folder / "timings.json").read_text())
    expected = [f"iteration_{t}/{name}" for t in (1, 2) for name in ("generate", "rank", "filter", "train")]
    assert list(timings) == expected
    etas = [json.loads((folder / f"iteration_{t}/policy/provenance.json").read_text())["loss"]["eta"] for t in (1, 2)]
    assert etas[0] == etas[1] != 1e6
    assert "--output_dir" in (folder / "logs" / "iteration_1-train.log").read_text()
    before = contents(folder)

    again = run_command("iterate", "--recipe", folder / "recipe.yaml")
    assert again.returncode == 0 and "all 8 stages are done" in again.stdout and "[1 of" not in again.stdout

    changed = run_command("iterate", *words, "--iterations", "2", "--train.lr", "2e-3", "--check")
    assert changed.returncode == 2
    assert "iteration_1/train" in changed.stderr and "what.lr was 0.001, now 0.002" in changed.stderr
    assert "iteration_2/generate, iteration_2/rank, iteration_2/filter, iteration_2/train" in changed.stderr

    part = ["--from", "iteration_2/train", "--to", "iteration_2/train"]
    more = ["--iterations", "2", "--iteration_2.train.lr", "2e-3", *part]
    redone = run_command("iterate", *words, *more, "--overwrite")
    assert redone.returncode == 0 and redone.stdout.count("\n$ ") == 1, redone.stderr
    after = contents(folder)
    assert {name for name in before if before[name] != after[name]} == {"iteration_2/policy/model.safetensors"}


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(
    small: Path, tmp_path: Path, run_command, command_environment
) -> None:
    """SIGKILL to the command's process group, SIGTERM once; each attempt gets a little longer, so that it ends."""
    whole = tmp_path / "whole"
    assert run_command("iterate", "--recipe", small, "--output", whole).returncode == 0
    killed, output, rng = tmp_path / "killed", tmp_path / "output", random.Random(7)
    for attempt in range(5):
        process = start(["--recipe", small, "--output", killed], command_environment, output)
        time.sleep(rng.uniform(8, 14) + 3 * attempt)
        if process.poll() is not None:
            break
        if attempt == 2:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 143
        else:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    last = run_command("iterate", "--recipe", small, "--output", killed)
    assert last.returncode == 0, output.read_text() + last.stderr
    assert contents(killed) == contents(whole)
    seconds = [json.loads((folder / "timings.json").read_text()) for folder in (whole, killed)]
    assert seconds[0].keys() == seconds[1].keys()


@pytest.mark.slow
def test_a_push_that_failed_is_repeated_by_the_next_start(
    small: Path, tmp_path: Path, run_command, hub, online
) -> None:
    words = ["--recipe", small, "--output", tmp_path / "run", "--repo", "owner/run"]

    def run(*more: Any) -> Any:
        return run_command("iterate", *words, *more, env=online, cwd=tmp_path)

    hub.failures = [403]
    assert "iteration_1/generate ended with exit code 2" in run().stderr
    assert run("--to", "filter").returncode == 0
    hub.failures = [403]
    assert "iteration_1/train ended with exit code 2" in run().stderr
    assert "model.safetensors" not in hub.repos["model", "owner/run-iter1-policy"]["files"]
    last = run()
    assert last.returncode == 0 and last.stdout.count("\n$ ") == 1, last.stderr
    assert "model.safetensors" in hub.repos["model", "owner/run-iter1-policy"]["files"]
    for name in ("responses", "rewards", "pairs"):
        files = hub.repos["dataset", f"owner/run-iter1-{name}"]["files"]
        assert "provenance.json" in files and "pushed.json" not in files
    assert "all 4 stages are done" in run("--check").stdout


@pytest.mark.slow
def test_a_rule_that_fires_ends_the_run_with_the_best_policy_named(small: Path, tmp_path: Path, run_command) -> None:
    """A random policy is cut off at 24 tokens now and then, so that no more than 0 % fires after iteration 1.

    Its data are removed, but not what they were; a restart finds all of this done.
    """
    folder = tmp_path / "run"
    told = yaml.safe_load(small.read_text())
    rewards = [f"letters={told['rank']['reward_model']}"]
    words = ["--recipe", small, "--output", folder, "--iterations", "3", "--stop.truncated", "0.0"]
    words += ["--remove_intermediate", "--evaluate.prompts", told["iterate"]["prompts"]]
    words += ["--evaluate.reward_models", *rewards]
    done = run_command("iterate", *words)
    assert done.returncode == 0, done.stderr
    assert "stopped    after iteration 1 of 3" in done.stdout and "(--stop.truncated 0)" in done.stdout
    stop = json.loads((folder / "stop.json").read_text())
    assert stop["iteration"] == 1 and stop["best"] == "start"
    page = (folder / "report.html").read_text()
    assert "A stop rule ended this run after iteration 1 of 3" in page and not (folder / "iteration_2").exists()
    assert not list(folder.glob("iteration_1/*/data")) and (folder / "iteration_1/pairs/provenance.json").exists()
    again = run_command("iterate", *words)
    assert again.returncode == 0 and "[1 of" not in again.stdout and "data removed" in again.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_ci_run_killed_eight_times_ends_with_the_same_summary(tmp_path: Path, command_environment) -> None:
    """vLLM, DeepSpeed ZeRO-3 on two processes, the tiny world: SIGKILL to the command's process group at seeded
    random moments, then the same summary.json as of an uninterrupted run, byte for byte."""
    recipe = REPO / "scripts" / "recipes" / "tiny_ci.yaml"
    rng, output = random.Random(3), tmp_path / "output"

    def run(folder: Path, kills: int) -> bytes:
        for _ in range(kills):
            process = start(["--recipe", recipe, "--output", folder], command_environment, output)
            time.sleep(rng.uniform(15, 45))
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process = start(["--recipe", recipe, "--output", folder], command_environment, output)
        assert process.wait() == 0, output.read_text()[-4000:]
        return (folder / "summary.json").read_bytes()

    assert run(tmp_path / "killed", 8) == run(tmp_path / "whole", 0)
