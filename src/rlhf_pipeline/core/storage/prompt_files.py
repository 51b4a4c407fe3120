"""Prompts from one file: .jsonl, .json, .csv or .parquet."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.files import sha256_of
from rlhf_pipeline.core.storage.references import Ref
from rlhf_pipeline.core.storage.sources import Source, make_source, parquet_tables

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

PROMPT_FILES = (".jsonl", ".json", ".csv", ".parquet")


def open_file(ref: Ref, flag: str) -> Source:
    path = ref.path
    assert path is not None
    if path.suffix not in PROMPT_FILES:
        raise BadUse(f"{flag} {ref.text} is a file of no known kind; expected one of {', '.join(PROMPT_FILES)}.")
    if path.suffix == ".parquet":
        metadata = read_footer(path, flag)
        names = tuple(metadata.schema.to_arrow_schema().names)
        return make_source(
            ref, "train", ("train",), names, metadata.num_rows, sha256_of([path]), None, None,
            lambda columns, size, start, stop: parquet_tables([path], [metadata.num_rows], columns, size, start, stop),
        )  # fmt: skip
    rows = _read_rows(path, flag)
    names = tuple(dict.fromkeys(name for row in rows for name in row))
    read = functools.cache(functools.partial(_column, ref, rows, flag=flag))

    def tables(columns: Sequence[str], size: int, start: int, stop: int) -> Iterator[pa.Table]:
        import pyarrow as pa

        whole = pa.table({name: read(name) for name in columns})
        for low in range(start, stop, size):
            yield whole.slice(low, min(size, stop - low))

    source = make_source(ref, "train", ("train",), names, len(rows), sha256_of([path]), None, None, tables)
    return replace(source, plain=rows)


def read_footer(path: Path, flag: str) -> pq.FileMetaData:
    """A parquet file's metadata. Raises BadUse, naming the file, where it is cut off or something else."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise BadUse(
            f"{flag} {path} can't be read as parquet ({str(error).splitlines()[0]}): fetch the whole file, "
            "with `git lfs pull` if what lies there is a pointer of git-lfs."
        ) from error


def _column(ref: Ref, rows: Sequence[dict[str, Any]], name: str, *, flag: str) -> pa.Array:
    """All of a column, so that a piece of it in which all is null is of the same type as the others."""
    import pyarrow as pa

    try:
        return pa.array([row.get(name) for row in rows])
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise BadUse(f"{flag} {ref.text} mixes kinds of values in its column {name}: {error}") from error


def _read_rows(path: Path, flag: str) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:  # -sig: Excel begins a file with a byte order mark
        try:
            if path.suffix == ".csv":
                return _read_csv(path, csv.DictReader(file), flag)
            rows = json.load(file) if path.suffix == ".json" else [json.loads(line) for line in file if line.strip()]
        except json.JSONDecodeError as error:
            raise BadUse(f"{flag} {path} is not valid JSON: {error}") from error
        except UnicodeDecodeError as error:
            byte = f"0x{error.object[error.start]:02x}"
            raise BadUse(f"{flag} {path} is not UTF-8 (it has a byte {byte}): save it in that encoding.") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise BadUse(f'{flag} {path} is not a list of objects; expected rows such as {{"prompt": "..."}}.')
    return rows


def _read_csv(path: Path, reader: csv.DictReader[str], flag: str) -> list[dict[str, Any]]:
    rows = list(reader)
    if any(None in row for row in rows):  # where DictReader puts fields without a name
        raise BadUse(f"{flag} {path} has a row of more fields than its header: put text with commas in quotes.")
    return rows
