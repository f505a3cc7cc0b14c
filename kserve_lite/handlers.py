"""Reads a user's function once, when it is registered: what it wants and gives.

The first parameter of a handler is its payload; the others are asked for by name. The
payload's annotation says in which form it comes (see `Form`), and `TensorSpec`s in the
annotations become metadata. Everything that cannot work is a `ModelDefinitionError`
here, where the function is defined, and never a surprise at the first request.
"""

from __future__ import annotations

import difflib
import enum
import functools
import inspect
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from kserve_lite.errors import ModelDefinitionError
from kserve_lite.messages import InferRequest
from kserve_lite.tensors import TensorSpec

Function = Callable[..., Any]


class Stage(enum.StrEnum):
    """The handlers that a model may have. Values are the decorators' names."""

    LOAD = "load"
    PREPROCESS = "preprocess"
    PREDICT = "predict"
    POSTPROCESS = "postprocess"
    EXPLAIN = "explain"
    UNLOAD = "unload"
    READY = "ready"


# What a handler may ask for by name, beside its payload. A request's stages get all of
# it; the stages of a model's life have no request.
_OF_REQUEST = ("state", "headers", "response_headers", "context")
PROVIDED: dict[Stage, tuple[str, ...]] = {
    Stage.LOAD: (),
    Stage.PREPROCESS: _OF_REQUEST,
    Stage.PREDICT: _OF_REQUEST,
    Stage.POSTPROCESS: _OF_REQUEST,
    Stage.EXPLAIN: _OF_REQUEST,
    Stage.UNLOAD: ("state",),
    Stage.READY: ("state",),
}


class Form(enum.Enum):
    """In which form a handler gets a request's payload."""

    JSON = "the decoded JSON on V1, an InferRequest elsewhere"
    REQUEST = "an InferRequest on every protocol"
    TENSORS = "one array or tensor a parameter"


class Call(enum.Enum):
    """How a handler is called."""

    AWAIT = "an async def: awaited on the event loop"
    THREAD = "a def: called in a worker thread"
    GENERATOR = "a generator of either kind: making it runs none of its code"


class TensorParameter(NamedTuple):
    """One parameter that takes a tensor: numpy's, or torch's if `torch` is set."""

    name: str
    torch: bool
    spec: TensorSpec | None


@dataclass(frozen=True, slots=True)
class Handler:
    """A user's function and what is known about it.

    tensors: the payload parameters, for `Form.TENSORS`.
    injected: which of `PROVIDED` it asks for.
    outputs: the specs of its return annotation, empty where it has none.
    is_plain: an `async def` that takes its payload as it is and nothing else.
    """

    stage: Stage
    function: Function
    form: Form
    tensors: tuple[TensorParameter, ...]
    injected: tuple[str, ...]
    call: Call
    outputs: tuple[TensorSpec, ...]
    is_plain: bool


def read_handler(stage: Stage, function: Function) -> Handler:
    """Read a function's signature and annotations.

    Raises ModelDefinitionError for a signature that cannot be served.
    """
    if not callable(function):
        raise ModelDefinitionError(
            f"{stage.value} must be a function, got {type(function).__name__}."
        )
    name = f"{stage.value} handler {getattr(function, '__name__', function)!r}"
    signature = inspect.signature(function)
    hints = _type_hints(function, name)
    provided = PROVIDED[stage]
    payload: list[inspect.Parameter] = []
    injected: list[str] = []
    takes_payload = "headers" in provided
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ModelDefinitionError(
                f"The {name} takes *{parameter.name}: kserve-lite passes parameters "
                "by name, so write out the ones that you want."
            )
        if takes_payload and not payload:
            if parameter.name in provided:
                raise ModelDefinitionError(
                    f"The first parameter of the {name} is {parameter.name!r}: the "
                    "first one is the payload; put it before the provided ones."
                )
            payload.append(parameter)
        elif parameter.name in provided:
            injected.append(parameter.name)
        elif takes_payload and _tensor_parameter(parameter.name, hints):
            payload.append(parameter)
        else:
            raise _unknown_parameter(name, parameter.name, provided, takes_payload)
    if takes_payload and not payload:
        raise ModelDefinitionError(
            f"The {name} takes no parameter: its first one is the payload."
        )
    form, tensors = _form(name, [p.name for p in payload], hints)
    call = _call(function)
    return Handler(
        stage=stage,
        function=function,
        form=form,
        tensors=tensors,
        injected=tuple(injected),
        call=call,
        outputs=_output_specs(hints.get("return")),
        is_plain=call is Call.AWAIT and form is not Form.TENSORS and not injected,
    )


