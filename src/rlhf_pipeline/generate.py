"""Stage 1: prompts -> N responses to each, sampled from a policy.

Reads a dataset of prompts (a Hub dataset, an output of this pipeline, a .jsonl, .json, .csv or .parquet file) and
writes prompt_id, prompt, response_{i}, response_{i}_tokens and response_{i}_finish_reason. A run that was killed goes
on where it stood when the same command runs again.

    python -m rlhf_pipeline.generate --output_repo ./runs/a/responses --prompts ./prompts.jsonl
    python -m rlhf_pipeline.generate --world_size 8 --output_repo OWNER/NAME
    python -m rlhf_pipeline.generate --model ./policy --prompts ./prompts.jsonl --output_repo ./out --check
"""

from __future__ import annotations

import contextlib
import gc
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from rlhf_pipeline.core import endpoint, preflight, provenance, storage, vllm_engine
from rlhf_pipeline.core.chat import Chat
from rlhf_pipeline.core.command import RUN, BadUse, How, RunFlags, What, entry, fields_with_roles, what_fields
from rlhf_pipeline.core.files import write_atomic
from rlhf_pipeline.core.generation import prompts
from rlhf_pipeline.core.generation.endpoint_sampler import Endpoint, EndpointSampler
from rlhf_pipeline.core.generation.engines import VllmEngines
from rlhf_pipeline.core.generation.responses import JOURNAL, SEED_STEP, SPLIT, Responses, Summary, summarize
from rlhf_pipeline.core.generation.sampling import (
    EngineOptions,
    SamplingSettings,
    TransformersSampler,
    VllmSampler,
    checkpoint_dtype,
)
from rlhf_pipeline.core.progress import amount, bar, duration, say

if TYPE_CHECKING:
    from rlhf_pipeline.core.models import ModelRef

BYTES_PER_TOKEN = 4
"""Of a response, on disk: its text and its ids, compressed."""
SKIPPED = "skipped.jsonl"
"""Beside the data: the prompts that were set aside, {row, prompt_id, reason, detail}."""


@dataclass(frozen=True)
class Config:
    output_repo: What[str]
    """Where to write the responses: a local folder, or OWNER/NAME on the Hub."""
    model: What[str] = "meta-llama/Meta-Llama-3-8B-Instruct"
    """Policy to sample from: a local folder or a Hub id."""
    prompts: What[str] = "allenai/ultrafeedback_binarized_cleaned_train"
    """Prompts: a Hub dataset, an output of this pipeline, or a .jsonl, .json, .csv or .parquet file."""
    split: What[str] = "train"
    """Split of the prompts."""
    prompt_column: What[str] = "prompt"
    """Column that holds the prompts, as text or as messages."""
    start_idx: What[int] = 0
    """First row to take."""
    end_idx: What[int] = -1
    """Row to stop before. -1: the end."""
    num_prompts: What[int | None] = None
    """Take only the first so many of these rows. None: all."""
    shuffle_seed: What[int | None] = None
    """Shuffle the rows with this seed before start_idx, end_idx and num_prompts count. None: as they come."""

    num_responses: Annotated[What[int], tyro.conf.arg(aliases=("--pairs",))] = 5
    """Responses to each prompt."""
    temperature: What[float] = 0.8
    """Sampling temperature. 0: always the most probable token."""
    top_p: What[float] = 0.9
    """Sample among the most probable tokens that together have this probability."""
    maxlen: What[int] = 2048
    """New tokens of a response at most."""
    seed: What[int] = 0
    """Response i of each prompt is sampled with seed + 50 i, mixed with the prompt's ids."""
    token_logps: What[bool] = False
    """Keep the sampled tokens' log-probabilities at temperature 1, for diagnosis, in response_{i}_token_logps."""

    system_prompt: What[str | None] = None
    """System turn for prompts that have none."""
    chat_template: What[str | None] = None
    """File with a chat template to use instead of the model's own."""
    date: What[str | None] = None
    """Day (YYYY-MM-DD) that a template is told which asks for today's. None: a fixed one."""

    backend: What[Literal["vllm", "transformers"]] = "vllm"
    """Engine. transformers needs no vLLM; it is for small models."""
    tensor_parallel_size: Annotated[How[int | None], tyro.conf.arg(aliases=("--world_size",))] = None
    """GPUs (groups of CPU cores) that share the model. None: all visible GPUs, or 1 on CPU."""
    data_parallel_size: How[int] = 1
    """Engines on this machine, each with tensor_parallel_size GPUs (groups of CPU cores) and its own responses."""
    engine: EngineOptions = EngineOptions()
    batch_invariant: How[bool] = False
    """vLLM's mode in which a row's numbers do not depend on its batch: a restart on GPUs gives identical rows."""
    endpoint: What[str | None] = None
    """Sample from an OpenAI-compatible endpoint instead of --model: its URL up to and with /v1. Gives text, no ids."""
    endpoint_model: What[str | None] = None
    """The endpoint's name for its model. A key, if it wants one, is read from OPENAI_API_KEY."""
    endpoint_concurrency: How[int] = 64
    """Requests to the endpoint at the same time."""
    rows_per_shard: How[int] = 1000
    """Prompts per parquet file, at most."""
    num_shards: How[int] = 1
    """Jobs that together write this output, each its share of the parquet files; see docs/storage.md."""
    shard_index: How[int | None] = None
    """Which of these jobs this is, from 0."""
    public: How[bool] = False
    """Push to a public repo on the Hub; without it only to a private one."""
    push_only: How[bool] = False
    """Push an output that is whole in its local folder, and compute nothing."""
    run: RUN = RunFlags()


