"""What a predictor's refusal is to the client: the tables of statuses, and the words.

A refusal keeps its status as far as the kinds of errors go. Its own words are passed on
where they say what is wrong with the request, and never where they would tell of the
inside: not of a failure, not with a URL, a host or an address in them.
"""

from __future__ import annotations

import re
from typing import Final

from kserve_lite.errors import (
    DeadlineExceeded,
    InferenceFault,
    Kind,
    ModelFailed,
    PredictorFault,
)

# What is not here is the predictor's failure: other 4xx too, since it is not the client
# who chose the path, the method and the content type.
OF_HTTP: Final[dict[int, Kind]] = {
    400: Kind.INVALID_INPUT,
    401: Kind.FORBIDDEN,
    403: Kind.FORBIDDEN,
    404: Kind.NOT_FOUND,
    413: Kind.INVALID_INPUT,
    422: Kind.INVALID_INPUT,
    429: Kind.OVERLOADED,
    501: Kind.UNSUPPORTED,
    503: Kind.NOT_READY,
    504: Kind.DEADLINE_EXCEEDED,
}
OF_GRPC: Final[dict[str, Kind]] = {
    "INVALID_ARGUMENT": Kind.INVALID_INPUT,
    "FAILED_PRECONDITION": Kind.INVALID_INPUT,
    "OUT_OF_RANGE": Kind.INVALID_INPUT,
    "UNAUTHENTICATED": Kind.FORBIDDEN,
    "PERMISSION_DENIED": Kind.FORBIDDEN,
    "NOT_FOUND": Kind.NOT_FOUND,
    "RESOURCE_EXHAUSTED": Kind.OVERLOADED,
    "UNIMPLEMENTED": Kind.UNSUPPORTED,
    "UNAVAILABLE": Kind.NOT_READY,
    "DEADLINE_EXCEEDED": Kind.DEADLINE_EXCEEDED,
}
_OWN: Final[dict[Kind, str]] = {
    Kind.INVALID_INPUT: "The {who} does not take the request.",
    Kind.FORBIDDEN: "The {who} does not allow this.",
    Kind.NOT_FOUND: "The {who} does not know the model {model}.",
    Kind.OVERLOADED: "The {who} has too much to do: try again later.",
    Kind.UNSUPPORTED: "The {who} does not do this.",
    Kind.NOT_READY: "The {who} is not ready.",
}
_PASSED_ON = frozenset((Kind.INVALID_INPUT, Kind.FORBIDDEN, Kind.NOT_FOUND))
MAX_TEXT = 512
# A URL, an IPv4 address, most of IPv6's.
_PLACE = re.compile(r"://|(?:\d{1,3}\.){3}\d{1,3}|[0-9a-f]{0,4}:[0-9a-f:]*:[0-9a-f]*")


class Failure(Exception):
    """An attempt to be answered that failed.

    fault: what it is to the client. again: whether another attempt may follow, as the
    predictor has not begun with this one. after: seconds that it asks to wait. why: for
    the log; empty where the client is told.
    """

    def __init__(
        self,
        fault: InferenceFault,
        *,
        again: bool = False,
        after: float = 0.0,
        why: str = "",
    ) -> None:
        super().__init__(why or fault.reason)
        self.fault = fault
        self.again = again
        self.after = after
        self.why = why[:MAX_TEXT]  # it may hold what a predictor has written


class Failures:
    """Words failures for the requests to one server, whose place they never tell.

    who: "predictor" or "explainer".
    """

    def __init__(self, who: str, host: str) -> None:
        self._who = who
        name = host.strip("[]").casefold()
        # Pods are named after their service, the first label of its host.
        self._label = re.compile(rf"(?<![\w-]){re.escape(name.partition('.')[0])}")

    def refused(
        self,
        kind: Kind | None,
        text: object,
        *,
        status: object,
        model: str,
        request_id: str,
        after: float | None = None,
    ) -> Failure:
        """An answer other than success. kind: by the tables; None: it has failed.

        text: the predictor's own words, of whatever type. after: of Retry-After.
        """
        if kind is None:
            return self.failed(f"it answered {status}", request_id)
        if kind is Kind.NOT_READY and after is not None:
            kind = Kind.OVERLOADED
        why = "" if kind in _PASSED_ON else f"it answered {status}"
        if kind is Kind.DEADLINE_EXCEEDED:
            return Failure(DeadlineExceeded(), why=why)
        words = self._passed_on(text) if kind in _PASSED_ON else ""
        words = words or _OWN[kind].format(who=self._who, model=model)
        again = kind in (Kind.NOT_READY, Kind.OVERLOADED)
        return Failure(
            PredictorFault(kind, words), again=again, after=after or 0.0, why=why
        )

    def failed(self, why: str, request_id: str) -> Failure:
        """It failed, or what it answered is no answer."""
        exposed = f"The {self._who} failed to answer."
        return Failure(ModelFailed(request_id, exposed), why=why)

    def unreachable(self, why: str) -> Failure:
        text = f"The {self._who} cannot be reached."
        return Failure(PredictorFault(Kind.NOT_READY, text), again=True, why=why)

    def _passed_on(self, text: object) -> str:
        """The predictor's own words; empty where they cannot be passed on."""
        if not isinstance(text, str):
            return ""
        # As far as what is shown may reach, and a host that begins in it.
        folded = text[: 3 * MAX_TEXT].casefold()
        if _PLACE.search(folded) or self._label.search(folded):
            return ""
        shown = text[: 2 * MAX_TEXT]
        shown = "".join(c if c.isprintable() else " " for c in shown)
        return " ".join(shown.split())[:MAX_TEXT]
