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
    sent: bytes of the answer's body.
    """

    action = ""
    model = ""
    protocol = "http"
    code: int | str = ""
    sent = 0
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
        if not self._request_id:
            given = self.headers.get("x-request-id", "")
            usable = (
                0 < len(given) <= MAX_ID and given.isascii() and given.isprintable()
            )
            self._request_id = given if usable and " " not in given else new_id()
        return self._request_id

    @property
    def trace(self) -> tuple[str, str, str]:
        """The trace id, our span's id and the flags, by W3C Trace Context.

        The trace is the one that `traceparent` names, or else a new one, whose id is
        that of the request where that was made here too.
        """
        if self._trace is None:
            given = _TRACEPARENT.fullmatch(self.headers.get("traceparent", ""))
            span = f"{random.getrandbits(64) or 1:016x}"
            if given is not None:
                self._trace = given[1], span, given[3]
            else:
                self._trace = new_id(), span, "00"
        return self._trace

    @property
    def traceparent(self) -> str:
        """What others are told who take part in the trace (W3C, section 3.2)."""
        return "00-{}-{}-{}".format(*self.trace)


def new_id() -> str:
    """Return a fresh id of 32 hexadecimal digits. It names, it does not protect."""
    return f"{random.getrandbits(128) or 1:032x}"
