"""What a client may send in HTTP/2, frame by frame, and what breaking a rule costs.

Every case is a list of frames and what becomes of them: accepted, a stream error or a
connection error with its code (RFC 9113 5.4). Each is fed whole and one byte at a time.
"""

from __future__ import annotations

import struct
from typing import TypeAlias

import pytest

from kserve_lite.wire.events import (
    Data,
    EndOfMessage,
    Event,
    Refusal,
    Request,
    Reset,
    Response,
)
from kserve_lite.wire.frames import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HAS_PRIORITY,
    HEADERS,
    PADDED,
    PING,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
)
from kserve_lite.wire.http2 import PREFACE, ErrorCode, Http2Connection
from kserve_lite.wire.limits import WireLimits
from tests.wire import http2_client as peer
from tests.wire.http2_client import (
    GET,
    POST,
    Frame,
    continuation,
    data,
    headers,
    last_data,
    literals,
    open_headers,
    ping,
    rst_stream,
    settings,
    window_update,
)

PROTOCOL_ERROR = ErrorCode.PROTOCOL_ERROR
FLOW_CONTROL_ERROR = ErrorCode.FLOW_CONTROL_ERROR
STREAM_CLOSED = ErrorCode.STREAM_CLOSED
FRAME_SIZE_ERROR = ErrorCode.FRAME_SIZE_ERROR
COMPRESSION_ERROR = ErrorCode.COMPRESSION_ERROR
ENHANCE_YOUR_CALM = ErrorCode.ENHANCE_YOUR_CALM

# Stream 0 stands for the connection.
Fault: TypeAlias = tuple[int, ErrorCode]
Case: TypeAlias = tuple[list[Frame], Fault | None]

ANSWER = Frame(0xF0, 0, 0)  # a mark: here the server answers what is complete
BLOCK = literals(*GET)
PRIORITY_FIELDS = b"\x80\0\0\x63\x10"
MOST = 2**31 - 1

ACCEPTED: dict[str, list[Frame]] = {
    "priority on any stream": [
        Frame(PRIORITY, 0, 1, PRIORITY_FIELDS),
        Frame(PRIORITY, 0, 5, b"\0\0\0\3\0"),
        headers(3),
        Frame(PRIORITY, 0, 3, PRIORITY_FIELDS),
        ANSWER,
        Frame(PRIORITY, 0, 3, PRIORITY_FIELDS),
        Frame(PRIORITY, 0, 2, PRIORITY_FIELDS),
    ],
    "headers with priority": [
        Frame(
            HEADERS, END_HEADERS | END_STREAM | HAS_PRIORITY, 1, PRIORITY_FIELDS + BLOCK
        )
    ],
    "headers with priority and padding": [
        Frame(
            HEADERS,
            END_HEADERS | END_STREAM | HAS_PRIORITY | PADDED,
            1,
            b"\x02" + PRIORITY_FIELDS + BLOCK + b"\0\0",
        )
    ],
    "unknown frames": [Frame(0x0A, 0xFF, 0), Frame(0xFF, 1, 7, b"x" * 100)],
    "unknown flags": [
        Frame(HEADERS, END_HEADERS | END_STREAM | 0xD2, 1, BLOCK),
        Frame(PING, 0xFE, 0, b"12345678"),
        Frame(WINDOW_UPDATE, 0xFF, 0, b"\0\0\0\1"),
    ],
    "unknown settings": [settings((0, 1), (7, 5), (0x99, 2**32 - 1))],
    "the reserved bit of a stream": [headers(2**31 + 1)],
    "the reserved bit of an increment": [window_update(0, 2**31 + 1)],
    "settings at their bounds": [
        settings((1, 0), (2, 0), (3, 0), (4, 0), (5, 2**14), (6, 0)),
        settings((1, 2**32 - 1), (2, 1), (4, MOST), (5, 2**24 - 1), (6, 2**32 - 1)),
    ],
    "repeated settings": [settings((4, 5), (4, 7))],
    "no settings at all": [settings()],
    "an unasked ack": [settings(flags=ACK), ping(flags=ACK)],
    "ids that leave gaps": [headers(1), headers(9), headers(11)],
    "the last id": [headers(MOST)],
    "continuation": [
        headers(1, flags=END_STREAM)._replace(payload=BLOCK[:10]),
        continuation(1, BLOCK[10:20], 0),
        continuation(1, b"", 0),
        continuation(1, BLOCK[20:]),
    ],
    "window update and reset after the end": [
        headers(1),
        window_update(1, 5),
        ANSWER,
        window_update(1, 5),
        window_update(1, 0),
        rst_stream(1),
        rst_stream(1),
    ],
    "frames on a stream that was answered early": [
        open_headers(1),
        ANSWER,
        data(1, b"abc"),
        data(1, b"\x01x\0", PADDED),
        headers(1, (b"x-a", b"b")),
        window_update(1, 5),
        rst_stream(1),
    ],
    "a goaway of the client, and what it still sends": [peer.goaway(2, 99), headers(1)],
    "an empty body": [open_headers(1), last_data(1)],
    "an empty padded body": [
        open_headers(1),
        Frame(DATA, END_STREAM | PADDED, 1, b"\0"),
    ],
    "padding that fills the frame": [
        open_headers(1),
        Frame(DATA, END_STREAM | PADDED, 1, b"\x05" + bytes(5)),
    ],
    "the largest frame": [open_headers(1), last_data(1, b"x" * 65536)],
    "a window opened to its most": [
        headers(1),
        window_update(1, MOST - 65535),
        window_update(0, MOST - 65535),
    ],
    "goaway with words": [Frame(GOAWAY, 0, 0, bytes(8) + b"bye")],
}

