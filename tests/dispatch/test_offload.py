"""Threads for plain handlers: order, bounds, cancellation, and that nothing is left.

Functions say when they begin and end when they are told to, so that every schedule is
the test's. The last test alone leaves it to chance.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import itertools
import logging
import os
import random
import sys
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import anyio
import pytest
import uvloop
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kserve_lite.dispatch.offload import NICE, Offload
from kserve_lite.dispatch.statistics import QUEUE, Times

pytestmark = pytest.mark.anyio

T = TypeVar("T")

PATIENCE = 20.0

LOOPS = [asyncio.new_event_loop, uvloop.new_event_loop]
ERRORS = [
    ValueError,
    StopIteration,
    StopAsyncIteration,
    GeneratorExit,
    KeyboardInterrupt,
    SystemExit,
    asyncio.CancelledError,
]
names = (f"test-{number}" for number in itertools.count())


class Step:
    """A function that says when it begins, and ends when it is told to."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self._begun = threading.Event()
        self._go = threading.Event()

    def __call__(self) -> Step:
        self._begun.set()
        assert self._go.wait(PATIENCE)
        if self.error is not None:
            raise self.error
        return self

    @property
    def begun(self) -> bool:
        return self._begun.is_set()

    def wait(self) -> None:
        """Wait until a thread is inside; this needs nothing of the event loop."""
        assert self._begun.wait(PATIENCE)

    def end(self, error: BaseException | None = None) -> None:
        self.error = error
        self._go.set()


class Uses:
    """What is held: a count, and those who wait until it is zero."""

    def __init__(self) -> None:
        self.count = 0
        self.begins = 0
        self._loop_thread = threading.get_ident()
        self._ended = asyncio.Event()

    def begin(self) -> None:
        assert threading.get_ident() == self._loop_thread
        self.count += 1
        self.begins += 1

    def end(self) -> None:
        assert threading.get_ident() == self._loop_thread
        self.count -= 1
        self._ended.set()

    async def down_to(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE):
            while self.count > count:
                self._ended.clear()
                await self._ended.wait()


async def outcome(call: Coroutine[Any, Any, T]) -> T | BaseException:
    """What a call comes to; a task that raises SystemExit would end the loop."""
    try:
        return await call
    except BaseException as error:
        return error


async def soon(task: asyncio.Task[T]) -> T:
    async with asyncio.timeout(PATIENCE):
        return await task


def threads(name: str) -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith(f"{name}_")]


@contextmanager
def offloading(workers: int) -> Iterator[Offload]:
    """An Offload whose threads have ended when this does."""
    name = next(names)
    offload = Offload(workers, name)
    try:
        yield offload
    finally:
        offload.close()
        for thread in threads(name):
            thread.join(PATIENCE)
        assert not threads(name)
        assert offload.running == offload.waiting == 0


async def asked(offload: Offload, *steps: Step, **held: Any) -> list[asyncio.Task[Any]]:
    """Ask for steps, in order, and return when all of them are in the queue."""
    tasks = [asyncio.create_task(outcome(offload.run(s, **held))) for s in steps]
    await asyncio.sleep(0)
    return tasks


async def test_a_result_reaches_the_caller_from_another_thread() -> None:
    with offloading(2) as offload:
        value = object()
        assert await offload.run(lambda: value) is value
        assert await offload.run(threading.get_ident) != threading.get_ident()
        assert offload.workers == 2


@pytest.mark.parametrize("kind", ERRORS)
async def test_an_error_of_any_kind_reaches_the_caller(kind: type) -> None:
    with offloading(1) as offload:
        raised = kind("why")

        def fail() -> None:
            raise raised

        got = await outcome(offload.run(fail))
        if kind is StopIteration:
            assert type(got) is RuntimeError
            assert got.__cause__ is raised
        else:
            assert got is raised
        assert await offload.run(lambda: "alive") == "alive"


async def test_an_error_shows_where_it_was_raised() -> None:
    def fail() -> None:
        raise ValueError

    with offloading(1) as offload:
        try:
            await offload.run(fail)
        except ValueError as error:
            trace = error.__traceback__
    frames = []
    while trace is not None:
        frames.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    assert frames[-1] == "fail"


