"""Does it pay to compute a prompt once for its N responses, with transformers? rank's batches against a prefix cache.

    python benchmarks/shared_prompts.py

rank sorts all conversations by length and fills batches, so that almost nothing is padding. Sharing a prompt means to
put its N responses into one batch behind the prompt's keys and values, padded to the longest of them. Both score the
same ids with the same random Llama classifier; repeats alternate, and the medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO / "src"), str(REPO)]
Prompts = list[tuple[list[int], list[list[int]]]]
"""Each prompt's ids and those of its responses."""


def make_prompts(count: int, prompt: int, responses: int, mean: int, spread: float) -> Prompts:
    """Responses of `mean` tokens, or between (1 - spread) and (1 + spread) times that, evenly."""
    random = Random(0)

    def ids(length: int) -> list[int]:
        return [random.randrange(8000) for _ in range(length)]

    def length() -> int:
        return round(mean * random.uniform(1 - spread, 1 + spread))

    return [(ids(prompt), [ids(length()) for _ in range(responses)]) for _ in range(count)]


def sorted_batches(model: Any, prompts: Prompts, budget: int) -> list[float]:
    """rank's way."""
    from rlhf_pipeline.core.batches import collate, plan_calls

    rows = [prompt + response for prompt, responses in prompts for response in responses]
    rewards = [0.0] * len(rows)
    [calls] = plan_calls([len(row) for row in rows], world_size=1, max_tokens=budget)
    for call in calls:
        batch = collate([rows[i] for i in call.indices], [()] * len(call.indices))
        hidden = model.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        for k, i in enumerate(call.indices):
            rewards[i] = model.score(hidden[k, len(rows[i]) - 1]).item()
    return rewards


def shared_prompts(model: Any, prompts: Prompts, budget: int) -> list[float]:
    """A prompt's keys and values once, then its responses behind them."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    rewards = []
    for prompt, responses in prompts:
        cache = model.model(input_ids=torch.tensor([prompt]), use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(responses))
        ids = pad_sequence([torch.tensor(response) for response in responses], batch_first=True)
        hidden = model.model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
        rewards += [model.score(hidden[k, len(response) - 1]).item() for k, response in enumerate(responses)]
    return rewards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt_tokens", type=int, default=200)
    parser.add_argument("--response_tokens", type=int, default=450)
    parser.add_argument("--responses", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    args = parser.parse_args()
    import pydoc_data.topics

    import torch
    from benchmarks.rank import machine, make_classifier
    from transformers import LlamaForSequenceClassification

    from rlhf_pipeline.core.ranking.network_scorers import CPU_BATCH_TOKENS

    corpus = "\n\n".join(pydoc_data.topics.topics.values())
    ways: dict[str, Callable[[Any, Prompts, int], list[float]]] = {
        "sorted batches": sorted_batches,
        "shared prompts": shared_prompts,
    }
    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        folder = make_classifier(Path(temporary, "reward"), corpus, hidden_size=args.hidden_size, layers=args.layers)
        model = LlamaForSequenceClassification.from_pretrained(folder).eval()
        for spread in (0.0, 0.5, 0.9):
            prompts = make_prompts(args.prompts, args.prompt_tokens, args.responses, args.response_tokens, spread)
            seconds, difference = measure(ways, model, prompts, CPU_BATCH_TOKENS, args.repeats)
            print(
                f"response lengths within {spread:3.0%} of {args.response_tokens}: "
                + ", ".join(f"{name} {spent:.2f} s" for name, spent in seconds.items())
                + f"; sharing is {seconds['sorted batches'] / seconds['shared prompts']:.2f}x as fast; "
                f"rewards differ by at most {difference:.1e}",
                flush=True,
            )
    print(f"prompts of {args.prompt_tokens} tokens, {args.responses} responses each; {machine()}")


def measure(
    ways: dict[str, Callable[[Any, Prompts, int], list[float]]],
    model: Any,
    prompts: Prompts,
    budget: int,
    repeats: int,
) -> tuple[dict[str, float], float]:
    """Each way's median seconds, and the largest difference between the ways' rewards."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    rewards: dict[str, Sequence[float]] = {}
    for _ in range(repeats):
        for name, score in ways.items():
            started = time.perf_counter()
            rewards[name] = score(model, prompts, budget)
            seconds[name].append(time.perf_counter() - started)
    first, second = rewards.values()
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return medians, max(abs(a - b) for a, b in zip(first, second, strict=True))


if __name__ == "__main__":
    main()