def _call(function: Function) -> Call:
    target = _routine(function)
    if inspect.isgeneratorfunction(target) or inspect.isasyncgenfunction(target):
        return Call.GENERATOR
    return Call.AWAIT if inspect.iscoroutinefunction(target) else Call.THREAD


def _routine(function: Any) -> Any:
    """The function behind a partial or a callable object."""
    while isinstance(function, functools.partial):
        function = function.func
    return function if inspect.isroutine(function) else type(function).__call__


def _type_hints(function: Function, name: str) -> dict[str, Any]:
    target = _routine(function)
    # Names of an enclosing function are visible to its annotations too.
    plain = inspect.unwrap(target)
    closure = inspect.getclosurevars(plain).nonlocals if _is_python(plain) else {}
    try:
        return typing.get_type_hints(target, localns=dict(closure), include_extras=True)
    except NameError as error:
        raise ModelDefinitionError(
            f"An annotation of the {name} names {error.name!r}, which is not defined "
            "when the model is built: import it outside `if TYPE_CHECKING`, at the top "
            "of the module."
        ) from error


def _is_python(function: Function) -> bool:
    return inspect.isfunction(function) or inspect.ismethod(function)


def _unknown_parameter(
    name: str, parameter: str, provided: tuple[str, ...], takes_payload: bool
) -> ModelDefinitionError:
    close = difflib.get_close_matches(parameter, provided, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    offer = ", ".join(provided) if provided else "nothing"
    more = (
        " A further input must be annotated np.ndarray or torch.Tensor."
        if takes_payload
        else ""
    )
    return ModelDefinitionError(
        f"The {name} asks for {parameter!r}; what can be asked for is {offer}."
        f"{hint}{more}"
    )


def _is_array_type(annotation: object) -> bool:
    origin = typing.get_origin(annotation) or annotation
    module = getattr(origin, "__module__", "")
    name = getattr(origin, "__name__", "")
    return (module, name) == ("numpy", "ndarray")


def _is_torch_type(annotation: object) -> bool:
    module = getattr(annotation, "__module__", "")
    return module == "torch" and getattr(annotation, "__name__", "") == "Tensor"


def _spec(annotation: object) -> tuple[object, TensorSpec | None]:
    """Split `Annotated[type, TensorSpec(...)]` into type and spec."""
    if typing.get_origin(annotation) is not typing.Annotated:
        return annotation, None
    inner, *extras = typing.get_args(annotation)
    specs = [extra for extra in extras if isinstance(extra, TensorSpec)]
    return inner, specs[0] if specs else None


def _tensor_parameter(name: str, hints: dict[str, Any]) -> TensorParameter | None:
    annotation, spec = _spec(hints.get(name))
    if _is_array_type(annotation):
        return TensorParameter(name, False, spec)
    if _is_torch_type(annotation):
        return TensorParameter(name, True, spec)
    return None


def _form(
    name: str, parameters: list[str], hints: dict[str, Any]
) -> tuple[Form, tuple[TensorParameter, ...]]:
    tensors = tuple(
        tensor for p in parameters if (tensor := _tensor_parameter(p, hints))
    )
    if tensors and len(tensors) == len(parameters):
        return Form.TENSORS, tensors
    if not parameters:
        return Form.JSON, ()
    first = parameters[0]
    annotation, spec = _spec(hints.get(first))
    alternatives = (annotation,)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        alternatives = typing.get_args(annotation)
    if spec is not None or any(map(_is_array_type, alternatives)):
        raise ModelDefinitionError(
            f"The parameter {first!r} of the {name} has an annotation that mixes a "
            "tensor with something else: use np.ndarray or torch.Tensor alone, or take "
            "an InferRequest."
        )
    if len(parameters) > 1:
        raise ModelDefinitionError(
            f"The {name} takes the tensors {', '.join(parameters[1:])} after "
            f"{first!r}, which is no tensor: annotate it too, or take an InferRequest."
        )
    return (Form.REQUEST if annotation is InferRequest else Form.JSON), ()


def _output_specs(annotation: object) -> tuple[TensorSpec, ...]:
    inner, spec = _spec(annotation)
    if spec is not None:
        return (spec,)
    if typing.get_origin(inner) is tuple:
        specs = [_spec(argument)[1] for argument in typing.get_args(inner)]
        if specs and all(specs):
            return tuple(spec for spec in specs if spec is not None)
    return ()
