"""What a model folder's safetensors hold, read from their headers: names and shapes before any weight is
loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_pipeline.core.command import BadUse

if TYPE_CHECKING:
    from torch import Tensor


def tensor_files(folder: Path) -> dict[str, Path]:
    """{tensor name: the safetensors file that holds it} of a model folder. Raises BadUse if it has none."""
    from safetensors import safe_open

    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    if not files:
        raise BadUse(f"--reward_model {folder} has no *.safetensors; weights in other formats are not read.")
    return files


def check_head_names(
    folder: Path, names: Collection[str], expected: Collection[str], *, flag: str = "--reward_model"
) -> None:
    """Raise BadUse naming the reward head's tensors that are not among the checkpoint's `names`."""
    missing = [name for name in expected if name not in names]
    if missing:
        raise BadUse(
            f"{flag} {folder} lacks its reward head: no {some(missing)} in its safetensors, and a "
            "random one would score noise. Pass a reward model, not the language model it was made from."
        )


def check_head_shapes(folder: Path, files: Mapping[str, Path], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise BadUse naming the reward head's tensors that the checkpoint lacks or has in another shape."""
    from safetensors import safe_open

    check_head_names(folder, files, expected)
    for name, shape in expected.items():
        with safe_open(files[name], framework="pt") as file:
            found = tuple(file.get_slice(name).get_shape())
        if found != shape:
            raise BadUse(f"--reward_model {folder}: {name} has shape {found}, but its config.json asks for {shape}.")


def read_tensors(files: Mapping[str, Path], names: Collection[str]) -> dict[str, Tensor]:
    """{name: tensor} of `names`, on the CPU and in the dtype they are stored in."""
    from safetensors import safe_open

    tensors = {}
    for name in names:
        with safe_open(files[name], framework="pt") as file:
            tensors[name] = file.get_tensor(name)
    return tensors


def check_none_missing(folder: Path, missing: Collection[str]) -> None:
    """Raise BadUse if transformers reports weights that it had to draw at random."""
    if missing:
        raise BadUse(f"--reward_model {folder} lacks weights that its config.json asks for: {some(missing)}.")


def some(names: Collection[str], limit: int = 4) -> str:
    shown = ", ".join(sorted(names)[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
