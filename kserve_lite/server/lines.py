"""Lines for a stream, written together by a thread, or to a pipe with room at once.

A stream that blocks, a pipe that nobody reads say, holds up that thread and nobody
else: what it cannot take in is dropped and counted. One that fails hurts nobody.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import stat
from collections.abc import Iterator
from threading import Condition, RLock, Thread
from time import monotonic
from typing import TextIO

log = logging.getLogger("kserve_lite")

# Lines wait so many seconds for others, unless there are so many bytes of them.
DELAY = 0.1
ENOUGH = 256 * 1024
# Bytes that wait while the stream blocks; as many more are being written.
MOST = 1024 * 1024
# Seconds between two lines about those that were dropped.
REPORT = 10.0


class Lines:
    """Takes whole lines, from any thread, and writes them to a stream in order.

    dead: whether the stream is gone for good, so that lines need not even be made.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.dead = stream is None
        self._fd = _descriptor(stream)
        # A pipe keeps a write of this size whole, whoever else writes (POSIX write(2)).
        # Other processes do, and our own log where standard error is the same pipe.
        is_pipe = _is_pipe(self._fd)
        self._chunk = select.PIPE_BUF if is_pipe else ENOUGH
        # For each write the thread would take the interpreter's lock from the loop.
        self._goes_at_once = is_pipe and hasattr(os, "RWF_NOWAIT")
        # Re-entrant: the garbage collector may end an abandoned request in `add()`.
        self._lock = RLock()
        self._changed = Condition(self._lock)
        self._thread: Thread | None = None
        self._lines: list[bytes] = []
        self._size = 0
        self._dropped = 0
        self._report_due = 0.0
        self._is_busy = self._is_hurried = self._is_closing = False
        self._is_failing = False

    def add(self, line: bytes) -> None:
        """Have a line, or several, written soon; without waiting."""
        with self._lock:
            if self._goes_at_once and self._is_done():
                line = self._write_at_once(line)
                if not line:
                    return
            if self._size >= MOST:
                self._dropped += line.count(b"\n")
                return
            self._lines.append(line)
            self._size += len(line)
            if self._size == len(line) or self._size >= ENOUGH:
                if self._thread is None:
                    self._start()
                self._changed.notify_all()

    def flush(self, seconds: float) -> bool:
        """Wait until all is written, at most so long; return whether it is."""
        with self._changed:
            self._is_hurried = True
            self._changed.notify_all()
            done = self._changed.wait_for(self._is_done, seconds)
            self._is_hurried = False
            return done

    def close(self, seconds: float) -> None:
        """The same, and end the thread; a line that comes later starts one again."""
        due = monotonic() + seconds
        self.flush(seconds)
        with self._changed:
            thread = self._thread
            self._is_closing = True
            self._changed.notify_all()
        if thread is not None:
            thread.join(max(0.0, due - monotonic()))

    def _is_done(self) -> bool:
        return not self._lines and not self._is_busy

    def _start(self) -> None:
        self._is_closing = False
        self._thread = Thread(target=self._work, name="access-log", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # the system's limit of threads: the next line tries again
            self._thread = None
            self._dropped += b"".join(self._lines).count(b"\n")
            self._lines.clear()
            self._size = 0

    def _work(self) -> None:
        """The life of the thread."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._is_closing)
                if not self._lines:
                    self._thread = None
                    return
                self._changed.wait_for(self._is_urgent, DELAY)
                lines, self._lines, self._size = self._lines, [], 0
                self._is_busy = True
            self._write(lines)
            self._report()
            with self._changed:
                self._is_busy = False
                self._changed.notify_all()

    def _report(self) -> None:
        """Say what was dropped, now and then only: it may go on for long."""
        with self._lock:
            now = monotonic()
            if not self._dropped or (now < self._report_due and not self._is_closing):
                return
            dropped, self._dropped = self._dropped, 0
            self._report_due = now + REPORT
        log.warning(
            "%d access lines were dropped: standard output takes them too slowly",
            dropped,
        )

    def _is_urgent(self) -> bool:
        return self._size >= ENOUGH or self._is_hurried or self._is_closing

    def _write_at_once(self, data: bytes) -> bytes:
        """Write what the pipe has room for; return the rest."""
        assert self._fd is not None  # noqa: S101 - it is a pipe
        written = 0
        try:
            for chunk in _chunks([data], self._chunk):
                taken = os.pwritev(self._fd, [chunk], -1, os.RWF_NOWAIT)
                written += taken
                if taken < len(chunk):  # a part of a line longer than PIPE_BUF
                    break
        except BlockingIOError:  # it is full
            pass
        except OSError:  # Linux before 6.4; what else is wrong the thread will meet
            self._goes_at_once = False
        return data[written:]

    def _write(self, lines: list[bytes]) -> None:
        try:
            for chunk in _chunks(lines, self._chunk):
                self._write_chunk(chunk)
        except Exception as error:  # noqa: BLE001 - the stream may be anybody's
            gone = getattr(error, "errno", None) in (errno.EPIPE, errno.EBADF)
            gone = gone or getattr(self._stream, "closed", False)
            if not self._is_failing:
                log.warning(
                    "access lines cannot be written to standard output: %s%s",
                    error,
                    "; no more are" if gone else "",
                )
            self.dead = gone
            self._is_failing = True
        else:
            self._is_failing = False

    def _write_chunk(self, chunk: memoryview) -> None:
        if self._fd is None:
            if self._stream is not None:
                self._stream.write(str(chunk, "utf-8"))
                self._stream.flush()
            return
        while chunk:
            try:
                chunk = chunk[os.write(self._fd, chunk) :]
            except BlockingIOError:  # somebody made the terminal or pipe non-blocking
                waiter = select.poll()
                waiter.register(self._fd, select.POLLOUT)
                waiter.poll()


def _chunks(lines: list[bytes], most: int) -> Iterator[memoryview]:
    """Whole lines together, at most so many bytes, unless it is one line."""
    data = b"".join(lines)
    view = memoryview(data)
    start = 0
    while len(data) - start > most:
        end = data.rfind(b"\n", start, start + most) + 1
        if not end:  # a longer line
            end = data.find(b"\n", start) + 1 or len(data)
        yield view[start:end]
        start = end
    yield view[start:]


def _descriptor(stream: TextIO | None) -> int | None:
    """What the system knows a stream by; None for one that is in memory, or closed."""
    try:
        return None if stream is None else stream.fileno()
    except (OSError, ValueError, AttributeError):
        return None


def _is_pipe(fd: int | None) -> bool:
    try:
        return fd is not None and stat.S_ISFIFO(os.fstat(fd).st_mode)
    except OSError:
        return False
