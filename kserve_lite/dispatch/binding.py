"""Between messages and handlers: a payload to arguments, a result to an answer.

What a request gets wrong raises InvalidInput. What a handler returns wrong raises
TypeError or ValueError, in words for its author; `dataplane.py` logs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kserve_lite.codecs.v2 import response_of
from kserve_lite.errors import InvalidInput
from kserve_lite.handlers import Form, Handler, TensorParameter
from kserve_lite.messages import (
    Answer,
    Context,
    InferRequest,
    InferResponse,
    JsonAnswer,
    RawAnswer,
    new_id,
)
from kserve_lite.model import Model
from kserve_lite.tensors import (
    Tensor,
    TensorSpec,
    as_numpy,
    as_torch,
    check_fits,
    describe,
    is_array,
    numpy_dtype,
)

if TYPE_CHECKING:
    import numpy as np


# Globals, since reading a member off its class costs 0.12 us in Python 3.11.
_JSON, _TENSORS = Form.JSON, Form.TENSORS
# The datatypes of the dtypes met so far: finding one by its name costs 3 us.
_DATATYPES: dict[np.dtype[Any], str] = {}


def request_arguments(handler: Handler, payload: Any) -> dict[str, Any] | tuple[Any]:
    """Turn a request's payload into the arguments of the handler that gets it first.

    A dict names several tensors, a tuple holds the one payload. Raises InvalidInput
    where names, datatypes or shapes are not what the handler declares.
    """
    if handler.form is not _TENSORS:
        return (payload,)
    request: InferRequest = payload
    parameters = handler.tensors
    if len(parameters) == 1:
        if len(request.inputs) != 1:
            raise InvalidInput(f"The model takes one input, got {len(request.inputs)}.")
        return (_argument(parameters[0], request.inputs[0]),)
    by_name = {tensor.name: tensor for tensor in request.inputs}
    wanted = {_wire_name(parameter): parameter for parameter in parameters}
    if by_name.keys() != wanted.keys():
        missing = [name for name in wanted if name not in by_name]
        detail = (
            f"missing: {', '.join(missing)}"
            if missing
            else f"{len(by_name) - len(wanted)} more came"
        )
        raise InvalidInput(f"The model takes the inputs {', '.join(wanted)}; {detail}.")
    return {
        parameter.name: _argument(parameter, by_name[name])
        for name, parameter in wanted.items()
    }


def stage_arguments(handler: Handler, value: Any) -> dict[str, Any] | tuple[Any]:
    """Turn what the stage before returned into a later stage's arguments.

    It is handed on as it is; only a handler of several tensors takes them from a dict
    by name or from a tuple in order.
    """
    names = [parameter.name for parameter in handler.tensors]
    if len(names) < 2:
        return (value,)
    if isinstance(value, tuple) and len(value) == len(names):
        return dict(zip(names, value, strict=True))
    if isinstance(value, Mapping) and set(value) == set(names):
        return dict(value)
    raise TypeError(
        f"{handler.stage.value} takes {', '.join(names)}: the stage before it must "
        f"return them as a tuple or dict, it returned {type(value).__name__}"
    )


def declared_datatype(handler: Handler, name: str) -> str | None:
    """The datatype that the handler declares for the input `name`."""
    for parameter in handler.tensors:
        if len(handler.tensors) == 1 or _wire_name(parameter) == name:
            return parameter.spec.datatype if parameter.spec else None
    return None


def unnamed_input(handler: Handler) -> str:
    """The name for an input to which the client gave none."""
    if len(handler.tensors) == 1:
        return _wire_name(handler.tensors[0])
    return "input-0"


def _wire_name(parameter: TensorParameter) -> str:
    spec = parameter.spec
    return spec.name if spec is not None and spec.name else parameter.name


def _argument(parameter: TensorParameter, tensor: Tensor) -> Any:
    if parameter.spec is not None:
        check_fits(tensor, parameter.spec)
    return as_torch(tensor.array, tensor.name) if parameter.torch else tensor.array


def answer_of(
    result: Any, model: Model, form: Form, context: Context, request: Any
) -> Answer:
    """Turn what the last handler returned into an answer.

    form: how the model's first handler takes its payload: on V1 a dict of arrays is an
        answer as it stands from a handler of JSON, and outputs by name from others.
    Raises TypeError or ValueError for what the protocol cannot say, InvalidInput for
    requested outputs that the model does not have.
    """
    is_v1 = context.protocol == "v1"
    if is_v1 and form is _JSON and type(result) is dict:
        return JsonAnswer(result)
    if isinstance(result, (bytes, bytearray, memoryview)):
        return RawAnswer(bytes(result))
    response = _response(result, model, form, is_v1)
    if response is None:
        if is_v1:
            return (
                RawAnswer(result.encode())
                if type(result) is str
                else JsonAnswer(result)
            )
        raise TypeError(
            f"a V2 answer is an array, a tuple or dict of arrays, an InferResponse or "
            f"a dict with outputs; the handler returned {type(result).__name__}"
        )
    asked = request if isinstance(request, InferRequest) else None
    outputs = response.outputs
    if asked is not None and asked.outputs:
        outputs = _requested(outputs, asked, model)
    given_id = response.id if isinstance(response.id, str) else None
    # A new one: a handler may keep the response that it returned.
    return InferResponse(
        outputs,
        id=given_id or (asked.id if asked else None) or new_id(),
        model_name=response.model_name or model.name,
        model_version=response.model_version or model.version,
        parameters=response.parameters,
    )


def _response(
    result: Any, model: Model, form: Form, is_v1: bool
) -> InferResponse | None:
    """The result as tensors, None where it is none."""
    if isinstance(result, InferResponse):
        return result
    if is_array(result):
        return _declared([(None, result)], model)
    if isinstance(result, tuple) and result and all(map(is_array, result)):
        return _declared([(None, array) for array in result], model)
    if isinstance(result, dict):
        keeps = is_v1 and (form is Form.JSON or "predictions" in result)
        if not keeps and result and all(map(is_array, result.values())):
            return _declared(list(result.items()), model)
        if not is_v1:
            return response_of(result)
    return None


def _declared(arrays: list[tuple[str | None, Any]], model: Model) -> InferResponse:
    """Name the arrays and hold them to the declared outputs."""
    specs = model.outputs
    if not specs:
        return InferResponse(
            tuple(
                _output(
                    f"output-{index}" if given is None else given, as_numpy(array), None
                )
                for index, (given, array) in enumerate(arrays)
            )
        )
    if len(specs) != len(arrays):
        raise ValueError(
            f"{len(specs)} outputs are declared, the handler returned {len(arrays)}"
        )
    by_name = {spec.name: spec for spec in specs}
    tensors = []
    for index, (given, array) in enumerate(arrays):
        if given is not None:
            name, spec = given, by_name.get(given)
        else:
            spec = specs[index]
            name = spec.name or f"output-{index}"
        tensors.append(_output(name, as_numpy(array), spec))
    return InferResponse(tuple(tensors))


def _output(name: str, array: np.ndarray, spec: TensorSpec | None) -> Tensor:
    if spec is None:
        datatype = _DATATYPES.get(array.dtype)
        if datatype is not None:
            return Tensor(name, array, datatype)
        tensor = Tensor.from_array(name, array)
        if array.dtype.isnative and array.dtype.kind not in "SU":  # no end of lengths
            _DATATYPES[array.dtype] = tensor.datatype
        return tensor
    # The metadata is a promise: FP64 that numpy made of FP32 on the way is narrowed,
    # anything else that differs is the author's to mend.
    array = array.astype(numpy_dtype(spec.datatype), casting="same_kind", copy=False)
    if not spec.fits(array.shape):
        raise ValueError(
            f"output '{name}' is declared {describe(spec.datatype, spec.shape)}, the "
            f"handler returned {describe(spec.datatype, array.shape)}"
        )
    return Tensor(name, array, spec.datatype)


def _requested(
    outputs: tuple[Tensor, ...], request: InferRequest, model: Model
) -> tuple[Tensor, ...]:
    by_name = {tensor.name: tensor for tensor in outputs}
    for output in request.outputs:
        if output.name not in by_name:
            raise InvalidInput(
                f"Unexpected inference output '{output.name}' for model '{model.name}'"
            )
    return tuple(by_name[output.name] for output in request.outputs)
