"""Plain `def` handlers run here: in a bounded number of threads, off the event loop.

Threads of our own, since what a call costs is waking. A worker is woken only if none is
on its way to the queue, and wakes the next if it leaves work behind; the loop is woken
once for all the results that it finds. With 16 callers and 6 threads an empty call
takes some 12 us at the median, where a ThreadPoolExecutor takes 50 and anyio's
`to_thread` 100 to 130 (bench/NOTES.md, "Threads").

A thread that runs cannot be stopped: when its caller is cancelled, it keeps its place
until the function returns, and the result is dropped. No function is called, and
nothing that may block is done, while the lock is held.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections import OrderedDict
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from threading import Lock, RLock, Thread, get_native_id
from time import perf_counter_ns
from typing import Any, Protocol, TypeVar

from kserve_lite.dispatch.statistics import QUEUE, Times

R = TypeVar("R")

log = logging.getLogger("kserve_lite")

# How much nicer than the process its threads are (setpriority(2)).
NICE = 5


class Held(Protocol):
    """What counts those that use it, such as `Running`."""

    def begin(self) -> None:
        """Count one more."""

    def end(self) -> None:
        """Count one less."""


class Offload:
    """At most `workers` functions run at the same time; the others wait in order."""

    def __init__(self, workers: int, name: str = "kserve-lite") -> None:
        self.workers = workers
        self._name = name
        # Of who makes this: a thread inherits the niceness of the one that starts it,
        # which may be one of ours.
        self._nice = os.getpriority(os.PRIO_PROCESS, 0) + NICE
        # Re-entrant, since the garbage collector may run anywhere, and so may end an
        # abandoned `run()` in a thread that is in here.
        self._lock = RLock()
        # A dict's order and a removal in no time: those who ask and leave while every
        # thread is stuck leave nothing behind. A plain dict pops its first in O(n).
        self._queue: OrderedDict[_Job, None] = OrderedDict()
        self._idle: list[Lock] = []  # one for each parked thread; the last is warmest
        self._threads = self._running = 0
        self._closed = False
        self._mailbox: _Mailbox | None = None

    @property
    def running(self) -> int:
        """How many threads are inside functions."""
        return self._running

    @property
    def waiting(self) -> int:
        """How many functions wait for a thread."""
        return len(self._queue)

    async def run(
        self,
        function: Callable[[], R],
        times: Times | None = None,
        held: Held | None = None,
    ) -> R:
        """Call `function` in a thread, in a copy of the caller's context variables.

        times: is told how many nanoseconds the function waited for a thread.
        held: what the function uses. If the caller is cancelled while the function
            runs, `held.begin()` is called, and `held.end()`, on the event loop, when
            the function has ended.
        Raises what the function raises, but RuntimeError for StopIteration, which no
        coroutine can raise (PEP 479); CancelledError if `close()` comes before a
        thread is free; RuntimeError if it came before this call.
        """
        loop = asyncio.get_running_loop()
        mailbox = self._mailbox
        if mailbox is None or mailbox.loop is not loop:
            mailbox = self._mailbox = _Mailbox(loop, self._lock)
        future = loop.create_future()
        job = _Job(function, mailbox, future, times)
        if not self._put(job):
            raise RuntimeError("the threads were closed: no function is called")
        try:
            await future
        except BaseException:  # cancelled; or never to be resumed, its loop being gone
            self._leave(job, held)
            raise
        if job.error is None:
            return job.result  # type: ignore[no-any-return]
        error, job.error = job.error, None
        try:
            if isinstance(error, StopIteration):
                raise RuntimeError("a handler raised StopIteration") from error
            raise error
        finally:
            del error  # its traceback has this frame

    def start(self, function: Callable[[], object]) -> None:
        """Call `function` in a thread and wait for nothing; not at all once closed."""
        try:
            self._put(_Job(partial(_logged, function), None, None, None))
        except RuntimeError:
            log.exception("a function that nobody waits for was not called")

    def close(self) -> None:
        """Start nothing more: what waits is cancelled, and idle threads end.

        Threads that run go on until their function returns.
        """
        with self._lock:
            self._closed = True
            dropped = list(self._queue)
            self._queue.clear()
            boxes = [j.mailbox for j in dropped if j.mailbox and j.mailbox.put(j)]
            for parked in self._idle:
                parked.release()
            self._idle.clear()
            self._mailbox = None  # jobs have their own reference
        for mailbox in boxes:
            mailbox.ring()

    def _put(self, job: _Job) -> bool:
        """Queue a job; return False once closed."""
        with self._lock:
            if self._closed:
                return False
            self._queue[job] = None
            spawns = self._rouse()
        if spawns:
            try:
                self._spawn()
            except RuntimeError:  # the system's limit of threads
                with self._lock:
                    # One thread is enough to get there; without any, nobody would.
                    if not self._threads and job in self._queue:
                        del self._queue[job]
                        raise
        return True

    def _leave(self, job: _Job, held: Held | None) -> None:
        """Nobody waits for a job any more. On its event loop."""
        with self._lock:
            if job in self._queue:
                del self._queue[job]
                return
        if job.settled:
            job.error = None
        elif job.begun and held is not None:
            held.begin()
            job.held = held

    def _rouse(self) -> bool:
        """See that a thread comes to the queue; return whether it is to be spawned.

        What neither runs nor is parked comes by itself, and wakes the next before it
        calls anything: so short functions are done by few threads, without waking the
        others for nothing, and long ones by all. Under the lock.
        """
        if self._threads > self._running + len(self._idle):
            return False
        if self._idle:
            self._idle.pop().release()
            return False
        if self._threads == self.workers:
            return False
        self._threads += 1
        return True

    def _spawn(self) -> None:
        """Start a thread that `_rouse()` has counted; raises RuntimeError."""
        name = f"{self._name}_{self._threads}"
        try:
            Thread(target=self._work, name=name, daemon=True).start()
        except RuntimeError:
            with self._lock:
                self._threads -= 1
            raise

    def _next(self) -> _Job | None:
        """The first that still wants to be called, counted as running.

        Under the lock. A caller that was cancelled has yet to take its job away.
        """
        while self._queue:
            job, _ = self._queue.popitem(last=False)
            if job.future is None or not job.future.cancelled():
                job.begun = True
                self._running += 1
                return job
        return None

    def _work(self) -> None:
        """The life of a thread."""
        _step_back(self._nice)
        parked = Lock()
        parked.acquire()
        while True:
            with self._lock:
                job = self._next()
                if job is not None:
                    spawns = bool(self._queue) and self._rouse()
                elif self._closed:
                    self._threads -= 1
                    return
                else:
                    self._idle.append(parked)
            if job is None:
                parked.acquire()
                continue
            if spawns:
                with contextlib.suppress(RuntimeError):  # then fewer have to do
                    self._spawn()
            job.call()
            mailbox = job.mailbox
            with self._lock:
                self._running -= 1
                rings = mailbox is not None and mailbox.put(job)
            # Not by the next assignment, which is under the lock: what the job holds,
            # if the loop has done with it by then, is freed here.
            del job
            if mailbox is not None and rings:
                mailbox.ring()


def _step_back(nice: int) -> None:
    """Have the current thread, and those that it starts, yield to the event loop.

    Else the loop waits for its turn behind computing threads: see docs/DESIGN.md. What
    only Linux can do for one thread; elsewhere it would be the whole process.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, get_native_id(), nice)


