"""Between messages and handlers: a payload to arguments, a result to an answer.

What a request gets wrong raises InvalidInput. What a handler returns wrong raises
TypeError or ValueError, in words for its author; `dataplane.py` logs it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

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
)
from kserve_lite.model import Model, Plan
from kserve_lite.records import new_id
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

Specs: TypeAlias = tuple[TensorSpec, ...]

# Globals, since reading a member off its class costs 0.12 us in Python 3.11.
_JSON, _TENSORS = Form.JSON, Form.TENSORS
# The protocols that answer with any JSON value; the others with tensors only.
_OF_JSON = frozenset(("v1", "generate"))
# Triton's name for the text that a model answers with.
TEXT = "text_output"
# A longer name is not repeated to the client that sent it.
MAX_SHOWN = 64
# The datatypes of the dtypes met so far: finding one by its name costs 3 us.
_DATATYPES: dict[np.dtype[Any], str] = {}


def request_arguments(
    handler: Handler, payload: Any
) -> dict[str, Any] | tuple[Any, ...]:
    """Turn a request's payload into the arguments of the handler that gets it first.

    A dict names several tensors, a tuple holds the one payload, and nothing where that
    is left to the parameter's default. Raises InvalidInput where names, datatypes or
    shapes are not what is declared.
    """
    if handler.form is not _TENSORS:
        if handler.takes and isinstance(payload, InferRequest):
            specs = handler.inputs
            for name, tensor in _by_name(handler, payload).items():
                check_fits(tensor, specs[name])
        return (payload,)
    request: InferRequest = payload
    parameters = handler.tensors
    if len(parameters) == 1:
        parameter = parameters[0]
        if len(request.inputs) == 1:
            return (_argument(parameter, request.inputs[0]),)
        if request.inputs or not parameter.optional:
            most = "one input or none" if parameter.optional else "one input"
            raise InvalidInput(f"The model takes {most}, got {len(request.inputs)}.")
        return () if parameter.has_default else (None,)
    by_name = _by_name(handler, request)
    arguments = {
        parameter.name: _argument(parameter, by_name[parameter.wire])
        for parameter in parameters
        if parameter.wire in by_name
    }
    return arguments if len(by_name) == len(parameters) else _filled(handler, arguments)


def stage_arguments(handler: Handler, value: Any) -> dict[str, Any] | tuple[Any, ...]:
    """Turn what the stage before returned into a later stage's arguments.

    It is handed on as it is; only a handler of several tensors takes them from a dict
    by name or from a tuple in order. What is optional may lack there, and where only
    one is not, its array may come alone.
    """
    parameters = handler.tensors
    if len(parameters) < 2:
        return (value,)
    names = [parameter.name for parameter in parameters]
    required = [parameter.name for parameter in parameters if not parameter.optional]
    given: dict[str, Any] | None = None
    if isinstance(value, tuple) and len(value) <= len(names):
        given = dict(zip(names, value, strict=False))
    elif isinstance(value, Mapping):
        given = dict(value)
    elif len(required) == 1 and is_array(value):
        given = {required[0]: value}
    if given is None or not set(required) <= given.keys() <= set(names):
        listed = _listed({p.name: p.optional for p in parameters})
        raise TypeError(
            f"{handler.stage.value} takes {listed}: the stage before it must return "
            f"them as a tuple or dict, it returned {type(value).__name__}"
        )
    return given if len(given) == len(names) else _filled(handler, given)


def declared_datatype(handler: Handler, name: str) -> str | None:
    """The datatype that is declared for the handler's input `name`; None: none is."""
    spec = handler.inputs.get(name)
    if spec is None and len(handler.tensors) == 1:  # it takes whatever name comes
        spec = handler.tensors[0].spec
    return spec.datatype if spec is not None else None


def unnamed_input(handler: Handler) -> str:
    """The name for an input to which the client gave none."""
    return handler.unnamed


def _by_name(handler: Handler, request: InferRequest) -> dict[str, Tensor]:
    """The inputs by name; raises InvalidInput for missing and undeclared names."""
    by_name = {tensor.name: tensor for tensor in request.inputs}
    if by_name.keys() != handler.takes.keys():
        _check_names(handler.takes, by_name)
    return by_name


def _check_names(takes: Mapping[str, bool], came: Mapping[str, Tensor]) -> None:
    missing = [n for n, optional in takes.items() if not optional and n not in came]
    others = [name for name in came if name not in takes]
    if missing:
        detail = f"missing: {', '.join(missing)}"
    elif others and len(others[0]) <= MAX_SHOWN and others[0].isprintable():
        detail = f"'{others[0]}' is not among them"
    elif others:
        detail = f"{len(others)} more came"
    else:
        return
    raise InvalidInput(f"The model takes the inputs {_listed(takes)}; {detail}.")


def _listed(takes: Mapping[str, bool]) -> str:
    """Names, each with whether it is optional, in an error."""
    return ", ".join(
        f"{name} (optional)" if optional else name for name, optional in takes.items()
    )


