"""An OpenAI-compatible server on 127.0.0.1 that fails as it is told; for tests."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-test-0123456789-very-secret"


class Server(ThreadingHTTPServer):
    """Answers prompt P with "answer to P"; `script` fails requests, by what they ask.

    script: for a prompt, what to do with its first, second, .. request: a status or (status,
    headers), "drop" the connection, "garbage" instead of JSON, "length" for a cut answer, "null"
    for no text, "slow" for one that lasts as long as the server. always: what to do with every
    other request. asked: prompts in the order in which they came; bodies, paths, keys: of the
    requests. most: requests under way at once, at most.
    """

    daemon_threads = True

    def __init__(self, script: dict[str, list[Any]] | None = None, always: Any = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script = {key: list(value) for key, value in (script or {}).items()}
        self.always = always
        self.lock = threading.Lock()
        self.over = threading.Event()
        self.asked: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.keys: list[str | None] = []
        self.now = self.most = 0  # requests under way

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that was dropped on purpose is no error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        is_chat = self.path.endswith("/chat/completions")
        prompt = body["messages"][-1]["content"] if is_chat else body["prompt"]
        with server.lock:
            server.asked.append(prompt)
            server.bodies.append(body)
            server.paths.append(self.path)
            server.keys.append(self.headers.get("Authorization"))
            server.now += 1
            server.most = max(server.most, server.now)
            steps = server.script.get(prompt) or []
            step = steps.pop(0) if steps else server.always
        try:
            self._do(step, prompt, is_chat)
        finally:
            with server.lock:
                server.now -= 1

    def _do(self, step: Any, prompt: str, is_chat: bool) -> None:
        if step == "drop":
            self.close_connection = True
            self.connection.close()
            return
        if step == "slow":
            self.server.over.wait(600)
        if step == "garbage":
            self._send(200, b"<html>busy</html>")
            return
        if isinstance(step, (int, tuple)):
            status, headers = step if isinstance(step, tuple) else (step, {})
            said = json.dumps({"error": f"no, {self.headers.get('Authorization')}"}).encode()
            self._send(status, said, headers)
            return
        text: str | None = None if step == "null" else f"answer to {prompt}"
        choice: dict[str, Any] = {"finish_reason": "length" if step == "length" else "stop"}
        choice |= {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
        usage = {"completion_tokens": 3}
        self._send(200, json.dumps({"choices": [choice], "usage": usage}).encode())

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving(script: dict[str, list[Any]] | None = None, always: Any = None) -> Iterator[Server]:
    """A server that runs in a thread."""
    server = Server(script, always)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
