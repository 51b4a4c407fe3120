"""Stage 3: rewards -> tokenized chosen/rejected pairs, in the splits train and test.

Reads rank's output (or any dataset with prompt, response_0, response_0_reward, ...) and writes one pair per prompt,
or all pairs: prompts left-padded to --maxlen_prompt, responses right-padded to --maxlen. Sampled ids are taken as
they were sampled; where there is only text, the chat template encodes it.

    python -m rlhf_pipeline.filter --input_repo ./runs/a/rewards
    python -m rlhf_pipeline.filter --input_repo ./runs/a/rewards --model ./runs/a/policy --test_size 0.1
    python -m rlhf_pipeline.filter --input_repo ./runs/a/rewards --select all_pairs --min_responses 2
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from rlhf_pipeline.core import preflight, provenance, schema, storage
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
from rlhf_pipeline.core.filtering import pair_blocks, pair_report, pair_tables
from rlhf_pipeline.core.filtering.pair_blocks import Work
from rlhf_pipeline.core.filtering.selection import Rules, Select
from rlhf_pipeline.core.progress import duration, say

if TYPE_CHECKING:
    import pyarrow as pa

TRAIN, TEST = "train", "test"
SHARD_ROWS = 4096
"""Pairs of one published file."""
SKIPPED = "skipped.jsonl"
CHAT_KEYS = {
    "tokenizer_hash": ("tokenizer", "--model"),
    "template_hash": ("chat template", "--model and --chat_template"),
    "system_prompt": ("system prompt", "--system_prompt"),
    "date": ("date", "--date"),
}
"""What decides a prompt's ids: in the words of an error, and the flags that decide it."""


@dataclass(frozen=True)
class Config:
    input_repo: What[str]
    """Rewards: rank's output, a local folder or a Hub dataset."""
    output_repo: What[str | None] = None
    """Where to write the pairs. None: the input's name with _tokenized."""
    model: What[str] = "meta-llama/Meta-Llama-3-8B-Instruct"
    """The policy that the pairs are for: its tokenizer and chat template are used, a local folder or a Hub id."""
    num_responses: Annotated[What[int], tyro.conf.arg(aliases=("--pairs",))] = 5
    """Responses per prompt to choose from."""
    maxlen: What[int] = 2048
    """Longest response in tokens, end of turn included; a longer one does not survive."""
    maxlen_prompt: What[int] = 1024
    """Longest prompt in tokens; a longer one is dropped."""
    select: What[Select] = "best_worst"
    """Which pairs: best against worst, against a random worse one, against the next worse one, or all of them."""
    min_margin: What[float | None] = None
    """Smallest reward_margin of a pair, in reward units. best_next takes the next one at least this far below."""
    max_margin: What[float | None] = None
    """Largest reward_margin of a pair."""
    min_responses: What[int | None] = None
    """Responses that must survive for a prompt to be kept. None: all of them, as in the tutorial."""
    keep_truncated: What[bool] = False
    """Let responses survive that were cut off at the sampler's limit (finish_reason length); they get no end."""
    keep_empty: What[bool] = False
    """Let empty responses survive."""
    null_reward: What[float | None] = None
    """Reward of a response that has none. None: such a response does not survive."""
    test_size: What[float] = 1000
    """Prompts held out in the test split: a number of them, or a fraction below 1."""
    seed: What[int] = 0
    """Decides which prompts are held out, and the random choice of best_random."""
    split: What[str] = "train"
    """The input's split."""
    chat_template: What[str | None] = None
    """File with a chat template to use instead of the model's own."""
    system_prompt: What[str | None] = None
    """System turn of prompts that have none. None: the one the responses were sampled with."""
    date: What[str | None] = None
    """YYYY-MM-DD, what a template is told that asks for the day. None: the one the responses were sampled with."""
    tutorial_columns: What[bool] = False
    """Write the columns of the tutorial's trainer as well, so that it runs on these pairs."""

    num_proc: How[int] = 1
    """Processes that tokenize; a single one uses a thread for each core."""
    public: How[bool] = False
    """Push to a public repo on the Hub; without it only to a private one."""
    push_only: How[bool] = False
    """Push an output that is whole in its local folder, and compute nothing."""
    run: RUN = RunFlags()


@dataclass(frozen=True)
class Plan:
    """Everything that is known before work begins."""

    source: storage.Source
    output: storage.Ref
    chat: Chat
    rules: Rules
    identity: dict[str, Any]


