"""A loaded model as it runs: its state, what is in flight, and what it has done.

Every load of a model has a `Running` of its own, so that requests which began before a
reload end with the state that they began with. Times are nanoseconds, as in Triton's
statistics extension, which perf_analyzer reads:
https://github.com/triton-inference-server/server, docs/protocol/extension_statistics.md
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from concurrent.futures import Future
from typing import Any

from kserve_lite.handlers import Stage

# What a request's time was spent on: by stage, and QUEUE for waiting for a thread.
Times = dict[str, int]
QUEUE = "queue"
# Triton's extensions know no model without a version; perf_analyzer fails without a
# number, and PyTriton finds no such model.
UNVERSIONED = "1"


class Statistics:
    """What a model has done since the server started, over all its loads."""

    __slots__ = (
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
        self.last = 0  # time.perf_counter_ns() when the last request began

    def add_times(self, times: Times) -> None:
        """Count what parts of a request that succeeded took, beside predicting."""
        self.queue_ns += times.get(QUEUE, 0)
        self.input_ns += times.get(Stage.PREPROCESS, 0)
        self.output_ns += times.get(Stage.POSTPROCESS, 0)

    def document(self, name: str, version: str | None) -> dict[str, Any]:
        """The statistics in the words of Triton's extension.

        `compute_input` is preprocess, `compute_output` is postprocess, `compute_infer`
        everything else that is no waiting.
        """
        begun = time.time_ns() - (time.perf_counter_ns() - self.last)
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
            "execution_count": self.successes,
            "inference_stats": {
                "success": {"count": self.successes, "ns": self.succeeded_ns},
                "fail": {"count": self.failures, "ns": self.failed_ns},
                **{k: {"count": self.successes, "ns": ns} for k, ns in spent.items()},
                "cache_hit": {"count": 0, "ns": 0},
                "cache_miss": {"count": 0, "ns": 0},
            },
            "batch_stats": [],
        }


class Running:
    """One load of a model, and the requests that use it.

    state: what its load handler returned.
    in_flight: requests that are being answered, and threads that still run for
        requests which have been given up.
    """

    __slots__ = ("_emptied", "in_flight", "state", "statistics")

    def __init__(self, state: Any, statistics: Statistics) -> None:
        self.state = state
        self.statistics = statistics
        self.in_flight = 0
        self._emptied: asyncio.Event | None = None

    def end(self) -> None:
        """A request, or a thread, has ended."""
        self.in_flight -= 1
        if not self.in_flight and self._emptied is not None:
            self._emptied.set()

    def hold(self, job: Future[Any]) -> None:
        """Count a job that nobody waits for any more until its thread is done."""
        loop = asyncio.get_running_loop()
        self.in_flight += 1

        def done(_: Future[Any]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self.end)

        job.add_done_callback(done)

    async def drained(self) -> None:
        """Wait until nothing is in flight; no request may begin meanwhile."""
        if self.in_flight:
            self._emptied = asyncio.Event()
            await self._emptied.wait()