CONNECTION_ERRORS: dict[str, tuple[list[Frame], ErrorCode]] = {
    # RFC 9113 4.2 and section 6: sizes
    "a frame too large": ([open_headers(1), data(1, b"x" * 65537)], FRAME_SIZE_ERROR),
    "unknown frame too large": ([Frame(99, 0, 0, b"x" * 65537)], FRAME_SIZE_ERROR),
    "short settings": ([Frame(SETTINGS, 0, 0, b"12345")], FRAME_SIZE_ERROR),
    "an ack with settings": ([settings((1, 1), flags=ACK)], FRAME_SIZE_ERROR),
    "short ping": ([ping(b"1234567")], FRAME_SIZE_ERROR),
    "long ping": ([ping(b"123456789")], FRAME_SIZE_ERROR),
    "short goaway": ([Frame(GOAWAY, 0, 0, b"1234567")], FRAME_SIZE_ERROR),
    "short window update": ([Frame(WINDOW_UPDATE, 0, 0, b"123")], FRAME_SIZE_ERROR),
    "long window update": ([Frame(WINDOW_UPDATE, 0, 0, b"12345")], FRAME_SIZE_ERROR),
    "short reset": ([headers(1), Frame(RST_STREAM, 0, 1, b"123")], FRAME_SIZE_ERROR),
    "short priority": ([Frame(PRIORITY, 0, 1, b"1234")], FRAME_SIZE_ERROR),
    "headers without room for the priority": (
        [Frame(HEADERS, END_HEADERS | HAS_PRIORITY, 1, b"1234")],
        FRAME_SIZE_ERROR,
    ),
    "padded headers without padding": (
        [Frame(HEADERS, END_HEADERS | PADDED, 1)],
        FRAME_SIZE_ERROR,
    ),
    "padded data without padding": (
        [open_headers(1), data(1, b"", PADDED)],
        FRAME_SIZE_ERROR,
    ),
    "more padding than data": (
        [open_headers(1), data(1, b"\x03ab", PADDED)],
        PROTOCOL_ERROR,
    ),
    "more padding than headers": (
        [Frame(HEADERS, END_HEADERS | PADDED, 1, b"\xff" + BLOCK)],
        PROTOCOL_ERROR,
    ),
    "padding over the priority": (
        [Frame(HEADERS, END_HEADERS | PADDED | HAS_PRIORITY, 1, b"\x05123456789")],
        FRAME_SIZE_ERROR,
    ),
    # Stream 0, and streams where none belongs
    "data on 0": ([data(0, b"x")], PROTOCOL_ERROR),
    "headers on 0": ([headers(0)], PROTOCOL_ERROR),
    "headers with more to come on 0": ([headers(0, flags=0)], PROTOCOL_ERROR),
    "priority on 0": ([Frame(PRIORITY, 0, 0, PRIORITY_FIELDS)], PROTOCOL_ERROR),
    "reset on 0": ([rst_stream(0)], PROTOCOL_ERROR),
    "continuation on 0": ([continuation(0, b"")], PROTOCOL_ERROR),
    "settings on a stream": ([Frame(SETTINGS, 0, 1)], PROTOCOL_ERROR),
    "ping on a stream": ([Frame(PING, 0, 1, b"12345678")], PROTOCOL_ERROR),
    "goaway on a stream": ([Frame(GOAWAY, 0, 1, bytes(8))], PROTOCOL_ERROR),
    # RFC 9113 5.1 and 5.1.1: idle, even, decreasing and closed streams
    "data on an idle stream": ([data(1, b"x")], PROTOCOL_ERROR),
    "reset of an idle stream": ([rst_stream(1)], PROTOCOL_ERROR),
    "window of an idle stream": ([window_update(1, 1)], PROTOCOL_ERROR),
    "window of an even stream": ([headers(3), window_update(2, 1)], PROTOCOL_ERROR),
    "an even stream": ([headers(2)], PROTOCOL_ERROR),
    "an even stream, in two frames": ([headers(2, flags=0)], PROTOCOL_ERROR),
    "data on an even stream": ([headers(3), data(2, b"x")], PROTOCOL_ERROR),
    "a smaller id": ([headers(5), headers(3)], PROTOCOL_ERROR),
    "data on a stream passed over": ([headers(5), data(3, b"x")], PROTOCOL_ERROR),
    "headers after everything": ([headers(1), ANSWER, headers(1)], STREAM_CLOSED),
    "data after everything": ([headers(1), ANSWER, data(1, b"x")], STREAM_CLOSED),
    "data after a reset": (
        [open_headers(1), rst_stream(1), data(1, b"x")],
        STREAM_CLOSED,
    ),
    "headers after a reset": (
        [open_headers(1), rst_stream(1), headers(1)],
        STREAM_CLOSED,
    ),
    "a stream depends on itself": (
        [Frame(PRIORITY, 0, 5, b"\x80\0\0\5\0")],
        PROTOCOL_ERROR,
    ),
    "headers depend on themselves": (
        [Frame(HEADERS, END_HEADERS | HAS_PRIORITY, 1, b"\0\0\0\1\0" + BLOCK)],
        PROTOCOL_ERROR,
    ),
    # RFC 9113 6.5.2
    "push is neither on nor off": ([settings((2, 2))], PROTOCOL_ERROR),
    "a window too large": ([settings((4, 2**31))], FLOW_CONTROL_ERROR),
    "frames too small": ([settings((5, 2**14 - 1))], PROTOCOL_ERROR),
    "frames too large": ([settings((5, 2**24))], PROTOCOL_ERROR),
    "settings that overflow a window": (
        [headers(1), window_update(1, MOST - 65535), settings((4, 65536))],
        FLOW_CONTROL_ERROR,
    ),
    # RFC 9113 6.6, 6.9, 6.10
    "push": (
        [Frame(PUSH_PROMISE, END_HEADERS, 1, b"\0\0\0\2" + BLOCK)],
        PROTOCOL_ERROR,
    ),
    "the connection's window opens by nothing": ([window_update(0, 0)], PROTOCOL_ERROR),
    "the connection's window overflows": (
        [window_update(0, MOST - 65534)],
        FLOW_CONTROL_ERROR,
    ),
    "continuation of nothing": ([continuation(1, BLOCK)], PROTOCOL_ERROR),
    "continuation after the end": (
        [headers(1), continuation(1, BLOCK)],
        PROTOCOL_ERROR,
    ),
    "a frame within headers": ([headers(1, flags=0), ping()], PROTOCOL_ERROR),
    "an unknown frame within headers": (
        [headers(1, flags=0), Frame(99, 0, 1)],
        PROTOCOL_ERROR,
    ),
    "other headers within headers": ([headers(1, flags=0), headers(3)], PROTOCOL_ERROR),
    "continuation of another stream": (
        [headers(1, flags=0), continuation(3, b"")],
        PROTOCOL_ERROR,
    ),
    # RFC 7541: each ends the compression's state
    "index 0": ([Frame(HEADERS, END_HEADERS, 1, b"\x80")], COMPRESSION_ERROR),
    "an index beyond the tables": (
        [Frame(HEADERS, END_HEADERS, 1, b"\xbe")],
        COMPRESSION_ERROR,
    ),
    "a string cut short": (
        [Frame(HEADERS, END_HEADERS, 1, b"\0\x05ab")],
        COMPRESSION_ERROR,
    ),
    "bad Huffman code": (
        [Frame(HEADERS, END_HEADERS, 1, b"\0\x84\xff\xff\xff\xff\0")],
        COMPRESSION_ERROR,
    ),
    "Huffman padding of 8 bits": (
        [Frame(HEADERS, END_HEADERS, 1, b"\0\x82\x1f\xff\0")],
        COMPRESSION_ERROR,
    ),
    "a table size too large": (
        [Frame(HEADERS, END_HEADERS, 1, b"\x3f\xe2\x1f" + BLOCK)],
        COMPRESSION_ERROR,
    ),
    "a table size late in the block": (
        [Frame(HEADERS, END_HEADERS, 1, BLOCK + b"\x20")],
        COMPRESSION_ERROR,
    ),
    "an endless integer": (
        [Frame(HEADERS, END_HEADERS, 1, b"\xff" + b"\x80" * 20)],
        COMPRESSION_ERROR,
    ),
    "bad trailers": (
        [open_headers(1), Frame(HEADERS, END_HEADERS | END_STREAM, 1, b"\xbe")],
        COMPRESSION_ERROR,
    ),
    "a bad block on a stream that is over": (
        [open_headers(1), ANSWER, Frame(HEADERS, END_HEADERS, 1, b"\xbe")],
        COMPRESSION_ERROR,
    ),
    "too many table sizes": (
        [Frame(HEADERS, END_HEADERS, 1, b"\x3f\xe1\x1f\x20\x20" + BLOCK)],
        ENHANCE_YOUR_CALM,
    ),
}

