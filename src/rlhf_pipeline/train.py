"""Stage 4: tokenized pairs -> the next policy, with REBEL or another pair loss.

Reads filter's output (or the tutorial's published datasets) and the policy that wrote the responses; writes a
transformers folder that generate, vLLM and from_pretrained load, with metrics.jsonl and the reference log-probs beside.

    accelerate launch --config_file accelerate_cfgs/deepspeed_config_stage_3.yaml --num_processes 8 \\
        -m rlhf_pipeline.train --input_repo ./runs/a/pairs --output_dir ./runs/a/policy
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import tyro

from rlhf_pipeline.core import hub, models, provenance, storage
from rlhf_pipeline.core.attention import PACKING
from rlhf_pipeline.core.batches import MicroBatch, order_of_rows
from rlhf_pipeline.core.chat import Chat
from rlhf_pipeline.core.command import (
    RUN,
    BadUse,
    How,
    RunFlags,
    What,
    entry,
    fields_with_roles,
    what_fields,
)
from rlhf_pipeline.core.logps import install
from rlhf_pipeline.core.progress import Metrics, duration, is_main, read_metrics, say
from rlhf_pipeline.core.training import checkpoints, lora, losses, memory
from rlhf_pipeline.core.training.checks import (
    check_given_reference,
    check_room,
    check_same_prompts,
    check_same_tokenizer,
    check_settings,
)
from rlhf_pipeline.core.training.distributed import (
    Engine,
    clean_exit,
    describe_launch,
    from_main,
    is_deepspeed,
    load_dtype,
    main_process_first,
    make_accelerator,
    make_engine,
    one_update,
    promised_world_size,
    sum_over_ranks,
)
from rlhf_pipeline.core.training.lora import Lora
from rlhf_pipeline.core.training.losses import (
    Dpo,
    Ipo,
    Kto,
    Loss,
    Orpo,
    Rebel,
    Simpo,
    Sppo,
    with_sft_term,
)
from rlhf_pipeline.core.training.optim import OptimizerName, count_updates, learning_rate, set_learning_rate
from rlhf_pipeline.core.training.pairs import PairData, load_pairs
from rlhf_pipeline.core.training.passes import (
    Limits,
    Split,
    as_pairs,
    mismatch,
    mismatched_log_ratio,
    pair_logps,
    plan_pairs,
    split_logps,
)
from rlhf_pipeline.core.training.reference import given_logps, reference_logps
from rlhf_pipeline.core.training.watching import WATCHED, judge_target, means, watch

if TYPE_CHECKING:
    from accelerate import Accelerator

TUTORIAL_TEMPERATURE = 0.8


@dataclass(frozen=True)
class Config:
    input_repo: Annotated[What[str], tyro.conf.arg(aliases=("--task.input_repo",))]
    """Tokenized pairs: filter's output, a local folder or a Hub dataset."""
    output_dir: What[str]
    """Folder of the new policy."""
    base_model: Annotated[What[str], tyro.conf.arg(aliases=("--model",))] = "meta-llama/Meta-Llama-3-8B-Instruct"
    """The policy to start from, also the reference: the one that wrote the responses. A local folder or a Hub id."""

    loss: What[Literal["rebel", "dpo", "ipo", "simpo", "kto", "orpo", "sppo"]] = "rebel"
    """Which loss; its hyper-parameters are the flags of its name, for example --rebel.eta."""
    rebel: Rebel = Rebel()
    dpo: Dpo = Dpo()
    ipo: Ipo = Ipo()
    simpo: Simpo = Simpo()
    kto: Kto = Kto()
    orpo: Orpo = Orpo()
    sppo: Sppo = Sppo()
    sft_weight: What[float] = 0.0
    """Weight of the chosen response's mean negative log-prob per token, added to any loss."""

    lora: Lora = Lora()
    lr: What[float] = 3e-7
    """Peak learning rate."""
    warmup_ratio: What[float] = 0.1
    """Share of the updates over which the learning rate rises; then it falls as a cosine to 0."""
    optimizer: What[OptimizerName] = "adamw"
    """adamw, or adam without weight decay."""
    eps: What[float] = 1e-8
    """Adam's epsilon."""
    weight_decay: What[float] = 1e-6
    """AdamW's weight decay."""
    max_grad_norm: What[float | None] = None
    """Clip the gradient of an update to this norm; None leaves it alone."""
    batch_size: What[int] = 128
    """Pairs per update, over all processes."""
    epochs: What[float] = 1.0
    """Passes over the pairs."""
    total_episodes: What[int | None] = None
    """Stop after this many pairs, if that is less than the epochs."""
    temperature: Annotated[What[float | None], tyro.conf.arg(aliases=("--task.temperature",))] = None
    """Sampling temperature of the responses; None takes it from the pairs' provenance."""
    chat_template: What[str | None] = None
    """File with the chat template that the pairs were made with, where it is not the model's; the policy keeps it."""
    reference_from_input: What[bool] = False
    """Take the reference log-probs that the pairs bring as chosen_logp (chosen_logprob) instead of computing them."""
    seed: What[int] = 555134
    """Decides the order of the pairs, and where adapters begin."""

    per_device_train_batch_size: How[int | None] = None
    """At most this many pairs in one engine call; None leaves it to --micro_batch_tokens."""
    micro_batch_tokens: How[int | None] = None
    """At most this many tokens, padding included, in one engine call; None and None above: one pair a call."""
    gradient_accumulation_steps: How[int | None] = None
    """Accepted for the tutorial's sake: refused unless it fits --batch_size; the plan of an update decides it."""
    maxlen_prompt: Annotated[How[int | None], tyro.conf.arg(aliases=("--task.maxlen_prompt",))] = None
    """Accepted for the tutorial's sake: the pairs know their lengths."""
    maxlen: Annotated[How[int | None], tyro.conf.arg(aliases=("--task.maxlen",))] = None
    """Accepted for the tutorial's sake: the pairs know their lengths."""
    reference_tolerance: How[float] = 1.0
    """Mean |log_ratio|, nats, before the first update above which the reference counts as another model's."""
    attn_implementation: How[models.Attention] = "auto"
    """auto: packed rows by flash_attention_2 or torch's own kernel where they work, else sdpa; never a download."""
    gradient_checkpointing: How[bool] = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    gpus: How[int | None] = None
    """--check plans memory and time for this many GPUs; None: the processes of this launch, or 8."""
    rate: How[str | None] = None
    """--check: real tokens per second over all GPUs, as a number or an earlier run's metrics.jsonl, to say how long."""
    save_every: How[int] = 100
    """Updates between checkpoints of the training state; 0: only at SIGTERM."""
    keep_checkpoints: How[int] = 1
    """How many checkpoints to keep."""
    eval_every: How[int] = 100
    """Updates between evaluations on the test split, and once at the end; 0: never."""
    tensorboard: How[bool] = False
    """Write TensorBoard files to <output_dir>/tensorboard as well."""
    wandb: How[str | None] = None
    """Name of a Weights & Biases project to report to as well."""
    push_to: How[str | None] = None
    """Push the finished policy to this Hub id, private unless --public."""
    public: How[bool] = False
    """Push to a public repo; without it only to a private one."""
    trust_remote_code: What[bool] = False
    """Run the model repo's own Python code."""
    run: RUN = RunFlags()


