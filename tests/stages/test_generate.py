"""generate as a command: what it writes, what it sets aside, what it refuses, and that being killed changes nothing."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hub_server import TOKEN, Hub
from rlhf_pipeline import generate
from rlhf_pipeline.core import storage
from rlhf_pipeline.core.chat import Chat
from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.generation.sampling import EngineOptions
from rlhf_pipeline.core.storage import open_source

N = 3


def config_for(policy: Path, prompts: Path, output: Path, **values: Any) -> generate.Config:
    sizes: dict[str, Any] = {"num_responses": N, "maxlen": 24, "rows_per_shard": 10}
    return generate.Config(
        output_repo=str(output), model=str(policy), prompts=str(prompts), backend="transformers", **{**sizes, **values}
    )


def read(folder: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(str(path)) for path in sorted(folder.glob("data/*.parquet")))


@pytest.fixture(scope="module")
def mixed_prompts(tmp_path_factory: pytest.TempPathFactory, tiny_prompts: Path) -> Path:
    """The 24 prompts with a category, and four that can't be used among them."""
    rows = [json.loads(line) | {"category": "a"} for line in tiny_prompts.read_text().splitlines()]
    rows[3:3] = [{"prompt_id": "empty", "prompt": ""}, {"prompt_id": "null", "prompt": None}]
    rows[9:9] = [{"prompt_id": "number", "prompt": 5}, {"prompt_id": "long", "prompt": "Why? " * 2000}]
    path = tmp_path_factory.mktemp("mixed") / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path, mixed_prompts: Path) -> Path:
    """The output of one run over these prompts."""
    output = tmp_path_factory.mktemp("finished") / "responses"
    return generate.main(config_for(tiny_policy, mixed_prompts, output, token_logps=True))


def test_every_usable_prompt_has_n_responses(finished: Path, tiny_prompts: Path, tiny_policy: Path) -> None:
    table = read(finished)
    prompts = [json.loads(line) for line in tiny_prompts.read_text().splitlines()]
    assert table.column("prompt_id").to_pylist() == [row["prompt_id"] for row in prompts]
    assert table.column("prompt").to_pylist() == [row["prompt"] for row in prompts]
    assert table.column("category").to_pylist() == ["a"] * 24
    chat = Chat.load(tiny_policy)
    for row in table.to_pylist():
        for i in range(N):
            ids, reason = row[f"response_{i}_tokens"], row[f"response_{i}_finish_reason"]
            assert reason == ("stop" if ids[-1] in chat.end_ids else "length")
            assert len(ids) == 24 or reason == "stop"
            kept = ids[:-1] if reason == "stop" else ids
            assert row[f"response_{i}"] == chat.tokenizer.decode(kept, skip_special_tokens=True)
    assert [path.name for path in sorted((finished / "data").iterdir())] == [
        f"train-0000{shard}-of-00003.parquet" for shard in range(3)
    ]


