"""What a supervisor and its worker say to each other: objects of JSON, a line each.

A worker says:
* hello: its event loop runs. beat: it still does.
* loaded: may it accept connections? ready (banner): all its models are, and it accepts.
* failed (reason): it ends, and why, in one line.
* stopped (drained, aborted): it has finished what was in flight.
* ask (id, verb, name): it was asked to have all workers load or unload a model.
* begins: to obey an order, which may take its time. done (id, fault): it has obeyed.
* unloads (within): it has begun to unload its models, before it ends; in seconds.

A supervisor says:
* accept (unloaded, loaded): accept connections, without models of the first names
  and, where the program brings models on demand, with those of the second.
* stop (at_once): finish what is in flight, or do not.
* order (id, verb, name): load or unload a model.
* answer (id, fault): all have obeyed what this worker had asked for.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeAlias, cast

from kserve_lite.errors import InferenceFault, Kind

Message: TypeAlias = dict[str, Any]
# What an `InferenceFault` is on the way: its kind's name and its reason.
Fault: TypeAlias = list[str]


# Characters of a reason that are told; a load may fail with a whole tensor in words.
LONGEST = 4096
# Seconds that the other side has to read what is said when no event loop runs.
PATIENCE = 1.0


def line_of(kind: str, **fields: Any) -> bytes:
    return json.dumps({"kind": kind, **fields}).encode() + b"\n"


def fault_of(error: InferenceFault) -> Fault:
    return [error.kind.name, error.reason]


def error_of(fault: Fault) -> InferenceFault:
    """The error that another process has met."""
    error = InferenceFault(fault[1])
    error.kind = Kind[fault[0]]
    return error


class Channel(asyncio.Protocol):
    """One end of it. take: is told what the other says; lost: that it has gone."""

    def __init__(
        self, take: Callable[[Message], None], lost: Callable[[], None]
    ) -> None:
        self._take = take
        self._lost = lost
        self._data = b""
        self._transport: asyncio.Transport | None = None

    async def open(self, sock: socket.socket) -> None:
        """Speak over a connected socket, which the channel now owns."""
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: self, sock=sock)

    def say(self, kind: str, **fields: Any) -> None:
        if self._transport is not None:
            self._transport.write(line_of(kind, **fields))

    def beat(self) -> None:
        """Say that the event loop runs, unless what was said before is still unread."""
        transport = self._transport
        if transport is not None and not transport.get_write_buffer_size():
            transport.write(line_of("beat"))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    # --- called by the event loop -----------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        *lines, self._data = (self._data + data).split(b"\n")
        for line in lines:
            self._take(json.loads(line))

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._lost()


def say_once(sock: socket.socket, kind: str, **fields: Any) -> None:
    """Say something where no event loop runs."""
    # The event loop's copy has made it non-blocking, which both have in common: without
    # a timeout, what does not fit into the socket's buffer would be lost.
    sock.settimeout(PATIENCE)
    with suppress(OSError):  # nobody is there, or listens
        sock.sendall(line_of(kind, **fields))
