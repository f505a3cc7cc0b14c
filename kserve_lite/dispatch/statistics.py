"""What a model has done: counted here, over all its loads, read over all processes.

Two views of the same requests: KServe's histograms by stage and ours, which `/metrics`
shows, and the sums of Triton's statistics extension, which perf_analyzer reads:
https://github.com/triton-inference-server/server, docs/protocol/extension_statistics.md
Times are nanoseconds. The numbers lie on a sheet that the server's processes share.
"""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter_ns, time_ns
from typing import Any, NamedTuple

from kserve_lite import metrics
from kserve_lite.counters import Board
from kserve_lite.handlers import Stage
from kserve_lite.model import Model

# What a request's time was spent on: by stage, QUEUE for waiting for a thread or for
# its turn, BATCH for waiting for the batch that its rows are in.
Times = dict[str, int]
QUEUE, BATCH = "queue", "batch"
# Calls of a handler for several requests' rows, by rows: how many, and their time.
Batches = Mapping[int, tuple[int, int]]


class Spent(NamedTuple):
    """What a process has done for a request that another one answers.

    times: see `Times`. batches: those of all requests since it was last told.
    """

    times: Mapping[str, int]
    batches: Batches


def waited(times: Mapping[str, int]) -> int:
    """What a request spent on waiting, so far."""
    return times.get(QUEUE, 0) + times.get(BATCH, 0)


# Triton's extensions know no model without a version; perf_analyzer fails without a
# number, and PyTriton finds no such model.
UNVERSIONED = "1"

# The words of a model's row: how many succeeded and their time, the same of those that
# failed, and what the time of the former was spent on.
_SUCCESSES, _FAILURES, _QUEUE_NS, _INPUT_NS, _OUTPUT_NS, _WIDTH = 0, 2, 4, 5, 6, 7

# Calls that are counted together, at most.
TOGETHER = 64
# A global, since reading a member off its class costs 0.12 us in Python 3.11.
_PREDICT = Stage.PREDICT
_STAGES = {
    Stage.PREPROCESS: metrics.PREPROCESS,
    Stage.PREDICT: metrics.PREDICT,
    Stage.POSTPROCESS: metrics.POSTPROCESS,
    Stage.EXPLAIN: metrics.EXPLAIN,
}


