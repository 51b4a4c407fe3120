"""See it: a run folder -> one page, report.html, that opens from disk; its numbers, summary.json; the table, here.

Reads the files of the run and nothing else. Every part is optional: a run that is not evaluated gets what there is.

    python -m rlhf_pipeline.report runs/tiny
    python -m rlhf_pipeline.report runs/rebel_seed1 runs/rebel_seed2 runs/dpo_seed1 --output runs/losses.html
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from rlhf_pipeline.core import preflight
from rlhf_pipeline.core.command import RUN, BadUse, How, RunFlags, What, entry
from rlhf_pipeline.core.files import write_atomic, write_json
from rlhf_pipeline.core.progress import say
from rlhf_pipeline.core.reporting import page, page_runs, verdict
from rlhf_pipeline.core.reporting.run_folder import Run, read_run
from rlhf_pipeline.core.reporting.tables import print_policies

REPORT = "report.html"
SUMMARY = "summary.json"


@dataclass(frozen=True)
class Config:
    runs: Annotated[What[tuple[str, ...]], tyro.conf.Positional]
    """Run folders. One gets its page and its summary.json; several get one page together."""
    output: What[str | None] = None
    """Where to write the page. None: report.html in the run folder, or beside the first of several."""
    json: How[bool] = False
    """Print the summary as JSON instead of the table; several runs: {run: summary}."""
    run: RUN = RunFlags()


def check_runs(runs: list[Run], summaries: list[dict[str, Any] | None]) -> None:
    """Raise BadUse for several runs that can't stand in one page."""
    for run, summary in zip(runs, summaries, strict=True):
        if summary is None:
            raise BadUse(f"{run.folder} is not evaluated, so it can't be compared: run rlhf_pipeline.evaluate for it.")
    names = [run.name for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise BadUse(f"two of the runs are called {twice}: rename one of the folders.")
    if not page_runs.shared_models([summary for summary in summaries if summary is not None]):
        raise BadUse(f"no reward model judged all of {', '.join(names)}: evaluate them by the same one.")


def choose_output(config: Config, runs: list[Run]) -> Path:
    first = runs[0].folder
    default = first / REPORT if len(runs) == 1 else first.parent / REPORT
    path = Path(config.output).expanduser() if config.output is not None else default
    if path.is_dir():
        raise BadUse(f"--output {path} is a folder; name a file, for example {path / REPORT}.")
    preflight.check_writable(path.parent, flag="--output")
    return path


def show(config: Config, runs: list[Run], summaries: list[dict[str, Any] | None]) -> None:
    """The tables on the console, or all as JSON."""
    if config.json:
        every = {run.name: summary for run, summary in zip(runs, summaries, strict=True)}
        print(json.dumps(summaries[0] if len(runs) == 1 else every, indent=2, ensure_ascii=False))
        return
    for run, summary in zip(runs, summaries, strict=True):
        say(f"\n{run.name}")
        if summary is None:
            say("not evaluated yet")
        else:
            print_policies(summary)
        for sentence in run.early_end:
            say(sentence)


def main(config: Config) -> Path:
    if not config.runs:
        raise BadUse("no run folder given; expected one or more, for example runs/tiny.")
    runs = [read_run(text) for text in config.runs]
    summaries = [None if run.results is None else verdict.summarize(run.results) for run in runs]
    if len(runs) > 1:
        check_runs(runs, summaries)
    output = choose_output(config, runs)
    if config.run.check:
        for run in runs:
            evaluated = "evaluated" if run.results else "not evaluated"
            say(f"run        {run.folder}: {len(run.stages)} outputs, {evaluated}")
        say(f"output     {output}")
        return output
    if len(runs) == 1:
        text = page.render_run(runs[0], summaries[0])
        if summaries[0] is not None:
            write_json(runs[0].folder / SUMMARY, summaries[0])
    else:
        text = page_runs.render_runs(runs, [summary for summary in summaries if summary is not None])
    write_atomic(output, text)
    show(config, runs, summaries)
    if not config.json:
        say(f"\n{output}")
    return output


if __name__ == "__main__":
    entry(main, Config)
