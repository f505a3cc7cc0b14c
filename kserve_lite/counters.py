"""Counts of a process, kept where its siblings can read them.

A `Board` is memory that the processes of a server share: a sheet for each, and on a
sheet rows of 64-bit integers, each row with a key. A process writes to its own sheet
only, without a lock; whoever wants the totals adds all sheets up. What a process has
counted thus outlives it, however it dies, and one that takes its place goes on with its
sheet. An addition costs 0.1 us; prometheus_client's own counters, which its processes
share through files, cost 2 to 3.

Numbers are counted by one thread of the process, the event loop's; rows may be made and
read by any. What each number means, and how it is shown, is not known here.
"""

from __future__ import annotations

import enum
import json
import logging
import mmap
import os
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from operator import add
from threading import Lock

log = logging.getLogger("kserve_lite")

Key = tuple[str, ...]
# What keys begin with whose rows are about this moment, and so end with the process.
NOW = "now"

_WORD = 8
# Words of a sheet, 8 MiB, of which only those that are written to take memory. A model
# needs some 200, and each kind of request that came for it 15.
SHEET = 1024 * 1024
# The words of the row that nobody reads, and the most that any row may have.
SPARE = 64
# The sheet's own words, before its rows.
_END, _STATE, _PID, _SINCE, _FIRST = 0, 1, 2, 3, 4


class State(enum.IntEnum):
    """What the process of a sheet is about to do, for its siblings to know."""

    GONE = 0  # there is none
    STARTING = 1  # it loads its models and takes no connections yet
    SERVING = 2  # it takes connections; not all of its models are ready
    READY = 3  # it takes connections, and all of its models are ready
    STOPPING = 4  # it finishes what is in flight


class Board:
    """Sheets of several processes, in memory that they share.

    sheets: how many there are. fd: of the memory, where another process made it; the
    number of sheets must then be what it was there.
    """

    def __init__(self, sheets: int = 1, fd: int | None = None) -> None:
        size = sheets * SHEET * _WORD
        is_new = fd is None
        if fd is None:
            # One process alone needs no file descriptor.
            fd = _shared_file(size) if sheets > 1 else -1
        self.fd = fd
        words = memoryview(mmap.mmap(fd, size)).cast("q")
        self.sheets = [Sheet(words[i * SHEET :][:SHEET]) for i in range(sheets)]
        self._words = words
        if is_new:
            words[_SINCE] = time.time_ns()

    def close(self) -> None:
        """Close the file descriptor; the memory is there until nobody uses it."""
        if self.fd != -1:
            os.close(self.fd)
            self.fd = -1

    @property
    def since(self) -> float:
        """When everything was zero, in seconds since 1970."""
        return self._words[_SINCE] / 1e9

    @property
    def states(self) -> list[State]:
        """The states of the processes, by sheet."""
        return [sheet.state for sheet in self.sheets]

    def totals(self) -> dict[Key, list[int]]:
        """Every row of every sheet by key; those of one key are added up."""
        totals: dict[Key, list[int]] = {}
        for sheet in self.sheets:
            sheet.add_to(totals)
        return totals

    def total(self, key: Key, width: int = 1) -> list[int]:
        """One key's row, added up over the sheets; zeros where none has it."""
        total = [0] * width
        for sheet in self.sheets:
            at = sheet.find(key, width)
            if at is not None:
                numbers = sheet.words[at : at + width]
                total = [a + b for a, b in zip(total, numbers, strict=True)]
        return total


