"""A replica: one copy of a model, in an actor of Ray Serve.

It is a whole data plane, so that a request is served here as a server would serve it:
threads, batching, deadlines, statuses. What it is asked, and what it tells, is in
`outcomes.py`; where the requests come from, it does not know.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from time import monotonic
from typing import Any

from kserve_lite.dispatch.dataplane import DataPlane
from kserve_lite.dispatch.repository import Repository
from kserve_lite.dispatch.settings import DispatchSettings
from kserve_lite.dispatch.statistics import Batches, Spent, Times
from kserve_lite.errors import (
    InferenceFault,
    ModelNotReady,
    StartupError,
    Unsupported,
)
from kserve_lite.handlers import Stage
from kserve_lite.messages import Context, JsonAnswer, RawAnswer, StreamAnswer
from kserve_lite.model import Model, Phase
from kserve_lite.parallel.outcomes import LOAD_FAILED, Asked, Outcome, fault_of
from kserve_lite.registry import Registry

# Items of an iterator that a handler returned, which cannot be sent one by one.
MAX_ITEMS = 4096
# Seconds between two questions to a model that has been loaded and is not ready yet.
NOT_READY = 0.5


class Replica:
    """Serves one model. Made in its actor; ready when the model is loaded.

    make: gives the model. name, model_dir: what the server calls it, and where its
    files are.
    """

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self,
        make: Callable[[], Model],
        name: str,
        model_dir: str,
        settings: DispatchSettings,
    ) -> None:
        try:
            self._model = model = make()
            if model.phase is Phase.DEFINED:
                model.freeze()
            model.name, model.model_dir = name, Path(model_dir)
            registry = Registry()
            registry.add(model)
            self._dataplane = DataPlane(registry, settings)
            self._told: Batches = {}
            self._repository = Repository(self._dataplane)
            await self._repository.load(model)
        except Exception as error:
            raise StartupError(
                f"{LOAD_FAILED}{type(error).__name__}: {error}"
            ) from error
        # Ray Serve gives up a replica whose first check fails; a server waits for it.
        while not await self._dataplane.model_ready(model):  # noqa: ASYNC110 - asks
            await asyncio.sleep(NOT_READY)

    async def infer(self, verb: Stage, payload: Any, asked: Asked) -> Outcome:
        """Answer a request whole."""
        gone = asyncio.Event()  # for handlers in threads, which nobody can cancel
        context = self._context(asked, gone)
        times: Times = {}
        try:
            answer = await self._infer(verb, payload, context, times)
            if not isinstance(answer, StreamAnswer):
                outcome = Outcome(_value(answer), context.response_headers)
            else:
                async with aclosing(answer.items) as items:
                    values = [_value(item) async for item in _some(items)]
                outcome = Outcome(values, context.response_headers, items=True)
        except InferenceFault as fault:
            outcome = Outcome(fault=fault_of(fault))
        except asyncio.CancelledError:
            gone.set()
            raise
        return outcome._replace(spent=self._spent(times))

    async def stream(
        self, verb: Stage, payload: Any, asked: Asked
    ) -> AsyncGenerator[Any, None]:
        """Answer item by item.

        An `Outcome` without a value goes before the first item, another one, or that of
        a failure, after the last.
        """
        gone = asyncio.Event()
        context = self._context(asked, gone)
        times: Times = {}
        begun = False
        try:
            answer = await self._infer(verb, payload, context, times)
            if not isinstance(answer, StreamAnswer):
                yield Outcome(headers=context.response_headers)
                yield _value(answer)
            else:
                async with aclosing(answer.items) as items:
                    async for item in items:
                        if not begun:
                            begun = True
                            yield Outcome(headers=context.response_headers)
                        yield _value(item)
                if not begun:
                    yield Outcome(headers=context.response_headers)
            yield Outcome(spent=self._spent(times))
        except InferenceFault as fault:
            yield Outcome(fault=fault_of(fault), spent=self._spent(times))
        except (asyncio.CancelledError, GeneratorExit):
            gone.set()
            raise

    async def check_health(self) -> None:
        """For Ray Serve, which replaces a replica that raises here."""
        if not await self._dataplane.model_ready(self._model):
            raise ModelNotReady(self._model.name)

    async def __del__(self) -> None:
        """Ray Serve awaits it when what was in flight has ended."""
        await self._repository.unload(self._model)
        self._dataplane.close()

    def _context(self, asked: Asked, gone: asyncio.Event) -> Context:
        deadline = None if asked.remaining is None else monotonic() + asked.remaining
        model = self._model
        return Context(
            model.name,
            model.version,
            asked.protocol,
            asked.headers,
            deadline,
            asked.record(gone.is_set),
        )

    def _spent(self, times: Times) -> Spent:
        """A request's times, and the batches that no outcome has told of yet."""
        told, new = self._told, {}
        self._told = now = self._dataplane.statistics_of(self._model).batches()
        for rows, (calls, ns) in now.items():
            told_calls, told_ns = told.get(rows, (0, 0))
            if calls > told_calls:
                new[rows] = calls - told_calls, ns - told_ns
        return Spent(times, new)

    async def _infer(
        self, verb: Stage, payload: Any, context: Context, times: Times
    ) -> Any:
        dataplane, model = self._dataplane, self._model
        dataplane.find(model.name, model.version)  # admission, as at a server's door
        if model.is_checked:
            await dataplane.check(model)
        plan = model.plan(verb)
        return await dataplane.infer(model, plan, payload, context, times)


def _value(answer: Any) -> Any:
    """An answer as a handler would have returned it."""
    if isinstance(answer, JsonAnswer):
        return answer.value
    return answer.data if isinstance(answer, RawAnswer) else answer


async def _some(items: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    count = 0
    async for item in items:
        count += 1
        if count > MAX_ITEMS:
            raise Unsupported(
                f"The model answers with more than {MAX_ITEMS} items: make its handler "
                "a generator, so that replicas can stream them."
            )
        yield item
