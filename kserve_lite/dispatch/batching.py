"""Rows of several requests, gathered into one call of a handler.

`Batcher` queues requests by group (what can be concatenated), starts a batch where one
of `max_concurrency` slots is free, and gives each request its own rows of the result.
How long it waits is `patience.py`'s, what goes together `rows.py`'s. Nothing here knows
models, messages or protocols: `call` is whatever computes a batch.

A slot is given to whatever waits one step of the event loop after it became free, or
the first row came: rows that came in the same step then go together, for nothing.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from functools import partial
from itertools import islice
from typing import Any, TypeAlias

from kserve_lite.dispatch.admission import too_much
from kserve_lite.dispatch.patience import Cost, Opening, Patience
from kserve_lite.dispatch.rows import Arrays, joined, measured, split
from kserve_lite.dispatch.statistics import BATCH, Times
from kserve_lite.errors import DeadlineExceeded, InvalidInput, ServerNotReady
from kserve_lite.handlers import AUTO, Batching

Call: TypeAlias = Callable[[dict[str, Any]], Awaitable[Any]]

# Seconds. uvloop's timers count whole milliseconds and take less than half of one for
# none at all: what is due so soon is due, and no timer is shorter than the tick.
_SOON, _TICK = 0.0001, 0.0006


class Batcher:
    """Gathers the rows of requests for `call`; see `Batching`.

    call: computes a batch, given its arrays by parameter name; must not end before what
        it started has ended, or `max_concurrency` does not hold.
    max_queue_size: requests that may wait. Let in beyond it are, while slots are free,
        as many as their batches may have rows.
    max_concurrency: batches inside `call` at a time, the slots. While few wait, several
        are each small.
    clock: seconds, to tell how long things took and when a deadline has passed.
    """

    def __init__(
        self,
        call: Call,
        batching: Batching,
        *,
        max_queue_size: int,
        max_concurrency: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._call = call
        self._most = batching.max_batch_size
        self._auto = batching.max_delay_ms == AUTO
        delay = batching.max_delay_ms
        self._delay = 0.0 if isinstance(delay, str) else delay / 1000
        self._max_queue_size = max_queue_size
        self._max_concurrency = max_concurrency
        self._clock = clock
        # For every batch a copy: none may run in the first request's.
        self._context = contextvars.copy_context()
        self.cost = Cost()
        self._patience = Patience(batching, self.cost)
        # By age. Dicts that are emptied at the front are slow to find their first.
        self._waiting: OrderedDict[_Request, None] = OrderedDict()
        self._groups: dict[Hashable, _Group] = {}
        self._full: dict[_Group, None] = {}
        self._rows = 0  # that wait
        self._batches: dict[_Batch, None] = {}
        self._opening: Opening | None = None
        self._ended_rows = 0  # of the last batch that ended
        self._asked = False  # for `_dispatch`
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def waiting(self) -> int:
        """How many requests wait for a batch."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many batches are inside `call`."""
        return len(self._batches)

    async def run(
        self,
        arrays: Arrays,
        *,
        parameters: Hashable = (),
        deadline: float | None = None,
        times: Times | None = None,
    ) -> Any:
        """Return the rows of `call`'s result that belong to the rows of `arrays`.

        arrays: each with the same number of rows, 1 to `max_batch_size`, in their first
        dimension. parameters: only requests with equal ones share a batch. deadline: by
        `clock`; who passes one cancels this when it has passed.

        times: is told how long the request waited for its batch.

        Raises InvalidInput for other arrays, Overloaded where too much waits or the
        deadline would not be met, DeadlineExceeded, ServerNotReady once closed, and
        what `call` raises: the same object in each request of a batch, so that one
        failure can be told from several, and since exceptions in general cannot be
        copied. Its traceback does not grow: futures put back the one they were given.
        """
        if self._closed:
            raise _closed()
        rows, key = measured(arrays, self._most, parameters)
        loop = asyncio.get_running_loop()
        now = self._clock()
        if deadline is not None:
            self._check_deadline(deadline, now, rows=rows, key=key)
        free = self._max_concurrency - len(self._batches)
        if len(self._waiting) >= self._max_queue_size + free * self._most:
            raise too_much("too many requests wait for their turn")
        request = _Request(arrays, rows, loop.create_future(), now, deadline)
        self._add(request, key)
        if self._auto:
            self._tell(key, now, rows)
        if free and not self._asked:
            self._asked = True
            loop.call_soon(self._dispatch)
        try:
            result = await request.future
            if times is not None:
                waited = int((request.began - now) * 1e9)
                times[BATCH] = times.get(BATCH, 0) + waited
            return result
        except asyncio.CancelledError:
            self._leave(request)
            raise
        finally:
            # An error's traceback knows this frame, which must not know the error.
            del request

    def close(self) -> None:
        """Fail what waits, and comes, with ServerNotReady. What runs goes on."""
        self._closed = True
        self._stop_timer()
        self._opening = None
        for request in list(self._waiting):
            self._remove(request)
            _fail(request, _closed())

    def _check_deadline(
        self, deadline: float, now: float, *, rows: int, key: Hashable
    ) -> None:
        """Refuse what cannot end in time by what was learned, if others are ahead.

        With nobody ahead it is tried: the estimate may be wrong, and nothing else would
        mend it.
        """
        if deadline <= now:
            raise DeadlineExceeded
        if not (self._waiting or self._batches) or not self.cost.known:
            return
        group = self._groups.get(key)
        beside = 0 if group is None else group.rows % self._most
        if beside + rows > self._most:
            beside = 0
        own = self.cost.seconds(beside + rows)
        starts = 0.0  # when a slot is free
        if len(self._batches) >= self._max_concurrency:
            starts = min(
                max(0.0, batch.began + self.cost.seconds(batch.rows) - now)
                for batch in self._batches
            )
        # Full batches of every group; what is left of others goes before, too.
        ahead = self._rows - beside
        batches = sum(-(-other.rows // self._most) for other in self._some_groups())
        if beside:
            batches -= 1
        work = self.cost.per_row * ahead + self.cost.fixed * max(0, batches)
        if now + starts + work / self._max_concurrency + own > deadline:
            raise too_much("the request would miss its deadline")

    def _some_groups(self) -> list[_Group]:
        # Bounded, as this is asked for each request: more only makes it more hopeful.
        return list(islice(self._groups.values(), 16))

    def _add(self, request: _Request, key: Hashable) -> None:
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group(key)
        request.group = group
        group.requests[request] = None
        group.rows += request.rows
        if group.rows >= self._most:
            self._full[group] = None
        self._waiting[request] = None
        self._rows += request.rows

    def _remove(self, request: _Request) -> None:
        group = request.group
        if group is None:
            return
        request.group = None
        del self._waiting[request]
        self._rows -= request.rows
        del group.requests[request]
        group.rows -= request.rows
        if group.rows < self._most:
            self._full.pop(group, None)
        if not group.requests:
            del self._groups[group.key]

    def _leave(self, request: _Request) -> None:
        """The caller of a request was cancelled."""
        self._remove(request)
        if not self._waiting:
            self._stop_timer()
            self._opening = None
        batch = request.batch
        if batch is not None:
            others = any(not mate.future.done() for mate in batch.requests)
            if batch.task is not None and not others:
                batch.task.cancel()

    def _tell(self, key: Hashable, now: float, rows: int) -> None:
        """Tell the openings that are being watched that rows came."""
        if self._opening is not None:
            self._opening.add(key, now, rows)
        for batch in self._batches:
            if batch.opening is not None:
                batch.opening.add(key, now, rows)

    def _dispatch(self, ended: _Batch | None = None) -> None:
        """Start what is to start now; set a timer for what is to wait.

        ended: the batch that makes place.
        """
        self._asked = False
        self._stop_timer()
        try:
            if ended is not None:
                self._ended_rows = ended.rows
                if ended.opening is not None:
                    self._patience.learn(ended.opening)
            self._start_due(idle=ended is None)
        except Exception as error:
            # A bug of this file. Nobody else would ever answer those who wait.
            for request in list(self._waiting):
                self._remove(request)
                _fail(request, error)
            raise

    def _start_due(self, *, idle: bool) -> None:
        while self._waiting and len(self._batches) < self._max_concurrency:
            now = self._clock()
            group, at = self._next(now, idle=idle)
            if at - now > _SOON:
                loop = asyncio.get_running_loop()
                delay = max(at - now, _TICK)
                self._timer = loop.call_later(delay, self._dispatch)
                return
            self._start(group, now)
        if not self._waiting:
            self._opening = None

    def _next(self, now: float, *, idle: bool) -> tuple[_Group, float]:
        """The group that goes next, and when."""
        first = next(iter(self._waiting))
        group = first.group
        if group is None:
            raise RuntimeError("a request waits in no group")
        if self._auto:
            opening = self._opening
            if opening is None or opening.key != group.key:
                opening = Opening(group.key, now, (idle, self._ended_rows.bit_length()))
                self._opening = opening
            # With other groups the model has something to do meanwhile.
            if group.rows >= self._most or len(self._groups) > 1:
                return group, now
            at = self._patience.until(opening, now, rows=group.rows, first=first.came)
        elif group.rows >= self._most or not self._delay:
            return group, now
        else:
            at = first.came + self._delay
            if at > now and self._full:
                return next(iter(self._full)), now
        return group, self._in_time(group, now, at) if at > now else at

    def _in_time(self, group: _Group, now: float, at: float) -> float:
        """`at`, or when half the time that some request can spare has gone."""
        takes = self.cost.seconds(group.rows)
        for request in group.requests:
            if request.deadline is not None:
                spare = request.deadline - request.came - takes
                at = min(at, request.came + spare / 2)
        return max(at, now)

    def _start(self, group: _Group, now: float) -> None:
        """Start a batch of a group's oldest requests.

        Smaller ones that fit may overtake one that does not: never for long, since each
        batch takes the oldest, and so fewer are older with each.
        """
        batch = _Batch(now)
        dropped = []
        for request in islice(group.requests, 2 * self._most):
            late = request.deadline is not None and request.deadline <= now
            if late or request.future.done():  # cancelled a moment ago
                dropped.append(request)
            elif batch.rows + request.rows <= self._most:
                batch.requests.append(request)
                batch.rows += request.rows
                if batch.rows == self._most:
                    break
        for request in dropped:
            self._remove(request)
            _fail(request, DeadlineExceeded())
        if not batch.requests:
            return
        loop = asyncio.get_running_loop()
        batch.task = loop.create_task(
            self._compute(batch), context=self._context.copy()
        )
        # Not a `finally` inside: a task that is cancelled before its first step has
        # none, and this resolves whatever is left, bugs of this file included.
        batch.task.add_done_callback(partial(self._ended, batch))
        self._batches[batch] = None
        batch.opening, self._opening = self._opening, None
        for request in batch.requests:
            self._remove(request)
            request.batch = batch
            request.began = now

    def _ended(self, batch: _Batch, task: asyncio.Task[None]) -> None:
        del self._batches[batch]
        error: BaseException | None
        if not task.cancelled():
            error = task.exception()
        elif task.cancelling():
            error = _closed()
        else:
            error = RuntimeError("the handler raised CancelledError by itself")
        for request in batch.requests:
            request.batch = None
            _fail(request, error or RuntimeError("a batch ended with no result"))
        # The error's traceback knows the batch, which must not know the error.
        batch.requests.clear()
        batch.task = None
        self._dispatch(batch)

    async def _compute(self, batch: _Batch) -> None:
        """Run a batch. What is raised goes to every request that has no outcome."""
        requests = batch.requests
        try:
            await self._run(batch, requests, batch.rows)
        except InvalidInput:
            if len(requests) == 1:
                raise
        except SystemExit as error:  # which a task would end the event loop with
            raise RuntimeError("the handler raised SystemExit") from error
        else:
            return
        # Somebody's rows are wrong, which their mates must not be told.
        for request in requests:
            if request.future.done():
                continue
            try:
                await self._run(batch, [request], request.rows)
            except SystemExit as error:
                _fail(request, RuntimeError("the handler raised SystemExit"), error)
            except Exception as error:  # noqa: BLE001 - of user code, for this request
                _fail(request, error)

    async def _run(self, batch: _Batch, requests: list[_Request], rows: int) -> None:
        batch.began = began = self._clock()
        result = await self._call(joined([request.arrays for request in requests]))
        self.cost.observe(rows, self._clock() - began)
        parts = split(result, [request.rows for request in requests], rows)
        for request, part in zip(requests, parts, strict=True):
            if not request.future.done():
                request.future.set_result(part)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Request:
    __slots__ = (
        "arrays",
        "batch",
        "began",
        "came",
        "deadline",
        "future",
        "group",
        "rows",
    )

    def __init__(
        self,
        arrays: Arrays,
        rows: int,
        future: asyncio.Future[Any],
        came: float,
        deadline: float | None,
    ) -> None:
        self.arrays = arrays
        self.rows = rows
        self.future = future
        self.came = self.began = came
        self.deadline = deadline
        self.group: _Group | None = None  # while it waits
        self.batch: _Batch | None = None  # while it runs


class _Group:
    __slots__ = ("key", "requests", "rows")

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.requests: OrderedDict[_Request, None] = OrderedDict()
        self.rows = 0


class _Batch:
    __slots__ = ("began", "opening", "requests", "rows", "task")

    def __init__(self, began: float) -> None:
        self.began = began
        self.requests: list[_Request] = []
        self.rows = 0
        self.opening: Opening | None = None
        self.task: asyncio.Task[None] | None = None


def _closed() -> ServerNotReady:
    return ServerNotReady("The model is stopping.")


def _fail(
    request: _Request, error: BaseException, cause: BaseException | None = None
) -> None:
    if cause is not None:
        error.__cause__ = cause
    if not request.future.done():
        request.future.set_exception(error)
