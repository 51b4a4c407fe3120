"""docs/differences.md: every trap of the authors' code has its row, and every test that a row names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from conftest import REPO

TESTS = REPO / "tests"
TRAPS = 24


def rows() -> list[list[str]]:
    """The cells of the table trap by trap."""
    text = (REPO / "docs" / "differences.md").read_text(encoding="utf-8").partition("## Trap by trap")[2]
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    return [[cell.strip() for cell in line] for line in lines]


def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_trap_has_a_row_in_order() -> None:
    assert [int(row[0]) for row in rows()] == list(range(1, TRAPS + 1))
    assert {len(row) for row in rows()} == {4}


def test_every_trap_is_held_by_tests_that_exist() -> None:
    """A row names files of tests/, each followed by the names of tests in it; a name after a comma is of that file."""
    for number, _, _, named in rows():
        path = None
        for word in re.findall(r"[\w/]+\.py|`test_\w+`", named):
            if word.endswith(".py"):
                path = TESTS / word
                assert path.is_file(), f"trap {number}: {word} is not there"
                continue
            assert path is not None, f"trap {number}: {word} has no file"
            assert word.strip("`") in functions(path), f"trap {number}: {path.name} has no {word}"
        assert "`test_" in named, f"trap {number} names no test"