@dataclass(frozen=True)
class Policy:
    """A model that an engine of ours loads. window: tokens that the longest prompt and response need."""

    model: ModelRef
    chat: Chat
    window: int
    dtype: str
    tensor_parallel_size: int


@dataclass(frozen=True)
class Plan:
    """Everything that is known before a model is loaded."""

    policy: Policy | Endpoint
    source: storage.Source
    rows: int
    prompts: prompts.Prompts
    output: storage.Ref
    identity: dict[str, Any]


AT_LEAST_ONE = (
    "num_responses",
    "maxlen",
    "rows_per_shard",
    "num_prompts",
    "tensor_parallel_size",
    "data_parallel_size",
    "endpoint_concurrency",
)


def check_values(config: Config) -> None:
    """Raise BadUse for values that can't be meant, before anything is read."""
    for name in AT_LEAST_ONE:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise BadUse(f"--{name} is {value}; expected 1 or more.")
    if not 0 <= config.temperature <= 2:
        raise BadUse(f"--temperature is {config.temperature}; expected a number from 0 (greedy) to 2.")
    if not 0 < config.top_p <= 1:
        raise BadUse(f"--top_p is {config.top_p}; expected a number above 0, at most 1.")
    if config.temperature == 0 and config.num_responses > 1:
        raise BadUse(
            f"--temperature 0 is greedy: all {config.num_responses} responses to a prompt would be the same; "
            "pass --num_responses 1, or a temperature above 0."
        )
    if config.seed < 0:
        raise BadUse(f"--seed is {config.seed}; expected 0 or more.")
    if config.endpoint is not None or config.endpoint_model is not None:
        check_endpoint_options(config)
        return
    if config.data_parallel_size > 1 and config.engine.distributed_executor_backend == "ray":
        raise BadUse(
            f"--data_parallel_size {config.data_parallel_size} starts engines on this machine, "
            "each with GPUs of its own: drop --engine.distributed_executor_backend ray."
        )
    if config.backend == "transformers":
        check_transformers_options(config)


