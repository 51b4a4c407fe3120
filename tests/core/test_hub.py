"""The Hub over its real HTTP protocol, spoken by a server on the loopback interface."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hub_server import TOKEN
from tiny_pairs import write_pairs

REWARD = "def length(rows):\n    return [float(len(row['response'])) for row in rows]\n"


@pytest.fixture
def responses(tmp_path) -> Path:
    rows = [{"prompt": f"Say {n}.", "response_0": f"{n}", "response_1": f"{n} " * 2} for n in ("one", "two", "three")]
    (tmp_path / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "judge.py").write_text(REWARD)
    return tmp_path / "responses.jsonl"


def rank(run_command, responses: Path, online: dict[str, str], output: str, source: str | None = None, *more: str):
    args = ("--input_repo", source or responses, "--reward_model", f"{responses.parent}/judge.py:length")
    return run_command(
        "rank", *args, "--num_responses", 2, "--output_repo", output, *more, env=online, cwd=responses.parent
    )


def test_an_output_goes_to_a_private_repo_and_comes_back_as_it_was(run_command, responses, online, hub, tmp_path):
    """rank writes to the Hub; rank again reads that repo, pinned to its commit, and writes locally."""
    first = rank(run_command, responses, online, "owner/rewards")
    assert first.returncode == 0, first.stderr
    repo = hub.repos["dataset", "owner/rewards"]
    assert repo["private"] and {"README.md", "provenance.json"} <= set(repo["files"])
    assert TOKEN not in first.stdout + first.stderr + str(repo["files"])
    second = rank(run_command, responses, online, str(tmp_path / "again"), f"owner/rewards@{repo['sha']}")
    assert second.returncode == 0, second.stderr
    made = json.loads((tmp_path / "again" / "provenance.json").read_text())
    assert any(item.get("fingerprint") == repo["sha"] for item in made["inputs"].values() if isinstance(item, dict))


def test_a_push_that_failed_is_repeated_without_computing_again(run_command, responses, online, hub):
    hub.failures = [403]
    first = rank(run_command, responses, online, "owner/rewards")
    assert first.returncode != 0 and "owner/rewards" in first.stderr.strip().splitlines()[-1]
    assert hub.repos["dataset", "owner/rewards"]["files"] == {}
    (responses.parent / "judge.py").touch()
    second = rank(run_command, responses, online, "owner/rewards")
    assert second.returncode == 0, second.stderr
    assert "README.md" in hub.repos["dataset", "owner/rewards"]["files"]


@pytest.mark.parametrize(
    ("output", "env", "sentence"),
    [
        ("owner/rewards", {"HF_TOKEN": ""}, "there is no token: run `hf auth login`"),
        ("stranger/rewards", {}, "the Hub refused"),
        ("rewards", {}, "is neither a local folder nor OWNER/NAME: write ./rewards"),
    ],
    ids=["no token", "no permission", "no owner"],
)
def test_what_may_not_be_written_is_refused_before_any_work(run_command, responses, online, hub, output, env, sentence):
    result = rank(run_command, responses, {**online, **env}, output)
    assert result.returncode == 2, result.stdout + result.stderr
    assert sentence in result.stderr.strip().splitlines()[-1]
    assert not any("commit" in line for line in hub.asked)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [("owner/nowhere", "is no dataset that the Hub shows us"), ("owner/rewards@v9", "has no such revision")],
)
def test_what_is_not_there_is_said_in_one_sentence(run_command, responses, online, hub, tmp_path, source, sentence):
    hub.repos["dataset", "owner/rewards"] = {"private": False, "files": {"README.md": b"x"}, "sha": "1" * 40}
    result = rank(run_command, responses, online, str(tmp_path / "out"), source)
    assert result.returncode == 2, result.stdout + result.stderr
    assert sentence in result.stderr.strip().splitlines()[-1]


def test_a_policy_is_pushed_without_what_only_this_machine_needs(run_command, online, hub, tmp_path, tiny_policy):
    from conftest import PROMPTS

    pairs = write_pairs(tmp_path / "pairs", tiny_policy, PROMPTS)
    args = ("--input_repo", pairs, "--base_model", tiny_policy, "--batch_size", 8, "--output_dir", tmp_path / "policy")
    result = run_command("train", *args, "--push_to", "owner/policy", env=online)
    assert result.returncode == 0, result.stdout + result.stderr
    files = set(hub.repos["model", "owner/policy"]["files"])
    assert hub.repos["model", "owner/policy"]["private"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "provenance.json"} <= files
    assert not any(name.startswith(("reference", "checkpoints", "metrics")) for name in files)
    assert os.path.exists(tmp_path / "policy" / "metrics.jsonl")