NOT_PUSHED = ("reference/*", "checkpoints/*", "tensorboard/*", "wandb/*", "metrics.jsonl", "fingerprint.json")
LOSSES = ("rebel", "dpo", "ipo", "simpo", "kto", "orpo", "sppo")
PLACES = ("input_repo", "output_dir", "base_model", "chat_template")
"""Fields that name things: what they hold counts, by its fingerprint, not what they are called."""


# What is to be done


@dataclass(frozen=True)
class Plan:
    """Everything that is known before a model is loaded."""

    model: models.ModelRef
    chat: Chat
    train: PairData
    test: PairData | None
    train_source: storage.Source
    temperature: float
    temperature_from: str
    updates: int
    pairs_left_over: int
    adapters: lora.Size | None
    identity: dict[str, Any]


def check_values(config: Config) -> None:
    """Raise BadUse for values that can't be meant, before anything is read."""
    check_settings(config)
    if config.sft_weight < 0:
        raise BadUse(f"--sft_weight is {config.sft_weight}; expected 0 or more.")
    if config.temperature is not None and config.temperature <= 0:
        raise BadUse(f"--temperature is {config.temperature}; expected a number above 0.")
    for name in LOSSES:
        if name != config.loss and getattr(config, name) != type(getattr(config, name))():
            raise BadUse(f"a --{name} flag is set, but --loss is {config.loss}: drop it, or pass --loss {name}.")
    losses.check_values(getattr(config, config.loss), f"--{config.loss}")
    lora.check_values(config.lora)


