"""A recipe: what each stage of a run is told, from a YAML file and from the command line.

    iterate: {output: runs/a, iterations: 3, model: OWNER/NAME, prompts: OWNER/NAME}
    before: [{sft: {lr: 2e-5, ...}}, ...]                 stages that run once, in this order
    generate: {num_responses: 5}                          flags of a stage, the same in every iteration
    train: {lr: 3e-7, launch: {config_file: accelerate_cfgs/ddp.yaml, num_processes: 8}}
    iteration_2: {train: {lr: 1e-7}}                      what is different in one iteration
    evaluate: {prompts: ..., reward_models: [...]}        asks for an evaluation and a report

$run in a text is the run's folder.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_pipeline.core.command import BadUse

Value = str | int | float | bool | None | list[Any]
Flags = dict[str, Value]
"""{flag, nested ones dotted: value}. True is a flag without a value; a list is a flag with several."""

STAGES = ("generate", "rank", "filter", "train")
"""Of an iteration, in order."""
AFTER = ("evaluate", "report")
BEFORE = ("tiny", "sft", "reward", *STAGES)
"""Commands that may run before the first iteration."""
RUN = "$run"
NONE = "None"
"""The word for None on a command line."""
_ITERATION = re.compile(r"iteration_([1-9]\d*)")
_NUMBER = re.compile(r"-\.?\d")


@dataclass(frozen=True)
class Recipe:
    iterate: Flags = field(default_factory=dict)
    before: tuple[tuple[str, Flags], ...] = ()
    """(command, flags) of the stages before the first iteration."""
    stages: dict[str, Flags] = field(default_factory=dict)
    """{command: flags} of STAGES and AFTER."""
    iterations: dict[int, dict[str, Flags]] = field(default_factory=dict)
    """{iteration: {command: flags}} where they differ from `stages`."""

    def flags(self, command: str, iteration: int | None = None) -> Flags:
        """What `command` is told, in an iteration if it belongs to one."""
        return {**self.stages.get(command, {}), **self.iterations.get(iteration or 0, {}).get(command, {})}


# Reading


def read(path: Path) -> Recipe:
    """The recipe in a YAML file. Raises BadUse for a file that is none."""
    if not path.is_file():
        raise BadUse(f"--recipe {path} does not exist; scripts/recipes/ holds some to begin with.")
    return parse(load(path), f"--recipe {path}")


def load(path: Path) -> Any:
    """What a YAML file says. Raises BadUse if it is not valid."""
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise BadUse(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    return {} if data is None else data


def parse(data: Any, source: str) -> Recipe:
    """The recipe that YAML's `data` stand for. Raises BadUse, which begins with `source`, for what is no recipe."""
    sections = _mapping(data, source)
    stages: dict[str, Flags] = {}
    iterations = {}
    for name, section in sections.items():
        if match := _ITERATION.fullmatch(name):
            iterations[int(match[1])] = _stage_sections(section, STAGES, f"{source}: {name}")
        elif name not in ("iterate", "before"):
            stages |= _stage_sections({name: section}, (*STAGES, *AFTER), source)
    return Recipe(
        iterate=flatten(sections.get("iterate") or {}, f"{source}: iterate"),
        before=tuple(_before(sections.get("before") or [], f"{source}: before")),
        stages=stages,
        iterations=iterations,
    )


def _before(items: Any, source: str) -> Iterator[tuple[str, Flags]]:
    if not isinstance(items, list):
        raise BadUse(f"{source} is {items!r}; expected a list of stages such as - sft: {{lr: 2e-5}}.")
    for item in items:
        if not isinstance(item, dict) or len(item) != 1:
            raise BadUse(f"{source} has {item!r}; expected one stage and its flags, such as - sft: {{lr: 2e-5}}.")
        yield from _stage_sections(item, BEFORE, source).items()


def _stage_sections(data: Any, known: Sequence[str], source: str) -> dict[str, Flags]:
    sections = {}
    for name, section in _mapping(data, source).items():
        if name not in known:
            raise BadUse(f"{source} has a section {name}; expected one of {', '.join(known)}.")
        sections[name] = flatten(section or {}, f"{source}: {name}")
    return sections


def flatten(section: Any, source: str) -> Flags:
    """{rebel: {target-gap: 3}} as {"rebel.target_gap": 3}. Raises BadUse for what no command line can say."""
    flags: Flags = {}
    for written, value in _mapping(section, source).items():
        name = written.replace("-", "_")
        if isinstance(value, dict):
            flags |= {f"{name}.{inner}": item for inner, item in flatten(value, f"{source}.{name}").items()}
        elif value is False:
            raise BadUse(
                f"{source}: {name} is false; leave the line out, or write no_{name}: true if it is on by default "
                "(a word such as no needs quotes in YAML)."
            )
        elif isinstance(value, list) and any(isinstance(item, dict | list | bool) or item is None for item in value):
            raise BadUse(f"{source}: {name} is {value!r}; expected a list of words or numbers.")
        elif isinstance(value, str | int | float | list) or value is None:
            flags[name] = _single(value)
        else:
            raise BadUse(f"{source}: {name} is a {type(value).__name__}; put it in quotes.")
    return flags


