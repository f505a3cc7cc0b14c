"""A loaded model as it runs: its state, what is in flight, and who waits.

Every load of a model has a `Running` of its own, so that requests which began before a
reload end with the state that they began with.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from kserve_lite.dispatch.statistics import Statistics, Times
from kserve_lite.handlers import Stage

if TYPE_CHECKING:
    from kserve_lite.dispatch.admission import Gate
    from kserve_lite.dispatch.batching import Batcher


class Running:
    """One load of a model, and the requests that use it.

    state: what its load handler returned.
    gate: what its calls go through; None where any number may run.
    batcher: what puts its rows together; None where it does not batch.
    queues: whether its requests may have to wait, for a thread or for their turn.
    is_staged: whether a lone handler's calls, too, are to be timed or wait.
    batches: calls for rows of several requests that run, or wait for their turn.
    in_flight: requests that are being answered, and threads that still run for
        requests which have been given up.
    """

    __slots__ = (
        "_emptied",
        "batcher",
        "batches",
        "gate",
        "in_flight",
        "is_staged",
        "queues",
        "state",
        "statistics",
    )

    def __init__(
        self,
        state: Any,
        statistics: Statistics,
        gate: Gate | None = None,
    ) -> None:
        self.state = state
        self.statistics = statistics
        self.gate = gate
        self.batcher: Batcher | None = None
        self.queues = False
        self.is_staged = False
        self.in_flight = 0
        self.batches = 0
        self._emptied: asyncio.Event | None = None

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn, threads aside."""
        gate, batcher = self.gate, self.batcher
        waiting = 0 if gate is None else gate.waiting
        return waiting if batcher is None else waiting + batcher.waiting

    def begin(self) -> None:
        """A request begins, or a thread goes on for one that was given up."""
        self.in_flight += 1

    def ended(
        self, started: int, stage: Stage, times: Times | None, succeeded: bool
    ) -> None:
        """A request is over; see `Statistics.count`."""
        self.statistics.count(started, stage, times, succeeded)
        self.in_flight -= 1
        if self._emptied is not None:
            self._tell()

    def end(self) -> None:
        """A thread has ended that went on for a request which was given up."""
        self.in_flight -= 1
        if self._emptied is not None:
            self._tell()

    def batch_ended(self) -> None:
        """A batch's call has ended; its requests may have been given up before."""
        self.batches -= 1
        if self._emptied is not None:
            self._tell()

    def _tell(self) -> None:
        if self._emptied is not None and not self.in_flight and not self.batches:
            self._emptied.set()

    async def drained(self) -> None:
        """Wait until nothing is in flight; no request may begin meanwhile."""
        if self.in_flight or self.batches:
            self._emptied = asyncio.Event()
            await self._emptied.wait()
