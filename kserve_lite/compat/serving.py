"""A model of KServe's SDK as a native one, whose handlers call its methods.

What a method gets and gives is KServe's; everything around it, the order, threads,
deadlines, statuses, metrics and both codecs, is the native path's. Between two stages
travels a `_Call`: KServe's methods share one dict of headers, which they may change.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from kserve_lite.compat.model import (
    BaseKServeModel,
    Headers,
    InferenceModel,
    InferenceVerb,
    Model,
    upstream_of,
)
from kserve_lite.compat.model_repository import ModelRepository
from kserve_lite.compat.payloads import answer, given, refusal_of
from kserve_lite.handlers import Stage
from kserve_lite.messages import Context
from kserve_lite.model import Model as NativeModel
from kserve_lite.tensors import TensorSpec

log = logging.getLogger("kserve_lite")


class Served(NativeModel):
    """A model of a repository, served under a name.

    on_loop: run its `def` methods on the event loop, as KServe's SDK does.
    """

    def __init__(
        self,
        model: BaseKServeModel,
        name: str,
        repository: ModelRepository,
        *,
        on_loop: bool = False,
    ) -> None:
        self.origin = model
        self._repository = repository
        config = model.predictor_config if isinstance(model, Model) else None
        self._asks_predictor = bool(
            config and config.predictor_host and config.predictor_health_check
        )
        super().__init__(name, **_handlers(model, on_loop=on_loop))
        self.any_json = True  # `validate` sees to it, after preprocess
        self._types: tuple[tuple[TensorSpec, ...], ...] = ((), ())
        self.load(self._read_types)
        self.ready(self._is_ready)
        self.unload(self._leave_on_loop if on_loop else self._leave)

    # Whether a request has to run `_is_ready`, which costs as much as all else that is
    # done for a small one: not where it could but say what is seen here. Nor do
    # requests ask the predictor whether it is ready: they ask it to predict.
    @property
    def is_checked(self) -> bool:
        if self._asks_predictor:
            return False
        model, repository = self.origin, self._repository
        is_plain = (
            type(model).healthy is BaseKServeModel.healthy
            and "healthy" not in vars(model)
            and type(repository).is_model_ready is ModelRepository.is_model_ready
            and type(repository).get_model is ModelRepository.get_model
        )
        is_here = is_plain and repository.models.get(self.name) is model
        return not (is_here and model.ready)

    @is_checked.setter
    def is_checked(self, value: bool) -> None:
        """Ignore what registering handlers says of it."""

    # Shown as metadata only. Those of a native model are enforced as well, and what
    # KServe never held anyone to need not be true.
    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._types[0]

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._types[1]

    async def _read_types(self) -> None:
        model = self.origin
        if isinstance(model, InferenceModel):
            self._types = (
                await self._specs(model.get_input_types, "get_input_types"),
                await self._specs(model.get_output_types, "get_output_types"),
            )

    async def _specs(
        self, method: Callable[[], Any], what: str
    ) -> tuple[TensorSpec, ...]:
        try:
            said = method()
            said = await said if _is_awaitable(said) else said
            return tuple(
                TensorSpec(entry["datatype"].upper(), entry["shape"], entry["name"])
                for entry in said
            )
        except Exception as error:  # noqa: BLE001 - user code; metadata is no need
            log.warning("%s of model %s cannot be used: %r", what, self.name, error)
            return ()

    async def _is_ready(self) -> bool:
        if self._asks_predictor and isinstance(self.origin, Model):
            return await upstream_of(self.origin, Stage.PREDICT).ready(self.origin.name)
        ready: Any = self._repository.is_model_ready(self.name)
        return bool(await ready if _is_awaitable(ready) else ready)

    def _leave(self) -> Any:
        """Have the repository stop the model, unless another has its name now."""
        if self._repository.get_model(self.name) is self.origin:
            return self._repository.unload(self.name)
        return None

    async def _leave_on_loop(self) -> None:
        value = self._leave()
        if _is_awaitable(value):
            await value


class _Call:
    """A request on its way through a model's methods."""

    __slots__ = ("headers", "value")

    def __init__(self, payload: Any, context: Context) -> None:
        self.value = given(payload, context)
        self.headers = Headers(context.headers)
        self.headers.context = context

    def keep(self, value: Any) -> _Call:
        self.value = value
        return self


