"""What can be known before a model is loaded: GPUs, packages, disk, the launch.

The checks serve `--check` and every start: each raises BadUse with one sentence, or returns nothing.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from rlhf_pipeline.core import provenance
from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.progress import amount

GIB = 1024**3
EXTRAS = {
    "deepspeed": "train",
    "peft": "train",
    "tensorboard": "track",
    "vllm": "vllm",
    "wandb": "track",
}
"""Packages that an extra of this project brings: {package as imported: extra}."""
LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Gpu:
    """index, uuid: nvidia-smi's; free_memory, total_memory: bytes."""

    index: int
    uuid: str
    name: str
    driver: str
    free_memory: int
    total_memory: int

    @property
    def free_share(self) -> float:
        return self.free_memory / self.total_memory


def visible_gpus() -> list[Gpu]:
    """The NVIDIA GPUs that this process may use, in the order of CUDA_VISIBLE_DEVICES; [] without any."""
    if shutil.which("nvidia-smi") is None:
        return []
    fields = "index,uuid,name,driver_version,memory.free,memory.total"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:  # nvidia-smi without a driver or a device
        return []
    return select_visible(parse_gpus(answer.stdout), os.environ.get("CUDA_VISIBLE_DEVICES"))


def parse_gpus(table: str) -> list[Gpu]:
    """nvidia-smi's csv, one GPU a line: index, uuid, name, driver, free MiB, total MiB."""
    gpus = []
    for line in filter(None, table.splitlines()):
        index, uuid, name, driver, free, total = (part.strip() for part in line.split(","))
        gpus.append(Gpu(int(index), uuid, name, driver, int(free) * 2**20, int(total) * 2**20))
    return gpus


def select_visible(gpus: list[Gpu], visible: str | None) -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES names, indices or uuid prefixes, as CUDA up to the first unknown."""
    if visible is None:
        return gpus
    selected = []
    for name in visible.split(","):
        found = [gpu for gpu in gpus if is_named(gpu, name.strip())]
        if not found:
            break
        selected.append(found[0])
    return selected


def is_named(gpu: Gpu, name: str) -> bool:
    return name == str(gpu.index) or (name.startswith("GPU-") and gpu.uuid.startswith(name))


def check_gpus(count: int, *, memory_share: float, flag: str) -> None:
    """Refuse more GPUs than are visible, or one of the first `count` with less than `memory_share` free.

    A machine without any GPU is not refused: there the engine's CPU build runs.
    """
    gpus = visible_gpus()
    if not gpus:
        return
    if count > len(gpus):
        raise BadUse(
            f"{flag} {count} needs {count} GPUs and {len(gpus)} are visible here: lower {flag}, "
            "or look at CUDA_VISIBLE_DEVICES and `make doctor`."
        )
    for gpu in gpus[:count]:
        if gpu.free_share < memory_share:
            raise BadUse(
                f"GPU {gpu.index} has {describe_memory(gpu)} and {memory_share:.0%} of it are asked for: "
                "end what runs there (`nvidia-smi`), or choose other GPUs with CUDA_VISIBLE_DEVICES."
            )


def check_importable(package: str, *, flag: str, instead: str = "") -> None:
    """Refuse `flag` where `package` is not installed. `instead` says what else to do: "pass --backend x"."""
    if importlib.util.find_spec(package) is not None:
        return
    target = f"-e .[{EXTRAS[package]}]" if package in EXTRAS else package
    remedies = " or ".join(filter(None, [f"run `pip install {target}`", instead]))
    raise BadUse(f"{flag} needs the package {package}, which is not installed: {remedies}.")


def check_writable(folder: Path, *, flag: str) -> None:
    """Refuse an output folder that can't be made or written to."""
    parent = existing_parent(folder)
    if not parent.is_dir():
        raise BadUse(f"{flag} {folder} can't be written: {parent} is a file; name another folder.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise BadUse(f"{flag} {folder} can't be written: no permission in {parent}; name another folder.")


def check_disk(folder: Path, bytes_needed: int, *, flag: str) -> None:
    """Refuse an output whose disk has less than `bytes_needed` bytes free."""
    free = shutil.disk_usage(existing_parent(folder)).free
    if free < bytes_needed:
        raise BadUse(
            f"{flag} {folder} needs about {amount(bytes_needed, 'B')} and its disk has {amount(free, 'B')} free: "
            "free some, or name a folder on another disk."
        )


def existing_parent(path: Path) -> Path:
    """`path`, or the nearest of its parents that exists."""
    path = path.expanduser().absolute()
    return next(candidate for candidate in (path, *path.parents) if candidate.exists())


def check_launch() -> None:
    """Refuse a WORLD_SIZE that no launcher stands behind: each process would train alone, on all the data."""
    world_size = os.environ.get("WORLD_SIZE", "1")
    missing = [name for name in LAUNCH_VARIABLES if name not in os.environ]
    if world_size != "1" and missing:
        raise BadUse(
            f"WORLD_SIZE is {world_size} without {', '.join(missing)}: "
            "start with `accelerate launch` or torchrun, or unset WORLD_SIZE."
        )


# doctor


def doctor() -> list[str]:
    """What a person asks first when something does not run, a line each. Never prints a token."""
    return [
        f"python        {platform.python_version()} on {platform.platform()}",
        f"processors    {os.cpu_count()}",
        *describe_gpus(visible_gpus()),
        *describe_packages(),
        f"disk          {amount(shutil.disk_usage(Path.cwd()).free, 'B')} free in {Path.cwd()}",
        f"Hub token     {'yes' if hub_token_stored() else 'no (`hf auth login` stores one)'}",
    ]


def describe_gpus(gpus: list[Gpu]) -> list[str]:
    if not gpus:
        return ["GPUs          none visible"]
    lines = [f"driver        {gpus[0].driver}"]
    for gpu in gpus:
        lines.append(f"GPU {gpu.index:<9} {gpu.name}, {describe_memory(gpu)}")
    return lines


def describe_memory(gpu: Gpu) -> str:
    return f"{gpu.free_memory / GIB:.1f} of {gpu.total_memory / GIB:.1f} GiB free"


def describe_packages() -> list[str]:
    found = provenance.versions()
    return [f"{name:<13} {found.get(name, 'not installed')}" for name in provenance.PACKAGES]


def hub_token_stored() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None
