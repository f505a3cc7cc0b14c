"""A worker as its supervisor sees it: a process, what it last said, how it ended.

Judges nothing but whether the process is alive and well; what follows from that is the
supervisor's business.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from time import monotonic
from typing import Any

from kserve_lite.counters import Board, Sheet, State
from kserve_lite.errors import StartupError
from kserve_lite.server.control import Channel, Fault, Message
from kserve_lite.server.sockets import Ports
from kserve_lite.server.worker import VARIABLE

log = logging.getLogger("kserve_lite")

# Seconds of silence after which the log tells that an event loop is blocked; a worker
# speaks four times a second.
SILENCE = 1.0

# Seconds that a process is given that has nothing left to do, or is to do nothing.
TO_EXIT = 3.0

_numbers = count()


def command() -> list[str]:
    """What starts this program once more; raises StartupError where nothing does."""
    arguments = sys.orig_argv[1:]
    is_there = sys.argv and sys.argv[0] not in ("", "-")
    if hasattr(sys, "ps1") or not is_there:
        raise StartupError(
            "--workers and --reload start this program again, and it has no file to be "
            "started from: write it to a file and run that, or use --workers 1"
        )
    return [sys.executable, *arguments]


class Child:
    """A worker process, from its start.

    told: is called with what it says, beyond what is kept here. board, index: with the
    sheet that it gets. waits: whether it is to accept connections only when it is told
    to. unloaded: names of models that it is not to load.
    """

    def __init__(
        self,
        told: Callable[[Child, Message], None],
        *,
        board: Board,
        index: int,
        ports: Ports,
        waits: bool,
        unloaded: tuple[str, ...],
    ) -> None:
        self.index = index
        self.waits = waits
        self.sheet: Sheet = board.sheets[index]
        # On behalf of the process, so that no sibling is ready before it is.
        self.sheet.state = State.STARTING if waits else State.SERVING
        self.ready = asyncio.Event()
        self.gone = asyncio.Event()
        self.failure = ""  # why it ends, in its own words or ours
        self.unloaded = unloaded
        self.report: tuple[int, int] | None = None  # drained and aborted requests
        self.orders: dict[int, asyncio.Future[Fault | None]] = {}
        self.takes_orders = not waits
        self.stopping = False
        self._told = told
        self._greeted = False
        self._loads = False
        self._is_warned = False
        self._ready_at = math.inf
        self._heard = monotonic()
        self._exit_by = math.inf
        self._channel = Channel(self._take, self._disconnected)
        self._connected = True
        ours, theirs = socket.socketpair()
        self._ours = ours
        try:
            self.process = _start(theirs, board, self, ports)
        finally:
            theirs.close()
        log.debug("started worker %d", self.pid)

    @property
    def pid(self) -> int:
        return self.process.pid

    async def listen(self) -> None:
        """Hear what it says."""
        await self._channel.open(self._ours)

    # --- what it is told ----------------------------------------------------------

    def stop(self, *, at_once: bool = False) -> None:
        """Have it finish what is in flight and exit."""
        self.stopping = True
        if self._greeted:
            self._channel.say("stop", at_once=at_once)
        else:  # it serves nobody, and may read what it is told only in an hour
            self.process.terminate()
        if at_once or not self._greeted:
            self._exit_within(TO_EXIT)

    def accept(self, unloaded: tuple[str, ...]) -> None:
        """Have it accept connections. unloaded: models that it must not have."""
        self.takes_orders = True
        self._channel.say("accept", unloaded=unloaded)

    def order(self, verb: str, name: str) -> asyncio.Future[Fault | None]:
        """Have it load or unload a model; what comes back says how that went."""
        number = next(_numbers)
        future = asyncio.get_running_loop().create_future()
        self.orders[number] = future
        self._channel.say("order", id=number, verb=verb, name=name)
        return future

    def answer(self, number: int, fault: Fault | None) -> None:
        self._channel.say("answer", id=number, fault=fault)

    def end(self) -> None:
        """End it here and now, and leave nothing of it."""
        self.process.kill()
        self.process.wait()
        self._end()

    # --- what it says -------------------------------------------------------------

    def _take(self, message: Message) -> None:
        self._heard = monotonic()
        self._is_warned = False
        match message["kind"]:
            case "beat":
                return
            case "hello":
                self._greeted = True
                if self.stopping:
                    self.stop()
            case "ready":
                self._ready_at = monotonic()
                self.ready.set()
            case "failed":
                self.failure = message["reason"]
                self._exit_within(TO_EXIT)
            case "stopped":
                self.report = message["drained"], message["aborted"]
                self._exit_within(TO_EXIT)
            case "begins":
                self._loads = True
            case "done":
                self._loads = False
                future = self.orders.pop(message["id"], None)
                if future is not None and not future.done():
                    future.set_result(message["fault"])
        self._told(self, message)

    def _disconnected(self) -> None:
        self._connected = False
        self._exit_within(TO_EXIT)

    # --- whether it is well -------------------------------------------------------

    @property
    def lived(self) -> float:
        """Seconds that it was well for since it was ready; 0 if it never was."""
        return max(0.0, self._heard - self._ready_at)

    @property
    def how(self) -> str:
        """How it ended."""
        if self.failure:
            return self.failure
        status = self.process.returncode
        if status is not None and status < 0:
            return f"it was ended by {signal.Signals(-status).name}"
        where = "" if self._greeted else ", before it served"
        return f"it ended by itself with status {status}{where}"

    def forgive(self) -> None:
        """What was not heard is not its fault."""
        self._heard = monotonic()

    def look(self, timeout: float) -> None:
        """Find out whether it lives, and kill it if it has been silent for too long.

        timeout: seconds that it may be silent for; 0 is for ever.
        """
        now = monotonic()
        # What it has said last may not be read yet; a process that it has started may
        # hold its end of the channel.
        has_said_all = not self._connected or self._exit_by + TO_EXIT < now
        if self.process.poll() is not None:
            if has_said_all:
                self._end()
            else:
                self._exit_within(0)
        elif self._exit_by < now:
            self.process.kill()
        elif self.stopping or (self.ready.is_set() and not self._loads):
            # While models load, in the beginning and later, the interpreter may be
            # busy for long: importing a large package is enough.
            self._judge(now - self._heard, timeout)

    def _judge(self, silence: float, timeout: float) -> None:
        if timeout and silence > timeout:
            self.failure = (
                f"its event loop was blocked for {timeout:g} s (worker_timeout), so it "
                "was killed; write what computes or blocks as a plain def, not as an "
                "async def, or allow it more time"
            )
            self.process.kill()
        elif silence > SILENCE and not (self._is_warned or self.stopping):
            self._is_warned = True
            log.warning(
                "the event loop of worker %d has been blocked for %.1f s: it answers "
                "nothing%s",
                self.pid,
                silence,
                f", and is replaced after {timeout:g} s" if timeout else "",
            )

    def _exit_within(self, seconds: float) -> None:
        self._exit_by = min(self._exit_by, monotonic() + seconds)

    def _end(self) -> None:
        if self.gone.is_set():
            return
        self._channel.close()
        self.sheet.leave()
        for future in self.orders.values():
            if not future.done():
                future.set_result(None)  # it has nothing loaded any more
        self.orders.clear()
        self.gone.set()


def _start(
    control: socket.socket, board: Board, child: Child, ports: Ports
) -> subprocess.Popen[bytes]:
    first = [sock.fileno() for sock in ports.first]
    second = [sock.fileno() for sock in ports.second]
    given: dict[str, Any] = {
        "control": [control.fileno(), os.fstat(control.fileno()).st_ino],
        "board": board.fd,
        "sheets": len(board.sheets),
        "index": child.index,
        "first": first,
        "second": second,
        "waits": child.waits,
        "unloaded": child.unloaded,
    }
    # A terminal's Ctrl-C comes to every process. Until the worker listens to it, it
    # would end with a traceback: the signal waits, as a started process inherits that.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        return subprocess.Popen(  # noqa: S603 - the very command of this process
            command(),
            env={**os.environ, VARIABLE: json.dumps(given)},
            pass_fds=(control.fileno(), board.fd, *first, *second),
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
