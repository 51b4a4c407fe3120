"""generate from an endpoint: its text through the stages, and a run that goes on after the endpoint broke down."""

from __future__ import annotations

import importlib.util
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chat_server import ChatServer
from rlhf_pipeline import filter as filter_
from rlhf_pipeline import generate, rank
from rlhf_pipeline.core import endpoint
from rlhf_pipeline.core.chat import Chat
from rlhf_pipeline.core.command import BadUse, WorkFailed
from rlhf_pipeline.core.generation.sampling import EngineOptions

N = 3


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.001)
    server = ChatServer(lambda body: f"{body['messages'][-1]['content'][:9]} {body['seed'] % 1000}")
    server.refuse = lambda body: "too long" if len(body["messages"][-1]["content"]) > 500 else None
    yield server
    server.close()


@pytest.fixture
def prompts(tmp_path: Path, tiny_prompts: Path) -> Path:
    """24 prompts, one that the endpoint refuses, one that no one can answer."""
    path = tmp_path / "prompts.jsonl"
    more = [{"prompt_id": "long", "prompt": "Why? " * 200}, {"prompt_id": "none", "prompt": ""}]
    path.write_text(tiny_prompts.read_text() + "".join(json.dumps(row) + "\n" for row in more))
    return path


def config_for(server: ChatServer, prompts: Path, output: Path, **values: Any) -> generate.Config:
    sizes: dict[str, Any] = {"num_responses": N, "maxlen": 24, "rows_per_shard": 10, "endpoint_concurrency": 4}
    where = {"endpoint": server.url, "endpoint_model": "big", "output_repo": str(output), "prompts": str(prompts)}
    return generate.Config(**{**where, **sizes, **values})


def read(folder: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(str(path)) for path in sorted(folder.glob("data/*.parquet")))


def test_its_responses_are_text_and_an_error_where_it_refused(
    server: ChatServer, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = generate.main(config_for(server, prompts, tmp_path / "out"))
    table = read(output)
    assert table.column_names == ["prompt_id", "prompt"] + [
        f"response_{i}{part}" for i in range(N) for part in ("", "_finish_reason", "_error")
    ]
    rows = table.to_pylist()
    assert len(rows) == 25
    for row in rows[:24]:
        assert row["response_0"].startswith(row["prompt"][:9]) and row["response_0_error"] is None
        assert len({row[f"response_{i}"] for i in range(N)}) == N
    assert (rows[24]["response_1"], rows[24]["response_1_finish_reason"]) == (None, None)
    assert "too long" in rows[24]["response_1_error"]
    said = capsys.readouterr().out
    assert "text only, no token ids" in said and "4.0% were refused by the endpoint" in said
    made = json.loads((output / "provenance.json").read_text())
    assert made["engine"] == {"name": "endpoint", "url": server.url, "model": "big"}
    assert (made["responses"]["unit"], made["responses"]["refused"]) == ("characters", 0.04)
    assert made["dropped"] == {"empty": 1} and "chat" not in made
    server.requests.clear()
    server.close()
    generate.main(config_for(server, prompts, output))
    assert "done before" in capsys.readouterr().out and server.requests == []


def test_a_run_that_the_endpoint_broke_off_goes_on_and_asks_nothing_twice(
    server: ChatServer, prompts: Path, tmp_path: Path
) -> None:
    def answer(body: dict[str, Any]) -> str:
        if len(server.requests) > 40:
            server.faults += [500] * 100
        return whole(body)

    whole, server.answer = server.answer, answer
    with pytest.raises(WorkFailed, match=r"HTTP 500.*run the same command again"):
        generate.main(config_for(server, prompts, tmp_path / "out", endpoint_concurrency=1))
    server.faults, server.answer = [], whole
    kept = sum(len(path.read_text().splitlines()) for path in tmp_path.glob(".out.partial/journal/0*.jsonl"))
    kept += N * sum(pq.read_metadata(path).num_rows for path in tmp_path.glob(".out.partial/data/*.parquet"))
    assert kept >= 30
    server.requests.clear()
    output = generate.main(config_for(server, prompts, tmp_path / "out"))
    assert len(server.requests) == 25 * N - kept
    assert read(output).equals(read(generate.main(config_for(server, prompts, tmp_path / "at_once"))))


def test_rank_and_filter_take_its_responses(
    server: ChatServer, prompts: Path, tmp_path: Path, tiny_policy: Path
) -> None:
    """filter encodes the text as the template would, end of turn included."""
    (tmp_path / "reward.py").write_text("def score(rows):\n    return [float(r['response'][-1]) for r in rows]\n")
    responses = generate.main(config_for(server, prompts, tmp_path / "out"))
    [rewards] = rank.main(
        rank.Config(input_repo=str(responses), reward_model=(f"{tmp_path / 'reward.py'}:score",), num_responses=N)
    )
    pairs = filter_.main(
        filter_.Config(
            input_repo=str(rewards),
            model=str(tiny_policy),
            num_responses=N,
            maxlen=64,
            maxlen_prompt=64,
            test_size=2,
            output_repo=str(tmp_path / "pairs"),
        )
    )
    chat = Chat.load(tiny_policy)
    rows = read(pairs).to_pylist()
    assert len(rows) >= 20 and "long" not in {row["prompt_id"] for row in rows}
    for row in rows:
        ids = row["chosen_tokens"][: row["chosen_length"]]
        assert ids == chat.response_ids(row["prompt"], row["chosen"])
    made = json.loads((pairs / "provenance.json").read_text())
    assert made["sampling"]["temperature"] == 0.8  # which train reads


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"endpoint_model": None}, "--endpoint and --endpoint_model belong together"),
        ({"endpoint": None}, "--endpoint and --endpoint_model belong together"),
        ({"endpoint_concurrency": 0}, "--endpoint_concurrency is 0; expected 1 or more"),
        ({"model": "./policy"}, "--model has no meaning with --endpoint"),
        ({"token_logps": True}, "--token_logps has no meaning with --endpoint"),
        ({"data_parallel_size": 2}, "--data_parallel_size has no meaning with --endpoint"),
        ({"engine": EngineOptions(dtype="float32")}, "--engine has no meaning with --endpoint"),
        ({"endpoint": "localhost/v1"}, "--endpoint localhost/v1 is not a URL"),
        ({"endpoint": "http://127.0.0.1:9/v1"}, "--endpoint http://127.0.0.1:9/v1 does not answer"),
    ],
)
def test_what_an_endpoint_cannot_do_is_refused(
    server: ChatServer, prompts: Path, tmp_path: Path, values: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadUse) as error:
        generate.main(config_for(server, prompts, tmp_path / "out", **values))
    assert str(error.value).startswith(said)
    assert server.requests == []


