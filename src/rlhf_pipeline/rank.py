"""Stage 2: responses -> one reward for each.

Reads generate's output (or any dataset with prompt, response_0, response_1, ...) and writes the same rows
with response_{i}_reward, and the reason in response_{i}_reward_error where there is none. With --pairs_accuracy it
reads chosen and rejected responses instead, and says how often the reward model agrees.

    python -m rlhf_pipeline.rank --input_repo ./runs/a/responses
    python -m rlhf_pipeline.rank --input_repo ./runs/a/responses --reward_model ./my_reward.py:score
    accelerate launch --num_processes 8 -m rlhf_pipeline.rank --input_repo ./runs/a/responses
    python -m rlhf_pipeline.rank --pairs_accuracy --input_repo allenai/reward-bench --split filtered
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from rlhf_pipeline.core import preflight, provenance, schema, storage
from rlhf_pipeline.core.command import (
    RUN,
    BadUse,
    How,
    RunFlags,
    What,
    WorkFailed,
    entry,
    fields_with_roles,
    what_fields,
)
from rlhf_pipeline.core.comparisons import texts_of
from rlhf_pipeline.core.files import read_json, write_json
from rlhf_pipeline.core.progress import amount, bar, duration, is_main, say
from rlhf_pipeline.core.ranking import pair_accuracy, reward_report, scoring
from rlhf_pipeline.core.ranking.network_scorers import Backend, Dtype, HeadDtype, Score, ScoringOptions, resolve_dtype
from rlhf_pipeline.core.ranking.reward_columns import (
    describe_columns,
    reward_columns,
    with_prompt_ids,
    with_rewards,
)
from rlhf_pipeline.core.ranking.scoring import Combine, Scorer
from rlhf_pipeline.core.ranking.vllm_scorer import MEMORY_SHARE

if TYPE_CHECKING:
    import pyarrow as pa

    from rlhf_pipeline.core.storage.remote import Remote

SPLIT = "train"
ACCURACY = "accuracy.json"
"""Of pairs: the report, beside the rows."""
MAX_BLOCK, MIN_BLOCK, BLOCKS = 512, 16, 64
"""Rows of a block, which is one shard of the output and what a killed run loses at most: about a 64th of the
rows.
"""
NO_PAIR = Score(None, "no pair: expected prompt, chosen and rejected, or two conversations with one prompt")
LISTED = 100
"""Responses without a reward that provenance lists; all of them are in the dataset."""
BYTES_PER_RESPONSE, BYTES_PER_REWARD = 4000, 320
"""For the estimate of the output's size: text and ids; a reward with ArmoRM's objectives and coefficients."""
CARRIED = ("sampling", "chat")
"""Parts of the input's provenance that later stages ask for."""


