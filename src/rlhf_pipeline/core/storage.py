"""Datasets between stages: what a reference names, how rows are read, how an output appears whole or not at all.

A local dataset is laid out as a Hub dataset repo: README.md with the splits' files in its front matter,
data/<split>-00000-of-0000N.parquet, and provenance.json. While it is being written it lives in the hidden folder
.<name>.partial beside its final place; the rename of that folder is the moment at which it exists.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_pipeline.core import hub, schema
from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.files import (
    LOCK_WAIT,
    atomic,
    locked,
    read_json,
    sha256_of,
    sync_folder,
    write_atomic,
    write_json,
)

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

PROVENANCE = "provenance.json"
CARD = "README.md"
IDENTITY = "identity.json"
RUNS = "runs"
HUB_MIRROR = Path(RUNS, "hub")
"""Where an output for the Hub is written before it is pushed."""
PROMPT_FILES = (".jsonl", ".json", ".csv", ".parquet")
_SHARD = re.compile(r"(?P<split>.+?)-(?P<index>\d{5})(-of-(?P<count>\d{5}))?\.parquet")


@dataclass(frozen=True)
class Ref:
    """A repo reference: a local path, or a Hub id with an optional revision."""

    text: str
    path: Path | None = None
    repo_id: str | None = None
    revision: str | None = None

    @property
    def folder(self) -> Path:
        """Where an output of this reference is written locally."""
        return self.path if self.path is not None else HUB_MIRROR / str(self.repo_id)

    def __str__(self) -> str:
        if self.path is not None:
            return str(self.path)
        return f"hf://{self.repo_id}" + (f"@{self.revision}" if self.revision else "")


def parse_ref(text: str, *, flag: str, output: bool = False) -> Ref:
    """What `text` names. Raises BadUse for a name that is neither a local path nor OWNER/NAME.

    Local: begins with ./ ../ / ~, or exists, or has more than two parts, or begins with runs/; an output that does
    not exist yet also when its first part is an existing folder. hf://datasets/owner/name is always the Hub.
    """
    if text.startswith("hf://"):
        return _hub_ref(text, text.removeprefix("hf://").removeprefix("datasets/"), flag)
    path = Path(text).expanduser()
    parts = [part for part in text.partition("@")[0].split("/") if part]
    local_parent = parts and (parts[0] == RUNS or (output and Path(parts[0]).is_dir()))
    if (
        text.startswith(("./", "../", "/", "~"))
        or path.exists()
        or len(parts) > 2
        or (len(parts) == 2 and local_parent)
    ):
        return Ref(text, path=path)
    return _hub_ref(text, text, flag)


def _hub_ref(text: str, name: str, flag: str) -> Ref:
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name)
    if match is None:
        raise BadUse(f"{flag} {text} is neither a local folder nor OWNER/NAME: write ./{name} for a local folder.")
    return Ref(text, repo_id=match[1], revision=match[2])


def default_output(source: Ref, suffix: str) -> Ref:
    """The tutorial's name for what a stage makes of `source`: its name + suffix, beside it.

    On the Hub only where the stored token may write to that account, else in the working folder.
    """
    if source.path is not None:
        path = source.path.resolve()
        return Ref(f"{source.text.rstrip('/')}{suffix}", path=path.with_name(path.stem + suffix))
    owner, name = str(source.repo_id).split("/")
    if owner in hub.writable_accounts():
        return Ref(f"{owner}/{name}{suffix}", repo_id=f"{owner}/{name}{suffix}")
    return Ref(f"./{name}{suffix}", path=Path(f"{name}{suffix}"))


def prepare_delivery(output: Ref, *, public: bool, flag: str) -> None:
    """Before any work: for an output on the Hub, create the repo, which proves that we may write to it."""
    if output.repo_id is not None:
        hub.create_repo(output.repo_id, "dataset", private=not public, flag=flag)


def deliver(output: Ref) -> str:
    """Push a published output to the Hub if that is where it belongs; says where it is."""
    if output.repo_id is None:
        return str(output.folder)
    commit = hub.push(output.folder, output.repo_id, "dataset")
    return f"hf://datasets/{output.repo_id}@{commit}"


# Reading


@dataclass(frozen=True)
class Source:
    """One split of a dataset, under our column names.

    `fingerprint` is the Hub commit, or sha256 of the parquet files or of the prompt file. `provenance` is None for
    data made elsewhere. `renamed` is {name in the data: our name} for columns read by a tutorial name. `plain` holds
    the rows of a prompt file, whose values need not be of one kind; None for data that is stored in columns.
    """

    ref: Ref
    split: str
    splits: tuple[str, ...]
    columns: tuple[str, ...]
    num_rows: int
    fingerprint: str
    provenance: dict[str, Any] | None
    renamed: dict[str, str]
    folder: Path | None
    _tables: Callable[[Sequence[str], int, int, int], Iterator[pa.Table]]
    plain: Sequence[dict[str, Any]] | None = None

    @property
    def name(self) -> str:
        return self.ref.text

    def tables(
        self,
        columns: Sequence[str] | None = None,
        *,
        size: int = 1000,
        start: int = 0,
        stop: int | None = None,
    ) -> Iterator[pa.Table]:
        """Rows start..stop as Arrow tables of at most `size` rows, in order, in constant memory."""
        ours = list(self.columns if columns is None else columns)
        theirs = {new: old for old, new in self.renamed.items()}
        stop = self.num_rows if stop is None else min(stop, self.num_rows)
        for table in self._tables([theirs.get(name, name) for name in ours], size, start, stop):
            yield table.rename_columns(ours)

    def batches(
        self,
        columns: Sequence[str] | None = None,
        *,
        size: int = 1000,
        start: int = 0,
        stop: int | None = None,
    ) -> Iterator[list[dict[str, Any]]]:
        """Rows start..stop as lists of at most `size` dicts, in order, in constant memory."""
        if self.plain is None:
            for table in self.tables(columns, size=size, start=start, stop=stop):
                yield table.to_pylist()
            return
        theirs = {new: old for old, new in self.renamed.items()}
        names = {name: theirs.get(name, name) for name in (self.columns if columns is None else columns)}
        stop = self.num_rows if stop is None else min(stop, self.num_rows)
        for low in range(start, stop, size):
            rows = self.plain[low : min(low + size, stop)]
            yield [{name: row.get(their) for name, their in names.items()} for row in rows]

    def prompt_ids(self) -> list[str]:
        """The rows' prompt_id if it is there, unique and never null, else made from their prompts."""
        if schema.PROMPT_ID in self.columns:
            ids = [row[schema.PROMPT_ID] for row in self.rows([schema.PROMPT_ID])]
            if None not in ids and len(set(ids)) == len(ids):
                return ids
        return schema.make_prompt_ids(row[schema.PROMPT] for row in self.rows([schema.PROMPT]))

    def rows(
        self, columns: Sequence[str] | None = None, *, start: int = 0, stop: int | None = None
    ) -> Iterator[dict[str, Any]]:
        for batch in self.batches(columns, start=start, stop=stop):
            yield from batch


