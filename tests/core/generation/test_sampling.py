"""Sampling: tokens of the right distribution, each response its own, the same from vLLM as from transformers.

vLLM runs once, in a process of its own (it binds threads and changes torch for good): this file is that
process too.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, fields, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.core import vllm_engine
from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.generation.sampling import (
    EngineOptions,
    Request,
    Sample,
    SamplingSettings,
    TransformersSampler,
    VllmSampler,
    vllm_arguments,
)
from rlhf_pipeline.core.vllm_engine import bind_cores

WINDOW = 128
GREEDY = SamplingSettings(temperature=0.0, max_tokens=24)


def make_prompts(count: int) -> list[tuple[int, ...]]:
    """Prompts of 3 to 40 ids, no two alike; id 0 to 299 are text in the tiny vocabulary."""
    return [(*((7 * i + 13 * j + j * j) % 300 for j in range(3 + i % 38)), i) for i in range(count)]


def requests_for(prompts: Iterable[tuple[int, ...]], num_responses: int = 1) -> list[Request]:
    pairs = [(prompt, p) for prompt in prompts for p in range(num_responses)]
    return [Request(key, prompt, seed=50 * p) for key, (prompt, p) in enumerate(pairs)]


def tokens_by_key(samples: Iterable[Sample]) -> dict[int, list[int]]:
    return {sample.key: sample.token_ids for sample in samples}


def stop_ids_of(folder: Path) -> tuple[int, ...]:
    ids = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    return tuple(ids)


@pytest.fixture(scope="module")
def model(tiny_policy: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_policy).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_policy: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_policy)


def transformers_sampler(model: Any, tokenizer: Any, settings: SamplingSettings, **options: Any) -> TransformersSampler:
    return TransformersSampler(model, tokenizer, settings, **{"max_model_len": WINDOW, **options})


# transformers


def test_greedy_tokens_equal_those_of_generate(model: Any, tokenizer: Any, tiny_policy: Path) -> None:
    """Independent reference: transformers' own generate, one prompt at a time, stopping at the same ids."""
    import torch

    prompts, stops = make_prompts(24), stop_ids_of(tiny_policy)
    settings = SamplingSettings(temperature=0.0, max_tokens=24, stop_ids=stops)
    ours = tokens_by_key(transformers_sampler(model, tokenizer, settings).sample(requests_for(prompts)))
    for key, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, pad_token_id=0
        )
        assert ours[key] == whole[0, len(prompt) :].tolist()


def top_p_distribution(probs: Any, top_p: float) -> dict[int, float]:
    """The definition, token by token: take the most probable ones until they hold top_p, then renormalise."""
    taken, mass = {}, 0.0
    for index in sorted(range(len(probs)), key=lambda i: -probs[i]):
        if mass >= top_p:
            break
        taken[index] = float(probs[index])
        mass += taken[index]
    return {index: value / mass for index, value in taken.items()}


def test_draws_follow_the_top_p_distribution_exactly() -> None:
    """At uniforms k/1000 + 1/2000 each token must come up 1000 times its probability, to within one count.

    Row 0 is peaked and needs few tokens, row 1 is flat: its top-p set is far larger than the first look.
    """
    import torch

    from rlhf_pipeline.core.generation.decoding import FIRST_LOOK, draw

    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 900, generator=generator) * torch.tensor([[4.0], [0.3]])
    probs = torch.softmax(logits, dim=1)
    sizes = [len(top_p_distribution(row.tolist(), 0.9)) for row in probs]
    assert sizes[0] < FIRST_LOOK < 8 * FIRST_LOOK < sizes[1]
    uniforms = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    for row in probs:
        drawn = Counter(draw(row.expand(1000, -1), uniforms, 0.9).tolist())
        expected = top_p_distribution(row.tolist(), 0.9)
        assert set(drawn) <= set(expected)
        assert all(abs(drawn[token] - 1000 * share) <= 1 for token, share in expected.items())


def test_draw_with_top_p_one_leaves_no_token_out() -> None:
    """Probabilities 1/2, 1/4, 1/8, 1/8: the CDF's steps are at 0.5, 0.75 and 0.875."""
    import torch

    from rlhf_pipeline.core.generation.decoding import draw

    probs = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).expand(6, -1)
    uniforms = torch.tensor([0.0, 0.4999, 0.5, 0.75, 0.875, 1 - 2**-53], dtype=torch.float64)
    assert draw(probs, uniforms, 1.0).tolist() == [0, 0, 1, 2, 3, 3]


