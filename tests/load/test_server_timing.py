"""Server-Timing: where a request's time went, told to its client when asked for."""

from __future__ import annotations

import re
import threading

import anyio
import numpy as np
import pytest

from kserve_lite import InferRequest, Model
from tests.load.asking import PROTOCOLS, asking
from tests.transports.client import Client, predict, serving, until

pytestmark = pytest.mark.anyio

PART = re.compile(r"([a-z]+);dur=([0-9]+\.[0-9]{3})")


def parts_of(header: str) -> dict[str, float]:
    """The parts by name, in milliseconds."""
    parts = [PART.fullmatch(part) for part in header.split(", ")]
    assert all(parts), header
    return {part[1]: float(part[2]) for part in parts if part}


def staged() -> Model:
    model = Model("m")

    @model.preprocess
    async def preprocess(request: InferRequest) -> InferRequest:
        return request

    @model.predict
    async def work(request: InferRequest) -> np.ndarray:
        return request.inputs[0].array

    @model.postprocess
    async def postprocess(response: object) -> object:
        return response

    return model


@pytest.mark.parametrize("protocol", [p for p in PROTOCOLS if "v1" not in p])
async def test_each_stage_is_told(protocol: str) -> None:
    async with (
        serving(staged(), enable_latency_logging=True) as server,
        asking(protocol, server) as asker,
    ):
        outcome = await asker.ask([[1.0]])
        headers = outcome.headers
        if protocol == "grpc":
            (stream,) = asker.client.streams.values()
            headers = stream.headers
        assert list(parts_of(headers["server-timing"])) == [
            "preprocess",
            "predict",
            "postprocess",
        ]


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_a_batch_is_told(protocol: str) -> None:
    model = Model("m")

    @model.predict(max_batch_size=4)
    async def double(x: np.ndarray) -> np.ndarray:
        return 2 * x

    async with (
        serving(model, enable_latency_logging=True) as server,
        asking(protocol, server) as asker,
    ):
        outcome = await asker.ask([[1.0]])
        headers = outcome.headers
        if protocol == "grpc":
            (stream,) = asker.client.streams.values()
            headers = stream.headers
        assert set(parts_of(headers["server-timing"])) == {"batch", "predict"}


async def test_waiting_for_a_thread_is_told_apart() -> None:
    let_go = threading.Event()
    started = threading.Semaphore(0)

    def slow(payload: object) -> object:
        started.release()
        let_go.wait(20)
        return payload

    async with (
        serving(slow, enable_latency_logging=True, max_asyncio_workers=1) as server,
        Client(server.port) as first,
        Client(server.port) as second,
    ):
        await first.send(predict(1))
        await anyio.to_thread.run_sync(started.acquire)
        await second.send(predict(2))
        await until(lambda: server.dataplane.stages.offload.waiting == 1)
        await anyio.sleep(0.05)  # what the second has to wait at the least
        let_go.set()
        quick = parts_of((await first.answer()).headers["server-timing"])
        waited = parts_of((await second.answer()).headers["server-timing"])
    assert quick["predict"] >= 50
    assert waited["queue"] >= 50
    assert waited["queue"] > quick["queue"]


async def test_nothing_is_told_unasked() -> None:
    async with serving(staged()) as server, asking("v2", server) as asker:
        outcome = await asker.ask([[1.0]])
        assert "server-timing" not in outcome.headers


async def test_a_handler_may_say_it_itself() -> None:
    async def told(payload: object, response_headers: dict[str, str]) -> object:
        response_headers["server-timing"] = "own;dur=1"
        return payload

    async with (
        serving(told, enable_latency_logging=True) as server,
        Client(server.port) as client,
    ):
        answer = await client.ask(predict(1))
        assert answer.headers["server-timing"] == "own;dur=1"
