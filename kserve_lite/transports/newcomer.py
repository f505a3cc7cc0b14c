"""A connection whose HTTP version is not known yet: its first bytes tell.

A client that speaks HTTP/2 begins with its preface (RFC 9113 section 3.4), in clear
text, where it knows by itself that we do, as under TLS, where ALPN has told it.
`Upgrade: h2c` is ignored, as section 3.1 allows.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import TypeVar, cast

from kserve_lite.transports.connection import Connection
from kserve_lite.transports.http1 import Http1
from kserve_lite.transports.http2 import Http2
from kserve_lite.transports.timeouts import LAST_REQUEST, LINGER
from kserve_lite.wire.http2 import PREFACE

Known = TypeVar("Known", bound=Connection)


class Newcomer(Connection):
    """From accept, through a TLS handshake if there is one, to the first bytes."""

    _first = b""
    _handshake: asyncio.Task[None] | None = None
    _tls: ssl.SSLContext | None = None  # until the handshake begins

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if not self._listener.admit(self):
            if self._listener.crowded or self._listener.closed or self._listener.tls:
                self._transport.abort()
            else:
                self._become(Http1).refuse(503, "The server has too many connections.")
            return
        self._tls = self._listener.tls
        limits = self._listener.limits
        allowed = limits.head_timeout if self._tls else limits.timeout_keep_alive
        self._set_deadline(self._loop.time() + self._at_most(allowed))

    def _at_most(self, seconds: float) -> float:
        """How long to wait for the first request, also when a stop has begun."""
        return min(seconds, LAST_REQUEST) if self._listener.draining else seconds

    def finish(self) -> None:
        # What the peer has sent may be on its way.
        self._set_deadline(min(self._deadline, self._loop.time() + LAST_REQUEST))

    async def _shake_hands(self, context: ssl.SSLContext, hello: bytes) -> None:
        """Begin TLS with the bytes that have come already.

        Reading cannot be paused before any came: uvloop begins to read after
        `connection_made()` whatever that has said, and `start_tls()` would miss them.
        """
        # Runs when `start_tls()` has set the protocol and before that begins.
        self._loop.call_soon(self._hand_over, hello)
        encrypted: asyncio.Transport | None = None
        try:
            encrypted = await self._loop.start_tls(
                self._transport,
                self,
                context,
                server_side=True,
                ssl_handshake_timeout=self._listener.limits.head_timeout,
                ssl_shutdown_timeout=LINGER,
            )
        except (OSError, asyncio.CancelledError):  # the peer's, or it is no TLS at all
            self._transport.abort()
        finally:
            self._handshake = None
        if self.lost:
            return
        if encrypted is None or encrypted.is_closing():
            # The loop tells of a loss only those that had a connection.
            self.connection_lost(None)
            return
        self.beneath, self._transport = self._transport, encrypted
        if self._first:  # it came with the end of the handshake
            self._look()

    def _hand_over(self, data: bytes) -> None:
        successor = cast("asyncio.BufferedProtocol", self._transport.get_protocol())
        while data and successor is not self:
            buffer = memoryview(successor.get_buffer(len(data)))
            size = min(len(data), len(buffer))
            buffer[:size] = data[:size]
            successor.buffer_updated(size)
            data = data[size:]

    def buffer_updated(self, nbytes: int) -> None:
        self._first += bytes(self._listener.scratch[:nbytes])
        if self._tls is not None:
            self._transport.pause_reading()
            hello, self._first = self._first, b""
            self._set_deadline(
                self._loop.time()
                + self._at_most(self._listener.limits.timeout_keep_alive)
            )
            # It is counted already: the bound on connections is one on handshakes.
            self._handshake = self._loop.create_task(
                self._shake_hands(self._tls, hello)
            )
            self._tls = None
        elif self._handshake is None:
            self._look()

    def _look(self) -> None:
        first = self._first
        if first.startswith(PREFACE):
            self._become(Http2).begin(first)
        elif not PREFACE.startswith(first):
            self._become(Http1).begin(first)
        else:
            limit = self._listener.limits.head_timeout
            self._set_deadline(min(self._deadline, self._loop.time() + limit))

    def cancel(self) -> None:
        if self._handshake is not None:
            self._loop.call_soon(self._handshake.cancel)

    def _become(self, kind: type[Known]) -> Known:
        if self._timer is not None:
            self._timer.cancel()
        successor = kind(self._listener)
        self._listener.replace(self, successor)
        successor.beneath = self.beneath
        successor.connection_made(self._transport)
        self._transport.set_protocol(successor)
        if self._listener.draining:  # when it has seen the first bytes
            self._loop.call_soon(successor.finish)
        return successor
