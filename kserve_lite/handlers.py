"""Reads a user's function once, when it is registered: what it wants and gives.

The first parameter of a handler is its payload; the others are asked for by name. The
payload's annotation says in which form it comes (see `Form`), and `TensorSpec`s in the
annotations become metadata; `with_inputs` gives a handler those of `Model(inputs=...)`.
Everything that cannot work is a `ModelDefinitionError` here, where the function is
defined, and never a surprise at the first request. What every request needs to know of
a handler is worked out here once.
"""

from __future__ import annotations

import contextlib
import difflib
import enum
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, NamedTuple

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


# The value of `max_delay_ms` with which a model learns how long to wait.
AUTO: Final = "auto"

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
    """One parameter that takes a tensor: numpy's, or torch's if `torch` is set.

    spec: what is declared of it, with its name; None where nothing is.
    wire: the name that requests give it.
    optional: requests may leave it out; then it gets its own default if it
        `has_default`, else None.
    """

    name: str
    torch: bool
    spec: TensorSpec | None
    wire: str
    optional: bool
    has_default: bool


@dataclass(frozen=True, slots=True)
class Batching:
    """How rows of several requests are put together for one call of a handler.

    max_batch_size: the most rows of a call, and of a request.
    max_delay_ms: how long the first row may wait for others while the model is free; 0
        is greedy: what waits goes as soon as the model is free. "auto" learns what a
        call costs and waits only when that pays.
    latency_goal_ms: with "auto", what waiting and computing may take together for the
        first row; None: it waits no longer than the call is expected to take.

    Raises ModelDefinitionError for values that cannot be.
    """

    max_batch_size: int
    max_delay_ms: float | Literal["auto"] = 0.0
    latency_goal_ms: float | None = None

    def __post_init__(self) -> None:
        size, delay, goal = self.max_batch_size, self.max_delay_ms, self.latency_goal_ms
        if type(size) is not int or size < 1:
            raise ModelDefinitionError(
                f"max_batch_size is a number of rows from 1 up, got {size!r}."
            )
        if delay != AUTO and not (_is_number(delay) and 0 <= delay < 1e6):
            raise ModelDefinitionError(
                f"max_delay_ms is a number of milliseconds or {AUTO!r}, got {delay!r}."
            )
        if goal is not None and (
            delay != AUTO or not (_is_number(goal) and 0 < goal < 1e6)
        ):
            raise ModelDefinitionError(
                "latency_goal_ms is a number of milliseconds, for "
                f"max_delay_ms={AUTO!r} only, got {goal!r} with {delay!r}."
            )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


@dataclass(frozen=True, slots=True)
class Handler:
    """A user's function and what is known about it.

    tensors: the payload parameters, for `Form.TENSORS`.
    injected: which of `PROVIDED` it asks for.
    outputs: the specs of its return annotation, named; empty where it has none.
    is_plain: an `async def` that takes its payload as it is, unchecked, and nothing
        else.
    inputs: what is declared of its inputs, by name; those that are not declared lack.
    takes: the names of all inputs that it takes, and whether each is optional; empty
        where it takes whatever comes.
    unnamed: the name for an input to which a request gives none.
    batching: how rows of several requests are put together; None: they are not.
    """

    stage: Stage
    function: Function
    form: Form
    tensors: tuple[TensorParameter, ...]
    injected: tuple[str, ...]
    call: Call
    outputs: tuple[TensorSpec, ...]
    is_plain: bool
    inputs: Mapping[str, TensorSpec] = field(default_factory=dict)
    takes: Mapping[str, bool] = field(default_factory=dict)
    unnamed: str = "input-0"
    batching: Batching | None = None


def read_handler(
    stage: Stage, function: Function, batching: Batching | None = None
) -> Handler:
    """Read a function's signature and annotations.

    Raises ModelDefinitionError for a signature that cannot be served.
    """
    if not callable(function):
        raise ModelDefinitionError(
            f"{stage.value} must be a function, got {type(function).__name__}."
        )
    name = _title(stage, function)
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
        elif takes_payload and _tensor_parameter(parameter, hints):
            payload.append(parameter)
        else:
            raise _unknown_parameter(name, parameter.name, provided, takes_payload)
    if takes_payload and not payload:
        raise ModelDefinitionError(
            f"The {name} takes no parameter: its first one is the payload."
        )
    _check_kinds(name, signature, payload)
    form, tensors = _form(name, payload, hints)
    call = _call(function)
    if batching is not None:
        _check_batched(name, form, call, injected)
    takes = _takes(name, tensors)
    return Handler(
        stage=stage,
        function=function,
        form=form,
        tensors=tensors,
        injected=tuple(injected),
        call=call,
        outputs=named_outputs(_output_specs(hints.get("return")), f"The {name}"),
        is_plain=call is Call.AWAIT and form is not Form.TENSORS and not injected,
        inputs={t.wire: t.spec for t in tensors if t.spec is not None},
        takes=takes,
        unnamed=_unnamed(takes),
        batching=batching,
    )


