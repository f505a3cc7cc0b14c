"""The state of an HTTP/2 connection, and the frames that carry no part of a message.

`ControlFrames` is the lower half of `http2.Http2Connection`: how streams end, and what
PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY and WINDOW_UPDATE mean (RFC
9113 6.3 to 6.9). The upper half reads frames, bodies and header blocks.
"""

from __future__ import annotations

from typing import NamedTuple

from kserve_lite.wire import frames
from kserve_lite.wire.events import Buffer, Event, Reset
from kserve_lite.wire.frames import MAX_WINDOW, ConnectionFault, ErrorCode
from kserve_lite.wire.hpack_blocks import HeaderReader
from kserve_lite.wire.http2_guards import Budgets, PastStreams
from kserve_lite.wire.http2_output import Outbox
from kserve_lite.wire.http2_streams import Credit, Stream
from kserve_lite.wire.limits import (
    HEADER_TABLE_SIZE,
    MAX_FRAME_SIZE,
    RESET_BUDGET,
    WireLimits,
)

_DRAINING = b"draining"


class Frame(NamedTuple):
    """A frame of a type that is not worth a faster way."""

    flags: int
    stream_id: int
    payload: bytes


class ControlFrames:
    """What a connection knows, and what control frames do to it."""

    def __init__(self, limits: WireLimits | None = None) -> None:
        self.limits = limits or WireLimits()
        self._outbox = Outbox()
        self._credit = Credit(self.limits, self._outbox.queue)
        self._reader = HeaderReader(self.limits)
        self._streams: dict[int, Stream] = {}
        self._past = PastStreams()
        self._budgets = Budgets()
        self._last_accepted = 0
        # The only frame that may come next, by type and stream: SETTINGS at the start,
        # CONTINUATION within a header block (RFC 9113 3.4, 6.10).
        self._only: tuple[int, int] | None = (frames.SETTINGS, 0)
        self._settings_acked = False
        self._draining = False
        self._peer_leaves = False
        self._outbox.queue(
            frames.make_settings(
                {
                    frames.SETTINGS_HEADER_TABLE_SIZE: HEADER_TABLE_SIZE,
                    frames.SETTINGS_MAX_CONCURRENT_STREAMS: self.limits.max_streams,
                    frames.SETTINGS_INITIAL_WINDOW_SIZE: self._credit.initial,
                    frames.SETTINGS_MAX_FRAME_SIZE: MAX_FRAME_SIZE,
                    frames.SETTINGS_MAX_HEADER_LIST_SIZE: self.limits.max_head_size,
                }
            )
        )
        self._outbox.queue(
            frames.make_window_update(0, MAX_WINDOW - frames.DEFAULT_WINDOW)
        )

    def _on_control(self, kind: int, frame: Frame, events: list[Event]) -> None:
        self._budgets.spend()
        handler = self._handlers.get(kind)
        if handler is not None:  # RFC 9113 4.1: unknown frames are ignored
            handler(self, frame, events)

    def _on_priority(self, frame: Frame, events: list[Event]) -> None:
        """Check and ignore PRIORITY (RFC 9113 5.3.2, 6.3)."""
        if frame.stream_id == 0:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "PRIORITY has no stream")
        if len(frame.payload) == 5:
            check_dependency(frame.payload, frame.stream_id)
        elif frame.stream_id in self._streams:
            self._fail(frame.stream_id, ErrorCode.FRAME_SIZE_ERROR, events)
        else:
            # RST_STREAM may not be sent on an idle stream (6.4).
            raise ConnectionFault(
                ErrorCode.FRAME_SIZE_ERROR, "PRIORITY must have 5 bytes"
            )

    def _on_rst_stream(self, frame: Frame, events: list[Event]) -> None:
        """Take RST_STREAM (RFC 9113 6.4)."""
        if len(frame.payload) != 4:
            raise ConnectionFault(
                ErrorCode.FRAME_SIZE_ERROR, "RST_STREAM must have 4 bytes"
            )
        self._past.check_not_idle(frame.stream_id)
        stream = self._streams.get(frame.stream_id)
        if stream is None:
            return
        self._forget(stream)
        if not stream.refused:
            events.append(Reset(stream.id, frames.unpack_word(frame.payload)[0]))
        self._budgets.spend_reset()

    def _on_settings(self, frame: Frame, events: list[Event]) -> None:
        """Take SETTINGS (RFC 9113 6.5)."""
        size = len(frame.payload)
        if frame.stream_id != 0:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "SETTINGS has a stream")
        if frame.flags & frames.ACK:
            if size:
                raise ConnectionFault(
                    ErrorCode.FRAME_SIZE_ERROR, "an ACK of SETTINGS is empty"
                )
            if self._only is not None:
                raise ConnectionFault(
                    ErrorCode.PROTOCOL_ERROR, "SETTINGS come before an ACK of ours"
                )
            self._settings_acked = True
            return
        if size % 6:
            raise ConnectionFault(
                ErrorCode.FRAME_SIZE_ERROR, "SETTINGS are 6 bytes each"
            )
        self._only = None
        self._budgets.spend(size // 60)  # a frame may hold 10,000 of them
        self._outbox.apply(frame.payload, self._streams.values())
        self._outbox.queue(frames.make_frame(frames.SETTINGS, frames.ACK, 0))

    def _on_push_promise(self, frame: Frame, events: list[Event]) -> None:
        """Refuse PUSH_PROMISE (RFC 9113 8.4)."""
        raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a client must not push")

    def _on_ping(self, frame: Frame, events: list[Event]) -> None:
        """Answer PING (RFC 9113 6.7)."""
        if frame.stream_id != 0:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "PING has a stream")
        if len(frame.payload) != 8:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "PING must have 8 bytes")
        if not frame.flags & frames.ACK:
            self._outbox.queue(
                frames.make_frame(frames.PING, frames.ACK, 0, frame.payload)
            )
        elif self._draining and self._past.final is None and frame.payload == _DRAINING:
            self._say_last()

    def _on_goaway(self, frame: Frame, events: list[Event]) -> None:
        """Take GOAWAY (RFC 9113 6.8): what is open is still served."""
        if frame.stream_id != 0:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "GOAWAY has a stream")
        if len(frame.payload) < 8:
            raise ConnectionFault(
                ErrorCode.FRAME_SIZE_ERROR, "GOAWAY has 8 bytes or more"
            )
        self._peer_leaves = True

    def _on_window_update(self, frame: Frame, events: list[Event]) -> None:
        """Take WINDOW_UPDATE (RFC 9113 6.9)."""
        if len(frame.payload) != 4:
            raise ConnectionFault(
                ErrorCode.FRAME_SIZE_ERROR, "WINDOW_UPDATE must have 4 bytes"
            )
        increment = frames.unpack_word(frame.payload)[0] & MAX_WINDOW
        stream_id = frame.stream_id
        if stream_id == 0:
            if not increment:
                raise ConnectionFault(
                    ErrorCode.PROTOCOL_ERROR, "a window opens by nothing"
                )
            self._outbox.widen(increment)
            return
        self._past.check_not_idle(stream_id)
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        if not increment:
            self._fail(stream_id, ErrorCode.PROTOCOL_ERROR, events)
        elif not self._outbox.widen_stream(stream, increment):
            self._fail(stream_id, ErrorCode.FLOW_CONTROL_ERROR, events)

    _handlers = {  # noqa: RUF012 - a table of functions
        frames.PRIORITY: _on_priority,
        frames.RST_STREAM: _on_rst_stream,
        frames.SETTINGS: _on_settings,
        frames.PUSH_PROMISE: _on_push_promise,
        frames.PING: _on_ping,
        frames.GOAWAY: _on_goaway,
        frames.WINDOW_UPDATE: _on_window_update,
    }

    # --- how streams end --------------------------------------------------------------

    def _answered(self, stream: Stream, out: list[Buffer]) -> None:
        """Note that the answer is handed out, which is the end of the stream."""
        if self._streams.pop(stream.id, None) is None:
            return  # reset after it was written
        self._credit.release(stream)
        if self._budgets.resets < RESET_BUDGET:
            self._budgets.resets += 1
        if stream.receiving:
            # RFC 9113 8.1: the rest of the request is not wanted.
            stream.receiving = False
            out.append(frames.make_reset(stream.id, ErrorCode.NO_ERROR))
            self._past.remember_reset(stream.id, stream.window)

    def _forget(self, stream: Stream) -> None:
        """Drop a stream before its answer is handed out."""
        del self._streams[stream.id]
        stream.receiving = False
        self._credit.release(stream)
        self._outbox.drop(stream)

    def _reset(self, stream: Stream, code: int) -> None:
        self._forget(stream)
        self._outbox.queue(frames.make_reset(stream.id, code))
        self._past.remember_reset(stream.id, stream.window)

    def _fail(self, stream_id: int, code: ErrorCode, events: list[Event]) -> None:
        """End one stream for the peer's mistake (RFC 9113 5.4.2).

        It counts as if the peer had reset it: that it makes us do so is the point of
        CVE-2025-8671.
        """
        stream = self._streams.get(stream_id)
        if stream is not None:
            self._reset(stream, code)
            if not stream.refused:
                events.append(Reset(stream_id, code))
        else:
            self._outbox.queue(frames.make_reset(stream_id, code))
            self._past.remember_reset(stream_id, self._credit.initial)
        self._budgets.spend_reset()

    def _start_draining(self) -> None:
        self._draining = True
        self._outbox.queue(frames.make_goaway(frames.MAX_STREAM_ID, ErrorCode.NO_ERROR))
        self._outbox.queue(frames.make_frame(frames.PING, 0, 0, _DRAINING))

    def _say_last(self) -> None:
        self._past.final = self._last_accepted
        self._outbox.queue(frames.make_goaway(self._last_accepted, ErrorCode.NO_ERROR))


def check_dependency(payload: bytes, stream_id: int) -> None:
    """RFC 7540 5.3.1: a stream does not depend on itself. The rest is ignored."""
    if frames.unpack_word(payload)[0] & frames.MAX_STREAM_ID == stream_id:
        raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a stream depends on itself")
