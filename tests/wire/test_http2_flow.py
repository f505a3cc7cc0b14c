"""HTTP/2 flow control: the windows that we open, and keeping to the peer's."""

from __future__ import annotations

import random
from collections.abc import Iterable

import h2.events
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kserve_lite.wire.events import (
    Data,
    EndOfMessage,
    Refusal,
    Request,
    Reset,
    Response,
    Trailers,
)
from kserve_lite.wire.frames import DATA, HEADERS, MAX_WINDOW, WINDOW_UPDATE
from kserve_lite.wire.http2 import ErrorCode, Http2Connection
from kserve_lite.wire.limits import STREAM_WINDOW, WINDOW_SLACK, WireLimits
from tests.wire import http2_client as peer
from tests.wire.http2_client import POST, Frame, feed, sent, started

MIB = 2**20
SIZE = 65536  # of the DATA frames that a peer sends here


def opened(frames: Iterable[Frame], stream_id: int) -> list[int]:
    """The increments of a stream's window among frames."""
    return [
        int.from_bytes(frame.payload, "big")
        for frame in frames
        if frame.kind == WINDOW_UPDATE and frame.stream_id == stream_id
    ]


class Uploads:
    """Clients that send bodies as fast as their windows allow."""

    def __init__(self, connection: Http2Connection, *streams: int) -> None:
        self.connection = connection
        self.windows = dict.fromkeys(streams, STREAM_WINDOW)
        self.came = dict.fromkeys(streams, 0)
        self.updates = 0
        feed(connection, *(peer.open_headers(stream) for stream in streams))

    def send(self, stream: int, size: int) -> int:
        """Send what the window allows of `size` bytes; return how much it was."""
        done = 0
        while done < size:
            count = min(SIZE, self.windows[stream], size - done)
            if count == 0:
                break
            events = feed(self.connection, peer.data(stream, bytes(count)))
            assert [type(event) for event in events] == [Data]
            self.windows[stream] -= count
            self.came[stream] += count
            done += count
            self.read()
        return done

    def read(self) -> None:
        for frame in sent(self.connection):
            if frame.kind == WINDOW_UPDATE and frame.stream_id:
                self.windows[frame.stream_id] += int.from_bytes(frame.payload, "big")
                self.updates += 1

    def finish(self, stream: int) -> None:
        feed(self.connection, peer.last_data(stream))

    def held(self) -> int:
        """What windows and held bytes cost beyond the first windows."""
        streams = self.connection._streams.values()
        return sum(max(0, s.window + s.held - STREAM_WINDOW) for s in streams)


# --- receiving ------------------------------------------------------------------------


@pytest.mark.parametrize("announced", [False, True])
def test_a_held_body_takes_few_updates(announced: bool) -> None:
    connection = started()
    size = 100 * MIB
    uploads = Uploads(connection)
    uploads.windows[1], uploads.came[1] = STREAM_WINDOW, 0
    length = ((b"content-length", b"%d" % size),) if announced else ()
    feed(connection, peer.open_headers(1, *POST, *length))
    while uploads.came[1] < size:
        came = uploads.came[1]
        assert uploads.send(1, min(SIZE, size - came)) == min(SIZE, size - came)
        assert uploads.windows[1] + uploads.came[1] <= size + WINDOW_SLACK
        # It is lent in proportion to what came, whatever was announced.
        assert uploads.windows[1] <= 3 * STREAM_WINDOW + 2 * uploads.came[1]
    assert uploads.updates <= 9
    uploads.finish(1)
    assert connection._credit._lent == size - STREAM_WINDOW
    connection.send(Response(1, 200, (), b""))
    sent(connection)
    assert connection._credit._lent == 0


def test_a_body_that_is_consumed_as_it_comes_takes_few_updates_and_no_credit() -> None:
    connection = started()
    uploads = Uploads(connection, 1)
    for _ in range(1600):
        assert uploads.send(1, SIZE) == SIZE
        connection.acknowledge(1, SIZE)
        assert uploads.held() == 0
        uploads.read()
    assert uploads.updates <= 1600 * SIZE // (STREAM_WINDOW // 4)
    assert connection._credit._lent == 0


