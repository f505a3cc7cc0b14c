"""Rows of several requests in one call: who goes when, and who gets what.

Schedules are controlled by events: `Model` computes when it is told to. `steps()` lets
the event loop go round until nothing moves; no test waits for time to pass, but for
those of a delay, which measure none.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import math
import random
import selectors
import traceback
import weakref
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from kserve_lite.dispatch.batching import Batcher
from kserve_lite.dispatch.patience import Cost, Opening, Patience
from kserve_lite.dispatch.statistics import BATCH, Times
from kserve_lite.errors import (
    DeadlineExceeded,
    InvalidInput,
    Overloaded,
    ServerNotReady,
)
from kserve_lite.handlers import AUTO, Batching

pytestmark = pytest.mark.anyio


async def steps() -> None:
    for _ in range(12):
        await asyncio.sleep(0)


class Model:
    """A call that computes when it is told to: rows times ten."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.pending: list[asyncio.Future[Any]] = []
        self.cancelled = 0
        self.called = asyncio.Event()

    async def __call__(self, arrays: dict[str, Any]) -> Any:
        self.calls.append(arrays)
        self.called.set()
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.pending.append(future)
        try:
            result = await future
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.pending.remove(future)
        return arrays["x"] * 10 if result is None else result

    @property
    def batches(self) -> list[list[float]]:
        return [call["x"].reshape(-1).tolist() for call in self.calls]

    async def finish(self, result: Any = None) -> None:
        future = self.pending[0]
        if isinstance(result, BaseException):
            future.set_exception(result)
        else:
            future.set_result(result)
        await steps()


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def rows(*values: float, dtype: Any = np.float32) -> dict[str, Any]:
    return {"x": np.array(values, dtype).reshape(-1, 1)}


def batcher_of(
    call: Callable[[dict[str, Any]], Awaitable[Any]],
    most: int = 4,
    delay: Any = 0.0,
    **keywords: Any,
) -> Batcher:
    keywords.setdefault("max_queue_size", 100)
    return Batcher(call, Batching(most, delay), **keywords)


async def start(batcher: Batcher, arrays: Mapping[str, Any], **keywords: Any) -> Any:
    task = asyncio.ensure_future(batcher.run(arrays, **keywords))
    await steps()
    return task


def values(task: asyncio.Task[Any]) -> list[float]:
    found: list[float] = task.result().reshape(-1).tolist()
    return found


def is_empty(batcher: Batcher) -> bool:
    held = (batcher._waiting, batcher._groups, batcher._full, batcher._batches)
    return not any(held) and batcher._rows == 0 and batcher._timer is None


async def test_rows_of_one_step_go_together() -> None:
    model = Model()
    batcher = batcher_of(model)
    tasks = [asyncio.ensure_future(batcher.run(rows(i))) for i in range(3)]
    await steps()
    assert model.batches == [[0, 1, 2]]
    assert (batcher.waiting, batcher.running) == (0, 1)
    await model.finish()
    assert [values(task) for task in tasks] == [[0], [10], [20]]
    assert is_empty(batcher)


async def test_what_waits_goes_when_the_model_is_free() -> None:
    model = Model()
    batcher = batcher_of(model)
    tasks = [await start(batcher, rows(i)) for i in range(7)]
    assert model.batches == [[0]]
    assert batcher.waiting == 6
    await model.finish()
    await model.finish()
    await model.finish()
    assert model.batches == [[0], [1, 2, 3, 4], [5, 6]]
    assert [values(task) for task in tasks] == [[10.0 * i] for i in range(7)]


async def test_results_are_views() -> None:
    model = Model()
    batcher = batcher_of(model)
    a, b = (asyncio.ensure_future(batcher.run(rows(1, 2))) for _ in range(2))
    await steps()
    result = np.arange(4.0).reshape(4, 1)
    await model.finish(result)
    assert np.shares_memory(a.result(), result)
    assert np.shares_memory(b.result(), result)
    assert (values(a), values(b)) == ([0, 1], [2, 3])


async def test_a_request_alone_is_not_copied() -> None:
    model = Model()
    batcher = batcher_of(model)
    given = rows(1, 2)
    task = await start(batcher, given)
    assert model.calls[0]["x"] is given["x"]
    result = {"y": np.zeros((2, 5))}
    await model.finish(result)
    assert task.result() is result


async def test_a_request_is_never_split_and_overtaken_once_at_most() -> None:
    model = Model()
    batcher = batcher_of(model)
    sizes: list[list[float]] = [[0], [1, 1, 1], [2, 2], [3], [4, 4, 4], [5]]
    tasks = [await start(batcher, rows(*given)) for given in sizes]
    for _ in range(4):
        await model.finish()
    assert model.batches == [[0], [1, 1, 1, 3], [2, 2, 5], [4, 4, 4]]
    assert [len(values(task)) for task in tasks] == [1, 3, 2, 1, 3, 1]


