"""Preference pairs as text, in the shapes in which people publish them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def texts_of(row: Mapping[str, Any]) -> tuple[Any, str, str] | None:
    """(prompt, chosen, rejected) of a row; None if it is no pair.

    chosen and rejected are texts, or message lists that end with the assistant's turn. What stands before that turn is
    the prompt, and must be the same in both; where nothing does, or they are texts, it is the row's own `prompt`.
    """
    sides = [_before_and_answer(row.get(name)) for name in ("chosen", "rejected")]
    if sides[0] is None or sides[1] is None or sides[0][0] != sides[1][0]:
        return None
    prompt = sides[0][0] or row.get("prompt")
    return (prompt, sides[0][1], sides[1][1]) if prompt else None


def _before_and_answer(side: Any) -> tuple[list[dict[str, Any]], str] | None:
    if isinstance(side, str):
        return [], side
    if not isinstance(side, list) or not side or not all(isinstance(turn, dict) for turn in side):
        return None
    answer = side[-1].get("content")
    return (side[:-1], answer) if isinstance(answer, str) else None
