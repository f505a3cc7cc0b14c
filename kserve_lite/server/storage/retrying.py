"""Tries what a store may do at the next time; says in one line why it never will.

The one place where exceptions of the stores' packages are caught: beyond it there are
StartupError and Stopped only.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import TypeVar

from kserve_lite.errors import KServeLiteError, StartupError
from kserve_lite.server.storage.faults import Fault, fault_of
from kserve_lite.server.storage.remotes import Missing
from kserve_lite.server.storage.staging import Stopped

log = logging.getLogger("kserve_lite")
T = TypeVar("T")

# What does not come any further so many times in a row is given up ...
MOST_TRIES = 5
# ... and so it is when so many seconds have passed since it has failed first, in which
# it has not come so many bytes further: who sends a byte a time is as good as away.
LONGEST = 600.0
ENOUGH = 1024 * 1024
# Seconds before the second try; twice as many each time, up to the last.
BACK_OFF = 0.5
MOST_BACK_OFF = 30.0


class Failed(StartupError):
    """What a store cannot give, in words for whoever starts the server."""

    def __init__(self, reason: str, fault: Fault) -> None:
        super().__init__(reason)
        self.fault = fault


class Corrupt(Exception):
    """What came has another checksum than the store tells."""


@dataclass(frozen=True, slots=True)
class Patience:
    """Tries again and again.

    shown: the URI, as people may read it. stopping: ends the waiting.
    """

    shown: str
    stopping: threading.Event

    def __call__(
        self,
        attempt: Callable[[], T],
        *,
        what: str = "",
        reached: Callable[[], int] = lambda: 0,
    ) -> T:
        """Return what the attempt does, at last; raise Failed, or Stopped.

        what: the file. reached: how far it has come; an attempt that brings it further
        than all before does not count as one more failure.
        """
        tries, furthest, since, was_at = 0, 0, 0.0, 0
        while True:
            try:
                return attempt()
            except (KServeLiteError, Stopped):
                raise
            # Whatever the packages of a store raise.
            except Exception as error:
                log.debug("fetching %s failed", what, exc_info=error)
                at, now = reached(), monotonic()
                if not since or at >= was_at + ENOUGH:
                    since, was_at = now, at
                tries = 1 if at > furthest else tries + 1
                furthest = max(furthest, at)
                fault = fault_of(error)
                if isinstance(error, Corrupt):
                    fault = Fault.CORRUPT
                late = now - since > LONGEST
                if tries >= MOST_TRIES or late or not fault.passes:
                    raise self._failed(error, fault, what) from error
                delay = min(BACK_OFF * 2 ** (tries - 1), MOST_BACK_OFF)
                log.warning(
                    "fetching %s: %s (%s): trying again in %g s",
                    what or self.shown,
                    fault.value,
                    type(error).__name__,
                    delay,
                )
                if self.stopping.wait(delay):
                    raise Stopped from error

    def _failed(self, error: Exception, fault: Fault, what: str) -> Failed:
        words = fault.value
        if isinstance(error, Missing) and str(error):
            words = f"{error}: check its name, and the endpoint"
        elif fault is Fault.BUSY:
            words += f" ({type(error).__name__})"
        elif fault is Fault.UNKNOWN:
            words += f" ({type(error).__name__}); --log_level DEBUG tells more"
        where = f"{self.shown}: {what}" if what else self.shown
        return Failed(f"storage_uri {where}: {words}", fault)
