"""V2 as a client has it: requests written, answers read, JSON and protobuf.

For tests of models (`testing/`) and for what forwards requests (`forwarding/`), which
may hear from anybody: what is read wrong raises one of `MALFORMED`, and no more memory
is taken than the answer's own bytes call for. numpy is imported where it is used,
protobuf too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from kserve_lite.codecs.json_tensors import dumps, loads, strings, to_array
from kserve_lite.codecs.raw_tensors import from_raw, objects, raw_of
from kserve_lite.errors import InvalidInput
from kserve_lite.messages import InferResponse
from kserve_lite.tensors import (
    DATATYPES,
    Parameters,
    Tensor,
    as_numpy,
    is_array,
    numpy_dtype,
)

if TYPE_CHECKING:
    import numpy as np

# What an answer raises that is none.
MALFORMED = (
    AttributeError,
    InvalidInput,
    LookupError,
    OverflowError,
    TypeError,
    ValueError,
)

_SIZE = "binary_data_size"
# A parameter's field in protobuf, by its Python type; a bool is an int too.
_FIELDS = {
    bool: "bool_param",
    int: "int64_param",
    float: "double_param",
    str: "string_param",
}


class Asked(NamedTuple):
    """A request. outputs: the names of those that are asked for; empty: all."""

    inputs: tuple[Tensor, ...]
    parameters: Parameters
    outputs: Sequence[str]
    id: str = ""


def asked(
    inputs: Mapping[str, Any], parameters: Parameters, outputs: Sequence[str]
) -> Asked:
    """Make a request of arrays (numpy's or torch's) by name.

    Raises TypeError for other values, dtypes without a datatype, and parameters that
    the protocol has no type for.
    """
    for name, value in inputs.items():
        if not is_array(value):
            raise TypeError(
                f"input {name!r} must be an array of numpy or torch, not a "
                f"{type(value).__name__}"
            )
    for name, value in parameters.items():
        if type(value) not in _FIELDS:
            raise TypeError(
                f"the parameter {name!r} must be a bool, int, float or str, not a "
                f"{type(value).__name__}"
            )
    tensors = tuple(Tensor.from_array(name, as_numpy(inputs[name])) for name in inputs)
    return Asked(tensors, parameters, outputs)


def write_json(request: Asked, *, binary: bool) -> tuple[bytes, int | None]:
    """Write a body; return it, and how many bytes of it are JSON; None: all.

    binary: whether tensors go, and are to come back, by the binary tensor extension.
    """
    raw = [raw_of(tensor) for tensor in request.inputs] if binary else []
    document: dict[str, Any] = {"id": request.id} if request.id else {}
    document["inputs"] = []
    for index, tensor in enumerate(request.inputs):
        entry: dict[str, Any] = {
            "name": tensor.name,
            "shape": tensor.shape,
            "datatype": tensor.datatype,
        }
        parameters = {k: v for k, v in tensor.parameters.items() if k != _SIZE}
        if binary:
            parameters[_SIZE] = len(raw[index])
        else:
            entry["data"] = _flat(tensor)
        if parameters:
            entry["parameters"] = parameters
        document["inputs"].append(entry)
    parameters = dict(request.parameters)
    if binary:
        parameters.setdefault("binary_data_output", True)
    if parameters:
        document["parameters"] = parameters
    if request.outputs:
        flag = {"parameters": {"binary_data": True}} if binary else {}
        document["outputs"] = [{"name": name, **flag} for name in request.outputs]
    head = dumps(document)
    return b"".join((head, *raw)), len(head) if binary else None


def _flat(tensor: Tensor) -> Any:
    flat = tensor.array.reshape(-1)
    if tensor.datatype == "BYTES":
        return strings(flat, tensor.name).tolist()
    if DATATYPES[tensor.datatype].kind == "float":
        return flat.astype("float64")
    return flat


def read_json(body: bytes, json_size: int | None) -> InferResponse:
    """Read an answer. json_size: how many bytes of it are JSON; None: all.

    Raises one of `MALFORMED`.
    """
    document = loads(body[:json_size])
    rest = memoryview(body)[len(body) if json_size is None else json_size :]
    outputs = []
    for output in document["outputs"]:
        name, datatype = _text(output["name"]), _text(output["datatype"])
        shape, parameters = tuple(output["shape"]), dict(output.get("parameters") or {})
        if _SIZE in parameters:
            size = parameters.pop(_SIZE)
            array = from_raw(rest[:size], datatype, shape, name)
            rest = rest[size:]
        else:
            array = _array(output["data"], datatype, name).reshape(shape)
        outputs.append(Tensor(name, array, datatype, parameters))
    version = document.get("model_version")
    return InferResponse(
        tuple(outputs),
        id=_text(document.get("id") or "") or None,
        model_name=_text(document.get("model_name") or "") or None,
        model_version=None if version is None else str(version),
        parameters=dict(document.get("parameters") or {}),
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"text was expected, a {type(value).__name__} came")
    return value


def _array(data: list[Any], datatype: str, name: str) -> np.ndarray:
    import numpy as np

    if DATATYPES[datatype].kind == "float":  # null is what JSON has for NaN
        return np.array(data, "float64").astype(numpy_dtype(datatype))
    return to_array(data, datatype, name)


def write_proto(request: Asked, *, model: str, version: str | None) -> Any:
    """Return a ModelInferRequest whose tensors are raw.

    Raises TypeError for parameters that gRPC has no type for.
    """
    from kserve_lite.codecs.proto import message_class, message_from

    message = message_from(
        message_class("inference.ModelInferRequest"),
        {
            "model_name": model,
            "model_version": version or "",
            "id": request.id,
            "parameters": _written(request.parameters),
            "inputs": [
                {
                    "name": t.name,
                    "datatype": t.datatype,
                    "shape": t.shape,
                    "parameters": _written(t.parameters),
                }
                for t in request.inputs
            ],
            "outputs": [{"name": name} for name in request.outputs],
        },
    )
    message.raw_input_contents.extend(bytes(raw_of(t)) for t in request.inputs)
    return message


def _written(parameters: Parameters) -> dict[str, Any]:
    written = {}
    for name, value in parameters.items():
        field = _FIELDS.get(type(value))
        if field is None:
            raise TypeError(
                f"the parameter {name!r} is a {type(value).__name__}, which gRPC has "
                "no parameters of"
            )
        if field == "int64_param" and value >= 1 << 63:
            field = "uint64_param"
        written[name] = {field: value}
    return written


def read_proto(message: Any) -> InferResponse:
    """Read a ModelInferResponse, its tensors raw or not; raises one of `MALFORMED`."""
    outputs = []
    for index, output in enumerate(message.outputs):
        name, datatype, shape = output.name, output.datatype, tuple(output.shape)
        if message.raw_output_contents:
            raw = message.raw_output_contents[index]
            array = from_raw(raw, datatype, shape, name)
        else:
            array = _from_contents(output.contents, datatype).reshape(shape)
        parameters = _parameters(output.parameters)
        outputs.append(Tensor(name, array, datatype, parameters))
    return InferResponse(
        tuple(outputs),
        id=message.id or None,
        model_name=message.model_name,
        model_version=message.model_version or None,
        parameters=_parameters(message.parameters),
    )


def _from_contents(contents: Any, datatype: str) -> np.ndarray:
    import numpy as np

    from kserve_lite.codecs.proto.contents import CONTENTS

    values = getattr(contents, CONTENTS[datatype].field)
    if datatype == "BYTES":
        return objects(values)
    return np.array(values, numpy_dtype(datatype))


def _parameters(message: Any) -> dict[str, Any]:
    return {
        name: getattr(parameter, parameter.WhichOneof("parameter_choice"))
        for name, parameter in message.items()
    }