async def test_groups_are_not_mixed_and_go_by_age() -> None:
    model = Model()
    batcher = batcher_of(model)
    x = np.zeros((1, 2), np.float32)
    kinds: list[tuple[dict[str, Any], Any]] = [
        ({"x": x}, ()),
        ({"x": x.astype(np.float64)}, ()),
        ({"x": np.zeros((1, 3), np.float32)}, ()),
        ({"x": np.zeros((1, 2, 1), np.float32)}, ()),
        ({"x": x}, ("temperature", 1)),
        ({"x": x, "y": x}, ()),
        ({"x": x, "y": None}, ()),
        ({"x": torch.zeros(1, 2)}, ()),
    ]
    blocker = await start(batcher, rows(0))
    tasks = [
        await start(batcher, arrays, parameters=parameters)
        for _ in range(2)
        for arrays, parameters in kinds
    ]
    while model.pending:
        await model.finish()
    assert [len(call["x"]) for call in model.calls] == [1] + [2] * len(kinds)
    for call, (arrays, _) in zip(model.calls[1:], kinds, strict=True):
        assert call.keys() == arrays.keys()
        assert call["x"].dtype == arrays["x"].dtype
        assert call["x"].shape[1:] == arrays["x"].shape[1:]
    assert all(task.done() for task in [blocker, *tasks])
    assert model.calls[7]["y"] is None


async def test_the_order_of_inputs_does_not_matter() -> None:
    model = Model()
    batcher = batcher_of(model)
    x, y = rows(1)["x"], rows(2)["x"]
    tasks = [
        asyncio.ensure_future(batcher.run(arrays))
        for arrays in ({"x": x, "y": y}, {"y": y, "x": x})
    ]
    await steps()
    assert model.calls[0]["x"].tolist() == [[1], [1]]
    assert model.calls[0]["y"].tolist() == [[2], [2]]
    await model.finish()
    assert [values(task) for task in tasks] == [[10], [10]]


async def test_a_group_is_not_starved_by_a_busier_one() -> None:
    model = Model()
    batcher = batcher_of(model, most=1)
    await start(batcher, rows(0))
    await start(batcher, rows(1))
    other = await start(batcher, rows(9, dtype=np.int64))
    for i in range(2, 5):
        await start(batcher, rows(i))
    await model.finish()
    await model.finish()
    await model.finish()
    assert values(other) == [90]
    while model.pending:
        await model.finish()


async def test_torch_tensors_are_concatenated_beside_numpy_arrays() -> None:
    model = Model()
    batcher = batcher_of(model)
    tasks = [
        asyncio.ensure_future(
            batcher.run({"x": torch.tensor([[i]]), "y": np.array([i])})
        )
        for i in range(2)
    ]
    await steps()
    assert torch.equal(model.calls[0]["x"], torch.tensor([[0], [1]]))
    assert model.calls[0]["y"].tolist() == [0, 1]
    result = torch.tensor([[5.0], [6.0]])
    await model.finish(result)
    assert torch.equal(tasks[1].result(), torch.tensor([[6.0]]))
    assert tasks[1].result().data_ptr() == result[1:].data_ptr()


class Pair(NamedTuple):
    label: Any
    score: Any


async def test_results_keep_their_structure() -> None:
    model = Model()
    batcher = batcher_of(model)
    label, score = np.arange(3), np.arange(6).reshape(3, 2)
    for result, pick in (
        ((label, score), lambda part: part),
        ({"label": label, "score": score}, lambda part: tuple(part.values())),
        (Pair(label, score), lambda part: (part.label, part.score)),
    ):
        tasks = [
            asyncio.ensure_future(batcher.run(arrays))
            for arrays in (rows(0), rows(1, 2))
        ]
        await steps()
        await model.finish(result)
        for task, where in zip(tasks, (slice(1), slice(1, 3)), strict=True):
            assert type(task.result()) is type(result)
            found = pick(task.result())
            assert found[0].tolist() == label[where].tolist()
            assert found[1].tolist() == score[where].tolist()


