"""One request's life: a request with its body is answered on its stream.

The same for every HTTP version: what differs is behind `Stream`.
"""

from __future__ import annotations

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

App: TypeAlias = Callable[[Request, Buffer, Callable[[], bool]], Awaitable[Reply]]


class Stream(Protocol):
    """Where the answer to one request goes."""

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

    def is_gone(self) -> bool:
        """Whether the peer has gone."""


async def exchange(app: App, request: Request, body: Buffer, stream: Stream) -> None:
    """Have `app` answer the request, and send what it answers."""
    reply = await app(request, body, stream.is_gone)
    chunks = reply.body
    stream_id = request.stream_id
    if isinstance(chunks, bytes):
        headers = sent_headers(int(time.time()), reply.headers)
        stream.send(Response(stream_id, reply.status, headers, chunks))
        if stream.stalled:
            await stream.drain()
        return
    async with aclosing(chunks):
        try:
            headers = sent_headers(int(time.time()), reply.headers)
            stream.send(Response(stream_id, reply.status, headers))
            async for chunk in chunks:
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