def test_first_tokens_over_seeds_follow_temperature_and_top_p(model: Any, tokenizer: Any) -> None:
    """Chi-square of 4000 one-token responses to one prompt against the model's own probabilities.

    The statistic has mean k - 1 and standard deviation sqrt(2 (k - 1)) over k tokens; five of them is the
    bound.
    """
    import torch

    prompt, count = make_prompts(1)[0], 4000
    settings = SamplingSettings(temperature=0.5, top_p=0.8, max_tokens=1)
    requests = [Request(seed, prompt, seed) for seed in range(count)]
    drawn = Counter(s.token_ids[0] for s in transformers_sampler(model, tokenizer, settings).sample(requests))
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1].double()
    expected = top_p_distribution(torch.softmax(logits / 0.5, dim=0).tolist(), 0.8)
    assert set(drawn) <= set(expected)
    chi_square = sum((drawn[t] - count * p) ** 2 / (count * p) for t, p in expected.items())
    freedom = len(expected) - 1
    assert freedom >= 5
    assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)


def test_a_response_does_not_depend_on_its_neighbours(model: Any, tokenizer: Any, tiny_policy: Path) -> None:
    """Reversed, a seventh of them, in batches of 5, those of one length, alone: the same bits."""
    settings = SamplingSettings(max_tokens=40, stop_ids=stop_ids_of(tiny_policy), token_logps=True)
    requests = requests_for(make_prompts(40), num_responses=3)

    def run(chosen: list[Request], **options: Any) -> dict[int, Sample]:
        sampler = transformers_sampler(model, tokenizer, settings, **options)
        return {sample.key: sample for sample in sampler.sample(chosen)}

    together = run(requests)
    assert len({tuple(sample.token_ids) for sample in together.values()}) > 110  # seeds and prompts matter
    for other in (
        run(requests[::-1]),
        run(requests[::7]),
        run(requests, max_num_seqs=5),
        run([request for request in requests if len(request.prompt_ids) == 16]),  # a batch without padding
        *(run([request]) for request in requests[:20:4]),
    ):
        assert all(sample == together[key] for key, sample in other.items())


def test_equal_seeds_of_different_prompts_draw_at_different_quantiles() -> None:
    """Response 0 of every prompt has seed 0. Were its noise the seed's alone, all first draws would lie in
    one place of their distributions; their mean over 400 prompts must be near 1/2 (standard error 0.29 / 20).
    """
    import torch

    seeds = [Request(i, (i, i + 1), 0).engine_seed for i in range(400)]
    draws = torch.tensor([float(torch.rand(1, generator=torch.Generator().manual_seed(seed))) for seed in seeds])
    assert len(set(seeds)) == 400
    assert abs(draws.mean() - 0.5) < 5 * 0.29 / 20
    assert Request(0, (1, 2), 50).engine_seed != Request(0, (1, 2), 0).engine_seed == Request(9, (1, 2), 0).engine_seed


def test_token_logps_are_the_models_at_temperature_one(model: Any, tokenizer: Any) -> None:
    import torch

    settings = SamplingSettings(temperature=0.6, top_p=0.7, max_tokens=12, token_logps=True)
    prompts = make_prompts(6)
    for sample in transformers_sampler(model, tokenizer, settings).sample(requests_for(prompts)):
        expected = reference_logps(model, prompts[sample.key], sample.token_ids)
        assert sample.token_logps == pytest.approx(expected, abs=1e-5)
        assert len(sample.token_ids) == 12
    assert torch.is_grad_enabled()  # the sampler leaves no mode behind