def make_plan(config: Config) -> Plan:
    """Resolve and check inputs. Raises BadUse with one sentence for what can't be trained on."""
    model = models.resolve_model(config.base_model, flag="--base_model")
    chat = Chat.load(model.folder, chat_template=config.chat_template, flag="--base_model")
    source = storage.open_source(config.input_repo, flag="--input_repo", split="train")
    check_same_tokenizer(source, chat, config.base_model)
    train = load_pairs(source, pad_id=chat.pad_id, end_ids=chat.end_ids)
    test = None
    if {"test", "test_prefs"} & set(source.splits):
        test_source = storage.open_source(config.input_repo, flag="--input_repo", split="test")
        test = load_pairs(test_source, pad_id=chat.pad_id, end_ids=chat.end_ids)
    if getattr(config, config.loss).needs_all_rewards and train.rewards is None:
        raise BadUse(
            f"--loss {config.loss} needs the column rewards, which {config.input_repo} lacks: filter writes it."
        )
    check_same_prompts(source, train, chat)
    if config.reference_from_input:
        check_given_reference(source, [train, *([test] if test else [])], getattr(config, config.loss), config.loss)
    updates, left_over = updates_of(len(train), config)
    temperature, temperature_from = choose_temperature(config, source)
    adapters = None
    if config.lora.r is not None:
        adapters = lora.measure(model.folder, config.lora, trust_remote_code=config.trust_remote_code)
    inputs = {"pairs": source.fingerprint, "model": models.fingerprint(model)}
    if config.chat_template is not None:
        inputs["chat"] = chat.template_hash
    identity = {"command": "train", "what": {**what_decides(config), "temperature": temperature}, "inputs": inputs}
    return Plan(model, chat, train, test, source, temperature, temperature_from, updates, left_over, adapters, identity)


def what_decides(config: Config) -> dict[str, Any]:
    """The fields that decide the weights, but for those that name places and those of what is not used."""
    unused = {*LOSSES} - {config.loss} | ({"lora"} if config.lora.r is None else set())
    what = what_fields(config)
    return {name: what[name] for name in what if name not in PLACES and name.split(".")[0] not in unused}


def choose_temperature(config: Config, source: storage.Source) -> tuple[float, str]:
    """(temperature, where it comes from): the flag, the pairs' provenance, else the tutorial's 0.8."""
    if config.temperature is not None:
        return config.temperature, "--temperature"
    sampling = (source.provenance or {}).get("sampling")
    if sampling is not None and sampling["temperature"]:
        return float(sampling["temperature"]), "the pairs' provenance"
    return TUTORIAL_TEMPERATURE, "the tutorial (the pairs don't say)"