@dataclass(frozen=True)
class Config:
    input_repo: What[str]
    """Responses to score: generate's output, a local folder or a Hub dataset. With --pairs_accuracy: pairs."""
    output_repo: What[tuple[str, ...]] = ()
    """Where to write the rewards. Not given: the input's name with _armo, for pairs with _accuracy. As many as there
    are reward models: each model's rewards go to their own output, and there is no ensemble."""
    reward_model: What[tuple[str, ...]] = ("RLHFlow/ArmoRM-Llama3-8B-v0.1",)
    """ArmoRM, any sequence classifier with one label (folder or Hub id), a function package.module:function
    or ./file.py:function, or an OpenAI-compatible endpoint http://HOST/v1. Several make an ensemble."""
    combine: What[Combine] = "mean"
    """How the rewards of several models become one."""
    num_responses: Annotated[What[int], tyro.conf.arg(aliases=("--pairs",))] = 5
    """Responses per prompt to score."""
    judge_model: What[str | None] = None
    """With an endpoint as --reward_model: the model there that rates responses."""
    judge_template: What[str | None] = None
    """File with the judge's prompt, holding {prompt} and {response}; it must ask for a rating in the form
    [[7]].
    """
    pairs_accuracy: What[bool] = False
    """Ask what the reward model is worth: score the chosen and rejected responses of preference pairs, filter's or
    RewardBench's or any with prompt, chosen and rejected as text or messages, and say how often it agrees."""
    split: What[str] = "train"
    """The input's split."""
    objectives: What[bool] = True
    """The named rewards behind a reward are kept: ArmoRM's objectives and their coefficients, an ensemble's
    members. --no_objectives leaves them out."""
    max_length: What[int | None] = None
    """Longest conversation in tokens; a longer one gets no reward, never a cut. None: the model's window."""
    backend: What[Backend] = "transformers"
    """What runs a reward model that is a network. vllm takes sequence classifiers with a linear head."""
    dtype: What[Dtype] = "auto"
    """Of the reward model's backbone. auto: bfloat16 on a GPU, float32 on a CPU."""
    head_dtype: What[HeadDtype] = "float32"
    """Of the layers that make the reward. bfloat16 gives the published ArmoRM code's rounding, and its
    ties.
    """
    chat_template: What[str | None] = None
    """File with a chat template to use instead of the reward model's own."""
    trust_remote_code: What[bool] = False
    """Run the reward model repo's own Python code. ArmoRM needs none."""

    on_error: How[Literal["keep", "stop"]] = "keep"
    """A response that can't be scored: keep it without a reward and with the reason, or stop the run."""
    batch_tokens: How[int | None] = None
    """Tokens of one batch, padding included; halved when the GPU's memory is too small. None: 32768 on a GPU,
    2048 on a CPU, with --backend vllm its own choice."""
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
class Plan:
    """Everything that is known before a model is loaded."""

    source: storage.Source
    output: storage.Ref
    reward_models: tuple[scoring.RewardModel, ...]
    options: ScoringOptions
    blocks: tuple[range, ...]
    engine: dict[str, Any]
    identity: dict[str, Any]


