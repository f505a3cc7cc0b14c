"""What is counted, by name: the families of `/metrics`, for those who count.

A family is a row of the table below. `on(sheet, *labels)` gives the number to count
with, which is made once and kept, not looked up for each request. Times are counted in
nanoseconds and shown in seconds. How they are shown is in `server/metrics.py`.

Values of labels come from the server's own side: a peer who could choose them could
fill the memory of every scraper. `RequestCounts` sees to that for requests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kserve_lite.counters import Counter, Histogram, Sheet

if TYPE_CHECKING:
    from kserve_lite.records import Record

SECOND = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Family:
    """Numbers of one meaning, one for each combination of values of its labels.

    name, help: as shown. labels: their names, in the order in which values are given.
    """

    kind: ClassVar[str]

    name: str
    help: str
    labels: tuple[str, ...] = ()

    @property
    def stem(self) -> str:
        """The name without its ending; no two families may have the same."""
        return self.name.removesuffix("_total")

    @property
    def width(self) -> int:
        """How many numbers a row has."""
        return 1

    def key(self, labels: tuple[str, ...]) -> tuple[str, ...]:
        if len(labels) != len(self.labels):
            raise ValueError(f"{self.name} has the labels {self.labels}, not {labels}")
        return (self.name, *labels)


class CounterFamily(Family):
    """Numbers that only grow."""

    kind = "counter"

    def on(self, sheet: Sheet, *labels: str) -> Counter:
        return sheet.counter(*self.key(labels))


class GaugeFamily(Family):
    """Numbers that fall, too; the processes' are added up."""

    kind = "gauge"

    def on(self, sheet: Sheet, *labels: str) -> Counter:
        return sheet.gauge(*self.key(labels))


@dataclass(frozen=True, slots=True)
class HistogramFamily(Family):
    """Sizes, counted by how large they are.

    bounds: of the buckets, in the unit that is counted. unit: how many of that make one
    of what is shown.
    """

    kind: ClassVar[str] = "histogram"

    bounds: tuple[int, ...] = ()
    unit: int = SECOND

    @property
    def width(self) -> int:
        """How many numbers a row has: the buckets, what is larger, and the sum."""
        return len(self.bounds) + 2

    def on(self, sheet: Sheet, *labels: str) -> Histogram:
        return sheet.histogram(*self.key(labels), bounds=self.bounds)


def _nanoseconds(*seconds: float) -> tuple[int, ...]:
    return tuple(round(s * SECOND) for s in seconds)


