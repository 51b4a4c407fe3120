"""Blocks whose writer is killed, or whose files are not all there, become the pairs of an undisturbed run."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from killed_writers import CARD, each_kill, in_process
from rlhf_pipeline import filter as stage
from rlhf_pipeline.core import storage
from rlhf_pipeline.core.filtering import pair_blocks


@pytest.fixture
def filtering(tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[stage.Plan, stage.Config]:
    """Seven prompts in three blocks, of which one prompt is dropped; the rest go into three files."""
    monkeypatch.setattr(pair_blocks, "BLOCK_ROWS", 3)
    monkeypatch.setattr(stage, "SHARD_ROWS", 2)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # a fork would wait for threads that it does not have
    rows = [
        {"prompt": f"Question {n}?", "response_0": "a", "response_0_reward": 1.0, "response_1": "b"}
        | {"response_1_reward": 1.0 + n}
        for n in range(7)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = stage.Config(
        input_repo=f"{tmp_path}/in.jsonl",
        model=str(tiny_policy),
        num_responses=2,
        maxlen=30,
        maxlen_prompt=40,
        test_size=2,
    )
    return stage.make_plan(config), config


def filter_pairs(folder: Path, plan: stage.Plan, config: stage.Config) -> None:
    """The work of filter's main, into the output `out` of a folder."""
    with storage.open_output(folder / "out", plan.identity, overwrite=False) as output:
        if output.done:
            return
        work = work_of(plan, config, output.folder)
        blocks = pair_blocks.do_blocks(work, plan.source, num_proc=1)
        output.publish(stage.make_splits(plan, config, output, work, blocks), CARD)


def work_of(plan: stage.Plan, config: stage.Config, partial: Path) -> pair_blocks.Work:
    return pair_blocks.Work(plan.chat, plan.rules, config.num_responses, config.maxlen_prompt, partial / "journal")


def contents(folder: Path) -> dict[str, bytes]:
    files = [*(folder / "out" / "data").iterdir(), folder / "out" / stage.SKIPPED]
    return {path.name: path.read_bytes() for path in files}


@pytest.mark.slow
def test_filter_killed_before_any_step_goes_on_to_the_pairs_of_an_undisturbed_run(filtering, tmp_path):
    work = functools.partial(filter_pairs, plan=filtering[0], config=filtering[1])
    kills, begun = tmp_path / "kills", set()
    kills.mkdir()
    for step in each_kill(work, kills):
        here = kills / str(step)
        begun.add(len(list((here / ".out.partial" / "journal").glob("block-*.parquet"))))
        assert in_process(work, here) == 0
        assert contents(here) == contents(kills / "warm")
        assert not any(".tmp" in path.name for path in (here / "out").rglob("*"))
        assert not (here / ".out.partial").exists()
    assert begun == {0, 1, 2, 3}
    assert len(contents(kills / "warm")) == 4


@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_a_block_of_which_a_file_is_missing_is_made_again(suffix, filtering, tmp_path):
    """As a run leaves it that is killed while it removes what it can't finish."""
    plan, config = filtering
    filter_pairs(tmp_path / "whole", plan, config)
    with storage.open_output(tmp_path / "out", plan.identity, overwrite=False) as output:
        pair_blocks.do_blocks(work_of(plan, config, output.folder), plan.source, num_proc=1)
        (output.folder / "journal" / f"block-00001.{suffix}").unlink()
    filter_pairs(tmp_path, plan, config)
    assert contents(tmp_path) == contents(tmp_path / "whole")
