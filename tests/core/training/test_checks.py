"""What train, sft and reward refuse before anything is read."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from rlhf_pipeline import reward, sft, train
from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.training.checks import check_settings
from rlhf_pipeline.core.training.distributed import make_accelerator


@pytest.mark.parametrize("command", [train, sft, reward], ids=lambda module: module.__name__.rpartition(".")[2])
@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("batch_size", 0, "a number above 0"),
        ("lr", 0.0, "a number above 0"),
        ("epochs", -1.0, "a number above 0"),
        ("max_grad_norm", 0.0, "a number above 0, or None"),
        ("max_grad_norm", -1.0, "a number above 0, or None"),
        ("per_device_train_batch_size", 0, "1 or more"),
        ("micro_batch_tokens", 0, "1 or more"),
        ("keep_checkpoints", 0, "1 or more"),
        ("save_every", -1, "0 or more updates"),
    ],
)
def test_a_value_that_can_not_be_meant_is_refused_by_its_flag(command: Any, name: str, value: float, expected: str):
    places = {"input_repo": "./x", "output_dir": "./y"}
    with pytest.raises(BadUse, match=f"--{name} is {value}; expected {expected}"):
        check_settings(command.Config(**places, **{name: value}))


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed here")
def test_a_tracker_that_is_not_installed_is_said_before_anything_is_computed():
    with pytest.raises(BadUse, match="--wandb needs the package wandb, which is not installed"):
        check_settings(train.Config(input_repo="./x", output_dir="./y", wandb="project"))


def test_a_launch_in_fp16_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(BadUse, match="mixed precision is fp16; expected bf16 or no"):
        make_accelerator(max_grad_norm=None)