def check_transformers_options(config: Config) -> None:
    for name in ("tensor_parallel_size", "data_parallel_size"):
        if (getattr(config, name) or 1) > 1:
            raise BadUse(f"--{name} {getattr(config, name)} needs --backend vllm; transformers takes one device.")
    if config.engine.quantization is not None:
        raise BadUse(f"--engine.quantization {config.engine.quantization} needs --backend vllm.")
    if config.batch_invariant:
        raise BadUse("--batch_invariant is a mode of vLLM's: drop it, or pass --backend vllm.")


NOT_FOR_AN_ENDPOINT = (
    "model",
    "chat_template",
    "date",
    "token_logps",
    "backend",
    "tensor_parallel_size",
    "data_parallel_size",
    "engine",
    "batch_invariant",
)
"""Fields that say how an engine of ours works."""


def check_endpoint_options(config: Config) -> None:
    if config.endpoint is None or config.endpoint_model is None:
        raise BadUse("--endpoint and --endpoint_model belong together: the URL, and the name that the model has there.")
    defaults = {field.name: field.default for field in fields(config)}
    for name in NOT_FOR_AN_ENDPOINT:
        if getattr(config, name) != defaults[name]:
            raise BadUse(f"--{name} has no meaning with --endpoint, which has an engine of its own: drop one of them.")


def make_plan(config: Config) -> Plan:
    """Resolve and check inputs, and render the prompts. Raises BadUse with one sentence for what can't be sampled."""
    output = storage.parse_ref(config.output_repo, flag="--output_repo", output=True)
    source = storage.open_source(config.prompts, flag="--prompts", split=config.split)
    source = prompts.read_as_prompt(source, config.prompt_column)
    rows = prompts.choose_rows(
        source.num_rows,
        start_idx=config.start_idx,
        end_idx=config.end_idx,
        num_prompts=config.num_prompts,
        shuffle_seed=config.shuffle_seed,
    )
    if config.endpoint is not None:
        return plan_endpoint(config, output, source, rows)
    return plan_policy(config, output, source, rows)


def plan_endpoint(config: Config, output: storage.Ref, source: storage.Source, rows: Sequence[int]) -> Plan:
    which = Endpoint(str(config.endpoint), str(config.endpoint_model), config.endpoint_concurrency)
    prepared = prompts.prepare(source, None, rows, None)
    what = decisive_fields(config) | {"system_prompt": config.system_prompt}
    for name in (*NOT_FOR_AN_ENDPOINT, *(name for name in what if name.startswith("engine."))):
        what.pop(name, None)
    identity = {"command": "generate", "what": what, "inputs": {"prompts": source.fingerprint}}
    return Plan(which, source, len(rows), prepared, output, identity)


def plan_policy(config: Config, output: storage.Ref, source: storage.Source, rows: Sequence[int]) -> Plan:
    from rlhf_pipeline.core import models

    model = models.resolve_model(config.model, flag="--model", chat_template=config.chat_template is None)
    chat = Chat.load(
        model.folder, chat_template=config.chat_template, system_prompt=config.system_prompt, date=config.date
    )
    model_config = models.load_config(model.folder)
    limit = choose_window(models.context_window(model_config), config)
    prepared = prompts.prepare(source, chat, rows, limit)
    window = min(limit, prepared.longest + config.maxlen)
    dtype = checkpoint_dtype(model.folder) if config.engine.dtype == "auto" else config.engine.dtype
    size = choose_tensor_parallel_size(config, model_config.get_text_config().num_attention_heads)
    what = decisive_fields(config) | {"engine.dtype": dtype, "window": window}
    identity = {
        "command": "generate",
        "what": what,
        "inputs": {"model": models.fingerprint(model), "prompts": source.fingerprint},
        "chat": {**chat.describe(), "stop_ids": chat.end_ids},
    }
    return Plan(Policy(model, chat, window, dtype, size), source, len(rows), prepared, output, identity)


