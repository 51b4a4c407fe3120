"""Datasets between stages: what a reference names, how rows are read, how an output appears whole or not at all.

A local dataset is laid out as a Hub dataset repo: README.md with the splits' files in its front matter,
data/<split>-00000-of-0000N.parquet, and provenance.json. While it is being written it lives in the hidden folder
.<name>.partial beside its final place; the rename of that folder is the moment at which it exists.
"""

from rlhf_pipeline.core.storage.delivery import check_delivery, deliver, finish, prepare_delivery, push_only
from rlhf_pipeline.core.storage.identity import check_same_run, differences
from rlhf_pipeline.core.storage.layout import CARD, IDENTITY, PROVENANCE, partial_folder, shard_files
from rlhf_pipeline.core.storage.reading import open_source
from rlhf_pipeline.core.storage.references import RUNS, Ref, default_output, parse_ref
from rlhf_pipeline.core.storage.run_folders import finish_run, run_lock, run_state, start_run
from rlhf_pipeline.core.storage.shares import Share, choose_share, even_shards
from rlhf_pipeline.core.storage.sources import Source
from rlhf_pipeline.core.storage.writing import Output, existing_state, open_output

__all__ = [
    "CARD",
    "IDENTITY",
    "PROVENANCE",
    "RUNS",
    "Output",
    "Ref",
    "Share",
    "Source",
    "check_delivery",
    "check_same_run",
    "choose_share",
    "default_output",
    "deliver",
    "differences",
    "even_shards",
    "existing_state",
    "finish",
    "finish_run",
    "open_output",
    "open_source",
    "parse_ref",
    "partial_folder",
    "prepare_delivery",
    "push_only",
    "run_lock",
    "run_state",
    "shard_files",
    "start_run",
]
