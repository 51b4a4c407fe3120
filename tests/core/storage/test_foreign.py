"""Datasets made elsewhere: which configuration and split is read, and what is said of those that can't be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.storage import open_source, parse_ref

CONFIGS = {"main": ["train", "test"], "socratic": ["train"]}


def parquet(text: str) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"prompt": [text]}), sink)
    return bytes(sink.getvalue())


def files_of(configs: dict[str, list[str]]) -> dict[str, bytes]:
    """A dataset repo: for each configuration and split one row that says which it is."""
    lines = ["---", "configs:"]
    files = {}
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split in splits:
            lines += [f"  - split: {split}", f"    path: {config}/{split}.parquet"]
            files[f"{config}/{split}.parquet"] = parquet(f"{config} {split}")
    return {**files, "README.md": "\n".join([*lines, "---", "# x"]).encode()}


def put(folder: Path, configs: dict[str, list[str]]) -> Path:
    for name, content in files_of(configs).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def only_row(reference: str, split: str | None = "train") -> str:
    source = open_source(reference, flag="--prompts", split=split)
    assert source.num_rows == 1
    return str(next(source.rows())["prompt"])


def test_a_configuration_is_chosen_by_the_reference_and_a_split_by_its_flag(tmp_path):
    folder = put(tmp_path / "gsm", CONFIGS)
    assert only_row(f"{folder}:main") == "main train"
    assert only_row(f"{folder}:main", "test") == "main test"
    assert only_row(f"{folder}:socratic", None) == "socratic train"


def test_several_configurations_are_listed_in_one_sentence(tmp_path):
    folder = put(tmp_path / "gsm", CONFIGS)
    with pytest.raises(BadUse, match=r"has several configurations \(main, socratic\): choose one, as in .*gsm:main"):
        open_source(str(folder), flag="--prompts")
    with pytest.raises(BadUse, match="has no configuration maim; it has main, socratic"):
        open_source(f"{folder}:maim", flag="--prompts")
    with pytest.raises(BadUse, match="has no split dev; it has train, test: choose with --split"):
        open_source(f"{folder}:main", flag="--prompts", split="dev")


def test_the_only_configuration_and_the_default_one_need_no_name(tmp_path):
    assert only_row(str(put(tmp_path / "one", {"main": ["train"]}))) == "main train"
    assert only_row(str(put(tmp_path / "two", {"default": ["train"], "more": ["train"]}))) == "default train"


def fingerprint(reference: Path | str) -> str:
    return open_source(str(reference), flag="--prompts").fingerprint


@pytest.mark.parametrize("name", ["train.jsonl", "train.csv"])
def test_a_folder_of_text_files_is_another_input_once_they_are_edited(name, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    line = '{"prompt": "PROMPT"}\n' if name.endswith("jsonl") else "prompt\nPROMPT\n"
    (folder / name).write_text(line)
    before = fingerprint(folder)
    (folder / ".DS_Store").write_text("not data")
    assert fingerprint(folder) == before
    (folder / name).write_text(line.replace("PROMPT", "edited"))
    assert fingerprint(folder) != before


def test_configurations_of_one_dataset_are_different_inputs(tmp_path):
    folder = put(tmp_path / "gsm", CONFIGS)
    assert fingerprint(f"{folder}:main") != fingerprint(f"{folder}:socratic")


def test_a_reference_with_a_configuration_is_read_as_such(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ref = parse_ref("openai/gsm8k:main@v1", flag="--prompts")
    assert (ref.repo_id, ref.config, ref.revision) == ("openai/gsm8k", "main", "v1")
    Path("runs:old").mkdir()
    assert parse_ref("./runs:old", flag="--prompts").config is None
    assert parse_ref("./new:old", flag="--output_repo", output=True).path == Path("new:old")


def test_a_foreign_repo_is_read_over_http_pinned_to_its_commit(run_command, hub, online, tmp_path):
    hub.repos["dataset", "them/gsm"] = {"private": False, "files": files_of(CONFIGS), "sha": "1" * 40}
    refused = read_over_http(run_command, online, tmp_path, "them/gsm")
    assert refused.returncode == 2 and "has several configurations (main, socratic)" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    done = read_over_http(run_command, online, tmp_path, "them/gsm:socratic")
    assert done.stderr.strip() == (
        "error: them/gsm:socratic has no columns response_0, response_1 (it has prompt). rlhf_pipeline.generate writes "
        "it: pass generate's output, or lower --num_responses (now 2)."
    )


def read_over_http(run_command: Any, online: dict[str, str], tmp_path: Path, reference: str) -> Any:
    (tmp_path / "judge.py").write_text("def score(rows):\n    return [1.0 for row in rows]\n")
    args = ("--input_repo", reference, "--reward_model", f"{tmp_path}/judge.py:score", "--num_responses", 2)
    return run_command("rank", *args, "--output_repo", "./out", "--check", env=online, cwd=tmp_path)


def test_a_gated_repo_names_the_page_of_its_licence(run_command, hub, online, tmp_path):
    hub.repos["dataset", "them/gated"] = {
        "private": False,
        "files": files_of({"main": ["train"]}),
        "sha": "1" * 40,
        "gated": True,
    }
    refused = read_over_http(run_command, online, tmp_path, "them/gated")
    assert refused.returncode == 2
    assert refused.stderr.strip() == (
        f"error: --input_repo them/gated is gated: accept its licence at {hub.url}/datasets/them/gated, "
        "then run `hf auth login`."
    )


def test_a_gated_output_of_ours_is_refused_alike(run_command, hub, online, tmp_path):
    files = {
        "provenance.json": b"{}",
        "data/train-00000-of-00001.parquet": parquet("x"),
    }
    hub.repos["dataset", "them/ours"] = {"private": False, "files": files, "sha": "1" * 40, "gated": True}
    refused = read_over_http(run_command, online, tmp_path, "them/ours")
    assert refused.returncode == 2 and "is gated: accept its licence at" in refused.stderr
