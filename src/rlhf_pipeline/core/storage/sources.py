"""A split of a dataset as the stages read it: under our column names, in order, in constant memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_pipeline.core import schema
from rlhf_pipeline.core.storage.references import Ref

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


@dataclass(frozen=True)
class Source:
    """One split of a dataset, under our column names.

    `fingerprint` is the Hub commit, or sha256 of the data files or of the prompt file; with the configuration, if the
    reference names one. `provenance` is None for data made elsewhere. `renamed` is {name in the data: our name} for
    columns read by a tutorial name. `plain` holds the rows of a prompt file, whose values need not be of one kind; None
    for data that is stored in columns.
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
        """The rows' prompt_id, as text, if it is there, unique and never null, else made from their prompts."""
        if schema.PROMPT_ID in self.columns:
            given = [row[schema.PROMPT_ID] for row in self.rows([schema.PROMPT_ID])]
            ids = [str(prompt_id) for prompt_id in given]
            if None not in given and len(set(ids)) == len(ids):
                return ids
        return schema.make_prompt_ids(row[schema.PROMPT] for row in self.rows([schema.PROMPT]))

    def rows(
        self, columns: Sequence[str] | None = None, *, start: int = 0, stop: int | None = None
    ) -> Iterator[dict[str, Any]]:
        for batch in self.batches(columns, start=start, stop=stop):
            yield from batch


def make_source(
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


def parquet_tables(
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
