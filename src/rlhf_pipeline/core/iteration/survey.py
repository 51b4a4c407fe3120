"""What is done of a run and what is left: every stage's own --check, in order, before anything starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf_pipeline.core import hub, preflight, storage
from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.files import read_json
from rlhf_pipeline.core.iteration import estimates
from rlhf_pipeline.core.iteration.checks import Checked, Checker
from rlhf_pipeline.core.iteration.recipes import words_of
from rlhf_pipeline.core.iteration.stages import (
    DATA_FLAG,
    Stage,
    as_list,
    following,
    place,
    whole,
    with_eta,
)
from rlhf_pipeline.core.reporting.evaluation import RESULTS
from rlhf_pipeline.core.reporting.names import named

State = Literal["done", "data removed", "changed", "partial", "to be looked at", "to do"]
"""changed: done or begun with other settings, and to be done again. to be looked at: there, but what it was made from
is still to come."""
FINISHED = ("done", "data removed")
ROWS_KNOWN = ("tiny", "generate", "rank", "filter")
"""Commands that write datasets, whose provenance counts their rows."""
DATA = "data"


@dataclass(frozen=True)
class Look:
    stage: Stage
    state: State
    rows: int | None = None
    """Of what it writes; at most so many where it has not run."""

    @property
    def finished(self) -> bool:
        return self.state in FINISHED


# One stage


def folder_of(ref: str) -> Path:
    """Where a stage's output lies on this disk; a Hub output also does."""
    return storage.parse_ref(ref, flag="--output", output=True).folder


def state_on_disk(stage: Stage) -> State:
    """What is there of a stage's output, whoever wrote it."""
    if stage.command == "report":
        written, evaluated = Path(stage.output), Path(stage.inputs[0], storage.PROVENANCE)
        return "done" if written.exists() and written.stat().st_mtime >= modified(evaluated) else "to do"
    folders = [folder_of(ref) for ref in stage.writes]
    if all((folder / storage.PROVENANCE).exists() for folder in folders):
        whole = covers(stage) if stage.command == "evaluate" else is_delivered(stage)
        return "done" if whole else "partial"
    begun = any(folder.exists() or storage.partial_folder(folder).exists() for folder in folders)
    return "partial" if begun else "to do"


