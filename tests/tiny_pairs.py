"""Tokenized pairs for the training tests, as filter writes them: random responses, rewards and margins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rlhf_pipeline.core.chat import Chat
from rlhf_pipeline.core.storage import open_output

BLOCK = 48
"""Tokens of a padded prompt or response."""


def make_rows(chat: Chat, prompts: list[str], seed: int, longest: int = 24) -> list[dict[str, Any]]:
    """One pair per prompt; lengths differ, the chosen response is always the first."""
    rng = np.random.default_rng(seed)
    rows = []
    for index, prompt in enumerate(prompts):
        ids = chat.prompt_ids(prompt)
        chosen, rejected = (
            [*map(int, rng.integers(0, 400, rng.integers(2, longest))), chat.end_ids[-1]] for _ in range(2)
        )
        low, middle, high = sorted(map(float, rng.normal(size=3)))
        rows.append(
            {
                "prompt_id": f"p{index}",
                "prompt": prompt,
                "chosen": f"chosen {index}",
                "rejected": f"rejected {index}",
                "chosen_reward": high,
                "rejected_reward": low,
                "rewards": [high, low, middle],
                "prompt_tokens": [chat.pad_id] * (BLOCK - len(ids)) + ids,
                "chosen_tokens": chosen + [chat.pad_id] * (BLOCK - len(chosen)),
                "rejected_tokens": rejected + [chat.pad_id] * (BLOCK - len(rejected)),
                "prompt_length": len(ids),
                "chosen_length": len(chosen),
                "rejected_length": len(rejected),
                "chosen_index": 0,
                "rejected_index": 1,
            }
        )
    return rows


def write_pairs(
    folder: Path,
    policy: Path,
    prompts: list[str],
    *,
    test: int = 8,
    temperature: float = 0.8,
    seed: int = 0,
    chat_template: Path | None = None,
) -> Path:
    """A dataset of pairs for `policy` with the splits train and test. Returns `folder`."""
    chat = Chat.load(policy, chat_template=None if chat_template is None else str(chat_template))
    splits = {"train": make_rows(chat, prompts, seed), "test": make_rows(chat, prompts[:test], seed + 1)}
    with open_output(folder, {"command": "filter", "seed": seed}, overwrite=False) as output:
        for split, rows in splits.items():
            output.write_shard(split, 0, pa.Table.from_pylist(rows))
        output.publish({"chat": chat.describe(), "sampling": {"temperature": temperature}}, "---\n---\n")
    return folder
