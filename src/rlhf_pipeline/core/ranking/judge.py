"""A language model as a judge: any OpenAI-compatible endpoint that answers with a rating in double
brackets.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_pipeline.core import endpoint
from rlhf_pipeline.core.chat import Prompt, turns_of
from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.files import Journal
from rlhf_pipeline.core.ranking.network_scorers import Row, Score, empty

TEMPLATE = """\
Please judge the quality of the assistant's response below: is it correct, helpful, complete, and as long as it \
should be? Length alone earns nothing. Explain your judgement in a sentence or two, then give a rating from 1 to 10 \
in exactly this form: [[rating]], for example [[5]].

[Conversation]
{prompt}

[Response]
{response}
"""
RATING = re.compile(r"\[\[\s*(-?\d+(?:\.\d+)?)\s*\]\]")


@dataclass(frozen=True)
class Endpoint:
    """url: up to and with /v1. template: text with {prompt} and {response}."""

    url: str
    model: str
    template: str = TEMPLATE
    max_tokens: int = 1024
    workers: int = 16


def read_template(path: str) -> str:
    """The prompt template in a file. Raises BadUse unless it has both places to fill."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise BadUse(f"--judge_template {path}: no such file; expected a text with {{prompt}} and {{response}}.")
    text = file.read_text(encoding="utf-8")
    for place in ("{prompt}", "{response}"):
        if place not in text:
            raise BadUse(f"--judge_template {path} has no {place}, where that is to be put.")
    return text


class Judge:
    """Ratings from an endpoint, several requests at a time. Answers are kept in `cache`, for a run that is
    killed.
    """

    objectives: tuple[str, ...] = ()
    has_coefficients = False

    def __init__(self, endpoint: Endpoint, engine: dict[str, Any], *, cache: Path | None = None):
        self._endpoint = endpoint
        self._journal = None if cache is None else Journal(cache)
        self._answers = {item["key"]: item["answer"] for item in self._journal.records} if self._journal else {}
        self._lock = threading.Lock()
        self.engine = engine

    def score(self, rows: Sequence[Row]) -> list[Score]:
        """Raises WorkFailed when the endpoint refuses us, or does not answer in TRIES tries.

        After any exception, Ctrl-C's too, nothing more is asked; the answers under way are waited for and kept.
        """
        with ThreadPoolExecutor(self._endpoint.workers) as pool:
            return list(pool.map(self._rate, rows))

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()

    def _rate(self, row: Row) -> Score:
        if reason := empty(row):
            return Score(None, reason)
        try:
            body = self._body(row)
        except BadUse as error:
            return Score(None, f"not rendered: {error}")
        key = hashlib.sha256(body).hexdigest()
        if key not in self._answers:
            try:
                answer = endpoint.ask(self._endpoint.url, body, flag="--judge_model").text
            except endpoint.Refused as error:
                return Score(None, f"refused: {error}")
            with self._lock:
                self._answers[key] = answer
                if self._journal is not None:
                    self._journal.append({"key": key, "answer": answer})
        return parse_rating(self._answers[key])

    def _body(self, row: Row) -> bytes:
        parts = {"{prompt}": as_text(row["prompt"]), "{response}": row["response"]}
        # in one pass: a prompt that holds "{response}" stays as it is
        text = re.sub(r"\{prompt\}|\{response\}", lambda match: parts[match[0]], self._endpoint.template)
        request = {
            "model": self._endpoint.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": self._endpoint.max_tokens,
        }
        return json.dumps(request, sort_keys=True).encode()


def parse_rating(answer: str) -> Score:
    """The last number in double brackets; judges think before they rate."""
    found = RATING.findall(answer)
    if not found:
        return Score(None, f"no rating: the judge answered {answer[-160:]!r}")
    return Score(float(found[-1]))


def as_text(prompt: Prompt) -> str:
    """Raises BadUse for messages that no answer can follow."""
    if isinstance(prompt, str):
        return prompt
    turns = turns_of(prompt, None)
    return "\n\n".join(f"{str(turn['role']).capitalize()}: {turn.get('content', '')}" for turn in turns)
