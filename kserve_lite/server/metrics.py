"""`GET /metrics`: the numbers on the board as Prometheus text or OpenMetrics.

prometheus_client says which of the two a scraper wants and writes what is its own: its
default registry, where it tells about the process and where applications and libraries
have metrics. Ours are written here: its encoders take 13 to 22 us a line, 0.2 s for 100
models, and these 1.2. A test holds that both write the same.
https://prometheus.io/docs/specs/om/open_metrics_spec/,
https://prometheus.io/docs/instrumenting/exposition_formats/

With several processes the registry of the one that answers would mislead: then there
are each process's `process_*` with the label `worker`, and an application's metrics
where PROMETHEUS_MULTIPROC_DIR is set, by which prometheus_client adds them up.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from importlib import import_module
from itertools import accumulate
from time import monotonic_ns
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import anyio
import anyio.lowlevel
import anyio.to_thread

from kserve_lite.counters import NOW, Board, Key, State
from kserve_lite.metrics import FAMILIES, WORKERS, Family, HistogramFamily

if TYPE_CHECKING:
    from prometheus_client import Metric

# The values of the labels, and the numbers.
Row: TypeAlias = tuple[tuple[str, ...], list[int]]
Encoder: TypeAlias = Callable[[Any], bytes]

log = logging.getLogger("kserve_lite")

# What is asked for in a version that is not known here gets this one.
_OPEN = "application/openmetrics-text; version=1.0.0;"
_EOF = b"# EOF\n"
# Nanoseconds of work after which others have their turn on the event loop.
_SLICE = 1_000_000


class Metrics:
    """What `/metrics` answers.

    board: with the numbers of all processes. publish: brings what this process says of
    this moment onto the board.
    """

    def __init__(
        self, board: Board, *, publish: Callable[[], None] | None = None
    ) -> None:
        self._board = board
        self._publish = publish
        self._lock = anyio.Lock()
        self._latest: tuple[int, bytes, bytes] | None = None

    async def render(self, accept: str | None = None) -> tuple[bytes, bytes]:
        """Return the content type and the body. accept: the header, whatever it says.

        Those who ask while an answer is made share the next one, so that it does not
        matter how many they are.
        """
        asked = monotonic_ns()
        if not _import.cache_info().currsize:
            await anyio.to_thread.run_sync(_import)
        encode, name = _encoder(accept or "")
        content_type = name.encode("ascii")
        async with self._lock:
            latest = self._latest
            if latest is None or latest[0] < asked or latest[1] != content_type:
                began = monotonic_ns()
                body = await self._render(encode, is_open=name.startswith(_OPEN))
                self._latest = latest = began, content_type, body
        return latest[1:]

    async def _render(self, encode: Encoder, *, is_open: bool) -> bytes:
        if self._publish is not None:
            self._publish()
        board = self._board
        totals: dict[Key, list[int]] = {}
        for sheet in board.sheets:
            sheet.add_to(totals)
            await anyio.lowlevel.checkpoint()
        for state in list(State)[1:]:
            totals[WORKERS.name, state.name.lower()] = [board.states.count(state)]
        pieces = [_foreign_text(board, encode).removesuffix(_EOF)]
        began = 0
        for piece in _own_text(totals, board.since, is_open=is_open):
            pieces.append(piece)
            if monotonic_ns() - began > _SLICE:
                await anyio.lowlevel.checkpoint()
                began = monotonic_ns()
        if is_open:
            pieces.append(_EOF)
        return b"".join(pieces)


@cache
def _import() -> None:
    """Import prometheus_client, for whose 40 ms others would wait on the event loop."""
    for name in ("exposition", "metrics", "multiprocess"):
        import_module(f"prometheus_client.{name}")


def _encoder(accept: str) -> tuple[Encoder, str]:
    """The encoder of what is not ours, and the content type."""
    from prometheus_client.exposition import choose_encoder

    # This would rename even ours, and nobody has to do as asked here.
    accept = accept.replace("escaping=dots", "escaping=underscores")
    try:
        encode, name = choose_encoder(accept)
    except (ValueError, TypeError):  # a version such as 1.x
        return choose_encoder("")
    # It answers with whatever version is asked for.
    if "openmetrics" in name and not name.startswith(_OPEN):
        return choose_encoder(_OPEN)
    return encode, name


# --- What is ours ---


def _own_text(
    totals: Mapping[Key, list[int]], since: float, *, is_open: bool
) -> Iterator[bytes]:
    """Pieces of the text, each of some lines."""
    from prometheus_client import metrics

    rows: dict[str, list[Row]] = {f.name: [] for f in FAMILIES}
    for key, numbers in totals.items():
        name, *labels = key[1:] if key[0] == NOW else key
        if name in rows:
            rows[name].append((tuple(labels), numbers))
    shows_created = getattr(metrics, "_use_created", True)
    created = _number(since) if shows_created else ""
    for family in FAMILIES:
        if not family.labels and not rows[family.name]:
            rows[family.name].append(((), [0]))
        yield from _family_text(family, rows[family.name], created, is_open=is_open)


def _family_text(
    family: Family, rows: Sequence[Row], created: str, *, is_open: bool
) -> Iterator[bytes]:
    yield _head(family, family.stem if is_open else family.name, family.kind)
    lines_of = _histogram(family) if isinstance(family, HistogramFamily) else None
    stamps: list[str] = []
    for values, numbers in rows:
        # What a process with other code has counted, before a rolling restart.
        if len(values) != len(family.labels) or len(numbers) != family.width:
            continue
        labels = _label_text(family, values)
        if lines_of is None:
            lines = f"{family.name}{_braced(labels)} {_number(numbers[0])}\n"
        else:
            lines = lines_of(labels, numbers)
        if created and family.kind != "gauge":
            stamp = f"{family.stem}_created{_braced(labels)} {created}\n"
            if is_open:
                lines += stamp
            else:
                stamps.append(stamp)
        yield lines.encode()
    # The text format knows no such thing: there it is a gauge of its own.
    if stamps:
        yield _head(family, f"{family.stem}_created", "gauge")
        yield "".join(stamps).encode()


def _head(family: Family, name: str, kind: str) -> bytes:
    return f"# HELP {name} {family.help}\n# TYPE {name} {kind}\n".encode()


def _label_text(family: Family, values: Sequence[str]) -> str:
    """Labels in the order of their names, as encoders write them."""
    return ",".join(
        f'{name}="{_escaped(value)}"'
        for name, value in sorted(zip(family.labels, values, strict=True))
    )


def _escaped(value: str) -> str:
    # What is no Unicode scalar value cannot be UTF-8.
    value = value.encode(errors="replace").decode()
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _braced(labels: str) -> str:
    return f"{{{labels}}}" if labels else ""


def _histogram(family: HistogramFamily) -> Callable[[str, list[int]], str]:
    """What writes a row of a histogram, given its labels' text and its numbers."""
    sizes = [_number(bound / family.unit) for bound in family.bounds]
    starts = [f'{family.name}_bucket{{le="{size}"' for size in (*sizes, "+Inf")]

    def lines(labels: str, numbers: list[int]) -> str:
        *buckets, total = numbers
        end = f",{labels}}}" if labels else "}"
        counts = [*accumulate(buckets)]
        text = [
            f"{start}{end} {_number(count)}\n"
            for start, count in zip(starts, counts, strict=True)
        ]
        labels = _braced(labels)
        text.append(f"{family.name}_count{labels} {_number(counts[-1])}\n")
        text.append(f"{family.name}_sum{labels} {_number(total / family.unit)}\n")
        return "".join(text)

    return lines


