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
import math
import socket
from collections.abc import Callable

from kserve_lite.counters import NOW, Board, State
from kserve_lite.metrics import CONNECTIONS

log = logging.getLogger("kserve_lite")

# Seconds that siblings are given: several times what waking takes.
PATIENCE = 0.001

# How many connections it may have more than a sibling before it waits: short ones come
# and go, and waiting for each would slow them down.
SLACK = 2

# Connections taken at once, at most, when none has come in that time: twice as many
# each further time, so that a sibling that is blocked costs the others little.
BATCH = 16

# Seconds to wait where the process, or the machine, has too many open files.
FULL = 0.5

_KEY = (NOW, CONNECTIONS.name)


class Share:
    """How many connections this process and its siblings have.

    board, index: of all processes, and of this one's sheet there.
    """

    def __init__(self, board: Board, index: int) -> None:
        own = board.sheets[index]
        self._words, self._at = own.words, own.row(*_KEY)
        self._siblings = [s for s in board.sheets if s is not own]

    @property
    def own(self) -> int:
        return self._words[self._at]

    @property
    def fewest(self) -> float:
        """What the sibling has that has fewest; infinite where none accepts any."""
        fewest = math.inf
        for sheet in self._siblings:
            if sheet.state in (State.SERVING, State.READY):
                at = sheet.find(_KEY)
                if at is not None:
                    fewest = min(fewest, sheet.words[at])
        return fewest


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
        self._batch = 1
        self._fewest = math.inf
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
        fewest = self._share.fewest
        # Those that begin are not counted yet.
        if self._share.own + len(self._tasks) > fewest + SLACK:
            self._fewest = fewest
            self._wait(PATIENCE)
        else:
            self._batch = 1
            self._take()

    def _after_waiting(self) -> None:
        self._waiting = None
        self._loop.add_reader(self._sock.fileno(), self._on_readable)
        is_idle = self._share.fewest == self._fewest
        self._batch = min(2 * self._batch, BATCH) if is_idle else 1
        self._take()

    def _take(self) -> None:
        try:
            take(self._sock, self._make, self._batch, self._tasks)
        except OSError as error:
            log.error("no connection can be accepted: %s", error.strerror)
            self._wait(FULL)

    def _wait(self, seconds: float) -> None:
        # The loop would tell of what waits again and again.
        self._loop.remove_reader(self._sock.fileno())
        self._waiting = self._loop.call_later(seconds, self._after_waiting)


def take(
    sock: socket.socket,
    make: Callable[[], asyncio.BaseProtocol],
    most: int,
    tasks: set[asyncio.Task[object]],
) -> None:
    """Accept what waits at a socket, so many at most. tasks: those that go on.

    Raises OSError where there are too many open files.
    """
    loop = asyncio.get_running_loop()
    for _ in range(most):
        try:
            connection, _peer = sock.accept()
        except BlockingIOError:  # none waits
            return
        except ConnectionError:  # it was reset meanwhile
            continue
        connection.setblocking(False)
        task = loop.create_task(_begin(loop, make, connection))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


async def _begin(
    loop: asyncio.AbstractEventLoop,
    make: Callable[[], asyncio.BaseProtocol],
    connection: socket.socket,
) -> None:
    try:
        await loop.connect_accepted_socket(make, connection)
    except OSError:  # reset before it began
        connection.close()