@pytest.mark.parametrize(
    ("result", "kind", "words"),
    [
        (np.zeros(3), ValueError, "a batch of 2 rows .* an array of shape \\[3\\]"),
        (np.array(1.0), ValueError, "of shape \\[\\]"),
        ((np.zeros(2), np.zeros(1)), ValueError, "result 1 of shape \\[1\\]"),
        ({"a": np.zeros((1, 2))}, ValueError, "result 'a' of shape \\[1, 2\\]"),
        ({"a": 1.0}, TypeError, "its result 'a' is of type float"),
        ([1.0, 2.0], TypeError, "of type list"),
        (np.float32(1), TypeError, "of type float32"),
        ("text", TypeError, "of type str"),
        ((), TypeError, "an empty tuple"),
        ({}, TypeError, "an empty dict"),
    ],
)
@pytest.mark.parametrize("requests", [1, 2])
async def test_a_wrong_result_fails_its_batch_only(
    result: Any, kind: type[Exception], words: str, requests: int
) -> None:
    model = Model()
    batcher = batcher_of(model)
    arrays = [rows(0), rows(1)] if requests == 2 else [rows(0, 1)]
    tasks = [asyncio.ensure_future(batcher.run(given)) for given in arrays]
    await steps()
    after = await start(batcher, rows(2))
    await model.finish(result)
    await model.finish()
    for task in tasks:
        with pytest.raises(kind, match=words):
            task.result()
    assert values(after) == [20]
    assert is_empty(batcher)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": np.array(1.0)}, "Input 'x': .* got a scalar"),
        (
            {"x": np.zeros((2, 1)), "y": np.zeros(3)},
            "Input 'y': expected 2 rows as input 'x' has, got 3",
        ),
        ({"x": np.zeros((5, 1))}, "Input 'x': expected 1 to 4 rows, got 5"),
        ({"x": np.zeros((0, 7))}, "Input 'x': expected 1 to 4 rows, got 0"),
        ({"x": None}, "No input: expected one of 1 to 4 rows"),
        ({}, "No input"),
        ({"x": np.zeros(1), "y": torch.tensor(1.0)}, "Input 'y': .* got a scalar"),
    ],
)
async def test_what_has_no_rows_of_a_batch_is_refused(
    arrays: dict[str, Any], words: str
) -> None:
    model = Model()
    batcher = batcher_of(model)
    with pytest.raises(InvalidInput, match=words):
        await batcher.run(arrays)
    assert is_empty(batcher)
    assert not model.calls


@pytest.mark.parametrize("size", [0, 1, 5])
async def test_no_more_wait_than_may(size: int) -> None:
    model = Model()
    batcher = batcher_of(model, most=2, max_queue_size=size)
    running = await start(batcher, rows(0))
    # Every one a group of its own.
    waiting = [await start(batcher, {f"x{i}": np.zeros(1)}) for i in range(size)]
    for _ in range(2):
        with pytest.raises(Overloaded, match="too many requests wait"):
            await batcher.run(rows(1))
    assert batcher.waiting == len(batcher._groups) == size
    batcher.close()
    await model.finish()
    assert values(running) == [0]
    assert all(isinstance(task.exception(), ServerNotReady) for task in waiting)


async def test_in_one_step_no_more_come_than_may_wait_and_run() -> None:
    model = Model()
    batcher = batcher_of(model, most=2, max_queue_size=3)
    tasks = [asyncio.ensure_future(batcher.run(rows(i))) for i in range(10)]
    await steps()
    assert sum(task.done() for task in tasks) == 5
    while model.pending:
        await model.finish()
    assert [values(task) for task in tasks[:5]] == [[10.0 * i] for i in range(5)]
    assert {type(task.exception()) for task in tasks[5:]} == {Overloaded}


async def test_so_many_batches_at_a_time() -> None:
    model = Model()
    batcher = batcher_of(model, most=1, max_concurrency=2)
    tasks = [asyncio.ensure_future(batcher.run(rows(i))) for i in range(5)]
    await steps()
    assert (batcher.running, batcher.waiting) == (2, 3)
    await model.finish()
    assert (batcher.running, batcher.waiting) == (2, 2)
    while model.pending:
        await model.finish()
    assert [values(task) for task in tasks] == [[10.0 * i] for i in range(5)]


async def test_nothing_stays_of_a_cancelled_request_that_waits() -> None:
    model = Model()
    batcher = batcher_of(model)
    await start(batcher, rows(0))
    mate = await start(batcher, rows(1))
    for i in range(300):  # more than may wait
        dtype = np.float32 if i % 2 else np.float64
        task = await start(batcher, rows(2, dtype=dtype))
        assert batcher.waiting == 2
        task.cancel()
        await steps()
        assert task.cancelled()
        assert (batcher.waiting, len(batcher._groups), batcher._rows) == (1, 1, 1)
    await model.finish()
    await model.finish()
    assert values(mate) == [10]
    assert model.batches == [[0], [1]]
    assert is_empty(batcher)


