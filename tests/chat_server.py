"""An OpenAI-compatible endpoint on the loopback interface that answers, and errs, as a test says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class ChatServer(ThreadingHTTPServer):
    """answer(body) -> the text of a response. faults: what happens to the next requests instead, in this order:

    an HTTP code; "drop", the connection is closed; "garbage", an answer that is not JSON; "empty", one without
    choices. refuse(body) -> what is wrong with it (HTTP 400), or None. key: the one that is asked for.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, answer: Callable[[dict[str, Any]], str] = lambda body: "Yes."):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.refuse: Callable[[dict[str, Any]], str | None] = lambda body: None
        self.faults: list[int | str] = []
        self.finish_reason: str | None = "stop"
        self.key: str | None = None
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_a_time = 0
        self.lock = threading.Lock()
        self._now = 0
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def come_and_go(self, step: int) -> None:
        with self.lock:
            self._now += step
            self.most_at_a_time = max(self.most_at_a_time, self._now)

    def next_fault(self) -> int | str | None:
        with self.lock:
            return self.faults.pop(0) if self.faults else None

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_GET(self) -> None:
        self.reply(self.denied() or 200, {"data": [{"id": "big"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        server.come_and_go(1)
        server.requests.append(body)
        server.headers.append(dict(self.headers))
        fault = self.denied() or server.next_fault()
        message = {"role": "assistant", "content": None}
        if fault == "drop":
            server.come_and_go(-1)
            self.connection.close()
        elif fault == "garbage":
            self.reply(200, "<html>busy</html>")
        elif fault == "empty":
            self.reply(200, {"choices": []})
        elif isinstance(fault, int):
            self.reply(fault, {"error": "not now"})
        elif wrong := server.refuse(body):
            self.reply(400, {"error": wrong})
        else:
            message["content"] = server.answer(body)
            self.reply(200, {"choices": [{"message": message, "finish_reason": server.finish_reason}]})

    def denied(self) -> int | None:
        wanted = self.server.key
        return 401 if wanted and self.headers["Authorization"] != f"Bearer {wanted}" else None

    def reply(self, status: int, answer: dict[str, Any] | str) -> None:
        if self.command == "POST":
            self.server.come_and_go(-1)  # now: who has the answer may ask again before we are back
        content = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass
