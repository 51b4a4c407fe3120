"""The Hub over its real HTTP protocol, spoken by a server on the loopback interface."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hub_server import TOKEN
from rlhf_pipeline.core.command import BadUse, parse
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


def test_a_push_that_was_cut_off_does_not_send_again_what_had_arrived(run_command, responses, online, hub):
    """40 rows are three large files. The second does not arrive: the push fails, and the next sends only what lacks."""
    rows = [{"prompt": f"Say {n}.", "response_0": f"{n}", "response_1": f"{n} " * 2} for n in range(40)]
    responses.write_text("".join(json.dumps(row) + "\n" for row in rows))
    hub.blob_failures = [0, 400, 400]
    first = rank(run_command, responses, online, "owner/rewards")
    assert first.returncode == 1 and len(first.stderr.strip().splitlines()) == 1, first.stderr
    assert "HTTP 400" in first.stderr and "--push_only pushes it" in first.stderr
    arrived = len(hub.blobs)
    assert arrived == 1 and hub.repos["dataset", "owner/rewards"]["files"] == {}
    hub.asked.clear()
    hub.blob_failures.clear()  # the first push may have ended before it sent its third file
    second = push_only(run_command, responses, online)
    assert second.returncode == 0, second.stderr
    assert sum(line.startswith("PUT blobs/") for line in hub.asked) == 2
    assert {"README.md", "data/train-00002-of-00003.parquet"} < set(hub.repos["dataset", "owner/rewards"]["files"])


def push_only(run_command, responses: Path, online: dict[str, str], output: str = "owner/rewards", *more: str):
    args = ("--input_repo", "./gone", "--output_repo", output, "--push_only", *more)
    return run_command("rank", *args, env=online, cwd=responses.parent)


def test_push_only_needs_a_whole_output_and_a_repo(run_command, responses, online, hub):
    nothing = push_only(run_command, responses, online)
    assert nothing.returncode == 2 and "--push_only finds no whole output in runs/hub/owner/rewards" in nothing.stderr
    local = push_only(run_command, responses, online, "./rewards")
    assert local.returncode == 2 and "--output_repo is ./rewards: name it as OWNER/NAME" in local.stderr
    assert hub.repos == {}


def test_push_only_with_check_says_what_it_would_push_and_changes_nothing(run_command, responses, online, hub):
    hub.failures = [403]
    assert rank(run_command, responses, online, "owner/rewards").returncode != 0
    hub.repos.clear()
    checked = push_only(run_command, responses, online, "owner/rewards", "--check")
    assert checked.returncode == 0, checked.stderr
    assert "hf://owner/rewards: whole in runs/hub/owner/rewards, to be pushed" in checked.stdout
    assert hub.repos == {}


@pytest.mark.parametrize(
    ("output", "env", "sentence"),
    [
        ("owner/rewards", {"HF_TOKEN": ""}, "it accepted no token"),
        ("stranger/rewards", {}, "the token may write to owner"),
    ],
    ids=["no token", "no permission"],
)
def test_check_asks_whether_the_token_may_write_and_creates_nothing(
    run_command, responses, online, hub, output, env, sentence
):
    refused = rank(run_command, responses, {**online, **env}, output, None, "--check")
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert sentence in refused.stderr.strip().splitlines()[-1]
    assert rank(run_command, responses, online, "owner/rewards", None, "--check").returncode == 0
    assert hub.repos == {}


@pytest.mark.parametrize("name", ["generate", "rank", "filter", "train"])
def test_check_of_every_command_that_pushes_asks_for_a_token(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (tmp_path / "judge.py").write_text(REWARD)
    flags = {
        "generate": "--model ./m --prompts ./p --backend transformers --output_repo owner/out",
        "rank": "--input_repo ./p --reward_model ./judge.py:length --output_repo owner/out",
        "filter": "--input_repo ./p --model ./m --output_repo owner/out",
        "train": "--input_repo ./p --base_model ./m --output_dir ./policy --push_to owner/out",
    }
    command = importlib.import_module(f"rlhf_pipeline.{name}")
    words = [*flags[name].split(), "--check", "--pending", "./m=0", "./p=6000"]
    with pytest.raises(BadUse, match="owner/out is on the Hub, and it accepted no token"):
        command.main(parse(command.Config, words))


def test_data_goes_to_a_public_repo_only_when_asked_and_then_to_no_private_one(run_command, responses, online, hub):
    hub.repos["dataset", "owner/rewards"] = {"private": False, "files": {}, "sha": "1" * 40}
    refused = rank(run_command, responses, online, "owner/rewards")
    assert refused.returncode == 2
    assert "--output_repo owner/rewards is a public repo: pass --public to push to it" in refused.stderr
    assert hub.repos["dataset", "owner/rewards"]["files"] == {}
    done = rank(run_command, responses, online, "owner/rewards", None, "--public")
    assert done.returncode == 0, done.stderr
    hub.repos["dataset", "owner/rewards"]["private"] = True
    refused = rank(run_command, responses, online, "owner/rewards", None, "--public")
    assert refused.returncode == 2
    assert "owner/rewards is a private repo, which --public does not change" in refused.stderr


def test_another_runs_output_on_the_hub_is_refused_and_replaced_whole_when_asked(run_command, responses, online, hub):
    """Another machine has written more files there; afterwards none of them is left among ours."""
    rows = [{"prompt": f"Say {n}.", "response_0": f"{n}", "response_1": f"{n} " * 2} for n in range(40)]
    few = responses.read_text()
    responses.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert rank(run_command, responses, online, "owner/rewards").returncode == 0
    shutil.rmtree(responses.parent / "runs")
    responses.write_text(few)
    refused = rank(run_command, responses, online, "owner/rewards")
    assert refused.returncode == 2
    assert "--output_repo owner/rewards holds the output of another run (inputs.responses was" in refused.stderr
    assert rank(run_command, responses, online, "owner/rewards", None, "--overwrite").returncode == 0
    files = hub.repos["dataset", "owner/rewards"]["files"]
    assert [name for name in files if name.startswith("data/")] == ["data/train-00000-of-00001.parquet"]


def test_a_local_output_that_lost_its_files_takes_none_from_the_hub(run_command, responses, online, hub):
    assert rank(run_command, responses, online, "owner/rewards").returncode == 0
    before = dict(hub.repos["dataset", "owner/rewards"]["files"])
    shutil.rmtree(responses.parent / "runs/hub/owner/rewards/data")
    for result in (rank(run_command, responses, online, "owner/rewards"), push_only(run_command, responses, online)):
        assert result.returncode == 2
        assert "is not whole any more, split train lacks shards 0 of 1" in result.stderr
        assert "--overwrite" in result.stderr
    again = rank(run_command, responses, online, "owner/rewards", None, "--overwrite")
    assert again.returncode == 0 and "done before: hf://datasets/owner/rewards@" in again.stdout
    assert hub.repos["dataset", "owner/rewards"]["files"] == before


def test_what_the_hub_has_is_not_replaced_by_what_another_run_left_here(run_command, responses, online, hub):
    """Another machine overwrote the repo with this very run; here the run before still lies."""
    rows = responses.read_text()
    responses.write_text(rows + json.dumps({"prompt": "x", "response_0": "a", "response_1": "b"}) + "\n")
    assert rank(run_command, responses, online, "owner/rewards").returncode == 0
    (responses.parent / "runs").rename(responses.parent / "elsewhere")
    responses.write_text(rows)
    assert rank(run_command, responses, online, "owner/rewards", None, "--overwrite").returncode == 0
    before = dict(hub.repos["dataset", "owner/rewards"]["files"])
    shutil.rmtree(responses.parent / "runs")
    (responses.parent / "elsewhere").rename(responses.parent / "runs")
    again = rank(run_command, responses, online, "owner/rewards", None, "--overwrite")
    assert again.returncode == 0 and "done before" in again.stdout, again.stderr
    assert hub.repos["dataset", "owner/rewards"]["files"] == before


def test_a_repo_that_holds_something_else_is_never_replaced(run_command, responses, online, hub):
    hub.repos["dataset", "owner/rewards"] = {"private": True, "files": {"thesis.txt": b"x"}, "sha": "1" * 40}
    refused = rank(run_command, responses, online, "owner/rewards", None, "--overwrite")
    assert refused.returncode == 2 and "holds no output of rlhf_pipeline (thesis.txt" in refused.stderr


@pytest.mark.slow
def test_a_command_killed_at_any_of_its_requests_goes_on_to_the_same_repo(command_environment, responses, online, hub):
    """Killed while it asks for the k-th thing that changes the Hub; run again, the repo is as if nothing had been."""
    args = ["--input_repo", str(responses), "--reward_model", f"{responses.parent}/judge.py:length"]
    args += ["--num_responses", "2", "--output_repo", "owner/rewards", "--num_shards", "2", "--shard_index"]

    def run(index: int, kill_at: int | None) -> int:
        words = [sys.executable, "-m", "rlhf_pipeline.rank", *args, str(index)]
        environment = {**command_environment, **online}
        with subprocess.Popen(words, cwd=responses.parent, env=environment, stdout=subprocess.DEVNULL) as process:
            hub.kill(process, kill_at)
            return process.wait(60)

    expected, step, code = None, -1, -9
    while code != 0:
        hub.repos.clear()
        shutil.rmtree(responses.parent / "runs", ignore_errors=True)
        assert run(1, None) == 0
        code = run(0, step if step >= 0 else None)
        if step >= 0:
            assert code in (0, -9)
            assert run(0, None) == 0
        files = {name: len(content) for name, content in hub.repos["dataset", "owner/rewards"]["files"].items()}
        expected = expected or files
        assert set(files) == set(expected) and "README.md" in files
        step, code = step + 1, code if step >= 0 else -9
    assert step > 5


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
