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
from typing import Any, TextIO

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
        self._format: Callable[[Record, int], bytes] = (
            _Json().line
            if settings.log_format == "json"
            else _Text(has_colours(stream)).line
        )
        self._told = _Text(colours=False).told

    def write(self, record: Record) -> None:
        """Have the line of a request written; on the event loop, without waiting.

        Lines are made some at a time: one by one, between other work, they take twice
        as long.
        """
        pending = self._pending
        pending.append(record)
        # Lines of several requests belong to the context, and the span, of none.
        if len(pending) >= TOGETHER:
            contextvars.Context().run(self._settle)
        elif len(pending) == 1:
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
                since = (time_ns() - perf_counter_ns()) // 1_000_000
                lines.add(b"".join([self._format(record, since) for record in pending]))
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
    def __init__(self, colours: bool) -> None:
        self._code = _coloured_code if colours else _plain_code
        self._second = 0
        # Bytes, as the ids are; an f-string takes longer, for numbers with a format.
        self._template = b""

    def line(self, record: Record, since: int) -> bytes:
        ended = since + (record.started + record.took) // 1_000_000
        second, millisecond = divmod(ended, 1000)
        if second != self._second:
            self._second = second
            self._template = (
                f"{strftime('%Y-%m-%d %H:%M:%S', localtime(second))}.%03d {os.getpid()}"
                f" {log.name} %b %b %d %.2fms %b id=%b trace=%b\n"
            ).encode()
        method, target = record.method, record.target
        peer, model = record.peer, record.model
        is_short = len(target) + len(method) + len(model) + len(peer) <= SHORT
        known = _known_words if is_short else _words
        before, after = known(peer, method, target, record.http, record.protocol, model)
        request_id, traceparent = record.ids
        return self._template % (
            millisecond,
            before,
            self._code(record.code),
            record.sent,
            record.took / 1e6,
            after,
            request_id,
            traceparent[3:35],
        )

    def told(self, record: Record) -> str:
        """What the line says after the name of the logger."""
        line = self.line(record, 0).decode()
        return line.partition(f" {log.name} ")[2].rstrip("\n")


class _Json:
    def __init__(self) -> None:
        self._second = 0
        self._template = ""

    def line(self, record: Record, since: int) -> bytes:
        ended = since + (record.started + record.took) // 1_000_000
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
        return line.encode(errors="backslashreplace")


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


# What peers choose is remembered only if it is short, and not for ever.
@lru_cache(maxsize=64)
def _json_code(code: int | str) -> str:
    status, grpc_status = _statuses(code)
    text = f'"status":{"null" if status is None else status}'
    return text if grpc_status is None else f'{text},"grpc_status":"{grpc_status}"'


@lru_cache(maxsize=64)
def _plain_code(code: int | str) -> bytes:
    return str(code or "-").encode()


@lru_cache(maxsize=64)
def _coloured_code(code: int | str) -> bytes:
    if isinstance(code, int):
        colour = (GREEN, GREEN, GREEN, CYAN, YELLOW, RED)[min(code // 100, 5)]
    elif code == "OK":
        colour = GREEN
    else:
        colour = RED if code in ("INTERNAL", "UNAVAILABLE", "UNKNOWN") else YELLOW
    return coloured(str(code or "-"), colour).encode()


# Characters of what is looked up together.
SHORT = 256


def _word(text: str) -> str:
    """Text as one word: escaped, spaces too; `-` for none."""
    return visible(text, MAX_WORD).replace(" ", "\\x20") or "-"


def _json_word(text: str) -> str:
    return quoted(text, MAX_WORD)


def _words(  # noqa: PLR0917 - by position, as `lru_cache` wants them
    peer: str, method: str, target: str, http: str, protocol: str, model: str
) -> tuple[bytes, bytes]:
    """What a line says of a request before its outcome, and after it."""
    path = visible(_path(target), MAX_PATH)
    request = f"{visible(method, MAX_WORD)} {path} HTTP/{http}"
    before, after = f'{_word(peer)} "{request}"', f"{protocol} {_word(model)}"
    return before.encode(errors="backslashreplace"), after.encode(
        errors="backslashreplace"
    )


def _json_request(method: str, target: str, http: str) -> tuple[str, str]:
    """The beginning of the message, and the fields; both of them JSON."""
    path = _path(target)
    what = quoted(f"{method[:MAX_WORD]} {path}", MAX_WORD)[1:-1]
    return what, (
        f'"method":{quoted(method, MAX_WORD)},"path":{quoted(path, MAX_PATH)},'
        f'"http_version":"{http}"'
    )


_known_json = lru_cache(maxsize=1024)(_json_word)
_known_words = lru_cache(maxsize=1024)(_words)
_known_json_request = lru_cache(maxsize=1024)(_json_request)


def _path(target: str) -> str:
    """A target without its query, and without the host and user of the absolute form.

    Cut to what may be seen of it anyway.
    """
    path, question, _ = origin_form(target[: 2 * MAX_PATH]).partition("?")
    return f"{path}?..." if question else path
