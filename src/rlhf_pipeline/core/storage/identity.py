"""Whether what is there is of the same run: by what decides the rows, leaf by leaf."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf_pipeline.core.command import BadUse


def differences(recorded: Any, wanted: Any, name: str = "") -> list[str]:
    """What differs between two identities, as "name: recorded, now wanted", leaf by leaf."""
    if isinstance(recorded, dict) and isinstance(wanted, dict):
        return [
            line
            for key in {**recorded, **wanted}
            for line in differences(recorded.get(key), wanted.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if recorded == wanted else [f"{name} was {json.dumps(recorded)}, now {json.dumps(wanted)}"]


def check_same_run(folder: Path, recorded: Any, identity: dict[str, Any]) -> None:
    """Raise BadUse naming what differs if `folder` holds (part of) the output of another run."""
    changed = differences(recorded, json.loads(json.dumps(identity)))
    if changed:
        raise BadUse(
            f"{folder} holds the output of another run ({'; '.join(changed[:4])}): "
            "name another output, or pass --overwrite to replace it."
        )