def test_token_logps_are_the_policys_after_one_bos(finished: Path, tiny_policy: Path) -> None:
    """Reference: transformers on BOS, the template's turn and the response. A second BOS would show here."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_policy).eval()
    chat = Chat.load(tiny_policy)
    for row in read(finished).to_pylist()[::7]:
        text = f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{row['prompt']}<|eot_id|>"
        text += "<|start_header_id|>assistant<|end_header_id|>\n\n"
        prompt = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = row["response_1_tokens"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        logps = torch.log_softmax(logits, dim=1)[range(len(ids)), ids]
        assert row["response_1_token_logps"] == pytest.approx(logps.tolist(), abs=1e-5)


def test_prompts_set_aside_are_listed_with_their_reasons(finished: Path) -> None:
    skipped = [json.loads(line) for line in (finished / "skipped.jsonl").read_text().splitlines()]
    assert {item["prompt_id"]: (item["row"], item["reason"]) for item in skipped} == {
        "empty": (3, "empty"),
        "null": (4, "empty"),
        "number": (9, "neither text nor messages"),
        "long": (10, "no room for a response in the window"),
    }
    made = json.loads((finished / "provenance.json").read_text())
    assert (made["rows_in"], made["rows_out"]) == (28, 24)
    assert made["dropped"] == {
        "empty": 2,
        "neither text nor messages": 1,
        "no room for a response in the window": 1,
    }


def test_provenance_says_what_made_the_responses(finished: Path, tiny_policy: Path) -> None:
    made = json.loads((finished / "provenance.json").read_text())
    fingerprint = made["inputs"]["model"]["fingerprint"]
    assert made["sampling"] == {
        "temperature": 0.8,
        "top_p": 0.9,
        "max_tokens": 24,
        "stop_ids": list(Chat.load(tiny_policy).end_ids),
        "token_logps": True,
        "seed": 0,
        "seed_step": 50,
        "model": str(tiny_policy),
        "model_fingerprint": fingerprint,
    }
    assert (made["engine"]["name"], made["engine"]["dtype"]) == ("transformers", "float32")
    assert made["chat"] == Chat.load(tiny_policy).describe()
    lengths = [len(ids) for i in range(N) for ids in read(finished).column(f"response_{i}_tokens").to_pylist()]
    assert made["responses"]["total"] == sum(lengths) and made["responses"]["longest"] == max(lengths)
    assert not [path.name for path in finished.rglob("*") if "journal" in path.name or path.name == "identity.json"]


def test_datasets_opens_the_output(finished: Path) -> None:
    import datasets

    loaded = datasets.load_dataset(str(finished), split="train")
    assert loaded.num_rows == 24
    assert loaded.column_names[:5] == ["prompt_id", "prompt", "category", "response_0", "response_0_tokens"]


def test_the_same_command_again_does_nothing(
    finished: Path, tiny_policy: Path, mixed_prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    how = {"rows_per_shard": 7, "engine": EngineOptions(max_num_seqs=2)}  # decide nothing about the rows
    generate.main(config_for(tiny_policy, mixed_prompts, finished, token_logps=True, **how))
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    assert "done before" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")
def test_a_finished_output_needs_no_free_gpu_and_one_to_be_made_does(
    tmp_path: Path,
    tiny_policy: Path,
    tiny_prompts: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The one GPU that a stand-in nvidia-smi shows is in use, by train as it may be."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 0, GPU-aaaa, NVIDIA H100, 580.65, 900, 81559\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    config = dataclasses.replace(config_for(tiny_policy, tiny_prompts, tmp_path / "out"), backend="vllm")
    with pytest.raises(BadUse, match=r"GPU 0 has 0\.9 of 79\.6 GiB free and 90% of it are asked for"):
        generate.main(config)
    with storage.open_output(tmp_path / "out", generate.make_plan(config).identity, overwrite=False) as output:
        output.write_shard("train", 0, pa.table({"prompt": ["p"]}))
        output.publish({}, "")
    generate.main(config)
    assert "done before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"temperature": 0.7}, "what.temperature was 0.8, now 0.7"),
        ({"seed": 1}, "what.seed was 0, now 1"),
        ({"system_prompt": "Be brief."}, 'chat.system_prompt was null, now "Be brief."'),
        ({"engine": EngineOptions(dtype="bfloat16")}, 'what.engine.dtype was "float32", now "bfloat16"'),
    ],
)
def test_another_run_is_refused_naming_what_differs(
    finished: Path, tiny_policy: Path, mixed_prompts: Path, change: dict[str, Any], named: str
) -> None:
    config = config_for(tiny_policy, mixed_prompts, finished, token_logps=True, **change)
    with pytest.raises(BadUse) as error:
        generate.main(config)
    assert "holds the output of another run" in str(error.value)
    assert named in str(error.value) and "--overwrite" in str(error.value)


def test_a_longer_maximum_that_no_response_reached_still_is_another_run(
    tmp_path: Path, tiny_policy: Path, tiny_prompts: Path
) -> None:
    """The window asked for decides where responses end: a run in a narrower one must not be taken for this one."""
    config = config_for(tiny_policy, tiny_prompts, tmp_path / "out", end_idx=2)
    generate.main(config)
    narrow = dataclasses.replace(config, engine=EngineOptions(max_model_len=30))
    with pytest.raises(BadUse, match=r"what\.window was \d+, now 30"):
        generate.main(narrow)


def test_a_slice_has_the_rows_of_the_whole(
    finished: Path, tmp_path: Path, tiny_policy: Path, tiny_prompts: Path
) -> None:
    """A response depends on its prompt and its seed alone, so rows 5 to 9 are the same bits in a run of their own."""
    output = generate.main(config_for(tiny_policy, tiny_prompts, tmp_path / "out", start_idx=5, end_idx=9))
    table = read(output)
    assert table.equals(read(finished).slice(5, 4).select(table.column_names))


def test_messages_are_answered_as_text_is(
    finished: Path, tmp_path: Path, tiny_policy: Path, tiny_prompts: Path
) -> None:
    rows = [json.loads(line) for line in tiny_prompts.read_text().splitlines()[:4]]
    path = tmp_path / "messages.jsonl"
    path.write_text(
        "".join(json.dumps({**row, "prompt": [{"role": "user", "content": row["prompt"]}]}) + "\n" for row in rows)
    )
    table = read(generate.main(config_for(tiny_policy, path, tmp_path / "out")))
    assert table.column("prompt")[0].as_py() == [{"role": "user", "content": rows[0]["prompt"]}]
    for i in range(N):
        expected = read(finished).column(f"response_{i}_tokens").slice(0, 4).to_pylist()
        assert table.column(f"response_{i}_tokens").to_pylist() == expected


def test_check_prints_the_plan_and_writes_nothing(
    tmp_path: Path, tiny_policy: Path, mixed_prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check = dataclasses.replace(generate.RunFlags(), check=True)
    generate.main(config_for(tiny_policy, mixed_prompts, tmp_path / "out", run=check))
    shown = capsys.readouterr().out
    assert "28 of 28 rows, 24 can be answered" in shown
    assert "set aside  2: empty" in shown
    assert "72, 3 to each prompt, temperature 0.8, top-p 0.9, seeds 0 to 100 by 50" in shown
    assert f"output     {tmp_path}/out: absent" in shown
    assert list(tmp_path.iterdir()) == []


def test_check_plans_what_an_earlier_stage_will_write(
    tmp_path: Path, tiny_prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = str(tmp_path / "policy")
    check = generate.RunFlags(check=True, pending=(f"{policy}=0",))
    generate.main(config_for(Path(policy), tiny_prompts, tmp_path / "out", run=check, num_prompts=10))
    assert "30, 3 to each prompt" in capsys.readouterr().out


@pytest.fixture(scope="module")
def answers(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_policy: Path,
    tiny_prompts: Path,
    command_environment: dict[str, str],
) -> dict[str, tuple[int, str]]:
    """{what is wrong: (exit code, stderr)} of the command, run again and again in one process to save imports."""
    folder = tmp_path_factory.mktemp("refusals")
    silent = folder / "no_template"
    shutil.copytree(tiny_policy, silent)
    (silent / "chat_template.jinja").unlink()
    (folder / "empty.jsonl").write_text("")
    (folder / "blank.jsonl").write_text('{"prompt": ""}\n{"prompt": " "}\n')
    (folder / "theirs").mkdir()
    (folder / "theirs" / "notes.txt").write_text("mine")
    common = {
        "--model": tiny_policy,
        "--prompts": tiny_prompts,
        "--output_repo": folder / "out",
        "--backend": "transformers",
    }
    changes: dict[str, dict[str, Any]] = {
        "model": {"--model": "./nowhere"},
        "template": {"--model": silent},
        "empty": {"--prompts": folder / "empty.jsonl"},
        "blank": {"--prompts": folder / "blank.jsonl"},
        "range": {"--start_idx": 9, "--end_idx": 4},
        "folder": {"--output_repo": folder / "theirs"},
        "greedy": {"--temperature": 0},
        "window": {"--engine.max_model_len": 99999},
        "parallel": {"--world_size": 2},
    }
    lines = {
        name: [str(part) for pair in {**common, **change}.items() for part in pair] for name, change in changes.items()
    }
    script = f"""
