"""Opening a dataset: our own layout straight from its parquet files, a file of prompts, anything else by datasets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_pipeline.core import hub, schema
from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.files import read_json, sha256_of
from rlhf_pipeline.core.storage import remote
from rlhf_pipeline.core.storage.layout import (
    CARD,
    PROVENANCE,
    SETTLED,
    UNDER_WAY,
    counts_of,
    lacking,
    partial_folder,
    say_missing,
    shard_files,
    shards_among,
)
from rlhf_pipeline.core.storage.prompt_files import open_file, read_footer
from rlhf_pipeline.core.storage.references import Ref, parse_ref
from rlhf_pipeline.core.storage.sources import Source, make_source, parquet_tables

if TYPE_CHECKING:
    import pyarrow as pa


def open_source(text: str, *, flag: str, split: str | None = "train") -> Source:
    """Open one split of the dataset that `text` names (None: its only split).

    Raises BadUse when it does not exist, has no such split, has no rows, or is a sharded output not yet whole.
    """
    ref = parse_ref(text, flag=flag)
    if ref.path is not None and ref.path.is_file():
        source = open_file(ref, flag)
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
    if any(name.startswith(f"{UNDER_WAY}/") for name in names):
        counts = remote.counts_among(names)
        missing = lacking(counts, shards_among(Path(name).name for name in names))
        lacks = say_missing(missing, counts, remote.num_jobs(names)) if missing else "it lacks only its card"
        raise BadUse(f"{flag} {ref.text} is not whole yet: {lacks}; run the commands that write them.")
    hub.check_access(str(ref.repo_id), "dataset", flag=flag)
    return _open_foreign(ref, str(ref.repo_id), split, flag, revision=commit, fingerprint=commit)


def _open_folder(ref: Ref, folder: Path, split: str | None, flag: str, *, fingerprint: str | None = None) -> Source:
    if not folder.is_dir():
        partial = partial_folder(folder)
        hint = _describe_partial(partial) if partial.is_dir() else "check the name, or run the stage that writes it"
        raise BadUse(f"{flag} {ref.text} does not exist; {hint}.")
    provenance = read_json(folder / PROVENANCE)
    shards = shard_files(folder, flag)
    fingerprint = fingerprint or sha256_of(
        [path for paths in shards.values() for path in paths] or _data_files(folder), relative_to=folder
    )
    if not shards:
        return _open_foreign(ref, str(folder), split, flag, revision=None, fingerprint=fingerprint)
    name = _choose_split(tuple(shards), split, ref.text, flag)
    files = shards[name]
    metadata = [read_footer(path, flag) for path in files]
    columns = tuple(metadata[0].schema.to_arrow_schema().names)
    counts = [item.num_rows for item in metadata]
    return make_source(
        ref, name, tuple(shards), columns, sum(counts), fingerprint, provenance, folder,
        lambda names, size, start, stop: parquet_tables(files, counts, names, size, start, stop),
    )  # fmt: skip


def _data_files(folder: Path) -> list[Path]:
    """What `datasets` reads of a folder made elsewhere: its parquet files, or, without any, all that is not hidden."""
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    shown = [folder / path for path in files if not any(part.startswith(".") for part in path.parts)]
    return [path for path in shown if path.suffix == ".parquet"] or shown


def _describe_partial(partial: Path) -> str:
    """What a reader is told of an output that is being written."""
    written = f"it is being written in {partial}"
    settled = read_json(partial / SETTLED) or {}
    counts = counts_of(settled)
    missing = lacking(counts, shards_among(path.name for path in (partial / "data").glob("*.parquet")))
    if not missing:
        return f"{written}: run that stage's command again to finish it"
    jobs = settled.get("num_shards", 1)
    return f"{written}, and {say_missing(missing, counts, jobs)}: run the commands that write them, to the end"


def _open_foreign(
    ref: Ref, location: str, split: str | None, flag: str, *, revision: str | None, fingerprint: str
) -> Source:
    import datasets

    try:
        with hub.explained(location, "dataset", flag):
            config = _choose_config(ref, location, revision, flag)
            loaded = datasets.load_dataset(location, config, revision=revision)
    except (ValueError, datasets.exceptions.DatasetNotFoundError, datasets.exceptions.DatasetGenerationError) as error:
        cause = error.__cause__ or error
        raise BadUse(f"{flag} {ref.text} can't be read as a dataset: {str(cause).splitlines()[0]}") from error
    name = _choose_split(tuple(loaded), split, ref.text, flag)
    fingerprint += f":{ref.config}" if ref.config is not None else ""
    data = loaded[name].with_format("arrow")

    def tables(names: Sequence[str], size: int, start: int, stop: int) -> Iterator[pa.Table]:
        chosen = data.select_columns(list(names))
        for low in range(start, stop, size):
            yield chosen[low : min(low + size, stop)].select(list(names))

    return make_source(
        ref, name, tuple(loaded), tuple(data.column_names), len(data), fingerprint, None, None, tables
    )  # fmt: skip


def _choose_config(ref: Ref, location: str, revision: str | None, flag: str) -> str:
    """The configuration that the reference names, the only one, or the default one. Raises BadUse listing them."""
    import datasets

    names = datasets.get_dataset_config_names(location, revision=revision)
    if ref.config is None and len(names) > 1:
        default = datasets.get_dataset_default_config_name(location, revision=revision)
        if default is None:
            raise BadUse(
                f"{flag} {ref.text} has several configurations ({_some(names)}): choose one, as in "
                f"{ref.text.partition('@')[0]}:{names[0]}."
            )
        return str(default)
    if ref.config is not None and ref.config not in names:
        raise BadUse(f"{flag} {ref.text} has no configuration {ref.config}; it has {_some(names)}.")
    return ref.config or str(names[0])


def _some(names: Sequence[str], limit: int = 12) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _choose_split(splits: tuple[str, ...], wanted: str | None, text: str, flag: str) -> str:
    if wanted is None and len(splits) == 1:
        return splits[0]
    for name in (wanted, schema.TUTORIAL_SPLITS.get(wanted or "")):
        if name in splits:
            return str(name)
    raise BadUse(f"{flag} {text} has no split {wanted}; it has {', '.join(splits)}: choose with --split.")
