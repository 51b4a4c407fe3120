"""The stages of a run as data: what each is told, what it reads and writes, in the order in which they run.

Nothing here looks at a file or starts a process: a recipe and a few decisions go in, a tuple of stages comes out.
"""

from __future__ import annotations

import os.path
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.iteration.recipes import STAGES, Flags, Recipe, Value, words_of

DATA_FLAG = {
    "generate": "prompts",
    "rank": "input_repo",
    "filter": "input_repo",
    "train": "input_repo",
    "sft": "input_repo",
    "reward": "input_repo",
    "evaluate": "prompts",
}
MODEL_FLAG = {
    "generate": "model",
    "rank": "reward_model",
    "filter": "model",
    "train": "base_model",
    "sft": "base_model",
    "reward": "base_model",
}
OUTPUT_FLAG = {
    "tiny": "output",
    "sft": "output_dir",
    "reward": "output_dir",
    "generate": "output_repo",
    "rank": "output_repo",
    "filter": "output_repo",
    "train": "output_dir",
    "evaluate": "output",
}
ALIASES = {
    "generate": {"pairs": "num_responses", "world_size": "tensor_parallel_size"},
    "rank": {"pairs": "num_responses"},
    "filter": {"pairs": "num_responses"},
    "train": {
        "model": "base_model",
        "task.input_repo": "input_repo",
        "task.temperature": "temperature",
        "task.maxlen": "maxlen",
        "task.maxlen_prompt": "maxlen_prompt",
    },
    "sft": {"model": "base_model"},
    "reward": {"model": "base_model"},
}
"""{command: {another spelling of a flag: the one used here}}."""
SET_HERE = {
    "generate": ("model", "prompts", "output_repo"),
    "rank": ("input_repo", "output_repo"),
    "filter": ("input_repo", "model", "output_repo"),
    "train": ("input_repo", "base_model", "output_dir"),
    "evaluate": ("policies", "output", "vllm_python", "train_python"),
    "report": (),
}
"""Flags of an iteration's stages, and of what follows, that the run decides and a recipe can't."""
ONE_RUN = ("check", "pending", "overwrite", "debug")
"""Flags that say how a command is run this once; a recipe has none of them."""
SEEDS = {"generate": 0, "filter": 0, "train": 555134}
"""The commands whose seed moves on by 1 with every iteration, and their own default."""
MOVING = ("seed", "shuffle_seed")
"""Flags that move on so; but all shards are cut from one order, so that with shards shuffle_seed stays."""
SAMPLING = ("backend", "temperature", "top_p", "maxlen", "system_prompt", "chat_template", "tensor_parallel_size")
"""How evaluate samples if it is not told: as generate does."""
WORLD = {
    "demo": {"prompts": 912, "prompts_heldout": 252, "demonstrations": 6000, "start": 0},
    "ci": {"prompts": 236, "prompts_heldout": 116, "demonstrations": 2400, "start": 0},
}
"""{size: {folder: rows}} of what `tiny` writes."""
LAUNCH, ENVIRONMENT = "launch.", "env."
EVALUATION, REPORT = "evaluation", "report.html"


@dataclass(frozen=True)
class Run:
    """What is decided for the run as a whole."""

    folder: str
    model: str
    """The policy that iteration 1 starts from."""
    prompts: str
    iterations: int
    repo: str | None = None
    """OWNER/NAME: the data go to the Hub as OWNER/NAME-iter1-responses and so on."""
    shards: int | None = None
    """Iteration t takes the t-th of so many disjoint shards of the prompts; None: all of them."""
    num_prompts: int | None = None
    """Rows of the prompts, which shards are cut from."""
    evaluate_each: bool = False
    """Evaluate after every iteration, not at the end alone."""
    vllm_python: str = "python"
    train_python: str = "python"


@dataclass(frozen=True)
class Stage:
    """One command of a run."""

    name: str
    """iteration_2/train, before/sft, evaluate"""
    command: str
    python: str
    flags: Flags
    """In the order in which they are printed; those of the launcher apart."""
    output: str
    iteration: int | None = None
    launch: Flags = field(default_factory=dict)
    """accelerate launch's flags; empty: one plain process."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables that are set for it beside ours."""
    arguments: tuple[str, ...] = ()
    """What is not a flag."""
    inputs: tuple[str, ...] = ()
    """References that it reads: datasets, models, the folder of an evaluation."""
    eta_from: str | None = None
    """The policy whose resolved eta takes the place of --rebel.target_gap, once it is there."""

    @property
    def writes(self) -> tuple[str, ...]:
        """References under which others read what it writes."""
        if self.command == "tiny":
            return tuple(f"{self.output}/{name}" for name in WORLD["demo"])
        return (self.output,)