async def test_context_variables_are_the_callers_and_changes_stay_in_the_thread() -> (
    None
):
    variable = contextvars.ContextVar("variable", default="none")

    def change() -> str:
        before = variable.get()
        variable.set("changed")
        return before

    with offloading(1) as offload:
        assert await offload.run(change) == "none"
        variable.set("mine")
        assert await offload.run(change) == "mine"
        assert await offload.run(variable.get) == "mine"
        assert variable.get() == "mine"


async def test_the_time_in_the_queue_is_added() -> None:
    with offloading(1) as offload:
        first, second = Step(), Step()
        times: Times = {QUEUE: 10**15}
        (one,) = await asked(offload, first)
        (two,) = await asked(offload, second, times=times)
        first.wait()
        assert times == {QUEUE: 10**15}
        first.end()
        second.end()
        await soon(one)
        await soon(two)
        assert times.keys() == {QUEUE}
        assert times[QUEUE] > 10**15


async def test_calls_one_after_the_other_need_one_thread() -> None:
    with offloading(4) as offload:
        used = {await offload.run(threading.get_ident) for _ in range(100)}
        assert len(used) == 1


async def test_threads_are_named_and_do_not_hold_up_the_end_of_the_process() -> None:
    with offloading(3) as offload:
        steps = [Step() for _ in range(5)]
        tasks = await asked(offload, *steps)
        for step in steps[:3]:
            step.wait()
        found = threads(offload._name)
        assert sorted(t.name for t in found) == [
            f"{offload._name}_{n}" for n in (1, 2, 3)
        ]
        assert all(t.daemon for t in found)
        for step in steps:
            step.end()
        assert [await soon(t) for t in tasks] == steps


async def test_a_peer_that_asks_and_leaves_piles_up_nothing() -> None:
    class Payload:
        def __call__(self) -> None:
            raise AssertionError

    alive: weakref.WeakSet[Payload] = weakref.WeakSet()
    with offloading(1) as offload:
        stuck = Step()
        (task,) = await asked(offload, stuck)
        stuck.wait()
        small = sys.getsizeof(offload._queue)
        gc.disable()  # what is freed must be freed at once
        try:
            for _ in range(200):
                calls = []
                for _ in range(50):
                    payload = Payload()
                    alive.add(payload)
                    calls.append(asyncio.create_task(offload.run(payload)))
                del payload
                await asyncio.sleep(0)
                assert offload.waiting == 50
                for call in calls:
                    call.cancel()
                assert {type(await outcome(call)) for call in calls} == {  # type: ignore[arg-type]
                    asyncio.CancelledError
                }
                assert offload.waiting == 0
                del calls, call
            assert len(alive) < 100
        finally:
            gc.enable()
        assert sys.getsizeof(offload._queue) < small + 100_000
        stuck.end()
        assert await soon(task) is stuck


async def test_cancelled_before_the_loop_comes_round_it_never_runs() -> None:
    with offloading(1) as offload:
        first, never, last = Step(), Step(), Step()
        uses = Uses()
        tasks = await asked(offload, first, never, last, held=uses)
        first.wait()
        tasks[1].cancel()
        first.end()
        last.wait()  # the thread passed over the cancelled one; the loop stood still
        assert not never.begun
        assert isinstance(await soon(tasks[1]), asyncio.CancelledError)
        last.end()
        assert await soon(tasks[0]) is first
        assert await soon(tasks[2]) is last
        assert uses.begins == 0


@pytest.mark.parametrize("kind", [None, *ERRORS])
async def test_what_a_cancelled_call_comes_to_is_dropped_in_silence(
    kind: type[BaseException] | None, caplog: pytest.LogCaptureFixture
) -> None:
    with offloading(1) as offload:
        step, uses = Step(), Uses()
        (task,) = await asked(offload, step, held=uses)
        step.wait()
        task.cancel()
        assert isinstance(await soon(task), asyncio.CancelledError)
        assert uses.count == uses.begins == offload.running == 1
        step.end(None if kind is None else kind("why"))
        await uses.down_to(0)
        assert offload.running == 0
        assert await offload.run(lambda: "alive") == "alive"
    del task
    gc.collect()
    assert not caplog.records


