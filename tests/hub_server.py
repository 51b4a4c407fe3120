"""A Hub on the loopback interface: as much of its HTTP protocol as creating, filling and reading repos takes."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_loopback"
ACCOUNT = "owner"
KINDS = {"datasets": "dataset", "models": "model"}


class Hub:
    """Repos by (kind, id): {"private": bool, "files": {path: bytes}, "sha": str}; and every path that was asked for.

    A repo with "gated": True gives nobody its files. Large files are uploaded beside the commits, as blobs by sha256.
    """

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], dict[str, Any]] = {}
        self.asked: list[str] = []
        self.failures: list[int] = []
        """HTTP codes with which the next commits are refused"""
        self.blobs: dict[str, bytes] = {}
        self.blob_failures: list[int] = []
        """HTTP codes with which the next uploads of large files are refused; 0: taken"""
        self.together: threading.Barrier | None = None
        """Where the next commits wait for each other, so that they are made on top of the same one"""
        self.lock = threading.Lock()
        self.victim: subprocess.Popen[bytes] | None = None
        self.changes_left = -1
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                answer(self, hub)

            do_HEAD = do_POST = do_PUT = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def kill(self, process: subprocess.Popen[bytes], at: int | None) -> None:
        """End `process` when it asks for the at-th thing, from 0, that changes something here; None: never."""
        self.victim, self.changes_left = process, -1 if at is None else at

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def answer(request: BaseHTTPRequestHandler, hub: Hub) -> None:
    path = request.path.split("?")[0].strip("/")
    hub.asked.append(f"{request.command} {path}")
    body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
    if request.command in ("POST", "PUT") and hub.victim is not None:
        if hub.changes_left == 0:
            hub.victim.kill()
        hub.changes_left -= 1
    signed_in = request.headers.get("Authorization") == f"Bearer {TOKEN}"
    if path == "api/whoami-v2":
        send_json(request, {"name": ACCOUNT, "orgs": [], "type": "user"}) if signed_in else send_json(request, {}, 401)
    elif path == "api/validate-yaml":
        send_json(request, {"errors": [], "warnings": []})
    elif path == "api/repos/create":
        create(request, hub, json.loads(body), signed_in)
    elif path.endswith(".git/info/lfs/objects/batch"):
        offer_uploads(request, hub, json.loads(body))
    elif path.startswith("blobs/"):
        take_blob(request, hub, path.removeprefix("blobs/"), body)
    elif path.startswith("api/"):
        _, kinds, owner, name, *rest = path.split("/")
        about(request, hub, KINDS[kinds], f"{owner}/{name}", rest, body, signed_in)
    else:
        download(request, hub, path, signed_in)


def create(request: BaseHTTPRequestHandler, hub: Hub, wanted: dict[str, Any], signed_in: bool) -> None:
    name = f"{wanted.get('organization') or ACCOUNT}/{wanted['name']}"
    if not signed_in or not name.startswith(f"{ACCOUNT}/"):
        send_json(request, {"error": "You don't have the rights to create here"}, 403 if signed_in else 401)
        return
    key = (wanted.get("type", "model"), name)
    if key in hub.repos:
        send_json(request, {"url": f"{hub.url}/{name}"}, 409)
        return
    hub.repos[key] = {"private": wanted.get("visibility") == "private", "files": {}, "sha": "0" * 40}
    send_json(request, {"url": f"{hub.url}/{'datasets/' if key[0] == 'dataset' else ''}{name}"})


def about(
    request: BaseHTTPRequestHandler, hub: Hub, kind: str, name: str, rest: list[str], body: bytes, signed_in: bool
) -> None:
    repo = hub.repos.get((kind, name))
    if repo is None or (repo["private"] and not signed_in):
        send_json(request, {"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
    elif rest[:1] == ["preupload"]:
        send_json(request, {"files": [upload_mode(repo, file["path"]) for file in json.loads(body)["files"]]})
    elif rest[:1] == ["auth-check"]:
        send_json(request, {}) if not repo.get("gated") else send_gated(request)
    elif rest[:1] == ["commit"]:
        commit(request, hub, repo, body, f"{hub.url}/{'datasets/' if kind == 'dataset' else ''}{name}")
    elif rest[:1] == ["tree"]:
        send_json(request, [{"type": "file", "path": p, "size": len(c), "oid": "0"} for p, c in repo["files"].items()])
    elif rest[:1] == ["revision"] and rest[1] not in ("main", repo["sha"]):
        send_json(request, {"error": "no such revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
    else:
        siblings = [{"rfilename": path} for path in repo["files"]]
        about_it = {"id": name, "sha": repo["sha"], "private": repo["private"], "siblings": siblings, "tags": []}
        send_json(request, {**about_it, "downloads": 0, "likes": 0})


def upload_mode(repo: dict[str, Any], path: str) -> dict[str, Any]:
    """Large or regular; and the hash of what the repo has there, by which a client sees what has not changed."""
    large, content = path.endswith((".parquet", ".safetensors")), repo["files"].get(path)
    oid = None
    if content is not None:
        oid = (hashlib.sha256(content) if large else hashlib.sha1(b"blob %d\0" % len(content) + content)).hexdigest()
    return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}


def offer_uploads(request: BaseHTTPRequestHandler, hub: Hub, wanted: dict[str, Any]) -> None:
    """Where to put the large files that are not here yet."""
    objects = []
    for item in wanted["objects"]:
        upload = {"actions": {"upload": {"href": f"{hub.url}/blobs/{item['oid']}"}}}
        objects.append({**item, "authenticated": True, **({} if item["oid"] in hub.blobs else upload)})
    send_json(request, {"transfer": "basic", "objects": objects})


def take_blob(request: BaseHTTPRequestHandler, hub: Hub, oid: str, content: bytes) -> None:
    code = hub.blob_failures.pop(0) if hub.blob_failures else 0
    if code == 0:
        assert hashlib.sha256(content).hexdigest() == oid
        hub.blobs[oid] = content
    send_json(request, {}, code or 200)


def commit(request: BaseHTTPRequestHandler, hub: Hub, repo: dict[str, Any], body: bytes, url: str) -> None:
    if hub.failures:
        send_json(request, {"error": "not now"}, hub.failures.pop(0))
        return
    lines = [json.loads(line) for line in body.splitlines()]
    if hub.together is not None and hub.together.wait(60) == 0:
        hub.together = None
    with hub.lock:
        if lines[0]["value"].get("parentCommit") not in (None, repo["sha"]):
            send_json(request, {"error": "A commit has happened since. Please refresh and try again."}, 412)
            return
        for line in lines:
            path = line["value"].get("path")
            if line["key"] == "file":
                repo["files"][path] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                repo["files"][path] = hub.blobs[line["value"]["oid"]]
            elif line["key"] == "deletedFile":
                del repo["files"][path]
        repo["sha"] = hashlib.sha1(repo["sha"].encode() + body).hexdigest()
        sha = repo["sha"]
    send_json(request, {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}"})


def download(request: BaseHTTPRequestHandler, hub: Hub, path: str, signed_in: bool) -> None:
    kind, path = ("dataset", path.removeprefix("datasets/")) if path.startswith("datasets/") else ("model", path)
    owner, name, _, _, *file = path.split("/")
    repo = hub.repos.get((kind, f"{owner}/{name}"))
    if repo is None or (repo["private"] and not signed_in):
        send_json(request, {}, 404, {"X-Error-Code": "RepoNotFound"})
    elif repo.get("gated"):
        send_gated(request)
    elif "/".join(file) not in repo["files"]:
        send_json(request, {}, 404, {"X-Error-Code": "EntryNotFound"})
    else:
        content = repo["files"]["/".join(file)]
        etag = hashlib.sha1(content).hexdigest()
        send(request, content, 200, {"ETag": f'"{etag}"', "X-Repo-Commit": repo["sha"]})


def send_gated(request: BaseHTTPRequestHandler) -> None:
    send_json(request, {"error": "Access to this repo is restricted"}, 403, {"X-Error-Code": "GatedRepo"})


def send_json(
    request: BaseHTTPRequestHandler, value: Any, code: int = 200, headers: dict[str, str] | None = None
) -> None:
    send(request, json.dumps(value).encode(), code, {"Content-Type": "application/json", **(headers or {})})


def send(request: BaseHTTPRequestHandler, content: bytes, code: int, headers: dict[str, str]) -> None:
    request.send_response(code)
    for name, value in {**headers, "Content-Length": str(len(content))}.items():
        request.send_header(name, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(content)
