"""The launch: one process, DDP or DeepSpeed, told apart here and nowhere else; one update means the same in all."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from rlhf_pipeline.core.attention import check_packed, takes_packed_rows
from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.files import read_json
from rlhf_pipeline.core.progress import say
from rlhf_pipeline.core.training.optim import make_optimizer

if TYPE_CHECKING:
    from accelerate import Accelerator

GROUP_TIMEOUT = timedelta(hours=2)
"""A rank may wait this long for the others; nccl's own default of 10 minutes ends runs while rank 0 saves."""
M = TypeVar("M")


@dataclass(frozen=True)
class Engine:
    """A model in training, prepared for its launch."""

    accelerator: Accelerator
    model: torch.nn.Module
    """Call it: what is around the model (DDP, DeepSpeed) gathers and reduces only in its own forward."""
    optimizer: Any
    packed: bool = False
    """Whether plans count real tokens and batches are packed rows."""

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world_size(self) -> int:
        return self.accelerator.num_processes


def make_accelerator(*, max_grad_norm: float | None) -> Accelerator:
    """The Accelerator of this launch, with accumulation and clipping in our hands.

    max_grad_norm: clip each update's gradient to this norm; None really leaves it alone.
    Raises BadUse when the launch would train on unsynchronised gradients, or when its yaml file sets what train sets.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    on_gpu = torch.cuda.is_available()
    # Without a GPU accelerate finds no backend and every rank would take itself for the only one.
    gloo = "WORLD_SIZE" in os.environ and not on_gpu
    if gloo:
        _skip_shared_memory_op()
    group = InitProcessGroupKwargs(timeout=GROUP_TIMEOUT, backend="gloo" if gloo else None)
    _check_precision(os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))
    precision = None if "ACCELERATE_MIXED_PRECISION" in os.environ else ("bf16" if on_gpu else "no")
    accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=[group], step_scheduler_with_optimizer=False)
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)  # warns of tied weights at every checkpoint
    # torch tells DeepSpeed's authors of renamed collectives, once per call site and rank
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    _check_launch(accelerator)
    if is_deepspeed(accelerator):
        _configure_deepspeed(accelerator, max_grad_norm)
    return accelerator


def promised_world_size() -> int:
    """How many processes the launcher says it started, before any Accelerator exists."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_accumulation(batch_size: int, per_device: int | None, steps: int | None = None) -> None:
    """Raise BadUse for a gradient_accumulation_steps, `steps` or one of the launch's configs, that doesn't fit.

    The plan of an update decides how often gradients are added up; what others say of it is only checked.
    """
    said = {} if steps is None else {"--gradient_accumulation_steps": steps}
    for where, value in _said_by_launch("gradient_accumulation_steps").items():
        if value != "1":  # what a config says by default
            said[f"gradient_accumulation_steps of {where}"] = int(value)
    world, each = promised_world_size(), per_device or 1
    for name, count in said.items():
        if count * each * world != batch_size:
            raise BadUse(
                f"{name} {count} x {each} pairs x {world} processes is {count * each * world}, --batch_size is "
                f"{batch_size}: drop the former, or make the product fit."
            )


def _said_by_launch(key: str) -> dict[str, str]:
    """{where: value} of what the launch's own configs say of `key`."""
    said = {"the accelerate config": os.environ.get(f"ACCELERATE_{key.upper()}")}
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if path != "none":
        said[path] = (read_json(Path(path)) or {}).get(key)
    return {where: str(value) for where, value in said.items() if str(value).lower() not in ("auto", "none")}


def is_deepspeed(accelerator: Accelerator) -> bool:
    return str(accelerator.distributed_type.value) == "DEEPSPEED"


def zero_stage(accelerator: Accelerator) -> int | None:
    return int(accelerator.state.deepspeed_plugin.zero_stage) if is_deepspeed(accelerator) else None


