"""What an update costs: the fixed-block scheme, ours, the same with plain full log-probs, a bare forward and backward,
and TRL's DPOTrainer, on the same random pairs and the same small Llama with a 128,256-word vocabulary.

    OMP_NUM_THREADS=2 python benchmarks/train.py --results benchmarks/results/train.txt

Lengths are drawn like the tutorial's: prompts of about 200, responses of about 450 tokens, in blocks of 1024 and 2048.
A run is forward and backward of all pairs; against TRL it is a whole update with the DPO loss and AdamW. Repeats
alternate, and the median counts. A block costs the same whatever is in it, so the fixed-block scheme is timed on
--block_pairs of the pairs only. Memory is the most bytes of tensors alive at one time in a run by torch's own
accounting, above those alive before it (weights and gradients).
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO / "src"), str(REPO / "tests")]

VOCABULARY = 128_256
PROMPT_BLOCK, RESPONSE_BLOCK = 1024, 2048
TEMPERATURE = 0.8
BETA = 0.1


@dataclass(frozen=True)
class Pair:
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of prompt + chosen and of prompt + rejected."""
        return len(self.prompt) + len(self.chosen), len(self.prompt) + len(self.rejected)

    @property
    def in_a_row(self) -> tuple[int]:
        """Tokens in a packed row, where the prompt stands once."""
        return (len(self.prompt) + len(self.chosen) + len(self.rejected),)


def make_pairs(count: int, *, seed: int = 0, vocabulary: int = VOCABULARY) -> list[Pair]:
    """Prompts of about 200 and responses of about 450 tokens in the mean: evenly spaced quantiles of gamma
    distributions, which have the long tails of chat data, in random order.
    """
    rng = np.random.default_rng(seed)

    def draw(shape: float, mean: float, number: int, high: int) -> list[list[int]]:
        lengths = np.quantile(rng.gamma(shape, mean / shape, 10_000), (np.arange(number) + 0.5) / number).clip(16, high)
        return [rng.integers(0, vocabulary, int(length)).tolist() for length in rng.permutation(lengths)]

    prompts, responses = draw(2.0, 200, count, PROMPT_BLOCK), draw(3.0, 450, 2 * count, RESPONSE_BLOCK)
    return [Pair(*ids) for ids in zip(prompts, responses[:count], responses[count:], strict=True)]


def make_model(*, hidden_size: int, layers: int, vocabulary: int = VOCABULARY, attention: str = "sdpa") -> Any:
    """A random Llama of Llama-3-8B's proportions: 3.5 inner values for a hidden one, 4 query heads for a key head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlhf_pipeline.core.attention import register

    register()
    heads = max(4, hidden_size // 128)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        intermediate_size=7 * hidden_size // 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).train()


# Ways to compute the same gradient


def fixed_blocks(model: Any, pairs: Sequence[Pair]) -> None:
    """Left-padded prompt blocks, right-padded response blocks, all logits, a float32 log-softmax over a whole block.

    The two responses of a pair go one after the other: in one call, as the authors do it, their logits alone take
    3 GB a copy. It makes no difference to the time on a CPU.
    """
    for pair in pairs:
        for response in (pair.chosen, pair.rejected):
            ids = torch.zeros(1, PROMPT_BLOCK + RESPONSE_BLOCK, dtype=torch.long)
            ids[0, PROMPT_BLOCK - len(pair.prompt) : PROMPT_BLOCK] = torch.tensor(pair.prompt)
            ids[0, PROMPT_BLOCK : PROMPT_BLOCK + len(response)] = torch.tensor(response)
            mask = torch.zeros_like(ids)
            mask[0, PROMPT_BLOCK - len(pair.prompt) : PROMPT_BLOCK + len(response)] = 1
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            table = (logits[:, PROMPT_BLOCK - 1 : -1].float() / TEMPERATURE).log_softmax(-1)
            logps = table.gather(2, ids[:, PROMPT_BLOCK:, None])[..., 0]
            (logps * mask[:, PROMPT_BLOCK:]).sum().backward()


def calls_of(pairs: Sequence[Pair], tokens: int | None, *, packed: bool = False) -> list[list[Pair]]:
    """The engine calls that train plans: one pair each, or by a token budget."""
    from rlhf_pipeline.core.batches import plan_calls

    lengths = [pair.in_a_row if packed else pair.lengths for pair in pairs]
    most = None if tokens else 1
    [plan] = plan_calls(lengths, world_size=1, max_pairs=most, max_tokens=tokens, packed=packed)
    return [[pairs[i] for i in call.indices] for call in plan]


def batch_of(pairs: Sequence[Pair], *, packed: bool = False, prompts_twice: bool = False) -> Any:
    """prompts_twice: another first token keeps the rejected response's prompt from being shared."""
    from rlhf_pipeline.core.batches import collate

    prompts = [pair.prompt for pair in pairs]
    again = [[1 - min(prompt[0], 1), *prompt[1:]] for prompt in prompts] if prompts_twice else prompts
    responses = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    return collate(prompts + again, responses, packed=packed)