STREAM_ERRORS: dict[str, tuple[list[Frame], ErrorCode]] = {
    # RFC 9113 5.1: half-closed (remote)
    "data after the end": ([headers(1), data(1, b"x")], STREAM_CLOSED),
    "empty data after the end": ([headers(1), last_data(1)], STREAM_CLOSED),
    "trailers after the end": ([headers(1), headers(1, (b"a", b"b"))], STREAM_CLOSED),
    "headers after the end": ([headers(1), headers(1)], STREAM_CLOSED),
    # RFC 9113 6.3, 6.9
    "short priority on an open stream": (
        [open_headers(1), Frame(PRIORITY, 0, 1, b"1234")],
        FRAME_SIZE_ERROR,
    ),
    "a stream's window opens by nothing": (
        [headers(1), window_update(1, 0)],
        PROTOCOL_ERROR,
    ),
    "a stream's window overflows": (
        [headers(1), window_update(1, MOST - 65534)],
        FLOW_CONTROL_ERROR,
    ),
    # RFC 9113 8.1
    "trailers that do not end": (
        [open_headers(1), open_headers(1, (b"a", b"b"))],
        PROTOCOL_ERROR,
    ),
    "trailers with a pseudo-header": (
        [open_headers(1), headers(1, (b":path", b"/"))],
        PROTOCOL_ERROR,
    ),
    "the same head again": ([open_headers(1), open_headers(1)], PROTOCOL_ERROR),
    "trailers with upper case": (
        [open_headers(1), headers(1, (b"A", b"b"))],
        PROTOCOL_ERROR,
    ),
    "trailers of the connection": (
        [open_headers(1), headers(1, (b"connection", b"close"))],
        PROTOCOL_ERROR,
    ),
    # RFC 9113 8.1.1: content-length
    "less than announced": (
        [open_headers(1, *POST, (b"content-length", b"3")), last_data(1, b"ab")],
        PROTOCOL_ERROR,
    ),
    "more than announced": (
        [open_headers(1, *POST, (b"content-length", b"3")), data(1, b"abcd")],
        PROTOCOL_ERROR,
    ),
    "more than announced, in two": (
        [
            open_headers(1, *POST, (b"content-length", b"3")),
            data(1, b"abc"),
            data(1, b"d"),
        ],
        PROTOCOL_ERROR,
    ),
    "nothing of what was announced": (
        [headers(1, *POST, (b"content-length", b"3"))],
        PROTOCOL_ERROR,
    ),
    "trailers before what was announced": (
        [
            open_headers(1, *POST, (b"content-length", b"3")),
            data(1, b"ab"),
            headers(1, (b"a", b"b")),
        ],
        PROTOCOL_ERROR,
    ),
}


