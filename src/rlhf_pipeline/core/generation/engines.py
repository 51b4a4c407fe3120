"""Several vLLM engines on one machine: each a process with GPUs of its own, all fed from one place.

vLLM's own LLM refuses data_parallel_size in one process. Nothing here is written to disk but what the engines say:
samples come back over pipes, so that whoever asked for them keeps them as with one engine.
"""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from multiprocessing.connection import Connection, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from rlhf_pipeline.core.command import BadUse, WorkFailed, die_with_parent
from rlhf_pipeline.core.generation.sampling import (
    QUEUE_DEPTH,
    Request,
    Sample,
    VllmSampler,
)
from rlhf_pipeline.core.preflight import visible_gpus
from rlhf_pipeline.core.vllm_engine import CORES_VARIABLE, bind_cores, split_cores

GPU_VARIABLE = "CUDA_VISIBLE_DEVICES"
LAST_WORDS = 6
"""Lines of a dead engine's log that are shown."""
PATIENCE = 10.0
"""Seconds that engines have to end in order; then they are killed."""


class VllmEngines:
    """`data_parallel_size` vLLM engines, each over `tensor_parallel_size` GPUs or groups of CPU cores.

    arguments: VllmSampler's. logs: folder for engine_{i}.log, what each engine says. Raises WorkFailed if one can't
    start.
    """

    def __init__(self, *, data_parallel_size: int, tensor_parallel_size: int, logs: Path, **arguments: Any):
        logs.mkdir(parents=True, exist_ok=True)
        self._engines: list[_Engine] = []
        groups = split_gpus(data_parallel_size, tensor_parallel_size)
        cores = split_cores(data_parallel_size) if groups is None else None
        try:
            for number in range(data_parallel_size):
                devices = groups[number] if groups else None
                bound = cores[number] if cores else None
                engine = _Engine(number, logs / f"engine_{number}.log", devices, bound)
                self._engines.append(engine)
                engine.send({**arguments, "tensor_parallel_size": tensor_parallel_size})
            described = [engine.receive() for engine in self._engines]
        except BaseException:
            self.close()
            raise
        self.max_num_seqs: int = described[0]["max_num_seqs"]
        self.fewest_waiting: int | None = None
        """Fewest requests that waited for a place in an engine while the iterator still had some."""
        self.engine = {**described[0], "data_parallel_size": data_parallel_size}

    def sample(self, requests: Iterable[Request]) -> Iterator[Sample]:
        """Samples as they finish, from any engine. Raises WorkFailed when one dies or fails, with its last words."""
        # the requests for one prompt go to one engine, which then computes the prompt once
        prompts = (list(group) for _, group in groupby(requests, key=lambda request: request.prompt_ids))
        more = self._feed(prompts)
        while busy := {engine.connection: engine for engine in self._engines if engine.outstanding}:
            for ready in wait(list(busy)):
                engine = busy[ready]  # type: ignore[index]
                samples, waiting = engine.receive()
                engine.outstanding -= len(samples)
                if more and (self.fewest_waiting is None or waiting < self.fewest_waiting):
                    self.fewest_waiting = waiting
                more = self._feed(prompts)
                yield from samples

    def close(self) -> None:
        """Let the engines end; kill what has not ended after PATIENCE seconds, at once if one of them has died."""
        patience = PATIENCE if all(engine.is_alive for engine in self._engines) else 0.0
        for engine in self._engines:
            engine.connection.close()
        for engine in self._engines:
            engine.end(patience)

    def _feed(self, prompts: Iterator[list[Request]]) -> bool:
        """Give each prompt to the engine that has least to do, up to QUEUE_DEPTH; False when none are left."""
        given: dict[_Engine, list[Request]] = collections.defaultdict(list)
        more = True
        while (idle := min(self._engines, key=lambda engine: engine.outstanding)).outstanding < self._depth:
            requests = next(prompts, None)
            if requests is None:
                more = False
                break
            idle.outstanding += len(requests)
            given[idle] += requests
        for engine, requests in given.items():
            engine.send(requests)
        return more

    @property
    def _depth(self) -> int:
        return QUEUE_DEPTH * self.max_num_seqs


class _Engine:
    """The process of one engine, as seen from the one that feeds it. outstanding: requests given, not come back."""

    def __init__(self, number: int, log: Path, gpus: str | None, cores: Sequence[int] | None):
        self.number, self.log = number, log
        self.outstanding = 0
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, log, gpus, cores), name=f"engine_{number}")
        self._process.start()
        theirs.close()  # so that its end is the end of the pipe

    def send(self, message: Any) -> None:
        try:
            self.connection.send(message)
        except OSError as error:
            raise self._death() from error

    def receive(self) -> Any:
        try:
            return self.connection.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive()

    def end(self, patience: float) -> None:
        self._process.join(patience)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid or 0, signal.SIGKILL)  # and what it started: vLLM's own processes
        self._process.join()

    def _death(self) -> WorkFailed:
        self._process.join(PATIENCE)
        code = self._process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with {code}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_WORDS:]
        words = "\n".join(lines) or "nothing"
        return WorkFailed(
            f"engine {self.number} (process {self._process.pid}) {how}; what is finished is kept: run the same command "
            f"again. The last that it said ({self.log}):\n{words}"
        )


def split_gpus(engines: int, size: int) -> list[str] | None:
    """CUDA_VISIBLE_DEVICES of each of `engines` engines with `size` GPUs; None without GPUs."""
    count = len(visible_gpus())
    if not count:
        return None
    chosen = os.environ.get(GPU_VARIABLE)
    names = chosen.split(",")[:count] if chosen else [str(index) for index in range(count)]
    return [",".join(names[size * i : size * (i + 1)]) for i in range(engines)]


def _serve(connection: Connection, log: Path, gpus: str | None, cores: Sequence[int] | None) -> None:
    """An engine's process: takes VllmSampler's arguments, then lists of requests, until the pipe ends.

    Gives what describes the engine, then ([samples], requests that waited for a place), as they finish.
    """
    os.setsid()  # Ctrl-C is for the process that we work for
    die_with_parent()
    with log.open("w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    if gpus is not None:
        os.environ[GPU_VARIABLE] = gpus
    if cores is not None:
        os.sched_setaffinity(0, cores)
    arguments = connection.recv()  # not Process's: unpickling may import torch, which looks at our cores
    if cores is not None:
        os.environ[CORES_VARIABLE] = bind_cores(arguments["tensor_parallel_size"])
    try:
        _work(connection, VllmSampler(**arguments))
    except BrokenPipeError:  # nobody listens any more
        sys.exit(1)
    except (BadUse, WorkFailed) as error:
        sys.exit(f"error: {error}")


def _work(connection: Connection, sampler: VllmSampler) -> None:
    inbox: SimpleQueue[list[Request] | None] = SimpleQueue()
    connection.send(sampler.engine)
    # a thread that always takes: else both sides could wait for the other to empty its pipe
    threading.Thread(target=_take, args=(connection, inbox), daemon=True).start()
    with contextlib.closing(sampler):
        while True:
            while not sampler.unfinished or not inbox.empty():
                requests = inbox.get()
                if requests is None:
                    return
                for request in requests:
                    sampler.add(request)
            waiting = max(sampler.unfinished - sampler.max_num_seqs, 0)
            if samples := sampler.step():
                connection.send((samples, waiting))


def _take(connection: Connection, inbox: SimpleQueue[list[Request] | None]) -> None:
    with contextlib.suppress(EOFError, OSError):
        while True:
            inbox.put(connection.recv())
    inbox.put(None)
