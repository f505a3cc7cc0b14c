"""The values that every protocol is turned into and out of.

`InferRequest` and `InferResponse` are the Open Inference Protocol's request and
response; `Context` is what a handler may know about the request besides its payload.
Nothing here knows JSON, protobuf, HTTP or gRPC. Values that every request makes are
not frozen: a frozen dataclass takes 1.2 us to make, this 0.4.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from kserve_lite.errors import InvalidInput
from kserve_lite.records import Record
from kserve_lite.tensors import Parameters, Tensor

if TYPE_CHECKING:
    import numpy as np

# Inputs, requested outputs and parameters that one request may have of each. All are
# looked at one by one on the event loop, and a few bytes make one. No model comes near.
MAX_ENTRIES = 4096


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """An output that the client asks for by name."""

    name: str
    parameters: Parameters = field(default_factory=dict)


@dataclass(slots=True)
class InferRequest:
    """A request's tensors.

    id: the client's own id; None where it gave none.
    outputs: what the client asks for, in order; empty: every output.
    document: the JSON that it was read from; None where it did not come as JSON.
    raw: whether its tensors came as gRPC's `raw_input_contents`.
    """

    model_name: str
    inputs: tuple[Tensor, ...]
    id: str | None = None
    model_version: str | None = None
    parameters: Parameters = field(default_factory=dict)
    outputs: tuple[RequestedOutput, ...] = ()
    document: bytes | bytearray | memoryview | None = field(
        default=None, repr=False, compare=False
    )
    raw: bool = field(default=False, repr=False, compare=False)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self.inputs)

    def __contains__(self, name: str) -> bool:
        return any(tensor.name == name for tensor in self.inputs)

    def __getitem__(self, name: str) -> np.ndarray:
        """Return the array of the input `name`; raise InvalidInput without one."""
        for tensor in self.inputs:
            if tensor.name == name:
                return tensor.array
        raise InvalidInput(f"Input '{name}' is missing.")


@dataclass(slots=True)
class InferResponse:
    """An answer's tensors.

    id: None lets the server fill in the request's id, or a new one.
    model_name: None lets the server fill in the model's name.
    """

    outputs: tuple[Tensor, ...]
    id: str | None = None
    model_name: str | None = None
    model_version: str | None = None
    parameters: Parameters = field(default_factory=dict)


MAX_TIMEOUT_MS = 24 * 3600 * 1000


def asked_deadline(headers: Mapping[str, str]) -> float | None:
    """When a client that sent `x-request-timeout-ms` stops waiting; None: it does not.

    By `time.monotonic()`. Raises InvalidInput for what is no whole number.
    """
    timeout = headers.get("x-request-timeout-ms")
    if timeout is None:
        return None
    if not timeout.isascii() or not timeout.isdecimal() or len(timeout) > 9:
        raise InvalidInput("x-request-timeout-ms must be a whole number.")
    return time.monotonic() + min(int(timeout), MAX_TIMEOUT_MS) / 1e3


class Context:
    """What a handler may know of its request; ask for it by the name `context`.

    model_name, model_version: the model that answers; the version may be None.
    protocol: "v1", "v2", "grpc", or "generate" for V2's generate extension.
    headers: the request's headers, read-only, names in lower case.
    response_headers: headers for the answer, filled by the handler.
    deadline: `time.monotonic()` at which the caller stops waiting; None: it does not.
    """

    __slots__ = (
        "_record",
        "deadline",
        "headers",
        "model_name",
        "model_version",
        "protocol",
        "response_headers",
    )

    def __init__(  # noqa: PLR0917 - by position: by name it takes twice as long
        self,
        model_name: str,
        model_version: str | None = None,
        protocol: str = "v1",
        headers: Mapping[str, str] | None = None,
        deadline: float | None = None,
        record: Record | None = None,
    ) -> None:
        self.model_name = model_name
        self.model_version = model_version
        self.protocol = protocol
        self.headers: Mapping[str, str] = {} if headers is None else headers
        self.response_headers: dict[str, str] = {}
        self.deadline = deadline
        self._record = record

    @property
    def request_id(self) -> str:
        """The client's `x-request-id`, or one made here; the same all along.

        A client's id is taken only if it has at most 128 visible ASCII characters,
        since it is written to logs and sent back.
        """
        return self._known.request_id

    @property
    def traceparent(self) -> str:
        """What to send along to others in the trace (W3C Trace Context, 3.2)."""
        return self._known.traceparent

    @property
    def _known(self) -> Record:
        if self._record is None:  # called from within the program
            self._record = Record("", "", "", self.headers, "", lambda: False)
        return self._record

    def remaining(self) -> float | None:
        """Seconds that are left until the deadline, never below 0; None without one."""
        if self.deadline is None:
            return None
        return max(0.0, self.deadline - time.monotonic())

    @property
    def disconnected(self) -> bool:
        """Whether the client has gone: what is computed now, nobody will read."""
        return self._known.is_gone()


class JsonAnswer(NamedTuple):
    """An answer that is a JSON value as it stands (V1)."""

    value: Any


class RawAnswer(NamedTuple):
    """An answer whose bytes the handler wrote itself."""

    data: bytes


class StreamAnswer(NamedTuple):
    """An answer that comes in pieces, whatever the handler yields."""

    items: AsyncGenerator[Any, None]


Answer: TypeAlias = InferResponse | JsonAnswer | RawAnswer | StreamAnswer
