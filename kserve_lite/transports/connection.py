"""What accepted connections of every HTTP version share: life, writing, deadlines.

Reading is driven by the event loop, answering by one task a request. Every way in which
a peer can hold a connection has a deadline; one lazy timer a connection checks them.
`Newcomer` reads the first bytes, which tell the version, and hands over to `Http1` or
`Http2`. A lost connection ends its own tasks and nothing else.
"""

from __future__ import annotations

import asyncio
import fcntl
import math
import termios
from contextvars import copy_context
from typing import TYPE_CHECKING, cast

from kserve_lite.transports.timeouts import CLOSING_EVERY, MIN_RATE

if TYPE_CHECKING:
    from kserve_lite.transports.listener import Listener


# What is written at once up to this size is joined into one buffer; beyond it the copy
# costs more than further buffers for the kernel.
JOIN_SIZE = 64 * 1024


class Connection(asyncio.BufferedProtocol):
    """A connection of `listener`, from accept to close.

    peer: its host; empty where that is not known.
    lost: nobody can be answered any more.
    stalled: the peer reads too little for more to be written.
    """

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        # What requests begin with: not what a handler has set, in whose task the next
        # pipelined request may be found.
        self._context = copy_context()
        self.peer = ""
        self.lost = False
        self.stalled = False
        self._eof = False
        self.beneath: asyncio.Transport | None = None  # TLS, what it is spoken over
        self._writable: asyncio.Future[None] | None = None
        self._deadline = math.inf
        self._write_deadline = math.inf
        self._unwritten = 0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = math.inf

    # --- called by the event loop -----------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast, since uvloop's is no subclass.
        self._transport = cast("asyncio.Transport", transport)
        name = transport.get_extra_info("peername")
        self.peer = str(name[0]) if isinstance(name, tuple) else ""

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._listener.scratch

    def eof_received(self) -> bool:
        self._eof = True
        return False

    def pause_writing(self) -> None:
        self.stalled = True
        self._watch_writing()

    def resume_writing(self) -> None:
        self.stalled = False
        self._write_deadline = math.inf
        if self._writable is not None:
            if not self._writable.done():
                self._writable.set_result(None)
            self._writable = None

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self._deadline = math.inf
        # Before the writers are woken: what is cancelled makes no further item.
        self.cancel()
        self.resume_writing()
        if self._timer is not None:
            self._timer.cancel()
        if not self.answering:
            self._listener.forget(self)

    # --- writing -----------------------------------------------------------------

    async def drain(self) -> None:
        if not self.stalled:
            await asyncio.sleep(0)
            return
        if self._writable is None:
            self._writable = self._loop.create_future()
        await self._writable

    # --- called by the listener --------------------------------------------------

    @property
    def answering(self) -> int:
        """How many requests are being answered."""
        return 0

    def cancel(self) -> None:
        """Cancel the handlers that answer."""

    def finish(self) -> None:
        """Close as soon as nothing is in flight, and say so to the peer."""
        self._close()

    def abort(self) -> None:
        """Close at once; what is not sent yet is dropped."""
        self._transport.abort()

    # --- deadlines -----------------------------------------------------------------

    def _set_deadline(self, due: float) -> None:
        """Have `_expire()` called at a time of the loop's clock.

        A timer that fires early finds nothing due and is set again: a kept connection
        thus makes no timer a request.
        """
        self._deadline = due
        if due < self._timer_due:
            self._set_timer()

    def _set_timer(self) -> None:
        due = min(self._deadline, self._write_deadline)
        if due < self._timer_due:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(due, self._on_timer)
            self._timer_due = due

    def _on_timer(self) -> None:
        self._timer = None
        self._timer_due = math.inf
        now = self._loop.time()
        if self._write_deadline <= now:
            self._watch_writing()
        if self._deadline <= now:
            self._deadline = math.inf
            self._expire(now)
        self._set_timer()

    def _expire(self, now: float) -> None:
        """What was waited for has not come in time."""
        self._close()

    def _unsent(self) -> int:
        """Bytes that are written and that the kernel has not taken yet."""
        unsent = self._transport.get_write_buffer_size()
        if self.beneath is not None:
            unsent += self.beneath.get_write_buffer_size()
        return unsent

    def _has_unread(self) -> bool:
        """Whether something has come that the event loop has not read yet."""
        sock = self._transport.get_extra_info("socket")
        if self.lost or sock is None or self._transport.is_closing():
            return False
        count = bytearray(4)
        try:
            fcntl.ioctl(sock.fileno(), termios.FIONREAD, count)
        except OSError:
            return False
        return any(count)

    def _watch_writing(self) -> None:
        """Cut a peer that reads too little of what was written since the last look."""
        if self.lost:
            return
        seconds = self._listener.limits.write_timeout
        left = self._unsent()
        looked_before = self._write_deadline < math.inf
        if looked_before and self._unwritten - left < MIN_RATE * seconds:
            self._transport.abort()
            return
        self._unwritten = left
        self._write_deadline = self._loop.time() + seconds
        self._set_timer()

    def _close(self) -> None:
        """Close when all that was written is sent, within the write timeout."""
        if self.lost or self._transport.is_closing():
            return
        self._deadline = math.inf
        unsent = self._unsent()
        if unsent and self._write_deadline == math.inf:
            self._watch_writing()
        if unsent and self.beneath is not None:
            # The time that TLS gives to closing would bound what is still to be sent,
            # and nobody tells when that is done.
            self._loop.call_later(CLOSING_EVERY, self._close)
        else:
            self._transport.close()
