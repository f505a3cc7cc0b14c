"""HTTP/2 peers that are slow, idle, hasty or hostile, and stops while they are served.

Where a time must pass with nothing happening, a sibling stream that runs into the same
bound is the clock.
"""

from __future__ import annotations

import asyncio
import gc
import random
import struct
import threading
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import anyio.lowlevel
import h2.connection
import pytest
from h2.settings import SettingCodes

from kserve_lite import InferRequest, serve
from kserve_lite.transports.http2 import Http2
from kserve_lite.transports.timeouts import STREAM_BUFFER
from kserve_lite.wire.frames import ErrorCode
from kserve_lite.wire.http2 import PREFACE
from tests.transports.client import (
    PATIENCE,
    Client,
    echo,
    in_background,
    model_of,
    nothing_unhandled,
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
    config,
    fields_of,
    http2_of,
    inference,
    read_message,
)

pytestmark = pytest.mark.anyio

SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
# GET / of http://x, in the static table's words (RFC 7541 appendix A).
ROOT = b"\x82\x86\x84\x41\x01x"
ALL_STREAMS = 2**31 - 1


def head(stream_id: int, *, flags: int = 0x5, block: bytes = ROOT) -> bytes:
    """A HEADERS frame; by default a whole request."""
    return struct.pack(">LBL", len(block) << 8 | 1, flags, stream_id) + block


def rst_stream(stream_id: int) -> bytes:
    return struct.pack(">LBLL", 4 << 8 | 3, 0, stream_id, ErrorCode.CANCEL)


def nothing_left(connection: Http2) -> bool:
    wire = connection._wire
    return not (
        connection._streams
        or connection._answered
        or connection.writers
        or wire._streams
        or wire._credit._waiting
        or wire._credit._lent
        or wire._expecting
        or wire._outbox._ready
        or wire._outbox._blocked
    )


# --- heads and idleness -----------------------------------------------------------


@pytest.mark.parametrize(
    "begun",
    [
        PREFACE,  # and no SETTINGS
        PREFACE + SETTINGS[:4],
        PREFACE + SETTINGS + head(1)[:4],
        PREFACE + SETTINGS + head(1)[:-1],
        PREFACE + SETTINGS + head(1, flags=0x1),  # and no CONTINUATION
    ],
)
async def test_what_begins_must_go_on_within_the_head_timeout(begun: bytes) -> None:
    limits = {"head_timeout": 0.2, "timeout_keep_alive": NEVER}
    async with serving(echo, **limits) as server, Client(server.port) as client:
        await client.send(begun)
        assert await client.rest()  # the server's own SETTINGS, at least
        client.close()
        await until(lambda: not server._listener._connections)


async def test_a_frame_that_stops_midway_after_a_long_silence() -> None:
    limits = {"head_timeout": 0.2, "timeout_keep_alive": NEVER}
    async with serving(echo, **limits) as server, H2Client(server.port) as client:
        assert await client.live() == 200
        connection = await http2_of(server)
        now = asyncio.get_running_loop().time()
        await until(lambda: connection._deadline > now + NEVER / 2)
        await client.send(head(3)[:7])
        await client.end()
        assert client.goaways[-1] == (1, ErrorCode.NO_ERROR)


async def test_a_body_that_stops_midway_after_a_long_silence() -> None:
    limits = {"body_timeout": 0.2, "timeout_keep_alive": NEVER}
    async with serving(echo, **limits) as server, H2Client(server.port) as client:
        assert await client.live() == 200
        connection = await http2_of(server)
        now = asyncio.get_running_loop().time()
        await until(lambda: connection._deadline > now + NEVER / 2)
        stream_id = await client.begin("POST", PREDICT_PATH)
        assert (await client.answer(stream_id)).status == 408


@pytest.mark.parametrize("asks", [0, 1])
async def test_an_idle_connection_is_closed_with_goaway(asks: int) -> None:
    async with (
        serving(echo, timeout_keep_alive=0.2) as server,
        H2Client(server.port) as client,
    ):
        for _ in range(asks):
            assert await client.live() == 200
        await client.end()
        assert client.goaways[-1] == (asks, ErrorCode.NO_ERROR)
        await until(lambda: not server._listener._connections)


