"""A run's stages as SLURM jobs: a shell script that submits each after those whose output it needs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence

from rlhf_pipeline.core.iteration import plan_table
from rlhf_pipeline.core.iteration.stages import Stage, command_line, place

SCRIPTS = {
    "tiny": "cpu",
    "filter": "cpu",
    "report": "cpu",
    "generate": "generate",
    "rank": "rank",
    "train": "train",
    "sft": "train",
    "reward": "train",
    "evaluate": "evaluate",
}
"""{command: its script in scripts/slurm/}, where nodes, GPUs and hours stand."""


SHARED = ("generate", "rank")
"""Commands of which several jobs can write one output."""


def script(stages: Sequence[Stage], folder: str, *more: str, shards: int = 1) -> list[str]:
    """Lines of bash. `more`: words for every stage's command. A job that fails holds back those that need it.

    shards: jobs of the array that does each generate and each rank.
    """
    lines = [
        "#!/usr/bin/env bash",
        f"# {folder}: {len(stages)} jobs. Printed, not submitted: pipe this into bash, or keep it and edit it.",
        "set -euo pipefail",
        f"mkdir -p {shlex.quote(f'{folder}/logs')}",
    ]
    jobs: dict[str, str] = {}
    for stage in stages:
        lines += ["", submission(stage, folder, needed(stage, jobs), *more, shards=shards)]
        jobs |= {place(ref): variable(stage) for ref in stage.writes}
    return lines


def needed(stage: Stage, jobs: dict[str, str]) -> list[str]:
    """The variables that hold the ids of the jobs whose output a stage reads."""
    return list(dict.fromkeys(jobs[place(ref)] for ref in stage.inputs if place(ref) in jobs))


def submission(stage: Stage, folder: str, after: Iterable[str], *more: str, shards: int = 1) -> str:
    """The line that submits a stage, as an array if it is to be shared, and keeps its job's id in a variable."""
    ids = ":".join(f"${name}" for name in after)
    shared = stage.command in SHARED and shards > 1
    options = [
        "--parsable",
        f"--job-name={stage.name}",
        f"--output={folder}/logs/{stage.name.replace('/', '-')}-{'%A_%a' if shared else '%j'}.log",
    ]
    if shared:
        options.append(f"--array=0-{shards - 1}")
        more = (*more, "--num_shards", str(shards))
    words = [*map(shlex.quote, options)]
    if ids:
        words.append(f"--dependency=afterok:{ids}")
    if stage.eta_from:
        words.append(f"--export=ALL,ETA_FROM={shlex.quote(stage.eta_from)}")
    words.append(f"scripts/slurm/{SCRIPTS[stage.command]}.sbatch")
    return f"{variable(stage)}=$(sbatch {' '.join(words)} \\\n    {plan_table.pasted(command_line(stage, *more))})"


def variable(stage: Stage) -> str:
    return re.sub(r"\W", "_", stage.name)
