"""K iterations unattended: generate, rank, filter and train, again and again, each from the policy of the one before.

Runs the stages as processes, from flags or from a recipe (scripts/recipes/): a YAML file of {stage: {flag: value}}, in
which every value can be set on the command line as --STAGE.FLAG. Killed at any moment, the same command goes on.

    python -m rlhf_pipeline.iterate --recipe scripts/recipes/llama3_armo.yaml --check
    python -m rlhf_pipeline.iterate --recipe scripts/recipes/llama3_armo.yaml --train.lr 1e-6
    python -m rlhf_pipeline.iterate --output runs/a --model ./policy --prompts ./prompts.jsonl --iterations 2 \\
        --rank.reward_model ./reward --generate.num_responses 5 --train.batch_size 64
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from rlhf_pipeline.core import children, preflight, storage
from rlhf_pipeline.core.command import (
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    RUN,
    BadUse,
    How,
    RunFlags,
    What,
    WorkFailed,
    entry,
    fields_with_roles,
    parse_known,
)
from rlhf_pipeline.core.files import read_json, write_atomic, write_json
from rlhf_pipeline.core.iteration import estimates, plan_table, recipes, slurm, stages, stopping
from rlhf_pipeline.core.iteration.checks import Checker
from rlhf_pipeline.core.iteration.recipes import Flags, Recipe
from rlhf_pipeline.core.iteration.stages import Run, Stage
from rlhf_pipeline.core.iteration.stopping import Rules, Stop
from rlhf_pipeline.core.iteration.survey import (
    DATA,
    Look,
    folder_of,
    known_rows,
    names_in,
    resolved,
    state_on_disk,
    survey,
)
from rlhf_pipeline.core.progress import duration, say
from rlhf_pipeline.core.reporting import verdict
from rlhf_pipeline.core.reporting.evaluation import RESULTS
from rlhf_pipeline.core.reporting.run_folder import RECIPE, STOP, TIMINGS

LOGS = "logs"
THIS_TIME = ("recipe", "from_stage", "to_stage", "slurm", "slurm_shards", "overrides")
"""Fields that belong to one start of a run, not into its recipe; those of `run` are others."""


@dataclass(frozen=True)
class Config:
    recipe: How[str | None] = None
    """YAML file with what follows, in its section iterate, and with the stages' flags. See docs/iterate.md."""
    output: What[str | None] = None
    """Folder of the run. None: runs/NAME, with the recipe's file name."""
    model: What[str] = "meta-llama/Meta-Llama-3-8B-Instruct"
    """The policy that iteration 1 starts from: a local folder or a Hub id."""
    prompts: What[str] = "allenai/ultrafeedback_binarized_cleaned_train"
    """Prompts to train on: what generate --prompts takes."""
    iterations: What[int] = 3
    """Rounds of generate, rank, filter and train."""
    shard_prompts: What[bool] = False
    """Cut the prompts into as many disjoint shards as there are iterations. Otherwise each takes them all."""
    repo: What[str | None] = None
    """OWNER/NAME: data and policies go to the Hub, as OWNER/NAME-iter1-responses and so on. None: local folders."""

    stop: Rules = Rules()
    """Rules by which to end before the last iteration, judged on evaluate's prompts after each."""
    remove_intermediate: How[bool] = False
    """Once an iteration's policy is there, remove its responses, rewards and pairs, but for their provenance."""

    vllm_python: How[str] = sys.executable
    """Interpreter that runs generate."""
    train_python: How[str] = sys.executable
    """Interpreter that runs everything else."""
    from_stage: Annotated[How[str | None], tyro.conf.arg(name="from")] = None
    """First stage to run: rank, say, or iteration_2/rank. None: the first of all."""
    to_stage: Annotated[How[str | None], tyro.conf.arg(name="to")] = None
    """Last stage to run. None: the last of all."""
    slurm: How[bool] = False
    """Print the stages that are left as a shell script that submits them as jobs, each after those that it needs."""
    slurm_shards: How[int] = 1
    """With --slurm: generate and rank as arrays of so many jobs, which together write one output."""
    overrides: Annotated[How[tuple[str, ...]], tyro.conf.Suppress] = ()
    """The words --STAGE.FLAG VALUE of the command line."""
    run: RUN = RunFlags()

    @classmethod
    def from_words(cls, words: list[str]) -> Config:
        """Flags win over the recipe's section iterate, which wins over the defaults. Raises BadUse."""
        config, others = parse_known(cls, words)
        if config.recipe is not None:
            section = recipes.read(Path(config.recipe)).iterate
            config, others = parse_known(cls, words, default=from_section(section, config.recipe))
        return dataclasses.replace(config, overrides=tuple(others))


