"""One HTTP/2 connection, server side, bytes to events and back (RFC 9113).

Here stands what the owner of the socket does with it. Below, each in its own module:
`http2_reading` (frames, bodies and header blocks as they come), `http2_control` (frames
that carry no part of a message), `http2_output` (what waits to be written),
`http2_streams` (streams, and the windows that we open), `http2_guards` (budgets against
floods), `hpack_blocks` and `hpack_decoder` (header blocks), `frames` (numbers and
layouts).

There is no clock here, so the owner says when a second has passed: `replenish()`.
"""

from __future__ import annotations

from kserve_lite.wire.events import Buffer, Data, Outgoing, Reset, Response, Trailers
from kserve_lite.wire.frames import PREFACE, ErrorCode
from kserve_lite.wire.http2_reading import FrameReader
from kserve_lite.wire.limits import CONTROL_BUDGET

__all__ = ["PREFACE", "ErrorCode", "Http2Connection"]


class Http2Connection(FrameReader):
    """The server's side of one HTTP/2 connection.

    The owner gives bytes to `receive()`, answers to `send()`, and writes what
    `data_to_send()` returns after either, but only while its transport takes more:
    what waits here is bounded, what waits there is not. It says by `acknowledge()`
    when it has let go of body bytes and by `replenish()` that a second has passed.
    """

    @property
    def open_streams(self) -> int:
        """Requests that have begun and whose answer is not completely handed out."""
        return len(self._streams)

    @property
    def closed(self) -> bool:
        """The connection is over, once `data_to_send()` is written."""
        leaving = self._past.final is not None or self._peer_leaves
        return self._dead or (leaving and not self._streams)

    @property
    def mid_frame(self) -> bool:
        """A frame, a header block or the connection preface has begun and not ended."""
        return bool(self._tail or self._partial or self._only is not None)

    @property
    def last_stream_id(self) -> int:
        """The last stream that was accepted, 0 if none was."""
        return self._last_accepted

    def send(self, *events: Outgoing) -> None:
        """Queue parts of answers. What belongs to no open stream is dropped."""
        streams = self._streams
        outbox = self._outbox
        for event in events:
            stream = streams.get(event.stream_id)
            if stream is None:
                continue
            if isinstance(event, Reset):
                self._reset(stream, event.error_code)
                continue
            if stream.ended:
                continue
            if isinstance(event, Response):
                if outbox.add_whole(stream, event):
                    continue
                outbox.add_head(stream, event)
            elif isinstance(event, Data):
                outbox.add_body(stream, event.data)
            elif isinstance(event, Trailers):
                outbox.add_trailers(stream, event.headers)
            else:
                stream.ended = True
            if stream.line is None:
                outbox.schedule(stream)

    def data_to_send(self, limit: int = 2**20) -> list[Buffer]:
        """Return what to write now, about `limit` bytes at most; empty: nothing.

        Bodies come as slices of what was sent: they must not change until written.
        """
        outbox = self._outbox
        out = outbox.take(limit)
        if outbox.finished:
            for stream in outbox.finished:
                self._answered(stream, out)
            outbox.finished.clear()
        if outbox.fruitful:
            if self._budgets.control < CONTROL_BUDGET:
                self._budgets.earn(2 * outbox.fruitful)
            outbox.fruitful = 0
        return out

    def unsent(self, stream_id: int) -> int:
        """Count the body bytes of an answer that are not yet handed out."""
        stream = self._streams.get(stream_id)
        return 0 if stream is None else stream.queued

    def handed_out(self, stream_id: int) -> int:
        """Count the body bytes of an answer that were handed out so far."""
        stream = self._streams.get(stream_id)
        return 0 if stream is None else stream.sent

    def acknowledge(self, stream_id: int, count: int) -> None:
        """Say that `count` body bytes of a request are held no longer."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            self._credit.acknowledge(stream, count)

    def replenish(self) -> None:
        """Say that a second has passed: what a peer may do in vain is bounded by it."""
        self._budgets.replenish()

    def shutdown(self) -> None:
        """Let the peer open no more streams (RFC 9113 6.8).

        The first call announces it, and streams that are on their way are still served
        until the peer has answered a PING. The second call ends that at once.
        """
        if self._dead or self._past.final is not None:
            return
        if self._draining:
            self._say_last()
        else:
            self._start_draining()
