"""One connection over real loopback sockets: order, limits, deadlines, lost peers."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import json
import socket
import threading
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from kserve_lite import Model, Server
from kserve_lite.transports.http1 import Http1
from kserve_lite.transports.timeouts import READ_SIZE
from tests.transports.client import (
    LIVE,
    PATIENCE,
    Client,
    echo,
    get,
    nothing_unhandled,
    post,
    predict,
    serving,
    still_serves,
    until,
)

pytestmark = pytest.mark.anyio


def speaks_http1(server: Server) -> bool:
    """Whether the first bytes of a connection have come."""
    return any(isinstance(one, Http1) for one in server._listener._connections)


def only_connection(server: Server) -> Any:
    (connection,) = server._listener._connections
    return connection


# --- requests and answers ---------------------------------------------------------


async def test_a_connection_is_kept_and_used_again() -> None:
    async with serving(echo) as server, Client(server.port) as client:
        for number in range(3):
            answer = await client.ask(predict(number))
            assert answer.json == {"instances": [number]}
            assert "connection" not in answer.headers
        assert len(server._listener._connections) == 1


async def test_connection_close_is_honoured_and_said() -> None:
    async with serving(echo) as server, Client(server.port) as client:
        answer = await client.ask(predict(1, "Connection: close"))
        assert answer.status == 200
        assert answer.headers["connection"] == "close"
        assert await client.rest() == b""


async def test_http10_closes_unless_asked_to_stay() -> None:
    async with serving(echo) as server:
        async with Client(server.port) as client:
            answer = await client.ask(b"GET /v2/health/live HTTP/1.0\r\n\r\n")
            assert answer.headers["connection"] == "close"
            assert await client.rest() == b""
        async with Client(server.port) as client:
            kept = b"GET /v2/health/live HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
            for _ in range(2):
                answer = await client.ask(kept)
                assert answer.headers["connection"] == "keep-alive"


async def async_number(payload: dict[str, Any]) -> dict[str, Any]:
    if payload["instances"][0] % 3 == 0:
        await asyncio.sleep(0)
    return {"predictions": payload["instances"]}


def plain_number(payload: dict[str, Any]) -> dict[str, Any]:
    return {"predictions": payload["instances"]}


@pytest.mark.parametrize("handler", [async_number, plain_number])
@pytest.mark.parametrize("together", [True, False])
async def test_pipelined_requests_are_answered_in_order(
    handler: Callable[..., Any], together: bool
) -> None:
    requests = [predict(number) for number in range(150)]
    async with serving(handler) as server, Client(server.port) as client:
        for data in [b"".join(requests)] if together else requests:
            await client.send(data)
        for number in range(150):
            assert (await client.answer()).json == {"predictions": [number]}


async def test_pipelined_requests_split_anywhere() -> None:
    stream = predict(1) + LIVE + predict(2) + get("/nowhere") + predict(3)
    async with serving(echo) as server, Client(server.port) as client:
        for start in range(0, len(stream), 7):
            await client.send(stream[start : start + 7])
            await asyncio.sleep(0)
        statuses = [(await client.answer()).status for _ in range(5)]
    assert statuses == [200, 200, 200, 404, 200]


async def test_a_connection_with_much_to_do_leaves_turns_to_others() -> None:
    async with serving(echo) as server, Client(server.port) as busy:
        await busy.send(LIVE * 500)
        await still_serves(server)
        for _ in range(500):
            assert (await busy.answer()).status == 200


async def test_head_has_the_length_and_no_body() -> None:
    async with serving(echo) as server, Client(server.port) as client:
        expected = await client.ask(LIVE)
        await client.send(LIVE.replace(b"GET", b"HEAD"))
        answer = await client.answer(no_body=True)
        assert answer.status == 200
        assert answer.headers["content-length"] == expected.headers["content-length"]
        # Nothing follows the head: the next answer is read from its first byte.
        assert (await client.ask(LIVE)).body == expected.body


async def test_expect_gets_100_and_then_its_answer() -> None:
    head, _, body = predict(5, "Expect: 100-continue").partition(b"\r\n\r\n")
    async with serving(echo) as server, Client(server.port) as client:
        for _ in range(2):
            assert (await client.ask(head + b"\r\n\r\n")).status == 100
            answer = await client.ask(body)
            assert (answer.status, answer.json) == (200, {"instances": [5]})


async def test_expect_of_too_large_a_body_gets_413_and_no_100() -> None:
    head = post(b"", "Expect: 100-continue").replace(b"Length: 0", b"Length: 5000")
    async with (
        serving(echo, max_body_size=4999) as server,
        Client(server.port) as client,
    ):
        answer = await client.ask(head)
        assert answer.status == 413
        assert answer.headers["connection"] == "close"
        assert await client.rest() == b""


def chunked(*pieces: bytes) -> bytes:
    head = post(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    body = (b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return b"".join((head, *body, b"0\r\n\r\n"))


async def test_chunked_request_and_the_one_after_it() -> None:
    async with serving(echo) as server, Client(server.port) as client:
        await client.send(chunked(b'{"inst', b'ances"', b":[1]}") + predict(2))
        assert (await client.answer()).json == {"instances": [1]}
        assert (await client.answer()).json == {"instances": [2]}


async def test_chunked_request_byte_by_byte() -> None:
    async with serving(echo) as server, Client(server.port) as client:
        for byte in chunked(b'{"instances":', b"[1]}"):
            await client.send(bytes([byte]))
            await asyncio.sleep(0)
        assert (await client.answer()).json == {"instances": [1]}


async def test_large_body_in_pieces() -> None:
    text = "x" * 5_000_000
    data = predict(text)
    async with serving(echo) as server, Client(server.port) as client:
        for _ in range(2):
            for start in range(0, len(data), 300_001):
                await client.send(data[start : start + 300_001])
                await asyncio.sleep(0)
            answer = await client.answer()
            assert answer.status == 200
            assert answer.json["instances"] == [text]


# --- refusals ---------------------------------------------------------------------

LARGE_HEAD = get("/", *(f"X-{n}: {'v' * 80}" for n in range(20)))


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (post(b"x" * 101), 413),
        (chunked(b"x" * 60, b"x" * 60), 413),
        (LARGE_HEAD, 431),
        (LARGE_HEAD[:-2], 431),
        (b"GET / HTTP/3.0\r\nHost: x\r\n\r\n", 505),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nBad header: 1\r\n\r\n", 400),
        (post(b"", "Transfer-Encoding: chunked"), 400),
        (post(b"", "Expect: a-miracle"), 417),
        (chunked()[:-5] + b"zz\r\n", 400),
    ],
)
async def test_refusals_close_the_connection(data: bytes, status: int) -> None:
    limits = {"max_body_size": 100, "max_head_size": 1000}
    async with serving(echo, **limits) as server, Client(server.port) as client:
        answer = await client.ask(data)
        assert answer.status == status
        assert answer.headers["connection"] == "close"
        assert answer.headers["content-type"] == "application/json"
        assert list(answer.json) == ["error"]
        assert await client.rest() == b""


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (post(b"{"), 400),
        (get("/nowhere"), 404),
        (post(path="/v1/models/other:predict"), 404),
    ],
)
async def test_mistakes_keep_the_connection(data: bytes, status: int) -> None:
    async with serving(echo) as server, Client(server.port) as client:
        answer = await client.ask(data)
        assert answer.status == status
        assert list(answer.json) == ["error"]
        assert (await client.ask(LIVE)).status == 200


async def test_415_for_a_body_that_is_encoded() -> None:
    async with serving(echo) as server, Client(server.port) as client:
        answer = await client.ask(post(b"\x1f\x8b", "Content-Encoding: gzip"))
        assert (answer.status, answer.headers["accept-encoding"]) == (415, "identity")
        plain = predict(1, "Content-Encoding: identity")
        assert (await client.ask(plain)).status == 200


async def test_405_says_what_is_allowed() -> None:
    async with serving(echo) as server, Client(server.port) as client:
        answer = await client.ask(get("/v2/models/m/infer"))
        assert (answer.status, answer.headers["allow"]) == (405, "POST")
        answer = await client.ask(post(path="/v2/health/live"))
        assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"hello\r\n\r\n",
        b"\x00" * 100,
    ],
)
async def test_garbage_is_closed_without_a_word(data: bytes) -> None:
    async with serving(echo) as server, Client(server.port) as client:
        await client.send(data)
        assert await client.rest() == b""


async def test_a_refusal_reaches_a_client_that_is_still_sending() -> None:
    size = 8_000_000
    head = post(b"").replace(b"Length: 0", b"Length: %d" % size)
    async with (
        serving(echo, max_body_size=1000) as server,
        Client(server.port) as client,
    ):
        # Far more than the buffers of both kernels: it is read, or this would block.
        await client.send(head + b"x" * size)
        assert (await client.answer()).status == 413
        assert await client.rest() == b""


async def test_a_refusal_follows_the_answers_before_it() -> None:
    async with serving(echo) as server, Client(server.port) as client:
        await client.send(predict(1) + b"GET / HTTP/1.1\r\n\r\n" + predict(2))
        assert (await client.answer()).json == {"instances": [1]}
        assert (await client.answer()).status == 400
        assert await client.rest() == b""


async def test_too_many_connections_get_503() -> None:
    async with serving(echo, max_connections=2) as server:
        async with Client(server.port) as first, Client(server.port) as second:
            assert (await first.ask(LIVE)).status == 200
            assert (await second.ask(LIVE)).status == 200
            async with Client(server.port) as third:
                answer = await third.answer()
                assert answer.status == 503
                assert answer.headers["retry-after"] == "1"
                assert answer.headers["connection"] == "close"
                assert await third.rest() == b""
            assert (await first.ask(LIVE)).status == 200
        await until(lambda: not server._listener._connections)
        await still_serves(server)


async def test_far_too_many_connections_are_cut() -> None:
    async with serving(echo, max_connections=1) as server:
        async with Client(server.port) as first, Client(server.port) as second:
            assert (await first.ask(LIVE)).status == 200
            assert (await second.answer()).status == 503
            async with Client(server.port) as third:
                assert await third.rest_or_reset() == b""
        await until(lambda: not server._listener._connections)
        await still_serves(server)


async def test_refused_connection_that_is_reset_already(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving(echo, max_connections=1) as server, Client(server.port) as first:
        assert (await first.ask(LIVE)).status == 200
        with nothing_unhandled(caplog):
            for _ in range(5):
                # The loop is not run in between: what it accepts is reset already.
                one = socket.create_connection(("127.0.0.1", server.port))
                linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                one.close()
                for _ in range(10):
                    await asyncio.sleep(0)
            assert (await first.ask(LIVE)).status == 200


# --- deadlines --------------------------------------------------------------------


async def test_408_for_a_head_that_does_not_come() -> None:
    async with serving(echo, head_timeout=0.2) as server, Client(server.port) as client:
        assert (await client.ask(LIVE)).status == 200
        answer = await client.ask(b"GET / HTTP/1.1\r\nHost:")
        assert (answer.status, answer.headers["connection"]) == (408, "close")
        assert await client.rest() == b""


@pytest.mark.parametrize("begun", [post(b"x" * 50)[:-10], chunked(b"abc")[:-5]])
async def test_408_for_a_body_that_does_not_come(begun: bytes) -> None:
    async with serving(echo, body_timeout=0.2) as server, Client(server.port) as client:
        answer = await client.ask(begun)
        assert (answer.status, answer.headers["connection"]) == (408, "close")
        assert await client.rest() == b""


async def test_a_slow_body_that_keeps_coming_is_waited_for() -> None:
    # 50 KB earn some 50 seconds: the body timeout is not one for the whole transfer.
    text = "x" * 50_000
    data = predict(text)
    async with serving(echo, body_timeout=0.1) as server, Client(server.port) as client:
        await client.send(data[:-10])
        await anyio.sleep(0.4)
        answer = await client.ask(data[-10:])
        assert answer.json["instances"] == [text]


@pytest.mark.parametrize("before", [b"", LIVE])
async def test_an_idle_connection_is_closed_without_a_word(before: bytes) -> None:
    async with (
        serving(echo, timeout_keep_alive=0.2) as server,
        Client(server.port) as client,
    ):
        if before:
            assert (await client.ask(before)).status == 200
        assert await client.rest() == b""
        await until(lambda: not server._listener._connections)


async def test_a_long_answer_has_no_deadline() -> None:
    async def slow(payload: Any) -> Any:
        await anyio.sleep(0.5)
        return payload

    limits = {"timeout_keep_alive": 0.1, "head_timeout": 0.1, "body_timeout": 0.1}
    async with serving(slow, **limits) as server, Client(server.port) as client:
        assert (await client.ask(predict(1))).json == {"instances": [1]}


@pytest.mark.parametrize("closing", ["keep-alive", "close"])
async def test_a_reader_that_does_not_read_is_cut(closing: str) -> None:
    size = 30_000_000

    async def large(payload: Any) -> bytes:
        return bytes(size)

    async with (
        serving(large, write_timeout=0.2) as server,
        Client(server.port, receive_buffer=4096) as client,
    ):
        await client.send(predict(1, f"Connection: {closing}"))
        assert (await client.head()).headers["content-length"] == str(size)
        await until(lambda: not server._listener._connections)
        assert len(await client.rest_or_reset()) < size
        await still_serves(server)


async def test_a_reader_that_reads_gets_all_of_it() -> None:
    async def large(payload: Any) -> bytes:
        return bytes(30_000_000)

    async with (
        serving(large, write_timeout=5) as server,
        Client(server.port, receive_buffer=4096) as client,
    ):
        answer = await client.ask(predict(1, "Connection: close"))
        assert (len(answer.body), answer.complete) == (30_000_000, True)


# --- pipelining is bounded --------------------------------------------------------


async def test_reading_pauses_while_too_much_is_pipelined() -> None:
    go_on = anyio.Event()

    async def wait(payload: Any) -> Any:
        await go_on.wait()
        return payload

    requests = b"".join(predict(number) for number in range(200))
    async with (
        serving(wait, max_head_size=1024) as server,
        Client(server.port) as client,
    ):
        await client.send(requests)
        await until(lambda: speaks_http1(server))
        connection = only_connection(server)
        await until(lambda: connection._paused)
        go_on.set()
        for number in range(200):
            assert (await client.answer()).json == {"instances": [number]}
        assert (await client.ask(LIVE)).status == 200


async def test_what_is_kept_of_pipelined_requests_is_bounded() -> None:
    permits = anyio.Semaphore(0)

    async def wait(payload: Any) -> Any:
        await permits.acquire()
        return payload

    async with (
        # While nothing is read, nobody sees that the client has gone at the end.
        serving(wait, max_head_size=1024, grace_period=0.1) as server,
        Client(server.port) as client,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(client.send, predict(1) * 40_000)
        await until(lambda: speaks_http1(server))
        connection = only_connection(server)
        for _ in range(20):
            await until(lambda: connection._paused)
            assert len(connection._wire.kept) <= 1024 + READ_SIZE
            permits.release()
            assert (await client.answer()).status == 200
        tasks.cancel_scope.cancel()


# --- peers that go away -----------------------------------------------------------


@pytest.mark.parametrize("way", ["close", "reset"])
async def test_a_client_that_goes_cancels_its_handler_alone(way: str) -> None:
    started, cancelled, go_on = anyio.Event(), anyio.Event(), anyio.Event()

    async def wait(payload: dict[str, Any]) -> Any:
        if payload["instances"] == ["sibling"]:
            await go_on.wait()
            return payload
        started.set()
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            cancelled.set()
            raise

    async with serving(wait) as server, Client(server.port) as sibling:
        await sibling.send(predict("sibling"))
        async with Client(server.port) as client:
            await client.send(predict(1))
            await started.wait()
            client.reset() if way == "reset" else client.close()
            with anyio.fail_after(PATIENCE):
                await cancelled.wait()
        go_on.set()
        assert (await sibling.answer()).json == {"instances": ["sibling"]}
        assert (await sibling.ask(LIVE)).status == 200


async def test_a_handler_is_told_that_its_client_has_gone() -> None:
    started = anyio.Event()
    seen: list[bool] = []

    async def wait(payload: Any, context: Any) -> Any:
        seen.append(context.disconnected)
        started.set()
        try:
            await anyio.sleep_forever()
        finally:
            seen.append(context.disconnected)

    async with serving(wait) as server:
        async with Client(server.port) as client:
            await client.send(predict(1))
            await started.wait()
        await until(lambda: len(seen) == 2)
    assert seen == [False, True]


async def test_a_half_closed_client_is_answered() -> None:
    async def quick(payload: Any) -> Any:
        await anyio.sleep(0.05)
        return payload

    async with serving(quick) as server, Client(server.port) as client:
        await client.send(predict(1))
        client.half_close()
        answer = await client.answer()
        assert answer.json == {"instances": [1]}
        assert answer.headers["connection"] == "close"
        assert await client.rest() == b""


async def test_a_half_closed_client_of_a_large_answer_gets_all_of_it() -> None:
    async def large(payload: Any) -> bytes:
        return bytes(20_000_000)

    async with serving(large) as server, Client(server.port) as client:
        await client.send(predict(1))
        client.half_close()
        answer = await client.answer()
        assert (len(answer.body), answer.complete) == (20_000_000, True)


async def test_a_client_that_half_closes_amid_the_answer() -> None:
    async def large(payload: Any) -> bytes:
        return bytes(20_000_000)

    async with (
        serving(large) as server,
        Client(server.port, receive_buffer=4096) as client,
    ):
        await client.send(predict(1))
        head = await client.head()
        assert "connection" not in head.headers
        client.half_close()
        assert len(await client.rest()) == 20_000_000


async def test_end_of_input_amid_a_request_closes() -> None:
    async with serving(echo) as server:
        for begun in (b"GET /", post(b"12345")[:-2], chunked(b"123")[:-5]):
            async with Client(server.port) as client:
                await client.send(begun)
                client.half_close()
                assert await client.rest() == b""


async def test_resets_disturb_nobody(caplog: pytest.LogCaptureFixture) -> None:
    async def large(payload: Any) -> bytes:
        return bytes(10_000_000)

    async def reset_after(data: bytes, read: int) -> None:
        client = Client(server.port, receive_buffer=4096)
        async with client:
            await client.send(data)
            if read:
                await client._exactly(read)
            client.reset()

    async with serving(large) as server, Client(server.port) as sibling:
        with nothing_unhandled(caplog):
            async with anyio.create_task_group() as tasks:
                for _ in range(8):
                    tasks.start_soon(reset_after, predict(1), 5000)
                    tasks.start_soon(reset_after, predict(1), 0)
                    tasks.start_soon(reset_after, predict(1) * 20, 5000)
                    tasks.start_soon(reset_after, post(b"x" * 900_000)[:-9], 0)
                    tasks.start_soon(reset_after, b"GET / HTT", 0)
                    tasks.start_soon(reset_after, chunked(b"123")[:-5], 0)
                    tasks.start_soon(reset_after, b"", 0)
                for _ in range(20):
                    assert (await sibling.ask(LIVE)).status == 200
            await until(lambda: len(server._listener._connections) == 1)
            assert (await sibling.ask(LIVE)).status == 200


# --- plain handlers ---------------------------------------------------------------


async def test_a_plain_handler_does_not_hold_up_the_server() -> None:
    go_on = threading.Event()

    def block(payload: Any) -> Any:
        go_on.wait(PATIENCE)
        return payload

    async with serving(block) as server, Client(server.port) as client:
        try:
            await client.send(predict(1))
            await until(lambda: server.dataplane.stages.offload.running)
            for _ in range(3):
                await still_serves(server)
        finally:
            go_on.set()
        assert (await client.answer()).json == {"instances": [1]}


async def test_max_asyncio_workers_bounds_the_plain_handlers() -> None:
    pair = threading.Barrier(2)
    lock = threading.Lock()
    running: list[int] = [0]
    peak: list[int] = [0]

    def count(payload: Any) -> Any:
        with lock:
            running[0] += 1
            peak[0] = max(peak[0], running[0])
        pair.wait(PATIENCE)  # so many do run at once
        with lock:
            running[0] -= 1
        return payload

    async def ask(port: int) -> None:
        async with Client(port) as client:
            assert (await client.ask(predict(1))).status == 200

    async with (
        serving(count, max_asyncio_workers=2) as server,
        anyio.create_task_group() as tasks,
    ):
        for _ in range(8):
            tasks.start_soon(ask, server.port)
    assert peak == [2]


async def test_plain_handlers_run_in_the_callers_context() -> None:
    variable = contextvars.ContextVar("variable", default="")
    model = Model("m")

    @model.preprocess
    async def preprocess(payload: dict[str, Any]) -> Any:
        variable.set(payload["instances"][0])
        return payload

    @model.predict
    def predicts(payload: dict[str, Any]) -> Any:
        return {"predictions": [variable.get()]}

    async with (
        serving(model) as server,
        Client(server.port) as one,
        Client(server.port) as other,
    ):
        await one.send(predict("one"))
        await other.send(predict("other"))
        assert (await one.answer()).json == {"predictions": ["one"]}
        assert (await other.answer()).json == {"predictions": ["other"]}


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize(
    "kind",
    [
        ValueError,
        StopIteration,
        StopAsyncIteration,
        SystemExit,
        asyncio.CancelledError,
        TimeoutError,
        ConnectionResetError,
        BrokenPipeError,
        MemoryError,
        RecursionError,
    ],
)
async def test_whatever_a_handler_raises_is_500(
    plain: bool, kind: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(payload: dict[str, Any]) -> Any:
        if payload["instances"] == ["fail"]:
            raise kind("secret")
        return payload

    async def async_fail(payload: dict[str, Any]) -> Any:
        return fail(payload)

    handler = fail if plain else async_fail
    async with serving(handler) as server, Client(server.port) as client:
        answer = await client.ask(predict("fail", "X-Request-Id: abc"))
        assert answer.status == 500
        assert answer.headers["x-request-id"] == "abc"
        assert "abc" in answer.json["error"]
        assert b"secret" not in answer.body
        assert (await client.ask(predict(1))).json == {"instances": [1]}
        await still_serves(server)
    failures = [r for r in caplog.records if "abc" in r.getMessage()]
    assert len(failures) == 1
    assert failures[0].exc_info is not None


class Odd(BaseException):
    """No Exception, as some test and cancellation libraries have it."""


@pytest.mark.parametrize("kind", [Odd, GeneratorExit])
async def test_what_is_no_exception_harms_one_connection_at_most(
    kind: type[BaseException],
) -> None:
    async def fail(payload: dict[str, Any]) -> Any:
        if payload["instances"] == ["fail"]:
            raise kind
        return payload

    async with serving(fail) as server, Client(server.port) as sibling:
        assert (await sibling.ask(LIVE)).status == 200
        async with Client(server.port) as client:
            await client.send(predict("fail"))
            with contextlib.suppress(EOFError, ConnectionResetError):
                assert (await client.answer()).status == 500
        assert (await sibling.ask(predict(1))).json == {"instances": [1]}
        await still_serves(server)


async def test_json_that_cannot_be_said_is_500() -> None:
    async def odd(payload: Any) -> Any:
        return {"predictions": object()}

    async with serving(odd) as server, Client(server.port) as client:
        assert (await client.ask(predict(1))).status == 500
        assert (await client.ask(LIVE)).status == 200


async def test_headers_of_a_handler_cannot_frame_or_split_the_answer() -> None:
    async def odd(payload: dict[str, Any], response_headers: dict[str, str]) -> Any:
        name, value = payload["instances"][0]
        response_headers[name] = value
        return payload

    def ask(name: str, value: str) -> bytes:
        return post(json.dumps({"instances": [[name, value]]}).encode())

    async with serving(odd) as server, Client(server.port) as client:
        assert (await client.ask(ask("x-mine", "1"))).headers["x-mine"] == "1"
        assert (await client.ask(ask("x-mine", "1\r\nx-more: 2"))).status == 500
        assert (await client.ask(ask("x mine", "1"))).status == 500
        assert (await client.ask(ask("Content-Length", "1"))).status == 200
        assert (await client.ask(ask("Transfer-Encoding", "chunked"))).status == 200
        assert (await client.ask(LIVE)).status == 200
