"""Before the stages: demonstrations -> a starting policy, by maximum likelihood of the responses alone.

Reads conversations that end with an assistant turn (column messages), or prompt and response; writes a transformers
folder. Starts from a checkpoint, or with --fresh from random weights for a config.

    accelerate launch --config_file accelerate_cfgs/deepspeed_config_stage_3.yaml --num_processes 8 \\
        -m rlhf_pipeline.sft --base_model meta-llama/Meta-Llama-3-8B --input_repo OWNER/demos --output_dir runs/a/sft
"""

from __future__ import annotations

import contextlib
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import tyro

from rlhf_pipeline.core import models, provenance, storage
from rlhf_pipeline.core.batches import MicroBatch, collate, order_of_rows, plan_calls
from rlhf_pipeline.core.chat import Chat
from rlhf_pipeline.core.command import RUN, How, RunFlags, What, entry, fields_with_roles, what_fields
from rlhf_pipeline.core.logps import install, token_logps
from rlhf_pipeline.core.progress import Metrics, duration, is_main, read_metrics, say
from rlhf_pipeline.core.training import checkpoints
from rlhf_pipeline.core.training.checks import check_room, check_settings
from rlhf_pipeline.core.training.conversations import Demonstrations, load_demonstrations
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

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Config:
    input_repo: What[str]
    """Demonstrations: messages ending with an assistant turn, or prompt and response."""
    output_dir: What[str]
    """Folder of the policy."""
    base_model: Annotated[What[str], tyro.conf.arg(aliases=("--model",))] = "meta-llama/Meta-Llama-3-8B"
    """Model to start from: a local folder or a Hub id, with a chat template."""
    fresh: What[bool] = False
    """Start from random weights for base_model's config, drawn by --seed."""
    split: What[str] = "train"
    """Split of the demonstrations."""
    every_turn: What[bool] = False
    """Learn every assistant turn of a conversation, not the last alone."""
    max_length: What[int] = 4096
    """Leave out demonstrations of more tokens than this, prompt and response together."""
    chat_template: What[str | None] = None
    """File with a chat template to use instead of the model's; the policy keeps it."""

    lr: What[float] = 2e-5
    """Peak learning rate."""
    warmup_ratio: What[float] = 0.03
    """Share of the updates over which the learning rate rises; then it falls as a cosine to 0."""
    weight_decay: What[float] = 0.0
    """AdamW's weight decay."""
    max_grad_norm: What[float | None] = 1.0
    """Clip the gradient of an update to this norm; None leaves it alone."""
    batch_size: What[int] = 128
    """Demonstrations per update, over all processes."""
    epochs: What[float] = 2.0
    """Passes over the demonstrations."""
    seed: What[int] = 1
    """Decides the order of the demonstrations, and fresh weights."""

    per_device_train_batch_size: How[int | None] = None
    """At most this many demonstrations in one engine call."""
    micro_batch_tokens: How[int | None] = 8192
    """At most this many tokens, padding included, in one engine call."""
    attn_implementation: How[models.Attention] = "auto"
    """auto: packed rows by flash_attention_2 or torch's own kernel where they work, else sdpa; never a download."""
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


@dataclass(frozen=True)
class Plan:
    """Everything that is known before a model is loaded."""

    model: models.ModelRef
    chat: Chat
    source: storage.Source
    data: Demonstrations
    updates: int
    identity: dict[str, Any]


def make_plan(config: Config) -> Plan:
    """Resolve and check inputs. Raises BadUse with one sentence for what can't be trained on."""
    model = models.resolve_model(
        config.base_model,
        flag="--base_model",
        chat_template=config.chat_template is None,
        weights=not config.fresh,
    )
    chat = Chat.load(str(model.folder), chat_template=config.chat_template)
    source = storage.open_source(config.input_repo, flag="--input_repo", split=config.split)
    data = load_demonstrations(source, chat, max_length=config.max_length, every_turn=config.every_turn)
    seen = int(len(data) * config.epochs)
    updates, _ = count_updates(seen, config.batch_size, f"{config.input_repo} gives {seen} demonstrations")
    what = {name: value for name, value in what_fields(config).items() if name not in PLACES}
    inputs = {
        "demonstrations": source.fingerprint,
        "model": models.fingerprint(model),
        "chat": chat.template_hash,
    }
    return Plan(model, chat, source, data, updates, {"command": "sft", "what": what, "inputs": inputs})


PLACES = ("input_repo", "output_dir", "base_model", "chat_template")
"""Fields that name things: what they hold counts, by its fingerprint, not what they are called."""


def check_pending(config: Config, pending: dict[str, int]) -> None:
    """`--check` where an earlier stage has still to write the data or the model: what is there must be right."""
    if config.base_model not in pending:
        models.resolve_model(config.base_model, flag="--base_model", weights=not config.fresh)
    if config.input_repo not in pending:
        storage.open_source(config.input_repo, flag="--input_repo", split=config.split)
    say(f"pending    {', '.join(f'{ref} ({rows:,} rows)' for ref, rows in pending.items())}")
    say(f"model      {config.base_model} -> {config.output_dir}")


def print_plan(plan: Plan, config: Config) -> None:
    say(f"data       {plan.source.ref}: {len(plan.data):,} responses to learn from {plan.data.rows:,} rows")
    for reason, count in plan.data.dropped.items():
        say(f"dropped    {count:,} {reason}")
    say(f"model      {plan.model.text}{' with fresh weights' if config.fresh else ''} -> {config.output_dir}")
    say(f"updates    {plan.updates} of {config.batch_size}, learning rate {config.lr:g}")


