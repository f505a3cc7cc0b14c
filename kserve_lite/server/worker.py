"""A process that serves on behalf of a supervisor: what it was given, what it reports.

A worker is the same program, started once more with a variable in its environment.
Its life is that of any `Server`; here is what ties it to its supervisor: a heartbeat
from the event loop itself, orders, and the end when the supervisor ends.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import select
import signal
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Any

import anyio

from kserve_lite.counters import Board, State
from kserve_lite.errors import InferenceFault, ServerNotReady
from kserve_lite.server.control import (
    LONGEST,
    Channel,
    Fault,
    Message,
    error_of,
    fault_of,
    say_once,
)
from kserve_lite.server.lifecycle import Seat, Server
from kserve_lite.server.sockets import Ports

log = logging.getLogger("kserve_lite")

# Where a worker finds what it is given.
VARIABLE = "KSERVE_LITE_WORKER"

# Seconds between two signs of life.
BEAT = 0.25
# Seconds after which a model's `ready` handler is asked again.
LOOK = 1.0


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a worker is given by its supervisor.

    control: connected to the supervisor. waits: whether to accept connections only when
    its models are loaded. unloaded: names of models that are not to be. loaded: of
    those that clients have had loaded.
    """

    control: socket.socket
    board: Board
    index: int
    ports: Ports
    waits: bool
    unloaded: tuple[str, ...]
    loaded: tuple[str, ...]

    def fail(self, reason: str) -> None:
        """Tell the supervisor why this process ends."""
        say_once(self.control, "failed", reason=reason[:LONGEST])


@cache
def assignment() -> Assignment | None:
    """What this process is given, if it is a worker; it is then one for good.

    Nothing of it goes on to processes that it starts.
    """
    text = os.environ.pop(VARIABLE, "")
    if not text:
        return None
    given = json.loads(text)
    if not _is_here(*given["control"]):
        unblock_signals()
        return None  # it was meant for a process that has started this one
    descriptors = [given["control"][0], given["board"], *given["first"]]
    for fd in (*descriptors, *given["second"]):
        os.set_inheritable(fd, False)
    # A terminal's hangup is for the supervisor, and so are its SIGINT, which the
    # supervisor has blocked until somebody here listens to it, and SIGTERM. A handler:
    # what is ignored, processes that are started from here would ignore, too.
    with suppress(ValueError):  # another thread than the main one may not
        signal.signal(signal.SIGHUP, lambda *_: None)
    return Assignment(
        socket.socket(fileno=given["control"][0]),
        Board(given["sheets"], given["board"]),
        given["index"],
        Ports(
            [socket.socket(fileno=fd) for fd in given["first"]],
            [socket.socket(fileno=fd) for fd in given["second"]],
        ),
        given["waits"],
        tuple(given["unloaded"]),
        tuple(given["loaded"]),
    )


def _is_here(fd: int, inode: int) -> bool:
    try:
        return os.fstat(fd).st_ino == inode
    except OSError:
        return False