def _mapping(data: Any, source: str) -> dict[str, Any]:
    if not isinstance(data, dict) or not all(isinstance(name, str) for name in data):
        raise BadUse(f"{source} is {data!r}; expected names with values, such as lr: 1e-6.")
    return data


# The command line


def override(recipe: Recipe, words: Sequence[str]) -> Recipe:
    """`recipe` with --STAGE.FLAG VALUE, --before.STAGE.FLAG and --iteration_N.STAGE.FLAG of the command line.

    A flag without a value is set; with the value false, one that the recipe sets is left out again. Raises BadUse.
    """
    for name, value in _flags_of(words):
        recipe = _set(recipe, name, value)
    return recipe


def _flags_of(words: Sequence[str]) -> Iterator[tuple[str, Value]]:
    """(flag without dashes, value) of --a.b 1 --a.c=2 --a.d 3 4 --a.e."""
    groups: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            name, separator, value = word[2:].partition("=")
            groups.append((name.replace("-", "_"), [value] if separator else []))
        elif groups:
            groups[-1][1].append(word)
        else:
            raise BadUse(f"{word} belongs to no flag; a recipe is given as --recipe {word}.")
    for name, values in groups:
        yield name, True if not values else _single(values[0]) if len(values) == 1 else values


def _single(value: Value) -> Value:
    return None if value == NONE else value


def _set(recipe: Recipe, name: str, value: Value) -> Recipe:
    first, _, rest = name.partition(".")
    if first in (*STAGES, *AFTER) and rest:
        stages = {**recipe.stages, first: _changed(recipe.stages.get(first, {}), rest, value, name)}
        return dataclasses.replace(recipe, stages=stages)
    command, _, flag = rest.partition(".")
    if first == "before" and flag and command in dict(recipe.before):
        before = (
            (other, _changed(flags, flag, value, name) if other == command else flags) for other, flags in recipe.before
        )
        return dataclasses.replace(recipe, before=tuple(before))
    if (match := _ITERATION.fullmatch(first)) and flag and command in STAGES:
        mine = recipe.iterations.get(int(match[1]), {})
        changed = {**mine, command: _changed(mine.get(command, {}), flag, value, name)}
        return dataclasses.replace(recipe, iterations={**recipe.iterations, int(match[1]): changed})
    raise BadUse(
        f"--{name} is no flag of iterate, nor of a stage here: those are --STAGE.FLAG such as --train.lr, "
        "--before.STAGE.FLAG for a stage of the recipe's before, and --iteration_2.STAGE.FLAG."
    )


def _changed(flags: Flags, flag: str, value: Value, name: str) -> Flags:
    if value not in ("false", "False"):
        return {**flags, flag: value}
    if flags.get(flag) is not True:
        raise BadUse(f"--{name} {value} takes back a flag that the recipe sets to true, and it does not set this one.")
    return {other: item for other, item in flags.items() if other != flag}


# Writing


def words_of(flags: Mapping[str, Value]) -> list[str]:
    """The words of a command line: {"lr": 0.1, "fresh": True, "x": [1, 2]} as --lr 0.1 --fresh --x 1 2."""
    words = []
    for name, value in flags.items():
        if value is True:
            words.append(f"--{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif str(value).startswith("-") and not _NUMBER.match(str(value)):
            words.append(f"--{name}={value}")  # or it would be taken for a flag
        else:
            words += [f"--{name}", str(value)]
    return words


def as_data(recipe: Recipe) -> dict[str, Any]:
    """What `parse` takes and makes the same recipe of."""
    data: dict[str, Any] = {"iterate": recipe.iterate}
    if recipe.before:
        data["before"] = [{command: flags} for command, flags in recipe.before]
    return data | recipe.stages | {f"iteration_{number}": told for number, told in sorted(recipe.iterations.items())}


def to_yaml(data: Any) -> str:
    import yaml

    return str(yaml.safe_dump(data, sort_keys=False, default_flow_style=False, width=110, allow_unicode=True))


def in_folder(recipe: Recipe, folder: str) -> Recipe:
    """`recipe` with $run in its texts replaced by the run's `folder`."""

    def fill(value: Value) -> Value:
        if isinstance(value, list):
            return [fill(item) for item in value]
        return value.replace(RUN, folder) if isinstance(value, str) else value

    def filled(flags: Flags) -> Flags:
        return {name: fill(value) for name, value in flags.items()}

    def all_filled(stages: dict[str, Flags]) -> dict[str, Flags]:
        return {command: filled(flags) for command, flags in stages.items()}

    return Recipe(
        iterate=filled(recipe.iterate),
        before=tuple((command, filled(flags)) for command, flags in recipe.before),
        stages=all_filled(recipe.stages),
        iterations={number: all_filled(stages) for number, stages in recipe.iterations.items()},
    )
