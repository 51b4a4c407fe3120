"""What policies and reward models are called in an evaluation, and what a reference to one stands for."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.ranking.scoring import FUNCTION_NAME

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def named(items: Sequence[str], reserved: Collection[str], flag: str) -> dict[str, str]:
    """{name: reference} of NAME=REF or REF items. Raises BadUse for a name that can't be one, or comes twice."""
    found: dict[str, str] = {}
    for item in items:
        name, separator, ref = item.partition("=")
        if not separator or not NAME.fullmatch(name):
            name, ref = default_name(item), item
        if not NAME.fullmatch(name) or name in reserved:
            raise BadUse(
                f"{flag} {item} can't be called {name}, which is no name or means something else in the results: "
                f"write NAME={ref} with another one."
            )
        if name in found:
            raise BadUse(f"{flag} names {name} twice ({found[name]} and {ref}): write NAME={ref} for one of them.")
        found[name] = ref
    if not found:
        raise BadUse(f"{flag} is empty; expected at least one.")
    return found


def default_name(ref: str) -> str:
    """What to call a policy or reward model: the function's name, or the last part of its path or Hub id.

    A folder named policy is called after the folder it lies in: runs/a/iteration_2/policy is iteration_2.
    """
    if match := FUNCTION_NAME.fullmatch(ref):
        return str(match["name"] or match["member"])
    parts = [part for part in ref.partition("@")[0].split("/") if part not in ("", ".", "..")]
    if len(parts) > 1 and parts[-1] == "policy":
        parts.pop()
    return parts[-1] if parts else ref


def last_policy(ref: str) -> str:
    """`ref`, or the last iteration's policy if it is a run folder."""
    policies = {int(path.parent.name.split("_")[1]): path for path in Path(ref).glob("iteration_[0-9]*/policy")}
    return str(policies[max(policies)]) if policies else ref
