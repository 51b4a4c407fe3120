"""scripts/tiny_losses.sh and its table: the commands parse, the intervals are right, and a small one runs."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import REPO
from rlhf_pipeline import iterate
from rlhf_pipeline.core.command import parse
from rlhf_pipeline.train import LOSSES, Config, check_values

SCRIPT = REPO / "scripts" / "tiny_losses.sh"


def run(folder: Path, environment: dict[str, str], **options: str) -> list[str]:
    """The lines that the script prints."""
    env = {**environment, "RUN": str(folder), **options}
    ended = subprocess.run([str(SCRIPT)], env=env, capture_output=True, text=True, timeout=700)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    return ended.stdout.splitlines()


def test_every_command_parses_and_every_loss_has_three_seeds(tmp_path):
    """With echo for Python the script prints its commands."""
    commands = [shlex.split(line) for line in run(tmp_path, dict(os.environ), PYTHON="echo")]
    trained = []
    for words in commands:
        if words[:2] == ["-m", "rlhf_pipeline.iterate"]:
            iterate.read_recipe(iterate.Config.from_words(words[2:]))
        elif words[0] == "-m":
            config = parse(importlib.import_module(words[1]).Config, words[2:])
            assert dataclasses.is_dataclass(config)
            if isinstance(config, Config):
                check_values(config)
                trained.append((config.loss, config.seed))
    assert trained == [(loss, seed) for loss in LOSSES for seed in (1, 2, 3)]
    assert [words[1] for words in commands if words[0] == "-m"].count("rlhf_pipeline.evaluate") == 1


def policy(name: str, gold: float, kl: float | None) -> dict[str, Any]:
    distance = None if kl is None else {"k1": {"value": kl}}
    return {"name": name, "rewards": {"gold": {"mean": gold}}, "kl": distance, "length": 10.0}


def test_a_loss_has_the_mean_of_its_seeds_and_students_interval(tmp_path):
    """1, 2 and 3: mean 2, standard deviation 1, half an interval 4.303 / sqrt(3) = 2.48."""
    runs = [policy(f"dpo_{seed}", float(seed), 0.5) for seed in (1, 2, 3)]
    results = {"policies": [policy("start", 0.25, None), *runs, policy("rebel_1", 4.0, 0.25)]}
    (tmp_path / "results.json").write_text(json.dumps({**results, "prompts": 6, "responses_per_prompt": 2}))
    command = [sys.executable, str(REPO / "scripts" / "losses_table.py"), str(tmp_path / "results.json")]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert out[0] == "| loss | seeds | gold | KL | length |"
    assert out[2] == "| start |  | 0.25 | 0 | 10.00 |"
    assert out[3] == "| dpo | 3 | 2.00 ± 2.48 | 0.50 ± 0.00 | 10.00 ± 0.00 |"
    assert out[4] == "| rebel | 1 | 4.00 | 0.25 | 10.00 |"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_small_comparison_runs_and_does_nothing_the_second_time(tmp_path, command_environment):
    small = {"PYTHON": sys.executable, "SIZE": "ci", "LOSSES": "rebel simpo", "SEEDS": "1"}
    first = run(tmp_path / "losses", command_environment, **small)
    table = [line.split(" | ")[0] for line in first if line.startswith("| ")]
    assert table == ["| loss", "| ---", "| start", "| rebel", "| simpo"]
    again = run(tmp_path / "losses", command_environment, **small)
    assert not [line for line in again if line.startswith("train:")] and again[-6:] == first[-6:]
