"""Several engines: who gets which GPUs, and who gets which prompts. That they work is tested through the command."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_pipeline import generate
from rlhf_pipeline.core import preflight
from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.generation import engines
from rlhf_pipeline.core.generation.sampling import EngineOptions, Request

GIB = 1024**3
RAY = EngineOptions(distributed_executor_backend="ray")


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [preflight.Gpu(i, f"GPU-{i}", "H100", "570", 79 * GIB, 80 * GIB) for i in range(8)]
    monkeypatch.delenv(engines.GPU_VARIABLE, raising=False)
    for module in (preflight, engines):
        monkeypatch.setattr(module, "visible_gpus", lambda: gpus)


def test_each_engine_has_gpus_of_its_own(eight_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engines.split_gpus(4, 2) == ["0,1", "2,3", "4,5", "6,7"]
    assert engines.split_gpus(2, 1) == ["0", "1"]
    monkeypatch.setenv(engines.GPU_VARIABLE, "7,6,5,4,3,2,1,0")
    assert engines.split_gpus(2, 2) == ["7,6", "5,4"]


def test_without_gpus_cores_are_what_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "visible_gpus", list)
    assert engines.split_gpus(2, 1) is None


def config(**values: Any) -> generate.Config:
    return generate.Config(output_repo="./out", **values)


@pytest.mark.parametrize(("data_parallel", "tensor_parallel"), [(1, 8), (2, 4), (8, 1)])
def test_visible_gpus_are_shared_out_among_the_engines(
    eight_gpus: None, data_parallel: int, tensor_parallel: int
) -> None:
    assert generate.choose_tensor_parallel_size(config(data_parallel_size=data_parallel), 32) == tensor_parallel


def test_more_gpus_than_there_are_is_refused(eight_gpus: None) -> None:
    with pytest.raises(BadUse, match="x --data_parallel_size 16 needs 16 GPUs and 8 are visible"):
        generate.check_processors(config(data_parallel_size=4), 16)
    with pytest.raises(BadUse, match="--tensor_parallel_size 16 needs 16 GPUs and 8 are visible"):
        generate.check_processors(config(), 16)
    generate.check_processors(config(), 8)


def test_engines_on_one_machine_do_not_go_with_ray() -> None:
    with pytest.raises(BadUse, match="--data_parallel_size 2 starts engines on this machine"):
        generate.check_values(config(data_parallel_size=2, engine=RAY))


def test_with_ray_a_model_may_take_more_gpus_than_this_machine_has(
    eight_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate.check_processors(config(engine=RAY), 16)
    monkeypatch.setattr(preflight, "visible_gpus", list)
    with pytest.raises(BadUse, match="backend ray starts from a machine of the Ray cluster that has GPUs, and none is"):
        generate.check_processors(config(engine=RAY), 16)


def test_ray_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "ray" else name)
    with pytest.raises(
        BadUse, match=r"_backend ray needs the package ray, which is not installed: run `pip install ray`"
    ):
        generate.check_vllm(config(engine=RAY))


class FakeEngine:
    """Takes requests and answers those it is told to."""

    def __init__(self) -> None:
        self.outstanding = 0
        self.given: list[Request] = []

    def send(self, requests: list[Request]) -> None:
        self.given += requests


def test_prompts_go_whole_to_the_engine_with_least_to_do() -> None:
    """40 prompts x 5; each engine holds 3 x 4 = 12 requests or the prompt that brings it there, which makes 15."""
    several = object.__new__(engines.VllmEngines)
    first, second = FakeEngine(), FakeEngine()
    several._engines = [first, second]  # type: ignore[list-item]
    several.max_num_seqs = 4
    prompts = iter([[Request(5 * p + i, (p,), 50 * i) for i in range(5)] for p in range(40)])
    assert several._feed(prompts)
    assert (first.outstanding, second.outstanding) == (15, 15)
    assert [request.key // 5 for request in first.given] == [0] * 5 + [2] * 5 + [4] * 5
    second.outstanding = 3
    assert several._feed(prompts)
    assert (len(first.given), second.outstanding) == (15, 13)
    while several._feed(prompts):
        first.outstanding = second.outstanding = 0
    keys = sorted(request.key for engine in (first, second) for request in engine.given)
    assert keys == list(range(200))