def _filled(handler: Handler, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with None for each that lacks and has no default of its own."""
    for parameter in handler.tensors:
        if not parameter.has_default:
            arguments.setdefault(parameter.name, None)
    return arguments


def _argument(parameter: TensorParameter, tensor: Tensor) -> Any:
    if parameter.spec is not None:
        check_fits(tensor, parameter.spec)
    return as_torch(tensor.array, tensor.name) if parameter.torch else tensor.array


def answer_of(
    result: Any, model: Model, plan: Plan, context: Context, request: Any
) -> Answer:
    """Turn what the last handler of a plan returned into an answer.

    On V1 a dict of arrays is an answer as it stands where the first handler takes JSON,
    and outputs by name where it does not.
    Raises TypeError or ValueError for what the protocol cannot say, InvalidInput for
    requested outputs that the model does not have.
    """
    is_json = context.protocol in _OF_JSON
    form = plan[0].form
    if is_json and form is _JSON and type(result) is dict:
        return JsonAnswer(result)
    if isinstance(result, (bytes, bytearray, memoryview)):
        return RawAnswer(bytes(result))
    keeps_dicts = is_json and (
        form is _JSON or (isinstance(result, dict) and "predictions" in result)
    )
    response = _response(result, plan[-1].outputs, request, keeps_dicts)
    if response is None and isinstance(result, dict) and not is_json:
        response = _held(response_of(result), plan[-1].outputs, request)
    if response is None:
        if is_json:
            return (
                RawAnswer(result.encode())
                if type(result) is str
                else JsonAnswer(result)
            )
        raise TypeError(
            "a V2 answer is an array, a tuple or dict of arrays, an InferResponse or "
            f"a dict with outputs; the handler returned {type(result).__name__}"
        )
    if response is result:  # which the handler may keep
        response = InferResponse(
            response.outputs,
            response.id,
            response.model_name,
            response.model_version,
            response.parameters,
        )
    asked = request if isinstance(request, InferRequest) else None
    if asked is not None and asked.outputs:
        response.outputs = _requested(response.outputs, asked, model)
    given_id = response.id if isinstance(response.id, str) else None
    response.id = given_id or (asked.id if asked else None) or new_id()
    response.model_name = response.model_name or model.name
    response.model_version = response.model_version or model.version
    return response


def text_name(plan: Plan) -> str:
    """The output that text is: the only declared one, or Triton's `text_output`."""
    outputs = plan[-1].outputs
    return outputs[0].name or TEXT if len(outputs) == 1 else TEXT


def text_response(text: str | bytes, plan: Plan) -> InferResponse:
    """Text as a BYTES tensor of one element, of shape [1] unless declared otherwise."""
    import numpy as np

    data = text.encode() if isinstance(text, str) else text
    array = np.array([data, None], object)[:1]  # else numpy cuts zero bytes off
    outputs = plan[-1].outputs
    if len(outputs) == 1:
        array = array.reshape((1,) * len(outputs[0].shape))
    return InferResponse((Tensor(text_name(plan), array, "BYTES"),))


def _response(
    result: Any, specs: Specs, request: Any, keeps_dicts: bool
) -> InferResponse | None:
    """The result as tensors, held to the declared outputs; None where it is none.

    keeps_dicts: a dict is a JSON value, whatever is in it.
    """
    if isinstance(result, InferResponse):
        return _held(result, specs, request)
    if is_array(result):
        return _declared([(None, result)], specs)
    if isinstance(result, tuple) and result and all(map(is_array, result)):
        return _declared([(None, array) for array in result], specs)
    by_name = isinstance(result, dict) and result and not keeps_dicts
    if by_name and all(map(is_array, result.values())):
        if specs:
            _check_outputs(result.keys(), specs, request)
        return _declared(list(result.items()), specs)
    return None


def _held(response: InferResponse, specs: Specs, request: Any) -> InferResponse:
    """The author's own response, if it is as declared; else raises ValueError."""
    if specs:
        _check_outputs([tensor.name for tensor in response.outputs], specs, request)
        by_name = {spec.name: spec for spec in specs}
        for tensor in response.outputs:
            spec = by_name[tensor.name]
            if tensor.datatype != spec.datatype or not spec.fits(tensor.shape):
                raise _misfit(tensor.name, spec, tensor.datatype, tensor.shape)
    return response


def _check_outputs(names: Collection[str], specs: Specs, request: Any) -> None:
    """Raise ValueError for outputs that are not declared, twice there or missing.

    Where the client asks for some, the handler may have left out the others.
    """
    declared = {spec.name for spec in specs}
    asked = request.outputs if isinstance(request, InferRequest) else ()
    wanted = declared.intersection(output.name for output in asked) or declared
    came = set(names)
    if len(came) != len(names) or not wanted <= came <= declared:
        listed = ", ".join(spec.name or "" for spec in specs)
        raise ValueError(
            f"the declared outputs are {listed}; the handler returned "
            f"{', '.join(map(str, names)) or 'none'}"
        )


def _declared(arrays: list[tuple[str | None, Any]], specs: Specs) -> InferResponse:
    """Name the arrays and hold them to the declared outputs."""
    if not specs:
        outputs = []
        for index, (given, array) in enumerate(arrays):
            name = f"output-{index}" if given is None else given
            outputs.append(_output(name, as_numpy(array), None))
        return InferResponse(tuple(outputs))
    if arrays[0][0] is None:
        if len(specs) != len(arrays):
            raise ValueError(
                f"{len(specs)} outputs are declared, the handler returned {len(arrays)}"
            )
        pairs = zip(specs, arrays, strict=True)
    else:
        by_name = {spec.name: spec for spec in specs}
        pairs = zip([by_name[name] for name, _ in arrays], arrays, strict=True)
    return InferResponse(
        tuple(
            _output(spec.name or "", as_numpy(array), spec)
            for spec, (_, array) in pairs
        )
    )


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
        raise _misfit(name, spec, spec.datatype, array.shape)
    return Tensor(name, array, spec.datatype)


def _misfit(
    name: str, spec: TensorSpec, datatype: str, shape: Sequence[int]
) -> ValueError:
    return ValueError(
        f"output '{name}' is declared {describe(spec.datatype, spec.shape)}, the "
        f"handler returned {describe(datatype, shape)}"
    )


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
