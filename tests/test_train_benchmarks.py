"""The benchmarks compare what they say they compare, and the GPU's runs wherever this runs."""

from __future__ import annotations

import dataclasses
import importlib
import sys

import pytest
import torch

from conftest import REPO
from random_models import gradients

VOCABULARY = 300


@pytest.fixture
def benchmark(monkeypatch):
    """`benchmark(name)`: the module of that name in benchmarks/."""
    monkeypatch.setattr(sys, "path", [str(REPO / "benchmarks"), *sys.path])
    return importlib.import_module


def test_every_way_that_the_benchmark_times_computes_the_same_gradients(benchmark):
    from rlhf_pipeline.core.logps import install

    train = benchmark("train")
    pairs = train.make_pairs(1, vocabulary=VOCABULARY)
    padded, packed = (
        train.make_model(hidden_size=32, layers=1, vocabulary=VOCABULARY, attention=kind) for kind in ("sdpa", "packed")
    )
    train.fixed_blocks(padded, pairs)
    expected = gradients(padded)
    train.full_log_softmax(padded, train.calls_of(pairs, None))
    found = [gradients(padded)]
    install(padded)
    install(packed)
    train.ours(padded, train.calls_of(pairs, None))
    train.ours(packed, train.calls_of(pairs, None, packed=True), packed=True)
    found += [gradients(padded), gradients(packed)]
    for ways in found:
        for name, gradient in expected.items():
            assert torch.allclose(ways[name], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max())), name
    [pair] = pairs
    sizes = [train.batch_of(pairs, packed=True, prompts_twice=twice).input_ids.numel() for twice in (False, True)]
    assert sizes == [sum(pair.in_a_row), sum(pair.lengths)]


@pytest.mark.parametrize("updates", [True, False], ids=["whole updates", "forward and backward"])
def test_the_gpu_benchmark_runs_from_end_to_end_in_tiny(benchmark, updates):
    train, train_gpu = benchmark("train"), benchmark("train_gpu")
    size = train_gpu.Size(32, 64, 2, 2, 1, tied=updates, updates=updates, vocabulary=VOCABULARY)
    pairs = [train.Pair([5] * 20, [6] * 30, [7] * 10), train.Pair([8] * 5, [9] * 12, [10] * 40)]
    lines = train_gpu.compare("tiny", size, pairs, torch.device("cpu"), tokens=64, repeats=1, blocks=(32, 64))
    assert lines[0] == "tiny: 2 pairs, 142 real tokens, calls of 64"
    assert ["ours" in lines[1], "fixed blocks" in lines[2]] == [True, True]


def test_the_flops_of_a_model_by_hand(benchmark):
    """One layer of H 4, I 8, two heads of which one key head, so 4 (8 + 4 + 24) = 144 weights; V 10, so a head of 40.
    A pair of 3 and 4 tokens, 2 of them the prompt's: 6 x 144 x 5, 6 x 40 x 3, and 6 x 4 x (3 x 4 + 4 x 5)."""
    train, train_gpu = benchmark("train"), benchmark("train_gpu")
    size = train_gpu.Size(4, 8, 1, 2, 1, tied=False, updates=False, vocabulary=10)
    pair = train.Pair([1, 2], [3], [4, 5])
    assert train_gpu.model_flops(size, [pair]) == 6 * 144 * 5 + 6 * 40 * 3 + 6 * 4 * (12 + 20)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_gpu_takes_the_memory_that_is_estimated(benchmark, checkpointing):
    """Forward and backward of the 1B shape in bf16 against torch's own peak, to 15 percent."""
    from rlhf_pipeline.core.training.memory import Call, Shape, estimate

    train, train_gpu = benchmark("train"), benchmark("train_gpu")
    size, device = train_gpu.SIZES["1B"], torch.device("cuda")
    size = dataclasses.replace(size, updates=False)
    engine = train_gpu.make_engine(size, "packed", device)
    if not checkpointing:
        engine.model.gradient_checkpointing_disable()
    pairs = train.make_pairs(4)
    run = train_gpu.our_calls(engine, pairs, 10**6)
    train_gpu.run(engine, run)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train_gpu.run(engine, run)
    torch.cuda.synchronize()
    labels = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    call = Call(sum(sum(pair.in_a_row) for pair in pairs), labels, sum(sum(pair.lengths) for pair in pairs))
    shape = Shape(engine.model.num_parameters(), 2048, 8192, 16, 2048, 512, size.vocabulary)
    found = estimate(shape, call, "zero 2", processes=1, half=True, checkpointing=checkpointing)
    counted = torch.cuda.max_memory_allocated() - before
    assert found.activations + max(found.log_probs, found.layer) == pytest.approx(counted, rel=0.15)
