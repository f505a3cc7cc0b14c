"""What every protocol asks for: live, ready, infer. Models' lives: `repository.py`.

`infer` runs a model's stages in order, async handlers on the event loop and plain ones
in threads. An exception of a handler ends here: in the log with its traceback, and to
the caller as `ModelFailed` with the request id under which it was logged.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from functools import partial
from time import perf_counter_ns
from typing import Any

import anyio

from kserve_lite.counters import Board, State
from kserve_lite.dispatch.admission import too_much
from kserve_lite.dispatch.binding import answer_of, request_arguments, text_response
from kserve_lite.dispatch.deadlines import Deadlines
from kserve_lite.dispatch.offload import Offload
from kserve_lite.dispatch.running import Running
from kserve_lite.dispatch.settings import DispatchSettings
from kserve_lite.dispatch.stages import Stages
from kserve_lite.dispatch.statistics import Statistics, Times
from kserve_lite.dispatch.streams import InFlight, items_of, streams
from kserve_lite.errors import (
    DeadlineExceeded,
    InferenceFault,
    ModelFailed,
    ModelNotFound,
    ModelNotReady,
    ServerNotReady,
    Unsupported,
)
from kserve_lite.handlers import Call, Stage
from kserve_lite.messages import Answer, Context, StreamAnswer
from kserve_lite.model import Model, Phase, Plan
from kserve_lite.registry import Registry

log = logging.getLogger("kserve_lite")

# Globals, since reading a member off its class costs 0.12 us in Python 3.11.
_READY, _UNLOADED = Phase.READY, Phase.UNLOADED
_AWAIT = Call.AWAIT

# A `ready` handler that takes longer is as good as not ready; kubelet's default probe
# timeout is 1 s.
READY_TIMEOUT = 5.0


class DataPlane:
    """The door to a registry of models.

    board, index: where the processes of the server count, and this one's sheet; by
    default those of a process of its own.
    """

    def __init__(
        self,
        registry: Registry,
        settings: DispatchSettings,
        *,
        board: Board | None = None,
        index: int = 0,
    ) -> None:
        self.board = board or Board()
        self.index = index
        self.registry = registry
        self.settings = settings
        self._max_in_flight = settings.max_in_flight
        self._max_queue_size = settings.max_queue_size
        self._deadlines = Deadlines(settings.request_timeout)
        self.stages = Stages(settings)
        # `def ready` checks have a thread of their own: they must not wait behind
        # predictions.
        self._checks = Offload(1, "kserve-lite-ready")
        self._failing: set[Model] = set()  # whose `ready` handler has raised just now
        # Whether there may be no model: they come later.
        self.may_be_empty = False
        self._accepting = True
        self._change = asyncio.Event()
        self._idle: set[anyio.CancelScope] = set()
        # What is loaded. A model that is loaded again gets another `Running`.
        self.running: dict[Model, Running] = {}
        self.statistics: dict[Model, Statistics] = {}
        self._uncounted: set[Statistics] = set()
        self.board.sheets[index].writers.append(self._count)

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
        return self.stages.offload.running + self._checks.running

    def close(self) -> None:
        self.stages.offload.close()
        self._checks.close()
        self._deadlines.close()

    async def ready(self) -> bool:
        """Whether every model is ready, in every process that takes requests.

        False while stopping and, unless it `may_be_empty`, with no model.
        """
        # Whose state is SERVING takes requests, and would refuse them.
        others = (s for i, s in enumerate(self.board.sheets) if i != self.index)
        return await self.own_ready() and State.SERVING not in {
            sheet.state for sheet in others
        }

    async def own_ready(self) -> bool:
        """Whether every model is ready in this process."""
        if not self.accepting:
            return False
        served = [model for model in self.registry if model.phase is not _UNLOADED]
        for model in served:
            if not await self.model_ready(model):
                return False
        return bool(served) or self.may_be_empty

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
                answer = await self.stages.call(check, running, offload=self._checks)
                is_ready = bool(answer)
        except (Exception, SystemExit):  # user code: whatever it raises is "not ready"
            # Probes, and siblings, ask each second: the first failure is told.
            if model not in self._failing:
                log.exception("the ready handler of model %s failed", model.name)
                self._failing.add(model)
            return False
        self._failing.discard(model)
        return is_ready

    def statistics_of(self, model: Model) -> Statistics:
        """What a model has done; made when it is first asked for."""
        known = self.statistics.get(model)
        if known is None:
            known = Statistics(model, self.board, self.index, self._uncounted)
            self.statistics[model] = known
        return known

    def _count(self) -> None:
        while self._uncounted:
            self._uncounted.pop().settle()

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
        """Return a loaded model that a request may be brought to.

        Raises ModelNotFound, ModelNotReady, and Overloaded where too much is in flight
        or waits: here, before its body is decoded, refusing a request is cheap. A model
        that `is_checked` has then to pass `check()`.
        """
        model = self.registry.get(name, version)
        if model.phase is not _READY:
            if model.phase is _UNLOADED:
                raise ModelNotFound(name, version)
            raise ModelNotReady(name)
        running = self.running[model]
        if running.in_flight >= self._max_in_flight or running.queues:
            self._admit(model, running)
        return model

    def _admit(self, model: Model, running: Running) -> None:
        """Raise Overloaded where a model has too much to do."""
        if running.in_flight >= self._max_in_flight:
            raise too_much("too many requests are in flight")
        if model.uses_threads and self.stages.offload.waiting >= self._max_queue_size:
            raise too_much("too many requests wait for a thread")
        if running.waiting >= self._max_queue_size:
            raise too_much("too many requests wait for their turn")

    async def check(self, model: Model) -> None:
        """Raise ModelNotReady unless the model is ready, its own handler included."""
        if not await self.model_ready(model):
            raise ModelNotReady(model.name)

    async def infer(
        self,
        model: Model,
        plan: Plan,
        payload: Any,
        context: Context,
        times: Times | None = None,
    ) -> Answer:
        """Run a model's handlers on a payload.

        plan: the model's plan for a verb. payload: an InferRequest, or decoded JSON
        where the plan's first handler takes JSON on V1 and generate. times: is filled,
        for a caller that wants to know what took how long.
        Raises InferenceFault, and nothing else of what handlers raise.
        """
        running = self.running.get(model)
        if running is None:  # unloaded since it was found
            raise ModelNotReady(model.name)
        running.in_flight += 1
        started = perf_counter_ns()
        task: asyncio.Task[Any] | None = None
        entry = plan[0]
        stage = entry.stage
        try:
            task = self._deadlines.begin(context)
            is_lone = len(plan) == 1 and entry.call is _AWAIT and entry.batching is None
            if times is not None or running.is_staged or not is_lone:
                times = {} if times is None else times
                value = await self.stages.run(plan, payload, running, context, times)
            # For the most frequent models: nothing waits, all of the time is theirs.
            elif entry.is_plain:
                value = await entry.function(payload)
            else:
                arguments = request_arguments(entry, payload)
                value = await self.stages.call(entry, running, arguments, context)
            self._deadlines.end(task)
            if context.protocol != "v2" and streams(type(value)):  # type: ignore[arg-type]
                items = items_of(value, running, self.stages.offload)
                if context.protocol != "v1":
                    items = self._answers(items, model, plan, context, payload)
                within = partial(self._deadlines.within, context)
                ended = partial(running.ended, started, stage, times)
                return StreamAnswer(InFlight(items, within, ended))
            answer = answer_of(value, model, plan, context, payload)
        except BaseException as error:
            running.ended(started, stage, times, False)
            if self._deadlines.end(task) and isinstance(error, asyncio.CancelledError):
                raise DeadlineExceeded from None
            if isinstance(error, InferenceFault):
                raise
            raise self._fault(model, context, error) from error
        running.ended(started, stage, times, True)
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
