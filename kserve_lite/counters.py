"""Counts of a process, kept where its siblings can read them.

A `Board` is memory that the processes of a server share: a sheet for each, and on a
sheet rows of 64-bit integers, each row with a key. A process writes to its own sheet
only, without a lock; whoever wants the totals adds all sheets up. What a process has
counted thus outlives it, however it dies, and one that takes its place goes on with its
sheet. An addition costs 0.1 us; prometheus_client's own counters, which its processes
share through files, cost 2 to 3.

What each number means, and how it is shown, is not known here.
"""

from __future__ import annotations

import enum
import json
import logging
import mmap
import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence

log = logging.getLogger("kserve_lite")

Key = tuple[str, ...]
# What keys begin with whose rows are about this moment, and so end with the process.
NOW = "now"

_WORD = 8
# Words of a sheet, 8 MiB, of which only those that are written to take memory. A model
# needs some 200, and each kind of request that came for it 15.
SHEET = 1024 * 1024
# The sheet's own words, before its rows.
_END, _STATE, _FIRST = 0, 1, 2


class State(enum.IntEnum):
    """What the process of a sheet is about to do, for its siblings to know."""

    GONE = 0  # there is none
    STARTING = 1  # it loads its models and takes no connections yet
    SERVING = 2  # it takes connections; not all of its models are ready
    READY = 3  # it takes connections, and all of its models are ready
    STOPPING = 4  # it finishes what is in flight


class Board:
    """Sheets of several processes, in memory that they share.

    sheets: how many there are. fd: of the memory, where another process made it.
    """

    def __init__(self, sheets: int = 1, fd: int | None = None) -> None:
        size = sheets * SHEET * _WORD
        if fd is None and sheets > 1:
            fd = os.memfd_create("kserve-lite")
            os.ftruncate(fd, size)
        # One process alone needs no file descriptor.
        self.fd = -1 if fd is None else fd
        self._memory = mmap.mmap(self.fd, size)
        self._words = memoryview(self._memory).cast("q")
        self.sheets = [
            Sheet(self._words[i * SHEET : (i + 1) * SHEET]) for i in range(sheets)
        ]

    @property
    def states(self) -> list[State]:
        """The states of the processes, by sheet."""
        return [sheet.state for sheet in self.sheets]

    def totals(self) -> dict[Key, list[int]]:
        """Every row of every sheet by key; those of one key are added up."""
        totals: dict[Key, list[int]] = {}
        for sheet in self.sheets:
            for key, numbers in sheet.rows():
                known = totals.get(key)
                if known is None:
                    totals[key] = numbers
                else:
                    totals[key] = [a + b for a, b in zip(known, numbers, strict=True)]
        return totals

    def total(self, key: Key, width: int = 1) -> list[int]:
        """One key's row, added up over the sheets; zeros where none has it."""
        total = [0] * width
        for sheet in self.sheets:
            at = sheet.find(key)
            if at is not None:
                numbers = sheet.words[at : at + width]
                total = [a + b for a, b in zip(total, numbers, strict=True)]
        return total


class Sheet:
    """The rows of one process. Only one process writes to it.

    words: the memory; a row's numbers are counted up right here.
    """

    def __init__(self, words: memoryview[int]) -> None:
        self.words = words
        self._places: dict[Key, int] = {}
        self._read = _FIRST  # up to where rows are known
        self._is_full = False

    @property
    def state(self) -> State:
        return State(self.words[_STATE])

    @state.setter
    def state(self, state: State) -> None:
        self.words[_STATE] = state

    def row(self, *key: str, width: int = 1) -> int:
        """The place of a key's row in `words`, made if there is none.

        A sheet that is full has one more row, which nobody reads.
        """
        at = self.find(key)
        if at is None:
            at = self._make(key, width)
        return at

    def counter(self, *key: str) -> Counter:
        """A number that only grows."""
        return Counter(self.words, self.row(*key))

    def gauge(self, *key: str) -> Counter:
        """A number that falls, too, and that counts while its process lives."""
        return Counter(self.words, self.row(NOW, *key))

    def leave(self) -> None:
        """Its process is gone: what it has counted stays, what held then does not."""
        self.state = State.GONE
        self._look()
        for key, at in self._places.items():
            if key[0] == NOW:
                self.words[at] = 0

    def histogram(self, *key: str, bounds: Sequence[int]) -> Histogram:
        """Counts by size; the last two words are for the larger ones and the sum."""
        return Histogram(self.words, self.row(*key, width=len(bounds) + 2), bounds)

    def find(self, key: Key) -> int | None:
        """The place of a key's row; None where there is none."""
        at = self._places.get(key)
        if at is None:
            self._look()
            at = self._places.get(key)
        return at

    def rows(self) -> Iterator[tuple[Key, list[int]]]:
        """Every row's key and numbers."""
        self._look()
        for key, at in self._places.items():
            yield key, self.words[at : at + self.words[at - 1]].tolist()

    def _look(self) -> None:
        """Find the rows that its process has made since the last look."""
        while self._read < self.words[_END]:
            start = self._read
            length = self.words[start]
            at = start + 2 + _words_of(length)
            text = bytes(self.words[start + 1 : at - 1])[:length]
            self._places[tuple(json.loads(text))] = at
            self._read = at + self.words[at - 1]

    def _make(self, key: Key, width: int) -> int:
        # Length and text of the key, width, numbers. Others read what is before the
        # end, so the end is moved last.
        text = json.dumps(key).encode()
        start = self.words[_END] or _FIRST
        at = start + 2 + _words_of(len(text))
        if at + width > len(self.words) - SPARE:
            if not self._is_full:
                self._is_full = True
                log.warning("there are too many metrics; further ones are not counted")
            return len(self.words) - SPARE
        self.words[start] = len(text)
        padded = text.ljust(_words_of(len(text)) * _WORD)
        self.words[start + 1 : at - 1] = memoryview(padded).cast("q")
        self.words[at - 1] = width
        self._places[key] = at
        self._read = self.words[_END] = at + width
        return at


# The words of the row that nobody reads.
SPARE = 64


def _words_of(size: int) -> int:
    return -(-size // _WORD)


class Counter:
    """A number that only grows."""

    __slots__ = ("_at", "_words")

    def __init__(self, words: memoryview[int], at: int) -> None:
        self._words = words
        self._at = at

    def add(self, number: int = 1) -> None:
        self._words[self._at] += number

    def set(self, number: int) -> None:
        """For what also falls: the sum over the processes is then what holds now."""
        self._words[self._at] = number


class Histogram:
    """Counts of sizes: how many are at most each bound, and larger; and their sum."""

    __slots__ = ("_at", "_bounds", "_sum", "_words")

    def __init__(self, words: memoryview[int], at: int, bounds: Sequence[int]) -> None:
        self._words = words
        self._at = at
        self._sum = at + len(bounds) + 1
        self._bounds = bounds

    def observe(self, size: int) -> None:
        words = self._words
        words[self._at + bisect_left(self._bounds, size)] += 1
        words[self._sum] += size
