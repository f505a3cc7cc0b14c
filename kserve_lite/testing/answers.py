"""What the test clients give back and raise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kserve_lite.codecs.json_tensors import loads
from kserve_lite.errors import InvalidInput, KServeLiteError
from kserve_lite.messages import InferResponse

if TYPE_CHECKING:
    import numpy as np


class Refused(KServeLiteError):
    """The answer is an error.

    code: the HTTP status, or the name of the gRPC status; 200 or "OK" where one item of
    a stream that had begun was an error. reason: what the client is told.
    """

    def __init__(self, code: int | str, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Response:
    """An HTTP answer. headers: names in lower case; of repeated ones the last."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body, read as JSON; raises InvalidInput where it is none."""
        return loads(self.body)


@dataclass(slots=True)
class Inferred(InferResponse):
    """An answer of V2. headers: of HTTP, or the initial metadata."""

    headers: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> np.ndarray:
        """Return the array of the output `name`; raise KeyError without one."""
        for tensor in self.outputs:
            if tensor.name == name:
                return tensor.array
        raise KeyError(name)


def checked(response: Response) -> Response:
    """Return an answer; raise Refused where it is an error."""
    if response.status < 400:
        return response
    try:
        reason = response.json()["error"]
    except (InvalidInput, KeyError, TypeError):  # a handler's own answer
        reason = response.body.decode(errors="replace")
    raise Refused(response.status, reason)


def inferred(response: InferResponse, headers: Mapping[str, str]) -> Inferred:
    """Give an answer the headers that it came with."""
    return Inferred(
        response.outputs,
        response.id,
        response.model_name,
        response.model_version,
        response.parameters,
        headers,
    )
