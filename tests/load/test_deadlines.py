"""Deadlines, on every protocol and stage."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import numpy as np
import pytest

from kserve_lite import Context, Model, serve
from kserve_lite.dispatch import deadlines
from kserve_lite.dispatch.deadlines import Deadlines
from kserve_lite.errors import DeadlineExceeded
from tests.load.asking import LATE, OK, asking, every_protocol
from tests.transports.client import PATIENCE, model_of, serving, until

pytestmark = pytest.mark.anyio

SOON = 200  # milliseconds: a busy machine has to get to the handler within
STAGES = ("preprocess", "predict", "postprocess")


def staged(stage: str, waits: Callable[[np.ndarray], Any]) -> Model:
    """A model that waits in one stage, if its first row is 1."""
    model = Model("m")

    def passes(x: np.ndarray) -> np.ndarray:
        return x

    for name in STAGES:
        getattr(model, name)(waits if name == stage else passes)
    return model


@every_protocol
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["async", "plain"])
async def test_each_stage_is_given_up(protocol: str, stage: str, kind: str) -> None:
    given_up = threading.Event()
    go_on = threading.Event()

    async def waits(x: np.ndarray) -> np.ndarray:
        if x[0] == 1:
            try:
                await anyio.sleep_forever()
            finally:
                given_up.set()
        return x

    def waits_plainly(x: np.ndarray) -> np.ndarray:
        if x[0] == 1:
            assert go_on.wait(PATIENCE)
        return x

    model = staged(stage, waits if kind == "async" else waits_plainly)
    try:
        async with serving(model) as server, asking(protocol, server) as asker:
            assert asker.is_(await asker.ask([1], SOON), LATE)
            if kind == "async":
                assert given_up.is_set()
            # The connection and the model serve on.
            outcome = await asker.ask([2], 10_000)
            assert asker.is_(outcome, OK)
            assert outcome.rows == [2]
            go_on.set()
            running = server.dataplane.running[model]
            await until(lambda: not running.in_flight)
    finally:
        go_on.set()


@every_protocol
async def test_no_time_at_all_runs_nothing(protocol: str) -> None:
    async def never(x: np.ndarray) -> None:
        raise AssertionError

    async with serving(model_of(never)) as server, asking(protocol, server) as asker:
        assert asker.is_(await asker.ask([1], 0), LATE)


@every_protocol
async def test_what_waits_for_a_thread_is_dropped(protocol: str) -> None:
    entered = threading.Event()
    go_on = threading.Event()
    seen: list[float] = []

    def predict(x: np.ndarray) -> np.ndarray:
        seen.append(float(x[0]))
        entered.set()
        assert go_on.wait(PATIENCE)
        return x

    try:
        async with (
            serving(predict, max_asyncio_workers=1) as server,
            asking(protocol, server) as asker,
            asking(protocol, server) as late,
        ):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(asker.ask, [1])
                await until(entered.is_set)
                assert late.is_(await late.ask([2], SOON), LATE)
                assert server.dataplane.stages.offload.waiting == 0
                go_on.set()
            assert seen == [1]
    finally:
        go_on.set()


@every_protocol
async def test_the_default_deadline(
    protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadlines, "GRAIN", 0.0)
    lefts: list[float | None] = []

    async def predict(x: np.ndarray, context: Context) -> np.ndarray:
        lefts.append(context.remaining())
        if x[0] == 1:
            await anyio.sleep_forever()
        return x

    async with (
        serving(predict, request_timeout=0.3) as server,
        asking(protocol, server) as asker,
    ):
        assert asker.is_(await asker.ask([1]), LATE)
        # A client may ask for more than the default.
        assert asker.is_(await asker.ask([2], 30_000), OK)
        assert asker.is_(await asker.ask([3]), OK)
        default, asked, again = lefts
        assert default is not None
        assert 0 < default <= 0.3
        assert asked is not None
        assert 1 < asked <= 30
        assert again is not None
        assert 0 < again <= 0.3


async def test_no_default_deadline() -> None:
    async def predict(x: np.ndarray, context: Context) -> np.ndarray:
        assert context.remaining() is None
        return x

    async with (
        serving(predict, request_timeout=0) as server,
        asking("v1", server) as asker,
    ):
        assert asker.is_(await asker.ask([1]), OK)


@pytest.mark.parametrize("path", ["/v1/models/m:predict", "/v2/models/m/generate"])
async def test_a_stream_is_given_up_between_items(path: str) -> None:
    closed = asyncio.Event()

    async def predict(payload: dict[str, Any]) -> AsyncIterator[str]:
        try:
            yield "one"
            await anyio.sleep_forever()
        finally:
            closed.set()

    async with serving(predict) as server, asking("v1", server) as asker:
        timeout = ("x-request-timeout-ms", str(SOON))
        answer = await asker.client.fetch("POST", path, timeout, body=b"{}")
        await closed.wait()
        if path.endswith("generate"):
            assert answer.status == 504
        else:
            assert (answer.status, answer.complete) == (200, False)


async def test_a_handler_that_swallows_its_cancellation_is_answered() -> None:
    async def predict(x: np.ndarray) -> Any:
        try:
            await anyio.sleep_forever()
        except asyncio.CancelledError:
            return x

    async with serving(predict) as server, asking("v1", server) as asker:
        outcome = await asker.ask([7], SOON)
        assert outcome.rows == [7]
        # The task is not cancelled any more: the next request of it is answered too.
        assert (await asker.ask([8], SOON)).rows == [8]


async def test_default_deadlines_wait_in_one_queue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Thousands of watches make one timer, and those that ended leave nothing."""
    monkeypatch.setattr(deadlines, "GRAIN", 0.0)
    watched = Deadlines(0.05)
    ended: list[int] = []

    async def request(number: int, stays: bool) -> None:
        try:
            with watched.within(Context("m")):
                if stays:
                    await anyio.sleep_forever()
        except DeadlineExceeded:
            ended.append(number)

    async with anyio.create_task_group() as tasks:
        for number in range(1000):
            tasks.start_soon(request, number, number % 100 == 0)
    assert ended == list(range(0, 1000, 100))
    assert not watched._queue
    watched.close()


async def test_who_else_cancels_a_late_request_counts_more() -> None:
    watched = Deadlines(0)
    with pytest.raises(DeadlineExceeded), watched.within(Context("m", deadline=0.0)):
        raise AssertionError

    outcome: list[str] = []

    async def request() -> None:
        task = asyncio.current_task()
        try:
            with watched.within(Context("m", deadline=time.monotonic() + 3600)):
                assert task is not None
                watched._expire(task)
                task.cancel()
                await anyio.sleep_forever()
        except DeadlineExceeded:
            outcome.append("late")
        except asyncio.CancelledError:
            outcome.append("cancelled")
            raise

    await asyncio.wait([asyncio.create_task(request())])
    assert outcome == ["cancelled"]
    assert not watched._own
    assert not watched._late


async def test_a_stop_leaves_no_timer() -> None:
    async with serve(model_of(lambda p: p), http_port=0, host="127.0.0.1") as server:
        async with asking("v1", server) as asker:
            await asker.client.fetch("POST", "/v1/models/m:predict", body=b"{}")
        assert server.dataplane._deadlines._timer is not None
    assert server.dataplane._deadlines._timer is None
