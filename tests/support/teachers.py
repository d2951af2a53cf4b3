"""A teacher in this process that misbehaves as it is told to."""

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], bytes]
HANG = 30.0


def answer(content: Any, *, finish: Any = "stop", **message: Any) -> bytes:
    """A chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}
    return json.dumps({"choices": [choice], "usage": {"completion_tokens": 7}}).encode()


class FakeTeacher:
    """``reply(body, number)`` says what comes of the request of this number: bytes, a status with bytes, or a callable
    that does what it likes with the handler.
    """

    def __init__(self, reply: Callable[[dict[str, Any], int], Any], models: Any = ("fake",)) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = 0
        self._at_once, self._lock = 0, threading.Lock()
        teacher = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                data = json.dumps({"data": [{"id": name} for name in models]}).encode()
                teacher.send(self, 200 if self.path == "/v1/models" else 404, data)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with teacher._lock:
                    number = len(teacher.asked)
                    teacher.asked.append(body)
                    teacher.headers.append(dict(self.headers))
                    teacher._at_once += 1
                    teacher.most_at_once = max(teacher.most_at_once, teacher._at_once)
                try:
                    found = reply(body, number)
                    if callable(found):
                        found(self)
                        self.close_connection = True
                    else:
                        status, data = (200, found) if isinstance(found, bytes) else found
                        teacher.send(self, status, data)
                finally:
                    with teacher._lock:
                        teacher._at_once -= 1

            def log_message(self, *of: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    @staticmethod
    def send(handler: BaseHTTPRequestHandler, status: int, data: bytes, **headers: str) -> None:
        with suppress(OSError):
            handler.send_response(status)
            for key, value in {"content-length": str(len(data)), **headers}.items():
                handler.send_header(key.replace("_", "-"), value)
            handler.end_headers()
            handler.wfile.write(data)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def hang(handler: BaseHTTPRequestHandler) -> None:
    """Says nothing until the other side has gone."""
    handler.connection.settimeout(HANG)
    with suppress(OSError):
        handler.connection.recv(1)


def drip(handler: BaseHTTPRequestHandler) -> None:
    """A header that never ends, a byte at a time."""
    with suppress(OSError):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nx-slow: ")
        end = time.monotonic() + HANG
        while time.monotonic() < end:
            handler.wfile.write(b"a")
            handler.wfile.flush()
            time.sleep(0.02)


def cut_off(handler: BaseHTTPRequestHandler) -> None:
    """Half of what it says it has."""
    data = answer("whole")
    FakeTeacher.send(handler, 200, data[: len(data) // 2], content_length=str(len(data)))


def endless(handler: BaseHTTPRequestHandler) -> None:
    """A body of more than anybody should read."""
    with suppress(OSError):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n")
        for _ in range(64):
            handler.wfile.write(b" " * (1 << 20))


def gone(handler: BaseHTTPRequestHandler) -> None:
    """No reply at all."""


def redirect(handler: BaseHTTPRequestHandler) -> None:
    """Elsewhere."""
    FakeTeacher.send(handler, 302, b"", location="http://127.0.0.1:9/steal")
