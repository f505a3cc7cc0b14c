"""An HTTP/1.1 connection: requests are answered one after the other, in order.

The next request is looked at when the last one is answered. While a body of announced
length arrives, the event loop reads straight into the wire codec's buffer.
"""

from __future__ import annotations

import asyncio
import enum
import math
import mmap
import socket
from typing import TYPE_CHECKING

from kserve_lite.rest.replies import error_reply
from kserve_lite.transports.connection import JOIN_SIZE, Connection
from kserve_lite.transports.exchange import cut, exchange, send_refusal
from kserve_lite.transports.timeouts import (
    CLOSING_EVERY,
    HALF_CLOSED,
    LAST_REQUEST,
    LINGER,
    MIN_RATE,
)
from kserve_lite.wire.events import (
    Buffer,
    ContinueWanted,
    Data,
    EndOfMessage,
    Event,
    Headers,
    Outgoing,
    Refusal,
    Request,
    Response,
)
from kserve_lite.wire.http1 import CONTINUE, STREAM, Http1Connection

if TYPE_CHECKING:
    from kserve_lite.transports.listener import Listener


class _Phase(enum.IntEnum):
    """What the connection waits for, which says what its deadline means."""

    IDLE = 0  # the next request
    HEAD = 1  # the rest of a head
    BODY = 2  # the rest of a body
    ANSWER = 3  # its own answer: no deadline here
    HALF_CLOSED = 4  # its own answer to a peer that may be gone
    LINGER = 5  # the peer to close, after a refusal


# Globals, since reading a member off its class costs 0.12 us in Python 3.11.
_IDLE, _HEAD, _BODY, _ANSWER, _HALF_CLOSED, _LINGER = _Phase


# Linux's TCP writes nothing to where it is told to drop bytes (tcp(7), MSG_TRUNC), so
# that this takes no memory; elsewhere, what nobody reads.
_NOWHERE = mmap.mmap(-1, 4 * 1024 * 1024)


