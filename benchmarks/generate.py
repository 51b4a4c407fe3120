"""generate against a bare `LLM.generate` over the same requests, and against the tutorial's five passes: the same
tokens from the same engine settings, in one run.

    python benchmarks/generate.py --prompts 120 --repeats 5

- generate: the command's own pass, from the first request to the last shard, journal and shards included.
- LLM.generate: one call with all requests, which gives ids and keeps nothing.
- five passes: one call per seed, as the tutorial's code works, which gives text and keeps nothing.

Each measurement is a process of its own; starting the engine is not timed. Repeats alternate, and the median counts.
On CPU, where the engine is in the measured process, processor time is what other work on the machine changes least.
All three sample the same tokens, which is checked where the numbers are float32. The policy is a random Llama whose
responses have lengths of a geometric distribution, the prompts are pieces of Python's own manual; --model and
--prompt_file take others.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO / "src")]
RESULTS = REPO / "benchmarks" / "results" / "generate.txt"
NUM_RESPONSES = 5
WAYS = ("generate", "LLM.generate", "five passes")


@dataclass(frozen=True)
class Run:
    """seconds: of the clock, and of the processor in the measured process."""

    tokens: int
    seconds: float
    processor: float


def make_policy(folder: Path, corpus: str, *, hidden_size: int, layers: int, mean_length: int) -> Path:
    """A random Llama of 2,048 ids that ends a response at each token with probability 1 / mean_length or so."""
    import math

    from safetensors.torch import load_file, save_file

    from rlhf_pipeline.core.world import tiny_llama

    tokenizer = tiny_llama.build_tokenizer([corpus], 2048)
    tiny_llama.write_policy_folder(
        folder,
        tokenizer,
        hidden_size=hidden_size,
        num_layers=layers,
        num_heads=hidden_size // 64,
        tie_word_embeddings=False,
    )
    weights = load_file(folder / "model.safetensors")
    end = tiny_llama.end_ids(tokenizer)[-1]
    # dimension 0 is a constant that the embedding sets and no layer changes: the end of turn's logit reads it alone
    weights["model.embed_tokens.weight"][:, 0] = 10.0
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[0, :] = 0.0
    weights["lm_head.weight"][:, 0] = 0.0
    weights["lm_head.weight"][end, :] = 0.0
    # after the last norm the constant is about sqrt(hidden_size); 0.8 is the temperature
    weights["lm_head.weight"][end, 0] = 0.8 * math.log(len(tokenizer) / mean_length) / math.sqrt(hidden_size)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_prompts(path: Path, count: int, corpus: str) -> Path:
    """Prompts of 40 to 1,200 characters."""
    random = Random(0)
    with path.open("w", encoding="utf-8") as file:
        for k in range(count):
            characters = int(40 * 30 ** random.random())
            start = random.randrange(len(corpus) - characters)
            file.write(json.dumps({"prompt_id": f"p{k}", "prompt": corpus[start : start + characters]}) + "\n")
    return path


def flags_of(args: argparse.Namespace, folder: Path) -> list[str]:
    flags = {
        "--model": args.model,
        "--prompts": args.prompt_file,
        "--maxlen": args.maxlen,
        "--num_responses": NUM_RESPONSES,
        "--rows_per_shard": args.rows_per_shard,
        "--tensor_parallel_size": args.tensor_parallel_size,
        "--output_repo": folder / "out",
    }
    if args.max_num_seqs:
        flags["--engine.max_num_seqs"] = args.max_num_seqs
    return [str(part) for pair in flags.items() for part in pair]


def time_ours(flags: Sequence[str]) -> Run:
    from rlhf_pipeline import generate
    from rlhf_pipeline.core import storage
    from rlhf_pipeline.core.command import parse

    config = parse(generate.Config, list(flags))
    plan = generate.make_plan(config)
    with storage.open_output(plan.output.folder, plan.identity, overwrite=False) as output:
        responses = generate.open_responses(plan, config, output)
        sampler = generate.start_sampler(plan, config, output.folder)
        with contextlib.redirect_stdout(sys.stderr):
            return timed(lambda: generate.gather(sampler, responses))


def time_vllm(flags: Sequence[str], *, five_passes: bool) -> Run:
    """vLLM's own LLM over the requests of the command that `flags` describe."""
    from rlhf_pipeline import generate
    from rlhf_pipeline.core import vllm_engine
    from rlhf_pipeline.core.command import parse
    from rlhf_pipeline.core.generation.responses import SEED_STEP
    from rlhf_pipeline.core.generation.sampling import Request, vllm_arguments

    config = parse(generate.Config, list(flags))
    plan = generate.make_plan(config)
    policy = plan.policy
    assert isinstance(policy, generate.Policy)
    settings = generate.settings_of(config, policy)
    on_cpu = vllm_engine.set_environment(policy.tensor_parallel_size)
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    arguments = vllm_arguments(
        policy.model.folder,
        config.engine,
        on_cpu=on_cpu,
        dtype=policy.dtype,
        max_model_len=policy.window,
        tensor_parallel_size=policy.tensor_parallel_size,
    )
    llm = LLM(**{**arguments, "skip_tokenizer_init": not five_passes})

    def call(seeds: Sequence[int]) -> int:
        prompts, params = [], []
        for prompt in plan.prompts.kept:
            for seed in seeds:
                prompts.append(TokensPrompt(prompt_token_ids=list(prompt.ids)))
                params.append(
                    SamplingParams(
                        temperature=settings.temperature,
                        top_p=settings.top_p,
                        max_tokens=settings.max_tokens,
                        stop_token_ids=list(settings.stop_ids),
                        ignore_eos=True,
                        seed=Request(0, tuple(prompt.ids), seed).engine_seed,
                        detokenize=five_passes,
                    )
                )
        return sum(len(output.outputs[0].token_ids) for output in llm.generate(prompts, params, use_tqdm=False))

    seeds = [config.seed + SEED_STEP * i for i in range(config.num_responses)]
    return timed(lambda: sum(call([seed]) for seed in seeds) if five_passes else call(seeds))


