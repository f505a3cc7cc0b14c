"""KServe V1 JSON: `{"instances": [...]}` or `{"inputs": ...}` in, predictions out.

A body is JSON whatever its content type says: `curl -d` announces a form. Rows
(`instances`) and columns (`inputs`) are those of TensorFlow Serving's REST API, which
V1 follows, `{"b64": "..."}` for bytes included.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from kserve_lite.codecs.json_tensors import Body, Lane, dumps, loads, read
from kserve_lite.errors import InvalidInput
from kserve_lite.messages import InferRequest, InferResponse
from kserve_lite.tensors import Tensor

if TYPE_CHECKING:
    import numpy as np


def decode(body: Body) -> Any:
    """Return the body's JSON value, for handlers that take JSON.

    Raises InvalidInput for malformed JSON and for `instances` that are no list.
    """
    return checked(loads(body))


def checked(value: Any) -> Any:
    """Return a decoded body, unless its `instances` are no list: InvalidInput."""
    if (
        type(value) is dict
        and "instances" in value
        and type(value["instances"]) is not list
    ):
        raise InvalidInput('Expected "instances" to be a list')
    return value


def decode_tensors(
    body: Body,
    *,
    model_name: str,
    datatype_of: Callable[[str], str | None],
    unnamed: str,
) -> InferRequest:
    """Return the body's rows or columns as tensors, one an input name.

    datatype_of: the datatype that the input of a name must have, None where nothing is
        declared; V1 itself is untyped.
    unnamed: the name for an input that the body does not name.
    Raises InvalidInput.
    """
    return read(
        body,
        partial(
            build_tensors,
            model_name=model_name,
            datatype_of=datatype_of,
            unnamed=unnamed,
        ),
    )


def build_tensors(
    root: Any,
    lane: Lane,
    *,
    model_name: str,
    datatype_of: Callable[[str], str | None],
    unnamed: str,
) -> InferRequest:
    """What `decode_tensors` does, of a JSON value that is parsed already."""
    members = lane.members(root)
    if members is None:
        raise InvalidInput("The body must be an object with instances or inputs.")
    columns: dict[str, Any]
    if "instances" in members:
        columns = _rows(members["instances"], lane, unnamed)
    elif "inputs" in members:
        node = members["inputs"]
        named = lane.members(node)
        columns = {unnamed: node} if named is None else named
    else:
        raise InvalidInput('The body has neither "instances" nor "inputs".')
    tensors = []
    for name, node in columns.items():
        tensors.append(
            Tensor.from_array(name, lane.array(node, datatype_of(name), name))
        )
    return InferRequest(model_name, tuple(tensors))


def _rows(node: Any, lane: Lane, unnamed: str) -> dict[str, Any]:
    """Turn rows of `{name: value}` into columns; plain rows are one column."""
    first = lane.first(node)
    if first is None:
        raise InvalidInput('Expected "instances" to be a list')
    first_members = lane.members(first[0]) if first else None
    if first_members is None or set(first_members) == {"b64"}:
        return {unnamed: node}
    columns: dict[str, Any] = {name: [] for name in first_members}
    for row in lane.elements(node) or ():
        members = lane.members(row)
        if members is None or members.keys() != columns.keys():
            raise InvalidInput(
                "The instances differ in the names of their values: each must have "
                "the names that the first one has."
            )
        for name, value in members.items():
            columns[name].append(value)
    return columns


# A JSON answer is written as it stands.
encode = dumps


def encode_tensors(response: InferResponse, key: str) -> bytes:
    """Write outputs as rows: `{"predictions": rows}` with `key` for "predictions".

    One output gives its rows, several give rows of `{name: value}`. Raises ValueError
    where several outputs differ in their number of rows.
    """
    outputs = response.outputs
    if len(outputs) == 1:
        return dumps({key: _sayable(outputs[0].array)})
    counts = {tensor.array.shape[0] if tensor.array.ndim else 1 for tensor in outputs}
    if len(counts) > 1:
        raise ValueError(f"the outputs differ in their number of rows: {counts}")
    columns = {
        tensor.name: _sayable(tensor.array if tensor.shape else tensor.array.reshape(1))
        for tensor in outputs
    }
    rows = [
        dict(zip(columns, values, strict=True))
        for values in zip(*columns.values(), strict=True)
    ]
    return dumps({key: rows})


def _sayable(array: np.ndarray) -> Any:
    """An array, or for BYTES lists of text, `{"b64": ...}` where it is no UTF-8."""
    if array.dtype.kind in "SU":
        array = array.astype(object)
    if array.dtype.kind != "O":
        return array
    return _texts(array.tolist())


def _texts(value: Any) -> Any:
    if isinstance(value, list):
        return [_texts(element) for element in value]
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"b64": base64.b64encode(value).decode()}