def _check_batched(name: str, form: Form, call: Call, injected: list[str]) -> None:
    if form is not Form.TENSORS:
        raise ModelDefinitionError(
            f"The {name} cannot be batched: only rows of arrays can, so annotate its "
            "parameters np.ndarray or torch.Tensor."
        )
    if call is Call.GENERATOR:
        raise ModelDefinitionError(
            f"The {name} cannot be batched: it is a generator, and streams are not."
        )
    of_one = [name for name in injected if name != "state"]
    if of_one:
        raise ModelDefinitionError(
            f"The {name} asks for {', '.join(of_one)}, which a batch of several "
            "requests has not: take them in preprocess or postprocess."
        )


def with_inputs(handler: Handler, specs: Sequence[TensorSpec]) -> Handler:
    """Return the handler with the inputs of `Model(inputs=specs)`, to be enforced.

    A parameter that is an array takes the spec of its name, others the specs that are
    left in their order; the names of the specs are those of requests. Raises
    ModelDefinitionError where specs and parameters do not go together.
    """
    name = _title(handler.stage, handler.function)
    if handler.form is not Form.TENSORS:
        if any(not spec.name for spec in specs):
            raise ModelDefinitionError(
                f"Model(inputs=) declares an input without a name, and the {name} has "
                'no array parameter that gives one: write TensorSpec(..., name="x").'
            )
        inputs = {spec.name or "": spec for spec in specs}
        takes = {wire: spec.optional for wire, spec in inputs.items()}
        return replace(
            handler,
            inputs=inputs,
            takes=takes,
            unnamed=_unnamed(takes),
            is_plain=False,  # checked first
        )
    for parameter in handler.tensors:
        if parameter.spec is not None:
            raise ModelDefinitionError(
                f"The parameter {parameter.name!r} of the {name} has a TensorSpec, and "
                "Model(inputs=) is given too: declare the inputs in one of the two "
                "places."
            )
    if len(specs) != len(handler.tensors):
        parameters = ", ".join(parameter.name for parameter in handler.tensors)
        raise ModelDefinitionError(
            f"Model(inputs=) declares {len(specs)} inputs, the {name} takes "
            f"{len(handler.tensors)} ({parameters}): give one TensorSpec for each "
            "parameter, or let the handler take an InferRequest."
        )
    names = {spec.name for spec in specs}
    by_name = {parameter.name: parameter for parameter in handler.tensors}
    others = iter([p for p in handler.tensors if p.name not in names])
    declared = [
        _declared(name, by_name.get(spec.name or "") or next(others), spec)
        for spec in specs
    ]
    by_name = {parameter.name: parameter for parameter in declared}
    tensors = tuple(by_name[parameter.name] for parameter in handler.tensors)
    takes = _takes(name, tensors)
    return replace(
        handler,
        tensors=tensors,
        inputs={p.wire: p.spec for p in declared if p.spec is not None},
        takes=takes,
        unnamed=_unnamed(takes),
    )


def named_outputs(specs: Iterable[TensorSpec], whose: str) -> tuple[TensorSpec, ...]:
    """Give outputs without a name theirs: `output-0`, `output-1`, ...

    whose: who declares them, as an error begins. Raises ModelDefinitionError for two of
    one name, and for an optional one.
    """
    named = tuple(
        replace(spec, name=spec.name or f"output-{index}")
        for index, spec in enumerate(specs)
    )
    twice = repeated(spec.name for spec in named)
    if twice is not None:
        raise ModelDefinitionError(
            f"{whose} declares two outputs named {twice!r}: give each its own name."
        )
    if any(spec.optional for spec in named):
        raise ModelDefinitionError(
            f"{whose} declares an optional output: only inputs can be optional."
        )
    return named