def updates_of(pairs: int, config: Config) -> tuple[int, int]:
    """(updates, pairs in the incomplete last one, which is dropped). Raises BadUse for fewer pairs than one update."""
    seen = int(pairs * config.epochs)
    if config.total_episodes is not None:
        seen = min(seen, config.total_episodes)
    return count_updates(seen, config.batch_size, f"{config.input_repo} gives {seen} pairs")


def print_plan(plan: Plan, config: Config) -> None:
    lengths = plan.train.lengths()
    margins = plan.train.margins()
    say(f"pairs      {plan.train_source.ref}: {len(plan.train):,} train, {len(plan.test or []):,} test")
    say(f"tokens     {lengths.sum():,} with their prompts, longest {lengths.max():,}")
    say(f"model      {plan.model.text} -> {config.output_dir}")
    if plan.adapters is not None:
        size = plan.adapters
        say(f"LoRA       rank {config.lora.r} on {size.layers} layers: {size.trained:,} of {size.total:,} weights")
    say(f"updates    {plan.updates} of {config.batch_size} pairs; {plan.pairs_left_over} pairs left over are dropped")
    say(f"loss       {config.loss}, learning rate {config.lr:g}")
    say(f"reference  {describe_reference(plan, config)}")
    say(f"temperature {plan.temperature:g} from {plan.temperature_from}")
    say(f"margin     mean {margins.mean():.4g}, largest {margins.max():.4g} reward units")


def print_cost(plan: Plan, config: Config) -> None:
    """What an update computes, what that takes of each GPU in every launch, and how long a run is."""
    gpus = config.gpus or (promised_world_size() if promised_world_size() > 1 else 8)
    model_config = models.load_config(plan.model.folder, trust_remote_code=config.trust_remote_code)
    kind = models.choose_attention(config.attn_implementation, model_config, half_precision=True, can_pack=True)
    call, tokens, computed = memory.largest_call(
        plan.train,
        config.batch_size,
        gpus,
        limits_of(config),
        packed=kind in PACKING,
        seed=config.seed,
        updates=plan.updates,
    )
    change = (
        f"{computed - 1:.0%} more with padding" if computed >= 1 else f"{1 - computed:.0%} fewer with prompts shared"
    )
    say(f"update     {tokens:,.0f} tokens on average, {change}; largest call {call.tokens:,} tokens")
    shape = memory.shape_of(plan.model.folder, trust_remote_code=config.trust_remote_code)
    if shape is None:
        say(f"memory     can't be said for {model_config.model_type}: no decoder with RMS norms and a gated MLP")
    else:
        checkpointing = "with" if config.gradient_checkpointing else "without"
        say(f"memory     GiB on each of {gpus} GPUs, bf16, {checkpointing} gradient checkpointing, attention {kind}:")
        for line in memory.table(
            shape,
            call,
            processes=gpus,
            checkpointing=config.gradient_checkpointing,
            trained=None if plan.adapters is None else plan.adapters.trained,
        ):
            say(f"           {line}")
    if config.rate is not None:
        rate = memory.tokens_per_second(config.rate)
        seconds = memory.seconds_of_run(plan.train, plan.updates * tokens, rate, reference=plan_needs_reference(config))
        say(f"time       {duration(seconds)} at {rate:,.0f} tokens per second, reference log-probs included")


def plan_needs_reference(config: Config) -> bool:
    return getattr(config, config.loss).needs_reference and not config.reference_from_input


def describe_reference(plan: Plan, config: Config) -> str:
    """Where the reference log-probs come from, in words."""
    if not getattr(config, config.loss).needs_reference:
        return f"none, {config.loss} needs no reference"
    renamed = ", ".join(f"{old} as {new}" for old, new in plan.train_source.renamed.items() if new.endswith("_logp"))
    columns = "chosen_logp and rejected_logp" + (f" (read {renamed})" if renamed else "")
    if config.reference_from_input:
        return f"the pairs' columns {columns}"
    ignored = f"; the pairs' {columns} are left alone" if plan.train.chosen_logp is not None else ""
    return f"{plan.model.text}, asked before the first update{ignored}"


