"""The size of a real iteration through storage, rank and filter: memory, time and bytes, each in a process of its own.

    python benchmarks/scale.py                  # 60,000 prompts x 5 responses of about 450 tokens
    python benchmarks/scale.py --rows 600       # the same, small

Writes a dataset of responses as generate does (shard by shard), scores it with `rank` and a Python function, and makes
pairs of it with `filter`. The peak is that of the resident memory of a command and all its children, asked for ten
times a second; it has to stay under 2 GB. Responses are sequences of random words of Python's own manual, which
compress little, with the ids that a Llama 3 tokenizer of 16,000 ids gives for their pieces.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO / "src"), str(REPO / "benchmarks")]

if TYPE_CHECKING:
    import psutil
    import pyarrow as pa

ROWS, NUM_RESPONSES = 60_000, 5
ROWS_PER_SHARD = 1000
PIECE_WORDS, MOST_PIECES = 64, 9
"""A response is 1 to MOST_PIECES pieces of so many words: about 450 tokens on average."""
LIMIT = 2_000_000_000
"""Bytes of memory that no command may pass."""
Pieces = list[tuple[str, "array[int]"]]
REWARD = """
def score(rows):
    return [len(set(row["response"].split())) / len(row["response"].split()) for row in rows]
"""


@dataclass(frozen=True)
class Measured:
    """seconds: wall time. peak: bytes of resident memory of the process and its children together."""

    seconds: float
    peak: int


def tokenizer_and_pieces(folder: Path, count: int) -> Pieces:
    """`count` pieces of text with their ids; the tokenizer is saved in `folder`."""
    from pydoc_data.topics import topics

    from rlhf_pipeline.core.world.tiny_llama import build_tokenizer

    corpus = "\n".join(topics.values())
    tokenizer = build_tokenizer([corpus[start : start + 5000] for start in range(0, len(corpus), 5000)], 16_000)
    tokenizer.save_pretrained(folder)
    random, words = Random(0), corpus.split()
    texts = [" ".join(random.choices(words, k=PIECE_WORDS)) + " " for _ in range(count)]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [(text, array("i", tokens)) for text, tokens in zip(texts, ids, strict=True)]


def shards(pieces: Pieces, end_id: int, rows: int) -> Iterator[pa.Table]:
    """What generate writes, shard by shard."""
    import pyarrow as pa

    random = Random(1)
    for start in range(0, rows, ROWS_PER_SHARD):
        numbers = range(start, min(start + ROWS_PER_SHARD, rows))
        columns = {
            "prompt_id": pa.array([f"p{number}" for number in numbers]),
            "prompt": pa.array([f"{number}: {random.choice(pieces)[0]}" for number in numbers]),
        }
        for i in range(NUM_RESPONSES):
            chosen = [random.choices(pieces, k=random.randint(1, MOST_PIECES)) for _ in numbers]
            columns[f"response_{i}"] = pa.array(["".join(text for text, _ in parts) for parts in chosen])
            ids = [[*(token for _, tokens in parts for token in tokens), end_id] for parts in chosen]
            columns[f"response_{i}_tokens"] = pa.array(ids, pa.list_(pa.int32()))
            columns[f"response_{i}_finish_reason"] = pa.array(["stop"] * len(numbers))
        yield pa.table(columns)


def write_responses(folder: Path, rows: int) -> None:
    """The process that stands for generate's writing."""
    from rlhf_pipeline.core import storage
    from rlhf_pipeline.core.chat import Chat

    pieces = tokenizer_and_pieces(folder / "tokenizer", min(20_000, 20 * rows))
    end_id = Chat.load(folder / "tokenizer").end_ids[0]
    with storage.open_output(folder / "responses", {"command": "generate"}, overwrite=False) as output:
        for index, table in enumerate(shards(pieces, end_id, rows)):
            output.write_shard("train", index, table)
        output.publish({"made_by": "benchmarks/scale.py"}, "---\nconfigs: []\n---\n# responses\n")


def measure(name: str, words: list[str], folder: Path) -> Measured:
    """Run a command to its end. Ends this program if it fails."""
    import psutil

    started, peak = time.perf_counter(), 0
    log = folder / f"{name}.log"
    with log.open("w") as file:
        process = psutil.Popen(words, stdout=file, stderr=subprocess.STDOUT, cwd=folder, env=environment())
        while process.poll() is None:
            peak = max(peak, resident(process))
            time.sleep(0.1)
    if process.returncode != 0:
        sys.exit(f"{name} ended with {process.returncode}:\n{log.read_text()[-2000:]}")
    return Measured(time.perf_counter() - started, peak)


def resident(process: psutil.Popen) -> int:
    """Bytes of memory of a process and its children; those that have just ended count 0."""
    import psutil

    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        for each in [process, *process.children(recursive=True)]:
            total += each.memory_info().rss
    return total


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPO / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rows", type=int, default=ROWS)
    arguments.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.write is not None:
        write_responses(given.write, given.rows)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "judge.py").write_text(REWARD)
        stage = [sys.executable, "-m"]
        rank = ["--input_repo", "./responses", "--output_repo", "./rewards", "--reward_model", "./judge.py:score"]
        pairs = ["--input_repo", "./rewards", "--output_repo", "./pairs", "--model", "./tokenizer"]
        commands = {
            "responses": [sys.executable, __file__, "--write", temporary, "--rows", str(given.rows)],
            "rewards": [*stage, "rlhf_pipeline.rank", *rank],
            "pairs": [*stage, "rlhf_pipeline.filter", *pairs, "--test_size", "0.05"],
        }
        found = {name: measure(name, words, folder) for name, words in commands.items()}
        report(found, folder, given.rows)
    if any(each.peak > LIMIT for each in found.values()):
        sys.exit(f"a command took more than {LIMIT:,} bytes of memory")


def report(found: dict[str, Measured], folder: Path, rows: int) -> None:
    from rlhf_pipeline.core import storage
    from rlhf_pipeline.core.provenance import versions

    some = next(storage.open_source(str(folder / "responses"), flag="--x").batches(size=min(rows, 1000)))
    tokens = sum(len(row[f"response_{i}_tokens"]) for row in some for i in range(NUM_RESPONSES))
    average = tokens / len(some) / NUM_RESPONSES
    print(f"{rows:,} prompts x {NUM_RESPONSES} responses of {average:.0f} tokens on average")
    print(f"{'':22} {'seconds':>8} {'prompts/s':>10} {'peak memory':>12} {'written':>9}")
    names = {"responses": "storage: responses", "rewards": "rank, Python function", "pairs": "filter, sampled ids"}
    for name, each in found.items():
        print(
            f"{names[name]:22} {each.seconds:8.1f} {rows / each.seconds:10,.0f} {each.peak / 1e6:9,.0f} MB "
            f"{size(folder / name) / 1e6:6,.0f} MB"
        )
    processor = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "?",
    )
    used = ", ".join(f"{name} {version}" for name, version in versions().items() if name in ("python", "transformers"))
    print(f"{processor}, {os.cpu_count()} cores; {used}")


if __name__ == "__main__":
    main()
