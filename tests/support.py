"""What several test files need: a server in a thread, and raw HTTP over a socket."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import anyio
import h11

from kserve_lite import Model, Server, serve


class ServerThread:
    """A real server on a free loopback port, its event loop in a thread."""

    def __init__(self, *models: Model, **settings: Any) -> None:
        self._models = models
        self._settings = {"host": "127.0.0.1", "http_port": 0} | settings
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="test-server")
        self._loop: Any = None
        self.server: Server

    @property
    def port(self) -> int:
        return self.server.port

    @property
    def url(self) -> str:
        return self.server.url

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self.server.stop)
        self._thread.join()

    def make(self) -> Server:
        return serve(*self._models, **self._settings)

    def _run(self) -> None:
        try:
            anyio.run(self._serve, backend_options={"use_uvloop": True})
        except BaseException as error:  # handed to the thread that waits
            self._failure = error
        finally:
            self._started.set()

    async def _serve(self) -> None:
        import asyncio

        self._loop = asyncio.get_running_loop()
        self.server = self.make()
        async with self.server:
            self._started.set()
            await self.server.wait_stopped()


class RawAnswer(NamedTuple):
    """An answer as a strict client read it. `complete`: it ended as HTTP says."""

    status: int
    headers: dict[str, str]
    body: bytes
    complete: bool

    @property
    def chunked(self) -> bool:
        return "transfer-encoding" in self.headers


def exchange(port: int, request: bytes, method: str = "POST") -> RawAnswer:
    """Send bytes on a connection of their own; return the first final answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(request)
        client = h11.Connection(h11.CLIENT)
        # Only so that h11 knows what it reads the answer to.
        client.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
        client.send(h11.EndOfMessage())
        status, body = 0, b""
        headers: dict[str, str] = {}
        while True:
            try:
                event = client.next_event()
            except h11.RemoteProtocolError:
                return RawAnswer(status, headers, body, complete=False)
            if event is h11.NEED_DATA:
                client.receive_data(connection.recv(1 << 16))
            elif isinstance(event, h11.Response):
                status = event.status_code
                headers = {n.decode(): v.decode("latin-1") for n, v in event.headers}
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed)):
                complete = isinstance(event, h11.EndOfMessage)
                return RawAnswer(status, headers, body, complete)


@contextmanager
def running(*command: str, cwd: Path) -> Iterator[str]:
    """Run a serving command on a free loopback port; yield its URL; it must exit 0."""
    root = Path(__file__).parent.parent
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--http_port", "0"],
        cwd=cwd,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    try:
        yield banner_url(process)
    finally:
        process.terminate()
        assert process.stderr is not None
        process.stderr.read()
        process.stderr.close()
        assert process.wait() == 0


def banner_url(process: subprocess.Popen[str]) -> str:
    """Read a serving process's standard error up to its banner; return its URL."""
    seen = ""
    while process.stderr is not None and (line := process.stderr.readline()):
        seen += line
        found = re.search(r" serves .* on (https?://\S+)", line)
        if found:
            # The banner ends with the line to paste.
            while "curl" not in process.stderr.readline():
                pass
            return found[1]
    raise AssertionError(f"the server ended before its banner:\n{seen}")
