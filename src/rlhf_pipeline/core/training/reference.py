"""Reference log-probs: what the policy says of every pair before its first update, computed once, kept and keyed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rlhf_pipeline.core import provenance, storage
from rlhf_pipeline.core.command import BadUse, WorkFailed
from rlhf_pipeline.core.progress import bar, is_main, say
from rlhf_pipeline.core.training.distributed import Engine, describe_launch, from_main, main_process_first
from rlhf_pipeline.core.training.pairs import PairData
from rlhf_pipeline.core.training.passes import Limits, Logps, split_logps

if TYPE_CHECKING:
    import pyarrow as pa

BLOCK = 2048
"""Pairs per shard: what a killed pass loses at most."""
PAIRS_CHECKED = 8
"""Pairs per process whose |log_ratio| is looked at before the first update."""


def reference_logps(
    engine: Engine,
    splits: dict[str, PairData],
    folder: Path,
    key: dict[str, Any],
    *,
    temperature: float,
    limits: Limits,
    tolerance: float | None,
) -> dict[str, Logps]:
    """{split: (n, 2) chosen and rejected log-probs in nats}, from `folder` if it holds them, else by `model`.

    Collective. `key` is what decides them (fingerprints of model and pairs, temperature). `tolerance`: the mean
    |log_ratio|, nats, that a model may show before its first update; it is about zero, and printed. None: don't look.
    Raises BadUse if `folder` holds those of another key, WorkFailed if they turn out not to be this model's.
    """
    identity = {"command": "reference", "splits": list(splits), **key}
    holding = storage.open_output(folder, identity, overwrite=False) if is_main() else contextlib.nullcontext()
    with holding as output:
        engine.accelerator.wait_for_everyone()
        if not from_main(engine.accelerator, (folder / storage.PROVENANCE).exists()):
            _compute(engine, splits, storage.partial_folder(folder), output, temperature, limits)
            main_process_first(engine.accelerator, lambda: _publish(output, splits, key, engine))
    found = {
        split: from_main(engine.accelerator, _read(folder, split, data) if is_main() else np.zeros((len(data), 2)))
        for split, data in splits.items()
    }
    log_ratio = _look(engine, splits["train"], found["train"], temperature, limits, tolerance)
    if tolerance is not None and log_ratio > tolerance:
        raise WorkFailed(
            f"before the first update |log_ratio| is {log_ratio:.3g} nats on average, not about zero: {folder} belongs "
            "to another model. Delete it, or name another --output_dir."
        )
    return found


def given_logps(
    engine: Engine,
    splits: dict[str, PairData],
    name: str,
    *,
    temperature: float,
    limits: Limits,
    tolerance: float | None,
) -> dict[str, Logps]:
    """{split: (n, 2)} that the pairs of the dataset `name` bring themselves; as `reference_logps` otherwise.

    Collective. Raises BadUse if they are too far from what the model says.
    """
    found = {
        split: np.stack([np.asarray(data.chosen_logp), np.asarray(data.rejected_logp)], axis=1)
        for split, data in splits.items()
    }
    log_ratio = _look(engine, splits["train"], found["train"], temperature, limits, tolerance)
    if tolerance is not None and log_ratio > tolerance:
        raise BadUse(
            f"before the first update |log_ratio| is {log_ratio:.3g} nats on average, expected at most {tolerance:g}: "
            f"the log-probs that {name} brings are another model's, or of another temperature than {temperature:g}. "
            "Drop --reference_from_input, or raise --reference_tolerance if you know better."
        )
    return found


def _compute(
    engine: Engine,
    splits: dict[str, PairData],
    partial: Path,
    output: storage.Output | None,
    temperature: float,
    limits: Limits,
) -> None:
    every = list(_blocks(splits))
    missing = from_main(engine.accelerator, [not _is_written(partial, split, number) for split, number, _ in every])
    blocks = [block for block, wanted in zip(every, missing, strict=True) if wanted]
    with bar(sum(len(rows) for _, _, rows in blocks), "pairs", "reference log-probs") as advance:
        for split, number, rows in blocks:
            logps = split_logps(
                engine,
                splits[split],
                rows,
                temperature=temperature,
                limits=limits,
                advance=advance,
            )
            if output is not None:
                output.write_shard(split, number, _table(splits[split], rows, logps))


def _blocks(splits: dict[str, PairData]) -> Iterator[tuple[str, int, npt.NDArray[np.int64]]]:
    """(split, shard number, indices)"""
    for split, data in splits.items():
        for number, start in enumerate(range(0, len(data), BLOCK)):
            yield split, number, np.arange(start, min(start + BLOCK, len(data)))


def _is_written(partial: Path, split: str, number: int) -> bool:
    """Whether an earlier run, which was killed, has written that shard."""
    return any((partial / "data").glob(f"{split}-{number:05d}*.parquet"))


def _table(data: PairData, rows: npt.NDArray[np.int64], logps: Logps) -> pa.Table:
    import pyarrow as pa

    return pa.table(
        {
            "prompt_id": [data.prompt_ids[i] for i in rows],
            "chosen_index": data.chosen_index[rows],
            "rejected_index": data.rejected_index[rows],
            "chosen_logp": logps[:, 0],
            "rejected_logp": logps[:, 1],
        }
    )


def _publish(output: storage.Output | None, splits: dict[str, PairData], key: dict[str, Any], engine: Engine) -> None:
    assert output is not None
    rows = {split: len(data) for split, data in splits.items()}
    made = provenance.describe(
        command="train",
        config={"temperature": key["temperature"]},
        inputs={name: {"fingerprint": value} for name, value in key["inputs"].items()},
        rows_in=sum(rows.values()),
        rows_out=rows,
        dropped={},
        engine=describe_launch(engine.accelerator),
    )
    columns = {
        "prompt_id, chosen_index, rejected_index": "which pair",
        "chosen_logp, rejected_logp": "natural-log probability of the response under the starting policy, nats",
    }
    card = provenance.card(title="Reference log-probs", provenance=made, splits=list(splits), columns=columns)
    output.publish(made, card)


def _read(folder: Path, split: str, data: PairData) -> Logps:
    """(n, 2), checked against the pairs by their key."""
    rows = list(storage.open_source(str(folder.resolve()), flag="--output_dir", split=split).rows())
    keys = [(row["prompt_id"], row["chosen_index"], row["rejected_index"]) for row in rows]
    wanted = list(zip(data.prompt_ids, data.chosen_index.tolist(), data.rejected_index.tolist(), strict=True))
    if keys != wanted:
        raise WorkFailed(f"{folder} is not about the pairs of this run: delete it and run the same command again.")
    return np.array([(row["chosen_logp"], row["rejected_logp"]) for row in rows])


def _look(
    engine: Engine,
    data: PairData,
    reference: Logps,
    temperature: float,
    limits: Limits,
    tolerance: float | None,
) -> float:
    """The mean |log_ratio| of the first pairs, nats, printed with the largest; 0 unless it is asked for."""
    if tolerance is None:
        return 0.0
    some = np.arange(min(len(data), PAIRS_CHECKED * engine.world_size))
    logps = split_logps(engine, data, some, temperature=temperature, limits=limits)
    log_ratio = np.abs(logps - reference[some])
    seen = f"mean {log_ratio.mean():.2g}, largest {log_ratio.max():.2g} nats"
    say(f"check      |log_ratio| before the first update: {seen}")
    return float(log_ratio.mean())
