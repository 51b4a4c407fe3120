"""What every use of vLLM in this project needs: its environment, and to notice when its core process dies or hangs."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from rlhf_pipeline.core.command import BadUse, WorkFailed

ENDS_WITH_PARENT = "RLHF_PIPELINE_ENGINE"
"""Environment variable that tells vLLM's processes to end with the one that started them."""
CORES_VARIABLE = "VLLM_CPU_OMP_THREADS_BIND"
"""Environment variable in which vLLM finds the CPU cores of each of its workers."""
CPU_KV_CACHE_GIB = "1"
"""vLLM's KV cache on CPU, unless VLLM_CPU_KVCACHE_SPACE says otherwise."""
SILENCE = 600
"""Seconds that a step may take. A first compilation or a long prefill takes long too, but not so long."""


def set_environment(tensor_parallel_size: int = 1, *, batch_invariant: bool = False) -> bool:
    """What vLLM reads from the environment when it is imported; True where it will run on CPU."""
    import huggingface_hub  # noqa: F401  reads HF_HUB_OFFLINE now: this process may still push afterwards
    import torch

    for name in ("VLLM_NO_USAGE_STATS", "DO_NOT_TRACK", "HF_HUB_OFFLINE", ENDS_WITH_PARENT):
        os.environ[name] = "1"
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # a forked process would load no plugin
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if batch_invariant:
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CPU_KV_CACHE_GIB)
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        if tensor_parallel_size > 1:
            os.environ.setdefault(CORES_VARIABLE, bind_cores(tensor_parallel_size))
    return on_cpu


def bind_cores(groups: int) -> str:
    """This process's CPU cores in `groups` equal parts, as vLLM writes them. Raises BadUse for too few."""
    return "|".join(",".join(map(str, cores)) for cores in split_cores(groups))


def split_cores(groups: int) -> list[list[int]]:
    """This process's CPU cores in `groups` equal parts. Raises BadUse for too few."""
    cores = sorted(os.sched_getaffinity(0))
    size = len(cores) // groups
    if size == 0:
        raise BadUse(
            f"{groups} groups of CPU cores (--tensor_parallel_size x --data_parallel_size) need as many cores; "
            f"this process may use {len(cores)}."
        )
    return [cores[size * i : size * (i + 1)] for i in range(groups)]


def wake_when_dead(engine_core: Any, step_under_way: Callable[[], object] = lambda: None) -> None:
    """Let a blocked `step` raise when vLLM's core process has been killed, or has been silent for SILENCE seconds.

    step_under_way: another object for each step, None between two. When the core is killed vLLM 0.32 closes its client
    and marks it dead, while `step` goes on waiting for an output that can't come; of one that hangs it knows nothing.
    """
    if not hasattr(engine_core, "outputs_queue"):  # the core lives in this process
        return

    def watch() -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        last: object = None
        seconds = 0
        while not engine_core.resources.engine_dead and seconds < SILENCE:
            time.sleep(1)  # seconds of this thread, not of a clock: where all of us were stopped, nothing hangs
            step = step_under_way()
            seconds = seconds + 1 if step is not None and step is last else 0
            last = step
        silent = f"vLLM has computed nothing for {SILENCE} s; what is finished is kept: run the same command again."
        engine_core.outputs_queue.put(EngineDeadError() if engine_core.resources.engine_dead else WorkFailed(silent))

    threading.Thread(target=watch, daemon=True, name="vllm-watch").start()


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turn what vLLM raises when it dies or fails into WorkFailed."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except (EngineDeadError, RuntimeError) as error:  # RuntimeError: out of memory, or a worker process is gone
        raise WorkFailed(
            f"vLLM has stopped working ({type(error).__name__}: {error}); what is finished is kept: "
            "run the same command again."
        ) from error
