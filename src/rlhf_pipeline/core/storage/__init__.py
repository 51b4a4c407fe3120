"""Datasets between stages: what a reference names, how rows are read, how an output appears whole or not at all.

A local dataset is laid out as a Hub dataset repo: README.md with the splits' files in its front matter,
data/<split>-00000-of-0000N.parquet, and provenance.json. While it is being written it lives in the hidden folder
.<name>.partial beside its final place; the rename of that folder is the moment at which it exists.
"""

from rlhf_pipeline.core.storage.delivery import deliver, prepare_delivery
from rlhf_pipeline.core.storage.identity import check_same_run, differences
from rlhf_pipeline.core.storage.layout import CARD, IDENTITY, PROVENANCE, partial_folder, shard_files
from rlhf_pipeline.core.storage.reading import open_source
from rlhf_pipeline.core.storage.references import RUNS, Ref, default_output, parse_ref
from rlhf_pipeline.core.storage.run_folders import finish_run, run_lock, run_state, start_run
from rlhf_pipeline.core.storage.sources import Source
from rlhf_pipeline.core.storage.writing import Output, existing_state, open_output

__all__ = [
    "CARD",
    "IDENTITY",
    "PROVENANCE",
    "RUNS",
    "Output",
    "Ref",
    "Source",
    "check_same_run",
    "default_output",
    "deliver",
    "differences",
    "existing_state",
    "finish_run",
    "open_output",
    "open_source",
    "parse_ref",
    "partial_folder",
    "prepare_delivery",
    "run_lock",
    "run_state",
    "shard_files",
    "start_run",
]