def check_values(config: Config) -> None:
    """Raise BadUse for values that can't be meant, before anything is read."""
    for name in ("num_responses", "batch_tokens", "max_length"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise BadUse(f"--{name} is {value}; expected 1 or more.")
    judged = any(text.startswith(("http://", "https://")) for text in config.reward_model)
    if not judged and (config.judge_model or config.judge_template):
        raise BadUse("--judge_model and --judge_template go with an endpoint http://HOST/v1 as --reward_model.")
    if len(set(config.reward_model)) < len(config.reward_model) or not config.reward_model:
        raise BadUse(f"--reward_model {' '.join(config.reward_model)}: expected different models, at least one.")
    outputs = config.output_repo
    if len(outputs) not in (0, 1, len(config.reward_model)) or len(set(outputs) - {""}) < len(outputs):
        raise BadUse(
            f"--output_repo {' '.join(outputs)}: expected one for the combined reward, or one for each of the "
            f"{len(config.reward_model)} reward models, all different."
        )
    if config.backend == "vllm":
        preflight.check_importable("vllm", flag="--backend vllm", instead="leave --backend out")


def separate(config: Config) -> list[Config]:
    """A Config for each output: of all reward models together, or of one each."""
    if len(config.output_repo) < 2:
        return [config]
    return [
        dataclasses.replace(config, reward_model=(model,), output_repo=(output,))
        for model, output in zip(config.reward_model, config.output_repo, strict=True)
    ]


def make_plan(config: Config) -> Plan:
    """Resolve and check inputs. Raises BadUse with one sentence for what can't be ranked."""
    source = storage.open_source(config.input_repo, flag="--input_repo", split=config.split)
    check_columns(source, config)
    output = choose_output(config, source.ref)
    preflight.check_writable(output.folder, flag="--output_repo")
    reward_models = tuple(resolve(text, config) for text in config.reward_model)
    networks = sum(model.model is not None for model in reward_models)
    options = ScoringOptions(
        backend=config.backend,
        dtype=config.dtype,
        head_dtype=config.head_dtype,
        max_length=config.max_length,
        batch_tokens=config.batch_tokens,
        trust_remote_code=config.trust_remote_code,
        device=choose_device() if networks else "cpu",
        engines=max(networks, 1),
    )
    identity = identify(config, source, reward_models, options)
    engine = scoring.describe_engine(reward_models, options, config.combine)
    return Plan(source, output, reward_models, options, tuple(cut(source.num_rows)), engine, identity)


def check_columns(source: storage.Source, config: Config) -> None:
    """Raise BadUse if the input lacks what is to be scored."""
    names = scored_columns(config)
    if config.pairs_accuracy:
        schema.require(source, names, written_by="filter", remedy="name pairs with chosen and rejected")
        return
    remedy = f"lower --num_responses (now {config.num_responses})"
    schema.require(source, (schema.PROMPT, *names), written_by="generate", remedy=remedy)


def scored_columns(config: Config) -> tuple[str, ...]:
    """The columns whose texts get a reward."""
    return pair_accuracy.SIDES if config.pairs_accuracy else tuple(map(schema.response, range(config.num_responses)))


def identify(
    config: Config,
    source: storage.Source,
    reward_models: Sequence[scoring.RewardModel],
    options: ScoringOptions,
) -> dict[str, Any]:
    """What decides the rows: values and contents, not the names under which they are found."""
    what = what_fields(config)
    for name in ("input_repo", "output_repo", "reward_model", "chat_template", "judge_model", "judge_template"):
        del what[name]
    if config.backend == "transformers":
        del what["backend"]  # here and below: outputs written before there was a choice remain the same run
    if config.pairs_accuracy:
        del what["num_responses"]
    else:
        del what["pairs_accuracy"]
    if any(model.model is not None for model in reward_models):
        what["dtype"] = str(resolve_dtype(options)).removeprefix("torch.")
    return {
        "command": "rank",
        "what": what,
        "inputs": {
            "responses": source.fingerprint,
            "reward_models": [model.identity() for model in reward_models],
        },
    }


def choose_device() -> str:
    """This process's GPU, or the CPU."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def check_machine(plan: Plan, config: Config) -> None:
    """Raise BadUse if what is left to be ranked can't be ranked here."""
    check_gpu_memory(plan.reward_models, plan.options)
    preflight.check_disk(plan.output.folder, estimate_bytes(plan.source, config), flag="--output_repo")


def check_gpu_memory(reward_models: Sequence[scoring.RewardModel], options: ScoringOptions) -> None:
    """Raise BadUse if this machine's processes outnumber its GPUs, or the weights don't fit into what is
    free. A GPU that nvidia-smi does not list (a MIG slice, one of another make) is not looked at.
    """
    gpus = [] if options.device == "cpu" else preflight.visible_gpus()
    if not gpus:
        return
    folders = [model.model.folder for model in reward_models if model.model is not None]
    weights = sum(path.stat().st_size for folder in folders for path in folder.glob("*.safetensors"))
    share = min(weights / gpus[0].total_memory, 0.95)
    if options.backend == "vllm":
        share = MEMORY_SHARE
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    preflight.check_gpus(processes, memory_share=share, flag="--num_processes")


def estimate_bytes(source: storage.Source, config: Config) -> int:
    """Of the output, roughly."""
    responses = source.num_rows * len(scored_columns(config))
    if source.folder is None:
        return responses * BYTES_PER_RESPONSE
    return sum(path.stat().st_size for path in source.folder.glob("data/*.parquet")) + responses * BYTES_PER_REWARD


def cut(num_rows: int) -> Iterator[range]:
    """Blocks of rows. A function of the number of rows alone: a restart, on any number of GPUs, finds the
    same.
    """
    size = min(MAX_BLOCK, max(MIN_BLOCK, -(-num_rows // BLOCKS)))
    for start in range(0, num_rows, size):
        yield range(start, min(start + size, num_rows))


def make_rows(batch: Sequence[dict[str, Any]], name: str) -> Iterator[dict[str, Any]]:
    """What a scorer sees of the texts in column `name`, such as response_0."""
    for row in batch:
        yield {
            "prompt_id": row[schema.PROMPT_ID],
            "prompt": row[schema.PROMPT],
            "response": row[name],
            "response_tokens": row.get(f"{name}_tokens"),
            "finish_reason": row.get(f"{name}_finish_reason"),
        }


def as_pair(row: dict[str, Any]) -> dict[str, Any]:
    """`row` with prompt, chosen and rejected as texts, None where it is no pair, and a prompt_id that all pairs of a
    prompt share.
    """
    prompt, chosen, rejected = texts_of(row) or (None, None, None)
    prompt_id = str(row.get(schema.PROMPT_ID) or schema.make_prompt_ids([prompt])[0])
    pair = {schema.PROMPT_ID: prompt_id, schema.PROMPT: prompt, "chosen": chosen, "rejected": rejected}
    for side in pair_accuracy.SIDES:
        tokens, length = row.get(f"{side}_tokens"), row.get(f"{side}_length")
        pair[f"{side}_tokens"] = tokens[:length] if tokens and length else None  # filter's are padded
    return pair


def check_pending(config: Config, pending: dict[str, int]) -> Path:
    """The plan of a run whose input or reward model an earlier stage is still to write."""
    rows = pending.get(config.input_repo)
    if rows is None:
        rows = storage.open_source(config.input_repo, flag="--input_repo", split=config.split).num_rows
    source = storage.parse_ref(config.input_repo, flag="--input_repo")
    output = choose_output(config, source)
    preflight.check_writable(output.folder, flag="--output_repo")
    say(f"input      {source}: {describe_size(rows, config)}")
    for text in config.reward_model:
        if text in pending:
            say(f"reward     {text}: to be written by an earlier stage")
        else:
            model = resolve(text, config)
            say(f"reward     {text}: {model.kind}, {model.fingerprint[:16]}")
    say(f"output     {output}: absent")
    storage.check_delivery(output)
    return output.folder


def resolve(text: str, config: Config) -> scoring.RewardModel:
    return scoring.resolve_reward_model(
        text,
        chat_template=config.chat_template,
        trust_remote_code=config.trust_remote_code,
        judge_model=config.judge_model,
        judge_template=config.judge_template,
    )


def choose_output(config: Config, source: storage.Ref) -> storage.Ref:
    if not config.output_repo:
        return storage.default_output(source, "_accuracy" if config.pairs_accuracy else "_armo")
    return storage.parse_ref(config.output_repo[0], flag="--output_repo", output=True)


def describe_size(rows: int, config: Config) -> str:
    noun = "pairs" if config.pairs_accuracy else "prompts"
    return f"{rows:,} {noun}, {rows * len(scored_columns(config)):,} responses to score"


def print_plan(plan: Plan, config: Config) -> None:
    source = plan.source
    say(f"input      {source.ref}: {describe_size(source.num_rows, config)}")
    for model in plan.reward_models:
        say(f"reward     {model.text}: {model.kind}, {model.fingerprint[:16]}")
    if len(plan.reward_models) > 1:
        say(f"ensemble   {config.combine} of {len(plan.reward_models)}")
    more = schema.count_responses(source.columns) - config.num_responses
    if more > 0 and not config.pairs_accuracy:
        say(f"left out   {more} further responses per prompt: raise --num_responses to score them")
    old = [name for text in scored_columns(config) for name in reward_columns(text) if name in source.columns]
    if old:
        say(f"replaced   {', '.join(old)}, which the input has already")
    folder = plan.output.folder
    state = storage.existing_state(folder, plan.identity, overwrite=config.run.overwrite)
    if state == "partial":
        output = storage.Output(folder, plan.identity, done=False)
        written = sum(output.has_shard(SPLIT, index) for index in range(len(plan.blocks)))
        state = f"partial, {written} of {len(plan.blocks)} shards"
    say(f"output     {plan.output}: {state}, about {amount(estimate_bytes(source, config), 'B')}")


# Work


def score_block(scorer: Scorer, source: storage.Source, block: range, ids: Sequence[str], config: Config) -> pa.Table:
    """One block's rows with their rewards. Raises WorkFailed for a response without one under --on_error
    stop.
    """
    import pyarrow as pa

    table = pa.concat_tables(source.tables(start=block.start, stop=block.stop))
    if config.pairs_accuracy:
        batch = [as_pair(row) for row in table.to_pylist()]
        table = table.drop_columns([name for name in table.column_names if name.endswith("_tokens")])
        table = with_prompt_ids(table, [row[schema.PROMPT_ID] for row in batch])
    else:
        table = with_prompt_ids(table, ids[block.start : block.stop])
        batch = table.to_pylist()
    names = scored_columns(config)
    rows = [row for name in names for row in make_rows(batch, name)]
    flat = scorer.score(rows)
    if config.pairs_accuracy:
        flat = [NO_PAIR if row["prompt"] is None else score for row, score in zip(rows, flat, strict=True)]
    scores = {name: flat[i * len(batch) : (i + 1) * len(batch)] for i, name in enumerate(names)}
    if config.on_error == "stop":
        check_none_failed(scores, batch)
    objectives = scorer.objectives if config.objectives else ()
    return with_rewards(table, scores, objectives, coefficients=scorer.has_coefficients)


def check_none_failed(scores: Mapping[str, Sequence[Score]], batch: Sequence[dict[str, Any]]) -> None:
    for name, column in scores.items():
        for score, row in zip(column, batch, strict=True):
            if score.error is not None:
                raise WorkFailed(
                    f"{name.replace('_', ' ')} of prompt {row[schema.PROMPT_ID]} got no reward ({score.error}), and "
                    "--on_error is stop."
                )


def check_some_rewards(table: pa.Table, names: Sequence[str]) -> None:
    """Raise WorkFailed if no response of the output's first block has a reward: then it is not the rows that are
    bad. Of a later block, where a restart or another process may begin, it may be.
    """
    columns = [table.column(f"{name}_reward") for name in names]
    if all(column.null_count == len(column) for column in columns):
        reason = table.column(f"{names[0]}_reward_error")[0].as_py()
        raise WorkFailed(f"none of the first {len(table) * len(names)} responses got a reward; the first: {reason}")


def rank_blocks(plan: Plan, config: Config, output: storage.Output, worker: int, workers: int) -> None:
    """Score the blocks of this job's share that are this worker's and not there yet."""
    mine = output.share.of(list(enumerate(plan.blocks)))[worker::workers]
    waiting = [(index, block) for index, block in mine if not output.has_shard(SPLIT, index)]
    if not waiting:
        return
    ids = [] if config.pairs_accuracy else plan.source.prompt_ids()
    names = scored_columns(config)
    total = sum(len(block) for _, block in mine) * len(names)
    left = sum(len(block) for _, block in waiting) * len(names)
    journals = output.folder / "journal" / f"{output.share}.{worker}"
    with (
        closing(scoring.load_scorers(plan.reward_models, plan.options, config.combine, journals=journals)) as scorer,
        bar(total, "responses", "rank", done=total - left) as advance,
    ):
        for index, block in waiting:
            table = score_block(scorer, plan.source, block, ids, config)
            if index == 0:
                check_some_rewards(table, names)
            output.write_shard(SPLIT, index, table)
            advance(len(block) * len(names))


def report(plan: Plan, config: Config, folder: Path, files: Sequence[Path]) -> tuple[dict[str, Any], str]:
    """Report on the finished set, whose files lie under `folder`; returns provenance and card."""
    if config.pairs_accuracy:
        pairs = pair_accuracy.read(files)
        made_of, unscored = pair_accuracy.make(pairs), pairs.unscored()
        write_json(folder / ACCURACY, made_of)
        lines = pair_accuracy.lines(made_of)
    else:
        rewards = reward_report.read(files, config.num_responses)
        made_of, unscored = reward_report.make(rewards, members=len(plan.reward_models) > 1), rewards.unscored()
        lines = reward_report.lines(made_of)
    print("\n".join(lines), flush=True)
    made = describe(plan, config, made_of, unscored[:LISTED])
    return made, card(made, lines, files[0], config)


def describe(plan: Plan, config: Config, report: dict[str, Any], unscored: Sequence[dict[str, Any]]) -> dict[str, Any]:
    came_with = plan.source.provenance or {}
    return provenance.describe(
        command="rank",
        config={name: value for name, _, value in fields_with_roles(config)},
        inputs={
            "responses": provenance.describe_source(plan.source),
            **{
                f"reward_model_{i}": {"ref": model.text, "kind": model.kind, "fingerprint": model.fingerprint}
                for i, model in enumerate(plan.reward_models)
            },
        },
        rows_in=plan.source.num_rows,
        rows_out=plan.source.num_rows,
        dropped={},
        engine=plan.engine,
        **{"pair_accuracy" if config.pairs_accuracy else "reward_report": report},
        unscored=list(unscored),
        **{name: came_with[name] for name in CARRIED if name in came_with and not config.pairs_accuracy},
    )


def card(made: dict[str, Any], lines: Sequence[str], shard: Path, config: Config) -> str:
    import pyarrow.parquet as pq

    what = "Accuracy on" if config.pairs_accuracy else "Rewards of"
    return provenance.card(
        title=f"{what} {config.input_repo} by {', '.join(config.reward_model)}",
        provenance=made,
        splits=[SPLIT],
        columns=describe_columns(scored_columns(config), pq.read_schema(shard).names),
        facts=dict(line.split(": ", 1) for line in lines),
        samples=provenance.sample_rows(shard),
    )


def rank(plan: Plan, config: Config, remote: Remote | None) -> None:
    """Score what is not scored yet of this job's share, and publish the set once it is whole."""
    started = time.monotonic()
    share = storage.choose_share(config.shard_index, config.num_shards)
    worker, workers = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    overwrite = config.run.overwrite
    with storage.open_output(
        plan.output.folder, plan.identity, overwrite=overwrite, share=share, worker=worker, remote=remote
    ) as output:
        if output.done:
            if is_main():
                say(f"done before: {storage.deliver(plan.output)}")  # again: that push may be what was killed
                if (accuracy := read_json(plan.output.folder / ACCURACY)) is not None:
                    say("\n".join(pair_accuracy.lines(accuracy)))
            return
        output.expect(SPLIT, len(plan.blocks))
        rank_blocks(plan, config, output, worker, workers)
        where = storage.finish(
            output, plan.output, lambda files: report(plan, config, output.folder, files[SPLIT]), overwrite=overwrite
        )
    if where is not None:
        print(f"done in {duration(time.monotonic() - started)}: {where}", flush=True)


def prepare_output(plan: Plan, config: Config) -> Remote | None:
    """What the Hub has of the output. Raises BadUse if it can't be written, or what it lacks can't be ranked here."""
    overwrite, remote = config.run.overwrite, None
    if config.run.check:
        storage.check_delivery(plan.output)
    else:
        remote = storage.prepare_delivery(
            plan.output, plan.identity, public=config.public, overwrite=overwrite, flag="--output_repo"
        )
    done = storage.existing_state(plan.output.folder, plan.identity, overwrite=overwrite) == "done"
    if not (done or (remote is not None and remote.state == "done")):
        check_machine(plan, config)
    return remote


def main(config: Config) -> list[Path]:
    check_values(config)
    preflight.check_launch()
    storage.choose_share(config.shard_index, config.num_shards)
    if config.push_only:
        return [
            storage.push_only(repo, public=config.public, overwrite=config.run.overwrite, check=config.run.check)
            for repo in config.output_repo or (None,)
        ]
    configs = separate(config)
    pending = config.run.pending_rows() if config.run.check else {}
    if {config.input_repo, *config.reward_model} & set(pending):
        return [check_pending(each, pending) for each in configs]
    plans = [make_plan(each) for each in configs]
    for plan, each in zip(plans, configs, strict=True):
        print_plan(plan, each)
    folders = [plan.output.folder for plan in plans]
    remotes = [prepare_output(plan, each) for plan, each in zip(plans, configs, strict=True)]
    if config.run.check:
        return folders
    for plan, each, remote in zip(plans, configs, remotes, strict=True):
        rank(plan, each, remote)
    return folders


if __name__ == "__main__":
    entry(main, Config)
