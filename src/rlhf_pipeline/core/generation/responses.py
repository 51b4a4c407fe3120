"""N responses to every prompt, gathered shard by shard, so that a killed run loses none and repeats none.

A response is written to its shard's journal as soon as it is finished. When a shard has all of them it is
written as parquet and its journal goes. A restart reads the journals and asks for what they lack.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rlhf_pipeline.core import schema
from rlhf_pipeline.core.files import Journal
from rlhf_pipeline.core.generation.prompts import Prompt
from rlhf_pipeline.core.generation.sampling import Request, Sample
from rlhf_pipeline.core.storage import Output, even_shards

if TYPE_CHECKING:
    import pyarrow as pa

SPLIT = "train"
JOURNAL = "journal"
"""Folder of what a run under way keeps beside its shards; gone when the output appears."""
SEED_STEP = 50
"""Response i of every prompt is sampled with seed + i * SEED_STEP, as in the tutorial."""


def response_token_logps(i: int) -> str:
    return f"response_{i}_token_logps"


def response_error(i: int) -> str:
    return f"response_{i}_error"


@dataclass
class _Shard:
    """The responses that are there of one shard, {key: sample}, and the journal that holds them."""

    journal: Journal
    samples: dict[int, Sample] = field(default_factory=dict)


class Responses:
    """The responses of a run that writes to `output`.

    The key of response i to the prompt numbered p among `prompts` is p * num_responses + i. rows_per_shard
    counts where the run has no shards yet; later it stays what it was. Of several jobs each makes its share. An
    endpoint's responses are text_only: without ids, and null with an error where it refused.
    """

    def __init__(
        self,
        output: Output,
        prompts: Sequence[Prompt],
        *,
        num_responses: int,
        seed: int,
        rows_per_shard: int,
        token_logps: bool = False,
        text_only: bool = False,
    ):
        self.output = output
        self.prompts = prompts
        self.num_responses = num_responses
        self.seed = seed
        self.token_logps = token_logps
        self.text_only = text_only
        even = even_shards(len(prompts), rows_per_shard, output.share.count)
        self.rows_per_shard = output.settle("rows_per_shard", even)
        output.expect(SPLIT, self.num_shards)
        self.shards = output.share.of(range(self.num_shards))
        self._types = _column_types(prompts)
        self._open: dict[int, _Shard] = {}
        for index in self.shards:
            if not output.has_shard(SPLIT, index) and self._journal_path(index).exists():
                self._open_shard(index)

    @property
    def num_shards(self) -> int:
        return -(-len(self.prompts) // self.rows_per_shard)

    @property
    def total(self) -> int:
        """Of this job's shards."""
        return sum(len(self._keys(index)) for index in self.shards)

    @property
    def finished(self) -> int:
        """Responses that need not be sampled again."""
        written = (i for i in self.shards if self.output.has_shard(SPLIT, i))
        return sum(len(self._keys(i)) for i in written) + sum(len(shard.samples) for shard in self._open.values())

    def requests(self) -> Iterator[Request]:
        """What is still to be sampled, shard by shard, the responses to one prompt together."""
        for index in self.shards:
            if self.output.has_shard(SPLIT, index):
                continue
            shard = self._open.get(index) or self._open_shard(index)
            for key in [key for key in self._keys(index) if key not in shard.samples]:
                number, i = divmod(key, self.num_responses)
                prompt = self.prompts[number]
                text = prompt.prompt if self.text_only else None
                yield Request(key, tuple(prompt.ids), self.seed + i * SEED_STEP, text)

    def add(self, sample: Sample) -> None:
        """Record a finished response, and write its shard if it was the last one."""
        index = sample.key // self.num_responses // self.rows_per_shard
        shard = self._open[index]
        shard.samples[sample.key] = sample
        shard.journal.append(vars(sample))
        self._write_if_whole(index)

    def _open_shard(self, index: int) -> _Shard:
        shard = self._open[index] = _Shard(Journal(self._journal_path(index)))
        for record in shard.journal.records:
            shard.samples[record["key"]] = Sample(**record)
        shard.journal.records.clear()
        self._write_if_whole(index)
        return shard

    def _write_if_whole(self, index: int) -> None:
        shard = self._open[index]
        if len(shard.samples) < len(self._keys(index)):
            return
        self.output.write_shard(SPLIT, index, self._table(index, shard.samples))
        del self._open[index]
        shard.journal.close()
        self._journal_path(index).unlink()

    def _journal_path(self, index: int) -> Path:
        return self.output.folder / JOURNAL / f"{index:05d}.jsonl"

    def _rows(self, index: int) -> range:
        start = index * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, len(self.prompts)))

    def _keys(self, index: int) -> range:
        rows = self._rows(index)
        return range(rows.start * self.num_responses, rows.stop * self.num_responses)

    def _table(self, index: int, samples: dict[int, Sample]) -> pa.Table:
        import pyarrow as pa

        rows = self._rows(index)
        chosen = [self.prompts[number] for number in rows]
        columns: dict[str, pa.Array] = {
            schema.PROMPT_ID: pa.array([prompt.prompt_id for prompt in chosen], pa.string()),
            schema.PROMPT: pa.array([prompt.prompt for prompt in chosen], self._types[schema.PROMPT]),
        }
        if schema.CATEGORY in self._types:
            kinds = [prompt.category for prompt in chosen]
            columns[schema.CATEGORY] = pa.array(kinds, self._types[schema.CATEGORY])
        for i in range(self.num_responses):
            column = [samples[number * self.num_responses + i] for number in rows]
            columns[schema.response(i)] = pa.array([sample.text for sample in column], pa.string())
            if not self.text_only:
                ids = [sample.token_ids for sample in column]
                columns[schema.response_tokens(i)] = pa.array(ids, pa.list_(pa.int32()))
            reasons = [sample.finish_reason for sample in column]
            columns[schema.response_finish_reason(i)] = pa.array(reasons, pa.string())
            if self.text_only:
                errors = [sample.error for sample in column]
                columns[response_error(i)] = pa.array(errors, pa.string())
            if self.token_logps:
                logps = [sample.token_logps for sample in column]
                columns[response_token_logps(i)] = pa.array(logps, pa.list_(pa.float32()))
        return pa.table(columns)