def check_values(config: Config) -> None:
    """Raise BadUse for values that can't be meant, before anything is read."""
    for name, least in (("num_responses", 2), ("maxlen", 1), ("maxlen_prompt", 1), ("num_proc", 1)):
        if getattr(config, name) < least:
            raise BadUse(f"--{name} is {getattr(config, name)}; expected {least} or more.")
    if config.min_responses is not None and not 2 <= config.min_responses <= config.num_responses:
        raise BadUse(
            f"--min_responses is {config.min_responses}; expected 2 to {config.num_responses} (--num_responses)."
        )
    if not (0 < config.test_size < 1 or (config.test_size >= 1 and float(config.test_size).is_integer())):
        raise BadUse(
            f"--test_size is {config.test_size:g}; expected a number of prompts, or a fraction between 0 and 1."
        )
    low, high = config.min_margin, config.max_margin
    if low is not None and high is not None and low > high:
        raise BadUse(f"--min_margin {low:g} is above --max_margin {high:g}: no pair would be left.")
    if config.null_reward is not None and not math.isfinite(config.null_reward):
        raise BadUse(f"--null_reward is {config.null_reward}; expected a finite number.")


def make_plan(config: Config) -> Plan:
    """Resolve and check inputs. Raises BadUse with one sentence for what can't be filtered."""
    source = storage.open_source(config.input_repo, flag="--input_repo", split=config.split)
    remedy = f"lower --num_responses (now {config.num_responses})"
    for kind, writer in ((schema.response, "generate"), (schema.response_reward, "rank")):
        needed = (schema.PROMPT, *map(kind, range(config.num_responses)))
        schema.require(source, needed, written_by=writer, remedy=remedy)
    if config.test_size >= source.num_rows:
        refuse_test_size(config.test_size, source.num_rows, f"{source.name} has")
    chat = choose_chat(config, source)
    if schema.response_tokens(0) not in source.columns:
        chat.response_ids("a", "b")  # raises for a template that can encode no response at all
    rules = Rules(
        maxlen=config.maxlen,
        min_responses=config.min_responses or config.num_responses,
        select=config.select,
        min_margin=config.min_margin,
        max_margin=config.max_margin,
        keep_truncated=config.keep_truncated,
        keep_empty=config.keep_empty,
        null_reward=config.null_reward,
        seed=config.seed,
    )
    what = what_fields(config)
    for name in ("input_repo", "output_repo", "model", "chat_template", "system_prompt", "date"):
        del what[name]
    inputs = {"rewards": source.fingerprint, "chat": chat.describe()}
    identity = {"command": "filter", "what": what, "inputs": inputs}
    return Plan(source, choose_output(config, source.ref), chat, rules, identity)


def choose_output(config: Config, source: storage.Ref) -> storage.Ref:
    if config.output_repo is None:
        return storage.default_output(source, "_tokenized")
    return storage.parse_ref(config.output_repo, flag="--output_repo", output=True)


def choose_chat(config: Config, source: storage.Source) -> Chat:
    """The chat that the responses were sampled in; where the input doesn't say, the one the flags describe.

    Raises BadUse where both speak and differ: a policy is trained on the prompts that it answered.
    """
    came_with = source.provenance or {}
    sampled = came_with.get("chat")
    inherited = sampled or {}
    chat = Chat.load(
        config.model,
        chat_template=config.chat_template,
        system_prompt=inherited.get("system_prompt") if config.system_prompt is None else config.system_prompt,
        date=inherited.get("date") if config.date is None else config.date,
    )
    ours = chat.describe()
    for key, (word, flags) in CHAT_KEYS.items():
        if sampled is not None and ours[key] != sampled[key]:
            sampler = came_with.get("sampling", {}).get("model", "unknown")
            raise BadUse(
                f"the responses in {source.name} were sampled by {sampler} with another {word} "
                f"({_short(sampled[key])}) than --model {config.model} has here ({_short(ours[key])}): "
                f"give {flags} as generate had it."
            )
    return chat


def _short(value: Any) -> str:
    return repr(value[:16] if isinstance(value, str) else value)


