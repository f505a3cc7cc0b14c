"""A raw HTTP/1.1 client on a non-blocking socket, for tests inside an event loop.

It sends exactly what it is told, reads answers strictly, and can do what real clients
do badly: not read, close half, reset.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import struct
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import TracebackType
from typing import Any, NamedTuple

import anyio
import pytest
from anyio.abc import TaskStatus

from kserve_lite import Model, Server, serve

PATIENCE = 20.0


class Answer(NamedTuple):
    """An answer as it came. `complete`: it ended as HTTP says."""

    status: int
    headers: dict[str, str]
    body: bytes
    complete: bool = True

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """One connection. Use it as an async context manager.

    port: of the server, or a socket that is connected to it already.
    """

    def __init__(self, port: int | socket.socket, *, receive_buffer: int = 0) -> None:
        self._port = port
        self._sock = port if isinstance(port, socket.socket) else socket.socket()
        self._sock.setblocking(False)
        if receive_buffer:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._data = bytearray()

    async def __aenter__(self) -> Client:
        loop = asyncio.get_running_loop()
        if self._sock is self._port:
            return self
        try:
            await loop.sock_connect(self._sock, ("127.0.0.1", self._port))
        except BaseException:
            self.close()
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._sock.close()

    def reset(self) -> None:
        """Close with RST instead of FIN."""
        linger = struct.pack("ii", 1, 0)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._sock.close()

    def half_close(self) -> None:
        self._sock.shutdown(socket.SHUT_WR)

    async def send(self, data: bytes) -> None:
        with anyio.fail_after(PATIENCE):
            await asyncio.get_running_loop().sock_sendall(self._sock, data)

    async def _read(self) -> bool:
        """Read some; False at the end."""
        with anyio.fail_after(PATIENCE):
            loop = asyncio.get_running_loop()
            data = await loop.sock_recv(self._sock, 1 << 16)
        self._data += data
        return bool(data)

    async def _until(self, separator: bytes) -> bytes:
        while separator not in self._data:
            if not await self._read():
                raise EOFError(bytes(self._data))
        found, _, self._data = self._data.partition(separator)
        return bytes(found)

    async def _exactly(self, count: int) -> bytes:
        while len(self._data) < count:
            if not await self._read():
                raise EOFError(bytes(self._data))
        found = bytes(self._data[:count])
        del self._data[:count]
        return found

    async def head(self) -> Answer:
        """Read the head of an answer; its body is empty."""
        line, *fields = (await self._until(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        assert line.startswith("HTTP/1.1 ")
        headers: dict[str, str] = {}
        for field in fields:
            name, _, value = field.partition(":")
            assert name not in headers, f"{name} came twice"
            headers[name] = value.strip()
        return Answer(int(line.split()[1]), headers, b"")

    async def chunk(self) -> bytes:
        """Read one chunk of a chunked body; empty: the last one."""
        size = int(await self._until(b"\r\n"), 16)
        data = await self._exactly(size)
        assert await self._exactly(2) == b"\r\n"
        return data

    async def answer(self, *, no_body: bool = False) -> Answer:
        """Read an answer; `no_body` for the answer to HEAD."""
        head = await self.head()
        if no_body or head.status < 200:
            return head
        body = b""
        try:
            if "content-length" in head.headers:
                body = await self._exactly(int(head.headers["content-length"]))
            elif "transfer-encoding" in head.headers:
                assert head.headers["transfer-encoding"] == "chunked"
                while piece := await self.chunk():
                    body += piece
            else:
                assert head.headers.get("connection") == "close"
                body = await self.rest()
        except (EOFError, ConnectionResetError):
            return head._replace(body=body, complete=False)
        return head._replace(body=body)

    async def ask(self, data: bytes) -> Answer:
        await self.send(data)
        return await self.answer()

    async def rest(self) -> bytes:
        """Read until the server closes; return what came."""
        while await self._read():
            pass
        found = bytes(self._data)
        self._data.clear()
        return found

    async def rest_or_reset(self) -> bytes:
        """Read until the server closes or cuts the connection; return what came."""
        try:
            return await self.rest()
        except ConnectionResetError:
            return bytes(self._data)


def get(path: str, *headers: str) -> bytes:
    lines = (f"GET {path} HTTP/1.1", "Host: test", *headers, "", "")
    return "\r\n".join(lines).encode()


LIVE = get("/v2/health/live")


def post(
    body: bytes = b'{"instances":[]}', *headers: str, path: str = "/v1/models/m:predict"
) -> bytes:
    lines = (f"POST {path} HTTP/1.1", "Host: test", f"Content-Length: {len(body)}")
    return "\r\n".join((*lines, *headers, "", "")).encode() + body


def predict(value: Any, *headers: str) -> bytes:
    """A V1 prediction of one instance."""
    return post(json.dumps({"instances": [value]}).encode(), *headers)


def model_of(function: Callable[..., Any], name: str = "m") -> Model:
    return Model(name, predict=function)


@asynccontextmanager
async def serving(
    function: Callable[..., Any] | Model, **settings: Any
) -> AsyncGenerator[Server]:
    """Serve a predict handler, or a model, on a free loopback port."""
    model = function if isinstance(function, Model) else model_of(function)
    async with serve(model, http_port=0, host="127.0.0.1", **settings) as server:
        yield server


@asynccontextmanager
async def in_background(server: Server) -> AsyncGenerator[anyio.Event]:
    """Run a server in a task of its own; gives the event that it has ended."""
    ended = anyio.Event()

    async def live(*, task_status: TaskStatus[None]) -> None:
        async with server:
            task_status.started()
            await server.wait_stopped()
        ended.set()

    async with anyio.create_task_group() as tasks:
        await tasks.start(live)
        yield ended
        server.stop()


async def echo(payload: Any) -> Any:
    return payload


async def still_serves(server: Server) -> None:
    """A connection of its own gets an answer."""
    async with Client(server.port) as client:
        answer = await client.ask(LIVE)
    assert (answer.status, answer.json) == (200, {"live": True})


async def until(condition: Callable[[], object]) -> None:
    """Wait for a state of the server that nothing announces."""
    with anyio.fail_after(PATIENCE):
        while not condition():  # noqa: ASYNC110
            await anyio.sleep(0.005)


@contextmanager
def nothing_unhandled(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail if an exception reaches the loop's handler or a line the log at ERROR."""
    unhandled: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: unhandled.append(context))
    try:
        yield
    finally:
        loop.set_exception_handler(before)
    assert unhandled == []
    assert [r for r in caplog.records if r.levelno >= logging.ERROR] == []
