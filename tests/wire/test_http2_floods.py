"""What an HTTP/2 client can make us do in vain, and that nothing stays behind.

Each attack is cut off with ENHANCE_YOUR_CALM within its budget; the ordinary client
that resembles it most is not. `replenish()` stands for a second.
"""

from __future__ import annotations

import gc
import itertools
import tracemalloc
import weakref
from collections.abc import Callable, Iterator

import pytest

from kserve_lite.wire.events import (
    Data,
    EndOfMessage,
    Event,
    Refusal,
    Request,
    Reset,
    Response,
    Trailers,
)
from kserve_lite.wire.frames import ACK, END_HEADERS, END_STREAM, HEADERS, PRIORITY
from kserve_lite.wire.http2 import PREFACE, ErrorCode, Http2Connection
from kserve_lite.wire.limits import (
    CONTROL_BUDGET,
    CONTROL_BUDGET_PER_SECOND,
    MAX_CONTINUATIONS,
    MAX_CONTROL_OUTPUT,
    REMEMBERED_RESETS,
    RESET_BUDGET,
    RESET_BUDGET_PER_SECOND,
    WireLimits,
)
from tests.wire import http2_client as peer
from tests.wire.http2_client import POST, Frame, feed, sent, started

CALM = ErrorCode.ENHANCE_YOUR_CALM


def until_refused(
    connection: Http2Connection, attack: Callable[[int], list[Frame]], most: int
) -> int:
    """Repeat an attack, reading all answers, until it is cut off; return how often."""
    for number in range(most):
        events = feed(connection, *attack(number))
        if events and events[-1].stream_id == 0:
            assert peer.ended_with(connection, events) == CALM
            return number
        sent(connection)
    raise AssertionError("nothing stopped it")


def always(*frames: Frame) -> Callable[[int], list[Frame]]:
    return lambda _: list(frames)


def unpaired(connection: Http2Connection) -> Http2Connection:
    """Have one request open, so that frames have a stream."""
    feed(connection, peer.open_headers(1))
    return connection


# --- control frames -----------------------------------------------------------------

FLOODS: dict[str, Frame] = {
    "settings": peer.settings((3, 1)),
    "empty settings": peer.settings(),
    "acks of settings": peer.SETTINGS_ACK,
    "pings": peer.ping(),
    "answers to no ping": peer.ping(flags=ACK),
    "priorities": Frame(PRIORITY, 0, 1, b"\0\0\0\3\0"),
    "priorities of idle streams": Frame(PRIORITY, 0, 99, b"\0\0\0\3\0"),
    "windows of the connection": peer.window_update(0, 1),
    "windows of a stream": peer.window_update(1, 1),
    "unknown frames": Frame(0xBB, 0, 1, b"x"),
    "empty data": peer.data(1),
    "empty data with padding": Frame(0, 8, 1, b"\x02\0\0"),
    "goaways": peer.goaway(),
}


@pytest.mark.parametrize("name", FLOODS)
def test_control_frames_are_counted(name: str) -> None:
    """CVE-2019-9512, 9513, 9515, 9518 and their like."""
    frame = FLOODS[name]
    count = until_refused(unpaired(started()), lambda _: [frame], 2 * CONTROL_BUDGET)
    assert CONTROL_BUDGET - 10 <= count <= CONTROL_BUDGET
    # Spread over seconds they are nothing.
    connection = unpaired(started())
    for _ in range(30):
        feed(connection, *CONTROL_BUDGET_PER_SECOND * [frame])
        sent(connection)
        connection.replenish()
    assert not connection._dead


def test_settings_in_one_frame_are_counted() -> None:
    large = peer.settings(*[(4, 70_000 + n % 2) for n in range(9_000)])
    assert until_refused(started(), lambda _: [large], 10) == 1