def test_a_small_body_takes_no_update() -> None:
    connection = started()
    length = (b"content-length", b"602112")
    feed(connection, peer.open_headers(1, *POST, length))
    for start in range(0, 602112, 16384):
        feed(connection, peer.data(1, bytes(min(16384, 602112 - start))))
    assert sent(connection) == []


def test_a_body_cannot_pass_the_largest_by_more_than_the_slack() -> None:
    limits = WireLimits(max_body_size=3 * MIB)
    uploads = Uploads(started(limits), 1)
    uploads.send(1, 10 * MIB)
    assert uploads.came[1] == 3 * MIB + WINDOW_SLACK
    events = feed(uploads.connection, peer.data(1, b"x"))
    assert events == [Reset(1, ErrorCode.FLOW_CONTROL_ERROR)]
    # Letting go of some lets as much come.
    uploads = Uploads(started(limits), 1)
    uploads.send(1, 10 * MIB)
    uploads.connection.acknowledge(1, MIB)
    uploads.read()
    assert uploads.send(1, 10 * MIB) == MIB


def test_the_first_window_follows_a_small_largest_body() -> None:
    connection = Http2Connection(WireLimits(max_body_size=100))
    assert (4, 100 + WINDOW_SLACK) in [
        (4, int.from_bytes(sent(connection)[0].payload[14:18], "big"))
    ]


def test_padding_is_given_back() -> None:
    connection = started()
    length = (b"content-length", b"%d" % (3 * MIB))
    feed(connection, peer.open_headers(1, *POST, length))
    window, came = STREAM_WINDOW, 0
    padded = Frame(DATA, 8, 1, b"\xff" + bytes(745) + bytes(255))
    while came + 745 <= 3 * MIB:
        assert window >= 1001
        assert [type(e) for e in feed(connection, padded)] == [Data]
        came += 745
        window += sum(opened(sent(connection), 1)) - 1001
    assert connection._streams[1].held == came


def test_streams_share_a_budget_and_wait_for_each_other() -> None:
    limits = WireLimits(max_body_size=20 * MIB, max_held_bodies=30 * MIB)
    connection = started(limits)
    uploads = Uploads(connection, 1, 3, 5, 7)
    size = 20 * MIB
    bound = 30 * MIB + size + WINDOW_SLACK
    # All send what they may, until nobody may any more.
    while sum(uploads.send(stream, MIB) for stream in uploads.windows):
        assert uploads.held() <= bound
        for stream in [s for s in uploads.windows if uploads.came[s] >= size]:
            del uploads.windows[stream]
    done = [stream for stream, came in uploads.came.items() if came >= size]
    assert 0 < len(done) < 4
    # Each that is answered lets another go on: none waits for ever.
    answered: set[int] = set()
    while len(answered) < 4:
        stream = next(
            s for s in uploads.came if s not in answered and uploads.came[s] >= size
        )
        uploads.windows[stream] = 0
        uploads.finish(stream)
        connection.send(Response(stream, 200, (), b""))
        uploads.read()
        answered.add(stream)
        del uploads.windows[stream]
        while sum(
            uploads.send(s, min(MIB, size - uploads.came[s])) for s in uploads.windows
        ):
            assert uploads.held() <= bound
    assert connection._credit._lent == 0
    assert not connection._credit._waiting
    assert connection._credit._overdrawing is None


def test_the_oldest_waits_for_nobody() -> None:
    """All are incomplete and the budget is nothing: one at a time goes on."""
    limits = WireLimits(max_body_size=8 * MIB, max_held_bodies=1)
    connection = started(limits)
    uploads = Uploads(connection, 1, 3, 5)
    for stream in (5, 3, 1):
        uploads.send(stream, 8 * MIB)
    assert uploads.came == {1: MIB, 3: MIB, 5: 8 * MIB}
    feed(connection, peer.rst_stream(5))  # The credit goes on to the oldest.
    uploads.read()
    assert uploads.send(3, MIB) == 0
    assert uploads.send(1, 7 * MIB) == 7 * MIB
    uploads.finish(1)
    assert uploads.send(3, MIB) == 0
    connection.acknowledge(1, 8 * MIB)
    uploads.read()
    assert uploads.send(3, 7 * MIB) == 7 * MIB
    connection.send(Reset(3, 2), Reset(1, 2))
    assert connection._credit._lent == 0


