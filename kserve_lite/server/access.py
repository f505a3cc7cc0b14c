"""The access log: one line for each request, when it is over.

Text, fields parted by one space, each without a space unless it is quoted:

    DATE TIME PROCESS kserve_lite.access PEER "METHOD PATH HTTP/VERSION" CODE BYTES
    MILLISECONDSms PROTOCOL MODEL id=REQUEST-ID trace=TRACE-ID

all on one line; `-` is what is not known; CODE is the name of a gRPC call's status. The
same in JSON: `FIELDS`. Queries may hold secrets: they are written as `?...`.
Probes are requests, too. Lines are of level INFO: `log_level` WARNING drops them.

They go to standard output, as KServe's do, straight: a LogRecord a line would take
ten times as long. Only where the program or `log_config` configured logging itself
they go through the logger "kserve_lite.access", with the same fields. What a peer sent
is escaped, so that it ends no line and steers no terminal, and cut, so that a line fits
in 4096 bytes, which a pipe that several processes write to keeps whole.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import sys
from collections.abc import Callable
from functools import lru_cache
from time import localtime, perf_counter_ns, strftime, time_ns
from typing import Any, TextIO, TypeAlias, TypeVar

from kserve_lite.records import Record
from kserve_lite.rest.routes import origin_form
from kserve_lite.server.escaping import quote, quoted, visible
from kserve_lite.server.lines import Lines
from kserve_lite.server.logs import (
    CYAN,
    GREEN,
    RED,
    YELLOW,
    OwnHandler,
    coloured,
    has_colours,
    utc,
)
from kserve_lite.server.settings import ServerSettings
from kserve_lite.telling import tell

log = logging.getLogger("kserve_lite.access")

K = TypeVar("K")
V = TypeVar("V")
# What the words of a line are made of.
_Known: TypeAlias = tuple[str | int, ...]

# Bytes, as they are escaped; in JSON it may be twice as many.
MAX_PATH = 1024
MAX_WORD = 128

# Requests whose lines are made together, and seconds that the first of them waits.
TOGETHER = 32
DELAY = 0.05

# In JSON, and of LogRecords. status is a number: a gRPC call's is 200; grpc_status, its
# own status, is there for a call only.
FIELDS = (
    "peer",
    "method",
    "path",
    "http_version",
    "status",
    "grpc_status",
    "bytes",
    "duration_ms",
    "protocol",
    "model",
    "request_id",
    "trace_id",
    "span_id",
)


class AccessLog:
    """Writes a line for each request that has ended; made once a server, at its start.

    stream: what to write to where the log is ours to write, default: standard output.
    """

    def __init__(self, settings: ServerSettings, stream: TextIO | None = None) -> None:
        stream = sys.stdout if stream is None else stream  # None if it was closed
        self._on = settings.access_log
        self._lines: Lines | None = None
        self._pending: list[Record] = []
        if self._on and _only_ours_listens():
            self._lines = Lines(stream)
        self._format: Callable[[list[Record], int], bytes] = (
            _Json().lines
            if settings.log_format == "json"
            else _Text(has_colours(stream)).lines
        )
        self._told = _Text(colours=False).told

    def write(self, *records: Record) -> None:
        """Have the lines of requests written; on the event loop, without waiting.

        Lines are made some at a time: one by one, between other work, they take twice
        as long.
        """
        pending = self._pending
        is_first = not pending
        pending += records
        # Lines of several requests belong to the context, and the span, of none.
        if len(pending) >= TOGETHER:
            contextvars.Context().run(self._settle)
        elif is_first:
            context = contextvars.Context()
            try:
                loop = asyncio.get_running_loop()
            except RuntimeError:
                context.run(self._settle)
            else:
                loop.call_later(DELAY, self._settle, context=context)

    def _settle(self) -> None:
        """Make the lines of what is pending."""
        pending, self._pending = self._pending, []
        if not self._on or not log.isEnabledFor(logging.INFO):
            return
        lines = self._lines
        if lines is not None and not log.handlers:
            if not lines.dead:
                # From the clock of records to the world's.
                lines.add(self._format(pending, time_ns() - perf_counter_ns()))
        elif log.hasHandlers():
            for record in pending:
                tell(log, self._told(record), _fields(record))

    def flush(self, seconds: float = 1.0) -> None:
        """Wait until what was written is out, but no longer than `seconds`."""
        self._settle()
        if self._lines is not None:
            self._lines.flush(seconds)

    def close(self, seconds: float = 1.0) -> None:
        """The same, and end the thread that writes."""
        self._settle()
        if self._lines is not None:
            self._lines.close(seconds)


def _only_ours_listens() -> bool:
    """Whether the logger's lines would reach our own handler and no other."""
    logger: logging.Logger | None = log
    found: list[logging.Handler] = []
    while logger is not None:
        found += logger.handlers
        logger = logger.parent if logger.propagate else None
    return bool(found) and all(isinstance(h, OwnHandler) for h in found)