async def test_a_cancelled_request_that_runs_harms_no_mate() -> None:
    model = Model()
    batcher = batcher_of(model)
    tasks = [asyncio.ensure_future(batcher.run(rows(i))) for i in range(3)]
    await steps()
    tasks[0].cancel()
    await steps()
    assert tasks[0].cancelled()
    assert not model.cancelled
    await model.finish()
    assert [values(task) for task in tasks[1:]] == [[10], [20]]
    assert is_empty(batcher)


async def test_a_batch_without_callers_is_cancelled() -> None:
    model = Model()
    batcher = batcher_of(model)
    tasks = [asyncio.ensure_future(batcher.run(rows(i))) for i in range(3)]
    await steps()
    after = await start(batcher, rows(3))
    for task in tasks:
        assert not model.cancelled
        task.cancel()
        await steps()
    assert model.cancelled == 1
    assert model.batches == [[0, 1, 2], [3]]
    await model.finish()
    assert values(after) == [30]
    assert is_empty(batcher)


async def test_a_batch_that_is_cancelled_before_its_first_step_answers() -> None:
    model = Model()
    batcher = batcher_of(model)
    task = asyncio.ensure_future(batcher.run(rows(0)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    (batch,) = batcher._batches
    assert batch.task is not None
    batch.task.cancel()
    await steps()
    assert not model.calls
    assert isinstance(task.exception(), ServerNotReady)
    assert is_empty(batcher)
    after = await start(batcher, rows(1))
    await model.finish()
    assert values(after) == [10]


@pytest.mark.parametrize("before", range(4))
async def test_a_request_may_be_cancelled_at_any_step(before: int) -> None:
    model = Model()
    batcher = batcher_of(model)
    tasks = [asyncio.ensure_future(batcher.run(rows(i))) for i in range(2)]
    for _ in range(before):
        await asyncio.sleep(0)
    tasks[0].cancel()
    await steps()
    assert tasks[0].cancelled()
    assert model.batches == ([[1]] if before < 2 else [[0, 1]])
    await model.finish()
    assert values(tasks[1]) == [10]
    assert is_empty(batcher)


async def test_a_bad_row_harms_no_mate() -> None:
    calls = []

    async def call(arrays: dict[str, Any]) -> Any:
        calls.append(arrays["x"].reshape(-1).tolist())
        if (arrays["x"] < 0).any():
            raise InvalidInput("Input 'x': negative.")
        return arrays["x"] * 10

    batcher = batcher_of(call)
    tasks = [asyncio.ensure_future(batcher.run(rows(i))) for i in (1, -2, 3)]
    await asyncio.wait(tasks)
    assert calls == [[1, -2, 3], [1], [-2], [3]]
    assert (values(tasks[0]), values(tasks[2])) == ([10], [30])
    with pytest.raises(InvalidInput, match="negative"):
        tasks[1].result()
    await steps()
    assert is_empty(batcher)


async def test_requests_that_are_tried_alone_fail_alone() -> None:
    model = Model()
    batcher = batcher_of(model)
    tasks = [asyncio.ensure_future(batcher.run(rows(i))) for i in range(5)][:4]
    await steps()
    await model.finish(InvalidInput("one of them"))
    tasks[0].cancel()
    await steps()
    await model.finish()  # of the cancelled one, which had begun
    tasks[1].cancel()  # the others' results do not come of this call
    await steps()
    await model.finish()
    await model.finish(SystemExit(2))
    await model.finish(KeyError("model"))
    await model.finish()
    assert model.batches == [[0, 1, 2, 3], [0], [1], [2], [3], [4]]
    assert [task.cancelled() for task in tasks] == [True, True, False, False]
    with pytest.raises(RuntimeError, match="SystemExit"):
        tasks[2].result()
    with pytest.raises(KeyError):
        tasks[3].result()
    await steps()
    assert is_empty(batcher)


async def test_a_failure_is_one_object_whose_traceback_does_not_grow() -> None:
    async def call(arrays: dict[str, Any]) -> Any:
        raise LookupError("the model's")

    batcher = batcher_of(call)
    seen: list[tuple[BaseException, traceback.StackSummary]] = []

    async def ask(value: float) -> None:
        try:
            await batcher.run(rows(value))
        except LookupError as error:
            seen.append((error, traceback.extract_tb(error.__traceback__)))

    await asyncio.gather(*(ask(i) for i in range(4)))
    assert len({id(error) for error, _ in seen}) == 1
    assert len({len(frames) for _, frames in seen}) == 1
    assert {frames[-1].name for _, frames in seen} == {"call"}


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (SystemExit(1), "SystemExit"),
        (asyncio.CancelledError(), "CancelledError by itself"),
    ],
)
async def test_what_a_handler_may_not_raise_is_an_error_like_others(
    error: BaseException, words: str
) -> None:
    async def call(arrays: dict[str, Any]) -> Any:
        if arrays["x"][0] == 0:
            raise error
        return arrays["x"]

    batcher = batcher_of(call)
    results = await asyncio.gather(
        *(batcher.run(rows(0)) for _ in range(2)), return_exceptions=True
    )
    assert [type(result) for result in results] == [RuntimeError] * 2
    assert words in str(results[0])
    assert (await batcher.run(rows(1))).tolist() == [[1]]


