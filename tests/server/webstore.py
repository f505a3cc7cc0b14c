"""A web server with files, on loopback: with ranges, and with faults on demand."""

from __future__ import annotations

import hashlib
import ssl
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class WebStore:
    """Serves `files`, by path.

    Of each answer no more than `most` bytes are sent before the connection is cut, if
    that is set. `ranges`: whether Range is known. `length`: whether sizes are told.
    `headers` are added. `statuses` are answered instead, one a request, in order;
    `moved` leads elsewhere. `asked` has what came: path and range. `sending` is called
    before each piece of `PIECE` bytes.
    """

    PIECE = 64 * 1024

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.most: int | None = None
        self.ranges = True
        self.etag = True
        self.length = True
        self.headers: dict[str, str] = {}
        self.statuses: list[int] = []
        self.moved: dict[str, str] = {}
        self.asked: list[tuple[str, str]] = []
        self.seen: list[dict[str, str]] = []
        self.sending: Callable[[], object] = lambda: None
        store = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                store.answer(self)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False  # they are waited for
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.scheme = "http"

    def secure(self, certificate: str, key: str) -> Self:
        """Serve https."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self._server.socket = context.wrap_socket(
            self._server.socket, server_side=True, do_handshake_on_connect=False
        )
        self.scheme = "https"
        return self

    def __enter__(self) -> Self:
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), name="web-store"
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def url(self, path: str) -> str:
        return f"{self.scheme}://127.0.0.1:{self._server.server_port}{path}"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path, _, _ = handler.path.partition("?")
        wanted = handler.headers.get("Range", "")
        self.asked.append((path, wanted))
        self.seen.append({k.lower(): v for k, v in handler.headers.items()})
        if self.statuses:
            handler.send_error(self.statuses.pop(0))
            return
        if path in self.moved:
            handler.send_response(302)
            handler.send_header("Location", self.moved[path])
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        content = self.files.get(path)
        if content is None:
            handler.send_error(404)
            return
        etag = f'"{hashlib.md5(content).hexdigest()}"'
        start = 0
        is_same = handler.headers.get("If-Range", etag) == etag
        if wanted and self.ranges and is_same:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if start >= len(content) > 0:
            handler.send_error(416)
            return
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header(
                "Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}"
            )
        if self.length:
            handler.send_header("Content-Length", str(len(content) - start))
        if self.etag:
            handler.send_header("ETag", etag)
        for name, value in self.headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        end = len(content) if self.most is None else start + self.most
        body = memoryview(content)[start:end]
        for index in range(0, len(body), self.PIECE):
            self.sending()
            handler.wfile.write(body[index : index + self.PIECE])
            handler.wfile.flush()
        handler.close_connection = True