def from_section(section: Flags, path: str) -> Config:
    """The Config that a recipe's section iterate stands for. Raises BadUse for what iterate doesn't have."""
    allowed = {name for name, _ in fields_of_run(Config())}
    for name in section:
        if name not in allowed:
            expected = ", ".join(sorted(allowed))
            raise BadUse(f"--recipe {path}: iterate has no {name} in a recipe; expected some of {expected}.")
    return parse_known(Config, recipes.words_of(section))[0]


def fields_of_run(config: Config) -> list[tuple[str, Any]]:
    """(name, value) of what a recipe's section iterate may say."""
    fields = ((name, value) for name, _, value in fields_with_roles(config))
    return [(name, value) for name, value in fields if name not in THIS_TIME and not name.startswith("run.")]


# What is to be done


def check_values(config: Config, told: Recipe) -> None:
    """Raise BadUse for values that can't be meant, before anything is read."""
    if config.iterations < 1:
        raise BadUse(f"--iterations is {config.iterations}; expected 1 or more.")
    if config.slurm_shards < 1 or (config.slurm_shards > 1 and not config.slurm):
        raise BadUse(f"--slurm_shards is {config.slurm_shards}; expected 1 or more, and it goes with --slurm.")
    stopping.check_values(config.stop)
    if config.repo is not None and config.repo.count("/") != 1:
        raise BadUse(f"--repo {config.repo} is not of the form OWNER/NAME.")
    if not config.stop.are_set:
        return
    if "evaluate" not in told.stages:
        raise BadUse("a --stop rule needs held-out prompts: pass --evaluate.prompts and --evaluate.reward_models.")
    if config.stop.kl is not None and "no_kl" in told.stages["evaluate"]:
        raise BadUse("--stop.kl needs the KL that --evaluate.no_kl leaves out: drop one of them.")
    judges = [str(item).partition("=") for item in stages.as_list(told.stages["evaluate"].get("reward_models"))]
    if config.stop.reward is not None and all(separator for _, separator, _ in judges):
        stopping.judge_of(config.stop, [name for name, _, _ in judges])


def choose_folder(config: Config) -> str:
    """The run's folder as it is written. Raises BadUse for a name that is none."""
    text = config.output
    if text is None and config.recipe is not None:
        text = f"{storage.RUNS}/{Path(config.recipe).stem}"
    if text is None:
        raise BadUse("--output is missing: name the run's folder, such as runs/NAME.")
    ref = storage.parse_ref(text, flag="--output", output=True)
    if ref.path is None:
        raise BadUse(f"--output {text} is not a local folder, and a run is one: ./NAME. The Hub is --repo.")
    preflight.check_writable(ref.path, flag="--output")
    return text.rstrip("/") if not text.startswith("~") else str(ref.path)


def read_recipe(config: Config) -> Recipe:
    """The recipe with the command line's words, $run as it stands. Raises BadUse."""
    told = recipes.read(Path(config.recipe)) if config.recipe is not None else Recipe()
    return recipes.override(told, config.overrides)


def make_plan(config: Config, told: Recipe, folder: str) -> tuple[Recipe, Run]:
    """The recipe and the decisions that the stages follow from."""
    told = recipes.in_folder(told, folder)
    run = Run(
        folder=folder,
        model=config.model.replace(recipes.RUN, folder),
        prompts=config.prompts.replace(recipes.RUN, folder),
        iterations=config.iterations,
        repo=config.repo,
        evaluate_each=config.stop.are_set,
        vllm_python=config.vllm_python,
        train_python=config.train_python,
    )
    if not config.shard_prompts:
        return told, run
    every = stages.plan(told, run)
    rows = estimates.all_rows(every, known_rows(every, every))
    return told, dataclasses.replace(run, shards=config.iterations, num_prompts=rows[stages.place(run.prompts)])


