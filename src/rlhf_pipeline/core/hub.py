"""The Hugging Face Hub: look up, download, check that we may write, push. Its errors become one sentence each."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from rlhf_pipeline.core.command import BadUse, WorkFailed
from rlhf_pipeline.core.files import write_json

Kind = Literal["dataset", "model"]
PUSHED = "pushed.json"
"""In a folder whose push has ended: where it went. It stays here."""


@contextlib.contextmanager
def explained(repo_id: str, kind: Kind, flag: str) -> Iterator[None]:
    """Turn the Hub's errors about `repo_id` into BadUse sentences that say what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = (
        f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"
    )
    try:
        yield
    except GatedRepoError:
        raise BadUse(f"{flag} {repo_id} is gated: accept its licence at {page}, then run `hf auth login`.") from None
    except RevisionNotFoundError:
        raise BadUse(f"{flag} {repo_id} has no such revision; its revisions are listed at {page}.") from None
    except RepositoryNotFoundError:
        raise BadUse(
            f"{flag} {repo_id} is no {kind} that the Hub shows us: check the name, write ./{repo_id} for a local "
            "folder, or run `hf auth login` if it is private."
        ) from None
    except _transport_error() as error:
        raise WorkFailed(
            f"{flag} {repo_id}: the Hub can't be reached ({error}); run the same command again to go on from here."
        ) from None
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError):
        raise BadUse(
            f"{flag} {repo_id} is not in the local cache and the Hub can't be reached (offline?): "
            f"write ./{repo_id} if you meant a local folder."
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "?"
        if status in (401, 403):
            raise BadUse(
                f"{flag} {repo_id}: the Hub refused (HTTP {status}); run `hf auth login` with a token that may."
            ) from None
        raise WorkFailed(f"{flag} {repo_id}: the Hub answered HTTP {status}; run the same command again.") from None


def _transport_error() -> type[Exception]:
    """What huggingface_hub raises when a connection fails: its HTTP client changed with its version 2."""
    name = "httpx2" if importlib.util.find_spec("httpx2") else "httpx"
    error: type[Exception] = importlib.import_module(name).TransportError
    return error


def look_up(repo_id: str, kind: Kind, revision: str | None, *, flag: str) -> tuple[str, list[str]]:
    """(commit, file names) of a Hub repo; from the local cache when offline mode is on. Raises BadUse."""
    from huggingface_hub import HfApi, constants, snapshot_download

    with explained(repo_id, kind, flag):
        if constants.is_offline_mode():
            folder = Path(snapshot_download(repo_id, repo_type=kind, revision=revision, local_files_only=True))
            return folder.name, [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        api = HfApi()
        look = api.dataset_info if kind == "dataset" else api.model_info
        info = look(repo_id, revision=revision)
        return info.sha or "", [sibling.rfilename for sibling in info.siblings or ()]


def download(
    repo_id: str, kind: Kind, commit: str, *, patterns: Sequence[str], flag: str, into: Path | None = None
) -> Path:
    """The folder with the files of a Hub repo at `commit` that match `patterns`: `into`, or one in the local cache."""
    from huggingface_hub import snapshot_download

    with explained(repo_id, kind, flag):
        return Path(
            snapshot_download(repo_id, repo_type=kind, revision=commit, allow_patterns=list(patterns), local_dir=into)
        )


def check_access(repo_id: str, kind: Kind, *, flag: str) -> None:
    """Raises BadUse if our token may not read the files of a repo that it sees: a gated one. Offline: no check."""
    from huggingface_hub import HfApi, constants

    if not constants.is_offline_mode():
        with explained(repo_id, kind, flag):
            HfApi().auth_check(repo_id, repo_type=kind)


def writable_accounts() -> set[str]:
    """The account and organisations that the stored token may write to; empty offline or without a token that the Hub
    takes. Raises WorkFailed when the Hub does not say.
    """
    from huggingface_hub import get_token, whoami
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if get_token() is None:
        return set()
    try:
        who = whoami(cache=True)  # the Hub allows few of these
        return {str(who["name"]), *(str(org["name"]) for org in who.get("orgs", ()))}
    except OfflineModeIsEnabled:
        return set()
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status < 500 and status != 429:  # it takes no such token
            return set()
        why = f"HTTP {status}"
    except (ConnectionError, _transport_error()) as error:
        why = str(error)
    raise WorkFailed(
        f"the Hub does not say where the stored token may write ({why}): run the same command again, "
        "or name the output with --output_repo."
    )


def check_write(repo_id: str, *, flag: str) -> None:
    """Refuse an output under an account that the stored token may not write to; creates nothing."""
    owner, _, name = repo_id.partition("/")
    accounts = writable_accounts()
    if owner not in accounts:
        may = f"the token may write to {', '.join(sorted(accounts))}" if accounts else "it accepted no token"
        raise BadUse(
            f"{flag} {repo_id} is on the Hub, and {may}: run `hf auth login` with a token of {owner}, "
            f"or write ./{name} for a local folder."
        )


def create_repo(repo_id: str, kind: Kind, *, private: bool, flag: str) -> None:
    """Create the repo unless it is there: the proof, before any model loads, that we may write to it.

    Raises BadUse also if it is there and public where a private one is asked for, or the other way round.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise BadUse(
            f"{flag} {repo_id} is on the Hub and there is no token: run `hf auth login`, or write ./{repo_id}."
        )
    with explained(repo_id, kind, flag):
        HfApi().create_repo(repo_id, repo_type=kind, private=private, exist_ok=True)
        is_private = bool(HfApi().repo_info(repo_id, repo_type=kind).private)
    if private and not is_private:
        raise BadUse(f"{flag} {repo_id} is a public repo: pass --public to push to it, or name another.")
    if is_private and not private:
        raise BadUse(
            f"{flag} {repo_id} is a private repo, which --public does not change: make it public in its settings on "
            "the Hub, or leave --public out."
        )


class Overtaken(WorkFailed):
    """Another commit came between the one that ours builds on and ours."""


@contextlib.contextmanager
def _failures_of_commits() -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (409, 412):
            raise Overtaken("another commit to the same repo came between: run the same command again.") from error
        raise
    except RuntimeError as error:
        if isinstance(error.__cause__, (HfHubHTTPError, _transport_error())):  # how it wraps a large file's failure
            raise error.__cause__ from None
        raise


def push(
    folder: Path,
    repo_id: str,
    kind: Kind,
    *,
    ignore: Sequence[str] = (),
    replace: Sequence[str] = (),
    parent: str | None = None,
    flag: str = "--push_to",
) -> str:
    """Upload `folder` as one commit, note in it that this was done, and return the commit's id. Raises WorkFailed.

    What a push that was killed had uploaded of large files is not sent again. replace: patterns of files that go from
    the repo if `folder` lacks them. parent: the commit to build on; raises Overtaken if it is not the last one.
    """
    from huggingface_hub import HfApi

    with explained(repo_id, kind, flag), _failures_of_commits():
        commit = HfApi().upload_folder(
            folder_path=folder,
            repo_id=repo_id,
            repo_type=kind,
            ignore_patterns=[*ignore, PUSHED],
            delete_patterns=list(replace),
            parent_commit=parent,
            commit_message="rlhf_pipeline",
        )
    write_json(folder / PUSHED, {"repo_id": repo_id, "commit": commit.oid})
    return str(commit.oid)


def commit_files(
    repo_id: str, kind: Kind, *, add: Mapping[str, Path | bytes], delete: Iterable[str], parent: str, flag: str
) -> str:
    """Commit these files, {name in the repo: file or content}, on top of `parent`, and return the commit's id.

    Raises Overtaken if `parent` is not the last commit any more.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi

    operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = []
    operations += [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in add.items()]
    operations += [CommitOperationDelete(path_in_repo=name) for name in delete]
    with explained(repo_id, kind, flag), _failures_of_commits():
        commit = HfApi().create_commit(
            repo_id, operations, repo_type=kind, parent_commit=parent, commit_message="rlhf_pipeline"
        )
    return str(commit.oid)
