"""A benchmark that nobody runs is soon broken: each that is quick enough is run small."""

from __future__ import annotations

import re
import sys

from conftest import REPO, run_process


def test_scale_prints_time_memory_and_bytes_of_storage_rank_and_filter(command_environment):
    done = run_process([sys.executable, REPO / "benchmarks" / "scale.py", "--rows", 60], command_environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("60 prompts x 5 responses of ")
    lines = re.findall(r"^(storage|rank|filter).* +([\d.]+) +([\d,]+) +([\d,]+) MB +([\d,]+) MB$", done.stdout, re.M)
    assert [line[0] for line in lines] == ["storage", "rank", "filter"]
    assert all(int(line[3].replace(",", "")) > 50 for line in lines)  # Python and pyarrow alone