@pytest.mark.parametrize("end", ["answer", "reset", "refusal"])
async def test_idleness_begins_with_the_end_of_the_last_stream(end: str) -> None:
    waiting = Waiting()
    limits = {"timeout_keep_alive": 1.5, "head_timeout": 0.2, "max_body_size": 1000}
    async with (
        serving(waiting.predict, **limits) as server,
        H2Client(server.port) as client,
    ):
        if end == "answer":
            stream_id = await client.predict(1)
        else:
            stream_id = await client.begin("POST", PREDICT_PATH)
        connection = await http2_of(server)
        async with H2Client(server.port) as clock:
            await clock.end()
        if end == "answer":
            waiting.go_on.set()
            await client.answer(stream_id)
        elif end == "reset":
            await client.cancel(stream_id)
        else:
            await client.body(stream_id, b"x" * 1001, end=False)
            assert (await client.answer(stream_id)).status == 413
        await until(lambda: nothing_left(connection))
        # Seen to be idle, for no more than a moment.
        time = asyncio.get_running_loop().time
        await until(lambda: connection._deadline > time() + 0.5)
        assert await client.live() == 200
        await client.end()
        assert client.goaways[-1] == (stream_id + 2, ErrorCode.NO_ERROR)


async def test_a_long_answer_has_no_deadline() -> None:
    waiting = Waiting()
    limits = {"timeout_keep_alive": 0.1, "head_timeout": 0.1, "body_timeout": 0.1}
    async with (
        serving(waiting.predict, **limits) as server,
        H2Client(server.port) as client,
        H2Client(server.port) as clock,
    ):
        stream_id = await client.predict(1)
        await clock.end()
        waiting.go_on.set()
        assert (await client.answer(stream_id)).json == {"instances": [1]}


# --- bodies that do not come ------------------------------------------------------


@pytest.mark.parametrize("length", [(), (("content-length", "50"),)])
@pytest.mark.parametrize("begun", [b"", b'{"instances"'])
async def test_408_for_a_body_that_does_not_come(
    length: tuple[tuple[str, str], ...], begun: bytes
) -> None:
    waiting = Waiting()
    async with (
        serving(waiting.predict, body_timeout=0.2) as server,
        H2Client(server.port) as client,
    ):
        sibling = await client.predict("sibling")
        stream_id = await client.begin("POST", PREDICT_PATH, *length)
        await client.body(stream_id, begun, end=False)
        answer = await client.answer(stream_id)
        assert (answer.status, answer.complete) == (408, True)
        assert list(answer.json) == ["error"]
        waiting.go_on.set()
        assert (await client.answer(sibling)).json == {"instances": ["sibling"]}
        assert await client.live() == 200
        connection = await http2_of(server)
        await until(lambda: nothing_left(connection))


async def test_a_slow_body_that_keeps_coming_is_waited_for() -> None:
    # 50 KB earn some 50 seconds: the body timeout is not one for the whole transfer.
    text = "x" * 50_000
    body = b'{"instances":["%s"]}' % text.encode()
    async with (
        serving(echo, body_timeout=0.1) as server,
        H2Client(server.port) as client,
    ):
        slow = await client.begin("POST", PREDICT_PATH)
        await client.body(slow, body[:-10], end=False)
        for _ in range(3):
            stalled = await client.begin("POST", PREDICT_PATH)
            assert (await client.answer(stalled)).status == 408
        await client.body(slow, body[-10:])
        assert (await client.answer(slow)).json == {"instances": [text]}


@pytest.mark.parametrize("begun", [b"", b"\0\0", inference("x" * 50)[:-5]])
@pytest.mark.parametrize("method", ["ModelInfer", "ModelStreamInfer"])
async def test_a_call_whose_message_does_not_come_is_reset(
    begun: bytes, method: str
) -> None:
    if method == "ModelStreamInfer" and not begun:
        return  # that one may wait
    async with (
        serving(any_request, body_timeout=0.2) as server,
        H2Client(server.port) as client,
    ):
        path = f"{SERVICE}/{method}"
        call = await client.begin("POST", path, *GRPC)
        await client.body(call, begun, end=False)
        fine = await client.post(
            inference(), *GRPC, path=f"{SERVICE}/ModelInfer", announced=False
        )
        await client.answer(fine)
        assert client.streams[fine].trailers["grpc-status"] == "0"
        await client.answer(call)
        assert client.streams[call].reset == ErrorCode.CANCEL
        assert await client.live() == 200
        connection = await http2_of(server)
        await until(lambda: nothing_left(connection))


async def test_a_stream_of_messages_may_idle_between_them() -> None:
    async with (
        serving(any_request, body_timeout=0.1) as server,
        H2Client(server.port) as client,
    ):
        call = await client.begin("POST", f"{SERVICE}/ModelStreamInfer", *GRPC)
        stream = client.streams[call]
        for number in range(3):
            for _ in range(2):
                stalled = await client.begin("POST", PREDICT_PATH)
                assert (await client.answer(stalled)).status == 408
            await client.body(call, inference(str(number)), end=False)
            await client.until(lambda: stream.body)
            assert read_message(stream).infer_response.id == str(number)
        # But not inside one.
        await client.body(call, inference()[:-1], end=False)
        await client.answer(call)
        assert stream.reset == ErrorCode.CANCEL