def open_source(text: str, *, flag: str, split: str | None = "train") -> Source:
    """Open one split of the dataset that `text` names (None: its only split).

    Raises BadUse when it does not exist, has no such split, has no rows, or is a sharded output not yet whole.
    """
    ref = parse_ref(text, flag=flag)
    if ref.path is not None and ref.path.is_file():
        source = _open_file(ref, flag)
    elif ref.path is not None:
        source = _open_folder(ref, ref.path, split, flag)
    else:
        source = _open_hub(ref, split, flag)
    if source.num_rows == 0:
        raise BadUse(f"{flag} {text} has no rows in split {source.split}; pass a dataset that has some.")
    return source


def _open_hub(ref: Ref, split: str | None, flag: str) -> Source:
    commit, names = hub.look_up(str(ref.repo_id), "dataset", ref.revision, flag=flag)
    if PROVENANCE in names:
        folder = hub.download(
            str(ref.repo_id), "dataset", commit, patterns=(CARD, PROVENANCE, "data/*", "*.jsonl"), flag=flag
        )
        return _open_folder(ref, folder, split, flag, fingerprint=commit)
    return _open_foreign(ref, str(ref.repo_id), split, flag, revision=commit, fingerprint=commit)


def _open_folder(ref: Ref, folder: Path, split: str | None, flag: str, *, fingerprint: str | None = None) -> Source:
    if not folder.is_dir():
        partial = partial_folder(folder)
        hint = (
            f"it is being written in {partial}: run that stage's command again to finish it"
            if partial.is_dir()
            else ("check the name, or run the stage that writes it")
        )
        raise BadUse(f"{flag} {ref.text} does not exist; {hint}.")
    provenance = read_json(folder / PROVENANCE)
    shards = shard_files(folder, flag)
    fingerprint = fingerprint or sha256_of(
        [path for paths in shards.values() for path in paths] or list(folder.rglob("*.parquet")),
        relative_to=folder,
    )
    if not shards:
        return _open_foreign(ref, str(folder), split, flag, revision=None, fingerprint=fingerprint)
    name = _choose_split(tuple(shards), split, ref.text, flag)
    import pyarrow.parquet as pq

    files = shards[name]
    metadata = [pq.read_metadata(path) for path in files]
    columns = tuple(pq.read_schema(files[0]).names)
    counts = [item.num_rows for item in metadata]
    return _source(
        ref, name, tuple(shards), columns, sum(counts), fingerprint, provenance, folder,
        lambda names, size, start, stop: _parquet_tables(files, counts, names, size, start, stop),
    )  # fmt: skip


