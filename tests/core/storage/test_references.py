"""What a reference names."""

import http.server
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.storage import default_output, parse_ref


@pytest.mark.parametrize(
    ("text", "local"),
    [
        ("./a", True),
        ("../a/b", True),
        ("/tmp/x/y", True),
        ("~/a", True),
        ("a/b/c", True),
        ("runs/a", True),
        ("owner/name", False),
        ("owner/name@v1.0", False),
        ("hf://datasets/owner/name", False),
        ("hf://datasets/runs/name", False),
    ],
)
def test_a_reference_is_local_or_hub_by_its_form(text, local, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (parse_ref(text, flag="--input_repo").path is not None) == local


def test_an_existing_folder_of_two_parts_is_local_and_only_an_output_may_be_new_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data/old").mkdir(parents=True)
    assert parse_ref("data/old", flag="--input_repo").path is not None
    assert parse_ref("data/new", flag="--output_repo", output=True).path is not None
    assert parse_ref("data/new", flag="--input_repo").repo_id == "data/new"


def test_one_part_alone_is_refused_and_the_sentence_names_the_local_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadUse, match=r"--output_repo ranked is neither .* write \./ranked"):
        parse_ref("ranked", flag="--output_repo", output=True)


@pytest.mark.parametrize("text", ["owner/name@dev", "owner/name:main", "hf://datasets/owner/name@dev"])
def test_an_output_is_a_whole_repo_and_not_a_part_of_one(text):
    assert parse_ref(text, flag="--input_repo").repo_id == "owner/name"
    with pytest.raises(BadUse, match=r"names a part of a repo, and an output is all of one.*: owner/name\.$"):
        parse_ref(text, flag="--output_repo", output=True)


def test_revision_is_kept():
    ref = parse_ref("owner/name@refs/pr/3", flag="--model")
    assert (ref.repo_id, ref.revision) == ("owner/name", "refs/pr/3")


def test_default_output_lies_beside_a_local_input(tmp_path):
    assert (
        default_output(parse_ref(str(tmp_path / "responses"), flag="--x"), "_armo").folder
        == tmp_path / "responses_armo"
    )


def test_default_output_is_on_the_hub_only_where_it_lets_us_write_and_nowhere_while_it_does_not_say(
    command_environment,
):
    """The Hub takes no token, is out of order, wants us to wait, hangs up, says alice, as it will from then on. In a
    process of its own: huggingface_hub reads its settings once, when it is imported."""
    statuses = [401, 503, 429, None, 200]

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = statuses.pop(0)
            if status is not None:
                body = json.dumps({"type": "user", "name": "alice", "orgs": []}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    script = """
from rlhf_pipeline.core.command import WorkFailed
from rlhf_pipeline.core.storage import default_output, parse_ref
for _ in range(5):
    try:
        print(default_output(parse_ref("alice/responses", flag="--input_repo"), "_armo"))
    except WorkFailed as error:
        print(error)
"""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        environment = {**command_environment, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": url, "HF_TOKEN": "hf_secret"}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert [said[0], said[4]] == ["responses_armo", "hf://alice/responses_armo"]
    for line, why in zip(said[1:4], ("HTTP 503", "HTTP 429", ""), strict=True):
        assert line.startswith(f"the Hub does not say where the stored token may write ({why}")
        assert line.endswith("run the same command again, or name the output with --output_repo.")


def test_default_output_keeps_the_dots_of_a_folder_and_drops_the_ending_of_a_file(tmp_path):
    (tmp_path / "prompts.v2.jsonl").touch()
    (tmp_path / "llama-3.1").mkdir()
    for name, expected in (
        ("prompts.v2.jsonl", "prompts.v2_armo"),
        ("llama-3.1", "llama-3.1_armo"),
        ("llama-3.2-8b", "llama-3.2-8b_armo"),  # still to be written
    ):
        assert default_output(parse_ref(str(tmp_path / name), flag="--x"), "_armo").folder == tmp_path / expected