def place(ref: str) -> str:
    """A reference in the one spelling by which two are compared."""
    return os.path.normpath(ref)


# The plan


def plan(recipe: Recipe, run: Run) -> tuple[Stage, ...]:
    """Every stage of the run in order. Raises BadUse for a recipe that sets what the run decides."""
    check_recipe(recipe)
    stages = list(before(recipe, run))
    evaluated = "evaluate" in recipe.stages
    for t in range(1, run.iterations + 1):
        stages += (make(recipe, run, t) for make in (generate, rank, filter_, train))
        if evaluated and run.evaluate_each and t < run.iterations:
            stages.append(replace(evaluate(recipe, run, t), name=f"iteration_{t}/evaluate", iteration=t))
    if evaluated:
        stages += [evaluate(recipe, run, run.iterations), report(recipe, run)]
    return tuple(stages)


def check_recipe(recipe: Recipe) -> None:
    """Raise BadUse for a flag that is not the recipe's to set."""
    sections = {**recipe.stages} | {f"before.{command}": flags for command, flags in recipe.before}
    for number, stages in recipe.iterations.items():
        sections |= {f"iteration_{number}.{command}": flags for command, flags in stages.items()}
    for name, flags in sections.items():
        command = name.rpartition(".")[2]
        taken = () if name.startswith("before.") else SET_HERE[command]
        for flag in canonical(command, flags):
            if flag in ONE_RUN:
                raise BadUse(f"{name}.{flag} is nothing for a recipe: pass --{flag} to iterate.")
            if flag in taken:
                own = {"model": "; iterate's own --model is the first policy", "prompts": "; pass --prompts"}
                raise BadUse(f"{name}.{flag} is what iterate itself sets: leave it out{own.get(flag, '')}.")


def canonical(command: str, flags: Flags) -> Flags:
    """`flags` under the spellings used here."""
    return {ALIASES.get(command, {}).get(name, name): value for name, value in flags.items()}


def split(flags: Flags) -> tuple[Flags, dict[str, Any]]:
    """(the stage's own flags, {"launch": accelerate launch's, "environment": variables}) of what a recipe says."""
    own, launch, environment = {}, {}, {}
    for name, value in flags.items():
        if name.startswith(LAUNCH):
            launch[name.removeprefix(LAUNCH)] = value
        elif name.startswith(ENVIRONMENT):
            environment[name.removeprefix(ENVIRONMENT)] = str(value)
        else:
            own[name] = value
    return own, {"launch": launch, "environment": environment}


def before(recipe: Recipe, run: Run) -> Iterator[Stage]:
    """The stages that run once. Raises BadUse for one that doesn't say where it writes."""
    seen: Counter[str] = Counter()
    for command, given in recipe.before:
        seen[command] += 1
        name = f"before/{command}" + (f"_{seen[command]}" if seen[command] > 1 else "")
        flags, start = split(canonical(command, given))
        output = flags.get(OUTPUT_FLAG[command])
        if not isinstance(output, str):
            raise BadUse(f"{name} has no {OUTPUT_FLAG[command]}, and what follows must know where it writes.")
        python = run.vllm_python if command == "generate" else run.train_python
        yield Stage(name, command, python, flags, output, inputs=inputs_of(command, flags), **start)


def inputs_of(command: str, flags: Flags) -> tuple[str, ...]:
    """The references that a stage's flags name as its data and models."""
    named = (flags.get(table.get(command, "")) for table in (DATA_FLAG, MODEL_FLAG))
    return tuple(str(ref) for value in named for ref in as_list(value))


def as_list(value: Value) -> list[Value]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def policy_of(run: Run, t: int) -> str:
    """The policy after iteration t; for 0 the one that the run starts from."""
    return f"{run.folder}/iteration_{t}/policy" if t else run.model


def data_of(run: Run, t: int, kind: str) -> str:
    """Where iteration t's responses, rewards or pairs lie."""
    return f"{run.repo}-iter{t}-{kind}" if run.repo else f"{run.folder}/iteration_{t}/{kind}"


