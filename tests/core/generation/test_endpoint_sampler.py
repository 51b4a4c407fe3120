"""Responses from an endpoint of our own: what it is asked, how often, and what becomes of its errors."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from chat_server import ChatServer
from rlhf_pipeline.core import endpoint
from rlhf_pipeline.core.command import BadUse, WorkFailed
from rlhf_pipeline.core.generation.endpoint_sampler import REFUSALS, Endpoint, EndpointSampler
from rlhf_pipeline.core.generation.sampling import Request, Sample, SamplingSettings

SETTINGS = SamplingSettings(temperature=0.7, top_p=0.95, max_tokens=30)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.001)
    monkeypatch.delenv(endpoint.KEY_VARIABLE, raising=False)
    server = ChatServer(lambda body: f"{body['messages'][-1]['content']} {body['seed']}")
    yield server
    server.close()


def requests(count: int, seed: int = 0) -> list[Request]:
    return [Request(key, (), seed, f"question {key}") for key in range(count)]


def sample(server: ChatServer, wanted: list[Request], **options: Any) -> dict[int, Sample]:
    which = Endpoint(server.url, "big", options.pop("concurrency", 4))
    sampler = EndpointSampler(which, SETTINGS, **{"system_prompt": None, **options})
    return {found.key: found for found in sampler.sample(wanted)}


def test_each_response_is_asked_for_by_itself_with_its_seed_and_the_settings(server: ChatServer) -> None:
    """No n: some endpoints refuse it. The seed is mixed with the prompt, as for an engine of ours."""
    wanted = [*requests(2), Request(2, (), 50, "question 0"), Request(3, (), 0, [{"role": "user", "content": "Hi"}])]
    found = sample(server, wanted, system_prompt="Be brief.")
    asked = {(body["messages"][1]["content"], body["seed"]): body for body in server.requests}
    assert len(asked) == 4
    for request in wanted:
        content = request.prompt if isinstance(request.prompt, str) else "Hi"
        body = asked[content, request.engine_seed]
        assert body["messages"] == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": content},
        ]
        assert {**body, "messages": 0, "seed": 0} == {
            "model": "big",
            "messages": 0,
            "temperature": 0.7,
            "top_p": 0.95,
            "max_tokens": 30,
            "seed": 0,
        }
        assert found[request.key] == Sample(request.key, [], f"{content} {request.engine_seed}", "stop")
    assert len({request.engine_seed for request in wanted}) == 4


def test_errors_that_pass_are_waited_out(server: ChatServer) -> None:
    server.faults = [429, 500, "drop", "garbage", 503, "empty", 408]
    found = sample(server, requests(8))
    assert sorted(found) == list(range(8))
    assert all(one.error is None for one in found.values())
    assert len(server.requests) == 8 + 7


@pytest.mark.parametrize(
    ("fault", "said"),
    [(500, "HTTP 500"), (429, "HTTP 429"), ("drop", "RemoteDisconnected"), ("garbage", "JSONDecodeError")],
)
def test_an_endpoint_that_stays_broken_ends_the_run(server: ChatServer, fault: int | str, said: str) -> None:
    server.faults = [fault] * 100
    with pytest.raises(WorkFailed, match=rf"did not answer in {endpoint.TRIES} tries \({said}.*same command again"):
        sample(server, requests(3), concurrency=1)
    assert len(server.requests) == endpoint.TRIES


def test_what_is_refused_is_kept_as_an_error_and_the_others_go_on(server: ChatServer) -> None:
    server.refuse = lambda body: "too long" if body["messages"][0]["content"] == "question 2" else None
    found = sample(server, requests(5))
    assert found[2] == Sample(2, [], None, None, error='HTTP 400, {"error": "too long"}')
    assert [found[key].error for key in (0, 1, 3, 4)] == [None] * 4
    assert len(server.requests) == 5


def test_answers_without_choices_are_asked_for_again_and_then_left_out(server: ChatServer) -> None:
    server.faults = ["empty"] * endpoint.TRIES
    [found] = sample(server, requests(1)).values()
    assert found.error == f"an answer without choices, {endpoint.TRIES} times"


def test_a_response_that_ended_for_another_reason_is_none(server: ChatServer) -> None:
    server.finish_reason = "content_filter"
    [found] = sample(server, requests(1)).values()
    assert (found.text, found.error) == (None, "finish_reason content_filter")
    server.finish_reason = "length"
    [found] = sample(server, requests(1)).values()
    assert (found.error, found.finish_reason) == (None, "length")


def test_an_endpoint_that_refuses_all_ends_the_run(server: ChatServer) -> None:
    server.refuse = lambda body: "seed is not supported"
    with pytest.raises(WorkFailed, match=r"refuses every request: HTTP 400, .*seed is not supported"):
        sample(server, requests(500), concurrency=2)
    assert REFUSALS <= len(server.requests) < REFUSALS + 10


def test_a_few_prompts_that_are_refused_first_do_not_end_the_run(server: ChatServer) -> None:
    """4 prompts x 5 responses are 20 refusals, of 4 prompts."""
    server.refuse = lambda body: "too long" if body["messages"][0]["content"] < "question 4" else None
    wanted = [Request(5 * p + i, (), 50 * i, f"question {p}") for p in range(6) for i in range(5)]
    found = sample(server, wanted, concurrency=1)
    assert [key for key in sorted(found) if found[key].error] == list(range(REFUSALS))
    assert len(found) == 30


def test_refusals_wait_for_an_answer_to_what_was_asked_with_them(server: ChatServer) -> None:
    """The first request is answered when more prompts have been refused than the run would bear without."""

    def answer(body: dict[str, Any]) -> str:
        deadline = time.monotonic() + 20
        while len(server.requests) <= 2 * REFUSALS and time.monotonic() < deadline:
            time.sleep(0.01)
        return "Yes."

    server.answer = answer
    server.refuse = lambda body: None if body["messages"][0]["content"] == "question 0" else "too long"
    found = sample(server, requests(3 * REFUSALS))
    assert [key for key, one in found.items() if one.error is None] == [0]
    assert len(found) == 3 * REFUSALS


def test_so_many_are_asked_at_a_time_and_no_more(server: ChatServer) -> None:
    """The first four are held until all four are there: fewer at a time would never come to an end."""
    together = threading.Barrier(4)

    def answer(body: dict[str, Any]) -> str:
        if len(server.requests) <= 4:
            together.wait(timeout=20)
        return "Yes."

    server.answer = answer
    assert len(sample(server, requests(30), concurrency=4)) == 30
    assert server.most_at_a_time == 4


def test_a_pause_that_the_endpoint_asks_for_is_kept(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(endpoint, "_retry_after", lambda error: 7.0)
    monkeypatch.setattr(time, "sleep", pauses.append)
    server.faults = [429]
    sample(server, requests(1))
    assert 7.0 in pauses


def test_a_key_is_sent_and_never_shown(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.key = "sk-right"
    with pytest.raises(BadUse, match="HTTP 401: it wants a key in OPENAI_API_KEY; it is not set"):
        endpoint.look_at(server.url, flag="--endpoint")
    monkeypatch.setenv(endpoint.KEY_VARIABLE, "sk-wrong")
    with pytest.raises(BadUse, match="the one there is not taken") as refused:
        endpoint.look_at(server.url, flag="--endpoint")
    with pytest.raises(WorkFailed, match="HTTP 401: check the URL, --endpoint_model and OPENAI_API_KEY") as failed:
        sample(server, requests(1))
    assert "sk-" not in f"{refused.value}{failed.value}"
    monkeypatch.setenv(endpoint.KEY_VARIABLE, "sk-right")
    endpoint.look_at(server.url, flag="--endpoint")
    found = sample(server, requests(1))
    assert server.headers[-1]["Authorization"] == "Bearer sk-right"
    assert "sk-" not in json.dumps(found[0].text)


def test_what_does_not_answer_is_refused_before_any_work(server: ChatServer) -> None:
    with pytest.raises(BadUse, match="--endpoint localhost:8000 is not a URL"):
        endpoint.look_at("localhost:8000", flag="--endpoint")
    server.close()
    with pytest.raises(BadUse, match=r"--endpoint http.* does not answer \(.*refused.*\): is it running\?"):
        endpoint.look_at(server.url, flag="--endpoint")