def reference_logps(model: Any, prompt: tuple[int, ...], token_ids: list[int]) -> list[float]:
    """log_softmax of one forward pass over prompt and response, at the response's tokens."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *token_ids]])).logits[0].double()
    logps = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=1)
    return [float(row[token]) for row, token in zip(logps, token_ids, strict=True)]


def test_any_stop_id_ends_a_response_and_stays_in_its_tokens(model: Any, tokenizer: Any) -> None:
    """Stop ids are taken from what greedy decoding emits third and fifth: it must end there, reason stop."""
    prompts = make_prompts(4)
    free = tokens_by_key(transformers_sampler(model, tokenizer, GREEDY).sample(requests_for(prompts)))
    stops = (free[0][2], free[1][4])
    settings = SamplingSettings(temperature=0.0, max_tokens=24, stop_ids=stops)
    for sample in transformers_sampler(model, tokenizer, settings).sample(requests_for(prompts)):
        whole = free[sample.key]
        ends = [i for i, token in enumerate(whole) if token in stops]
        expected = whole[: ends[0] + 1] if ends else whole
        assert sample.token_ids == expected
        assert sample.finish_reason == ("stop" if ends else "length")
        kept = expected[:-1] if ends else expected
        assert sample.text == tokenizer.decode(kept, skip_special_tokens=True)


def test_the_window_ends_a_response(model: Any, tokenizer: Any) -> None:
    """Prompt ids 3 + 1 and 40 + 1 long in a window of 50: 46 and 9 new tokens, both cut by length."""
    prompts = [make_prompts(1)[0], make_prompts(38)[37]]
    settings = SamplingSettings(temperature=0.0, max_tokens=1000)
    samples = transformers_sampler(model, tokenizer, settings, max_model_len=50).sample(requests_for(prompts))
    assert {sample.key: (len(sample.token_ids), sample.finish_reason) for sample in samples} == {
        0: (46, "length"),
        1: (9, "length"),
    }


def test_requests_are_taken_from_the_iterator_only_as_they_are_needed(model: Any, tokenizer: Any) -> None:
    from rlhf_pipeline.core.generation.sampling import LOOK_AHEAD

    taken = 0

    def endless() -> Iterable[Request]:
        nonlocal taken
        while True:
            yield Request(taken, (1, 2, 3), taken)
            taken += 1

    settings = SamplingSettings(max_tokens=1)
    next(iter(transformers_sampler(model, tokenizer, settings).sample(endless())))
    assert taken <= LOOK_AHEAD


def test_cores_are_bound_in_equal_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 2, 4, 6, 8})
    assert bind_cores(2) == "0,2|4,6"
    with pytest.raises(BadUse, match=r"6 groups of CPU cores .* need as many cores; .* 5"):
        bind_cores(6)


# vLLM


OPTIONS = EngineOptions(
    dtype="bfloat16",
    quantization="fp8",
    max_model_len=500,
    max_num_seqs=7,
    gpu_memory_utilization=0.4,
    enforce_eager=True,
    distributed_executor_backend="ray",
)


def test_every_engine_option_reaches_vllm() -> None:
    """dtype and max_model_len as the plan resolved them; without chunked prefill on CPU alone."""
    sizes: dict[str, Any] = {"dtype": "float16", "max_model_len": 400, "tensor_parallel_size": 2}
    arguments = vllm_arguments(Path("policy"), OPTIONS, on_cpu=False, **sizes)
    assert {name: arguments[name] for name in asdict(OPTIONS)} == {
        **asdict(OPTIONS),
        "dtype": "float16",
        "max_model_len": 400,
    }
    assert (arguments["tensor_parallel_size"], arguments["enable_prefix_caching"]) == (2, True)
    assert "enable_chunked_prefill" not in arguments
    assert vllm_arguments(Path("policy"), OPTIONS, on_cpu=True, **sizes)["enable_chunked_prefill"] is False


def test_batch_invariance_reaches_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    vllm_engine.set_environment()
    assert "VLLM_BATCH_INVARIANT" not in os.environ
    vllm_engine.set_environment(batch_invariant=True)
    assert os.environ["VLLM_BATCH_INVARIANT"] == "1"


VLLM_PROMPTS = 100


def run_vllm(folder: Path, output: Path) -> None:
    """Everything the tests below look at, from one engine start per sampling setting that needs its own."""
    from transformers import AutoTokenizer
    from vllm.engine.arg_utils import EngineArgs

    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = EngineOptions(max_num_seqs=16)
    sizes: dict[str, Any] = {"dtype": "float32", "max_model_len": WINDOW}
    prompts = make_prompts(VLLM_PROMPTS)
    settings = SamplingSettings(max_tokens=40, stop_ids=stop_ids_of(folder), token_logps=True)
    sampler = VllmSampler(folder, tokenizer, settings, options, **sizes)
    requests = requests_for(prompts, num_responses=5)
    found: dict[str, Any] = {
        "engine": sampler.engine,
        "takes": [field.name for field in fields(EngineArgs)],
        "sampled": [asdict(sample) for sample in sampler.sample(iter(requests))],
        "fewest_waiting": sampler.fewest_waiting,
        "backwards": [asdict(sample) for sample in sampler.sample(requests[::-7])],
        "twins": [asdict(sample) for sample in sampler.sample(replace(r, key=1000 + r.key) for r in requests[:10])],
    }
    sampler.close()
    sampler = VllmSampler(folder, tokenizer, GREEDY, options, **sizes)
    found["greedy"] = [asdict(sample) for sample in sampler.sample(requests_for(prompts[:24]))]
    sampler.close()
    output.write_text(json.dumps(found))


@pytest.fixture(scope="module")
def vllm_run(
    tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory, command_environment: dict[str, str]
) -> dict[str, Any]:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    output = tmp_path_factory.mktemp("vllm") / "found.json"
    command = [sys.executable, __file__, str(tiny_policy), str(output)]
    subprocess.run(command, env=command_environment, check=True, timeout=280)
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_vllm_completes_many_seeded_requests(vllm_run: dict[str, Any], tiny_policy: Path) -> None:
    """100 prompts x 5 seeds: with chunked prefill, its default, vLLM's CPU build crashes on these."""
    keys = [sample["key"] for sample in vllm_run["sampled"]]
    assert sorted(keys) == list(range(5 * VLLM_PROMPTS))
    stops = stop_ids_of(tiny_policy)
    for sample in vllm_run["sampled"]:
        assert (sample["token_ids"][-1] in stops) == (sample["finish_reason"] == "stop")
        assert not set(sample["token_ids"][:-1]) & set(stops)
        assert sample["finish_reason"] == "stop" or len(sample["token_ids"]) == 40
    reasons = Counter(sample["finish_reason"] for sample in vllm_run["sampled"])
    assert min(reasons["stop"], reasons["length"]) > 0


