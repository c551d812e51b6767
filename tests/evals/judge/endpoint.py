"""An OpenAI-compatible server on loopback that misbehaves as told."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], bytes] | str


def completion(text: str | None, top: dict[str, float] | None = None) -> bytes:
    """The JSON of a chat completion; top: {token: ln p} of the first token."""
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if top is not None:
        listed = [{"token": token, "logprob": p, "bytes": None} for token, p in top.items()]
        choice["logprobs"] = {"content": [{"token": text, "logprob": 0.0, "top_logprobs": listed}]}
    return json.dumps({"object": "chat.completion", "choices": [choice]}).encode()


def good(text: str | None, top: dict[str, float] | None = None) -> Reply:
    return 200, {}, completion(text, top)


class Endpoint:
    """`answer(number, body)` says what the request of that number (from 0) gets: (status, headers, body), or "reset"
    (cut before an answer), "half" (cut in the middle of one) and "silence" (nothing until the client gives up)."""

    def __init__(self, answer: Callable[[int, dict[str, Any]], Reply]):
        self.requests: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.at_once = self.most_at_once = 0
        lock, endpoint = threading.Lock(), self
        self.closing = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(endpoint.requests)
                    endpoint.requests.append((dict(self.headers), {"path": self.path, **body}))
                    endpoint.at_once += 1
                    endpoint.most_at_once = max(endpoint.most_at_once, endpoint.at_once)
                try:
                    self.reply(answer(number, body))
                finally:
                    with lock:
                        endpoint.at_once -= 1

            def reply(self, reply: Reply) -> None:
                if reply == "silence":
                    endpoint.closing.wait(20)
                if isinstance(reply, str) and reply != "half":
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return
                status, headers, body = good("x" * 1000) if reply == "half" else reply
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if reply == "half" else body)
                if reply == "half":
                    self.wfile.flush()
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self) -> Endpoint:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
