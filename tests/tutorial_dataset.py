"""Pairs as the tutorial makes them: its procedure written down anew, and a dataset in the schema that was published.

Nothing here uses rlhf_pipeline, so the tests may hold our results against it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

HEADER = 5
"""Ids of BOS, header start, role, header end and blank line in a Llama 3 chat."""


def tutorial_pairs(
    rows: Sequence[dict[str, Any]],
    tokenizer: Any,
    *,
    num_responses: int = 5,
    maxlen_prompt: int = 1024,
    maxlen: int = 2048,
) -> list[dict[str, Any]]:
    """What part 3 of the tutorial makes of rows with prompt, response_{i} and response_{i}_reward, before its split.

    tokenizer: a Llama 3 one; it is copied and given [PAD].
    """
    right, left = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    for side, each in (("right", right), ("left", left)):
        each.padding_side = side
        each.add_special_tokens({"pad_token": "[PAD]"})

    def ids(tokenizer: Any, role: str, text: str, width: int | None = None) -> list[int]:
        padding = {} if width is None else {"padding": "max_length", "max_length": width}
        turn = [{"role": role, "content": text}]
        prompt = role == "user"
        return tokenizer.apply_chat_template(turn, add_generation_prompt=prompt, return_dict=False, **padding)

    pairs = []
    for row in rows:
        texts = [row[f"response_{i}"] for i in range(num_responses)]
        rewards = [row[f"response_{i}_reward"] for i in range(num_responses)]
        best, worst = int(np.argmax(rewards)), int(np.argmin(rewards))
        too_long = any(len(ids(right, "assistant", text)[HEADER:]) > maxlen for text in texts)
        if too_long or len(ids(right, "user", row["prompt"])) > maxlen_prompt or texts[best] == texts[worst]:
            continue
        prompt_tokens = ids(left, "user", row["prompt"], maxlen_prompt)
        chosen_tokens = ids(right, "assistant", texts[best], maxlen + HEADER)[HEADER:]
        reject_tokens = ids(right, "assistant", texts[worst], maxlen + HEADER)[HEADER:]
        pairs.append(
            {
                **row,
                "llama_prompt": left.decode(prompt_tokens),
                "llama_prompt_tokens": prompt_tokens,
                "chosen": texts[best],
                "chosen_reward": rewards[best],
                "llama_chosen": right.decode(chosen_tokens),
                "llama_chosen_tokens": chosen_tokens,
                "reject": texts[worst],
                "reject_reward": rewards[worst],
                "llama_reject": right.decode(reject_tokens),
                "llama_reject_tokens": reject_tokens,
            }
        )
    return pairs


def write_tutorial_dataset(
    folder: Path, rows: Sequence[dict[str, Any]], tokenizer: Any, *, test_rows: int = 2, **lengths: int
) -> list[dict[str, Any]]:
    """Write the pairs of `rows` in the published schema: splits train_prefs and test_prefs, int64 tokens, and the
    reference log-probs chosen_logprob and reject_logprob (here -1, -2, ...). Returns the pairs, test split last."""
    import datasets

    pairs = tutorial_pairs(rows, tokenizer, **lengths)
    for index, pair in enumerate(pairs):
        pair |= {"chosen_logprob": -1.0 - 2 * index, "reject_logprob": -2.0 - 2 * index}
    splits = {"train_prefs": pairs[:-test_rows], "test_prefs": pairs[-test_rows:]}
    for split, part in splits.items():
        path = folder / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(part).to_parquet(path)
    files = "\n".join(f"  - split: {split}\n    path: data/{split}-*" for split in splits)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}\n---\n")
    return pairs
