"""The board that processes share: exact over real processes, however they end."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kserve_lite import counters
from kserve_lite.counters import NOW, Board, Histogram, Sheet, State

ROOT = Path(__file__).parents[1]
BOUNDS = (10, 100, 1000)


@pytest.fixture
def board() -> Iterator[Board]:
    made = Board(3)
    yield made
    made.close()


def child(board: Board, index: int, code: str) -> subprocess.Popen[str]:
    """A process that counts on a sheet; `code` uses `board` and `sheet`."""
    start = (
        "import sys\n"
        "from kserve_lite.counters import Board, State\n"
        f"board = Board({len(board.sheets)}, fd={board.fd})\n"
        f"sheet = board.sheets[{index}]\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", start + code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=[board.fd],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def ended(process: subprocess.Popen[str]) -> int:
    process.communicate(timeout=30)
    return process.returncode


def fresh(sheet: Sheet) -> Sheet:
    """The same memory as one sees it who knows nothing of it."""
    return Sheet(sheet.words)


def state_of(sheet: Sheet) -> State:
    """Asked each time: what mypy remembers of an attribute, others may change."""
    return sheet.state


# --- One process ---


def test_numbers_are_counted_and_found_by_key() -> None:
    board = Board()
    sheet = board.sheets[0]
    one = sheet.counter("requests", "a")
    one.add()
    one.add(41)
    sheet.counter("requests", "b").add(7)
    sheet.counter("requests", "a").add(100)  # the same row
    assert board.totals() == {("requests", "a"): [142], ("requests", "b"): [7]}
    assert board.total(("requests", "a")) == [142]
    assert board.total(("requests", "c")) == [0]
    assert board.fd == -1  # one process alone needs none
    assert abs(board.since - Path("/proc/self").stat().st_mtime) < 3600


@pytest.mark.parametrize(
    ("size", "bucket"), [(0, 0), (10, 0), (11, 1), (100, 1), (1000, 2), (1001, 3)]
)
def test_a_size_is_at_most_its_bound(size: int, bucket: int) -> None:
    board = Board()
    board.sheets[0].histogram("h", bounds=BOUNDS).observe(size)
    expected = [0, 0, 0, 0, size]
    expected[bucket] = 1
    assert board.total(("h",), width=5) == expected


def test_a_sum_beyond_64_bits_begins_again() -> None:
    board = Board()
    sizes = board.sheets[0].histogram("h", bounds=BOUNDS)
    for size in (2**63 - 1, 1, 5):
        sizes.observe(size)
    assert board.total(("h",), width=5) == [2, 0, 0, 1, 5]


@given(st.lists(st.integers(0, 2_000)))
def test_several_sizes_count_as_one_by_one(sizes: list[int]) -> None:
    alone, together = Board(), Board()
    for size in sizes:
        alone.sheets[0].histogram("h", bounds=BOUNDS).observe(size)
    together.sheets[0].histogram("h", bounds=BOUNDS).observe_all(list(sizes))
    assert together.total(("h",), width=5) == alone.total(("h",), width=5)


def test_several_sizes_beyond_64_bits() -> None:
    board = Board()
    sizes = board.sheets[0].histogram("h", bounds=BOUNDS)
    sizes.observe_all([2**63 - 1, 1])
    sizes.observe_all([5, 2**70])
    assert board.total(("h",), width=5) == [2, 0, 0, 2, 0]


def test_what_is_counted_beside_a_sheet_is_written_when_it_settles() -> None:
    board = Board()
    sheet = board.sheets[0]
    number = sheet.counter("n")
    sheet.writers += [lambda: number.add(2), lambda: number.add(3)]
    assert board.total(("n",)) == [0]
    sheet.settle()
    assert board.total(("n",)) == [5]


@given(st.lists(st.lists(st.text(max_size=40), min_size=1, max_size=5), max_size=20))
def test_keys_hold_any_text(keys: list[list[str]]) -> None:
    sheet = Board().sheets[0]
    for number, key in enumerate(keys):
        sheet.words[sheet.row(*key, width=2)] += number
    expected: dict[tuple[str, ...], int] = {}
    for number, key in enumerate(keys):
        expected[tuple(key)] = expected.get(tuple(key), 0) + number
    for reader in (sheet, fresh(sheet)):
        assert {key: numbers[0] for key, numbers in reader.rows()} == expected


@pytest.mark.parametrize("text", ["\ud800", 'q"\\\n\0', "größe 🜁", "]" * 9, ""])
def test_awkward_keys(text: str) -> None:
    sheet = Board().sheets[0]
    sheet.counter("c", text).add()
    assert list(fresh(sheet).rows()) == [(("c", text), [1])]


def test_a_row_has_a_most() -> None:
    sheet = Board().sheets[0]
    sheet.row("widest", width=counters.SPARE)
    with pytest.raises(ValueError, match="64 words"):
        sheet.row("wider", width=counters.SPARE + 1)


def test_a_key_of_another_width_is_another_row() -> None:
    """A process with newer code takes over: it must not count in others' words."""
    board = Board()
    sheet = board.sheets[0]
    old = sheet.histogram("h", bounds=(1, 2))
    sheet.counter("behind").add(5)
    new = fresh(sheet).histogram("h", bounds=(1, 2, 3, 4))
    old.observe(2)
    new.observe(100)
    assert board.totals() == {("h",): [0, 0, 0, 0, 1, 100], ("behind",): [5]}
    assert board.total(("h",), width=6) == [0, 0, 0, 0, 1, 100]


