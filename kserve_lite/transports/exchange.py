"""One request's life: a request with its body is answered on its stream.

The same for every HTTP version: what differs is behind `Stream`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from email.utils import formatdate
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol, TypeAlias, cast

from kserve_lite.errors import InferenceFault
from kserve_lite.records import Record
from kserve_lite.rest.replies import Reply
from kserve_lite.wire.events import (
    Buffer,
    Data,
    EndOfMessage,
    Outgoing,
    RawHeaders,
    Request,
    Response,
    make,
)

if TYPE_CHECKING:
    from kserve_lite.rpc.call import CallStream
    from kserve_lite.transports.http2_stream import Http2Stream

log = logging.getLogger("kserve_lite")

# Given a request and its body: None where it was refused as it began.
App: TypeAlias = Callable[[Request, Buffer | None, Record], Awaitable[Reply]]
# Whether a request is refused, whatever the body that is still to come.
Refuses: TypeAlias = Callable[[Request], bool]
# Told of every request when it is over, answered or not.
Ended: TypeAlias = Callable[[Record], None]


class Stream(Protocol):
    """Where the answer to one request goes."""

    @property
    def http(self) -> str:
        """The version, "1.1" or "2"."""

    @property
    def peer(self) -> str:
        """The host that the connection comes from; empty where it is not known."""

    def is_gone(self) -> bool:
        """Whether the peer has gone, or is about to."""

    def send(self, *events: Outgoing) -> None:
        """Write events; never blocks, never raises for a lost connection."""

    @property
    def stalled(self) -> bool:
        """Whether the peer reads too little for more to be written."""

    async def drain(self) -> None:
        """Wait until the peer has read enough for more to be written.

        Waits one turn of the event loop at least: a generator that awaits nothing would
        otherwise hold up every connection, and never learn that its peer has gone.
        """

    def abort(self) -> None:
        """Cut the stream, so that the peer sees that the answer is incomplete."""

    @property
    def lost(self) -> bool:
        """Whether nobody can be answered any more."""

    def end(self, complete: bool) -> None:
        """The exchange is over; `complete`: the whole answer has been sent."""


# gRPC calls read and write their messages by themselves, on HTTP/2 only.
Rpc: TypeAlias = "Callable[[Request, CallStream, Record], Awaitable[None]]"


async def exchange(
    app: App, request: Request, body: Buffer | None, stream: Stream, ended: Ended
) -> None:
    """Have `app` answer the request, send what it answers, and end the stream.

    Run it as a task of its own: a request then has context variables of its own.
    """
    complete = False
    stream_id, method, target, asked, _ = request
    record = Record(stream.http, method, target, asked, stream.peer, stream.is_gone)
    try:
        # The peer may have gone between the making of the task and its first step.
        if not stream.lost:
            reply = await app(request, body, record)
            status, own, content = reply
            record.code = status
            headers = sent_headers(int(time.time()), own)
            if isinstance(content, _BUFFERS):
                record.sent = len(content) if method != "HEAD" else 0
                whole = stream_id, status, headers, content, None, record.ids
                stream.send(make(Response, whole))
                if stream.stalled:
                    await stream.drain()
            elif isinstance(content, list):
                _send_pieces(content, stream_id, status, headers, stream, record)
                if stream.stalled:
                    await stream.drain()
            else:
                head = Response(stream_id, status, headers, ids=record.ids)
                stream.send(head)
                await _send_chunks(content, stream_id, stream, record)
            complete = True
        else:
            record.code = CLIENT_GONE
    except BaseException as error:  # noqa: BLE001 - the boundary, see there
        _give_up(stream, record, error)
    stream.end(complete)
    ended(record)


async def call(rpc: Rpc, request: Request, stream: Http2Stream, ended: Ended) -> None:
    """Have `rpc` run a gRPC call, and end the stream."""
    complete = False
    record = record_of(request, stream)
    record.protocol = "grpc"
    try:
        if not stream.lost:
            await rpc(request, stream, record)
            complete = True
        else:
            record.code = "CANCELLED"
    except BaseException as error:  # noqa: BLE001 - the boundary, see there
        _give_up(stream, record, error)
    stream.end(complete)
    ended(record)


def record_of(request: Request, stream: Stream) -> Record:
    """What is known of a request as it begins."""
    _, method, target, headers, _ = request
    return Record(stream.http, method, target, headers, stream.peer, stream.is_gone)


def send_refusal(reply: Reply, request: Request, stream: Stream, ended: Ended) -> None:
    """Send what the transport itself answers to a request that it refuses."""
    record = record_of(request, stream)
    headers = sent_headers(int(time.time()), reply.headers)
    body = cast("bytes", reply.body)
    record.code, record.sent = reply.status, len(body)
    stream.send(Response(request[0], reply.status, headers, body, ids=record.ids))
    ended(record)


def cut(request: Request, stream: Stream, ended: Ended) -> None:
    """Tell of a request that was given up before all of it had come."""
    record = record_of(request, stream)
    record.code = CLIENT_GONE
    ended(record)


_BUFFERS = (bytes, bytearray, memoryview)

# The client has gone before there was an answer, for which this is nginx's code, or the
# grace period of a stop was over.
CLIENT_GONE = 499


def _give_up(stream: Stream, record: Record, error: BaseException) -> None:
    """The boundary: what goes wrong with one request never harms its siblings."""
    if isinstance(error, KeyboardInterrupt):
        raise error
    if not record.code:
        was_cancelled = isinstance(error, asyncio.CancelledError)
        if record.protocol == "grpc":
            record.code = "CANCELLED" if was_cancelled else "INTERNAL"
        else:
            record.code = CLIENT_GONE if was_cancelled else 500
    # Cancelled by the connection: its peer is gone or may be, or the server stops. What
    # is written already is still sent; a stream ends without its end.
    if not isinstance(error, asyncio.CancelledError):
        log.error("a request failed: a bug in kserve-lite", exc_info=error)
        stream.abort()


def _send_pieces(  # noqa: PLR0917 - one call, of what `exchange` has at hand
    pieces: list[Buffer],
    stream_id: int,
    status: int,
    headers: RawHeaders,
    stream: Stream,
    record: Record,
) -> None:
    """Send a body of several buffers as it stands: large tensors are not joined."""
    record.sent = sum(map(len, pieces))
    length = (b"content-length", b"%d" % record.sent)
    stream.send(
        Response(stream_id, status, (*headers, length), ids=record.ids),
        *(Data(stream_id, piece) for piece in pieces),
        EndOfMessage(stream_id),
    )


async def _send_chunks(
    chunks: AsyncGenerator[bytes, None],
    stream_id: int,
    stream: Stream,
    record: Record,
) -> None:
    async with aclosing(chunks):
        try:
            async for chunk in chunks:
                record.sent += len(chunk)
                stream.send(Data(stream_id, chunk))
                await stream.drain()
        except InferenceFault:
            # Logged where it was raised; the status is sent already.
            stream.abort()
            return
    stream.send(EndOfMessage(stream_id))


_SERVER = (b"server", b"kserve-lite")


@lru_cache(maxsize=64)
def sent_headers(second: int, own: RawHeaders) -> RawHeaders:
    """Date (RFC 9110 section 6.6.1) of a second, server, and the reply's own headers.

    The same object for the same second and headers: the wire remembers what it encoded.
    """
    date = (b"date", formatdate(second, usegmt=True).encode("ascii"))
    return (date, _SERVER, *own)
