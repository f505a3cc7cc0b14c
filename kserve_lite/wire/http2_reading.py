"""The reading half of an HTTP/2 connection: frames, bodies and header blocks.

`receive()` reads frames in one loop over the bytes as they came. A DATA frame need not
be complete to be passed on: only the incomplete rest of any other frame is kept. Here
stand the rules of which frame may come when, what it means and what a mistake costs
(RFC 9113 sections 3 to 6 and 8.1); `http2_control` has those of the frames that carry
no part of a message, `hpack_blocks` those of header fields.
"""

from __future__ import annotations

from typing import NamedTuple

from kserve_lite.wire import frames
from kserve_lite.wire.events import (
    Buffer,
    ContinueWanted,
    Data,
    EndOfMessage,
    Event,
    Refusal,
    Request,
    make,
)
from kserve_lite.wire.frames import PREFACE, ConnectionFault, ErrorCode, StreamFault
from kserve_lite.wire.hpack_blocks import Head
from kserve_lite.wire.http2_control import ControlFrames, Frame, check_dependency
from kserve_lite.wire.http2_output import Outbox
from kserve_lite.wire.http2_streams import Stream
from kserve_lite.wire.limits import (
    CONTROL_BUDGET,
    CONTROL_BUDGET_PER_REQUEST,
    HEAD_EXCESS,
    MAX_CONTINUATIONS,
    MAX_CONTROL_OUTPUT,
    MAX_FRAME_SIZE,
    WireLimits,
)

# Reading a name off a module or a class costs more than a global does in Python 3.11.
_DATA = frames.DATA
_HEADERS = frames.HEADERS
_END_STREAM = frames.END_STREAM
_END_HEADERS = frames.END_HEADERS
_PADDED = frames.PADDED
_PADDED_OR_PRIORITY = frames.PADDED | frames.HAS_PRIORITY
_HEADER_SIZE = frames.HEADER_SIZE
_MAX_STREAM_ID = frames.MAX_STREAM_ID
_unpack_header = frames.unpack_header

# The connection's window protects nothing that the streams' windows do not, so it is
# kept wide open: half of it is 1 GiB.
_LOW_WINDOW = frames.MAX_WINDOW // 2
# Payloads beyond this are passed on as views: a copy of less costs less than a view.
_COPIED = 4096
# The first 32 bits of a frame larger than we announced.
_TOO_LARGE = MAX_FRAME_SIZE + 1 << 8
# Reads beyond this are parsed where they lie; smaller ones are copied first, since
# bytes are faster to take apart.
_SMALL_READ = 64 * 1024


class _OpenBlock(NamedTuple):
    """HEADERS whose CONTINUATION is still to come."""

    stream_id: int
    flags: int
    pieces: bytearray