def timed(work: Callable[[], int]) -> Run:
    clock, processor = time.perf_counter(), time.process_time()
    tokens = work()
    return Run(tokens, time.perf_counter() - clock, time.process_time() - processor)


def measure(way: str, args: argparse.Namespace) -> Run:
    """One way, in a process of its own."""
    with tempfile.TemporaryDirectory() as temporary:
        flags = flags_of(args, Path(temporary))
        command = [sys.executable, __file__, "--measure", way, "--flags", json.dumps(flags)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return Run(**json.loads(done.stdout.splitlines()[-1]))


def table(found: dict[str, list[Run]]) -> list[str]:
    """A line for each way: medians of clock and processor time, and generate's speed beside it, by either."""
    ours = found["generate"]
    lines = []
    for way, runs in found.items():
        clock, processor = (statistics.median(getattr(run, name) for run in runs) for name in ("seconds", "processor"))
        line = f"{way:<13} {runs[0].tokens:8,} tokens  {clock:7.2f} s, {runs[0].tokens / clock:7,.0f} tokens/s"
        line += f"  processor {processor:7.2f} s"
        if way != "generate":
            line += f"  generate's speed beside it: {ratio(runs, ours, 'seconds')}, processor "
            line += ratio(runs, ours, "processor")
        lines.append(line)
    return lines


def ratio(theirs: Sequence[Run], ours: Sequence[Run], name: str) -> str:
    """Of the medians, and from the lowest to the highest of neighbouring repeats."""
    medians = [statistics.median(getattr(run, name) for run in runs) for runs in (theirs, ours)]
    each = [getattr(there, name) / getattr(here, name) for there, here in zip(theirs, ours, strict=True)]
    return f"{medians[0] / medians[1]:.3f} ({min(each):.3f} to {max(each):.3f})"


def machine() -> str:
    import torch

    from rlhf_pipeline.core.provenance import versions

    if torch.cuda.is_available():
        processor = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else platform.processor()
    used = versions()
    packages = ", ".join(f"{name} {used[name]}" for name in ("python", "torch", "vllm"))
    cores = f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores, load {os.getloadavg()[1]:.1f} at the end"
    return f"{processor}, {cores}; {packages}; {datetime.date.today()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=120)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--maxlen", type=int, default=128)
    parser.add_argument("--mean_length", type=int, default=40, help="of the random policy's responses, in tokens")
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--max_num_seqs", type=int, help="default: vLLM's")
    parser.add_argument("--rows_per_shard", type=int, default=20)
    parser.add_argument("--tensor_parallel_size", type=int, default=1)
    parser.add_argument("--model", help="a policy's folder; default: a random one")
    parser.add_argument("--prompt_file", help="default: pieces of Python's manual")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file that keeps the table")
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--flags", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        flags = json.loads(args.flags)
        run = time_ours(flags) if args.measure == "generate" else time_vllm(flags, five_passes=args.measure == WAYS[2])
        print(json.dumps(asdict(run)))
        return
    words = " ".join(sys.argv[1:])
    import pydoc_data.topics

    corpus = "\n\n".join(pydoc_data.topics.topics.values())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.model is None:
            sizes = {"hidden_size": args.hidden_size, "layers": args.layers, "mean_length": args.mean_length}
            args.model = str(make_policy(folder / "policy", corpus, **sizes))
        args.prompt_file = args.prompt_file or str(write_prompts(folder / "prompts.jsonl", args.prompts, corpus))
        found: dict[str, list[Run]] = {way: [] for way in WAYS}
        for repeat in range(args.repeats):
            for way in WAYS:
                found[way].append(measure(way, args))
                print(f"repeat {repeat}: {way:<13} {found[way][-1]}", flush=True)
        check_same_tokens(found, args.model)
    lines = [f"python benchmarks/generate.py {words}".rstrip(), "", *table(found), machine()]
    print("\n".join(lines))
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text("\n".join(lines) + "\n")


def check_same_tokens(found: dict[str, list[Run]], model: str) -> None:
    from rlhf_pipeline.core.generation.sampling import checkpoint_dtype

    counts = {way: {run.tokens for run in runs} for way, runs in found.items()}
    if checkpoint_dtype(Path(model)) == "float32" and len(set.union(*counts.values())) > 1:
        raise SystemExit(f"the ways sampled different numbers of tokens: {counts}")


if __name__ == "__main__":
    main()
