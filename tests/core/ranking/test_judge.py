"""The judge against an endpoint of our own: what it sends, what it makes of answers, and when it asks
again.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from judge_server import Server, judging
from rlhf_pipeline.core import endpoint
from rlhf_pipeline.core.command import BadUse, WorkFailed
from rlhf_pipeline.core.ranking import judge, scoring
from rlhf_pipeline.core.ranking.network_scorers import ScoringOptions


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.001)
    with judging() as server:
        yield server


@pytest.fixture
def template(tmp_path: Path) -> str:
    path = tmp_path / "template.txt"
    path.write_text("PROMPT {prompt} RESPONSE {response}")
    return str(path)


def load(server: Server, template: str, journal: Path | None = None) -> scoring.Scorer:
    model = scoring.resolve_reward_model(server.url, judge_model="big", judge_template=template)
    return scoring.load_scorer(model, ScoringOptions(), journal=journal)


def row(response: str | None, prompt: Any = "Hi") -> dict[str, Any]:
    return {"prompt_id": "p", "prompt": prompt, "response": response, "response_tokens": None}


def test_a_rating_is_the_last_number_in_double_brackets_and_rows_keep_their_order(
    server: Server, template: str
) -> None:
    scores = load(server, template).score([row("one " * k) for k in range(1, 40)])
    assert [score.reward for score in scores] == [k + 0.5 for k in range(1, 40)]


def test_the_template_is_filled_once_and_the_judge_is_asked_without_randomness(server: Server, template: str) -> None:
    turns = [("user", "What is {response}?"), ("assistant", "A place."), ("user", "Sure?")]
    conversation = [{"role": role, "content": content} for role, content in turns]
    load(server, template).score([row("Right.", conversation)])
    [request] = server.requests
    assert request["messages"][0]["content"] == (
        "PROMPT User: What is {response}?\n\nAssistant: A place.\n\nUser: Sure? RESPONSE Right."
    )
    assert (request["model"], request["temperature"]) == ("big", 0)


def test_answers_without_a_rating_and_refused_or_empty_rows_are_null_with_a_reason(
    server: Server, template: str
) -> None:
    no_role, answered = [{"role": None, "content": "Hi"}], [{"role": "assistant", "content": "Hi"}]
    bad = [row("mumble"), row("too long"), row("  "), row(None), row("fine", no_role), row("fine", answered)]
    scores = load(server, template).score([*bad, row("fine")])
    assert [score.reward for score in scores] == [None] * 6 + [1.5]
    reasons = [str(score.error) for score in scores[:6]]
    assert reasons[0].startswith("no rating: ") and "7 of 10" in reasons[0]
    assert reasons[1] == "refused: HTTP 400, maximum context length exceeded"
    assert reasons[2:4] == ["empty response"] * 2
    assert all(reason.startswith("not rendered: ") for reason in reasons[4:])


def test_a_turn_without_text_is_an_empty_one(server: Server, template: str) -> None:
    """As Arrow gives a turn that only calls a tool."""
    turns = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": None},
        {"role": "tool", "content": "3"},
    ]
    load(server, template).score([row("Three.", turns)])
    assert "Assistant: \n\nTool: 3 RESPONSE" in server.requests[0]["messages"][0]["content"]


def test_a_busy_endpoint_is_asked_again_and_a_dead_one_ends_the_run(server: Server, template: str) -> None:
    server.busy = endpoint.TRIES - 1
    assert load(server, template).score([row("good")])[0].reward == 1.5
    assert len(server.requests) == endpoint.TRIES
    server.busy = endpoint.TRIES
    with pytest.raises(WorkFailed, match=rf"did not answer in {endpoint.TRIES} tries \(HTTP 503\)"):
        load(server, template).score([row("good")])


def test_a_wrong_key_ends_the_run_at_once_and_is_not_shown(
    server: Server, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-abc")
    scorer = load(server, template)
    with pytest.raises(WorkFailed, match=r"HTTP 401.*OPENAI_API_KEY") as caught:
        scorer.score([row("secret")])
    assert server.keys == ["Bearer sk-abc"]
    assert "sk-abc" not in f"{caught.value} {scorer.engine}"


def test_ctrl_c_waits_for_the_answers_under_way_alone_and_keeps_them(
    server: Server, template: str, tmp_path: Path
) -> None:
    """Of 400 requests 16 are under way at a time; the signal comes with the first of them."""
    server.delay = 0.2
    scorer = load(server, template, tmp_path / "answers.jsonl")
    timer = threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        scorer.score([row(f"good {k}") for k in range(400)])
    scorer.close()
    assert 1 <= len(server.requests) <= 32
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == len(server.requests)


def test_answers_are_not_paid_for_twice(server: Server, template: str, tmp_path: Path) -> None:
    journal = tmp_path / "answers.jsonl"
    first = load(server, template, journal).score([row("one"), row("one two"), row("mumble")])
    again = load(server, template, journal).score([row("one two"), row("mumble"), row("one"), row("1 2 3")])
    assert [score.reward for score in again] == [first[1].reward, None, first[0].reward, 3.5]
    assert len(server.requests) == 4


def test_another_model_or_template_is_another_reward_model(server: Server, template: str, tmp_path: Path) -> None:
    def identity(judge_model: str = "big", judge_template: str = template) -> dict[str, str]:
        return scoring.resolve_reward_model(
            server.url, judge_model=judge_model, judge_template=judge_template
        ).identity()

    other = tmp_path / "other.txt"
    other.write_text("{prompt} {response} Rate it.")
    assert identity() == identity()
    assert identity(judge_model="small") != identity()
    assert identity(judge_template=str(other)) != identity()


def test_what_is_missing_is_refused_by_its_flag(tmp_path: Path) -> None:
    (tmp_path / "bare.txt").write_text("Rate {response}.")
    with pytest.raises(BadUse, match=r"--reward_model http://localhost/v1 is an endpoint: .*--judge_model"):
        scoring.resolve_reward_model("http://localhost/v1")
    with pytest.raises(BadUse, match=r"--judge_template .*bare\.txt has no \{prompt\}"):
        judge.read_template(str(tmp_path / "bare.txt"))
    with pytest.raises(BadUse, match=r"--judge_template \./none\.txt: no such file"):
        judge.read_template("./none.txt")