# prometheus_client's own, which KServe's histograms have.
_KSERVE = _nanoseconds(
    *(0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10),
)
# What this server adds to a request is below a millisecond.
_FINE = _nanoseconds(
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
_LOADS = _nanoseconds(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_MODEL = ("model_name",)

PREPROCESS = HistogramFamily(
    "request_preprocess_seconds", "pre-process request latency", _MODEL, _KSERVE
)
PREDICT = HistogramFamily(
    "request_predict_seconds", "predict request latency", _MODEL, _KSERVE
)
POSTPROCESS = HistogramFamily(
    "request_postprocess_seconds", "post-process request latency", _MODEL, _KSERVE
)
EXPLAIN = HistogramFamily(
    "request_explain_seconds", "explain request latency", _MODEL, _KSERVE
)
REQUESTS = CounterFamily(
    "kserve_lite_requests_total",
    "Requests that have ended, by what was asked and the status.",
    ("model_name", "protocol", "method", "code"),
)
REQUEST_TIMES = HistogramFamily(
    "kserve_lite_request_seconds",
    "Time from a request's head to the end of its answer.",
    ("model_name", "protocol"),
    _FINE,
)
IN_FLIGHT = GaugeFamily(
    "kserve_lite_requests_in_flight", "Requests that models work on or hold.", _MODEL
)
QUEUE_TIMES = HistogramFamily(
    "kserve_lite_queue_seconds",
    "Time that a request waited for a thread, its turn or its batch.",
    _MODEL,
    _FINE,
)
BATCH_ROWS = HistogramFamily(
    "kserve_lite_batch_rows",
    "Rows of a call of a handler.",
    _MODEL,
    tuple(2**i for i in range(11)),
    unit=1,
)
LOADS = HistogramFamily(
    "kserve_lite_model_load_seconds", "Time that a load took.", _MODEL, _LOADS
)
RECEIVED = CounterFamily(
    "kserve_lite_received_bytes_total", "Bytes of HTTP that came from clients."
)
SENT = CounterFamily(
    "kserve_lite_sent_bytes_total", "Bytes of HTTP that went to clients."
)
CONNECTIONS = GaugeFamily("kserve_lite_connections", "Connections that are open.")
ACCEPTED = CounterFamily(
    "kserve_lite_accepted_connections_total", "Connections that have been accepted."
)
RESTARTS = CounterFamily(
    "kserve_lite_worker_restarts_total",
    "Worker processes that took the place of one that had failed.",
)
# Nobody counts these: the states of the processes are on the board.
WORKERS = GaugeFamily(
    "kserve_lite_workers", "Processes that serve, by state.", ("state",)
)

FAMILIES: tuple[Family, ...] = (
    PREPROCESS,
    PREDICT,
    POSTPROCESS,
    EXPLAIN,
    REQUESTS,
    REQUEST_TIMES,
    IN_FLIGHT,
    QUEUE_TIMES,
    BATCH_ROWS,
    LOADS,
    RECEIVED,
    SENT,
    CONNECTIONS,
    ACCEPTED,
    RESTARTS,
    WORKERS,
)

# Of kinds of requests. Some 30 methods, 500 codes and any number of models are
# possible, and none of them is a peer's to choose.
MOST_REMEMBERED = 4096


class RequestCounts:
    """Counts requests as they end; for the thread of the event loop.

    is_known: whether a model of that name is served, or was. Requests for others are
    counted, without a name.
    """

    def __init__(self, sheet: Sheet, is_known: Callable[[str], bool]) -> None:
        self._sheet = sheet
        self._is_known = is_known
        self._kinds: dict[tuple[str, str, str, int | str], _Kind] = {}

    def count(self, *records: Record) -> None:
        """Count requests whose answers have been sent, or given up."""
        known = self._kinds
        counted: list[_Kind] = []
        for record in records:
            key = record.model, record.protocol, record.action, record.code
            kind = known.get(key) or self._kind_of(record)
            tooks = kind.tooks
            if not tooks:
                counted.append(kind)
            tooks.append(record.took)
        for kind in counted:
            kind.settle()

    def _kind_of(self, record: Record) -> _Kind:
        model = record.model if self._is_known(record.model) else ""
        key = model, record.protocol, record.action, record.code
        kind = self._kinds.get(key)
        if kind is None:
            # The action without its protocol: "predict", "infer", "ModelInfer".
            method = record.action.removeprefix(f"{record.protocol}_")
            labels = model, record.protocol, method, str(record.code)
            times = None
            if model:
                times = REQUEST_TIMES.on(self._sheet, model, record.protocol)
            kind = _Kind(REQUESTS.on(self._sheet, *labels), times)
            if len(self._kinds) < MOST_REMEMBERED:
                self._kinds[key] = kind
        return kind


class _Kind:
    """Requests that are counted together, and how long each of them took, in ns.

    times: None where the model is none that is known.
    """

    __slots__ = ("_number", "_times", "tooks")

    def __init__(self, number: Counter, times: Histogram | None) -> None:
        self._number, self._times = number, times
        self.tooks: list[int] = []

    def settle(self) -> None:
        tooks, self.tooks = self.tooks, []
        self._number.add(len(tooks))
        if self._times is not None:
            self._times.observe_all(tooks)
