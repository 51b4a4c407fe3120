"""rank as a command: what it writes, what it refuses, and that being killed or spread changes nothing."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import run_process
from judge_server import Server, judging
from rlhf_pipeline import rank
from rlhf_pipeline.core import storage
from rlhf_pipeline.core.command import BadUse, WorkFailed, parse
from rlhf_pipeline.core.ranking.network_scorers import ScoringOptions
from rlhf_pipeline.core.schema import make_prompt_ids
from tiny_reward_models import write_armorm, write_classifier

N = 3
NUM_ROWS = 40  # 3 blocks: 16, 16, 8
COUNT_CHARACTERS = """
def score(rows):
    return [float(len(row["response"])) for row in rows]
"""


def responses_table(num_rows: int = NUM_ROWS, **changed: list[Any]) -> pa.Table:
    columns: dict[str, list[Any]] = {
        "prompt_id": [f"p{r}" for r in range(num_rows)],
        "prompt": [f"List {r} birds." for r in range(num_rows)],
        "category": ["birds"] * num_rows,
    }
    for i in range(N):
        columns[f"response_{i}"] = ["crow " * (1 + (r * 7 + i * 5) % 11) for r in range(num_rows)]
        columns[f"response_{i}_tokens"] = [[1] * (1 + (r * 7 + i * 5) % 11) for r in range(num_rows)]
        columns[f"response_{i}_finish_reason"] = ["stop"] * num_rows
    return pa.table(columns | changed)


def write_responses(folder: Path, table: pa.Table, provenance: dict[str, Any] | None = None) -> Path:
    with storage.open_output(folder, {"command": "generate"}, overwrite=False) as output:
        output.write_shard("train", 0, table)
        output.publish(provenance or {}, "# responses\n")
    return folder


@pytest.fixture
def responses(tmp_path: Path) -> Path:
    return write_responses(tmp_path / "responses", responses_table(), {"sampling": {"temperature": 0.8}})


@pytest.fixture
def function(tmp_path: Path) -> str:
    path = tmp_path / "count.py"
    path.write_text(COUNT_CHARACTERS)
    return f"{path}:score"


def config_for(responses: Path, reward_model: str, **values: Any) -> rank.Config:
    return rank.Config(input_repo=str(responses), reward_model=(reward_model,), num_responses=N, **values)


def read(folder: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("data/*.parquet")))


def test_rows_come_back_in_order_with_a_reward_for_every_response(responses: Path, function: str) -> None:
    """The default name is the tutorial's: the input's with _armo."""
    [folder] = rank.main(config_for(responses, function))
    assert folder == responses.with_name("responses_armo")
    before, after = read(responses), read(folder)
    assert after.select(before.column_names) == before
    assert after.column_names[len(before.column_names) :] == [
        name for i in range(N) for name in (f"response_{i}_reward", f"response_{i}_reward_error")
    ]
    for i in range(N):
        lengths = [float(len(text)) for text in before.column(f"response_{i}").to_pylist()]
        assert after.column(f"response_{i}_reward").to_pylist() == lengths
        assert after.column(f"response_{i}_reward").type == pa.float64()
        assert after.column(f"response_{i}_reward_error").null_count == NUM_ROWS


def test_a_full_disk_is_refused_by_its_flag_unless_the_output_is_finished(
    responses: Path, function: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(responses)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
        with pytest.raises(BadUse, match=r"--output_repo .*responses_armo needs about .* its disk has 0 B free"):
            rank.main(config_for(responses, function))
        full.undo()
        rank.main(config_for(responses, function))
        full.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
        rank.main(config_for(responses, function))
    assert "done before" in capsys.readouterr().out


def test_provenance_names_model_input_report_and_the_temperature_that_train_needs(
    responses: Path, function: str
) -> None:
    """Characters are 5 a word and tokens 1, so reward and length correlate perfectly."""
    [folder] = rank.main(config_for(responses, function))
    made = json.loads((folder / "provenance.json").read_text())
    assert made["inputs"]["responses"]["rows"] == made["rows_out"] == NUM_ROWS
    assert made["engine"]["kind"] == "Python function"
    assert made["sampling"] == {"temperature": 0.8}
    report = made["reward_report"]
    assert report["responses"] == NUM_ROWS * N and report["length_correlation"] == pytest.approx(1.0)
    assert "correlation with length" in (folder / "README.md").read_text()


def test_a_response_without_a_reward_is_null_with_its_reason_and_listed(responses: Path, tmp_path: Path) -> None:
    path = tmp_path / "picky.py"
    path.write_text("def score(rows):\n    return [1 / (len(row['response_tokens']) - 3) for row in rows]\n")
    [folder] = rank.main(config_for(responses, f"{path}:score"))
    table = read(folder)
    expected = [
        (f"p{r}", i)
        for r in range(NUM_ROWS)
        for i in range(N)
        if len(table.column(f"response_{i}_tokens")[r].as_py()) == 3
    ]
    assert expected
    unscored = json.loads((folder / "provenance.json").read_text())["unscored"]
    assert [(item["prompt_id"], item["response"]) for item in unscored] == expected
    for prompt_id, i in expected:
        r = int(prompt_id[1:])
        assert table.column(f"response_{i}_reward")[r].as_py() is None
        assert table.column(f"response_{i}_reward_error")[r].as_py().startswith("ZeroDivisionError: ")
    with pytest.raises(WorkFailed, match=r"response 0 of prompt p5 got no reward \(Zero.*--on_error is stop"):
        rank.main(config_for(responses, f"{path}:score", output_repo=(str(tmp_path / "other"),), on_error="stop"))


def test_a_reward_that_fails_everywhere_ends_the_run_at_its_first_block(responses: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("def score(rows):\n    return [undefined for row in rows]\n")
    with pytest.raises(WorkFailed, match=r"none of the first 48 responses got a reward; the first: NameError"):
        rank.main(config_for(responses, f"{path}:score"))


def test_a_last_block_of_bad_rows_alone_ends_no_job(tmp_path: Path) -> None:
    """Of 17 rows the second job has the last one, whose prompt is none."""
    script = tmp_path / "length.py"
    script.write_text("def score(rows):\n    return [float(len(row['prompt'])) for row in rows]\n")
    table = responses_table(17, prompt=[*(f"List {r} birds." for r in range(16)), None])
    config = config_for(write_responses(tmp_path / "responses", table), f"{script}:score", num_shards=2)
    for index in (1, 0):
        [folder] = rank.main(dataclasses.replace(config, shard_index=index))
    rewards = read(folder).column("response_0_reward").to_pylist()
    assert rewards[16] is None and None not in rewards[:16]


def test_text_of_any_arrow_kind_is_ranked(tmp_path: Path, function: str) -> None:
    """Polars and some of the Hub's datasets have large strings, and a column without a text may have no kind."""
    names = ["prompt", "response_0", "response_1"]
    table = responses_table().select(names).cast(pa.schema([(name, pa.large_string()) for name in names]))
    table = table.append_column("response_2", pa.nulls(NUM_ROWS))
    [folder] = rank.main(config_for(write_responses(tmp_path / "responses", table), function))
    report = json.loads((folder / "provenance.json").read_text())["reward_report"]
    assert report["length_unit"] == "characters" and report["length_correlation"] == pytest.approx(1.0)
    assert report["nulls"] == NUM_ROWS