async def test_a_call_that_raises_stop_iteration_before_it_is_awaited() -> None:
    def call(arrays: dict[str, Any]) -> Awaitable[Any]:
        raise StopIteration

    batcher = batcher_of(call)
    with pytest.raises(RuntimeError, match="StopIteration"):
        await batcher.run(rows(0))
    await steps()
    assert is_empty(batcher)


async def test_a_failure_keeps_no_arrays_alive() -> None:
    async def call(arrays: dict[str, Any]) -> Any:
        raise LookupError

    batcher = batcher_of(call)
    gone = []
    gc.disable()
    try:
        for _ in range(2):
            arrays = rows(1)
            gone.append(weakref.ref(arrays["x"]))
            with contextlib.suppress(LookupError):
                await batcher.run(arrays)
            del arrays
        await steps()
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()


async def test_an_error_that_nobody_waits_for_any_more_is_no_news() -> None:
    reported: list[Any] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: reported.append(context))
    tasks: list[asyncio.Task[Any]] = []

    class Hasty(Batcher):
        def _ended(self, *args: Any) -> None:
            super()._ended(*args)
            tasks.pop().cancel()  # which has its error, and no step since

    model = Model()
    batcher = Hasty(model, Batching(4), max_queue_size=4)
    task = await start(batcher, rows(0))
    tasks.append(task)
    model.pending[0].set_exception(KeyError("model"))
    await steps()
    assert task.cancelled()
    gc.collect()
    assert reported == []


async def test_a_batch_that_somebody_cancels_answers() -> None:
    model = Model()
    batcher = batcher_of(model)
    task = await start(batcher, rows(0))
    (batch,) = batcher._batches
    assert batch.task is not None
    batch.task.cancel()  # as the end of asyncio.run() does
    await steps()
    assert isinstance(task.exception(), ServerNotReady)
    assert is_empty(batcher)


async def test_an_error_of_the_batcher_itself_answers_all() -> None:
    class Broken(Clock):
        left = 3

        def __call__(self) -> float:
            self.left -= 1
            if self.left < 0:
                raise OSError("no clock")
            return self.now

    reported: list[Any] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: reported.append(context))
    model = Model()
    batcher = batcher_of(model, clock=Broken())
    tasks = [asyncio.ensure_future(batcher.run(rows(i))) for i in range(3)]
    await steps()
    assert [type(task.exception()) for task in tasks] == [OSError] * 3
    assert len(reported) == 1
    assert is_empty(batcher)


VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("VARIABLE")


async def test_a_batch_has_a_context_of_its_own() -> None:
    seen = []

    async def call(arrays: dict[str, Any]) -> Any:
        seen.append(VARIABLE.get("none"))
        VARIABLE.set("of the batch")
        return arrays["x"]

    VARIABLE.set("of the program")
    batcher = batcher_of(call)
    VARIABLE.set("of the request")
    await batcher.run(rows(0))
    await batcher.run(rows(0))
    assert seen == ["of the program"] * 2
    assert VARIABLE.get() == "of the request"


async def test_close_fails_what_waits_and_lets_run_what_runs() -> None:
    model = Model()
    batcher = batcher_of(model, delay=50_000)
    full = [asyncio.ensure_future(batcher.run(rows(i))) for i in range(4)]
    await steps()
    waiting = [await start(batcher, rows(i)) for i in range(3)]
    batcher.close()
    await steps()
    assert {type(task.exception()) for task in waiting} == {ServerNotReady}
    with pytest.raises(ServerNotReady):
        await batcher.run(rows(5))
    await model.finish()
    assert [values(task) for task in full] == [[0], [10], [20], [30]]
    assert is_empty(batcher)


async def test_times_say_how_long_a_request_waited() -> None:
    model, clock = Model(), Clock()
    batcher = batcher_of(model, clock=clock)
    first, second = Times(), Times({BATCH: 5})
    await start(batcher, rows(0), times=first)
    await start(batcher, rows(1), times=second)
    clock.now += 0.25
    await model.finish()
    clock.now += 1
    await model.finish()
    assert first == {BATCH: 0}
    assert second == {BATCH: 250_000_005}


