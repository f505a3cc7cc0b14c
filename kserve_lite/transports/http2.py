"""An HTTP/2 connection: many requests at a time, each on a stream of its own.

What streams answer is gathered and written once a turn of the event loop. Streams of
the same peer share its connection and nothing else: one that fails, stalls or is too
slow is ended by itself.
"""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress
from typing import TYPE_CHECKING

from kserve_lite.rest.replies import error_reply
from kserve_lite.transports.connection import JOIN_SIZE, Connection
from kserve_lite.transports.exchange import call, cut, exchange, send_refusal
from kserve_lite.transports.http2_stream import Http2Stream
from kserve_lite.transports.timeouts import (
    GOAWAY_WAIT,
    HALF_CLOSED,
    LINGER,
    WATCH_EVERY,
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
    Reset,
    Response,
)
from kserve_lite.wire.http2 import ErrorCode, Http2Connection

if TYPE_CHECKING:
    from kserve_lite.transports.listener import Listener

_CANCEL = ErrorCode.CANCEL


class Http2(Connection):
    """Speaks HTTP/2 once the first bytes have told so."""

    def __init__(self, listener: Listener) -> None:
        super().__init__(listener)
        self._wire = Http2Connection(listener.wire_limits)
        self._streams: dict[int, Http2Stream] = {}
        self.writers: set[Http2Stream] = set()  # whose handlers wait in drain()
        # Answered streams that stay until the last of the answer is written.
        self._answered: list[Http2Stream] = []
        self._flush_is_due = False
        self._lingers = False
        self.now = self._loop.time()  # of the last read or look
        self._idle_since = self.now
        self._replenished = self.now
        self._frame_since = math.inf
        self._eof_at = math.inf
        self._goaway_at = math.inf
        limits = listener.limits
        self._watch_every = min(
            WATCH_EVERY,
            limits.head_timeout / 4,
            limits.body_timeout / 4,
            limits.write_timeout / 4,
        )

    # --- called by the event loop ----------------------------------------------------

    def begin(self, first: bytes) -> None:
        """Take the connection over with the first bytes that came."""
        self._set_deadline(self.now + self._watch_every)
        self._listener.received += len(first)
        self._receive(first)

    def buffer_updated(self, nbytes: int) -> None:
        self._listener.received += nbytes
        if not self._lingers:
            self._receive(self._listener.scratch[:nbytes])

    def eof_received(self) -> bool:
        self._eof = True
        for stream in list(self._streams.values()):
            if stream.task is None and not stream.ended:  # it never will be
                self._cut(stream)
                del self._streams[stream.id]
        if self._lingers or not self._streams:
            return False
        self._eof_at = self._loop.time() + HALF_CLOSED
        self._set_deadline(min(self._deadline, self._eof_at))
        return self._transport.can_write_eof()  # TLS closes, and would warn of True

    def connection_lost(self, exc: Exception | None) -> None:
        self._lingers = False
        for stream in list(self._streams.values()):
            if stream.task is None:
                self._cut(stream)
                del self._streams[stream.id]
        super().connection_lost(exc)

    def resume_writing(self) -> None:
        super().resume_writing()
        # Not now: asyncio is amid a write, and ends twice if that closes the transport.
        self._flush_soon()

    # --- what streams do -------------------------------------------------------------

    def future(self) -> asyncio.Future[None]:
        return self._loop.create_future()

    def send(self, *events: Outgoing) -> None:
        if not (self.lost or self._lingers):
            self._wire.send(*events)
            self._flush_soon()

    def acknowledge(self, stream_id: int, count: int) -> None:
        self._wire.acknowledge(stream_id, count)
        self._flush_soon()

    def unsent(self, stream_id: int) -> int:
        return 0 if self.lost or self._lingers else self._wire.unsent(stream_id)

    def handed_out(self, stream_id: int) -> int:
        return 0 if self.lost else self._wire.handed_out(stream_id)

    def is_gone(self) -> bool:
        return self.lost or self._lingers or self._eof

    def answered(self, stream: Http2Stream) -> None:
        """The handler of a stream has ended."""
        if self.lost:
            self._streams.pop(stream.id, None)
            if not self._streams:
                self._listener.forget(self)
        else:
            self._answered.append(stream)
            self._flush_soon()

    # --- called by the listener ------------------------------------------------------

    @property
    def answering(self) -> int:
        return sum(stream.task is not None for stream in self._streams.values())

    def cancel(self) -> None:
        for stream in self._streams.values():
            stream.lost = stream.lost or self.lost or self._lingers
            stream.cancel()

    def finish(self) -> None:
        if self._lingers:
            return
        self._wire.shutdown()
        self._goaway_at = self._loop.time() + GOAWAY_WAIT
        self._set_deadline(min(self._deadline, self._goaway_at))
        self._flush()

    # --- requests --------------------------------------------------------------------

    def _receive(self, data: Buffer) -> None:
        self.now = now = self._loop.time()
        if now - self._replenished >= 1.0:
            self._replenished = now
            self._wire.replenish()
        events = self._wire.receive(data)
        if not self._wire.mid_frame or events:
            self._frame_since = math.inf
        elif self._frame_since == math.inf:
            self._frame_since = now
        self._take(events)
        if self._deadline > now + self._watch_every and not self._lingers:
            self._set_deadline(now + self._watch_every)  # it was idle
        self._flush_soon()

    def _take(self, events: list[Event]) -> None:
        streams = self._streams
        for event in events:
            if type(event) is Request:
                self._open(event)
                continue
            if type(event) is Refusal:
                self._refuse(event)
                continue
            stream = streams.get(event.stream_id)
            if stream is None or (stream.ended and type(event) is not Reset):
                continue
            if type(event) is Data:
                stream.feed(event.data)
                if not stream.is_call:
                    self._fits(stream)
            elif type(event) is EndOfMessage:
                stream.complete()
                if not stream.is_call:
                    self._answer(stream)
            elif type(event) is Reset:
                stream.lost = True
                self._forget(stream)
            elif type(event) is ContinueWanted:
                self._wire.send(Response(event.stream_id, 100, ()))

    def _open(self, request: Request) -> None:
        rpc = self._listener.rpc
        kind = request.headers.get("content-type", "")
        is_call = rpc is not None and kind.startswith("application/grpc")
        stream = Http2Stream(self, request, is_call)
        self._streams[stream.id] = stream
        self._idle_since = self.now
        if rpc is not None and is_call:
            stream.task = self._loop.create_task(
                call(rpc, request, stream, self._listener.ended),
                context=self._context.copy(),
            )
        elif stream.ended and self._fits(stream):
            self._answer(stream)
        elif not stream.ended:
            # Answered at its end all the same: of curl and httpx, which still send, an
            # answer before, and the reset after it, is not taken (RFC 9113 8.1).
            stream.dropped = self._listener.refuses(request)

    def _answer(self, stream: Http2Stream) -> None:
        listener, request = self._listener, stream.request
        body = None if stream.dropped else stream.taken_body()
        stream.task = self._loop.create_task(
            exchange(listener.app, request, body, stream, listener.ended),
            context=self._context.copy(),
        )

    def _fits(self, stream: Http2Stream) -> bool:
        """Refuse a body that is too large, unless the wire did already."""
        limit = self._wire.limits.max_body_size
        if stream.size <= limit:
            return True
        reason = f"The body may have {limit} bytes (max_body_size); more came."
        self._refuse(Refusal(stream.id, 413, reason))
        return False

    def _refuse(self, refusal: Refusal) -> None:
        if refusal.status is None:
            self._linger()
            return
        stream = self._streams.get(refusal.stream_id)
        if stream is None:  # refused before there was a request to tell of
            request = Request(refusal.stream_id, "", "", Headers())
            stream = self._streams[request.stream_id] = Http2Stream(
                self, request, is_call=False
            )
        reply = error_reply(refusal.status, refusal.reason)
        stream.taken_body()
        stream.ended = True
        send_refusal(reply, stream.request, stream, self._listener.ended)
        self.answered(stream)

    def _linger(self) -> None:
        """Say nothing more, and read until the peer has heard what was said.

        Closing at once would reset the connection as soon as the peer's next frame
        comes, a WINDOW_UPDATE say, and could destroy what it has not read yet.
        """
        transport = self._transport
        if self.lost or self._lingers or transport.is_closing():
            return
        if not self.stalled or self._wire.closed:
            transport.writelines(self._wire.data_to_send())
        self._lingers = True
        self.cancel()
        self._set_deadline(self._loop.time() + LINGER)
        if self._write_deadline == math.inf and self._unsent():
            self._watch_writing()
        if transport.can_write_eof():
            with suppress(OSError):  # reset already, which the loop has yet to see
                transport.write_eof()

    def _close(self) -> None:
        now = self._loop.time()
        if self._eof or (self._listener.draining and self._idle_since + LINGER < now):
            super()._close()  # nothing comes that matters, and a stop need not wait
        else:
            self._linger()

    def _forget(self, stream: Http2Stream) -> None:
        """Nobody waits for the answer of a stream any more."""
        if stream.task is None:
            self._cut(stream)
            self._streams.pop(stream.id, None)
        else:
            stream.cancel()

    def _cut(self, stream: Http2Stream) -> None:
        """Tell of a request that ends before all of it has come, or was refused."""
        if stream not in self._answered:
            cut(stream.request, stream, self._listener.ended)

    # --- writing ---------------------------------------------------------------------

    def _flush_soon(self) -> None:
        """Write once a turn: after all that this turn's reads have set going."""
        if not self._flush_is_due:
            self._flush_is_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_is_due = False
        transport = self._transport
        while not (
            self.stalled or self.lost or self._lingers or transport.is_closing()
        ):
            parts = self._wire.data_to_send()
            if not parts:
                break
            size = sum(map(len, parts))
            self._listener.sent += size
            if size <= JOIN_SIZE:
                transport.write(b"".join(parts))
            else:
                transport.writelines(parts)
        if self._answered:
            self._clear_answered()
        if self.writers:
            self.writers = {one for one in self.writers if not one.wake_writer()}
        left = self._eof and not self._streams  # and what it asked for is written
        if (self._wire.closed or left) and not self.stalled:
            self._close()

    def _clear_answered(self) -> None:
        """Let go of streams whose answer is written."""
        left = []
        for stream in self._answered:
            if self._wire.unsent(stream.id):
                left.append(stream)
            else:
                self._streams.pop(stream.id, None)
        self._answered = left
        if not self._streams:
            self._idle_since = self.now

    # --- deadlines -------------------------------------------------------------------

    def _expire(self, now: float) -> None:
        """Look after all that a peer may be slow with, often while it is busy."""
        limits = self._listener.limits
        self.now = now
        if self._lingers:
            if self._unsent():
                self._set_deadline(now + LINGER)
            else:
                super()._close()
            return
        if self._goaway_at <= now:
            self._goaway_at = math.inf
            self._wire.shutdown()
        if self._eof_at <= now:
            self._eof_at = math.inf
            self.cancel()
        if self._frame_since + limits.head_timeout <= now:
            self._leave()
            return
        self._end_slow_streams(now)
        self._flush()
        if self.lost or self._lingers:
            return
        idle_until = self._idle_since + limits.timeout_keep_alive
        if not self._streams and self._frame_since == math.inf:
            if idle_until <= now:
                self._leave()
            else:
                self._set_deadline(min(idle_until, self._goaway_at))
        else:
            self._set_deadline(now + self._watch_every)

    def _end_slow_streams(self, now: float) -> None:
        limits = self._listener.limits
        if self._streams:
            self._idle_since = now
        for stream in list(self._streams.values()):
            late = stream.is_late(now, limits.body_timeout)
            if late and not stream.is_call:
                reason = "The request's body did not arrive in time."
                self._refuse(Refusal(stream.id, 408, reason))
            elif late or stream.reads_too_little(now, limits.write_timeout):
                self._wire.send(Reset(stream.id, _CANCEL))
                stream.lost = True
                self._forget(stream)

    def _leave(self) -> None:
        """Say goodbye and close; streams that the peer has just opened it may retry."""
        self._wire.shutdown()
        self._wire.shutdown()
        self._flush()
        self._close()