def check_pending(config: Config, pending: dict[str, int]) -> None:
    """`--check` where an earlier stage has still to write the pairs or the policy: what is there must be right."""
    if config.base_model not in pending:
        models.resolve_model(config.base_model, flag="--base_model", chat_template=config.chat_template is None)
    if config.input_repo in pending:
        updates, _ = updates_of(pending[config.input_repo], config)
        say(f"pairs      {config.input_repo}: pending, at most {pending[config.input_repo]:,}, {updates} updates")
    else:
        storage.open_source(config.input_repo, flag="--input_repo")
    say(f"model      {config.base_model} -> {config.output_dir}")


# Work


def resolve_loss(config: Config, margins: npt.NDArray[np.float64]) -> Loss:
    """The loss to train with; REBEL's eta from its target gap, if that was given. Says what it asks of the policy."""
    loss: Loss = getattr(config, config.loss)
    if not isinstance(loss, Rebel):
        return loss
    if loss.target_gap is not None:
        if margins.mean() <= 0:
            raise BadUse(f"--rebel.target_gap needs a positive mean reward_margin; here it is {margins.mean():.4g}.")
        loss = dataclasses.replace(loss, eta=loss.target_gap / float(margins.mean()), target_gap=None)
    say(
        f"eta        {loss.eta:.6g}: eta x mean margin asks for a log_ratio_gap of {loss.eta * margins.mean():.4g} nats"
    )
    return loss


def with_reference(engine: Engine, plan: Plan, config: Config, loss: Loss) -> dict[str, Split]:
    """{split: pairs and reference}; the reference is the policy itself, asked before its first update."""
    data = {"train": plan.train} | ({"test": plan.test} if plan.test else {})
    if not loss.needs_reference:
        return {name: Split(pairs, None) for name, pairs in data.items()}
    folder = Path(config.output_dir)
    untouched = not from_main(engine.accelerator, checkpoints.updates_done(folder / "checkpoints"))
    passes: dict[str, Any] = {
        "temperature": plan.temperature,
        "limits": limits_of(config),
        "tolerance": config.reference_tolerance if untouched else None,
    }
    if config.reference_from_input:
        given = given_logps(engine, data, plan.train_source.name, **passes)
        return {name: Split(pairs, given[name]) for name, pairs in data.items()}
    mismatched = {name: mismatch(pairs) for name, pairs in data.items()} if loss.needs_mismatched else {}
    logps = reference_logps(
        engine,
        data | {f"mismatched_{name}": pairs for name, pairs in mismatched.items()},
        folder / "reference",
        {"inputs": plan.identity["inputs"], "temperature": plan.temperature},
        **passes,
    )
    return {
        name: Split(pairs, logps[name], mismatched.get(name), logps.get(f"mismatched_{name}"))
        for name, pairs in data.items()
    }


def train_policy(engine: Engine, plan: Plan, config: Config, loss: Loss, splits: dict[str, Split]) -> None:
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
        numbers = {"update": update + 1, "lr": lr}
        numbers |= run_update(engine, splits["train"], order[update], plan, config, loss)
        checkpoints.check_finite(numbers, saved)
        seconds = time.monotonic() - started
        numbers["pairs_per_second"] = config.batch_size / seconds
        numbers["tokens_per_second"] = float(plan.train.lengths()[order[update]].sum()) / seconds
        if evaluation_is_due(update + 1, plan, config):
            numbers |= evaluate(engine, splits["test"], plan, config, loss)
        metrics.write(numbers)


def evaluation_is_due(update: int, plan: Plan, config: Config) -> bool:
    if plan.test is None or not config.eval_every:
        return False
    return update == plan.updates or update % config.eval_every == 0


