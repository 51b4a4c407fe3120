"""Several jobs write one output: each its share, none waits for another, and an incomplete set is refused."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from rlhf_pipeline.core import storage
from rlhf_pipeline.core.command import BadUse, WorkFailed
from rlhf_pipeline.core.files import replace_folder
from rlhf_pipeline.core.storage import Share, choose_share, even_shards, writing
from rlhf_pipeline.core.storage.references import Ref
from rlhf_pipeline.core.storage.remote import Remote

IDENTITY = {"command": "rank", "what": {"seed": 1}, "inputs": {"prompts": "abc"}}
REWARD = "def length(rows):\n    return [float(len(row['response'])) for row in rows]\n"


def work(
    folder: Path, share: Share, shards: int = 5, identity: dict[str, Any] = IDENTITY, **options: Any
) -> str | None:
    """What a stage does for its share: two rows a shard, and publish if the set is whole."""
    with storage.open_output(folder, identity, overwrite=False, share=share, wait=0, **options) as output:
        assert not output.done
        output.expect("train", shards)
        output.note({"engine": str(share)})
        for index in share.of(range(shards)):
            if not output.has_shard("train", index):
                output.write_shard("train", index, pa.table({"prompt": [f"p{2 * index}", f"p{2 * index + 1}"]}))

        def describe(files: dict[str, list[Path]]) -> tuple[dict[str, Any], str]:
            return {"notes": output.notes()}, f"---\nconfigs: []\n---\n# {len(files['train'])} shards\n"

        return storage.finish(output, Ref(str(folder), path=folder), describe, overwrite=False)


def prompts_of(folder: Path) -> list[str]:
    return [row["prompt"] for row in storage.open_source(str(folder), flag="--x").rows()]


def test_two_jobs_write_what_one_writes_and_the_one_that_completes_the_set_publishes_it(tmp_path):
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    assert work(whole, Share()) == str(whole)
    assert work(shared, Share(1, 2)) is None
    assert work(shared, Share(0, 2)) == str(shared)
    assert prompts_of(shared) == prompts_of(whole) == [f"p{i}" for i in range(10)]
    made = json.loads((shared / "provenance.json").read_text())
    assert made["notes"] == [{"engine": "00000-of-00002"}, {"engine": "00001-of-00002"}]


def test_an_incomplete_set_is_refused_naming_its_shards_and_the_jobs_that_write_them(tmp_path):
    work(tmp_path / "out", Share(1, 3))
    with pytest.raises(
        BadUse, match=r"lacks shards 0, 2, 3 of 5; they are those of --shard_index 0, 2 with --num_shards 3"
    ):
        storage.open_source(str(tmp_path / "out"), flag="--input_repo")


def test_a_share_that_is_run_again_does_nothing_and_a_finished_set_may_be_cut_anew(tmp_path):
    work(tmp_path / "out", Share(0, 2))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / ".out.partial" / "data").iterdir()}
    assert work(tmp_path / "out", Share(0, 2)) is None
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert work(tmp_path / "out", Share()) == str(tmp_path / "out")
    assert len(prompts_of(tmp_path / "out")) == 10


def test_a_job_of_another_cut_is_refused_while_one_writes_and_one_of_the_same_cut_is_not(tmp_path):
    with storage.open_output(tmp_path / "out", IDENTITY, overwrite=False, share=Share(0, 2)):
        with storage.open_output(tmp_path / "out", IDENTITY, overwrite=False, share=Share(1, 2), wait=0):
            pass
        for share in (Share(1, 3), Share(), Share(0, 2)):
            with (
                pytest.raises(BadUse, match="is held by process"),
                storage.open_output(tmp_path / "out", IDENTITY, overwrite=False, share=share, wait=0),
            ):
                pass


def test_overwriting_waits_for_those_who_write_what_it_would_remove(tmp_path):
    other = {**IDENTITY, "what": {"seed": 2}}
    with storage.open_output(tmp_path / "out", IDENTITY, overwrite=False, share=Share(0, 2)):
        with (
            pytest.raises(BadUse, match="is held by process"),
            storage.open_output(tmp_path / "out", other, overwrite=True, share=Share(1, 2), wait=0),
        ):
            pass
        with storage.open_output(tmp_path / "out", IDENTITY, overwrite=True, share=Share(1, 2), wait=0) as output:
            assert not output.done


def test_what_was_begun_here_in_another_cut_than_on_the_hub_is_refused_before_any_work(tmp_path):
    """Four jobs, of which one was killed here; then two jobs elsewhere, in larger pieces, of which one has pushed."""
    assert work(tmp_path / "out", Share(0, 4), shards=8) is None
    names = frozenset({"data/train-00000-of-00005.parquet", "under_way/00000-of-00002.json"})
    pushed = Remote("owner/r", "1" * 40, "partial", names, settled={"shards of train": 5, "num_shards": 2})
    with pytest.raises(BadUse, match=r"with shards of train 8, .* with 5: remove .*\.out\.partial to go on"):
        work(tmp_path / "out", Share(1, 2), remote=pushed)
    same = dataclasses.replace(pushed, settled={"shards of train": 8, "num_shards": 2})
    with storage.open_output(tmp_path / "out", IDENTITY, overwrite=False, share=Share(1, 2), remote=same) as output:
        assert output.counts() == {"train": 8}


def test_a_job_that_starts_while_another_publishes_waits_and_finds_it_done(tmp_path, monkeypatch):
    """The publisher has written the provenance and stands before the rename."""
    publishing, go_on = threading.Event(), threading.Event()

    def late(new: Path, final: Path) -> None:
        publishing.set()
        assert go_on.wait(30)
        replace_folder(new, final)

    monkeypatch.setattr(writing, "replace_folder", late)
    assert work(tmp_path / "out", Share(0, 2)) is None
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(work, tmp_path / "out", Share(1, 2))
        assert publishing.wait(30)
        second = pool.submit(is_done, tmp_path / "out", Share(0, 2))
        time.sleep(0.5)
        go_on.set()
        assert first.result(30) == str(tmp_path / "out") and second.result(30)
    assert len(prompts_of(tmp_path / "out")) == 10


def is_done(folder: Path, share: Share) -> bool:
    with storage.open_output(folder, IDENTITY, overwrite=False, share=share) as output:
        return output.done


def test_a_process_that_another_overtook_writes_nothing_anew(tmp_path):
    """Two workers of one job: the second publishes between the moment at which the first looks and its first step."""
    out = tmp_path / "out"
    with storage.open_output(out, IDENTITY, overwrite=False, worker=0) as output:
        with storage.open_output(out, IDENTITY, overwrite=False, worker=1) as other:
            other.write_shard("train", 0, pa.table({"prompt": ["p"]}))
            other.publish({}, "")
        with pytest.raises(WorkFailed, match=r"another process has finished .*out meanwhile: run the same command"):
            output.expect("train", 1)
        with pytest.raises(WorkFailed, match="another process has finished"):
            output.write_shard("train", 0, pa.table({"prompt": ["again"]}))
    assert prompts_of(out) == ["p"] and not (tmp_path / ".out.partial").exists()
    assert is_done(out, Share())


@pytest.mark.parametrize(
    ("index", "count", "sentence"),
    [
        (None, 2, "needs --shard_index: which of them, 0 to 1"),
        (2, 2, "--shard_index is 2; expected 0 to 1"),
        (-1, 2, "--shard_index is -1; expected 0 to 1"),
        (0, 0, "--num_shards is 0; expected 1 or more"),
        (1, 1, "--shard_index is 1; expected 0 to 0"),
    ],
)
def test_a_job_that_cannot_be_is_refused(index, count, sentence):
    with pytest.raises(BadUse, match=sentence):
        choose_share(index, count)


def test_jobs_get_equally_many_shards_of_at_most_the_size_asked_for():
    """60,000 rows in shards of 1,000 for 7 jobs: 9 rounds, 63 shards of 953 rows; one job: 60 shards of 1,000."""
    assert even_shards(60_000, 1000, 1) == 1000
    assert even_shards(60_000, 1000, 7) == 953
    assert -(-60_000 // 953) == 63
    assert even_shards(10, 1000, 4) == 3


# Through rank, as people run it


@pytest.fixture
def responses(tmp_path: Path) -> Path:
    rows = [{"prompt": f"Say {n}.", "response_0": f"{n}", "response_1": f"{n} " * 2} for n in range(40)]
    (tmp_path / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "judge.py").write_text(REWARD)
    return tmp_path / "responses.jsonl"


def rank(run_command: Any, responses: Path, output: str, *more: Any, machine: str = "a", env: Any = None) -> Any:
    """rank as one machine runs it, in a working folder of its own."""
    cwd = responses.parent / machine
    cwd.mkdir(exist_ok=True)
    args = ("--input_repo", responses, "--reward_model", f"{responses.parent}/judge.py:length", "--num_responses", 2)
    return run_command("rank", *args, "--output_repo", output, *more, cwd=cwd, env=env)


def succeeded(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_ranks_of_two_shares_give_the_rows_of_one(run_command, responses, tmp_path):
    succeeded(rank(run_command, responses, str(tmp_path / "whole")))
    first = rank(run_command, responses, str(tmp_path / "shared"), "--num_shards", 2, "--shard_index", 0)
    assert "--shard_index 1 with --num_shards 2" in succeeded(first)
    succeeded(rank(run_command, responses, str(tmp_path / "shared"), "--num_shards", 2, "--shard_index", 1))
    rows = [list(storage.open_source(str(tmp_path / name), flag="--x").rows()) for name in ("whole", "shared")]
    assert rows[0] == rows[1] and len(rows[0]) == 40


def test_machines_that_share_no_disk_fill_one_repo_and_readers_refuse_it_until_it_is_whole(
    run_command,
    responses,
    online,
    hub,
    tmp_path,
):
    succeeded(rank(run_command, responses, str(tmp_path / "whole")))
    first = ("--num_shards", 2, "--shard_index", 0)
    assert "not whole" in succeeded(rank(run_command, responses, "owner/r", *first, machine="a", env=online))
    repo = hub.repos["dataset", "owner/r"]
    assert sorted(repo["files"]) == [
        "data/train-00000-of-00003.parquet",
        "data/train-00002-of-00003.parquet",
        "under_way/00000-of-00002.json",
    ]
    reader = run_command("rank", "--input_repo", "owner/r", "--output_repo", "./x", "--check", env=online, cwd=tmp_path)
    assert reader.returncode == 2
    assert "lacks shards 1 of 3; they are those of --shard_index 1 with --num_shards 2" in reader.stderr
    second = rank(run_command, responses, "owner/r", "--num_shards", 2, "--shard_index", 1, machine="b", env=online)
    assert "done in" in succeeded(second)
    assert {"README.md", "provenance.json"} < set(repo["files"])
    assert not any(name.startswith("under_way") for name in repo["files"])
    again = rank(run_command, responses, "owner/r", *first, machine="c", env=online)
    assert f"done before: hf://datasets/owner/r@{repo['sha']}" in succeeded(again)
    rows = list(storage.open_source(str(tmp_path / "whole"), flag="--x").rows())
    for name, content in repo["files"].items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
    assert list(storage.open_source(str(tmp_path / "copy"), flag="--x").rows()) == rows


def test_of_two_jobs_that_finish_at_once_one_writes_the_card(run_command, responses, online, hub):
    """Both commit on top of the same commit: the Hub takes one, the other looks again and finds the set whole."""
    hub.together = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(
                rank,
                run_command,
                responses,
                "owner/r",
                *("--num_shards", 2, "--shard_index", index),
                machine=f"m{index}",
                env={**online, "HF_HOME": f"{online['HF_HOME']}_{index}"},
            )
            for index in range(2)
        ]
        said = [succeeded(job.result()) for job in jobs]
    assert sum("not whole" in text for text in said) == 1
    assert sum("done in" in text for text in said) == 1
    files = hub.repos["dataset", "owner/r"]["files"]
    assert sorted(name for name in files if name.startswith("data/")) == [
        f"data/train-0000{index}-of-00003.parquet" for index in range(3)
    ]
    assert {"README.md", "provenance.json"} < set(files) and not any(name.startswith("under_way") for name in files)


def test_generate_in_two_shares_gives_the_rows_of_one(tiny_policy, tiny_prompts, tmp_path):
    from rlhf_pipeline import generate

    for name, shares in (("whole", [(None, 1)]), ("shared", [(1, 2), (0, 2)])):
        for index, count in shares:
            config = generate.Config(
                output_repo=str(tmp_path / name),
                model=str(tiny_policy),
                prompts=str(tiny_prompts),
                num_responses=2,
                maxlen=8,
                backend="transformers",
                rows_per_shard=5,
                shard_index=index,
                num_shards=count,
            )
            generate.main(config)
    assert all_rows(tmp_path / "shared") == all_rows(tmp_path / "whole")
    made = json.loads((tmp_path / "shared" / "provenance.json").read_text())
    assert made["engine"]["name"] and made["rows_out"] == 24


def all_rows(folder: Path) -> list[Any]:
    return list(storage.open_source(str(folder), flag="--x").rows())
