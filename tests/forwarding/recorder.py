"""A predictor that says what it is told to say: HTTP/1.1, one answer after the other.

It writes down what it is asked, on which connection, and when a client has gone.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, TypeAlias


class Asked(NamedTuple):
    """A request. connection: the client's port."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    connection: int


class Reply(NamedTuple):
    """An answer. hangs_up: the connection is closed behind it, unannounced."""

    status: int = 200
    body: bytes = b'{"predictions":[1]}'
    headers: dict[str, str] = {}  # noqa: RUF012 - never changed
    hangs_up: bool = False


def refusal(status: int, text: str, **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, json.dumps({"error": text}).encode(), named)


# None: the connection is closed without an answer.
Answering: TypeAlias = Callable[[Asked], Reply | None]


class Recorder:
    """answer: what to answer; `asked`: what came so far."""

    def __init__(self, server: ThreadingHTTPServer) -> None:
        self.asked: list[Asked] = []
        self.answer: Answering = lambda _: Reply()
        self.closed = threading.Event()  # a client has closed its connection
        self._server = server

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._server.server_address[1]}"

    def in_turn(self, *replies: Reply | None) -> None:
        """Answer so from now on, the last for good; forget what came."""
        self.asked.clear()
        self.answer = lambda _: replies[min(len(self.asked), len(replies)) - 1]


@contextmanager
def recorder() -> Iterator[Recorder]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            asked = Asked(
                self.command, self.path, headers, body, self.client_address[1]
            )
            kept.asked.append(asked)
            reply = kept.answer(asked)
            if reply is None:
                self.close_connection = True
                return
            self.send_response(reply.status)
            fields = {"content-length": str(len(reply.body)), **reply.headers}
            for name, value in fields.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(reply.body)
            self.close_connection = reply.hangs_up

        do_POST = do_GET = _answer  # noqa: N815 - http.server's names

        def finish(self) -> None:
            kept.closed.set()
            super().finish()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    kept = Recorder(server)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield kept
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
