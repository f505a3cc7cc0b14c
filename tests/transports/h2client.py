"""A raw HTTP/2 client on the `h2` package, for tests inside an event loop.

It reads strictly, since `h2` does, and can do what real clients do badly: open no
window, reset, stop in the middle of a frame. One task reads: waiting for one answer
takes note of all others. `fetch` asks the same of either HTTP version.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol

import anyio
import h2.config
import h2.connection
import h2.events
import h2.settings
from h2.settings import SettingCodes

from kserve_lite import InferRequest, InferResponse, Server
from kserve_lite.transports.http2 import Http2
from tests.rpc.stream import framed, proto
from tests.transports.client import Answer, Client, until

Field = tuple[str, str]

LIVE_PATH = "/v2/health/live"
PREDICT_PATH = "/v1/models/m:predict"
WIDE = 2**30
NEVER = 1000.0
PING, GOAWAY = 6, 7
GRPC = (("content-type", "application/grpc"), ("te", "trailers"))
SERVICE = "/inference.GRPCInferenceService"


def config() -> h2.config.H2Configuration:
    return h2.config.H2Configuration(client_side=True, header_encoding="latin-1")


def fields_of(method: str, path: str, *fields: Field) -> list[Field]:
    known = (":method", method), (":scheme", "http"), (":authority", "test")
    return [*known, (":path", path), *fields]


class Arriving:
    """An answer while it comes. `reset`: the error code that it was cut with."""

    def __init__(self) -> None:
        self.status = 0
        self.informed: list[int] = []
        self.headers: dict[str, str] = {}
        self.trailers: dict[str, str] = {}
        self.body = bytearray()
        self.ended = False
        self.reset: int | None = None

    @property
    def over(self) -> bool:
        return self.ended or self.reset is not None

    @property
    def answer(self) -> Answer:
        return Answer(self.status, self.headers, bytes(self.body), self.ended)


class H2Client(Client):
    """One connection. Use it as an async context manager.

    window: what each stream may send before it is asked for more (by default as much as
        it likes), and what the connection may.
    goaways: what the server said with them: (last stream, error code).
    held: streams that are given no more window; the connection's is opened all the same
        unless `holds_all`.
    """

    def __init__(
        self,
        port: int | socket.socket,
        *,
        receive_buffer: int = 0,
        window: int = WIDE,
        connection_window: int = WIDE,
    ) -> None:
        super().__init__(port, receive_buffer=receive_buffer)
        self.h2 = h2.connection.H2Connection(config())
        self.goaways: list[tuple[int, int]] = []
        self.held: set[int] = set()
        self.holds_all = False
        self.answers_pings = True
        self.acknowledged = False
        self.streams: dict[int, Arriving] = {}
        self._window = window
        self._connection_window = connection_window
        self._at_end = False

    async def __aenter__(self) -> H2Client:
        await super().__aenter__()
        self.h2.local_settings = h2.settings.Settings(
            client=True,
            initial_values={
                SettingCodes.ENABLE_PUSH: 0,
                SettingCodes.INITIAL_WINDOW_SIZE: self._window,
            },
        )
        self.h2.initiate_connection()
        more = self._connection_window - 65_535
        if more > 0:
            self.h2.increment_flow_control_window(more)
        await self.flush()
        return self

    async def flush(self) -> None:
        data = self.h2.data_to_send()
        if data:
            await self.send(data)

    # --- requests ---------------------------------------------------------------------

    async def begin(self, method: str, path: str, *fields: Field) -> int:
        """Send the head of a request whose body is to come; return its stream."""
        return await self._open(fields_of(method, path, *fields), end=False)

    async def ask_for(self, method: str, path: str, *fields: Field) -> int:
        """Send a request that has no body; return its stream."""
        return await self._open(fields_of(method, path, *fields), end=True)

    async def predict(
        self, value: Any, *fields: Field, path: str = PREDICT_PATH
    ) -> int:
        """Send a V1 prediction of one instance; return its stream."""
        body = json.dumps({"instances": [value]}).encode()
        return await self.post(body, *fields, path=path)

    async def post(
        self,
        body: bytes,
        *fields: Field,
        path: str = PREDICT_PATH,
        announced: bool = True,
    ) -> int:
        """Send a request with a body; return its stream."""
        length = (("content-length", str(len(body))),) if announced else ()
        stream_id = await self.begin("POST", path, *length, *fields)
        await self.body(stream_id, body)
        return stream_id

    async def _open(self, fields: list[Field], *, end: bool) -> int:
        stream_id = self.h2.get_next_available_stream_id()
        self.streams[stream_id] = Arriving()
        self.h2.send_headers(stream_id, fields, end_stream=end)
        await self.flush()
        return stream_id

    async def body(self, stream_id: int, data: bytes, *, end: bool = True) -> None:
        """Send a body, or a part of it, as the server's windows allow."""
        view = memoryview(data)
        while view and not self.streams[stream_id].over:
            room = self.h2.local_flow_control_window(stream_id)
            size = min(room, self.h2.max_outbound_frame_size, len(view))
            if size > 0:
                self.h2.send_data(stream_id, bytes(view[:size]))
                view = view[size:]
                await self.flush()
            elif not await self.turn():
                raise EOFError
        if end and not self.streams[stream_id].over:
            self.h2.end_stream(stream_id)
            await self.flush()

    async def cancel(self, stream_id: int) -> None:
        """Reset a stream."""
        self.h2.reset_stream(stream_id, 8)
        await self.flush()

    # --- answers ----------------------------------------------------------------------

    async def answer(  # type: ignore[override]
        self, stream_id: int
    ) -> Answer:
        """Read until the answer on a stream is complete, or was cut."""
        stream = self.streams[stream_id]
        await self.until(lambda: stream.over)
        return stream.answer

    async def until(self, condition: Callable[[], object]) -> None:
        """Read until something has come."""
        while not condition():
            if not await self.turn():
                raise EOFError

    async def fetch(
        self,
        method: str,
        path: str,
        *fields: Field,
        body: bytes | None = None,
        announced: bool = True,
    ) -> Answer:
        """Ask and read the answer."""
        if body is None:
            stream_id = await self.ask_for(method, path, *fields)
        else:
            length = (("content-length", str(len(body))),) if announced else ()
            stream_id = await self.begin(method, path, *length, *fields)
            await self.body(stream_id, body)
        return await self.answer(stream_id)

    async def live(self) -> int:
        return (await self.fetch("GET", LIVE_PATH)).status

    async def end(self) -> None:
        """Read until the server closes, then close."""
        while await self.turn():
            pass
        self.close()

    async def turn(self) -> bool:
        """Read some and take note of it; False at the end of the connection."""
        if self._at_end or not await self._read():
            self._at_end = True
            return False
        while len(self._data) >= 9:
            size = 9 + int.from_bytes(self._data[:3], "big")
            if len(self._data) < size:
                break
            frame = bytes(self._data[:size])
            del self._data[:size]
            self._take(frame)
        with suppress(BrokenPipeError, ConnectionResetError):  # seen by the next read
            await self.flush()
        return True

    def _take(self, frame: bytes) -> None:
        """`h2` believes that nothing may come after GOAWAY, and answers every PING."""
        kind = frame[3]
        if kind == GOAWAY:
            last, code = struct.unpack_from(">LL", frame, 9)
            self.goaways.append((last, code))
        elif kind != PING or self.answers_pings:
            for event in self.h2.receive_data(frame):
                self._note(event)

    def _note(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.InformationalResponseReceived():
                fields = dict(texts(event.headers))
                self._of(event).informed.append(int(fields[":status"]))
            case h2.events.ResponseReceived():
                stream = self._of(event)
                for name, value in texts(event.headers):
                    assert name not in stream.headers, f"{name} came twice"
                    stream.headers[name] = value
                stream.status = int(stream.headers.pop(":status"))
            case h2.events.DataReceived():
                self._of(event).body += event.data or b""
                self._open_window(event.stream_id or 0, event.flow_controlled_length)
            case h2.events.TrailersReceived():
                self._of(event).trailers = dict(texts(event.headers))
            case h2.events.StreamEnded():
                self._of(event).ended = True
            case h2.events.StreamReset():
                stream = self._of(event)
                # After a whole answer it says that the rest of a body is not wanted.
                if not stream.ended:
                    stream.reset = int(event.error_code or 0)
            case h2.events.SettingsAcknowledged():
                self.acknowledged = True
            case _:
                pass

    def _of(self, event: Any) -> Arriving:
        return self.streams[event.stream_id]

    def _open_window(self, stream_id: int, size: int | None) -> None:
        if not size or self.holds_all:
            return
        if stream_id in self.held:
            self.h2.increment_flow_control_window(size)
        else:
            self.h2.acknowledge_received_data(size, stream_id)


def texts(headers: Iterable[Any] | None) -> list[Field]:
    return [
        (n.decode() if isinstance(n, bytes) else n, v.decode("latin-1"))
        if isinstance(v, bytes)
        else (str(n), v)
        for n, v in headers or ()
    ]


class Http1Client(Client):
    """The same questions over HTTP/1.1."""

    async def fetch(
        self,
        method: str,
        path: str,
        *fields: Field,
        body: bytes | None = None,
        announced: bool = True,
    ) -> Answer:
        lines = [f"{method} {path} HTTP/1.1", "host: test"]
        lines += [f"{name}: {value}" for name, value in fields]
        data = body or b""
        if body is not None and announced:
            lines.append(f"content-length: {len(body)}")
        elif body is not None:
            lines.append("transfer-encoding: chunked")
            data = (
                b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
            )
        await self.send("\r\n".join((*lines, "", "")).encode() + data)
        return await self.answer(no_body=method == "HEAD")


class Asker(Protocol):
    """A connection of any HTTP version."""

    async def fetch(
        self,
        method: str,
        path: str,
        *fields: Field,
        body: bytes | None = None,
        announced: bool = True,
    ) -> Answer:
        """Ask and read the answer."""


@asynccontextmanager
async def connected(version: str, port: int) -> AsyncGenerator[Asker]:
    """A connection of an HTTP version, by its name."""
    client = Http1Client(port) if version == "http1" else H2Client(port)
    async with client:
        yield client


async def http2_of(server: Server) -> Http2:
    """The one HTTP/2 connection of the server, when its first bytes have come."""

    def found() -> list[Http2]:
        return [one for one in server._listener._connections if type(one) is Http2]

    await until(found)
    (connection,) = found()
    return connection


# --- what handlers and calls need -------------------------------------------------


class Waiting:
    """A handler that waits to be let go, and knows who came and who was cancelled."""

    def __init__(self) -> None:
        self.started: list[Any] = []
        self.cancelled: list[Any] = []
        self.go_on = anyio.Event()

    async def predict(self, payload: dict[str, Any]) -> Any:
        value = payload["instances"][0]
        if value == "quick":
            return payload
        self.started.append(value)
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled.append(value)
            raise
        return payload


async def any_request(payload: Any) -> Any:
    if isinstance(payload, InferRequest):
        return InferResponse(payload.inputs, id=payload.id)
    return {"predictions": payload["instances"]}


def inference(text: str = "") -> bytes:
    """A framed request of a gRPC call for the model `m`."""
    return framed(proto("ModelInferRequest", model_name="m", id=text))


def read_message(stream: Arriving) -> Any:
    """Take one message off what came on a stream of ModelStreamInfer."""
    size = int.from_bytes(stream.body[1:5], "big")
    data = bytes(stream.body[5 : 5 + size])
    del stream.body[: 5 + size]
    return type(proto("ModelStreamInferResponse")).FromString(data)
