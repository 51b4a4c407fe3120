"""Writers of storage as processes that are killed before the k-th thing they do to the file system."""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

KILLED = 137
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.move"}
"""Audit events of Python's that announce a change; beside them `open` for writing."""
IDENTITY = {"command": "rank", "what": {"seed": 1}}
OTHER = {"command": "rank", "what": {"seed": 2}}
CARD = "---\nconfigs: []\n---\n# card\n"


def each_kill(
    work: Callable[[Path], None], folder: Path, prepare: Callable[[Path], None] | None = None
) -> Iterator[int]:
    """Yields k after `work(folder / "k")` was killed before its k-th change under that folder, until it is not."""
    (folder / "warm").mkdir()
    if prepare is not None:
        prepare(folder / "warm")
    work(folder / "warm")  # what is imported on the way is imported in this process, once for all forks
    step = 0
    while True:
        here = folder / str(step)
        here.mkdir()
        if prepare is not None:
            prepare(here)
        code = in_process(work, here, kill_at=step)
        assert code in (0, KILLED), f"the writer ended with {code} where it was to be killed at step {step}"
        yield step
        shutil.rmtree(here)
        if code == 0:
            return
        step += 1


def in_process(work: Callable[[Path], None], folder: Path, *, kill_at: int | None = None) -> int:
    """The exit code of a process that does `work`. A fork: a new interpreter for each step would take minutes."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            if kill_at is not None:
                sys.addaudithook(_killer(str(folder), kill_at))
            work(folder)
            code = 0
        except BaseException:  # noqa: BLE001 (a fork must not go on as pytest)
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _killer(folder: str, kill_at: int) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that ends this process before its kill_at-th change under `folder`."""
    steps = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal steps
        if _changes(event, arguments, folder):
            if steps == kill_at:
                os._exit(KILLED)
            steps += 1

    return watch


def _changes(event: str, arguments: tuple[Any, ...], folder: str) -> bool:
    if event == "open":
        path, _, flags = arguments
        return str(path).startswith(folder) and bool(flags & (os.O_WRONLY | os.O_RDWR))
    return event in CHANGES and str(arguments[0]).startswith(folder)


# The writers


def write_output(folder: Path, identity: dict[str, Any] = IDENTITY, first: int = 0, *, overwrite: bool = False) -> None:
    """Three shards of two rows, with what a stage notes and settles; rows count from `first`."""
    import pyarrow as pa

    from rlhf_pipeline.core import storage
    from rlhf_pipeline.core.storage.references import Ref

    with storage.open_output(folder / "out", identity, overwrite=overwrite) as output:
        if output.done:
            return
        output.expect("train", 3)
        output.note({"engine": "x"})
        for shard in range(3):
            if not output.has_shard("train", shard):
                rows = [first + 2 * shard, first + 2 * shard + 1]
                output.write_shard("train", shard, pa.table({"n": rows}))
        storage.finish(
            output,
            Ref("out", path=folder / "out"),
            lambda files: ({"notes": output.notes()}, CARD),
            overwrite=overwrite,
        )


def overwrite_output(folder: Path) -> None:
    write_output(folder, OTHER, 100, overwrite=True)


def share_output(folder: Path) -> None:
    """Both of two jobs, one after the other."""
    import pyarrow as pa

    from rlhf_pipeline.core import storage
    from rlhf_pipeline.core.storage.references import Ref

    for index in (1, 0):
        share = storage.Share(index, 2)
        with storage.open_output(folder / "out", IDENTITY, overwrite=False, share=share) as output:
            if output.done:
                return
            output.expect("train", 3)
            output.note({"engine": "x"})
            for shard in share.of(range(3)):
                if not output.has_shard("train", shard):
                    output.write_shard("train", shard, pa.table({"n": [2 * shard, 2 * shard + 1]}))
            storage.finish(
                output,
                Ref("out", path=folder / "out"),
                lambda files: ({"notes": output.notes()}, CARD),
                overwrite=False,
            )


def write_half_a_shard(folder: Path) -> None:
    """write_output, killed in the middle of the second parquet file."""
    import pyarrow.parquet as pq

    whole, written = pq.write_table, []

    def half(table: Any, path: Path, **options: Any) -> None:
        whole(table, path, **options)
        written.append(path)
        if len(written) == 2:
            os.truncate(path, path.stat().st_size // 2)
            os._exit(KILLED)

    pq.write_table = half
    write_output(folder)


def write_responses_with_little_room(folder: Path, room: int) -> None:
    """write_responses where no file may have more than `room` bytes; what it says then is in `said`."""
    import resource

    from rlhf_pipeline.core.command import WorkFailed

    without = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, without[1]))
    try:
        write_responses(folder)
    except WorkFailed as failure:
        resource.setrlimit(resource.RLIMIT_FSIZE, without)
        (folder / "said").write_text(str(failure))


def write_responses(folder: Path) -> None:
    """Three prompts x 2 responses in shards of 2 prompts; the keys that were sampled are lines of `sampled`."""
    from rlhf_pipeline.core import storage
    from rlhf_pipeline.core.generation.prompts import Prompt
    from rlhf_pipeline.core.generation.responses import Responses
    from rlhf_pipeline.core.generation.sampling import Sample
    from rlhf_pipeline.core.storage.references import Ref

    prompts = [Prompt(i, f"p{i}", f"Say {i}.", None, array("i", [1, i])) for i in range(3)]
    with storage.open_output(folder / "out", IDENTITY, overwrite=False) as output:
        if output.done:
            return
        responses = Responses(output, prompts, num_responses=2, seed=0, rows_per_shard=2, token_logps=False)
        for request in responses.requests():
            with (folder / "sampled").open("a") as file:
                file.write(f"{request.key}\n")
            responses.add(Sample(request.key, [request.key], f"{request.key}", "stop"))
        storage.finish(output, Ref("out", path=folder / "out"), lambda files: ({}, CARD), overwrite=False)


def fill_run_folder(folder: Path) -> None:
    """A folder that a command fills in place, as train does."""
    from rlhf_pipeline.core import storage
    from rlhf_pipeline.core.files import write_atomic

    with storage.run_lock(folder / "out"):
        if storage.run_state(folder / "out", IDENTITY, overwrite=False) == "done":
            return
        storage.start_run(folder / "out", IDENTITY, overwrite=False)
        write_atomic(folder / "out" / "weights", "w")
        storage.finish_run(folder / "out", IDENTITY, {"rows_out": 1}, CARD)


def put_responses(folder: Path) -> None:
    """Forty prompts with two responses each, and a reward program."""
    rows = [{"prompt": f"Say {n}.", "response_0": f"{n}", "response_1": f"{n} " * 2} for n in range(40)]
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "judge.py").write_text("def length(rows):\n    return [float(len(row['response'])) for row in rows]\n")


def rank_rewards(folder: Path) -> None:
    from rlhf_pipeline import rank

    model = (f"{folder}/judge.py:length",)
    rank.main(
        rank.Config(
            input_repo=f"{folder}/in.jsonl", output_repo=(f"{folder}/out",), reward_model=model, num_responses=2
        )
    )
