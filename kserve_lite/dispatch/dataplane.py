"""What every protocol asks for: live, ready, metadata, load, infer.

`infer` runs a model's stages in order, async handlers on the event loop and plain ones
in threads. An exception of a handler ends here: in the log with its traceback, and to
the caller as `ModelFailed` with the request id under which it was logged.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import anyio

from kserve_lite.dispatch.binding import (
    answer_of,
    request_arguments,
    stage_arguments,
)
from kserve_lite.dispatch.offload import Offload
from kserve_lite.errors import (
    DeadlineExceeded,
    InferenceFault,
    ModelFailed,
    ModelNotFound,
    ModelNotReady,
    ServerNotReady,
    Unsupported,
)
from kserve_lite.handlers import Call, Form, Function, Handler, Stage
from kserve_lite.messages import Answer, Context, StreamAnswer
from kserve_lite.model import Model, Phase, Plan
from kserve_lite.registry import Registry

log = logging.getLogger("kserve_lite")
trace = logging.getLogger("kserve_lite.trace")

# Globals, since reading a member off its class costs 0.12 us in Python 3.11.
_READY, _UNLOADED = Phase.READY, Phase.UNLOADED
_, _THREAD, _GENERATOR = Call

# A `ready` handler that takes longer is as good as not ready; kubelet's default probe
# timeout is 1 s.
READY_TIMEOUT = 5.0


def default_workers() -> int:
    """min(32, CPUs + 4), of the CPUs that this process may use."""
    return min(32, len(os.sched_getaffinity(0)) + 4) if _has_affinity() else 8


def _has_affinity() -> bool:
    return hasattr(os, "sched_getaffinity")


@dataclass(frozen=True, slots=True)
class DispatchSettings:
    """How requests are run.

    max_asyncio_workers: threads that plain `def` handlers of all models share; 0 takes
        min(32, CPUs + 4).
    enable_latency_logging: log one line a request with the milliseconds of each stage.
    expose_errors: send the text of a handler's exception to the client (development).
    """

    max_asyncio_workers: int = 0
    enable_latency_logging: bool = False
    expose_errors: bool = False


class DataPlane:
    """The door to a registry of models."""

    def __init__(self, registry: Registry, settings: DispatchSettings) -> None:
        self.registry = registry
        self.settings = settings
        self._timed = settings.enable_latency_logging
        self.offload = Offload(settings.max_asyncio_workers or default_workers())
        # `def ready` checks have a thread of their own: they must not wait behind
        # predictions.
        self._checks = Offload(1, "kserve-lite-ready")
        self._accepting = True
        self._change = asyncio.Event()
        self._idle: set[anyio.CancelScope] = set()
        # One load or unload by name at a time: they walk a model's phases.
        self._control = asyncio.Lock()

    @property
    def accepting(self) -> bool:
        """Whether the server is to take requests; False from when a stop is asked."""
        return self._accepting

    @accepting.setter
    def accepting(self, accepting: bool) -> None:
        self._accepting = accepting
        self._changed()
        if not accepting:
            for scope in self._idle:
                scope.cancel()

    def change(self) -> asyncio.Event:
        """An event that is set when a model was loaded or unloaded, or a stop begins.

        Of a model's own `ready` handler nothing is told: it can only be asked.
        """
        return self._change

    @contextmanager
    def idle(self) -> Iterator[None]:
        """What waits in here waits for a client, and so need not be finished at a stop.

        Raises ServerNotReady when a stop begins, or has begun.
        """
        if not self._accepting:
            raise ServerNotReady
        with anyio.CancelScope() as scope:
            self._idle.add(scope)
            try:
                yield
            finally:
                self._idle.discard(scope)
        if scope.cancelled_caught:
            raise ServerNotReady

    def _changed(self) -> None:
        self._change.set()
        self._change = asyncio.Event()

    @property
    def running(self) -> int:
        """How many threads are inside handlers; they cannot be stopped."""
        return self.offload.running + self._checks.running

    def close(self) -> None:
        self.offload.close()
        self._checks.close()

    async def ready(self) -> bool:
        """Whether every model is ready; False with no model and while stopping."""
        if not self.accepting:
            return False
        served = [model for model in self.registry if model.phase is not _UNLOADED]
        for model in served:
            if not await self.model_ready(model):
                return False
        return bool(served)

    async def model_ready(self, model: Model) -> bool:
        """Whether the model is loaded and its `ready` handler, if any, says yes."""
        if model.phase is not Phase.READY:
            return False
        check = model.handler(Stage.READY)
        if check is None:
            return True
        try:
            with anyio.fail_after(READY_TIMEOUT):
                return bool(await self._call(check, (), model, None, self._checks))
        except Exception:  # user code: whatever it raises means "not ready"
            log.exception("the ready handler of model %s failed", model.name)
            return False

    async def load(self, model: Model) -> None:
        """Run the model's load handler; raises what it raises."""
        model.enter(Phase.LOADING)
        handler = model.handler(Stage.LOAD)
        started = time.perf_counter()
        try:
            state = await self._call(handler, (), model, None) if handler else None
        except BaseException:
            model.enter(Phase.FAILED)
            raise
        model.enter(Phase.READY, state)
        self._changed()
        log.info("loaded %s in %.2f s", model.name, time.perf_counter() - started)

    async def unload(self, model: Model) -> None:
        """Run the model's unload handler; what it raises is logged."""
        handler = model.handler(Stage.UNLOAD)
        try:
            if handler is not None and model.phase is Phase.READY:
                await self._call(handler, (), model, None)
        except Exception:  # user code: the other models must still be unloaded
            log.exception("the unload handler of model %s failed", model.name)
        finally:
            if model.phase is not Phase.UNLOADED:
                model.enter(Phase.UNLOADED)
            self._changed()

    async def load_named(self, name: str) -> None:
        """Load every version of a model again: unload what is loaded, then load.

        Requests meanwhile meet a model that is not ready. Raises ModelNotFound,
        ModelNotReady where a load handler fails, which is logged, and ServerNotReady
        while the server stops. A caller that goes away leaves the model failed.
        """
        async with self._control:
            if not self.accepting:
                raise ServerNotReady
            for model in self._versions(name):
                if model.phase in (Phase.FROZEN, Phase.LOADING):  # the server's start
                    raise ModelNotReady(name)
                if model.phase is Phase.READY:
                    await self.unload(model)
                try:
                    await self.load(model)
                except (Exception, SystemExit) as error:  # user code
                    log.exception("loading model %s failed", name)
                    self._changed()
                    raise ModelNotReady(name) from error

    async def unload_named(self, name: str) -> None:
        """Unload every version of a model; raises ModelNotFound where none is served.

        From then on it is as if the model did not exist, until it is loaded again.
        """
        async with self._control:
            served = [m for m in self._versions(name) if m.phase is not _UNLOADED]
            if not served:
                raise ModelNotFound(name)
            for model in served:
                await self.unload(model)

    def _versions(self, name: str) -> list[Model]:
        self.registry.get(name)
        return [model for model in self.registry if model.name == name]

    def names(self) -> list[str]:
        """The names of the models, ready or not, less those that were unloaded."""
        served = {model.name for model in self.registry if model.phase is not _UNLOADED}
        return [name for name in self.registry.names() if name in served]

    def get(self, name: str, version: str | None = None) -> Model:
        """Return a model, ready or not; raise ModelNotFound, also once unloaded."""
        model = self.registry.get(name, version)
        if model.phase is _UNLOADED:
            raise ModelNotFound(name, version)
        return model

    def find(self, name: str, version: str | None = None) -> Model:
        """Return a loaded model; raise ModelNotFound or ModelNotReady.

        A model that `is_checked` has then to pass `check()`.
        """
        model = self.registry.get(name, version)
        if model.phase is not _READY:
            if model.phase is _UNLOADED:
                raise ModelNotFound(name, version)
            raise ModelNotReady(name)
        return model

    async def check(self, model: Model) -> None:
        """Raise ModelNotReady unless the model is ready, its own handler included."""
        if not await self.model_ready(model):
            raise ModelNotReady(model.name)

    async def infer(
        self, model: Model, plan: Plan, payload: Any, context: Context
    ) -> Answer:
        """Run a model's handlers on a payload.

        plan: the model's plan for a verb. payload: an InferRequest, or decoded JSON
        where the plan's first handler takes JSON on V1.
        Raises InferenceFault, and nothing else of what handlers raise.
        """
        try:
            entry = plan[0]
            if context.deadline is not None:
                value = await self._run_in_time(plan, payload, model, context)
            elif entry.is_plain and len(plan) == 1 and not self._timed:
                # The shortest way, for the most frequent model.
                value = await entry.function(payload)
            else:
                value = await self._run_stages(plan, payload, model, context)
            if context.protocol != "v2" and _streams(type(value)):  # type: ignore[arg-type]
                items = self._stream(value)
                if context.protocol == "grpc":
                    items = self._answers(items, model, entry.form, context, payload)
                return StreamAnswer(items)
            return answer_of(value, model, entry.form, context, payload)
        except InferenceFault:
            raise
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            raise self._fault(model, context, error) from error

    def _fault(
        self, model: Model, context: Context, error: BaseException
    ) -> InferenceFault:
        """What an exception of user code, which may be any, is to the caller.

        Raises CancelledError again where somebody cancelled the request.
        """
        if isinstance(error, asyncio.CancelledError):
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise error
            # Nobody cancelled this request: the handler raised it by itself.
        if isinstance(error, NotImplementedError):
            return Unsupported(str(error) or "Not implemented.")
        return self.model_failed(model, context, error)

    async def _run_in_time(
        self, plan: Plan, payload: Any, model: Model, context: Context
    ) -> Any:
        with anyio.move_on_after(context.remaining()):
            return await self._run_stages(plan, payload, model, context)
        raise DeadlineExceeded

    async def _run_stages(
        self, plan: Plan, payload: Any, model: Model, context: Context
    ) -> Any:
        timed = self._timed
        milliseconds: dict[Stage, float] = {}
        value = payload
        for handler in plan:
            started = time.perf_counter() if timed else 0.0
            bind = request_arguments if handler is plan[0] else stage_arguments
            value = self._call(handler, bind(handler, value), model, context)
            if handler.call is not _GENERATOR:
                value = await value
            if timed:
                milliseconds[handler.stage] = (time.perf_counter() - started) * 1e3
        if timed:
            _log_latency(context, milliseconds)
        return value

    def model_failed(
        self, model: Model, context: Context, error: BaseException
    ) -> ModelFailed:
        """Log a failure of the model's own code; return what the client may know."""
        log.error(
            "model %s failed, request id %s",
            model.name,
            context.request_id,
            exc_info=error,
        )
        exposed = None
        if self.settings.expose_errors:
            exposed = f"{type(error).__name__}: {error}."
        return ModelFailed(context.request_id, exposed)

    def _call(
        self,
        handler: Handler,
        arguments: tuple[Any, ...] | dict[str, Any],
        model: Model,
        context: Context | None,
        offload: Offload | None = None,
    ) -> Any:
        """Call a handler: a generator as it is, else an awaitable of its result."""
        named: dict[str, Any] = {}
        for name in handler.injected:
            if name == "state":
                named[name] = model.state
            elif name == "context":
                named[name] = context
            else:
                named[name] = getattr(context, name)
        if isinstance(arguments, dict):
            named |= arguments
            arguments = ()
        if handler.call is not _THREAD:
            return handler.function(*arguments, **named)
        return self._in_thread(
            offload or self.offload, handler.function, arguments, named
        )

    async def _in_thread(
        self,
        offload: Offload,
        function: Function,
        arguments: tuple[Any, ...],
        named: dict[str, Any],
    ) -> Any:
        result = await offload.run(function, *arguments, **named)
        if inspect.isawaitable(result):
            return await result
        return result

    async def _answers(
        self,
        items: AsyncGenerator[Any, None],
        model: Model,
        form: Form,
        context: Context,
        payload: Any,
    ) -> AsyncGenerator[Answer, None]:
        """Each item as an answer of its own (gRPC); raises InferenceFault."""
        try:
            async with aclosing(items):
                async for item in items:
                    yield answer_of(item, model, form, context, payload)
        except InferenceFault:
            raise
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            raise self._fault(model, context, error) from error

    async def _stream(
        self, items: AsyncIterator[Any] | Iterator[Any]
    ) -> AsyncGenerator[Any, None]:
        """The items of any iterator; a plain one is advanced in a thread."""
        if isinstance(items, AsyncIterator):
            try:
                async for item in items:
                    yield item
            finally:
                if isinstance(items, AsyncGenerator):
                    await items.aclose()
            return
        stream = _ThreadStream(items)
        try:
            while (item := await self.offload.run(stream.advance)) is not stream:
                yield item
        finally:
            if stream.leave():
                self.offload.start(stream.close)


