"""Where an output comes from: fingerprints, versions, launch, and the card that a person reads."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rlhf_pipeline.core.files import read_json, sha256_of, write_json
from rlhf_pipeline.core.storage import Source

PACKAGES = (
    "rlhf_pipeline",
    "torch",
    "transformers",
    "vllm",
    "accelerate",
    "deepspeed",
    "flash-attn",
    "datasets",
    "numpy",
    "peft",
)
MODEL_FINGERPRINT = "fingerprint.json"
"""Beside a model's weights: their sha256, and the names and sizes it was taken of."""
Reasons = Mapping[str, int]


def versions() -> dict[str, str]:
    """{package: version} of what is installed of PACKAGES (vllm also by its CPU build's name), and Python's."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        for distribution in (name, f"{name}-cpu"):
            try:
                found[name] = metadata.version(distribution)
                break
            except metadata.PackageNotFoundError:
                continue
    return found


def command_line() -> str:
    """The command as it can be pasted; a launcher's own words are not part of it."""
    module = Path(sys.argv[0]).stem
    return shlex.join(["python", "-m", f"rlhf_pipeline.{module}", *sys.argv[1:]])


def fingerprint_model(folder: Path) -> str:
    """sha256 of a model folder's safetensors; taken once and stored beside them where the folder may be written.

    The stored one counts as long as names, sizes and modification times of the files are those it was taken of.
    """
    files = sorted(folder.glob("*.safetensors"))
    seen = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
    stored = read_json(folder / MODEL_FINGERPRINT)
    if stored is not None and stored["files"] == seen:
        return str(stored["sha256"])
    sha256 = sha256_of(files)
    if os.access(folder, os.W_OK):
        write_json(folder / MODEL_FINGERPRINT, {"sha256": sha256, "files": seen})
    return sha256


def fingerprint_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def describe_source(source: Source) -> dict[str, Any]:
    """What an output's provenance says of a dataset it was made from."""
    return {
        "ref": source.name,
        "resolved": str(source.ref),
        "split": source.split,
        "rows": source.num_rows,
        "fingerprint": source.fingerprint,
        "read_as": source.renamed,
    }


def describe(
    *,
    command: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, Any],
    rows_in: int,
    rows_out: int | Mapping[str, int],
    dropped: Reasons,
    engine: Mapping[str, Any],
    **more: Any,
) -> dict[str, Any]:
    """The machine-readable provenance of an output. `config`: every field as the command resolved it."""
    return {
        "made_by": f"rlhf_pipeline.{command}",
        "command_line": command_line(),
        "config": dict(config),
        "inputs": dict(inputs),
        "rows_in": rows_in,
        "rows_out": rows_out if isinstance(rows_out, int) else dict(rows_out),
        "dropped": dict(dropped),
        "engine": dict(engine),
        "versions": versions(),
        **more,
    }


def card(
    *,
    title: str,
    provenance: Mapping[str, Any],
    splits: Sequence[str],
    columns: Mapping[str, str],
    facts: Mapping[str, Any] = {},
    samples: Iterable[Mapping[str, Any]] = (),
) -> str:
    """README.md of a dataset: front matter by which datasets finds the splits' files, then what a person wants to know.

    columns: {name: what it holds, in a few words}. facts: {words: value}. samples: a row or two to look at.
    """
    files = "\n".join(f"  - split: {name}\n    path: data/{name}-*.parquet" for name in splits)
    holds = _table(("column", "holds"), ((f"`{name}`", text) for name, text in columns.items()))
    rows = [
        _table(("column", "value"), ((f"`{name}`", _short(value)) for name, value in row.items())) for row in samples
    ]
    return _page(
        f"configs:\n- config_name: default\n  data_files:\n{files}",
        title,
        provenance,
        facts,
        [f"## Columns\n\n{holds}", *(f"## Row {number}\n\n{row}" for number, row in enumerate(rows))],
    )


def sample_rows(shard: Path, count: int = 2) -> list[dict[str, Any]]:
    """The first rows of a parquet file for its card, without the columns of token ids and other lists of numbers."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(shard) as file:
        names = [
            field.name
            for field in file.schema_arrow
            if not (pa.types.is_list(field.type) and pa.types.is_primitive(field.type.value_type))
        ]
        rows: list[dict[str, Any]] = next(file.iter_batches(count, columns=names)).to_pylist()
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def model_card(*, title: str, provenance: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """README.md of a policy or reward model. facts: {words: value}, such as the loss and the last metrics."""
    return _page("library_name: transformers", title, provenance, facts, [])


def _page(
    front: str, title: str, provenance: Mapping[str, Any], facts: Mapping[str, Any], sections: Sequence[str]
) -> str:
    lineage = (_lineage(name, item) for name, item in provenance["inputs"].items())
    used = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    parts = [
        f"---\n{front}\n---\n\n# {title}",
        f"Made by `{provenance['made_by']}`:\n\n```\n{provenance['command_line']}\n```",
        _table(("from", "rows", "fingerprint"), lineage),
        _counts(provenance),
        *([_table(("", ""), ((name, _short(value)) for name, value in facts.items()))] if facts else []),
        *sections,
        f"Engine: {_short(provenance['engine'], 400)}. Versions: {used}. For programs: provenance.json.",
    ]
    return "\n\n".join(parts) + "\n"


def _lineage(name: str, item: Any) -> tuple[str, str, str]:
    if not isinstance(item, Mapping):
        return (name, "", _short(item))
    return (
        f"{name}: {_link(item)}",
        str(item.get("rows", "")),
        f"`{str(item.get('fingerprint', ''))[:16]}`",
    )


def _link(item: Mapping[str, Any]) -> str:
    """An input's reference; of the Hub, where the fingerprint is a commit, a link to just that."""
    ref, commit = str(item.get("ref", "")), str(item.get("fingerprint", ""))
    repo = re.fullmatch(r"(?:hf://(?:datasets/)?)?([\w.-]+/[\w.-]+?)(?:[:@].*)?", ref)
    if repo is None or not re.fullmatch(r"[0-9a-f]{40}", commit):
        return f"`{ref}`"
    kind = "datasets/" if "rows" in item else ""
    return f"[`{ref}`](https://huggingface.co/{kind}{repo[1]}/tree/{commit})"


def _counts(provenance: Mapping[str, Any]) -> str:
    rows = [("rows in", str(provenance["rows_in"])), ("rows out", _short(provenance["rows_out"]))]
    rows += [(f"dropped: {reason}", str(count)) for reason, count in provenance["dropped"].items()]
    return _table(("", ""), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _short(value: Any, limit: int = 200) -> str:
    if isinstance(value, Mapping):
        text = ", ".join(f"{name} {_short(item)}" for name, item in value.items())
    elif isinstance(value, float):
        text = f"{value:.4g}"
    else:
        text = str(value)
    text = text.replace("|", "\\|").replace("\n", " ")
    return text if len(text) <= limit else text[:limit] + " ..."
