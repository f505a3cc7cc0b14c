"""HTTP/2 requests and answers, with the `h2` package at the other end."""

from __future__ import annotations

import itertools
import random
import struct

import h2.events
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kserve_lite.wire.events import (
    ContinueWanted,
    Data,
    EndOfMessage,
    Event,
    Headers,
    Outgoing,
    Refusal,
    Request,
    Reset,
    Response,
    Trailers,
)
from kserve_lite.wire.frames import (
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PING,
    RST_STREAM,
)
from kserve_lite.wire.http2 import PREFACE, ErrorCode, Http2Connection
from kserve_lite.wire.limits import WireLimits
from tests.wire import http2_client as peer
from tests.wire.http2_client import GET, POST, Field, Pair, feed, merged, sent, started

PLAIN: tuple[Field, ...] = ((b"content-type", b"text/plain"),)
HEAD: tuple[Field, ...] = ((b":method", b"HEAD"), *GET[1:])


def request_of(events: list[Event]) -> Request:
    assert isinstance(events[0], Request)
    return events[0]


# --- requests ---------------------------------------------------------------------


def test_a_request_without_body() -> None:
    pair = Pair()
    stream = pair.ask(*GET, (b"accept", b"*/*"))
    events, _ = pair.run()
    fields = ((b"host", b"a"), (b"accept", b"*/*"))
    assert events == [
        Request(stream, "GET", "/p", Headers(fields)),
        EndOfMessage(stream),
    ]
    assert request_of(events).headers.raw == fields
    assert pair.server.open_streams == 1
    assert pair.server.last_stream_id == stream


def test_a_request_with_body() -> None:
    pair = Pair()
    body = random.Random(1).randbytes(300_000)
    stream = pair.ask(*POST, body=body)
    events, _ = pair.run()
    assert events[1:] == [Data(stream, body), EndOfMessage(stream)]


def test_requests_side_by_side() -> None:
    pair = Pair()
    first, second = pair.ask(), pair.ask(*POST, body=b"x")
    events, _ = pair.run()
    assert [(type(e), e.stream_id) for e in events] == [
        (Request, first),
        (EndOfMessage, first),
        (Request, second),
        (Data, second),
        (EndOfMessage, second),
    ]


def test_trailers_end_a_request_and_are_dropped() -> None:
    pair = Pair()
    pair.client.send_headers(1, POST)
    pair.client.send_data(1, b"x")
    pair.client.send_headers(1, [(b"x-sum", b"1")], end_stream=True)
    events, _ = pair.run()
    assert events[1:] == [Data(1, b"x"), EndOfMessage(1)]


def test_padding_is_taken_off() -> None:
    pair = Pair()
    pair.client.send_headers(1, POST)
    pair.client.send_data(1, b"x" * 10, pad_length=200)
    pair.client.send_data(1, b"", pad_length=3, end_stream=True)
    events, _ = pair.run()
    assert events[1:] == [Data(1, b"x" * 10), EndOfMessage(1)]
    padded = b"\x02" + peer.literals(*GET) + b"\x00\x00"
    frame = peer.Frame(HEADERS, END_HEADERS | END_STREAM | 8, 3, padded)
    assert request_of(feed(pair.server, frame)).target == "/p"


def test_large_frames_arrive_as_views_of_the_read() -> None:
    connection = started()
    raw = bytes(peer.open_headers(1)) + bytes(peer.data(1, b"x" * 60_000))
    events = peer.received(connection, memoryview(raw + bytes(200_000 - len(raw))))
    piece = events[1]
    assert isinstance(piece, Data)
    assert isinstance(piece.data, memoryview)
    assert piece.data == b"x" * 60_000


def test_a_body_does_not_wait_for_its_frame() -> None:
    connection = started()
    raw = peer.joined([peer.open_headers(1), peer.last_data(1, b"abcdef")])
    events = peer.received(connection, raw[:-4])
    assert merged(events)[1:] == [Data(1, b"ab")]
    assert peer.is_midway(connection)
    assert merged(peer.received(connection, raw[-4:-1])) == [Data(1, b"cde")]
    assert merged(peer.received(connection, raw[-1:])) == [
        Data(1, b"f"),
        EndOfMessage(1),
    ]
    assert not peer.is_midway(connection)


