"""How much a stage of a run will read, write and take, as far as it can be known before it has run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlhf_pipeline.core.iteration.recipes import Flags
from rlhf_pipeline.core.iteration.stages import DATA_FLAG, WORLD, Stage, number, place, whole

NUM_RESPONSES, MAXLEN, MAXLEN_PROMPT, TEST_SIZE = 5, 2048, 1024, 1000
"""The stages' own defaults."""


def rows_read(stage: Stage, rows: Mapping[str, int]) -> int | None:
    """Rows of a stage's data, if `rows`, {place: rows}, knows."""
    data = stage.flags.get(DATA_FLAG.get(stage.command, ""))
    return rows.get(place(data)) if isinstance(data, str) else None


def rows_written(stage: Stage, rows: Mapping[str, int]) -> dict[str, int]:
    """{reference: rows at most} of what a stage writes; models count 0, and what isn't known isn't there."""
    if stage.command == "tiny":
        sizes = WORLD.get(str(stage.flags.get("size", "demo")), WORLD["demo"])
        return {f"{stage.output}/{name}": count for name, count in sizes.items()}
    if stage.command in ("sft", "reward", "train"):
        return {stage.output: 0}
    read = rows_read(stage, rows)
    if read is None or stage.command not in ("generate", "rank", "filter"):
        return {}
    count = {"generate": prompts_taken, "rank": lambda flags, n: n, "filter": pairs_made}[stage.command]
    return {stage.output: count(stage.flags, read)}


def prompts_taken(flags: Flags, rows: int) -> int:
    start = whole(flags.get("start_idx", 0), "--start_idx")
    end = whole(flags.get("end_idx", -1), "--end_idx")
    most = flags.get("num_prompts")
    taken = max(0, (rows if end == -1 else min(end, rows)) - start)
    return taken if most is None else min(taken, whole(most, "--num_prompts"))


def pairs_made(flags: Flags, rows: int) -> int:
    """Pairs to train on, if no prompt is dropped."""
    held_out = number(flags.get("test_size", TEST_SIZE), "--test_size")
    prompts = rows - (max(1, round(held_out * rows)) if held_out < 1 else int(held_out))
    responses = whole(flags.get("num_responses", NUM_RESPONSES), "--num_responses")
    pairs = responses * (responses - 1) // 2 if flags.get("select") == "all_pairs" else 1
    return max(0, prompts * pairs)


def tokens_written(stage: Stage, rows: int) -> int | None:
    """Tokens of the responses that generate samples for `rows` prompts, at most."""
    if stage.command != "generate":
        return None
    responses = whole(stage.flags.get("num_responses", NUM_RESPONSES), "--num_responses")
    return rows * responses * whole(stage.flags.get("maxlen", MAXLEN), "--maxlen")


def bytes_written(stage: Stage, rows: int) -> int | None:
    """Bytes on disk of what generate, rank or filter writes for `rows` rows of output, at most."""
    if stage.command == "filter":
        prompt = whole(stage.flags.get("maxlen_prompt", MAXLEN_PROMPT), "--maxlen_prompt")
        return rows * 4 * (prompt + 2 * whole(stage.flags.get("maxlen", MAXLEN), "--maxlen"))
    tokens = tokens_written(stage, rows)
    return None if tokens is None else 4 * tokens  # text and ids, compressed


def all_rows(stages: Sequence[Stage], rows: Mapping[str, int]) -> dict[str, int]:
    """{place: rows at most} of everything that `stages` read and write; `rows`: of what they only read."""
    known = dict(rows)
    for stage in stages:
        known |= {place(ref): count for ref, count in rows_written(stage, known).items()}
    return known
