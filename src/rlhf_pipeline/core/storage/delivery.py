"""Bringing an output to where it belongs: the Hub, or nowhere further."""

from __future__ import annotations

from rlhf_pipeline.core import hub
from rlhf_pipeline.core.storage.references import Ref


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
