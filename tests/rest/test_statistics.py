"""The statistics extension: what is counted, and that it is exact."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from time import perf_counter_ns
from typing import Any

import anyio
import pytest

from kserve_lite import InvalidInput, Model, serve
from kserve_lite.counters import Board
from kserve_lite.dispatch.statistics import TOGETHER, Statistics
from kserve_lite.handlers import Stage
from kserve_lite.metrics import PREDICT
from tests.transports.client import (
    PATIENCE,
    Client,
    echo,
    get,
    post,
    predict,
    serving,
    until,
)

pytestmark = pytest.mark.anyio

PARTS = ("queue", "compute_input", "compute_infer", "compute_output")


async def statistics_of(client: Client, path: str = "/v2/models/m/stats") -> Any:
    answer = await client.ask(get(path))
    assert answer.status == 200
    (statistics,) = answer.json["model_stats"]
    return statistics


def spent(statistics: Any, part: str) -> int:
    ns: int = statistics["inference_stats"][part]["ns"]
    return ns


def count(statistics: Any, part: str) -> int:
    number: int = statistics["inference_stats"][part]["count"]
    return number


async def picky(payload: dict[str, Any]) -> Any:
    match payload["instances"][0]:
        case "bad":
            raise InvalidInput("bad")
        case "broken":
            raise ValueError
    return payload


async def test_what_nobody_settles_is_bounded() -> None:
    """As in a replica, whose counts another process reads."""
    model = Model("m")
    model.predict(picky)
    model.freeze()
    board, uncounted = Board(), set[Statistics]()
    statistics = Statistics(model, board, 0, uncounted)
    for _ in range(2 * TOGETHER + 1):
        statistics.count(perf_counter_ns(), Stage.PREDICT, None, True)
        assert len(statistics._tooks) < TOGETHER
    assert uncounted == {statistics}
    key = PREDICT.key(("m",))
    assert sum(board.total(key, PREDICT.width)[:-1]) == 2 * TOGETHER
    assert statistics.successes == 2 * TOGETHER + 1
    assert sum(board.total(key, PREDICT.width)[:-1]) == 2 * TOGETHER + 1


async def test_successes_and_failures_are_counted_exactly() -> None:
    async with serving(picky) as server, Client(server.port) as client:
        fresh = await statistics_of(client)
        assert fresh["inference_count"] == fresh["last_inference"] == 0
        for value in ("a", "bad", "b", "broken", "c"):
            await client.ask(predict(value))
        await client.ask(post(b"{"))  # never reached the model
        statistics = await statistics_of(client)
        assert (statistics["name"], statistics["version"]) == ("m", "1")
        assert statistics["inference_count"] == statistics["execution_count"] == 3
        assert statistics["last_inference"] > 1_700_000_000_000
        assert count(statistics, "success") == 3
        assert count(statistics, "fail") == 2
        assert spent(statistics, "success") > 0
        assert spent(statistics, "fail") > 0
        assert sum(spent(statistics, part) for part in PARTS) == spent(
            statistics, "success"
        )
        assert {count(statistics, part) for part in PARTS} == {3}


async def test_the_parts_of_a_request_add_up_to_it() -> None:
    model = Model("m")

    @model.preprocess
    def before(payload: Any) -> Any:
        return payload

    @model.predict
    def predicts(payload: Any) -> Any:
        return payload

    @model.postprocess
    async def after(payload: Any) -> Any:
        return payload

    async with serving(model) as server, Client(server.port) as client:
        for number in range(4):
            assert (await client.ask(predict(number))).status == 200
        statistics = await statistics_of(client)
        for part in PARTS:
            assert spent(statistics, part) > 0, part
        assert sum(spent(statistics, part) for part in PARTS) == spent(
            statistics, "success"
        )


async def test_waiting_for_a_thread_is_queueing() -> None:
    first = threading.Event()
    let_go = threading.Event()

    def handler(payload: Any) -> Any:
        if payload["instances"] == ["wait"]:
            first.set()
            assert let_go.wait(PATIENCE)
        return payload

    async with (
        serving(handler, max_asyncio_workers=1) as server,
        Client(server.port) as waits,
        Client(server.port) as queued,
        Client(server.port) as client,
    ):
        await waits.send(predict("wait"))
        await until(first.is_set)
        await queued.send(predict(1))
        (running,) = server.dataplane.running.values()
        await until(lambda: running.in_flight == 2)
        since = time.perf_counter_ns()
        await anyio.lowlevel.checkpoint()
        at_least = time.perf_counter_ns() - since
        let_go.set()
        await queued.answer()
        await waits.answer()
        assert spent(await statistics_of(client), "queue") >= at_least


async def streamed(payload: dict[str, Any]) -> AsyncIterator[str]:
    for item in payload["instances"]:
        if item == "broken":
            raise ValueError
        yield item


def plainly_streamed(payload: dict[str, Any]) -> Iterator[str]:
    yield from payload["instances"]


@pytest.mark.parametrize("handler", [streamed, plainly_streamed])
async def test_a_stream_counts_when_it_ends(handler: Any) -> None:
    async with serving(handler) as server, Client(server.port) as client:
        await client.ask(predict("a"))
        statistics = await statistics_of(client)
        assert (count(statistics, "success"), count(statistics, "fail")) == (1, 0)
        if handler is streamed:
            await client.ask(predict("broken"))
            statistics = await statistics_of(client)
            assert (count(statistics, "success"), count(statistics, "fail")) == (1, 1)
        (running,) = server.dataplane.running.values()
        assert running.in_flight == 0


async def test_a_request_that_is_given_up_failed() -> None:
    started = anyio.Event()

    async def handler(payload: Any) -> None:
        started.set()
        await anyio.sleep_forever()

    async with serving(handler) as server, Client(server.port) as client:
        async with Client(server.port) as leaves:
            await leaves.send(predict(1))
            await started.wait()
        statistics = server.dataplane.statistics[server.application.models[0]]
        await until(lambda: statistics.failures)
        assert count(await statistics_of(client), "fail") == 1


async def test_every_model_and_version() -> None:
    models = [
        Model("m", version="9", predict=echo),
        Model("m", version="10", predict=echo),
        Model("other", predict=echo),
    ]
    async with (
        serve(*models, http_port=0, host="127.0.0.1") as server,
        Client(server.port) as client,
    ):
        await client.ask(predict(1))
        every = (await client.ask(get("/v2/models/stats"))).json["model_stats"]
        assert [(s["name"], s["version"], s["inference_count"]) for s in every] == [
            ("m", "9", 0),
            ("m", "10", 1),
            ("other", "1", 0),
        ]
        of_m = (await client.ask(get("/v2/models/m/stats"))).json["model_stats"]
        assert of_m == every[:2]
        one = await statistics_of(client, "/v2/models/m/versions/10/stats")
        assert one == every[1]
        for path in ("/v2/models/x/stats", "/v2/models/m/versions/3/stats"):
            assert (await client.ask(get(path))).status == 404


async def test_loading_again_keeps_the_statistics() -> None:
    async with serving(echo) as server, Client(server.port) as client:
        await client.ask(predict(1))
        for path in ("load", "unload", "load"):
            body = json.dumps({}).encode()
            answer = await client.ask(
                post(body, path=f"/v2/repository/models/m/{path}")
            )
            assert answer.status == 200
        await client.ask(predict(1))
        assert (await statistics_of(client))["inference_count"] == 2
