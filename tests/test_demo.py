"""The demo's chain at the size of the tests: world, sft, reward model, two iterations (one under ZeRO-3 on two
processes), evaluation, report, and the check of what came out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import REPO

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def demo(folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["scripts/tiny.sh"],
        env={**environment, "RUN": str(folder), "SIZE": "ci", "PYTHON": sys.executable},
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=1400,
    )


def test_the_chain_makes_the_policy_better_by_its_reward_model_and_says_done_the_second_time(
    tmp_path, command_environment
):
    first = demo(tmp_path / "run", command_environment)
    assert first.returncode == 0, (first.stdout + first.stderr)[-5000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())["policies"]
    assert [policy["iteration"] for policy in summary] == [0, 1, 2]
    start, end = summary[0]["proxy"], summary[2]["proxy"]
    assert end["low"] - start["high"] > 0
    assert summary[2]["win_rate_proxy"]["low"] > 0.5 and summary[0]["win_rate_proxy"] is None
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<script" not in page and "http" not in page.replace("http://www.w3.org", "")

    weights = (tmp_path / "run" / "iteration_2" / "policy" / "model.safetensors").stat().st_mtime_ns
    second = demo(tmp_path / "run", command_environment)
    assert second.returncode == 0, (second.stdout + second.stderr)[-3000:]
    assert (tmp_path / "run" / "iteration_2" / "policy" / "model.safetensors").stat().st_mtime_ns == weights