def choose_window(of_model: int | None, config: Config) -> int:
    """Tokens of prompt and response together, at most."""
    asked = config.engine.max_model_len
    if of_model is None and asked is None:
        raise BadUse(f"--model {config.model} does not say how long its window is: pass --engine.max_model_len.")
    if of_model is not None and asked is not None and asked > of_model:
        raise BadUse(f"--engine.max_model_len {asked} is longer than the window of --model {config.model}, {of_model}.")
    return asked or of_model or 0


def choose_tensor_parallel_size(config: Config, num_heads: int) -> int:
    if config.backend == "transformers":
        return 1
    size = config.tensor_parallel_size or max(1, len(preflight.visible_gpus()) // config.data_parallel_size)
    if num_heads % size:
        raise BadUse(
            f"--tensor_parallel_size {size} does not divide the {num_heads} attention heads of --model {config.model}: "
            "pass a divisor of that."
        )
    return size


def check_machine(plan: Plan, config: Config) -> None:
    """Raise BadUse if what is left to be sampled can't be sampled from here."""
    if isinstance(plan.policy, Endpoint):
        endpoint.look_at(plan.policy.url, flag="--endpoint")
    elif config.backend == "vllm":
        check_vllm(config)
        check_processors(config, config.data_parallel_size * plan.policy.tensor_parallel_size)
    preflight.check_disk(plan.output.folder, estimate_bytes(plan, config), flag="--output_repo")


def check_vllm(config: Config) -> None:
    preflight.check_importable("vllm", flag="--backend vllm", instead="pass --backend transformers")
    if config.engine.distributed_executor_backend == "ray":
        preflight.check_importable("ray", flag="--engine.distributed_executor_backend ray")


def check_processors(config: Config, count: int) -> None:
    """Raise BadUse if there are no `count` free GPUs; without any, if there are fewer cores."""
    if config.engine.distributed_executor_backend == "ray":  # which knows the GPUs of all machines
        if not preflight.visible_gpus():
            raise BadUse(
                "--engine.distributed_executor_backend ray starts from a machine of the Ray cluster that has GPUs, and "
                "none is visible here: run the command on one of those."
            )
        return
    if not preflight.visible_gpus():
        vllm_engine.split_cores(count)  # refuses more groups than cores
    flag = "--tensor_parallel_size" + (" x --data_parallel_size" if config.data_parallel_size > 1 else "")
    preflight.check_gpus(count, memory_share=config.engine.gpu_memory_utilization, flag=flag)


def decisive_fields(config: Config) -> dict[str, Any]:
    """What decides the rows by its value; of the rest the contents count, not the names under which they are found."""
    what = what_fields(config)
    for name in ("output_repo", "model", "prompts", "system_prompt", "chat_template", "date"):
        del what[name]
    return what


def settings_of(config: Config, policy: Policy | Endpoint) -> SamplingSettings:
    return SamplingSettings(
        temperature=config.temperature,
        top_p=config.top_p,
        max_tokens=config.maxlen,
        stop_ids=policy.chat.end_ids if isinstance(policy, Policy) else (),
        token_logps=config.token_logps,
    )


def print_plan(plan: Plan, config: Config) -> None:
    kept, policy = plan.prompts.kept, plan.policy
    responses = len(kept) * config.num_responses
    if isinstance(policy, Endpoint):
        say(f"model      {policy.model} at {policy.url}: text only, no token ids")
    else:
        say(f"model      {policy.model.text}: {plan.identity['inputs']['model'][:16]}, {policy.dtype}")
    say(f"prompts    {plan.source.ref}: {plan.rows:,} of {plan.source.num_rows:,} rows, {len(kept):,} can be answered")
    for reason, count in plan.prompts.reasons.items():
        say(f"set aside  {count:,}: {reason}")
    if plan.prompts.repeated:
        say(f"repeated   {plan.prompts.repeated:,} prompts occur before; equal seeds give them equal responses")
    last_seed = config.seed + SEED_STEP * (config.num_responses - 1)
    say(
        f"responses  {responses:,}, {config.num_responses} to each prompt, temperature {config.temperature:g}, "
        f"top-p {config.top_p:g}, seeds {config.seed} to {last_seed} by {SEED_STEP}"
    )
    of_responses = f"of responses at most {config.maxlen:,} each, {responses * config.maxlen:,} together"
    if isinstance(policy, Endpoint):
        say(f"tokens     {of_responses}")
        say(f"engine     the endpoint's, {policy.concurrency} requests at the same time")
    else:
        tokens = sum(len(prompt.ids) for prompt in kept)
        say(f"tokens     {tokens:,} of prompts, {plan.prompts.longest:,} of the longest; {of_responses}")
        engines = f"{config.data_parallel_size} x " if config.data_parallel_size > 1 else ""
        say(
            f"engine     {engines}{config.backend}, tensor parallel {policy.tensor_parallel_size}, "
            f"{policy.window:,} tokens per sequence"
        )
    folder = plan.output.folder
    state = storage.existing_state(folder, plan.identity, overwrite=config.run.overwrite)
    if state == "partial":
        state = f"partial, {count_shards(folder)} of {-(-len(kept) // config.rows_per_shard)} shards written"
    say(f"output     {plan.output}: {state}; at most {amount(estimate_bytes(plan, config), 'B')}")


def count_shards(folder: Path) -> int:
    return len(list((storage.partial_folder(folder) / "data").glob("*.parquet")))


def estimate_bytes(plan: Plan, config: Config) -> int:
    return len(plan.prompts.kept) * config.num_responses * config.maxlen * BYTES_PER_TOKEN


def check_pending(config: Config, pending: dict[str, int]) -> Path:
    """The plan of a run whose prompts or model an earlier stage is still to write."""
    output = storage.parse_ref(config.output_repo, flag="--output_repo", output=True)
    preflight.check_writable(output.folder, flag="--output_repo")
    if config.endpoint is None and config.backend == "vllm":
        check_vllm(config)
    available = pending.get(config.prompts)
    if available is None:
        available = storage.open_source(config.prompts, flag="--prompts", split=config.split).num_rows
    if config.endpoint is None and config.model not in pending:
        from rlhf_pipeline.core import models

        models.resolve_model(config.model, flag="--model", chat_template=config.chat_template is None)
    rows = prompts.choose_rows(
        available, start_idx=config.start_idx, end_idx=config.end_idx, num_prompts=config.num_prompts
    )
    later = dict.fromkeys(pending, ", to be written by an earlier stage")
    say(f"model      {config.endpoint_model or config.model + later.get(config.model, '')}")
    say(f"prompts    {config.prompts}: {len(rows):,} of {available:,} rows{later.get(config.prompts, '')}")
    say(f"responses  {len(rows) * config.num_responses:,}, {config.num_responses} to each prompt")
    say(f"output     {output}: absent")
    storage.check_delivery(output)
    return output.folder


# Work


Sampler = VllmSampler | VllmEngines | TransformersSampler | EndpointSampler


def start_sampler(plan: Plan, config: Config, logs: Path) -> Sampler:
    """The engine that the flags ask for. logs: where several engines say what they have to say."""
    from rlhf_pipeline.core import models

    policy = plan.policy
    settings = settings_of(config, policy)
    if isinstance(policy, Endpoint):
        return EndpointSampler(policy, settings, system_prompt=config.system_prompt)
    folder = models.fetch_weights(policy.model, flag="--model")
    if config.backend == "transformers":
        return TransformersSampler(
            load_model(folder, policy.dtype),
            policy.chat.tokenizer,
            settings,
            max_model_len=policy.window,
            max_num_seqs=config.engine.max_num_seqs,
        )
    arguments: dict[str, Any] = {
        "model": folder,
        "tokenizer": policy.chat.tokenizer,
        "settings": settings,
        "options": config.engine,
        "dtype": policy.dtype,
        "max_model_len": policy.window,
        "tensor_parallel_size": policy.tensor_parallel_size,
        "batch_invariant": config.batch_invariant,
    }
    if config.data_parallel_size == 1:
        return VllmSampler(**arguments)
    return VllmEngines(data_parallel_size=config.data_parallel_size, logs=logs, **arguments)


def load_model(folder: Path, dtype: str) -> Any:
    import torch

    from rlhf_pipeline.core import models

    numbers: torch.dtype = models.stored_dtype(folder) if dtype == "auto" else getattr(torch, dtype)
    attention = models.choose_attention("auto", models.load_config(folder), half_precision=numbers != torch.float32)
    model = models.load_policy(folder, dtype=numbers, attn_implementation=attention)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def open_responses(plan: Plan, config: Config, output: storage.Output) -> Responses:
    return Responses(
        output,
        plan.prompts.kept,
        num_responses=config.num_responses,
        seed=config.seed,
        rows_per_shard=config.rows_per_shard,
        token_logps=config.token_logps,
        text_only=isinstance(plan.policy, Endpoint),
    )


def sample_all(plan: Plan, config: Config, responses: Responses) -> None:
    """Sample what is not there yet, in one pass of the engine over all shards."""
    done, output = responses.finished, responses.output
    if done == responses.total:
        return
    with contextlib.closing(start_sampler(plan, config, output.folder / JOURNAL / str(output.share))) as sampler:
        output.note(sampler.engine)
        started = time.monotonic()
        tokens = gather(sampler, responses)
        print_speed(sampler, responses.total - done, tokens, time.monotonic() - started)


def gather(sampler: Sampler, responses: Responses) -> int:
    """Keep each response as it finishes, and each shard as it is whole; returns the tokens sampled."""
    tokens = 0
    gc.collect()
    gc.freeze()  # else a collection looks at all modules again, and in that half second engines run dry
    try:
        with bar(responses.total, "responses", "generate", done=responses.finished) as advance:
            for sample in sampler.sample(responses.requests()):
                responses.add(sample)
                tokens += len(sample.token_ids)
                advance(1)
    finally:
        gc.unfreeze()
    return tokens


def print_speed(sampler: Sampler, count: int, tokens: int, seconds: float) -> None:
    if isinstance(sampler, EndpointSampler):
        say(f"sampled {count:,} responses in {duration(seconds)}: {count / seconds:,.1f} responses/s")
    else:
        say(f"sampled {tokens:,} tokens in {duration(seconds)}: {tokens / seconds:,.0f} tokens/s")
    if isinstance(sampler, VllmSampler | VllmEngines) and sampler.fewest_waiting is not None:
        each = " in each engine" if isinstance(sampler, VllmEngines) else ""
        say(
            f"at least {sampler.fewest_waiting} requests waited at any time{each} (max_num_seqs {sampler.max_num_seqs})"
        )


def report(
    plan: Plan, config: Config, output: storage.Output, files: dict[str, list[Path]]
) -> tuple[dict[str, Any], str]:
    """Summarise the finished shards; returns provenance and card."""
    summary = summarize(files[SPLIT], config.num_responses)
    say(
        f"{summary.prompts:,} prompts x {config.num_responses} responses: mean length {summary.mean_length:.1f}, "
        f"longest {summary.longest:,} {summary.unit}; {summary.truncated:.1%} truncated, {summary.empty:.1%} empty, "
        f"{summary.repeated:.1%} repeat another response to their prompt"
    )
    if summary.refused:
        say(f"{summary.refused:.1%} were refused by the endpoint: see response_0_error and so on")
    if plan.prompts.skipped:
        lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in plan.prompts.skipped)
        write_atomic(output.folder / SKIPPED, "".join(lines))
    made = describe(plan, config, summary, output.notes())
    return made, card(made, config, files[SPLIT][0])