def test_ctrl_c_does_not_wait_for_the_answers_under_way(
    server: ChatServer, prompts: Path, tmp_path: Path, command_environment: dict[str, str]
) -> None:
    """The server answers after a minute; the command is gone within seconds."""
    server.answer = lambda body: time.sleep(60) or "late"  # type: ignore[func-returns-value]
    flags = ["--endpoint", server.url, "--endpoint_model", "big", "--prompts", str(prompts)]
    command = [sys.executable, "-m", "rlhf_pipeline.generate", *flags, "--output_repo", str(tmp_path / "out")]
    process = subprocess.Popen(command, env=command_environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not server.requests and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=15)
    finally:
        process.kill()
    assert process.returncode == 130
    assert said.endswith("interrupted: run the same command again to go on from here\n")


# A real server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def vllm_server(
    tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory, command_environment: dict[str, str]
) -> Iterator[str]:
    """`vllm serve` by its module: the script needs the package by the name vllm, and the CPU build has another."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny_policy)]
    command += ["--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "128", "--no-enable-chunked-prefill", "--max-num-batched-tokens", "4096"]
    command += ["--generation-config", "vllm", "--api-key", "sk-local"]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=command_environment, stdout=file, stderr=file, start_new_session=True)
    try:
        deadline = time.monotonic() + 200
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(timeout=30)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")
def test_vllms_own_server_serves(
    vllm_server: str,
    prompts: Path,
    tiny_policy: Path,
    tmp_path: Path,
    run_command: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under its own key, equal seeds give equal texts, and a prompt beyond its window is refused."""
    flags = ["--endpoint", vllm_server, "--endpoint_model", "tiny", "--prompts", prompts, "--pairs", N, "--maxlen", 24]
    refused = run_command("generate", *flags, "--output_repo", tmp_path / "out", env={"OPENAI_API_KEY": "sk-other"})
    assert refused.returncode == 2 and "it wants a key in OPENAI_API_KEY" in refused.stderr
    for name in ("out", "again"):
        done = run_command("generate", *flags, "--output_repo", tmp_path / name, env={"OPENAI_API_KEY": "sk-local"})
        assert done.returncode == 0, done.stderr
        assert "sk-" not in done.stdout + done.stderr
    table = read(tmp_path / "out")
    assert table.equals(read(tmp_path / "again"))
    rows = table.to_pylist()
    assert len(rows) == 25 and "maximum context length" in rows[24]["response_0_error"]
    assert all(row["response_0_finish_reason"] in ("stop", "length") for row in rows[:24])
    assert len({row[f"response_{i}"] for row in rows[:24] for i in range(N)}) > 60
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() and b"sk-local" in path.read_bytes()]