def test_missing_prompt_ids_are_made_and_rewards_of_another_model_replaced(tmp_path: Path, function: str) -> None:
    table = responses_table(response_0_reward=[-1.0] * NUM_ROWS).drop_columns(["prompt_id"])
    [folder] = rank.main(config_for(write_responses(tmp_path / "made_elsewhere", table), function))
    ranked = read(folder)
    assert ranked.column("prompt_id").to_pylist() == make_prompt_ids(table.column("prompt").to_pylist())
    assert min(ranked.column("response_0_reward").to_pylist()) > 0
    assert ranked.column_names.count("response_0_reward") == 1


def test_the_same_run_again_does_nothing_and_another_is_refused_naming_the_flag(
    responses: Path, function: str, capsys: pytest.CaptureFixture[str]
) -> None:
    [folder] = rank.main(config_for(responses, function))
    before = (folder / "provenance.json").stat().st_mtime_ns
    rank.main(config_for(responses, function))
    assert (folder / "provenance.json").stat().st_mtime_ns == before
    assert "done before" in capsys.readouterr().out
    Path(function.partition(":")[0]).write_text("def score(rows):\n    return [0.0] * len(rows)\n")
    with pytest.raises(BadUse, match=r"another run .*reward_models.*--overwrite"):
        rank.main(config_for(responses, function))
    again = config_for(responses, function)
    rank.main(dataclasses.replace(again, run=dataclasses.replace(again.run, overwrite=True)))
    assert set(read(folder).column("response_0_reward").to_pylist()) == {0.0}