def shard_files(folder: Path, flag: str) -> dict[str, list[Path]]:
    """{split: its parquet files in order} of a dataset folder. Raises BadUse naming the shards that are missing."""
    found: dict[str, dict[int, Path]] = {}
    counts: dict[str, int] = {}
    for path in sorted((folder / "data").glob("*.parquet")):
        if match := _SHARD.fullmatch(path.name):
            found.setdefault(match["split"], {})[int(match["index"])] = path
            counts[match["split"]] = int(match["count"] or 0)
    for split, count in counts.items():
        missing = [str(index) for index in range(count) if index not in found[split]]
        if missing:
            raise BadUse(
                f"{flag} {folder} is not whole: split {split} lacks shards {', '.join(missing)} of {count}; "
                "run the commands that write them."
            )
    return {split: [found[split][index] for index in sorted(found[split])] for split in found}


def _parquet_tables(
    files: Sequence[Path], counts: Sequence[int], columns: Sequence[str], size: int, start: int, stop: int
) -> Iterator[pa.Table]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = 0
    for path, count in zip(files, counts, strict=True):
        position, first = first, first + count
        if position + count <= start or position >= stop:
            continue
        with pq.ParquetFile(path, pre_buffer=False) as file:  # else it keeps the whole file in memory
            position, groups = _row_groups(file.metadata, position, start, stop)
            for batch in file.iter_batches(size, row_groups=groups, columns=list(columns)):
                low, high = max(start - position, 0), min(stop - position, batch.num_rows)
                if low < high:
                    yield pa.Table.from_batches([batch.slice(low, high - low)]).select(list(columns))
                position += batch.num_rows


def _row_groups(metadata: pq.FileMetaData, position: int, start: int, stop: int) -> tuple[int, list[int]]:
    """(row at which the first begins, row groups with rows of start..stop) of a file that begins at row `position`."""
    begin, groups = position, []
    for group in range(metadata.num_row_groups):
        end = position + metadata.row_group(group).num_rows
        if end > start and position < stop:
            groups.append(group)
        elif not groups:
            begin = end
        position = end
    return begin, groups