def take_stock(config: Config, told: Recipe, run: Run) -> list[Look]:
    """Every stage that this start is about, checked. Raises BadUse for the first that can't run as it is told to."""
    every = stages.plan(told, run)
    part = stages.part(every, config.from_stage, config.to_stage)
    with Checker() as checker:
        return list(survey(every, part, checker, overwrite=config.run.overwrite))


def until_stop(config: Config, looks: list[Look]) -> list[Look]:
    """The stages up to the first evaluation after which a rule fires, and the report; all of them if none does."""
    for position, look in enumerate(looks):
        evaluated = look.stage.command == "evaluate" and look.stage.iteration and look.finished
        if evaluated and stop_of(config, look.stage) is not None:
            reports = [other.stage for other in looks[position:] if other.stage.command == "report"]
            return [*looks[: position + 1], *(Look(stage, state_on_disk(stage)) for stage in reports)]
    return looks


def stop_of(config: Config, evaluation: Stage) -> Stop | None:
    """The first rule that fires on what a finished evaluation measured."""
    rows, judge = measured(config, evaluation)
    return stopping.first_stop(config.stop, rows, judge)


def measured(config: Config, evaluation: Stage) -> tuple[list[dict[str, Any]], str]:
    """(the policies' numbers in order, the reward model that judges) of a finished evaluation."""
    summary = verdict.summarize(read_json(Path(evaluation.output, RESULTS)))
    rows = {row["name"]: row for row in summary["policies"]}
    judge = stopping.judge_of(config.stop, summary["reward_models"])
    return [rows[name] for name in names_in(evaluation, "policies")], judge


def print_plan(looks: Sequence[Look], run: Run) -> None:
    seconds = read_json(Path(run.folder, TIMINGS)) or {}
    left = sum(not look.finished for look in looks)
    stages_left = f"{left} of {len(looks)} stages are left" if left else f"all {len(looks)} stages are done"
    say(f"run        {run.folder}: {run.iterations} iterations from {run.model}")
    say(f"prompts    {run.prompts}, {'all of them each time' if run.shards is None else f'in {run.shards} shards'}")
    say(f"stages     {stages_left}\n")
    for line in plan_table.lines(looks, run.folder, run.model, seconds):
        say(line)
    say("\n" + plan_table.disk(looks, run.folder, run.model))


def print_jobs(config: Config, told: Recipe, run: Run) -> None:
    """The stages that are left as a script that submits them. Raises BadUse for what only iterate itself can do."""
    if config.stop.are_set or config.remove_intermediate:
        raise BadUse(
            "--slurm submits all jobs before any has run, so nobody would look at --stop rules or remove data: drop "
            "those flags, or submit iterate itself with scripts/slurm/iterate.sbatch."
        )
    looks = take_stock(config, told, run)
    left = [look.stage for look in looks if not look.finished]
    more = ["--overwrite"] if config.run.overwrite else []
    for line in slurm.script(left, run.folder, *more, shards=config.slurm_shards):
        say(line)


# Work


def note_recipe(config: Config, told: Recipe, folder: str) -> None:
    """Keep what this run is told in its folder, as a recipe that repeats it; say what is new since the last start."""
    defaults = dict(fields_of_run(Config()))
    section = {name: value for name, value in fields_of_run(config) if value != defaults[name]}
    data = recipes.as_data(dataclasses.replace(told, iterate={**section, "output": folder}))
    path = Path(folder, RECIPE)
    if path.exists():
        for line in storage.differences(recipes.load(path), data):
            say(f"changed    {line}")
    write_atomic(path, recipes.to_yaml(data))


def work(config: Config, run: Run, looks: list[Look]) -> list[Look]:
    """Run what is left, in order, until all is done or a rule fires. Returns the stages that are done."""
    started, position = time.monotonic(), 0
    while position < len(looks):
        look = looks[position]
        if look.stage.command == "report":
            note_stop(config, run, looks)
        if not look.finished:
            say(f"\n[{position + 1} of {len(looks)}] {look.stage.name}, {duration(time.monotonic() - started)} so far")
            run_stage(config, resolved(look.stage), run.folder)
            looks[position] = dataclasses.replace(look, state="done")
        if config.remove_intermediate and look.stage.command == "train" and look.stage.iteration:
            remove_data(run, look.stage.iteration)
        looks = until_stop(config, looks)
        position += 1
    return looks