class Statistics:
    """What a model has done since the server started.

    board, index: where the server's processes count, and this one's sheet. uncounted:
    has this while `settle()` has something to write.
    """

    def __init__(
        self, model: Model, board: Board, index: int, uncounted: set[Statistics]
    ) -> None:
        self._board = board
        self._uncounted = uncounted
        # Of calls of a lone predict handler: their times, when the last one began.
        self._tooks: list[int] = []
        self._began = 0
        self._name, self._version = model.name, model.version
        self._sheet = sheet = board.sheets[index]
        self._words = sheet.words
        self._key = ("statistics", model.name, model.version or "")
        self._row = sheet.row(*self._key, width=_WIDTH)
        self._last_key = ("statistics_last", *self._key[1:])
        self._last = sheet.row(*self._last_key)
        self._batches: dict[int, int] = {}
        handled = {handler.stage for verb in _VERBS for handler in model.plan(verb)}
        self._stages = {
            stage: family.on(sheet, model.name)
            for stage, family in _STAGES.items()
            if stage in handled
        }
        self._queued = metrics.QUEUE_TIMES.on(sheet, model.name)
        self._rows = metrics.BATCH_ROWS.on(sheet, model.name)
        self.loads = metrics.LOADS.on(sheet, model.name)

    @property
    def successes(self) -> int:
        """Requests of this process that were answered."""
        self.settle()
        return self._words[self._row + _SUCCESSES]

    @property
    def failures(self) -> int:
        """Requests of this process that got an error, or were given up."""
        return self._words[self._row + _FAILURES]

    def count(
        self, started: int, stage: Stage, times: Times | None, succeeded: bool
    ) -> None:
        """Count a request that was answered, or failed, or was given up.

        started: time.perf_counter_ns(). stage: of the lone handler, where there are no
        times.
        """
        took = perf_counter_ns() - started
        if times is None and succeeded and stage is _PREDICT:
            # The most frequent: some together take a third of the time.
            tooks = self._tooks
            tooks.append(took)
            self._began = started
            if len(tooks) == 1:
                self._uncounted.add(self)
            elif len(tooks) == TOGETHER:
                self.settle()
            return
        words, row = self._words, self._row
        words[self._last] = started
        if not succeeded:
            row += _FAILURES
        words[row] += 1
        try:
            words[row + 1] += took
        except ValueError:  # beyond 64 bits, as in `Histogram.observe`
            words[row + 1] = 0
        if times is None:
            self._stages[stage].observe(took)
            return
        self._count_stages(times)
        if succeeded:
            words[row + _QUEUE_NS] += waited(times)
            words[row + _INPUT_NS] += times.get(Stage.PREPROCESS, 0)
            words[row + _OUTPUT_NS] += times.get(Stage.POSTPROCESS, 0)

    def settle(self) -> None:
        """Write what `count` has only remembered."""
        tooks = self._tooks
        if not tooks:
            return
        self._tooks = []
        words, row = self._words, self._row
        words[self._last] = max(words[self._last], self._began)
        words[row] += len(tooks)
        try:
            words[row + 1] += sum(tooks)
        except ValueError:
            words[row + 1] = 0
        self._stages[_PREDICT].observe_all(tooks)

    def _count_stages(self, times: Times) -> None:
        waiting = waited(times)
        if waiting:
            self._queued.observe(waiting)
        for part, ns in times.items():
            if part in self._stages:
                self._stages[Stage(part)].observe(ns)

    def add_elsewhere(self, spent: Spent) -> None:
        """Add what another process has done for a request of this model's.

        But not its times of predict and explain: `count` has the whole way there and
        back.
        """
        times = spent.times
        for rows, (calls, ns) in spent.batches.items():
            self.add_batch(rows, ns, calls)
        waiting = waited(times)
        if waiting:
            self._queued.observe(waiting)
        for stage in (Stage.PREPROCESS, Stage.POSTPROCESS):
            if stage in times:
                known = self._stages.get(stage)
                if known is None:
                    known = _STAGES[stage].on(self._sheet, self._name)
                    self._stages[stage] = known
                known.observe(times[stage])

    def add_batch(self, rows: int, ns: int, calls: int = 1) -> None:
        """Count calls of a handler for several requests' rows, all as many."""
        at = self._batches.get(rows)
        if at is None:
            at = self._sheet.row("batch", *self._key[1:], str(rows), width=2)
            self._batches[rows] = at
        self._words[at] += calls
        self._words[at + 1] += ns
        for _ in range(calls):
            self._rows.observe(rows)

    def batches(self) -> Batches:
        """The batches of this process."""
        words = self._words
        return {rows: (words[at], words[at + 1]) for rows, at in self._batches.items()}

    def document(self) -> dict[str, Any]:
        """The statistics in the words of Triton's extension.

        `compute_input` is preprocess, `compute_output` is postprocess, `compute_infer`
        everything else that is no waiting.
        """
        self.settle()
        board = self._board
        total = board.total(self._key, _WIDTH)
        successes, succeeded_ns, failures, failed_ns, *known = total
        queue_ns, input_ns, output_ns = known
        own = ("batch", *self._key[1:])
        batches = sorted(
            (int(key[3]), numbers[0], numbers[1])
            for key, numbers in board.totals().items()
            if key[:3] == own
        )
        executions = sum(count for _, count, _ in batches)
        last = max(
            sheet.words[at]
            for sheet in board.sheets
            if (at := sheet.find(self._last_key)) is not None
        )
        begun = time_ns() - (perf_counter_ns() - last)
        spent = {
            "queue": queue_ns,
            "compute_input": input_ns,
            "compute_infer": succeeded_ns - sum(known),
            "compute_output": output_ns,
        }
        return {
            "name": self._name,
            "version": self._version or UNVERSIONED,
            "last_inference": begun // 1_000_000 if last else 0,
            "inference_count": successes,
            "execution_count": executions or successes,
            "inference_stats": {
                "success": {"count": successes, "ns": succeeded_ns},
                "fail": {"count": failures, "ns": failed_ns},
                **{k: {"count": successes, "ns": ns} for k, ns in spent.items()},
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
                for rows, count, ns in batches
            ],
        }


_VERBS = (Stage.PREDICT, Stage.EXPLAIN)
