"""A connection whose HTTP version is not known yet: its first bytes tell.

A client that speaks HTTP/2 begins with its preface (RFC 9113 section 3.4), in clear
text, where it knows by itself that we do, as under TLS, where ALPN has told it.
`Upgrade: h2c` is ignored, as section 3.1 allows.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import TypeVar

from kserve_lite.transports.connection import Connection
from kserve_lite.transports.http1 import Http1
from kserve_lite.transports.http2 import Http2
from kserve_lite.transports.timeouts import LINGER
from kserve_lite.wire.http2 import PREFACE

Known = TypeVar("Known", bound=Connection)


class Newcomer(Connection):
    """From accept, through a TLS handshake if there is one, to the first bytes."""

    _first = b""
    _handshake: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if not self._listener.admit(self):
            if self._listener.crowded or self._listener.draining or self._listener.tls:
                self._transport.abort()
            else:
                self._become(Http1).refuse(503, "The server has too many connections.")
            return
        self._set_deadline(self._loop.time() + self._listener.limits.timeout_keep_alive)
        if self._listener.tls is not None:
            # Counted before it is shaken hands with: that is a bound on handshakes.
            self._transport.pause_reading()
            self._handshake = self._loop.create_task(
                self._shake_hands(self._listener.tls)
            )

    async def _shake_hands(self, context: ssl.SSLContext) -> None:
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
            self._listener.forget(self)
            return
        finally:
            self._handshake = None
        if encrypted is not None and not self.lost:
            self._transport = encrypted
            if self._first:  # it came with the end of the handshake
                self._look()

    def buffer_updated(self, nbytes: int) -> None:
        self._first += bytes(self._listener.scratch[:nbytes])
        if self._handshake is None:
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
        successor.connection_made(self._transport)
        self._transport.set_protocol(successor)
        return successor