# Delays


async def test_a_batch_goes_when_its_delay_has_passed() -> None:
    model = Model()
    batcher = batcher_of(model, delay=2)
    task = asyncio.ensure_future(batcher.run(rows(0)))
    await model.called.wait()
    await model.finish()
    assert values(task) == [0]
    assert is_empty(batcher)


async def test_a_batch_waits_until_it_is_full_or_late() -> None:
    model, clock = Model(), Clock()
    batcher = batcher_of(model, delay=50_000, clock=clock)
    for i in range(3):
        await start(batcher, rows(i))
    assert not model.calls
    await start(batcher, rows(3))
    assert model.batches == [[0, 1, 2, 3]]
    await start(batcher, rows(4))
    clock.now += 30
    await model.finish()
    assert len(model.calls) == 1
    clock.now += 21
    await start(batcher, rows(5))
    assert model.batches[1:] == [[4, 5]]
    await model.finish()
    assert is_empty(batcher)


async def test_no_timer_stays_of_a_request_that_left() -> None:
    model = Model()
    batcher = batcher_of(model, delay=50_000)
    task = await start(batcher, rows(0))
    assert batcher._timer is not None
    task.cancel()
    await steps()
    assert is_empty(batcher)


async def test_a_full_batch_does_not_wait_for_an_older_one_that_does() -> None:
    model, clock = Model(), Clock()
    batcher = batcher_of(model, delay=50_000, clock=clock)
    await start(batcher, rows(0))
    for i in range(4):
        await start(batcher, rows(i, dtype=np.int64))
    assert model.batches == [[0, 1, 2, 3]]
    await model.finish()
    assert batcher.waiting == 1
    clock.now += 51  # now the older one is first
    for i in range(4):
        await start(batcher, rows(i, dtype=np.int64))
    assert model.batches[1:] == [[0]]
    await model.finish()
    await model.finish()
    assert is_empty(batcher)


async def test_a_delay_leaves_time_to_meet_a_deadline() -> None:
    model, clock = Model(), Clock()
    batcher = batcher_of(model, delay=50_000, clock=clock)
    batcher.cost.observe(1, 2.0)
    await start(batcher, rows(0), deadline=clock.now + 10)
    clock.now += 2.9
    await start(batcher, rows(1))
    assert not model.calls
    clock.now += 0.2  # half of what it can spare has passed
    await start(batcher, rows(2))
    assert model.batches == [[0, 1, 2]]
    await model.finish()


# Deadlines


async def test_what_would_miss_its_deadline_is_refused_if_others_are_ahead() -> None:
    model, clock = Model(), Clock()
    batcher = batcher_of(model, clock=clock)
    for size in (1, 4) * 4:
        batcher.cost.observe(size, 1.0 + 0.5 * size)
    running = await start(batcher, rows(0), deadline=clock.now + 0.1)
    assert model.batches == [[0]]  # nobody is ahead: it is tried
    clock.now += 1  # 0.5 left
    with pytest.raises(Overloaded, match="miss its deadline"):
        await batcher.run(rows(1), deadline=clock.now + 1.9)
    await start(batcher, rows(1), deadline=clock.now + 2.1)
    # With three more its batch takes 3, and the next one's 1.5 comes on top.
    with pytest.raises(Overloaded):
        await batcher.run(rows(2, 2, 2), deadline=clock.now + 3.4)
    await start(batcher, rows(2, 2, 2), deadline=clock.now + 3.6)
    with pytest.raises(Overloaded):
        await batcher.run(rows(3), deadline=clock.now + 4.9)
    await start(batcher, rows(3), deadline=clock.now + 5.2)
    with pytest.raises(Overloaded):  # of another group, after all of these
        await batcher.run(rows(4, dtype=np.int8), deadline=clock.now + 6.4)
    await start(batcher, rows(4, dtype=np.int8), deadline=clock.now + 6.7)
    for _ in range(4):
        await model.finish()
    assert model.batches == [[0], [1, 2, 2, 2], [3], [4]]
    assert values(running) == [0]
    assert is_empty(batcher)


async def test_without_an_estimate_everything_is_tried() -> None:
    model, clock = Model(), Clock()
    batcher = batcher_of(model, clock=clock)
    await start(batcher, rows(0))
    task = await start(batcher, rows(1), deadline=clock.now + 1e-6)
    assert batcher.waiting == 1
    await model.finish()
    await model.finish()
    assert values(task) == [10]


