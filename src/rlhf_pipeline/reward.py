"""Before the stages: chosen/rejected pairs -> a reward model, by the Bradley-Terry likelihood of the labels.

Reads filter's output, or prompt, chosen and rejected as text or message lists; writes a sequence classifier with one
label that rank --reward_model takes. Its rewards are centred: their mean on the pairs' responses, which the policy
wrote, is stored with the model and subtracted by rank.

    accelerate launch --config_file accelerate_cfgs/deepspeed_config_stage_3.yaml --num_processes 8 \\
        -m rlhf_pipeline.reward --base_model runs/a/sft --input_repo OWNER/preferences --output_dir runs/a/reward
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
import tyro

from rlhf_pipeline.core import models, provenance, storage
from rlhf_pipeline.core.batches import MicroBatch, order_of_rows
from rlhf_pipeline.core.chat import Chat
from rlhf_pipeline.core.command import RUN, BadUse, How, RunFlags, What, entry, fields_with_roles, what_fields
from rlhf_pipeline.core.files import write_json
from rlhf_pipeline.core.progress import Metrics, duration, is_main, say
from rlhf_pipeline.core.reward_model import REWARD_OFFSET, draw_reward_model, load_reward_model, rewards
from rlhf_pipeline.core.training import checkpoints
from rlhf_pipeline.core.training.checks import check_room, check_same_tokenizer, check_settings
from rlhf_pipeline.core.training.distributed import (
    Engine,
    clean_exit,
    describe_launch,
    load_dtype,
    main_process_first,
    make_accelerator,
    make_engine,
    one_update,
    sum_over_ranks,
)
from rlhf_pipeline.core.training.optim import count_updates, learning_rate, set_learning_rate
from rlhf_pipeline.core.training.pairs import TOKENS, PairData, load_comparisons
from rlhf_pipeline.core.training.passes import Limits, pair_batch, plan_pairs, split_pass

if TYPE_CHECKING:
    from accelerate import Accelerator

WATCHED = ("loss", "reward_margin", "accuracy")
"""Per-pair quantities whose means are written for every update."""
CALIBRATION_BINS = 10


@dataclass(frozen=True)
class Config:
    input_repo: What[str]
    """Pairs: filter's output, or a dataset with prompt, chosen and rejected."""
    output_dir: What[str]
    """Folder of the reward model."""
    base_model: Annotated[What[str], tyro.conf.arg(aliases=("--model",))] = "meta-llama/Meta-Llama-3-8B-Instruct"
    """Policy to start from, usually the one that wrote the responses: a local folder or a Hub id."""
    drop_equal: What[bool] = False
    """Leave out pairs whose two responses are the same instead of refusing them."""

    lr: What[float] = 2e-6
    """Peak learning rate."""
    warmup_ratio: What[float] = 0.1
    """Share of the updates over which the learning rate rises; then it falls as a cosine to 0."""
    weight_decay: What[float] = 0.0
    """AdamW's weight decay."""
    max_grad_norm: What[float | None] = 1.0
    """Clip the gradient of an update to this norm; None leaves it alone."""
    batch_size: What[int] = 64
    """Pairs per update, over all processes."""
    epochs: What[float] = 1.0
    """Passes over the pairs."""
    seed: What[int] = 1
    """Decides the order of the pairs and the new head's weights."""

    per_device_train_batch_size: How[int | None] = None
    """At most this many pairs in one engine call."""
    micro_batch_tokens: How[int | None] = 8192
    """At most this many tokens, padding included, in one engine call."""
    attn_implementation: How[models.Attention] = "auto"
    """auto: flash_attention_2 where installed, else sdpa; nothing is ever downloaded."""
    gradient_checkpointing: How[bool] = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    save_every: How[int] = 100
    """Updates between checkpoints of the training state; 0: only at SIGTERM."""
    keep_checkpoints: How[int] = 1
    """How many checkpoints to keep."""
    tensorboard: How[bool] = False
    """Write TensorBoard files to <output_dir>/tensorboard as well."""
    wandb: How[str | None] = None
    """Name of a Weights & Biases project to report to as well."""
    run: RUN = RunFlags()