def run(connection: Http2Connection, frames: list[Frame], step: int) -> list[Event]:
    """Feed frames in pieces of `step` bytes; answer where the case says so."""
    events: list[Event] = []
    for frame in frames:
        if frame is ANSWER:
            for stream_id in tuple(connection._streams):
                connection.send(Response(stream_id, 200, (), b""))
            peer.sent(connection)
            continue
        raw = bytes(frame)
        for start in range(0, len(raw), step):
            events += peer.received(connection, raw[start : start + step])
    return peer.merged(events)


def steps(frames: list[Frame]) -> tuple[int, ...]:
    large = any(len(frame.payload) > 1000 for frame in frames)
    return (2**20, 20_000) if large else (2**20, 1, 7)


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str) -> None:
    for step in steps(ACCEPTED[name]):
        connection = peer.started()
        events = run(connection, ACCEPTED[name], step)
        assert {type(event) for event in events}.isdisjoint((Refusal, Reset))
        assert not peer.is_midway(connection)
        kinds = [frame.kind for frame in peer.sent(connection)]
        assert RST_STREAM not in kinds
        assert GOAWAY not in kinds


@pytest.mark.parametrize("name", CONNECTION_ERRORS)
def test_connection_errors(name: str) -> None:
    frames, code = CONNECTION_ERRORS[name]
    for step in steps(frames):
        connection = peer.started()
        events = run(connection, frames, step)
        assert peer.ended_with(connection, events) == code