import contextlib, io, json, runpy, sys
answers = {{}}
for name, line in {lines!r}.items():
    sys.argv = ["generate", *line]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            runpy.run_module("rlhf_pipeline.generate", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            answers[name] = (end.code, said.getvalue())
print(json.dumps(answers))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=command_environment, cwd=folder, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert not (folder / "out").exists()
    found: dict[str, tuple[int, str]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ("model", "--model ./nowhere: no such folder."),
        ("template", "has no chat template: pass --chat_template FILE"),
        ("empty", "has no rows in split train"),
        ("blank", "none of the 2 prompts of"),
        ("range", "--end_idx 4 leaves no rows after --start_idx 9"),
        ("folder", "exists and is not an output of rlhf_pipeline: name another output folder."),
        ("greedy", "--temperature 0 is greedy: all 5 responses to a prompt would be the same"),
        ("window", "--engine.max_model_len 99999 is longer than the window of --model"),
        ("parallel", "--tensor_parallel_size 2 needs --backend vllm"),
    ],
)
def test_bad_use_ends_with_2_and_one_sentence(answers: dict[str, tuple[int, str]], wrong: str, sentence: str) -> None:
    code, said = answers[wrong]
    assert code == 2
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert sentence in line
    assert "Traceback" not in said


@pytest.mark.slow
def test_prompts_come_from_a_private_hub_dataset_and_responses_go_to_another(
    finished: Path, tmp_path: Path, tiny_policy: Path, tiny_prompts: Path, run_command: Callable[..., Any]
) -> None:
    """Made elsewhere, the rows in split test. Rows 2 to 5 are those of the file's run."""
    rows = [json.loads(line) for line in tiny_prompts.read_text().splitlines()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")
    hub = Hub()
    front = "configs:\n- config_name: default\n  data_files:\n  - split: test\n    path: test.parquet"
    files = {"test.parquet": (tmp_path / "test.parquet").read_bytes(), "README.md": f"---\n{front}\n---\n".encode()}
    hub.repos["dataset", "owner/prompts"] = {"private": True, "files": files, "sha": "1" * 40}
    online = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    online |= {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
    flags = ["--prompts", "owner/prompts", "--split", "test", "--start_idx", 2, "--end_idx", 6, "--model", tiny_policy]
    flags += ["--pairs", N, "--maxlen", 24, "--backend", "transformers", "--output_repo", "owner/responses"]
    done = run_command("generate", *flags, env=online, cwd=tmp_path)
    hub.close()
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    repo = hub.repos["dataset", "owner/responses"]
    assert repo["private"] and {"README.md", "provenance.json"} <= set(repo["files"])
    made = json.loads(repo["files"]["provenance.json"])
    assert made["inputs"]["prompts"]["fingerprint"] == "1" * 40
    [data] = [content for name, content in repo["files"].items() if name.endswith(".parquet")]
    table = pq.read_table(io.BytesIO(data))
    assert table.equals(read(finished).slice(2, 4).select(table.column_names))


# Killed and run again


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def start(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)


def end_when(process: subprocess.Popen[bytes], reached: Callable[[], bool], number: signal.Signals, log: Path) -> int:
    """Send the signal to the command's processes as soon as `reached`; returns how it ended."""
    deadline = time.monotonic() + 200
    while not reached():
        assert process.poll() is None, f"ended too early:\n{log.read_text()[-2000:]}"
        assert time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.002)
    if number == signal.SIGKILL:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    return process.wait(timeout=60)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "backend",
    [
        "transformers",
        pytest.param(
            "vllm",
            marks=pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here"),
        ),
    ],
)
def test_a_run_killed_again_and_again_has_the_rows_of_an_uninterrupted_one(
    backend: str, tmp_path: Path, tiny_policy: Path, tiny_prompts: Path, command_environment: dict[str, str]
) -> None:
    """Killed before the engine is there, in the first shard (its journal then loses the end of its last line),
    when a shard is whole, ended by Ctrl-C, by SIGTERM, and killed in the last shard."""
    command = [sys.executable, "-m", "rlhf_pipeline.generate", "--model", str(tiny_policy), "--prompts"]
    command += [str(tiny_prompts), "--backend", backend, "--maxlen", "48", "--rows_per_shard", "6"]
    command += ["--engine.max_num_seqs", "4", "--token_logps", "--output_repo"]
    partial, log = tmp_path / ".killed.partial", tmp_path / "log"
    journals = [partial / "journal" / f"{shard:05d}.jsonl" for shard in range(4)]
    shards = partial / "data"

    def killed(reached: Callable[[], bool], number: signal.Signals = signal.SIGKILL) -> int:
        return end_when(start([*command, str(tmp_path / "killed")], command_environment, log), reached, number, log)

    def finished() -> int:
        """Responses that are safe: in journals, or in written shards of 6 x 5."""
        return sum(count_lines(path) for path in journals) + 30 * len(list(shards.glob("train-*.parquet")))

    killed(lambda: (partial / "identity.json").exists())
    killed(lambda: finished() >= 7)
    for path in journals:
        if count_lines(path):
            path.write_bytes(path.read_bytes()[:-5])
    killed(lambda: any(shards.glob("train-*.parquet")))
    safe = finished()
    assert killed(lambda: finished() >= safe + 5, signal.SIGINT) == 130
    safe = finished()
    assert killed(lambda: finished() >= safe + 5, signal.SIGTERM) == 143
    killed(lambda: finished() >= 112)
    assert not (tmp_path / "killed").exists()
    for name in ("killed", "uninterrupted"):
        done = subprocess.run([*command, str(tmp_path / name)], env=command_environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "run the same command again to go on" in log.read_text()
    assert read(tmp_path / "killed").equals(read(tmp_path / "uninterrupted"))
    engines = json.loads((tmp_path / "killed" / "provenance.json").read_text())
    assert engines["engine"]["name"] == backend and engines["earlier_engines"] == []


AT_THE_MOMENT = """
import os, signal, sys
from rlhf_pipeline import generate
from rlhf_pipeline.core import files
from rlhf_pipeline.core.command import entry
from rlhf_pipeline.core.storage import Output

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def die_in_shard(number):
    import pyarrow.parquet as pq
    write, written = pq.write_table, []
    def write_table(table, path, **options):
        written.append(path)
        if len(written) <= number:
            return write(table, path, **options)
        path.write_bytes(b"PAR1 and no more")
        die()
    pq.write_table = write_table

moment = sys.argv.pop(1)
if moment == "engine start":
    generate.start_sampler = die
elif moment == "first shard":
    die_in_shard(0)
elif moment == "last shard":
    die_in_shard(1)
elif moment == "summary":
    generate.summarize = die
elif moment == "card":
    generate.card = die
elif moment == "card is there":
    Output._publish = lambda output, made, card: (files.write_atomic(output.folder / "README.md", card), die())
sys.argv[0] = generate.__file__
entry(generate.main, generate.Config)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_each_step_a_run_still_ends_as_an_uninterrupted_one(
    finished: Path, tmp_path: Path, tiny_policy: Path, mixed_prompts: Path, command_environment: dict[str, str]
) -> None:
    """SIGKILL by the process itself, so that the moment is exact; "last shard": the first that this process writes is
    whole, the next is not."""
    flags = ["--model", tiny_policy, "--prompts", mixed_prompts, "--backend", "transformers", "--token_logps"]
    flags += ["--pairs", N, "--maxlen", 24, "--rows_per_shard", 10, "--output_repo", tmp_path / "out"]
    for moment in ("engine start", "first shard", "last shard", "summary", "card", "card is there"):
        command = [sys.executable, "-c", AT_THE_MOMENT, moment, *map(str, flags)]
        killed = subprocess.run(command, env=command_environment, capture_output=True, text=True)
        assert killed.returncode == -signal.SIGKILL, f"{moment}: {killed.stderr}"
        assert not (tmp_path / "out").exists()
        with pytest.raises(BadUse, match="is being written"):
            open_source(str(tmp_path / "out"), flag="--input_repo")
    output = generate.main(config_for(tiny_policy, mixed_prompts, tmp_path / "out", token_logps=True))
    assert read(output).equals(read(finished))
    assert (output / "skipped.jsonl").read_text() == (finished / "skipped.jsonl").read_text()
    assert sorted(path.name for path in output.rglob("*")) == sorted(path.name for path in finished.rglob("*"))


# Several processes

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")
CORES = len(os.sched_getaffinity(0))


def needs_cores(count: int) -> pytest.MarkDecorator:
    return pytest.mark.skipif(count > CORES, reason=f"{count} groups of CPU cores need as many cores")


@pytest.fixture(scope="module")
def of_one_worker(
    tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path, tiny_prompts: Path, run_command: Callable[..., Any]
) -> Path:
    output = tmp_path_factory.mktemp("of_one_worker") / "responses"
    done = run_command("generate", *vllm_flags(tiny_policy, tiny_prompts), "--output_repo", output)
    assert done.returncode == 0, done.stderr
    return output


def vllm_flags(policy: Path, prompts: Path) -> list[str]:
    flags = {"--model": policy, "--prompts": prompts, "--maxlen": 48, "--pairs": 20, "--engine.max_num_seqs": 4}
    return [str(part) for pair in flags.items() for part in pair]


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_vllm
@pytest.mark.parametrize(
    ("tensor_parallel", "data_parallel"),
    [
        pytest.param(2, 1, marks=needs_cores(2)),
        pytest.param(1, 2, marks=needs_cores(2)),
        pytest.param(2, 2, marks=needs_cores(4)),
    ],
)
def test_workers_and_engines_do_not_change_rows(
    tensor_parallel: int,
    data_parallel: int,
    of_one_worker: Path,
    tmp_path: Path,
    tiny_policy: Path,
    tiny_prompts: Path,
    run_command: Callable[..., Any],
) -> None:
    """Float32 on CPU. Each engine has requests waiting until the last prompts are out."""
    sizes = ("--world_size", tensor_parallel, "--data_parallel_size", data_parallel)
    flags = vllm_flags(tiny_policy, tiny_prompts)
    done = run_command("generate", *flags, *sizes, "--output_repo", tmp_path / "out", timeout=500)
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "out").equals(read(of_one_worker))
    engine = json.loads((tmp_path / "out" / "provenance.json").read_text())["engine"]
    assert (engine["tensor_parallel_size"], engine.get("data_parallel_size", 1)) == (tensor_parallel, data_parallel)
    [waited] = re.findall(r"at least (\d+) requests waited at any time.* \(max_num_seqs 4\)", done.stdout)
    assert int(waited) >= 4
    assert done.stdout.count("generate: 480 of 480 responses") == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_vllm
@needs_cores(2)
def test_engines_that_die_are_reported_and_leave_nothing_behind(
    of_one_worker: Path, tmp_path: Path, tiny_policy: Path, tiny_prompts: Path, command_environment: dict[str, str]
) -> None:
    """An engine is killed, then the command, then Ctrl-C ends it; one engine alone finishes their work."""
    command = [sys.executable, "-m", "rlhf_pipeline.generate", *vllm_flags(tiny_policy, tiny_prompts)]
    command += ["--output_repo", str(tmp_path / "out")]
    log, journal = tmp_path / "log", tmp_path / ".out.partial" / "journal" / "00000.jsonl"

    def sampling(more: int) -> tuple[subprocess.Popen[bytes], list[int]]:
        """The command with two engines, once it has written `more` responses, and its engines' processes."""
        wanted = count_lines(journal) + more
        process = start([*command, "--data_parallel_size", "2"], command_environment, log)
        wait_until(lambda: process.poll() is not None or count_lines(journal) >= wanted, log)
        engines = [pid for pid in children_of(process.pid) if len(os.sched_getaffinity(pid)) < CORES]
        assert len(engines) == 2, log.read_text()
        return process, engines

    process, engines = sampling(20)
    os.kill(engines[1], signal.SIGKILL)
    assert process.wait(timeout=20) == 1
    assert f"error: engine 1 (process {engines[1]}) was killed by SIGKILL; what is finished is kept" in log.read_text()
    wait_until(lambda: not any(map(is_running, engines)), log)

    process, engines = sampling(20)
    process.kill()  # not its group
    wait_until(lambda: not any(map(is_running, engines)), log)

    process, engines = sampling(20)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(timeout=30) == 130
    assert "run the same command again to go on" in log.read_text().splitlines()[-1]
    assert not any(map(is_running, engines))

    assert count_lines(journal) >= 60
    done = subprocess.run(command, env=command_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "out").equals(read(of_one_worker))
    made = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert [engine.get("data_parallel_size") for engine in (*made["earlier_engines"], made["engine"])] == [2, None]


@pytest.mark.slow
@needs_vllm
@needs_cores(2)
def test_an_engine_that_cannot_start_is_reported_with_its_last_words(
    tmp_path: Path, tiny_policy: Path, tiny_prompts: Path, run_command: Callable[..., Any]
) -> None:
    flags = [*vllm_flags(tiny_policy, tiny_prompts), "--data_parallel_size", 2, "--engine.quantization", "no_such"]
    done = run_command("generate", *flags, "--output_repo", tmp_path / "out")
    assert done.returncode == 1
    assert "error: engine 0 (process " in done.stderr
    assert "vLLM can't start on" in done.stderr and "no_such" in done.stderr
    assert "Traceback" not in done.stderr


def wait_until(reached: Callable[[], bool], log: Path, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.002)


def children_of(pid: int) -> list[int]:
    """In the order in which they were started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    """Whether there is such a process that is more than a zombie which no one has collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