class FrameReader(ControlFrames):
    """Bytes in, events out."""

    def __init__(self, limits: WireLimits | None = None) -> None:
        super().__init__(limits)
        self._started = False
        self._dead = False
        self._tail = b""
        self._block: _OpenBlock | None = None
        self._continuations = 0
        # Of a DATA frame that has begun: bytes to come, stream, END_STREAM.
        self._partial = 0
        self._partial_id = 0
        self._partial_ends = 0
        self._expecting: list[Stream] = []
        # Streams of which this read has brought the head and no body yet, and the place
        # of the head among the read's events.
        self._begun: dict[int, int] = {}
        self._window = frames.MAX_WINDOW

    def receive(self, data: Buffer) -> list[Event]:
        """Take bytes that arrived; return what they mean, in order.

        What `Data` events hold is valid only until the next call: the owner copies it
        to where the body belongs. A body's bytes come as they arrive, in any pieces; a
        request of which all came is one `Request` with its body.
        """
        events: list[Event] = []
        if self._dead:
            return events
        self._begun.clear()
        buffer = data
        if self._tail:
            buffer = self._tail + data
            self._tail = b""
        elif type(data) is not bytes and (
            type(data) is bytearray or len(data) <= _SMALL_READ
        ):
            buffer = bytes(data)
        try:
            used = self._read_frames(buffer, events)
            if self._outbox.control_size > MAX_CONTROL_OUTPUT:
                raise ConnectionFault(
                    ErrorCode.ENHANCE_YOUR_CALM, "answers to frames are not read"
                )
        except ConnectionFault as fault:
            self._give_up(fault, events)
            return events
        if used < len(buffer):
            self._tail = bytes(buffer[used:])
        if self._expecting:
            self._ask_to_continue(events)
        return events

    def _read_frames(self, buffer: Buffer, events: list[Event]) -> int:
        """Handle the frames in the buffer; return how much of it is used."""
        size = len(buffer)
        position = 0
        if not self._started:
            position = self._read_preface(buffer)
            if not position:
                return 0
        elif self._partial:
            position = self._read_partial(buffer, events)
        while size - position >= _HEADER_SIZE:
            word, flags, stream_id = _unpack_header(buffer, position)
            kind = word & 0xFF
            start = position + _HEADER_SIZE
            end = start + (word >> 8)
            stream_id &= _MAX_STREAM_ID
            if self._only is not None or word >= _TOO_LARGE:
                self._check_frame(kind, stream_id, end - start)
            if end > size:
                if kind != _DATA or flags & _PADDED:
                    break
                # Nothing of a body waits for the rest of its frame.
                self._partial = end - size
                self._partial_id = stream_id
                self._partial_ends = flags & _END_STREAM
            if kind == _DATA:
                self._on_data(buffer, start, end, flags, stream_id, events)
            elif kind == _HEADERS:
                self._on_headers(buffer, start, end, flags, stream_id, events)
            else:
                self._on_other(
                    kind, Frame(flags, stream_id, bytes(buffer[start:end])), events
                )
            position = end
        return min(position, size)

    def _read_preface(self, buffer: Buffer) -> int:
        start = bytes(buffer[: len(PREFACE)])
        if not PREFACE.startswith(start):
            raise ConnectionFault(
                ErrorCode.PROTOCOL_ERROR,
                "the connection does not begin with the preface of HTTP/2",
            )
        self._started = len(start) == len(PREFACE)
        return len(PREFACE) if self._started else 0

    def _read_partial(self, buffer: Buffer, events: list[Event]) -> int:
        """Pass on more of a DATA frame that was accounted for when it began."""
        count = min(len(buffer), self._partial)
        self._partial -= count
        stream = self._streams.get(self._partial_id)
        if stream is not None and stream.receiving:
            if count and not stream.refused:
                events.append(Data(stream.id, memoryview(buffer)[:count]))
            if self._partial_ends and not self._partial:
                self._end_request(stream, events)
        return count

    def _check_frame(self, kind: int, stream_id: int, size: int) -> None:
        if size > MAX_FRAME_SIZE:
            # RFC 9113 4.2 asks no less for what bears on the whole connection, and a
            # DATA frame of that size is not worth reading past.
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "a frame is too large")
        if self._only is not None and (kind, stream_id) != self._only:
            expected = "CONTINUATION" if self._block else "SETTINGS"
            raise ConnectionFault(
                ErrorCode.PROTOCOL_ERROR, f"another frame came in place of {expected}"
            )

    def _on_other(self, kind: int, frame: Frame, events: list[Event]) -> None:
        if kind == frames.CONTINUATION:
            self._on_continuation(frame, events)
        else:
            self._on_control(kind, frame, events)

    def _on_data(  # noqa: PLR0917 - no object for each frame
        self,
        buffer: Buffer,
        start: int,
        end: int,
        flags: int,
        stream_id: int,
        events: list[Event],
    ) -> None:
        """Take DATA (RFC 9113 6.1), whose payload may be cut short by the buffer."""
        size = end - start
        self._window -= size
        if self._window < _LOW_WINDOW:
            self._widen()
        if flags & _PADDED:
            start, end = _strip_padding(buffer, start, end)
        stream = self._streams.get(stream_id)
        if stream is None or not stream.receiving:
            self._on_stray_data(stream, stream_id, size, events)
            return
        stream.window -= size
        if stream.window < 0:
            self._fail(stream_id, ErrorCode.FLOW_CONTROL_ERROR, events)
            return
        size = end - start
        ends = flags & _END_STREAM
        if not size and not ends:
            self._budgets.spend()
            return
        stream.held += size
        if stream.expected >= 0 and not self._is_expected(stream, size, ends, events):
            return
        if self._budgets.control < CONTROL_BUDGET:
            self._budgets.control += 1
        if ends and end <= len(buffer) and stream_id in self._begun:
            # All of it in one read: one event, as most small requests come.
            stream.receiving = False
            self._credit.complete(stream)
            index = self._begun[stream_id]
            _, method, target, fields, _ = events[index]  # type: ignore[misc]
            body = bytes(buffer[start:end])
            events[index] = make(Request, (stream_id, method, target, fields, body))
            return
        self._begun.pop(stream_id, None)
        if start < len(buffer) and size and not stream.refused:
            payload = buffer if size <= _COPIED else memoryview(buffer)
            events.append(Data(stream_id, payload[start:end]))
        if not ends:
            self._credit.refill(stream)
        elif end <= len(buffer):
            self._end_request(stream, events)

    def _is_expected(
        self, stream: Stream, size: int, ends: int, events: list[Event]
    ) -> bool:
        """RFC 9113 8.1.1: a body is as long as announced."""
        stream.expected -= size
        if stream.expected >= 0 and not (ends and stream.expected):
            return True
        self._fail(stream.id, ErrorCode.PROTOCOL_ERROR, events)
        return False

    def _on_stray_data(
        self, stream: Stream | None, stream_id: int, size: int, events: list[Event]
    ) -> None:
        """Take DATA where none belongs (RFC 9113 5.1)."""
        if stream is not None:
            self._fail(stream_id, ErrorCode.STREAM_CLOSED, events)
            return
        self._past.take_late_data(stream_id, size)
        if not size:
            self._budgets.spend()

    def _on_headers(  # noqa: PLR0917 - no object for each frame
        self,
        buffer: Buffer,
        start: int,
        end: int,
        flags: int,
        stream_id: int,
        events: list[Event],
    ) -> None:
        """Take HEADERS (RFC 9113 6.2)."""
        if flags & _PADDED_OR_PRIORITY:
            start, end = _strip_headers(buffer, start, end, flags, stream_id)
        block = bytes(buffer[start:end])
        if not flags & _END_HEADERS:
            self._begin_block(block, flags, stream_id)
        elif stream_id > self._past.highest and stream_id & 1:
            self._open(block, flags & _END_STREAM, stream_id, events)
        else:
            self._on_late_block(block, flags & _END_STREAM, stream_id, events)

    def _begin_block(self, block: bytes, flags: int, stream_id: int) -> None:
        if not stream_id & 1:
            raise ConnectionFault(
                ErrorCode.PROTOCOL_ERROR, "HEADERS comes on no stream of a client"
            )
        if not block:
            self._budgets.spend()
        self._block = _OpenBlock(stream_id, flags, bytearray(block))
        self._continuations = 0
        self._only = (frames.CONTINUATION, stream_id)

    def _on_continuation(self, frame: Frame, events: list[Event]) -> None:
        """Take CONTINUATION (RFC 9113 6.10)."""
        begun = self._block
        if begun is None:
            raise ConnectionFault(
                ErrorCode.PROTOCOL_ERROR, "CONTINUATION follows no HEADERS"
            )
        if not frame.payload:
            self._budgets.spend()
        begun.pieces.extend(frame.payload)
        self._continuations += 1
        if (
            self._continuations > MAX_CONTINUATIONS
            or len(begun.pieces) > HEAD_EXCESS * self.limits.max_head_size
        ):
            raise ConnectionFault(
                ErrorCode.ENHANCE_YOUR_CALM, "a header block is too large"
            )
        if not frame.flags & _END_HEADERS:
            return
        self._block = self._only = None
        block = bytes(begun.pieces)
        ends = begun.flags & _END_STREAM
        if frame.stream_id > self._past.highest:
            self._open(block, ends, frame.stream_id, events)
        else:
            self._on_late_block(block, ends, frame.stream_id, events)

    def _on_late_block(
        self, block: bytes, ends: int, stream_id: int, events: list[Event]
    ) -> None:
        """Take a header block that opens no stream: trailers, or a mistake."""
        stream = self._streams.get(stream_id)
        if stream is None:
            self._past.take_late_headers(stream_id)
            self._budgets.spend()
            self._reader.skip(block)
            return
        try:
            self._reader.read_trailers(block)
            if not ends or stream.expected > 0:
                # RFC 9113 8.1 and 8.1.1: trailers end the stream and the body.
                raise StreamFault(ErrorCode.PROTOCOL_ERROR)
            fault = None if stream.receiving else ErrorCode.STREAM_CLOSED
        except StreamFault as error:
            fault = error.code if stream.receiving else ErrorCode.STREAM_CLOSED
        if fault is None:
            self._end_request(stream, events)
        else:
            self._fail(stream_id, fault, events)

    def _open(
        self, block: bytes, ends: int, stream_id: int, events: list[Event]
    ) -> None:
        """Begin a stream (RFC 9113 5.1.1, 5.1.2)."""
        past = self._past
        if stream_id != past.highest + 2:
            past.pass_over(stream_id)
        past.highest = stream_id
        if len(self._streams) >= self.limits.max_streams or past.final is not None:
            self._refuse_stream(block, stream_id)
            return
        try:
            head = self._reader.remembered.get(block) or self._reader.read_head(block)
            if ends and head.length > 0:
                raise StreamFault(ErrorCode.PROTOCOL_ERROR)  # RFC 9113 8.1.1
        except StreamFault as fault:
            self._fail(stream_id, fault.code, events)
            return
        stream = Stream(
            stream_id, self._credit.initial, self._outbox.initial_window, head.length
        )
        if ends:
            stream.receiving = False
        self._streams[stream_id] = stream
        self._last_accepted = stream_id
        if self._budgets.control < CONTROL_BUDGET:
            self._budgets.earn(CONTROL_BUDGET_PER_REQUEST)
        if head.special:
            self._open_special(stream, head)
            if head.refused is not None:
                events.append(Refusal(stream_id, *head.refused))
                return
        body = b"" if ends else None
        if not ends:
            self._begun[stream_id] = len(events)
        events.append(
            make(Request, (stream_id, head.method, head.target, head.headers, body))
        )

    def _open_special(self, stream: Stream, head: Head) -> None:
        stream.is_head = head.method == "HEAD"
        stream.refused = head.refused is not None
        if head.expects_continue and stream.receiving:
            self._expecting.append(stream)

    def _refuse_stream(self, block: bytes, stream_id: int) -> None:
        """RFC 9113 5.1.2: told to be unprocessed, so that the peer may try again."""
        self._reader.skip(block)
        self._outbox.queue(frames.make_reset(stream_id, ErrorCode.REFUSED_STREAM))
        self._past.remember_reset(stream_id, self._credit.initial)
        if self._settings_acked and self._past.final is None:
            self._budgets.spend_reset()
        else:  # It cannot know better yet.
            self._budgets.spend()

    def _ask_to_continue(self, events: list[Event]) -> None:
        """RFC 9110 10.1.1: not where the body has begun."""
        events += [
            ContinueWanted(stream.id)
            for stream in self._expecting
            if stream.receiving and not stream.held
        ]
        self._expecting.clear()

    def _end_request(self, stream: Stream, events: list[Event]) -> None:
        stream.receiving = False
        self._credit.complete(stream)
        if not stream.refused:
            events.append(EndOfMessage(stream.id))

    def _widen(self) -> None:
        """Open the connection's window again, where it was kept to."""
        if self._window < 0:
            raise ConnectionFault(
                ErrorCode.FLOW_CONTROL_ERROR, "DATA overruns the connection's window"
            )
        self._outbox.queue(
            frames.make_window_update(0, frames.MAX_WINDOW - self._window)
        )
        self._window = frames.MAX_WINDOW

    def _give_up(self, fault: ConnectionFault, events: list[Event]) -> None:
        """End the connection (RFC 9113 5.4.1)."""
        self._dead = True
        self._tail = b""
        self._streams.clear()
        if self._started:
            self._outbox.clear()
            last = self._last_accepted if self._past.final is None else self._past.final
            self._outbox.queue(frames.make_goaway(last, fault.code, fault.reason))
        else:
            # Whoever this is, it does not speak HTTP/2: RFC 9113 3.4 lets us say
            # nothing at all.
            self._outbox = Outbox()
        events.append(Refusal(0, None, fault.reason))


def _strip_padding(buffer: Buffer, start: int, end: int) -> tuple[int, int]:
    """RFC 9113 6.1: the first byte says how many stand at the end."""
    if start == end:
        raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "a frame is too short")
    padding = buffer[start]
    if padding >= end - start:
        raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "padding is larger than frame")
    return start + 1, end - padding


def _strip_headers(
    buffer: Buffer, start: int, end: int, flags: int, stream_id: int
) -> tuple[int, int]:
    """RFC 9113 6.2: padding, and a priority that is checked and ignored."""
    if flags & _PADDED:
        start, end = _strip_padding(buffer, start, end)
    if flags & frames.HAS_PRIORITY:
        if end - start < 5:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "HEADERS is too short")
        check_dependency(bytes(buffer[start : start + 4]), stream_id)
        start += 5
    return start, end
