"""One request and its answer on a stream of an HTTP/2 connection."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from kserve_lite.transports.timeouts import MIN_RATE, STREAM_BUFFER
from kserve_lite.wire.events import Buffer, Request, Reset
from kserve_lite.wire.http2 import ErrorCode

if TYPE_CHECKING:
    from kserve_lite.transports.http2 import Http2

# A peer that announces much and sends little costs so many times what it sent.
AHEAD = 16

_CANCEL = ErrorCode.CANCEL
_INTERNAL_ERROR = ErrorCode.INTERNAL_ERROR


class Inbox:
    """Bytes of a request that came and were not taken yet.

    One buffer, as large as was announced, though at most AHEAD times what came. Letting
    a bytearray grow by itself moved a 602 KB tensor up to 30 times, as others grew
    beside it.
    """

    __slots__ = ("_announced", "_buffer", "_end", "_start")

    def __init__(self, whole: Buffer | None) -> None:
        self._buffer: Buffer = bytearray() if whole is None else whole
        self._start = 0
        self._end = len(self._buffer)
        self._announced = 0

    def __len__(self) -> int:
        return self._end - self._start

    def announce(self, size: int) -> None:
        """Say how many bytes are to come, as far as is known."""
        self._announced = size

    def add(self, data: Buffer) -> None:
        end = self._end + len(data)
        if end > len(self._buffer):
            self._make_room(len(data))
            end = self._end + len(data)
        # Through a view: a bytearray's slice would make a copy of the data first.
        memoryview(self._buffer)[self._end : end] = data
        self._end = end

    def _make_room(self, size: int) -> None:
        """Have room for more, by moving what is left to the front or by growing."""
        held = len(self)
        needed = held + size
        room = len(self._buffer)
        if needed > room:
            # What was announced as soon as that may be; small steps until then, since
            # both buffers are held while one is moved.
            soon = needed <= self._announced <= AHEAD * needed
            room = self._announced if soon else 2 * needed
        fresh = bytearray(room)
        memoryview(fresh)[:held] = memoryview(self._buffer)[self._start : self._end]
        self._buffer, self._start, self._end = fresh, 0, held

    def take(self, size: int) -> Buffer:
        """Return the next bytes, at most `size`; the rest of many is not copied."""
        buffer, start = self._buffer, self._start
        end = min(start + size, self._end)
        if end < self._end or end - start <= STREAM_BUFFER:
            self._start = end
            return buffer[start:end]
        self._buffer, self._start, self._end = bytearray(), 0, 0
        if start or type(buffer) is not bytearray:
            return memoryview(buffer)[start:end]
        del buffer[end:]
        return buffer


class Http2Stream:
    """One request and its answer; what `exchange` and `call` read and write.

    dropped: the body is not kept, since the request is refused.
    lost: nobody can be answered any more.
    peer: the host of the peer.
    """

    http = "2"

    __slots__ = (
        "_came",
        "_connection",
        "_inbox",
        "_readable",
        "_since",
        "_watched",
        "_watched_at",
        "_writable",
        "dropped",
        "ended",
        "id",
        "is_call",
        "lost",
        "request",
        "send",
        "task",
    )

    def __init__(self, connection: Http2, request: Request, is_call: bool) -> None:
        self.id = request.stream_id
        self.request = request
        self.is_call = is_call
        self.ended = request.body is not None  # the request is complete
        self.dropped = False
        self.lost = False
        self.task: asyncio.Task[None] | None = None
        self._connection = connection
        self.send: Callable[..., None] = connection.send
        self._inbox = Inbox(request.body)
        self._readable: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None
        # Since when the rest of a body or message is waited for, and what came since.
        self._since = connection.now
        self._came = 0
        self._watched = 0
        self._watched_at = math.inf

    @property
    def peer(self) -> str:
        return self._connection.peer

    # --- the request -----------------------------------------------------------------

    def feed(self, data: Buffer) -> None:
        """Take bytes of the body."""
        if self.dropped:
            self._came += len(data)
            return
        if not self._inbox:
            self._inbox.announce(self._announced(data))
        self._inbox.add(data)
        self._came += len(data)
        self._wake_reader()

    def _announced(self, data: Buffer) -> int:
        """The bytes of the message or body that begins with `data`; 0: not known."""
        if self.is_call:
            return 5 + int.from_bytes(data[1:5], "big") if len(data) >= 5 else 0
        return int(self.request.headers.get("content-length", 0))

    def complete(self) -> None:
        """All of the request has come."""
        self.ended = True
        self._wake_reader()

    @property
    def size(self) -> int:
        """Bytes of the body that are held here, or were dropped."""
        return self._came if self.dropped else len(self._inbox)

    def taken_body(self) -> Buffer:
        """The whole body, which is held here no longer."""
        return self._inbox.take(len(self._inbox))

    def whole(self) -> Buffer | None:
        """The whole body, where all of it came at once."""
        return self.request.body

    async def read(self, size: int, *, may_wait: bool = False) -> Buffer:
        """Return `size` bytes of the body; fewer only at its end.

        may_wait: the caller may take its time to send the first of these bytes, as
            between two messages of a call.
        """
        while (held := len(self._inbox)) < size and not self.ended:
            if may_wait and not held:
                self._since = math.inf
            elif self._since == math.inf:
                self._since, self._came = self._connection.now, held
            self._readable = self._connection.future()
            await self._readable
        self._since = math.inf
        taken = self._inbox.take(size)
        if not self.ended:
            self._connection.acknowledge(self.id, len(taken))
        return taken

    def _wake_reader(self) -> None:
        if self._readable is not None:
            if not self._readable.done():
                self._readable.set_result(None)
            self._readable = None

    # --- the answer ------------------------------------------------------------------

    @property
    def stalled(self) -> bool:
        return self._connection.unsent(self.id) > STREAM_BUFFER

    async def drain(self) -> None:
        if not self.stalled:
            await asyncio.sleep(0)
            return
        self._writable = self._connection.future()
        self._connection.writers.add(self)
        await self._writable

    def abort(self) -> None:
        self._connection.send(Reset(self.id, _INTERNAL_ERROR))

    def is_gone(self) -> bool:
        return self.lost or self._connection.is_gone()

    def end(self, complete: bool) -> None:
        self.task = None
        if not complete and not self.lost:
            self._connection.send(Reset(self.id, _CANCEL))
        self._connection.answered(self)

    # --- called by the connection ----------------------------------------------------

    def cancel(self) -> None:
        """Cancel the handler, if it runs.

        Not at once: a task that is cancelled before its first step never runs at all,
        and so would not clear up.
        """
        if self.task is not None:
            asyncio.get_running_loop().call_soon(self.task.cancel)

    def wake_writer(self) -> bool:
        """Let the handler go on if enough of its answer has been written."""
        if self.stalled:
            return False
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None
        return True

    def is_late(self, now: float, body_timeout: float) -> bool:
        """Whether the rest of the request has been waited for too long."""
        allowed = body_timeout + self._came / MIN_RATE
        return not self.ended and self._since + allowed < now

    def reads_too_little(self, now: float, write_timeout: float) -> bool:
        """Whether the peer has read less than it must since the last look."""
        if not self._connection.unsent(self.id):
            self._watched_at = math.inf
            return False
        sent = self._connection.handed_out(self.id)
        if self._watched_at == math.inf:
            self._watched, self._watched_at = sent, now
        elif self._watched_at + write_timeout <= now:
            if sent - self._watched < MIN_RATE * write_timeout:
                return True
            self._watched, self._watched_at = sent, now
        return False
