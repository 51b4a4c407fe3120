"""rank's batches against one row at a time, and against its vLLM back end where that is installed: the same rewards,
in one run.

    python benchmarks/rank.py --prompts 100

One row at a time is how the tutorial's code works. All three score the same conversations with the same
random Llama classifier and reach the same rewards to rounding; only scoring is timed, tokenization included,
loading not. The ways take turns, and every round has conversations of its own: vLLM remembers those it has
seen.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_pipeline.core.ranking.network_scorers import Backend

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO / "src")]
NUM_RESPONSES = 5
Score = Callable[[Sequence[dict[str, Any]]], list[float]]


def make_rows(prompts: int, corpus: str, longest: int, seed: int) -> list[dict[str, Any]]:
    """Prompts of 40 to 400 characters, responses of 40 to `longest`, lengths log-uniform."""
    random = Random(seed)

    def piece(low: int, high: int) -> str:
        characters = int(low * (high / low) ** random.random())
        start = random.randrange(len(corpus) - characters)
        return corpus[start : start + characters].strip()

    rows = []
    for k in range(prompts):
        prompt = piece(40, 400)
        rows += [
            {"prompt_id": f"p{k}", "prompt": prompt, "response": piece(40, longest), "response_tokens": None}
            for _ in range(NUM_RESPONSES)
        ]
    return rows


def make_classifier(folder: Path, corpus: str, *, hidden_size: int, layers: int) -> Path:
    import torch
    from transformers import LlamaForSequenceClassification

    from rlhf_pipeline.core.world import tiny_llama

    tokenizer = tiny_llama.build_tokenizer([corpus], 8192)
    config = tiny_llama.llama_config(
        tokenizer,
        hidden_size=hidden_size,
        num_layers=layers,
        num_heads=hidden_size // 64,
        intermediate_size=3 * hidden_size,
        init_std=0.05,
        max_length=4096,
    )
    config.num_labels = 1
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def scorer(folder: Path, backend: Backend, *, batch_tokens: int | None = None) -> Score:
    import torch

    from rlhf_pipeline.core.ranking.network_scorers import ScoringOptions
    from rlhf_pipeline.core.ranking.scoring import load_scorer, resolve_reward_model

    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    options = ScoringOptions(backend=backend, batch_tokens=batch_tokens, device=device)
    loaded = load_scorer(resolve_reward_model(str(folder)), options)

    def score(rows: Sequence[dict[str, Any]]) -> list[float]:
        return [item.reward for item in loaded.score(rows) if item.reward is not None]

    return score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--longest", type=int, default=4000, help="characters of the longest response")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch_tokens", type=int, help="rank's; default: its own")
    parser.add_argument("--without_vllm", action="store_true")
    args = parser.parse_args()
    import pydoc_data.topics

    corpus = "\n\n".join(pydoc_data.topics.topics.values())
    rounds = [make_rows(args.prompts, corpus, args.longest, seed) for seed in range(args.repeats)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_classifier(Path(temporary, "reward"), corpus, hidden_size=args.hidden_size, layers=args.layers)
        ways = {
            "one row at a time": scorer(folder, "transformers", batch_tokens=1),
            "rank": scorer(folder, "transformers", batch_tokens=args.batch_tokens),
        }
        if not args.without_vllm:
            ways["rank --backend vllm"] = scorer(folder, "vllm", batch_tokens=args.batch_tokens)
        table = measure(ways, rounds)
    from rlhf_pipeline.core.provenance import versions

    print(
        f"\n{args.prompts * NUM_RESPONSES} conversations a round, {NUM_RESPONSES} to a prompt; the reward model: "
        f"{args.layers} layers of {args.hidden_size}; medians of {args.repeats} rounds"
    )
    for name, line in table.items():
        print(
            f"{name:<20} {line['seconds']:7.2f} s ({line['times']:4.1f}x)  "
            f"processor {line['processor']:7.2f} s ({line['times_of_processor']:4.1f}x)  "
            f"{line['rows_per_second']:6.1f} rows/s  rewards differ by at most {line['largest_difference']:.1e}"
        )
    print(f"{machine()}; {', '.join(f'{name} {version}' for name, version in versions().items())}")


def measure(ways: dict[str, Score], rounds: Sequence[Sequence[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Of each way the median time over the rounds, beside the first way's."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    of_processor: dict[str, list[float]] = {name: [] for name in ways}
    differences: dict[str, float] = dict.fromkeys(ways, 0.0)
    for rows in rounds:
        rewards: dict[str, list[float]] = {}
        for name, score in ways.items():
            started, before = time.perf_counter(), time.process_time()
            rewards[name] = score(rows)
            seconds[name].append(time.perf_counter() - started)
            of_processor[name].append(time.process_time() - before)
        expected = next(iter(rewards.values()))
        for name, found in rewards.items():
            apart = max(abs(a - b) for a, b in zip(found, expected, strict=True))
            differences[name] = max(differences[name], apart)
    first = next(iter(ways))
    return {
        name: {
            "seconds": statistics.median(times),
            "times": statistics.median(seconds[first]) / statistics.median(times),
            "processor": statistics.median(of_processor[name]),
            "times_of_processor": statistics.median(of_processor[first]) / statistics.median(of_processor[name]),
            "rows_per_second": len(rounds[0]) / statistics.median(times),
            "largest_difference": differences[name],
        }
        for name, times in seconds.items()
    }


def machine() -> str:
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?")
    gpu = f", {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else ""
    return f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{gpu}"


if __name__ == "__main__":
    main()