def run_stage(config: Config, stage: Stage, folder: str) -> None:
    """One stage to its end. Raises WorkFailed if it failed, SystemExit if we were asked to end."""
    words = stages.command_line(stage, *(["--overwrite"] if config.run.overwrite else []))
    command = plan_table.pasted(words)
    say(f"$ {command}")
    log = Path(folder, LOGS, f"{stage.name.replace('/', '-')}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {command}\n")
    timings = Path(folder, TIMINGS)
    seconds = read_json(timings) or {}
    earlier = seconds.get(stage.name, 0.0)

    def note(elapsed: float) -> None:
        write_json(timings, {**seconds, stage.name: round(earlier + elapsed, 1)})

    note(0.0)
    ended = children.run(words, log=log, environment={"RLHF_PIPELINE_PARENT": "1"}, on_beat=note)
    note(ended.seconds)
    if ended.asked is not None:
        say("ended as asked: run the same command again to go on from here")
        raise SystemExit(EXIT_INTERRUPTED if ended.asked == signal.SIGINT else EXIT_TERMINATED)
    if ended.code != 0:
        raise WorkFailed(
            f"{stage.name} {how_it_ended(ended.code)} after {duration(ended.seconds)}. Its command stands above, what "
            f"it said also in {log}. When the cause is gone, the same iterate command goes on from here."
        )


def how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    hint = " (was the memory full?)" if code == -signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-code).name}{hint}"


def remove_data(run: Run, t: int) -> None:
    """Remove the rows of iteration t's responses, rewards and pairs; what they were stays in card and provenance."""
    for kind in ("responses", "rewards", "pairs"):
        folder = folder_of(stages.data_of(run, t, kind))
        if (folder / DATA).exists():
            (folder / DATA).rename(folder / f".{DATA}")  # in one step, so that half of it is never read
        shutil.rmtree(folder / f".{DATA}", ignore_errors=True)


def note_stop(config: Config, run: Run, looks: Sequence[Look]) -> None:
    """Keep in the run's folder which rule fired, before the report reads it."""
    evaluations = [look.stage for look in looks if look.stage.command == "evaluate"]
    if not evaluations:  # --from report: it stands as it is
        return
    path = Path(run.folder, STOP)
    path.unlink(missing_ok=True)
    (rows, judge), stop = measured(config, evaluations[-1]), stop_of(config, evaluations[-1])
    if stop is not None:
        best = rows[stopping.best(rows, judge, stop)]["name"]
        stopped = {"iteration": stop.iteration, "of": config.iterations, "reasons": stop.reasons, "best": best}
        write_json(path, stopped)


def conclude(config: Config, run: Run, looks: Sequence[Look]) -> None:
    """Say which rule fired, which policy is best and where the report is."""
    evaluations = [look.stage for look in looks if look.stage.command == "evaluate"]
    if evaluations:
        (rows, judge), stop = measured(config, evaluations[-1]), stop_of(config, evaluations[-1])
        t = stopping.best(rows, judge, stop)
        if stop is not None:
            say(f"stopped    after iteration {stop.iteration} of {config.iterations}: {'; '.join(stop.reasons)}")
        say(f"best       {rows[t]['name']} by {judge} with {rows[t][judge]['mean']:.3g}: {stages.policy_of(run, t)}")
    report = Path(run.folder, stages.REPORT)
    say(f"done: {report if report.exists() else run.folder}")


def main(config: Config) -> Path:
    text, told = choose_folder(config), read_recipe(config)
    check_values(config, told)
    filled, run = make_plan(config, told, text)
    folder = Path(text)
    if config.slurm:
        print_jobs(config, filled, run)
        return folder
    with contextlib.nullcontext() if config.run.check else storage.run_lock(folder):
        looks = until_stop(config, take_stock(config, filled, run))
        print_plan(looks, run)
        if not config.run.check:
            note_recipe(config, told, text)
            conclude(config, run, work(config, run, looks))
    return folder


if __name__ == "__main__":
    entry(main, Config)