def train_policy(engine: Engine, plan: Plan, config: Config) -> None:
    """The loop: from the newest checkpoint, if any, to the last update."""
    folder = Path(config.output_dir)
    order = order_of_rows(len(plan.data), plan.updates, config.batch_size, config.seed)
    done = checkpoints.updates_done(folder / "checkpoints")
    metrics = Metrics(folder / "metrics.jsonl", after=done, tensorboard=config.tensorboard, wandb=config.wandb)
    engine.model.train()
    for update in checkpoints.updates(
        engine.accelerator,
        folder / "checkpoints",
        plan.updates,
        save_every=config.save_every,
        keep=config.keep_checkpoints,
    ):
        started = time.monotonic()
        lr = learning_rate(update, plan.updates, peak=config.lr, warmup_ratio=config.warmup_ratio)
        set_learning_rate(engine.optimizer, lr)
        loss, norm, tokens = run_update(engine, plan.data, order[update], config)
        numbers = {"update": update + 1, "lr": lr, "loss": loss, "grad_norm": norm}
        checkpoints.check_finite(numbers, folder / "checkpoints")
        metrics.write({**numbers, "tokens_per_second": tokens / (time.monotonic() - started)})


def run_update(
    engine: Engine,
    data: Demonstrations,
    indices: npt.NDArray[np.int64],
    config: Config,
) -> tuple[float, float, int]:
    """One optimizer step on the mean negative log-prob per response token, in nats, over the whole update.

    Returns it, the gradient norm before clipping, and the tokens computed.
    """
    lengths = np.array([len(data.prompt[i]) + len(data.response[i]) for i in indices])
    response_tokens = sum(len(data.response[i]) for i in indices)
    calls = plan_calls(
        lengths,
        world_size=engine.world_size,
        max_pairs=config.per_device_train_batch_size,
        max_tokens=config.micro_batch_tokens,
        packed=engine.packed,
    )
    seen = torch.zeros((), dtype=torch.float64, device=engine.device)

    def loss_of(call: MicroBatch) -> torch.Tensor:
        rows = indices[list(call.indices)]
        prompts, responses = [data.prompt[i] for i in rows], [data.response[i] for i in rows]
        batch = collate(prompts, responses, packed=engine.packed, device=engine.device)
        loss = -token_logps(engine.model, batch, 1.0).sum() * (call.weight / response_tokens)
        seen.add_(loss.detach())
        return loss

    norm = one_update(engine, calls[engine.rank], loss_of, max_grad_norm=config.max_grad_norm)
    return float(sum_over_ranks(engine.accelerator, seen)), norm, int(lengths.sum())


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
        start = prepare_folder(plan, config)
        accelerator = make_accelerator(max_grad_norm=config.max_grad_norm)
        accelerator.wait_for_everyone()  # rank 0 may still draw; under an Accelerator it would draw with all of them
        engine = load(accelerator, start, config)
        train_policy(engine, plan, config)
        save(engine, start, plan, config)
        say(f"done in {duration(time.monotonic() - started)}: {folder}")
        clean_exit(accelerator)
    return folder


def prepare_folder(plan: Plan, config: Config) -> Path:
    """The folder of the model to start from; fresh weights are drawn once, on rank 0, so that every launch has them."""
    folder = Path(config.output_dir)
    if is_main():
        storage.start_run(folder, plan.identity, overwrite=config.run.overwrite)
    if not config.fresh:
        return models.fetch_weights(plan.model, flag="--base_model")
    fresh = folder / "fresh"
    if is_main() and not (fresh / models.CONFIG).exists():
        models.draw_policy(plan.model.folder, fresh, seed=config.seed)
    return fresh


def load(accelerator: Accelerator, start: Path, config: Config) -> Engine:
    """The model and its optimizer, ready for this launch."""
    attention = models.choose_attention(
        config.attn_implementation,
        models.load_config(start),
        half_precision=accelerator.mixed_precision == "bf16",
        can_pack=True,
    )
    model = models.load_policy(start, dtype=load_dtype(accelerator), attn_implementation=attention)
    install(model)
    return make_engine(
        accelerator,
        model,
        attention,
        can_pack=True,
        gradient_checkpointing=config.gradient_checkpointing,
        lr=config.lr,
        weight_decay=config.weight_decay,
    )


def save(engine: Engine, start: Path, plan: Plan, config: Config) -> None:
    """Write the policy, then its provenance; then the training state is no longer needed."""
    folder = Path(config.output_dir)
    state_dict = engine.accelerator.get_state_dict(engine.model)

    def write() -> None:
        policy = engine.accelerator.unwrap_model(engine.model)
        template = None if config.chat_template is None else Path(config.chat_template)
        models.save_policy(policy, state_dict, start=start, folder=folder, chat_template=template)
        made = provenance.describe(
            command="sft",
            config={name: value for name, _, value in fields_with_roles(config)},
            inputs={
                "demonstrations": provenance.describe_source(plan.source),
                "model": {"ref": plan.model.text, "fingerprint": plan.identity["inputs"]["model"]},
            },
            rows_in=plan.data.rows,
            rows_out=plan.updates * config.batch_size,
            dropped=plan.data.dropped,
            engine=describe_launch(engine.accelerator),
            chat=plan.chat.describe(),
        )
        facts = {"after the last update": read_metrics(folder / "metrics.jsonl")[-1]}
        card = provenance.model_card(title=f"Policy tuned from {plan.model.text}", provenance=made, facts=facts)
        storage.finish_run(folder, plan.identity, made, card)
        for leftover in ("checkpoints", "fresh"):
            shutil.rmtree(folder / leftover, ignore_errors=True)

    main_process_first(engine.accelerator, write)


if __name__ == "__main__":
    entry(main, Config)
