"""Blocks of prompts become pairs, in one process or several; together the blocks become the splits.

What is done lies in a folder, two files a block, so that a killed run goes on and no table is ever held whole.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_pipeline.core import schema
from rlhf_pipeline.core.chat import Chat
from rlhf_pipeline.core.command import WorkFailed, die_with_launcher
from rlhf_pipeline.core.files import atomic, read_json, write_json
from rlhf_pipeline.core.filtering import pair_tables
from rlhf_pipeline.core.filtering.selection import FAULTS, REASONS, Rules
from rlhf_pipeline.core.progress import bar
from rlhf_pipeline.core.storage import Source

if TYPE_CHECKING:
    import pyarrow as pa

BLOCK_ROWS = 512
"""Prompts that are looked at together, and what a killed process loses at most."""


@dataclass(frozen=True)
class Work:
    """What a block needs beside its rows; `folder` is where its files go."""

    chat: Chat
    rules: Rules
    num_responses: int
    maxlen_prompt: int
    folder: Path

    def pairs_file(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.parquet"

    def tally_file(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.json"

    def is_done(self, index: int) -> bool:
        return self.pairs_file(index).exists() and self.tally_file(index).exists()


def do_block(work: Work, index: int, table: pa.Table, prompt_ids: list[str]) -> int:
    """Write a block's pairs, unpadded, and the tally of what became of its prompts. Returns its rows."""
    import pyarrow.parquet as pq

    block = pair_tables.read_block(
        table, prompt_ids, work.chat, num_responses=work.num_responses, maxlen_prompt=work.maxlen_prompt
    )
    outcomes = pair_tables.judge(block, work.rules, work.maxlen_prompt)
    pairs = pair_tables.make_pairs(block, outcomes, table.column(schema.PROMPT), work.rules)
    tally = pair_tables.tally(block, outcomes, index * BLOCK_ROWS)
    sampled, changed = pair_tables.count_round_trip_changes(block, outcomes, work.chat)
    write_json(work.tally_file(index), {**tally, "sampled_pairs": sampled, "changed_pairs": changed})
    with atomic(work.pairs_file(index)) as temporary:
        pq.write_table(pairs, temporary, compression="lz4")
    return len(table)


def do_blocks(work: Work, source: Source, num_proc: int) -> int:
    """Do every block of `source` that is not there yet. Returns how many blocks there are."""
    count = -(-source.num_rows // BLOCK_ROWS)
    missing = {index for index in range(count) if not work.is_done(index)}
    if not missing:
        return count
    first = min(missing)
    columns = pair_tables.input_columns(source.columns, work.num_responses)
    tables = source.tables(columns, size=BLOCK_ROWS, start=first * BLOCK_ROWS)
    ids = source.prompt_ids()
    blocks = (
        (index, table, ids[index * BLOCK_ROWS : (index + 1) * BLOCK_ROWS])
        for index, table in enumerate(pair_tables.cut(tables, BLOCK_ROWS), first)
        if index in missing
    )
    left = sum(len(ids[index * BLOCK_ROWS : (index + 1) * BLOCK_ROWS]) for index in missing)
    with bar(source.num_rows, "prompts", "filter", done=source.num_rows - left) as advance:
        for rows in _run(work, blocks, num_proc):
            advance(rows)
    return count


def _run(work: Work, blocks: Iterable[tuple[int, pa.Table, list[str]]], num_proc: int) -> Iterator[int]:
    """Yields the rows of each block done: here, or in `num_proc` processes with few blocks in wait at a time."""
    if num_proc == 1:
        for block in blocks:
            yield do_block(work, *block)
        return
    with _workers(work, num_proc) as executor:
        waiting: deque[Future[int]] = deque()
        for block in blocks:
            waiting.append(executor.submit(_do_block_in_worker, *block))
            if len(waiting) > 2 * num_proc:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextlib.contextmanager
def _workers(work: Work, num_proc: int) -> Iterator[Executor]:
    """Forked processes, which have the tokenizer already. An error or a signal drops the blocks in wait."""
    executor = ProcessPoolExecutor(
        num_proc,
        mp_context=multiprocessing.get_context("fork"),
        initializer=_begin_worker,
        initargs=(work,),
    )
    try:
        yield executor
    except BrokenProcessPool:
        raise WorkFailed(
            "a process that tokenizes was killed (memory?): run the same command again, with a lower --num_proc."
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


_work: Work | None = None
"""In a worker process: the work it was forked for."""


def _begin_worker(work: Work) -> None:
    global _work
    _work = work
    os.environ["RLHF_PIPELINE_PARENT"] = "filter"
    die_with_launcher()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _do_block_in_worker(index: int, table: pa.Table, prompt_ids: list[str]) -> int:
    assert _work is not None
    return do_block(_work, index, table, prompt_ids)


# The blocks together


def add_up(work: Work, blocks: int, skipped: Path) -> dict[str, Any]:
    """The tallies of all blocks as one; a line for each dropped prompt goes to the file `skipped`.

    refusal: what the chat says against the first prompt that it can't encode, None without any.
    """
    refusal: str | None = None
    totals: dict[str, Counter[str]] = {"dropped": Counter(), "faults": Counter(), "counts": Counter()}
    with atomic(skipped) as temporary, temporary.open("w", encoding="utf-8") as file:
        for index in range(blocks):
            tally = read_json(work.tally_file(index))
            skips = tally.pop("skipped")
            file.writelines(json.dumps(line) + "\n" for line in skips)
            details = (f"prompt {line['prompt_id']}: {line['detail']}" for line in skips if "detail" in line)
            refusal = refusal or next(details, None)
            for name in ("dropped", "faults"):
                totals[name].update(tally.pop(name))
            totals["counts"].update(tally)
    return {
        **totals["counts"],
        "refusal": refusal,
        "dropped": {reason: totals["dropped"][reason] for reason in REASONS if reason in totals["dropped"]},
        "faults": {fault: totals["faults"][fault] for fault in FAULTS if fault in totals["faults"]},
    }


def split_order(work: Work, blocks: int) -> list[str]:
    """The prompt_ids of all prompts with pairs, in the seeded order by which the test split is drawn."""
    import pyarrow.parquet as pq

    keys: set[tuple[str, str]] = set()
    for index in range(blocks):
        table = pq.read_table(work.pairs_file(index), columns=[pair_tables.SPLIT_KEY, schema.PROMPT_ID])
        keys.update(zip(*(column.to_pylist() for column in table.columns), strict=True))
    return [prompt_id for _, prompt_id in sorted(keys)]


def pairs_of(work: Work, blocks: int, prompt_ids: Iterable[str], *, others: bool = False) -> Iterator[pa.Table]:
    """The pairs of these prompts (with `others`: of all but these), unpadded, in the input's order."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    wanted = pa.array(sorted(prompt_ids), pa.string())
    for index in range(blocks):
        table = pq.read_table(work.pairs_file(index))
        found = pc.is_in(table.column(schema.PROMPT_ID), value_set=wanted)
        yield table.filter(pc.invert(found) if others else found)


def columns_of(work: Work, blocks: int, names: Sequence[str]) -> pa.Table:
    """Some (small) columns of all pairs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pa.concat_tables(pq.read_table(work.pairs_file(index), columns=list(names)) for index in range(blocks))