def test_moved_input_and_model_are_the_same_run(responses: Path, function: str, tmp_path: Path) -> None:
    """Contents decide, not names: this is what lets a run folder be moved."""
    output = (str(tmp_path / "rewards"),)
    rank.main(config_for(responses, function, output_repo=output))
    moved, script = tmp_path / "moved", tmp_path / "elsewhere" / "count.py"
    responses.rename(moved)
    script.parent.mkdir()
    Path(function.partition(":")[0]).rename(script)
    rank.main(config_for(moved, f"{script}:score", output_repo=output))


def test_as_many_outputs_as_models_are_that_many_runs_in_one_process(responses: Path, tmp_path: Path) -> None:
    """Each output is what the model alone would have written, so a finished one is left as it is."""
    script = tmp_path / "two.py"
    script.write_text(COUNT_CHARACTERS + "\ndef short(rows):\n    return [-reward for reward in score(rows)]\n")
    models, outputs = (f"{script}:score", f"{script}:short"), (str(tmp_path / "long"), str(tmp_path / "short"))
    both = dataclasses.replace(config_for(responses, models[0]), reward_model=models, output_repo=outputs)
    rank.main(dataclasses.replace(both, reward_model=models[:1], output_repo=outputs[:1]))
    before = (tmp_path / "long" / "provenance.json").stat().st_mtime_ns
    assert rank.main(both) == [tmp_path / "long", tmp_path / "short"]
    assert (tmp_path / "long" / "provenance.json").stat().st_mtime_ns == before
    long, short = (read(tmp_path / name).column("response_0_reward").to_pylist() for name in ("long", "short"))
    assert long == [-reward for reward in short] and min(long) > 0
    assert "response_0_objectives" not in read(tmp_path / "short").column_names


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"num_responses": 5},
            r"responses has no columns response_3, response_4 \(it has .*\)\. rlhf_pipeline\.generate writes it: "
            r"pass generate's output, or lower --num_responses \(now 5\)\.",
        ),
        ({"reward_model": ("./nothing_here",)}, r"--reward_model \./nothing_here: no such folder"),
        ({"reward_model": ("math:fsum", "math:fsum")}, "--reward_model .* expected different models"),
        ({"split": "test"}, "has no split test; it has train: choose with --split"),
        ({"num_responses": 0}, "--num_responses is 0; expected 1 or more"),
        ({"input_repo": "./no_such_responses"}, r"--input_repo \./no_such_responses does not exist"),
        ({"output_repo": ("./a", "./b")}, r"--output_repo \./a \./b: expected one .* or one for each of the 1 reward"),
        (
            {"reward_model": ("math:fsum", "math:prod"), "output_repo": ("./a", "./a")},
            r"--output_repo \./a \./a: expected one .* all different",
        ),
        ({"output_repo": ("rewards",)}, r"--output_repo rewards .*write \./rewards"),
    ],
)
def test_what_cannot_be_ranked_is_refused_in_one_sentence(
    responses: Path, function: str, values: dict[str, Any], sentence: str
) -> None:
    config = config_for(responses, function)
    with pytest.raises(BadUse, match=sentence):
        rank.main(dataclasses.replace(config, **values))
    assert not responses.with_name("responses_armo").exists()


