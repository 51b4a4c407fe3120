"""An OpenAI-compatible endpoint of our own that rates the word RESPONSE's rest by its number of words."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """Rates a response by its number of words, and misbehaves as the response says."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.busy = 0
        self.delay = 0.0
        """Seconds until an answer."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        self.server.keys.append(self.headers["Authorization"])
        time.sleep(self.server.delay)
        text = body["messages"][0]["content"].partition("RESPONSE ")[2]
        if self.path != "/v1/chat/completions":
            self.reply(404, "")
        elif self.server.busy > 0:
            self.server.busy -= 1
            self.reply(503, "")
        elif "too long" in text:
            self.reply(400, "maximum context length exceeded")
        elif "secret" in text:
            self.reply(401, "")
        elif "mumble" in text:
            self.reply(200, "It is rather good, I would say 7 of 10.")
        else:
            self.reply(200, f"The scale ends at [[10]]. I give [[{len(text.split())}.5]]")

    def reply(self, status: int, content: str) -> None:
        self.send_response(status)
        self.end_headers()
        answer = {"choices": [{"message": {"content": content}}]}
        self.wfile.write((json.dumps(answer) if status == 200 else content).encode())

    def log_message(self, *args: Any) -> None:
        pass


@contextlib.contextmanager
def judging() -> Iterator[Server]:
    """The endpoint, serving in a thread."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
