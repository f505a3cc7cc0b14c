"""Mutated byte streams against a live server: it must live on, in silence."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import anyio
import pytest

from kserve_lite import InferRequest, InferResponse
from tests.transports.client import (
    LIVE,
    Client,
    get,
    nothing_unhandled,
    post,
    predict,
    serving,
)

pytestmark = pytest.mark.anyio

ROUNDS = 150
TOGETHER = 15

SEEDS = (
    LIVE,
    LIVE.replace(b"GET", b"HEAD"),
    get("/v2/models/m"),
    get("/v1/models/m%20"),
    b"GET http://test/v2/health/live HTTP/1.1\r\nHost: test\r\n\r\n",
    b"GET /v2/health/live HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    predict(1),
    predict({"a": [1, 2.5, None, "\u00e9"]}, "Connection: close"),
    predict("x" * 2000),
    predict("stream"),
    predict(1, "Expect: 100-continue"),
    post(b'{"inputs":[{"name":"a","shape":[1],"datatype":"INT32","data":[1]}]}'),
    post(b'{"id":"1","inputs":[]}', path="/v2/models/m/infer"),
    post(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    + b"10\r\n"
    + b'{"instances":[]}'
    + b"\r\n0\r\nTrailer: 1\r\n\r\n",
)
WORDS = (
    b"\r\n",
    b"\r\n\r\n",
    b"\n",
    b"\x00",
    b"\xff",
    b":",
    b" ",
    b"Content-Length: 99999999999999999999\r\n",
    b"Content-Length: -1\r\n",
    b"Content-Length: 5\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: gzip, chunked\r\n",
    b"Expect: 100-continue\r\n",
    b"Upgrade: h2c\r\n",
    b"Connection: close\r\n",
    b"HTTP/2.0",
    b"fffffffffffffffff\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"{" * 200,
    b"x" * 3000,
)


def mutated(chance: random.Random) -> bytes:
    stream = bytearray(b"".join(chance.choices(SEEDS, k=chance.randint(1, 4))))
    for _ in range(chance.randint(0, 6)):
        at = chance.randrange(len(stream) + 1)
        end = min(len(stream), at + chance.randint(0, 40))
        match chance.randrange(5):
            case 0 if stream:
                stream[at % len(stream)] = chance.randrange(256)
            case 1:
                del stream[at:end]
            case 2:
                stream[at:at] = chance.choice(WORDS)
            case 3:
                stream[at:at] = stream[at:end] * chance.randint(1, 5)
            case _:
                stream[at:end] = chance.randbytes(end - at)
    return bytes(stream)


async def handler(payload: Any) -> Any:
    if isinstance(payload, InferRequest):
        return InferResponse(payload.inputs)
    if isinstance(payload, dict) and payload.get("instances") == ["stream"]:
        return iter(["one", "two"])
    return payload


async def abuse(port: int, seed: int) -> None:
    """Send a mutated stream in pieces, then leave in one of the ways there are."""
    chance = random.Random(seed)
    stream = mutated(chance)
    async with Client(port) as client:
        try:
            while stream:
                size = chance.choice((1, 7, 100, len(stream)))
                if size == 1 and len(stream) > 200:
                    size = 50
                await client.send(stream[:size])
                stream = stream[size:]
                if chance.random() < 0.5:
                    await asyncio.sleep(0)
            way = chance.randrange(4)
            if way == 0:
                client.reset()
            elif way == 1:
                client.half_close()
                await client.rest()
            elif way == 2:
                await client.rest()
        except OSError:
            return


async def test_mutated_streams(caplog: pytest.LogCaptureFixture) -> None:
    limits = {
        "head_timeout": 0.2,
        "body_timeout": 0.2,
        "timeout_keep_alive": 0.2,
        "write_timeout": 1,
        "max_head_size": 4096,
        "max_body_size": 100_000,
    }
    async with serving(handler, **limits) as server:
        with nothing_unhandled(caplog):
            for start in range(0, ROUNDS, TOGETHER):
                async with anyio.create_task_group() as tasks:
                    for seed in range(start, start + TOGETHER):
                        tasks.start_soon(abuse, server.port, seed)
            async with Client(server.port) as client:
                answer = await client.ask(predict(1))
                assert (answer.status, answer.json) == (200, {"instances": [1]})
