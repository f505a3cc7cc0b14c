"""gRPC calls by name, with grpcio and our own messages: what has no generated stub.

The generated stubs of KServe and Triton define the same names, so one process can have
only one of them: their tests run in processes of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kserve_lite.codecs.proto import POOL, message_class

INFERENCE = "inference.GRPCInferenceService"
ModelInferRequest = message_class("inference.ModelInferRequest")


class Stub:
    """The methods of a service on a channel of grpcio, or of grpcio's aio."""

    def __init__(self, channel: Any, service: str = INFERENCE) -> None:
        for method in POOL.FindServiceByName(service).methods:
            asks, answers = (
                "stream" if streams else "unary"
                for streams in (method.client_streaming, method.server_streaming)
            )
            call = getattr(channel, f"{asks}_{answers}")(
                f"/{service}/{method.name}",
                request_serializer=_serialized,
                response_deserializer=message_class(
                    method.output_type.full_name
                ).FromString,
            )
            setattr(self, method.name, call)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"there is no method {name}")


def _serialized(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data


def message(kind: str, /, **fields: Any) -> Any:
    """A message of the inference service."""
    return message_class(f"inference.{kind}")(**fields)


def infer_request(model: str, *arrays: np.ndarray, **fields: Any) -> Any:
    """A request with raw FP32 or INT64 tensors, `in0`, `in1`, ..."""
    request = ModelInferRequest(model_name=model, **fields)
    for index, array in enumerate(arrays):
        datatype = {"float32": "FP32", "int64": "INT64"}[array.dtype.name]
        request.inputs.add(name=f"in{index}", datatype=datatype, shape=array.shape)
        request.raw_input_contents.append(array.tobytes())
    return request
