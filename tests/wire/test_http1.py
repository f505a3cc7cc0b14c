"""HTTP/1.1: bytes in, events out, and back.

Every case is a byte literal. It is fed whole, one byte at a time and in random pieces,
through `receive()` alone and through `body_buffer()`: the events must be the same, but
for how a chunked body is cut into `Data`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kserve_lite.wire import http1
from kserve_lite.wire.events import (
    ContinueWanted,
    Data,
    EndOfMessage,
    Event,
    Headers,
    Outgoing,
    RawHeaders,
    Refusal,
    Request,
    Response,
)
from kserve_lite.wire.http1 import STREAM, Http1Connection
from kserve_lite.wire.limits import FIRST_BODY_BUFFER, WireLimits
from tests.wire.spread import spread

# A message as the tests compare it: method, target, headers, body.
Message: TypeAlias = tuple[str, str, RawHeaders, bytes]

HOST = (b"host", b"a")
OK = Response(STREAM, 200, ((b"content-length", b"0"),))
# Stands in every request that is refused; no refusal may repeat it.
SECRET = b"s3cr3t"
SMALL = WireLimits(max_head_size=512, max_body_size=64)


def pieces_of(raw: bytes, size: int) -> list[bytes]:
    return [raw[start : start + size] for start in range(0, len(raw), size)]


def random_pieces(raw: bytes, seed: int) -> list[bytes]:
    chance = random.Random(seed)
    cuts = sorted(chance.randrange(len(raw) + 1) for _ in range(chance.randrange(1, 8)))
    bounds = [0, *cuts, len(raw)]
    return [raw[a:b] for a, b in itertools.pairwise(bounds)]


def ways(raw: bytes) -> Iterator[tuple[list[bytes], bool]]:
    """Every way in which a case is fed: its pieces, and whether bodies go direct."""
    cuttings = [[raw], *(random_pieces(raw, seed) for seed in range(6))]
    if len(raw) < 5000:
        cuttings.append(pieces_of(raw, 1))
    for pieces in cuttings:
        for direct in (False, True):
            yield pieces, direct


def take(connection: Http1Connection, data: bytes, direct: bool) -> list[Event]:
    """Hand bytes over as the owner of a socket does."""
    events: list[Event] = []
    whole = connection.receive_again(data) if direct else None
    if whole is not None:
        return spread([whole])
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


def feed(
    connection: Http1Connection, pieces: Iterable[bytes], direct: bool
) -> list[Event]:
    return [event for data in pieces for event in take(connection, data, direct)]


def converse(
    connection: Http1Connection, pieces: Iterable[bytes], direct: bool
) -> list[Event]:
    """Feed, answering each request as soon as it is complete."""
    events: list[Event] = []
    for data in pieces:
        new = take(connection, data, direct)
        while new:
            events += new
            if type(new[-1]) is not EndOfMessage:
                break
            connection.send(OK, EndOfMessage(STREAM))
            new = spread(connection.next_cycle())
    return events


def messages(events: Iterable[Event]) -> list[Message]:
    """The complete messages among events, in which nothing else may stand."""
    found: list[Message] = []
    request: Request | None = None
    body = b""
    for event in spread(events):
        if type(event) is Request:
            assert request is None
            request, body = event, b""
        elif type(event) is Data:
            assert request is not None
            body += event.data
        elif type(event) is EndOfMessage:
            assert request is not None
            found.append((request.method, request.target, request.headers.raw, body))
            request = None
        else:
            assert type(event) is ContinueWanted
    assert request is None
    return found


def kinds(events: Iterable[Event]) -> list[type[Event]]:
    """The types of events, runs of `Data` as one."""
    found: list[type[Event]] = []
    for event in events:
        if type(event) is not Data or found[-1:] != [Data]:
            found.append(type(event))
    return found


def assert_dead(connection: Http1Connection) -> None:
    """After a refusal nothing comes out, whatever comes in."""
    assert connection.keep_alive is False
    assert connection.receive(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n") == []
    assert connection.body_buffer() is None
    assert connection.next_cycle() == []
    assert connection.receive(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n") == []
    assert connection.kept == b""


BODY_HEAD = b"POST /p HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n"
BODY_HEADERS = (HOST, (b"content-length", b"5"))
CHUNKED_HEAD = b"POST /p HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNKED_HEADERS = (HOST, (b"transfer-encoding", b"chunked"))
KEEP_HEADERS = ((b"connection", b"Keep-Alive"), (b"content-length", b"2"))

# Name: bytes, the messages in them, whether the connection stays open.
CASES: dict[str, tuple[bytes, list[Message], bool]] = {
    "plain": (
        b"GET /v2/models/m?x=1 HTTP/1.1\r\nHost: a\r\n\r\n",
        [("GET", "/v2/models/m?x=1", (HOST,), b"")],
        True,
    ),
    "names in lower case, blanks around values dropped": (
        b"GET / HTTP/1.1\r\nHoSt:a\r\nX-One:  b  c\t \r\nX-Empty:\r\n\r\n",
        [("GET", "/", (HOST, (b"x-one", b"b  c"), (b"x-empty", b"")), b"")],
        True,
    ),
    "repeated fields stay": (
        b"GET / HTTP/1.1\r\nHost: a\r\nX: 1\r\nx: 2\r\n\r\n",
        [("GET", "/", (HOST, (b"x", b"1"), (b"x", b"2")), b"")],
        True,
    ),
    "bytes over 127 in a value": (
        b"GET / HTTP/1.1\r\nHost: a\r\nX: \xc3\xa9\r\n\r\n",
        [("GET", "/", (HOST, (b"x", b"\xc3\xa9")), b"")],
        True,
    ),
    "leading empty lines": (
        b"\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
        [("GET", "/", (HOST,), b"")],
        True,
    ),
    "bare line feeds": (
        b"GET / HTTP/1.1\nHost: a\n\n",
        [("GET", "/", (HOST,), b"")],
        True,
    ),
    "folded value": (
        b"GET / HTTP/1.1\r\nHost: a\r\nX: 1\r\n  2\r\n\r\n",
        [("GET", "/", (HOST, (b"x", b"1 2")), b"")],
        True,
    ),
    "absolute form": (
        b"GET http://b/v1/models HTTP/1.1\r\nHost: a\r\n\r\n",
        [("GET", "http://b/v1/models", (HOST,), b"")],
        True,
    ),
    "asterisk form": (
        b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
        [("OPTIONS", "*", (HOST,), b"")],
        True,
    ),
    "unknown method": (
        b"BREW /pot HTTP/1.1\r\nHost: a\r\n\r\n",
        [("BREW", "/pot", (HOST,), b"")],
        True,
    ),
    "upgrade is ignored": (
        b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n",
        [("GET", "/", (HOST, (b"upgrade", b"h2c"), (b"connection", b"Upgrade")), b"")],
        True,
    ),
    "head longer than the fast lane takes": (
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + 3000 * b"abc" + b"\r\n\r\n",
        [("GET", "/", (HOST, (b"x", 3000 * b"abc")), b"")],
        True,
    ),
    "announced body": (
        BODY_HEAD + b"hello",
        [("POST", "/p", BODY_HEADERS, b"hello")],
        True,
    ),
    "announced body of nothing": (
        b"POST /p HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
        [("POST", "/p", (HOST, (b"content-length", b"0")), b"")],
        True,
    ),
    "body that looks like a request": (
        (
            b"POST /p HTTP/1.1\r\nHost: a\r\nContent-Length: 27\r\n\r\n"
            b"GET / HTTP/1.1\r\nHost: b\r\n\r\n"
        ),
        [
            (
                "POST",
                "/p",
                (HOST, (b"content-length", b"27")),
                b"GET / HTTP/1.1\r\nHost: b\r\n\r\n",
            )
        ],
        True,
    ),
    "same length twice": (
        (
            b"POST /p HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n"
            b"Content-Length: 5\r\n\r\nhello"
        ),
        [("POST", "/p", BODY_HEADERS, b"hello")],
        True,
    ),
    "chunked body": (
        CHUNKED_HEAD + b"3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n",
        [("POST", "/p", CHUNKED_HEADERS, b"hello")],
        True,
    ),
    "chunked body with extensions and trailers": (
        CHUNKED_HEAD
        + b'5;n="va;lue"\r\nhello\r\n0A\r\n0123456789\r\n00;last\r\nX-Sum: 1\r\n\r\n',
        [("POST", "/p", CHUNKED_HEADERS, b"hello0123456789")],
        True,
    ),
    "chunked body of nothing": (
        CHUNKED_HEAD + b"0\r\n\r\n",
        [("POST", "/p", CHUNKED_HEADERS, b"")],
        True,
    ),
    "pipelined": (
        BODY_HEAD
        + b"hello"
        + CHUNKED_HEAD
        + b"1\r\nx\r\n0\r\n\r\n"
        + b"HEAD /h HTTP/1.1\r\nHost: a\r\n\r\n"
        + 2 * (BODY_HEAD + b"again"),
        [
            ("POST", "/p", BODY_HEADERS, b"hello"),
            ("POST", "/p", CHUNKED_HEADERS, b"x"),
            ("HEAD", "/h", (HOST,), b""),
            ("POST", "/p", BODY_HEADERS, b"again"),
            ("POST", "/p", BODY_HEADERS, b"again"),
        ],
        True,
    ),
    "empty lines between pipelined requests": (
        BODY_HEAD + b"hello" + b"\r\n" + BODY_HEAD + b"again" + b"\r\n",
        [
            ("POST", "/p", BODY_HEADERS, b"hello"),
            ("POST", "/p", BODY_HEADERS, b"again"),
        ],
        True,
    ),
    "connection: close": (
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        [("GET", "/", (HOST, (b"connection", b"close")), b"")],
        False,
    ),
    "connection: close in any case, in a list": (
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: te,\tCLOSE , x\r\n\r\n",
        [("GET", "/", (HOST, (b"connection", b"te,\tCLOSE , x")), b"")],
        False,
    ),
    "connection: close in a second field": (
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: te\r\nConnection: Close\r\n\r\n",
        [
            (
                "GET",
                "/",
                (HOST, (b"connection", b"te"), (b"connection", b"Close")),
                b"",
            )
        ],
        False,
    ),
    "connection: closed is no close": (
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: closed\r\n\r\n",
        [("GET", "/", (HOST, (b"connection", b"closed")), b"")],
        True,
    ),
    "nothing is read after close": (
        (
            b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
            b"GET /2 HTTP/1.1\r\nHost: a\r\n\r\n"
        ),
        [("GET", "/", (HOST, (b"connection", b"close")), b"")],
        False,
    ),
    "chunked and close": (
        (
            b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n"
            b"Connection: close\r\n\r\n1\r\nx\r\n0\r\n\r\n"
        ),
        [
            (
                "POST",
                "/",
                (HOST, (b"transfer-encoding", b"chunked"), (b"connection", b"close")),
                b"x",
            )
        ],
        False,
    ),
    "HTTP/1.0": (b"GET / HTTP/1.0\r\n\r\n", [("GET", "/", (), b"")], False),
    "HTTP/1.0 with keep-alive": (
        2 * b"POST / HTTP/1.0\r\nConnection: Keep-Alive\r\nContent-Length: 2\r\n\r\nhi",
        [("POST", "/", KEEP_HEADERS, b"hi"), ("POST", "/", KEEP_HEADERS, b"hi")],
        True,
    ),
    "HTTP/1.0 with keep-alive and close": (
        b"GET / HTTP/1.0\r\nConnection: keep-alive, close\r\n\r\n",
        [("GET", "/", ((b"connection", b"keep-alive, close"),), b"")],
        False,
    ),
    "HTTP/1.0 expectation is ignored": (
        b"POST / HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\nhi",
        [
            (
                "POST",
                "/",
                ((b"expect", b"100-continue"), (b"content-length", b"2")),
                b"hi",
            )
        ],
        False,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_requests(name: str) -> None:
    raw, expected, stays = CASES[name]
    for pieces, direct in ways(raw):
        connection = Http1Connection()
        assert messages(converse(connection, pieces, direct)) == expected
        assert connection.keep_alive is stays


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_parsed_while_a_request_is_answered(name: str) -> None:
    raw, expected, _ = CASES[name]
    for pieces, direct in ways(raw):
        connection = Http1Connection()
        events = feed(connection, pieces, direct)
        assert messages(events) == expected[:1]
        assert connection.body_buffer() is None
        assert not connection.inside_body


def test_announced_body_is_one_event() -> None:
    for pieces, direct in ways(BODY_HEAD + b"hello"):
        events = feed(Http1Connection(), pieces, direct)
        assert kinds(events) == [Request, Data, EndOfMessage]
        assert len(events) == 3


def test_no_data_of_a_body_that_is_dropped() -> None:
    asked: list[str] = []

    def drops(request: Request) -> bool:
        asked.append(request.target)
        return request.target == "/1"

    body = random.Random(4).randbytes(3000)
    head = b"POST /%d HTTP/1.1\r\nHost: a\r\nContent-Length: 3000\r\n\r\n"
    chunked = b"POST /1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunked += b"3e8\r\n%b\r\n7d0\r\n%b\r\n0\r\n\r\n" % (body[:1000], body[1000:])
    raw = head % 1 + body + head % 2 + body + chunked + head % 2 + body
    for pieces, direct in ways(raw):
        connection = Http1Connection(drops=drops)
        asked.clear()
        events = converse(connection, pieces, direct)
        found = [(target, data) for _, target, _, data in messages(events)]
        # Nobody is asked where all of an announced body comes with its head.
        first = b"" if asked.count("/1") == 2 else body
        assert found == [("/1", first), ("/2", body), ("/1", b""), ("/2", body)]


def test_no_data_without_a_body() -> None:
    raw = b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"
    for pieces, direct in ways(raw):
        events = feed(Http1Connection(), pieces, direct)
        assert kinds(events) == [Request, EndOfMessage]


def test_remembered_head_still_means_the_same() -> None:
    connection = Http1Connection()
    events = converse(connection, 3 * [BODY_HEAD, b"hel", b"lo"], True)
    assert messages(events) == 3 * [("POST", "/p", BODY_HEADERS, b"hello")]


@pytest.mark.parametrize("name", CASES)
def test_requests_that_come_again(name: str) -> None:
    raw, expected, stays = CASES[name]
    events = converse(Http1Connection(), 3 * [raw], direct=True)
    assert messages(events) == (3 * expected if stays else expected)


def test_a_small_request_with_the_last_head_is_taken_at_once() -> None:
    connection = Http1Connection()
    assert connection.receive_again(BODY_HEAD + b"hello") is None  # no head is known
    converse(connection, [BODY_HEAD + b"hello"], direct=False)
    for body in (b"other", b"again"):
        taken = connection.receive_again(memoryview(BODY_HEAD + body))
        assert messages([] if taken is None else [taken]) == [
            ("POST", "/p", BODY_HEADERS, body)
        ]
        # Until it is answered the same bytes are the next request's.
        assert connection.receive_again(BODY_HEAD + body) is None
        connection.send(OK, EndOfMessage(STREAM))
        assert connection.next_cycle() == []


@pytest.mark.parametrize(
    "data",
    [
        BODY_HEAD + b"hell",
        BODY_HEAD + b"hello" + b"G",
        BODY_HEAD.replace(b"/p", b"/q") + b"hello",
        BODY_HEAD.replace(b": a", b":a ") + b"hello",
        BODY_HEAD.replace(b": 5", b": 4") + b"hello",
        b"",
    ],
)
def test_what_is_not_taken_at_once_changes_nothing(data: bytes) -> None:
    connection = Http1Connection()
    converse(connection, [BODY_HEAD + b"hello"], direct=False)
    assert connection.receive_again(data) is None
    assert connection.between_messages
    again = messages(connection.receive(BODY_HEAD + b"hello"))
    assert again == [("POST", "/p", BODY_HEADERS, b"hello")]


def test_what_is_kept_comes_before_a_request_with_the_last_head() -> None:
    connection = Http1Connection()
    converse(connection, [BODY_HEAD + b"hello"], direct=False)
    connection.receive(b"GET / HT")
    assert connection.receive_again(BODY_HEAD + b"hello") is None


@pytest.mark.parametrize("length", [http1.SMALL, http1.SMALL + 1])
def test_a_large_request_with_the_last_head_is_read_as_any(length: int) -> None:
    head = b"POST /p HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % length
    connection = Http1Connection()
    converse(connection, [head + bytes(length)], direct=False)
    is_small = length <= http1.SMALL
    assert (connection.receive_again(head + bytes(length)) is not None) is is_small


def test_pipelined_requests_wait_for_their_turn() -> None:
    second = b"GET /2 HTTP/1.1\r\nHost: a\r\n\r\n"
    connection = Http1Connection()
    events = connection.receive(BODY_HEAD + b"hello" + second)
    assert messages(events) == [("POST", "/p", BODY_HEADERS, b"hello")]
    assert len(connection.kept) == len(second)
    assert connection.receive(second) == []
    assert len(connection.kept) == 2 * len(second)
    for left in (1, 0):
        assert messages(connection.next_cycle()) == [("GET", "/2", (HOST,), b"")]
        assert len(connection.kept) == left * len(second)
    assert connection.next_cycle() == []
    assert connection.between_messages


def test_phases_of_a_request() -> None:
    connection = Http1Connection()

    def phase() -> tuple[bool, bool]:
        return connection.between_messages, connection.inside_body

    steps = [
        (b"", (True, False)),
        (BODY_HEAD[:9], (False, False)),
        (BODY_HEAD[9:], (False, True)),
        (b"hell", (False, True)),
        (b"o", (False, False)),
        (None, (True, False)),
        (CHUNKED_HEAD, (False, True)),
        (b"", (False, True)),
        (b"5\r\nhel", (False, True)),
        (b"lo\r\n0\r\n\r\n", (False, False)),
        (b"GE", (False, False)),
        (None, (False, False)),
    ]
    for data, expected in steps:
        if data is None:
            connection.next_cycle()
        else:
            connection.receive(data)
        assert phase() == expected


# --- Expect -----------------------------------------------------------------------

EXPECTING = [
    (
        (
            b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-Continue\r\n"
            b"Content-Length: 5\r\n\r\n"
        ),
        b"hello",
    ),
    (
        (
            b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        ),
        b"5\r\nhello\r\n0\r\n\r\n",
    ),
]


@pytest.mark.parametrize(("head", "body"), EXPECTING, ids=["announced", "chunked"])
def test_continue_is_wanted(head: bytes, body: bytes) -> None:
    for pieces, direct in ways(head):
        connection = Http1Connection()
        assert kinds(feed(connection, pieces, direct)) == [Request, ContinueWanted]
        assert kinds(feed(connection, [body], direct)) == [Data, EndOfMessage]


@pytest.mark.parametrize(("head", "body"), EXPECTING, ids=["announced", "chunked"])
def test_continue_is_not_wanted_once_the_body_came(head: bytes, body: bytes) -> None:
    for count in range(1, len(body) + 1):
        connection = Http1Connection()
        events = spread(connection.receive(head + body[:count]))
        events += connection.receive(body[count:])
        assert kinds(events) == [Request, Data, EndOfMessage]


def test_continue_is_not_wanted_without_a_body() -> None:
    raw = b"GET / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n\r\n"
    for pieces, direct in ways(raw):
        events = feed(Http1Connection(), pieces, direct)
        assert kinds(events) == [Request, EndOfMessage]


def test_continue_is_not_wanted_of_http10() -> None:
    raw = b"POST / HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
    for pieces, direct in ways(raw):
        assert kinds(feed(Http1Connection(), pieces, direct)) == [Request]


def test_continue_is_not_wanted_of_a_body_that_is_too_large() -> None:
    raw = (
        b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n"
        b"Content-Length: 65\r\n\r\n"
    )
    for pieces, direct in ways(raw):
        assert kinds(feed(Http1Connection(SMALL), pieces, direct)) == [Refusal]


# --- refusals ---------------------------------------------------------------------


def head_with(*lines: bytes, method: bytes = b"POST", version: bytes = b"1.1") -> bytes:
    start = method + b" /s3cr3t HTTP/" + version
    return b"\r\n".join((start, *lines, b"", b""))


HOST_LINE = b"Host: s3cr3t"
REFUSALS: dict[str, tuple[bytes, int | None]] = {
    "no host": (head_with(b"X: 1"), 400),
    "no header at all": (head_with(), 400),
    "two hosts": (head_with(HOST_LINE, HOST_LINE), 400),
    "length no number": (head_with(HOST_LINE, b"Content-Length: s3cr3t"), 400),
    "negative length": (head_with(HOST_LINE, b"Content-Length: -1"), 400),
    "signed length": (head_with(HOST_LINE, b"Content-Length: +1"), 400),
    "hexadecimal length": (head_with(HOST_LINE, b"Content-Length: 0x1"), 400),
    "empty length": (head_with(HOST_LINE, b"Content-Length:"), 400),
    "length with an underscore": (head_with(HOST_LINE, b"Content-Length: 1_0"), 400),
    "lengths in a list that differ": (
        head_with(HOST_LINE, b"Content-Length: 1, 2"),
        400,
    ),
    "two lengths": (
        head_with(HOST_LINE, b"Content-Length: 1", b"Content-Length: 2"),
        400,
    ),
    "length of 30 digits": (
        head_with(HOST_LINE, b"Content-Length: " + 30 * b"9"),
        400,
    ),
    "both framings": (
        head_with(HOST_LINE, b"Content-Length: 1", b"Transfer-Encoding: chunked"),
        400,
    ),
    "chunked over HTTP/1.0": (
        head_with(b"Transfer-Encoding: chunked", version=b"1.0"),
        400,
    ),
    "NUL in a value": (head_with(HOST_LINE, b"X: s3cr3t\0"), 400),
    "carriage return in a value": (head_with(HOST_LINE, b"X: s3cr3t\rY: 2"), 400),
    "vertical tab in a value": (head_with(HOST_LINE, b"X: s3cr3t\x0b"), 400),
    "blank before the colon": (head_with(HOST_LINE, b"S3cr3t : 1"), 400),
    "no colon": (head_with(HOST_LINE, b"s3cr3t"), 400),
    "no name": (head_with(HOST_LINE, b": s3cr3t"), 400),
    "name that is no token": (head_with(HOST_LINE, b"s3cr3t(: 1"), 400),
    "first header folded": (head_with(b" s3cr3t", HOST_LINE), 400),
    "blank in the target": (b"GET /s3cr3t a HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "two blanks": (b"GET  /s3cr3t HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "no target": (b"S3CR3T HTTP/1.1\r\nHost: s3cr3t\r\n\r\n", 400),
    "bytes over 127 in the target": (
        b"GET /s3cr3t\xc3\xa9 HTTP/1.1\r\nHost: a\r\n\r\n",
        400,
    ),
    "NUL in the method": (b"s3cr3t\0 / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "blank after the version": (b"GET /s3cr3t HTTP/1.1 \r\nHost: a\r\n\r\n", 400),
    "minor version of two digits": (head_with(HOST_LINE, version=b"1.10"), 400),
    "body too large": (head_with(HOST_LINE, b"Content-Length: 65"), 413),
    "body far too large": (
        head_with(HOST_LINE, b"Content-Length: 99999999999999999999"),
        413,
    ),
    "other expectation": (
        head_with(HOST_LINE, b"Expect: s3cr3t", b"Content-Length: 1"),
        417,
    ),
    "head too large": (head_with(HOST_LINE, b"X: " + 80 * SECRET), 431),
    "other transfer coding": (head_with(HOST_LINE, b"Transfer-Encoding: s3cr3t"), 501),
    "two transfer codings": (
        head_with(HOST_LINE, b"Transfer-Encoding: gzip, chunked"),
        501,
    ),
    "transfer coding twice": (
        head_with(
            HOST_LINE, b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"
        ),
        501,
    ),
    "version 2.0": (head_with(HOST_LINE, version=b"2.0"), 505),
    "version 3.1": (head_with(HOST_LINE, version=b"3.1"), 505),
    "version 0.9": (head_with(HOST_LINE, version=b"0.9"), 505),
    "no HTTP": (b"GARBAGE s3cr3t\r\n\r\n", None),
    "no version": (b"GET /s3cr3t\r\n\r\n", None),
    "version in lower case": (b"GET /s3cr3t http/1.1\r\nHost: a\r\n\r\n", None),
    "leading blank": (b" GET /s3cr3t HTTP/1.1\r\nHost: a\r\n\r\n", None),
    "leading bare line feed": (b"\nGET /s3cr3t HTTP/1.1\r\nHost: a\r\n\r\n", None),
    "leading bare carriage return": (
        b"\rGET /s3cr3t HTTP/1.1\r\nHost: a\r\n\r\n",
        None,
    ),
    "leading noise": (b"\x80GET /s3cr3t HTTP/1.1\r\nHost: a\r\n\r\n", None),
    "TLS": (
        bytes.fromhex("16030100c5010000c10303")
        + bytes(range(180))
        + SECRET
        + b"\n\r\n",
        None,
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_heads(name: str) -> None:
    raw, status = REFUSALS[name]
    for pieces, direct in ways(raw):
        connection = Http1Connection(SMALL)
        events = feed(connection, pieces, direct)
        assert kinds(events) == [Refusal]
        refusal = events[0]
        assert isinstance(refusal, Refusal)
        assert refusal.status == status
        assert refusal.reason
        assert "s3cr3t" not in refusal.reason.lower()
        assert_dead(connection)


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_after_a_request(name: str) -> None:
    """A refused head behind a good request: the good one is answered first."""
    raw, status = REFUSALS[name]
    good = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
    for pieces, direct in ways(good + raw):
        connection = Http1Connection(SMALL)
        events = converse(connection, pieces, direct)
        assert kinds(events) == [Request, EndOfMessage, Refusal]
        assert isinstance(events[-1], Refusal)
        assert events[-1].status == status
        assert_dead(connection)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"s3cr3t\r\n", 400),
        (b"-1\r\n", 400),
        (b"0x1\r\nx\r\n", 400),
        (b"1 2\r\n", 400),
        (b";s3cr3t\r\nx\r\n", 400),
        (b"1\r\nxs3cr3t\r\n0\r\n\r\n", 400),
        (b"1\r\nx\n0\r\n\r\n", 400),
        (b"0\r\ns3cr3t\r\n\r\n", 400),
        (b"0\r\nX: s3cr3t\0\r\n\r\n", 400),
        (30 * b"f" + b"\r\n", 400),
        (b"41\r\n" + 65 * b"x" + b"\r\n0\r\n\r\n", 413),
        (13 * b"5\r\nhello\r\n" + b"0\r\n\r\n", 413),
        (b"5;" + 600 * b"s", 431),
        (b"0\r\nX: " + 600 * b"s", 431),
    ],
)
def test_refused_chunks(body: bytes, status: int) -> None:
    for pieces, direct in ways(CHUNKED_HEAD + body):
        connection = Http1Connection(SMALL)
        events = feed(connection, pieces, direct)
        assert kinds(events) in ([Request, Refusal], [Request, Data, Refusal])
        refusal = events[-1]
        assert isinstance(refusal, Refusal)
        assert refusal.status == status
        assert "s3cr3t" not in refusal.reason
        data = b"".join(bytes(e.data) for e in events if isinstance(e, Data))
        assert len(data) <= SMALL.max_body_size
        assert_dead(connection)


def test_a_body_of_the_largest_size_is_taken() -> None:
    announced = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 64\r\n\r\n" + 64 * b"x"
    chunked = CHUNKED_HEAD + 2 * (b"20\r\n" + 32 * b"x" + b"\r\n") + b"0\r\n\r\n"
    for raw in (announced, chunked):
        for pieces, direct in ways(raw):
            found = messages(converse(Http1Connection(SMALL), pieces, direct))
            assert [body for *_, body in found] == [64 * b"x"]


def test_each_chunked_body_is_counted_for_itself() -> None:
    raw = 2 * (CHUNKED_HEAD + b"30\r\n" + 48 * b"x" + b"\r\n0\r\n\r\n")
    for pieces, direct in ways(raw):
        found = messages(converse(Http1Connection(SMALL), pieces, direct))
        assert [body for *_, body in found] == 2 * [48 * b"x"]


@pytest.mark.parametrize("excess", [0, 1])
def test_a_head_of_the_largest_size_is_taken(excess: int) -> None:
    start = b"GET / HTTP/1.1\r\nHost: a\r\nX: "
    raw = start + (512 + excess - len(start) - 4) * b"x" + b"\r\n\r\n"
    assert len(raw) == 512 + excess
    for pieces, direct in ways(raw):
        events = feed(Http1Connection(SMALL), pieces, direct)
        assert kinds(events) == ([Refusal] if excess else [Request, EndOfMessage])


# --- what a peer can make the connection hold --------------------------------------


@pytest.mark.parametrize(
    "start",
    [
        b"GET /",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: ",
        b"GET / HTTP/1.1\r\nHost: a\r\nX",
        b"GET / HTTP/1.1\r\nHost: a\r\n" + 30 * b"X: y\r\n",
    ],
)
def test_an_endless_head_is_refused_at_the_limit(start: bytes) -> None:
    connection = Http1Connection(SMALL)
    events = connection.receive(start)
    came = len(start)
    while not events:
        assert len(connection.kept) <= SMALL.max_head_size
        assert came <= SMALL.max_head_size
        events = connection.receive(b"x")
        came += 1
    assert [event.status for event in events if isinstance(event, Refusal)] == [431]
    assert came == SMALL.max_head_size + 1
    assert not connection.kept


def test_noise_is_closed_at_its_first_byte() -> None:
    for byte in (*range(10), 11, 12, *range(14, 33), *range(127, 256)):
        events = Http1Connection().receive(bytes([byte]))
        assert [e.status for e in events if isinstance(e, Refusal)] == [None]


def test_empty_lines_are_not_kept() -> None:
    connection = Http1Connection()
    for _ in range(1000):
        assert connection.receive(b"\r\n\r\n\r") == []
        assert connection.receive(b"\n") == []
        assert len(connection.kept) == 0
    assert connection.between_messages


def test_an_announced_length_costs_nothing_before_data_comes() -> None:
    connection = Http1Connection()
    length = 90 * 1024 * 1024
    connection.receive(
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % length
    )
    assert connection.inside_body
    assert len(connection._body) <= FIRST_BODY_BUFFER
    filled = 0
    while filled < 9 * 1024 * 1024:
        target = connection.body_buffer()
        assert target is not None
        count = min(len(target), 300_000)
        target.release()
        assert connection.body_received(count) == []
        filled += count
        assert len(connection._body) <= max(FIRST_BODY_BUFFER, 2 * filled)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(
    "length",
    [
        FIRST_BODY_BUFFER - 1,
        FIRST_BODY_BUFFER,
        FIRST_BODY_BUFFER + 1,
        2 * FIRST_BODY_BUFFER,
        3 * FIRST_BODY_BUFFER + 7,
    ],
)
def test_bodies_around_the_first_buffer(length: int, direct: bool) -> None:
    body = random.Random(length).randbytes(length)
    head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % length
    after = b"GET /2 HTTP/1.1\r\nHost: a\r\n\r\n"
    for size in (1 << 16, 999_983, 1 << 30):
        connection = Http1Connection()
        events = converse(connection, pieces_of(head + body + after, size), direct)
        found = messages(events)
        assert [target for _, target, *_ in found] == ["/", "/2"]
        assert found[0][3] == body
        assert len([event for event in events if type(event) is Data]) == 1


def test_body_buffer_never_takes_what_follows_the_body() -> None:
    connection = Http1Connection()
    connection.receive(BODY_HEAD + b"he")
    target = connection.body_buffer()
    assert target is not None
    assert len(target) == 3


# --- answers ----------------------------------------------------------------------


def asked(request: bytes) -> Http1Connection:
    connection = Http1Connection()
    assert kinds(spread(connection.receive(request)))[-1] is EndOfMessage
    return connection


def sent(connection: Http1Connection, *events: Outgoing) -> bytes:
    return b"".join(bytes(part) for part in connection.send(*events))


def read_by_h11(
    raw: bytes, method: str = "GET", *, closed: bool = False
) -> tuple[h11.Response, bytes, bool]:
    """The answer as a client reads it; whether it may ask again."""
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method=method, target="/", headers=[("Host", "a")]))
    client.send(h11.EndOfMessage())
    client.receive_data(raw)
    if closed:
        client.receive_data(b"")
    response = client.next_event()
    assert isinstance(response, h11.Response)
    body = b""
    while isinstance(event := client.next_event(), h11.Data):
        body += event.data
    assert isinstance(event, h11.EndOfMessage)
    assert client.trailing_data[0] == b""
    return response, body, client.our_state is h11.DONE


def fields(response: h11.Response, name: bytes) -> list[bytes]:
    return [value for key, value in response.headers if key == name]


GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
HEAD = b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n"
GET_10 = b"GET / HTTP/1.0\r\n\r\n"
GET_10_KEEP = b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
LENGTH_5 = ((b"content-type", b"text/plain"), (b"content-length", b"5"))
HELLO: tuple[Outgoing, ...] = (
    Data(STREAM, b"he"),
    Data(STREAM, b""),
    Data(STREAM, bytearray(b"l")),
    Data(STREAM, memoryview(b"lo")),
    EndOfMessage(STREAM),
)


def test_answer_of_announced_length() -> None:
    raw = sent(asked(GET), Response(STREAM, 200, LENGTH_5), *HELLO)
    assert raw == (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 5\r\n\r\nhello"
    )


def test_answer_of_unknown_length_is_chunked() -> None:
    raw = sent(asked(GET), Response(STREAM, 200, ()), *HELLO)
    assert raw == (
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        b"2\r\nhe\r\n1\r\nl\r\n2\r\nlo\r\n0\r\n\r\n"
    )


def test_whole_answer_in_one_event() -> None:
    response = Response(STREAM, 404, ((b"server", b"x"),), b"hello")
    assert sent(asked(GET), response) == (
        b"HTTP/1.1 404 Not Found\r\nserver: x\r\ncontent-length: 5\r\n\r\nhello"
    )
    assert sent(asked(HEAD), response) == (
        b"HTTP/1.1 404 Not Found\r\nserver: x\r\ncontent-length: 5\r\n\r\n"
    )


@pytest.mark.parametrize("request_", [GET, HEAD, GET_10, GET_10_KEEP])
@pytest.mark.parametrize("closes", [False, True])
def test_an_answer_like_the_last_one_is_written_like_the_first(
    request_: bytes, closes: bool
) -> None:
    headers = ((b"content-type", b"text/plain"),)
    bodies = [
        *(b"", b"hello", bytes(http1.SMALL), bytes(http1.SMALL + 1), None),
        *(bytearray(b"hello"), memoryview(b"hello")),
    ]
    for status, body, ids in itertools.product(
        (200, 204, 500), bodies, (None, (b"id", b"00-t-s-00"))
    ):
        answer = Response(STREAM, status, headers, body, None, ids)
        fresh, used = asked(request_), asked(GET)
        used.send(Response(STREAM, status, headers, b"first", None, (b"0", b"1")))
        used.next_cycle()
        used.receive(request_)
        if closes:
            fresh.keep_alive = used.keep_alive = False
        assert sent(used, answer) == sent(fresh, answer)
        rest = (Data(STREAM, b"rest"), EndOfMessage(STREAM))
        assert sent(used, *rest) == sent(fresh, *rest)


def test_bodies_are_not_copied() -> None:
    tensor = bytearray(100)
    parts = asked(GET).send(Response(STREAM, 200, ()), Data(STREAM, tensor))
    assert any(part is tensor for part in parts)
    parts = asked(GET).send(Response(STREAM, 200, (), tensor))
    assert any(part is tensor for part in parts)


@pytest.mark.parametrize("headers", [LENGTH_5, ()], ids=["length", "chunked"])
def test_answer_to_head_has_no_body(headers: RawHeaders) -> None:
    connection = asked(HEAD)
    raw = sent(connection, Response(STREAM, 200, headers), *HELLO)
    assert raw.endswith(b"\r\n\r\n")
    response, body, open_ = read_by_h11(raw, "HEAD")
    assert (response.status_code, body, open_) == (200, b"", True)
    assert fields(response, b"content-length") == ([b"5"] if headers else [])
    connection.next_cycle()
    connection.receive(GET)
    raw = sent(connection, Response(STREAM, 200, headers), *HELLO)
    assert read_by_h11(raw)[1] == b"hello"


def test_answer_to_http10_of_announced_length() -> None:
    raw = sent(asked(GET_10), Response(STREAM, 200, LENGTH_5), *HELLO)
    response, body, open_ = read_by_h11(raw)
    assert (body, open_) == (b"hello", False)
    assert fields(response, b"connection") == [b"close"]


def test_answer_to_http10_that_keeps_alive() -> None:
    connection = asked(GET_10_KEEP)
    raw = sent(connection, Response(STREAM, 200, LENGTH_5), *HELLO)
    response, body, _ = read_by_h11(raw)
    assert body == b"hello"
    assert fields(response, b"connection") == [b"keep-alive"]
    assert connection.keep_alive


@pytest.mark.parametrize("request_", [GET_10, GET_10_KEEP], ids=["closes", "keeps"])
def test_answer_to_http10_of_unknown_length_ends_by_closing(request_: bytes) -> None:
    connection = asked(request_)
    raw = sent(connection, Response(STREAM, 200, ()), *HELLO)
    response, body, _ = read_by_h11(raw, closed=True)
    assert body == b"hello"
    assert fields(response, b"transfer-encoding") == []
    assert fields(response, b"connection") == [b"close"]
    assert connection.keep_alive is False
    assert connection.next_cycle() == []


def test_answer_to_http11_after_http10_is_chunked_again() -> None:
    connection = asked(GET_10_KEEP)
    sent(connection, Response(STREAM, 200, LENGTH_5), *HELLO)
    connection.next_cycle()
    connection.receive(GET)
    raw = sent(connection, Response(STREAM, 200, ()), *HELLO)
    response, body, open_ = read_by_h11(raw)
    assert fields(response, b"transfer-encoding") == [b"chunked"]
    assert fields(response, b"connection") == []
    assert (body, open_) == (b"hello", True)


def test_answer_says_close_where_the_client_did() -> None:
    connection = asked(GET[:-2] + b"Connection: close\r\n\r\n")
    raw = sent(connection, Response(STREAM, 200, LENGTH_5), *HELLO)
    response, _, open_ = read_by_h11(raw)
    assert fields(response, b"connection") == [b"close"]
    assert not open_


@pytest.mark.parametrize("when", ["before", "inside the head", "inside the body"])
def test_the_owner_may_close_at_any_time_before_the_answer(when: str) -> None:
    connection = Http1Connection()
    parts = {"before": 0, "inside the head": 20, "inside the body": len(BODY_HEAD) + 2}
    raw = BODY_HEAD + b"hello"
    connection.receive(raw[: parts[when]])
    connection.keep_alive = False
    connection.receive(raw[parts[when] :])
    answer = sent(connection, Response(STREAM, 200, LENGTH_5), *HELLO)
    assert fields(read_by_h11(answer)[0], b"connection") == [b"close"]
    connection.receive(GET)
    assert connection.next_cycle() == []


@pytest.mark.parametrize("status", [204, 304])
@pytest.mark.parametrize("request_", [GET, HEAD], ids=["GET", "HEAD"])
def test_answers_that_have_no_body(status: int, request_: bytes) -> None:
    raw = sent(asked(request_), Response(STREAM, status, ()), *HELLO)
    response, body, open_ = read_by_h11(raw, request_[:4].strip().decode())
    assert (response.status_code, body, open_) == (status, b"", True)
    assert fields(response, b"transfer-encoding") == []


@pytest.mark.parametrize("before", [HEAD, GET_10_KEEP], ids=["HEAD", "HTTP/1.0"])
def test_a_refusal_is_not_framed_as_the_answer_before_it(before: bytes) -> None:
    connection = asked(before)
    sent(connection, Response(STREAM, 200, LENGTH_5), *HELLO)
    connection.next_cycle()
    events = connection.receive(b"GET / HTTP/1.1\r\n\r\n")
    assert kinds(events) == [Refusal]
    raw = sent(connection, Response(STREAM, 400, LENGTH_5), *HELLO)
    response, body, open_ = read_by_h11(raw)
    assert (response.status_code, body, open_) == (400, b"hello", False)


def test_a_refused_head_request_gets_no_body() -> None:
    connection = Http1Connection()
    connection.receive(
        b"HEAD / HTTP/1.1\r\nHost: a\r\nExpect: x\r\nContent-Length: 1\r\n\r\n"
    )
    raw = sent(connection, Response(STREAM, 417, LENGTH_5), *HELLO)
    assert read_by_h11(raw, "HEAD")[1] == b""


@settings(deadline=None, max_examples=300)
@given(
    request=st.sampled_from([GET, HEAD, GET_10, GET_10_KEEP]),
    status=st.sampled_from([200, 204, 304, 400, 404, 413, 431, 500, 503]),
    parts=st.lists(st.binary(max_size=40), max_size=5),
    form=st.sampled_from(["announced", "unknown", "whole"]),
    keep=st.booleans(),
)
def test_a_client_reads_every_answer(
    request: bytes, status: int, parts: list[bytes], form: str, keep: bool
) -> None:
    connection = asked(request)
    if not keep:
        connection.keep_alive = False
    body = b"".join(parts)
    if form == "whole":
        raw = sent(connection, Response(STREAM, status, (), body))
    else:
        length = (b"content-length", b"%d" % len(body))
        raw = sent(
            connection,
            Response(STREAM, status, (length,) if form == "announced" else ()),
            *(Data(STREAM, part) for part in parts),
            EndOfMessage(STREAM),
        )
    closes = not connection.keep_alive
    method = request.partition(b" ")[0].decode()
    response, came, open_ = read_by_h11(raw, method, closed=closes)
    assert response.status_code == status
    assert came == (b"" if method == "HEAD" or status in (204, 304) else body)
    framings = fields(response, b"content-length") + fields(
        response, b"transfer-encoding"
    )
    assert len(framings) <= 1
    if request in (GET_10, GET_10_KEEP):
        assert not fields(response, b"transfer-encoding")
        assert fields(response, b"connection") == [
            b"close" if closes else b"keep-alive"
        ]
    else:
        assert fields(response, b"connection") == ([b"close"] if closes else [])
    if keep and request in (GET, HEAD):
        assert open_


# --- headers ----------------------------------------------------------------------


def test_headers_are_a_mapping_of_the_last_values() -> None:
    headers = Headers(((b"x", b"1"), (b"y", b"caf\xe9"), (b"x", b"2")))
    assert dict(headers) == {"x": "2", "y": "caf\xe9"}
    assert len(headers) == 2
    assert headers["y"] == "caf\xe9"
    assert headers.get("z") is None
    assert headers.get("z", "0") == "0"
    assert "x" in headers
    assert "z" not in headers
    with pytest.raises(KeyError):
        headers["z"]


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.__setitem__("x", "2"),
        lambda h: h.__delitem__("x"),
        lambda h: h.update(x="2"),
        lambda h: h.setdefault("y", "2"),
        lambda h: h.pop("x"),
        lambda h: h.popitem(),
        lambda h: h.clear(),
        lambda h: h.__ior__({"x": "2"}),
    ],
)
def test_headers_are_read_only(change: Callable[[Headers], object]) -> None:
    headers = Headers(((b"x", b"1"),))
    with pytest.raises(TypeError, match="read-only"):
        change(headers)
    assert dict(headers) == {"x": "1"}


@pytest.mark.parametrize("size", [20_000, 300_000, 2_000_000])
@pytest.mark.parametrize("after", [b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_a_known_head_with_much_of_its_body(size: int, after: bytes) -> None:
    """What came with a head that is known is not copied by way of a head's buffer."""
    body = bytes(range(256)) * (size // 256)
    head = b"POST /m HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    wire = Http1Connection(WireLimits(max_body_size=size))
    for _ in range(3):
        scratch = bytearray(head + body + after)
        events = wire.receive(memoryview(scratch))
        scratch[:] = bytes(len(scratch))  # the next read overwrites it
        request = events[0]
        assert isinstance(request, Request)
        assert (request.method, request.target) == ("POST", "/m")
        came = request.body
        if came is None:
            assert isinstance(events[1], Data)
            came = events[1].data
        assert bytes(came) == body
        wire.send(Response(1, 204, ()))
        events = wire.next_cycle()
        if after:
            assert [type(event) for event in events] == [Request]
            wire.send(Response(1, 204, ()))
            assert wire.next_cycle() == []