def describe(plan: Plan, config: Config, summary: Summary, engines: list[dict[str, Any]]) -> dict[str, Any]:
    if isinstance(plan.policy, Endpoint):
        name, fingerprint = f"{plan.policy.model} at {plan.policy.url}", ""
        chat = {}
    else:
        name, fingerprint = plan.policy.model.text, plan.identity["inputs"]["model"]
        chat = {"chat": plan.policy.chat.describe()}
    return provenance.describe(
        command="generate",
        config={name: value for name, _, value in fields_with_roles(config)},
        inputs={
            "prompts": provenance.describe_source(plan.source),
            "model": {"ref": name, "fingerprint": fingerprint},
        },
        rows_in=plan.rows,
        rows_out=len(plan.prompts.kept),
        dropped=plan.prompts.reasons,
        engine=engines[-1],
        earlier_engines=engines[:-1],
        sampling={
            **asdict(settings_of(config, plan.policy)),
            "seed": config.seed,
            "seed_step": SEED_STEP,
            "model": name,
            "model_fingerprint": fingerprint,
        },
        responses=asdict(summary),
        **chat,
    )


COLUMNS = {
    "prompt_id": "the source's, or the first 16 hex digits of sha256 of the prompt",
    "prompt": "the prompt as it came: text, or messages with text as content",
    "category": "the source's",
    "response_{i}": "text of the response, without special tokens",
    "response_{i}_tokens": "its ids as sampled, with the stop id if one was emitted",
    "response_{i}_finish_reason": "stop, or length: cut at --maxlen or the window",
    "response_{i}_error": "why the endpoint gave no response; the others are then null",
    "response_{i}_token_logps": "log-probabilities of its ids at temperature 1",
}


