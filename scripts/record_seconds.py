"""record_seconds.py TIMINGS NAME STARTED ENDED: add a stage's seconds to a run's timings.json, restarts included."""

import sys
from pathlib import Path

from rlhf_pipeline.core.files import read_json, write_json

path, name, started, ended = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), float(sys.argv[4])
timings = read_json(path) or {}
timings[name] = round(timings.get(name, 0.0) + ended - started, 2)
write_json(path, timings)