async def test_a_deadline_that_has_passed_is_not_computed() -> None:
    model, clock = Model(), Clock()
    batcher = batcher_of(model, clock=clock)
    with pytest.raises(DeadlineExceeded):
        await batcher.run(rows(0), deadline=clock.now)
    await start(batcher, rows(1))
    late = await start(batcher, rows(2), deadline=clock.now + 1)
    mate = await start(batcher, rows(3))
    clock.now += 2
    await model.finish()
    assert isinstance(late.exception(), DeadlineExceeded)
    await model.finish()
    assert model.batches == [[1], [3]]
    assert values(mate) == [30]
    assert is_empty(batcher)


# What is learned


@pytest.mark.parametrize(
    ("per_row", "fixed"), [(10.6e-3, 15e-3), (5e-5, 1e-3), (5e-3, 0.0), (0.0, 2e-3)]
)
def test_cost_is_found_through_noise_and_outliers(per_row: float, fixed: float) -> None:
    dice, cost = random.Random(1), Cost()
    assert (cost.known, cost.seconds(5)) == (False, 0)
    cost.observe(1, 3.0)  # the first is slow
    for _ in range(300):
        size = dice.choice((1, 2, 3, 5, 8, 13, 16))
        slow = 10 if dice.random() < 0.05 else dice.uniform(0.97, 1.03)
        cost.observe(size, (per_row * size + fixed) * slow)
    for size in (1, 4, 16):
        expected = per_row * size + fixed
        assert cost.seconds(size) == pytest.approx(expected, rel=0.05)
    assert cost.fixed == pytest.approx(fixed, abs=0.1 * (per_row + fixed))
    assert cost.per_row >= 0
    assert cost.fixed >= 0


def test_cost_of_one_size_is_half_fixed() -> None:
    cost = Cost()
    cost.observe(4, 0.8)
    assert cost.seconds(4) == pytest.approx(0.8)
    assert cost.fixed == pytest.approx(0.4)


def test_cost_is_never_negative() -> None:
    cost = Cost()
    cost.observe(1, 1.0)
    cost.observe(16, 100.0)  # more than in proportion
    assert cost.fixed == 0
    assert cost.per_row > 0
    cost = Cost()
    cost.observe(1, 1.0)
    cost.observe(16, 0.5)
    assert cost.per_row == 0
    assert 0.5 <= cost.fixed <= 1
    cost.observe(1, 0.0)  # a clock that does not move
    assert math.isfinite(cost.seconds(16))


def test_cost_forgets_but_not_what_only_old_batches_tell() -> None:
    cost = Cost()
    for size in (1, 16) * 10:
        cost.observe(size, 0.01 * size + 0.015)
    for _ in range(2000):
        cost.observe(16, 0.175)
    assert cost.fixed == pytest.approx(0.015, rel=0.1)
    for size in (2, 16) * 100:  # now twice as fast
        cost.observe(size, 0.005 * size + 0.0075)
    assert cost.seconds(16) == pytest.approx(0.0875, rel=0.05)


def patience_of(
    past: list[list[float]], goal: float | None = None, most: int = 16
) -> Patience:
    """Of a model of 10 ms a row and 16 ms a batch, after openings of one kind."""
    cost = Cost()
    for size in (1, 16) * 4:
        cost.observe(size, 0.010 * size + 0.016)
    patience = Patience(Batching(most, "auto", goal), cost)
    for offsets in past:
        opening = Opening("group", 0.0, (False, 4))
        opening.offsets = offsets
        patience.learn(opening)
    return patience


def until(
    patience: Patience, age: float = 0.0, rows: int = 1, seen: int = 0, kind: int = 4
) -> float:
    """How long a batch that could start at 1000 waits at a later age."""
    opening = Opening("group", 1000.0, (False, kind))
    opening.add("group", 1000.0 + age, seen)
    opening.add("another", 1000.0, 5)
    return patience.until(opening, 1000.0 + age, rows=rows, first=999.99) - 1000.0


BURST = [0.001, 0.0015, 0.002, 0.003]


def test_patience_waits_for_a_burst_to_its_end() -> None:
    patience = patience_of([BURST] * 8)
    assert until(patience) == pytest.approx(0.003)
    assert until(patience, age=0.0016, rows=3, seen=2) == pytest.approx(0.003)
    assert until(patience, age=0.002, rows=5, seen=4) == pytest.approx(0.002)  # all
    assert until(patience, age=0.0031, rows=3, seen=2) == pytest.approx(0.0031)  # late
    assert until(patience, kind=1) == 0  # after other openings
    # Four came early: that is all that ever come.
    assert until(patience, age=0.0005, rows=5, seen=4) == pytest.approx(0.0005)
    # Three did: of the four only one can still come, too few for twelve to wait.
    assert until(patience, age=0.0005, rows=12, seen=3) == pytest.approx(0.0005)


