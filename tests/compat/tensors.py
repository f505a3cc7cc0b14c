"""Values of every datatype, and requests of them, for the tests of compat's types."""

from __future__ import annotations

from typing import Any

import numpy as np

from kserve_lite.compat.protocol import infer_type as ours
from kserve_lite.tensors import numpy_dtype

VALUES: dict[str, list[Any]] = {
    "BOOL": [True, False],
    "FP16": [1.5, -2.0],
    "FP32": [0.5, -2.25],
    "FP64": [0.1, -2.0],
    "BYTES": [b"a", "é".encode()],
    **{name: [1, 2] for name in ("UINT8", "UINT16", "UINT32", "UINT64")},
    **{name: [1, -2] for name in ("INT8", "INT16", "INT32", "INT64")},
}
TYPES = list(VALUES)
JSON_TYPES = [name for name in TYPES if name != "FP16"]


def array_of(datatype: str) -> np.ndarray:
    return np.array(VALUES[datatype], numpy_dtype(datatype))


def binary_request(datatype: str, **more: Any) -> tuple[bytes, int]:
    raw = ours.InferInput("a", [2], datatype)
    raw.set_data_from_numpy(array_of(datatype))
    body, size = ours.InferRequest("m", [raw], "7", **more).to_rest()
    assert isinstance(body, bytes)
    assert size
    return body, size


def grpc_request(kind: Any, datatype: str, *, raw: bool) -> Any:
    """A ModelInferRequest of the package that is tested."""
    tensor = ours.InferInput("a", [2], datatype, VALUES[datatype], {"p": 1})
    if raw:
        tensor.set_data_from_numpy(array_of(datatype))
    request = ours.InferRequest(
        "m",
        [tensor],
        "7",
        parameters={"s": "x", "b": True, "i": 3},
        request_outputs=[ours.RequestedOutput("o", {"binary_data": True})],
        model_version="2",
    )
    message = request.to_grpc()
    return kind.FromString(message.SerializeToString())
