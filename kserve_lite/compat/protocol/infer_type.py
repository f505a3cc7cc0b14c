"""The tensors, requests and answers of KServe's SDK: `kserve.protocol.infer_type`.

What each method gives is what KServe's gives, except where KServe's fails or changes
its own object; docs/migrating-from-kserve.md lists that. Between these and the values
that the server itself has, `kserve_lite.messages`, go `from_native` and `to_native`.
"""

from __future__ import annotations

from kserve_lite.compat.protocol.byte_tensors import (
    deserialize_bytes_tensor,
    serialize_byte_tensor,
)
from kserve_lite.compat.protocol.documents import get_content
from kserve_lite.compat.protocol.parameters import (
    to_grpc_parameters,
    to_http_parameters,
)
from kserve_lite.compat.protocol.requests import InferRequest, RequestedOutput
from kserve_lite.compat.protocol.responses import InferResponse
from kserve_lite.compat.protocol.tensors import InferInput, InferOutput

__all__ = [
    "InferInput",
    "InferOutput",
    "InferRequest",
    "InferResponse",
    "RequestedOutput",
    "deserialize_bytes_tensor",
    "get_content",
    "serialize_byte_tensor",
    "to_grpc_parameters",
    "to_http_parameters",
]