def test_check_prints_the_plan_and_writes_nothing(
    responses: Path, function: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(responses, function)
    before = sorted(responses.parent.rglob("*"))
    rank.main(dataclasses.replace(config, run=dataclasses.replace(config.run, check=True)))
    out = capsys.readouterr().out
    assert "40 prompts, 120 responses" in out and "responses_armo: absent" in out
    assert sorted(path for path in responses.parent.rglob("*") if "__pycache__" not in path.parts) == before


def test_check_takes_a_pending_input_and_a_pending_model_for_granted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = rank.Config(input_repo="./runs/a/responses", reward_model=("./runs/a/reward",))
    pending = ("./runs/a/responses=600", "./runs/a/reward=0")
    rank.main(dataclasses.replace(config, run=dataclasses.replace(config.run, check=True, pending=pending)))
    assert "600 prompts, 3,000 responses" in capsys.readouterr().out


# Pairs


def write_pairs(folder: Path, rows: list[dict[str, Any]], split: str = "test") -> Path:
    (folder / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def accuracy_of(folder: Path, function: str, **values: Any) -> dict[str, Any]:
    config = rank.Config(input_repo=str(folder), reward_model=(function,), pairs_accuracy=True, **values)
    [output] = rank.main(config)
    report: dict[str, Any] = json.loads((output / "accuracy.json").read_text())
    return report


def test_the_accuracy_on_rewardbench_rows_is_reported_by_subset(
    tmp_path: Path, function: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reward is the number of characters: right on hep-go (3 > 1, 2 > 1), wrong once and tied once on Chat."""
    rows = [
        {"prompt": f"p{k}", "chosen": chosen, "rejected": rejected, "subset": subset, "id": k}
        for k, (chosen, rejected, subset) in enumerate(
            [("aaa", "b", "hep-go"), ("aa", "b", "hep-go"), ("a", "bb", "mt-bench-easy"), ("a", "b", "mt-bench-med")]
        )
    ]
    pairs = write_pairs(tmp_path / "bench", rows, "filtered")
    report = accuracy_of(pairs, function, split="filtered")
    assert report["accuracy"]["mean"] == 2.5 / 4 and report["ties"] == 1
    assert report["subsets"]["hep-go"]["accuracy"]["mean"] == 1.0
    assert report["rewardbench"]["score"]["accuracy"]["mean"] == pytest.approx((1.0 + 0.25) / 2)
    table = read(tmp_path / "bench_accuracy")
    assert table.column("chosen_reward").to_pylist() == [3.0, 2.0, 1.0, 1.0]
    assert "RewardBench score" in (tmp_path / "bench_accuracy" / "README.md").read_text()
    capsys.readouterr()
    accuracy_of(pairs, function, split="filtered")
    again = capsys.readouterr().out
    assert "done before" in again and "accuracy: 62.5 %" in again


def test_filters_pairs_are_judged_with_the_tokens_that_are_real_and_without_the_rewards_they_came_with(
    tmp_path: Path,
) -> None:
    """Two pairs of one prompt, tokens padded to 4; the function sees the real ones and counts them."""
    script = tmp_path / "tokens.py"
    script.write_text("def score(rows):\n    return [float(len(row['response_tokens'])) for row in rows]\n")
    row = {
        "prompt_id": "p0",
        "prompt": "List birds.",
        "prompt_tokens": [0, 1],
        "chosen": "A crow.",
        "rejected": "No.",
        "chosen_reward": -5.0,
        "rejected_reward": 5.0,
    }
    rows = [
        row
        | {"chosen_tokens": [7, 7, 7, 0], "chosen_length": 3, "rejected_tokens": [7, 0, 0, 0], "rejected_length": 1},
        row
        | {"chosen_tokens": [7, 0, 0, 0], "chosen_length": 1, "rejected_tokens": [7, 7, 0, 0], "rejected_length": 2},
    ]
    report = accuracy_of(write_pairs(tmp_path / "pairs", rows), f"{script}:score", split="test")
    assert report["accuracy"]["mean"] == 0.5
    table = read(tmp_path / "pairs_accuracy")
    assert table.column("chosen_reward").to_pylist() == [3.0, 1.0]
    assert table.column("prompt_id").to_pylist() == ["p0", "p0"]
    assert not [name for name in table.column_names if name.endswith("tokens")]


def test_message_lists_are_pairs_and_what_is_no_pair_has_no_reward(tmp_path: Path, function: str) -> None:
    def turns(question: str, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    rows = [
        {"chosen": turns("Birds?", "A crow."), "rejected": turns("Birds?", "No.")},
        {"chosen": turns("Birds?", "A crow."), "rejected": turns("Fish?", "A cod.")},
    ]
    report = accuracy_of(write_pairs(tmp_path / "pairs", rows), function, split="test")
    assert (report["pairs"], report["accuracy"]["mean"], report["nulls"]) == (1, 1.0, {"no pair": 2})
    listed = json.loads((tmp_path / "pairs_accuracy" / "provenance.json").read_text())["unscored"]
    assert {item["response"] for item in listed} == {"chosen", "rejected"}


def test_responses_are_no_pairs(responses: Path, function: str) -> None:
    with pytest.raises(BadUse, match=r"has no columns chosen, rejected .* name pairs with chosen and rejected"):
        accuracy_of(responses, function)


@pytest.mark.parametrize(
    "line",
    [
        ["--input_repo", "a/b"],
        ["--input-repo", "a/b", "--pairs", "5"],
        ["--reward_model", "RLHFlow/ArmoRM-Llama3-8B-v0.1", "--input_repo", "a/b", "--num_responses", "5"],
    ],
)
def test_the_tutorials_line_means_armorm_and_five_responses(line: list[str]) -> None:
    config = parse(rank.Config, line)
    assert (config.input_repo, config.num_responses) == ("a/b", 5)
    assert config.reward_model == ("RLHFlow/ArmoRM-Llama3-8B-v0.1",)


@pytest.mark.parametrize("num_rows", [1, 16, 17, 1000, 60_000])
def test_blocks_hold_every_row_once_and_in_order(num_rows: int) -> None:
    blocks = list(rank.cut(num_rows))
    assert [row for block in blocks for row in block] == list(range(num_rows))
    assert max(map(len, blocks)) <= rank.MAX_BLOCK


def test_a_gpu_that_nvidia_smi_does_not_list_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice of a GPU goes by a name of its own; without nvidia-smi no GPU has one."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-8c3e2f5a-0000-0000-0000-000000000000")
    rank.check_gpu_memory((), ScoringOptions(device="cuda:0"))


# Real processes


KILLED_IN_ITS_SECOND_BLOCK = """
import os, pathlib, signal
calls = pathlib.Path(__file__).with_name("calls")

def score(rows):
    with calls.open("a") as file:
        file.write(f"{rows[0]['prompt_id']}\\n")
    if "KILL" in os.environ and rows[0]["prompt_id"] == "p16":
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(row["response"])) for row in rows]
"""


def test_a_killed_run_goes_on_where_it_stood(responses: Path, function: str, tmp_path: Path, run_command: Any) -> None:
    expected = read(rank.main(config_for(responses, function, output_repo=(str(tmp_path / "whole"),)))[0])
    script, output = tmp_path / "killed.py", tmp_path / "killed"
    script.write_text(KILLED_IN_ITS_SECOND_BLOCK)
    command = ["rank", "--input_repo", responses, "--output_repo", output]
    command += ["--reward_model", f"{script}:score", "--num_responses", N]
    killed = run_command(*command, env={"KILL": "1"})
    assert killed.returncode == -9 and not output.exists()
    checked = run_command(*command, "--check")
    assert checked.returncode == 0 and "partial, 1 of 3 shards" in checked.stdout
    finished = run_command(*command)
    assert finished.returncode == 0, finished.stderr
    assert read(output) == expected
    assert (tmp_path / "calls").read_text().split() == ["p0", "p16", "p16", "p32"]


def test_two_processes_write_what_one_writes(
    responses: Path, tmp_path: Path, command_environment: dict[str, str]
) -> None:
    """Bit for bit on a CPU in float32: blocks, and so batches, are the same however they are dealt."""
    model = write_classifier(tmp_path / "classifier")
    expected = read(rank.main(config_for(responses, str(model), output_repo=(str(tmp_path / "one"),)))[0])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command = [*launcher, "-m", "rlhf_pipeline.rank", "--input_repo", responses, "--num_responses", N]
    command += ["--reward_model", model, "--output_repo", tmp_path / "two"]
    done = run_process(command, command_environment)
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "two") == expected
    assert len(set(expected.column("response_0_reward").to_pylist())) > 5
    assert done.stdout.count("no reward: 0 of 120") == 1  # one of them reported and published


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_two_processes_with_vllm_write_what_transformers_write_to_rounding(
    responses: Path, tmp_path: Path, command_environment: dict[str, str]
) -> None:
    """Each process has an engine of its own, which must not take the launcher's variables for a group to join."""
    model = write_classifier(tmp_path / "classifier")
    [whole] = rank.main(config_for(responses, str(model), output_repo=(str(tmp_path / "one"),)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command = [*launcher, "-m", "rlhf_pipeline.rank", "--input_repo", responses, "--num_responses", N]
    command += ["--reward_model", model, "--output_repo", tmp_path / "two", "--backend", "vllm"]
    done = run_process(command, command_environment)
    assert done.returncode == 0, done.stderr
    for i in range(N):
        name = f"response_{i}_reward"
        assert read(tmp_path / "two").column(name).to_pylist() == pytest.approx(
            read(whole).column(name).to_pylist(), abs=2e-5
        )
    assert json.loads((tmp_path / "two" / "provenance.json").read_text())["engine"]["backend"] == "vllm"


def test_the_command_refuses_a_model_without_reward_head_in_one_sentence(
    responses: Path, tiny_policy: Path, run_command: Any
) -> None:
    refused = run_command("rank", "--input_repo", responses, "--reward_model", tiny_policy, "--pairs", N)
    assert refused.returncode == 2
    assert "error: --reward_model" in refused.stderr and "has 2 labels" in refused.stderr
    assert "Traceback" not in refused.stderr


# A judge behind an endpoint


def judge_words(responses: Path, output: Path, server: Server) -> list[Any]:
    template = output.with_name("template.txt")
    template.write_text("PROMPT {prompt} RESPONSE {response}")
    words = ["rank", "--input_repo", responses, "--output_repo", output, "--num_responses", N]
    return [*words, "--reward_model", server.url, "--judge_model", "big", "--judge_template", template]


def test_a_judge_rates_through_the_command_and_what_it_does_not_rate_is_null_with_the_reason(
    tmp_path: Path, run_command: Any
) -> None:
    """The endpoint is busy at first. Response 0 of prompts 0 and 1 is not rated, one by each side's fault."""
    table = responses_table()
    texts = ["mumble", "too long", *table.column("response_0").to_pylist()[2:]]
    bad = table.set_column(table.column_names.index("response_0"), "response_0", pa.array(texts))
    responses = write_responses(tmp_path / "responses", bad)
    with judging() as server:
        server.busy = 3
        done = run_command(*judge_words(responses, tmp_path / "rewards", server))
        asked = len(server.requests)
        again = run_command(*judge_words(responses, tmp_path / "rewards", server))
        assert len(server.requests) == asked, "a finished run asked again"
    assert done.returncode == 0, done.stderr
    assert "no reward: 2 of 120 responses, 1 no rating, 1 refused" in done.stdout
    assert again.returncode == 0 and "done before" in again.stdout
    ranked = read(tmp_path / "rewards")
    assert ranked.column("response_0_reward").to_pylist()[:2] == [None, None]
    reasons = ranked.column("response_0_reward_error").to_pylist()
    assert reasons[0].startswith("no rating: ") and reasons[1].startswith("refused: HTTP 400")
    for i in (1, 2):
        words = [len(text.split()) + 0.5 for text in table.column(f"response_{i}").to_pylist()]
        assert ranked.column(f"response_{i}_reward").to_pylist() == words


def test_a_killed_judge_run_goes_on_without_paying_twice(
    responses: Path, tmp_path: Path, run_command: Any, command_environment: dict[str, str]
) -> None:
    """Of the requests that a kill interrupts only those under way, 16 at most, are made again."""
    with judging() as server:
        server.delay = 0.05
        module, *rest = map(str, judge_words(responses, tmp_path / "rewards", server))
        process = subprocess.Popen([sys.executable, "-m", f"rlhf_pipeline.{module}", *rest], env=command_environment)
        deadline = time.monotonic() + 60
        while len(server.requests) < 25 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert not (tmp_path / "rewards").exists()
        time.sleep(0.3)  # the endpoint still answers what it was asked
        before = len(server.requests)
        done = run_command(*judge_words(responses, tmp_path / "rewards", server))
        assert done.returncode == 0, done.stderr
        different = len({json.dumps(request) for request in server.requests})
        assert before >= 25 and len(server.requests) - different <= 16
    words = [len(text.split()) + 0.5 for text in read(responses).column("response_0").to_pylist()]
    assert read(tmp_path / "rewards").column("response_0_reward").to_pylist() == words


# ArmoRM


def test_armorm_through_the_command_keeps_objectives_and_gives_bad_rows_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prompts with a system turn, several turns, and a text that quotes a header; a response too long and an empty one.

    The second model's template has no header for a conversation that begins with a system turn: no gate.
    """
    header = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    system = {"role": "system", "content": "Be brief."}
    asked, answered = {"role": "user", "content": "A bird?"}, {"role": "assistant", "content": "A crow."}
    quoting = {"role": "user", "content": f"What does {header} mean?"}
    prompts = [[system, asked], [asked, answered, asked], [quoting], [asked], [asked]]
    texts = ["A tit.", "An owl.", f"{header} opens a turn.", "A crow. " * 300, "  "]
    responses = write_responses(tmp_path / "responses", pa.table({"prompt": prompts, "response_0": texts}))
    config = rank.Config(input_repo=str(responses), reward_model=(str(write_armorm(tmp_path / "rm")),), num_responses=1)
    [folder] = rank.main(config)
    table = read(folder).to_pylist()
    for row in table[:3]:
        weighted = [value * row["response_0_coefficients"][k] for k, value in row["response_0_objectives"].items()]
        assert len(weighted) == 19 and row["response_0_reward"] == pytest.approx(sum(weighted), abs=1e-5)
    kinds = [row["response_0_reward_error"].partition(":")[0] for row in table[3:]]
    assert kinds == ["too long", "empty response"]
    assert "helpsteer-verbosity: mean" in capsys.readouterr().out
    template = tmp_path / "template.jinja"
    template.write_text(
        "{{- bos_token }}{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + "
        "'<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' }}{%- endfor %}{%- if add_generation_prompt %}"
        "{{- 'Go on: ' if messages[0]['role'] == 'system' else '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
        "{%- endif %}"
    )
    other = dataclasses.replace(config, chat_template=str(template), output_repo=(str(tmp_path / "other"),))
    rank.main(other)
    reasons = read(tmp_path / "other").column("response_0_reward_error").to_pylist()
    assert reasons[0].startswith("no gate: ") and reasons[1:3] == [None, None]


@pytest.mark.parametrize("kind", ["classifier", "armorm"])
def test_two_jobs_that_share_the_output_write_what_one_writes(kind: str, responses: Path, tmp_path: Path) -> None:
    """Bit for bit: the blocks are the same whoever takes them."""
    model = (write_classifier if kind == "classifier" else write_armorm)(tmp_path / kind)
    whole = config_for(responses, str(model), output_repo=(str(tmp_path / "one"),))
    rank.main(whole)
    for index in (1, 0):
        share = dataclasses.replace(whole, output_repo=(str(tmp_path / "two"),), num_shards=2, shard_index=index)
        rank.main(share)
        assert (tmp_path / "two").exists() == (index == 0)
    assert read(tmp_path / "two") == read(tmp_path / "one")
