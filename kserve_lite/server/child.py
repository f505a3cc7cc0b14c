"""A worker as its supervisor sees it: a process, what it last said, how it ended.

Judges nothing but whether the process is alive and well; what follows from that is the
supervisor's business.
"""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import socket
import subprocess
from collections.abc import Callable
from itertools import count
from time import monotonic

from kserve_lite.counters import Board, Sheet, State
from kserve_lite.server.control import Channel, Fault, Message
from kserve_lite.server.sockets import Ports
from kserve_lite.server.starting import start

log = logging.getLogger("kserve_lite")

# Seconds of silence after which the log tells that an event loop is blocked; a worker
# speaks four times a second.
SILENCE = 1.0

# Seconds that a process is given that has nothing left to do, or is to do nothing.
TO_EXIT = 3.0

_numbers = count()


class Child:
    """A worker process, from its start.

    told: is called with what it says, beyond what is kept here. board, index: with the
    sheet that it gets. waits: whether it is to accept connections only when it is told
    to. unloaded, loaded: names of models that it is not to load, and that clients had
    loaded. Where it cannot be started it is as one that has failed at once.
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
        loaded: tuple[str, ...],
    ) -> None:
        self.waits = waits
        self.sheet: Sheet = board.sheets[index]
        # On behalf of the process, so that no sibling is ready before it is.
        self.sheet.state = State.STARTING if waits else State.SERVING
        self.ready = asyncio.Event()
        self.gone = asyncio.Event()
        self.settled = asyncio.Event()  # ready, or gone
        self.failure = ""  # why it ends, in its own words or ours
        self.report: tuple[int, int] | None = None  # drained and aborted requests
        self.orders: dict[int, asyncio.Future[Fault | None]] = {}
        self.takes_orders = not waits
        self.stopping = False
        self._told = told
        self._greeted = False
        self._loads = False
        self._unloads = False
        self._is_warned = False
        self._ready_at = math.inf
        self._heard = monotonic()
        self._exit_by = math.inf
        self._channel = Channel(self._take, self._disconnected)
        self._connected = True
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._ours, theirs = socket.socketpair()
            with theirs:
                self._process = start(
                    theirs,
                    board,
                    index,
                    ports,
                    waits=waits,
                    unloaded=unloaded,
                    loaded=loaded,
                )
        except OSError as error:  # too many processes or files, say; later there may be
            self.failure = f"it could not be started: {error}"
            self._end()
        else:
            log.debug("started %s", self.name)

    @property
    def name(self) -> str:
        """What the log calls it."""
        return f"worker {self._process.pid}" if self._process else "a worker"

    async def listen(self) -> None:
        """Hear what it says."""
        if not self.gone.is_set():
            await self._channel.open(self._ours)

    # --- what it is told ----------------------------------------------------------

    def stop(self, *, at_once: bool = False) -> None:
        """Have it finish what is in flight and exit."""
        if self.gone.is_set():
            return
        self.stopping = True
        if self._greeted:
            self._channel.say("stop", at_once=at_once)
        elif self._process:  # it serves nobody, and may read this only in an hour
            self._process.terminate()
        if at_once or not self._greeted:
            self._exit_within(TO_EXIT)

    def accept(self, unloaded: tuple[str, ...], loaded: tuple[str, ...]) -> None:
        """Have it accept connections. unloaded, loaded: see the class, by now."""
        self.takes_orders = True
        self._channel.say("accept", unloaded=unloaded, loaded=loaded)

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
        if self._process:
            self._process.kill()
            self._process.wait()
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
                self.settled.set()
            case "failed":
                self.failure = message["reason"]
                self._exit_within(TO_EXIT)
            case "stopped":
                self.report = message["drained"], message["aborted"]
                self._exit_within(TO_EXIT)
            case "unloads":
                self._unloads = True
                self._exit_within(message["within"] + TO_EXIT)
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
    def was_stopped(self) -> bool:
        """Whether it ended as one does that was told to, by whomever."""
        process = self._process
        return (
            self.report is not None and process is not None and not process.returncode
        )

    @property
    def lost(self) -> bool:
        """Whether it was to finish what is in flight, and ended before it had."""
        is_gone = self.gone.is_set() and self.stopping
        return is_gone and self.ready.is_set() and self.report is None

    @property
    def how(self) -> str:
        """How it ended."""
        if self.failure:
            return self.failure
        status = self._process.returncode if self._process else None
        if status is not None and status < 0:
            return f"it was ended by {_name_of(-status)}"
        where = "" if self._greeted else ", before it served"
        return f"it ended by itself with status {status}{where}"

    @property
    def how_in_a_line(self) -> str:
        return " ".join(self.how.split())

    def forgive(self) -> None:
        """What was not heard is not its fault."""
        self._heard = monotonic()

    def look(self, timeout: float) -> None:
        """Find out whether it lives, and kill it if it has been silent for too long.

        timeout: seconds that it may be silent for; 0 is for ever.
        """
        process = self._process
        if process is None or self.gone.is_set():
            return
        now = monotonic()
        # What it has said last may not be read yet; a process that it has started may
        # hold its end of the channel.
        has_said_all = not self._connected or self._exit_by + TO_EXIT < now
        if process.poll() is not None:
            if has_said_all:
                self._end()
            else:
                self._exit_within(0)
        elif self._exit_by < now:
            process.kill()
        elif self._unloads:
            pass  # it may block, within the time that it has told
        elif self.stopping or (self.ready.is_set() and not self._loads):
            # While models load, in the beginning and later, the interpreter may be
            # busy for long: importing a large package is enough.
            self._judge(process, now - self._heard, timeout)

    def _judge(
        self, process: subprocess.Popen[bytes], silence: float, timeout: float
    ) -> None:
        if timeout and silence > timeout:
            self.failure = (
                f"its event loop was blocked for {timeout:g} s (worker_timeout), so it "
                "was killed; write what computes or blocks as a plain def, not as an "
                "async def, or allow it more time, also where a plain def holds the GIL"
            )
            process.kill()
        elif silence > SILENCE and not (self._is_warned or self.stopping):
            self._is_warned = True
            log.warning(
                "the event loop of %s has been blocked for %.1f s: it answers "
                "nothing%s",
                self.name,
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
        self.settled.set()
        if self.lost:
            log.error("%s had not finished what it held: %s", self.name, self.how)


def _name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal has none
        return f"signal {number}"
