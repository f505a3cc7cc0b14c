"""Between protocols: whatever a client or a preprocess handler gave, for a predictor.

V1 has rows (`instances`) of untyped JSON, V2 named and typed tensors; each can be
turned into the other, by the rules of `codecs/v1.py`. What need not be turned is left
as it is. What cannot be turned is InvalidInput on the way to the predictor, since it
came from a client or from what a client sent, and ValueError on the way back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from kserve_lite.codecs import generate, v1, v2
from kserve_lite.codecs.json_tensors import dumps, to_array
from kserve_lite.errors import InvalidInput
from kserve_lite.handlers import Handler
from kserve_lite.messages import Context, InferRequest, InferResponse
from kserve_lite.tensors import (
    DATATYPES,
    Tensor,
    TensorSpec,
    as_numpy,
    as_torch,
    is_array,
    numpy_dtype,
)

# Triton's name for the text that a model answers with.
_TEXT = "text_output"
_TENSOR = {"name", "shape", "datatype"}
# What an input is called that nobody has named.
_PLACEHOLDER = re.compile(r"input-\d+")


def v1_body(payload: Any, context: Context, specs: Sequence[TensorSpec]) -> bytes:
    """What a V1 predictor is sent. specs: as for `tensors_of`.

    JSON goes as it is, tensors as rows. Raises InvalidInput, and TypeError for what
    JSON cannot say.
    """
    if not isinstance(payload, InferRequest):
        members = context.protocol == "generate" and isinstance(payload, dict)
        if _arrays(payload) is None and (not members or _is_v1(payload)):
            return dumps(payload)
        payload = tensors_of(payload, context, specs)
    inputs = tuple(
        t if t.shape else Tensor(t.name, t.array.reshape(1), t.datatype)
        for t in payload.inputs
    )
    if not inputs:
        return dumps({"instances": []})
    try:
        return v1.encode_tensors(InferResponse(inputs), "instances")
    except ValueError:
        raise InvalidInput(
            "The inputs differ in their number of rows, which the predictor's protocol "
            "cannot say."
        ) from None


def tensors_of(
    payload: Any, context: Context, specs: Sequence[TensorSpec]
) -> InferRequest:
    """What a V2 predictor is sent: tensors of whatever payload.

    specs: what is declared of them, in order, which may be nothing: names for arrays
    without one, datatypes for JSON's numbers.
    Raises InvalidInput, and TypeError for what has no tensors.
    """
    if isinstance(payload, InferRequest):
        return payload
    model_name = context.model_name
    arrays = _arrays(payload)
    if arrays is not None:
        by_name = {spec.name: spec for spec in specs}
        named = [
            (_name(specs, index) if name is None else name, array)
            for index, (name, array) in enumerate(arrays)
        ]
        tensors = tuple(_tensor(name, a, by_name.get(name)) for name, a in named)
        return InferRequest(model_name, tensors)
    if isinstance(payload, dict) and _is_v2(payload):
        return v2.decode(dumps(payload), model_name=model_name)
    if context.protocol == "generate" and isinstance(payload, dict):
        declared = {spec.name or "": spec for spec in specs}
        return generate.tensors_of(payload, model_name=model_name, inputs=declared)
    if isinstance(payload, list):
        payload = {"instances": payload}
    if not isinstance(payload, dict):
        raise TypeError(
            "what goes to a V2 predictor is an array, a tuple or dict of arrays, an "
            f"InferRequest or V1's JSON; it is a {type(payload).__name__}"
        )
    datatypes = {spec.name: spec.datatype for spec in specs}
    return v1.decode_tensors(
        dumps(payload),
        model_name=model_name,
        datatype_of=datatypes.get,
        unnamed=_name(specs, 0),
    )


def fitted(request: InferRequest, takes: Mapping[str, str]) -> InferRequest:
    """Give tensors that came without names and types those that the predictor takes.

    takes: the datatypes of its inputs by name, in order; empty where it does not say.
    What does not fit is left as it is: the predictor words it best.
    """
    tensors = request.inputs
    names = [tensor.name for tensor in tensors]
    if len(names) == len(takes) and all(map(_PLACEHOLDER.fullmatch, names)):
        names = list(takes)
    fits = tuple(
        _retyped(tensor, name, takes.get(name, tensor.datatype))
        for name, tensor in zip(names, tensors, strict=True)
    )
    return replace(request, inputs=fits)


def _retyped(tensor: Tensor, name: str, datatype: str) -> Tensor:
    array = tensor.array
    came, wanted = (DATATYPES[d].kind for d in (tensor.datatype, datatype))
    if tensor.datatype == datatype or "bytes" in (came, wanted) or not array.ndim:
        return replace(tensor, name=name)
    if wanted == "float" and came != "bool":
        import numpy as np

        with np.errstate(over="ignore"):
            narrow = array.astype(numpy_dtype(datatype))
        if not np.isinf(narrow).any():
            return Tensor(name, narrow, datatype, tensor.parameters)
    else:
        with suppress(InvalidInput):
            exact = to_array(array.tolist(), datatype, name)
            return Tensor(name, exact, datatype, tensor.parameters)
    return replace(tensor, name=name)


def v1_answer(
    answer: Any, context: Context, specs: Sequence[TensorSpec]
) -> InferResponse:
    """A V1 predictor's answer as tensors, for a client that takes nothing else.

    specs: the declared outputs. Raises ValueError where it cannot be said so.
    """
    rows = answer.get("predictions") if isinstance(answer, dict) else None
    columns = answer.get("outputs") if isinstance(answer, dict) else None
    if isinstance(rows, dict):
        rows, columns = None, rows
    if rows is None and columns is None:
        raise ValueError('a V1 answer has "predictions"; what came has none')
    datatypes = {spec.name: spec.datatype for spec in specs}
    unnamed = _TEXT if context.protocol == "generate" else "output-0"
    if specs:
        unnamed = specs[0].name or unnamed
    try:
        read = v1.decode_tensors(
            dumps({"instances": rows} if rows is not None else {"inputs": columns}),
            model_name=context.model_name,
            datatype_of=datatypes.get,
            unnamed=unnamed,
        )
    except InvalidInput as error:
        raise ValueError(f"its predictions are no tensors: {error}") from error
    return InferResponse(read.inputs)


def arguments_of(
    answer: Any, handler: Handler, context: Context, specs: Sequence[TensorSpec]
) -> Any:
    """An answer for a postprocess handler whose parameters are arrays.

    One parameter gets the only output, several get theirs by name, or in order where
    the names are others. Raises ValueError where they do not go together.
    """
    if not isinstance(answer, InferResponse):
        answer = v1_answer(answer, context, specs)
    parameters, outputs = handler.tensors, answer.outputs
    required = [p for p in parameters if not p.optional]
    if not len(required) <= len(outputs) <= len(parameters):
        raise ValueError(
            f"it gave {len(outputs)} outputs, {handler.stage.value} takes "
            f"{len(parameters)}"
        )
    by_name = {output.name: output for output in outputs}
    if not by_name.keys() <= {p.wire for p in parameters}:
        by_name = {p.wire: o for p, o in zip(parameters, outputs, strict=False)}
    arrays = {
        p.name: as_torch(by_name[p.wire].array, p.wire)
        if p.torch
        else by_name[p.wire].array
        for p in parameters
        if p.wire in by_name
    }
    return arrays if len(parameters) > 1 else next(iter(arrays.values()), None)


def _arrays(payload: Any) -> list[tuple[str | None, Any]] | None:
    """The arrays of a payload that has nothing else, with their names; or None."""
    if is_array(payload):
        return [(None, payload)]
    if isinstance(payload, tuple) and payload and all(map(is_array, payload)):
        return [(None, array) for array in payload]
    if not isinstance(payload, Mapping) or not payload or _is_v1(payload):
        return None
    return list(payload.items()) if all(map(is_array, payload.values())) else None


def _is_v1(payload: Any) -> bool:
    return isinstance(payload, Mapping) and (
        "instances" in payload or "inputs" in payload
    )


def _is_v2(payload: dict[str, Any]) -> bool:
    inputs = payload.get("inputs")
    return isinstance(inputs, list) and any(
        isinstance(tensor, dict) and tensor.keys() >= _TENSOR for tensor in inputs
    )


def _name(specs: Sequence[TensorSpec], index: int) -> str:
    if index < len(specs):
        return specs[index].name or f"input-{index}"
    return f"input-{index}"


def _tensor(name: str, value: Any, spec: TensorSpec | None) -> Tensor:
    array = as_numpy(value)
    if spec is not None:
        # As with outputs: FP64 that numpy made of FP32 on the way is narrowed.
        dtype = numpy_dtype(spec.datatype)
        array = array.astype(dtype, casting="same_kind", copy=False)
    return Tensor.from_array(name, array)
