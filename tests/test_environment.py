"""Environments that resolve, launch files that accelerate accepts, and command lines of the house that parse.

The two resolutions ask the package index for metadata (seconds); where it can't be reached they skip, except in CI.
"""

from __future__ import annotations

import ast
import functools
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

REPO = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ("vllm_env.yml", "rebel_env.yml")
LAUNCH_FILES = sorted((REPO / "accelerate_cfgs").glob("*.yaml"))
STAGES = ["generate", "rank", "filter", "train"]
CLEAN = {"PATH": os.environ["PATH"]}
"""An environment without the variables that make, this one's caller perhaps, and the scripts would read."""
Pins = dict[str, str]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def conda_pins(file_name: str) -> Pins:
    """{package: version} of the pip section of a conda file, without the line that installs this project."""
    dependencies = yaml.safe_load((REPO / "envs" / file_name).read_text())["dependencies"]
    lines = next(item["pip"] for item in dependencies if isinstance(item, dict))
    assert lines[-1] == "-e .."
    return read_pins(lines[:-1])


def read_pins(lines: list[str]) -> Pins:
    """{package: version} of requirement lines, each of which must be a pin."""
    pins = {}
    for line in lines:
        name, separator, version = line.split(";")[0].strip().partition("==")
        assert separator, f"{line} is not pinned"
        pins[canonical(name)] = version
    return pins


def pins_file(name: str) -> list[str]:
    lines = (REPO / "envs" / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def project_dependencies(*extras: str) -> set[str]:
    """Names of what this project requires, with those of the extras."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    lines = sum((project["optional-dependencies"][extra] for extra in extras), project["dependencies"])
    return {canonical(re.split(r"[<>=!~ ]", line)[0]) for line in lines}


def third_party_imports(folder: Path) -> set[str]:
    """Top-level packages that the files below `folder` import anywhere, other than Python's and this project's."""
    found: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module).split(".")[0])
    return found - sys.stdlib_module_names - {"rlhf_pipeline"}


@functools.cache
def resolve(pins: tuple[str, ...]) -> Pins:
    """What pip would install for `pins` and this project on Linux with Python 3.11."""
    uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert uv, "uv is not installed: run `make install`"
    platform = ["--python-platform", "x86_64-unknown-linux-gnu", "--python-version", "3.11"]
    done = subprocess.run(
        [uv, "pip", "compile", "-", *platform, "--quiet", "--no-header", "--no-annotate"],
        input="\n".join([*pins, "-e ."]),
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    unreachable = "Failed to fetch" in done.stderr or "error sending request" in done.stderr
    if unreachable and "CI" not in os.environ:
        pytest.skip("the package index can't be reached")
    assert done.returncode == 0, done.stderr
    return read_pins([line for line in done.stdout.splitlines() if not line.startswith("-e ")])


def requirements(pins: Pins) -> tuple[str, ...]:
    return tuple(f"{name}=={version}" for name, version in sorted(pins.items()))


def test_everything_imported_is_required_by_the_project_or_an_extra() -> None:
    imported = {canonical({"yaml": "pyyaml"}.get(name, name)) for name in third_party_imports(REPO / "src")}
    assert imported - project_dependencies("vllm", "train", "flash", "track") == set()


@pytest.mark.parametrize("file_name", ENVIRONMENTS)
def test_a_conda_file_resolves_to_its_own_pins_with_this_project(file_name: str) -> None:
    pins = conda_pins(file_name)
    resolved = resolve(requirements(pins))
    assert {name: resolved[name] for name in pins} == pins


@pytest.mark.parametrize("file_name", ENVIRONMENTS)
def test_a_conda_file_pins_torch_and_every_dependency_of_this_project(file_name: str) -> None:
    assert project_dependencies() - conda_pins(file_name).keys() == set()


def test_no_conda_file_asks_for_flash_attn() -> None:
    """It is built last, where it can be; in a pip section its failure would take the environment with it."""
    assert [name for name in ENVIRONMENTS if "flash-attn" in conda_pins(name)] == []


def test_the_conda_files_agree_so_that_install_gpu_can_put_both_into_one_environment() -> None:
    vllm, rebel = (conda_pins(name) for name in ENVIRONMENTS)
    assert {name: (vllm[name], rebel[name]) for name in vllm.keys() & rebel if vllm[name] != rebel[name]} == {}
    both = resolve(requirements(vllm | rebel))
    assert both["vllm"] == vllm["vllm"]
    assert both["deepspeed"] == rebel["deepspeed"]


def test_the_cpu_lock_holds_every_cpu_pin() -> None:
    """Torch's local version (+cpu) stands in the pins and is cut off in the lock."""
    pins, lock = read_pins(pins_file("cpu.txt")), read_pins(pins_file("cpu-lock.txt"))
    assert {name: lock[name] for name in pins} == {name: version.removesuffix("+cpu") for name, version in pins.items()}
    assert project_dependencies() - pins.keys() == set()


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.stem)
def test_accelerate_accepts_a_launch_file_that_leaves_accumulation_and_clipping_to_train(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path)).to_dict()
    assert config["compute_environment"] == "LOCAL_MACHINE"
    assert config["num_machines"] == 1
    text = str(config)
    assert "gradient_accumulation" not in text
    assert "gradient_clipping" not in text