@pytest.mark.parametrize("delivered", [False, True])
async def test_cancelled_when_the_function_has_ended(
    delivered: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with offloading(1) as offload:
        step, next_, uses = Step(), Step(), Uses()
        task, other = await asked(offload, step, next_, held=uses)
        step.end(ValueError("why"))
        next_.wait()  # so the first has ended; the loop has not come round
        if delivered:
            # Its result is there before the task is told.
            offload._mailbox._empty()  # type: ignore[union-attr]
        task.cancel()
        assert isinstance(await soon(task), asyncio.CancelledError)
        assert uses.begins == 0
        next_.end()
        assert await soon(other) is next_
        assert uses.count == 0
    del task
    gc.collect()
    assert not caplog.records


async def test_a_scope_of_anyio_ends_the_wait() -> None:
    with offloading(1) as offload:
        step, uses = Step(), Uses()
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(offload.run, step, None, uses)
                await anyio.lowlevel.checkpoint()
                step.wait()
                scope.cancel()
        assert scope.cancelled_caught
        assert uses.count == 1
        step.end()
        await uses.down_to(0)


async def test_a_call_that_is_dropped_with_its_loop_leaves_the_queue() -> None:
    with offloading(1) as offload:
        stuck = Step()
        (task,) = await asked(offload, stuck)
        call = offload.run(Step())
        call.send(None)
        assert offload.waiting == 1
        call.close()
        assert offload.waiting == 0
        stuck.end()
        assert await soon(task) is stuck


async def test_closed_what_waits_is_cancelled_and_what_runs_ends() -> None:
    with offloading(1) as offload:
        step, never = Step(), Step()
        started = threading.Event()
        one, two = await asked(offload, step, never)
        offload.start(started.set)
        step.wait()
        offload.close()
        offload.close()
        assert (offload.running, offload.waiting) == (1, 0)
        assert isinstance(await soon(two), asyncio.CancelledError)
        assert not two.cancelling()
        offload.start(started.set)
        with pytest.raises(RuntimeError, match="closed"):
            await offload.run(never)
        step.end()
        assert await soon(one) is step
    assert not never.begun
    assert not started.is_set()


async def test_started_functions_wait_in_line_with_the_others() -> None:
    with offloading(1) as offload:
        order: list[int] = []
        step = Step()
        (task,) = await asked(offload, step)
        offload.start(lambda: order.append(1))
        second = asyncio.create_task(offload.run(lambda: order.append(2)))
        await asyncio.sleep(0)
        offload.start(lambda: order.append(3))
        assert offload.waiting == 3
        step.end()
        await offload.run(lambda: order.append(4))
        assert order == [1, 2, 3, 4]
        await second
        await soon(task)


@pytest.mark.parametrize("kind", ERRORS)
async def test_an_error_that_nobody_waits_for_is_logged(
    kind: type, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise kind("why")

    with offloading(1) as offload:
        offload.start(fail)
        assert await offload.run(lambda: "alive") == "alive"
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None
    assert record.exc_info[0] is kind


def test_start_needs_no_event_loop() -> None:
    with offloading(1) as offload:
        started = threading.Event()
        offload.start(started.set)
        assert started.wait(PATIENCE)


@pytest.mark.parametrize("factory", LOOPS)
@pytest.mark.parametrize("told", [False, True])
def test_the_loop_may_be_closed_while_a_thread_runs(
    factory: Callable[[], asyncio.AbstractEventLoop],
    told: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with offloading(1) as offload:
        step, next_ = Step(), Step()

        async def leave() -> None:
            await asked(offload, step)  # the runner cancels it
            step.wait()
            if told:
                offload.start(next_)
                step.end(SystemExit())
                next_.wait()  # so the loop has been woken
            else:
                await asked(offload, Step())  # waits, and is cancelled

        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(leave())
        step.end(SystemExit())
        next_.end()
        with asyncio.Runner(loop_factory=factory) as runner:
            assert runner.run(offload.run(lambda: "again")) == "again"
    assert not caplog.records


@pytest.mark.parametrize("factory", LOOPS)
def test_what_ends_after_its_loop_is_freed(
    factory: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    with offloading(1) as offload:
        step, next_ = Step(), threading.Event()

        async def leave(step: Step) -> None:
            await asked(offload, step)
            step.wait()

        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(leave(step))
        kept = weakref.ref(step)
        step.end()
        del step
        offload.start(next_.set)
        assert next_.wait(PATIENCE)
        gc.collect()
        assert kept() is None


@pytest.mark.parametrize("factory", LOOPS)
def test_loops_at_the_same_time_get_their_own_results(
    factory: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    wrong: list[Any] = []
    with offloading(2) as offload:

        async def ask(number: int) -> None:
            for turn in range(200):
                sent = (number, turn)
                got = await offload.run(lambda sent=sent: sent)  # type: ignore[misc]
                if got != sent:
                    wrong.append((sent, got))

        async def ask_all(number: int) -> None:
            async with asyncio.timeout(PATIENCE):
                await asyncio.gather(*(ask(number + i) for i in range(4)))

        def serve(number: int) -> None:
            with asyncio.Runner(loop_factory=factory) as runner:
                runner.run(ask_all(number))

        loops = [threading.Thread(target=serve, args=(10 * n,)) for n in range(3)]
        for loop in loops:
            loop.start()
        for loop in loops:
            loop.join(PATIENCE * 2)
    assert not wrong


async def test_without_any_thread_the_caller_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with offloading(2) as offload:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_thread)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                await offload.run(lambda: None)
            assert (offload.running, offload.waiting) == (0, 0)
            assert not caplog.records
            offload.start(lambda: None)
            assert (offload.running, offload.waiting) == (0, 0)
            assert len(caplog.records) == 1
        assert await offload.run(lambda: "again") == "again"


async def test_with_fewer_threads_than_asked_for_all_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with offloading(4) as offload:
        first, second, third = Step(), Step(), Step()
        tasks = await asked(offload, first)
        first.wait()
        monkeypatch.setattr(threading.Thread, "start", no_thread)
        tasks += await asked(offload, second, third)
        assert (offload.running, offload.waiting) == (1, 2)
        for step in (first, second, third):
            step.wait()
            step.end()
        assert [await soon(t) for t in tasks] == [first, second, third]


def no_thread(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("left", ["never", "while it runs", "when it has ended"])
async def test_a_call_is_freed_at_once_when_it_has_ended(
    fails: bool, left: str
) -> None:
    class Failure(Exception):
        pass

    class Payload(Step):
        def __call__(self) -> Step:
            super().__call__()
            if fails:
                raise Failure(self)
            return Step()

    with offloading(1) as offload:
        gc.collect()
        gc.disable()  # so that a cycle would stay
        try:
            payload, next_ = Payload(), Step()
            call = weakref.ref(payload)
            task, other = await asked(offload, payload, next_)
            payload.wait()
            if left == "while it runs":
                task.cancel()
                await soon(task)
            payload.end()
            next_.wait()
            if left == "when it has ended":
                # The task has its result, but is cancelled before it goes on.
                offload._mailbox._empty()  # type: ignore[union-attr]
                task.cancel()
            result = weakref.ref(await soon(task))
            next_.end()
            await soon(other)
            del payload, task
            assert call() is None
            assert result() is None
        finally:
            gc.enable()


class Asked:
    """A call, as the machine below follows it."""

    def __init__(self, offload: Offload, uses: Uses) -> None:
        self.step = Step()
        self.outcomes = 0
        self.ran = False
        self.abandoned = False
        self.task = asyncio.create_task(self._run(offload, uses))

    async def _run(self, offload: Offload, uses: Uses) -> Step | BaseException:
        got = await outcome(offload.run(self.step, held=uses))
        self.outcomes += 1
        return got


class Schedules(RuleBasedStateMachine):
    """Anything that can happen to calls, in any order, one after the other."""

    factory: Callable[[], asyncio.AbstractEventLoop]

    @initialize(workers=st.integers(1, 3))
    def begin(self, workers: int) -> None:
        self.complaints: list[dict[str, Any]] = []
        self.runner = asyncio.Runner(loop_factory=type(self).factory)
        loop = self.runner.get_loop()
        loop.set_exception_handler(lambda _, told: self.complaints.append(told))
        self.offload = Offload(workers, next(names))
        self.uses = self.runner.run(self._uses())
        self.all: list[Asked] = []
        self.waiting: list[Asked] = []
        self.running: list[Asked] = []
        self.closed = False

    async def _uses(self) -> Uses:
        return Uses()

    def _settle(self) -> None:
        """Let begin what must: the first of those that wait, and no others."""
        while self.waiting and len(self.running) < self.offload.workers:
            first = self.waiting.pop(0)
            first.step.wait()
            first.ran = True
            self.running.append(first)

    @rule(number=st.integers(1, 5))
    def ask(self, number: int) -> None:
        async def ask() -> list[Asked]:
            new = [Asked(self.offload, self.uses) for _ in range(number)]
            await asyncio.sleep(0)
            return new

        new = self.runner.run(ask())
        self.all += new
        if self.closed:
            for call in new:
                got = self.runner.run(soon(call.task))
                assert type(got) is RuntimeError
        else:
            self.waiting += new
        self._settle()

    @precondition(lambda self: self.running)
    @rule(data=st.data(), kind=st.sampled_from([None, *ERRORS]))
    def end(self, data: st.DataObject, kind: type[BaseException] | None) -> None:
        call = self._any(data, self.running)
        error = None if kind is None else kind("why")
        call.step.end(error)
        self._settle()
        if call.abandoned:
            self.runner.run(self.uses.down_to(self._abandoned()))
            return
        got = self.runner.run(soon(call.task))
        if error is None:
            assert got is call.step
        elif isinstance(error, StopIteration):
            assert type(got) is RuntimeError
        else:
            assert got is error

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel_waiting(self, data: st.DataObject) -> None:
        call = self._any(data, self.waiting)
        self._cancel(call)

    @precondition(lambda self: self.waiting and self.running)
    @rule(data=st.data())
    def cancel_waiting_while_a_thread_gets_free(self, data: st.DataObject) -> None:
        """The thread comes to the queue before the loop has done anything."""
        call = self._any(data, self.waiting)
        ends = self._any(data, self.running)

        async def cancel() -> None:
            call.task.cancel()
            ends.step.end()
            self._settle()

        self.runner.run(cancel())
        assert isinstance(self.runner.run(soon(call.task)), asyncio.CancelledError)
        self.runner.run(soon(ends.task))
        self.runner.run(self.uses.down_to(self._abandoned()))

    @precondition(lambda self: any(not call.abandoned for call in self.running))
    @rule(data=st.data())
    def cancel_running(self, data: st.DataObject) -> None:
        call = data.draw(st.sampled_from([c for c in self.running if not c.abandoned]))
        call.abandoned = True
        self._cancel(call)

    @precondition(lambda self: any(not call.abandoned for call in self.running))
    @rule(data=st.data())
    def cancel_running_that_ends(self, data: st.DataObject) -> None:
        """Both at once, before the loop has heard of either."""
        call = data.draw(st.sampled_from([c for c in self.running if not c.abandoned]))
        self.running.remove(call)

        async def cancel() -> None:
            call.step.end()
            self._settle()
            call.task.cancel()

        self.runner.run(cancel())
        assert isinstance(self.runner.run(soon(call.task)), asyncio.CancelledError)
        self.runner.run(self.uses.down_to(self._abandoned()))

    @precondition(lambda self: not self.closed)
    @rule()
    def close(self) -> None:
        self.offload.close()
        self.closed = True
        for call in self.waiting:
            got = self.runner.run(soon(call.task))
            assert isinstance(got, asyncio.CancelledError)
        self.waiting.clear()

    def _any(self, data: st.DataObject, calls: list[Asked]) -> Asked:
        return calls.pop(data.draw(st.integers(0, len(calls) - 1)))

    def _cancel(self, call: Asked) -> None:
        call.task.cancel()
        assert isinstance(self.runner.run(soon(call.task)), asyncio.CancelledError)

    def _abandoned(self) -> int:
        return sum(call.abandoned for call in self.running)

    @invariant()
    def the_counts_are_exact(self) -> None:
        assert self.offload.running == len(self.running) <= self.offload.workers
        assert self.offload.waiting == len(self.waiting)
        assert self.uses.count == self._abandoned()

    @invariant()
    def only_those_began_whose_turn_it_was(self) -> None:
        for call in self.all:
            assert call.step.begun == call.ran

    @invariant()
    def everybody_has_one_outcome(self) -> None:
        under_way = {*self.waiting, *(c for c in self.running if not c.abandoned)}
        for call in self.all:
            assert call.outcomes == (call not in under_way)
        assert not self.complaints

    def teardown(self) -> None:
        if not hasattr(self, "offload"):
            return
        while self.running:
            self._finish(self.running.pop(0))
        self.runner.run(self.uses.down_to(0))
        self.offload.close()
        for thread in threads(self.offload._name):
            thread.join(PATIENCE)
        assert not threads(self.offload._name)
        assert all(call.outcomes == 1 for call in self.all)
        assert not self.complaints
        self.runner.close()

    def _finish(self, call: Asked) -> None:
        call.step.end()
        self._settle()
        self.runner.run(soon(call.task))


class OnAsyncio(Schedules):
    factory = asyncio.new_event_loop


class OnUvloop(Schedules):
    factory = uvloop.new_event_loop


@pytest.mark.parametrize("machine", [OnAsyncio, OnUvloop])
def test_any_schedule(machine: type[Schedules]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(max_examples=50, stateful_step_count=30, deadline=None),
    )


class Call:
    """A short function; what it did, and whether its caller left."""

    def __init__(self, kind: int, together: Together) -> None:
        self.kind = kind
        self.together = together
        self.runs = 0

    def __call__(self) -> Call:
        with self.together.inside():
            self.runs += 1
            if self.kind == 1:
                sum(range(300))
            elif self.kind == 2:
                self.together.give_way()
            elif self.kind == 3:
                raise LookupError
            return self


class Together:
    """How many functions run at once, and at the most."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self._lock = threading.Lock()

    @contextmanager
    def inside(self) -> Iterator[None]:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            yield
        finally:
            with self._lock:
                self.now -= 1

    def give_way(self) -> None:
        """Let another thread have the interpreter."""
        os.sched_yield()


@pytest.mark.parametrize("workers", [1, 3])
async def test_thousands_of_calls_and_cancels_leave_nothing(workers: int) -> None:
    chance = random.Random(workers)
    together = Together()
    uses = Uses()
    alive: weakref.WeakSet[Call] = weakref.WeakSet()
    counts = dict.fromkeys(("ended", "failed", "left", "ran and left", "asked"), 0)

    async def ask(offload: Offload) -> None:
        call = Call(chance.randrange(4), together)
        alive.add(call)
        counts["asked"] += 1
        task = asyncio.create_task(offload.run(call, {}, uses))
        if chance.random() < 0.4:
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)
            task.cancel()
        try:
            assert await task is call
        except asyncio.CancelledError:
            counts["left"] += 1
            counts["ran and left"] += call.runs
        except LookupError:
            counts["failed"] += 1
            assert (call.kind, call.runs) == (3, 1)
        else:
            counts["ended"] += 1
            assert call.runs == 1
            assert call.kind != 3

    async def peer(offload: Offload) -> None:
        for _ in range(100):
            await ask(offload)

    with offloading(workers) as offload:
        async with asyncio.timeout(PATIENCE * 2):
            await asyncio.gather(*(peer(offload) for _ in range(40)))
        await uses.down_to(0)
        assert offload.waiting == offload.running == 0
    assert counts.pop("ran and left") <= counts["left"]
    assert counts.pop("asked") == sum(counts.values()) == 4_000
    assert all(counts.values())
    assert together.now == 0
    assert together.most <= workers
    gc.collect()
    assert not alive


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it is the process's own")
async def test_all_threads_are_equally_nicer_than_the_loop() -> None:
    """Also those that another thread has started, which inherit its niceness."""
    offload = Offload(2)
    found: list[int] = []
    recorded = threading.Event()

    def record() -> None:
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    def second() -> None:
        record()
        recorded.set()

    def first() -> None:
        record()
        offload.start(second)  # for which this thread starts another
        assert recorded.wait(20)

    await offload.run(first)
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert found == [min(19, own + NICE)] * 2
    offload.close()
