"""What a reference names."""

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


def test_default_output_keeps_the_dots_of_a_folder_and_drops_the_ending_of_a_file(tmp_path):
    (tmp_path / "prompts.v2.jsonl").touch()
    (tmp_path / "llama-3.1").mkdir()
    for name, expected in (
        ("prompts.v2.jsonl", "prompts.v2_armo"),
        ("llama-3.1", "llama-3.1_armo"),
        ("llama-3.2-8b", "llama-3.2-8b_armo"),  # still to be written
    ):
        assert default_output(parse_ref(str(tmp_path / name), flag="--x"), "_armo").folder == tmp_path / expected