@lru_cache(maxsize=256)  # a hasattr() that fails costs 0.5 us
def _streams(kind: type) -> bool:
    """Whether results of a type are iterators of either kind."""
    return hasattr(kind, "__anext__") or hasattr(kind, "__next__")


class _ThreadStream:
    """A plain iterator that threads advance and that may be left at any time.

    A client may go away while a thread is inside an item, where the iterator cannot be
    closed: then that thread closes it when the item is done.
    """

    def __init__(self, items: Iterator[Any]) -> None:
        self._items = items
        self._lock = threading.Lock()
        self._left = False
        self._ended = False

    def advance(self) -> Any:
        """The next item; the stream itself when there is none."""
        with self._lock:
            try:
                item = next(self._items, self)
            except BaseException:
                self._ended = True
                raise
        self._ended = item is self
        if self._left:
            self.close()
        return item

    def leave(self) -> bool:
        """Ask for no more items; return whether `close()` is still wanted."""
        self._left = True
        return not self._ended and hasattr(self._items, "close")

    def close(self) -> None:
        """Let a generator clean up, unless a thread is inside, which will."""
        if self._lock.acquire(blocking=False):
            try:
                self._items.close()  # type: ignore[attr-defined]
            except Exception:  # user code: nobody waits for it any more
                log.exception("a generator failed while it was closed")
            finally:
                self._lock.release()


def _log_latency(context: Context, milliseconds: dict[Stage, float]) -> None:
    """One line, in the format of KServe's SDK."""
    fields = ", ".join(
        f"{stage.value}_ms: {round(milliseconds.get(stage, 0.0), 6)}"
        for stage in (
            Stage.PREPROCESS,
            Stage.EXPLAIN,
            Stage.PREDICT,
            Stage.POSTPROCESS,
        )
    )
    given = context.headers.get("x-request-id")
    trace.info("requestId: %s, %s", context.request_id if given else "N.A.", fields)
