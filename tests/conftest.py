"""What the tests share: a CPU environment without a network, a random tiny Llama, some prompts, and the two
ways in which a command is started. Nothing heavy is imported here: most tests need neither torch nor
transformers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[1]
CACHE = REPO / ".pytest_cache" / "rlhf_pipeline"

CPU_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HOME": str(CACHE / "huggingface"),  # also keeps the developer's token and caches out of the tests
    "VLLM_CACHE_ROOT": str(CACHE / "vllm"),
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "COLUMNS": "120",
}
if shutil.which("nvidia-smi") is None:
    CPU_ENVIRONMENT["DS_ACCELERATOR"] = "cpu"
os.environ.update(CPU_ENVIRONMENT)  # before any test imports torch or huggingface_hub in this process
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores Ctrl-C, and so do its children


PROMPTS = [
    "What is the capital of France?",
    "Name three colours of autumn leaves.",
    "How do I boil an egg so that the yolk stays soft?",
    "Translate 'good morning' into Italian.",
    "Why is the sky blue?",
    "Write one sentence about a lighthouse in the fog.",
    "What is 17 plus 25?",
    "List the days of the week that contain the letter T.",
    "Who wrote the play Hamlet?",
    "Give me a rhyme for 'river'.",
    "My café opens at 7:30. When should the baker arrive?",
    "Explain photosynthesis to a child of six.\n\nTwo sentences are enough.",
    "What is the opposite of 'brittle'?",
    "How many legs do three spiders have?",
    "Suggest a name for a grey cat.",
    "Is a tomato a fruit or a vegetable?",
    "What comes after Thursday?",
    "Describe snow to someone who has never seen it.",
    "Which is heavier, a kilogram of feathers or a kilogram of iron?",
    "Correct this sentence: She don't like rain.",
    "What is the smallest prime number above 50?",
    "How long does a letter take from Lisbon to Oslo?",
    "Tell me something kind.",
    "Hello!",
]


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random float32 Llama's folder: hidden 64, 2 layers, 2 heads of 32, 512 ids, untied head as in Llama 3
    8B.

    It speaks no language, but its samples differ, and at temperature 0.8 most responses end within 24 tokens.
    """
    from rlhf_pipeline.tiny import build_tokenizer, write_policy_folder

    folder = tmp_path_factory.mktemp("tiny_policy") / "policy"
    tokenizer = build_tokenizer(PROMPTS, 512)
    sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 2}
    write_policy_folder(folder, tokenizer, **sizes, init_std=0.2, tie_word_embeddings=False, seed=0)
    _let_it_stop(folder, tokenizer.eos_token_id)
    return folder


def _let_it_stop(folder: Path, end_id: int) -> None:
    """Raise the end-of-turn logit by about a constant. Llama's head has no bias: hidden dimension 0, set by
    the embedding, written by no layer and read by no other row of the head, stands in for it."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][:, 0] = 2.0
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[0, :] = 0.0
    weights["lm_head.weight"][:, 0] = 0.0
    weights["lm_head.weight"][end_id, :] = 0.0
    weights["lm_head.weight"][end_id, 0] = 15.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="session")
def tiny_prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl file of 24 prompts with the columns prompt_id and prompt."""
    path = tmp_path_factory.mktemp("tiny_prompts") / "prompts.jsonl"
    rows = [{"prompt_id": f"p{index:02d}", "prompt": prompt} for index, prompt in enumerate(PROMPTS)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def hub() -> Iterator[Any]:
    """A `hub_server.Hub`."""
    from hub_server import Hub

    server = Hub()
    yield server
    server.close()


@pytest.fixture
def online(hub: Any, tmp_path: Path) -> dict[str, str]:
    """The environment of a command that sees this Hub and no other, signed in."""
    from hub_server import TOKEN

    return {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "huggingface"),
        "HF_HUB_OFFLINE": "0",
        "TRANSFORMERS_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }


RunCommand = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def command_environment() -> dict[str, str]:
    """The environment of the processes that tests start: this one's, with src/ importable."""
    path = os.pathsep.join(filter(None, [str(REPO / "src"), os.environ.get("PYTHONPATH")]))
    return {**os.environ, **CPU_ENVIRONMENT, "PYTHONPATH": path}


@pytest.fixture(scope="session")
def run_command(command_environment: dict[str, str]) -> RunCommand:
    """`run_command("generate", "--model", folder, env={}, cwd=REPO, timeout=300)`: the command as a process.

    Returns the CompletedProcess with stdout and stderr as text; the exit code is for the test to judge.
    """

    def run(command: str, *args: object, **options: Any) -> subprocess.CompletedProcess[str]:
        return run_process([sys.executable, "-m", f"rlhf_pipeline.{command}", *args], command_environment, **options)

    return run


@pytest.fixture(scope="session")
def launch(command_environment: dict[str, str]) -> RunCommand:
    """`launch(2, "deepspeed_config_stage_3.yaml", "train", *args)`: the command under accelerate launch.

    The yaml is a name in accelerate_cfgs/ or a path. Port 0 lets launches run beside one another.
    """

    def run(
        num_processes: int, config_yaml: str | Path, command: str, *args: object, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        launcher: list[object] = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "no"]
        launcher += ["--config_file", REPO / "accelerate_cfgs" / config_yaml]
        launcher += ["--num_processes", num_processes, "--main_process_port", 0, "-m", f"rlhf_pipeline.{command}"]
        return run_process([*launcher, *args], command_environment, **options)

    return run


def run_process(
    command: list[object],
    environment: dict[str, str],
    *,
    env: dict[str, str] | None = None,
    cwd: Path = REPO,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Run to the end. When time is over, end it and all it has started: TimeoutExpired."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(
            [str(part) for part in command],
            env={**environment, **(env or {})},
            cwd=cwd,
            stdout=stdout,  # files: a rank that outlives its launcher would hold a pipe open for ever
            stderr=stderr,
            text=True,
        )
        try:
            process.wait(timeout)
        finally:
            end_with_descendants(process)
        stdout.seek(0)
        stderr.seek(0)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout.read(), stderr.read())


def end_with_descendants(process: subprocess.Popen[str]) -> None:
    """End a process that still runs, and what it has started (a launcher's ranks have sessions of their own)."""
    if process.poll() is None:
        import psutil

        for running in [*psutil.Process(process.pid).children(recursive=True), process]:
            running.kill()
        process.wait()
