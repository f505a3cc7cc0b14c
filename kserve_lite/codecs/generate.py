"""Triton's generate extension: the members of a JSON object are the tensors.

https://github.com/triton-inference-server/server, docs/protocol/extension_generate.md.
A request is `{"text_input": "...", "parameters": {...}}`, an answer
`{"model_name": ..., "text_output": "..."}`; of a stream each answer is one Server-Sent
Event (https://html.spec.whatwg.org/multipage/server-sent-events.html).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kserve_lite.codecs.json_tensors import Body, dumps, loads, strings, to_array
from kserve_lite.codecs.raw_tensors import check_count
from kserve_lite.errors import InvalidInput
from kserve_lite.messages import (
    Answer,
    InferRequest,
    InferResponse,
    JsonAnswer,
    RawAnswer,
)
from kserve_lite.tensors import Tensor, TensorSpec

_NO_TENSORS = ("id", "parameters")


def decode(body: Body) -> dict[str, Any]:
    """Return the request's JSON object.

    Raises InvalidInput for malformed JSON, and for an id or parameters that are none.
    """
    members = loads(body)
    if type(members) is not dict:
        raise InvalidInput('The body must be an object, {"text_input": "..."} say.')
    check_count("members", members)
    if not isinstance(members.get("id", ""), str):
        raise InvalidInput('"id" must be a string.')
    if not isinstance(members.get("parameters", {}), dict):
        raise InvalidInput('"parameters" must be an object.')
    return members


def tensors_of(
    members: Mapping[str, Any], *, model_name: str, inputs: Mapping[str, TensorSpec]
) -> InferRequest:
    """Return the members as a request's tensors, a single value as one of shape [1].

    inputs: the declared ones, whose datatypes and numbers of dimensions the members
        take; further single values are parameters. Where none are declared every member
        is a tensor, BOOL, INT64, FP64 or BYTES.
    Raises InvalidInput.
    """
    parameters = dict(members.get("parameters", {}))
    tensors = []
    for name, value in members.items():
        if name in _NO_TENSORS or value is None:
            continue
        spec = inputs.get(name)
        if spec is not None or not inputs:
            tensors.append(_tensor(name, value, spec))
        elif isinstance(value, (dict, list)):
            raise InvalidInput(
                f"The model has no such input; it takes {', '.join(inputs)}."
            )
        else:
            parameters[name] = value
    return InferRequest(
        model_name,
        tuple(tensors),
        id=members.get("id") or None,
        parameters=parameters,
    )


def _tensor(name: str, value: Any, spec: TensorSpec | None) -> Tensor:
    datatype = None if spec is None else spec.datatype
    rank = 1 if spec is None else len(spec.shape)
    if isinstance(value, list):
        array = to_array(value, datatype, name)
    else:
        array = to_array([value], datatype, name).reshape(())
    if array.ndim < rank:
        array = array.reshape((1,) * (rank - array.ndim) + array.shape)
    return Tensor.from_array(name, array)


def encode(
    answer: Answer, *, text: str, model: tuple[str, str | None], request_id: str | None
) -> bytes:
    """Write one answer. text: the member that text is. model: its name and version.

    Raises TypeError or ValueError, in words for the author of the model, for what JSON
    cannot say.
    """
    name, version = model
    document: dict[str, Any] = {"model_name": name}
    if version is not None:
        document["model_version"] = version
    if request_id:
        document["id"] = request_id
    if isinstance(answer, RawAnswer):
        document[text] = answer.data.decode()
    elif isinstance(answer, InferResponse):
        for tensor in answer.outputs:
            document[tensor.name] = _value(tensor)
    elif isinstance(answer, JsonAnswer):
        if isinstance(answer.value, dict):
            document = {**answer.value, **document}
        else:
            document[text] = answer.value
    return dumps(document)


def _value(tensor: Tensor) -> Any:
    """One element as it is, several as lists."""
    array = tensor.array
    if tensor.datatype == "BYTES":
        array = strings(array, tensor.name)
    return array.reshape(-1)[:1].tolist()[0] if array.size == 1 else array


def event(data: bytes) -> bytes:
    """One Server-Sent Event. data: JSON, which has no line breaks of its own."""
    return b"data: " + data + b"\n\n"
