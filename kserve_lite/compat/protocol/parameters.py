"""Parameters: plain values over REST, InferParameter messages over gRPC.

A request that came over gRPC shows its own parameters as messages, as in KServe's SDK,
so both kinds are taken wherever parameters are. Messages of another descriptor pool
(`kserve`'s, `tritonclient`'s) are read as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kserve_lite.compat.errors import InvalidInput

BINARY_SIZE = "binary_data_size"


def to_http_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters as plain values; a message without a value is left out."""
    plain = {}
    for name, value in parameters.items():
        if not hasattr(value, "WhichOneof"):
            plain[name] = value
        elif which := value.WhichOneof("parameter_choice"):
            plain[name] = getattr(value, which)
    return plain


def to_grpc_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters as InferParameter messages.

    A float is a `double_param`, which KServe's own message has no field for: its
    servers and clients see a parameter without a value. Raises InvalidInput for values
    other than str, bool, int and float.
    """
    from kserve_lite.compat.protocol.grpc.grpc_predict_v2_pb2 import InferParameter

    messages = {}
    for name, value in parameters.items():
        if isinstance(value, InferParameter):
            messages[name] = value
            continue
        for plain in to_http_parameters({name: value}).values():
            messages[name] = InferParameter(**{_field(name, plain): plain})
    return messages


def _field(name: str, value: Any) -> str:
    if isinstance(value, str):
        return "string_param"
    if isinstance(value, bool):
        return "bool_param"
    if isinstance(value, int):
        return "uint64_param" if value >= 1 << 63 else "int64_param"
    if isinstance(value, float):
        return "double_param"
    raise InvalidInput(
        f"The parameter {name!r} must be a str, bool, int or float, not a "
        f"{type(value).__name__}."
    )


def message_map(parameters: Mapping[str, Any]) -> Any:
    """Return parameters as a request that came over gRPC has them in KServe's SDK.

    A protobuf map, where a name that is not there has an empty message.
    """
    from kserve_lite.compat.protocol.grpc.grpc_predict_v2_pb2 import ModelInferRequest

    return ModelInferRequest(parameters=to_grpc_parameters(parameters)).parameters


def plain_parameters(
    parameters: Mapping[str, Any] | None, *, size: int | None = None
) -> dict[str, Any]:
    """A tensor's parameters as plain values, in a dict of their own.

    size: how many raw bytes the tensor has, which is told; None: it goes another way.
    """
    plain = to_http_parameters(parameters or {})
    plain.pop(BINARY_SIZE, None)
    if size is not None:
        plain[BINARY_SIZE] = size
    return plain