def card(made: dict[str, Any], config: Config, shard: Path) -> str:
    import pyarrow.parquet as pq

    written = pq.read_schema(shard).names
    return provenance.card(
        title=f"{config.num_responses} responses of {made['sampling']['model']} to each prompt",
        provenance=made,
        splits=[SPLIT],
        columns={name: text for name, text in COLUMNS.items() if name.format(i=0) in written},
        facts={"sampling": made["sampling"], "responses": made["responses"]},
        samples=provenance.sample_rows(shard),
    )


def main(config: Config) -> Path:
    check_values(config)
    share = storage.choose_share(config.shard_index, config.num_shards)
    if config.push_only:
        return storage.push_only(
            config.output_repo, public=config.public, overwrite=config.run.overwrite, check=config.run.check
        )
    pending = config.run.pending_rows() if config.run.check else {}
    if config.prompts in pending or config.model in pending:
        return check_pending(config, pending)
    plan = make_plan(config)
    print_plan(plan, config)
    folder = plan.output.folder
    overwrite = config.run.overwrite
    preflight.check_writable(folder, flag="--output_repo")
    remote = None
    if not config.run.check:
        remote = storage.prepare_delivery(
            plan.output, plan.identity, public=config.public, overwrite=overwrite, flag="--output_repo"
        )
    done = storage.existing_state(folder, plan.identity, overwrite=overwrite) == "done"
    if not (done or (remote is not None and remote.state == "done")):
        check_machine(plan, config)
    if config.run.check:
        storage.check_delivery(plan.output)
        return folder
    started = time.monotonic()
    with storage.open_output(folder, plan.identity, overwrite=overwrite, share=share, remote=remote) as output:
        if output.done:
            say(f"done before: {storage.deliver(plan.output)}")  # again: that push may be what was killed
            return folder
        sample_all(plan, config, open_responses(plan, config, output))
        where = storage.finish(
            output, plan.output, lambda files: report(plan, config, output, files), overwrite=overwrite
        )
    say(f"done in {duration(time.monotonic() - started)}: {where or 'this share; other jobs have theirs to do'}")
    return folder


if __name__ == "__main__":
    entry(main, Config)
