"""HTTP/2 over real loopback sockets: negotiation, the same answers as over HTTP/1.1,
and streams that share a connection and nothing else.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import pytest
from hyperframe.frame import GoAwayFrame, HeadersFrame

from kserve_lite import InferResponse, Model, Server
from kserve_lite.transports.http1 import Http1
from kserve_lite.transports.http2 import Http2
from kserve_lite.transports.newcomer import Newcomer
from kserve_lite.wire.frames import ErrorCode
from kserve_lite.wire.http2 import PREFACE
from tests.transports.client import (
    LIVE,
    PATIENCE,
    Client,
    echo,
    nothing_unhandled,
    post,
    serving,
    still_serves,
    until,
)
from tests.transports.h2client import (
    GRPC,
    LIVE_PATH,
    NEVER,
    PREDICT_PATH,
    SERVICE,
    H2Client,
    Waiting,
    any_request,
    connected,
    http2_of,
    inference,
    read_message,
)

pytestmark = pytest.mark.anyio

SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"

both_versions = pytest.mark.parametrize("version", ["http1", "http2"])


# --- which version ----------------------------------------------------------------


async def test_each_version_by_its_first_bytes() -> None:
    async with (
        serving(echo) as server,
        Client(server.port) as first,
        H2Client(server.port) as second,
    ):
        assert (await first.ask(LIVE)).status == 200
        assert await second.live() == 200
        assert (await first.ask(LIVE)).status == 200
        kinds = {type(one) for one in server._listener._connections}
        assert kinds == {Http1, Http2}


async def test_the_preface_one_byte_at_a_time() -> None:
    async with serving(echo) as server, Client(server.port) as client:
        for byte in PREFACE + SETTINGS:
            await client.send(bytes([byte]))
            await asyncio.sleep(0)
        frame = HeadersFrame(1, flags=["END_HEADERS", "END_STREAM"])
        # :method GET, :scheme http, :path /, :authority x (RFC 7541 appendix A)
        frame.data = b"\x82\x86\x84\x41\x01x"
        for byte in frame.serialize():
            await client.send(bytes([byte]))
            await asyncio.sleep(0)
        while b'{"status":"alive"}' not in client._data:
            assert await client._read()


async def test_http11_one_byte_at_a_time_even_as_the_preface_begins() -> None:
    for method in (b"GET", b"PUT", b"P"):
        data = LIVE.replace(b"GET", method)
        async with serving(echo) as server, Client(server.port) as client:
            for byte in data:
                await client.send(bytes([byte]))
                await asyncio.sleep(0)
            answer = await client.answer()
            assert answer.status == (200 if method == b"GET" else 405)


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x00" * 9, b"\xff" * 100]
)
async def test_garbage_after_the_preface_gets_goaway_and_no_http11(
    garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(echo) as server, Client(server.port) as client:
        with nothing_unhandled(caplog):
            await client.send(PREFACE + garbage)
            said = await client.rest()
            await until(lambda: not server._listener._connections)
    assert b"HTTP" not in said.replace(b"the preface of HTTP/2", b"")
    assert b"\x00\x00\x07" not in said[:5]
    assert GoAwayFrame.type in frame_types(said)


def frame_types(raw: bytes) -> list[int]:
    types = []
    while raw:
        types.append(raw[3])
        raw = raw[9 + int.from_bytes(raw[:3], "big") :]
    return types


@pytest.mark.parametrize(
    "wrong",
    [
        b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\rX" + SETTINGS,
        b"PRI * HTTP/2.0\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/3.0\r\n\r\nSM\r\n\r\n",
    ],
)
@pytest.mark.parametrize("together", [True, False])
async def test_a_wrong_preface_is_closed_without_a_word(
    wrong: bytes, together: bool
) -> None:
    async with serving(echo) as server, Client(server.port) as client:
        if not together:
            await client.send(wrong[:16])
            await until(lambda: server._listener._connections)
        await client.send(wrong[16 * (not together) :])
        assert await client.rest_or_reset() == b""
        await still_serves(server)


async def test_upgrade_to_h2c_is_ignored() -> None:
    upgrade = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c")
    body = b'{"instances":[1]}'
    request = post(body, *upgrade, "HTTP2-Settings: AAMAAABkAAQAAP__")
    async with serving(echo) as server, Client(server.port) as client:
        for _ in range(2):
            answer = await client.ask(request)
            assert (answer.status, answer.body) == (200, body)
            assert "upgrade" not in answer.headers


async def test_first_bytes_that_never_come() -> None:
    limits = {"timeout_keep_alive": 0.2, "head_timeout": NEVER}
    async with serving(echo, **limits) as server, Client(server.port) as client:
        assert await client.rest() == b""
        await until(lambda: not server._listener._connections)


@pytest.mark.parametrize("begun", [b"P", PREFACE[:-1]])
async def test_a_preface_that_stops_midway(begun: bytes) -> None:
    limits = {"timeout_keep_alive": NEVER, "head_timeout": 0.2}
    async with serving(echo, **limits) as server, Client(server.port) as client:
        await client.send(begun)
        assert await client.rest() == b""
        await until(lambda: not server._listener._connections)


@pytest.mark.parametrize("way", ["close", "reset", "half_close"])
@pytest.mark.parametrize("begun", [b"", b"PRI", PREFACE, PREFACE + SETTINGS])
async def test_clients_that_go_before_they_ask(
    begun: bytes, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(echo) as server:
        with nothing_unhandled(caplog):
            async with Client(server.port) as client:
                await client.send(begun)
                await until(lambda: server._listener._connections)
                getattr(client, way)()
                await until(lambda: not server._listener._connections)
            await still_serves(server)


async def test_a_connection_whose_version_is_unknown_does_not_hold_up_a_stop() -> None:
    async with serving(echo) as server, Client(server.port) as client:
        await client.send(PREFACE[:10])
        await until(lambda: server._listener._connections)
        (newcomer,) = server._listener._connections
        assert isinstance(newcomer, Newcomer)
        await until(lambda: newcomer._first)
        server.stop()
        with anyio.fail_after(PATIENCE):
            await server._listener.drain()
        assert await client.rest() == b""


# --- the same over both versions --------------------------------------------------

V2_BODY = (
    b'{"id":"7","inputs":[{"name":"a","shape":[2],"datatype":"INT32","data":[1,2]}]}'
)
V1_BODY = b'{"instances":[[1,2],[3,4]]}'

ROUTES: list[tuple[str, str, bytes | None, int]] = [
    ("GET", "/", None, 200),
    ("GET", "/v1/models", None, 200),
    ("GET", "/v1/models/m", None, 200),
    ("GET", "/v1/models/m%20", None, 404),
    ("POST", "/v1/models/m:predict", V1_BODY, 200),
    ("POST", "/v1/models/m:predict?x=1", V1_BODY, 200),
    ("POST", "/v1/models/m:explain", V1_BODY, 200),
    ("POST", "/v1/models/other:predict", V1_BODY, 404),
    ("POST", "/v1/models/m:predict", b"{", 400),
    ("POST", "/v1/models/m:predict", b"", 400),
    ("GET", "/v1/models/m:predict", None, 404),
    ("GET", "/v2", None, 200),
    ("GET", "/v2/health/live", None, 200),
    ("GET", "/v2/health/ready", None, 200),
    ("GET", "/v2/models", None, 200),
    ("GET", "/v2/models/m", None, 200),
    ("GET", "/v2/models/m/ready", None, 200),
    ("GET", "/v2/models/m/versions/1", None, 404),
    ("POST", "/v2/models/m/infer", V2_BODY, 200),
    ("POST", "/v2/models/m/infer", b'{"inputs":1}', 400),
    ("POST", "/v2/models/m/versions/1/infer", V2_BODY, 404),
    ("DELETE", "/v2/models/m", None, 405),
    ("GET", "/nowhere", None, 404),
    ("HEAD", "/v2/health/live", None, 200),
    ("HEAD", "/v2/models/m", None, 200),
    ("HEAD", "/nowhere", None, 404),
]


def explained() -> Model:
    model = Model("m", predict=any_request)

    @model.explain
    async def explain(payload: dict[str, Any]) -> Any:
        return {"explanations": payload["instances"]}

    return model


async def test_every_route_answers_alike() -> None:
    async with (
        serving(explained()) as server,
        connected("http1", server.port) as first,
        connected("http2", server.port) as second,
    ):
        for method, path, body, status in ROUTES:
            for announced in (True, False) if body is not None else (True,):
                one = await first.fetch(method, path, body=body, announced=announced)
                other = await second.fetch(method, path, body=body, announced=announced)
                for answer in (one, other):
                    assert answer.headers.pop("date")
                    assert answer.headers.pop("server") == "kserve-lite"
                    assert len(answer.headers.pop("x-request-id")) == 32
                    assert len(answer.headers.pop("traceparent")) == 55
                assert (one.status, other.status) == (status, status), path
                assert one == other


@both_versions
async def test_a_connection_is_used_again(version: str) -> None:
    async with serving(echo) as server, connected(version, server.port) as client:
        for number in range(20):
            body = b'{"instances":[%d]}' % number
            answer = await client.fetch("POST", PREDICT_PATH, body=body)
            assert (answer.status, answer.body) == (200, body)
        assert len(server._listener._connections) == 1


@both_versions
@pytest.mark.parametrize("announced", [True, False])
async def test_large_bodies_both_ways(version: str, announced: bool) -> None:
    body = b'{"instances":["%s"]}' % (b"x" * 5_000_000)
    async with serving(echo) as server, connected(version, server.port) as client:
        for _ in range(2):
            answer = await client.fetch(
                "POST", PREDICT_PATH, body=body, announced=announced
            )
            assert (answer.status, answer.body == body) == (200, True)
        assert (await client.fetch("GET", LIVE_PATH)).status == 200


@both_versions
async def test_context_and_headers_reach_the_handler(version: str) -> None:
    async def look(payload: Any, context: Any) -> Any:
        return {"seen": context.headers["x-mine"], "gone": context.disconnected}

    async with serving(look) as server, connected(version, server.port) as client:
        answer = await client.fetch(
            "POST", PREDICT_PATH, ("x-mine", "a: b, c"), body=b'{"instances":[]}'
        )
        assert answer.json == {"seen": "a: b, c", "gone": False}


def plain_stream(payload: Any, response_headers: dict[str, str]) -> Iterator[Any]:
    response_headers.update(
        {"content-type": "text/event-stream", "X-Mine": "1", "Content-Length": "3"}
    )
    yield {"a": 1}
    yield "data é"
    yield b"\x00"


async def async_stream(
    payload: Any, response_headers: dict[str, str]
) -> AsyncIterator[Any]:
    for item in plain_stream(payload, response_headers):
        await asyncio.sleep(0)
        yield item


@both_versions
@pytest.mark.parametrize("handler", [plain_stream, async_stream])
async def test_a_stream_with_headers_of_its_handler(
    version: str, handler: Callable[..., Any]
) -> None:
    async with serving(handler) as server, connected(version, server.port) as client:
        for _ in range(2):
            answer = await client.fetch("POST", PREDICT_PATH, body=V1_BODY)
            assert (answer.status, answer.complete) == (200, True)
            assert answer.headers["content-type"] == "text/event-stream"
            assert answer.headers["x-mine"] == "1"
            assert "content-length" not in answer.headers
            assert answer.body == b'{"a":1}\n' + "data é".encode() + b"\x00"


@both_versions
async def test_an_empty_stream(version: str) -> None:
    async def stream(payload: Any) -> AsyncIterator[Any]:
        if payload is None:
            yield "never"

    async with serving(stream) as server, connected(version, server.port) as client:
        answer = await client.fetch("POST", PREDICT_PATH, body=V1_BODY)
        assert (answer.status, answer.body, answer.complete) == (200, b"", True)


@both_versions
@pytest.mark.parametrize("before", [0, 3])
async def test_a_stream_that_fails(version: str, before: int) -> None:
    async def stream(payload: Any) -> AsyncIterator[str]:
        for number in range(before):
            yield f"{number} "
        raise ValueError("secret")

    async with serving(stream) as server:
        async with connected(version, server.port) as client:
            answer = await client.fetch("POST", PREDICT_PATH, body=V1_BODY)
            assert b"secret" not in answer.body
            if before:
                assert (answer.status, answer.complete) == (200, False)
                assert b"0 1 2 ".startswith(answer.body)
            else:
                assert answer.status == 500
            if version == "http2":
                assert (await client.fetch("GET", LIVE_PATH)).status == 200
        await still_serves(server)


@both_versions
@pytest.mark.parametrize("plain", [True, False])
async def test_a_handler_that_fails(
    version: str, plain: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(payload: dict[str, Any]) -> Any:
        raise RuntimeError("secret")

    async def async_fail(payload: dict[str, Any]) -> Any:
        return fail(payload)

    handler = fail if plain else async_fail
    async with serving(handler) as server, connected(version, server.port) as client:
        answer = await client.fetch(
            "POST", PREDICT_PATH, ("x-request-id", "abc"), body=V1_BODY
        )
        assert (answer.status, answer.headers["x-request-id"]) == (500, "abc")
        assert b"secret" not in answer.body
        assert (await client.fetch("GET", LIVE_PATH)).status == 200
    assert len([r for r in caplog.records if "abc" in r.getMessage()]) == 1


@both_versions
@pytest.mark.parametrize("announced", [True, False])
async def test_413_for_a_body_that_is_too_large(version: str, announced: bool) -> None:
    seen: list[Any] = []

    async def look(payload: Any) -> Any:
        seen.append(payload)
        return payload

    async with serving(look, max_body_size=1000) as server:
        async with connected(version, server.port) as client:
            body = b'{"instances":[1]}'.ljust(1001)
            answer = await client.fetch(
                "POST", PREDICT_PATH, body=body, announced=announced
            )
            assert (answer.status, answer.complete) == (413, True)
            assert list(answer.json) == ["error"]
            if version == "http2":
                for _ in range(2):
                    assert (await client.fetch("GET", LIVE_PATH)).status == 200
        async with connected(version, server.port) as client:
            body = b'{"instances":[2]}'.ljust(1000)
            answer = await client.fetch(
                "POST", PREDICT_PATH, body=body, announced=announced
            )
            assert answer.status == 200
    assert seen == [{"instances": [2]}]


@both_versions
async def test_431_for_a_head_that_is_too_large(version: str) -> None:
    fields = [(f"x-{n}", "v" * 80) for n in range(12)]
    async with serving(echo, max_head_size=1000) as server:
        async with connected(version, server.port) as client:
            answer = await client.fetch("GET", LIVE_PATH, *fields)
            assert (answer.status, answer.complete) == (431, True)
            assert list(answer.json) == ["error"]
            if version == "http2":
                assert (await client.fetch("GET", LIVE_PATH)).status == 200
        await still_serves(server)


@both_versions
async def test_headers_of_a_handler_cannot_frame_or_split_the_answer(
    version: str,
) -> None:
    async def odd(payload: dict[str, Any], response_headers: dict[str, str]) -> Any:
        name, value = payload["instances"][0]
        response_headers[name] = value
        return payload

    cases = [
        ("x-mine", "1", 200),
        ("x-mine", "1\\r\\nx-more: 2", 500),
        ("x mine", "1", 500),
        ("Content-Length", "1", 200),
        ("Transfer-Encoding", "chunked", 200),
        ("Connection", "close", 200),
    ]
    async with serving(odd) as server, connected(version, server.port) as client:
        for name, value, status in cases:
            body = f'{{"instances":[["{name}","{value}"]]}}'.encode()
            answer = await client.fetch("POST", PREDICT_PATH, body=body)
            assert (answer.status, answer.complete) == (status, True), name
        assert (await client.fetch("GET", LIVE_PATH)).status == 200


# --- bodies and windows -----------------------------------------------------------


async def test_expect_gets_100_and_then_its_answer() -> None:
    async with serving(echo) as server, H2Client(server.port) as client:
        for _ in range(2):
            stream_id = await client.begin(
                "POST", PREDICT_PATH, ("expect", "100-continue")
            )
            informed = client.streams[stream_id].informed
            while not informed:
                assert await client.turn()
            await client.body(stream_id, b'{"instances":[5]}')
            assert (await client.answer(stream_id)).json == {"instances": [5]}
            assert informed == [100]


async def test_expect_of_too_large_a_body_gets_413_and_no_100() -> None:
    async with (
        serving(echo, max_body_size=4999) as server,
        H2Client(server.port) as client,
    ):
        stream_id = await client.begin(
            "POST", PREDICT_PATH, ("expect", "100-continue"), ("content-length", "5000")
        )
        assert (await client.answer(stream_id)).status == 413
        assert client.streams[stream_id].informed == []
        assert await client.live() == 200


@pytest.mark.parametrize("window", [1, 100, 65_535])
async def test_a_client_with_small_windows_gets_all_of_it(window: int) -> None:
    size = min(window * 300, 3_000_000)

    async def large(payload: Any) -> bytes:
        return bytes(size)

    async with (
        serving(large) as server,
        H2Client(server.port, window=window, connection_window=0) as client,
    ):
        answer = await client.answer(await client.predict(1))
        assert (len(answer.body), answer.complete) == (size, True)
        assert await client.live() == 200


async def test_an_unannounced_body_that_stays_too_large_is_refused_while_it_comes() -> (
    None
):
    async with (
        serving(echo, max_body_size=3_000_000) as server,
        H2Client(server.port) as client,
    ):
        stream_id = await client.begin("POST", PREDICT_PATH)
        # Endless: what follows the refusal is not taken.
        await client.body(stream_id, b"x" * 30_000_000)
        answer = await client.answer(stream_id)
        assert (answer.status, answer.complete) == (413, True)
        assert await client.live() == 200
        connection = await http2_of(server)
        await until(lambda: not connection._wire._streams)


async def test_bodies_of_many_streams_interleaved() -> None:
    bodies = {}
    async with serving(echo) as server, H2Client(server.port) as client:
        for number in range(50):
            bodies[await client.begin("POST", PREDICT_PATH)] = (
                b'{"instances":[%d,"%s"]}' % (number, b"x" * 20_000)
            )
        for start in range(0, 20_100, 2000):
            for stream_id, body in bodies.items():
                piece = body[start : start + 2000]
                last = start + 2000 >= len(body)
                if piece:
                    await client.body(stream_id, piece, end=last)
        for stream_id, body in reversed(bodies.items()):
            assert (await client.answer(stream_id)).body == body


# --- many at a time ---------------------------------------------------------------


async def test_streams_are_answered_as_they_are_ready() -> None:
    events = [anyio.Event() for _ in range(100)]

    async def wait(payload: dict[str, Any]) -> Any:
        await events[payload["instances"][0]].wait()
        return payload

    async with serving(wait) as server, H2Client(server.port) as client:
        streams = [await client.predict(number) for number in range(100)]
        await until(lambda: server._listener.in_flight == 100)
        for number in reversed(range(100)):
            events[number].set()
            answer = await client.answer(streams[number])
            assert answer.json == {"instances": [number]}
            assert not any(client.streams[one].over for one in streams[:number])
        assert server._listener.in_flight == 0


async def test_more_streams_than_allowed_are_refused_unprocessed() -> None:
    waiting = Waiting()
    async with (
        serving(waiting.predict, max_streams=5) as server,
        H2Client(server.port) as client,
    ):
        # Before the settings have come, so that h2 does not hold it back.
        streams = [await client.predict(number) for number in range(8)]
        await client.until(lambda: all(client.streams[s].over for s in streams[5:]))
        codes = {client.streams[one].reset for one in streams[5:]}
        assert codes == {ErrorCode.REFUSED_STREAM}
        waiting.go_on.set()
        for number, stream_id in enumerate(streams[:5]):
            answer = await client.answer(stream_id)
            assert answer.json == {"instances": [number]}
        assert sorted(waiting.started) == list(range(5))
        assert await client.live() == 200


async def test_a_plain_handler_does_not_hold_up_its_siblings() -> None:
    go_on = threading.Event()

    def block(payload: Any) -> Any:
        go_on.wait(PATIENCE)
        return payload

    async with serving(block) as server, H2Client(server.port) as client:
        try:
            blocked = await client.predict(1)
            await until(lambda: server.dataplane.stages.offload.running)
            for _ in range(3):
                assert await client.live() == 200
        finally:
            go_on.set()
        assert (await client.answer(blocked)).json == {"instances": [1]}


async def test_items_come_when_they_are_made_and_siblings_meanwhile() -> None:
    go_on = anyio.Event()

    async def stream(payload: Any) -> AsyncIterator[str]:
        yield "first"
        await go_on.wait()
        yield "second"

    async with serving(stream) as server, H2Client(server.port) as client:
        stream_id = await client.predict(1)
        arriving = client.streams[stream_id]
        await client.until(lambda: arriving.body == b"first")
        assert await client.live() == 200
        go_on.set()
        answer = await client.answer(stream_id)
        assert (answer.body, answer.complete) == (b"firstsecond", True)


async def test_a_generator_that_awaits_nothing_leaves_turns_to_siblings() -> None:
    made = 0

    async def stream(payload: Any) -> AsyncIterator[bytes]:
        nonlocal made
        while True:
            made += 1
            yield bytes(1000)

    async with serving(stream) as server, H2Client(server.port) as client:
        endless = await client.predict(1)
        for _ in range(3):
            assert await client.live() == 200
        await client.cancel(endless)
        assert await client.live() == 200
        connection = await http2_of(server)
        await until(lambda: not connection._streams)
        assert made > 0


# --- one stream's end is its own --------------------------------------------------


async def test_a_reset_cancels_the_handler_of_its_stream_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    waiting = Waiting()
    async with serving(waiting.predict) as server, H2Client(server.port) as client:
        with nothing_unhandled(caplog):
            streams = [await client.predict(number) for number in range(3)]
            await until(lambda: len(waiting.started) == 3)
            await client.cancel(streams[1])
            await until(lambda: waiting.cancelled)
            await until(lambda: server._listener.in_flight == 2)
            assert await client.live() == 200
            waiting.go_on.set()
            for number in (0, 2):
                answer = await client.answer(streams[number])
                assert answer.json == {"instances": [number]}
        assert waiting.cancelled == [1]
        assert await client.live() == 200


@pytest.mark.parametrize("begun", [True, False])
async def test_a_reset_closes_a_streaming_generator(begun: bool) -> None:
    started, stopped = anyio.Event(), anyio.Event()
    told: list[bool] = []

    async def stream(payload: Any, context: Any) -> AsyncIterator[str]:
        try:
            if begun:
                yield "first"
            started.set()
            await anyio.sleep_forever()
        finally:
            told.append(context.disconnected)
            stopped.set()
        yield "never"

    async with serving(stream) as server, H2Client(server.port) as client:
        stream_id = await client.predict(1)
        await started.wait()
        await client.cancel(stream_id)
        with anyio.fail_after(PATIENCE):
            await stopped.wait()
        assert told == [True]
        assert await client.live() == 200
        connection = await http2_of(server)
        await until(lambda: not connection._streams)


async def test_a_reset_while_the_body_comes() -> None:
    async with serving(echo) as server, H2Client(server.port) as client:
        stream_id = await client.begin("POST", PREDICT_PATH)
        await client.body(stream_id, b'{"inst', end=False)
        connection = await http2_of(server)
        await until(lambda: connection._streams)
        await client.cancel(stream_id)
        assert await client.live() == 200
        await until(lambda: not connection._streams)
        assert server._listener.in_flight == 0


async def test_a_reset_at_once_runs_no_handler() -> None:
    waiting = Waiting()
    async with serving(waiting.predict) as server, H2Client(server.port) as client:
        for number in range(20):
            fields = (":method", "POST"), (":scheme", "http"), (":path", PREDICT_PATH)
            stream_id = client.h2.get_next_available_stream_id()
            client.h2.send_headers(stream_id, [*fields, (":authority", "x")])
            client.h2.send_data(stream_id, b'{"instances":[%d]}' % number, True)
            client.h2.reset_stream(stream_id, 8)
            await client.flush()
        assert await client.live() == 200
        connection = await http2_of(server)
        await until(lambda: not connection._streams)
        assert waiting.started == []


@pytest.mark.parametrize("way", ["close", "reset"])
async def test_a_lost_connection_cancels_all_of_its_own(
    way: str, caplog: pytest.LogCaptureFixture
) -> None:
    waiting = Waiting()
    async with serving(waiting.predict) as server, H2Client(server.port) as sibling:
        with nothing_unhandled(caplog):
            other = await sibling.predict("sibling")
            async with H2Client(server.port) as client:
                for number in range(5):
                    await client.predict(number)
                # One more whose body never comes to its end, and a call.
                half = await client.begin("POST", PREDICT_PATH)
                await client.body(half, b"{", end=False)
                await client.begin("POST", f"{SERVICE}/ModelInfer", *GRPC)
                await until(lambda: len(waiting.started) == 6)
                client.reset() if way == "reset" else client.close()
                await until(lambda: len(waiting.cancelled) == 5)
            assert sorted(waiting.cancelled) == list(range(5))
            await until(lambda: len(server._listener._connections) == 1)
            assert server._listener.in_flight == 1
            waiting.go_on.set()
            assert (await sibling.answer(other)).json == {"instances": ["sibling"]}


class Odd(BaseException):
    """No Exception, as some test and cancellation libraries have it."""


@pytest.mark.parametrize("kind", [Odd, GeneratorExit, SystemExit, MemoryError])
async def test_whatever_a_handler_raises_harms_one_stream_at_most(
    kind: type[BaseException],
) -> None:
    async def fail(payload: dict[str, Any]) -> Any:
        if payload["instances"] == ["fail"]:
            raise kind
        return payload

    async with serving(fail) as server, H2Client(server.port) as client:
        failing = await client.predict("fail")
        fine = await client.predict(1)
        assert (await client.answer(fine)).json == {"instances": [1]}
        answer = await client.answer(failing)
        assert answer.status == 500 or not answer.complete
        assert await client.live() == 200
        assert server._listener.in_flight == 0


# --- clients that send no more ----------------------------------------------------


async def test_a_half_closed_client_is_answered_and_the_connection_closed() -> None:
    async def quick(payload: Any) -> Any:
        await anyio.sleep(0.05)
        return payload

    async with serving(quick) as server, H2Client(server.port) as client:
        streams = [await client.predict(number) for number in range(3)]
        half = await client.begin("POST", PREDICT_PATH)
        await until(lambda: server._listener.in_flight == 3)
        await client.body(half, b"{", end=False)
        client.half_close()
        for number, stream_id in enumerate(streams):
            assert (await client.answer(stream_id)).json == {"instances": [number]}
        await client.end()
        await until(lambda: not server._listener._connections)


async def test_a_half_closed_client_is_not_answered_for_ever() -> None:
    waiting = Waiting()
    async with serving(waiting.predict) as server, H2Client(server.port) as client:
        await client.predict(1)
        call = await client.begin("POST", f"{SERVICE}/ModelInfer", *GRPC)
        await client.body(call, b"\0", end=False)
        await until(lambda: waiting.started)
        client.half_close()
        await client.end()
        assert waiting.cancelled == [1]
        await until(lambda: not server._listener._connections)


async def test_end_of_input_with_nothing_to_answer_closes() -> None:
    async with serving(echo) as server, H2Client(server.port) as client:
        assert await client.live() == 200
        half = await client.begin("POST", PREDICT_PATH)
        await client.body(half, b"{", end=False)
        connection = await http2_of(server)
        await until(lambda: connection._streams)
        client.half_close()
        await client.end()
        await until(lambda: not server._listener._connections)


async def test_a_half_closed_client_of_a_large_answer_gets_all_of_it() -> None:
    async def large(payload: Any) -> bytes:
        return bytes(5_000_000)

    async with serving(large) as server, H2Client(server.port) as client:
        stream_id = await client.predict(1)
        client.half_close()
        answer = await client.answer(stream_id)
        assert (len(answer.body), answer.complete) == (5_000_000, True)
        await client.end()


async def test_a_half_closed_client_may_take_the_last_bytes_all_at_once() -> None:
    """asyncio tells that more may be written amid the write that was the last."""

    async def large(payload: Any) -> bytes:
        return bytes(payload["instances"][0])

    async def take(server: Server, size: int) -> None:
        ours, theirs = socket.socketpair()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 100_000)
        ours.setblocking(False)
        theirs.setblocking(False)
        await server._listener.connect(theirs)
        async with H2Client(ours) as client:
            connection = await http2_of(server)
            stream_id = await client.predict(size)
            client.half_close()
            await until(lambda: connection.stalled)
            answer = await client.answer(stream_id)
            assert (len(answer.body), answer.complete) == (size, True)
            await client.end()
        await until(lambda: not server._listener._connections)

    async with serving(large) as server:
        for size in range(300_000, 600_000, 50_000):
            await take(server, size)


async def test_a_handler_is_told_that_its_client_sends_no_more() -> None:
    seen: list[bool] = []
    go_on = anyio.Event()

    async def look(payload: Any, context: Any) -> Any:
        seen.append(context.disconnected)
        await go_on.wait()
        seen.append(context.disconnected)
        return payload

    async with serving(look) as server, H2Client(server.port) as client:
        stream_id = await client.predict(1)
        await until(lambda: seen)
        client.half_close()
        connection = await http2_of(server)
        await until(connection.is_gone)
        go_on.set()
        assert (await client.answer(stream_id)).status == 200
    assert seen == [False, True]


# --- calls ------------------------------------------------------------------------


async def test_calls_and_rest_share_a_connection() -> None:
    async with serving(any_request) as server, H2Client(server.port) as client:
        call = await client.post(
            inference("7"), *GRPC, path=f"{SERVICE}/ModelInfer", announced=False
        )
        rest = await client.post(V2_BODY, path="/v2/models/m/infer")
        assert (await client.answer(rest)).json["id"] == "7"
        answer = await client.answer(call)
        assert answer.status == 200
        assert client.streams[call].trailers["grpc-status"] == "0"
        assert answer.headers["content-type"] == "application/grpc"


async def test_a_call_for_each_message_of_a_stream() -> None:
    async with serving(any_request) as server, H2Client(server.port) as client:
        path = f"{SERVICE}/ModelStreamInfer"
        call = await client.begin("POST", path, *GRPC)
        stream = client.streams[call]
        for number in range(3):
            await client.body(call, inference(str(number)), end=False)
            await client.until(lambda: stream.body)
            assert read_message(stream).infer_response.id == str(number)
            assert await client.live() == 200
        client.h2.end_stream(call)
        await client.flush()
        await client.answer(call)
        assert stream.trailers["grpc-status"] == "0"


async def test_a_reset_call_is_cancelled_alone() -> None:
    started, cancelled = anyio.Event(), anyio.Event()

    async def wait(payload: Any) -> Any:
        if payload.id == "quick":
            return InferResponse(payload.inputs)
        started.set()
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.set()

    path = f"{SERVICE}/ModelInfer"
    async with serving(wait) as server, H2Client(server.port) as client:
        call = await client.post(inference(), *GRPC, path=path, announced=False)
        await started.wait()
        await client.cancel(call)
        with anyio.fail_after(PATIENCE):
            await cancelled.wait()
        call = await client.post(inference("quick"), *GRPC, path=path, announced=False)
        await client.answer(call)
        assert client.streams[call].trailers["grpc-status"] == "0"
        connection = await http2_of(server)
        await until(lambda: not connection._streams)


async def test_what_a_call_holds_of_its_messages_is_bounded() -> None:
    taken = 0

    async def count(payload: Any) -> Any:
        nonlocal taken
        taken += 1
        return InferResponse(())

    # The reader is behind all along, so that what is held never falls to nothing.
    message = inference("x" * 10_000)
    async with (
        serving(count, max_body_size=1_000_000) as server,
        H2Client(server.port) as client,
    ):
        call = await client.begin("POST", f"{SERVICE}/ModelStreamInfer", *GRPC)
        await client.body(call, message[:5000], end=False)
        connection = await http2_of(server)
        await until(lambda: connection._streams)
        stream = connection._streams[call]
        peak = 0
        for _ in range(600):
            await client.body(call, message[5000:] + message[:5000], end=False)
            peak = max(peak, stream.size)
        await client.until(lambda: taken == 600)
        assert peak < 1_500_000
        await client.body(call, message[5000:])
        await client.answer(call)
        assert client.streams[call].trailers["grpc-status"] == "0"
