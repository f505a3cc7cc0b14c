"""A predictor of ours that speaks every protocol, and what it has seen."""

from __future__ import annotations

import threading
from typing import Any

import anyio

from kserve_lite import InferResponse, Model
from kserve_lite.errors import (
    Forbidden,
    InvalidInput,
    ModelNotFound,
    Overloaded,
    Unsupported,
)
from kserve_lite.tensors import Tensor

FAULTS = {
    "invalid": InvalidInput("the row is too short"),
    "unknown": ModelNotFound("inner"),
    "forbidden": Forbidden("not yours"),
    "overloaded": Overloaded("busy"),
    "unsupported": Unsupported("no such thing"),
    "failed": RuntimeError("secret"),
}


class Seen:
    """What the last request had, and what became of the slow one."""

    def __init__(self) -> None:
        self.protocol = ""
        self.headers: dict[str, Any] = {}
        self.remaining: float | None = None
        self.calls = 0
        self.began = threading.Event()
        self.cancelled = threading.Event()


def predictor_models(seen: Seen) -> tuple[Model, ...]:
    """double: twice what came, V1 or V2. faulty: raises what it is told. slow: waits.

    large: answers with more than it is asked.
    """
    double, faulty, slow, large = map(Model, ("double", "faulty", "slow", "large"))

    @double.predict
    async def _(payload, context):  # type: ignore[no-untyped-def]
        seen.protocol, seen.headers = context.protocol, dict(context.headers)
        seen.remaining = context.remaining()
        seen.calls += 1
        if not isinstance(payload, dict):
            return InferResponse(
                tuple(Tensor("y", t.array * 2, t.datatype) for t in payload.inputs)
            )
        rows = [[2 * v for v in row] for row in payload["instances"]]
        more = {k: v for k, v in payload.items() if k != "instances"}
        return {"predictions": rows, **more}

    @faulty.predict
    async def _(payload: Any) -> Any:
        is_v1 = isinstance(payload, dict)
        name = (payload["instances"] if is_v1 else payload.inputs[0].array)[0]
        raise FAULTS[name.decode() if isinstance(name, bytes) else name]

    @slow.predict
    async def _(payload: Any) -> Any:
        seen.began.set()
        try:
            await anyio.sleep(60)
        except BaseException:
            seen.cancelled.set()
            raise

    @large.predict
    async def _(payload: Any) -> Any:
        import numpy as np

        if isinstance(payload, dict):
            return {"predictions": ["x" * 100_000]}
        return np.zeros(100_000, np.uint8)

    return double, faulty, slow, large