def ours(model: Any, calls: Sequence[Sequence[Pair]], **rows: bool) -> None:
    from rlhf_pipeline.core.logps import response_logps

    for pairs in calls:
        response_logps(model, batch_of(pairs, **rows), TEMPERATURE).sum().backward()


def full_log_softmax(model: Any, calls: Sequence[Sequence[Pair]]) -> None:
    """Ours, but for all logits of the response tokens at once and autograd's own backward."""
    for pairs in calls:
        batch = batch_of(pairs)
        hidden = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state.flatten(0, 1)
        logits = torch.nn.functional.linear(hidden.index_select(0, batch.positions), model.lm_head.weight)
        table = (logits.float() / TEMPERATURE).log_softmax(-1)
        table.gather(1, batch.labels[:, None]).sum().backward()


def bare(model: Any, calls: Sequence[Sequence[Pair]]) -> None:
    """Forward and backward to the logits of the response tokens, with no log-softmax."""
    for pairs in calls:
        batch = batch_of(pairs)
        hidden = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state.flatten(0, 1)
        torch.nn.functional.linear(hidden.index_select(0, batch.positions), model.lm_head.weight).sum().backward()


def our_dpo_update(engine: Any, calls: Sequence[Sequence[Pair]], reference: dict[int, Any]) -> float:
    """One update of train's own rooms: DPO, AdamW. `reference` is filled on the first call. Returns the loss."""
    from rlhf_pipeline.core.logps import response_logps
    from rlhf_pipeline.core.training.distributed import one_update

    count, total = sum(map(len, calls)), 0.0

    def loss_of(pairs: Sequence[Pair]) -> torch.Tensor:
        nonlocal total
        logps = response_logps(engine.model, batch_of(pairs, packed=engine.packed), 1.0)
        chosen, rejected = (logps - reference.setdefault(id(pairs), logps.detach())).chunk(2)
        loss = -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).sum() / count
        total += loss.item()
        return loss

    one_update(engine, calls, loss_of, max_grad_norm=None)
    return total


# Measuring


def seconds_of(run: Callable[[], object]) -> float:
    gc.collect()
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


@dataclass(frozen=True)
class Row:
    name: str
    pairs_per_second: float
    peak: int | None


def compare(pairs: Sequence[Pair], args: argparse.Namespace) -> list[Row]:
    """The fixed-block scheme, ours and its two yardsticks, by alternating repeats."""
    from rlhf_pipeline.core.logps import install
    from tensor_bytes import peak_bytes

    sizes = {"hidden_size": args.hidden_size, "layers": args.layers, "vocabulary": args.vocabulary}
    plain, taught, packing = (make_model(**sizes, attention=name) for name in ("sdpa", "sdpa", "packed"))
    install(taught)
    install(packing)
    calls = calls_of(pairs, args.micro_batch_tokens)
    packed = calls_of(pairs, args.micro_batch_tokens, packed=True)
    blocks = list(pairs[: args.block_pairs])
    ways: dict[str, tuple[Any, int, Callable[[], None]]] = {
        "fixed blocks": (plain, len(blocks), lambda: fixed_blocks(plain, blocks)),
        "ours, packed rows": (packing, len(pairs), lambda: ours(packing, packed, packed=True)),
        "ours, packed, prompts twice": (
            packing,
            len(pairs),
            lambda: ours(packing, packed, packed=True, prompts_twice=True),
        ),
        "ours, padded rows": (taught, len(pairs), lambda: ours(taught, calls)),
        "padded, full log-softmax": (plain, len(pairs), lambda: full_log_softmax(plain, calls)),
        "padded, bare forward, backward": (plain, len(pairs), lambda: bare(plain, calls)),
    }
    for _, _, run in list(ways.values())[1:]:  # gradients are there before anything is measured
        run()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, (_, _, run) in ways.items():
            times[name].append(seconds_of(run))
    return [
        Row(name, count / statistics.median(times[name]), peak_bytes(run)) for name, (_, count, run) in ways.items()
    ]


