"""What every protocol asks for: live, ready, infer. Models' lives: `repository.py`.

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
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from time import perf_counter_ns
from typing import Any

import anyio

from kserve_lite.dispatch.binding import (
    answer_of,
    request_arguments,
    stage_arguments,
    text_response,
)
from kserve_lite.dispatch.offload import Offload
from kserve_lite.dispatch.running import QUEUE, Running, Statistics, Times
from kserve_lite.errors import (
    DeadlineExceeded,
    InferenceFault,
    ModelFailed,
    ModelNotFound,
    ModelNotReady,
    ServerNotReady,
    Unsupported,
)
from kserve_lite.handlers import Call, Handler, Stage
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
    enable_model_control: let clients on other machines load and unload models.
    expose_errors: send the text of a handler's exception to the client (development).
    grace_period: seconds that a stop, or unloading a model, gives to what is in flight.
    """

    max_asyncio_workers: int = 0
    enable_latency_logging: bool = False
    enable_model_control: bool = False
    expose_errors: bool = False
    grace_period: float = 30.0


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
        # What is loaded. A model that is loaded again gets another `Running`.
        self.running: dict[Model, Running] = {}
        self.statistics: dict[Model, Statistics] = {}

    @property
    def accepting(self) -> bool:
        """Whether the server is to take requests; False from when a stop is asked."""
        return self._accepting

    @accepting.setter
    def accepting(self, accepting: bool) -> None:
        self._accepting = accepting
        self.changed()
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

    def changed(self) -> None:
        """Tell those who wait for `change()`."""
        self._change.set()
        self._change = asyncio.Event()

    @property
    def threads(self) -> int:
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
        running = self.running.get(model)
        if running is None:
            return False
        check = model.handler(Stage.READY)
        if check is None:
            return True
        try:
            with anyio.fail_after(READY_TIMEOUT):
                return bool(await self.call(check, running, offload=self._checks))
        except Exception:  # user code: whatever it raises means "not ready"
            log.exception("the ready handler of model %s failed", model.name)
            return False

    def names(self) -> list[str]:
        """The names of the models, ready or not, less those that were unloaded."""
        served = {model.name for model in self.registry if model.phase is not _UNLOADED}
        return [name for name in self.registry.names() if name in served]

    def served(self) -> Registry:
        """The models that `names()` lists, as a registry of their own."""
        registry = Registry()
        for model in self.registry:
            if model.phase is not _UNLOADED:
                registry.add(model)
        return registry

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
        where the plan's first handler takes JSON on V1 and generate.
        Raises InferenceFault, and nothing else of what handlers raise.
        """
        running = self.running.get(model)
        if running is None:  # unloaded since it was found
            raise ModelNotReady(model.name)
        running.in_flight += 1
        running.statistics.last = started = perf_counter_ns()
        times: Times | None = None
        try:
            entry = plan[0]
            if (
                entry.is_plain
                and len(plan) == 1
                and context.deadline is None
                and not self._timed
            ):
                # The shortest way, for the most frequent model.
                value = await entry.function(payload)
            else:
                times = {}
                value = await self._run_in_time(plan, payload, running, context, times)
            if context.protocol != "v2" and _streams(type(value)):  # type: ignore[arg-type]
                items = self._stream(value, running)
                if context.protocol != "v1":
                    items = self._answers(items, model, plan, context, payload)
                return StreamAnswer(_InFlight(items, running, started, times))
            answer = answer_of(value, model, plan, context, payload)
        except BaseException as error:
            _failed(running, started)
            if isinstance(error, InferenceFault):
                raise
            raise self._fault(model, context, error) from error
        _succeeded(running, started, times)
        return answer

    def _fault(
        self, model: Model, context: Context, error: BaseException
    ) -> InferenceFault:
        """What an exception of user code, which may be any, is to the caller.

        Raises CancelledError again where somebody cancelled the request, and what no
        server may hold up.
        """
        if not isinstance(error, (Exception, SystemExit, asyncio.CancelledError)):
            raise error
        if isinstance(error, asyncio.CancelledError):
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise error
            # Nobody cancelled this request: the handler raised it by itself.
        if isinstance(error, NotImplementedError):
            return Unsupported(str(error) or "Not implemented.")
        return self.model_failed(model, context, error)

    async def _run_in_time(
        self,
        plan: Plan,
        payload: Any,
        running: Running,
        context: Context,
        times: Times,
    ) -> Any:
        if context.deadline is None:
            return await self._run_stages(plan, payload, running, context, times)
        with anyio.move_on_after(context.remaining()):
            return await self._run_stages(plan, payload, running, context, times)
        raise DeadlineExceeded

    async def _run_stages(
        self,
        plan: Plan,
        payload: Any,
        running: Running,
        context: Context,
        times: Times,
    ) -> Any:
        value = payload
        for handler in plan:
            waited = times.get(QUEUE, 0)
            started = perf_counter_ns()
            bind = request_arguments if handler is plan[0] else stage_arguments
            arguments = bind(handler, value)
            value = self.call(handler, running, arguments, context, times)
            if handler.call is not _GENERATOR:
                value = await value
            waited = times.get(QUEUE, 0) - waited
            times[handler.stage] = perf_counter_ns() - started - waited
        if self._timed:
            _log_latency(context, times)
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

    def call(
        self,
        handler: Handler,
        running: Running | None,
        arguments: tuple[Any, ...] | dict[str, Any] = (),
        context: Context | None = None,
        times: Times | None = None,
        *,
        offload: Offload | None = None,
    ) -> Any:
        """Call a handler: a generator as it is, else an awaitable of its result.

        running: the load whose state it gets; None while the model is being loaded.
        """
        named: dict[str, Any] = {}
        for name in handler.injected:
            if name == "state":
                named[name] = None if running is None else running.state
            elif name == "context":
                named[name] = context
            else:
                named[name] = getattr(context, name)
        if isinstance(arguments, dict):
            named |= arguments
            arguments = ()
        if handler.call is not _THREAD:
            return handler.function(*arguments, **named)
        function = partial(handler.function, *arguments, **named)
        return self._in_thread(offload or self.offload, function, running, times)

    async def _in_thread(
        self,
        offload: Offload,
        function: Callable[[], Any],
        running: Running | None,
        times: Times | None = None,
    ) -> Any:
        job = offload.submit(function, times)
        try:
            result = await asyncio.wrap_future(job)
        except asyncio.CancelledError:
            if running is not None and not job.cancelled():
                running.hold(job)
            raise
        return await result if inspect.isawaitable(result) else result

    async def _answers(
        self,
        items: AsyncGenerator[Any, None],
        model: Model,
        plan: Plan,
        context: Context,
        payload: Any,
    ) -> AsyncGenerator[Answer, None]:
        """Each item as an answer of its own; raises InferenceFault."""
        try:
            async with aclosing(items):
                async for item in items:
                    if context.protocol == "grpc" and isinstance(item, (str, bytes)):
                        item = text_response(item, plan)
                    yield answer_of(item, model, plan, context, payload)
        except InferenceFault:
            raise
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            raise self._fault(model, context, error) from error

    async def _stream(
        self, items: AsyncIterator[Any] | Iterator[Any], running: Running
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
        offload = self.offload
        try:
            while True:
                item = await self._in_thread(offload, stream.advance, running)
                if item is stream:
                    break
                yield item
        finally:
            if stream.leave():
                self.offload.start(stream.close)


class _InFlight(AsyncGenerator[Any, None]):
    """The items of a stream that is in flight until it ends or is closed.

    No generator function, whose end is not told if it was never begun.
    """

    def __init__(
        self,
        items: AsyncGenerator[Any, None],
        running: Running,
        started: int,
        times: Times | None,
    ) -> None:
        self._items = items
        self._running: Running | None = running
        self._started = started
        self._times = times

    async def asend(self, value: Any) -> Any:
        try:
            return await self._items.asend(value)
        except BaseException as error:
            self._end(complete=isinstance(error, StopAsyncIteration))
            raise

    async def athrow(self, *error: Any) -> Any:
        return await self._items.athrow(*error)

    async def aclose(self) -> None:
        try:
            await self._items.aclose()
        finally:
            self._end(complete=False)

    def _end(self, *, complete: bool) -> None:
        running, self._running = self._running, None
        if running is None:
            return
        if complete:
            _succeeded(running, self._started, self._times)
        else:
            _failed(running, self._started)


def _succeeded(running: Running, started: int, times: Times | None) -> None:
    statistics = running.statistics
    statistics.successes += 1
    statistics.succeeded_ns += perf_counter_ns() - started
    if times is not None:
        statistics.add_times(times)
    running.end()


def _failed(running: Running, started: int) -> None:
    running.statistics.failures += 1
    running.statistics.failed_ns += perf_counter_ns() - started
    running.end()


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


def _log_latency(context: Context, times: Times) -> None:
    """One line, in the format of KServe's SDK."""
    fields = ", ".join(
        f"{stage.value}_ms: {round(times.get(stage, 0) / 1e6, 6)}"
        for stage in (
            Stage.PREPROCESS,
            Stage.EXPLAIN,
            Stage.PREDICT,
            Stage.POSTPROCESS,
        )
    )
    given = context.headers.get("x-request-id")
    trace.info("requestId: %s, %s", context.request_id if given else "N.A.", fields)