def repeated(names: Iterable[str | None]) -> str | None:
    """A name that is there twice; None: there is none."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        if name:
            seen.add(name)
    return None


def _title(stage: Stage, function: Function) -> str:
    return f"{stage.value} handler {getattr(function, '__name__', function)!r}"


def _takes(name: str, tensors: Sequence[TensorParameter]) -> dict[str, bool]:
    twice = repeated(parameter.wire for parameter in tensors)
    if twice is not None:
        raise ModelDefinitionError(
            f"Two inputs of the {name} are named {twice!r}: give each TensorSpec its "
            "own name."
        )
    return {parameter.wire: parameter.optional for parameter in tensors}


def _unnamed(takes: Mapping[str, bool]) -> str:
    """The only input, or the only one that must come; `input-0` for want of one."""
    required = [name for name, optional in takes.items() if not optional]
    lone = required if len(required) == 1 else list(takes)
    return lone[0] if len(lone) == 1 else "input-0"


def _declared(
    name: str, parameter: TensorParameter, spec: TensorSpec
) -> TensorParameter:
    """The parameter with its spec; whether it is optional, the parameter says."""
    if spec.optional and not parameter.optional:
        raise ModelDefinitionError(
            f"The parameter {parameter.name!r} of the {name} is declared optional and "
            "cannot be left out: give it a default, or annotate it "
            "`np.ndarray | None`."
        )
    wire = spec.name or parameter.name
    spec = replace(spec, name=wire, optional=parameter.optional)
    return parameter._replace(spec=spec, wire=wire)


def _check_kinds(
    name: str, signature: inspect.Signature, payload: list[inspect.Parameter]
) -> None:
    """A payload alone is passed by position, everything else by name."""
    lone = payload[0] if len(payload) == 1 else None
    if lone is not None and lone.kind is lone.KEYWORD_ONLY:
        raise ModelDefinitionError(
            f"The {name} takes its payload {lone.name!r} by name only: put it before "
            "the '*'."
        )
    for parameter in signature.parameters.values():
        if parameter is not lone and parameter.kind is parameter.POSITIONAL_ONLY:
            raise ModelDefinitionError(
                f"The {name} takes {parameter.name!r} by position only: kserve-lite "
                "passes parameters by name, so put it after the '/'."
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
    try:
        # Names of an enclosing function are visible to its annotations too.
        return typing.get_type_hints(
            target, localns=_closure(inspect.unwrap(target)), include_extras=True
        )
    except NameError as error:
        raise ModelDefinitionError(
            f"An annotation of the {name} names {error.name!r}, which is not defined "
            "when the model is built: import it outside `if TYPE_CHECKING`, at the top "
            "of the module."
        ) from error


def _closure(function: Function) -> dict[str, Any]:
    """The variables of enclosing functions, less those that have no value yet.

    `inspect.getclosurevars` raises ValueError for these.
    """
    code = getattr(function, "__code__", None)
    cells = getattr(function, "__closure__", None)
    if not isinstance(code, types.CodeType) or not cells:
        return {}
    values = {}
    for name, cell in zip(code.co_freevars, cells, strict=True):
        with contextlib.suppress(ValueError):
            values[name] = cell.cell_contents
    return values


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


class _Parts(NamedTuple):
    """What an annotation says: the types that it allows, None aside, and the spec."""

    types: tuple[object, ...]
    spec: TensorSpec | None
    allows_none: bool


def _parts(annotation: object) -> _Parts:
    """Take `Annotated` and unions apart, whichever is around the other."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        inner, *extras = typing.get_args(annotation)
        parts = _parts(inner)
        specs = [extra for extra in extras if isinstance(extra, TensorSpec)]
        return parts._replace(spec=specs[0]) if specs else parts
    if origin in (typing.Union, types.UnionType):
        each = [_parts(alternative) for alternative in typing.get_args(annotation)]
        return _Parts(
            tuple(kind for parts in each for kind in parts.types),
            next((parts.spec for parts in each if parts.spec is not None), None),
            any(parts.allows_none for parts in each),
        )
    if annotation is type(None):
        return _Parts((), None, True)
    return _Parts((annotation,), None, False)


def _tensor_parameter(
    parameter: inspect.Parameter, hints: dict[str, Any]
) -> TensorParameter | None:
    parts = _parts(hints.get(parameter.name))
    if len(parts.types) != 1:
        return None
    (kind,) = parts.types
    is_torch = _is_torch_type(kind)
    if not is_torch and not _is_array_type(kind):
        return None
    name = parameter.name
    has_default = parameter.default is not parameter.empty
    return TensorParameter(
        name, is_torch, None, name, has_default or parts.allows_none, has_default
    )


def _form(
    name: str, parameters: list[inspect.Parameter], hints: dict[str, Any]
) -> tuple[Form, tuple[TensorParameter, ...]]:
    tensors = []
    for parameter in parameters:
        tensor = _tensor_parameter(parameter, hints)
        if tensor is not None:
            spec = _parts(hints[parameter.name]).spec
            tensors.append(_declared(name, tensor, spec) if spec else tensor)
    if tensors and len(tensors) == len(parameters):
        return Form.TENSORS, tuple(tensors)
    if not parameters:
        return Form.JSON, ()
    first = parameters[0].name
    parts = _parts(hints.get(first))
    if parts.spec is not None or any(
        _is_array_type(kind) or _is_torch_type(kind) for kind in parts.types
    ):
        raise ModelDefinitionError(
            f"The parameter {first!r} of the {name} has an annotation that mixes a "
            "tensor with something else: use np.ndarray or torch.Tensor, alone or "
            "with None, or take an InferRequest."
        )
    if len(parameters) > 1:
        others = ", ".join(parameter.name for parameter in parameters[1:])
        raise ModelDefinitionError(
            f"The {name} takes the tensors {others} after {first!r}, which is no "
            "tensor: annotate it too, or take an InferRequest."
        )
    return (Form.REQUEST if parts.types == (InferRequest,) else Form.JSON), ()


def _output_specs(annotation: object) -> tuple[TensorSpec, ...]:
    parts = _parts(annotation)
    if len(parts.types) != 1:
        return ()
    if parts.spec is not None:
        return (parts.spec,)
    if typing.get_origin(parts.types[0]) is tuple:
        specs = [_parts(argument).spec for argument in typing.get_args(parts.types[0])]
        if specs and all(specs):
            return tuple(spec for spec in specs if spec is not None)
    return ()