def describe_launch(accelerator: Accelerator) -> dict[str, Any]:
    """Engine and launch for provenance, for example deepspeed stage 3, world size 2."""
    name = "deepspeed" if is_deepspeed(accelerator) else str(accelerator.distributed_type.value).lower()
    return {
        "name": {"no": "one process", "multi_cpu": "ddp", "multi_gpu": "ddp"}.get(name, name),
        "zero_stage": zero_stage(accelerator),
        "world_size": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def say_launch(accelerator: Accelerator, attention: str) -> None:
    launch = describe_launch(accelerator)
    stage = f" stage {launch['zero_stage']}" if launch["zero_stage"] is not None else ""
    say(
        f"engine     {launch['name']}{stage}, world size {launch['world_size']}, {launch['device']}, "
        f"mixed precision {launch['mixed_precision']}, attention {attention}"
    )


def load_dtype(accelerator: Accelerator) -> torch.dtype:
    """The dtype to load parameters in, so that the optimizer steps float32 weights in every launch.

    DeepSpeed in bf16 keeps a float32 master copy of its bf16 parameters. Nobody else does: there parameters are
    float32, under autocast (at lr 3e-7 a bf16 weight hardly ever moves).
    """
    return torch.bfloat16 if is_deepspeed(accelerator) and accelerator.mixed_precision == "bf16" else torch.float32


def _skip_shared_memory_op() -> None:
    """On CPU DeepSpeed would compile an inference-only op for most of a minute when it starts."""
    with contextlib.suppress(ImportError):
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _check_precision(name: str) -> None:
    if name not in ("no", "bf16"):
        raise BadUse(
            f"the launch's mixed precision is {name}; expected bf16 or no (accelerate launch --mixed_precision): "
            "gradients are never scaled here, as others would need."
        )


def _check_launch(accelerator: Accelerator) -> None:
    _check_precision(accelerator.mixed_precision)
    seen, promised = accelerator.num_processes, promised_world_size()
    if seen != promised:
        raise BadUse(
            f"WORLD_SIZE is {promised}, but accelerate sees {seen} process(es): start with `accelerate launch` or "
            "torchrun, or unset WORLD_SIZE."
        )
    if seen > 1 and str(accelerator.distributed_type.value) == "NO":
        raise BadUse(
            f"this launch starts {seen} processes that would not share gradients (--multi_gpu without GPUs?): "
            "use accelerate_cfgs/deepspeed_config_stage_3.yaml, or ACCELERATE_USE_CPU=true torchrun."
        )


def _configure_deepspeed(accelerator: Accelerator, max_grad_norm: float | None) -> None:
    """Hand DeepSpeed its numbers directly: through accelerate a clipping of 0 becomes 1.0, and yaml wins over code."""
    for where, clipping in _said_by_launch("gradient_clipping").items():
        if float(clipping) != (max_grad_norm or 0.0):
            raise BadUse(
                f"{where} sets gradient_clipping to {clipping}, --max_grad_norm is {max_grad_norm}: remove it there; "
                "--max_grad_norm decides."
            )
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    config["gradient_accumulation_steps"] = 1  # our micro-batches set the boundary themselves
    config["train_micro_batch_size_per_gpu"] = 1
    config["gradient_clipping"] = max_grad_norm or 0.0
    config["data_types"] = {"grad_accum_dtype": "fp32"}


def make_engine(
    accelerator: Accelerator,
    model: Any,
    attention: str,
    *,
    gradient_checkpointing: bool,
    can_pack: bool = False,
    **optimizer: Any,
) -> Engine:
    """`model` with an optimizer (`make_optimizer`'s settings) on what of it is trained, ready for this launch.

    `can_pack`: rows will be packed if its attention takes that, which is tried. Raises BadUse if they leak.
    """
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    stepping = make_optimizer(model.parameters(), **optimizer)
    say_launch(accelerator, attention)
    packed = can_pack and takes_packed_rows(model)
    model, stepping = accelerator.prepare(model, stepping)
    engine = Engine(accelerator, model, stepping, packed)
    if packed:
        check_packed(engine.model, engine.device)
    return engine


def one_update(
    engine: Engine,
    micro_batches: Sequence[M],
    loss_of: Callable[[M], torch.Tensor],
    *,
    max_grad_norm: float | None,
) -> float:
    """Step the optimizer once on the gradient of the sum of `loss_of` over all micro-batches of all ranks.

    loss_of must give the micro-batch's share of the update's loss: its sum over rows divided by the rows of the
    whole update, so that the gradient doesn't depend on how the rows were cut. Every rank must bring the same
    number of micro-batches. Returns the gradient norm before clipping.
    """
    accelerator, model = engine.accelerator, engine.model
    for index, micro_batch in enumerate(micro_batches):
        last = index == len(micro_batches) - 1
        # every back end averages gradients over ranks: undo it, the losses are shares of a sum
        if is_deepspeed(accelerator):
            loss = loss_of(micro_batch) * engine.world_size
            accelerator.deepspeed_engine_wrapped.backward(loss, sync_gradients=last)
            continue
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            accelerator.backward(loss_of(micro_batch) * engine.world_size)
    if is_deepspeed(accelerator):  # the engine stepped inside its last backward
        return float(accelerator.deepspeed_engine_wrapped.get_global_grad_norm())
    limit = float("inf") if max_grad_norm is None else max_grad_norm
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    engine.optimizer.step()
    engine.optimizer.zero_grad()
    return float(norm)


def sum_over_ranks(accelerator: Accelerator, values: torch.Tensor) -> torch.Tensor:
    """Elementwise sum of `values` over all ranks, the same on each."""
    return accelerator.reduce(values, reduction="sum")


def from_main(accelerator: Accelerator, values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Rank 0's `values` on every rank: what it sees of a shared folder, where another node may see it late."""
    ours = torch.as_tensor(np.asarray(values, dtype=np.float64), device=accelerator.device)
    return sum_over_ranks(accelerator, ours if accelerator.is_main_process else torch.zeros_like(ours)).cpu().numpy()


def any_rank(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` is set on any rank, the same answer on each."""
    return bool(sum_over_ranks(accelerator, torch.tensor([float(flag)], device=accelerator.device)) > 0)


def main_process_first(accelerator: Accelerator, work: Callable[[], object]) -> None:
    """Do short `work` on rank 0 while the others wait; all of them fail if it fails there."""
    finished = not accelerator.is_main_process
    try:
        if accelerator.is_main_process:
            work()
            finished = True
    finally:
        failed = any_rank(accelerator, not finished)
    if failed:
        raise SystemExit(1)


def clean_exit(accelerator: Accelerator, then: Callable[[], object] = lambda: None) -> None:
    """End the process group, and do `then`, which may take long: nobody waits for it any more.

    With gloo the process ends here too: its threads may otherwise abort it after all is done.
    """
    accelerator.wait_for_everyone()
    several_on_cpu = accelerator.num_processes > 1 and not torch.cuda.is_available()
    accelerator.end_training()
    then()
    if several_on_cpu:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
