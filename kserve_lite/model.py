"""A model: named handlers, and a life.

`Model` is a plain object. Its decorators register a function and return it unchanged,
so that it can be called and tested alone. The life of a model is the table
`TRANSITIONS`; whoever serves it (`registry.py`, `server/`) walks it, users only define.
Nothing here runs a handler: that is `dispatch/`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict, TypeVar, Unpack, overload

from kserve_lite.errors import ModelDefinitionError
from kserve_lite.handlers import (
    Batching,
    Call,
    Function,
    Handler,
    Stage,
    named_outputs,
    read_handler,
    repeated,
    with_inputs,
)
from kserve_lite.tensors import TensorSpec

Plan: TypeAlias = tuple[Handler, ...]
F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_MODEL_DIR = Path("/mnt/models")


class Phase(enum.Enum):
    """Where a model is in its life."""

    DEFINED = "being defined: handlers may be registered"
    FROZEN = "handed to a server, not loaded"
    LOADING = "its load handler runs"
    READY = "it answers requests"
    FAILED = "its load handler raised"
    UNLOADING = "it takes no new requests and finishes those in flight"
    UNLOADED = "it has been stopped"


TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    Phase.DEFINED: frozenset({Phase.FROZEN}),
    Phase.FROZEN: frozenset({Phase.LOADING, Phase.UNLOADED}),
    Phase.LOADING: frozenset({Phase.READY, Phase.FAILED, Phase.UNLOADED}),
    # To itself: loaded again, while what was loaded before went on serving.
    Phase.READY: frozenset({Phase.READY, Phase.UNLOADING, Phase.UNLOADED}),
    Phase.FAILED: frozenset({Phase.LOADING, Phase.UNLOADED}),
    Phase.UNLOADING: frozenset({Phase.UNLOADED}),
    Phase.UNLOADED: frozenset({Phase.LOADING, Phase.FROZEN}),
}


@dataclass(frozen=True, slots=True)
class Deployment:
    """How a model runs as replicas on Ray Serve, in processes of their own.

    replicas: how many, or Ray Serve's autoscaling_config.
    options: Ray's ray_actor_options of each: num_cpus, num_gpus (fractions, too),
        resources, runtime_env and so on.
    idempotent: whether a request may be sent again when its replica died amid it.
    name: of the deployment; default: the model's.
    make: makes the model in a replica; default: a copy of the model.
    streams: predict's answers go item by item, although its handlers do not show it.
    """

    replicas: int | Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    idempotent: bool = False
    name: str = ""
    make: Callable[[], Model] | None = None
    streams: bool = False


class Handlers(TypedDict, total=False):
    """The handlers, as `Model(...)` takes them: each the same as its decorator."""

    load: Function
    preprocess: Function
    predict: Function
    postprocess: Function
    explain: Function
    unload: Function
    ready: Function


class Model:
    """A named model, defined by decorating plain functions.

    name: how clients address it; one path segment, so without "/".
    version: None for a model without versions.
    inputs, outputs: what the model takes and gives, shown as metadata and enforced on
        every protocol, for handlers whose annotations do not say it. An input needs a
        name where there are several, or where no array parameter gives it one. Inputs
        are those of the handlers that requests reach first (explain's too), outputs
        those of a prediction. JSON that a handler takes or gives as it is (V1) is not
        checked.
    example: a V1 or V2 request body that works, for the API's description.
    max_concurrency: how many calls of its request handlers may run at the same time: 1
        for a model that is not thread-safe. None: as many as come, and of batches one.
    replicas: run so many copies on Ray Serve, each in a process of its own, or as many
        as Ray's autoscaling_config says, a dict; needs the extra [ray]. None: the model
        runs in the process of the server.
    resources: what a replica needs, as Ray's ray_actor_options: {"num_cpus": 1,
        "num_gpus": 0.5}.
    idempotent: a request may run twice: it is sent to another replica if its own died.
    **handlers: functions by stage, the same as decorating them.

    Requests run preprocess, predict (or explain), postprocess; only predict is needed.
    `load` runs once a process before the model is ready and off the event loop if it is
    a plain `def`; what it returns is `state`. `unload` runs when the server stops,
    `ready` whenever readiness is asked for. Every handler may be `def`, which runs in
    a worker thread, or `async def`, which runs on the event loop.

    Raises ModelDefinitionError for what cannot work: a second handler of a stage, a
    parameter that nobody provides, two inputs of one name, a registration after serving
    began; and, when serving begins, for declarations that do not fit the handlers.
    """

    def __init__(
        self,
        name: str,
        *,
        version: str | None = None,
        inputs: Sequence[TensorSpec] | None = None,
        outputs: Sequence[TensorSpec] | None = None,
        example: dict[str, Any] | None = None,
        max_concurrency: int | None = None,
        replicas: int | Mapping[str, Any] | None = None,
        resources: Mapping[str, Any] | None = None,
        idempotent: bool = False,
        **handlers: Unpack[Handlers],
    ) -> None:
        if not name or "/" in name:
            raise ModelDefinitionError(
                f"A model cannot be named {name!r}: the name is one segment of a URL, "
                "so it has at least one character and no '/'."
            )
        self.name = name
        self.version = version
        self.model_dir = DEFAULT_MODEL_DIR
        self.phase = Phase.DEFINED
        self._handlers: dict[Stage, Handler] = {}
        self.is_checked = False  # it has a ready handler
        self.any_json = False  # V1's `instances` need be no list
        self.uses_threads = False  # a handler of requests is a `def`
        self._plans: dict[Stage, Plan] = {}
        whose = f"Model({name!r})"
        self._inputs = _declared(f"The inputs of {whose}", inputs)
        twice = repeated(spec.name for spec in self._inputs)
        if twice is not None:
            raise ModelDefinitionError(
                f"{whose} declares two inputs named {twice!r}: give each its own name."
            )
        if len(self._inputs) > 1 and not all(spec.name for spec in self._inputs):
            raise ModelDefinitionError(
                f"{whose} declares several inputs, one without a name: give each a "
                'name, TensorSpec(..., name="x").'
            )
        declared = _declared(f"The outputs of {whose}", outputs)
        self._outputs = named_outputs(declared, whose) or None
        if example is not None and type(example) is not dict:
            raise ModelDefinitionError(
                f"The example of {whose} must be a request body, a dict; it is "
                f"{type(example).__name__}."
            )
        self.example = example
        if max_concurrency is not None and (
            not isinstance(max_concurrency, int) or max_concurrency < 1
        ):
            raise ModelDefinitionError(
                f"max_concurrency of {whose} is a whole number from 1 up, got "
                f"{max_concurrency!r}."
            )
        self.max_concurrency = max_concurrency
        self.deployment: Deployment | None = None
        if replicas is not None:
            check_replicas(replicas, whose)
            self.deployment = Deployment(replicas, resources or {}, idempotent)
        elif resources is not None or idempotent:
            raise ModelDefinitionError(
                f"{whose} has resources or idempotent, which are of replicas: give "
                "replicas=1 or more, too."
            )
        self._state: Any = None
        given: dict[str, Any] = dict(handlers)
        for stage_name, function in given.items():
            if stage_name not in Stage._value2member_map_:
                stages = ", ".join(stage.value for stage in Stage)
                raise ModelDefinitionError(
                    f"Model({name!r}) got the unknown argument {stage_name!r}: the "
                    f"handlers are {stages}."
                )
            self._register(Stage(stage_name), function)

    def load(self, function: F) -> F:
        """Register what loads the model; its result becomes `state`."""
        return self._register(Stage.LOAD, function)

    def preprocess(self, function: F) -> F:
        """Register what turns a request into predict's (and explain's) payload."""
        return self._register(Stage.PREPROCESS, function)

    @overload
    def predict(self, function: F) -> F: ...

    @overload
    def predict(
        self,
        *,
        max_batch_size: int,
        max_delay_ms: float | Literal["auto"] = 0.0,
        latency_goal_ms: float | None = None,
    ) -> Callable[[F], F]: ...

    def predict(
        self,
        function: Any = None,
        *,
        max_batch_size: int | None = None,
        max_delay_ms: float | Literal["auto"] = 0.0,
        latency_goal_ms: float | None = None,
    ) -> Any:
        """Register what predicts.

        With `max_batch_size`, rows of several requests are put together for one call,
        as `Batching` says: for handlers of arrays, each of whose rows has its row in
        the result.
        """
        if function is not None:
            return self._register(Stage.PREDICT, function)
        if max_batch_size is None:
            raise ModelDefinitionError(
                "@model.predict(...) turns batching on: give it max_batch_size, or "
                "write @model.predict."
            )
        how = Batching(max_batch_size, max_delay_ms, latency_goal_ms)
        return lambda function: self._register(Stage.PREDICT, function, how)

    def postprocess(self, function: F) -> F:
        """Register what turns predict's (or explain's) result into the answer."""
        return self._register(Stage.POSTPROCESS, function)

    def explain(self, function: F) -> F:
        """Register what explains (V1 `:explain`)."""
        return self._register(Stage.EXPLAIN, function)

    def unload(self, function: F) -> F:
        """Register what frees the model's resources when the server stops."""
        return self._register(Stage.UNLOAD, function)

    def ready(self, function: F) -> F:
        """Register a check that a loaded model is ready: it returns a bool."""
        return self._register(Stage.READY, function)

    @property
    def state(self) -> Any:
        """What the load handler returned; None before, and without such a handler."""
        return self._state

    def path(self, *parts: str) -> Path:
        """Return a path inside the model's folder (`--model_dir`, /mnt/models)."""
        return self.model_dir.joinpath(*parts)

    def handler(self, stage: Stage) -> Handler | None:
        return self._handlers.get(stage)

    def amend(self, stage: Stage, function: Function) -> None:
        """Put another function in a handler's place, to be called as that is."""
        self._handlers[stage] = replace(self._handlers[stage], function=function)

    def plan(self, verb: Stage) -> Plan:
        """The handlers that a request runs through; `verb` is PREDICT or EXPLAIN.

        Empty where the model does not have that verb.
        """
        known = self._plans.get(verb)
        if known is not None:
            return known
        if verb not in self._handlers:
            return ()
        stages = (Stage.PREPROCESS, verb, Stage.POSTPROCESS)
        plan = tuple(self._handlers[s] for s in stages if s in self._handlers)
        if self.phase is not Phase.DEFINED:
            self._plans[verb] = plan
        return plan

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The declared inputs, named; empty where none are declared.

        Raises ModelDefinitionError where they do not fit the handler.
        """
        plan = self.plan(Stage.PREDICT)
        if not plan:
            return self._inputs
        entry = plan[0]
        if self._inputs and self.phase is Phase.DEFINED:
            entry = with_inputs(entry, self._inputs)
        return tuple(entry.inputs.values())

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The declared outputs, named; empty where none are declared."""
        if self._outputs is not None:  # every request asks
            return self._outputs
        plan = self.plan(Stage.PREDICT)
        return plan[-1].outputs if plan else ()

    def with_handlers(self, handlers: Mapping[Stage, Handler]) -> Model:
        """A model of the same name, inputs and outputs, whose work is done elsewhere.

        It declares what this one does, and checks nothing.
        """
        other = Model(self.name, version=self.version, example=self.example)
        other._handlers = dict(handlers)
        other._outputs = self.outputs or None
        other.is_checked = Stage.READY in handlers
        return other

    def freeze(self) -> None:
        """End the definition: from here on a registration is an error.

        Raises ModelDefinitionError for a model that could not answer a request.
        """
        if Stage.PREDICT not in self._handlers:
            raise ModelDefinitionError(
                f"Model {self.name!r} has no predict handler, so it cannot answer: "
                "decorate a function with @model.predict, or have another server "
                "predict, --predictor_host."
            )
        if self.phase not in (Phase.DEFINED, Phase.UNLOADED):
            raise ModelDefinitionError(
                f"Model {self.name!r} is being served already: serve it once, or make "
                "a second Model."
            )
        if self.phase is Phase.DEFINED:
            self._declare()
        self.enter(Phase.FROZEN)

    def enter(self, phase: Phase, state: Any = None) -> None:
        """Go to another phase of life; READY takes the state that `load` returned."""
        if phase not in TRANSITIONS[self.phase]:
            raise RuntimeError(f"a model cannot go from {self.phase} to {phase}")
        self.phase = phase
        self._state = state if phase is Phase.READY else None

    def _declare(self) -> None:
        """Hand what the constructor declared to the handlers that it is for."""
        last = self.plan(Stage.PREDICT)[-1]
        if self._outputs is not None and last.outputs:
            raise ModelDefinitionError(
                f"The {last.stage.value} handler of model {self.name!r} returns a "
                "TensorSpec, and Model(outputs=) is given too: declare the outputs in "
                "one of the two places."
            )
        entries = [Stage.PREPROCESS]
        if Stage.PREPROCESS not in self._handlers:
            entries = [Stage.PREDICT, Stage.EXPLAIN]
        if self._inputs:
            # All are made before one counts: a model that fails here may be mended.
            self._handlers |= {
                stage: with_inputs(self._handlers[stage], self._inputs)
                for stage in entries
                if stage in self._handlers
            }
        self._outputs = self.outputs
        last = self._handlers[last.stage]
        self._handlers[last.stage] = replace(last, outputs=self._outputs)

    def _register(
        self, stage: Stage, function: F, batching: Batching | None = None
    ) -> F:
        if self.phase is not Phase.DEFINED:
            raise ModelDefinitionError(
                f"Model {self.name!r} is being served, so {stage.value} cannot be "
                "registered any more: register handlers before run() or serve()."
            )
        if stage in self._handlers:
            raise ModelDefinitionError(
                f"Model {self.name!r} has a {stage.value} handler already: a model has "
                "one of each; remove one, or make a second Model."
            )
        self._handlers[stage] = read_handler(stage, function, batching)
        self.is_checked |= stage is Stage.READY
        if stage in (Stage.PREPROCESS, Stage.PREDICT, Stage.POSTPROCESS, Stage.EXPLAIN):
            self.uses_threads |= self._handlers[stage].call is Call.THREAD
        return function

    def __repr__(self) -> str:
        version = f", version={self.version!r}" if self.version else ""
        return f"Model({self.name!r}{version})"


def check_replicas(replicas: int | Mapping[str, Any], whose: str) -> None:
    """Raise ModelDefinitionError for a number that cannot be."""
    if isinstance(replicas, int):
        is_good = type(replicas) is int and replicas >= 1  # and not True
    else:
        is_good = isinstance(replicas, Mapping)
    if not is_good:
        raise ModelDefinitionError(
            f"replicas of {whose} is a whole number from 1 up, or Ray Serve's "
            f"autoscaling_config as a dict, got {replicas!r}."
        )


def _declared(whose: str, given: Sequence[TensorSpec] | None) -> tuple[TensorSpec, ...]:
    if given is None:
        return ()
    if not isinstance(given, Sequence) or not all(
        isinstance(spec, TensorSpec) for spec in given
    ):
        raise ModelDefinitionError(f"{whose} must be a list of TensorSpec.")
    return tuple(given)