def run_update(
    engine: Engine, split: Split, indices: npt.NDArray[np.int64], plan: Plan, config: Config, loss: Loss
) -> dict[str, float]:
    """One optimizer step on the pairs `indices`. Returns the means of WATCHED over them and the gradient norm."""
    limits = limits_of(config)
    calls = plan_pairs(engine, split.data, indices, limits)
    mismatched = mismatched_log_ratio(engine, split, indices, temperature=plan.temperature, limits=limits)
    sums = torch.zeros(len(WATCHED), dtype=torch.float64, device=engine.device)

    def loss_of(call: MicroBatch) -> torch.Tensor:
        rows = indices[list(call.indices)].tolist()
        pairs = as_pairs(split, rows, pair_logps(engine, split.data, rows, plan.temperature), mismatched)
        values = with_sft_term(loss(pairs), pairs, config.sft_weight)
        sums.add_(watch(pairs, values) * call.weight)
        return values.sum() * (call.weight / len(indices))

    norm = one_update(engine, calls[engine.rank], loss_of, max_grad_norm=config.max_grad_norm)
    return means(sum_over_ranks(engine.accelerator, sums), len(indices), loss) | {"grad_norm": norm}


def evaluate(engine: Engine, split: Split, plan: Plan, config: Config, loss: Loss) -> dict[str, float]:
    """Loss, gap and accuracy on the test split."""
    every, limits = np.arange(len(split.data)), limits_of(config)
    mismatched = mismatched_log_ratio(engine, split, every, temperature=plan.temperature, limits=limits)
    logps = torch.from_numpy(
        split_logps(engine, split.data, every, temperature=plan.temperature, limits=limits)
    ).float()
    pairs = as_pairs(split, every.tolist(), (logps[:, 0], logps[:, 1]), mismatched)
    values = with_sft_term(loss(pairs), pairs, config.sft_weight)
    numbers = means(watch(pairs, values), len(every), loss)
    return {f"test_{name}": numbers[name] for name in ("loss", "log_ratio_gap", "accuracy")}


def limits_of(config: Config) -> Limits:
    per_device = config.per_device_train_batch_size
    if per_device is None and config.micro_batch_tokens is None:
        per_device = 1
    return Limits(per_device, config.micro_batch_tokens)


# Recipe


def main(config: Config) -> Path:
    check_values(config)
    pending = config.run.pending_rows()
    if config.run.check and config.push_to is not None:
        hub.check_write(config.push_to, flag="--push_to")
    if config.run.check and {config.input_repo, config.base_model} & pending.keys():
        check_pending(config, pending)
        return Path(config.output_dir)
    plan = make_plan(config)
    print_plan(plan, config)
    folder = Path(config.output_dir)
    state = storage.run_state(folder, plan.identity, overwrite=config.run.overwrite)
    say(f"output     {folder}: {state}")
    if state != "done":
        trained = None if plan.adapters is None else plan.adapters.trained
        say(f"disk       {check_room(folder, plan.model.folder, config, updates=plan.updates, trained=trained)}")
    if config.run.check:
        print_cost(plan, config)
        return folder
    if config.push_to is not None and is_main():
        hub.create_repo(config.push_to, "model", private=not config.public, flag="--push_to")
    if state == "done":
        push(config)
        return folder
    with storage.run_lock(folder) if is_main() else contextlib.nullcontext():
        started = time.monotonic()
        if is_main():
            storage.start_run(folder, plan.identity, overwrite=config.run.overwrite)
        engine = load(make_accelerator(max_grad_norm=config.max_grad_norm), plan, config)
        loss = resolve_loss(config, plan.train.margins())
        splits = with_reference(engine, plan, config, loss)
        train_policy(engine, plan, config, loss, splits)
        if told := judge_target(read_metrics(folder / "metrics.jsonl")[-1]):
            say(f"target     {told}")
        save(engine, plan, config, loss)
        say(f"done in {duration(time.monotonic() - started)}: {folder}")
        clean_exit(engine.accelerator, lambda: push(config))
    return folder


