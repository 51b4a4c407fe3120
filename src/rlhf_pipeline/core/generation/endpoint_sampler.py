"""Samples from an OpenAI-compatible endpoint: text alone, since such an endpoint gives no token ids."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from queue import Empty, SimpleQueue
from typing import Any

from rlhf_pipeline.core import endpoint
from rlhf_pipeline.core.chat import turns_of
from rlhf_pipeline.core.command import WorkFailed
from rlhf_pipeline.core.generation.sampling import Request, Sample, SamplingSettings

REFUSALS = 20
"""So many prompts refused with no answer before them: the endpoint objects to what we ask for, not to a prompt."""


@dataclass(frozen=True)
class Endpoint:
    """url: up to and with /v1. concurrency: requests under way at a time."""

    url: str
    model: str
    concurrency: int


class EndpointSampler:
    """Asks an endpoint for one response at a time (some refuse n > 1), `concurrency` of them together.

    A response that the endpoint refuses, or ends for another reason than stop or length, comes back with `error`.
    """

    def __init__(self, which: Endpoint, settings: SamplingSettings, *, system_prompt: str | None):
        self._endpoint = which
        self._settings = settings
        self._system_prompt = system_prompt
        self.engine = {"name": "endpoint", "url": which.url, "model": which.model}

    def sample(self, requests: Iterable[Request]) -> Iterator[Sample]:
        """Samples as they come. Raises WorkFailed when the endpoint refuses us, or stops to answer."""
        todo: SimpleQueue[Request | None] = SimpleQueue()
        found: SimpleQueue[tuple[Request, Sample | WorkFailed]] = SimpleQueue()
        workers = self._endpoint.concurrency
        left = iter(requests)
        first = list(islice(left, 2 * workers))
        left, unheard = chain(first, left), {request.key for request in first}
        refused: set[str] = set()
        for _ in range(workers):  # daemons, not a pool: leaving must not wait for the answers under way
            threading.Thread(target=self._work, args=(todo, found), daemon=True).start()
        answered, pending = False, 0
        try:
            while True:
                for request in islice(left, 2 * workers - pending):
                    todo.put(request)
                    pending += 1
                if not pending:
                    return
                request, sample = found.get()
                pending -= 1
                if isinstance(sample, WorkFailed):
                    raise sample
                unheard.discard(sample.key)
                answered = answered or sample.error is None
                if not answered:
                    refused.add(json.dumps(request.prompt))
                # a refusal comes sooner than an answer: wait for what was asked with it
                if not answered and not unheard and len(refused) >= REFUSALS:
                    raise WorkFailed(f"{self._endpoint.url} refuses every request: {sample.error}")
                yield sample
        finally:
            with contextlib.suppress(Empty):
                while True:
                    todo.get_nowait()
            for _ in range(workers):
                todo.put(None)

    def close(self) -> None:
        """Nothing to shut down."""

    def _work(self, todo: SimpleQueue[Request | None], found: SimpleQueue[tuple[Request, Sample | WorkFailed]]) -> None:
        while (request := todo.get()) is not None:
            outcome: Sample | WorkFailed = WorkFailed("a thread that asks the endpoint has died")
            try:
                outcome = self._ask(request)
            except WorkFailed as error:
                outcome = error
                return
            finally:  # also with an error of ours: someone waits for it
                found.put((request, outcome))

    def _ask(self, request: Request) -> Sample:
        try:
            answer = endpoint.ask(self._endpoint.url, self._body(request), flag="--endpoint_model")
        except endpoint.Refused as error:
            return _refused(request, str(error))
        if answer.finish_reason not in ("stop", "length"):
            return _refused(request, f"finish_reason {answer.finish_reason}")
        return Sample(request.key, [], answer.text, "stop" if answer.finish_reason == "stop" else "length")

    def _body(self, request: Request) -> bytes:
        settings = self._settings
        body: dict[str, Any] = {
            "model": self._endpoint.model,
            "messages": turns_of(request.prompt, self._system_prompt),
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_tokens": settings.max_tokens,
            "seed": request.engine_seed,
        }
        return json.dumps(body).encode()


def _refused(request: Request, why: str) -> Sample:
    return Sample(request.key, [], None, None, error=why)
