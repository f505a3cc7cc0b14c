"""Gives models the handlers that they do not have, each of which asks another server.

To all else these are ordinary async handlers: they are timed, counted, described, given
a deadline and cancelled as a user's own. A model outlives the servers that serve it, so
a handler that was given to it once is handed the next server's `Upstream`.
"""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Callable, Coroutine, Generator
from dataclasses import replace
from typing import Any

from kserve_lite.errors import ModelDefinitionError
from kserve_lite.forwarding.bridging import arguments_of
from kserve_lite.forwarding.settings import ForwardingSettings
from kserve_lite.forwarding.upstream import Upstream
from kserve_lite.handlers import Form, Stage
from kserve_lite.messages import Context, InferRequest
from kserve_lite.model import Model, Phase
from kserve_lite.tensors import TensorSpec

# What outputs are named that a handler's annotations give no name; as inputs of the
# predictor they are named as inputs.
_UNNAMED = re.compile(r"output-(\d+)")


class Forwarding:
    """Forwards for the models of one server. max_size: bytes that an answer may have.

    Raises StartupError where a client is missing that is needed.
    """

    def __init__(self, settings: ForwardingSettings, *, max_size: int) -> None:
        self._settings = settings
        self.predictor: Upstream | None = None
        self.explainer: Upstream | None = None
        if settings.predictor_host:
            self.predictor = Upstream(
                settings, settings.predictor_host, max_size=max_size
            )
        if settings.explainer_host:
            self.explainer = Upstream(
                settings, settings.explainer_host, explains=True, max_size=max_size
            )

    def attach(self, model: Model) -> None:
        """Have a model forward what it has no handler for; before it is frozen.

        Raises ModelDefinitionError for one that a server before this one forwarded for.
        One that is being served is left as it is: `freeze` refuses it, and the server
        that has it goes on.
        """
        if model.phase not in (Phase.DEFINED, Phase.UNLOADED):
            return
        is_v1 = self._settings.predictor_protocol == "v1"
        self._give(model, Stage.PREDICT, self.predictor, takes_json=is_v1)
        self._give(model, Stage.EXPLAIN, self.explainer, takes_json=True)
        self._check_health(model)

    def _give(
        self, model: Model, stage: Stage, upstream: Upstream | None, *, takes_json: bool
    ) -> None:
        known = model.handler(stage)
        if known is not None:
            function: object = known.function
            if isinstance(function, _Forward):
                if upstream is None:
                    raise ModelDefinitionError(
                        f"Model {model.name!r} has no {stage.value} handler of its "
                        f"own: give --{_SETTING[stage]}, as when it was served before."
                    )
                function.upstream = upstream
            return
        if upstream is not None:
            kind = _ForwardJson if takes_json else _ForwardTensors
            forward = kind(model, stage, upstream)
            model.predict(forward) if stage is Stage.PREDICT else model.explain(forward)

    def _check_health(self, model: Model) -> None:
        """Have a model that forwards be ready only while its predictor is."""
        predicts = model.handler(Stage.PREDICT)
        function: object = predicts.function if predicts is not None else None
        if not isinstance(function, _Forward):
            return
        wanted = self._settings.enable_predictor_health_check
        predictor = self.predictor if wanted else None
        known = model.handler(Stage.READY)
        check: object = known.function if known is not None else None
        if isinstance(check, _Ready):
            check.predictor = predictor
        elif known is None:
            # Without a check too: the next server may want one.
            model.ready(_Ready(model, predictor))
            # Only who asks whether it is ready is to wait for the predictor's word.
            model.is_checked = False
        elif predictor is not None:
            also = _AlsoReady(model, predictor, known.function)
            model.amend(Stage.READY, also)

    async def close(self) -> None:
        """Close all connections."""
        opened = [u for u in (self.predictor, self.explainer) if u is not None]
        await asyncio.gather(*(upstream.close() for upstream in opened))


_SETTING = {Stage.PREDICT: "predictor_host", Stage.EXPLAIN: "explainer_host"}


class _Forward:
    """A handler that asks another server."""

    def __init__(self, model: Model, stage: Stage, upstream: Upstream) -> None:
        self.upstream = upstream
        self._model = model
        self._stage = stage

    async def _ask(self, payload: Any, context: Context) -> Any:
        model = self._model
        after = model.handler(Stage.POSTPROCESS)
        outputs = () if after is not None else model.outputs
        answer = await self.upstream.infer(
            payload,
            context,
            self._stage,
            inputs=_inputs(model),
            outputs=outputs,
            asks_outputs=after is None,
        )
        if after is not None and after.form is Form.TENSORS:
            return arguments_of(answer, after, context, outputs)
        return answer


class _ForwardJson(_Forward):
    """For V1: what clients sent as JSON goes on as JSON."""

    async def __call__(self, payload: Any, context: Context) -> Any:
        return await self._ask(payload, context)


class _ForwardTensors(_Forward):
    """For V2: JSON is read as tensors from the beginning, by the fast way."""

    async def __call__(self, payload: InferRequest, context: Context) -> Any:
        return await self._ask(payload, context)


class _Ready:
    """The ready handler of a model that has none: the predictor is asked.

    predictor: None asks none.
    """

    def __init__(self, model: Model, predictor: Upstream | None) -> None:
        self.predictor = predictor
        self._model = model

    async def __call__(self) -> bool:
        return self.predictor is None or await self.predictor.ready(self._model.name)


class _AlsoReady(_Ready):
    """In the place of a model's own ready handler, which is asked first.

    It is called as that is, in a thread if it is a `def`; the predictor is then asked
    on the event loop.
    """

    def __init__(
        self, model: Model, predictor: Upstream, own: Callable[..., Any]
    ) -> None:
        super().__init__(model, predictor)
        self._own = own

    def __call__(self, **named: Any) -> Any:
        return _Then(self._own(**named), super().__call__)


class _Then:
    """Awaits a check's result, then asks another. No coroutine: it may be dropped."""

    def __init__(self, result: Any, ask: Callable[[], Coroutine[Any, Any, bool]]):
        self._result = result
        self._ask = ask

    def __await__(self) -> Generator[Any, None, bool]:
        return self._both().__await__()

    async def _both(self) -> bool:
        result = self._result
        if inspect.isawaitable(result):
            result = await result
        return bool(result) and await self._ask()


def _inputs(model: Model) -> tuple[TensorSpec, ...]:
    """What is declared of the predictor's inputs: what preprocess is said to return."""
    before = model.handler(Stage.PREPROCESS)
    if before is None:
        return model.inputs
    return tuple(
        replace(spec, name=_UNNAMED.sub(r"input-\1", spec.name or ""))
        for spec in before.outputs
    )