def _handlers(model: BaseKServeModel, *, on_loop: bool) -> dict[str, Any]:
    if not isinstance(model, Model) or type(model).__call__ is not Model.__call__:
        return _whole(model, on_loop=on_loop)

    # Methods are looked up at each call: a program may set them on the instance.
    def preprocess(payload: Any, context: Context) -> Any:
        call = _Call(payload, context)
        value = model.preprocess(call.value, call.headers)
        return _then(value, lambda value: _then(model.validate(value), call.keep))

    def predict(call: _Call, context: Context) -> Any:
        arguments = (call.value, call.headers, *_own_headers(model, context))
        return _then(model.predict(*arguments), call.keep)

    def explain(call: _Call, context: Context) -> Any:
        return _then(model.explain(call.value, call.headers), call.keep)

    def postprocess(call: _Call, context: Context) -> Any:
        arguments = (call.value, call.headers, *_own_headers(model, context))
        value = model.postprocess(*arguments)
        return _then(value, partial(answer, context=context))

    stages = {
        Stage.PREPROCESS: (preprocess, model.preprocess),
        Stage.PREDICT: (predict, model.predict),
        Stage.EXPLAIN: (explain, model.explain),
        Stage.POSTPROCESS: (postprocess, model.postprocess),
    }
    return {
        stage.value: (
            _in_thread(stage_of)
            if _blocks(method) and not on_loop
            else _on_loop(stage_of)
        )
        for stage, (stage_of, method) in stages.items()
    }


def _whole(model: BaseKServeModel, *, on_loop: bool) -> dict[str, Any]:
    """The handlers of a model that is one call, or has none."""

    def run(verb: InferenceVerb, payload: Any, context: Context) -> Any:
        if not isinstance(model, InferenceModel):
            kind = type(model).__name__
            raise NotImplementedError(f"A {kind} does not support inference.")
        call = _Call(payload, context)

        def take(result: Any) -> Any:
            if isinstance(result, tuple) and len(result) == 2:
                result, own = result
                context.response_headers.update(own or {})
            return answer(result, context)

        return _then(model(call.value, headers=call.headers, verb=verb), take)

    def predict(payload: Any, context: Context) -> Any:
        return run(InferenceVerb.PREDICT, payload, context)

    def explain(payload: Any, context: Context) -> Any:
        return run(InferenceVerb.EXPLAIN, payload, context)

    is_def = isinstance(model, InferenceModel) and _blocks(type(model).__call__)
    if is_def and not on_loop:
        return {"predict": _in_thread(predict), "explain": _in_thread(explain)}
    return {"predict": _on_loop(predict), "explain": _on_loop(explain)}


def _own_headers(model: Model, context: Context) -> tuple[dict[str, str], ...]:
    return (context.response_headers,) if model.required_response_headers else ()


def _blocks(method: Any) -> bool:
    """Whether calling a method runs its code, so that a thread has to call it."""
    return not (
        inspect.iscoroutinefunction(method)
        or inspect.isasyncgenfunction(method)
        or inspect.isgeneratorfunction(method)
    )


def _on_loop(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as an `async def` of the same parameters."""

    async def stage(payload: Any, context: Context) -> Any:
        try:
            value = function(payload, context)
            return await value if _is_awaitable(value) else value
        except Exception as error:  # user code may raise anything
            if (refusal := refusal_of(error)) is None:
                raise
            raise refusal from error

    return stage


def _in_thread(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as a `def` for a thread; what it leaves is awaited on the loop."""

    async def rest(value: Any) -> Any:
        try:
            return await value
        except Exception as error:  # user code may raise anything
            if (refusal := refusal_of(error)) is None:
                raise
            raise refusal from error

    def stage(payload: Any, context: Context) -> Any:
        try:
            value = function(payload, context)
        except Exception as error:  # user code may raise anything
            if (refusal := refusal_of(error)) is None:
                raise
            raise refusal from error
        return rest(value) if _is_awaitable(value) else value

    return stage


def _is_awaitable(value: object) -> bool:
    # Ten times as fast as inspect.isawaitable, and asked a dozen times a request.
    return hasattr(value, "__await__")


def _then(value: Any, after: Callable[[Any], Any]) -> Any:
    """What `after` makes of a value; of an awaitable, an awaitable that gives it."""
    if not _is_awaitable(value):
        return after(value)

    async def awaited() -> Any:
        made = after(await value)
        return await made if _is_awaitable(made) else made

    return awaited()