def _shared_file(size: int) -> int:
    """Memory with a file descriptor, which has no name and ends with its processes."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("kserve-lite")
    else:  # not Linux
        import tempfile

        fd, path = tempfile.mkstemp()
        os.unlink(path)  # noqa: PTH108 - the path is a string, for this line only
    os.ftruncate(fd, size)
    return fd


class Sheet:
    """The rows of one process. Only one process writes to it.

    words: the memory; a row's numbers are counted up right here. writers: called by
    `settle()`, where it is cheaper to count beside the sheet and to write at times.
    """

    def __init__(self, words: memoryview[int]) -> None:
        self.words = words
        self._places: dict[Key, int] = {}
        self._read = _FIRST  # up to where rows are known
        self._is_full = False
        self._lock = Lock()
        self.writers: list[Callable[[], None]] = []

    def settle(self) -> None:
        """Have what was counted beside the sheet written to it."""
        for write in self.writers:
            write()

    @property
    def state(self) -> State:
        return State(self.words[_STATE])

    @state.setter
    def state(self, state: State) -> None:
        self.words[_STATE] = state
        self.words[_PID] = os.getpid() if state else 0

    @property
    def pid(self) -> int:
        """The process that set the state; 0 where there is none."""
        return self.words[_PID]

    def row(self, *key: str, width: int = 1) -> int:
        """The place of a key's row in `words`, made if there is none.

        width: words of the row, 64 at most. A sheet that is full has one more row,
        which nobody reads.
        """
        at = self.find(key, width)
        if at is None:
            with self._lock:
                at = self._find(key, width) or self._make(key, width)
        return at

    def counter(self, *key: str) -> Counter:
        """A number that only grows."""
        return Counter(self.words, self.row(*key))

    def gauge(self, *key: str) -> Counter:
        """A number that falls, too, and that counts while its process lives."""
        return Counter(self.words, self.row(NOW, *key))

    def leave(self) -> None:
        """Its process is gone: what it has counted stays, what held then does not.

        For those who saw it end, before another takes its place.
        """
        self.state = State.GONE
        self._look()
        for key, at in self._places.items():
            if key[0] == NOW:
                self.words[at] = 0

    def histogram(self, *key: str, bounds: Sequence[int]) -> Histogram:
        """Counts by size; the last two words are for the larger ones and the sum."""
        return Histogram(self.words, self.row(*key, width=len(bounds) + 2), bounds)

    def find(self, key: Key, width: int = 1) -> int | None:
        """The place of a key's row; None where there is none of that width."""
        at = self._find(key, width)
        if at is None:
            self._look()
            at = self._find(key, width)
        return at

    def rows(self) -> Iterator[tuple[Key, list[int]]]:
        """Every row's key and numbers."""
        self._look()
        # A copy: another thread may make rows meanwhile.
        for key, at in list(self._places.items()):
            yield key, self.words[at : at + self.words[at - 1]].tolist()

    def add_to(self, totals: dict[Key, list[int]]) -> None:
        """Add every row up with those of the same key in `totals`."""
        for key, numbers in self.rows():
            known = totals.get(key)
            if known is None or len(known) != len(numbers):
                totals[key] = numbers
            else:
                totals[key] = list(map(add, known, numbers))

    def _find(self, key: Key, width: int) -> int | None:
        # Of another width is what a process counted with other code, before a rolling
        # restart: that row is left alone, and the newer one is the key's.
        at = self._places.get(key)
        return at if at is not None and self.words[at - 1] == width else None

    def _look(self) -> None:
        """Find the rows that its process has made since the last look."""
        with self._lock:
            while self._read < self.words[_END]:
                start = self._read
                length = self.words[start]
                at = start + 2 + _words_of(length)
                text = bytes(self.words[start + 1 : at - 1])[:length]
                width = self.words[at - 1]
                try:
                    key = tuple(json.loads(text))
                except ValueError:
                    return
                # Some processors let others see the end move before the row is there.
                if not width:
                    return
                self._places[key] = at
                self._read = at + width

    def _make(self, key: Key, width: int) -> int:
        # Length and text of the key, width, numbers. Others read what is before the
        # end, so the end is moved last: a process killed here leaves nothing that its
        # successor would have to mend, but for text where the next row is written.
        if width > SPARE:
            raise ValueError(f"a row has at most {SPARE} words, not {width}")
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
        # Not zero where a longer key's text was left by a process that was killed.
        self.words[at : at + width] = memoryview(bytes(width * _WORD)).cast("q")
        self._places[key] = at
        self._read = self.words[_END] = at + width
        return at


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
        try:
            words[self._sum] += size
        except ValueError:  # beyond 64 bits: 107 days of a thousand requests at a time
            words[self._sum] = 0

    def observe_all(self, sizes: list[int]) -> None:
        """Count several, which are sorted by the way."""
        words, bounds = self._words, self._bounds
        sizes.sort()
        done, count = 0, len(sizes)
        while done < count:
            bucket = bisect_left(bounds, sizes[done])
            begun, done = done, count
            if bucket < len(bounds):
                done = bisect_right(sizes, bounds[bucket], begun)
            words[self._at + bucket] += done - begun
        try:
            words[self._sum] += sum(sizes)
        except ValueError:  # as above
            words[self._sum] = 0