PLACES = ("input_repo", "output_dir", "base_model")
"""Fields that name things: what they hold counts, by its fingerprint, not what they are called."""


@dataclass(frozen=True)
class Plan:
    """Everything that is known before a model is loaded."""

    model: models.ModelRef
    chat: Chat
    source: storage.Source
    train: PairData
    test: PairData | None
    equal: int
    updates: int
    identity: dict[str, Any]


def make_plan(config: Config) -> Plan:
    """Resolve and check inputs. Raises BadUse with one sentence for what can't be learned from."""
    model = models.resolve_model(config.base_model, flag="--base_model", chat_template=True)
    chat = Chat.load(model.folder, flag="--base_model")
    source = storage.open_source(config.input_repo, flag="--input_repo")
    if set(TOKENS) <= set(source.columns):
        check_same_tokenizer(source, chat, config.base_model)
    every = load_comparisons(source, chat)
    train = without_equal(every, source.name, config.drop_equal)
    test = None
    if "test" in source.splits:
        held_out = storage.open_source(config.input_repo, flag="--input_repo", split="test")
        test = without_equal(load_comparisons(held_out, chat), source.name, config.drop_equal)
    seen = int(len(train) * config.epochs)
    updates, _ = count_updates(seen, config.batch_size, f"{config.input_repo} gives {seen} pairs")
    what = {name: value for name, value in what_fields(config).items() if name not in PLACES}
    inputs = {"pairs": source.fingerprint, "model": models.fingerprint(model)}
    identity = {"command": "reward", "what": what, "inputs": inputs}
    return Plan(model, chat, source, train, test, len(every) - len(train), updates, identity)


def without_equal(data: PairData, name: str, drop: bool) -> PairData:
    """The pairs whose responses differ. Raises BadUse if some don't and they are not to be dropped."""
    different = [i for i in range(len(data)) if not np.array_equal(data.chosen[i], data.rejected[i])]
    equal = len(data) - len(different)
    if equal and not drop:
        raise BadUse(
            f"{name} has {equal} pairs whose chosen and rejected response are the same, from which no reward can be "
            "learned: drop them, or pass --drop_equal."
        )
    if not different:
        raise BadUse(
            f"{name} has no pair whose responses differ; expected chosen and rejected to say different things."
        )
    return data.select(different)


def check_pending(config: Config, pending: dict[str, int]) -> None:
    """`--check` where an earlier stage has still to write the data or the model: what is there must be right."""
    if config.base_model not in pending:
        models.resolve_model(config.base_model, flag="--base_model")
    if config.input_repo not in pending:
        storage.open_source(config.input_repo, flag="--input_repo")
    say(f"pending    {', '.join(f'{ref} ({rows:,} rows)' for ref, rows in pending.items())}")
    say(f"model      {config.base_model} -> {config.output_dir}")


def print_plan(plan: Plan, config: Config) -> None:
    say(f"pairs      {plan.source.ref}: {len(plan.train):,} train, {len(plan.test or []):,} test")
    say(f"dropped    {plan.equal:,} with equal responses")
    say(f"model      {plan.model.text} -> {config.output_dir}")
    say(f"updates    {plan.updates} of {config.batch_size} pairs, learning rate {config.lr:g}")


