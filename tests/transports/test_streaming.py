"""Streamed answers: framing, headers, failures, back-pressure, clients that go."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import pytest

from kserve_lite import serve
from tests.transports.client import (
    LIVE,
    PATIENCE,
    Client,
    in_background,
    model_of,
    nothing_unhandled,
    post,
    predict,
    serving,
    still_serves,
    until,
)

pytestmark = pytest.mark.anyio


def plain(payload: dict[str, Any]) -> Iterator[Any]:
    yield from payload["instances"]


async def asynchronous(payload: dict[str, Any]) -> AsyncIterator[Any]:
    for item in payload["instances"]:
        await asyncio.sleep(0)
        yield item


def returned_by_plain(payload: dict[str, Any]) -> Iterator[Any]:
    return iter(payload["instances"])


async def returned_by_async(payload: dict[str, Any]) -> AsyncIterator[Any]:
    return asynchronous(payload)


HANDLERS = [plain, asynchronous, returned_by_plain, returned_by_async]


def stream_of(*items: Any) -> bytes:
    return post(json.dumps({"instances": items}).encode())


@pytest.mark.parametrize("handler", HANDLERS)
async def test_text_comes_as_it_is(handler: Callable[..., Any]) -> None:
    async with serving(handler) as server, Client(server.port) as client:
        for _ in range(2):
            await client.send(stream_of("one ", "zwei ", "trois é"))
            head = await client.head()
            assert head.status == 200
            assert head.headers["transfer-encoding"] == "chunked"
            assert "content-length" not in head.headers
            assert "content-type" not in head.headers
            pieces = [await client.chunk() for _ in range(4)]
            assert pieces == [b"one ", b"zwei ", "trois é".encode(), b""]


@pytest.mark.parametrize("handler", HANDLERS)
async def test_other_items_come_as_lines_of_json(handler: Callable[..., Any]) -> None:
    async with serving(handler) as server, Client(server.port) as client:
        answer = await client.ask(stream_of({"a": 1}, [2], 3))
        assert answer.headers["content-type"] == "application/x-ndjson"
        assert answer.body == b'{"a":1}\n[2]\n3\n'
        assert (await client.ask(LIVE)).status == 200


async def test_bytes_and_empty_items() -> None:
    async def stream(payload: Any) -> AsyncIterator[bytes]:
        for item in (b"\x00\xff", b"", b"end"):
            yield item

    async with serving(stream) as server, Client(server.port) as client:
        answer = await client.ask(predict(1))
        assert (answer.body, answer.complete) == (b"\x00\xffend", True)


@pytest.mark.parametrize("handler", HANDLERS)
async def test_an_empty_stream(handler: Callable[..., Any]) -> None:
    async with serving(handler) as server, Client(server.port) as client:
        answer = await client.ask(stream_of())
        assert (answer.status, answer.body, answer.complete) == (200, b"", True)


async def test_headers_of_the_handler_are_kept() -> None:
    async def stream(
        payload: Any, response_headers: dict[str, str]
    ) -> AsyncIterator[Any]:
        response_headers["content-type"] = "text/event-stream"
        response_headers["X-Mine"] = "1"
        response_headers["Content-Length"] = "3"
        yield {"a": 1}
        yield "data"

    async with serving(stream) as server, Client(server.port) as client:
        answer = await client.ask(predict(1))
        assert answer.headers["content-type"] == "text/event-stream"
        assert answer.headers["x-mine"] == "1"
        assert answer.body == b'{"a":1}\ndata'


async def test_items_come_when_they_are_made() -> None:
    go_on = anyio.Event()

    async def stream(payload: Any) -> AsyncIterator[str]:
        yield "first"
        await go_on.wait()
        yield "second"

    async with serving(stream) as server, Client(server.port) as client:
        await client.send(predict(1))
        await client.head()
        assert await client.chunk() == b"first"
        go_on.set()
        assert await client.chunk() == b"second"
        assert await client.chunk() == b""


async def test_http10_gets_no_chunks() -> None:
    async with serving(plain) as server, Client(server.port) as client:
        request = stream_of("one ", "two").replace(b"HTTP/1.1", b"HTTP/1.0")
        answer = await client.ask(request)
        assert "transfer-encoding" not in answer.headers
        assert answer.headers["connection"] == "close"
        assert answer.body == b"one two"


async def plain_failure(at: int) -> Callable[..., Any]:
    def stream(payload: Any) -> Iterator[str]:
        for number in range(at):
            yield f"{number} "
        raise ValueError("secret")

    return stream


async def async_failure(at: int) -> Callable[..., Any]:
    async def stream(payload: Any) -> AsyncIterator[str]:
        for number in range(at):
            yield f"{number} "
        raise ValueError("secret")

    return stream


@pytest.mark.parametrize("failing", [plain_failure, async_failure])
async def test_an_error_before_the_first_item_is_500(
    failing: Callable[[int], Any],
) -> None:
    handler = await failing(0)
    async with serving(handler) as server, Client(server.port) as client:
        answer = await client.ask(predict(1, "X-Request-Id: abc"))
        assert (answer.status, answer.headers["x-request-id"]) == (500, "abc")
        assert b"secret" not in answer.body
        assert (await client.ask(LIVE)).status == 200


@pytest.mark.parametrize("failing", [plain_failure, async_failure])
async def test_an_error_later_cuts_the_answer(failing: Callable[[int], Any]) -> None:
    handler = await failing(3)
    async with serving(handler) as server, Client(server.port) as sibling:
        async with Client(server.port) as client:
            answer = await client.ask(predict(1))
            assert (answer.status, answer.complete) == (200, False)
            assert b"0 1 2 ".startswith(answer.body)
        assert (await sibling.ask(LIVE)).status == 200
        await still_serves(server)


async def test_an_item_that_is_no_json_cuts_the_answer() -> None:
    async def stream(payload: Any) -> AsyncIterator[Any]:
        yield {"a": 1}
        yield object()

    async with serving(stream) as server, Client(server.port) as client:
        assert not (await client.ask(predict(1))).complete
        await still_serves(server)


class Endless:
    """Streams without end, and knows how far it came and when it was stopped."""

    def __init__(self) -> None:
        self.made = 0
        self.stopped = threading.Event()

    def plain(self, payload: Any) -> Iterator[bytes]:
        try:
            while True:
                self.made += 1
                yield bytes(64 * 1024)
        finally:
            self.stopped.set()

    async def asynchronous(self, payload: Any) -> AsyncIterator[bytes]:
        try:
            while True:
                self.made += 1
                yield bytes(64 * 1024)
        finally:
            self.stopped.set()


@pytest.mark.parametrize("kind", ["plain", "asynchronous"])
@pytest.mark.parametrize("way", ["close", "reset"])
async def test_an_endless_stream_waits_for_its_reader_and_ends_with_it(
    kind: str, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    endless = Endless()
    async with serving(getattr(endless, kind)) as server:
        with nothing_unhandled(caplog):
            client = Client(server.port, receive_buffer=4096)
            async with client:
                await client.send(predict(1))
                await client.head()
                await client.chunk()
                (connection,) = server._listener._connections
                await until(lambda: connection._writable is not None)
                made = endless.made
                for _ in range(5):
                    await still_serves(server)
                # At most the one item that was being made went on.
                assert endless.made <= made + 1
                # Kernels buffer up to some 10 MB; a producer of its own pace makes
                # gigabytes meanwhile.
                assert endless.made < 500
                assert not endless.stopped.is_set()
                client.reset() if way == "reset" else client.close()
            assert await asyncio.to_thread(endless.stopped.wait, PATIENCE)
            await still_serves(server)


@pytest.mark.parametrize("kind", ["plain", "asynchronous"])
async def test_a_stream_to_a_client_that_never_reads_is_cut(kind: str) -> None:
    endless = Endless()
    async with (
        serving(getattr(endless, kind), write_timeout=0.2) as server,
        Client(server.port, receive_buffer=4096) as client,
    ):
        await client.send(predict(1))
        assert await asyncio.to_thread(endless.stopped.wait, PATIENCE)
        await still_serves(server)


async def test_a_client_that_goes_while_an_item_is_made() -> None:
    started, stopped = anyio.Event(), anyio.Event()

    async def stream(payload: Any) -> AsyncIterator[str]:
        yield "first"
        started.set()
        try:
            await anyio.sleep_forever()
        finally:
            stopped.set()

    async with serving(stream) as server:
        async with Client(server.port) as client:
            await client.send(predict(1))
            await started.wait()
        with anyio.fail_after(PATIENCE):
            await stopped.wait()
        await still_serves(server)


async def test_a_client_that_goes_while_a_thread_makes_an_item() -> None:
    started, go_on, stopped = threading.Event(), threading.Event(), threading.Event()

    def stream(payload: Any) -> Iterator[str]:
        try:
            yield "first"
            started.set()
            go_on.wait(PATIENCE)
            yield "second"
        finally:
            stopped.set()

    async with serving(stream) as server:
        async with Client(server.port) as client:
            await client.send(predict(1))
            assert await asyncio.to_thread(started.wait, PATIENCE)
            client.reset()
        await still_serves(server)
        go_on.set()
        assert await asyncio.to_thread(stopped.wait, PATIENCE)


async def test_a_stream_in_flight_is_finished_by_a_stop() -> None:
    go_on = anyio.Event()

    async def stream(payload: Any) -> AsyncIterator[str]:
        yield "first "
        await go_on.wait()
        yield "second"

    server = serve(model_of(stream), http_port=0, host="127.0.0.1")
    async with in_background(server) as ended, Client(server.port) as client:
        await client.send(predict(1))
        assert "connection" not in (await client.head()).headers
        assert await client.chunk() == b"first "
        server.stop()
        go_on.set()
        assert await client.chunk() == b"second"
        assert await client.chunk() == b""
        assert await client.rest() == b""
        with anyio.fail_after(PATIENCE):
            await ended.wait()
    assert server.report.startswith("drained 1, aborted 0, in ")


async def test_a_generator_that_awaits_nothing_leaves_turns_to_others() -> None:
    ended = False

    async def stream(payload: Any) -> AsyncIterator[bytes]:
        nonlocal ended
        for _ in range(300):
            yield bytes(1000)
        ended = True

    async with serving(stream) as server, Client(server.port) as client:
        await client.send(predict(1))
        await client.head()
        await client.chunk()
        assert not ended
        for _ in range(299):
            assert len(await client.chunk()) == 1000
        assert await client.chunk() == b""
