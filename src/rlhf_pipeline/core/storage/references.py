"""What a repo reference names: a local folder or file, or a Hub id with an optional revision."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from rlhf_pipeline.core import hub
from rlhf_pipeline.core.command import BadUse

RUNS = "runs"
HUB_MIRROR = Path(RUNS, "hub")
"""Where an output for the Hub is written before it is pushed."""


@dataclass(frozen=True)
class Ref:
    """A repo reference: a local path, or a Hub id with an optional revision; of a dataset made elsewhere perhaps one
    of its configurations.
    """

    text: str
    path: Path | None = None
    repo_id: str | None = None
    revision: str | None = None
    config: str | None = None

    @property
    def folder(self) -> Path:
        """Where an output of this reference is written locally."""
        return self.path if self.path is not None else HUB_MIRROR / str(self.repo_id)

    def __str__(self) -> str:
        config = f":{self.config}" if self.config else ""
        if self.path is not None:
            return f"{self.path}{config}"
        return f"hf://{self.repo_id}{config}" + (f"@{self.revision}" if self.revision else "")


def parse_ref(text: str, *, flag: str, output: bool = False) -> Ref:
    """What `text` names. Raises BadUse for a name that is neither a local path nor OWNER/NAME, and for an output with
    a revision or a configuration.

    Local: begins with ./ ../ / ~, or exists, or has more than two parts, or begins with runs/; an output that does
    not exist yet also when its first part is an existing folder. hf://datasets/owner/name is always the Hub.
    """
    if text.startswith("hf://"):
        return _hub_ref(text, text.removeprefix("hf://").removeprefix("datasets/"), flag, output)
    path, config = _split_config(text, output)
    parts = [part for part in text.partition("@")[0].split("/") if part]
    local_parent = parts and (parts[0] == RUNS or (output and Path(parts[0]).is_dir()))
    if (
        text.startswith(("./", "../", "/", "~"))
        or path.exists()
        or len(parts) > 2
        or (len(parts) == 2 and local_parent)
        or config is not None
    ):
        return Ref(text, path=path, config=config)
    return _hub_ref(text, text, flag, output)


def _split_config(text: str, output: bool) -> tuple[Path, str | None]:
    """(path, configuration) of a local name: ./a:b is configuration b of ./a if no ./a:b is there and ./a is."""
    path = Path(text).expanduser()
    before, colon, config = text.rpartition(":")
    if colon and not output and not path.exists() and Path(before).expanduser().is_dir():
        return Path(before).expanduser(), config
    return path, None


def _hub_ref(text: str, name: str, flag: str, output: bool) -> Ref:
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?:@([\w./-]+))?", name)
    if match is None:
        raise BadUse(f"{flag} {text} is neither a local folder nor OWNER/NAME: write ./{name} for a local folder.")
    if output and name != match[1]:
        raise BadUse(
            f"{flag} {text} names a part of a repo, and an output is all of one, on its main branch: {match[1]}."
        )
    return Ref(text, repo_id=match[1], revision=match[3], config=match[2])


def default_output(source: Ref, suffix: str) -> Ref:
    """The tutorial's name for what a stage makes of `source`: its name + suffix, beside it.

    On the Hub only where the stored token may write to that account, else in the working folder.
    """
    if source.path is not None:
        path = source.path.resolve()
        name = path.stem if path.is_file() else path.name
        return Ref(f"{source.text.rstrip('/')}{suffix}", path=path.with_name(name + suffix))
    owner, name = str(source.repo_id).split("/")
    if owner in hub.writable_accounts():
        return Ref(f"{owner}/{name}{suffix}", repo_id=f"{owner}/{name}{suffix}")
    return Ref(f"./{name}{suffix}", path=Path(f"{name}{suffix}"))