def push(config: Config) -> None:
    """Upload the finished policy, without what only this machine needs, if --push_to asks for it."""
    if config.push_to is not None and is_main():
        commit = hub.push(Path(config.output_dir), config.push_to, "model", ignore=NOT_PUSHED)
        say(f"pushed     hf://{config.push_to}@{commit}")


def load(accelerator: Accelerator, plan: Plan, config: Config) -> Engine:
    """The policy and its optimizer, ready for this launch."""
    path = models.fetch_weights(plan.model, flag="--base_model")
    trust = config.trust_remote_code
    attention = models.choose_attention(
        config.attn_implementation,
        models.load_config(path, trust_remote_code=trust),
        half_precision=accelerator.mixed_precision == "bf16",
        can_pack=True,
    )
    dtype = load_dtype(accelerator)
    if config.lora.r is not None and not is_deepspeed(accelerator):
        dtype = lora.base_dtype(path, accelerator.mixed_precision)
    model: Any = models.load_policy(path, dtype=dtype, attn_implementation=attention, trust_remote_code=trust)
    if config.lora.r is not None:
        model = lora.attach(model, config.lora, seed=config.seed, float32=not is_deepspeed(accelerator))
        torch.manual_seed(config.seed + accelerator.process_index)  # of its dropout
    install(model)
    return make_engine(
        accelerator,
        model,
        attention,
        can_pack=True,
        gradient_checkpointing=config.gradient_checkpointing,
        lr=config.lr,
        eps=config.eps,
        weight_decay=config.weight_decay,
        kind=config.optimizer,
    )


def save(engine: Engine, plan: Plan, config: Config, loss: Loss) -> None:
    """Write the policy, then its provenance; then the training state is no longer needed."""
    folder = Path(config.output_dir)
    state_dict = engine.accelerator.get_state_dict(engine.model)

    def write() -> None:
        start = models.fetch_weights(plan.model, flag="--base_model")
        policy, weights = engine.accelerator.unwrap_model(engine.model), state_dict
        if config.lora.r is not None:
            lora.save_adapter(policy, state_dict, config.lora, folder, base=plan.model.text)
            policy = policy.get_base_model()
            weights = lora.merged(state_dict, config.lora, dtype=models.stored_dtype(start))
        template = None if config.chat_template is None else Path(config.chat_template)
        models.save_policy(policy, weights, start=start, folder=folder, chat_template=template)
        made = describe_policy(engine.accelerator, plan, config, loss)
        storage.finish_run(folder, plan.identity, made, policy_card(made, plan, folder))
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    main_process_first(engine.accelerator, write)


def describe_policy(accelerator: Accelerator, plan: Plan, config: Config, loss: Loss) -> dict[str, Any]:
    return provenance.describe(
        command="train",
        config={name: value for name, _, value in fields_with_roles(config)},
        inputs={
            "pairs": provenance.describe_source(plan.train_source),
            "model": {"ref": plan.model.text, "fingerprint": plan.identity["inputs"]["model"]},
        },
        rows_in=len(plan.train),
        rows_out=plan.updates * config.batch_size,
        dropped={"left over after the last whole update": plan.pairs_left_over},
        engine=describe_launch(accelerator),
        loss={"name": config.loss, **dataclasses.asdict(loss)},
        reference=describe_reference(plan, config),
        temperature=plan.temperature,
        chat=plan.chat.describe(),
    )


def policy_card(made: dict[str, Any], plan: Plan, folder: Path) -> str:
    last = read_metrics(folder / "metrics.jsonl")[-1]
    facts = {"loss": made["loss"], "temperature": made["temperature"], "after the last update": last}
    if told := judge_target(last):
        facts["target"] = told
    return provenance.model_card(title=f"Policy trained from {plan.model.text}", provenance=made, facts=facts)


if __name__ == "__main__":
    entry(main, Config)