def stage_of(command: str, recipe: Recipe, run: Run, t: int, decided: Flags) -> Stage:
    """A stage of iteration t, told what is `decided`, then what the recipe says, with seeds of its own."""
    given, start = split(canonical(command, recipe.flags(command, t)))
    flags = {**decided, **given, **moved_seeds(command, recipe, t)}
    python = run.vllm_python if command == "generate" else run.train_python
    output = str(flags[OUTPUT_FLAG[command]])
    name, inputs = f"iteration_{t}/{command}", inputs_of(command, flags)
    return Stage(name, command, python, flags, output, iteration=t, inputs=inputs, **start)


def moved_seeds(command: str, recipe: Recipe, t: int) -> Flags:
    """The seeds of iteration t: what the recipe gives for every iteration, or the command's own default, plus t - 1.

    Nothing in iteration 1, where those hold as they are, and nothing for a seed that the recipe gives for this
    iteration alone.
    """
    base: Flags = {"seed": SEEDS[command]} if command in SEEDS else {}
    base |= {name: value for name, value in recipe.stages.get(command, {}).items() if name in MOVING}
    own = recipe.iterations.get(t, {}).get(command, {})
    return {
        name: whole(value, f"{command}.{name}") + t - 1
        for name, value in base.items()
        if t > 1 and name not in own and value is not None
    }


def generate(recipe: Recipe, run: Run, t: int) -> Stage:
    """Sample from the policy of the iteration before, prompts whole or this iteration's shard."""
    decided: Flags = {
        "model": policy_of(run, t - 1),
        "prompts": run.prompts,
        "output_repo": data_of(run, t, "responses"),
    }
    stage = stage_of("generate", recipe, run, t, decided)
    if run.shards is None or run.num_prompts is None:
        return stage
    order = {name: recipe.flags("generate", t)[name] for name in ("shuffle_seed",) if name in stage.flags}
    mine = shard(recipe.flags("generate", t), run.shards, run.num_prompts, t)
    return replace(stage, flags={**stage.flags, **order, **mine})


