"""A model: named handlers, and a life.

`Model` is a plain object. Its decorators register a function and return it unchanged,
so that it can be called and tested alone. The life of a model is the table
`TRANSITIONS`; whoever serves it (`registry.py`, `server/`) walks it, users only define.
Nothing here runs a handler: that is `dispatch/`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias, TypedDict, TypeVar, Unpack

from kserve_lite.errors import ModelDefinitionError
from kserve_lite.handlers import Function, Handler, Stage, read_handler
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
    UNLOADED = "it has been stopped"


TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    Phase.DEFINED: frozenset({Phase.FROZEN}),
    Phase.FROZEN: frozenset({Phase.LOADING, Phase.UNLOADED}),
    Phase.LOADING: frozenset({Phase.READY, Phase.FAILED, Phase.UNLOADED}),
    Phase.READY: frozenset({Phase.UNLOADED}),
    Phase.FAILED: frozenset({Phase.LOADING, Phase.UNLOADED}),
    Phase.UNLOADED: frozenset({Phase.LOADING, Phase.FROZEN}),
}


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
    **handlers: functions by stage, the same as decorating them.

    Requests run preprocess, predict (or explain), postprocess; only predict is needed.
    `load` runs once a process before the model is ready and off the event loop if it is
    a plain `def`; what it returns is `state`. `unload` runs when the server stops,
    `ready` whenever readiness is asked for. Every handler may be `def`, which runs in
    a worker thread, or `async def`, which runs on the event loop.

    Raises ModelDefinitionError for what cannot work: a second handler of a stage, a
    parameter that nobody provides, a registration after serving began.
    """

    def __init__(
        self, name: str, *, version: str | None = None, **handlers: Unpack[Handlers]
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
        self.is_checked = False
        self._plans: dict[Stage, Plan] = {}
        self._outputs: tuple[TensorSpec, ...] | None = None
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

    def predict(self, function: F) -> F:
        """Register what predicts."""
        return self._register(Stage.PREDICT, function)

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
        """The declared inputs, named; empty where the annotations declare none."""
        plan = self.plan(Stage.PREDICT)
        tensors = plan[0].tensors if plan else ()
        return tuple(
            TensorSpec(t.spec.datatype, t.spec.shape, t.spec.name or t.name)
            for t in tensors
            if t.spec is not None
        )

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The declared outputs, named; empty where the annotations declare none."""
        if self._outputs is not None:
            return self._outputs
        plan = self.plan(Stage.PREDICT)
        specs = plan[-1].outputs if plan else ()
        named = tuple(
            TensorSpec(spec.datatype, spec.shape, spec.name or f"output-{index}")
            for index, spec in enumerate(specs)
        )
        if self.phase is not Phase.DEFINED:  # every request asks
            self._outputs = named
        return named

    def freeze(self) -> None:
        """End the definition: from here on a registration is an error.

        Raises ModelDefinitionError for a model that could not answer a request.
        """
        if Stage.PREDICT not in self._handlers:
            raise ModelDefinitionError(
                f"Model {self.name!r} has no predict handler, so it cannot answer: "
                "decorate a function with @model.predict."
            )
        if self.phase not in (Phase.DEFINED, Phase.UNLOADED):
            raise ModelDefinitionError(
                f"Model {self.name!r} is being served already: serve it once, or make "
                "a second Model."
            )
        self.enter(Phase.FROZEN)

    def enter(self, phase: Phase, state: Any = None) -> None:
        """Go to another phase of life; READY takes the state that `load` returned."""
        if phase not in TRANSITIONS[self.phase]:
            raise RuntimeError(f"a model cannot go from {self.phase} to {phase}")
        self.phase = phase
        self._state = state if phase is Phase.READY else None

    def _register(self, stage: Stage, function: F) -> F:
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
        self._handlers[stage] = read_handler(stage, function)
        self.is_checked |= stage is Stage.READY
        return function

    def __repr__(self) -> str:
        version = f", version={self.version!r}" if self.version else ""
        return f"Model({self.name!r}{version})"
