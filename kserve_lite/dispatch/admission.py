"""How much of a model may run and wait at a time; beyond it requests are refused.

Refused at the door, before a body is decoded: see `DataPlane.find`. Health, metadata
and statistics go by no door.
"""

from __future__ import annotations

import asyncio
from types import TracebackType

from kserve_lite.dispatch.offload import Held
from kserve_lite.errors import Overloaded


def too_much(what: str) -> Overloaded:
    """What a request is told that cannot be taken in. what: too much of what."""
    return Overloaded(f"The model is overloaded, {what}: try again later.")


class Gate:
    """Lets so many through at a time; the others wait in order.

    limit: how many; max_queue_size: how many may wait, beyond which entering raises
    Overloaded.
    """

    def __init__(self, limit: int, max_queue_size: int) -> None:
        self._semaphore = asyncio.Semaphore(limit)
        self._max_queue_size = max_queue_size
        self.waiting = 0

    async def enter(self) -> None:
        if not self._semaphore.locked():
            await self._semaphore.acquire()
            return
        if self.waiting >= self._max_queue_size:
            raise too_much("too many requests wait for their turn")
        self.waiting += 1
        try:
            await self._semaphore.acquire()
        finally:
            self.waiting -= 1

    def leave(self) -> None:
        self._semaphore.release()


class Turn:
    """One call's place behind a gate, from entry to exit.

    It is also what the call is `held` by: where its caller is cancelled and its thread
    goes on, the place is taken until that has ended.
    """

    __slots__ = ("_gate", "_held", "_kept")

    def __init__(self, gate: Gate | None, held: Held) -> None:
        self._gate = gate
        self._held = held
        self._kept = False

    async def __aenter__(self) -> Turn:
        if self._gate is not None:
            await self._gate.enter()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._kept:
            self._leave()

    def begin(self) -> None:
        self._kept = True
        self._held.begin()

    def end(self) -> None:
        self._leave()
        self._held.end()

    def _leave(self) -> None:
        if self._gate is not None:
            self._gate.leave()
