"""HTTP/2 header blocks: RFC 7541's examples, RFC 9113 section 8, both caches."""

from __future__ import annotations

import hpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kserve_lite.wire.events import (
    EndOfMessage,
    Headers,
    Refusal,
    Request,
    Reset,
    Response,
    Trailers,
)
from kserve_lite.wire.frames import (
    END_HEADERS,
    END_STREAM,
    HEADERS,
    ConnectionFault,
)
from kserve_lite.wire.hpack_blocks import (
    HeaderReader,
    encode_block,
    encode_field,
    encode_integer,
    encode_length,
)
from kserve_lite.wire.hpack_decoder import Decoder
from kserve_lite.wire.http2 import ErrorCode, Http2Connection
from kserve_lite.wire.limits import REMEMBERED_HEADS, WireLimits
from tests.wire import http2_client as peer
from tests.wire.http2_client import GET, Field, Frame, literals

# --- RFC 7541 appendix C ------------------------------------------------------------

AUTHORITY = (b":authority", b"www.example.com")
GET_ROOT = [(b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/"), AUTHORITY]
THIRD = [
    (b":method", b"GET"),
    (b":scheme", b"https"),
    (b":path", b"/index.html"),
    AUTHORITY,
    (b"custom-key", b"custom-value"),
]
DATE = b"Mon, 21 Oct 2013 20:13:2%d GMT"
LOCATION = (b"location", b"https://www.example.com")
PRIVATE = (b"cache-control", b"private")
COOKIE = b"foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1"
REQUESTS = [GET_ROOT, [*GET_ROOT, (b"cache-control", b"no-cache")], THIRD]
RESPONSES = [
    [(b":status", b"302"), PRIVATE, (b"date", DATE % 1), LOCATION],
    [(b":status", b"307"), PRIVATE, (b"date", DATE % 1), LOCATION],
    [
        (b":status", b"200"),
        PRIVATE,
        (b"date", DATE % 2),
        LOCATION,
        (b"content-encoding", b"gzip"),
        (b"set-cookie", COOKIE),
    ],
]
# The responses are for a table of 256 bytes, which the first block says (6.3).
TABLE_256 = "3fe101"
EXAMPLES: dict[str, tuple[list[str], list[list[Field]]]] = {
    "C.2.1": (
        ["400a637573746f6d2d6b65790d637573746f6d2d686561646572"],
        [[(b"custom-key", b"custom-header")]],
    ),
    "C.2.2": (["040c2f73616d706c652f70617468"], [[(b":path", b"/sample/path")]]),
    "C.2.3": (["100870617373776f726406736563726574"], [[(b"password", b"secret")]]),
    "C.2.4": (["82"], [[(b":method", b"GET")]]),
    "C.3": (
        [
            "828684410f7777772e6578616d706c652e636f6d",
            "828684be58086e6f2d6361636865",
            "828785bf400a637573746f6d2d6b65790c637573746f6d2d76616c7565",
        ],
        REQUESTS,
    ),
    "C.4": (
        [
            "828684418cf1e3c2e5f23a6ba0ab90f4ff",
            "828684be5886a8eb10649cbf",
            "828785bf408825a849e95ba97d7f8925a849e95bb8e8b4bf",
        ],
        REQUESTS,
    ),
    "C.5": (
        [
            TABLE_256 + "4803333032580770726976617465611d4d6f6e2c203231204f637420323031"
            "332032303a31333a323120474d546e1768747470733a2f2f7777772e6578616d706c652e63"
            "6f6d",
            "4803333037c1c0bf",
            (
                "88c1611d4d6f6e2c203231204f637420323031332032303a31333a323220474d54c05a0467"
                "7a69707738666f6f3d4153444a4b48514b425a584f5157454f50495541585157454f49553b"
                "206d61782d6167653d333630303b2076657273696f6e3d31"
            ),
        ],
        RESPONSES,
    ),
    "C.6": (
        [
            TABLE_256
            + "488264025885aec3771a4b6196d07abe941054d444a8200595040b8166e082a6"
            "2d1bff6e919d29ad171863c78f0b97c8e9ae82ae43d3",
            "4883640effc1c0bf",
            (
                "88c16196d07abe941054d444a8200595040b8166e084a62d1bffc05a839bd9ab77ad94e782"
                "1dd7f2e6c7b335dfdfcd5b3960d5af27087f3672c1ab270fb5291f9587316065c003ed4ee5"
                "b1063d5007"
            ),
        ],
        RESPONSES,
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_of_rfc_7541(name: str) -> None:
    blocks, lists = EXAMPLES[name]
    reader = HeaderReader(WireLimits())
    assert [reader._decode(bytes.fromhex(block))[0] for block in blocks] == lists


def test_integers_of_rfc_7541() -> None:
    assert encode_integer(10, 5, 0) == b"\x0a"
    assert encode_integer(1337, 5, 0) == b"\x1f\x9a\x0a"
    assert encode_integer(42, 8, 0) == b"\x2a"
    assert encode_integer(1337, 5, 0xE0) == b"\xff\x9a\x0a"


@pytest.mark.parametrize("name", ["C.3", "C.4"])
def test_requests_of_rfc_7541_on_a_connection(name: str) -> None:
    connection = peer.started()
    for number, block in enumerate(EXAMPLES[name][0]):
        events = peer.feed(connection, whole(2 * number + 1, bytes.fromhex(block)))
        request = events[0]
        assert isinstance(request, Request)
        fields = REQUESTS[number][4:]
        assert request.headers.raw == ((b"host", b"www.example.com"), *fields)
        assert request.target == REQUESTS[number][2][1].decode()


def whole(stream_id: int, block: bytes) -> Frame:
    return Frame(HEADERS, END_HEADERS | END_STREAM, stream_id, block)


# --- RFC 9113 section 8 -------------------------------------------------------------

METHOD, SCHEME, PATH, HOST = GET
REGULAR = (b"x-a", b"b")

MALFORMED: dict[str, tuple[Field, ...]] = {
    "nothing": (),
    "no method": (SCHEME, PATH, HOST),
    "no scheme": (METHOD, PATH, HOST),
    "no path": (METHOD, SCHEME, HOST),
    "two methods": (METHOD, METHOD, SCHEME, PATH, HOST),
    "two schemes": (METHOD, SCHEME, SCHEME, PATH, HOST),
    "two paths": (METHOD, SCHEME, PATH, PATH, HOST),
    "two authorities": (METHOD, SCHEME, PATH, HOST, HOST),
    "a status": (*GET, (b":status", b"200")),
    "an unknown pseudo-header": (*GET, (b":protocol", b"websocket")),
    "a pseudo-header after a field": (METHOD, SCHEME, PATH, REGULAR, HOST),
    "a method that is no token": ((b":method", b"G T"), SCHEME, PATH, HOST),
    "an empty method": ((b":method", b""), SCHEME, PATH, HOST),
    "an empty scheme": (METHOD, (b":scheme", b""), PATH, HOST),
    "a bad scheme": (METHOD, (b":scheme", b"ht tp"), PATH, HOST),
    "an empty path": (METHOD, SCHEME, (b":path", b""), HOST),
    "a relative path": (METHOD, SCHEME, (b":path", b"p"), HOST),
    "a star of GET": (METHOD, SCHEME, (b":path", b"*"), HOST),
    "a blank in the path": (METHOD, SCHEME, (b":path", b"/a b"), HOST),
    "a line end in the path": (METHOD, SCHEME, (b":path", b"/a\r\nx: y"), HOST),
    "a byte beyond ASCII in the path": (METHOD, SCHEME, (b":path", b"/\xe4"), HOST),
    "a full URI": (METHOD, SCHEME, (b":path", b"http://a/p"), HOST),
    "no authority": (METHOD, SCHEME, PATH),
    "an empty authority": (METHOD, SCHEME, PATH, (b":authority", b"")),
    "an empty host": (METHOD, SCHEME, PATH, (b"host", b"")),
    "userinfo": (METHOD, SCHEME, PATH, (b":authority", b"u@a")),
    "a path in the authority": (METHOD, SCHEME, PATH, (b":authority", b"a/b")),
    "a blank in the authority": (METHOD, SCHEME, PATH, (b":authority", b"a b")),
    "another host": (*GET, (b"host", b"b")),
    "two hosts": (METHOD, SCHEME, PATH, (b"host", b"a"), (b"host", b"a")),
    "upper case": (*GET, (b"X-a", b"b")),
    "an empty name": (*GET, (b"", b"b")),
    "a blank in a name": (*GET, (b"x a", b"b")),
    "a colon in a name": (*GET, (b"x:a", b"b")),
    "a control character in a name": (*GET, (b"x\x00", b"b")),
    "a byte beyond ASCII in a name": (*GET, (b"x\xe4", b"b")),
    "NUL in a value": (*GET, (b"x", b"a\x00b")),
    "CR in a value": (*GET, (b"x", b"a\rb")),
    "LF in a value": (*GET, (b"x", b"a\nb")),
    "another control character in a value": (*GET, (b"x", b"a\x01b")),
    "DEL in a value": (*GET, (b"x", b"a\x7fb")),
    "a blank before a value": (*GET, (b"x", b" b")),
    "a tab after a value": (*GET, (b"x", b"b\t")),
    "nothing but a blank": (*GET, (b"x", b" ")),
    "connection": (*GET, (b"connection", b"close")),
    "keep-alive": (*GET, (b"keep-alive", b"1")),
    "proxy-connection": (*GET, (b"proxy-connection", b"close")),
    "transfer-encoding": (*GET, (b"transfer-encoding", b"chunked")),
    "upgrade": (*GET, (b"upgrade", b"h2c")),
    "te": (*GET, (b"te", b"gzip")),
    "te with more": (*GET, (b"te", b"trailers, gzip")),
    "lengths that differ": (
        *GET,
        (b"content-length", b"0"),
        (b"content-length", b"1"),
    ),
    "a length that is a list": (*GET, (b"content-length", b"0, 0")),
    "a negative length": (*GET, (b"content-length", b"-1")),
    "a signed length": (*GET, (b"content-length", b"+0")),
    "an empty length": (*GET, (b"content-length", b"")),
    "a length of 16 digits": (*GET, (b"content-length", b"1" * 16)),
    "CONNECT with a path": ((b":method", b"CONNECT"), PATH, HOST),
    "CONNECT without authority": ((b":method", b"CONNECT"),),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_requests_are_stream_errors(name: str) -> None:
    connection = peer.started()
    for stream_id in (1, 3):  # Nothing of a malformed one is remembered.
        block = literals(*MALFORMED[name])
        assert peer.feed(connection, whole(stream_id, block)) == []
        assert peer.sent(connection) == [
            peer.rst_stream(stream_id, ErrorCode.PROTOCOL_ERROR)
        ]
    assert connection.open_streams == connection.last_stream_id == 0
    events = peer.feed(connection, peer.data(1, b"x"), peer.headers(5))
    assert [type(event) for event in events] == [Request, EndOfMessage]


WELL_FORMED: dict[str, tuple[tuple[Field, ...], tuple[Field, ...]]] = {
    "host for authority": (
        (METHOD, SCHEME, PATH, (b"x", b"y"), (b"host", b"a")),
        ((b"x", b"y"), (b"host", b"a")),
    ),
    "both": ((*GET, (b"x", b"y"), (b"host", b"A")), ((b"x", b"y"), (b"host", b"A"))),
    "an address": (
        (METHOD, SCHEME, PATH, (b":authority", b"[::1]:80")),
        ((b"host", b"[::1]:80"),),
    ),
    "any order of pseudo-headers": ((HOST, PATH, SCHEME, METHOD), ((b"host", b"a"),)),
    "another scheme needs no authority": ((METHOD, (b":scheme", b"urn"), PATH), ()),
    "te": ((*GET, (b"te", b"Trailers")), ((b"host", b"a"), (b"te", b"Trailers"))),
    "an empty value": ((*GET, (b"x", b"")), ((b"host", b"a"), (b"x", b""))),
    "inner blanks and more": (
        (*GET, (b"x", b"a \t b\xff"), (b"!#$%&'*+-.^_`|~09az", b"~")),
        ((b"host", b"a"), (b"x", b"a \t b\xff"), (b"!#$%&'*+-.^_`|~09az", b"~")),
    ),
    "cookies": (
        (*GET, (b"cookie", b"a=1"), (b"x", b"y"), (b"cookie", b"b=2; c=3")),
        ((b"host", b"a"), (b"cookie", b"a=1; b=2; c=3"), (b"x", b"y")),
    ),
    "one cookie": ((*GET, (b"cookie", b"a")), ((b"host", b"a"), (b"cookie", b"a"))),
    "the same length twice": (
        (*GET, (b"content-length", b"0"), (b"content-length", b"0")),
        ((b"host", b"a"), (b"content-length", b"0"), (b"content-length", b"0")),
    ),
    "a path with everything": (
        (METHOD, SCHEME, (b":path", b"/!\"#$%&'()*+,;<=>?@[]^`{|}~\\"), HOST),
        ((b"host", b"a"),),
    ),
    "a star": (
        ((b":method", b"OPTIONS"), SCHEME, (b":path", b"*"), HOST),
        ((b"host", b"a"),),
    ),
    "another method": (
        ((b":method", b"m-SEARCH"), SCHEME, PATH, HOST),
        ((b"host", b"a"),),
    ),
    "fields that repeat": (
        (*GET, (b"x", b"1"), (b"x", b"2")),
        ((b"host", b"a"), (b"x", b"1"), (b"x", b"2")),
    ),
}


@pytest.mark.parametrize("name", WELL_FORMED)
def test_well_formed_requests(name: str) -> None:
    fields, raw = WELL_FORMED[name]
    connection = peer.started()
    for stream_id in (1, 3):
        events = peer.feed(connection, whole(stream_id, literals(*fields)))
        pseudo = dict(fields)
        method, path = pseudo[b":method"].decode(), pseudo[b":path"].decode()
        assert events == [
            Request(stream_id, method, path, Headers(raw)),
            EndOfMessage(stream_id),
        ]
        request = events[0]
        assert isinstance(request, Request)
        assert request.headers.raw == raw


@pytest.mark.parametrize("excess", [0, 1])
def test_a_head_of_the_largest_size(excess: int) -> None:
    used = sum(len(name) + len(value) + 32 for name, value in GET) + 1 + 32
    fields = (*GET, (b"x", b"v" * (512 - used + excess)))
    connection = peer.started(WireLimits(max_head_size=512))
    first = peer.feed(connection, whole(1, literals(*fields)))[0]
    assert type(first) is (Refusal if excess else Request)


def test_trailers_too_large() -> None:
    connection = peer.started(WireLimits(max_head_size=512))
    events = peer.feed(
        connection, peer.open_headers(1), peer.headers(1, (b"x", b"v" * 500))
    )
    assert events[1:] == [Reset(1, ErrorCode.ENHANCE_YOUR_CALM)]


# --- heads that are remembered ------------------------------------------------------

PLAIN = literals(*GET)
INSERT = b"\x40\x03x-a\x01b"


def table_of(connection: Http2Connection) -> dict[bytes, object]:
    return dict(connection._reader.remembered)


def test_a_head_is_remembered_by_its_block() -> None:
    connection = peer.started()
    (first, _, second, _) = peer.feed(connection, whole(1, PLAIN), whole(3, PLAIN))
    assert isinstance(first, Request)
    assert isinstance(second, Request)
    assert first.headers is second.headers
    assert list(table_of(connection)) == [PLAIN]


@pytest.mark.parametrize(
    "change",
    {
        "an insertion": PLAIN + INSERT,
        "the same insertion again": PLAIN + INSERT + INSERT,
        "an eviction by size": b"\x20" + PLAIN,
        "evicted and allowed again": b"\x20\x3f\xe1\x1f" + PLAIN,
        "a smaller table": b"\x3f\x00" + PLAIN,
        "an entry too large for the table": PLAIN
        + b"\x40\x01x\x7f\x81\x1f"
        + b"v" * (127 + 1 + 31 * 128),
    }.items(),
    ids=lambda item: item[0],
)
def test_any_change_of_the_table_forgets_all(change: tuple[str, bytes]) -> None:
    connection = peer.started()
    remembered = PLAIN + b"\xbe"
    peer.feed(connection, whole(1, PLAIN + INSERT), whole(3, remembered))
    assert list(table_of(connection)) == [remembered]
    peer.feed(connection, whole(5, change[1]))
    assert not peer.is_closed(connection)
    assert table_of(connection) == {}


def test_blocks_that_change_the_table_are_not_remembered() -> None:
    connection = peer.started()
    peer.feed(connection, *(whole(2 * n + 1, PLAIN + INSERT) for n in range(3)))
    assert table_of(connection) == {}
    events = peer.feed(connection, whole(9, PLAIN + b"\xbe\xbf\xc0"))
    assert isinstance(events[0], Request)
    assert len(events[0].headers.raw) == 4
    assert peer.feed(connection, whole(11, PLAIN + b"\xc1"))[0].stream_id == 0


def test_the_memory_is_bounded() -> None:
    connection = peer.started()
    for number in range(3 * REMEMBERED_HEADS):
        stream_id = 2 * number + 1
        peer.feed(connection, peer.headers(stream_id, *GET, (b"x", b"%d" % number)))
        connection.send(Response(stream_id, 200, (), b""))
        peer.sent(connection)
        assert len(table_of(connection)) <= REMEMBERED_HEADS
    before = table_of(connection)
    peer.feed(connection, peer.headers(stream_id + 2, *GET, (b"x", b"v" * 5000)))
    assert table_of(connection) == before


def test_a_remembered_head_means_trailers_no_less() -> None:
    connection = peer.started()
    trailers = literals((b"x-sum", b"1"))
    for stream_id in (1, 3):
        events = peer.feed(
            connection, peer.open_headers(stream_id), whole(stream_id, trailers)
        )
        assert [type(event) for event in events] == [Request, EndOfMessage]


FIELDS = st.lists(
    st.tuples(
        st.sampled_from([b"x-a", b"x-b", b"accept", b"grpc-timeout"]),
        st.sampled_from([b"", b"1", b"22", b"v" * 50, b"w" * 900, b"u" * 4100]),
        st.booleans(),
    ),
    max_size=5,
)


@given(
    st.lists(
        st.tuples(FIELDS, st.sampled_from([None, 0, 64, 200, 4096]), st.integers(0, 5)),
        max_size=12,
    )
)
@settings(max_examples=150, deadline=None)
def test_remembering_changes_nothing(
    steps: list[tuple[list[tuple[bytes, bytes, bool]], int | None, int]],
) -> None:
    """Blocks of an encoder, and blocks repeated, mean what a plain decoder says."""
    encoder = hpack.Encoder()
    judge = hpack.Decoder()
    connection = peer.started()
    blocks: list[bytes] = []
    for number, (fields, size, repeat) in enumerate(steps):
        if size is not None:
            encoder.header_table_size = size
        block = encoder.encode([*GET, *fields])
        if repeat and blocks:
            block = blocks[-repeat % len(blocks)]
        blocks.append(block)
        events = peer.feed(connection, whole(2 * number + 1, block))
        try:
            expected = [(bytes(n), bytes(v)) for n, v in judge.decode(block, raw=True)]
        except hpack.HPACKError:
            assert peer.ended_with(connection, events) == ErrorCode.COMPRESSION_ERROR
            return
        peer.sent(connection)
        # An index may name another entry by now, and with it make the head malformed.
        names = [name for name, _ in expected if name.startswith(b":")]
        if names == [name for name, _ in GET] == [name for name, _ in expected[:4]]:
            request = events[0]
            assert isinstance(request, Request)
            assert list(request.headers.raw[1:]) == expected[4:]


SOUND = hpack.Encoder()
PIECES = st.sampled_from(
    [
        PLAIN,
        INSERT,
        b"\x20",
        b"\x3f\x11",
        b"\x3f\xe1\x1f",
        b"\xbe",
        b"\xbf",
        b"\x7e\x01z",
        b"\x0f\x30\x01z",
        SOUND.encode([*GET, (b"accept", b"text/plain"), (b"x-long", b"v" * 3000)]),
        b"\x40\x82\x94\xe7\x83\x8c\x76\x7f",
    ]
)


@given(st.lists(st.lists(PIECES | st.binary(max_size=4), max_size=4), max_size=6))
@settings(max_examples=400, deadline=None)
def test_our_decoder_and_that_of_hpack_say_the_same(blocks: list[list[bytes]]) -> None:
    ours = Decoder(10**6)
    judge = hpack.Decoder(10**6)
    for pieces in blocks:
        block = b"".join(pieces)
        fields: list[Field] | None
        try:
            fields = [(bytes(n), bytes(v)) for n, v in judge.decode(block, raw=True)]
        except hpack.HPACKError:
            fields = None
        before, unchanged = (list(ours._entries), ours._max_size), ours.changes
        code = None
        try:
            decoded, size = ours.decode(block)
        except ConnectionFault as fault:
            code = fault.code
        if code is not None:
            # hpack takes any number of table sizes.
            assert fields is None or code == ErrorCode.ENHANCE_YOUR_CALM
            return
        assert decoded == fields
        assert size == sum(len(n) + len(v) + 32 for n, v in decoded)
        assert ours._entries == list(judge.header_table.dynamic_entries)
        assert ours._max_size == judge.header_table_size
        assert ours._size == sum(len(n) + len(v) + 32 for n, v in ours._entries)
        if ours.changes == unchanged:
            assert before == (ours._entries, ours._max_size)


# --- answers ------------------------------------------------------------------------

ANSWER = (
    (b"content-type", b"application/grpc"),
    (b"grpc-status", b"0"),
    (b"x-long", b"v" * 5000),
    (b"x-empty", b""),
    (b"accept-encoding", b"gzip, deflate"),
    (b"set-cookie", b"secret"),
)


@pytest.mark.parametrize("status", [100, 200, 204, 404, 418, 500, 599])
def test_answers_are_encoded_without_the_dynamic_table(status: int) -> None:
    decoder = hpack.Decoder()
    block = encode_block(status, ANSWER) + encode_length(1234567)
    for _ in range(2):
        fields = list(decoder.decode(block, raw=True))
        assert fields == [
            (b":status", b"%d" % status),
            *ANSWER,
            (b"content-length", b"1234567"),
        ]
        assert not decoder.header_table.dynamic_entries
    never = [
        bytes(f[0]) for f in fields if isinstance(f, hpack.NeverIndexedHeaderTuple)
    ]
    assert never == [b"set-cookie"]


@given(st.binary(max_size=300), st.binary(max_size=300))
@settings(max_examples=100, deadline=None)
def test_any_field_survives_encoding(name: bytes, value: bytes) -> None:
    assert list(hpack.Decoder().decode(encode_field(name, value), raw=True)) == [
        (name, value)
    ]


@pytest.mark.parametrize(
    ("changes", "confirmed"),
    [
        ([(1, 4096)], False),
        ([(1, 8192)], False),
        ([(1, 100)], True),
        ([(1, 0), (1, 4096)], True),
        ([(1, 8192), (1, 4096)], True),
    ],
)
def test_a_smaller_table_is_confirmed_once(
    changes: list[tuple[int, int]], confirmed: bool
) -> None:
    """RFC 7541 4.2: the next block begins with an update of the table's size."""
    connection = peer.started(None, *changes)
    peer.feed(connection, peer.headers(1), peer.headers(3))
    connection.send(Response(1, 200, ()), Trailers(1, ((b"x", b"y"),)))
    first, second = peer.sent(connection)
    assert first.payload == (b"\x20\x88" if confirmed else b"\x88")
    assert second.payload == encode_field(b"x", b"y")
    connection.send(Response(3, 200, ()), Trailers(3, ()))
    assert [frame.payload for frame in peer.sent(connection)] == [b"\x88", b""]


def test_equal_answers_are_encoded_once() -> None:
    first = encode_block(200, ((b"x-once", b"y"),))
    assert encode_block(200, ((b"x-once", b"y"),)) is first