class _Text:
    """Lines of pieces that are known: to format one takes three times as long.

    Bytes, as the ids are. What is remembered is forgotten when there is too much of it.
    """

    def __init__(self, colours: bool) -> None:
        self._code = _coloured_code if colours else _plain_code
        # The second that stamps are of, by the clock of records, and its beginning.
        self._begun = 0
        self._stamp = b""
        self._process = f" {os.getpid()} {log.name} "
        self._words: dict[_Known, tuple[bytes, bytes]] = {}
        self._numbers: dict[int, bytes] = {}
        self._times: dict[int, bytes] = {}

    def lines(self, records: list[Record], since: int) -> bytes:
        begun, stamp = self._begun, self._stamp
        words, numbers, times = self._words, self._numbers, self._times
        pieces: list[bytes] = []
        for record in records:
            took, sent = record.took, record.sent
            # Small numbers from here on: dividing large ones takes long.
            passed = record.started + took - begun
            if not 0 <= passed < 1_000_000_000:
                begun, stamp = self._begin(record, since)
                passed = record.started + took - begun
            hundredths = (took + 5_000) // 10_000
            request_id, traceparent = record.known_ids or record.ids
            known = (
                record.target,
                record.model,
                record.protocol,
                record.code,
                record.peer,
                record.method,
                record.http,
            )
            before, after = words.get(known) or self._describe(record, known)
            pieces += (
                stamp,
                _THREE_DIGITS[passed // 1_000_000],
                before,
                numbers.get(sent) or _remember(numbers, sent, b"%d " % sent),
                times.get(hundredths)
                or _remember(times, hundredths, b"%d.%02d" % divmod(hundredths, 100)),
                after,
                request_id,
                b" trace=",
                traceparent[_TRACE_ID],
                b"\n",
            )
        return b"".join(pieces)

    def _begin(self, record: Record, since: int) -> tuple[int, bytes]:
        """Begin the second in which a record ended."""
        second = (since + record.started + record.took) // 1_000_000_000
        self._begun = second * 1_000_000_000 - since
        stamp = strftime("%Y-%m-%d %H:%M:%S.", localtime(second))
        self._stamp = stamp.encode()
        return self._begun, self._stamp

    def _describe(self, record: Record, known: _Known) -> tuple[bytes, bytes]:
        """What a line says from its time to the answer's size, and after the latter."""
        path = visible(_path(record.target), MAX_PATH)
        request = f"{visible(record.method, MAX_WORD)} {path} HTTP/{record.http}"
        process, code = self._process, self._code(record.code)
        before = f'{process}{_word(record.peer)} "{request}" {code} '
        after = f"ms {record.protocol} {_word(record.model)} id="
        words = _encoded(before), _encoded(after)
        if len(record.target) + len(record.model) + len(record.method) <= SHORT:
            _remember(self._words, known, words)
        return words

    def told(self, record: Record) -> str:
        """What the line says after the name of the logger."""
        line = self.lines([record], 0).decode()
        return line.partition(f" {log.name} ")[2].rstrip("\n")


class _Json:
    def __init__(self) -> None:
        self._second = 0
        self._template = ""

    def lines(self, records: list[Record], since: int) -> bytes:
        return b"".join([self._line(record, since) for record in records])

    def _line(self, record: Record, since: int) -> bytes:
        ended = (since + record.started + record.took) // 1_000_000
        second, millisecond = divmod(ended, 1000)
        if second != self._second:
            self._second = second
            self._template = (
                f'{{"timestamp":"{utc(second).removesuffix("000Z")}%03dZ",'
                f'"level":"INFO","logger":"{log.name}",'
                f'"message":"%s %s","process":{os.getpid()},'
                # In the order of FIELDS.
                '"peer":%s,%s,%s,"bytes":%d,"duration_ms":%.3f,"protocol":"%s",'
                '"model":%s,"request_id":%s,"trace_id":"%s","span_id":"%s"}\n'
            )
        method, target = record.method, record.target
        peer, model = record.peer, record.model
        if len(target) + len(method) <= SHORT >= len(model) + len(peer):
            what, request = _known_json_request(method, target, record.http)
            peer, model = _known_json(peer), _known_json(model)
        else:
            what, request = _json_request(method, target, record.http)
            peer, model = _json_word(peer), _json_word(model)
        code = record.code
        trace, span, _ = record.trace
        line = self._template % (
            millisecond,
            what,
            code or "-",
            peer,
            request,
            _json_code(code),
            record.sent,
            record.took / 1e6,
            record.protocol,
            model,
            quote(record.request_id),
            trace,
            span,
        )
        return _encoded(line)


def _fields(record: Record) -> dict[str, Any]:
    """A request's fields of a LogRecord: escaped, whatever format they end up in."""
    trace, span, _ = record.trace
    status, grpc_status = _statuses(record.code)
    fields = {
        "peer": visible(record.peer, MAX_WORD),
        "method": visible(record.method, MAX_WORD),
        "path": visible(_path(record.target), MAX_PATH),
        "http_version": record.http,
        "status": status,
        "grpc_status": grpc_status,
        "bytes": record.sent,
        "duration_ms": round(record.took / 1e6, 3),
        "protocol": record.protocol,
        "model": visible(record.model, MAX_WORD),
        "request_id": record.request_id,
        "trace_id": trace,
        "span_id": span,
    }
    if grpc_status is None:
        del fields["grpc_status"]
    return fields


def _statuses(code: int | str) -> tuple[int | None, str | None]:
    """The HTTP status and that of gRPC; the first is unknown if nothing was sent."""
    if isinstance(code, int):
        return code, None
    return (200, code) if code else (None, None)


_THREE_DIGITS = tuple(b"%03d" % number for number in range(1000))
_TRACE_ID = slice(3, 35)  # of a traceparent
# What is remembered of each kind.
MOST = 1024


def _remember(memory: dict[K, V], key: K, value: V) -> V:
    """Remember what a key stands for; what came before is forgotten at times."""
    if len(memory) >= MOST:
        memory.clear()
    memory[key] = value
    return value


def _encoded(text: str) -> bytes:
    return text.encode(errors="backslashreplace")


# What peers choose is remembered only if it is short, and not for ever.
@lru_cache(maxsize=64)
def _json_code(code: int | str) -> str:
    status, grpc_status = _statuses(code)
    text = f'"status":{"null" if status is None else status}'
    return text if grpc_status is None else f'{text},"grpc_status":"{grpc_status}"'


def _plain_code(code: int | str) -> str:
    return str(code or "-")


def _coloured_code(code: int | str) -> str:
    if isinstance(code, int):
        colour = (GREEN, GREEN, GREEN, CYAN, YELLOW, RED)[min(code // 100, 5)]
    elif code == "OK":
        colour = GREEN
    else:
        colour = RED if code in ("INTERNAL", "UNAVAILABLE", "UNKNOWN") else YELLOW
    return coloured(str(code or "-"), colour)


# Characters of what is looked up together.
SHORT = 256


def _word(text: str) -> str:
    """Text as one word: escaped, spaces too; `-` for none."""
    return visible(text, MAX_WORD).replace(" ", "\\x20") or "-"


def _json_word(text: str) -> str:
    return quoted(text, MAX_WORD)


def _json_request(method: str, target: str, http: str) -> tuple[str, str]:
    """The beginning of the message, and the fields; both of them JSON."""
    path = _path(target)
    what = quoted(f"{method[:MAX_WORD]} {path}", MAX_WORD)[1:-1]
    return what, (
        f'"method":{quoted(method, MAX_WORD)},"path":{quoted(path, MAX_PATH)},'
        f'"http_version":"{http}"'
    )


_known_json = lru_cache(maxsize=1024)(_json_word)
_known_json_request = lru_cache(maxsize=1024)(_json_request)


def _path(target: str) -> str:
    """A target without its query, and without the host and user of the absolute form.

    Cut to what may be seen of it anyway.
    """
    path, question, _ = origin_form(target[: 2 * MAX_PATH]).partition("?")
    return f"{path}?..." if question else path
