"""filter against row by row: the same pairs of the same responses, one process each, in one run.

    python benchmarks/filter.py --rows 2000

Row by row is how the tutorial's code works: a pass over the dataset for the prompt and for each response, one call of
the tokenizer for each text and again for each padded text, and columns of padded Python lists. filter is timed on text,
which it must encode, and on sampled ids, where it encodes only the pairs' text, to count what a round trip would
change. The tokenizer is a Llama 3 one of 16,000 ids, the texts are pieces of Python's own manual.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO / "src"), str(REPO / "tests")]

NUM_RESPONSES = 5
RESPONSE_CHARACTERS = 1900
"""About 450 tokens."""


def make_rows(count: int, corpus: str) -> list[dict[str, Any]]:
    """Prompts of 40 to 120 words and five responses of different lengths with different rewards."""
    random = Random(0)

    def piece(characters: int) -> str:
        start = random.randrange(len(corpus) - characters)
        return corpus[start : start + characters].strip()

    rows = []
    for k in range(count):
        row: dict[str, Any] = {"prompt_id": f"p{k}", "prompt": piece(random.randint(200, 600))}
        for i in range(NUM_RESPONSES):
            row[f"response_{i}"] = piece(int(RESPONSE_CHARACTERS * random.uniform(0.5, 1.5)))
            row[f"response_{i}_reward"] = random.gauss(0.0, 1.0)
        rows.append(row)
    return rows


def with_sampled_ids(rows: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    from rlhf_pipeline.core.chat import Chat

    chat = Chat.load(folder)
    for i in range(NUM_RESPONSES):
        ids = chat.encode_responses([row["prompt"] for row in rows], [row[f"response_{i}"] for row in rows])
        for row, tokens in zip(rows, ids, strict=True):
            row[f"response_{i}_tokens"] = tokens
    return rows


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "data" / "train-00000-of-00001.parquet", row_group_size=500)
    return folder


def row_by_row(source: Path, tokenizer: Path, output: Path, *, maxlen_prompt: int = 1024, maxlen: int = 2048) -> int:
    import datasets
    import numpy as np
    from transformers import AutoTokenizer

    header = 5
    right = AutoTokenizer.from_pretrained(tokenizer)
    left = AutoTokenizer.from_pretrained(tokenizer, padding_side="left")
    for each in (left, right):
        each.add_special_tokens({"pad_token": "[PAD]"})

    def ids(tokenizer: Any, role: str, text: str, **padding: Any) -> Any:
        turn = [{"role": role, "content": text}]
        return tokenizer.apply_chat_template(turn, add_generation_prompt=role == "user", return_dict=False, **padding)

    data = datasets.load_dataset(str(source), split="train", cache_dir=str(output / "cache"))
    data = data.filter(lambda row: len(ids(right, "user", row["prompt"])) <= maxlen_prompt)
    for i in range(NUM_RESPONSES):
        data = data.filter(lambda row, i=i: len(ids(right, "assistant", row[f"response_{i}"])) - header <= maxlen)
    columns: dict[str, list[Any]] = {name: [] for name in ("chosen", "reject", "chosen_reward", "reject_reward")}
    columns |= {f"llama_{name}{kind}": [] for name in ("prompt", "chosen", "reject") for kind in ("", "_tokens")}
    for row in data:
        tokens = ids(left, "user", row["prompt"], padding="max_length", max_length=maxlen_prompt)
        columns["llama_prompt_tokens"].append(tokens)
        columns["llama_prompt"].append(left.decode(tokens))
    for row in data:
        rewards = [row[f"response_{i}_reward"] for i in range(NUM_RESPONSES)]
        for name, index in (("chosen", int(np.argmax(rewards))), ("reject", int(np.argmin(rewards)))):
            text = row[f"response_{index}"]
            padded = {"padding": "max_length", "max_length": maxlen + header}
            tokens = ids(right, "assistant", text, **padded)[header:]
            columns[name].append(text)
            columns[f"{name}_reward"].append(rewards[index])
            columns[f"llama_{name}_tokens"].append(tokens)
            columns[f"llama_{name}"].append(right.decode(tokens))
    for name, values in columns.items():
        data = data.add_column(name, values)
    data = data.filter(lambda row: row["chosen"] != row["reject"])
    for split, part in data.train_test_split(test_size=0.1, shuffle=True, seed=0).items():
        part.to_parquet(output / f"{split}.parquet")
    return len(data)


def by_filter(source: Path, tokenizer: Path, output: Path, num_proc: int = 1) -> int:
    from rlhf_pipeline import filter as stage

    config = stage.Config(
        input_repo=str(source), output_repo=str(output), model=str(tokenizer), test_size=0.1, num_proc=num_proc
    )
    stage.main(config)
    provenance = json.loads((output / "provenance.json").read_text())
    return sum(provenance["rows_out"].values())


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rows", type=int, default=1000)
    count = arguments.parse_args().rows

    from pydoc_data.topics import topics

    from rlhf_pipeline.core.provenance import versions
    from rlhf_pipeline.core.world.tiny_llama import build_tokenizer

    corpus = "\n".join(topics.values())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build_tokenizer(
            [corpus[start : start + 5000] for start in range(0, len(corpus), 5000)], 16_000
        ).save_pretrained(folder / "tokenizer")
        rows = make_rows(count, corpus)
        text = write(folder / "text", rows)
        ids = write(folder / "ids", with_sampled_ids(rows, folder / "tokenizer"))
        tokens = sum(len(row[f"response_{i}_tokens"]) for row in rows for i in range(NUM_RESPONSES))
        runs = {
            "row by row, text": lambda out: row_by_row(text, folder / "tokenizer", out),
            "filter, text": lambda out: by_filter(text, folder / "tokenizer", out),
            "filter, sampled ids": lambda out: by_filter(ids, folder / "tokenizer", out),
        }
        seconds, of_processor, pairs = {}, {}, {}
        for name, run in runs.items():
            started, before = time.perf_counter(), time.process_time()
            pairs[name] = run(folder / f"out {name}")
            seconds[name], of_processor[name] = time.perf_counter() - started, time.process_time() - before
    print(f"\n{count:,} prompts x {NUM_RESPONSES} responses of {tokens / count / NUM_RESPONSES:.0f} tokens on average")
    baseline = "row by row, text"
    for name, spent in seconds.items():
        times, of_times = seconds[baseline] / spent, of_processor[baseline] / of_processor[name]
        print(
            f"{name:20} {spent:7.2f} s ({times:4.1f}x)  processor {of_processor[name]:7.2f} s ({of_times:4.1f}x)  "
            f"{count / spent:6.0f} prompts/s  {pairs[name]:,} pairs"
        )
    processor = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "?",
    )
    print(f"{processor}, {os.cpu_count()} cores; {versions()}")


if __name__ == "__main__":
    main()