def modified(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else float("inf")


def covers(stage: Stage) -> bool:
    """Whether an evaluation, which grows with the run, has all of a stage's policies and reward models already."""
    results = read_json(Path(stage.output, RESULTS)) or {"policies": [], "reward_models": []}
    held = {"policies": {item["name"] for item in results["policies"]}, "reward_models": {*results["reward_models"]}}
    return all(held[flag].issuperset(names_in(stage, flag)) for flag in held)


def names_in(stage: Stage, flag: str) -> list[str]:
    """What an evaluation calls its `policies` or `reward_models`, in order."""
    return list(named([str(item) for item in as_list(stage.flags.get(flag))], (), f"--{flag}"))


def is_delivered(stage: Stage) -> bool:
    """Whether what belongs on the Hub is there: started again, a stage repeats a push that failed, and nothing else."""
    repo = storage.parse_ref(stage.output, flag="--output", output=True).repo_id or stage.flags.get("push_to")
    pushed = read_json(folder_of(stage.output) / hub.PUSHED)
    return repo is None or (pushed is not None and pushed["repo_id"] == repo)


def has_no_data(stage: Stage) -> bool:
    """Whether only the card and the provenance of a stage's dataset are left."""
    folder = folder_of(stage.output)
    return (folder / storage.PROVENANCE).exists() and not (folder / DATA).exists()


def closed_iterations(stages: Sequence[Stage]) -> set[int]:
    """The iterations whose policy is there and whose data, or some of them, were removed."""
    trained = {
        stage.iteration
        for stage in stages
        if stage.command == "train" and (folder_of(stage.output) / storage.PROVENANCE).exists()
    }
    datasets = [stage for stage in stages if stage.command in ("generate", "rank", "filter")]
    return {t for stage in datasets if (t := stage.iteration) and t in trained and has_no_data(stage)}


def resolved(stage: Stage) -> Stage:
    """`stage` with iteration 1's eta, if that is known by now."""
    made = read_json(Path(stage.eta_from, storage.PROVENANCE)) if stage.eta_from else None
    return with_eta(stage, made["loss"]["eta"]) if made else stage


def rows_there(stage: Stage) -> dict[str, int]:
    """{reference: rows} of what a finished stage has written, from its provenance."""
    rows = {}
    for ref in stage.writes:
        out = read_json(folder_of(ref) / storage.PROVENANCE)["rows_out"]
        rows[ref] = out["train"] if isinstance(out, dict) else out
    return rows


# Its check


def processes_of(stage: Stage) -> tuple[int, tuple[str, ...]]:
    """(processes of a stage's launch, packages that it needs). Raises BadUse if its config file isn't there."""
    if not stage.launch:
        return 1, ()
    import yaml

    settings: dict[str, Any] = {}
    if "config_file" in stage.launch:
        path = Path(str(stage.launch["config_file"]))
        if not path.is_file():
            raise BadUse(f"{stage.name}: launch.config_file {path} does not exist; accelerate_cfgs/ holds some.")
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    count = whole(stage.launch.get("num_processes", settings.get("num_processes", 1)), "launch.num_processes")
    deepspeed = settings.get("distributed_type") == "DEEPSPEED" or "use_deepspeed" in stage.launch
    return count, ("accelerate", "deepspeed") if deepspeed else ("accelerate",)


def launch_environment(processes: int) -> dict[str, str]:
    """What a launcher would tell its first worker, so that a check sees the launch it is for."""
    if processes == 1:
        return {}
    sizes = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return sizes | {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}


def check(stage: Stage, pending: Mapping[str, int], checker: Checker, *more: str) -> Checked:
    processes, packages = processes_of(stage)
    if processes > 1 and "num_machines" not in stage.launch:
        preflight.check_gpus(processes, memory_share=0.0, flag=f"{stage.name}: launch.num_processes")
    waits = [f"{ref}={pending[place(ref)]}" for ref in dict.fromkeys(stage.inputs) if place(ref) in pending]
    words = [*stage.arguments, *words_of(stage.flags), "--check", *more, *(["--pending", *waits] if waits else [])]
    environment = {**stage.environment, **launch_environment(processes)}
    return checker.check(stage.python, stage.command, words, environment=environment, packages=packages)


def look_at(
    stage: Stage, stages: Sequence[Stage], pending: Mapping[str, int], checker: Checker, *, overwrite: bool
) -> State:
    """Raise BadUse, naming the stage, for what its command refuses, and for another run's output."""
    state = state_on_disk(stage)
    if stage.command == "report":
        return "to do" if place(stage.inputs[0]) in pending else state
    waits = any(place(ref) in pending for ref in stage.inputs)
    answer = check(stage, pending, checker)
    if answer.code == 0:
        return "to be looked at" if waits and state != "to do" else state
    if state != "to do" and not waits and check(stage, pending, checker, "--overwrite").code == 0:
        if overwrite:
            return "changed"
        raise BadUse(describe_change(stage, stages, answer))
    raise BadUse(f"{stage.name}: {answer.error}")


def describe_change(stage: Stage, stages: Sequence[Stage], answer: Checked) -> str:
    stale = [other.name for other in following(stages, stage) if state_on_disk(other) != "to do"]
    also = f" It and what was made from it ({', '.join(stale)}) would be" if stale else " It would be"
    return f"{stage.name}: {answer.error}{also} done again with iterate --overwrite."


# All of them


def known_rows(stages: Sequence[Stage], part: Sequence[Stage]) -> dict[str, int]:
    """{place: rows} of the data that `part` reads and does not write. Raises BadUse for what is not there."""
    rows: dict[str, int] = {}
    for stage in stages:
        if stage not in part and stage.command in ROWS_KNOWN and state_on_disk(stage) == "done":
            rows |= {place(ref): count for ref, count in rows_there(stage).items()}
    written = {place(ref) for stage in stages for ref in stage.writes}
    for stage in part:
        data = stage.flags.get(DATA_FLAG.get(stage.command, ""))
        if stage.command in ("generate", "rank", "filter") and isinstance(data, str) and place(data) not in written:
            split = str(stage.flags.get("split", "train"))
            source = storage.open_source(data, flag=f"{stage.name}: --{DATA_FLAG[stage.command]}", split=split)
            rows[place(data)] = source.num_rows
    return rows


def survey(stages: Sequence[Stage], part: Sequence[Stage], checker: Checker, *, overwrite: bool) -> Iterator[Look]:
    """A look at each stage of `part`, in order. Raises BadUse for the first that can't run as it is told to."""
    rows = known_rows(stages, part)
    pending: dict[str, int] = {}
    closed = closed_iterations(part)
    for planned in part:
        stage = planned if planned.eta_from and place(planned.eta_from) in pending else resolved(planned)
        if stage.iteration in closed and stage.command != "evaluate":
            state: State = "done" if stage.command == "train" else "data removed"
        else:
            state = look_at(stage, stages, pending, checker, overwrite=overwrite)
        there = state in FINISHED and stage.command in ROWS_KNOWN
        written = rows_there(stage) if there else estimates.rows_written(stage, rows)
        rows |= {place(ref): count for ref, count in written.items()}
        if state not in FINISHED:
            pending |= {place(ref): written.get(ref, 0) for ref in stage.writes}
        yield Look(stage, state, written.get(stage.output))
