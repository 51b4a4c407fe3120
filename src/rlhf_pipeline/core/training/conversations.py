"""Demonstrations: conversations whose assistant turns are to be learned, as prompt ids and response ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_pipeline.core.chat import Chat, text_of
from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.storage import Source
from rlhf_pipeline.core.training.pairs import Ids

MESSAGES = ("messages", "conversations")
"""Columns that hold a whole conversation."""


@dataclass(frozen=True)
class Demonstrations:
    """n responses with what stands before them. `dropped`: {reason: rows left out}."""

    prompt: list[Ids]
    response: list[Ids]
    rows: int
    dropped: dict[str, int]

    def __len__(self) -> int:
        return len(self.response)


def load_demonstrations(source: Source, chat: Chat, *, max_length: int, every_turn: bool) -> Demonstrations:
    """Read messages ending with an assistant turn, or prompt and response; leave out what is longer than max_length.

    every_turn: each assistant turn of a conversation is a response of its own, else the last alone.
    Raises BadUse for a row without a response, naming it.
    """
    prompts: list[Ids] = []
    responses: list[Ids] = []
    too_long = 0
    for number, row in enumerate(source.rows(_columns(source))):
        for before, response in _turns(row, number, source.name, every_turn):
            prompt = np.array(chat.prompt_ids(before), dtype=np.int32)
            answer = np.array(chat.response_ids(before, response), dtype=np.int32)
            if len(prompt) + len(answer) > max_length:
                too_long += 1
                continue
            prompts.append(prompt)
            responses.append(answer)
    if not responses:
        raise BadUse(f"{source.name} has no demonstration of at most {max_length} tokens: raise --max_length.")
    return Demonstrations(prompts, responses, source.num_rows, {f"longer than {max_length} tokens": too_long})


def _columns(source: Source) -> list[str]:
    for name in MESSAGES:
        if name in source.columns:
            return [name]
    if {"prompt", "response"} <= set(source.columns):
        return ["prompt", "response"]
    raise BadUse(
        f"{source.name} has neither messages nor prompt and response (it has {', '.join(source.columns[:6])}): "
        "name a dataset of demonstrations with --input_repo."
    )


def _turns(row: dict[str, Any], number: int, name: str, every_turn: bool) -> Iterator[tuple[Any, str]]:
    """(what stands before, response) of each assistant turn to learn."""
    if "response" in row:
        before, response = row["prompt"], row["response"]
        if not isinstance(response, str) or not response.strip():
            raise BadUse(f"row {number} of {name} has no response; expected a text to learn from in every row.")
        yield before, response
        return
    messages = row[next(iter(row))]
    if not messages or messages[-1]["role"] != "assistant" or not _text(messages[-1]).strip():
        raise BadUse(f"row {number} of {name} does not end with an assistant turn; expected a response to learn.")
    first = 0 if every_turn else len(messages) - 1
    for index in range(first, len(messages)):
        if messages[index]["role"] == "assistant":
            yield messages[:index], _text(messages[index])


def _text(message: dict[str, Any]) -> str:
    return text_of(message["content"]) if message["content"] else ""
