"""Responses gathered shard by shard: a run that was killed at any point asks for what lacks, and only that."""

from __future__ import annotations

from array import array
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rlhf_pipeline.core.generation.prompts import Prompt
from rlhf_pipeline.core.generation.responses import Responses, summarize
from rlhf_pipeline.core.generation.sampling import FinishReason, Request, Sample
from rlhf_pipeline.core.storage import open_output, shard_files

N = 3
PROMPTS = [Prompt(i, f"id{i}", f"question {i}", None, array("i", [1, 100 + i])) for i in range(7)]


def answer(request: Request) -> Sample:
    """What a sampler might give: a function of the request alone."""
    ids = [request.prompt_ids[-1], request.seed, 2]
    return Sample(request.key, ids, f"{ids[0]}/{ids[1]}", "stop", [-0.5, -1.0, -2.0])


def gather(folder: Path, *, answers: int | None = None, rows_per_shard: int = 3, order: int = 1) -> list[int]:
    """One run over the output: answer so many requests (None: all), then vanish. Returns the keys asked for."""
    with open_output(folder, {"seed": 7}, overwrite=False) as output:
        responses = Responses(output, PROMPTS, num_responses=N, seed=7, rows_per_shard=rows_per_shard, token_logps=True)
        requests = list(responses.requests())
        for request in requests[::order][:answers]:
            responses.add(answer(request))
        return [request.key for request in requests]


def written(folder: Path) -> list[Path]:
    return sorted((folder.parent / f".{folder.name}.partial" / "data").glob("*.parquet"))


def test_each_response_has_its_own_seed_and_its_prompts_ids(tmp_path):
    """Response i is sampled with seed + 50 i, the tutorial's rule; the keys of a prompt's responses are neighbours."""
    with open_output(tmp_path / "out", {}, overwrite=False) as output:
        responses = Responses(output, PROMPTS, num_responses=N, seed=7, rows_per_shard=3, token_logps=False)
        requests = list(responses.requests())
    assert requests[:4] == [
        Request(0, (1, 100), 7),
        Request(1, (1, 100), 57),
        Request(2, (1, 100), 107),
        Request(3, (1, 101), 7),
    ]
    assert [request.key for request in requests] == list(range(21))


def test_a_killed_run_asks_for_the_rest_alone(tmp_path):
    """Shards of 9, 9 and 3 responses: 10 answers write the first and leave one in the second's journal."""
    assert gather(tmp_path / "out", answers=10) == list(range(21))
    assert len(written(tmp_path / "out")) == 1
    assert gather(tmp_path / "out", answers=4) == list(range(10, 21))
    assert gather(tmp_path / "out") == list(range(14, 21))
    assert len(written(tmp_path / "out")) == 3
    assert gather(tmp_path / "out") == []


def test_responses_may_finish_in_any_order_and_over_several_shards(tmp_path):
    gather(tmp_path / "forward")
    gather(tmp_path / "backward", answers=13, order=-1)
    assert gather(tmp_path / "backward") == list(range(8))
    tables = [pq.read_table([str(path) for path in written(tmp_path / name)]) for name in ("forward", "backward")]
    assert tables[0].equals(tables[1])


def test_a_torn_journal_costs_the_torn_response_alone(tmp_path):
    """Killed while it wrote: key 4's line lacks its end. Answered again, the row is as if nothing had happened."""
    gather(tmp_path / "out", answers=5)
    journal = tmp_path / ".out.partial" / "journal" / "00000.jsonl"
    journal.write_bytes(journal.read_bytes()[:-9])
    assert gather(tmp_path / "out") == list(range(4, 21))
    gather(tmp_path / "whole")
    tables = [pq.read_table([str(path) for path in written(tmp_path / name)]) for name in ("out", "whole")]
    assert tables[0].equals(tables[1])


def test_a_shard_whose_journal_is_whole_is_written_without_asking(tmp_path, monkeypatch):
    """Killed between the last response of a shard and its parquet file."""
    monkeypatch.setattr(
        "rlhf_pipeline.core.storage.Output.write_shard", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        gather(tmp_path / "out", answers=9)
    monkeypatch.undo()
    assert written(tmp_path / "out") == []
    assert gather(tmp_path / "out", answers=0) == list(range(9, 21))
    assert len(written(tmp_path / "out")) == 1


def test_the_size_of_shards_stays_what_it_was(tmp_path):
    gather(tmp_path / "out", answers=10, rows_per_shard=3)
    assert gather(tmp_path / "out", rows_per_shard=2) == list(range(10, 21))
    assert [pq.read_metadata(path).num_rows for path in written(tmp_path / "out")] == [3, 3, 1]


def test_columns_and_their_types(tmp_path):
    gather(tmp_path / "out")
    table = pq.read_table(str(written(tmp_path / "out")[0]))
    assert {name: str(kind) for name, kind in zip(table.schema.names, table.schema.types, strict=True)} == {
        "prompt_id": "string",
        "prompt": "string",
        **{
            name: kind
            for i in range(N)
            for name, kind in {
                f"response_{i}": "string",
                f"response_{i}_tokens": "list<element: int32>",
                f"response_{i}_finish_reason": "string",
                f"response_{i}_token_logps": "list<element: float>",
            }.items()
        },
    }
    assert table.slice(1, 1).to_pylist()[0] | {"prompt": ""} == {
        "prompt_id": "id1",
        "prompt": "",
        **{
            name: value
            for i in range(N)
            for name, value in {
                f"response_{i}": f"101/{7 + 50 * i}",
                f"response_{i}_tokens": [101, 7 + 50 * i, 2],
                f"response_{i}_finish_reason": "stop",
                f"response_{i}_token_logps": [-0.5, -1.0, -2.0],
            }.items()
        },
    }


def test_message_prompts_have_one_type_in_all_shards(tmp_path):
    """A shard in which no message has a name must still have the column's field for it."""
    turns = [[{"role": "user", "content": str(i)}] for i in range(4)]
    turns[3][0]["name"] = "Ada"
    prompts = [Prompt(i, f"id{i}", turn, None, array("i", [1])) for i, turn in enumerate(turns)]
    with open_output(tmp_path / "out", {}, overwrite=False) as output:
        responses = Responses(output, prompts, num_responses=1, seed=0, rows_per_shard=2, token_logps=False)
        for request in responses.requests():
            responses.add(answer(request))
    schemas = {str(pq.read_schema(path)) for path in written(tmp_path / "out")}
    assert len(schemas) == 1 and "name" in schemas.pop()


def test_summary_of_hand_made_responses(tmp_path):
    """3 prompts x 2: lengths 1 2 3 4 5 6, mean 3.5; two cut by length; one empty; one repeats its neighbour."""
    texts = ["a", "a", "b", " ", "b", "c"]
    prompts = [Prompt(i, f"id{i}", "q", "kind", array("i", [1])) for i in range(3)]
    with open_output(tmp_path / "out", {}, overwrite=False) as output:
        responses = Responses(output, prompts, num_responses=2, seed=0, rows_per_shard=2, token_logps=False)
        for request in responses.requests():
            key = request.key
            reason: FinishReason = "length" if key in (1, 5) else "stop"
            responses.add(Sample(key, list(range(key + 1)), texts[key], reason))
        summary = summarize(shard_files(output.folder, "--x")["train"], 2)
    assert (summary.prompts, summary.responses, summary.total) == (3, 6, 21)
    assert (summary.mean_length, summary.longest) == (3.5, 6)
    assert (summary.truncated, summary.empty, summary.repeated) == (2 / 6, 1 / 6, 1 / 6)
