"""Deadlines of requests: whose time has passed is cancelled, wherever it waits.

A timer a request would cost 2 us, and nearly all requests have the server's default
and end long before: those wait in one queue, in the order in which they will be due,
with one timer for the first. Deadlines that clients ask for have timers of their own.
"""

from __future__ import annotations

import asyncio
from asyncio import Task, current_task
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

from kserve_lite.errors import DeadlineExceeded
from kserve_lite.messages import Context

# How late the default deadline may be noticed, in seconds.
GRAIN = 1.0


class Deadlines:
    """Watches the tasks of one event loop. Times are by `time.monotonic()`.

    timeout: seconds that a request has which asks for no other deadline; 0: any number.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        # When each task is due; a dict as a queue from whose middle any can be taken.
        self._queue: dict[Task[Any] | None, float] = {}
        self._own: dict[Task[Any] | None, asyncio.TimerHandle] = {}
        self._late: set[Task[Any] | None] = set()
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, context: Context) -> Task[Any] | None:
        """Have the current task cancelled when a request's deadline passes.

        A context without a deadline gets the default one. Returns the task, for
        `end()`. Raises DeadlineExceeded where the deadline has passed.
        """
        task = current_task()
        if context.deadline is None:
            if self._timeout:
                context.deadline = self._queue[task] = monotonic() + self._timeout
                if self._timer is None:
                    self._set_timer(context.deadline)
            return task
        left = context.deadline - monotonic()
        if left <= 0:
            raise DeadlineExceeded
        loop = asyncio.get_running_loop()
        self._own[task] = loop.call_later(left, self._expire, task)
        return task

    def end(self, task: Task[Any] | None) -> bool:
        """The request has ended; return whether it was cancelled by this alone."""
        if self._queue.pop(task, None) is not None:
            return False
        timer = self._own.pop(task, None)
        if timer is not None:
            timer.cancel()
        if task is None or task not in self._late:
            return False
        self._late.discard(task)
        # Somebody else may have cancelled it too, which counts more.
        return not task.uncancel()

    @contextmanager
    def within(self, context: Context) -> Iterator[None]:
        """Both in one; raises DeadlineExceeded where the deadline passes inside."""
        task = self.begin(context)
        try:
            yield
        except asyncio.CancelledError:
            if self.end(task):
                raise DeadlineExceeded from None
            raise
        except BaseException:
            self.end(task)
            raise
        self.end(task)

    def _expire(self, task: Task[Any] | None) -> None:
        self._own.pop(task, None)
        if task is not None:
            self._late.add(task)
            task.cancel()

    def _set_timer(self, due: float) -> None:
        left = max(0.0, due - monotonic())
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(left + GRAIN, self._look)

    def _look(self) -> None:
        self._timer = None
        now = monotonic()
        while self._queue:
            task, due = next(iter(self._queue.items()))
            if due > now:
                self._set_timer(due)
                return
            del self._queue[task]
            self._expire(task)

    def close(self) -> None:
        """Watch nothing more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