def test_sheets_of_different_widths_do_not_fail(board: Board) -> None:
    board.sheets[0].histogram("h", bounds=(1, 2)).observe(1)
    board.sheets[1].histogram("h", bounds=(1, 2, 3)).observe(2)
    assert board.totals() == {("h",): [0, 1, 0, 0, 2]}
    assert board.total(("h",), width=4) == [1, 0, 0, 1]


def test_a_full_sheet_drops_what_is_new_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(counters, "SHEET", 512)
    board = Board(2)
    sheet, sibling = board.sheets
    with caplog.at_level(logging.WARNING, logger="kserve_lite"):
        rows = [sheet.histogram("h", str(i), bounds=BOUNDS) for i in range(100)]
        for row in rows:
            row.observe(5)
    sibling.counter("c").add(3)
    kept = {key[1] for key, _ in sheet.rows()}
    assert kept == {str(i) for i in range(len(kept))}  # the first ones
    assert 30 < len(kept) < 100
    assert len(caplog.records) == 1
    for reader in (sheet, fresh(sheet)):
        assert all(numbers == [1, 0, 0, 0, 5] for _, numbers in reader.rows())
    assert board.total(("h", "99"), width=5) == [0] * 5
    assert board.total(("c",)) == [3]
    sheet.counter("h" * 10_000).add()  # longer than all that is left
    # What is there already goes on.
    sheet.histogram("h", "0", bounds=BOUNDS).observe(5)
    assert board.total(("h", "0"), width=5) == [2, 0, 0, 0, 10]
    board.close()


def test_closing_keeps_what_is_counted(board: Board) -> None:
    fd = board.fd
    row = board.sheets[1].counter("c")
    board.close()
    board.close()
    row.add(2)
    assert board.total(("c",)) == [2]
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


# --- Rows that are only half there ---


def test_what_a_killed_process_left_half_made_is_made_again() -> None:
    """It may be killed between any two words: every prefix of them is tried."""
    long_key, key = ("left", "x" * 100), ("c", "made")
    whole = Board().sheets[0]
    whole.counter("before").add(9)
    begin = whole.words[0]
    whole.row(*long_key)
    for stop in range(begin, whole.words[0] + 1):
        board = Board()
        sheet = board.sheets[0]
        sheet.counter("before").add(9)
        sheet.words[begin:stop] = whole.words[begin:stop]
        successor = fresh(sheet)
        sizes: Histogram = successor.histogram(*key, bounds=BOUNDS)
        sizes.observe(20)
        assert board.totals() == {("before",): [9], key: [0, 1, 0, 0, 20]}


