"""One request's life: a request with its body is answered on its stream.

The same for every HTTP version: what differs is behind `Stream`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from email.utils import formatdate
from functools import lru_cache
from typing import Protocol, TypeAlias

from kserve_lite.errors import InferenceFault
from kserve_lite.rest.replies import Reply
from kserve_lite.wire.events import (
    Buffer,
    Data,
    EndOfMessage,
    Outgoing,
    RawHeaders,
    Request,
    Response,
)

log = logging.getLogger("kserve_lite")

App: TypeAlias = Callable[[Request, Buffer, Callable[[], bool]], Awaitable[Reply]]


class Stream(Protocol):
    """Where the answer to one request goes."""

    def send(self, *events: Outgoing) -> None:
        """Write events; never blocks, never raises for a lost connection."""

    async def drain(self) -> None:
        """Wait until the peer has read enough for more to be written."""

    def abort(self) -> None:
        """Cut the stream, so that the peer sees that the answer is incomplete."""

    def is_gone(self) -> bool:
        """Whether the peer has gone."""


async def exchange(app: App, request: Request, body: Buffer, stream: Stream) -> None:
    """Have `app` answer the request, and send what it answers."""
    reply = await app(request, body, stream.is_gone)
    if isinstance(reply.body, (bytes, bytearray, memoryview)):
        stream.send(*events_of(reply, request.stream_id))
        await stream.drain()
        return
    stream_id = request.stream_id
    async with aclosing(reply.body) as chunks:
        try:
            stream.send(
                Response(stream_id, reply.status, (*standing_headers(), *reply.headers))
            )
            async for chunk in chunks:
                stream.send(Data(stream_id, chunk))
                await stream.drain()
        except InferenceFault:
            # Logged where it was raised; the status is sent already.
            stream.abort()
            return
    stream.send(EndOfMessage(stream_id))


def events_of(reply: Reply, stream_id: int) -> tuple[Outgoing, Outgoing, Outgoing]:
    """The events of an answer whose body is complete."""
    body = reply.body
    if not isinstance(body, (bytes, bytearray, memoryview)):
        raise TypeError("only an answer with a complete body is events")
    length = (b"content-length", b"%d" % len(body))
    headers = (*standing_headers(), *reply.headers, length)
    return (
        Response(stream_id, reply.status, headers),
        Data(stream_id, body),
        EndOfMessage(stream_id),
    )


_SERVER = (b"server", b"kserve-lite")


def standing_headers() -> RawHeaders:
    """Date (RFC 9110 section 6.6.1) and server."""
    return _standing_headers(int(time.time()))


@lru_cache(maxsize=1)
def _standing_headers(second: int) -> RawHeaders:
    return (b"date", formatdate(second, usegmt=True).encode("ascii")), _SERVER
