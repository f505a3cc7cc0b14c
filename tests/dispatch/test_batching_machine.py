"""Any order of arrivals, cancels, results, failures and closes leaves no one waiting.

Each row holds a number of its own, so that every result tells whose it is. What may
happen to a request is written down as it happens to it, and nothing else may.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import uvloop
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from kserve_lite.dispatch.batching import Batcher
from kserve_lite.errors import (
    DeadlineExceeded,
    InvalidInput,
    Overloaded,
    ServerNotReady,
)
from kserve_lite.handlers import AUTO, Batching

MOST, QUEUE = 4, 6
INDEX = st.integers(0, 99)


class ModelError(Exception):
    pass


@dataclass(eq=False)
class Asked:
    """A request and the exceptions that it may end with."""

    values: list[int]
    task: asyncio.Task[Any]
    may_raise: set[type[BaseException]] = field(default_factory=set)
    deadline: float | None = None
    may_succeed: bool = True


@dataclass(eq=False)
class Called:
    """One call of the handler."""

    arrays: dict[str, Any]
    future: asyncio.Future[str]
    cancelled: bool = False

    @property
    def values(self) -> list[int]:
        found: list[int] = self.arrays["x"][:, 0].astype(int).tolist()
        return found


class BatcherMachine(RuleBasedStateMachine):
    new_loop: ClassVar[Callable[[], asyncio.AbstractEventLoop]]

    def __init__(self) -> None:
        super().__init__()
        self.loop = type(self).new_loop()
        self.now = 1000.0
        self.asked: list[Asked] = []
        self.calls: list[Called] = []
        self.bad: set[int] = set()
        self.last = 0
        self.closed = False

    @initialize(delay=st.sampled_from([0.0, 20_000.0, AUTO]), slots=st.integers(1, 2))
    def begin(self, delay: Any, slots: int) -> None:
        self.slots = slots
        self.batcher = Batcher(
            self.call,
            Batching(MOST, delay),
            max_queue_size=QUEUE,
            max_concurrency=slots,
            clock=lambda: self.now,
        )

    async def call(self, arrays: dict[str, Any]) -> Any:
        called = Called(arrays, self.loop.create_future())
        self.calls.append(called)
        x = arrays["x"]
        assert 1 <= len(x) <= MOST
        assert len(set(called.values)) == len(x)
        try:
            how = await called.future
        except asyncio.CancelledError:
            called.cancelled = True
            raise
        finally:
            self.calls.remove(called)
        if how == "error":
            raise ModelError
        if how == "short":
            return x[1:]
        if how == "list":
            return x.tolist()
        if self.bad.intersection(called.values):
            raise InvalidInput("a bad row")
        return {"x": x, "tenfold": x * 10} if how == "dict" else x

    def go(self) -> None:
        async def steps() -> None:
            for _ in range(12):
                await asyncio.sleep(0)

        self.loop.run_until_complete(steps())

    @rule(
        sizes=st.lists(st.integers(1, MOST), min_size=1, max_size=5),
        kind=st.sampled_from([np.float32, np.float64]),
        parameters=st.sampled_from([(), ("p", 1)]),
        bad=st.booleans(),
        seconds=st.sampled_from([None, None, 1.0, 30.0]),
    )
    def arrive(
        self, sizes: list[int], kind: Any, parameters: Any, bad: bool, seconds: Any
    ) -> None:
        room = QUEUE + (self.slots - self.batcher.running) * MOST
        room -= self.batcher.waiting
        for size in sizes:
            values = list(range(self.last, self.last + size))
            self.last += size
            deadline = None if seconds is None else self.now + seconds
            x = np.array(values, kind).reshape(-1, 1)
            task = self.loop.create_task(
                self.batcher.run({"x": x}, parameters=parameters, deadline=deadline)
            )
            asked = Asked(values, task, deadline=deadline)
            if bad:
                self.bad.add(values[0])
                asked.may_raise.add(InvalidInput)
            if self.closed:
                asked.may_raise = {ServerNotReady}
                asked.may_succeed = False
            elif deadline is not None:  # by an estimate
                asked.may_raise.add(Overloaded)
            if len(sizes) > room:
                asked.may_raise.add(Overloaded)
            self.asked.append(asked)
            bad = False
        self.go()

    @precondition(lambda self: self.asked)
    @rule(index=INDEX, among=st.integers(1, 3))
    def cancel(self, index: int, among: int) -> None:
        """Several neighbours, so that whole batches are cancelled too."""
        start = index % len(self.asked)
        for asked in self.asked[start : start + among]:
            if asked.task.cancel():
                asked.may_raise.add(asyncio.CancelledError)
                asked.may_succeed = False
        self.go()

    @precondition(lambda self: self.calls)
    @rule(index=INDEX, how=st.sampled_from(["ok", "dict", "error", "short", "list"]))
    def answer(self, index: int, how: str) -> None:
        called = self.calls[index % len(self.calls)]
        raises = {"error": ModelError, "short": ValueError, "list": TypeError}.get(how)
        if raises is not None:
            for asked in self.asked:
                if set(asked.values).intersection(called.values):
                    asked.may_raise.add(raises)
                    asked.may_succeed = False
        called.future.set_result(how)
        self.go()

    @rule(seconds=st.sampled_from([0.001, 0.5, 5.0, 25.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for asked in self.asked:
            if asked.deadline is not None and asked.deadline <= self.now:
                asked.may_raise.add(DeadlineExceeded)
        self.loop.call_soon(self.batcher._dispatch)  # as its timer would
        self.go()

    @precondition(lambda self: not self.closed)
    @rule(really=st.integers(0, 9))
    def close(self, really: int) -> None:
        if really:
            return
        waiting = {tuple(r.arrays["x"][:, 0]) for r in self.batcher._waiting}
        self.batcher.close()
        self.closed = True
        self.go()
        for asked in self.asked:
            if tuple(asked.values) in waiting:
                assert isinstance(asked.task.exception(), ServerNotReady)
                asked.may_raise.add(ServerNotReady)

    def outcomes_are_right(self) -> None:
        for asked in list(self.asked):
            if not asked.task.done():
                continue
            self.asked.remove(asked)
            if asked.task.cancelled():
                assert asyncio.CancelledError in asked.may_raise
                continue
            error = asked.task.exception()
            if error is not None:
                assert type(error) in asked.may_raise, repr(error)
                continue
            result = asked.task.result()
            assert asked.may_succeed
            assert not self.bad.intersection(asked.values)
            if isinstance(result, dict):
                assert result["tenfold"][:, 0].tolist() == [
                    10 * i for i in asked.values
                ]
                result = result["x"]
            assert result[:, 0].tolist() == asked.values

    @invariant()
    def all_is_right(self) -> None:
        if not hasattr(self, "batcher"):
            return
        self.outcomes_are_right()
        batcher = self.batcher
        assert batcher.running == len(batcher._batches) <= self.slots
        # What was let in for a free slot may find that others filled it.
        assert batcher.waiting <= QUEUE + self.slots * MOST
        assert len(self.calls) <= self.slots
        # Nothing is held but what somebody waits for.
        running = [r for b in batcher._batches for r in b.requests]
        live = sum(not r.future.done() for r in running)
        assert batcher.waiting + live == len(self.asked)
        assert batcher._rows == sum(r.rows for r in batcher._waiting)
        groups = batcher._groups.values()
        assert sum(len(group.requests) for group in groups) == batcher.waiting
        assert all(group.requests for group in groups)
        full = {group for group in groups if group.rows >= MOST}
        assert set(batcher._full) == full
        # Every batch that runs has a caller.
        for batch in batcher._batches:
            assert any(not r.future.done() for r in batch.requests)

    def teardown(self) -> None:
        for _ in range(200):
            self.outcomes_are_right()
            if not self.asked:
                break
            if self.calls:
                self.answer(0, "ok")
            else:
                self.pass_time(25.0)
        self.go()
        if hasattr(self, "batcher"):
            assert not self.asked
            assert (self.batcher.waiting, self.batcher.running) == (0, 0)
            assert not self.batcher._groups
            assert not self.batcher._full
            assert self.batcher._timer is None
            assert self.batcher._opening is None
        assert asyncio.all_tasks(self.loop) == set()
        self.loop.close()


class AsyncioMachine(BatcherMachine):
    new_loop = staticmethod(asyncio.new_event_loop)


class UvloopMachine(BatcherMachine):
    new_loop = staticmethod(uvloop.new_event_loop)


TestAsyncio = AsyncioMachine.TestCase
TestAsyncio.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestUvloop = UvloopMachine.TestCase
TestUvloop.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
