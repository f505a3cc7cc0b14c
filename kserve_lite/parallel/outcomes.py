"""What a server asks of a replica, and what it is told: values that cross processes.

Tensors cross as they are: Ray pickles arrays without a copy of its own (protocol 5),
and large ones lie in its object store, where the other side sees them in place.
Exceptions do not cross: a fault is its kind and its words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from kserve_lite.dispatch.statistics import Spent
from kserve_lite.errors import InferenceFault, Kind, ModelFailed
from kserve_lite.messages import Context
from kserve_lite.records import Record

# Begins what a replica says of a model that cannot be loaded; then the error.
LOAD_FAILED = "its load failed: "


class Asked(NamedTuple):
    """What a replica needs to know of a request besides its payload.

    remaining: seconds until the caller stops waiting; None: it does not. Clocks of two
    machines differ, durations do not.
    """

    protocol: str
    headers: Mapping[str, str]
    remaining: float | None
    request_id: str
    traceparent: str

    @classmethod
    def of(cls, context: Context) -> Asked:
        return cls(
            context.protocol,
            dict(context.headers),
            context.remaining(),
            context.request_id,
            context.traceparent,
        )

    def record(self, is_gone: Callable[[], bool]) -> Record:
        """The request, under the ids that it has at the server."""
        record = Record("", "", "", self.headers, "", is_gone)
        record.known_ids = self.request_id.encode(), self.traceparent.encode()
        return record


class Fault(NamedTuple):
    """An InferenceFault. model_failed: it is a ModelFailed, of `exposed` words."""

    kind: str
    reason: str
    model_failed: bool = False
    exposed: str | None = None


class Outcome(NamedTuple):
    """What became of a request, or of the beginning of a stream.

    value: the answer, unless there is a fault. items: whether `value` is a list of what
    a handler's iterator gave. spent: what the replica has done, with what ends the
    request.
    """

    value: Any = None
    headers: Mapping[str, str] = {}
    fault: Fault | None = None
    items: bool = False
    spent: Spent | None = None


def fault_of(error: InferenceFault) -> Fault:
    """What a fault is, in values that any process can read."""
    if isinstance(error, ModelFailed):
        return Fault(error.kind.name, error.reason, True, error.exposed)
    return Fault(error.kind.name, error.reason)


def raised(fault: Fault, request_id: str) -> InferenceFault:
    """The fault again, in another process than where it was raised."""
    if fault.model_failed:
        return ModelFailed(request_id, fault.exposed)
    error = InferenceFault(fault.reason)
    error.kind = Kind[fault.kind]
    return error