def shard(flags: Flags, shards: int, num_prompts: int, t: int) -> Flags:
    """The rows of iteration t's shard, within the recipe's own start_idx and end_idx; sizes differ by 1 at most."""
    start = whole(flags.get("start_idx", 0), "generate.start_idx")
    end = whole(flags.get("end_idx", -1), "generate.end_idx")
    rows = (num_prompts if end == -1 else end) - start
    if rows < shards:
        raise BadUse(f"--shard_prompts can't cut {rows} prompts into {shards} shards: lower --iterations.")
    return {"start_idx": start + rows * (t - 1) // shards, "end_idx": start + rows * t // shards}


def rank(recipe: Recipe, run: Run, t: int) -> Stage:
    decided: Flags = {"input_repo": data_of(run, t, "responses"), "output_repo": data_of(run, t, "rewards")}
    return stage_of("rank", recipe, run, t, {**decided, **same_responses(recipe, t)})


def filter_(recipe: Recipe, run: Run, t: int) -> Stage:
    decided: Flags = {
        "input_repo": data_of(run, t, "rewards"),
        "model": policy_of(run, t - 1),
        "output_repo": data_of(run, t, "pairs"),
    }
    return stage_of("filter", recipe, run, t, {**decided, **same_responses(recipe, t)})


def same_responses(recipe: Recipe, t: int) -> Flags:
    """As many responses per prompt as generate samples."""
    sampled = canonical("generate", recipe.flags("generate", t))
    return {name: sampled[name] for name in ("num_responses",) if name in sampled}


def train(recipe: Recipe, run: Run, t: int) -> Stage:
    """Train the policy of the iteration before; from iteration 2 on with the eta that iteration 1 resolved."""
    decided: Flags = {
        "base_model": policy_of(run, t - 1),
        "input_repo": data_of(run, t, "pairs"),
        "output_dir": policy_of(run, t),
        **({"push_to": f"{run.repo}-iter{t}-policy"} if run.repo else {}),
    }
    stage = stage_of("train", recipe, run, t, decided)
    own = {"rebel.target_gap", "rebel.eta"} & recipe.iterations.get(t, {}).get("train", {}).keys()
    if t > 1 and stage.flags.get("rebel.target_gap") is not None and not own:
        return replace(stage, eta_from=policy_of(run, 1))
    return stage


def evaluate(recipe: Recipe, run: Run, t: int) -> Stage:
    """All policies up to iteration t, in the run's one evaluation, which grows."""
    sampled = canonical("generate", recipe.flags("generate"))
    policies = [start_name(run.model), *(f"iteration_{i}={policy_of(run, i)}" for i in range(1, t + 1))]
    given, start = split(recipe.flags("evaluate"))
    flags: Flags = {
        "policies": [*policies],
        "output": f"{run.folder}/{EVALUATION}",
        **{name: sampled[name] for name in SAMPLING if name in sampled},
        **({"vllm_python": run.vllm_python} if run.vllm_python != run.train_python else {}),
        **given,
    }
    judges = [str(item).partition("=")[2] or str(item) for item in as_list(given.get("reward_models"))]
    inputs = (*inputs_of("evaluate", flags), *(policy_of(run, i) for i in range(t + 1)), *judges)
    output = f"{run.folder}/{EVALUATION}"
    return Stage("evaluate", "evaluate", run.train_python, flags, output, inputs=inputs, **start)


def start_name(model: str) -> str:
    """The first policy for evaluate, which calls it after its folder unless that would be an iteration's name."""
    return f"start={model}" if "iteration_" in model or PurePath(model).name == "policy" else model


def report(recipe: Recipe, run: Run) -> Stage:
    (flags, start), output = split(recipe.flags("report")), f"{run.folder}/{REPORT}"
    inputs = (f"{run.folder}/{EVALUATION}",)
    return Stage("report", "report", run.train_python, flags, output, arguments=(run.folder,), inputs=inputs, **start)


# What follows from a plan


def command_line(stage: Stage, *more: str) -> list[str]:
    """The words of a stage's command; `more` comes last."""
    variables = [f"{name}={value}" for name, value in stage.environment.items()]
    launcher = []
    if stage.launch:
        launch = {"main_process_port": 0, **stage.launch}  # 0: any free one
        launcher = ["-m", "accelerate.commands.launch", *words_of(launch)]
    module = ["-m", f"rlhf_pipeline.{stage.command}"]
    start = [*(["env", *variables] if variables else []), stage.python, *launcher, *module, *stage.arguments]
    return [*start, *words_of(stage.flags), *more]


def with_eta(stage: Stage, eta: float) -> Stage:
    """`stage` with the eta that iteration 1 resolved in the place of its target_gap."""
    flags: Flags = {}
    for name, value in stage.flags.items():
        flags |= {"rebel.eta": eta} if name == "rebel.target_gap" else {name: value}
    return replace(stage, flags=flags, eta_from=None)


def part(stages: Sequence[Stage], first: str | None, last: str | None) -> tuple[Stage, ...]:
    """From the first stage that `first` names to the last that `last` names, both included.

    A name is a stage's, such as iteration_2/rank, or a command's. Raises BadUse for a name that no stage has.
    """
    for name, flag in ((first, "--from"), (last, "--to")):
        if name is not None and not any(is_called(stage, name) for stage in stages):
            names = ", ".join(stage.name for stage in stages)
            raise BadUse(f"{flag} {name} is none of this run's stages: {', '.join(STAGES)}, or one of {names}.")
    begin = next(i for i, stage in enumerate(stages) if first is None or is_called(stage, first))
    end = max(i for i, stage in enumerate(stages) if last is None or is_called(stage, last))
    if end < begin:
        raise BadUse(f"--to {last} comes before --from {first}.")
    return tuple(stages[begin : end + 1])


def is_called(stage: Stage, name: str) -> bool:
    return name in (stage.name, stage.command) and not (name == stage.command and stage.name.startswith("before/"))


def following(stages: Sequence[Stage], changed: Stage) -> tuple[Stage, ...]:
    """The stages that read what `changed` writes, and what reads theirs, in order."""
    stale = {place(ref) for ref in changed.writes}
    found = []
    for stage in stages[stages.index(changed) + 1 :]:
        if stale & {place(ref) for ref in stage.inputs}:
            found.append(stage)
            stale |= {place(ref) for ref in stage.writes}
    return tuple(found)


def whole(value: Value, name: str) -> int:
    found = number(value, name)
    if found != int(found):
        raise BadUse(f"{name} is {value}; expected a whole number.")
    return int(found)


def number(value: Value, name: str) -> float:
    try:
        return float(str(value))
    except ValueError:
        raise BadUse(f"{name} is {value}; expected a number.") from None
