"""Runs a model's handlers: the stages of a request, and those of a model's life.

Async handlers run on the event loop, plain ones in threads; calls wait for their turn
where the model says how many may run at a time, and rows of a batched handler wait for
each other. Exceptions of handlers pass through: `dataplane.py` says what they mean.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Coroutine
from functools import partial
from time import perf_counter_ns
from typing import Any

from kserve_lite.dispatch.admission import Gate, Turn
from kserve_lite.dispatch.batching import Batcher
from kserve_lite.dispatch.binding import request_arguments, stage_arguments
from kserve_lite.dispatch.offload import Held, Offload
from kserve_lite.dispatch.running import QUEUE, Running, Statistics, Times
from kserve_lite.dispatch.settings import DispatchSettings, default_workers
from kserve_lite.handlers import Call, Handler, Stage
from kserve_lite.messages import Context
from kserve_lite.model import Model, Plan

trace = logging.getLogger("kserve_lite.trace")

# Globals, since reading a member off its class costs 0.12 us in Python 3.11.
_, _THREAD, _GENERATOR = Call


class Stages:
    """Runs handlers, plain ones in at most `max_asyncio_workers` threads."""

    def __init__(self, settings: DispatchSettings) -> None:
        self.offload = Offload(settings.max_asyncio_workers or default_workers())
        self._timed = settings.enable_latency_logging
        self._max_queue_size = settings.max_queue_size

    def running_of(self, model: Model, state: Any, statistics: Statistics) -> Running:
        """A load of a model, with what its calls wait in."""
        most = model.max_concurrency
        gate = None if most is None else Gate(most, self._max_queue_size)
        running = Running(state, statistics, gate)
        for handler in model.plan(Stage.PREDICT):
            if handler.batching is not None:
                running.batcher = Batcher(
                    partial(self._call_batch, handler, running),
                    handler.batching,
                    max_queue_size=self._max_queue_size,
                    max_concurrency=most or 1,
                )
        running.is_staged = self._timed or gate is not None
        running.queues = (
            gate is not None or running.batcher is not None or model.uses_threads
        )
        return running

    async def run(
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
            if handler.batching is not None and running.batcher is not None:
                value = await self._batched(
                    handler, running.batcher, arguments, context, times
                )
            elif running.gate is None or handler.call is _GENERATOR:
                value = await self.call(handler, running, arguments, context, times)
            else:
                value = await self._in_turn(handler, running, arguments, context, times)
            waited = times.get(QUEUE, 0) - waited
            times[handler.stage] = perf_counter_ns() - started - waited
        if self._timed:
            _log_latency(context, times)
        return value

    async def _in_turn(
        self,
        handler: Handler,
        running: Running,
        arguments: tuple[Any, ...] | dict[str, Any],
        context: Context,
        times: Times,
    ) -> Any:
        """Call a handler as one of a model's `max_concurrency` calls."""
        asked = perf_counter_ns()
        async with Turn(running.gate, running) as turn:
            times[QUEUE] = times.get(QUEUE, 0) + perf_counter_ns() - asked
            return await self.call(
                handler, running, arguments, context, times, held=turn
            )

    async def _batched(
        self,
        handler: Handler,
        batcher: Batcher,
        arguments: tuple[Any, ...] | dict[str, Any],
        context: Context,
        times: Times,
    ) -> Any:
        """Have a request's rows go through the handler with those of others."""
        if isinstance(arguments, tuple):
            names = (parameter.name for parameter in handler.tensors)
            arguments = dict(zip(names, arguments, strict=False))
        return await batcher.run(arguments, times=times, deadline=context.deadline)

    async def _call_batch(
        self, handler: Handler, running: Running, arrays: dict[str, Any]
    ) -> Any:
        """Call a handler with the rows of several requests.

        Cancelled, it ends when its thread has: until then the batch keeps its place.
        """
        lone = len(handler.tensors) == 1
        arguments = tuple(arrays.values()) if lone else arrays
        running.begin()
        try:
            async with Turn(running.gate, running):
                started = perf_counter_ns()
                work = self.call(handler, running, arguments)
                result = await (_to_its_end(work) if handler.call is _THREAD else work)
        finally:
            running.end()
        rows = len(next(iter(arrays.values())))
        running.statistics.add_batch(rows, perf_counter_ns() - started)
        return result

    async def call(
        self,
        handler: Handler,
        running: Running | None,
        arguments: tuple[Any, ...] | dict[str, Any] = (),
        context: Context | None = None,
        times: Times | None = None,
        *,
        held: Held | None = None,
        offload: Offload | None = None,
    ) -> Any:
        """Call a handler and return its result; of a generator, itself.

        running: the load whose state it gets; None while the model is being loaded.
        held: what a thread is counted by that goes on after its caller; the load, where
            it is nothing else.
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
        if handler.call is _GENERATOR:
            return handler.function(*arguments, **named)
        if handler.call is not _THREAD:
            return await handler.function(*arguments, **named)
        function = partial(handler.function, *arguments, **named)
        result = await (offload or self.offload).run(function, times, held or running)
        return await result if inspect.isawaitable(result) else result


async def _to_its_end(work: Coroutine[Any, Any, Any]) -> Any:
    """Await work that is cancelled only when it has ended."""
    task = asyncio.get_running_loop().create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # nobody is left to ask for it
        raise


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
