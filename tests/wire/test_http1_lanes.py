"""The two lanes of HTTP/1.1 mean the same (DESIGN.md section 5).

Whatever the fast lane accepts, h11 accepts too, with the same method, target, headers,
body and end of message. h11 drops blanks around values and lower-cases names.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TypeAlias

import h11
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kserve_lite.wire.events import (
    ContinueWanted,
    Data,
    EndOfMessage,
    Event,
    RawHeaders,
    Refusal,
    Request,
    Response,
)
from kserve_lite.wire.http1 import STREAM, Http1Connection, _fast_head
from kserve_lite.wire.limits import WireLimits
from tests.wire.spread import spread

Message: TypeAlias = tuple[bytes, bytes, RawHeaders, bytes]

many = settings(
    deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.too_slow]
)

# --- heads that are nearly right ----------------------------------------------------

METHODS = st.sampled_from(
    [
        b"GET",
        b"POST",
        b"HEAD",
        b"PUT",
        b"DELETE",
        b"PATCH",
        b"OPTIONS",
        b"get",
        b"BREW",
        b"CONNECT",
        b"G@T",
        b"",
        b"GET\t",
        b" GET",
    ]
)
TARGETS = st.sampled_from(
    [
        b"/",
        b"/v2/models/m/infer",
        b"/a?b=c&d=%20",
        b"//x",
        b'/"<>\\^`{|}',
        b"/a#b",
        b"http://a/b",
        b"*",
        b"a:80",
        b"/a b",
        b"/\xc3\xa9",
        b"",
        b"/\x7f",
        b"/\0",
    ]
)
VERSIONS = st.sampled_from(
    [
        *10 * [b"HTTP/1.1"],
        b"HTTP/1.0",
        b"HTTP/1.2",
        b"HTTP/2.0",
        b"http/1.1",
        b"HTTP/1.1 ",
        b"HTTP/1.10",
        b"HTTP/01.1",
        b"HTTP1.1",
        b"",
    ]
)
NAMES = st.one_of(
    st.sampled_from([b"Accept", b"x-y", b"X_Y", b"!#$%&'*+-.^_`|~1", b"A", b"te"]),
    st.sampled_from(
        [b"", b"a b", b"x(", b"x\xff", b"x\0", b"\tx", b" x", b"x ", b"x:"]
    ),
)
VALUES = st.one_of(
    st.sampled_from([b"", b"a", b"a  b", b"a\tb", b"a:b", b'"', b"text/html, */*;q=0"]),
    st.sampled_from([b"\xe9", b"a\0", b"a\x0b", b"a\x0c", b"a\rb", b"a\x7f", b"\x01"]),
    st.binary(max_size=5),
)
BLANKS = st.sampled_from([b" ", b" ", b" ", b"", b"\t", b"  \t ", b"\x0b", b"\r"])
AFTER = st.sampled_from([b"", b"", b"", b" ", b"\t \t", b"\x0c"])
LINE_ENDS = st.sampled_from([*20 * [b"\r\n"], b"\n", b"\r\n ", b"\r\r\n", b"\r\n\t"])
LENGTHS = st.sampled_from(
    [
        b"0",
        b"1",
        b"5",
        b"12",
        b"007",
        b"00000000000000000000",
        b"99999999999999",
        b"+1",
        b"-1",
        b"1,1",
        b"1, 2",
        b"1 1",
        b"0x1",
        b"1e1",
        b"\xb2",
        b"1_0",
        b"",
        b"9" * 15,
        b"9" * 16,
        b"9" * 20,
        b"9" * 21,
    ]
)
OPTIONS = st.sampled_from(
    [
        b"close",
        b"keep-alive",
        b"Keep-Alive, te",
        b"CLOSE",
        b"te,close",
        b"close,",
        b" ,",
        b"closed",
        b"te ; close",
        b"x\tclose",
        b"upgrade",
        b'"close"',
    ]
)
CODINGS = st.sampled_from([b"chunked", b"CHUNKED", b"gzip, chunked", b"identity", b""])
GOOD_LENGTHS = st.sampled_from([b"0", b"3", b"28", b"007", b"99999999999999"])
GOOD_BLANKS = [*4 * [(b" ", b"")], (b"", b""), (b"\t ", b""), (b" ", b" \t")]
PLAIN_FIELDS = st.tuples(
    st.sampled_from([b"accept", b"User-Agent", b"content-type"]),
    st.sampled_from([b"a", b"a  b", b"", b"q=0.5;\tb"]),
)
FIELDS = st.one_of(
    PLAIN_FIELDS,
    PLAIN_FIELDS,
    st.tuples(NAMES, VALUES),
    st.tuples(st.sampled_from([b"content-length", b"Content-Length"]), LENGTHS),
    st.tuples(st.sampled_from([b"connection", b"CONNECTION"]), OPTIONS),
    st.tuples(st.just(b"Transfer-Encoding"), CODINGS),
    st.tuples(st.just(b"Expect"), st.sampled_from([b"100-continue", b"x"])),
    st.tuples(st.just(b"Upgrade"), st.sampled_from([b"h2c", b"websocket"])),
    st.tuples(st.sampled_from([b"Host", b"host", b"hosT"]), st.just(b"a")),
)


@st.composite
def plain_heads(draw: st.DrawFn) -> bytes:
    """Heads as clients send them, with the odd blank."""
    fields = [(b"Host", b"a"), *draw(st.lists(PLAIN_FIELDS, max_size=3))]
    if draw(st.booleans()):
        fields.append((b"Content-Length", draw(GOOD_LENGTHS)))
    if draw(st.integers(0, 3)) == 0:
        fields.append((b"Connection", draw(OPTIONS)))
    raw = b"POST /a HTTP/1.1\r\n"
    for name, value in draw(st.permutations(fields)):
        before, after = draw(st.sampled_from(GOOD_BLANKS))
        raw += name + b":" + before + value + after + b"\r\n"
    return raw + b"\r\n"


@st.composite
def composed_heads(draw: st.DrawFn) -> bytes:
    """Heads made of parts, most of them right, some odd, some wrong."""
    fields = draw(st.lists(FIELDS, max_size=4))
    if draw(st.integers(0, 9)):
        fields.insert(draw(st.integers(0, len(fields))), (b"Host", b"a"))
    line = b" ".join((draw(METHODS), draw(TARGETS), draw(VERSIONS)))
    raw = line + draw(LINE_ENDS)
    for name, value in fields:
        raw += name + b":" + draw(BLANKS) + value + draw(AFTER) + draw(LINE_ENDS)
    return raw + b"\r\n"


VALID_HEADS = [
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    (
        b"POST /v2/models/m/infer?x=1 HTTP/1.1\r\nHost: localhost:8080\r\n"
        b"User-Agent: curl/8.5.0\r\nAccept: */*\r\nContent-Type: application/json\r\n"
        b"Content-Length: 12\r\n\r\n"
    ),
    b"PUT /a HTTP/1.1\r\nhost:a\r\nconnection: keep-alive, Close\r\nX:\t 1  2 \r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n",
]
ODD_BYTES = st.sampled_from(
    [
        b"\r",
        b"\n",
        b"\r\n",
        b"\0",
        b" ",
        b"\t",
        b":",
        b",",
        b"\x7f",
        b"\x80",
        b"\xff",
        b"\x0b",
        b"\x1f",
        b"a",
        b"0",
        b"(",
        b"\r\nHost: b",
        b"\r\n\r\n",
        b"\r\n ",
        b'"',
    ]
)


def mutate(draw: st.DrawFn, raw: bytes, count: int) -> bytes:
    """Insert, delete or replace a few bytes."""
    for _ in range(count):
        at = draw(st.integers(0, len(raw)))
        size = draw(st.sampled_from([0, 0, 1, 1, 2, 5]))
        raw = raw[:at] + draw(st.one_of(st.just(b""), ODD_BYTES)) + raw[at + size :]
    return raw


@st.composite
def mutated_heads(draw: st.DrawFn) -> bytes:
    return mutate(draw, draw(st.sampled_from(VALID_HEADS)), draw(st.integers(0, 3)))


HEADS = st.one_of(plain_heads(), composed_heads(), mutated_heads())


def body_of(length: int) -> bytes:
    """A body that would read as a request if its length were misread."""
    return (b"GET /x HTTP/1.1\r\nHost: b\r\n\r\n" * (length // 28 + 1))[:length]


def test_what_the_fast_lane_accepts_h11_accepts() -> None:
    accepted: Counter[bool] = Counter()

    @many
    @given(HEADS)
    @example(VALID_HEADS[0])
    @example(b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n")
    @example(b"GET / HTTP/1.1\r\nHost: a\r\nX: a\x0bb\r\n\r\n")
    @example(b"GET / HTTP/1.1\r\nHost: a\r\n folded: 1\r\n\r\n")
    @example(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: te,close \r\n\r\n")
    @example(b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 0, 0\r\n\r\n")
    def check(raw: bytes) -> None:
        head = _fast_head(raw)
        accepted[head is not None] += 1
        if head is None:
            return
        complete = head.content_length < 1000
        body = body_of(head.content_length) if complete else b"x"
        referee = h11.Connection(h11.SERVER)
        referee.receive_data(raw + body)
        request = referee.next_event()
        assert isinstance(request, h11.Request)
        assert request.method == head.request.method.encode()
        assert request.target == head.request.target.encode()
        assert tuple(request.headers) == head.request.headers.raw
        assert request.http_version == b"1.1"
        assert not referee.they_are_waiting_for_100_continue
        assert head.is_head is (request.method == b"HEAD")
        assert not head.is_http10
        came = b""
        while isinstance(event := referee.next_event(), h11.Data):
            came += event.data
        assert came == body
        assert referee.trailing_data[0] == b""
        if not complete:
            assert event is h11.NEED_DATA
            return
        assert isinstance(event, h11.EndOfMessage)
        stays = h11.DONE if head.keep_alive else h11.MUST_CLOSE
        assert referee.their_state is stays

    check()
    assert min(accepted[True], accepted[False]) > 200


@pytest.mark.parametrize(
    "field",
    [
        b"Accept: */*",
        b"x-one:1",
        b"X-Two: \t a  b \t",
        b"x-empty:",
        b"!#$%&'*+-.^_`|~1: \"(),/:;<=>?@[\\]{}",
        b"Content-Length: 12",
        b"Connection: close",
    ],
)
def test_the_fast_lane_takes_ordinary_fields(field: bytes) -> None:
    assert _fast_head(b"POST /a?b HTTP/1.1\r\nHost: a\r\n" + field + b"\r\n\r\n")


@pytest.mark.parametrize(
    "field",
    [
        b"X: \xc3\xa9",
        b"X: \x7f",
        b"X: \x01",
        b"X : 1",
        b" X: 1",
        b"X: 1\r\n 2",
        b"X: 1\nY: 2",
        b"X",
        b"Host: b",
        b"Content-Length: 1\r\nContent-Length: 1",
        b"Content-Length: 1, 1",
        b"Content-Length: 1234567890123456",
        b"Content-Length:",
        b"Transfer-Encoding: chunked",
        b"Expect: 100-continue",
        b"Upgrade: h2c",
        b"X: " + 9000 * b"x",
    ],
)
def test_the_fast_lane_leaves_the_rest_to_the_referee(field: bytes) -> None:
    head = b"POST /a?b HTTP/1.1\r\nHost: a\r\n" + field + b"\r\n\r\n"
    assert _fast_head(head) is None


@pytest.mark.parametrize(
    "line",
    [
        b"BREW / HTTP/1.1",
        b"GET http://a/ HTTP/1.1",
        b"GET * HTTP/1.1",
        b"GET / HTTP/1.0",
        b"GET / HTTP/1.1 ",
        b"GET /\xff HTTP/1.1",
        b"get / HTTP/1.1",
    ],
)
def test_the_fast_lane_takes_no_odd_request_line(line: bytes) -> None:
    assert _fast_head(line + b"\r\nHost: a\r\n\r\n") is None


# --- whole conversations -------------------------------------------------------------

HEADERS_OF_VALID = st.lists(
    st.sampled_from(
        [
            b"Accept: */*",
            b"x-one:1",
            b"X-Two: \t a  b \t",
            b"x-empty:",
            b"X: \xc3\xa9",
            b"x: 1",
            b"X: 2",
            b"Connection: keep-alive",
            b"X-Folded: 1\r\n\t 2",
        ]
    ),
    max_size=3,
)


@st.composite
def valid_requests(draw: st.DrawFn) -> bytes:
    method = draw(st.sampled_from([b"GET", b"POST", b"HEAD", b"BREW"]))
    target = draw(st.sampled_from([b"/", b"/a?b", b"http://a/b", b"*"]))
    lines = [method + b" " + target + b" HTTP/1.1", b"Host: a"]
    lines += draw(HEADERS_OF_VALID)
    framing = draw(st.sampled_from(["none", "length", "length", "chunked"]))
    body = draw(st.one_of(st.binary(max_size=50), st.integers(0, 60).map(body_of)))
    after = b""
    if framing == "length":
        lines.append(b"Content-Length: %d" % len(body))
        after = body
    elif framing == "chunked":
        lines.append(draw(st.sampled_from([b"", b"Transfer-Encoding: chunked"])))
        if not lines[-1]:
            lines[-1] = b"transfer-encoding:CHUNKED"
        at = draw(st.integers(0, len(body)))
        for chunk in (body[:at], body[at:]):
            if chunk:
                extension = draw(st.sampled_from([b"", b';a="b"', b" "]))
                after += b"%X%b\r\n%b\r\n" % (len(chunk), extension, chunk)
        after += b"0\r\n" + draw(st.sampled_from([b"", b"X-Sum: 1\r\n"])) + b"\r\n"
    if framing != "none" and draw(st.integers(0, 4)) == 0:
        lines.append(b"Expect: 100-continue")
    if draw(st.integers(0, 9)) == 0:
        lines.append(
            draw(st.sampled_from([b"Connection: close", b"Connection: a,Close"]))
        )
    end = draw(st.sampled_from([*5 * [b"\r\n"], b"\n"]))
    return end.join((*lines, b"", b"")) + after


def cut(draw: st.DrawFn, raw: bytes) -> list[bytes]:
    places = draw(st.lists(st.integers(0, len(raw)), max_size=8))
    bounds = [0, *sorted(places), len(raw)]
    return [raw[a:b] for a, b in itertools.pairwise(bounds)]


@st.composite
def conversations(draw: st.DrawFn) -> list[bytes]:
    raw = b"".join(draw(st.lists(valid_requests(), min_size=1, max_size=4)))
    return cut(draw, raw)


def by_h11(raw: bytes) -> tuple[list[Message], bool]:
    """The messages as h11 reads them, and whether it would read on."""
    referee = h11.Connection(h11.SERVER)
    referee.receive_data(raw)
    found: list[Message] = []
    while True:
        event = referee.next_event()
        if isinstance(event, h11.Request):
            headers = tuple((bytes(n), bytes(v)) for n, v in event.headers)
            found.append((event.method, event.target, headers, b""))
        elif isinstance(event, h11.Data):
            *start, body = found[-1]
            found[-1] = (*start, body + event.data)  # type: ignore[assignment]
        elif isinstance(event, h11.EndOfMessage):
            referee.send(
                h11.Response(status_code=200, headers=[("Content-Length", "0")])
            )
            referee.send(h11.EndOfMessage())
            if referee.our_state is h11.MUST_CLOSE:
                return found, False
            referee.start_next_cycle()
        else:
            assert event is h11.NEED_DATA
            return found, True


def take(connection: Http1Connection, data: bytes, direct: bool) -> list[Event]:
    events: list[Event] = []
    while data:
        target = connection.body_buffer() if direct else None
        if target is None:
            return events + spread(connection.receive(data))
        count = min(len(target), len(data))
        target[:count] = data[:count]
        target.release()
        events += connection.body_received(count)
        data = data[count:]
    return events


def by_us(pieces: list[bytes], direct: bool) -> tuple[list[Message], bool]:
    connection = Http1Connection()
    found: list[Message] = []
    ended = 0
    for piece in pieces:
        events = take(connection, piece, direct)
        while events:
            answered = False
            for event in events:
                if isinstance(event, Request):
                    head = (event.method.encode(), event.target.encode())
                    found.append((*head, event.headers.raw, b""))
                elif isinstance(event, Data):
                    method, target, headers, body = found[-1]
                    found[-1] = (method, target, headers, body + bytes(event.data))
                elif isinstance(event, EndOfMessage):
                    answered = True
                    ended += 1
                else:
                    assert isinstance(event, ContinueWanted)
            if not answered:
                break
            connection.send(Response(STREAM, 200, (), b""))
            events = spread(connection.next_cycle())
    assert ended == len(found)
    return found, connection.keep_alive


@settings(deadline=None, max_examples=600)
@given(conversations(), st.booleans())
def test_a_conversation_is_the_one_that_h11_reads(
    pieces: list[bytes], direct: bool
) -> None:
    assert by_us(pieces, direct) == by_h11(b"".join(pieces))


# --- anything at all ------------------------------------------------------------------


@st.composite
def rubbish(draw: st.DrawFn) -> list[bytes]:
    """Arbitrary bytes, or conversations with some bytes wrong."""
    if draw(st.integers(0, 4)) == 0:
        raw = draw(st.binary(max_size=200))
    else:
        parts = draw(st.lists(st.one_of(valid_requests(), HEADS), max_size=3))
        raw = mutate(draw, b"".join(parts), draw(st.integers(0, 4)))
    return cut(draw, raw)


def test_rubbish_never_raises_and_ends_with_a_refusal() -> None:
    ends: Counter[str] = Counter()

    @many
    @given(rubbish(), st.booleans())
    def check(pieces: list[bytes], direct: bool) -> None:
        connection = Http1Connection(WireLimits(max_head_size=300, max_body_size=100))
        refused = False
        inside = False
        body = 0
        for piece in pieces:
            events = take(connection, piece, direct)
            assert not (refused and events)
            while events:
                ended = False
                for event in events:
                    assert not refused
                    assert not ended
                    if isinstance(event, Request):
                        assert not inside
                        inside, body = True, 0
                        ends["request"] += 1
                    elif isinstance(event, Data):
                        assert inside
                        body += len(event.data)
                        assert body <= 100
                    elif isinstance(event, EndOfMessage):
                        assert inside
                        inside, ended = False, True
                    elif isinstance(event, Refusal):
                        refused = True
                        ends["refusal"] += 1
                if not ended:
                    break
                connection.send(Response(STREAM, 200, (), b""))
                events = spread(connection.next_cycle())
        if refused:
            assert not connection.keep_alive
            assert connection.next_cycle() == []
            assert take(connection, VALID_HEADS[0], direct) == []

    check()
    assert min(ends["request"], ends["refusal"]) > 200
