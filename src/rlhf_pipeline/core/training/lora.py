"""LoRA: train small additions to the linear layers in the place of all weights, and add them in at the end."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf_pipeline.core import models
from rlhf_pipeline.core.command import BadUse, What
from rlhf_pipeline.core.files import sync_file, sync_folder
from rlhf_pipeline.core.preflight import check_importable

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

ALL_LINEAR = "all-linear"
ADAPTER = "adapter"
"""Folder of the adapter inside the policy's."""
WRAPPING = "base_model.model."
"""What peft puts before a base model's names."""


@dataclass(frozen=True)
class Lora:
    """W x becomes W x + alpha / r B A x: A (r, in) and B (out, r) are trained, B from 0, and W stays.

    Hu et al. 2021 (LoRA, arXiv 2106.09685), section 4.1.
    """

    r: What[int | None] = None
    """Rank of LoRA adapters, for example 16; None trains all weights."""
    alpha: What[int] = 32
    """An adapter's product counts alpha / r times."""
    dropout: What[float] = 0.0
    """Probability that an adapter's input is dropped while training. Above 0 results depend on the launch."""
    target_modules: What[tuple[str, ...]] = (ALL_LINEAR,)
    """Names of the linear layers that get an adapter, as q_proj v_proj; all-linear is every one but the head."""


@dataclass(frozen=True)
class Size:
    """What of a model LoRA trains."""

    layers: int
    trained: int
    """parameters"""
    total: int
    """parameters of the model without adapters"""


def check_values(lora: Lora) -> None:
    """Raise BadUse for a value that can't be meant, and for any without --lora.r."""
    if lora.r is None:
        if lora != Lora():
            raise BadUse("a --lora flag is set, but --lora.r is not: drop it, or pass --lora.r 16.")
        return
    for name, value, fits, expected in (
        ("r", lora.r, lora.r > 0, "1 or more"),
        ("alpha", lora.alpha, lora.alpha > 0, "1 or more"),
        ("dropout", lora.dropout, 0 <= lora.dropout < 1, "a probability from 0 to below 1"),
    ):
        if not fits:
            raise BadUse(f"--lora.{name} is {value}; expected {expected}.")
    if not lora.target_modules or (ALL_LINEAR in lora.target_modules and len(lora.target_modules) > 1):
        raise BadUse(
            f"--lora.target_modules is {' '.join(lora.target_modules) or 'empty'}; expected names of linear layers, or "
            f"{ALL_LINEAR} alone."
        )
    check_importable("peft", flag="--lora.r")


def measure(folder: Path, lora: Lora, *, trust_remote_code: bool = False) -> Size:
    """What `lora` trains of the model in `folder`, of which only the config is read.

    Raises BadUse for target modules that the model lacks, and for any that is no linear layer or is its head.
    """
    model = models.without_weights(folder, trust_remote_code=trust_remote_code)
    layers = [layer for _, layer in _targets(model, lora.target_modules)]
    return Size(
        layers=len(layers),
        trained=sum(int(lora.r or 0) * (layer.in_features + layer.out_features) for layer in layers),
        total=sum(parameter.numel() for parameter in model.parameters()),
    )


def _targets(model: Any, names: tuple[str, ...]) -> Iterator[tuple[str, nn.Linear]]:
    """(name, layer) of every layer that gets an adapter."""
    head = model.get_output_embeddings()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if names == (ALL_LINEAR,):
        yield from ((name, module) for name, module in linear.items() if module is not head)
        return
    there = ", ".join(sorted({name.rpartition(".")[2] for name, module in linear.items() if module is not head}))
    for wanted in names:
        found = {name: part for name, part in model.named_modules() if f".{name}".endswith(f".{wanted}")}
        if head in found.values():
            raise BadUse(
                f"--lora.target_modules {wanted} is the model's head, whose log-probs are computed in chunks and "
                f"without an adapter: leave it out. Linear layers here are {there}."
            )
        if not found or not found.items() <= linear.items():
            problem = "is no linear layer" if found else "names no layer"
            raise BadUse(
                f"--lora.target_modules {wanted} {problem} of {type(model).__name__}; linear ones are {there}."
            )
        yield from found.items()


def base_dtype(folder: Path, mixed_precision: str) -> torch.dtype:
    """The dtype to load frozen weights in: bf16 where they are stored and computed with so, as no step is lost on them.

    Without DeepSpeed, which loads everything in bf16 and keeps float32 copies of what it trains.
    """
    stored_so = models.stored_dtype(folder) == torch.bfloat16
    return torch.bfloat16 if stored_so and mixed_precision == "bf16" else torch.float32


def attach(model: Any, lora: Lora, *, seed: int, float32: bool) -> PeftModel:
    """`model` with adapters drawn by `seed`, the same in every launch; its own weights no longer require gradients.

    float32: keep the adapters so over a bf16 model, since it is they that the optimizer steps (DeepSpeed, which keeps
    a float32 copy itself, wants one dtype).
    """
    from peft import get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, _peft_config(lora), autocast_adapter_dtype=float32)


def _peft_config(lora: Lora) -> LoraConfig:
    from peft import LoraConfig

    targets = ALL_LINEAR if lora.target_modules == (ALL_LINEAR,) else list(lora.target_modules)
    return LoraConfig(
        r=int(lora.r or 0),
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
    )


def merged(state_dict: Mapping[str, Tensor], lora: Lora, *, dtype: torch.dtype) -> dict[str, Tensor]:
    """The base model's state dict with W + alpha / r B A, added up in float32, in the place of each W.

    state_dict: the whole one of the model that `attach` made, which need not be gathered anywhere else. The sums are on
    the CPU: a GPU that held the model in training may have no room for it twice.
    """
    weights = {}
    for name, tensor in state_dict.items():
        if ".lora_" in name:
            continue
        layer, _, wrapped = name.partition(".base_layer.")
        if wrapped == "weight":
            down, up = (state_dict[f"{layer}.lora_{part}.default.weight"].float() for part in "AB")
            tensor = (tensor.float() + lora.alpha / int(lora.r or 0) * (up @ down)).to("cpu", dtype)
        weights[name.removeprefix(WRAPPING).replace(".base_layer.", ".")] = tensor
    return weights


def save_adapter(model: PeftModel, state_dict: Mapping[str, Tensor], lora: Lora, folder: Path, *, base: str) -> None:
    """Write the adapters of `state_dict` to <folder>/adapter, which peft loads over the model `base`."""
    from safetensors.torch import save_file

    final, partial = folder / ADAPTER, folder / f".{ADAPTER}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    adapters = {
        name.replace(".default.", "."): tensor.detach().cpu().contiguous()
        for name, tensor in state_dict.items()
        if ".lora_" in name
    }
    save_file(adapters, partial / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy.copy(model.peft_config["default"])
    config.base_model_name_or_path, config.inference_mode = base, True
    if ALL_LINEAR in lora.target_modules:  # peft has made a list of every layer of it: the kinds will do
        config.target_modules = {name.rpartition(".")[2] for name in config.target_modules}
    config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(partial))
    for path in partial.iterdir():
        sync_file(path)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    sync_folder(folder)