class _Job:
    """A function that is to be called once."""

    __slots__ = (
        "asked",
        "begun",
        "context",
        "error",
        "function",
        "future",
        "held",
        "mailbox",
        "result",
        "settled",
        "times",
    )

    def __init__(
        self,
        function: Callable[[], Any],
        mailbox: _Mailbox | None,
        future: asyncio.Future[None] | None,
        times: Times | None,
    ) -> None:
        self.function = function
        self.context = copy_context()
        # None where nobody waits. The future only tells that the job has ended: with
        # the exception in it, asyncio would complain if nobody asked for it.
        self.mailbox = mailbox
        self.future = future
        self.times = times
        self.asked = 0 if times is None else perf_counter_ns()
        self.begun = self.settled = False
        self.held: Held | None = None
        self.result: Any = None
        self.error: BaseException | None = None

    def call(self) -> None:
        """Call the function and keep what comes of it. In a thread."""
        times = self.times
        if times is not None:
            times[QUEUE] = times.get(QUEUE, 0) + perf_counter_ns() - self.asked
        try:
            self.result = self.context.run(self.function)
        except BaseException as error:  # noqa: BLE001 - user code: the caller's to see
            # A cycle, by way of the traceback, until the error is taken out again.
            self.error = error

    def settle(self) -> None:
        """Tell the caller, or whom it left behind. On its event loop."""
        self.settled = True
        if self.held is not None:
            self.held.end()
        future = self.future
        if future is None or future.done():
            self.error = None
        elif self.begun:
            future.set_result(None)
        else:
            future.cancel()  # by `close()`


class _Mailbox:
    """The jobs that have ended and whose event loop is still to hear of it."""

    __slots__ = ("_jobs", "_lock", "_rung", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop, lock: RLock) -> None:
        self.loop = loop
        self._lock = lock  # the Offload's: its threads have it when a job ends
        self._jobs: list[_Job] = []
        self._rung = False

    def put(self, job: _Job) -> bool:
        """Keep a job for the loop; return whether to `ring()`. Under the lock."""
        self._jobs.append(job)
        rung, self._rung = self._rung, True
        return not rung

    def ring(self) -> None:
        """Wake the loop. In any thread, and without the lock, as it may take long."""
        try:
            self.loop.call_soon_threadsafe(self._empty)
        except RuntimeError:  # the loop is closed
            self._take()

    def _take(self) -> list[_Job]:
        with self._lock:
            jobs, self._jobs = self._jobs, []
            self._rung = False
        return jobs

    def _empty(self) -> None:
        for job in self._take():
            job.settle()


def _logged(function: Callable[[], object]) -> None:
    try:
        function()
    except BaseException:  # user code, and nobody waits for it
        log.exception("a function that nobody waits for failed")
