"""Random frame sequences, told to our server and to that of the `h2` package.

After each frame both must say the same: accepted, with the same events; a stream error;
or a connection error. Where they may differ stands in a table, with the reason.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import hpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HAS_PRIORITY,
    HEADERS,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
)
from kserve_lite.wire.http2 import Http2Connection
from tests.wire import http2_client as peer
from tests.wire.http2_client import GET, POST, Field, Frame, literals

BLOCK = literals(*GET)
POST_BLOCK = literals(*POST)
FIVE = literals(*POST, (b"content-length", b"5"))
WHOLE = END_HEADERS | END_STREAM
FIELDS: dict[str, tuple[Field, ...]] = {
    "no method": GET[1:],
    "no path": (*GET[:2], GET[3]),
    "no authority": GET[:3],
    "two paths": (*GET, GET[2]),
    "a status": (*GET, (b":status", b"200")),
    "a late pseudo-header": (GET[0], (b"x", b"y"), *GET[1:]),
    "upper case": (*GET, (b"X", b"y")),
    "connection": (*GET, (b"connection", b"close")),
    "te": (*GET, (b"te", b"gzip")),
    "te trailers": (*GET, (b"te", b"trailers")),
    "another host": (*GET, (b"host", b"b")),
    "the same host": (*GET, (b"host", b"a")),
    "host alone": (*GET[:3], (b"host", b"a")),
    "an empty path": (*GET[:2], (b":path", b""), GET[3]),
    "an unknown pseudo-header": (*GET, (b":x", b"y")),
    "blanks around a value": (*GET, (b"x", b" y")),
    "cookies": (*GET, (b"cookie", b"a=1"), (b"cookie", b"b=2")),
}


def one_of(fields: tuple[Field, ...], stream_id: int) -> Frame:
    return peer.headers(stream_id, *fields)


MAKERS: dict[str, Callable[[int], Frame]] = {
    "request": lambda s: Frame(HEADERS, WHOLE, s, BLOCK),
    "request with body": lambda s: Frame(HEADERS, END_HEADERS, s, POST_BLOCK),
    "request of 5 bytes": lambda s: Frame(HEADERS, END_HEADERS, s, FIVE),
    "request with priority": lambda s: Frame(
        HEADERS, WHOLE | HAS_PRIORITY, s, b"\0\0\0\x63\0" + BLOCK
    ),
    "padded request": lambda s: Frame(
        HEADERS, WHOLE | PADDED, s, b"\x03" + BLOCK + bytes(3)
    ),
    "begun request": lambda s: Frame(HEADERS, END_STREAM, s, BLOCK[:9]),
    "rest of request": lambda s: peer.continuation(s, BLOCK[9:]),
    "some of request": lambda s: peer.continuation(s, b"", 0),
    "trailers": lambda s: peer.headers(s, (b"x", b"y")),
    "open trailers": lambda s: peer.open_headers(s, (b"x", b"y")),
    "bad index": lambda s: Frame(HEADERS, WHOLE, s, b"\xbe"),
    "insertion": lambda s: Frame(HEADERS, WHOLE, s, BLOCK + b"\x40\x01x\x01y"),
    "data": lambda s: peer.data(s, b"abc"),
    "last data": lambda s: peer.last_data(s, b"de"),
    "empty data": peer.data,
    "empty last data": peer.last_data,
    "padded data": lambda s: Frame(0, PADDED, s, b"\x02ab\0\0"),
    "overpadded data": lambda s: Frame(0, PADDED, s, b"\x05ab\0\0"),
    "large data": lambda s: peer.data(s, bytes(60_000)),
    "too large data": lambda s: peer.data(s, bytes(65_537)),
    "reset": peer.rst_stream,
    "short reset": lambda s: Frame(RST_STREAM, 0, s, b"abc"),
    "priority": lambda s: Frame(PRIORITY, 0, s, b"\0\0\0\x63\0"),
    "priority on itself": lambda s: Frame(PRIORITY, 0, s, s.to_bytes(4, "big") + b"\0"),
    "short priority": lambda s: Frame(PRIORITY, 0, s, b"\0\0\0\x63"),
    "window": lambda s: peer.window_update(s, 10),
    "no window": lambda s: peer.window_update(s, 0),
    "huge window": lambda s: peer.window_update(s, 2**31 - 1),
    "short window": lambda s: Frame(WINDOW_UPDATE, 0, s, b"abc"),
    "settings": lambda _: peer.settings((3, 5), (4, 70_000), (0x77, 1)),
    "settings on a stream": lambda s: Frame(SETTINGS, 0, s),
    "odd settings": lambda _: Frame(SETTINGS, 0, 0, b"abcde"),
    "push settings": lambda _: peer.settings((2, 3)),
    "huge window settings": lambda _: peer.settings((4, 2**31)),
    "small frame settings": lambda _: peer.settings((5, 100)),
    "ack with settings": lambda _: peer.settings((3, 5), flags=1),
    "ping": lambda _: peer.ping(),
    "ping on a stream": lambda s: Frame(PING, 0, s, bytes(8)),
    "short ping": lambda _: peer.ping(b"abc"),
    "goaway": lambda _: peer.goaway(),
    "goaway on a stream": lambda s: Frame(GOAWAY, 0, s, bytes(8)),
    "short goaway": lambda _: Frame(GOAWAY, 0, 0, b"abc"),
    "push": lambda s: Frame(PUSH_PROMISE, END_HEADERS, s, b"\0\0\0\x02" + BLOCK),
    "unknown": lambda s: Frame(0xBB, 0xFF, s, b"abc"),
    **{name: functools.partial(one_of, fields) for name, fields in FIELDS.items()},
}
ANSWER = "the server answers"

Happening: TypeAlias = tuple[str, int, bytes]


class Verdict(NamedTuple):
    """What a server makes of one frame."""

    fault: str  # "none", "stream" or "connection"
    happened: tuple[Happening, ...] = ()


class Ours:
    """Our server as a judge of frames."""

    def __init__(self) -> None:
        self.connection = Http2Connection()
        peer.received(
            self.connection, PREFACE + peer.joined([peer.settings(), peer.SETTINGS_ACK])
        )
        peer.sent(self.connection)

    def judge(self, raw: bytes) -> Verdict:
        return self.verdict(peer.merged(peer.received(self.connection, raw)))

    def verdict(self, events: list[Event]) -> Verdict:
        out = peer.sent(self.connection)
        failed = {f.stream_id for f in out if f.kind == RST_STREAM}
        happened: list[Happening] = []
        for event in events:
            if isinstance(event, Refusal):
                return Verdict("connection")
            if isinstance(event, Request):
                happened.append(("request", event.stream_id, event.target.encode()))
            elif isinstance(event, Data):
                happened.append(("data", event.stream_id, bytes(event.data)))
            elif isinstance(event, EndOfMessage):
                happened.append(("end", event.stream_id, b""))
            elif isinstance(event, Reset) and event.stream_id not in failed:
                happened.append(("reset", event.stream_id, b""))
        if failed:
            return Verdict("stream")
        return Verdict("none", tuple(happened))

    def answer(self) -> None:
        for stream_id in tuple(self.connection._streams):
            self.connection.send(Response(stream_id, 200, (), b""))
        peer.sent(self.connection)


class Theirs:
    """The server of `h2` as a judge of frames."""

    def __init__(self) -> None:
        config = h2.config.H2Configuration(client_side=False, header_encoding=None)
        self.connection = h2.connection.H2Connection(config)
        codes = h2.settings.SettingCodes
        self.connection.local_settings = h2.settings.Settings(
            client=False,
            initial_values={
                codes.MAX_CONCURRENT_STREAMS: 256,
                codes.INITIAL_WINDOW_SIZE: 2**20,
                codes.MAX_FRAME_SIZE: 65_536,
                codes.MAX_HEADER_LIST_SIZE: 65_536,
            },
        )
        self.connection.max_inbound_frame_size = 65_536
        self.connection.initiate_connection()
        self.connection.increment_flow_control_window(2**31 - 1 - 65_535)
        self.connection.receive_data(
            PREFACE + peer.joined([peer.settings(), peer.SETTINGS_ACK])
        )
        self.connection.data_to_send()
        self.live: set[int] = set()
        self.open: set[int] = set()

    def judge(self, raw: bytes) -> Verdict:
        try:
            events = self.connection.receive_data(raw)
        except (h2.exceptions.ProtocolError, hpack.HPACKError):
            return Verdict("connection")
        failed = {
            frame.stream_id
            for frame in peer.parse(self.connection.data_to_send())
            if frame.kind == RST_STREAM
        }
        happened: list[Happening] = []
        for event in events:
            self.note(event, happened)
        self.live -= failed
        self.open -= failed
        if failed:
            return Verdict("stream")
        return Verdict("none", tuple(happened))

    def note(self, event: h2.events.Event, happened: list[Happening]) -> None:
        if isinstance(event, h2.events.RequestReceived):
            path = dict(event.headers or ())[b":path"]
            happened.append(("request", event.stream_id or 0, bytes(path)))
            self.live.add(event.stream_id or 0)
            self.open.add(event.stream_id or 0)
        elif isinstance(event, h2.events.DataReceived) and event.data:
            happened.append(("data", event.stream_id or 0, event.data))
        elif isinstance(event, h2.events.StreamEnded):
            happened.append(("end", event.stream_id or 0, b""))
            self.open.discard(event.stream_id or 0)
        elif isinstance(event, h2.events.StreamReset) and event.stream_id in self.live:
            if event.remote_reset:
                happened.append(("reset", event.stream_id, b""))
            self.live.discard(event.stream_id)
            self.open.discard(event.stream_id)

    def answer(self) -> None:
        for stream_id in sorted(self.live):
            self.connection.send_headers(
                stream_id, [(b":status", b"200")], end_stream=True
            )
            if stream_id in self.open:
                self.connection.reset_stream(stream_id, 0)
        self.live.clear()
        self.open.clear()
        self.connection.data_to_send()


class Difference(NamedTuple):
    """A step of which the two think differently, and where our server stood."""

    name: str
    frame: Frame
    ours: Verdict
    theirs: Verdict
    is_live: bool
    was_reset: bool
    is_idle: bool

    @property
    def faults(self) -> tuple[str, str]:
        return self.ours.fault, self.theirs.fault

    @property
    def carries_message(self) -> bool:
        return self.frame.kind in (DATA, HEADERS)


def compare(steps: list[tuple[str, int]]) -> Difference | None:
    """Tell both; return the first step of which they think differently."""
    ours, theirs = Ours(), Theirs()
    for name, stream_id in steps:
        if name == ANSWER:
            ours.answer()
            theirs.answer()
            continue
        frame = MAKERS[name](stream_id)
        past = ours.connection._past
        is_live = frame.stream_id in ours.connection._streams
        was_reset = frame.stream_id in past._resets
        is_idle = frame.stream_id > past.highest or frame.stream_id % 2 == 0
        our, their = ours.judge(bytes(frame)), theirs.judge(bytes(frame))
        if our != their:
            return Difference(name, frame, our, their, is_live, was_reset, is_idle)
        if our.fault == "connection" or frame.kind == GOAWAY:
            return None  # h2 takes a GOAWAY for the end of everything.
    return None


# Where the two may differ, and why ours is right (sections of RFC 9113).
EXCUSES: dict[str, Callable[[Difference], bool]] = {
    "8.1.1: a malformed message is an error of its stream; h2 ends the connection": (
        lambda d: (
            d.faults == ("stream", "connection")
            and d.carries_message
            and (d.is_live or d.is_idle)
        )
    ),
    "6.3 and 6.9: so are these on an open stream": lambda d: (
        d.faults == ("stream", "connection")
        and d.is_live
        and d.name in ("no window", "short priority")
    ),
    "8.1.1: the body is counted when trailers end it, too; h2 does not": lambda d: (
        d.faults == ("stream", "none") and d.is_live and d.name == "trailers"
    ),
    "5.1: DATA on an idle stream ends the connection; h2 resets what is not there": (
        lambda d: (
            d.faults == ("connection", "stream") and d.is_idle and d.frame.kind == DATA
        )
    ),
    "5.1: so may DATA or HEADERS after the peer's own end; h2 resets once more": (
        lambda d: (
            d.faults == ("connection", "stream")
            and d.carries_message
            and not (d.is_live or d.was_reset or d.is_idle)
        )
    ),
    "5.1: frames on a stream that we reset are dropped; h2 resets once more": (
        lambda d: d.faults == ("none", "stream") and d.carries_message and d.was_reset
    ),
    "5.1: WINDOW_UPDATE on a closed stream is dropped; h2 reads it first": lambda d: (
        d.faults == ("none", "connection")
        and d.name == "no window"
        and not (d.is_live or d.is_idle)
    ),
    "6.4: RST_STREAM on an idle stream is an error; h2 drops it": lambda d: (
        d.faults == ("connection", "none") and d.is_idle and d.name == "reset"
    ),
    "5.1.1: HEADERS on no stream of a client; h2 waits for the end of the block": (
        lambda d: (
            d.faults == ("connection", "none")
            and d.is_idle
            and d.frame.kind == HEADERS
            and not d.frame.flags & END_HEADERS
        )
    ),
    "6.10: CONTINUATION of nothing ends the connection, on a closed stream, too": (
        lambda d: d.ours.fault == "connection" and d.frame.kind == CONTINUATION
    ),
}
# What is likely to lead somewhere comes more often.
NAMES = [
    *MAKERS,
    *6 * ["request"],
    *8 * ["request with body"],
    *3 * ["request of 5 bytes"],
    *4 * ["data", "last data", ANSWER],
]


@given(
    st.lists(
        st.tuples(st.sampled_from(NAMES), st.sampled_from([1, 1, 1, 3, 3, 5, 0, 2])),
        max_size=10,
    )
)
@settings(max_examples=400, deadline=None)
def test_h2_judges_alike(steps: list[tuple[str, int]]) -> None:
    difference = compare(steps)
    if difference is not None:
        reasons = [why for why, excuses in EXCUSES.items() if excuses(difference)]
        assert len(reasons) == 1, difference


LEGAL = (
    *3 * ("request", "request with body", "data", "last data", ANSWER),
    "request of 5 bytes",
    "request with priority",
    "padded request",
    "insertion",
    "padded data",
    "empty data",
    "large data",
    "priority",
    "window",
    "settings",
    "ping",
    "cookies",
    "unknown",
)


@pytest.mark.parametrize("seed", range(30))
def test_h2_accepts_the_same_long_conversations(seed: int) -> None:
    """Legal frames, on streams that can take them, and never a difference."""
    chance = random.Random(seed)
    steps: list[tuple[str, int]] = []
    body: dict[int, int] = {}  # what streams with a body have still to send
    last = -1
    for _ in range(150):
        name = chance.choice(LEGAL)
        kind = -1 if name == ANSWER else MAKERS[name](1).kind
        stream_id = 1
        if kind == HEADERS:
            last = stream_id = last + 2
            if name == "request with body":
                body[stream_id] = 900_000
            elif name == "request of 5 bytes":
                steps += [(name, stream_id), ("data", stream_id)]
                name = "last data"
        elif kind == DATA or name in ("priority", "window"):
            if not body:
                continue
            stream_id = chance.choice(list(body))
            body[stream_id] -= 60_000
            if body[stream_id] < 60_000:
                name = "last data"
            if name == "last data":
                del body[stream_id]
        elif name == ANSWER:
            body.clear()
        else:
            stream_id = 0
        steps.append((name, stream_id))
    assert last > 1
    assert compare(steps) is None
