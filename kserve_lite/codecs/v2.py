"""KServe V2, the Open Inference Protocol, as JSON.

https://github.com/kserve/open-inference-protocol, inference_rest. An input's data may
be flat or nested; an output's is flat, in row-major order. FP32 and smaller are written
with the digits of a double, as KServe's SDK does, so that a client that compares
numbers sees the same. NaN and infinity, which JSON has not, are written as null.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from kserve_lite.codecs.json_tensors import (
    MAX_DIMENSIONS,
    Body,
    Lane,
    dumps,
    read,
    strings,
    to_array,
)
from kserve_lite.errors import InvalidInput
from kserve_lite.messages import InferRequest, InferResponse, RequestedOutput
from kserve_lite.tensors import (
    DATATYPES,
    Parameters,
    Tensor,
    as_numpy,
    datatype_of,
    describe,
    element_count,
)

if TYPE_CHECKING:
    import numpy as np


def decode(body: Body, *, model_name: str) -> InferRequest:
    """Return the request of a JSON body.

    Raises InvalidInput for malformed JSON, missing or wrong fields, data that does not
    fit shape and datatype.
    """
    return read(body, partial(_build, model_name=model_name))


def _build(root: Any, lane: Lane, *, model_name: str) -> InferRequest:
    members = lane.members(root)
    if members is None:
        raise InvalidInput('The body must be an object with "inputs".')
    inputs = lane.elements(members.get("inputs"))
    if inputs is None:
        raise InvalidInput('The body must have "inputs", a list of tensors.')
    tensors = tuple(
        _tensor(node, lane, index, model_name) for index, node in enumerate(inputs)
    )
    names = [tensor.name for tensor in tensors]
    if len(set(names)) != len(names):
        raise InvalidInput("Two inputs have the same name.")
    request_id = members.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise InvalidInput('"id" must be a string.')
    return InferRequest(
        model_name,
        tensors,
        id=request_id or None,
        parameters=_parameters(members, lane, "the request"),
        outputs=_requested(members.get("outputs"), lane),
    )


def _tensor(node: Any, lane: Lane, index: int, model_name: str) -> Tensor:
    members = lane.members(node)
    if members is None:
        raise InvalidInput(f"inputs[{index}] must be an object.")
    name = members.get("name")
    if not isinstance(name, str):
        raise InvalidInput(f'inputs[{index}] must have a "name", a string.')
    datatype = members.get("datatype")
    if not isinstance(datatype, str) or datatype.upper() not in DATATYPES:
        came = f"'{datatype}'" if _is_word(datatype) else "something else"
        raise InvalidInput(
            f"Input '{name}' must have a \"datatype\" out of {', '.join(DATATYPES)}; "
            f"got {came}."
        )
    datatype = datatype.upper()
    shape = _shape(members.get("shape"), lane, name)
    if members.get("data") is None:
        raise InvalidInput(
            f"'data' field is missing for input '{name}' for model '{model_name}'"
        )
    array = lane.array(members["data"], datatype, name)
    if array.size != element_count(shape):
        raise InvalidInput(
            f"Input '{name}' of shape {describe(datatype, shape)} must have "
            f"{element_count(shape)} elements, got {array.size}."
        )
    try:
        array = array.reshape(shape)
    except ValueError:  # no elements, and sizes whose product numpy cannot hold
        raise InvalidInput(
            f"Input '{name}': no tensor can have the shape {describe(datatype, shape)}."
        ) from None
    parameters = _parameters(members, lane, f"input '{name}'")
    return Tensor(name, array, datatype, parameters)


def _is_word(text: object) -> bool:
    """Whether a text is short and plain enough to be named in an error."""
    return isinstance(text, str) and len(text) <= 16 and text.isalnum()


def _shape(node: Any, lane: Lane, name: str) -> tuple[int, ...]:
    sizes = lane.elements(node)
    shape = []
    for size in (None,) if sizes is None else sizes:
        # Some clients of KServe send the numbers as strings.
        if isinstance(size, str) and size.isascii() and size.isdecimal():
            size = int(size) if len(size) < 20 else None
        if type(size) is not int or not 0 <= size < 2**63:
            raise InvalidInput(
                f"Input '{name}' must have a \"shape\", a list of numbers from 0 up."
            )
        shape.append(size)
    if len(shape) > MAX_DIMENSIONS:
        raise InvalidInput(
            f"Input '{name}' may have at most {MAX_DIMENSIONS} dimensions, "
            f"got {len(shape)}."
        )
    return tuple(shape)


def _parameters(members: dict[str, Any], lane: Lane, whose: str) -> Parameters:
    node = members.get("parameters")
    if node is None:
        return {}
    parameters = lane.plain(node)
    if not isinstance(parameters, dict):
        raise InvalidInput(f'"parameters" of {whose} must be an object.')
    if any(isinstance(value, (dict, list)) for value in parameters.values()):
        raise InvalidInput(
            f'"parameters" of {whose} must be strings, numbers or booleans.'
        )
    return {key: value for key, value in parameters.items() if value is not None}


def _requested(node: Any, lane: Lane) -> tuple[RequestedOutput, ...]:
    if node is None:
        return ()
    outputs = lane.elements(node)
    if outputs is None:
        raise InvalidInput('"outputs" must be a list.')
    requested = []
    for index, output in enumerate(outputs):
        members = lane.members(output)
        name = members.get("name") if members else None
        if members is None or not isinstance(name, str):
            raise InvalidInput(f'outputs[{index}] must have a "name", a string.')
        parameters = _parameters(members, lane, f"output '{name}'")
        requested.append(RequestedOutput(name, parameters))
    return tuple(requested)


def encode(response: InferResponse) -> bytes:
    """Write a response whose model name and id are filled in.

    Raises InvalidInput for BYTES that JSON cannot say, TypeError for other elements.
    """
    document: dict[str, Any] = {"model_name": response.model_name}
    if response.model_version is not None:
        document["model_version"] = response.model_version
    document["id"] = response.id
    if response.parameters:
        document["parameters"] = response.parameters
    document["outputs"] = [_output(tensor) for tensor in response.outputs]
    return dumps(document)


def _output(tensor: Tensor) -> dict[str, Any]:
    output: dict[str, Any] = {
        "name": tensor.name,
        "shape": tensor.shape,
        "datatype": tensor.datatype,
    }
    if tensor.parameters:
        output["parameters"] = tensor.parameters
    output["data"] = _flat(tensor)
    return output


def _flat(tensor: Tensor) -> Any:
    array: np.ndarray = tensor.array.reshape(-1)
    if tensor.datatype == "BYTES":
        return strings(array, tensor.name).tolist()
    if DATATYPES[tensor.datatype].kind == "float":
        return array.astype("float64", copy=False)
    return array


def response_of(value: dict[str, Any]) -> InferResponse:
    """Read a V2-shaped dict that a handler returned, its data nested or flat.

    Its data may also be shaped as in gRPC's messages, as KServe's SDK wants it there:
    `"contents": {"fp32_contents": [...]}`. Raises ValueError, in words for the author
    of the model, where it is no response.
    """
    outputs = value.get("outputs")
    if not isinstance(outputs, list):
        raise ValueError('a V2 answer needs "outputs", a list of tensors')
    tensors = []
    for index, output in enumerate(outputs):
        try:
            name, shape = output["name"], output["shape"]
            datatype = output["datatype"].upper()
            contents = output.get("contents")
            data = output["data"] if contents is None else _contents(contents)
            array = _stated(data, datatype, name).reshape(shape)
            parameters = output.get("parameters") or {}
        except (
            KeyError,
            TypeError,
            ValueError,
            OverflowError,
            AttributeError,
            InvalidInput,
        ) as error:
            raise ValueError(f"outputs[{index}] of the answer: {error!r}") from error
        tensors.append(Tensor(name, array, datatype, parameters))
    version = value.get("model_version")
    return InferResponse(
        tuple(tensors),
        id=value.get("id"),
        model_name=value.get("model_name"),
        model_version=None if version is None else str(version),
        parameters=value.get("parameters") or {},
    )


def _contents(contents: dict[str, Any]) -> Any:
    """The data of an output that is written like gRPC's InferTensorContents."""
    filled = [name for name, values in contents.items() if len(values)]
    if len(filled) > 1 or any(not name.endswith("_contents") for name in contents):
        raise ValueError('"contents" holds one list, fp32_contents say')
    if filled == ["bytes_contents"]:
        import numpy as np

        return np.array([*contents["bytes_contents"], None], object)[:-1]
    return contents[filled[0]] if filled else []


def _stated(data: Any, datatype: str, name: str) -> np.ndarray:
    """The data of an output as an array of the datatype that the output states."""
    if not isinstance(data, list):
        array = as_numpy(data)
        if datatype_of(array) == datatype:
            return array
        data = array.reshape(-1).tolist()
    return to_array(data, datatype, name)