def refuse_test_size(test_size: float, prompts: int, who: str) -> None:
    """Raise BadUse for a test split that leaves nothing to train on."""
    smaller = max(1, prompts // 10)
    raise BadUse(
        f"--test_size {test_size:g} leaves nothing to train on, {who} {prompts:,} prompts: pass --test_size "
        + (f"{smaller} or a fraction such as 0.1." if prompts > 1 else "0.5 and more prompts.")
    )


def print_plan(plan: Plan, config: Config) -> None:
    source, rules = plan.source, plan.rules
    say(f"input      {source.ref}: {source.num_rows:,} prompts with {config.num_responses} responses each")
    if (more := schema.count_responses(source.columns) - config.num_responses) > 0:
        say(f"left out   {more} further responses per prompt: raise --num_responses to choose from them too")
    with_ids = schema.response_tokens(0) in source.columns
    ids = "as sampled" if with_ids else "encoded from text by the chat template (the input has no sampled ids)"
    say(f"ids        {ids}; tokenizer and template of {config.model}")
    if schema.response_finish_reason(0) not in source.columns:
        say("finish     the input has no finish_reason: every response counts as finished")
    say(f"lengths    prompts up to {config.maxlen_prompt:,} tokens, responses up to {config.maxlen:,}")
    say(f"pairs      {config.select}, from prompts with {rules.min_responses} surviving responses or more")
    state = storage.existing_state(plan.output.folder, plan.identity, overwrite=config.run.overwrite)
    say(f"output     {plan.output}: {state}")


def check_pending(config: Config, pending: dict[str, int]) -> Path:
    """The plan of a run whose input or model an earlier stage is still to write."""
    rows = pending.get(config.input_repo)
    if rows is None:
        rows = storage.open_source(config.input_repo, flag="--input_repo", split=config.split).num_rows
    if config.test_size >= rows:
        refuse_test_size(config.test_size, rows, f"{config.input_repo} is to have")
    output = choose_output(config, storage.parse_ref(config.input_repo, flag="--input_repo"))
    preflight.check_writable(output.folder, flag="--output_repo")
    say(f"input      {config.input_repo}: {rows:,} prompts with {config.num_responses} responses each")
    say(f"pairs      {config.select}, from prompts with {config.min_responses or config.num_responses} surviving")
    say(f"output     {output}: absent")
    storage.check_delivery(output)
    return output.folder


# Work


def write_split(plan: Plan, config: Config, output: storage.Output, split: str, pairs: Iterable[pa.Table]) -> int:
    """Pad and write the pairs of one split. Returns how many they are."""
    rows = 0
    for shard, table in enumerate(pair_tables.cut(pairs, SHARD_ROWS)):
        rows += len(table)
        if output.has_shard(split, shard):
            continue
        padded = pair_tables.pad(
            table, maxlen_prompt=config.maxlen_prompt, maxlen=config.maxlen, pad_id=plan.chat.pad_id
        )
        if config.tutorial_columns:
            padded = pair_tables.with_tutorial_columns(padded, plan.chat)
        output.write_shard(split, shard, padded)
    return rows


def draw_test(order: list[str], config: Config) -> list[str]:
    """The prompts that are held out: the first of the seeded order. Raises BadUse if no other would be left."""
    size = config.test_size
    count = max(1, round(size * len(order))) if size < 1 else int(size)
    if count >= len(order):
        refuse_test_size(size, len(order), "after filtering there are")
    return order[:count]


def make_splits(plan: Plan, config: Config, output: storage.Output, work: Work, blocks: int) -> dict[str, Any]:
    """Write the splits and return the provenance of the whole. Raises BadUse if there is nothing to split."""
    total = pair_blocks.add_up(work, blocks, output.folder / SKIPPED)
    say("\n".join(pair_report.lines_of_loss(total, plan.rules.min_responses)))
    order = pair_blocks.split_order(work, blocks)
    try:
        if not order:
            raise BadUse(
                f"no prompt of {plan.source.name} is left ({pair_report.counts(total['dropped'])}): look at --maxlen, "
                f"--maxlen_prompt, --min_responses (now {plan.rules.min_responses}), the margins and --chat_template."
            )
        test = draw_test(order, config)
    except BadUse:
        shutil.rmtree(output.folder)  # these flags can't finish it, and with others it is another run
        raise
    rows = {
        TRAIN: write_split(plan, config, output, TRAIN, pair_blocks.pairs_of(work, blocks, test, others=True)),
        TEST: write_split(plan, config, output, TEST, pair_blocks.pairs_of(work, blocks, test)),
    }
    data = pair_report.picture(pair_blocks.columns_of(work, blocks, pair_report.COLUMNS), config.num_responses)
    say("\n".join(pair_report.lines_of_data(data, rows, total)))
    return describe(plan, config, total, rows, {TRAIN: len(order) - len(test), TEST: len(test)}, data)


# What is said and recorded


def describe(
    plan: Plan,
    config: Config,
    total: dict[str, Any],
    rows: dict[str, int],
    prompts: dict[str, int],
    data: dict[str, Any],
) -> dict[str, Any]:
    came_with = plan.source.provenance or {}
    return provenance.describe(
        command="filter",
        config={name: value for name, _, value in fields_with_roles(config)},
        inputs={
            "rewards": provenance.describe_source(plan.source),
            "tokenizer": {"ref": config.model, "fingerprint": plan.chat.tokenizer_hash},
        },
        rows_in=plan.source.num_rows,
        rows_out=rows,
        dropped=total["dropped"],
        engine={"tokenizer": config.model, "processes": config.num_proc},
        chat=plan.chat.describe(),
        **({"sampling": came_with["sampling"]} if "sampling" in came_with else {}),
        prompts_out=prompts,
        responses_not_surviving=total["faults"],
        kept_with_min_responses_2=total["liftable"],
        ties={"best": total["tied_best"], "worst": total["tied_worst"]},
        round_trip={"sampled_pairs": total["sampled_pairs"], "changed_pairs": total["changed_pairs"]},
        data=data,
    )


COLUMNS = {
    "prompt_id": "the prompt's key, as in the input",
    "prompt": "text, or messages",
    "chosen, rejected": "the better and the worse response, text",
    "chosen_reward, rejected_reward": "their rewards, float64",
    "rewards": "of all responses to the prompt, in their order",
    "prompt_tokens": "prompt ids up to the assistant's header, left-padded, int32",
    "chosen_tokens, rejected_tokens": "response ids with the end of the turn, right-padded, int32",
    "prompt_length, chosen_length, rejected_length": "ids that are no padding",
    "chosen_index, rejected_index": "which of the prompt's responses they are",
}


def card(made: dict[str, Any], config: Config, pad_id: int, shard: Path) -> str:
    data = made["data"]
    facts = {
        "selection": config.select,
        "prompts in train and test": made["prompts_out"],
        "would stay with --min_responses 2": made["kept_with_min_responses_2"],
        "ties": made["ties"],
        "mean reward_margin": data["reward_margin"]["mean"],
        "mean lengths (prompt, chosen, rejected)": ", ".join(
            f"{data[f'{name}_length']['mean']:.0f}" for name in ("prompt", "chosen", "rejected")
        ),
        "padded with id": pad_id,
        "dropped prompts, one by one": SKIPPED,
    }
    return provenance.card(
        title=f"Pairs of {config.input_repo} for {config.model}",
        provenance=made,
        splits=[TRAIN, TEST],
        columns=COLUMNS,
        facts=facts,
        samples=provenance.sample_rows(shard),
    )


def main(config: Config) -> Path:
    check_values(config)
    if config.push_only:
        return storage.push_only(
            config.output_repo, public=config.public, overwrite=config.run.overwrite, check=config.run.check
        )
    pending = config.run.pending_rows() if config.run.check else {}
    if config.input_repo in pending or config.model in pending:
        return check_pending(config, pending)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if config.num_proc == 1 else "false"
    plan = make_plan(config)
    print_plan(plan, config)
    folder = plan.output.folder
    preflight.check_writable(folder, flag="--output_repo")
    if config.run.check:
        storage.check_delivery(plan.output)
        return folder
    started = time.monotonic()
    overwrite = config.run.overwrite
    remote = storage.prepare_delivery(
        plan.output, plan.identity, public=config.public, overwrite=overwrite, flag="--output_repo"
    )
    with storage.open_output(folder, plan.identity, overwrite=overwrite, remote=remote) as output:
        if output.done:
            say(f"done before: {storage.deliver(plan.output)}")  # again: that push may be what was killed
            return folder
        folder_of_blocks = output.folder / "journal"
        work = Work(plan.chat, plan.rules, config.num_responses, config.maxlen_prompt, folder_of_blocks)
        blocks = pair_blocks.do_blocks(work, plan.source, config.num_proc)
        made = make_splits(plan, config, output, work, blocks)
        first = storage.shard_files(output.folder, "--output_repo")[TRAIN][0]
        output.publish(made, card(made, config, plan.chat.pad_id, first))
        where = storage.deliver(plan.output)
    say(f"done in {duration(time.monotonic() - started)}: {where}")
    return folder


if __name__ == "__main__":
    entry(main, Config)
