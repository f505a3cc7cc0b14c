"""ModelInferResponse: from messages to bytes; see `v2_protobuf.py`."""

from __future__ import annotations

from typing import Any

from kserve_lite.codecs.proto import message_class, wire
from kserve_lite.codecs.proto.contents import CONTENTS
from kserve_lite.codecs.proto.varints import write_varints
from kserve_lite.codecs.proto.wire import Buffer, delimited, prefix
from kserve_lite.codecs.raw_tensors import (
    elements_of,
    flattened,
    joined,
    octets,
    raw_of,
)
from kserve_lite.messages import InferResponse
from kserve_lite.tensors import Parameters, Tensor

ModelInferResponse = message_class("inference.ModelInferResponse")
InferOutputTensor = message_class("inference.ModelInferResponse.InferOutputTensor")


def encode(response: InferResponse, *, raw: bool) -> list[Buffer]:
    """Write a response whose model name and id are filled in, as pieces in order.

    raw: whether the tensors go raw; they do anyway if one is FP16 or BF16. All go the
    same way: `raw_output_contents` belong to the outputs by position.
    Large arrays are not copied. Raises TypeError or ValueError, in words for the
    author of the model, for what the protocol cannot say.
    """
    message = ModelInferResponse(model_name=response.model_name, id=response.id)
    if response.model_version is not None:
        message.model_version = response.model_version
    if response.parameters:
        _write_parameters(message.parameters, response.parameters)
    raw = raw or any(tensor.datatype not in CONTENTS for tensor in response.outputs)
    if raw:
        return _encode_raw(response, message)
    large: list[Buffer] = []
    for tensor in response.outputs:
        if tensor.array.size * 4 < wire.FAST_SIZE or tensor.datatype == "BYTES":
            output = message.outputs.add()
            _write_head(output, tensor)
            _write_contents(output.contents, tensor)
            if large:  # what follows a large output must not be merged before it
                large.append(delimited(5, output.SerializeToString()))
                del message.outputs[-1]
        else:
            large += _large_output(tensor)
    start = message.SerializeToString()
    return _joined([start, *large]) if large else [start]


def in_stream(pieces: list[Buffer]) -> list[Buffer]:
    """Wrap an encoded answer as the `infer_response` of a ModelStreamInferResponse."""
    return _joined([prefix(2, sum(map(len, pieces))), *pieces])


def _encode_raw(response: InferResponse, message: Any) -> list[Buffer]:
    values: list[Buffer] = []
    for tensor in response.outputs:
        _write_head(message.outputs.add(), tensor)
        data = raw_of(tensor)
        values += (prefix(6, len(data)), data)
    return _joined([message.SerializeToString(), *values])


def _joined(pieces: list[Buffer]) -> list[Buffer]:
    return joined(pieces, below=wire.FAST_SIZE)


def _write_head(output: Any, tensor: Tensor) -> None:
    output.name = tensor.name
    output.datatype = tensor.datatype
    output.shape.extend(tensor.array.shape)
    if tensor.parameters:
        _write_parameters(output.parameters, tensor.parameters)


def _write_contents(contents: Any, tensor: Tensor) -> None:
    flat = flattened(tensor)
    column = CONTENTS[tensor.datatype]
    # Present even where it is empty: so says "typed" to the client.
    contents.SetInParent()
    if column.width:
        # As Python's floats, signalling NaN of FP32 would become quiet ones.
        contents.MergeFromString(delimited(column.number, flat.tobytes()))
        return
    values = elements_of(flat) if tensor.datatype == "BYTES" else flat.tolist()
    getattr(contents, column.field).extend(values)


def _large_output(tensor: Tensor) -> list[Buffer]:
    """One output with packed contents, which protobuf would make objects of."""
    column = CONTENTS[tensor.datatype]
    head = InferOutputTensor()
    _write_head(head, tensor)
    flat = flattened(tensor)
    packed: Buffer
    if column.width or tensor.datatype == "BOOL":
        packed = octets(flat)  # a BOOL's byte is its varint
    else:
        packed = write_varints(flat)
    before = prefix(column.number, len(packed))
    before = prefix(5, len(before) + len(packed)) + before
    start: bytes = head.SerializeToString() + before
    return [prefix(5, len(start) + len(packed)) + start, packed]


def _write_parameters(target: Any, parameters: Parameters) -> None:
    for name, value in parameters.items():
        if value is None:
            continue
        try:
            _write_parameter(target[name], value)
        except ValueError as error:
            raise ValueError(f"the parameter {name!r}: {error}") from error
        except TypeError as error:
            raise TypeError(f"the parameter {name!r}: {error}") from error


def _write_parameter(target: Any, value: Any) -> None:
    if hasattr(value, "item"):  # a number of numpy's
        value = value.item()
    if isinstance(value, bool):
        target.bool_param = value
    elif isinstance(value, int):
        if value >= 1 << 63:
            target.uint64_param = value
        else:
            target.int64_param = value
    elif isinstance(value, str):
        target.string_param = value
    elif isinstance(value, float):
        target.double_param = value
    else:
        raise TypeError(f"gRPC has no parameters of type {type(value).__name__}")