@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                ["send", "send", "ack", "finish", "answer", "reset", "open"]
            ),
            st.integers(0, 3),
            st.integers(1, 3 * MIB),
        ),
        max_size=60,
    )
)
@settings(max_examples=40, deadline=None)
def test_the_credit_adds_up(steps: list[tuple[str, int, int]]) -> None:
    limits = WireLimits(max_body_size=4 * MIB, max_held_bodies=3 * MIB)
    connection = started(limits)
    uploads = Uploads(connection, 1)
    last = 1
    for verb, which, size in steps:
        streams = list(uploads.windows)
        stream = streams[which % len(streams)] if streams else 0
        if verb == "open" and len(streams) < 4:
            last += 2
            feed(connection, peer.open_headers(last))
            uploads.windows[last], uploads.came[last] = STREAM_WINDOW, 0
        elif not stream:
            continue
        elif verb == "send":
            uploads.send(stream, size)
        elif verb == "ack":
            connection.acknowledge(stream, size)
        elif verb == "reset":
            connection.send(Reset(stream, 8))
            del uploads.windows[stream]
        elif verb in ("finish", "answer"):
            uploads.finish(stream)
            connection.send(Response(stream, 200, (), b""))
            del uploads.windows[stream]
        uploads.read()
        credit = connection._credit
        live = connection._streams.values()
        assert credit._lent == sum(s.lent for s in live)
        assert credit._lent <= 3 * MIB + 4 * MIB + WINDOW_SLACK
        for s in live:
            assert s.window == uploads.windows[s.id]
            assert s.window + s.held <= 4 * MIB + WINDOW_SLACK
            assert s.window + s.held <= STREAM_WINDOW + s.lent
        waiting = credit._waiting.keys()
        assert waiting <= {s.id for s in live if s.receiving}
        assert not waiting or credit._overdrawing is not None


def test_overrunning_a_stream_is_its_error() -> None:
    connection = started(WireLimits(max_body_size=100))
    window = 100 + WINDOW_SLACK
    feed(connection, peer.open_headers(1), peer.data(1, bytes(window - 60_000)))
    events = feed(connection, peer.data(1, bytes(60_001)))
    assert events == [Reset(1, ErrorCode.FLOW_CONTROL_ERROR)]
    assert sent(connection) == [peer.rst_stream(1, ErrorCode.FLOW_CONTROL_ERROR)]