def test_frames_on_streams_that_are_over_are_counted() -> None:
    for frame in (peer.rst_stream(1), peer.window_update(1, 1), peer.data(1)):
        connection = unpaired(started())
        connection.send(Reset(1, 8))
        count = until_refused(connection, always(frame), 2 * CONTROL_BUDGET)
        assert count <= CONTROL_BUDGET
    connection = unpaired(started())
    connection.send(Reset(1, 8))
    head = peer.headers(1, (b"x", b"y"))
    assert until_refused(connection, lambda _: [head], 2000) <= CONTROL_BUDGET


def test_ordinary_clients_are_not_counted_out() -> None:
    """gRPC's C core sends two WINDOW_UPDATE and a PING with each call."""
    connection = started()
    extra = [peer.window_update(0, 100), peer.window_update(1, 100), peer.ping()]
    for stream in range(1, 6001, 2):
        extra[1] = peer.window_update(stream, 100)
        feed(
            connection, peer.open_headers(stream), *extra, peer.last_data(stream, b"x")
        )
        connection.send(Response(stream, 200, (), b"x" * 100))
        feed(connection, peer.ping())
        sent(connection)
    assert connection.open_streams == 0
    assert not peer.is_closed(connection)


def test_a_client_that_reads_a_stream_may_open_its_windows() -> None:
    """One WINDOW_UPDATE for each message of a long answer, twice."""
    connection = unpaired(started())
    connection.send(Response(1, 200, ()))
    for _ in range(3000):
        connection.send(Data(1, b"x" * 50))
        sent(connection)
        updates = peer.window_update(0, 50), peer.window_update(1, 50)
        assert feed(connection, *updates) == []
    assert not peer.is_closed(connection)


def test_a_client_that_opens_its_window_by_a_byte_is_counted() -> None:
    """CVE-2019-9511: our frames must not earn it what they cost us."""
    connection = unpaired(started(None, (4, 0)))
    connection.send(Response(1, 200, ()), Data(1, bytes(10**5)))
    update = peer.window_update(1, 1)
    assert until_refused(connection, lambda _: [update], 2000) <= CONTROL_BUDGET


def test_answers_that_are_not_read_are_bounded() -> None:
    """CVE-2019-9512 and 9515, paid for by DATA that is worth its PING."""
    connection = unpaired(started())
    events: list[Event] = []
    count = 0
    while not any(isinstance(event, Refusal) for event in events):
        events = feed(connection, peer.ping(), peer.data(1, b"x"))
        count += 1
        assert connection._outbox.control_size <= MAX_CONTROL_OUTPUT + 100
    assert count > 1000
    assert peer.ended_with(connection, events) == CALM


# --- resets -------------------------------------------------------------------------


def next_stream(number: int) -> int:
    return 2 * number + 1


def test_rapid_reset() -> None:
    """CVE-2023-44487."""
    connection = started()
    attack = lambda n: [  # noqa: E731
        peer.headers(next_stream(n)),
        peer.rst_stream(next_stream(n)),
    ]
    assert until_refused(connection, attack, 2 * RESET_BUDGET) == RESET_BUDGET


MISTAKES: dict[str, Callable[[int], list[Frame]]] = {
    "a window of nothing": lambda s: [peer.headers(s), peer.window_update(s, 0)],
    "a window too wide": lambda s: [peer.headers(s), peer.window_update(s, 2**31 - 1)],
    "data after the end": lambda s: [peer.headers(s), peer.data(s, b"x")],
    "headers after the end": lambda s: [peer.headers(s), peer.headers(s)],
    "bad priority": lambda s: [peer.headers(s), Frame(PRIORITY, 0, s, b"x")],
    "malformed": lambda s: [peer.headers(s, (b"", b""))],
    "more than announced": lambda s: [
        peer.open_headers(s, *POST, (b"content-length", b"1")),
        peer.data(s, b"xx"),
    ],
    "refused and given up": lambda s: [
        peer.open_headers(s, *POST, (b"expect", b"nothing")),
        peer.rst_stream(s),
    ],
}


