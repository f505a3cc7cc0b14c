"""How far a fetch is: a line that moves on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import threading
from contextlib import suppress
from time import monotonic

log = logging.getLogger("kserve_lite")

# A log line at each tenth, not sooner than the first number of seconds after the last
# one, and not later than the second.
SHORTEST = 1.0
PERIOD = 30.0
# Seconds between two states of the line on a terminal.
FRAME = 0.1
WIDTH = 30


class Progress:
    """Counts bytes as they come, from any thread.

    shown: where from. files: how many. total: bytes; None if that is not known. here:
    bytes that have come before. bar: whether a terminal, if there is one, is ours.
    """

    def __init__(
        self, shown: str, files: int, total: int | None, *, here: int, bar: bool
    ) -> None:
        self._shown = shown
        self._files = files
        self._total = total
        self._done = self._here = here
        self._lock = threading.Lock()
        self._began = self._told = monotonic()
        self._tenth = 10 * here // total if total else 0
        self._bar = bar and sys.stderr is not None and sys.stderr.isatty()
        if not self._bar:
            size = "" if total is None else f", {amount(total)}"
            rest = f", {amount(here)} of them here already" if here else ""
            log.info("fetching %s: files: %d%s%s", shown, files, size, rest)

    def add(self, count: int) -> None:
        """Count bytes that have come, or, below 0, that were of no use."""
        with self._lock:
            self._done += count
            now = monotonic()
            if self._bar:
                if now - self._told >= FRAME:
                    self._told = now
                    self._draw()
                return
            tenth = 10 * self._done // self._total if self._total else 0
            passed = now - self._told
            if (tenth > self._tenth and passed >= SHORTEST) or passed >= PERIOD:
                self._tenth, self._told = max(tenth, self._tenth), now
                log.info("fetching %s: %s", self._shown, self._state())

    def finish(self, *, complete: bool) -> None:
        """Tell what it came to; where it is not complete, an error follows."""
        with self._lock:
            if self._bar:
                self._draw()
                with suppress(OSError):  # a terminal may be closed now
                    print(file=sys.stderr, flush=True)
        if complete:
            log.info(
                "fetched %s: files: %d, %s, in %.1f s",
                self._shown,
                self._files,
                amount(self._done - self._here),
                monotonic() - self._began,
            )

    def _state(self) -> str:
        seconds = max(monotonic() - self._began, 0.001)
        speed = f"{amount(max(self._done - self._here, 0) / seconds)}/s"
        if not self._total:
            return f"{amount(self._done)}, {speed}"
        share = min(100 * self._done // self._total, 100)
        return f"{share} %, {amount(self._done)} of {amount(self._total)}, {speed}"

    def _draw(self) -> None:
        bar = ""
        if self._total:
            full = min(WIDTH * self._done // self._total, WIDTH)
            bar = f"[{'#' * full}{' ' * (WIDTH - full)}] "
        with suppress(OSError):
            # To the end of the line, which may have been longer.
            print(
                f"\rfetching the model {bar}{self._state()}\x1b[K",
                end="",
                file=sys.stderr,
                flush=True,
            )


def amount(count: float) -> str:
    """Bytes, as people write them."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
