"""Admission: what is refused, on every protocol, and what never queues."""

from __future__ import annotations

import json
import threading
import tracemalloc
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
import numpy as np
import pytest

from kserve_lite import Model, ModelDefinitionError, Server
from kserve_lite.transports.http1 import Http1
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
from tests.transports.h2client import H2Client

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


def upload(*framing: str) -> bytes:
    lines = ("POST /v2/models/m/infer HTTP/1.1", "host: test", *framing, "", "")
    return "\r\n".join(lines).encode()


NUMBERS = b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[2]}]}'


@asynccontextmanager
async def one_in_flight() -> AsyncGenerator[tuple[Slow, Server]]:
    """A model that has as much to do as it may have."""
    slow = Slow()
    async with (
        serving(slow.model, max_in_flight=1) as server,
        asking("v2", server) as asker,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(asker.ask, [1])
        await until(lambda: slow.entered == 1)
        yield slow, server
        slow.go_on()


async def is_free(slow: Slow, server: Server) -> None:
    slow.go_on()
    await until(lambda: not server.dataplane.running[slow.model].in_flight)


def is_dropping(server: Server) -> bool:
    """Whether a head was read, and its body is to be forgotten."""
    connections = server._listener._connections
    return any(type(one) is Http1 and one._wire.dropped for one in connections)


@pytest.mark.parametrize("announced", [True, False])
async def test_an_upload_that_is_refused_is_not_kept(announced: bool) -> None:
    """It is read to its end, and its connection goes on."""
    piece, pieces = b" " * 1_000_000, 8
    async with one_in_flight() as (slow, server), Client(server.port) as client:
        if announced:
            head = upload(f"content-length: {len(piece) * pieces}")
        else:
            head = upload("transfer-encoding: chunked")
            piece = b"%x\r\n%b\r\n" % (len(piece), piece)
        tracemalloc.start()
        await client.send(head)
        for _ in range(pieces):
            await client.send(piece)
        if not announced:
            await client.send(b"0\r\n\r\n")
        answer = await client.answer()
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert "in flight" in answer.json["error"]
        # h11 copies what it reads.
        assert most < (1 if announced else 3) * len(piece)
        await is_free(slow, server)
        answer = await client.ask(upload(f"content-length: {len(NUMBERS)}") + NUMBERS)
        assert answer.status == 200
    assert slow.seen == [1, 2]


async def test_an_upload_is_refused_for_what_holds_as_it_begins() -> None:
    """HTTP/1.1 clients look for an answer when they have sent all."""
    async with one_in_flight() as (slow, server), Client(server.port) as client:
        await client.send(upload(f"content-length: {len(NUMBERS)}") + NUMBERS[:9])
        await until(lambda: is_dropping(server))
        await is_free(slow, server)
        await client.send(NUMBERS[9:])
        answer = await client.answer()
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert "as it began" in answer.json["error"]
        answer = await client.ask(upload(f"content-length: {len(NUMBERS)}") + NUMBERS)
        assert answer.status == 200


@pytest.mark.parametrize("announced", [True, False])
async def test_an_upload_over_http2_that_is_refused_is_not_kept(
    announced: bool,
) -> None:
    """Of clients that still send, an answer before the end is not taken."""
    body = NUMBERS.ljust(8_000_000)
    async with one_in_flight() as (slow, server), H2Client(server.port) as client:
        path = "/v2/models/m/infer"
        tracemalloc.start()
        stream_id = await client.post(body, path=path, announced=announced)
        answer = await client.answer(stream_id)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert answer.complete
        assert client.streams[stream_id].reset is None
        assert most < 0.5 * len(body)
        await is_free(slow, server)
        answer = await client.fetch("POST", path, body=body)
        assert answer.status == 200


async def test_an_upload_that_is_dropped_has_the_size_that_it_may_have() -> None:
    """Over HTTP/2, where no length need be announced."""
    slow = Slow()
    async with (
        serving(slow.model, max_in_flight=1, max_body_size=1000) as server,
        asking("v2", server) as asker,
        H2Client(server.port) as client,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(asker.ask, [1])
        await until(lambda: slow.entered == 1)
        for size, status in ((1000, 503), (1001, 413)):
            stream_id = await client.post(b" " * size, announced=False)
            assert (await client.answer(stream_id)).status == status
        slow.go_on()


async def test_what_is_refused_as_it_begins_is_counted() -> None:
    async with one_in_flight() as (_, server), Client(server.port) as client:
        await client.send(upload(f"content-length: {len(NUMBERS)}"))
        assert (await client.ask(NUMBERS)).status == 503
        text = (await client.ask(get("/metrics"))).body.decode()
    labels = 'code="503",method="infer",model_name="m",protocol="v2"'
    assert f"requests_total{{{labels}}} 1" in text


async def test_an_upload_to_no_model_is_refused_as_it_begins() -> None:
    async with one_in_flight() as (_, server), Client(server.port) as client:
        head = upload(f"content-length: {len(NUMBERS)}").replace(b"/m/", b"/none/")
        await client.send(head)
        answer = await client.ask(NUMBERS)
        assert answer.status == 404
        assert "none" in answer.json["error"]


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