@pytest.mark.parametrize("name", MISTAKES)
def test_resets_that_a_peer_makes_us_send(name: str) -> None:
    """CVE-2025-8671, MadeYouReset."""
    attack = MISTAKES[name]
    count = until_refused(started(), lambda n: attack(next_stream(n)), 2 * RESET_BUDGET)
    assert count == RESET_BUDGET


def test_answered_requests_and_time_pay_for_resets() -> None:
    connection = started()
    for number in range(3 * RESET_BUDGET):
        stream = 4 * number + 1
        feed(connection, peer.headers(stream), peer.headers(stream + 2))
        connection.send(Response(stream + 2, 200, (), b""))
        feed(connection, peer.rst_stream(stream))
        sent(connection)
    for number in range(20):
        for more in range(RESET_BUDGET_PER_SECOND):
            stream = 40_001 + 200 * number + 2 * more
            feed(connection, peer.headers(stream), peer.rst_stream(stream))
        connection.replenish()
    assert not peer.is_closed(connection)


def test_a_client_whose_calls_all_run_out_of_time_is_not_cut_off() -> None:
    connection = started()
    streams = range(1, 512, 2)
    feed(connection, *(peer.headers(stream) for stream in streams))
    assert connection.open_streams == 256
    events = feed(connection, *(peer.rst_stream(stream) for stream in streams))
    assert {type(event) for event in events} == {Reset}
    assert not peer.is_closed(connection)


def test_streams_beyond_the_limit_are_counted() -> None:
    limits = WireLimits(max_streams=1)
    attack = lambda n: [peer.headers(next_stream(n))]  # noqa: E731
    assert until_refused(started(limits), attack, 2000) == RESET_BUDGET + 1
    # Who cannot know of the limit yet has more.
    connection = Http2Connection(limits)
    peer.received(connection, PREFACE + bytes(peer.settings()))
    assert until_refused(connection, attack, 2000) >= CONTROL_BUDGET - 2


# --- header blocks ------------------------------------------------------------------


def test_continuations_are_bounded_in_number() -> None:
    """CVE-2024-27316."""
    connection = started()
    feed(connection, peer.headers(1, flags=0))
    attack = lambda _: [peer.continuation(1, b"\x20", 0)]  # noqa: E731
    assert until_refused(connection, attack, 100) == MAX_CONTINUATIONS
    connection = started()
    feed(connection, peer.headers(1, flags=0))
    assert until_refused(connection, lambda _: [peer.continuation(1, b"", 0)], 99) == (
        MAX_CONTINUATIONS
    )


def test_continuations_are_bounded_in_bytes() -> None:
    connection = started()
    piece = peer.continuation(1, peer.literals((b"x", b"v" * 60_000)), 0)
    feed(connection, peer.headers(1, flags=0))
    assert until_refused(connection, lambda _: [piece], 9) == 2


def test_a_header_bomb() -> None:
    """One byte of the block stands for 4 KB of the list."""
    connection = started()
    entry = b"\x40" + peer.literals((b"x", b"v" * 4000))[1:]
    block = peer.literals(*POST) + entry
    feed(connection, Frame(HEADERS, END_HEADERS | END_STREAM, 1, block))
    few = Frame(
        HEADERS, END_HEADERS | END_STREAM, 3, peer.literals(*POST) + b"\xbe" * 20
    )
    assert [type(event) for event in feed(connection, few)] == [Refusal]
    bomb = Frame(HEADERS, END_HEADERS | END_STREAM, 5, b"\xbe" * 60_000)
    assert peer.ended_with(connection, feed(connection, bomb)) == CALM


def test_headers_without_names_or_values_cost_what_they_count() -> None:
    """CVE-2019-9516: each counts 32 bytes (RFC 9113 6.5.2)."""
    connection = started()
    feed(connection, peer.headers(1, *POST, *2000 * [(b"x", b"")]))
    assert connection.last_stream_id == 1
    events = feed(connection, peer.headers(3, *POST, *2100 * [(b"x", b"")]))
    assert [type(event) for event in events] == [Refusal]
    events = feed(connection, peer.headers(5, *5000 * [(b"", b"")]))
    assert peer.ended_with(connection, events) == CALM