class Worker:
    """A server that obeys a supervisor."""

    def __init__(self, given: Assignment) -> None:
        self._given = given
        self.seat = Seat(
            given.board,
            given.index,
            given.ports,
            self._admitted if given.waits else None,
            frozenset(given.unloaded),
            self._unloads,
            given.loaded,
        )
        self.server: Server
        self._channel = Channel(self._take, self._orphaned)
        self._ids = count()
        self._answers: dict[int, asyncio.Future[None]] = {}
        self._accept: asyncio.Future[Message]
        self._orders: asyncio.Queue[Message] = asyncio.Queue()
        self._is_loaded = asyncio.Event()
        self._knows = threading.Event()  # that it has no supervisor

    async def open(self, server: Server) -> None:
        """Begin to obey, and to have `server`'s models loaded in all processes."""
        self.server = server
        server.application.repository.everywhere = self._ask
        self._accept = asyncio.get_running_loop().create_future()
        # A copy: when this process ends, and how, is to be told after the loop is gone.
        await self._channel.open(self._given.control.dup())
        self._channel.say("hello")
        threading.Thread(
            target=self._watch_over, name="kserve-lite-orphan", daemon=True
        ).start()

    async def run(self) -> None:
        """Beat, obey, and keep the state on the board true."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._beat)
            tasks.start_soon(self._obey)
            tasks.start_soon(self._look)

    def ready(self, banner: str) -> None:
        self._is_loaded.set()
        self._channel.say("ready", banner=banner)

    def stopped(self) -> None:
        """Say goodbye, right now: the event loop may not turn again."""
        drained, aborted = self.server.drained, self.server.aborted
        say_once(self._given.control, "stopped", drained=drained, aborted=aborted)

    async def _beat(self) -> None:
        while True:
            self._channel.beat()
            # Whichever process is asked for metrics, it reads what the others tell.
            self.server.application.publish()
            await anyio.sleep(BEAT)

    async def _look(self) -> None:
        """Tell the siblings whether this process is ready, in time."""
        dataplane, sheet = self.server.dataplane, self.server.application.sheet
        while True:
            change = dataplane.change()
            if sheet.state in (State.SERVING, State.READY):
                is_ready = await dataplane.own_ready()
                # Meanwhile it may have begun to stop.
                if sheet.state in (State.SERVING, State.READY):
                    sheet.state = State.READY if is_ready else State.SERVING
            with anyio.move_on_after(LOOK):
                await change.wait()

    # --- what the supervisor says -------------------------------------------------

    def _take(self, message: Message) -> None:
        match message["kind"]:
            case "stop":
                self.server.stop(at_once=message["at_once"])
            case "accept":
                if not self._accept.done():
                    self._accept.set_result(message)
            case "order":
                self._orders.put_nowait(message)
            case "answer":
                future = self._answers.pop(message["id"], None)
                if future is not None and not future.done():
                    _settle(future, message["fault"])

    def _watch_over(self) -> None:
        """End the process where the supervisor has gone and the event loop is blocked.

        Who would kill it for that is no more, and nobody else knows of it.
        """
        hangup = select.poll()
        hangup.register(self._given.control, select.POLLHUP)
        hangup.poll()
        settings = self.server.settings
        patience = settings.server.worker_timeout or settings.dispatch.grace_period
        if not self._knows.wait(patience):
            os._exit(1)

    def _orphaned(self) -> None:
        """The supervisor has gone, however: nobody would replace or stop this one."""
        self._knows.set()
        if not self.server.stopped:
            log.error("the supervisor has ended: stopping")
            self.server.stop()
        for future in self._answers.values():
            if not future.done():
                future.set_exception(ServerNotReady())
        self._answers.clear()

    async def _obey(self) -> None:
        """Carry orders out, one after the other, when all models are loaded."""
        await self._is_loaded.wait()
        while True:
            order = await self._orders.get()
            self._channel.say("begins")
            fault = await self._carry_out(order["verb"], order["name"])
            self._channel.say("done", id=order["id"], fault=fault)

    async def _carry_out(self, verb: str, name: str) -> Fault | None:
        try:
            await self.server.application.repository.obey(verb, name)
        except InferenceFault as error:
            return fault_of(error)
        return None

    # --- what it asks for ---------------------------------------------------------

    async def _admitted(self) -> None:
        """Wait until connections may be accepted, and be as the siblings are."""
        self._channel.say("loaded")
        now = await self._accept
        wanted = set(now["unloaded"])
        changed = wanted ^ set(self._given.unloaded)
        for name in sorted(changed):
            await self._carry_out("unload" if name in wanted else "load", name)
        # After those that were loaded when this process began.
        since = set(now["loaded"]) - set(self._given.loaded) - changed
        await self.server.bring(name for name in now["loaded"] if name in since)

    async def _unloads(self) -> None:
        """Tell that unload handlers follow, which may block the event loop."""
        settings = self.server.settings
        within = settings.dispatch.grace_period * len(self.server.application.models)
        self._channel.say("unloads", within=within)
        await asyncio.sleep(0)  # uvloop writes when its turn is over

    async def _ask(self, verb: str, name: str) -> None:
        """Have every process load or unload a model; raises InferenceFault."""
        if self._knows.is_set():  # nobody would answer
            raise ServerNotReady
        number = next(self._ids)
        self._answers[number] = future = asyncio.get_running_loop().create_future()
        self._channel.say("ask", id=number, verb=verb, name=name)
        try:
            await future
        finally:
            self._answers.pop(number, None)


def _settle(future: asyncio.Future[Any], fault: Fault | None) -> None:
    if fault is None:
        future.set_result(None)
    else:
        future.set_exception(error_of(fault))


def unblock_signals() -> None:
    """Take what the supervisor has blocked for this process while it starts."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))
