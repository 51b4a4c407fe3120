"""Did the demo show what it promises? Checks a run folder's files; one line per check, exit 0 if all hold.

python scripts/check_demo.py runs/tiny
python scripts/check_demo.py runs/ci --proxy_only
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

ITERATION = 2
FEWEST_RESPONSES = 500
ENGINES = ("vllm", "transformers")
MINUS = "\N{MINUS SIGN}"
Check = tuple[bool, str]


def above(rows: list[dict[str, Any]], reward: str) -> Check:
    """Whether iteration 2's interval lies above the start's."""
    start = rows[0][reward]
    later = next((row[reward] for row in rows if row["iteration"] == ITERATION), None)
    if later is None:
        return False, f"{reward}: iteration {ITERATION} is not in summary.json"
    numbers = f"{later['low']:.3f} to {later['high']:.3f} against {start['low']:.3f} to {start['high']:.3f}"
    return later["low"] > start["high"], f"{reward} of iteration {ITERATION} above the start's: {numbers}"


def enough_responses(rows: list[dict[str, Any]]) -> Check:
    fewest = min(row["responses"] for row in rows)
    return fewest >= FEWEST_RESPONSES, f"at least {FEWEST_RESPONSES} held-out responses of every policy: {fewest}"


def provenances(run: Path, pattern: str) -> dict[str, dict[str, Any]]:
    """{output: provenance} of a run's finished outputs; hidden folders hold unfinished ones."""
    paths = [path.parent for path in sorted(run.glob(f"{pattern}/provenance.json"))]
    names = {path: path.relative_to(run).as_posix() for path in paths}
    return {
        name: json.loads((path / "provenance.json").read_text()) for path, name in names.items() if "/." not in name
    }


def generated(run: Path) -> Check:
    """Whether vllm, or transformers because a flag said so, sampled every response."""
    found = provenances(run, "iteration_*/responses") | provenances(run, "evaluation/*/responses")
    engines = {name: made["engine"].get("name") for name, made in found.items()}
    unstated = [name for name, made in found.items() if made["config"].get("backend") != engines[name]]
    wrong = [name for name, engine in engines.items() if engine not in ENGINES] + unstated
    said = ", ".join(sorted({str(engine) for engine in engines.values()})) or "none found"
    return bool(found) and not wrong, f"engine of generate, as its flag says: {said}{_named(wrong)}"


def trained(run: Path) -> Check:
    """Whether DeepSpeed stage 3 on two processes made one of the policies."""
    found = provenances(run, "iteration_*/policy")
    launches = {name: made["engine"] for name, made in found.items()}
    right = [
        name
        for name, engine in launches.items()
        if (engine.get("name"), engine.get("zero_stage"), engine.get("world_size")) == ("deepspeed", 3, 2)
    ]
    return bool(right), f"a policy trained by deepspeed stage 3, world size 2: {', '.join(right) or 'none'}"


def _named(names: list[str]) -> str:
    return f" (not so: {', '.join(names)})" if names else ""


class Table(HTMLParser):
    """The report's table of policies: its numbers, each with its policy and its key in summary.json."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[tuple[str, str, bool, str]] = []
        """(policy, key, is a percentage, text)"""
        self.stray: list[str] = []
        """Numbers in cells that say no key"""
        self._inside = self._cell = False
        self._policy = ""
        self._number: tuple[str, bool] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "table" and given.get("class") == "policies":
            self._inside = True
        elif self._inside and tag == "tr":
            self._policy = given.get("data-policy") or ""
        elif self._inside and tag == "td":
            self._cell = True
        elif self._cell and "data-key" in given:
            self._number = (str(given["data-key"]), "data-percent" in given)

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self._inside = False
        elif tag == "td":
            self._cell = False
        elif tag == "span":
            self._number = None

    def handle_data(self, data: str) -> None:
        if self._number is not None:
            self.numbers.append((self._policy, *self._number, data))
        elif self._cell and re.search(r"\d", data):
            self.stray.append(data.strip())


def look_up(row: dict[str, Any], key: str) -> float:
    value: Any = row
    for part in key.split("."):
        value = value[part]
    return float(value)


def equal(text: str, value: float) -> bool:
    """Whether `text` is `value`, rounded to as many decimals as it shows."""
    shown = float(text.replace(MINUS, "-"))
    decimals = len(text.partition(".")[2])
    return abs(shown - value) <= 0.5 * 10**-decimals + 1e-9


def wrong_numbers(summary: dict[str, Any], page: str) -> Iterator[str]:
    """Numbers of the page's table that are not summary.json's, and numbers of summary.json that the table lacks."""
    table = Table()
    table.feed(page)
    rows = {row["name"]: row for row in summary["policies"]}
    yield from (f"{text!r} without a key" for text in table.stray)
    for policy, key, percent, text in table.numbers:
        value = look_up(rows[policy], key) * (100 if percent else 1)
        if not equal(text, value):
            yield f"{policy} {key} is {text}, not {value:.6g}"
    shown = {(policy, key) for policy, key, _, _ in table.numbers}
    for name, row in rows.items():
        for key in expected_keys(summary, row):
            if (name, key) not in shown:
                yield f"{name} {key} is not shown"


def expected_keys(summary: dict[str, Any], row: dict[str, Any]) -> Iterator[str]:
    for reward in summary["reward_models"]:
        for key in (reward, f"win_rate_{reward}"):
            if row[key] is not None:
                yield from (f"{key}.{part}" for part in ("mean", "low", "high"))
    yield from (key for key in ("kl", "length", "truncated", "repeated", "distinct_2") if row[key] is not None)


def same_numbers(run: Path, summary: dict[str, Any]) -> Check:
    wrong = list(wrong_numbers(summary, (run / "report.html").read_text(encoding="utf-8")))
    return not wrong, "every number of the report's table is summary.json's" + _named(wrong)


def checks(run: Path, *, proxy_only: bool) -> Iterator[Check]:
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    rows = summary["policies"]
    yield above(rows, "proxy")
    if not proxy_only:
        yield above(rows, "gold")
        yield enough_responses(rows)
    yield generated(run)
    yield trained(run)
    yield same_numbers(run, summary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder, for example runs/tiny")
    parser.add_argument("--proxy_only", action="store_true", help="ask neither for gold nor for 500 responses")
    args = parser.parse_args()
    missing = [name for name in ("summary.json", "report.html") if not (args.run / name).is_file()]
    if missing:
        print(f"error: {args.run} has no {' and no '.join(missing)}: run rlhf_pipeline.report for it", file=sys.stderr)
        sys.exit(2)
    results = list(checks(args.run, proxy_only=args.proxy_only))
    for ok, text in results:
        print(f"{'ok    ' if ok else 'NOT OK'} {text}")
    sys.exit(0 if all(ok for ok, _ in results) else 1)


if __name__ == "__main__":
    main()
