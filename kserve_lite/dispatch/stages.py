"""Runs a model's handlers: the stages of a request, and those of a model's life.

Async handlers run on the event loop, plain ones in threads; calls wait for their turn
where the model says how many may run at a time, and rows of a batched handler wait for
each other. Exceptions of handlers pass through: `dataplane.py` says what they mean.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from functools import partial
from time import perf_counter_ns
from typing import Any, TypeAlias

from kserve_lite.dispatch.admission import Gate, Turn
from kserve_lite.dispatch.batching import Batcher
from kserve_lite.dispatch.binding import request_arguments, stage_arguments
from kserve_lite.dispatch.offload import Held, Offload
from kserve_lite.dispatch.running import Running
from kserve_lite.dispatch.settings import DispatchSettings, default_workers
from kserve_lite.dispatch.statistics import QUEUE, Statistics, Times, waited
from kserve_lite.handlers import Call, Handler, Stage
from kserve_lite.messages import Context
from kserve_lite.model import Model, Plan
from kserve_lite.telling import tell

trace = logging.getLogger("kserve_lite.trace")

Span: TypeAlias = Callable[[str, Times], AbstractContextManager[None]]

# Globals, since reading a member off its class costs 0.12 us in Python 3.11.
_, _THREAD, _GENERATOR = Call


class Stages:
    """Runs handlers, plain ones in at most `max_asyncio_workers` threads."""

    def __init__(self, settings: DispatchSettings) -> None:
        self.offload = Offload(settings.max_asyncio_workers or default_workers())
        self._timed = settings.enable_latency_logging
        # In which each stage of a request runs, where requests are traced.
        self.span: Span | None = None
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
        traced = self.span is not None
        running.is_staged = self._timed or traced or gate is not None
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
            bind = request_arguments if handler is plan[0] else stage_arguments
            arguments = bind(handler, value)
            if self.span is None:
                value = await self._stage(handler, arguments, running, context, times)
            else:
                with self.span(handler.stage, times):
                    value = await self._stage(
                        handler, arguments, running, context, times
                    )
        if self._timed:
            _log_latency(context, times)
            headers = context.response_headers
            if not any(name.lower() == "server-timing" for name in headers):
                headers["server-timing"] = _timing(times)
        return value

    async def _stage(
        self,
        handler: Handler,
        arguments: tuple[Any, ...] | dict[str, Any],
        running: Running,
        context: Context,
        times: Times,
    ) -> Any:
        """Run one handler of a plan, in its turn, and time it without the waiting."""
        before = waited(times)
        started = perf_counter_ns()
        try:
            if handler.batching is not None and running.batcher is not None:
                return await self._batched(
                    handler, running.batcher, arguments, context, times
                )
            if running.gate is None or handler.call is _GENERATOR:
                return await self.call(handler, running, arguments, context, times)
            return await self._in_turn(handler, running, arguments, context, times)
        finally:
            waiting = waited(times) - before
            times[handler.stage] = perf_counter_ns() - started - waiting

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
        running.batches += 1
        try:
            async with Turn(running.gate, running):
                started = perf_counter_ns()
                work = self.call(handler, running, arguments)
                result = await (_to_its_end(work) if handler.call is _THREAD else work)
        finally:
            running.batch_ended()
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
    """One line, in the format of KServe's SDK; the same numbers as fields, for JSON.

    The id is that of the request's other lines: KServe says "N.A." without the
    client's own.
    """
    took = {f"{stage}_ms": round(times.get(stage, 0) / 1e6, 6) for stage in _TOLD}
    told = ", ".join(f"{name}: {ms}" for name, ms in took.items())
    known = {"request_id": context.request_id, "model": context.model_name, **took}
    tell(trace, f"requestId: {context.request_id}, {told}", known)


# In KServe's order.
_TOLD = (Stage.PREPROCESS, Stage.EXPLAIN, Stage.PREDICT, Stage.POSTPROCESS)


def _timing(times: Times) -> str:
    """The value of Server-Timing: https://www.w3.org/TR/server-timing/."""
    return ", ".join(f"{part};dur={ns / 1e6:.3f}" for part, ns in times.items())