def test_the_rest_of_a_frame_of_a_stream_that_is_over_is_dropped() -> None:
    connection = started()
    raw = peer.joined([peer.open_headers(1), peer.last_data(1, b"abcdef")])
    peer.received(connection, raw[:-4])
    connection.send(Reset(1, ErrorCode.CANCEL))
    assert (
        peer.received(connection, raw[-4:] + bytes(peer.headers(3)))[0].stream_id == 3
    )


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_is_taken(kind: type[bytes | bytearray | memoryview]) -> None:
    connection = Http2Connection()
    frames = [peer.settings(), peer.open_headers(1), peer.data(1, b"y" * 50_000)]
    raw = PREFACE + peer.joined([*frames, *10 * [peer.Frame(0xBB, 0, 0, b"z" * 9000)]])
    cut = len(PREFACE) + 15
    events = peer.received(connection, kind(raw[:cut])) + peer.received(
        connection, kind(raw[cut:])
    )
    assert merged(events)[1:] == [Data(1, b"y" * 50_000)]


# --- refusals and 100-continue ------------------------------------------------------

SECRET = b"s3cr3t"
SMALL = WireLimits(max_head_size=512, max_body_size=64)
TOO_LONG = (b"content-length", b"65")
REFUSED: dict[str, tuple[tuple[Field, ...], int, str]] = {
    "large body": (
        (*POST, TOO_LONG),
        413,
        "The body may have 64 bytes (max_body_size); 65 bytes were announced.",
    ),
    "large body with expectation": (
        (*POST, TOO_LONG, (b"expect", b"100-continue")),
        413,
        "The body may have 64 bytes (max_body_size); 65 bytes were announced.",
    ),
    "large head": (
        (*POST, (b"x-a", SECRET * 100)),
        431,
        "The request's head is larger than 512 bytes (max_head_size).",
    ),
    "other expectation": (
        (*POST, (b"expect", SECRET)),
        417,
        "The only expectation served is 100-continue.",
    ),
    "connect": (
        ((b":method", b"CONNECT"), (b":authority", SECRET)),
        501,
        "CONNECT is not served.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_request_gets_its_answer_and_nothing_else(name: str) -> None:
    fields, status, reason = REFUSED[name]
    connection = started(SMALL)
    events = feed(connection, peer.open_headers(1, *fields), peer.data(1, b"x" * 60))
    assert events == [Refusal(1, status, reason)]
    assert connection.open_streams == 1
    assert feed(connection, peer.data(1, b"x")) == []
    connection.send(Response(1, status, PLAIN, b"no"))
    frames = sent(connection)
    assert [frame.kind for frame in frames] == [HEADERS, DATA, RST_STREAM]
    assert frames[2].payload == bytes(4)
    assert connection.open_streams == 0
    assert feed(connection, peer.last_data(1, b"x")) == []
    # The others go on, with the state of the compression kept.
    assert request_of(feed(connection, peer.headers(3))).target == "/p"
    assert not peer.is_closed(connection)


def test_a_refused_request_that_is_complete_is_not_reset() -> None:
    connection = started(SMALL)
    events = feed(connection, peer.headers(1, *REFUSED["large head"][0]))
    assert [type(event) for event in events] == [Refusal]
    connection.send(Response(1, 431, PLAIN, b"no"))
    assert [frame.kind for frame in sent(connection)] == [HEADERS, DATA]
    feed(connection, peer.open_headers(3, *REFUSED["large head"][0]))
    assert feed(connection, peer.headers(3, (b"x-a", b"b"))) == []
    connection.send(Response(3, 431, PLAIN, b"no"))
    assert [frame.kind for frame in sent(connection)] == [HEADERS, DATA]


def test_a_peer_may_give_a_refused_request_up() -> None:
    connection = started(SMALL)
    feed(connection, peer.open_headers(1, *REFUSED["large body"][0]))
    assert feed(connection, peer.rst_stream(1)) == []
    connection.send(Response(1, 413, PLAIN, b"no"))
    assert sent(connection) == []


EXPECTING = (*POST, (b"content-length", b"2"), (b"expect", b"100-Continue"))


def test_continue_is_wanted_until_the_body_begins() -> None:
    connection = started()
    events = feed(connection, peer.open_headers(1, *EXPECTING))
    assert events[1:] == [ContinueWanted(1)]
    connection.send(Response(1, 100, ()))
    assert [(f.kind, f.flags) for f in sent(connection)] == [(HEADERS, END_HEADERS)]
    events = feed(connection, peer.last_data(1, b"hi"))
    assert merged(events) == [Data(1, b"hi"), EndOfMessage(1)]
    connection.send(Response(1, 200, PLAIN, b"ho"))
    assert [f.kind for f in sent(connection)] == [HEADERS, DATA]


def test_continue_is_not_wanted_with_the_body_or_without_one() -> None:
    connection = started()
    events = feed(
        connection, peer.open_headers(1, *EXPECTING), peer.last_data(1, b"hi")
    )
    assert [type(e) for e in events] == [Request, Data, EndOfMessage]
    events = feed(connection, peer.headers(3, *GET, (b"expect", b"100-continue")))
    assert [type(e) for e in events] == [Request, EndOfMessage]


# --- answers ------------------------------------------------------------------------


def answer(pair: Pair, *events: Outgoing) -> list[h2.events.Event]:
    pair.server.send(*events)
    return pair.run()[1]


def fields_of(event: h2.events.Event) -> list[Field]:
    assert isinstance(
        event,
        h2.events.ResponseReceived
        | h2.events.TrailersReceived
        | h2.events.InformationalResponseReceived,
    )
    return [(bytes(n), bytes(v)) for n, v in event.headers or ()]


def body_of(events: list[h2.events.Event]) -> bytes:
    return b"".join(
        e.data or b"" for e in events if isinstance(e, h2.events.DataReceived)
    )


def test_a_whole_answer() -> None:
    pair = Pair()
    stream = pair.ask()
    pair.run()
    events = answer(pair, Response(stream, 200, PLAIN, b"hello"))
    assert fields_of(events[0]) == [
        (b":status", b"200"),
        (b"content-type", b"text/plain"),
        (b"content-length", b"5"),
    ]
    assert body_of(events) == b"hello"
    assert type(events[-1]) is h2.events.StreamEnded
    assert pair.server.open_streams == 0


def test_a_whole_answer_of_nothing() -> None:
    connection = started()
    feed(connection, peer.headers(1))
    connection.send(Response(1, 200, PLAIN, b""))
    (frame,) = sent(connection)
    assert frame.flags == END_HEADERS | END_STREAM
    assert frame.payload.endswith(b"\x0f\x0d\x010")


def test_an_answer_in_parts_with_trailers() -> None:
    pair = Pair()
    stream = pair.ask()
    pair.run()
    trailers = ((b"grpc-status", b"0"),)
    events = answer(
        pair,
        Response(stream, 200, PLAIN),
        Data(stream, b"he"),
        Data(stream, b""),
        Data(stream, bytearray(b"ll")),
        Data(stream, memoryview(b"o")),
        Trailers(stream, trailers),
    )
    assert body_of(events) == b"hello"
    assert fields_of(events[-2]) == list(trailers)
    assert type(events[-1]) is h2.events.StreamEnded


def test_an_answer_in_parts_at_different_times() -> None:
    pair = Pair()
    stream = pair.ask()
    pair.run()
    assert fields_of(answer(pair, Response(stream, 200, PLAIN))[0])
    assert body_of(answer(pair, Data(stream, b"a"))) == b"a"
    assert body_of(answer(pair, Data(stream, b"b"))) == b"b"
    assert [type(e) for e in answer(pair, EndOfMessage(stream))][-1] is (
        h2.events.StreamEnded
    )
    assert pair.server.open_streams == 0


def test_the_shapes_of_small_answers() -> None:
    connection = started()
    feed(connection, *(peer.headers(stream) for stream in range(1, 13, 2)))
    trailers = Trailers(1, ((b"x", b"y"),))
    connection.send(Response(1, 200, PLAIN), EndOfMessage(1))
    connection.send(Response(3, 200, PLAIN), trailers._replace(stream_id=3))
    connection.send(Response(5, 200, PLAIN), Data(5, b"x"), EndOfMessage(5))
    connection.send(Response(7, 200, PLAIN))
    connection.send(EndOfMessage(7))
    connection.send(Response(9, 103, PLAIN), Response(9, 204, PLAIN))
    shapes: dict[int, list[tuple[int, int]]] = {}
    for frame in sent(connection):
        shapes.setdefault(frame.stream_id, []).append((frame.kind, frame.flags))
    assert shapes == {
        1: [(HEADERS, END_HEADERS | END_STREAM)],
        3: [(HEADERS, END_HEADERS), (HEADERS, END_HEADERS | END_STREAM)],
        5: [(HEADERS, END_HEADERS), (DATA, END_STREAM)],
        7: [(HEADERS, END_HEADERS | END_STREAM)],
        9: [(HEADERS, END_HEADERS), (HEADERS, END_HEADERS | END_STREAM)],
    }
    assert connection.open_streams == 1
    connection.send(Response(11, 200, PLAIN))
    sent(connection)
    connection.send(EndOfMessage(11))
    assert sent(connection) == [peer.Frame(DATA, END_STREAM, 11)]


@pytest.mark.parametrize("status", [204, 304])
def test_some_answers_have_no_body_and_no_length(status: int) -> None:
    pair = Pair()
    stream = pair.ask()
    pair.run()
    events = answer(pair, Response(stream, status, PLAIN, b"dropped"))
    assert fields_of(events[0]) == [(b":status", b"%d" % status), *PLAIN]
    assert [type(e) for e in events[1:]] == [h2.events.StreamEnded]


def test_an_answer_to_head_has_a_length_and_no_body() -> None:
    pair = Pair()
    first, second = pair.ask(*HEAD), pair.ask(*HEAD)
    pair.run()
    events = answer(pair, Response(first, 200, PLAIN, b"12345"))
    assert (b"content-length", b"5") in fields_of(events[0])
    assert [type(e) for e in events[1:]] == [h2.events.StreamEnded]
    events = answer(
        pair, Response(second, 200, PLAIN), Data(second, b"1"), EndOfMessage(second)
    )
    assert [type(e) for e in events[1:]] == [h2.events.StreamEnded]


def test_fields_of_the_connection_are_left_out() -> None:
    pair = Pair()
    stream = pair.ask()
    pair.run()
    fields = ((b"Connection", b"close"), (b"X-A", b"b"), (b"keep-alive", b"1"))
    events = answer(pair, Response(stream, 200, fields), EndOfMessage(stream))
    assert fields_of(events[0]) == [(b":status", b"200"), (b"x-a", b"b")]


def test_a_large_head_takes_continuations() -> None:
    pair = Pair()
    stream = pair.ask()
    pair.run()
    large = tuple((b"x-%d" % i, b"v" * 4000) for i in range(15))
    events = answer(pair, Response(stream, 200, large), Trailers(stream, large[:9]))
    assert fields_of(events[0])[1:] == list(large)
    assert fields_of(events[1]) == list(large[:9])


def test_an_early_answer_ends_the_request() -> None:
    """RFC 9113 8.1: RST_STREAM(NO_ERROR) once the answer is complete."""
    connection = started()
    feed(connection, peer.open_headers(1))
    connection.send(Response(1, 200, PLAIN), Data(1, b"x" * 70_000), EndOfMessage(1))
    assert sent(connection)[-1].kind == DATA
    assert connection.open_streams == 1
    feed(connection, peer.window_update(0, 70_000), peer.window_update(1, 70_000))
    *_, data, reset = sent(connection)
    assert (data.kind, data.flags) == (DATA, END_STREAM)
    assert reset == peer.rst_stream(1, ErrorCode.NO_ERROR)
    assert connection.open_streams == 0
    # What was on its way is dropped.
    late = [peer.data(1, b"x"), peer.headers(1, (b"x-a", b"b")), peer.rst_stream(1)]
    assert feed(connection, *late) == []
    assert not peer.is_closed(connection)


def test_what_belongs_to_no_stream_is_dropped() -> None:
    connection = started()
    feed(connection, peer.headers(1), peer.headers(3), peer.rst_stream(3))
    for stream in (3, 5, 2, 0):
        connection.send(
            Response(stream, 200, PLAIN), Data(stream, b"x"), EndOfMessage(stream)
        )
        connection.send(Reset(stream, 8), Trailers(stream, PLAIN))
        connection.acknowledge(stream, 10)
        assert connection.unsent(stream) == 0
    assert sent(connection) == []
    connection.send(Response(1, 200, PLAIN, b"x"), Data(1, b"more"), EndOfMessage(1))
    assert [f.kind for f in sent(connection)] == [HEADERS, DATA]
    connection.send(Response(1, 200, PLAIN, b"x"))
    assert sent(connection) == []


def test_a_reset_of_ours_drops_what_is_queued() -> None:
    connection = started()
    feed(connection, peer.headers(1), peer.open_headers(3))
    connection.send(Response(1, 200, PLAIN), Data(1, b"x" * 100_000))
    connection.send(Response(3, 200, PLAIN), Data(3, b"x"), Reset(3, 2))
    assert connection.unsent(1) == 100_000
    connection.send(Reset(1, ErrorCode.INTERNAL_ERROR))
    assert connection.unsent(1) == 0
    assert sent(connection) == [peer.rst_stream(3, 2), peer.rst_stream(1, 2)]
    assert connection.open_streams == 0
    assert feed(connection, peer.data(3, b"x"), peer.rst_stream(1)) == []


def test_a_reset_of_the_peer() -> None:
    pair = Pair()
    stream = pair.ask()
    pair.run()
    pair.client.reset_stream(stream, error_code=8)
    assert pair.run()[0] == [Reset(stream, 8)]
    assert pair.server.open_streams == 0
    done = pair.ask()
    pair.run()
    answer(pair, Response(done, 200, PLAIN, b""))
    assert feed(pair.server, peer.rst_stream(done)) == []


# --- the end of a connection --------------------------------------------------------


def test_graceful_shutdown() -> None:
    pair = Pair()
    first = pair.ask()
    pair.run()
    pair.server.shutdown()
    goaway, ping = sent(pair.server)
    assert goaway == peer.goaway(0, 2**31 - 1)
    assert ping.kind == PING
    # On its way before the peer knew: still served.
    events = feed(pair.server, peer.headers(first + 2))
    assert [type(e) for e in events] == [Request, EndOfMessage]
    assert not peer.is_closed(pair.server)
    feed(pair.server, peer.ping(b"whatever", 1))
    assert sent(pair.server) == []
    feed(pair.server, ping._replace(flags=1))
    assert sent(pair.server) == [peer.goaway(0, first + 2)]
    # Too late: told to be unprocessed, its body dropped.
    late = [peer.open_headers(first + 4), peer.last_data(first + 4, b"x")]
    assert feed(pair.server, *late) == []
    assert sent(pair.server) == [peer.rst_stream(first + 4, ErrorCode.REFUSED_STREAM)]
    assert pair.server.last_stream_id == first + 2
    pair.server.send(Response(first, 200, PLAIN, b""))
    sent(pair.server)
    assert not peer.is_closed(pair.server)
    pair.server.send(Response(first + 2, 200, PLAIN, b""))
    assert not peer.is_closed(pair.server)
    sent(pair.server)
    assert peer.is_closed(pair.server)


def test_a_second_shutdown_does_not_wait_for_the_peer() -> None:
    connection = started()
    connection.shutdown()
    connection.shutdown()
    connection.shutdown()
    assert [f.kind for f in sent(connection)] == [GOAWAY, PING, GOAWAY]
    assert peer.is_closed(connection)


def test_a_peer_that_leaves_is_served_to_the_end() -> None:
    pair = Pair()
    stream = pair.ask()
    pair.run()
    assert feed(pair.server, peer.goaway()) == []
    assert not peer.is_closed(pair.server)
    pair.server.send(Response(stream, 200, PLAIN, b"x"))
    assert [f.kind for f in sent(pair.server)] == [HEADERS, DATA]
    assert peer.is_closed(pair.server)


def test_after_a_connection_error_nothing_is_taken_or_sent() -> None:
    connection = started()
    feed(connection, peer.headers(1))
    connection.send(Response(1, 200, PLAIN, b"x" * 100))
    events = feed(connection, peer.ping(b"short"), peer.headers(3))
    assert [type(e) for e in events] == [Refusal]
    connection.send(Response(1, 200, PLAIN, b"x"))
    connection.shutdown()
    connection.replenish()
    connection.acknowledge(1, 1)
    assert connection.unsent(1) == connection.open_streams == 0
    assert peer.ended_with(connection, events) == ErrorCode.FRAME_SIZE_ERROR


@pytest.mark.parametrize(
    "raw",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\r",
        b"\x16\x03\x01",
        b"PRJ",
    ],
)
def test_a_bad_preface_is_closed_without_a_word(raw: bytes) -> None:
    for size in (1, len(raw)):
        connection = Http2Connection()
        events: list[Event] = []
        for start in range(0, len(raw), size):
            events += peer.received(connection, raw[start : start + size])
        (refusal,) = events
        assert isinstance(refusal, Refusal)
        assert refusal[:2] == (0, None)
        assert peer.is_closed(connection)
        assert connection.data_to_send() == []


def test_what_the_server_says_first() -> None:
    connection = Http2Connection(WireLimits(max_head_size=1000, max_streams=7))
    assert peer.is_midway(connection)
    first, second = sent(connection)
    assert first == peer.settings((1, 4096), (3, 7), (4, 2**20), (5, 65536), (6, 1000))
    assert second == peer.window_update(0, 2**31 - 65536)
    assert peer.received(connection, PREFACE) == []
    assert peer.is_midway(connection)
    assert feed(connection, peer.settings((1, 10))) == []
    assert not peer.is_midway(connection)
    assert sent(connection) == [peer.SETTINGS_ACK]
    assert connection.last_stream_id == 0


# --- any way in which bytes arrive ---------------------------------------------------

EVERYTHING = PREFACE + peer.joined(
    [
        peer.settings((3, 100), (4, 70_000), (0x99, 5)),
        peer.window_update(0, 1000),
        peer.SETTINGS_ACK,
        peer.headers(1),
        peer.ping(),
        peer.open_headers(3, *POST, (b"cookie", b"a"), (b"cookie", b"b")),
        peer.data(3, b"\x03abc\0\0\0", 8),
        peer.headers(5, flags=END_STREAM)._replace(payload=b"\x82"),
        peer.continuation(5, b"", 0),
        peer.continuation(5, peer.literals(*GET[1:])),
        peer.Frame(0xBB, 0xFF, 3, b"unknown"),
        peer.data(3, b"x" * 300),
        peer.Frame(2, 0, 9, b"\0\0\0\1\xff"),
        peer.headers(3, (b"x-sum", b"1")),
        peer.rst_stream(5),
        peer.goaway(),
        peer.open_headers(7, *POST, (b"content-length", b"5")),
        peer.last_data(7, b"hello"),
        peer.open_headers(9),
        peer.last_data(11),
    ]
)


def everything(pieces: list[bytes]) -> tuple[list[Event], list[peer.Frame]]:
    connection = Http2Connection()
    events: list[Event] = []
    for piece in pieces:
        events += merged(peer.received(connection, piece))
    return merged(events), sent(connection)


def test_one_byte_at_a_time() -> None:
    whole = everything([EVERYTHING])
    assert [type(e).__name__ for e in whole[0]] == [
        "Request",
        "EndOfMessage",
        "Request",
        "Data",
        "Request",
        "EndOfMessage",
        "Data",
        "EndOfMessage",
        "Reset",
        "Request",
        "Data",
        "EndOfMessage",
        "Request",
        "Refusal",
    ]
    assert whole[0][3] == Data(3, b"abc")
    assert whole == everything([bytes([byte]) for byte in EVERYTHING])


@given(st.lists(st.integers(0, len(EVERYTHING)), max_size=12))
@settings(max_examples=150, deadline=None)
def test_any_pieces(cuts: list[int]) -> None:
    bounds = [0, *sorted(cuts), len(EVERYTHING)]
    pieces = [EVERYTHING[a:b] for a, b in itertools.pairwise(bounds)]
    assert everything(pieces) == everything([EVERYTHING])


def test_error_codes_have_the_numbers_of_the_rfc() -> None:
    assert [code.value for code in ErrorCode] == list(range(14))
    assert ErrorCode(0xB).name == "ENHANCE_YOUR_CALM"
    assert struct.pack(">L", ErrorCode.CANCEL) == b"\0\0\0\x08"
