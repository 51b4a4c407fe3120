"""Command lines: the tutorial's, as printed, and what a command says and returns when it is used badly."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from rlhf_pipeline.core.command import parse

TUTORIAL: dict[str, dict[str, Any]] = {
    "generate --world_size 8 --output_repo OWNER/responses": {
        "tensor_parallel_size": 8,
        "output_repo": "OWNER/responses",
    },
    "generate --world_size 4 --output_repo O/r --model m/m --prompts p/p --maxlen 512 --pairs 3"
    " --start_idx 5 --end_idx 9": {
        "num_responses": 3,
        "maxlen": 512,
        "start_idx": 5,
        "end_idx": 9,
        "model": "m/m",
        "prompts": "p/p",
    },
    "rank --input_repo OWNER/responses": {"input_repo": "OWNER/responses"},
    "rank --input_repo O/r --reward_model RLHFlow/ArmoRM-Llama3-8B-v0.1 --pairs 5": {"num_responses": 5},
    "filter --input_repo OWNER/responses_armo": {"maxlen": 2048, "maxlen_prompt": 1024, "num_responses": 5},
    "filter --input_repo O/r --model m/m --maxlen 99 --maxlen_prompt 88 --pairs 4": {"maxlen": 99, "maxlen_prompt": 88},
    "train --task.input_repo OWNER/tokenized --output_dir models/new": {
        "input_repo": "OWNER/tokenized",
        "lr": 3e-7,
        "batch_size": 128,
    },
    "train --task.input_repo O/t --output_dir m --base_model b/b --lr 1e-6 --rebel.eta 1e4 --task.temperature 0.7"
    " --task.maxlen 2048 --task.maxlen_prompt 1024 --eps 1e-8 --weight_decay 1e-6 --optimizer adamw --warmup_ratio 0.1"
    " --gradient_accumulation_steps 16 --per_device_train_batch_size 1 --total_episodes 60000 --seed 555134": {
        "rebel.eta": 1e4,
        "temperature": 0.7,
        "total_episodes": 60000,
        "base_model": "b/b",
    },
}


def field(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize("dashes", [False, True], ids=["underscores", "dashes"])
@pytest.mark.parametrize("line", TUTORIAL)
def test_the_tutorials_command_lines_mean_what_they_say(line, dashes):
    args: list[str]
    command, *args = line.split()
    if dashes:
        args = [arg.replace("_", "-") if arg.startswith("--") else arg for arg in args]
    config: Any = parse(importlib.import_module(f"rlhf_pipeline.{command}").Config, args)
    assert {name: field(config, name) for name in TUTORIAL[line]} == TUTORIAL[line]


@pytest.mark.parametrize("spelling", ["--main-process-port", "--main_process_port"])
def test_accelerate_takes_the_tutorials_launch_line(spelling):
    from accelerate.commands.launch import launch_command_parser

    config = "accelerate_cfgs/deepspeed_config_stage_3.yaml"
    line = f"--config_file {config} {spelling} 29080 --num_processes 8 -m rlhf_pipeline.train --task.input_repo o/t"
    args = launch_command_parser().parse_args(line.split())
    assert (args.num_processes, args.main_process_port, args.training_script) == (8, 29080, "rlhf_pipeline.train")


def test_the_tutorials_defaults_are_ours():
    """generate.py, rank.py, filter_tokenize.py and rebel.py of REBEL's src/ultrafeedback_largebatch."""
    expected: dict[str, dict[str, Any]] = {
        "generate": {"temperature": 0.8, "top_p": 0.9, "maxlen": 2048, "num_responses": 5, "seed": 0, "end_idx": -1},
        "rank": {"num_responses": 5},
        "filter": {"maxlen": 2048, "maxlen_prompt": 1024, "test_size": 1000},
        "train": {
            "lr": 3e-7,
            "eps": 1e-8,
            "weight_decay": 1e-6,
            "warmup_ratio": 0.1,
            "batch_size": 128,
            "rebel.eta": 1e6,
            "seed": 555134,
            "epochs": 1.0,
            "max_grad_norm": None,
        },
    }
    places = ["--input_repo", "./in", "--output_repo", "./out", "--output_dir", "./out"]
    needed = {"generate": places[2:4], "rank": places[:2], "filter": places[:2], "train": [*places[:2], *places[4:]]}
    for command, fields in expected.items():
        config: Any = parse(importlib.import_module(f"rlhf_pipeline.{command}").Config, needed[command])
        assert {name: field(config, name) for name in fields} == fields, command


def test_bad_use_exits_with_2_and_one_sentence_and_debug_shows_where(run_command, tmp_path):
    result = run_command("rank", "--input_repo", "./nowhere", "--output_repo", tmp_path / "out")
    assert (result.returncode, result.stdout.count("Traceback")) == (2, 0)
    assert result.stderr.strip().splitlines()[-1].startswith("error: --input_repo ./nowhere does not exist")
    assert "Traceback" not in result.stderr
    debugged = run_command("rank", "--input_repo", "./nowhere", "--output_repo", tmp_path / "out", "--debug")
    assert debugged.returncode == 2 and "Traceback" in debugged.stderr


def test_an_unknown_flag_exits_with_2(run_command):
    result = run_command("filter", "--input_repo", "./x", "--no_such_flag", "1")
    assert result.returncode == 2 and "no_such_flag" in result.stdout + result.stderr
