"""Accepts connections, knows the open ones, and lets them finish."""

from __future__ import annotations

import asyncio
import socket
import ssl

import anyio

from kserve_lite.transports.connection import Connection
from kserve_lite.transports.exchange import App, Rpc
from kserve_lite.transports.newcomer import Newcomer
from kserve_lite.transports.timeouts import (
    CANCEL_AGAIN,
    READ_SIZE,
    ConnectionLimits,
)
from kserve_lite.wire.limits import WireLimits


class Listener:
    """Serves `app`, and `rpc` where there is one, on sockets that listen already."""

    def __init__(
        self,
        app: App,
        *,
        rpc: Rpc | None = None,
        tls: ssl.SSLContext | None = None,
        limits: ConnectionLimits | None = None,
        wire_limits: WireLimits | None = None,
    ) -> None:
        self.app = app
        self.rpc = rpc
        self.tls = tls
        self.limits = limits or ConnectionLimits()
        self.wire_limits = wire_limits or WireLimits()
        self.draining = False
        # One read buffer serves all connections: the selector loops and uvloop read
        # into it and report at once, before any other connection is looked at.
        self.scratch = memoryview(bytearray(READ_SIZE))
        self._connections: set[Connection] = set()
        self._servers: list[asyncio.Server] = []
        self._emptied: anyio.Event | None = None

    async def listen(self, sockets: list[socket.socket]) -> None:
        """Accept connections of these sockets, which the listener now owns."""
        loop = asyncio.get_running_loop()
        for sock in sockets:
            self._servers.append(
                await loop.create_server(lambda: Newcomer(self), sock=sock)
            )

    def admit(self, connection: Connection) -> bool:
        """Take a new connection in; False: it must go, there are too many.

        Or it was accepted just before a stop, and would outlive it.
        """
        self._connections.add(connection)
        fits = len(self._connections) <= self.limits.max_connections
        return fits and not self.draining

    @property
    def crowded(self) -> bool:
        """Whether even telling a connection that there are too many is too much."""
        return len(self._connections) > 2 * self.limits.max_connections

    def replace(self, connection: Connection, successor: Connection) -> None:
        """The version of a connection is known now."""
        self._connections.discard(connection)
        self._connections.add(successor)

    def forget(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if not self._connections and self._emptied is not None:
            self._emptied.set()

    @property
    def in_flight(self) -> int:
        """How many requests are being answered."""
        return sum(connection.answering for connection in self._connections)

    async def drain(self) -> None:
        """Accept nothing more; return when every connection has finished."""
        self.draining = True
        for server in self._servers:
            server.close()
        for connection in list(self._connections):
            connection.finish()
        if self._connections:
            self._emptied = anyio.Event()
            await self._emptied.wait()

    async def abort(self) -> None:
        """Accept nothing more and cut every connection."""
        self.draining = True
        for server in self._servers:
            server.close()
        for connection in list(self._connections):
            connection.abort()
        # Transports report the loss in the loop's next turns. A handler may need its
        # time to clean up; one that goes on in spite of it is cancelled again.
        self._emptied = anyio.Event()
        while self._connections:
            with anyio.move_on_after(CANCEL_AGAIN):
                await self._emptied.wait()
            for connection in list(self._connections):
                connection.cancel()
