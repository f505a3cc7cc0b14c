"""Accepts connections, knows the open ones, and lets them finish."""

from __future__ import annotations

import asyncio
import socket
import ssl
from contextlib import suppress

import anyio

from kserve_lite import metrics
from kserve_lite.counters import Board, Sheet
from kserve_lite.records import Record
from kserve_lite.transports.accepting import Acceptor, Share, take
from kserve_lite.transports.connection import Connection
from kserve_lite.transports.exchange import App, Ended, Refuses, Rpc
from kserve_lite.transports.newcomer import Newcomer
from kserve_lite.transports.timeouts import (
    BACKLOG,
    CANCEL_AGAIN,
    READ_SIZE,
    TURNS_OF_ACCEPTING,
    ConnectionLimits,
)
from kserve_lite.wire.limits import WireLimits


class Listener:
    """Serves `app`, and `rpc` where there is one, on sockets that listen already.

    refuses: is asked as a body begins to come that did not come with its head; where it
        says so, none of it is kept, and `app` gets None.
    ended: is told of every request when it is over, those among them that no `app` saw.
    sheet: where connections and bytes are counted.
    """

    def __init__(
        self,
        app: App,
        *,
        refuses: Refuses,
        rpc: Rpc | None = None,
        ended: Ended | None = None,
        sheet: Sheet | None = None,
        tls: ssl.SSLContext | None = None,
        limits: ConnectionLimits | None = None,
        wire_limits: WireLimits | None = None,
    ) -> None:
        self.app = app
        self.rpc = rpc
        self.refuses = refuses
        self.ended: Ended = ended or _nothing
        self.tls = tls
        self.limits = limits or ConnectionLimits()
        self.wire_limits = wire_limits or WireLimits()
        self.draining = False
        # One read buffer serves all connections: the selector loops and uvloop read
        # into it and report at once, before any other connection is looked at.
        self.scratch = memoryview(bytearray(READ_SIZE))
        sheet = sheet or Board().sheets[0]
        self.received = self.sent = 0  # bytes, since they were last counted
        self._received = metrics.RECEIVED.on(sheet)
        self._sent = metrics.SENT.on(sheet)
        sheet.writers.append(self._count)
        self._accepted = metrics.ACCEPTED.on(sheet)
        self._open = metrics.CONNECTIONS.on(sheet)
        self._connections: set[Connection] = set()
        self._servers: list[asyncio.Server | Acceptor] = []
        self._sockets: list[socket.socket] = []
        self._beginning: set[asyncio.Task[object]] = set()
        self.closed = False  # every connection is to go
        self._emptied: anyio.Event | None = None

    async def listen(
        self, sockets: list[socket.socket], share: Share | None = None
    ) -> None:
        """Accept connections of these sockets, which the listener now owns.

        share: where other processes accept from them too.
        """
        loop = asyncio.get_running_loop()
        for sock in sockets:
            self._sockets.append(sock)
            if share is not None:
                self._servers.append(Acceptor(sock, self._newcomer, share))
            else:
                # It would have the kernel hold 100 connections, not `BACKLOG`.
                server = await loop.create_server(
                    self._newcomer, sock=sock, backlog=BACKLOG
                )
                self._servers.append(server)

    def _count(self) -> None:
        self._received.add(self.received)
        self._sent.add(self.sent)
        self.received = self.sent = 0

    def _newcomer(self) -> Newcomer:
        return Newcomer(self)

    async def connect(self, sock: socket.socket) -> None:
        """Serve one connection that is open already: an end of a socket pair."""
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(self._newcomer, sock)

    def admit(self, connection: Connection) -> bool:
        """Take a new connection in; False: it must go, there are too many.

        Or it was accepted just before the end, and would outlive it.
        """
        self._connections.add(connection)
        self._accepted.add()
        self._open.set(len(self._connections))
        fits = len(self._connections) <= self.limits.max_connections
        return fits and not self.closed

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
        self._open.set(len(self._connections))
        if not self._connections and self._emptied is not None:
            self._emptied.set()

    @property
    def in_flight(self) -> int:
        """How many requests are being answered."""
        return sum(connection.answering for connection in self._connections)

    async def drain(self) -> None:
        """Accept nothing more; return when every connection has finished.

        Those that wait to be accepted are served: closing the socket resets them, and
        their clients may have sent a request already.
        """
        self.draining = True
        await self._accept_the_last()
        for connection in list(self._connections):
            connection.finish()
        if self._connections:
            self._emptied = anyio.Event()
            await self._emptied.wait()

    async def _accept_the_last(self) -> None:
        if not self._servers:
            return
        for sock in self._sockets:
            with suppress(OSError):  # too many open files: those that wait are lost
                take(sock, self._newcomer, BACKLOG, self._beginning)
        self._close_sockets()
        if self._beginning:
            await asyncio.wait(self._beginning)
        for _ in range(TURNS_OF_ACCEPTING):
            await asyncio.sleep(0)

    def _close_sockets(self) -> None:
        for server in self._servers:
            server.close()
        self._servers.clear()
        self._sockets.clear()

    async def abort(self) -> None:
        """Accept nothing more and cut every connection."""
        self.draining = self.closed = True
        self._close_sockets()
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


def _nothing(_: Record) -> None:
    """Nobody wants to know."""