class Http1(Connection):
    """Speaks HTTP/1.1 once the first bytes have come."""

    http = "1.1"

    def __init__(self, listener: Listener) -> None:
        super().__init__(listener)
        self._wire = Http1Connection(listener.wire_limits, drops=listener.refuses)
        self._kept = self._wire.kept
        limits = listener.limits
        self._keep_alive = limits.timeout_keep_alive
        self._seconds = (  # what each phase may last, in the order of `_Phase`
            self._keep_alive,
            limits.head_timeout,
            limits.body_timeout,
            math.inf,
            HALF_CLOSED,
            LINGER,
        )
        self._phase = _IDLE
        self._direct = False
        self._request: Request | None = None
        self._body: Buffer = b""
        self._task: asyncio.Task[None] | None = None
        self._paused = False
        self._body_since = 0.0
        self._came = 0  # bytes, since the connection was last idle

    # --- called by the event loop -----------------------------------------------

    def begin(self, first: bytes) -> None:
        """Take the connection over with the first bytes that came."""
        self._wait(_IDLE)
        self._came = len(first)
        self._listener.received += len(first)
        self._take(self._wire.receive(first))

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._phase is _BODY:
            target = self._wire.body_buffer()
            self._direct = target is not None
            if target is not None:
                return target
        return self._listener.scratch

    def buffer_updated(self, nbytes: int) -> None:
        phase = self._phase
        self._listener.received += nbytes
        if phase is _IDLE:
            self._came = nbytes
            data = self._listener.scratch[:nbytes]
            request = self._wire.receive_again(data)
            if request is None:
                self._take(self._wire.receive(data))
            else:
                self._answer(request, request.body or b"")
        elif self._direct:
            self._direct = False
            self._came += nbytes
            self._take(self._wire.body_received(nbytes))
        elif phase is not _LINGER:
            self._came += nbytes
            self._take(self._wire.receive(self._listener.scratch[:nbytes]))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._request is not None:
            cut(self._request, self, self._listener.ended)
            self._request = None
        super().connection_lost(exc)

    def eof_received(self) -> bool:
        self._eof = True
        if self._phase is _ANSWER:
            self._wait(_HALF_CLOSED)
            # Under TLS the connection ends here, whatever is returned.
            return self._transport.can_write_eof()
        return False

    # --- the stream that an exchange writes to -------------------------------------

    def send(self, *events: Outgoing) -> None:
        transport = self._transport
        if self.lost or transport.is_closing():
            return
        if self._eof or (self._listener.draining and type(events[0]) is Response):
            self._wire.keep_alive = False
        parts = self._wire.send(*events)
        size = sum(map(len, parts))
        self._listener.sent += size
        if len(parts) == 1 and type(parts[0]) is bytes:
            transport.write(parts[0])
        elif size <= JOIN_SIZE:
            transport.write(b"".join(parts))
        else:
            transport.writelines(parts)

    def abort(self) -> None:
        self._wire.keep_alive = False
        self._transport.abort()

    def is_gone(self) -> bool:
        return self.lost or self._eof

    def end(self, complete: bool) -> None:
        self._task = None
        wire = self._wire
        if self.lost:
            self._listener.forget(self)
        # Since the head promised to stay, the peer may have said that it sends no more.
        elif not (complete and wire.keep_alive) or self._eof:
            wire.keep_alive = False
            self._close()
        else:
            self._phase = _IDLE
            self._deadline = due = self._loop.time() + self._keep_alive
            if due < self._timer_due:
                self._set_timer()
            if self._listener.draining:
                self.finish()
            events = wire.next_cycle()
            if events or self._paused or self._kept:
                self._take(events)
                self._read_on()

    # --- called by the listener --------------------------------------------------

    @property
    def answering(self) -> int:
        return int(self._task is not None)

    def cancel(self) -> None:
        if self._task is not None:
            # Not at once: a task that is cancelled before its first step never runs at
            # all, and so would not clear up.
            self._loop.call_soon(self._task.cancel)

    def finish(self) -> None:
        """Close when idle, but give a request time that is on its way.

        A client that has used the connection a moment ago does so again, and cannot
        know that it is about to be closed: not every request may be sent twice.
        """
        if self._phase is _IDLE:
            self._set_deadline(min(self._deadline, self._loop.time() + LAST_REQUEST))

    # --- requests ------------------------------------------------------------------

    def _read_on(self) -> None:
        """Read again once less than a head is kept: each read adds READ_SIZE to it."""
        if self._paused and not self._crowded:
            self._paused = False
            self._transport.resume_reading()

    @property
    def _crowded(self) -> bool:
        return len(self._kept) > self._wire.limits.max_head_size

    def _take(self, events: list[Event]) -> None:
        for event in events:
            if type(event) is Request:
                if event.body is not None:
                    self._answer(event, event.body)
                else:
                    self._request = event
            elif type(event) is Data:
                self._gather(event.data)
            elif type(event) is EndOfMessage and self._request is not None:
                request, body = self._request, self._body
                self._request, self._body = None, b""
                self._answer(request, None if self._wire.dropped else body)
            elif type(event) is ContinueWanted:
                self._transport.write(CONTINUE)
            elif type(event) is Refusal:
                self._refuse(event)
                return
        if self._phase is not _ANSWER:
            self._await_the_rest()
        elif self._kept and self._crowded and not self._paused:
            # More pipelined requests than one head: read on when they are wanted.
            self._paused = True
            self._transport.pause_reading()

    def _answer(self, request: Request, body: Buffer | None) -> None:
        self._phase = _ANSWER
        self._deadline = math.inf
        # A bare task, 5 us, not one of a task group, 40 us; the listener waits for it
        # all the same.
        listener = self._listener
        self._task = self._loop.create_task(
            exchange(listener.app, request, body, self, listener.ended),
            context=self._context.copy(),
        )

    def _gather(self, data: Buffer) -> None:
        """An announced body comes whole; a chunked one in pieces, within its limit."""
        if not self._body:
            self._body = data
            return
        if not isinstance(self._body, bytearray):
            self._body = bytearray(self._body)
        self._body += data

    def _await_the_rest(self) -> None:
        if self.lost:
            return
        if self._wire.inside_body:
            if self._phase is not _BODY:
                self._body_since = self._loop.time()
                self._wait(_BODY)
            if self._wire.dropped and self._wire.missing:
                self._drop()
        elif not self._wire.between_messages and self._phase is _IDLE:
            self._wait(_HEAD)

    def _drop(self) -> None:
        """Have the kernel forget what has come of a body that nobody is to read.

        Copied out of it first, 600 KB take a processor that is busy with other memory
        0.1 ms, and others what they had in its caches.
        """
        if self._listener.tls is not None or self._transport.is_closing():
            return
        fd = self._transport.get_extra_info("socket").fileno()
        own = socket.socket(socket.AF_INET, socket.SOCK_STREAM, fileno=fd)
        own.setblocking(False)  # It is, but there may be a default timeout.
        size = min(self._wire.missing, len(_NOWHERE))
        try:
            count = own.recv_into(_NOWHERE, size, socket.MSG_TRUNC)
        except OSError:
            return  # Nothing has come, or the event loop will see what is the matter.
        finally:
            own.detach()
        self._listener.received += count
        self._came += count
        if events := self._wire.body_received(count):
            self._take(events)

    def refuse(self, status: int, reason: str) -> None:
        """Answer with an error and give the connection up."""
        self._refuse(self._wire.refuse(status, reason))

    def _refuse(self, refusal: Refusal) -> None:
        request = self._request or Request(STREAM, "", "", Headers())
        self._request, self._body = None, b""
        if refusal.status is None:
            self._close()
            return
        retry = ((b"retry-after", b"1"),) if refusal.status == 503 else ()
        reply = error_reply(refusal.status, refusal.reason, retry)
        send_refusal(reply, request, self, self._listener.ended)
        self._wait(_LINGER)
        if self._transport.can_write_eof():
            self._transport.write_eof()

    # --- deadlines -----------------------------------------------------------------

    def _wait(self, phase: _Phase) -> None:
        """Enter a phase, with the deadline that it has."""
        self._phase = phase
        self._set_deadline(self._loop.time() + self._seconds[phase])

    def _expire(self, now: float) -> None:
        if self._phase is _IDLE:
            if self._has_unread():
                self._set_deadline(now + CLOSING_EVERY)
            else:
                self._close()
        elif self._phase is _HEAD:
            self.refuse(408, "The request's head did not arrive in time.")
        elif self._phase is _BODY:
            allowed = self._seconds[_BODY] + self._came / MIN_RATE
            if self._body_since + allowed > now:
                self._set_deadline(self._body_since + allowed)
            else:
                self.refuse(408, "The request's body did not arrive in time.")
        elif self._phase is _HALF_CLOSED:
            self.cancel()
        elif self._phase is _LINGER:
            self._transport.abort()
