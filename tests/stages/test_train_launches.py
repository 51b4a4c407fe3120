"""train in every launch mode, killed, stopped and in bf16: many processes, so these tests are slow."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from conftest import PROMPTS, REPO
from rlhf_pipeline.core.progress import read_metrics
from tiny_pairs import write_pairs

pytestmark = pytest.mark.slow

ZERO_3 = ("--config_file", "accelerate_cfgs/deepspeed_config_stage_3.yaml", "--num_processes", "2")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--mixed_precision", "no")


@pytest.fixture(scope="module")
def pairs(tiny_policy, tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs", tiny_policy, PROMPTS)


@pytest.fixture(scope="module")
def arguments(pairs, tiny_policy) -> list[str]:
    chosen = (
        "--input_repo",
        pairs,
        "--base_model",
        tiny_policy,
        "--batch_size",
        4,
        "--lr",
        1e-3,
        "--rebel.target_gap",
        3,
    )
    return ["-m", "rlhf_pipeline.train", *map(str, chosen), "--save_every", "1"]


@pytest.fixture(scope="module")
def start(command_environment):
    """`start(command, **env)`: the process of a launch, in its own group."""

    def begin(command: list[str], **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            env={**command_environment, **env},
            cwd=REPO,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    return begin


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(
        timeout=600
    )  # minutes, where DeepSpeed compiles its CPU optimizer for the first time
    assert process.returncode == 0, output[-4000:]
    return output


def weights(folder: Path, name: str = "model") -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / f"{name}.safetensors")


@pytest.fixture(scope="module")
def bf16_policy(tiny_policy, tmp_path_factory) -> Path:
    """The tiny policy stored in bf16."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("bf16") / "policy"
    shutil.copytree(tiny_policy, folder, ignore=shutil.ignore_patterns("fingerprint.json"))
    halved = {name: value.bfloat16() for name, value in weights(tiny_policy).items()}
    save_file(halved, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def uninterrupted(start, arguments, tmp_path_factory) -> Path:
    """The policy of a run under ZeRO-3 on two processes that nobody disturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "policy"
    finish(start([*ACCELERATE, *ZERO_3, *arguments, "--output_dir", str(folder)]))
    return folder


def test_killed_at_random_moments_it_ends_with_the_same_bits(start, arguments, uninterrupted, tmp_path):
    """SIGKILL to the launcher three times, whatever its ranks are doing, then run to the end."""
    moments = random.Random(5)
    folder = tmp_path / "policy"
    command = [*ACCELERATE, *ZERO_3, *arguments, "--output_dir", str(folder)]
    for kill in range(3):
        process = start(command)
        wait_for(folder / "checkpoints" / f"update-{kill + 1}" / "state.json", process)
        time.sleep(moments.uniform(0.0, 0.4))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    finish(start(command))
    assert [line["loss"] for line in read_metrics(folder / "metrics.jsonl")] == [
        line["loss"] for line in read_metrics(uninterrupted / "metrics.jsonl")
    ]
    for name, value in weights(uninterrupted).items():
        assert torch.equal(value, weights(folder)[name]), name


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Until `path` or a later checkpoint exists, or the process has ended."""
    wanted = int(path.parent.name.removeprefix("update-"))
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        found = [int(p.parent.name.removeprefix("update-")) for p in path.parent.parent.glob("update-*/state.json")]
        if max(found, default=0) >= wanted:
            return
        time.sleep(0.02)


def test_ranks_end_with_their_launcher(start, arguments, tmp_path):
    """SIGKILL to the launcher alone: its ranks must not go on writing."""
    folder = tmp_path / "policy"
    process = start([*ACCELERATE, *ZERO_3, *arguments, "--output_dir", str(folder), "--epochs", "500"])
    wait_for(folder / "checkpoints" / "update-1" / "state.json", process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    ranks = [int(pid) for pid in children]
    assert len(ranks) == 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(alive(pid) for pid in ranks):
        time.sleep(0.1)
    left = [pid for pid in ranks if alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_sigterm_saves_the_update_under_way_and_the_next_run_goes_on(start, arguments, tmp_path):
    folder = tmp_path / "policy"
    command = [sys.executable, *arguments, "--output_dir", str(folder), "--save_every", "0", "--epochs", "40"]
    process = start(command)
    metrics = folder / "metrics.jsonl"
    while process.poll() is None and len(read_metrics(metrics)) < 3:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143, output[-3000:]
    done = len(read_metrics(metrics))
    assert f"terminated after update {done}, saved" in output
    assert f"resumed    after update {done}" in finish(start(command))


OTHER_LAUNCHES = pytest.mark.parametrize(
    ("launcher", "env"),
    [
        ([*ACCELERATE, "--config_file", "accelerate_cfgs/deepspeed_config_stage_2.yaml", "--num_processes", "2"], {}),
        (
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
            {"ACCELERATE_USE_CPU": "true"},
        ),
        ([sys.executable], {}),
        pytest.param(
            [*ACCELERATE, *ZERO_3, "--config_file", "accelerate_cfgs/deepspeed_config_stage_3_offload.yaml"],
            {},
            marks=pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed compiles its CPU optimizer"),
        ),
    ],
    ids=["zero 2", "ddp", "one process", "cpu offload"],
)


@OTHER_LAUNCHES
def test_launch_modes_agree(start, arguments, uninterrupted, launcher, env, tmp_path):
    """Losses, gradient norms and held-out losses of ZeRO-3 on two processes to 1e-4 relative."""
    folder = tmp_path / "policy"
    finish(start([*launcher, *arguments, "--output_dir", str(folder)], **env))
    ours, theirs = (read_metrics(path / "metrics.jsonl") for path in (folder, uninterrupted))
    for name in ("loss", "grad_norm", "test_loss"):
        found = [line[name] for line in ours if name in line]
        assert found == pytest.approx([line[name] for line in theirs if name in line], rel=1e-4), name


def test_two_launches_on_two_nodes_are_one(start, arguments, uninterrupted, tmp_path):
    """Each of two launchers starts one of two processes, as on two nodes: the losses are those of a single launcher."""
    folder = tmp_path / "policy"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    nodes = [*ACCELERATE[:3], *ZERO_3, "--mixed_precision", "no", "--main_process_port", port]
    nodes += ["--main_process_ip", "127.0.0.1", "--num_machines", "2", "--machine_rank"]
    processes = [start([*nodes, str(rank), *arguments, "--output_dir", str(folder)]) for rank in range(2)]
    for process in processes:
        finish(process)
    ours, theirs = (read_metrics(path / "metrics.jsonl") for path in (folder, uninterrupted))
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-6)


@pytest.fixture(scope="module")
def with_lora(arguments) -> list[str]:
    return [*arguments, "--lora.r", "4", "--lora.alpha", "8", "--lr", "3e-3"]


@pytest.fixture(scope="module")
def uninterrupted_lora(start, with_lora, tmp_path_factory) -> Path:
    """The policy of a run with LoRA under ZeRO-3 on two processes."""
    folder = tmp_path_factory.mktemp("uninterrupted_lora") / "policy"
    finish(start([*ACCELERATE, *ZERO_3, *with_lora, "--output_dir", str(folder)]))
    return folder


@OTHER_LAUNCHES
def test_launch_modes_agree_with_lora(start, with_lora, uninterrupted_lora, launcher, env, tmp_path):
    """Losses and gradient norms of ZeRO-3 to 1e-4 relative, and the merged weights that each launch gathers."""
    folder = tmp_path / "policy"
    finish(start([*launcher, *with_lora, "--output_dir", str(folder)], **env))
    ours, theirs = (read_metrics(path / "metrics.jsonl") for path in (folder, uninterrupted_lora))
    for name in ("loss", "grad_norm", "test_loss"):
        found = [line[name] for line in ours if name in line]
        assert found == pytest.approx([line[name] for line in theirs if name in line], rel=1e-4), name
    for name, value in weights(uninterrupted_lora).items():
        assert (value - weights(folder)[name]).abs().mean() < 1e-5, name


def test_lora_killed_under_zero_3_ends_with_the_same_bits(start, with_lora, uninterrupted_lora, tmp_path):
    """From a checkpoint smaller than the model: neither frozen weights nor an optimizer state of theirs are there."""
    folder = tmp_path / "policy"
    command = [*ACCELERATE, *ZERO_3, *with_lora, "--output_dir", str(folder)]
    process = start(command)
    wait_for(folder / "checkpoints" / "update-2" / "state.json", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    saved = sum(path.stat().st_size for path in (folder / "checkpoints" / "update-2").rglob("*.pt"))
    assert saved < sum(4 * value.numel() for value in weights(uninterrupted_lora).values())
    assert "resumed    after update" in finish(start(command))
    assert [line["loss"] for line in read_metrics(folder / "metrics.jsonl")] == [
        line["loss"] for line in read_metrics(uninterrupted_lora / "metrics.jsonl")
    ]
    for name, value in weights(uninterrupted_lora).items():
        assert torch.equal(value, weights(folder)[name]), name


def test_another_world_size_than_the_checkpoints_is_refused(start, arguments, tmp_path):
    folder = tmp_path / "policy"
    options = [*arguments, "--output_dir", str(folder), "--epochs", "200"]
    process = start([*ACCELERATE, *ZERO_3, *options])
    wait_for(folder / "checkpoints" / "update-1" / "state.json", process)
    process.kill()
    process.communicate()
    alone = start([sys.executable, *options])
    output, _ = alone.communicate(timeout=120)
    assert alone.returncode == 2
    assert "was saved with name deepspeed, this launch has one process" in output


def test_unsynchronised_launches_are_refused(start, arguments, tmp_path):
    """--multi_gpu without GPUs starts two processes whose gradients accelerate does not share."""
    command = [*ACCELERATE, "--multi_gpu", "--num_processes", "2", *arguments, "--output_dir", str(tmp_path / "p")]
    process = start(command)
    output, _ = process.communicate(timeout=180)
    assert process.returncode != 0
    assert "would not share gradients" in output


def test_clipping_that_a_launch_config_sets_otherwise_is_refused(start, arguments, tmp_path):
    """DeepSpeed would clip at the config's 1.0, whatever --max_grad_norm says."""
    launch = [*ACCELERATE, *ZERO_3, "--gradient_clipping", "1.0", *arguments, "--output_dir", str(tmp_path / "p")]
    process = start(launch)
    output, _ = process.communicate(timeout=180)
    assert process.returncode != 0
    assert "the accelerate config sets gradient_clipping to 1.0, --max_grad_norm is None: remove it there" in output


def test_50_bf16_updates_at_the_tutorials_learning_rate_move_most_master_weights(start, tmp_path):
    """DeepSpeed steps float32 master weights: at lr 3e-7 more than half of them have moved after 50 updates, though
    hardly any of their bf16 copies could have."""
    script = REPO / "tests" / "stages" / "bf16_updates.py"
    launch = [*ACCELERATE[:-2], "--mixed_precision", "bf16", *ZERO_3]
    output = finish(start([*launch, str(script)]))
    moved, moved_in_bf16 = (float(x) for x in output.strip().splitlines()[-1].split())
    assert moved > 0.5
    assert moved_in_bf16 < 0.2


@pytest.mark.parametrize(
    ("launcher", "env"),
    [
        ([*ACCELERATE[:-2], "--mixed_precision", "bf16", *ZERO_3], {}),
        ([sys.executable], {"ACCELERATE_MIXED_PRECISION": "bf16"}),
    ],
    ids=["zero 3", "one process"],
)
def test_lora_over_a_bf16_model_learns_and_leaves_a_bf16_policy(
    start, with_lora, bf16_policy, launcher, env, tmp_path, uninterrupted_lora
):
    """Losses within bf16's rounding of those in float32, and adapters that one process keeps in float32."""
    folder = tmp_path / "policy"
    finish(start([*launcher, *with_lora, "--base_model", str(bf16_policy), "--output_dir", str(folder)], **env))
    ours, exact = (read_metrics(path / "metrics.jsonl") for path in (folder, uninterrupted_lora))
    gaps, expected = ([line["log_ratio_gap"] for line in lines] for lines in (ours, exact))
    assert gaps == pytest.approx(expected, abs=0.6)
    assert {value.dtype for value in weights(folder).values()} == {torch.bfloat16}
    kept = torch.float32 if env else torch.bfloat16
    assert {value.dtype for value in weights(folder / "adapter", "adapter_model").values()} == {kept}
