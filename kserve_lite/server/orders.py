"""Loads and unloads that one worker was asked for, carried out by all.

A client's request reaches one process; that its model is loaded again, or is gone, must
hold for all. They are carried out one at a time, in the same order everywhere. A worker
that ends meanwhile has nothing to obey, and its successor begins with what holds then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import anyio

from kserve_lite.errors import Kind
from kserve_lite.server.child import Child
from kserve_lite.server.control import Fault, Message

# Those that wait for their turn; a further one is refused.
MOST = 16
# Seconds after which one is answered although not all workers have obeyed.
TIMEOUT = 600.0


class Orders:
    """Has workers load and unload models.

    workers: those that are alive. unloaded: names of models that were unloaded and not
    loaded since, which workers that start later are not to load.
    """

    def __init__(self, workers: Callable[[], Iterable[Child]]) -> None:
        self._workers = workers
        self._queue: asyncio.Queue[tuple[Child, Message]] = asyncio.Queue(MOST)
        self._unloaded: set[str] = set()

    @property
    def unloaded(self) -> tuple[str, ...]:
        return tuple(sorted(self._unloaded))

    def ask(self, asker: Child, message: Message) -> None:
        """Take what a worker was asked for, which is answered in its turn."""
        try:
            self._queue.put_nowait((asker, message))
        except asyncio.QueueFull:
            reason = "Too many models are being loaded and unloaded."
            asker.answer(message["id"], [Kind.OVERLOADED.name, reason])

    async def run(self) -> None:
        while True:
            asker, message = await self._queue.get()
            fault = await self._carry_out(message["verb"], message["name"])
            asker.answer(message["id"], fault)

    async def _carry_out(self, verb: str, name: str) -> Fault | None:
        members = [worker for worker in self._workers() if worker.takes_orders]
        if not all(worker.ready.is_set() or worker.waits for worker in members):
            # At the start: a worker that still loads the model could not obey.
            return _not_ready(name, "Not all workers have loaded their models yet.")
        if not members:
            return _not_ready(name, "The server stops, or starts again.")
        results = [worker.order(verb, name) for worker in members]
        with anyio.move_on_after(TIMEOUT) as waiting:
            await asyncio.wait(results)
        if waiting.cancelled_caught:
            return _not_ready(name, "Not all workers have obeyed in time.")
        faults = [result.result() for result in results]
        fault = next(filter(None, faults), None)
        if verb == "unload" and None in faults:
            # Where a load had failed before, there was nothing to unload.
            self._unloaded.add(name)
            return None
        if verb == "load" and fault is None:
            self._unloaded.discard(name)
        return fault


def _not_ready(name: str, detail: str) -> Fault:
    return [Kind.NOT_READY.name, f"Model with name {name} is not ready. {detail}"]
