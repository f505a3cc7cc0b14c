"""How much of a model may run and wait at a time; beyond it requests are refused.

Refused at the door, before a body is decoded: see `DataPlane.find`. Health, metadata
and statistics go by no door.
"""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager, nullcontext
from types import TracebackType

from kserve_lite.errors import Overloaded

# The gate of models that any number may use at a time.
NO_GATE: AbstractAsyncContextManager[None] = nullcontext()


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

    async def __aenter__(self) -> None:
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

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._semaphore.release()
