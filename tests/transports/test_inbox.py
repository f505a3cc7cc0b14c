"""Where the bytes of an HTTP/2 request wait: they come out as they went in."""

from __future__ import annotations

import random

import pytest

from kserve_lite.transports.http2_stream import AHEAD, Inbox
from kserve_lite.transports.timeouts import STREAM_BUFFER

MANY = 3 * STREAM_BUFFER


@pytest.mark.parametrize("announced", [0, 10, MANY, 2**40])
@pytest.mark.parametrize("seed", range(20))
def test_bytes_come_out_as_they_went_in(announced: int, seed: int) -> None:
    chance = random.Random(seed)
    inbox, expected = Inbox(None), b""
    inbox.announce(announced)
    taken = []
    for _ in range(60):
        if chance.random() < 0.6:
            data = chance.randbytes(chance.choice((1, 5, 1000, STREAM_BUFFER + 1)))
            inbox.add(memoryview(data))
            expected += data
        else:
            size = chance.choice((1, 5, 2000, STREAM_BUFFER + 2, 2**20))
            taken.append((inbox.take(size), expected[:size]))
            expected = expected[size:]
        assert len(inbox) == len(expected)
    # At the end: what was handed over may not be written over by what came later.
    assert all(bytes(got) == wanted for got, wanted in taken)


def test_an_announcement_alone_costs_little() -> None:
    inbox = Inbox(None)
    inbox.announce(2**40)
    inbox.add(b"x" * 1000)
    assert len(inbox._buffer) <= AHEAD * 1000


def test_a_large_body_is_handed_over_and_not_copied() -> None:
    inbox = Inbox(None)
    inbox.announce(MANY)
    for _ in range(3):
        inbox.add(bytes(STREAM_BUFFER))
    buffer = inbox._buffer
    assert inbox.take(MANY) is buffer


def test_a_reader_that_is_always_behind_does_not_let_it_grow() -> None:
    inbox = Inbox(None)
    inbox.add(b"x")
    for _ in range(1000):
        inbox.add(bytes(1000))
        assert len(inbox.take(1000)) == 1000
    assert len(inbox) == 1
    assert len(inbox._buffer) <= 4000
