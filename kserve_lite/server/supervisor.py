"""Keeps a number of workers serving: starts, watches, replaces and stops them.

It holds the listening sockets and never accepts from them, so that connections wait
while workers come and go. It answers no request and loads no model; what it knows of
workers they have said. Each place has one worker. Another one takes it when that one
has failed, after a moment; or at a restart, where the old one is stopped only when the
new one accepts connections.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from time import monotonic

import anyio
import anyio.abc

from kserve_lite.counters import Board, State
from kserve_lite.errors import KServeLiteError, StartupError
from kserve_lite.metrics import RESTARTS
from kserve_lite.server.child import Child
from kserve_lite.server.control import Message
from kserve_lite.server.lifecycle import report
from kserve_lite.server.orders import Orders
from kserve_lite.server.reloading import Reloading
from kserve_lite.server.settings import Settings
from kserve_lite.server.sockets import open_ports
from kserve_lite.server.starting import command
from kserve_lite.server.storage import fetch

log = logging.getLogger("kserve_lite")

# Seconds between two looks at the workers.
TICK = 0.1

# A worker that fails is replaced after so many seconds, twice as many each time.
BACK_OFF = 0.2
# It has to be ready for so many seconds to count as healthy ...
HEALTHY = 5.0
# ... and as many failures in a row without that, at one place, are the end.
MOST_FAILURES = 5


def supervise(settings: Settings, *folders: Path) -> None:
    """Serve with the workers that the settings ask for, until a signal.

    folders: the program's, to watch for changes. Raises StartupError where it cannot
    start, and where workers fail again and again.
    """
    command()
    anyio.run(Supervisor(settings, *folders).run)


class Supervisor:
    """The workers of a server, by place."""

    def __init__(self, settings: Settings, *folders: Path) -> None:
        self._stopping = asyncio.Event()
        self._children: list[Child] = []
        self._reloading = (
            Reloading(lambda: self._children, *folders, stop=self._stopping)
            if settings.server.reload
            else None
        )
        self._server = settings.server
        self._silence = settings.dispatch.grace_period
        # A restart needs a further sheet, and a stopped worker keeps its own for long.
        self._board = Board(1 + 2 * self._server.workers)
        self._restarts = RESTARTS.on(self._board.sheets[0])
        self._ports = open_ports(settings)
        self._places: list[Child] = []
        self._orders = Orders(self._that_serve)
        self._signals = 0  # that have asked for a stop
        self._failure: StartupError | None = None
        self._was_ready = False
        self._banner = ""
        self._restarting = False
        self._has_terminal = sys.stderr.isatty()
        self._tasks: anyio.abc.TaskGroup

    async def run(self) -> None:
        """Serve until a stop has been asked for and all workers have ended."""
        try:
            async with anyio.create_task_group() as self._tasks:
                if threading.current_thread() is threading.main_thread():
                    await self._tasks.start(self._watch_signals)
                self._tasks.start_soon(self._look)
                self._tasks.start_soon(self._orders.run)
                await self._fetch()
                for place in range(self._server.workers):
                    if self._stopping.is_set():
                        break
                    self._places.append(self._spawn(waits=False))
                    self._tasks.start_soon(self._keep, place)
                if self._reloading is not None:
                    self._tasks.start_soon(self._reload, self._reloading)
                await self._stopping.wait()
                await self._stop()
                self._tasks.cancel_scope.cancel()
        finally:
            for child in self._children:
                child.end()
            self._ports.close()
            self._board.close()
        if self._failure is not None:
            raise self._failure

    async def _fetch(self) -> None:
        """Fetch the model's files, on behalf of all workers, unless a stop comes."""
        async with anyio.create_task_group() as tasks:

            async def give_up() -> None:
                await self._stopping.wait()
                tasks.cancel_scope.cancel()

            tasks.start_soon(give_up)
            try:
                await fetch(self._server, bar=True)
            except KServeLiteError as error:
                self._fail(str(error))
            tasks.cancel_scope.cancel()

    # --- workers ----------------------------------------------------------------------

    def _spawn(self, *, waits: bool) -> Child:
        """Start a worker on a sheet that nobody uses."""
        states = self._board.states
        child = Child(
            self._told,
            board=self._board,
            index=states.index(State.GONE, 1),
            ports=self._ports,
            waits=waits,
            unloaded=self._orders.unloaded,
            loaded=self._orders.loaded,
        )
        self._children.append(child)
        self._tasks.start_soon(child.listen)
        return child

    def _that_serve(self) -> list[Child]:
        return [c for c in self._children if not (c.stopping or c.gone.is_set())]

    async def _keep(self, place: int) -> None:
        """Have a worker at a place, until the stop, or a restart puts another there."""
        failures = 0
        while True:
            child = self._places[place]
            await child.gone.wait()
            if not self._is_at(place, child):
                return
            if self._reloading is not None:
                await self._reloading.wait(child)
            else:
                failures = 1 if child.lived >= HEALTHY else failures + 1
                if not await self._recover(child, failures):
                    return
            if not self._is_at(place, child):
                return
            # Nobody may meet a worker that loads, unless there is no other: then
            # liveness is to answer, as at the start.
            waits = any(other.ready.is_set() for other in self._that_serve())
            waits = waits or self._reloading is not None
            self._places[place] = self._spawn(waits=waits)

    def _is_at(self, place: int, child: Child) -> bool:
        return self._places[place] is child and not self._stopping.is_set()

    async def _recover(self, child: Child, failures: int) -> bool:
        """Wait before a worker is replaced that has ended; False: it is not to be."""
        if child.failure and not self._was_ready:
            # What fails at the very first start, a load say, fails again.
            self._fail(child.failure)
            return False
        if failures >= MOST_FAILURES:
            self._fail(f"a worker has failed {failures} times in a row: {child.how}")
            return False
        delay = BACK_OFF * 2 ** (failures - 1)
        if child.was_stopped:
            log.info("%s was stopped: starting another in %g s", child.name, delay)
        else:
            log.error(
                "%s failed: %s; starting another in %g s",
                child.name,
                child.how_in_a_line,
                delay,
            )
            self._restarts.add()
        await anyio.sleep(delay)
        return True

    def _fail(self, reason: str) -> None:
        """Give up: stop, and end with this reason."""
        self._failure = self._failure or StartupError(reason)
        self._stopping.set()

    async def _look(self) -> None:
        """Look after the workers, often."""
        last = monotonic()
        while True:
            await anyio.sleep(TICK)
            now = monotonic()
            # Whoever suspended the machine, or this process, has suspended them too.
            was_away = now - last > 5 * TICK
            last = now
            for child in self._children:
                if was_away:
                    child.forgive()
                child.look(self._timeout(child))
            self._children = [c for c in self._children if not c.gone.is_set()]

    def _timeout(self, child: Child) -> float:
        if child.stopping:
            return self._server.worker_timeout or self._silence
        # Who develops may hold the loop in a debugger.
        return 0.0 if self._reloading else self._server.worker_timeout

    def _told(self, child: Child, message: Message) -> None:
        """Hear what a worker says."""
        match message["kind"]:
            case "loaded":
                child.accept(self._orders.unloaded, self._orders.loaded)
            case "ready":
                self._was_ready = True
                log.debug("%s is ready", child.name)
                self._announce(message["banner"])
            case "ask":
                self._orders.ask(child, message)

    def _announce(self, banner: str) -> None:
        """Print the banner once, when every place is ready."""
        ready = [child for child in self._places if child.ready.is_set()]
        if len(ready) == self._server.workers and not self._banner:
            self._banner = banner
            with suppress(OSError):  # a terminal may be closed at this moment
                print(banner, file=sys.stderr, flush=True)

    # --- restarts ---------------------------------------------------------------------

    async def _restart(self) -> None:
        """Replace every worker, one at a time, without a request failing."""
        if self._restarting:
            log.warning("SIGHUP: a restart is under way already")
            return
        if not self._places:
            log.warning("SIGHUP: the model's files are not here yet")
            return
        self._restarting = True
        log.info("SIGHUP: restarting %d workers", self._server.workers)
        try:
            for place in range(self._server.workers):
                if self._stopping.is_set():
                    return
                child = self._spawn(waits=True)
                await child.settled.wait()
                if self._stopping.is_set():
                    return
                if not child.ready.is_set():
                    log.error(
                        "the restart is given up, and the workers that serve go on: %s",
                        child.how_in_a_line,
                    )
                    return
                old, self._places[place] = self._places[place], child
                self._tasks.start_soon(self._keep, place)
                old.stop()
                await old.gone.wait()
            log.info("all workers are restarted")
        finally:
            self._restarting = False

    async def _reload(self, reloading: Reloading) -> None:
        try:
            await reloading.run()
        except StartupError as error:
            self._fail(str(error))

    # --- the end ----------------------------------------------------------------------

    async def _watch_signals(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        """SIGTERM and SIGINT stop, a second one at once; SIGHUP restarts."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        with anyio.open_signal_receiver(*numbers) as signals:
            task_status.started()
            async for number in signals:
                # A terminal that was closed sends it too, and is one no longer.
                is_closed = self._has_terminal and not sys.stderr.isatty()
                if number == signal.SIGHUP and self._stopping.is_set():
                    log.info("SIGHUP: the server is stopping already")
                elif number == signal.SIGHUP and not is_closed:
                    self._tasks.start_soon(self._restart)
                elif self._signals:
                    self._signals += 1
                    for child in self._children:
                        child.stop(at_once=True)
                else:
                    self._signals = 1
                    log.info("%s: stopping", signal.Signals(number).name)
                    self._stopping.set()

    async def _stop(self) -> None:
        """Have every worker finish what is in flight; report the sum."""
        started = monotonic()
        # First: the last to close them serves what still waits there, and cannot if
        # that is this process.
        self._ports.close()
        children = list(self._children)
        for child in children:
            child.stop(at_once=self._failure is not None and not self._was_ready)
        for child in children:
            await child.gone.wait()
        reports = [child.report for child in children if child.report is not None]
        drained = sum(drained for drained, _ in reports)
        aborted = sum(aborted for _, aborted in reports)
        log.info("stopped: %s", report(drained, aborted, monotonic() - started))
        if any(child.lost for child in children) and self._signals < 2:
            self._fail("a worker ended amid the stop: what it still held is lost")