@pytest.mark.parametrize("name", STREAM_ERRORS)
def test_stream_errors(name: str) -> None:
    frames, code = STREAM_ERRORS[name]
    for step in steps(frames):
        connection = peer.started()
        events = run(connection, frames, step)
        told = any(isinstance(event, Request) for event in events)
        assert told == (name != "nothing of what was announced")
        if told:
            assert events[-1] == Reset(1, code)
        assert peer.sent(connection) == [rst_stream(1, code)]
        assert connection.open_streams == 0
        # Late frames are dropped, and the next request is served.
        late = [data(1, b"x"), headers(1, (b"a", b"b")), window_update(1, 1)]
        after = run(connection, [*late, headers(3)], step)
        assert [type(event) for event in after] == [Request, EndOfMessage]


@pytest.mark.parametrize(
    "first",
    [
        ping(),
        headers(1),
        settings(flags=ACK),
        window_update(0, 1),
        Frame(SETTINGS, 0, 1),
        Frame(99, 0, 0),
    ],
)
def test_settings_come_first(first: Frame) -> None:
    connection = Http2Connection()
    events = peer.received(connection, PREFACE + bytes(first))
    assert peer.ended_with(connection, events) == PROTOCOL_ERROR


def test_a_goaway_says_what_was_accepted_and_repeats_nothing() -> None:
    connection = peer.started()
    run(connection, [headers(1), headers(5), headers(7, (b"bad", b"s3cr3t"))], 99)
    peer.sent(connection)
    events = run(connection, [Frame(HEADERS, END_HEADERS, 9, b"\0\x06s3cr3t\xff")], 99)
    (refusal,) = events
    assert isinstance(refusal, Refusal)
    (frame,) = peer.sent(connection)
    assert struct.unpack(">LL", frame.payload[:8]) == (5, COMPRESSION_ERROR)
    assert frame.payload[8:].decode() == refusal.reason
    assert "s3cr3t" not in refusal.reason