def test_a_row_that_is_not_seen_yet_is_seen_later() -> None:
    """Where the end is seen to move before the row's words are."""
    whole = Board().sheets[0]
    whole.counter("first").add(9)
    begin = whole.words[0]
    whole.counter("second", "x" * 30).add(4)
    words = [int(word) for word in whole.words[: whole.words[0]]]
    # The number itself is not among them: zero is a value like others.
    for unseen in range(begin, len(words) - 1):
        sheet = Board().sheets[0]
        for i, word in enumerate(words):
            sheet.words[i] = 0 if i == unseen else word
        assert dict(sheet.rows()) == {("first",): [9]}
        sheet.words[unseen] = words[unseen]
        assert dict(sheet.rows()) == {("first",): [9], ("second", "x" * 30): [4]}


# --- Several processes ---


def test_totals_are_exact_over_processes(board: Board) -> None:
    code = """
sizes = sheet.histogram("h", "größe", bounds=(10, 100, 1000))
one = sheet.counter("c")
for i in range(20_000):
    one.add()
    sizes.observe(i % 2000)
    if i % 10 == 0:
        sheet.counter("row", str(i)).add(i)
"""
    processes = [child(board, index, code) for index in range(3)]
    # Read all the while: what is seen is never half a row, and never falls.
    seen = 0
    while any(process.poll() is None for process in processes):
        totals = board.totals()
        count = totals.get(("c",), [0])[0]
        assert count >= seen
        seen = count
        assert all(key[0] in ("h", "c", "row") for key in totals)
    assert [ended(process) for process in processes] == [0, 0, 0]
    totals = board.totals()
    assert totals[("c",)] == [60_000]
    sizes = [i % 2000 for i in range(20_000)]
    assert totals[("h", "größe")] == [
        3 * sum(size <= 10 for size in sizes),
        3 * sum(10 < size <= 100 for size in sizes),
        3 * sum(100 < size <= 1000 for size in sizes),
        3 * sum(size > 1000 for size in sizes),
        3 * sum(sizes),
    ]
    for i in range(0, 20_000, 10):
        assert totals["row", str(i)] == [3 * i]
    assert len(totals) == 2002


COUNTS_UNTIL_KILLED = """
sheet.state = State.READY
sheet.gauge("busy").set(3)
one, made = sheet.counter("c"), 0
print("counts", flush=True)
while True:
    one.add()
    made += 1
    sheet.counter("row", str(made % 5000), "x" * (made % 90)).add()
"""


def test_a_killed_process_loses_nothing_and_its_successor_goes_on(
    board: Board,
) -> None:
    sheet = board.sheets[1]
    last = 0
    for _ in range(5):
        process = child(board, 1, COUNTS_UNTIL_KILLED)
        assert process.stdout is not None
        assert process.stdout.readline() == "counts\n"
        while board.total(("c",))[0] < last + 1000:
            assert process.poll() is None
        assert state_of(sheet) is State.READY
        assert sheet.pid == process.pid
        assert board.total((NOW, "busy")) == [3]
        process.send_signal(signal.SIGKILL)
        assert ended(process) == -signal.SIGKILL
        last = board.total(("c",))[0]
        sheet.leave()
        assert state_of(sheet) is State.GONE
        assert sheet.pid == 0
        # What held then holds no more; what was counted stays.
        assert board.total((NOW, "busy")) == [0]
        assert board.total(("c",)) == [last]
        rows = [n for key, (n,) in board.totals().items() if key[0] == "row"]
        # It was killed between the two additions, or not.
        assert sum(rows) in (last, last - 1)
        counted = sum(rows)
        sheet.counter("row", "difference").add(last - counted)
    assert last >= 5000


def test_one_process_leaves_the_sheets_of_others_alone(board: Board) -> None:
    for index in (0, 2):
        board.sheets[index].state = State.READY
        board.sheets[index].gauge("busy").set(index + 1)
    assert ended(child(board, 1, "sheet.state = State.STARTING")) == 0
    assert board.states == [State.READY, State.STARTING, State.READY]
    assert board.sheets[0].pid == os.getpid()
    board.sheets[1].leave()
    assert board.states == [State.READY, State.GONE, State.READY]
    assert board.total((NOW, "busy")) == [4]


def test_since_is_the_same_for_all(board: Board) -> None:
    process = child(board, 2, "print(repr(board.since))")
    out, _ = process.communicate(timeout=30)
    assert float(out) == board.since > 1_700_000_000