def compare_with_trl(pairs: Sequence[Pair], args: argparse.Namespace) -> list[Row]:
    """Whole updates: TRL's trainer makes its steps, and after each of them ours makes one."""
    from accelerate import Accelerator
    from transformers import TrainerCallback

    from rlhf_pipeline.core.logps import install
    from rlhf_pipeline.core.training.distributed import Engine
    from rlhf_pipeline.core.training.optim import make_optimizer

    model = make_model(hidden_size=args.hidden_size, layers=args.layers, vocabulary=args.vocabulary, attention="packed")
    install(model)
    calls = calls_of(pairs, args.micro_batch_tokens, packed=True)
    reference: dict[int, Any] = {}
    engine = Engine(Accelerator(cpu=True), model, make_optimizer(model.parameters(), lr=1e-5), packed=True)
    times: dict[str, list[float]] = {"ours": [], "TRL": []}

    class Alternate(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times["TRL"].append(time.perf_counter() - self.started)
            times["ours"].append(seconds_of(lambda: our_dpo_update(engine, calls, reference)))

    with tempfile.TemporaryDirectory() as folder:
        trl_trainer(pairs, args, folder, Alternate()).train()
    names = {"ours": "ours, DPO and AdamW", "TRL": f"TRL, DPO and AdamW, {args.trl_pairs} pairs a call"}
    return [Row(names[way], len(pairs) / statistics.median(found[1:]), None) for way, found in times.items()]


def trl_trainer(pairs: Sequence[Pair], args: argparse.Namespace, folder: str, callback: Any) -> Any:
    """TRL's DPOTrainer on the same ids, the reference computed beforehand, its defaults but for what must be equal."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from rlhf_pipeline.core.world.tiny_llama import build_tokenizer

    class OnIds(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    rows = [
        {"prompt": "", "chosen": "", "rejected": ""}
        | {"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected}
        for pair in pairs
    ]
    settings = DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=args.trl_pairs,
        gradient_accumulation_steps=len(pairs) // args.trl_pairs,
        max_steps=args.repeats + 1,
        beta=BETA,
        max_length=None,
        precompute_ref_log_probs=True,
        gradient_checkpointing=False,
        max_grad_norm=0.0,
        learning_rate=1e-5,
        bf16=False,
        use_cpu=True,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    return OnIds(
        model=make_model(hidden_size=args.hidden_size, layers=args.layers, vocabulary=args.vocabulary),
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=build_tokenizer(["a b c"], 300),
        callbacks=[callback],
    )


# Telling


def describe(pairs: Sequence[Pair], args: argparse.Namespace) -> list[str]:
    real = sum(sum(pair.lengths) for pair in pairs)
    blocks = len(pairs) * 2 * (PROMPT_BLOCK + RESPONSE_BLOCK)
    row = sum(sum(pair.in_a_row) for pair in pairs)
    padded = sum(
        2 * len(call) * max(max(pair.lengths) for pair in call) for call in calls_of(pairs, args.micro_batch_tokens)
    )
    means = [statistics.mean([len(getattr(pair, name)) for pair in pairs]) for name in ("prompt", "chosen", "rejected")]
    return [
        "{} pairs; mean tokens of prompt {:.0f}, chosen {:.0f}, rejected {:.0f}".format(len(pairs), *means),
        f"tokens: {real:,} real, {blocks:,} in blocks, {padded:,} in padded rows, {row:,} in packed rows: "
        f"blocks compute {blocks / row:.1f} times the tokens of ours",
        f"Llama with hidden size {args.hidden_size}, {args.layers} layers, {args.vocabulary:,} words, float32",
    ]


def table(rows: Sequence[Row]) -> list[str]:
    first = rows[0].pairs_per_second
    lines = [f"{'':34} pairs/s  speed-up  MiB above weights and gradients"]
    for row in rows:
        memory = "" if row.peak is None else f"{row.peak / 2**20:10,.0f}"
        lines.append(f"{row.name:34} {row.pairs_per_second:7.3f}  {row.pairs_per_second / first:7.2f}x {memory}")
    return lines


def machine() -> str:
    from rlhf_pipeline.core.provenance import versions

    path = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in path.read_text().splitlines() if line.startswith("model name")]
    found = {
        name: version for name, version in versions().items() if name in ("python", "torch", "transformers", "trl")
    }
    return (
        f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; "
        f"{', '.join(f'{name} {version}' for name, version in found.items())}; {datetime.date.today()}"
    )


def on_cpu(args: argparse.Namespace) -> list[str]:
    pairs = make_pairs(args.pairs, vocabulary=args.vocabulary)
    lines = [*describe(pairs, args), "", *table(compare(pairs, args))]
    if not args.without_trl:
        lines += ["", *table(compare_with_trl(pairs, args)[::-1])]
    return lines


def on_gpu(args: argparse.Namespace) -> list[str]:
    train_gpu = importlib.import_module("train_gpu")
    device = torch.device("cuda")
    lines = [torch.cuda.get_device_name(device)]
    for name, size in train_gpu.SIZES.items():
        settings = {"repeats": args.repeats, "block_pairs": args.block_pairs}
        lines += train_gpu.compare(name, size, make_pairs(args.pairs), device, **settings)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--block_pairs", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--micro_batch_tokens", type=int, help="ours; default: one pair a call")
    parser.add_argument("--trl_pairs", type=int, default=1, help="TRL's pairs in one call")
    parser.add_argument("--without_trl", action="store_true")
    parser.add_argument("--results", type=Path, help="write the table there as well")
    parser.add_argument("--gpu", action="store_true", help="Llama-3 shapes on one CUDA GPU instead")
    args = parser.parse_args()
    lines = on_gpu(args) if args.gpu else on_cpu(args)
    lines += ["", f"median of {args.repeats} repeats; {machine()}"]
    print("\n".join(lines))
    if args.results:
        args.results.write_text("\n".join(["python " + " ".join(sys.argv), "", *lines]) + "\n")


if __name__ == "__main__":
    main()
