"""What is known of one request and what became of it.

The transport makes a `Record` with the request. Those who answer fill in what they
learn; the access log, metrics and traces are written from it when the answer is sent.
Handlers see its ids through their `Context`.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Mapping
from time import perf_counter_ns
from typing import TypeAlias

# The values of x-request-id and traceparent.
Ids: TypeAlias = tuple[bytes, bytes]

# W3C Trace Context, section 3.2: version, trace id, parent id, flags. Only versions
# after 00 may have something behind, which is not looked at.
_TRACEPARENT = re.compile(
    r"(?:00(?=.{53}\Z)|(?!00|ff)[0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-"
    r"(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?"
)
# Sampled, and that the trace id is random; others are not ours to pass on.
_FLAGS = 0b11
# A client's id of more characters is not taken: it is logged and sent back.
MAX_ID = 128


class Record:
    """One request and its answer.

    http: the version, "1.1" or "2". method, target: of the request as it came.
    headers: the request's, names in lower case. peer: the client's host, empty where
    not known. is_gone: whether the client has gone. started: time.perf_counter_ns().

    action: what the request asks for: a route's action (`rest/routes.py`) or the name
    of a gRPC method; empty where there is no such thing. model: the name of the model
    that is asked for, which may not exist; empty where none is. protocol: "v1", "v2",
    "generate", "grpc", or "http" for what is none of them. code: the HTTP status or the
    name of the gRPC status; empty until it is known; 499 (CANCELLED) where the client
    went first, or the server had to stop. sent: bytes of
    the answer's body. took: nanoseconds until the answer had been sent. known_ids:
    `ids`, once they have been asked for.
    """

    __slots__ = (
        "action",
        "code",
        "headers",
        "http",
        "is_gone",
        "known_ids",
        "method",
        "model",
        "peer",
        "protocol",
        "sent",
        "started",
        "target",
        "took",
    )

    def __init__(  # noqa: PLR0917 - by position: by name it takes twice as long
        self,
        http: str,
        method: str,
        target: str,
        headers: Mapping[str, str],
        peer: str,
        is_gone: Callable[[], bool],
    ) -> None:
        self.http = http
        self.method = method
        self.target = target
        self.headers = headers
        self.peer = peer
        self.is_gone = is_gone
        self.started = perf_counter_ns()
        self.action = self.model = ""
        self.protocol = "http"
        self.code: int | str = ""
        self.sent = self.took = 0
        self.known_ids: Ids | None = None

    @property
    def request_id(self) -> str:
        """The client's `x-request-id`, or one made here; the same all along.

        A client's id is taken only if it has at most 128 visible ASCII characters,
        since it is written to logs and sent back.
        """
        return self.ids[0].decode("ascii")

    @property
    def trace(self) -> tuple[str, str, str]:
        """The trace id, our span's id and the flags, by W3C Trace Context.

        The trace is the one that `traceparent` names, or else a new one, whose id is
        that of the request unless the client gave one.
        """
        _, trace, span, flags = self.ids[1].decode("ascii").split("-")
        return trace, span, flags

    @trace.setter
    def trace(self, trace: tuple[str, str, str]) -> None:
        self.known_ids = self.ids[0], "-".join(("00", *trace)).encode("ascii")

    @property
    def ids(self) -> Ids:
        """The request's id, and `traceparent`, as the client is told."""
        ids = self.known_ids
        if ids is None:
            try:
                ids = _fresh.pop()
            except IndexError:
                ids = _make_fresh()
            headers = self.headers
            if "x-request-id" in headers or "traceparent" in headers:
                ids = _given(headers, *ids)
            self.known_ids = ids
        return ids

    @property
    def traceparent(self) -> str:
        """What others are told who take part in the trace (W3C, section 3.2)."""
        return self.ids[1].decode("ascii")


def _given(headers: Mapping[str, str], request_id: bytes, traceparent: bytes) -> Ids:
    """The ids that a client gives, where they can be taken, else those made here."""
    given = headers.get("x-request-id", "")
    if _is_id(given):
        request_id = given.encode("ascii")
    match = _TRACEPARENT.fullmatch(headers.get("traceparent", ""))
    if match is not None:
        span, flags = traceparent[36:52], int(match[3], 16) & _FLAGS
        traceparent = b"00-%b-%b-%02x" % (match[1].encode(), span, flags)
    return request_id, traceparent


def _is_id(given: str) -> bool:
    fits = 0 < len(given) <= MAX_ID and given.isascii()
    return fits and given.isprintable() and " " not in given


# Ids that are made and not used yet: some at a time, from one reading of randomness.
_fresh: list[Ids] = []
# A process that is forked must not use those that its parent will.
os.register_at_fork(after_in_child=_fresh.clear)


def _make_fresh(count: int = 64) -> Ids:
    """Make some, and return another one, since other threads may take them all."""
    parts = struct.unpack("32s16s" * count, os.urandom(24 * count).hex().encode())
    parents = (b"00-%b-%b-00 " * count % parts).split()
    first, *others = zip(parts[::2], parents, strict=True)
    _fresh.extend(others)
    return first


def new_id() -> str:
    """Return a fresh id of 32 hexadecimal digits. It names, it does not protect."""
    # Not of `random`, which models seed: ids would come again in every process.
    return os.urandom(16).hex()
