"""Whether what is there is of the same run: by what decides the rows, leaf by leaf."""

from __future__ import annotations

import json
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


def changes(recorded: Any, identity: Any) -> list[str]:
    """`differences` between what was read from a file and an identity as this process has it."""
    return differences(recorded, json.loads(json.dumps(identity)))


def check_same_run(where: object, recorded: Any, identity: Any) -> None:
    """Raise BadUse naming what differs if `where` (a folder or a repo) holds (part of) the output of another run."""
    if changed := changes(recorded, identity):
        raise BadUse(
            f"{where} holds the output of another run ({'; '.join(changed[:4])}): "
            "name another output, or pass --overwrite to replace it."
        )