def test_the_tutorial_s_launch_is_zero_3_in_bf16_on_8_gpus() -> None:
    config = yaml.safe_load((REPO / "accelerate_cfgs" / "deepspeed_config_stage_3.yaml").read_text())
    assert (config["distributed_type"], config["mixed_precision"], config["num_processes"]) == ("DEEPSPEED", "bf16", 8)
    assert config["deepspeed_config"] == {
        "deepspeed_multinode_launcher": "standard",
        "offload_optimizer_device": "none",
        "offload_param_device": "none",
        "zero3_init_flag": True,
        "zero3_save_16bit_model": True,
        "zero_stage": 3,
    }


def make_dry(*arguments: str) -> list[list[str]]:
    """The commands that `make -n` shows, as lists of words."""
    done = subprocess.run(["make", "-n", *arguments], cwd=REPO, env=CLEAN, capture_output=True, text=True, check=True)
    return [shlex.split(line) for line in done.stdout.replace("\\\n", " ").splitlines()]


def stage_and_flags(words: list[str]) -> tuple[str, list[str]]:
    """("train", ["--base_model", ...]) of `... -m rlhf_pipeline.train --base_model ...`."""
    position = next(index for index, word in enumerate(words) if word.startswith("rlhf_pipeline."))
    return words[position].removeprefix("rlhf_pipeline."), words[position + 1 :]


def flag(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def check_that_stages_parse(commands: list[list[str]]) -> None:
    from rlhf_pipeline.core.command import parse

    for stage, flags in map(stage_and_flags, commands):
        parse(importlib.import_module(f"rlhf_pipeline.{stage}").Config, flags)


def test_make_iteration_shows_the_four_stages_handing_over_in_a_run_folder() -> None:
    commands = make_dry("iteration", "RUN=mine", "MODEL=./policy", "GPUS=2", "BACKEND=transformers")
    assert [stage_and_flags(words)[0] for words in commands] == STAGES
    generate, rank, filter_, train = commands
    assert flag(generate, "--model") == flag(filter_, "--model") == flag(train, "--base_model") == "./policy"
    assert flag(generate, "--backend") == "transformers"
    assert flag(generate, "--output_repo") == flag(rank, "--input_repo") == "runs/mine/iteration_1/responses"
    assert flag(rank, "--output_repo") == flag(filter_, "--input_repo") == "runs/mine/iteration_1/rewards"
    assert flag(filter_, "--output_repo") == flag(train, "--input_repo") == "runs/mine/iteration_1/pairs"
    assert flag(train, "--output_dir") == "runs/mine/iteration_1/policy"
    assert flag(train, "--num_processes") == flag(generate, "--tensor_parallel_size") == "2"
    check_that_stages_parse(commands)


def test_make_iteration_2_starts_from_iteration_1_s_policy_and_names_hub_repos() -> None:
    generate, rank, filter_, train = make_dry("iteration", "REPO=acme/armo", "ITERATION=2", "MODEL=./policy")
    start = "runs/armo/iteration_1/policy"
    assert flag(generate, "--model") == flag(filter_, "--model") == flag(train, "--base_model") == start
    assert flag(generate, "--output_repo") == "acme/armo-iter2-responses"
    assert flag(rank, "--output_repo") == "acme/armo-iter2-rewards"
    assert flag(train, "--input_repo") == "acme/armo-iter2-pairs"
    assert flag(train, "--output_dir") == "runs/armo/iteration_2/policy"


def test_make_s_defaults_are_the_tutorial_s() -> None:
    generate, rank, _, train = make_dry("iteration")
    assert flag(generate, "--model") == flag(train, "--base_model") == "meta-llama/Meta-Llama-3-8B-Instruct"
    assert flag(generate, "--prompts") == "allenai/ultrafeedback_binarized_cleaned_train"
    assert flag(rank, "--reward_model") == "RLHFlow/ArmoRM-Llama3-8B-v0.1"
    assert flag(train, "--num_processes") == "8"
    assert flag(train, "--config_file") == "accelerate_cfgs/deepspeed_config_stage_3.yaml"


def test_llama3_armo_runs_the_tutorial_s_four_commands(tmp_path: Path) -> None:
    """Run with a stand-in for Python that writes down what it is asked."""
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(f'#!/bin/sh\necho "$@" >>{log}\n')
    python.chmod(0o755)
    environment = {**CLEAN, "OWNER": "acme", "VLLM_PYTHON": str(python), "TRAIN_PYTHON": str(python)}
    subprocess.run([REPO / "scripts" / "llama3_armo.sh"], env=environment, check=True, capture_output=True)
    commands = [line.split() for line in log.read_text().splitlines()]
    repo = "acme/ultrafeedback-llama3"
    assert [stage_and_flags(words) for words in commands] == [
        ("generate", ["--world_size", "8", "--output_repo", repo]),
        ("rank", ["--input_repo", repo]),
        ("filter", ["--input_repo", f"{repo}_armo"]),
        ("train", ["--task.input_repo", f"{repo}_armo_tokenized", "--output_dir", "models/rebel-llama3-armo-iter-1"]),
    ]
    check_that_stages_parse(commands)
