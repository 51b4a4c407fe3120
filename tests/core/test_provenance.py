"""The card that a person reads."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf_pipeline.core import provenance

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_card_links_its_inputs_and_shows_rows_without_ids(tmp_path):
    rows = [
        {
            "prompt": f"Say | {i}.\nNow.",
            "response_0": "x" * 500,
            "response_0_tokens": [i],
            "response_0_reward": 0.123456,
        }
        for i in range(3)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "shard.parquet")
    made = provenance.describe(
        command="rank",
        config={},
        inputs={
            "responses": {"ref": "owner/r:main", "rows": 3, "fingerprint": COMMIT},
            "model": {"ref": "owner/m", "fingerprint": COMMIT},
            "local": {"ref": "./runs/a", "rows": 3, "fingerprint": "ab" * 32},
        },
        rows_in=3,
        rows_out=2,
        dropped={"too long": 1},
        engine={"kind": "test"},
    )
    card = provenance.card(
        title="Rewards",
        provenance=made,
        splits=["train"],
        columns={"prompt": "the prompt"},
        samples=provenance.sample_rows(tmp_path / "shard.parquet"),
    )
    assert f"[`owner/r:main`](https://huggingface.co/datasets/owner/r/tree/{COMMIT}) | 3 |" in card
    assert f"[`owner/m`](https://huggingface.co/owner/m/tree/{COMMIT}) |" in card
    assert "| local: `./runs/a` | 3 | `abababababababab` |" in card
    assert "| dropped: too long | 1 |" in card and "| rows out | 2 |" in card
    assert card.count("## Row ") == 2 and "response_0_tokens" not in card
    assert "| `prompt` | Say \\| 1. Now. |" in card and "| `response_0_reward` | 0.1235 |" in card
    assert "x" * 201 not in card
