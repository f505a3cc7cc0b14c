"""The other end of an HTTP/2 connection, for the tests: frames by hand, or `h2`."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

import h2.config
import h2.connection
import h2.events

from kserve_lite.wire.events import Buffer, Data, Event, Refusal
from kserve_lite.wire.frames import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
)
from kserve_lite.wire.http2 import Http2Connection
from kserve_lite.wire.limits import WireLimits
from tests.wire.spread import spread

Field = tuple[bytes, bytes]

POST: tuple[Field, ...] = (
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/p"),
    (b":authority", b"a"),
)
GET: tuple[Field, ...] = ((b":method", b"GET"), *POST[1:])


def received(connection: Http2Connection, data: Buffer) -> list[Event]:
    """What bytes mean, with whole requests taken apart."""
    return spread(connection.receive(data))


class Frame(NamedTuple):
    """One frame as it is on the wire."""

    kind: int
    flags: int
    stream_id: int
    payload: bytes = b""

    def __bytes__(self) -> bytes:
        size = struct.pack(">L", len(self.payload))[1:]
        start = size + bytes((self.kind, self.flags))
        return start + struct.pack(">L", self.stream_id) + self.payload


def literals(*fields: Field) -> bytes:
    """A header block that uses no table (RFC 7541 6.2.2)."""
    block = b""
    for name, value in fields:
        block += b"\x00"
        for text in (name, value):
            if len(text) < 127:
                block += bytes((len(text),))
            else:
                rest = len(text) - 127
                block += b"\x7f"
                while rest >= 128:
                    block += bytes((rest % 128 + 128,))
                    rest //= 128
                block += bytes((rest,))
            block += text
    return block


def headers(
    stream_id: int, *fields: Field, flags: int = END_HEADERS | END_STREAM
) -> Frame:
    return Frame(HEADERS, flags, stream_id, literals(*(fields or GET)))


def open_headers(stream_id: int, *fields: Field) -> Frame:
    """A request whose body is to come."""
    return headers(stream_id, *(fields or POST), flags=END_HEADERS)


def continuation(stream_id: int, payload: bytes, flags: int = END_HEADERS) -> Frame:
    return Frame(CONTINUATION, flags, stream_id, payload)


def data(stream_id: int, payload: bytes = b"", flags: int = 0) -> Frame:
    return Frame(DATA, flags, stream_id, payload)


def last_data(stream_id: int, payload: bytes = b"") -> Frame:
    return Frame(DATA, END_STREAM, stream_id, payload)


def settings(*pairs: tuple[int, int], flags: int = 0) -> Frame:
    return Frame(SETTINGS, flags, 0, b"".join(struct.pack(">HL", *p) for p in pairs))


SETTINGS_ACK = settings(flags=ACK)


def window_update(stream_id: int, increment: int) -> Frame:
    return Frame(WINDOW_UPDATE, 0, stream_id, struct.pack(">L", increment))


def rst_stream(stream_id: int, code: int = 8) -> Frame:
    return Frame(RST_STREAM, 0, stream_id, struct.pack(">L", code))


def ping(payload: bytes = b"12345678", flags: int = 0) -> Frame:
    return Frame(PING, flags, 0, payload)


def goaway(code: int = 0, last: int = 0) -> Frame:
    return Frame(GOAWAY, 0, 0, struct.pack(">LL", last, code))


def joined(frames: Iterable[Frame]) -> bytes:
    return b"".join(bytes(frame) for frame in frames)


def parse(raw: bytes) -> list[Frame]:
    """The frames in bytes, which must be complete."""
    frames = []
    while raw:
        size = int.from_bytes(raw[:3], "big")
        (stream_id,) = struct.unpack(">L", raw[5:9])
        assert len(raw) >= 9 + size
        frames.append(Frame(raw[3], raw[4], stream_id, raw[9 : 9 + size]))
        raw = raw[9 + size :]
    return frames


def flat(parts: Iterable[Buffer]) -> bytes:
    return b"".join(bytes(part) for part in parts)


def sent(connection: Http2Connection) -> list[Frame]:
    """All that the server writes now."""
    raw = b""
    while parts := connection.data_to_send():
        raw += flat(parts)
    return parse(raw)


def feed(connection: Http2Connection, *frames: Frame) -> list[Event]:
    return received(connection, joined(frames))


def started(
    limits: WireLimits | None = None, *first: tuple[int, int]
) -> Http2Connection:
    """A server that has said and heard its settings."""
    connection = Http2Connection(limits)
    events = received(connection, PREFACE + joined([settings(*first), SETTINGS_ACK]))
    assert events == []
    sent(connection)
    return connection


def merged(events: Iterable[Event]) -> list[Event]:
    """Events with the pieces of each body as one, since they come in any pieces."""
    found: list[Event] = []
    for event in events:
        if isinstance(event, Data):
            last = found[-1] if found else None
            payload = bytes(event.data)
            if isinstance(last, Data) and last.stream_id == event.stream_id:
                found[-1] = Data(event.stream_id, bytes(last.data) + payload)
            else:
                found.append(Data(event.stream_id, payload))
        else:
            found.append(event)
    return found


def ended_with(connection: Http2Connection, events: list[Event]) -> int:
    """The code of the connection error that ends the events."""
    last = events[-1]
    assert isinstance(last, Refusal)
    assert (last.stream_id, last.status) == (0, None)
    assert connection.closed
    frame = sent(connection)[-1]
    assert frame.kind == GOAWAY
    assert received(connection, bytes(ping())) == []
    assert sent(connection) == []
    return int(struct.unpack(">L", frame.payload[4:8])[0])


def is_closed(connection: Http2Connection) -> bool:
    """As a call, since mypy takes a property to be the same twice."""
    return connection.closed


def is_midway(connection: Http2Connection) -> bool:
    return connection.mid_frame


class Pair:
    """Our server and an `h2` client, joined in memory."""

    def __init__(self, limits: WireLimits | None = None) -> None:
        self.server = Http2Connection(limits)
        self.client = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=True, header_encoding=None)
        )
        self.client.initiate_connection()
        self.run()

    def run(self) -> tuple[list[Event], list[h2.events.Event]]:
        """Carry bytes both ways until nobody has more to say."""
        ours: list[Event] = []
        theirs: list[h2.events.Event] = []
        while True:
            parts = self.server.data_to_send()
            for part in parts:
                theirs += self.client.receive_data(bytes(part))
            raw = self.client.data_to_send()
            if raw:
                ours += received(self.server, raw)
            elif not parts:
                return merged(ours), theirs

    def ask(self, *fields: Field, body: bytes | None = None) -> int:
        """Send a request as far as the windows allow; return its stream."""
        stream_id = self.client.get_next_available_stream_id()
        self.client.send_headers(stream_id, fields or GET, end_stream=body is None)
        if body is not None:
            size = self.client.max_outbound_frame_size
            for start in range(0, len(body), size):
                self.client.send_data(stream_id, body[start : start + size])
            self.client.end_stream(stream_id)
        return stream_id