def _open_foreign(
    ref: Ref, location: str, split: str | None, flag: str, *, revision: str | None, fingerprint: str
) -> Source:
    import datasets

    try:
        with hub.explained(location, "dataset", flag):
            loaded = datasets.load_dataset(location, revision=revision)
    except (ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        raise BadUse(f"{flag} {ref.text} can't be read as a dataset: {str(error).splitlines()[0]}") from error
    name = _choose_split(tuple(loaded), split, ref.text, flag)
    data = loaded[name].with_format("arrow")

    def tables(names: Sequence[str], size: int, start: int, stop: int) -> Iterator[pa.Table]:
        chosen = data.select_columns(list(names))
        for low in range(start, stop, size):
            yield chosen[low : min(low + size, stop)].select(list(names))

    return _source(
        ref, name, tuple(loaded), tuple(data.column_names), len(data), fingerprint, None, None, tables
    )  # fmt: skip


def _open_file(ref: Ref, flag: str) -> Source:
    path = ref.path
    assert path is not None
    if path.suffix not in PROMPT_FILES:
        raise BadUse(f"{flag} {ref.text} is a file of no known kind; expected one of {', '.join(PROMPT_FILES)}.")
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        metadata = pq.read_metadata(path)
        names = tuple(pq.read_schema(path).names)
        return _source(
            ref, "train", ("train",), names, metadata.num_rows, sha256_of([path]), None, None,
            lambda columns, size, start, stop: _parquet_tables([path], [metadata.num_rows], columns, size, start, stop),
        )  # fmt: skip
    rows = _read_rows(path, flag)
    names = tuple(dict.fromkeys(name for row in rows for name in row))

    def tables(columns: Sequence[str], size: int, start: int, stop: int) -> Iterator[pa.Table]:
        import pyarrow as pa

        for low in range(start, stop, size):
            chosen = [{name: row.get(name) for name in columns} for row in rows[low : min(low + size, stop)]]
            try:
                yield pa.Table.from_pylist(chosen)
            except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                raise BadUse(f"{flag} {ref.text} mixes kinds of values in one column: {error}") from error

    source = _source(ref, "train", ("train",), names, len(rows), sha256_of([path]), None, None, tables)
    return replace(source, plain=rows)


def _read_rows(path: Path, flag: str) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        try:
            if path.suffix == ".csv":
                return list(csv.DictReader(file))
            rows = json.load(file) if path.suffix == ".json" else [json.loads(line) for line in file if line.strip()]
        except json.JSONDecodeError as error:
            raise BadUse(f"{flag} {path} is not valid JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise BadUse(f'{flag} {path} is not a list of objects; expected rows such as {{"prompt": "..."}}.')
    return rows


def _source(
    ref: Ref,
    split: str,
    splits: tuple[str, ...],
    names: tuple[str, ...],
    num_rows: int,
    fingerprint: str,
    provenance: dict[str, Any] | None,
    folder: Path | None,
    tables: Callable[[Sequence[str], int, int, int], Iterator[pa.Table]],
) -> Source:
    renamed = schema.renamed(names)
    columns = tuple(renamed.get(name, name) for name in names)
    return Source(ref, split, splits, columns, num_rows, fingerprint, provenance, renamed, folder, tables)


def _choose_split(splits: tuple[str, ...], wanted: str | None, text: str, flag: str) -> str:
    if wanted is None and len(splits) == 1:
        return splits[0]
    for name in (wanted, schema.TUTORIAL_SPLITS.get(wanted or "")):
        if name in splits:
            return str(name)
    raise BadUse(f"{flag} {text} has no split {wanted}; it has {', '.join(splits)}: choose with --split.")


# Writing


def partial_folder(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


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


class Output:
    """A dataset being written into `folder`, from `open_output`. `done`: the same run is already there, whole."""

    def __init__(self, final: Path, identity: dict[str, Any], *, done: bool):
        self.final = final
        self.identity = identity
        self.done = done
        self.folder = partial_folder(final)

    def has_shard(self, split: str, index: int) -> bool:
        return any((self.folder / "data").glob(f"{split}-{index:05d}*.parquet"))

    def write_shard(self, split: str, index: int, table: pa.Table) -> None:
        import pyarrow.parquet as pq

        with atomic(self.folder / "data" / f"{split}-{index:05d}.parquet") as temporary:
            pq.write_table(table, temporary, compression="zstd")

    def publish(self, provenance: dict[str, Any], card: str) -> Path:
        """Name the shards for their count, write card and provenance, and let the whole appear under its name.

        Of several workers that find the set of shards complete, the first publishes.
        """
        with locked(self.final.with_name(f".{self.final.name}.publish")):
            if self.folder.exists():
                self._publish(provenance, card)
        return self.final

    def _publish(self, provenance: dict[str, Any], card: str) -> None:
        data = self.folder / "data"
        shards = [(path, match) for path in data.glob("*.parquet") if (match := _SHARD.fullmatch(path.name))]
        counts: dict[str, int] = {}
        for _, match in shards:
            counts[match["split"]] = counts.get(match["split"], 0) + 1
        for path, match in shards:
            path.rename(data / f"{match['split']}-{match['index']}-of-{counts[match['split']]:05d}.parquet")
        write_atomic(self.folder / CARD, card)
        write_json(self.folder / PROVENANCE, {"identity": self.identity, **provenance})
        _remove(self.folder / "journal")
        _replace_folder(self.folder, self.final)
        _remove(self.final / IDENTITY)


@contextlib.contextmanager
def open_output(
    folder: Path, identity: dict[str, Any], *, overwrite: bool, worker: int = 0, wait: float = LOCK_WAIT
) -> Iterator[Output]:
    """Hold the lock on the output `folder`, and find what is there of the run that `identity` describes.

    identity: JSON values, what decides the rows (what fields and fingerprints, never times). Nothing there: start.
    A part of the same run: go on. All of it: `done`. Another run's: BadUse naming what differs, unless `overwrite`.
    `worker`: this process's rank when several write shards of one output; all but 0 wait for worker 0 to decide.
    """
    lock = folder.with_name(f".{folder.name}.lock" + (f"{worker}" if worker else ""))
    with locked(lock, wait=wait):
        if worker:
            _wait_for_start(folder, identity, wait)
        done = _settle(folder, identity, overwrite)
        yield Output(folder, identity, done=done)


def existing_state(folder: Path, identity: dict[str, Any], *, overwrite: bool) -> str:
    """ "done", "partial" or "absent" for `--check`. Raises BadUse as `open_output` does."""
    partial = partial_folder(folder)
    if folder.is_dir() and any(folder.iterdir()):
        provenance = read_json(folder / PROVENANCE)
        if provenance is None:
            raise BadUse(f"{folder} exists and is not an output of rlhf_pipeline: name another output folder.")
        if not (overwrite and differences(provenance["identity"], json.loads(json.dumps(identity)))):
            check_same_run(folder, provenance["identity"], identity)
            return "done"
    recorded = read_json(partial / IDENTITY)
    if recorded is None or (overwrite and differences(recorded, json.loads(json.dumps(identity)))):
        return "absent"
    check_same_run(partial, recorded, identity)
    return "partial"


def _settle(folder: Path, identity: dict[str, Any], overwrite: bool) -> bool:
    state = existing_state(folder, identity, overwrite=overwrite)
    if state == "absent":
        partial = partial_folder(folder)
        _remove(partial)
        partial.mkdir(parents=True)
        write_json(partial / IDENTITY, identity)
    return state == "done"


def _wait_for_start(folder: Path, identity: dict[str, Any], wait: float) -> None:
    deadline = time.monotonic() + wait
    while existing_state(folder, identity, overwrite=True) == "absent":
        if time.monotonic() > deadline:
            raise BadUse(f"worker 0 has not started on {folder} within {wait:.0f} s: see its messages.")
        time.sleep(0.2)


def _replace_folder(new: Path, final: Path) -> None:
    old = final.with_name(f".{final.name}.replaced")
    _remove(old)
    if final.exists():
        final.rename(old)
    sync_folder(new)
    new.rename(final)
    sync_folder(final.parent)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists():
        os.unlink(path)


# A folder that a command fills in place: a policy with its checkpoints and metrics


def run_state(folder: Path, identity: dict[str, Any], *, overwrite: bool) -> str:
    """ "done", "partial" or "absent": what `folder` holds of the run that `identity` describes.

    Raises BadUse naming what differs if it holds another run (unless `overwrite`) or something that is not ours.
    """
    finished, started = read_json(folder / PROVENANCE), read_json(folder / IDENTITY)
    recorded = finished["identity"] if finished else started
    if recorded is None:
        if folder.is_dir() and any(folder.iterdir()):
            raise BadUse(f"{folder} exists and is not an output of rlhf_pipeline: name another output folder.")
        return "absent"
    if overwrite and differences(recorded, json.loads(json.dumps(identity))):
        return "absent"
    check_same_run(folder, recorded, identity)
    return "done" if finished else "partial"


def start_run(folder: Path, identity: dict[str, Any], *, overwrite: bool) -> None:
    """Make `folder` ready for the run: as it is if it holds a part of it, empty if it is new or to be overwritten."""
    if run_state(folder, identity, overwrite=overwrite) == "absent":
        _remove(folder)
        folder.mkdir(parents=True)
        write_json(folder / IDENTITY, identity)


def finish_run(folder: Path, identity: dict[str, Any], provenance: dict[str, Any], card: str) -> None:
    """Mark `folder` as whole: its card, then its provenance."""
    write_atomic(folder / CARD, card)
    write_json(folder / PROVENANCE, {"identity": identity, **provenance})
    _remove(folder / IDENTITY)


def run_lock(folder: Path) -> contextlib.AbstractContextManager[None]:
    return locked(folder.with_name(f".{folder.name}.lock"))