def _number(value: float) -> str:
    """A number as Go writes it, as far as it differs from Python for those here."""
    text = repr(float(value))
    point = text.find(".")
    if value < 0 or point <= 6:
        return text
    digits = f"{text[0]}.{text[1:point]}{text[point + 1 :]}".rstrip("0.")
    return f"{digits}e+{point - 1:02d}"


# --- What is prometheus_client's, the application's and its libraries' ---


class _Collected(NamedTuple):
    """What an encoder takes for a registry."""

    families: Iterable[Metric]

    def collect(self) -> Iterable[Metric]:
        return self.families


def _foreign_text(board: Board, encode: Encoder) -> bytes:
    # KServe's SDK, if an application imports it, registers families of these names.
    ours = {family.stem for family in FAMILIES}
    try:
        families = [f for f in _foreign(board) if f.name not in ours]
        return encode(_Collected(families))
    except Exception:  # the boundary: collectors may be anybody's
        log.exception("a collector in prometheus_client's registry failed")
        return b""


def _foreign(board: Board) -> Iterator[Metric]:
    from prometheus_client import PLATFORM_COLLECTOR, REGISTRY

    if len(board.sheets) == 1:
        yield from REGISTRY.collect()
        return
    yield from PLATFORM_COLLECTOR.collect()
    yield from _processes(board)
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        from prometheus_client import multiprocess

        collector: Any = multiprocess.MultiProcessCollector  # has no types
        yield from collector(None).collect()


def _processes(board: Board) -> Iterable[Metric]:
    """`process_*` of each worker.

    Not their sums: a worker that is replaced would take its CPU time out of them, which
    looks as if a counter began again, and rates would leap.
    """
    from prometheus_client import Metric, ProcessCollector

    families: dict[str, Metric] = {}
    for index, sheet in enumerate(board.sheets):
        pid = sheet.pid
        if not pid:
            continue
        for found in ProcessCollector(pid=partial(str, pid), registry=None).collect():
            family = families.setdefault(
                found.name, Metric(found.name, found.documentation, found.type)
            )
            for sample in found.samples:
                labels = {**sample.labels, "worker": str(index)}
                family.add_sample(sample.name, labels, sample.value)
    return families.values()
