"""`kserve.inference_client`: what asks servers, in an event loop."""

from __future__ import annotations

from kserve_lite.compat.grpc_client import (
    USE_CLIENT_DEFAULT,
    InferenceGRPCClient,
    RpcError,
)
from kserve_lite.compat.rest_client import InferenceRESTClient, RESTConfig

__all__ = [
    "USE_CLIENT_DEFAULT",
    "InferenceGRPCClient",
    "InferenceRESTClient",
    "RESTConfig",
    "RpcError",
]
