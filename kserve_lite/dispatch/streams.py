"""Answers that come in pieces: iterators of either kind, and what is in flight of them.

A plain iterator is advanced in threads. A stream may be left at any time, also before
its first item: then whoever made it cleans up, and the request is counted as ended.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

from kserve_lite.dispatch.admission import Turn
from kserve_lite.dispatch.offload import Offload
from kserve_lite.dispatch.running import Running

log = logging.getLogger("kserve_lite")


@lru_cache(maxsize=256)  # a hasattr() that fails costs 0.5 us
def streams(kind: type) -> bool:
    """Whether results of a type are iterators of either kind."""
    return hasattr(kind, "__anext__") or hasattr(kind, "__next__")


async def items_of(
    stream: AsyncIterator[Any] | Iterator[Any], running: Running, offload: Offload
) -> AsyncGenerator[Any, None]:
    """The items of any iterator; a plain one is advanced in a thread."""
    async with Turn(running.gate, running) as turn:
        if isinstance(stream, AsyncIterator):
            try:
                async for item in stream:
                    yield item
            finally:
                if isinstance(stream, AsyncGenerator):
                    await stream.aclose()
            return
        plain = ThreadStream(stream)
        try:
            while (item := await offload.run(plain.advance, None, turn)) is not plain:
                yield item
        finally:
            if plain.leave():
                offload.start(plain.close)


class InFlight(AsyncGenerator[Any, None]):
    """The items of a stream that is in flight until it ends or is closed.

    within: in which each item is made, within the request's deadline. ended: is told
    once, and whether the stream came to its end.
    No generator function, whose end is not told if it was never begun.
    """

    def __init__(
        self,
        items: AsyncGenerator[Any, None],
        within: Callable[[], AbstractContextManager[None]],
        ended: Callable[[bool], None],
    ) -> None:
        self._items = items
        self._within = within
        self._ended: Callable[[bool], None] | None = ended

    async def asend(self, value: Any) -> Any:
        try:
            with self._within():
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
        ended, self._ended = self._ended, None
        if ended is not None:
            ended(complete)


class ThreadStream:
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
