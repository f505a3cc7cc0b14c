"""One accepted connection: an asyncio protocol around the wire codec.

Reading is driven by the event loop, answering by one task a request. The next request
is looked at when the last one is answered, so that pipelined ones are answered in
order. Every way in which a peer can hold the connection has a deadline; one lazy timer
a connection checks them. A lost connection ends its own task and nothing else.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import math
import time
from typing import TYPE_CHECKING, cast

from kserve_lite.rest.replies import error_reply
from kserve_lite.transports.exchange import exchange, sent_headers
from kserve_lite.transports.timeouts import HALF_CLOSED, LINGER, MIN_RATE
from kserve_lite.wire.events import (
    Buffer,
    ContinueWanted,
    Data,
    EndOfMessage,
    Event,
    Outgoing,
    Refusal,
    Request,
    Response,
)
from kserve_lite.wire.http1 import CONTINUE, STREAM, Http1Connection

if TYPE_CHECKING:
    from kserve_lite.transports.listener import Listener

log = logging.getLogger("kserve_lite")

# A body up to this size is joined with its head into one write; beyond it the copy
# costs more than a second buffer for the kernel.
JOIN_SIZE = 64 * 1024


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


class Connection(asyncio.BufferedProtocol):
    """A connection of `listener`, from accept to close."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._wire = Http1Connection(listener.wire_limits)
        limits = listener.limits
        self._seconds = (  # what each phase may last, in the order of `_Phase`
            limits.timeout_keep_alive,
            limits.head_timeout,
            limits.body_timeout,
            math.inf,
            HALF_CLOSED,
            LINGER,
        )
        self._transport: asyncio.Transport
        self._direct = False
        self._request: Request | None = None
        self._body: Buffer = b""
        self._task: asyncio.Task[None] | None = None
        self._begun = False
        self._writable: asyncio.Future[None] | None = None
        self._paused = False
        self._gone = False
        self._eof = False
        self._phase = _IDLE
        self._deadline = math.inf
        self._body_since = 0.0
        self._came = 0  # bytes, since the connection was last idle
        self._write_deadline = math.inf
        self._unwritten = 0
        self._timer: asyncio.TimerHandle | None = None

    # --- called by the event loop -----------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast, since uvloop's is no subclass.
        self._transport = cast("asyncio.Transport", transport)
        if not self._listener.admit(self):
            if self._listener.crowded or self._listener.draining:
                self._transport.abort()
                return
            self._refuse(self._wire.refuse(503, "The server has too many connections."))
            return
        self._wait(_IDLE)

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._phase is _BODY:
            target = self._wire.body_buffer()
            self._direct = target is not None
            if target is not None:
                return target
        return self._listener.scratch

    def buffer_updated(self, nbytes: int) -> None:
        if self._phase is _LINGER:
            return
        self._came += nbytes
        if self._direct:
            self._direct = False
            self._take(self._wire.body_received(nbytes))
        else:
            self._take(self._wire.receive(self._listener.scratch[:nbytes]))
        if self._phase is _ANSWER and not self._paused and self._crowded:
            # More pipelined requests than one head: read on when they are wanted.
            self._paused = True
            self._transport.pause_reading()

    @property
    def _crowded(self) -> bool:
        return self._wire.surplus > self._wire.limits.max_head_size

    def eof_received(self) -> bool:
        self._eof = True
        if self._phase is _ANSWER:
            self._wait(_HALF_CLOSED)
            return True
        return False

    def pause_writing(self) -> None:
        if self._writable is None:
            self._writable = self._loop.create_future()
        self._watch_writing()

    def resume_writing(self) -> None:
        self._write_deadline = math.inf
        if self._writable is not None:
            if not self._writable.done():
                self._writable.set_result(None)
            self._writable = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone = True
        self._deadline = self._write_deadline = math.inf
        if self._timer is not None:
            self._timer.cancel()
        if self._task is None:
            self._listener.forget(self)
        else:
            # Before the writer is woken: what is cancelled makes no further item.
            self.cancel()
        self.resume_writing()

    # --- the stream that one exchange writes to ----------------------------------

    def send(self, *events: Outgoing) -> None:
        if self._gone or self._transport.is_closing():
            return
        if self._listener.draining or self._eof:
            self._wire.keep_alive = False
        parts = self._wire.send(*events)
        if parts and len(parts[-1]) <= JOIN_SIZE:  # a whole answer's body comes last
            self._transport.write(b"".join(parts))
        else:
            self._transport.writelines(parts)

    @property
    def stalled(self) -> bool:
        return self._writable is not None

    async def drain(self) -> None:
        if self._writable is not None:
            await self._writable
        else:
            await asyncio.sleep(0)

    def abort(self) -> None:
        self._wire.keep_alive = False
        self._transport.abort()

    def is_gone(self) -> bool:
        return self._gone or self._eof

    # --- called by the listener --------------------------------------------------

    @property
    def answering(self) -> bool:
        """Whether a request is being answered."""
        return self._phase in (_ANSWER, _HALF_CLOSED)

    def cancel(self) -> None:
        """Cancel the handler that answers, if any.

        A task that is cancelled before its first step never runs at all, and so would
        not clear up: it sees for itself that the peer is gone.
        """
        if self._task is not None and self._begun:
            self._task.cancel()

    def finish(self) -> None:
        """Close as soon as nothing is in flight; answers say `connection: close`."""
        if self._phase is _IDLE:
            self._close()

    # --- requests ------------------------------------------------------------------

    async def _answer(self, request: Request | None, body: Buffer) -> None:
        """Answer one request, in a task and so with context variables of its own."""
        self._begun = True
        try:
            if request is not None and not self._gone:
                await exchange(self._listener.app, request, body, self)
        except asyncio.CancelledError:
            # By this connection: its peer is gone or may be, or the server stops. What
            # is written already is still sent; a stream ends without its end.
            self._wire.keep_alive = False
        except KeyboardInterrupt:
            raise
        except BaseException:  # the boundary: one connection, never its siblings
            log.exception("a connection failed: a bug in kserve-lite")
            self._transport.abort()
        self._task = None
        if self._gone:
            self._listener.forget(self)
        # Since the head promised to stay, a stop may have begun or the peer may have
        # said that it sends no more.
        elif self._wire.keep_alive and not (self._listener.draining or self._eof):
            self._await_next()
        else:
            self._close()

    def _await_next(self) -> None:
        self._came = 0
        self._wait(_IDLE)
        events = self._wire.next_cycle()
        if events or self._wire.surplus or self._paused:
            self._take(events)
            self._read_on()

    def _read_on(self) -> None:
        """Read again once less than a head is kept: each read adds READ_SIZE to it."""
        if self._paused and self._wire.surplus <= self._wire.limits.max_head_size:
            self._paused = False
            self._transport.resume_reading()

    def _take(self, events: list[Event]) -> None:
        for event in events:
            if type(event) is Request:
                self._request = event
            elif type(event) is Data:
                self._gather(event.data)
            elif type(event) is EndOfMessage:
                self._phase = _ANSWER
                self._deadline = math.inf
                request, body = self._request, self._body
                self._request, self._body = None, b""
                self._begun = False
                # A bare task, 5 us, not one of a task group, 40 us; the listener
                # waits for it all the same.
                self._task = self._loop.create_task(self._answer(request, body))
            elif type(event) is ContinueWanted:
                self._transport.write(CONTINUE)
            elif type(event) is Refusal:
                self._refuse(event)
                return
        if self._phase is not _ANSWER and not self._gone:
            self._await_the_rest()

    def _gather(self, data: Buffer) -> None:
        """An announced body comes whole; a chunked one in pieces, within its limit."""
        if not self._body:
            self._body = data
            return
        if not isinstance(self._body, bytearray):
            self._body = bytearray(self._body)
        self._body += data

    def _await_the_rest(self) -> None:
        if self._wire.inside_body:
            if self._phase is not _BODY:
                self._body_since = self._loop.time()
                self._wait(_BODY)
        elif not self._wire.between_messages and self._phase is _IDLE:
            self._wait(_HEAD)

    def _refuse(self, refusal: Refusal) -> None:
        self._request, self._body = None, b""
        if refusal.status is None:
            self._close()
            return
        retry = ((b"retry-after", b"1"),) if refusal.status == 503 else ()
        reply = error_reply(refusal.status, refusal.reason, retry)
        headers = sent_headers(int(time.time()), reply.headers)
        body = cast("bytes", reply.body)
        self.send(Response(STREAM, reply.status, headers, body))
        self._wait(_LINGER)
        if self._transport.can_write_eof():
            self._transport.write_eof()

    # --- deadlines -----------------------------------------------------------------

    def _wait(self, phase: _Phase) -> None:
        """Enter a phase, with the deadline that it has."""
        self._phase = phase
        self._deadline = self._loop.time() + self._seconds[phase]
        self._set_timer()

    def _set_timer(self) -> None:
        """Have the timer fire no later than the nearest deadline.

        A timer that fires early finds nothing due and is set again: a kept connection
        thus makes no timer a request.
        """
        due = min(self._deadline, self._write_deadline)
        if self._timer is not None:
            if self._timer.when() <= due:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(due, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        now = self._loop.time()
        if self._write_deadline <= now:
            self._watch_writing()
        if self._deadline <= now:
            self._expire(now)
        if min(self._deadline, self._write_deadline) < math.inf:
            self._set_timer()

    def _expire(self, now: float) -> None:
        limits = self._listener.limits
        self._deadline = math.inf
        if self._phase is _IDLE:
            self._close()
        elif self._phase is _HEAD:
            self._refuse(
                self._wire.refuse(408, "The request's head did not arrive in time.")
            )
        elif self._phase is _BODY:
            allowed = limits.body_timeout + self._came / MIN_RATE
            if self._body_since + allowed > now:
                self._deadline = self._body_since + allowed
            else:
                self._refuse(
                    self._wire.refuse(408, "The request's body did not arrive in time.")
                )
        elif self._phase is _HALF_CLOSED:
            self.cancel()
        elif self._phase is _LINGER:
            self._transport.abort()

    def _watch_writing(self) -> None:
        """Cut a peer that reads too little of what was written since the last look."""
        if self._gone:
            return
        seconds = self._listener.limits.write_timeout
        left = self._transport.get_write_buffer_size()
        looked_before = self._write_deadline < math.inf
        if looked_before and self._unwritten - left < MIN_RATE * seconds:
            self._transport.abort()
            return
        self._unwritten = left
        self._write_deadline = self._loop.time() + seconds
        self._set_timer()

    def _close(self) -> None:
        """Close when all that was written is sent, within the write timeout."""
        if self._gone or self._transport.is_closing():
            return
        self._deadline = math.inf
        self._transport.close()
        if self._write_deadline == math.inf and self._transport.get_write_buffer_size():
            self._watch_writing()