def pair_rewards(engine: Engine, data: PairData, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(chosen, rejected) rewards, each (b,), of the b pairs `rows`, in one engine call."""
    chosen, rejected = rewards(engine.model, pair_batch(engine, data, rows)).chunk(2)
    return chosen, rejected


def bradley_terry(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """(B,) negative log-likelihood, nats, that the chosen response wins: -log sigmoid(r_chosen - r_rejected).

    Bradley and Terry 1952; Ouyang et al. 2022 (InstructGPT, arXiv 2203.02155), equation 1.
    """
    return -F.logsigmoid(chosen - rejected)


def train_reward(engine: Engine, plan: Plan, config: Config) -> None:
    """The loop: from the newest checkpoint, if any, to the last update."""
    folder = Path(config.output_dir)
    saved = folder / "checkpoints"
    order = order_of_rows(len(plan.train), plan.updates, config.batch_size, config.seed)
    done = checkpoints.updates_done(saved)
    metrics = Metrics(folder / "metrics.jsonl", after=done, tensorboard=config.tensorboard, wandb=config.wandb)
    engine.model.train()
    for update in checkpoints.updates(
        engine.accelerator, saved, plan.updates, save_every=config.save_every, keep=config.keep_checkpoints
    ):
        started = time.monotonic()
        lr = learning_rate(update, plan.updates, peak=config.lr, warmup_ratio=config.warmup_ratio)
        set_learning_rate(engine.optimizer, lr)
        numbers = {"update": update + 1, "lr": lr, **run_update(engine, plan.train, order[update], config)}
        checkpoints.check_finite(numbers, saved)
        metrics.write({**numbers, "pairs_per_second": config.batch_size / (time.monotonic() - started)})


def run_update(engine: Engine, data: PairData, indices: npt.NDArray[np.int64], config: Config) -> dict[str, float]:
    """One optimizer step on the pairs `indices`. Returns the means of WATCHED over them and the gradient norm."""
    calls = plan_pairs(engine, data, indices, limits_of(config))
    sums = torch.zeros(len(WATCHED), dtype=torch.float64, device=engine.device)

    def loss_of(call: MicroBatch) -> torch.Tensor:
        chosen, rejected = pair_rewards(engine, data, indices[list(call.indices)].tolist())
        losses = bradley_terry(chosen, rejected)
        margin = (chosen - rejected).detach()
        columns = (losses.detach(), margin, (margin > 0).float())
        sums.add_(torch.stack([column.double().sum() for column in columns]) * call.weight)
        return losses.sum() * (call.weight / len(indices))

    norm = one_update(engine, calls[engine.rank], loss_of, max_grad_norm=config.max_grad_norm)
    total = sum_over_ranks(engine.accelerator, sums).tolist()
    return {name: value / len(indices) for name, value in zip(WATCHED, total, strict=True)} | {"grad_norm": norm}


def limits_of(config: Config) -> Limits:
    return Limits(config.per_device_train_batch_size, config.micro_batch_tokens)


def judge(engine: Engine, plan: Plan, config: Config) -> tuple[float, dict[str, Any]]:
    """(offset, report): the mean reward of the training responses, and how well held-out labels are predicted."""

    def all_rewards(data: PairData) -> npt.NDArray[np.float64]:
        every = np.arange(len(data))
        return split_pass(engine, data, every, lambda rows: pair_rewards(engine, data, rows), limits=limits_of(config))

    offset = float(all_rewards(plan.train).mean())
    held_out = {} if plan.test is None else calibration(np.subtract(*all_rewards(plan.test).T))
    return offset, {"offset": offset, **held_out}


def calibration(margins: npt.NDArray[np.float64]) -> dict[str, Any]:
    """How often the model agrees with held-out labels, and whether it is as sure as it is right.

    margins: (n,) reward of the chosen minus of the rejected response. The model's confidence in its own favourite is
    sigmoid(|margin|). Pairs are grouped by it into bins of equal width from 1/2 to 1; a calibrated model is right in
    each bin as often as it is confident. The expected calibration error is the mean distance, weighted by pairs
    (Guo et al. 2017, arXiv 1706.04599, equation 3).
    """
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    right = np.where(margins == 0, 0.5, margins > 0)
    bins = np.minimum(((confidence - 0.5) * 2 * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    table = [
        {"confidence": float(confidence[bins == b].mean()), "accuracy": float(right[bins == b].mean()), "pairs": n}
        for b in range(CALIBRATION_BINS)
        if (n := int((bins == b).sum()))
    ]
    error = sum(row["pairs"] * abs(row["confidence"] - row["accuracy"]) for row in table) / len(margins)
    accuracy = float(right.mean())
    return {
        "held_out_pairs": len(margins),
        "accuracy": accuracy,
        "accuracy_standard_error": math.sqrt(accuracy * (1 - accuracy) / len(margins)),
        "loss": float(np.logaddexp(0, -margins).mean()),
        "expected_calibration_error": float(error),
        "reliability": table,
    }


def main(config: Config) -> Path:
    check_settings(config)
    pending = config.run.pending_rows()
    if config.run.check and {config.input_repo, config.base_model} & pending.keys():
        check_pending(config, pending)
        return Path(config.output_dir)
    plan = make_plan(config)
    print_plan(plan, config)
    folder = Path(config.output_dir)
    state = storage.run_state(folder, plan.identity, overwrite=config.run.overwrite)
    say(f"output     {folder}: {state}")
    if state != "done":
        say(f"disk       {check_room(folder, plan.model.folder, config, updates=plan.updates)}")
    if config.run.check or state == "done":
        return folder
    with storage.run_lock(folder) if is_main() else contextlib.nullcontext():
        started = time.monotonic()
        fresh = folder / "fresh"
        if is_main():
            storage.start_run(folder, plan.identity, overwrite=config.run.overwrite)
            if not fresh.exists():
                draw_reward_model(models.fetch_weights(plan.model, flag="--base_model"), fresh, seed=config.seed)
        accelerator = make_accelerator(max_grad_norm=config.max_grad_norm)
        accelerator.wait_for_everyone()  # rank 0 may still draw; under an Accelerator it would draw with all of them
        engine = load(accelerator, fresh, config)
        train_reward(engine, plan, config)
        offset, report = judge(engine, plan, config)
        save(engine, fresh, plan, config, offset, report)
        if plan.test is not None:
            error = 1.96 * report["accuracy_standard_error"]
            say(
                f"held out   accuracy {report['accuracy']:.3f} +- {error:.3f} on {report['held_out_pairs']} pairs, "
                f"expected calibration error {report['expected_calibration_error']:.3f}"
            )
        say(f"done in {duration(time.monotonic() - started)}: {folder}")
        clean_exit(engine.accelerator)
    return folder


def load(accelerator: Accelerator, start: Path, config: Config) -> Engine:
    """The reward model and its optimizer, ready for this launch."""
    attention = models.choose_attention(
        config.attn_implementation, models.load_config(start), half_precision=accelerator.mixed_precision == "bf16"
    )
    model = load_reward_model(start, dtype=load_dtype(accelerator), attn_implementation=attention)
    return make_engine(
        accelerator,
        model,
        attention,
        gradient_checkpointing=config.gradient_checkpointing,
        lr=config.lr,
        weight_decay=config.weight_decay,
    )


def save(engine: Engine, start: Path, plan: Plan, config: Config, offset: float, report: dict[str, Any]) -> None:
    """Write the reward model with its offset, then its provenance; then the training state is no longer needed."""
    folder = Path(config.output_dir)
    state_dict = engine.accelerator.get_state_dict(engine.model)

    def write() -> None:
        models.add_to_config(start, {REWARD_OFFSET: offset})
        models.save_policy(engine.accelerator.unwrap_model(engine.model), state_dict, start=start, folder=folder)
        write_json(folder / "held_out.json", report)
        made = provenance.describe(
            command="reward",
            config={name: value for name, _, value in fields_with_roles(config)},
            inputs={
                "pairs": provenance.describe_source(plan.source),
                "model": {"ref": plan.model.text, "fingerprint": plan.identity["inputs"]["model"]},
            },
            rows_in=len(plan.train) + plan.equal,
            rows_out=plan.updates * config.batch_size,
            dropped={"equal responses": plan.equal},
            engine=describe_launch(engine.accelerator),
            chat=plan.chat.describe(),
            held_out=report,
        )
        facts = {name: value for name, value in report.items() if name != "reliability"}
        card = provenance.model_card(title=f"Reward model from {plan.model.text}", provenance=made, facts=facts)
        storage.finish_run(folder, plan.identity, made, card)
        for leftover in ("checkpoints", "fresh"):
            shutil.rmtree(folder / leftover, ignore_errors=True)

    main_process_first(engine.accelerator, write)


if __name__ == "__main__":
    entry(main, Config)