def test_vllm_always_has_requests_waiting(vllm_run: dict[str, Any]) -> None:
    assert vllm_run["fewest_waiting"] >= vllm_run["engine"]["max_num_seqs"] == 16


def test_vllm_samples_do_not_depend_on_order_and_neighbours(vllm_run: dict[str, Any]) -> None:
    sampled = {sample["key"]: sample["token_ids"] for sample in vllm_run["sampled"]}
    backwards = vllm_run["backwards"]
    assert len(backwards) == 72
    assert all(sample["token_ids"] == sampled[sample["key"]] for sample in backwards)


def test_vllm_takes_each_requests_own_seed(vllm_run: dict[str, Any]) -> None:
    """Equal prompts and seeds under other keys: equal tokens. Other seeds, 50 apart: other tokens."""
    sampled = {sample["key"]: sample["token_ids"] for sample in vllm_run["sampled"]}
    twins = {sample["key"]: sample["token_ids"] for sample in vllm_run["twins"]}
    assert twins == {1000 + key: sampled[key] for key in range(10)}
    assert len({tuple(sampled[key]) for key in range(10)}) == 10


def test_vllm_logps_agree_with_transformers(vllm_run: dict[str, Any], model: Any) -> None:
    prompts = make_prompts(VLLM_PROMPTS)
    for sample in vllm_run["sampled"][::11]:
        expected = reference_logps(model, prompts[sample["key"] // 5], sample["token_ids"])
        assert sample["token_logps"] == pytest.approx(expected, abs=1e-4)


def test_vllm_samples_within_the_top_p_set_at_the_temperature(vllm_run: dict[str, Any], model: Any) -> None:
    """The tokens more probable than a sampled one hold less than top_p = 0.9 at temperature 0.8.

    At temperature 1, or without top-p, a share of the tokens would lie outside; 1e-4 allows for rounding.
    """
    import torch

    prompts = make_prompts(VLLM_PROMPTS)
    for sample in vllm_run["sampled"][::5]:
        prompt, ids = prompts[sample["key"] // 5], sample["token_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].double()
        probs = torch.softmax(logits / 0.8, dim=1)
        own = probs[range(len(ids)), ids][:, None]
        assert (torch.where(probs > own, probs, 0.0).sum(dim=1) < 0.9 + 1e-4).all()


def test_vllm_greedy_equals_the_transformers_sampler(vllm_run: dict[str, Any], model: Any, tokenizer: Any) -> None:
    """GREEDY has no stop ids: neither backend may add the generation config's on its own."""
    ours = transformers_sampler(model, tokenizer, GREEDY).sample(requests_for(make_prompts(24)))
    expected = {sample.key: asdict(sample) for sample in ours}
    assert {sample["key"]: sample for sample in vllm_run["greedy"]} == expected


def test_vllm_takes_every_argument_that_we_have(vllm_run: dict[str, Any]) -> None:
    arguments = vllm_arguments(Path("policy"), OPTIONS, on_cpu=True, dtype="float32", max_model_len=WINDOW)
    assert set(arguments) <= set(vllm_run["takes"])


def test_vllm_says_what_it_ran_with(vllm_run: dict[str, Any]) -> None:
    engine = vllm_run["engine"]
    assert engine["name"] == "vllm" and engine["version"].startswith("0.")
    assert (engine["dtype"], engine["tensor_parallel_size"], engine["max_model_len"]) == (
        "float32",
        1,
        WINDOW,
    )


HANG = 5
"""Seconds of silence that `sample_until` takes for a hang."""


def sample_until(folder: Path, output: Path, end: str) -> None:
    """Long responses from a vLLM with processes of its own, whose ids are in `output` once it samples.

    end: killed; hung; or killed between steps, when no step is under way.
    """
    from transformers import AutoTokenizer

    if end == "hung":
        vllm_engine.SILENCE = HANG
    tokenizer, settings = AutoTokenizer.from_pretrained(folder), SamplingSettings(max_tokens=1000)
    sampler = VllmSampler(
        folder, tokenizer, settings, EngineOptions(max_num_seqs=4), dtype="float32", max_model_len=1100
    )
    samples = sampler.sample(Request(key, (1, 2, key), key) for key in range(500))
    next(samples)
    output.write_text(" ".join(str(child.pid) for child in multiprocessing.active_children()))
    if end == "killed between steps":
        wait_for(lambda: sampler._engine.engine_core.resources.engine_dead, 60)
    for _ in samples:
        pass


@pytest.fixture
def sampling_process(
    request: pytest.FixtureRequest, tiny_policy: Path, tmp_path: Path, command_environment: dict[str, str]
) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A process that runs `sample_until`, and the ids of vLLM's own."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    end = getattr(request, "param", "killed")
    command = [sys.executable, __file__, str(tiny_policy), str(tmp_path / "pids"), end]
    environment = {**command_environment, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        wait_for((tmp_path / "pids").exists, 240)
        yield process, [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(true: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    """Whether there is such a process that is more than a zombie which no one has collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("sampling_process", ["killed", "killed between steps"], indirect=True)
def test_a_killed_core_process_is_reported_within_seconds(
    sampling_process: tuple[subprocess.Popen[str], list[int]],
) -> None:
    """vLLM 0.32 alone waits for ever for a core process that has been killed."""
    process, (core,) = sampling_process
    os.kill(core, signal.SIGKILL)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "WorkFailed: vLLM has stopped working (EngineDeadError" in said


@pytest.mark.slow
@pytest.mark.parametrize("sampling_process", ["hung"], indirect=True)
def test_a_core_process_that_hangs_is_reported_and_killed(
    sampling_process: tuple[subprocess.Popen[str], list[int]],
) -> None:
    """Stopped alone it hangs. Stopped with the process that waits for it, as by Ctrl-Z, it does not."""
    process, (core,) = sampling_process
    for pid in (process.pid, core):
        os.kill(pid, signal.SIGSTOP)
    time.sleep(HANG + 2)
    for pid in (core, process.pid):
        os.kill(pid, signal.SIGCONT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=HANG + 2)
    os.kill(core, signal.SIGSTOP)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"WorkFailed: vLLM has computed nothing for {HANG} s; what is finished is kept: run the same" in said
    assert not is_running(core)


@pytest.mark.slow
@pytest.mark.skipif(
    not [point for point in entry_points(group="vllm.general_plugins") if point.name == "rlhf_pipeline"],
    reason="rlhf_pipeline was installed before it had an entry point for vLLM: install it again",
)
def test_vllms_processes_end_with_a_killed_command(
    sampling_process: tuple[subprocess.Popen[str], list[int]],
) -> None:
    process, (core,) = sampling_process
    assert is_running(core)
    process.kill()  # not its group
    wait_for(lambda: not is_running(core), 20)


if __name__ == "__main__":
    (run_vllm if len(sys.argv) == 3 else sample_until)(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
