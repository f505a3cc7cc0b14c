"""The table from kinds of errors to gRPC statuses, and how a fault is told.

https://github.com/grpc/grpc/blob/master/doc/statuscodes.md says what each is for.
"""

from __future__ import annotations

from grpclib.const import Status

from kserve_lite.errors import InferenceFault, Kind, ModelFailed

# Total over the kinds, which a test holds. Nobody sees a cancelled call's status.
STATUS: dict[Kind, Status] = {
    Kind.INVALID_INPUT: Status.INVALID_ARGUMENT,
    Kind.NOT_FOUND: Status.NOT_FOUND,
    Kind.NOT_READY: Status.UNAVAILABLE,
    Kind.UNSUPPORTED: Status.UNIMPLEMENTED,
    Kind.FORBIDDEN: Status.PERMISSION_DENIED,
    Kind.OVERLOADED: Status.UNAVAILABLE,
    Kind.DEADLINE_EXCEEDED: Status.DEADLINE_EXCEEDED,
    Kind.CANCELLED: Status.CANCELLED,
    Kind.MODEL_FAILED: Status.INTERNAL,
    Kind.INTERNAL: Status.INTERNAL,
}

# grpc-message is a header and may triple when it is percent-encoded. Clients take
# 8 KB of headers (grpcio) to 16 KB (Go, Java) and lose the status beyond.
MAX_TEXT_SIZE = 2048


def text_of(fault: InferenceFault) -> str:
    """The fault's text as a message can hold it: Unicode, and of bounded length."""
    # A handler may word a fault with text from anywhere: what is no Unicode scalar
    # value cannot be UTF-8.
    octets = fault.reason.encode(errors="replace")
    if len(octets) > MAX_TEXT_SIZE:
        return octets[:MAX_TEXT_SIZE].decode(errors="ignore") + "..."
    return octets.decode()


def details_of(fault: InferenceFault) -> str:
    """The text of the status. A failed model's is KServe's own; see `trailers_of`."""
    if isinstance(fault, ModelFailed) and fault.exposed is None:
        return "Internal server error"
    return text_of(fault)


def trailers_of(fault: InferenceFault) -> dict[str, str]:
    """Trailing metadata: a failed model's has the id under which the log says more."""
    if isinstance(fault, ModelFailed):
        return {"x-request-id": fault.request_id}
    return {}