def test_streams_beyond_the_limit_are_refused_unprocessed() -> None:
    connection = peer.started(WireLimits(max_streams=2))
    events = run(connection, [headers(1), open_headers(3), open_headers(5)], 999)
    assert [e.stream_id for e in events if isinstance(e, Request)] == [1, 3]
    assert peer.sent(connection) == [rst_stream(5, ErrorCode.REFUSED_STREAM)]
    assert run(connection, [last_data(5, b"x"), last_data(3, b"x")], 999) == [
        Data(3, b"x"),
        EndOfMessage(3),
    ]
    connection.send(Response(1, 200, (), b""))
    peer.sent(connection)
    assert next(type(e) for e in run(connection, [headers(7)], 999)) is Request
    assert connection.last_stream_id == 7


def test_the_compression_goes_on_over_refused_and_failed_streams() -> None:
    """RFC 9113 4.3: a block that is not wanted still changes the dynamic table."""
    indexed = b"\x40\x03x-a\x01b"  # inserts x-a: b
    connection = peer.started(WireLimits(max_streams=1))
    run(connection, [headers(1)], 99)
    refused = literals(*GET) + indexed
    run(connection, [Frame(HEADERS, END_HEADERS | END_STREAM, 3, refused)], 99)
    connection.send(Response(1, 200, (), b""))
    peer.sent(connection)
    malformed = literals(*GET) + b"\x40\x03x-a\x01c\0\x01A\x01b"
    run(connection, [Frame(HEADERS, END_HEADERS | END_STREAM, 5, malformed)], 99)
    both = literals(*GET) + b"\xbe\xbf"  # the newest and the one before
    events = run(connection, [Frame(HEADERS, END_HEADERS | END_STREAM, 7, both)], 99)
    assert isinstance(events[0], Request)
    assert events[0].headers.raw[1:] == ((b"x-a", b"c"), (b"x-a", b"b"))


def test_an_unfinished_block_is_mid_frame() -> None:
    connection = peer.started()
    assert not peer.is_midway(connection)
    run(connection, [headers(1, flags=0)], 99)
    assert peer.is_midway(connection)
    run(connection, [Frame(CONTINUATION, END_HEADERS, 1)], 99)
    assert not peer.is_midway(connection)
    peer.received(connection, b"\0")
    assert peer.is_midway(connection)


def test_settings_and_pings_are_answered_in_order() -> None:
    connection = peer.started()
    run(connection, [settings((3, 1)), ping(b"abcdefgh"), settings()], 99)
    assert peer.sent(connection) == [
        settings(flags=ACK),
        ping(b"abcdefgh", ACK),
        settings(flags=ACK),
    ]