def test_patience_knows_nothing_at_first_and_learns_fast() -> None:
    assert until(patience_of([])) == 0
    assert until(patience_of([BURST[:2]])) == 0  # two rows may be chance
    assert until(patience_of([BURST])) == pytest.approx(0.003)


def test_patience_does_not_wait_where_it_does_not_pay() -> None:
    # 15 rows for 1.1 ms each are worth more than the 16 ms of a batch of one.
    assert until(patience_of([[0.0012]] * 16), rows=15) == 0
    assert until(patience_of([[0.0008]] * 16), rows=15) == pytest.approx(0.0008)
    # One row in 16 openings is chance.
    assert until(patience_of([[0.0001]] + [[]] * 15)) == 0
    # Rows that come after the batch could have been computed.
    assert until(patience_of([[0.050, 0.051]] * 16)) == 0


def test_patience_counts_no_more_rows_than_fit() -> None:
    assert until(patience_of([[0.009] * 3] * 16, most=16), rows=6) == 0
    assert until(patience_of([[0.006] * 8] * 16, most=16), rows=8) > 0
    assert until(patience_of([[0.006] * 8] * 16, most=10), rows=8) == 0


def test_patience_has_an_end() -> None:
    late = [[0.020 + i / 1000 for i in range(10)]] * 16
    assert until(patience_of(late)) == pytest.approx(0.026, rel=0.01)  # the batch's own
    # The first came 10 ms before, the batch takes 26.
    assert until(patience_of(late, goal=50.0)) == pytest.approx(0.014, abs=0.001)
    assert until(patience_of(late, goal=30.0)) == 0


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps where it would wait."""

    def __init__(self) -> None:
        loop = self
        self.now = 0.0

        class Selector(selectors.SelectSelector):
            def select(self, timeout: float | None = None) -> list[Any]:
                loop.now += timeout or 0.0
                return super().select(0)

        super().__init__(Selector())

    def time(self) -> float:
        return self.now


def closed_loop(
    clients: int, *, per_row: float, fixed: float, delay: Any, seconds: float = 8.0
) -> list[float]:
    """The latencies of clients that ask again 0.3 to 3 ms after their answer."""
    latencies: list[float] = []
    dice = random.Random(clients)

    async def call(arrays: dict[str, Any]) -> Any:
        await asyncio.sleep(per_row * len(arrays["x"]) + fixed)
        return arrays["x"]

    async def main() -> None:
        clock = asyncio.get_running_loop().time
        batcher = batcher_of(call, 16, delay, clock=clock)

        async def client() -> None:
            while clock() < seconds:
                await asyncio.sleep(dice.uniform(0.0003, 0.003))
                began = clock()
                await batcher.run(rows(0))
                if began > seconds / 4:
                    latencies.append(clock() - began)

        await asyncio.gather(*(client() for _ in range(clients)))

    loop = VirtualLoop()
    try:
        loop.run_until_complete(main())
    finally:
        loop.close()
    return latencies


@pytest.mark.parametrize("clients", [2, 4, 16])
def test_auto_gathers_clients_that_wait_for_answers(clients: int) -> None:
    found = closed_loop(clients, per_row=0.0106, fixed=0.015, delay=AUTO)
    best = clients / (0.0106 * clients + 0.015 + 0.003)
    assert len(found) / 6 > 0.95 * best


async def test_auto_does_not_keep_another_group_waiting() -> None:
    model, clock = Model(), Clock()
    batcher = batcher_of(model, delay=AUTO, clock=clock)
    batcher.cost.observe(1, 2.0)
    batcher.cost.observe(4, 2.0)
    for kind in ((True, 0), (True, 1), (False, 1)):
        for _ in range(8):  # three more always come half a second later
            opening = Opening("group", 0.0, kind)
            opening.offsets = [0.5] * 3
            batcher._patience.learn(opening)
    await start(batcher, rows(0))
    assert batcher.waiting == 1
    other = await start(batcher, rows(1, dtype=np.int64))
    assert model.batches == [[0]]
    await model.finish()
    assert batcher.waiting == 1  # the other, which is now alone
    batcher.close()
    await steps()
    assert isinstance(other.exception(), ServerNotReady)


def test_auto_never_keeps_a_lone_client_waiting() -> None:
    found = closed_loop(1, per_row=0.0106, fixed=0.015, delay=AUTO)
    assert max(found) < 0.0257


def test_auto_waits_for_nothing_where_batches_win_nothing() -> None:
    auto = closed_loop(4, per_row=0.005, fixed=0.0, delay=AUTO)
    greedy = closed_loop(4, per_row=0.005, fixed=0.0, delay=0.0)
    assert len(auto) > 0.99 * len(greedy)
