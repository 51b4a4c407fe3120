"""The checks before a model is loaded. A stand-in nvidia-smi shows the GPUs, a loopback server is the Hub."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_pipeline.core import hub, preflight
from rlhf_pipeline.core.command import BadUse

MIB = 2**20
TWO_GPUS = """\
0, GPU-aaaa1111, NVIDIA H100 80GB HBM3, 580.65.06, 81000, 81559
1, GPU-bbbb2222, NVIDIA H100 80GB HBM3, 580.65.06, 20000, 81559
"""
"""The second one is in use: 20,000 of 81,559 MiB free, 24.5 %."""


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with the GPUs of TWO_GPUS."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{TWO_GPUS}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def no_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", *preflight.LAUNCH_VARIABLES):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hub_of_alice() -> Iterator[str]:
    """A Hub on the loopback interface whose only user is alice, of the organisation acme."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"type": "user", "name": "alice", "orgs": [{"name": "acme"}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_gpus_are_read_in_bytes(two_gpus: None) -> None:
    first, second = preflight.visible_gpus()
    assert (first.index, first.name, first.driver) == (0, "NVIDIA H100 80GB HBM3", "580.65.06")
    assert (second.free_memory, second.total_memory) == (20000 * MIB, 81559 * MIB)


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        ("1", [1]),
        ("1,0", [1, 0]),
        ("GPU-bbbb", [1]),
        ("", []),
        ("0,7,1", [0]),  # CUDA stops at the first device it doesn't know
        ("-1", []),
    ],
)
def test_only_visible_gpus_count(
    two_gpus: None, monkeypatch: pytest.MonkeyPatch, visible: str, indices: list[int]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.index for gpu in preflight.visible_gpus()] == indices


def test_more_gpus_than_visible_are_refused(two_gpus: None) -> None:
    with pytest.raises(BadUse, match=r"--tensor_parallel_size 8 needs 8 GPUs and 2 are visible"):
        preflight.check_gpus(8, memory_share=0.1, flag="--tensor_parallel_size")


def test_a_gpu_in_use_is_refused_only_if_it_would_be_used(two_gpus: None) -> None:
    """20,000 MiB are 19.5 GiB, 81,559 MiB are 79.6 GiB."""
    preflight.check_gpus(1, memory_share=0.9, flag="--tensor_parallel_size")
    preflight.check_gpus(2, memory_share=0.2, flag="--tensor_parallel_size")
    with pytest.raises(BadUse, match=r"GPU 1 has 19\.5 of 79\.6 GiB free and 90%"):
        preflight.check_gpus(2, memory_share=0.9, flag="--tensor_parallel_size")


def test_a_machine_without_gpus_is_not_refused(no_gpus: None) -> None:
    preflight.check_gpus(2, memory_share=0.9, flag="--tensor_parallel_size")


def test_a_missing_package_is_refused_with_the_flag_that_needs_it() -> None:
    preflight.check_importable("json", flag="--backend vllm")
    with pytest.raises(
        BadUse, match=r"--wandb needs the package no_such_package.*run `pip install no_such_package`\.$"
    ):
        preflight.check_importable("no_such_package", flag="--wandb")


def test_a_missing_vllm_names_its_extra_and_the_other_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    with pytest.raises(BadUse, match=r"run `pip install -e \.\[vllm\]` or pass --backend transformers\.$"):
        preflight.check_importable("vllm", flag="--backend vllm", instead="pass --backend transformers")


def test_too_little_disk_is_refused_for_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    preflight.check_disk(tmp_path / "not" / "yet", 1, flag="--output_dir")
    with pytest.raises(BadUse, match=r"--output_dir .*/not/yet needs about 1,000,000\.0 TB and its disk has"):
        preflight.check_disk(tmp_path / "not" / "yet", 10**18, flag="--output_dir")


def test_an_output_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    preflight.check_writable(tmp_path / "new" / "folder", flag="--output_dir")
    with pytest.raises(BadUse, match=r"file/policy can't be written: .*/file is a file"):
        preflight.check_writable(tmp_path / "file" / "policy", flag="--output_dir")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(BadUse, match="no permission in"):
        preflight.check_writable(tmp_path / "policy", flag="--output_dir")


def test_a_world_size_without_a_launcher_is_refused(no_launcher: None, monkeypatch: pytest.MonkeyPatch) -> None:
    preflight.check_launch()
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(BadUse, match="WORLD_SIZE is 8 without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: start"):
        preflight.check_launch()


def test_a_launcher_s_world_size_is_accepted(no_launcher: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    for name in preflight.LAUNCH_VARIABLES:
        monkeypatch.setenv(name, "0")
    preflight.check_launch()


def test_without_a_token_a_hub_output_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(BadUse, match=r"--output_repo alice/out .*it accepted no token.*\./out"):
        hub.check_write("alice/out", flag="--output_repo")


def test_a_token_writes_to_its_own_accounts_and_is_never_shown(
    hub_of_alice: str, command_environment: dict[str, str]
) -> None:
    """In a process of its own: huggingface_hub reads its settings once, when it is imported."""
    script = """
from rlhf_pipeline.core import hub, preflight
from rlhf_pipeline.core.command import BadUse
for repo in ("alice/out", "acme/out", "bob/out"):
    try:
        print(repo, hub.check_write(repo, flag="--output_repo"))
    except BadUse as error:
        print(error)
print(*preflight.doctor(), sep="\\n")
"""
    environment = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub_of_alice, "HF_TOKEN": "hf_secret"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**command_environment, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "alice/out None\nacme/out None\n" in done.stdout
    assert "--output_repo bob/out is on the Hub, and the token may write to acme, alice" in done.stdout
    assert "Hub token     yes" in done.stdout
    assert "hf_secret" not in done.stdout + done.stderr


def test_doctor_names_gpus_versions_disk_and_token(two_gpus: None) -> None:
    report = "\n".join(preflight.doctor())
    for fact in (
        "driver        580.65.06",
        "GPU 1",
        "19.5 of 79.6 GiB free",
        "torch",
        "vllm",
        "disk",
        "Hub token",
    ):
        assert fact in report