# --- nothing stays behind -----------------------------------------------------------


def requests() -> Iterator[tuple[int, list[Frame]]]:
    """Streams that end in every way, over and over."""
    shapes: list[Callable[[int], list[Frame]]] = [
        lambda s: [peer.headers(s)],
        lambda s: [peer.open_headers(s), peer.last_data(s, b"x" * 500)],
        lambda s: [peer.open_headers(s), peer.data(s, b"x")],  # answered early
        lambda s: [peer.headers(s), peer.rst_stream(s)],
        lambda s: [peer.headers(s, *POST, (b"x", b"%d" % s)), peer.window_update(s, 9)],
        lambda s: [peer.open_headers(s), peer.headers(s, (b"x", b"y"))],
        lambda s: [peer.headers(s, *POST, (b"content-length", b"1"))],
        lambda s: [peer.open_headers(s, *POST, (b"expect", b"100-continue"))],
        lambda s: [peer.open_headers(s, *POST, (b"expect", b"x"))],
        lambda s: [peer.open_headers(s), peer.data(s, bytes(60_000))],
    ]
    for number, shape in zip(itertools.count(), itertools.cycle(shapes)):
        yield 2 * number + 1, shape(2 * number + 1)


def state_of(connection: Http2Connection) -> dict[str, int]:
    """The size of everything that could grow."""
    parts = (
        connection,
        connection._past,
        connection._outbox,
        connection._credit,
        connection._reader,
    )
    found = {}
    for part in parts:
        names = getattr(part, "__slots__", None) or vars(part)
        for name in names:
            value = getattr(part, name)
            if hasattr(value, "__len__"):
                found[f"{type(part).__name__}.{name}"] = len(value)
    return found


def test_ten_thousand_streams_leave_nothing_behind() -> None:
    connection = started()
    source = requests()

    def serve(count: int) -> None:
        for stream, frames in itertools.islice(source, count):
            feed(connection, *frames)
            connection.send(
                Response(stream, 200, ((b"x", b"y"),)),
                Data(stream, b"z" * 100),
                Trailers(stream, ((b"x", b"%d" % stream),)),
            )
            feed(connection, peer.window_update(0, 100))
            sent(connection)
            connection.replenish()

    tracemalloc.start()
    serve(6000)  # until what is remembered of the past is full
    before = state_of(connection)
    gc.collect()
    base = tracemalloc.get_traced_memory()[0]
    serve(4000)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - base
    tracemalloc.stop()
    after = state_of(connection)
    assert connection.open_streams == 0
    assert not peer.is_closed(connection)
    assert (
        before["PastStreams._resets"]
        == after["PastStreams._resets"]
        == REMEMBERED_RESETS
    )
    bounded = ("HeaderReader.remembered", "PastStreams._resets")
    assert {k: v for k, v in after.items() if k not in bounded} == {
        k: v for k, v in before.items() if k not in bounded
    }
    assert grown < 50_000


def test_a_connection_is_freed_without_the_collector() -> None:
    connection = started()
    feed(connection, peer.headers(1), peer.open_headers(3), peer.data(3, b"x"))
    connection.send(Response(1, 200, (), bytes(10**6)))
    sent(connection)
    reference = weakref.ref(connection)
    gc.disable()
    try:
        del connection
        assert reference() is None
    finally:
        gc.enable()


def test_requests_and_ends_match() -> None:
    """Every request that was told ends by its end or by a reset."""
    connection = started()
    told: dict[int, list[type[Event]]] = {}
    for _, frames in itertools.islice(requests(), 100):
        for event in feed(connection, *frames):
            told.setdefault(event.stream_id, []).append(type(event))
    for kinds in told.values():
        assert kinds[0] in (Request, Refusal)
        assert Reset not in kinds or kinds[-1] is Reset
        assert kinds.count(EndOfMessage) <= 1
