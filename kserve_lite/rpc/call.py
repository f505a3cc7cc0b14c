"""One gRPC call on a stream of our HTTP/2 engine.

`CallStream` is what a transport provides. `Call` is what the services see of a call;
the same object gives grpclib's `request_handler` what it knows as
`grpclib.protocol.Stream`, and so is the one place that depends on grpclib's inside.
Of a call that is not a well-formed unary one, grpclib checks the head and finds the
method, and it ends every call that fails with its status. Messages do not pass through
it, nor does the end of a unary call that succeeds. Measured for
ServerLive on a stream in memory: 16 us a call, and 46 us through grpclib's own
`recv_message`, `send_message` and trailers.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeAlias

from grpclib.const import Status
from grpclib.metadata import encode_metadata

from kserve_lite.errors import InvalidInput
from kserve_lite.messages import asked_deadline
from kserve_lite.records import Record
from kserve_lite.rpc.compression import ACCEPTED, inflate, too_long
from kserve_lite.wire.events import (
    ID_NAMES,
    Buffer,
    Data,
    EndOfMessage,
    Outgoing,
    RawHeaders,
    Request,
    Response,
    Trailers,
    make,
)

Message: TypeAlias = bytes | list[Buffer]
Idle: TypeAlias = Callable[[], AbstractContextManager[None]]


class CallStream(Protocol):
    """One HTTP/2 stream that carries a call."""

    def send(self, *events: Outgoing) -> None:
        """Write events; never blocks, never raises for a lost connection."""

    @property
    def stalled(self) -> bool:
        """Whether the peer reads too little for more to be written."""

    async def drain(self) -> None:
        """Wait until the peer has read enough for more to be written.

        Waits one turn of the event loop at least.
        """

    async def read(self, size: int, *, may_wait: bool = False) -> Buffer:
        """Return `size` bytes of the request's body; fewer only at its end.

        may_wait: the caller may take its time to send the first of these bytes.
        """

    def whole(self) -> Buffer | None:
        """The whole body, where all of it came at once and none has been read."""

    def abort(self) -> None:
        """Cut the stream, so that the peer sees that the answer is incomplete."""


# The gRPC specification's TimeoutValue: at most 8 digits.
_TIMEOUT = re.compile(r"([0-9]{1,8})([HMSmun])")
_SECONDS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}


# Constants, since the wire remembers how it encoded a tuple by its identity.
_TYPE = (b"content-type", b"application/grpc")
_ACCEPTS = (b"grpc-accept-encoding", ACCEPTED.encode())
HEAD: RawHeaders = (_TYPE, _ACCEPTS)
OK: RawHeaders = ((b"grpc-status", b"0"),)

# Pieces up to this length are copied behind their prefix, longer ones go by themselves.
_SMALL = 4096


class Call:
    """One call, from its head to its status.

    record: what is known of it; its code is set here.
    initial: metadata to be sent with the first message.
    fault: what the call has failed with, for grpclib to end it.
    """

    # grpclib resets a stream after an error status, so that a client stops sending;
    # our engine ends streams properly itself.
    closable = False

    __slots__ = (
        "_begun",
        "_ended",
        "_headers",
        "_id",
        "_limit",
        "_started",
        "_stream",
        "fault",
        "initial",
        "record",
        "wrapper",
    )

    def __init__(
        self, stream: CallStream, request: Request, limit: int, record: Record
    ) -> None:
        self.record = record
        self.initial: dict[str, str | bytes] | None = None
        self.wrapper: Any = None
        self.fault: Exception | None = None
        self._stream = stream
        self._id = request.stream_id
        self._headers = request.headers
        self._limit = limit
        self._started = time.monotonic()
        self._begun = self._ended = False

    def headers(self) -> Mapping[str, Any]:
        """The call's headers and metadata; the values of `-bin` names are bytes.

        Raises InvalidInput for a `-bin` value that is no base64.
        """
        headers = self._headers
        return _binary(headers, headers.binary) if headers.binary else headers

    def deadline(self) -> float | None:
        """When the caller stops waiting, by `time.monotonic()`; None: it does not.

        By grpc-timeout, or else by x-request-timeout-ms, as over REST. Raises
        InvalidInput where it is malformed.
        """
        text = self._headers.get("grpc-timeout")
        if text is None:
            return asked_deadline(self._headers)
        match = _TIMEOUT.fullmatch(text)
        if match is None:
            raise InvalidInput("grpc-timeout must be up to 8 digits and a unit.")
        return self._started + int(match[1]) * _SECONDS[match[2]]

    async def receive(self, idle: Idle | None = None) -> Buffer | None:
        """Return the next message, inflated; None where the caller sends no more.

        idle: in which to wait for a message to begin.
        Raises InvalidInput and GRPCError for what the peer does wrong.
        """
        if idle is None:
            whole = self._stream.whole()
            if whole is not None and self._is_one_message(whole):
                return whole[5:] if len(whole) <= _SMALL else memoryview(whole)[5:]
            prefix = await self._stream.read(5)
        else:
            with idle():
                prefix = await self._stream.read(5, may_wait=True)
        if not prefix:
            return None
        size = int.from_bytes(prefix[1:], "big")
        if len(prefix) < 5:
            raise InvalidInput("The call ended inside the prefix of a message.")
        flag = prefix[0]
        if flag > 1:
            raise InvalidInput("A message has an unknown flag in its prefix.")
        if size > self._limit:
            raise too_long(self._limit, size)
        body = await self._stream.read(size) if size else b""
        if len(body) < size:
            raise InvalidInput(
                f"The call ended inside a message: {len(body)} of {size} bytes came."
            )
        if flag:
            encoding = self._headers.get("grpc-encoding", "identity")
            return await inflate(body, encoding, self._limit)
        return body

    def _is_one_message(self, body: Buffer) -> bool:
        """Whether a body is one message, not compressed and not too long."""
        size = len(body) - 5
        return (
            0 <= size <= self._limit
            and body[0] == 0
            and int.from_bytes(body[1:5], "big") == size
        )

    async def send(self, message: Message) -> None:
        """Send one of several messages; the head goes with the first."""
        self._stream.send(*self._framed(message))
        await self._stream.drain()

    async def finish(self, message: Message) -> None:
        """Send the one message of an answer, and that all went well, in one piece."""
        self._ended = True
        stream = self._stream
        only = message if isinstance(message, bytes) else message[0]
        size = len(only)
        record = self.record
        record.code = "OK"
        if size <= _SMALL and (only is message or len(message) == 1):
            body = b"\0" + size.to_bytes(4, "big") + only
            record.sent = size + 5
            whole = self._id, 200, self._head(), body, OK, record.ids
            stream.send(make(Response, whole))
            return
        stream.send(*self._framed(message), Trailers(self._id, OK))
        if stream.stalled:
            await stream.drain()

    def _framed(self, message: Message) -> list[Outgoing]:
        """The events of a message, whose large pieces are not copied."""
        stream_id = self._id
        pieces = [message] if isinstance(message, bytes) else message
        size = sum(map(len, pieces))
        prefix = b"\0" + size.to_bytes(4, "big")
        self.record.sent += size + 5
        events: list[Outgoing] = []
        if not self._begun:
            self._begun = True
            ids = self.record.ids
            events.append(Response(stream_id, 200, self._head(), ids=ids))
        for piece in pieces:
            if prefix and len(piece) <= _SMALL:
                piece = prefix + piece
            elif prefix:
                events.append(Data(stream_id, prefix))
            prefix = b""
            events.append(Data(stream_id, piece))
        if prefix:
            events.append(Data(stream_id, prefix))
        return events

    def _head(self) -> RawHeaders:
        if not self.initial:
            return HEAD
        return HEAD + _encoded(encode_metadata(self.initial))

    # --- what grpclib's server uses of `grpclib.protocol.Stream` ---

    @property
    def connection(self) -> Call:
        return self

    @property
    def _transport(self) -> Call:
        return self

    def get_peer(self) -> Call:
        return self

    def is_closing(self) -> bool:
        """Whether grpclib has no status to send any more.

        Not whether the peer has gone: grpclib would swallow a call's cancellation.
        """
        return self._ended

    async def send_headers(
        self, headers: list[tuple[str, str]], end_stream: bool = False
    ) -> None:
        """Send the status: after messages as trailers, else as the whole answer."""
        self.record.code = _code_of(headers)
        own = [pair for pair in headers if pair[0] not in _HEAD_NAMES]
        if self._begun:
            trailers = OK if own == _OK else _encoded(own)
            self._stream.send(Trailers(self._id, trailers))
        else:
            said = [pair for pair in _encoded(own) if pair[0] not in ID_NAMES]
            status, ids = int(headers[0][1]), self.record.ids
            head = Response(self._id, status, (*HEAD, *said), ids=ids)
            self._stream.send(head, EndOfMessage(self._id))


_OK = [("grpc-status", "0")]
_HEAD_NAMES = (":status", "content-type")


def _code_of(headers: list[tuple[str, str]]) -> str:
    """The name of the status in trailers, or of the lack of one."""
    text = dict(headers).get("grpc-status", "2")
    return Status(int(text)).name


def _encoded(headers: Iterable[tuple[str, str]]) -> RawHeaders:
    return tuple((name.encode(), value.encode()) for name, value in headers)


def _binary(headers: Mapping[str, str], names: Sequence[str]) -> Mapping[str, Any]:
    """The headers with the values of `names` as bytes."""
    import base64
    import binascii
    from types import MappingProxyType

    read: dict[str, Any] = dict(headers)
    for name in names:
        # Repeated values may come joined by commas; the last counts, as elsewhere.
        text = headers[name].rpartition(",")[2].strip().rstrip("=")
        try:
            padded = text.encode("ascii") + b"=" * (-len(text) % 4)
            read[name] = base64.b64decode(padded, validate=True)
        except (UnicodeEncodeError, binascii.Error):
            raise InvalidInput("Metadata with a -bin name must be base64.") from None
    return MappingProxyType(read)
