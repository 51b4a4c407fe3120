"""The rules of the house, held over every file there is: who may import whom, what a command is made of."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import json
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_pipeline.core.command import HOW, WHAT

SOURCE = Path(__file__).resolve().parents[1] / "src"
PACKAGE = SOURCE / "rlhf_pipeline"
COMMANDS = sorted(path for path in PACKAGE.glob("*.py") if path.name != "__init__.py")
ROOMS = sorted(path for path in (PACKAGE / "core").rglob("*.py") if path.name != "__init__.py")
OPEN = {"rlhf_pipeline.core.storage"}
"""Packages whose __init__ hands on names of their rooms: who imports one imports all of these."""
HEAVY = ("transformers", "datasets", "vllm", "deepspeed", "accelerate")
every_command = pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
every_room = pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.stem)
every_file = pytest.mark.parametrize("path", COMMANDS + ROOMS, ids=lambda path: path.stem)


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


def imported_modules(path: Path) -> set[str]:
    """Modules of this project that a file imports, at its top, inside functions and for types alike."""
    ours = {module_name(other) for other in COMMANDS + ROOMS}
    found = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} imports relatively"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    found |= {
        module_name(room) for room in ROOMS if room.parent != path.parent and module_name(room.parent) in OPEN & found
    }
    return found & ours


def statements_with_effects(module: ast.Module) -> Iterator[ast.stmt]:
    """What runs on import and is neither a definition, an import, a constant nor the command's entry."""
    for statement in module.body:
        match statement:
            case ast.Import() | ast.ImportFrom() | ast.FunctionDef() | ast.ClassDef():
                continue
            case ast.Expr(value=ast.Constant(value=str())):  # a docstring
                continue
            case ast.Assign(targets=[ast.Name() | ast.Tuple()]) | ast.AnnAssign(target=ast.Name()):
                continue
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                continue
            case ast.If(test=ast.Compare(left=ast.Name(id="__name__"))):
                continue
        yield statement


def unmarked_fields(config_type: type, prefix: str = "") -> Iterator[str]:
    """Names of the leaf fields of a Config type that do not carry exactly one of What and How."""
    hints = typing.get_type_hints(config_type, include_extras=True)
    for field in dataclasses.fields(config_type):
        hint, marks = hints[field.name], []
        if typing.get_origin(hint) is typing.Annotated:
            hint, *marks = typing.get_args(hint)
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from unmarked_fields(hint, f"{prefix}{field.name}.")
        elif sum(mark in (WHAT, HOW) for mark in marks if isinstance(mark, str)) != 1:
            yield prefix + field.name


@every_command
def test_a_file_at_the_root_is_a_command(path: Path) -> None:
    """A docstring, a frozen Config, main(config), and the entry as the last statement."""
    module = parse(path)
    assert ast.get_docstring(module)
    config = next(node for node in module.body if isinstance(node, ast.ClassDef) and node.name == "Config")
    assert [ast.unparse(decorator) for decorator in config.decorator_list] == ["dataclass(frozen=True)"]
    main = next(node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    assert [argument.arg for argument in main.args.args] == ["config"]
    assert ast.unparse(module.body[-1]) == "if __name__ == '__main__':\n    entry(main, Config)"


@every_command
def test_no_command_imports_a_command(path: Path) -> None:
    assert imported_modules(path) & {module_name(command) for command in COMMANDS} == set()


@every_room
def test_no_room_imports_a_command(path: Path) -> None:
    assert imported_modules(path) & {module_name(command) for command in COMMANDS} == set()


@every_room
def test_rooms_have_no_config_and_no_entry(path: Path) -> None:
    for node in ast.walk(parse(path)):
        assert not (isinstance(node, ast.Name) and node.id == "Config"), f"line {node.lineno}"
        assert not (isinstance(node, ast.ClassDef) and node.name == "Config"), f"line {node.lineno}"
        assert not (isinstance(node, ast.FunctionDef) and node.name == "main"), f"line {node.lineno}"


def test_rooms_form_no_circle() -> None:
    """A room whose imports are all settled is settled, again and again; what never is stands in a circle."""
    waits_for = {module_name(path): imported_modules(path) - {module_name(path)} for path in ROOMS}
    while settled := {room for room, others in waits_for.items() if not others}:
        waits_for = {room: others - settled for room, others in waits_for.items() if room not in settled}
    assert waits_for == {}


@every_file
def test_importing_a_file_has_no_effect(path: Path) -> None:
    lines = [f"{statement.lineno}: {ast.unparse(statement)}" for statement in statements_with_effects(parse(path))]
    assert lines == []


@every_command
def test_every_field_of_a_config_is_marked_what_or_how(path: Path) -> None:
    config_type = importlib.import_module(module_name(path)).Config
    assert list(unmarked_fields(config_type)) == []


@every_command
def test_every_flag_of_a_command_is_explained(path: Path) -> None:
    """tyro shows the docstring behind a field as its help; fields that are dataclasses bring their own."""
    module = parse(path)
    body = next(node for node in module.body if isinstance(node, ast.ClassDef) and node.name == "Config").body
    silent = [
        ast.unparse(field.target)
        for field, after in zip(body, [*body[1:], None], strict=True)
        if isinstance(field, ast.AnnAssign)
        and {"What", "How"} & {node.id for node in ast.walk(field.annotation) if isinstance(node, ast.Name)}
        and not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant))
    ]
    assert silent == []


@pytest.mark.parametrize(
    "path", [path for path in COMMANDS + ROOMS if path.name != "chat.py"], ids=lambda path: path.stem
)
def test_only_chat_applies_chat_templates(path: Path) -> None:
    used = [
        node.lineno
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Attribute) and node.attr == "apply_chat_template"
    ]
    assert used == []


@pytest.fixture(scope="module")
def helped(command_environment: dict[str, str]) -> dict[str, dict[str, typing.Any]]:
    """{command: {code, text, loaded}} of every command's `--help`, one after another in one fresh process."""
    script = f"""
import contextlib, io, json, runpy, sys
answers = {{}}
for name in {[path.stem for path in COMMANDS]}:
    sys.argv = [name, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        try:
            runpy.run_module("rlhf_pipeline." + name, run_name="__main__", alter_sys=True)
            code = None
        except SystemExit as end:
            code = end.code
    loaded = [heavy for heavy in {HEAVY} if heavy in sys.modules]
    answers[name] = {{"code": code, "text": shown.getvalue(), "loaded": loaded}}
print(json.dumps(answers))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=command_environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers: dict[str, dict[str, typing.Any]] = json.loads(done.stdout.splitlines()[-1])
    return answers


@every_command
def test_help_loads_no_heavy_library(path: Path, helped: dict[str, dict[str, typing.Any]]) -> None:
    """A later command is blamed for what an earlier one loaded: the first to fail is the one to look at."""
    assert helped[path.stem]["loaded"] == []


@every_command
def test_every_command_explains_itself_and_has_check(path: Path, helped: dict[str, dict[str, typing.Any]]) -> None:
    answer = helped[path.stem]
    assert answer["code"] == 0
    assert f"python -m rlhf_pipeline.{path.stem}" in answer["text"]
    assert "--check" in answer["text"]
