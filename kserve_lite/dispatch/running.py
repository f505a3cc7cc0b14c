"""A loaded model as it runs: its state, what is in flight, and what it has done.

Every load of a model has a `Running` of its own, so that requests which began before a
reload end with the state that they began with. Times are nanoseconds, as in Triton's
statistics extension, which perf_analyzer reads:
https://github.com/triton-inference-server/server, docs/protocol/extension_statistics.md
"""

from __future__ import annotations

import asyncio
from time import perf_counter_ns, time_ns
from typing import TYPE_CHECKING, Any

from kserve_lite.handlers import Stage

if TYPE_CHECKING:
    from kserve_lite.dispatch.admission import Gate
    from kserve_lite.dispatch.batching import Batcher

# What a request's time was spent on: by stage, and QUEUE for waiting for a thread.
Times = dict[str, int]
QUEUE = "queue"
# Triton's extensions know no model without a version; perf_analyzer fails without a
# number, and PyTriton finds no such model.
UNVERSIONED = "1"


class Statistics:
    """What a model has done since the server started, over all its loads."""

    __slots__ = (
        "batches",
        "failed_ns",
        "failures",
        "input_ns",
        "last",
        "output_ns",
        "queue_ns",
        "succeeded_ns",
        "successes",
    )

    def __init__(self) -> None:
        self.successes = self.succeeded_ns = 0
        self.failures = self.failed_ns = 0
        self.queue_ns = self.input_ns = self.output_ns = 0
        # Of batches: how many of a number of rows, and the time that they took.
        self.batches: dict[int, list[int]] = {}
        self.last = 0  # time.perf_counter_ns() when the last request began

    def add_times(self, times: Times) -> None:
        """Count what parts of a request that succeeded took, beside predicting."""
        self.queue_ns += times.get(QUEUE, 0)
        self.input_ns += times.get(Stage.PREPROCESS, 0)
        self.output_ns += times.get(Stage.POSTPROCESS, 0)

    def add_batch(self, rows: int, ns: int) -> None:
        """Count a call of a handler for several requests' rows."""
        batch = self.batches.setdefault(rows, [0, 0])
        batch[0] += 1
        batch[1] += ns

    def document(self, name: str, version: str | None) -> dict[str, Any]:
        """The statistics in the words of Triton's extension.

        `compute_input` is preprocess, `compute_output` is postprocess, `compute_infer`
        everything else that is no waiting.
        """
        executions = sum(count for count, _ in self.batches.values())
        begun = time_ns() - (perf_counter_ns() - self.last)
        known = self.queue_ns + self.input_ns + self.output_ns
        spent = {
            "queue": self.queue_ns,
            "compute_input": self.input_ns,
            "compute_infer": self.succeeded_ns - known,
            "compute_output": self.output_ns,
        }
        return {
            "name": name,
            "version": version or UNVERSIONED,
            "last_inference": begun // 1_000_000 if self.last else 0,
            "inference_count": self.successes,
            "execution_count": executions or self.successes,
            "inference_stats": {
                "success": {"count": self.successes, "ns": self.succeeded_ns},
                "fail": {"count": self.failures, "ns": self.failed_ns},
                **{k: {"count": self.successes, "ns": ns} for k, ns in spent.items()},
                "cache_hit": {"count": 0, "ns": 0},
                "cache_miss": {"count": 0, "ns": 0},
            },
            "batch_stats": [
                {
                    "batch_size": rows,
                    "compute_input": {"count": count, "ns": 0},
                    "compute_infer": {"count": count, "ns": ns},
                    "compute_output": {"count": count, "ns": 0},
                }
                for rows, (count, ns) in sorted(self.batches.items())
            ],
        }


class Running:
    """One load of a model, and the requests that use it.

    state: what its load handler returned.
    gate: what its calls go through; None where any number may run.
    batcher: what puts its rows together; None where it does not batch.
    queues: whether its requests may have to wait, for a thread or for their turn.
    is_staged: whether a lone handler's calls, too, are to be timed or wait.
    in_flight: requests that are being answered, and threads that still run for
        requests which have been given up.
    """

    __slots__ = (
        "_emptied",
        "batcher",
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

    def succeeded(self, started: int, times: Times | None) -> None:
        """A request has been answered."""
        statistics = self.statistics
        statistics.successes += 1
        statistics.succeeded_ns += perf_counter_ns() - started
        if times is not None:
            statistics.add_times(times)
        self.end()

    def failed(self, started: int) -> None:
        """A request got an error, or was given up."""
        self.statistics.failures += 1
        self.statistics.failed_ns += perf_counter_ns() - started
        self.end()

    def end(self) -> None:
        """A request, or a thread, has ended."""
        self.in_flight -= 1
        if not self.in_flight and self._emptied is not None:
            self._emptied.set()

    async def drained(self) -> None:
        """Wait until nothing is in flight; no request may begin meanwhile."""
        if self.in_flight:
            self._emptied = asyncio.Event()
            await self._emptied.wait()