# --- peers that do not read -------------------------------------------------------


class Endless:
    """Streams without end, and knows how far it came and when it was stopped."""

    def __init__(self) -> None:
        self.made = 0
        self.stopped = threading.Event()

    def plain(self, payload: Any) -> Iterator[bytes]:
        try:
            while True:
                self.made += 1
                yield bytes(16 * 1024)
        finally:
            self.stopped.set()

    async def asynchronous(self, payload: Any) -> AsyncIterator[bytes]:
        try:
            while True:
                self.made += 1
                yield bytes(16 * 1024)
        finally:
            self.stopped.set()


async def large(payload: Any) -> bytes | Any:
    return bytes(3_000_000) if payload["instances"] == ["large"] else payload


@pytest.mark.parametrize("kind", ["plain", "asynchronous"])
async def test_an_endless_stream_waits_for_its_window(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    endless = Endless()
    async with serving(getattr(endless, kind)) as server:
        with nothing_unhandled(caplog):
            async with H2Client(server.port, window=100_000) as client:
                stream_id = await client.predict(1)
                client.held.add(stream_id)
                connection = await http2_of(server)
                await until(lambda: connection.writers)
                most = (100_000 + STREAM_BUFFER) // (16 * 1024) + 2
                for _ in range(5):
                    assert await client.live() == 200
                    assert endless.made <= most
                assert connection.unsent(stream_id) <= STREAM_BUFFER + 16 * 1024
                # A window opens it as far as it goes.
                made = endless.made
                client.h2.increment_flow_control_window(10 * 16 * 1024, stream_id)
                await client.flush()
                await until(lambda: endless.made >= made + 9)
                for _ in range(5):
                    assert await client.live() == 200
                assert endless.made <= made + 11
                assert not endless.stopped.is_set()
                await client.cancel(stream_id)
                assert await asyncio.to_thread(endless.stopped.wait, PATIENCE)
                assert await client.live() == 200
                await until(lambda: nothing_left(connection))


@pytest.mark.parametrize("kind", ["plain", "asynchronous"])
@pytest.mark.parametrize("way", ["close", "reset"])
async def test_an_endless_stream_waits_for_the_socket_and_ends_with_it(
    kind: str, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    endless = Endless()
    async with serving(getattr(endless, kind)) as server:
        with nothing_unhandled(caplog):
            async with H2Client(server.port, receive_buffer=4096) as client:
                streams = [await client.predict(1) for _ in range(3)]
                connection = await http2_of(server)
                await until(lambda: len(connection.writers) == 3)
                made = endless.made
                for _ in range(5):
                    await still_serves(server)
                # At most the one item of each that was being made went on.
                assert endless.made <= made + 3
                # Kernels buffer up to some 10 MB; a producer of its own pace makes
                # gigabytes meanwhile.
                assert endless.made < 2000
                assert connection.stalled
                for stream_id in streams:
                    assert connection.unsent(stream_id) <= STREAM_BUFFER + 16 * 1024
                assert not endless.stopped.is_set()
                client.reset() if way == "reset" else client.close()
            assert await asyncio.to_thread(endless.stopped.wait, PATIENCE)
            await until(lambda: not server._listener._connections)
            await still_serves(server)


@pytest.mark.parametrize("kind", ["plain", "asynchronous"])
async def test_a_peer_that_does_not_read_the_socket_is_cut(kind: str) -> None:
    endless = Endless()
    async with (
        serving(getattr(endless, kind), write_timeout=0.2) as server,
        H2Client(server.port, receive_buffer=4096) as client,
    ):
        await client.predict(1)
        assert await asyncio.to_thread(endless.stopped.wait, PATIENCE)
        await until(lambda: not server._listener._connections)
        await still_serves(server)


async def test_a_stream_without_window_is_reset_and_no_sibling() -> None:
    async with (
        serving(large, write_timeout=0.2) as server,
        H2Client(server.port, window=10_000) as client,
    ):
        blocked = await client.predict("large")
        client.held.add(blocked)
        slow = client.streams[blocked]
        while not slow.over:
            # It takes its time, but comes to its end.
            fine = await client.answer(await client.predict("sibling"))
            assert fine.json == {"instances": ["sibling"]}
        assert slow.reset == ErrorCode.CANCEL
        assert len(slow.body) == 10_000
        answer = await client.answer(await client.predict("large"))
        assert (len(answer.body), answer.complete) == (3_000_000, True)
        connection = await http2_of(server)
        await until(lambda: nothing_left(connection))


@pytest.mark.parametrize("kind", ["plain", "asynchronous"])
async def test_a_generator_without_window_is_closed(kind: str) -> None:
    endless = Endless()
    async with (
        serving(getattr(endless, kind), write_timeout=0.2) as server,
        H2Client(server.port, window=0) as client,
    ):
        stream_id = await client.predict(1)
        await client.answer(stream_id)
        assert client.streams[stream_id].reset == ErrorCode.CANCEL
        assert client.streams[stream_id].status == 200
        assert await asyncio.to_thread(endless.stopped.wait, PATIENCE)
        connection = await http2_of(server)
        await until(lambda: nothing_left(connection))


@pytest.mark.parametrize("length", [(), (("content-length", "1000"),)])
async def test_a_refusal_that_is_not_taken_is_given_up(
    length: tuple[tuple[str, str], ...],
) -> None:
    limits = {"write_timeout": 0.2, "max_body_size": 10, "timeout_keep_alive": NEVER}
    async with (
        serving(echo, **limits) as server,
        H2Client(server.port, window=0) as client,
    ):
        stream_id = await client.begin("POST", PREDICT_PATH, *length)
        stream = client.streams[stream_id]
        await client.body(stream_id, b"x" * 11, end=False)
        await client.until(lambda: stream.status == 413)
        connection = await http2_of(server)
        refused = connection._streams[stream_id]
        for _ in range(3):
            await client.body(stream_id, b"x" * 5, end=False)
            assert (await client.fetch("HEAD", LIVE_PATH)).status == 200
            assert refused.size == 0
        await client.answer(stream_id)
        assert stream.reset == ErrorCode.CANCEL
        await until(lambda: nothing_left(connection))


async def test_a_connection_without_window_resets_its_streams() -> None:
    async with (
        serving(large, write_timeout=0.2) as server,
        H2Client(server.port, connection_window=0) as client,
    ):
        client.holds_all = True
        streams = [await client.predict("large") for _ in range(3)]
        for stream_id in streams:
            await client.answer(stream_id)
            assert client.streams[stream_id].reset == ErrorCode.CANCEL
        connection = await http2_of(server)
        await until(lambda: nothing_left(connection))


async def test_a_slow_reader_that_goes_on_reading_gets_all_of_it() -> None:
    async with (
        serving(large, write_timeout=0.2) as server,
        H2Client(server.port, window=1000) as client,
    ):
        slow_id = await client.predict("large")
        client.held.add(slow_id)
        for _ in range(3):
            blocked_id = await client.predict("large")
            client.held.add(blocked_id)
            while not client.streams[blocked_id].over:  # after write_timeout
                client.h2.increment_flow_control_window(1000, slow_id)
                assert await client.live() == 200
            assert client.streams[blocked_id].reset == ErrorCode.CANCEL
        client.h2.increment_flow_control_window(3_000_000, slow_id)
        await client.flush()
        answer = await client.answer(slow_id)
        assert (len(answer.body), answer.complete) == (3_000_000, True)


# --- floods -----------------------------------------------------------------------


async def serve_meanwhile(port: int, over: anyio.Event) -> int:
    """Another connection, which is served all along; returns how often."""
    count = 0
    async with H2Client(port) as client:
        while not over.is_set():
            assert await client.live() == 200
            count += 1
    return count


def whole_prediction(client: H2Client) -> int:
    """Queue a prediction; return its stream."""
    stream_id = client.h2.get_next_available_stream_id()
    client.h2.send_headers(stream_id, fields_of("POST", PREDICT_PATH))
    client.h2.send_data(stream_id, b'{"instances":[%d]}' % stream_id, end_stream=True)
    return stream_id


@pytest.mark.parametrize("together", [1, 50])
async def test_rapid_resets_are_cut_off_and_nobody_else_is(
    together: int, caplog: pytest.LogCaptureFixture
) -> None:
    waiting, over = Waiting(), anyio.Event()
    async with (
        serving(waiting.predict) as server,
        H2Client(server.port) as sibling,
        anyio.create_task_group() as tasks,
    ):
        with nothing_unhandled(caplog):
            tasks.start_soon(serve_meanwhile, server.port, over)
            kept = await sibling.predict("kept")
            async with H2Client(server.port) as client:
                # It goes on after it has been cut off: nothing of that is read, and
                # what it was told still reaches it.
                await client.until(lambda: client.acknowledged)
                for _ in range(4000 // together):
                    streams = [whole_prediction(client) for _ in range(together)]
                    for stream_id in streams:
                        client.h2.reset_stream(stream_id, 8)
                    await client.flush()
                await client.end()
                assert client.goaways[-1][1] == ErrorCode.ENHANCE_YOUR_CALM
            await until(lambda: len(server._listener._connections) == 2)
            over.set()
            waiting.go_on.set()
            assert (await sibling.answer(kept)).json == {"instances": ["kept"]}
        assert len(waiting.started) < 1500
        assert sorted(waiting.cancelled) == sorted(set(waiting.started) - {"kept"})
        await until(lambda: not server._listener.in_flight)


async def test_resets_of_running_handlers_are_bounded(
    caplog: pytest.LogCaptureFixture,
) -> None:
    waiting = Waiting()
    async with serving(waiting.predict) as server, H2Client(server.port) as client:
        with nothing_unhandled(caplog):
            await client.until(lambda: client.acknowledged)
            while not client.goaways:
                before = len(waiting.started)
                streams = [whole_prediction(client) for _ in range(100)]
                await client.flush()
                await until(
                    lambda: len(waiting.started) == before + 100  # noqa: B023
                )
                for stream_id in streams:
                    client.h2.reset_stream(stream_id, 8)
                await client.flush()
                cancelled = len(waiting.started)
                await until(lambda: len(waiting.cancelled) == cancelled)  # noqa: B023
                stream_id = await client.ask_for("GET", LIVE_PATH)
                stream = client.streams[stream_id]
                await client.until(lambda: stream.over or client.goaways)  # noqa: B023
            assert client.goaways[-1][1] == ErrorCode.ENHANCE_YOUR_CALM
            await client.end()
        assert len(waiting.started) < 3000
        client.close()
        await until(lambda: not server._listener._connections)


@pytest.mark.parametrize(
    "frame",
    [
        b"\x00\x00\x08\x06\x00\x00\x00\x00\x0012345678",  # PING
        SETTINGS,
        b"\x00\x00\x04\x08\x00\x00\x00\x00\x00\x00\x00\x00\x01",  # WINDOW_UPDATE
        b"\x00\x00\x05\x02\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00",  # PRIORITY
        b"\x00\x00\x00\x77\x00\x00\x00\x00\x00",  # unknown
    ],
)
async def test_floods_of_control_frames_are_cut_off(
    frame: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(echo) as server, H2Client(server.port) as client:
        with nothing_unhandled(caplog):
            await client.turn()
            for _ in range(50):
                await client.send(frame * 100)
            await client.end()
            assert client.goaways[-1][1] == ErrorCode.ENHANCE_YOUR_CALM
            await still_serves(server)


async def test_a_connection_error_is_heard_by_a_client_that_goes_on_sending(
    caplog: pytest.LogCaptureFixture,
) -> None:
    waiting = Waiting()
    async with serving(waiting.predict) as server, H2Client(server.port) as client:
        with nothing_unhandled(caplog):
            await client.predict(1)
            await until(lambda: waiting.started)
            await client.send(head(2))  # no stream of a client
            # Far more than the buffers of both kernels: read, or this would block.
            for _ in range(100):
                await client.send(bytes(100_000))
            with pytest.raises(EOFError):
                await client.until(lambda: False)
            assert client.goaways == [(1, ErrorCode.PROTOCOL_ERROR)]
            await until(lambda: waiting.cancelled)
            # It stays as long as it likes, and is cut.
            await until(lambda: not server._listener._connections)


async def test_a_connection_error_while_the_peer_does_not_read(
    caplog: pytest.LogCaptureFixture,
) -> None:
    endless = Endless()
    async with serving(endless.asynchronous, write_timeout=0.2) as server:
        with nothing_unhandled(caplog):
            async with H2Client(server.port, receive_buffer=4096) as client:
                await client.predict(1)
                connection = await http2_of(server)
                await until(lambda: connection.stalled)
                await client.send(head(2))
                assert await asyncio.to_thread(endless.stopped.wait, PATIENCE)
                await until(lambda: not server._listener._connections)
            await still_serves(server)


# --- nothing is left behind -------------------------------------------------------


async def test_ten_thousand_streams_leave_nothing_behind() -> None:
    async with serving(echo) as server, Client(server.port) as client:
        wide = b"\x00\x00\x04\x08\x00\x00\x00\x00\x00\x40\x00\x00\x00"
        await client.send(PREFACE + SETTINGS + wide)
        connection = await http2_of(server)
        for number in range(0, 10_000, 10):
            if number == 2_000:
                gc.collect()
                tracemalloc.start()
            await ten_streams(client, 2 * number + 1)
        await until(lambda: nothing_left(connection))
        gc.collect()
        grown, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        # 8,000 streams that left a dict entry each would have left 1 MB.
        assert grown < 300_000
        await still_serves(server)


async def ten_streams(client: Client, first: int) -> None:
    """See streams to their ends: with a body, reset, its body amiss, without one."""
    body = b'{"instances":[]}'
    path = PREDICT_PATH.encode()
    block = b"\x83\x86\x04%c%s\x41\x01x" % (len(path), path)
    post, rest = head(first, flags=4, block=block), head(first + 4, flags=4)
    data = struct.pack(">LBL", len(body) << 8, 1, first) + body
    reset = head(first + 2, flags=4) + rst_stream(first + 2)
    gets = (head(stream_id) for stream_id in range(first + 6, first + 20, 2))
    await client.send(b"".join((post, data, reset, rest, *gets)))
    await client.send(struct.pack(">LBL", 0, 1, first + 4))
    wanted = set(range(first, first + 20, 2)) - {first + 2}
    while wanted:
        while len(client._data) < 9 or len(client._data) < frame_size(client._data):
            assert await client._read()
        word, flags, stream_id = struct.unpack_from(">LBL", client._data)
        del client._data[: frame_size(client._data)]
        assert word & 0xFF not in {3, 7}
        if flags & 1:
            wanted.discard(stream_id)


def frame_size(raw: bytearray) -> int:
    return 9 + int.from_bytes(raw[:3], "big")


async def test_streams_of_every_end_leave_nothing_behind() -> None:
    endless = Endless()

    async def handler(payload: dict[str, Any]) -> Any:
        match payload["instances"][0]:
            case "endless":
                return endless.asynchronous(payload)
            case "fail":
                raise ValueError
            case "wait":
                await anyio.sleep_forever()
        return payload

    async with (
        serving(handler, max_body_size=1000) as server,
        H2Client(server.port, window=100) as client,
    ):
        for _ in range(10):
            for value in ("endless", "wait"):
                stream_id = await client.predict(value)
                assert await client.live() == 200
                await client.cancel(stream_id)
            for value in ("fail", "x"):
                assert (await client.answer(await client.predict(value))).complete
            assert (await client.answer(await client.post(b"x" * 1001))).status == 413
            call = await client.begin("POST", f"{SERVICE}/ModelInfer", *GRPC)
            await client.body(call, b"\0\0", end=False)
            await client.cancel(call)
        assert await client.live() == 200
        connection = await http2_of(server)
        await until(lambda: nothing_left(connection))
        assert server._listener.in_flight == 0


# --- stops ------------------------------------------------------------------------


async def test_a_stop_says_so_twice_and_finishes_what_is_in_flight() -> None:
    waiting = Waiting()
    server = serve(model_of(waiting.predict), http_port=0, host="127.0.0.1")
    tasks = asyncio.all_tasks()
    async with in_background(server) as ended, H2Client(server.port) as client:
        streams = [await client.predict(number) for number in range(3)]
        await until(lambda: server._listener.in_flight == 3)
        connection = await http2_of(server)
        assert connection.answering == 3
        client.answers_pings = False
        server.stop()
        await client.until(lambda: client.goaways)
        assert client.goaways == [(ALL_STREAMS, ErrorCode.NO_ERROR)]
        # What was on its way is still answered.
        assert await client.live() == 200
        await client.until(lambda: len(client.goaways) == 2)
        assert client.goaways[1] == (streams[-1] + 2, ErrorCode.NO_ERROR)
        late = await client.ask_for("GET", LIVE_PATH)
        await client.answer(late)
        assert client.streams[late].reset == ErrorCode.REFUSED_STREAM
        assert server._listener.in_flight == 3
        assert not ended.is_set()
        waiting.go_on.set()
        for number, stream_id in enumerate(streams):
            assert (await client.answer(stream_id)).json == {"instances": [number]}
        await client.end()
        with anyio.fail_after(PATIENCE):
            await ended.wait()
        assert waiting.cancelled == []
        assert not server._listener._connections
    assert server.report.startswith("drained 3, aborted 0, in ")
    assert asyncio.all_tasks() == tasks


async def test_a_stop_waits_no_longer_than_the_peer_needs_to_hear_of_it() -> None:
    waiting = Waiting()
    server = serve(model_of(waiting.predict), http_port=0, host="127.0.0.1")
    async with in_background(server) as ended, H2Client(server.port) as client:
        stream_id = await client.predict(1)
        await until(lambda: server._listener.in_flight == 1)
        server.stop()
        await client.until(lambda: len(client.goaways) == 2)
        assert client.goaways[1] == (stream_id, ErrorCode.NO_ERROR)
        waiting.go_on.set()
        assert (await client.answer(stream_id)).complete
        await client.end()
        with anyio.fail_after(PATIENCE):
            await ended.wait()


@pytest.mark.parametrize("asks", [0, 1])
async def test_a_stop_closes_idle_connections(asks: int) -> None:
    server = serve(model_of(echo), http_port=0, host="127.0.0.1")
    async with in_background(server) as ended, H2Client(server.port) as client:
        for _ in range(asks):
            assert await client.live() == 200
        await http2_of(server)
        server.stop()
        await client.end()
        codes = [ErrorCode.NO_ERROR] * 2
        assert [code for _, code in client.goaways] == codes
        assert client.goaways[-1][0] == asks
        with anyio.fail_after(PATIENCE):
            await ended.wait()
    assert server.report.startswith("drained 0, aborted 0, in ")


async def test_a_stop_finishes_a_streamed_answer_and_an_upload() -> None:
    go_on = anyio.Event()

    async def stream(payload: Any) -> AsyncIterator[str]:
        yield "first "
        await go_on.wait()
        yield "second"

    server = serve(model_of(stream), http_port=0, host="127.0.0.1")
    async with in_background(server) as ended, H2Client(server.port) as client:
        streamed = await client.predict(1)
        await client.until(lambda: client.streams[streamed].body)
        upload = await client.begin("POST", PREDICT_PATH)
        await client.body(upload, b'{"instances"', end=False)
        connection = await http2_of(server)
        await until(lambda: len(connection._streams) == 2)
        server.stop()
        await client.until(lambda: len(client.goaways) == 2)
        await client.body(upload, b":[]}")
        go_on.set()
        for stream_id in (streamed, upload):
            answer = await client.answer(stream_id)
            assert (answer.body, answer.complete) == (b"first second", True)
        await client.end()
        with anyio.fail_after(PATIENCE):
            await ended.wait()


async def test_a_stop_ends_streams_of_messages_that_idle() -> None:
    server = serve(model_of(any_request), http_port=0, host="127.0.0.1")
    async with in_background(server) as ended, H2Client(server.port) as client:
        call = await client.begin("POST", f"{SERVICE}/ModelStreamInfer", *GRPC)
        stream = client.streams[call]
        await client.body(call, inference("1"), end=False)
        await client.until(lambda: stream.body)
        server.stop()
        await client.answer(call)
        assert stream.trailers["grpc-status"] == "14"
        await client.end()
        with anyio.fail_after(PATIENCE):
            await ended.wait()


@pytest.mark.parametrize("at_once", [True, False])
async def test_a_stop_that_takes_too_long_aborts(
    at_once: bool, caplog: pytest.LogCaptureFixture
) -> None:
    waiting = Waiting()
    grace = NEVER if at_once else 0.3
    server = serve(
        model_of(waiting.predict), http_port=0, host="127.0.0.1", grace_period=grace
    )
    tasks = asyncio.all_tasks()
    with nothing_unhandled(caplog):
        async with in_background(server) as ended, H2Client(server.port) as client:
            for number in range(2):
                await client.predict(number)
            half = await client.begin("POST", PREDICT_PATH)
            await client.body(half, b"{", end=False)
            call = await client.begin("POST", f"{SERVICE}/ModelInfer", *GRPC)
            await client.body(call, b"\0", end=False)
            await until(lambda: server._listener.in_flight == 3)
            server.stop()
            await client.until(lambda: client.goaways)
            if at_once:
                assert not ended.is_set()
                server.stop(at_once=True)
            with anyio.fail_after(PATIENCE):
                await ended.wait()
            assert sorted(waiting.cancelled) == [0, 1]
            with pytest.raises((EOFError, ConnectionResetError)):
                await client.answer(half)
    assert not server._listener._connections
    assert server.report.startswith("drained 0, aborted 3, in ")
    assert asyncio.all_tasks() == tasks


async def test_a_stop_while_a_peer_does_not_read() -> None:
    endless = Endless()
    server = serve(
        model_of(endless.asynchronous),
        http_port=0,
        host="127.0.0.1",
        grace_period=0.3,
    )
    async with (
        in_background(server) as ended,
        H2Client(server.port, receive_buffer=4096) as client,
    ):
        await client.predict(1)
        connection = await http2_of(server)
        await until(lambda: connection.stalled)
        server.stop()
        with anyio.fail_after(PATIENCE):
            await ended.wait()
        assert endless.stopped.is_set()
    assert server.report.startswith("drained 0, aborted 1, in ")


async def test_a_client_that_says_goodbye_is_still_answered() -> None:
    waiting = Waiting()
    async with serving(waiting.predict) as server, H2Client(server.port) as client:
        stream_id = await client.predict(1)
        await until(lambda: waiting.started)
        await client.send(b"\x00\x00\x08\x07\x00\x00\x00\x00\x00" + bytes(8))
        waiting.go_on.set()
        assert (await client.answer(stream_id)).json == {"instances": [1]}
        await client.end()
        await until(lambda: not server._listener._connections)


# --- mutated streams --------------------------------------------------------------

ROUNDS = 150
TOGETHER = 15
WORDS = (
    PREFACE,
    SETTINGS,
    head(1),
    head(3, flags=0x1),
    head(5, flags=0x4),
    rst_stream(1),
    rst_stream(3),
    b"\x00\x00\x04\x08\x00\x00\x00\x00\x01\x7f\xff\xff\xff",
    b"\x00\x00\x04\x08\x00\x00\x00\x00\x00\x00\x00\x00\x00",
    b"\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x04\x00\x00\x00\x00",
    b"\x00\x00\x08\x06\x00\x00\x00\x00\x0012345678",
    b"\x00\x00\x08\x07\x00\x00\x00\x00\x00" + bytes(8),
    b"\x00\x00\x03\x09\x04\x00\x00\x00\x01\x82\x86\x84",
    b"\x00\xff\xff\x00\x00\x00\x00\x00\x01",
    b"\x00",
    b"\xff",
    b"x" * 3000,
)


def requests(chance: random.Random) -> bytes:
    """A client's side of a connection, as it should be."""
    client = h2.connection.H2Connection(config())
    client.initiate_connection()
    if chance.random() < 0.3:
        client.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: chance.randrange(90)})
    bodies = (b'{"instances":[1]}', b'{"instances":["stream"]}', b"{", b"x" * 3000)
    for _ in range(chance.randint(1, 8)):
        stream_id = client.get_next_available_stream_id()
        match chance.randrange(6):
            case 0:
                client.send_headers(stream_id, fields_of("GET", LIVE_PATH), True)
            case 1:
                path = f"{SERVICE}/ModelStreamInfer"
                timeout = ("grpc-timeout", "200m")
                client.send_headers(stream_id, fields_of("POST", path, *GRPC, timeout))
                client.send_data(stream_id, inference("1") * 3, chance.random() < 0.7)
            case 2:
                fields = fields_of("POST", PREDICT_PATH, ("expect", "100-continue"))
                client.send_headers(stream_id, fields)
                client.send_data(stream_id, chance.choice(bodies), pad_length=5)
                client.send_headers(stream_id, [("trailer", "1")], True)
            case 3:
                client.send_headers(stream_id, fields_of("POST", PREDICT_PATH))
                client.send_data(stream_id, b'{"inst')
                client.reset_stream(stream_id)
            case _:
                body = chance.choice(bodies)
                length = ("content-length", str(len(body)))
                fields = fields_of("POST", PREDICT_PATH, length)
                client.send_headers(stream_id, fields, priority_weight=3)
                client.send_data(stream_id, body, True)
    return client.data_to_send()


def mutated(chance: random.Random) -> bytes:
    stream = bytearray(requests(chance))
    first = len(PREFACE) if chance.random() < 0.95 else 0
    for _ in range(chance.randint(0, 5)):
        at = chance.randrange(first, len(stream) + 1) if first < len(stream) else 0
        end = min(len(stream), at + chance.randint(0, 30))
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
        return await any_request(payload)
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
        "write_timeout": 0.2,
        "max_head_size": 4096,
        "max_body_size": 100_000,
    }
    async with serving(handler, **limits) as server:
        with nothing_unhandled(caplog):
            for start in range(0, ROUNDS, TOGETHER):
                async with anyio.create_task_group() as tasks:
                    for seed in range(start, start + TOGETHER):
                        tasks.start_soon(abuse, server.port, seed)
            async with H2Client(server.port) as client:
                answer = await client.answer(await client.predict(1))
                assert (answer.status, answer.json) == (200, {"instances": [1]})
            await until(lambda: not server._listener._connections)
            assert server._listener.in_flight == 0


async def test_a_stop_loses_nothing_of_a_large_answer() -> None:
    go_on = anyio.Event()

    async def wait(payload: Any) -> bytes:
        await go_on.wait()
        return bytes(1_000_000)

    server = serve(model_of(wait), http_port=0, host="127.0.0.1")
    async with in_background(server) as ended, H2Client(server.port) as client:
        stream_id = await client.predict(1)
        await until(lambda: server._listener.in_flight == 1)
        server.stop()
        await client.until(lambda: len(client.goaways) == 2)
        go_on.set()
        # The server has written all of it long before the client has read it, and the
        # client's windows go on opening.
        await until(lambda: not server._listener.in_flight)
        for _ in range(30):
            await anyio.lowlevel.checkpoint()
        client.h2.increment_flow_control_window(1)
        await client.flush()
        answer = await client.answer(stream_id)
        assert (len(answer.body), answer.complete) == (1_000_000, True)
        client.close()
        with anyio.fail_after(PATIENCE):
            await ended.wait()
