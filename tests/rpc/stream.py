"""A `CallStream` in memory, what a client would make of the answer, and a model."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterable
from typing import Any, NamedTuple
from urllib.parse import unquote

import anyio
import numpy as np

from kserve_lite.codecs.proto import message_class
from kserve_lite.dispatch.dataplane import DataPlane
from kserve_lite.dispatch.repository import Repository
from kserve_lite.dispatch.settings import DispatchSettings
from kserve_lite.model import Model
from kserve_lite.records import Record
from kserve_lite.registry import Registry
from kserve_lite.rpc.app import Rpc
from kserve_lite.wire.events import (
    Data,
    EndOfMessage,
    Headers,
    Outgoing,
    Request,
    Response,
    Trailers,
    fields_of_ids,
)

LIMIT = 1_000_000
INFERENCE = "inference.GRPCInferenceService"


def proto(name: str, /, **fields: Any) -> Any:
    """A message by its full name, `inference.` being understood."""
    return message_class(name if "." in name else f"inference.{name}")(**fields)


def framed(*messages: Any) -> bytes:
    """Messages as they go over the wire, without compression."""
    body = b""
    for message in messages:
        data = message if isinstance(message, bytes) else message.SerializeToString()
        body += b"\0" + len(data).to_bytes(4, "big") + data
    return body


class MemoryStream:
    """The client's end is `feed`, `end` and `sent`."""

    def __init__(self, body: bytes | None = None, peer: str = "127.0.0.1") -> None:
        self.peer = peer
        self.sent: list[tuple[Outgoing, ...]] = []
        self.stalled = False
        self.gone = False
        self.drains = 0
        self.reads: list[tuple[int, bool]] = []
        self._body = bytearray(body or b"")
        self._ended = body is not None
        self._arrived = asyncio.Event()
        self._written = asyncio.Event()

    def feed(self, data: bytes) -> None:
        self._body += data
        self._arrived.set()

    def end(self) -> None:
        self._ended = True
        self._arrived.set()

    async def until_sent(self, count: int) -> None:
        while len(self.sent) < count:
            self._written.clear()
            await self._written.wait()

    # --- what a transport provides ---

    def send(self, *events: Outgoing) -> None:
        self.sent.append(events)
        self._written.set()

    async def drain(self) -> None:
        self.drains += 1
        await asyncio.sleep(0)

    async def read(self, size: int, *, may_wait: bool = False) -> bytes:
        self.reads.append((size, may_wait))
        while len(self._body) < size and not self._ended:
            self._arrived.clear()
            await self._arrived.wait()
        data = bytes(self._body[:size])
        del self._body[:size]
        return data

    def whole(self) -> None:
        return None

    def abort(self) -> None:
        raise AssertionError("a call never cuts its stream")

    def is_gone(self) -> bool:
        return self.gone


class Answer(NamedTuple):
    """An answer as a client reads it."""

    http: int
    head: dict[str, str]
    messages: list[bytes]
    trailers: dict[str, str]

    @property
    def code(self) -> int:
        return int(self.trailers["grpc-status"])

    @property
    def text(self) -> str:
        return unquote(self.trailers.get("grpc-message", ""), errors="strict")

    def read(self, name: str) -> Any:
        """The one message of the answer."""
        assert self.code == 0, self.text
        (message,) = self.messages
        return type(proto(name)).FromString(message)


def _spread(events: Iterable[Outgoing]) -> Iterable[Outgoing]:
    """Take an answer that is sent whole apart into head, body and trailers."""
    for event in events:
        if isinstance(event, Response) and event.body is not None:
            assert event.trailers is not None
            yield event._replace(body=None, trailers=None)
            yield Data(event.stream_id, event.body)
            yield Trailers(event.stream_id, event.trailers)
        else:
            yield event


def answer_in(sent: Iterable[tuple[Outgoing, ...]]) -> Answer:
    """Read an answer strictly: what a client may not get fails here."""
    events = [event for batch in sent for event in _spread(batch)]
    first, last = events[0], events[-1]
    assert isinstance(first, Response)
    assert first.body is None
    fields = (*first.headers, *fields_of_ids(first.ids))
    head = {name.decode(): value.decode("ascii") for name, value in fields}
    assert len(head) == len(fields)
    data = b""
    for event in events[1:-1]:
        assert isinstance(event, Data)
        data += bytes(event.data)
    if isinstance(last, EndOfMessage):
        assert not data
        return Answer(first.status, head, [], head)
    assert isinstance(last, Trailers)
    trailers = {name.decode(): value.decode("ascii") for name, value in last.headers}
    messages = []
    while data:
        assert data[0] == 0
        size = int.from_bytes(data[1:5], "big")
        assert len(data) >= 5 + size
        messages.append(data[5 : 5 + size])
        data = data[5 + size :]
    return Answer(first.status, head, messages, trailers)


def request_for(path: str, metadata: dict[str, str] | None = None) -> Request:
    headers = {
        "content-type": "application/grpc",
        "te": "trailers",
        "user-agent": "test/1",
    }
    raw = (headers | (metadata or {})).items()
    return Request(
        5, "POST", path, Headers(tuple((k.encode(), v.encode()) for k, v in raw))
    )


class App:
    """Models behind an `Rpc`, loaded, without a socket."""

    def __init__(self, *models: Model, **settings: Any) -> None:
        self.models = models
        self.dataplane = DataPlane(Registry(), DispatchSettings(**settings))
        self.repository = Repository(self.dataplane)
        self.rpc = Rpc(self.dataplane, self.repository, max_message_size=LIMIT)

    async def __aenter__(self) -> App:
        for model in self.models:
            model.freeze()
            self.dataplane.registry.add(model)
            await self.repository.load(model)
        return self

    async def __aexit__(self, *_: object) -> None:
        for model in self.models:
            await self.repository.unload(model)
        self.dataplane.close()

    async def answer(self, request: Request, stream: MemoryStream) -> None:
        _, method, target, headers, _ = request
        record = Record("2", method, target, headers, stream.peer, stream.is_gone)
        await self.rpc.answer(request, stream, record)

    async def call(
        self,
        method: str,
        *messages: Any,
        service: str = INFERENCE,
        metadata: dict[str, str] | None = None,
        body: bytes | None = None,
        peer: str = "127.0.0.1",
    ) -> Answer:
        """Call a method with a whole request body; return the answer."""
        stream = MemoryStream(framed(*messages) if body is None else body, peer)
        request = request_for(f"/{service}/{method}", metadata)
        with anyio.fail_after(20):
            await self.answer(request, stream)
        return answer_in(stream.sent)


def binary(value: bytes) -> str:
    """A `-bin` metadata value."""
    return base64.b64encode(value).rstrip(b"=").decode()


def asking(
    values: tuple[float, ...] = (1, 2), model_name: str = "m", **fields: Any
) -> Any:
    """A request of one tensor, `x`, with the id 1."""
    request = proto("ModelInferRequest", model_name=model_name, id="1", **fields)
    tensor = request.inputs.add(name="x", datatype="FP32", shape=[len(values)])
    tensor.contents.fp32_contents.extend(values)
    return request


def doubling(**fields: Any) -> Model:
    """A model `m` that doubles what it gets."""
    model = Model("m", **fields)

    @model.predict
    async def predict(x: np.ndarray) -> np.ndarray:
        return x * 2

    return model
