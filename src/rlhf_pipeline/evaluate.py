"""Is it better? Several policies answer held-out prompts, several reward models judge, and the numbers are compared.

Runs generate and rank as processes, once per policy each, into ordinary repos in between; the first policy is the
baseline. Writes results.json: rewards and win rates with intervals, KL to the baseline, lengths, repetition.

    python -m rlhf_pipeline.evaluate --policies runs/tiny/sft runs/tiny/iteration_1/policy \\
        --reward_models proxy=runs/tiny/reward gold=rlhf_pipeline.tiny:gold \\
        --prompts runs/tiny/world/prompts_heldout --num_responses 2 --output runs/tiny/evaluation
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf_pipeline.core import children, preflight, provenance, schema, storage
from rlhf_pipeline.core.chat import Chat
from rlhf_pipeline.core.command import (
    EXIT_BAD_USE,
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
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
from rlhf_pipeline.core.files import read_json, write_json
from rlhf_pipeline.core.iteration import plan_table
from rlhf_pipeline.core.iteration.checks import Checker
from rlhf_pipeline.core.progress import duration, say
from rlhf_pipeline.core.ranking import scoring
from rlhf_pipeline.core.reporting import evaluation, verdict
from rlhf_pipeline.core.reporting.evaluation import ENSEMBLE, LOG_PROBS, RESPONSES, RESULTS, Answers
from rlhf_pipeline.core.reporting.names import last_policy, named
from rlhf_pipeline.core.reporting.tables import print_policies

if TYPE_CHECKING:
    from rlhf_pipeline.core.models import ModelRef

LOGS = "logs"
FILES = {RESULTS, LOGS, storage.PROVENANCE, storage.IDENTITY, storage.CARD}
RESERVED = {RESPONSES, LOG_PROBS, ENSEMBLE, *verdict.OTHER_COLUMNS}
"""What a policy, and what a reward model, can't be called: it means something else in the folder or in summary.json."""
PLACES = ("policies", "reward_models", "judge_model", "judge_template", "prompts", "output", "chat_template")
"""Fields that name things: what they hold counts, by its fingerprint, not what they are called."""
FLAGS = ("generate_flags", "rank_flags")
"""Fields that hold the stages' own flags, of which the stages know what decides rows."""


@dataclass(frozen=True)
class Config:
    policies: What[tuple[str, ...]]
    """Policies, NAME=REF or REF each: a local folder or a Hub id. The first is the baseline. A run folder stands for
    the policy of its last iteration."""
    reward_models: What[tuple[str, ...]]
    """Reward models, NAME=REF or REF each, as rank takes them. First the one that the policies were trained to please
    (the proxy), second the one to believe (gold, or a reward model not trained on), then any others."""
    prompts: What[str] = "./prompts_heldout"
    """Prompts held out from training: what generate --prompts takes. A column category gives a table per category."""
    output: What[str] = "./evaluation"
    """Local folder for responses, rewards and results."""
    split: What[str] = "train"
    """Split of the prompts."""
    num_prompts: What[int | None] = None
    """Take only the first so many prompts. None: all."""
    ensemble: What[tuple[str, ...]] = ()
    """Names of reward models whose mean, each in standard deviations of the baseline's rewards, judges as well."""

    judge_model: What[str | None] = None
    """With an endpoint http://HOST/v1 among the reward models: the model there that rates responses."""
    judge_template: What[str | None] = None
    """File with that judge's prompt, as for rank."""

    num_responses: What[int] = 1
    """Responses to each prompt."""
    temperature: What[float] = 0.8
    """Sampling temperature, also that of the log-probs for the KL."""
    top_p: What[float] = 0.9
    """Sample among the most probable tokens that together have this probability."""
    maxlen: What[int] = 2048
    """New tokens of a response at most."""
    seed: What[int] = 0
    """Response i of each prompt is sampled with seed + 50 i, by every policy."""
    system_prompt: What[str | None] = None
    """System turn for prompts that have none."""
    chat_template: What[str | None] = None
    """File with a chat template to use instead of the policies' own."""
    kl: What[bool] = True
    """Estimate each policy's KL to the baseline; --no_kl saves two forward passes over its responses."""

    backend: What[Literal["vllm", "transformers"]] = "vllm"
    """generate's engine."""
    generate_flags: What[str] = ""
    """Further flags for generate, as one string after =: --generate_flags="--engine.max_model_len 4096"."""
    rank_flags: What[str] = ""
    """Further flags for rank, as one string after =."""
    tensor_parallel_size: How[int | None] = None
    """generate's GPUs that share a policy. None: all visible ones, or 1 on CPU."""
    rank_processes: How[int] = 1
    """Processes of rank, a GPU each, started with accelerate launch if there are several."""
    batch_tokens: How[int] = 16384
    """Tokens of one forward pass for the KL, padding included."""
    vllm_python: How[str] = sys.executable
    """Interpreter that runs generate."""
    train_python: How[str] = sys.executable
    """Interpreter that runs rank."""
    run: RUN = RunFlags()


