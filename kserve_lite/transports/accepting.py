"""Accepts connections of a socket that sibling processes accept from as well.

Whoever is woken first would take all that wait: of 64 connections that come at once,
uvloop's own way gives one of two processes up to 63, and a kept connection stays where
it is. Here a process takes one at a time, and one that has more than a sibling gives
the siblings a moment to come first. A sibling that does not is busy, blocked or dead,
and its connections are taken after all: they wait in one queue for all, so that no
process takes any along when it ends.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

from kserve_lite.counters import NOW, Board, State
from kserve_lite.metrics import CONNECTIONS

log = logging.getLogger("kserve_lite")

# Seconds that siblings are given: several times what waking takes.
PATIENCE = 0.002

# Connections taken at once when no sibling has come in that time, so that a blocked
# one costs the others little.
BATCH = 8

# Seconds to wait where the process, or the machine, has too many open files.
FULL = 0.5

_KEY = (NOW, CONNECTIONS.name)


class Share:
    """Whether this process has more connections than a sibling.

    board, index: of all processes, and of this one's sheet there.
    """

    def __init__(self, board: Board, index: int) -> None:
        own = board.sheets[index]
        self._words, self._at = own.words, own.row(*_KEY)
        self._siblings = [s for s in board.sheets if s is not own]

    def exceeds(self, further: int) -> bool:
        """Whether a sibling that accepts connections has fewer.

        further: connections of this process that are not counted on the board yet.
        """
        number = self._words[self._at] + further
        for sheet in self._siblings:
            if sheet.state in (State.SERVING, State.READY):
                at = sheet.find(_KEY)
                if at is not None and sheet.words[at] < number:
                    return True
        return False


class Acceptor:
    """Accepts from one socket, which it owns, for `make`'s protocols."""

    def __init__(
        self,
        sock: socket.socket,
        make: Callable[[], asyncio.BaseProtocol],
        share: Share,
    ) -> None:
        self._sock = sock
        self._make = make
        self._share = share
        self._loop = asyncio.get_running_loop()
        self._waiting: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[object]] = set()
        self._loop.add_reader(sock.fileno(), self._on_readable)

    def close(self) -> None:
        """Accept nothing more."""
        if self._waiting is not None:
            self._waiting.cancel()
        else:
            self._loop.remove_reader(self._sock.fileno())
        self._sock.close()

    def _on_readable(self) -> None:
        if self._share.exceeds(len(self._tasks)):
            self._wait(PATIENCE)
        elif not take(self._sock, self._make, 1, self._tasks):
            self._wait(FULL)

    def _wait(self, seconds: float) -> None:
        # The loop would tell of what waits again and again.
        self._loop.remove_reader(self._sock.fileno())
        self._waiting = self._loop.call_later(seconds, self._after_waiting)

    def _after_waiting(self) -> None:
        self._waiting = None
        self._loop.add_reader(self._sock.fileno(), self._on_readable)
        if not take(self._sock, self._make, BATCH, self._tasks):
            self._wait(FULL)


def take(
    sock: socket.socket,
    make: Callable[[], asyncio.BaseProtocol],
    most: int,
    tasks: set[asyncio.Task[object]],
) -> bool:
    """Accept what waits at a socket, so many at most; False: no more are possible.

    tasks: those that go on.
    """
    loop = asyncio.get_running_loop()
    for _ in range(most):
        try:
            connection, _peer = sock.accept()
        except BlockingIOError:  # none waits
            return True
        except ConnectionError:  # it was reset meanwhile
            continue
        except OSError as error:
            log.error("no connection can be accepted: %s", error.strerror)
            return False
        connection.setblocking(False)
        task = loop.create_task(_begin(loop, make, connection))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    return True


async def _begin(
    loop: asyncio.AbstractEventLoop,
    make: Callable[[], asyncio.BaseProtocol],
    connection: socket.socket,
) -> None:
    try:
        await loop.connect_accepted_socket(make, connection)
    except OSError:  # reset before it began
        connection.close()
