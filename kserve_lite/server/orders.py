"""Loads and unloads that one worker was asked for, carried out by all.

A client's request reaches one process; that its model is loaded again, or is gone, must
hold for all. They are carried out one at a time, in the same order everywhere. A worker
that ends meanwhile has nothing to obey; one that begins meanwhile obeys when the
others have.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from kserve_lite.errors import Kind
from kserve_lite.server.child import Child
from kserve_lite.server.control import Fault, Message

# Those that wait for their turn; a further one is refused.
MOST = 16
# Seconds after which a client is answered although not all workers have obeyed yet.
TIMEOUT = 600.0


class Orders:
    """Has workers load and unload models.

    workers: those that are alive. unloaded: names of models that were unloaded and not
    loaded since, which workers that start later are not to load. loaded: names of those
    that were loaded and not unloaded since, which a program may have brought by then.
    """

    def __init__(self, workers: Callable[[], Iterable[Child]]) -> None:
        self._workers = workers
        self._queue: asyncio.Queue[tuple[Child, Message, asyncio.TimerHandle]]
        self._queue = asyncio.Queue(MOST)
        self._unloaded: set[str] = set()
        self._loaded: dict[str, None] = {}  # in their order

    @property
    def unloaded(self) -> tuple[str, ...]:
        return tuple(sorted(self._unloaded))

    @property
    def loaded(self) -> tuple[str, ...]:
        return tuple(self._loaded)

    def ask(self, asker: Child, message: Message) -> None:
        """Take what a worker was asked for, which is answered in its turn."""
        number, name = message["id"], message["name"]
        late = _not_ready(name, "Not all workers have obeyed in time.")
        loop = asyncio.get_running_loop()
        timer = loop.call_later(TIMEOUT, asker.answer, number, late)
        try:
            self._queue.put_nowait((asker, message, timer))
        except asyncio.QueueFull:
            timer.cancel()
            reason = "Too many models are being loaded and unloaded."
            asker.answer(number, [Kind.OVERLOADED.name, reason])

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            asker, message, timer = await self._queue.get()
            if timer.when() <= loop.time():
                continue  # whoever wanted it was told that it was not done
            # However long it takes: workers that come later are to know how it ended.
            fault = await self._carry_out(message["verb"], message["name"])
            timer.cancel()
            asker.answer(message["id"], fault)

    async def _carry_out(self, verb: str, name: str) -> Fault | None:
        members = self._members()
        if not all(worker.ready.is_set() or worker.waits for worker in members):
            # At the start: a worker that still loads the model could not obey.
            return _not_ready(name, "Not all workers have loaded their models yet.")
        if not members:
            return _not_ready(name, "The server stops, or starts again.")
        results: dict[Child, asyncio.Future[Fault | None]] = {}
        while members:
            results |= {worker: worker.order(verb, name) for worker in members}
            await asyncio.wait(results.values())
            # Those that were admitted meanwhile do not know of it.
            members = [worker for worker in self._members() if worker not in results]
        faults = [result.result() for result in results.values()]
        fault = next(filter(None, faults), None)
        if verb == "unload" and None in faults:
            # Where a load had failed before, there was nothing to unload.
            self._unloaded.add(name)
            self._loaded.pop(name, None)
            return None
        if verb == "load" and fault is None:
            self._unloaded.discard(name)
            self._loaded[name] = None
        return fault

    def _members(self) -> list[Child]:
        return [worker for worker in self._workers() if worker.takes_orders]


def _not_ready(name: str, detail: str) -> Fault:
    return [Kind.NOT_READY.name, f"Model with name {name} is not ready. {detail}"]
