"""What is known of one request and what became of it.

The transport makes a `Record` with the request. Those who answer fill in what they
learn; the access log, metrics and traces are written from it when the answer is sent.
Handlers see its ids through their `Context`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from time import perf_counter_ns

RawHeaders = tuple[tuple[bytes, bytes], ...]

# Neither id may be all zeros.
_NOT_ZERO = 1 << 64 | 1
# W3C Trace Context, section 3.2: version, trace id, parent id, flags. What later
# versions add behind is not looked at.
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})"
    r"(?:-.*)?"
)
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
    name of the gRPC status; empty until it is known; 499 where the client went first.
    sent: bytes of the answer's body. took: nanoseconds until the answer had been sent.
    """

    action = ""
    model = ""
    protocol = "http"
    code: int | str = ""
    sent = 0
    took = 0
    _request_id = ""
    _trace: tuple[str, str, str] | None = None

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

    @property
    def request_id(self) -> str:
        """The client's `x-request-id`, or one made here; the same all along.

        A client's id is taken only if it has at most 128 visible ASCII characters,
        since it is written to logs and sent back.
        """
        if self._trace is None:
            self._identify()
        return self._request_id

    @property
    def trace(self) -> tuple[str, str, str]:
        """The trace id, our span's id and the flags, by W3C Trace Context.

        The trace is the one that `traceparent` names, or else a new one, whose id is
        that of the request unless the client gave one.
        """
        return self._trace or self._identify()

    @trace.setter
    def trace(self, ids: tuple[str, str, str]) -> None:
        self._identify()
        self._trace = ids

    def _identify(self) -> tuple[str, str, str]:
        headers = self.headers
        digits = f"{random.getrandbits(192) | _NOT_ZERO:048x}"
        request_id, span = digits[:32], digits[32:]
        self._trace = trace = request_id, span, "00"
        if "x-request-id" in headers:
            given = headers["x-request-id"]
            request_id = given if _is_id(given) else request_id
        self._request_id = request_id
        if "traceparent" in headers:
            match = _TRACEPARENT.fullmatch(headers["traceparent"])
            if match is not None:
                self._trace = trace = match[1], span, match[3]
        return trace

    @property
    def fields(self) -> RawHeaders:
        """The fields that tell the client its request's ids."""
        trace, span, flags = self._trace or self._identify()
        return (
            (b"x-request-id", self._request_id.encode("ascii")),
            (b"traceparent", f"00-{trace}-{span}-{flags}".encode("ascii")),
        )

    @property
    def traceparent(self) -> str:
        """What others are told who take part in the trace (W3C, section 3.2)."""
        trace, span, flags = self.trace
        return f"00-{trace}-{span}-{flags}"


def _is_id(given: str) -> bool:
    fits = 0 < len(given) <= MAX_ID and given.isascii()
    return fits and given.isprintable() and " " not in given


def new_id() -> str:
    """Return a fresh id of 32 hexadecimal digits. It names, it does not protect."""
    return f"{random.getrandbits(128) or 1:032x}"