def test_a_stream_that_is_over_keeps_its_window() -> None:
    connection = started(WireLimits(max_body_size=100))
    window = 100 + WINDOW_SLACK
    feed(connection, peer.open_headers(1), peer.data(1, bytes(600)))
    connection.send(Reset(1, 8))
    late = peer.data(1, bytes((window - 600) // 2))
    assert feed(connection, late, late) == []
    events = feed(connection, peer.data(1, b"xx"))
    assert peer.ended_with(connection, events) == ErrorCode.FLOW_CONTROL_ERROR


def test_a_refused_body_is_not_let_in() -> None:
    connection = started()
    length = (b"content-length", b"%d" % 10**9)
    events = feed(connection, peer.open_headers(1, *POST, length))
    assert [type(event) for event in events] == [Refusal]
    for _ in range(STREAM_WINDOW // SIZE):
        assert feed(connection, peer.data(1, bytes(SIZE))) == []
    assert opened(sent(connection), 1) == []
    feed(connection, peer.data(1, b"x"))
    assert sent(connection) == [peer.rst_stream(1, ErrorCode.FLOW_CONTROL_ERROR)]


def test_the_connection_window_is_kept_open() -> None:
    connection = started()
    connection._window = MAX_WINDOW // 2 + 100
    feed(connection, peer.open_headers(1), peer.data(1, bytes(101)))
    assert opened(sent(connection), 0) == [MAX_WINDOW - MAX_WINDOW // 2 + 1]
    # DATA that nobody wants counts no less.
    connection.send(Reset(1, 8))
    connection._window = MAX_WINDOW // 2
    feed(connection, peer.data(1, b"x"))
    assert opened(sent(connection), 0) == [MAX_WINDOW - MAX_WINDOW // 2 + 1]
    connection._window = 1
    feed(connection, peer.open_headers(3))
    events = feed(connection, peer.data(3, b"xx"))
    assert peer.ended_with(connection, events) == ErrorCode.FLOW_CONTROL_ERROR


# --- sending --------------------------------------------------------------------------


def bodies(frames: Iterable[Frame]) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    for frame in frames:
        if frame.kind == DATA:
            found[frame.stream_id] = found.get(frame.stream_id, b"") + frame.payload
    return found


def test_an_answer_keeps_to_the_windows() -> None:
    connection = started(None, (4, 1000))
    feed(connection, peer.headers(1))
    body = random.Random(1).randbytes(200_000)
    connection.send(Response(1, 200, (), body))
    assert connection.unsent(1) == 200_000
    assert [f.kind for f in sent(connection)] == [HEADERS, DATA]
    assert connection.unsent(1) == 199_000
    assert sent(connection) == []
    feed(connection, peer.window_update(1, 500))
    assert [len(f.payload) for f in sent(connection)] == [500]
    # The connection's window of 65,535 bytes ends before the stream's.
    feed(connection, peer.window_update(1, 10**6))
    assert sum(len(f.payload) for f in sent(connection)) == 65_535 - 1500
    feed(connection, peer.window_update(1, 1))
    assert sent(connection) == []
    feed(connection, peer.window_update(0, 10))
    assert bodies(sent(connection)) == {1: body[65_535:65_545]}
    feed(connection, peer.window_update(0, 10**6))
    assert bodies(sent(connection)) == {1: body[65_545:]}
    assert connection.open_streams == 0


def test_settings_move_the_windows_below_zero_and_back() -> None:
    """RFC 9113 6.9.2."""
    connection = started(None, (4, 1000))
    feed(connection, peer.headers(1), peer.headers(3))
    connection.send(Response(1, 200, (), bytes(3000)))
    connection.send(Response(3, 200, (), bytes(10)))
    assert sum(len(f.payload) for f in sent(connection) if f.kind == DATA) == 1010
    feed(connection, peer.settings((4, 100)))
    assert connection._streams[1].send_window == -900
    feed(connection, peer.window_update(1, 900))
    assert [f.kind for f in sent(connection)] == [4]
    feed(connection, peer.window_update(1, 5))
    assert [len(f.payload) for f in sent(connection)] == [5]
    feed(connection, peer.settings((4, 0), (4, 2100)))
    assert [len(f.payload) for f in sent(connection)] == [0, 1995]
    # A stream that opens now has the window of now.
    feed(connection, peer.headers(5), peer.settings((4, 0)), peer.headers(7))
    assert [s.send_window for s in connection._streams.values()] == [0, 0]
    connection.send(Response(7, 200, (), b"x"))
    feed(connection, peer.settings((4, 1)))
    assert bodies(sent(connection)) == {7: b"x"}


def test_an_empty_answer_needs_no_window() -> None:
    connection = started(None, (4, 0))
    feed(connection, peer.headers(1), peer.headers(3), peer.headers(5))
    connection.send(Response(1, 200, (), b""))
    connection.send(Response(3, 200, ()), Trailers(3, ()))
    connection.send(Response(5, 200, ()), Data(5, b"x"), EndOfMessage(5))
    assert [f.stream_id for f in sent(connection)] == [1, 3, 3, 5]
    assert connection.open_streams == 1


def test_frames_keep_to_the_peers_largest() -> None:
    connection = started(None, (4, 10**6), (5, 20_000))
    feed(connection, peer.headers(1), peer.window_update(0, 10**6))
    connection.send(Response(1, 200, (), bytes(50_000)))
    sizes = [len(f.payload) for f in sent(connection) if f.kind == DATA]
    assert sizes == [20_000, 20_000, 10_000]
    feed(connection, peer.headers(3))
    connection.send(Response(3, 200, (), bytes(50_000)))
    feed(connection, peer.settings((5, 16_384)))
    assert max(len(f.payload) for f in sent(connection)) == 16_384


def test_streams_take_turns() -> None:
    connection = started(None, (4, 10**6))
    feed(connection, peer.window_update(0, 10**6))
    feed(connection, *(peer.headers(stream) for stream in (1, 3, 5)))
    connection.send(Response(1, 200, (), bytes(60_000)))
    connection.send(Response(3, 200, (), bytes(40_000)))
    feed(connection, peer.ping())
    connection.send(Response(5, 200, ()), Data(5, b"small"), Trailers(5, ()))
    order = [(f.stream_id, f.kind) for f in sent(connection)]
    assert order[:4] == [(0, 6), (1, HEADERS), (1, DATA), (3, HEADERS)]
    assert [stream for stream, kind in order if kind == DATA] == [
        1,
        3,
        5,
        1,
        3,
        1,
        3,
        1,
    ]


def test_a_blocked_stream_holds_nobody_up() -> None:
    connection = started(None, (4, 10))
    feed(connection, peer.headers(1), peer.headers(3))
    connection.send(Response(1, 200, (), bytes(20)))
    connection.send(Response(3, 200, (), bytes(10)))
    assert {s: len(b) for s, b in bodies(sent(connection)).items()} == {1: 10, 3: 10}
    assert connection.open_streams == 1
    feed(connection, peer.rst_stream(1))
    assert connection.open_streams == 0
    assert sent(connection) == []


def test_a_stream_reset_while_the_connection_is_blocked() -> None:
    connection = started()
    feed(connection, *(peer.headers(stream) for stream in (1, 3, 5)))
    connection.send(Response(1, 200, (), bytes(65_535)))
    sent(connection)
    connection.send(Response(3, 200, (), b"abc"))
    connection.send(Response(5, 200, (), b"def"))
    assert [f.kind for f in sent(connection)] == [HEADERS, HEADERS]
    assert len(connection._outbox._blocked) == 2
    feed(connection, peer.rst_stream(3))
    assert len(connection._outbox._blocked) == 1
    feed(connection, peer.window_update(0, 100))
    assert bodies(sent(connection)) == {5: b"def"}


def test_output_comes_in_portions_of_views() -> None:
    connection = started(None, (4, 10**7))
    feed(connection, peer.window_update(0, 10**7), peer.headers(1))
    body = bytearray(random.Random(2).randbytes(3_000_000))
    connection.send(Response(1, 200, (), body))
    raw = b""
    portions = 0
    while parts := connection.data_to_send(500_000):
        portions += 1
        assert sum(map(len, parts)) <= 500_000 + 16_384 + 9
        large = [part for part in parts if len(part) > 4096]
        assert all(isinstance(p, memoryview) and p.obj is body for p in large)
        raw += peer.flat(parts)
    assert portions == 6
    assert bodies(peer.parse(raw)) == {1: bytes(body)}


def test_bodies_in_many_pieces_fill_the_frames() -> None:
    connection = started()
    feed(connection, peer.headers(1))
    whole = random.Random(3).randbytes(60_000)
    connection.send(Response(1, 200, ()))
    for start in range(0, 60_000, 7001):
        connection.send(Data(1, whole[start : start + 7001]))
    connection.send(EndOfMessage(1))
    frames = [f for f in sent(connection) if f.kind == DATA]
    assert [len(f.payload) for f in frames] == [16_384, 16_384, 16_384, 10_848]
    assert bodies(frames) == {1: whole}


def test_views_of_other_shapes_are_sent_as_bytes() -> None:
    connection = started()
    feed(connection, peer.headers(1), peer.headers(3))
    view = memoryview(bytes(range(24))).cast("i")
    connection.send(Response(1, 200, (), view))
    connection.send(Response(3, 200, ()), Data(3, view.cast("B").cast("h", (3, 4))))
    frames = sent(connection)
    assert bodies(frames) == {1: bytes(range(24)), 3: bytes(range(24))}
    assert frames[0].payload.endswith(b"\x0224")


def test_both_directions_with_h2() -> None:
    pair = peer.Pair()
    body = random.Random(4).randbytes(900_000)
    stream = pair.ask(*POST, body=body)
    events, _ = pair.run()
    assert events[1:] == [Data(stream, body), EndOfMessage(stream)]
    assert isinstance(events[0], Request)
    pair.server.send(Response(stream, 200, (), body))
    got = b""
    for _ in range(1000):
        for event in pair.run()[1]:
            if isinstance(event, h2.events.DataReceived):
                got += event.data or b""
                length = event.flow_controlled_length or 0
                pair.client.acknowledge_received_data(length, stream)
        if not pair.server.open_streams:
            break
    assert got == body
