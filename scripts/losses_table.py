"""One table from the evaluation of several policies per loss, called LOSS_SEED, after the baseline.

python scripts/losses_table.py runs/tiny_losses/evaluation/results.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""{seeds: the 97.5th percentile of Student's t with a degree of freedom less}"""
DIGITS = 2


def by_loss(policies: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """{loss: its policies, one per seed}, in the order in which they were evaluated."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for policy in policies:
        groups.setdefault(policy["name"].rpartition("_")[0], []).append(policy)
    return groups


def columns(policy: dict[str, Any]) -> dict[str, float]:
    """What is compared: the mean of each reward model, the KL to the start in nats, the mean length in tokens."""
    kl = {} if policy["kl"] is None else {"KL": policy["kl"]["k1"]["value"]}
    return {name: reward["mean"] for name, reward in policy["rewards"].items()} | kl | {"length": policy["length"]}


def over_seeds(values: list[float]) -> str:
    """The mean of independent runs and half of its 95 % interval, by Student's t."""
    mean = f"{statistics.mean(values):.{DIGITS}f}"
    if len(values) not in T_95:
        return mean
    half = T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean} ± {half:.{DIGITS}f}"


def table(results: dict[str, Any]) -> str:
    """Markdown: the baseline's numbers, then every loss's mean over its seeds with an interval."""
    baseline, *others = results["policies"]
    names = list(columns(others[0]))
    start = columns(baseline)
    rows = [[baseline["name"], "", *(f"{start[name]:.{DIGITS}f}" if name in start else "0" for name in names)]]
    for loss, policies in by_loss(others).items():
        seen = [columns(policy) for policy in policies]
        rows.append([loss, str(len(seen)), *(over_seeds([item[name] for item in seen]) for name in names)])
    head = ["loss", "seeds", *names]
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="evaluate's results.json")
    path = parser.parse_args().results
    if not path.is_file():
        print(f"error: {path} does not exist; expected the results.json of an evaluation", file=sys.stderr)
        sys.exit(2)
    results = json.loads(path.read_text(encoding="utf-8"))
    print(table(results))
    print(f"\n{results['prompts']:,} prompts x {results['responses_per_prompt']} responses; 95 % intervals over seeds.")


if __name__ == "__main__":
    main()
