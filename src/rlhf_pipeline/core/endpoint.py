"""OpenAI-compatible endpoints: a chat completion is asked for until it comes, or the endpoint is given up."""

from __future__ import annotations

import http.client
import json
import os
import random
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from rlhf_pipeline.core.command import BadUse, WorkFailed

KEY_VARIABLE = "OPENAI_API_KEY"
TRIES = 6
FIRST_PAUSE = 1.0
"""Seconds before the second try; each further pause is twice as long, and up to half as long again by chance."""
LONGEST_PAUSE = 60.0
"""Seconds that an endpoint's own Retry-After is heeded for."""
TIMEOUT = 600.0
"""Seconds for one answer."""
LOOK_TIMEOUT = 20.0
"""Seconds for the first look at an endpoint."""
NOT_ALLOWED = (401, 403)
TRY_AGAIN = (408, 409, 425, 429)
"""Codes below 500 that may be another answer next time."""


@dataclass(frozen=True)
class Answer:
    """finish_reason: the endpoint's word, None if it says none."""

    text: str
    finish_reason: str | None


class Refused(Exception):
    """The endpoint won't answer this request, whatever we do: too long, or against its rules."""


class _Again(Exception):
    """This try failed, the next one may not. wait: seconds that the endpoint asks for. refused: if all tries fail so,
    it is this request that fails, and not the endpoint."""

    def __init__(self, problem: str, *, wait: float = 0.0, refused: bool = False):
        super().__init__(problem)
        self.wait, self.refused = wait, refused


def ask(url: str, body: bytes, *, flag: str) -> Answer:
    """One chat completion. url: up to and with /v1. body: the request as JSON. flag: the one that names the model.

    A busy or broken endpoint is asked TRIES times, with pauses. Raises Refused for a request that it can't take or
    answers without a choice each time, WorkFailed when it can't be asked at all.
    """
    for attempt in range(TRIES):
        try:
            return _complete(url, body, flag)
        except _Again as again:
            last = again
        if attempt < TRIES - 1:
            time.sleep(max(FIRST_PAUSE * 2**attempt * random.uniform(1, 1.5), last.wait))
    if last.refused:
        raise Refused(f"{last}, {TRIES} times")
    raise WorkFailed(f"{url} did not answer in {TRIES} tries ({last}); run the same command again to go on.")


def _complete(url: str, body: bytes, flag: str) -> Answer:
    try:
        return _read(_send(url, "chat/completions", body, TIMEOUT))
    except urllib.error.HTTPError as error:
        if error.code in (*NOT_ALLOWED, 404):
            raise WorkFailed(f"{url} answers HTTP {error.code}: check the URL, {flag} and {KEY_VARIABLE}.") from None
        if error.code not in TRY_AGAIN and error.code < 500:
            raise Refused(f"HTTP {error.code}, {error.read(200).decode(errors='replace')}") from None
        raise _Again(f"HTTP {error.code}", wait=_retry_after(error)) from None
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        raise _Again(f"{type(error).__name__}: {error}") from None


def look_at(url: str, *, flag: str) -> None:
    """Raise BadUse, naming `flag`, for a URL behind which nothing answers, or which does not take our key."""
    if not url.startswith(("http://", "https://")):
        raise BadUse(f"{flag} {url} is not a URL; expected one such as http://localhost:8000/v1.")
    try:
        _send(url, "models", None, LOOK_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code in NOT_ALLOWED:
            given = "the one there is not taken" if os.environ.get(KEY_VARIABLE) else "it is not set"
            raise BadUse(
                f"{flag} {url} answers HTTP {error.code}: it wants a key in {KEY_VARIABLE}; {given}."
            ) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise BadUse(f"{flag} {url} does not answer ({type(error).__name__}: {error}): is it running?") from error


def _send(url: str, path: str, body: bytes | None, timeout: float) -> Any:
    """The JSON that a POST of `body`, or a GET, brings."""
    request = urllib.request.Request(f"{url.rstrip('/')}/{path}", body, {"Content-Type": "application/json"})
    if key := os.environ.get(KEY_VARIABLE):
        request.add_unredirected_header("Authorization", f"Bearer {key}")  # for this host alone
    with urllib.request.urlopen(request, timeout=timeout) as response:
        return json.load(response)


def _read(answer: Any) -> Answer:
    """Raises KeyError or TypeError for an answer that is none."""
    if not answer["choices"]:
        raise _Again("an answer without choices", refused=True)
    choice = answer["choices"][0]
    return Answer(str(choice["message"]["content"] or ""), choice.get("finish_reason"))


def _retry_after(error: urllib.error.HTTPError) -> float:
    """Seconds that the endpoint asks us to wait; 0 if it doesn't, or names a time of day."""
    asked = error.headers.get("Retry-After") or ""
    return min(float(asked), LONGEST_PAUSE) if asked.replace(".", "", 1).isdigit() else 0.0
