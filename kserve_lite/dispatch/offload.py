"""Plain `def` handlers run here: in a bounded number of threads, off the event loop.

A thread pool executor of our own rather than anyio's `to_thread`: at 16 concurrent
calls the latter costs some 54 us a call, this some 24 us on the same machine. A thread
that runs cannot be stopped: when its caller is cancelled, the thread keeps its place in
the pool until the function returns, and the result is dropped.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from time import perf_counter_ns
from typing import TypeVar

from kserve_lite.dispatch.running import QUEUE, Times

R = TypeVar("R")


class Offload:
    """At most `workers` functions run at the same time; the others wait in order."""

    def __init__(self, workers: int, name: str = "kserve-lite") -> None:
        self.workers = workers
        self.running = 0
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix=name)

    def submit(
        self, function: Callable[[], R], times: Times | None = None
    ) -> Future[R]:
        """Call `function` in a thread, in a copy of the caller's context variables.

        times: is told how long the function waited for a thread.
        The future raises what the function raises; StopIteration, which no asyncio
        future can carry, becomes a RuntimeError, as it does inside a generator
        (PEP 479).
        """
        run = contextvars.copy_context().run
        asked = perf_counter_ns()
        return self._pool.submit(run, self._call, function, times, asked)

    def start(self, function: Callable[[], None]) -> None:
        """Call `function` in a thread and wait for nothing; not at all once closed."""
        with contextlib.suppress(RuntimeError):  # the pool's word for "closed"
            self._pool.submit(self._call, function)

    def _call(
        self, function: Callable[[], R], times: Times | None = None, asked: int = 0
    ) -> R:
        self.running += 1
        if times is not None:
            times[QUEUE] = times.get(QUEUE, 0) + perf_counter_ns() - asked
        try:
            return function()
        except StopIteration as error:
            raise RuntimeError("a handler raised StopIteration") from error
        finally:
            self.running -= 1

    def close(self) -> None:
        """Start nothing more. Threads that run go on until their function returns."""
        self._pool.shutdown(wait=False, cancel_futures=True)