def _column_types(prompts: Sequence[Prompt]) -> dict[str, pa.DataType]:
    """The type of prompt, and of category if there is one: the same in all shards, whatever rows they
    hold."""
    import pyarrow as pa

    types = {schema.PROMPT: pa.array([prompt.prompt for prompt in prompts]).type}
    if any(prompt.category is not None for prompt in prompts):
        types[schema.CATEGORY] = pa.array([prompt.category for prompt in prompts]).type
    return types


@dataclass(frozen=True)
class Summary:
    """What a person asks of the responses first. Shares are of all responses.

    total, mean_length, longest: in `unit`s, tokens with the stop id, or characters where there are no ids. repeated:
    share of responses whose text another response to the same prompt has, counted without the first. refused: share
    that an endpoint gave no response for.
    """

    prompts: int
    responses: int
    unit: Literal["tokens", "characters"]
    total: int
    mean_length: float
    longest: int
    truncated: float
    empty: float
    repeated: float
    refused: float


def summarize(files: Sequence[Path], num_responses: int) -> Summary:
    """Read the written shards once, in constant memory."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with_ids = schema.response_tokens(0) in pq.read_schema(files[0]).names
    rows = total = longest = truncated = empty = repeated = refused = 0
    for path in files:
        texts = []
        for i in range(num_responses):
            names = [schema.response(i), schema.response_finish_reason(i)]
            table = pq.read_table(path, columns=names + [schema.response_tokens(i)] * with_ids)
            text, reason = table.columns[:2]
            lengths = pc.list_value_length(table.columns[2]) if with_ids else pc.utf8_length(text)
            total += pc.sum(lengths).as_py() or 0
            longest = max(longest, pc.max(lengths).as_py() or 0)
            truncated += pc.sum(pc.equal(reason, "length")).as_py() or 0
            refused += text.null_count
            texts.append(text.to_pylist())
            empty += sum(item is not None and not item.strip() for item in texts[-1])
        rows += len(texts[0])
        repeated += sum(_repeated(of_prompt) for of_prompt in zip(*texts, strict=True))
    count = rows * num_responses
    return Summary(
        prompts=rows,
        responses=count,
        unit="tokens" if with_ids else "characters",
        total=total,
        mean_length=total / max(count - refused, 1),
        longest=longest,
        truncated=truncated / count,
        empty=empty / count,
        repeated=repeated / count,
        refused=refused / count,
    )


def _repeated(texts: Sequence[str | None]) -> int:
    there = [text for text in texts if text is not None]
    return len(there) - len(set(there))
