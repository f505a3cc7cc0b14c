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
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterator
from dataclasses import dataclass
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
    ModelNotReady,
    Unsupported,
)
from kserve_lite.handlers import Call, Function, Handler, Stage
from kserve_lite.messages import Answer, Context, StreamAnswer
from kserve_lite.model import Model, Phase, Plan
from kserve_lite.registry import Registry

log = logging.getLogger("kserve_lite")
trace = logging.getLogger("kserve_lite.trace")

# Globals, since reading a member off its class costs 0.12 us in Python 3.11.
_READY = Phase.READY
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
        self.offload = Offload(settings.max_asyncio_workers or default_workers())
        # `def ready` checks have a thread of their own: they must not wait behind
        # predictions.
        self._checks = Offload(1, "kserve-lite-ready")
        self.accepting = True

    @property
    def running(self) -> int:
        """How many threads are inside handlers; they cannot be stopped."""
        return self.offload.running + self._checks.running

    def close(self) -> None:
        self.offload.close()
        self._checks.close()

    async def ready(self) -> bool:
        """Whether every model is ready; False with no model and while stopping."""
        if not self.accepting or not len(self.registry):
            return False
        for model in self.registry:
            if not await self.model_ready(model):
                return False
        return True

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

    def find(self, name: str, version: str | None = None) -> Model:
        """Return a loaded model; raise ModelNotFound or ModelNotReady.

        A model that `is_checked` has then to pass `check()`.
        """
        model = self.registry.get(name, version)
        if model.phase is not _READY:
            raise ModelNotReady(name)
        return model

    async def check(self, model: Model) -> None:
        """Raise ModelNotReady unless the model is ready, its own handler included."""
        if not await self.model_ready(model):
            raise ModelNotReady(model.name)

    def infer(
        self, model: Model, plan: Plan, payload: Any, context: Context
    ) -> Awaitable[Answer]:
        """Run a model's handlers on a payload.

        plan: the model's plan for a verb. payload: an InferRequest, or decoded JSON
        where the plan's first handler takes JSON on V1.
        Raises InferenceFault, and nothing else of what handlers raise.
        """
        run = self._run if context.deadline is None else self._run_in_time
        return run(model, plan, payload, context)

    async def _run_in_time(
        self, model: Model, plan: Plan, payload: Any, context: Context
    ) -> Answer:
        try:
            with anyio.fail_after(context.remaining()):
                return await self._run(model, plan, payload, context)
        except TimeoutError as error:
            raise DeadlineExceeded from error

    async def _run(
        self, model: Model, plan: Plan, payload: Any, context: Context
    ) -> Answer:
        try:
            timed = self.settings.enable_latency_logging
            milliseconds: dict[Stage, float] = {}
            value: Any = payload
            entry = plan[0]
            for handler in plan:
                started = time.perf_counter() if timed else 0.0
                if handler.is_plain:  # the shortest way, for the most frequent handler
                    value = await handler.function(value)
                else:
                    bind = request_arguments if handler is entry else stage_arguments
                    value = self._call(handler, bind(handler, value), model, context)
                    if handler.call is not _GENERATOR:
                        value = await value
                if timed:
                    milliseconds[handler.stage] = (time.perf_counter() - started) * 1e3
            if timed:
                _log_latency(context, milliseconds)
            if context.protocol == "v1" and _streams(value):
                return StreamAnswer(self._stream(value))
            return answer_of(value, model, entry.form, context, payload)
        except InferenceFault:
            raise
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Nobody cancelled this request: the handler raised it by itself.
            raise self.model_failed(model, context, error) from error
        except (Exception, SystemExit) as error:  # user code may raise anything
            if isinstance(error, NotImplementedError):
                raise Unsupported(str(error) or "Not implemented.") from error
            raise self.model_failed(model, context, error) from error

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


def _streams(value: object) -> bool:
    """Whether a result is an iterator of either kind.

    Not by isinstance() of the abstract classes, which costs 1 us a request.
    """
    kind = type(value)
    return kind is not dict and (
        hasattr(kind, "__anext__") or hasattr(kind, "__next__")
    )


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