@dataclass(frozen=True)
class Plan:
    """Everything that is known before a model is loaded."""

    folder: Path
    policies: dict[str, ModelRef]
    reward_models: dict[str, scoring.RewardModel]
    source: storage.Source
    identity: dict[str, Any]


# What is to be done


def check_values(config: Config) -> None:
    """Raise BadUse for values that can't be meant, before anything is read."""
    for name in ("num_responses", "maxlen", "rank_processes", "batch_tokens", "num_prompts"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise BadUse(f"--{name} is {value}; expected 1 or more.")
    if config.kl and config.temperature <= 0:
        raise BadUse(
            f"--temperature {config.temperature:g} is greedy, and greedy responses say nothing of the KL: "
            "pass --no_kl, or a temperature above 0."
        )
    names = judges_of(config)
    for name in config.ensemble:
        if name not in names:
            raise BadUse(f"--ensemble {name} is none of the reward models {', '.join(names)}.")
    if len(set(config.ensemble)) != len(config.ensemble) or len(config.ensemble) == 1:
        raise BadUse(f"--ensemble {' '.join(config.ensemble)}: expected at least two different reward models.")
    policies_of(config)
    if config.backend == "vllm" and config.vllm_python == sys.executable:
        preflight.check_importable("vllm", flag="--backend vllm", instead="pass --backend transformers")


def policies_of(config: Config) -> dict[str, str]:
    """{name: reference}, the baseline first."""
    return named(config.policies, FILES, "--policies")


def judges_of(config: Config) -> dict[str, str]:
    """{name: reference} of the reward models."""
    return named(config.reward_models, RESERVED, "--reward_models")


def resolve_judge(config: Config, ref: str) -> scoring.RewardModel:
    """As rank will, with what --rank_flags tell it of reward models."""
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--trust_remote_code", "--trust-remote-code", action="store_true")
    flags.add_argument("--chat_template", "--chat-template")
    told, _ = flags.parse_known_args(shlex.split(config.rank_flags))
    return scoring.resolve_reward_model(
        ref,
        flag="--reward_models",
        judge_model=config.judge_model,
        judge_template=config.judge_template,
        **vars(told),
    )


def choose_folder(config: Config) -> Path:
    path = storage.parse_ref(config.output, flag="--output", output=True).path
    if path is None:
        raise BadUse(f"--output {config.output} is not a local folder, and results are written to one: ./NAME.")
    preflight.check_writable(path, flag="--output")
    return path


def make_plan(config: Config) -> Plan:
    """Resolve and check inputs. Raises BadUse with one sentence for what can't be evaluated."""
    from rlhf_pipeline.core import models

    own_template = config.chat_template is None
    policies = {
        name: models.resolve_model(last_policy(ref), flag="--policies", chat_template=own_template)
        for name, ref in policies_of(config).items()
    }
    judges = {name: resolve_judge(config, ref) for name, ref in judges_of(config).items()}
    source = storage.open_source(config.prompts, flag="--prompts", split=config.split)
    schema.require(source, (schema.PROMPT,), written_by="tiny", remedy="name a dataset with that column")
    what = {name: value for name, value in what_fields(config).items() if name not in PLACES}
    if config.chat_template is not None:
        any_policy = next(iter(policies.values())).folder
        what["chat_template"] = Chat.load(any_policy, chat_template=config.chat_template).template_hash
    identity = {
        "command": "evaluate",
        "what": what,
        "baseline": next(iter(policies)),
        "inputs": {
            "prompts": source.fingerprint,
            "policies": {name: models.fingerprint(model) for name, model in policies.items()},
            "reward_models": {name: judge.identity() for name, judge in judges.items()},
        },
    }
    return Plan(choose_folder(config), policies, judges, source, identity)


def recorded_identity(folder: Path) -> dict[str, Any] | None:
    """What the evaluation in `folder` is of; that of one under way comes before that of the finished one."""
    finished = read_json(folder / storage.PROVENANCE)
    under_way: dict[str, Any] | None = read_json(folder / storage.IDENTITY)
    return under_way or (finished["identity"] if finished else None)


def merge(recorded: dict[str, Any], wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
    """An evaluation may grow: the identity of both together. Raises BadUse where they contradict each other."""
    kinds = ("policies", "reward_models")
    ours, theirs = wanted["inputs"], recorded["inputs"]
    common = {kind: {name: theirs[kind][name] for name in ours[kind] if name in theirs[kind]} for kind in kinds}
    new = {kind: {name: ours[kind][name] for name in ours[kind] if name not in theirs[kind]} for kind in kinds}
    expected = {**recorded, "inputs": {**theirs, **{kind: {**common[kind], **new[kind]} for kind in kinds}}}
    storage.check_same_run(folder, expected, wanted)
    return {**wanted, "inputs": {**ours, **{kind: {**theirs[kind], **ours[kind]} for kind in kinds}}}


def state_of(plan: Plan, *, overwrite: bool) -> tuple[str, dict[str, Any]]:
    """("done", "partial" or "absent", identity to record). Raises BadUse if the folder holds another evaluation."""
    recorded = recorded_identity(plan.folder)
    if recorded is None:
        if plan.folder.is_dir() and any(plan.folder.iterdir()):
            raise BadUse(f"{plan.folder} exists and is not an output of rlhf_pipeline: name another --output.")
        return "absent", plan.identity
    try:
        merged = merge(recorded, plan.identity, plan.folder)
    except BadUse:
        if not overwrite:
            raise
        return "absent", plan.identity
    results = read_json(plan.folder / RESULTS)
    wanted = set(plan.policies), set(plan.reward_models)
    held = (
        ({item["name"] for item in results["policies"]}, set(results["reward_models"])) if results else (set(), set())
    )
    done = all(names <= there for names, there in zip(wanted, held, strict=True))
    return ("done" if done else "partial"), merged


def settle_flags(config: Config, plan: Plan) -> Plan:
    """`plan` with the recorded FLAGS where generate and rank take what is there for what they would make with its own.

    Raises BadUse for flags that one of them refuses.
    """
    recorded, now = recorded_identity(plan.folder), plan.identity["what"]
    before = {name: recorded["what"][name] if recorded else "" for name in FLAGS}
    if before.items() <= now.items():
        return plan
    refused = refusal(config, plan.folder, {})
    if refused and refusal(config, plan.folder, {}, "--overwrite"):
        raise BadUse(refused)
    if refused or recorded is None:
        return plan
    return replace(plan, identity={**plan.identity, "what": {**now, **before}})


def refusal(config: Config, folder: Path, pending: Mapping[str, int], *more: str) -> str | None:
    """What the first stage that would refuse its command says in its --check; None if all would run."""
    judges = list(judges_of(config))
    with Checker() as checker:
        for policy in policies_of(config):
            responses = folder / policy / RESPONSES
            waits = [f"{ref}={rows}" for ref, rows in pending.items()]
            waits += [] if is_whole(responses) else [f"{responses}=0"]
            check = ["--check", *more, *(["--pending", *waits] if waits else [])]
            generate, rank = generate_command(config, folder, policy), rank_command(config, folder, policy, judges)
            for name, words in (("generate", generate), ("rank", rank)):
                flags = words[words.index(f"rlhf_pipeline.{name}") + 1 :]
                answer = checker.check(words[0], name, [*flags, *check])
                if answer.code != 0:
                    return f"{name} for {policy}: {answer.error}"
    return None


def print_plan(plan: Plan, config: Config, state: str) -> None:
    prompts = min(plan.source.num_rows, config.num_prompts or plan.source.num_rows)
    for position, (name, model) in enumerate(plan.policies.items()):
        parts = (RESPONSES, *plan.reward_models)
        there = [part for part in parts if state != "absent" and is_whole(plan.folder / name / part)]
        note = f"; there already: {', '.join(there)}" if there else ""
        say(f"policy     {name}{' (baseline)' if position == 0 else ''}: {model.text}{note}")
    for name, judge in plan.reward_models.items():
        say(f"judge      {name}: {judge.text}, {judge.kind}")
    say(f"prompts    {plan.source.ref}: {prompts:,}, {prompts * config.num_responses:,} responses of every policy")
    say(f"output     {plan.folder}: {state}")


def check_pending(config: Config, pending: dict[str, int]) -> Path:
    """The plan of an evaluation whose policies, reward models or prompts an earlier stage is still to write."""
    from rlhf_pipeline.core import models

    folder = choose_folder(config)
    for name, ref in policies_of(config).items():
        if ref not in pending:
            models.resolve_model(last_policy(ref), flag="--policies", chat_template=config.chat_template is None)
        say(f"policy     {name}: {ref}{', to be written by an earlier stage' if ref in pending else ''}")
    for name, ref in judges_of(config).items():
        if ref not in pending:
            resolve_judge(config, ref)
        say(f"judge      {name}: {ref}{', to be written by an earlier stage' if ref in pending else ''}")
    rows = pending.get(config.prompts)
    if rows is None:
        rows = storage.open_source(config.prompts, flag="--prompts", split=config.split).num_rows
    rows = min(rows, config.num_prompts or rows)
    if (config.generate_flags or config.rank_flags) and (refused := refusal(config, folder, pending, "--overwrite")):
        raise BadUse(refused)
    say(f"prompts    {config.prompts}: {rows:,}, {rows * config.num_responses:,} responses of every policy")
    say(f"output     {folder}")
    return folder


# Work


def is_whole(folder: Path) -> bool:
    return (folder / storage.PROVENANCE).exists()


def generate_command(config: Config, folder: Path, policy: str) -> list[str]:
    given: dict[str, Any] = {
        "--model": last_policy(policies_of(config)[policy]),
        "--prompts": config.prompts,
        "--split": config.split,
        "--num_prompts": config.num_prompts,
        "--output_repo": folder / policy / RESPONSES,
        "--num_responses": config.num_responses,
        "--temperature": config.temperature,
        "--top_p": config.top_p,
        "--maxlen": config.maxlen,
        "--seed": config.seed,
        "--system_prompt": config.system_prompt,
        "--chat_template": config.chat_template,
        "--backend": config.backend,
        "--tensor_parallel_size": config.tensor_parallel_size,
    }
    flags = [part for name, value in given.items() if value is not None for part in (name, str(value))]
    return [config.vllm_python, "-m", "rlhf_pipeline.generate", *flags, *shlex.split(config.generate_flags)]


def rank_command(config: Config, folder: Path, policy: str, judges: Sequence[str]) -> list[str]:
    """One process for all the judges: each writes rewards of its own."""
    home, refs = folder / policy, judges_of(config)
    given: dict[str, list[Any]] = {
        "--input_repo": [home / RESPONSES],
        "--output_repo": [home / name for name in judges],
        "--reward_model": [refs[name] for name in judges],
        "--num_responses": [config.num_responses],
    }
    if any(refs[name].startswith(("http://", "https://")) for name in judges):
        asked = {"--judge_model": config.judge_model, "--judge_template": config.judge_template}
        given |= {name: [value] for name, value in asked.items() if value is not None}
    launch = ["-m", "accelerate.commands.launch", "--num_processes", str(config.rank_processes)]
    launcher = launch if config.rank_processes > 1 else []
    flags = [str(part) for name, values in given.items() for part in (name, *values)]
    return [config.train_python, *launcher, "-m", "rlhf_pipeline.rank", *flags, *shlex.split(config.rank_flags)]


def run_stages(config: Config, plan: Plan) -> None:
    """Every policy's responses and rewards that are not there yet.

    What is there whole was made for this evaluation: another one's is refused, or removed, before.
    """
    for policy in plan.policies:
        home = plan.folder / policy
        if not is_whole(home / RESPONSES):
            command = generate_command(config, plan.folder, policy)
            run_stage(command, plan.folder / LOGS / f"{policy}-responses.log", f"generate for {policy}")
        judges = [name for name in plan.reward_models if not is_whole(home / name)]
        if judges:
            command = rank_command(config, plan.folder, policy, judges)
            run_stage(command, plan.folder / LOGS / f"{policy}-rewards.log", f"rank of {policy} by {', '.join(judges)}")


def run_stage(words: Sequence[str], log: Path, name: str) -> None:
    """Run a command; what it says is also kept in `log`.

    Raises BadUse or WorkFailed as the stage did, SystemExit if this process was asked to end.
    """
    say(f"\n$ {plan_table.pasted(words)}")
    ended = children.run(words, log=log, environment={"RLHF_PIPELINE_PARENT": "1"}, on_beat=lambda seconds: None)
    if ended.asked is not None:
        say("ended as asked: run the same command again to go on from here")
        raise SystemExit(EXIT_INTERRUPTED if ended.asked == signal.SIGINT else EXIT_TERMINATED)
    if ended.code == EXIT_BAD_USE:
        raise BadUse(f"{name} was refused: its message stands above.")
    if ended.code != 0:
        raise WorkFailed(f"{name} ended with exit code {ended.code}: its message stands above, and in {log}.")


def measure_distances(config: Config, plan: Plan) -> None:
    """Every later policy's log-probs and the baseline's of what that policy said, into <output>/<policy>/log_probs."""
    from rlhf_pipeline.core.reporting import distance

    def policy(name: str) -> distance.Policy:
        model = plan.policies[name]
        chat = Chat.load(model.folder, chat_template=config.chat_template, system_prompt=config.system_prompt)
        return distance.Policy(name, model, plan.identity["inputs"]["policies"][name], chat)

    start, *others = plan.policies
    for name in others:
        distance.write_log_probs(
            plan.folder / name,
            policy(name),
            policy(start),
            temperature=config.temperature,
            batch_tokens=config.batch_tokens,
            config=all_fields(config),
        )


def all_fields(config: Config) -> dict[str, Any]:
    return {name: value for name, _, value in fields_with_roles(config)}


def compute(config: Config, plan: Plan) -> dict[str, Any]:
    """The results, from what lies in the folder."""
    every = [evaluation.read_answers(plan.folder, name, list(plan.reward_models)) for name in plan.policies]
    asked = min(plan.source.num_rows, config.num_prompts or plan.source.num_rows)
    answers: list[Answers] = evaluation.align(every)
    if config.ensemble:
        answers = evaluation.with_ensemble(answers, config.ensemble)
    results = evaluation.compare(answers)
    for item in results["policies"]:
        item["model"] = plan.policies[item["name"]].text
    sampling = {name: getattr(config, name) for name in ("temperature", "top_p", "maxlen", "seed", "backend")}
    return {**results, "prompts_left_out": asked - results["prompts"], "sampling": sampling}


def write_results(config: Config, plan: Plan, results: dict[str, Any], identity: dict[str, Any]) -> None:
    write_json(plan.folder / RESULTS, results)
    made = provenance.describe(
        command="evaluate",
        config=all_fields(config),
        inputs={
            "prompts": provenance.describe_source(plan.source),
            **{
                f"policy {name}": {"ref": model.text, "fingerprint": plan.identity["inputs"]["policies"][name]}
                for name, model in plan.policies.items()
            },
            **{
                f"reward model {name}": {"ref": judge.text, "kind": judge.kind, "fingerprint": judge.fingerprint}
                for name, judge in plan.reward_models.items()
            },
        },
        rows_in=results["prompts"] + results["prompts_left_out"],
        rows_out=results["prompts"],
        dropped={"not answered by every policy": results["prompts_left_out"]},
        engine={"name": config.backend},
    )
    facts = {
        item["name"]: {name: value["mean"] for name, value in item["rewards"].items()} for item in results["policies"]
    }
    card = provenance.model_card(title="An evaluation", provenance=made, facts=facts)
    storage.finish_run(plan.folder, identity, made, card)


def main(config: Config) -> Path:
    check_values(config)
    pending = config.run.pending_rows() if config.run.check else {}
    if {config.prompts, *policies_of(config).values(), *judges_of(config).values()} & set(pending):
        return check_pending(config, pending)
    plan = settle_flags(config, make_plan(config))
    state, identity = state_of(plan, overwrite=config.run.overwrite)
    print_plan(plan, config, state)
    if config.run.check:
        return plan.folder
    if state == "done":
        say("done before")
        print_policies(verdict.summarize(read_json(plan.folder / RESULTS)))
        return plan.folder
    with storage.run_lock(plan.folder):
        started = time.monotonic()
        state, identity = state_of(plan, overwrite=config.run.overwrite)  # another run may have held the lock
        if state == "absent":
            shutil.rmtree(plan.folder, ignore_errors=True)
        write_json(plan.folder / storage.IDENTITY, identity)
        run_stages(config, plan)
        if config.kl:
            measure_distances(config, plan)
        results = compute(config, plan)
        write_results(config, plan, results, identity)
        say()
        print_policies(verdict.summarize(results))
        say(f"\ndone in {duration(time.monotonic() - started)}: {plan.folder / RESULTS}")
    return plan.folder


if __name__ == "__main__":
    entry(main, Config)
