"""Admission: what is refused, on every protocol, and what never queues."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import anyio
import numpy as np
import pytest

from kserve_lite import Model, ModelDefinitionError
from tests.load.asking import BUSY, LATE, OK, Asker, asking, every_protocol
from tests.transports.client import (
    PATIENCE,
    Client,
    get,
    model_of,
    post,
    serving,
    until,
)

pytestmark = pytest.mark.anyio


class Slow:
    """A model whose requests wait until they are let go; of either kind."""

    def __init__(self, kind: str = "async", **model: Any) -> None:
        self.model = Model("m", **model)
        self.model.predict(self.plain if kind == "plain" else self.asynchronous)
        self.entered = 0
        self.most = 0
        self.inside = 0
        self.seen: list[float] = []
        self._go_on = threading.Event()

    def go_on(self) -> None:
        self._go_on.set()

    async def asynchronous(self, x: np.ndarray) -> np.ndarray:
        self._enter(x)
        try:
            with anyio.fail_after(PATIENCE):
                await until(self._go_on.is_set)
        finally:
            self.inside -= 1
        return x

    def plain(self, x: np.ndarray) -> np.ndarray:
        self._enter(x)
        assert self._go_on.wait(PATIENCE)
        self.inside -= 1
        return x

    def _enter(self, x: np.ndarray) -> None:
        self.seen.append(float(x[0]))
        self.entered += 1
        self.inside += 1
        self.most = max(self.most, self.inside)


async def is_refused(asker: Asker, word: str) -> None:
    outcome = await asker.ask([9])
    assert asker.is_(outcome, BUSY)
    assert word in outcome.error
    if asker.protocol != "grpc":
        assert outcome.headers["retry-after"] == "1"
        assert outcome.headers["content-type"] == "application/json"


@every_protocol
async def test_max_in_flight(protocol: str) -> None:
    slow = Slow()
    async with (
        serving(slow.model, max_in_flight=2) as server,
        asking(protocol, server) as one,
        asking("v1", server) as two,
        asking(protocol, server) as three,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(one.ask, [1])
        tasks.start_soon(two.ask, [2])
        await until(lambda: slow.entered == 2)
        await is_refused(three, "in flight")
        slow.go_on()
        await until(lambda: not server.dataplane.running[slow.model].in_flight)
        assert three.is_(await three.ask([3]), OK)
    assert sorted(slow.seen) == [1, 2, 3]


@every_protocol
async def test_max_queue_size_of_threads(protocol: str) -> None:
    slow = Slow("plain")
    async with (
        serving(slow.model, max_queue_size=1, max_asyncio_workers=1) as server,
        asking("v1", server) as one,
        asking("v2", server) as two,
        asking(protocol, server) as three,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(one.ask, [1])
        await until(lambda: slow.entered == 1)
        tasks.start_soon(two.ask, [2])
        await until(lambda: server.dataplane.stages.offload.waiting == 1)
        await is_refused(three, "a thread")
        slow.go_on()
    assert slow.seen == [1, 2]


async def test_async_models_do_not_wait_for_threads() -> None:
    slow = Slow("plain")

    async def echo(payload: Any) -> Any:
        return payload

    from kserve_lite import serve

    other = Model("other", predict=echo)
    async with (
        serve(
            slow.model,
            other,
            http_port=0,
            host="127.0.0.1",
            max_queue_size=1,
            max_asyncio_workers=1,
        ) as server,
        asking("v1", server) as one,
        asking("v1", server) as two,
        asking("v1", server) as three,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(one.ask, [1])
        await until(lambda: slow.entered == 1)
        tasks.start_soon(two.ask, [2])
        await until(lambda: server.dataplane.stages.offload.waiting == 1)
        path = "/v1/models/other:predict"
        answer = await three.client.fetch("POST", path, body=b'{"instances":[1]}')
        assert answer.status == 200
        slow.go_on()


@every_protocol
@pytest.mark.parametrize("kind", ["async", "plain"])
async def test_max_concurrency(protocol: str, kind: str) -> None:
    slow = Slow(kind, max_concurrency=1)
    async with (
        serving(slow.model, max_queue_size=1) as server,
        asking("v1", server) as one,
        asking(protocol, server) as two,
        asking(protocol, server) as three,
        asking(protocol, server) as late,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(one.ask, [1])
        await until(lambda: slow.entered == 1)
        # What waits for its turn is dropped when its time has passed.
        assert late.is_(await late.ask([4], 50), LATE)
        tasks.start_soon(two.ask, [2])
        running = server.dataplane.running[slow.model]
        await until(lambda: running.waiting == 1)
        await is_refused(three, "turn")
        assert slow.most == 1
        slow.go_on()
    assert slow.seen == [1, 2]
    assert slow.most == 1


async def test_max_concurrency_holds_for_every_stage_and_streams() -> None:
    inside = most = 0

    def enter(x: np.ndarray) -> np.ndarray:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        threading.Event().wait(0.001)
        inside -= 1
        return x

    async def stream(x: np.ndarray) -> Any:
        for _ in range(3):
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            await anyio.lowlevel.checkpoint()
            inside -= 1
            yield "x"

    for predict in (enter, stream):
        model = Model("m", max_concurrency=1, preprocess=enter, predict=predict)
        async with serving(model) as server, anyio.create_task_group() as tasks:

            async def ask(server: Any = server) -> None:
                async with asking("v1", server) as asker:
                    for _ in range(5):
                        answer = await asker.client.fetch(
                            "POST", "/v1/models/m:predict", body=b'{"instances":[1]}'
                        )
                        assert answer.status == 200

            for _ in range(6):
                tasks.start_soon(ask)
    assert most == 1


@pytest.mark.parametrize("kind", ["plain", "stream"])
async def test_a_thread_keeps_its_turn_when_its_client_has_gone(kind: str) -> None:
    """`max_concurrency=1` is for models that two threads must not be inside of."""
    slow = Slow("plain", max_concurrency=1)

    def stream(x: np.ndarray) -> Iterator[str]:
        slow.plain(x)
        yield "x"

    model = slow.model
    if kind == "stream":
        model = Model("m", max_concurrency=1, predict=stream)
    async with (
        serving(model) as server,
        asking("v1", server) as asker,
        anyio.create_task_group() as tasks,
    ):
        running = server.dataplane.running[model]
        async with Client(server.port) as leaves:
            await leaves.send(post(b'{"instances":[1]}'))
            await until(lambda: slow.entered == 1)
        await until(lambda: running.statistics.failures)
        path, body = "/v1/models/m:predict", b'{"instances":[2]}'
        tasks.start_soon(partial(asker.client.fetch, "POST", path, body=body))
        await until(lambda: running.waiting == 1)
        assert slow.entered == 1
        slow.go_on()
    assert (slow.entered, slow.most) == (2, 1)
    assert running.in_flight == 0


async def test_a_client_that_leaves_the_queue_makes_room() -> None:
    slow = Slow(max_concurrency=1)
    body = json.dumps({"instances": [5]}).encode()
    head = (
        b"POST /v1/models/m:predict HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
    )
    async with (
        serving(slow.model, max_queue_size=1) as server,
        asking("v1", server) as one,
        asking("v1", server) as two,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(one.ask, [1])
        await until(lambda: slow.entered == 1)
        running = server.dataplane.running[slow.model]
        for _ in range(3):
            async with Client(server.port) as leaves:
                await leaves.send(head % len(body) + body)
                await until(lambda: running.waiting == 1)
            await until(lambda: running.waiting == 0)
        tasks.start_soon(two.ask, [2])
        await until(lambda: running.waiting == 1)
        slow.go_on()
    assert slow.seen == [1, 2]


async def test_health_metadata_and_statistics_never_queue() -> None:
    slow = Slow("plain")
    async with (
        serving(
            slow.model, max_in_flight=1, max_queue_size=1, max_asyncio_workers=1
        ) as server,
        asking("v1", server) as one,
        Client(server.port) as client,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(one.ask, [1])
        await until(lambda: slow.entered == 1)
        for path in (
            "/v2/health/live",
            "/v2/health/ready",
            "/v2/models/m",
            "/v2/models/m/ready",
            "/v2/models/m/stats",
            "/openapi.json",
        ):
            assert (await client.ask(get(path))).status == 200
        slow.go_on()


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "2"])
async def test_what_max_concurrency_cannot_be(wrong: Any) -> None:
    with pytest.raises(ModelDefinitionError, match="max_concurrency"):
        Model("m", max_concurrency=wrong)


async def test_refusing_is_not_counted_as_a_failure_of_the_model() -> None:
    slow = Slow()
    async with (
        serving(model_of(slow.asynchronous), max_in_flight=1) as server,
        asking("v1", server) as one,
        asking("v1", server) as two,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(one.ask, [1])
        await until(lambda: slow.entered == 1)
        for _ in range(3):
            assert two.is_(await two.ask([2]), BUSY)
        slow.go_on()
        (statistics,) = server.dataplane.statistics.values()
        await until(lambda: statistics.successes)
        assert statistics.failures == 0
