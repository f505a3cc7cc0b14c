"""What waits to be written on one HTTP/2 connection, and in which order it goes.

Control frames go first, then the streams take turns of one DATA frame each, as the
peer's windows and its largest frame allow (RFC 9113 5.2, 6.9). Bodies are slices of
what the owner gave, never copies, but for small ones, which are joined with their
frames.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from kserve_lite.wire.events import Buffer, RawHeaders, Response
from kserve_lite.wire.frames import (
    CONTINUATION,
    DEFAULT_WINDOW,
    END_HEADERS,
    END_STREAM,
    GREATEST_FRAME_SIZE,
    HEADER_SIZE,
    HEADERS,
    LEAST_FRAME_SIZE,
    MAX_WINDOW,
    SETTINGS_ENABLE_PUSH,
    SETTINGS_HEADER_TABLE_SIZE,
    SETTINGS_INITIAL_WINDOW_SIZE,
    SETTINGS_MAX_FRAME_SIZE,
    ConnectionFault,
    ErrorCode,
    pack_header,
    unpack_settings,
)
from kserve_lite.wire.hpack_blocks import (
    TABLE_UPDATE,
    encode_block,
    encode_ids,
    encode_length,
)
from kserve_lite.wire.http2_streams import Stream
from kserve_lite.wire.limits import FRUITFUL_WINDOW, HEADER_TABLE_SIZE

# Copying this much costs less than one more buffer to write does.
_JOINED = 4096
# RFC 9110 6.4.1: an answer of these ends with its head.
_BODILESS = frozenset((204, 304))


class Outbox:
    """The queues of one connection, and the peer's windows.

    `finished` are the streams whose answers `take()` has completed: the caller empties
    it. `fruitful` counts the DATA frames handed out that the peer's windows did not cut
    very short.
    """

    def __init__(self) -> None:
        self.window = DEFAULT_WINDOW
        self.initial_window = DEFAULT_WINDOW
        self._max_frame_size = LEAST_FRAME_SIZE
        self._table_update_due = False
        self._table_size = HEADER_TABLE_SIZE
        self.control_size = 0
        self.fruitful = 0
        self.finished: list[Stream] = []
        self._control: list[Buffer] = []
        self._whole: list[Buffer] = []  # small answers, as they are written
        self._ready: deque[Stream] = deque()
        self._blocked: deque[Stream] = deque()  # by the connection's window
        # Answers to one peer tend to have the same headers, object for object.
        self._last_headers: RawHeaders | None = None
        self._last_status = 0
        self._last_block = b""
        self._last_trailers: RawHeaders | None = None
        self._last_trailer_block = b""

    def queue(self, frame: bytes) -> None:
        """Add a control frame."""
        self._control.append(frame)
        self.control_size += len(frame)

    def clear(self) -> None:
        """Drop everything but control frames."""
        self._ready.clear()
        self._blocked.clear()
        self._whole.clear()
        self.finished.clear()

    def drop(self, stream: Stream) -> None:
        """Drop what the stream has queued."""
        stream.ended = True
        stream.queued = 0
        stream.body.clear()
        if stream.line is not None:
            stream.line.remove(stream)
            stream.line = None

    def add_whole(self, stream: Stream, response: Response) -> bool:
        """Write a small answer that is all there at once; False: that is not so.

        In a third of the steps that the queues take. It is handed out by the next
        `take()`, and its stream counts as open until then.
        """
        stream_id, status, headers, body, trailers, ids = response
        if (
            body is None
            or status < 200
            or status in _BODILESS
            or stream.is_head
            or stream.line is not None
            or stream.blocks
            or self._table_update_due
            or not 0 < len(body) <= _JOINED
            or type(body) is not bytes
            or len(body) > self.window
            or len(body) > stream.send_window
        ):
            return False
        size = len(body)
        block = self._block_of(status, headers)
        if ids is not None:
            block += encode_ids(ids)
        end = b""
        if trailers is None:
            block += encode_length(size)
        else:
            end = self._trailer_block_of(trailers)
        if len(block) > LEAST_FRAME_SIZE or len(end) > LEAST_FRAME_SIZE:
            return False
        self.window -= size
        stream.ended = True
        whole = self._whole
        whole += (
            pack_header(len(block) << 8 | HEADERS, END_HEADERS, stream_id),
            block,
            pack_header(size << 8, 0 if end else END_STREAM, stream_id),
            body,
        )
        if end:
            whole += (
                pack_header(
                    len(end) << 8 | HEADERS, END_HEADERS | END_STREAM, stream_id
                ),
                end,
            )
        self.finished.append(stream)
        self.fruitful += 1
        return True

    def _block_of(self, status: int, headers: RawHeaders) -> bytes:
        if headers is not self._last_headers or status != self._last_status:
            self._last_block = encode_block(status, headers)
            self._last_headers = headers
            self._last_status = status
        return self._last_block

    def _trailer_block_of(self, headers: RawHeaders) -> bytes:
        if headers is not self._last_trailers:
            self._last_trailer_block = encode_block(0, headers)
            self._last_trailers = headers
        return self._last_trailer_block

    def add_head(self, stream: Stream, response: Response) -> None:
        """Queue the head of an answer, and its body where it has one."""
        status = response.status
        block = self._block_of(status, response.headers)
        if response.ids is not None:
            block += encode_ids(response.ids)
        body = response.body
        if status < 200:
            stream.blocks += (block,)
            return
        if status in _BODILESS:
            stream.ended = True
        else:
            if response.trailers is not None:
                self.add_trailers(stream, response.trailers)
            elif body is not None:
                block += encode_length(memoryview(body).nbytes)
            if stream.is_head:
                stream.ended = True
                stream.trailers = None
            elif body is not None:
                self.add_body(stream, body)
                stream.ended = True
        stream.blocks += (block,)

    def add_body(self, stream: Stream, data: Buffer) -> None:
        """Queue bytes of a body."""
        if type(data) is memoryview and (data.format != "B" or data.ndim != 1):
            data = data.cast("B")
        size = len(data)
        if size:
            stream.body.append(data)
            stream.queued += size

    def add_trailers(self, stream: Stream, headers: RawHeaders) -> None:
        """Queue the fields that end an answer."""
        stream.trailers = self._trailer_block_of(headers)
        stream.ended = True

    def schedule(self, stream: Stream) -> None:
        """Let the stream take turns, as it may have something to write."""
        if stream.line is None:
            stream.line = self._ready
            self._ready.append(stream)

    def widen(self, increment: int) -> None:
        """Open the connection's window (RFC 9113 6.9)."""
        self.window += increment
        if self.window > MAX_WINDOW:
            raise ConnectionFault(
                ErrorCode.FLOW_CONTROL_ERROR, "the connection's window is too wide"
            )
        if self._blocked and self.window > 0:
            for stream in self._blocked:
                stream.line = self._ready
            self._ready += self._blocked
            self._blocked.clear()

    def widen_stream(self, stream: Stream, increment: int) -> bool:
        """Open a stream's window; a negative increment narrows it. False: too wide."""
        stream.send_window += increment
        if stream.queued and stream.send_window > 0:
            self.schedule(stream)
        return stream.send_window <= MAX_WINDOW

    def apply(self, payload: bytes, streams: Iterable[Stream]) -> None:
        """Keep to the peer's settings (RFC 9113 6.5.2); unknown ones are ignored.

        Of repeated windows the last counts, once each has been checked: applying each
        would let one frame move the windows of all streams 10,000 times.
        """
        window = self.initial_window
        for name, value in unpack_settings(payload):
            if name == SETTINGS_HEADER_TABLE_SIZE:
                # RFC 9113 4.3.1: the next block must confirm a smaller table.
                self._table_update_due |= value < self._table_size
                self._table_size = value
            elif name == SETTINGS_ENABLE_PUSH:
                if value > 1:
                    raise ConnectionFault(
                        ErrorCode.PROTOCOL_ERROR, "ENABLE_PUSH is not 0 or 1"
                    )
            elif name == SETTINGS_INITIAL_WINDOW_SIZE:
                if value > MAX_WINDOW:
                    raise ConnectionFault(
                        ErrorCode.FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE is too large"
                    )
                window = value
            elif name == SETTINGS_MAX_FRAME_SIZE:
                if not LEAST_FRAME_SIZE <= value <= GREATEST_FRAME_SIZE:
                    raise ConnectionFault(
                        ErrorCode.PROTOCOL_ERROR, "MAX_FRAME_SIZE is out of range"
                    )
                self._max_frame_size = value
        change = window - self.initial_window
        self.initial_window = window
        for stream in streams if change else ():
            # RFC 9113 6.9.2: this may make a window negative.
            if not self.widen_stream(stream, change):
                raise ConnectionFault(
                    ErrorCode.FLOW_CONTROL_ERROR, "a stream's window is too wide"
                )

    def take(self, limit: int) -> list[Buffer]:
        """Hand out frames of about `limit` bytes."""
        out: list[Buffer] = []
        small = self._control
        room = limit - self.control_size
        if small:
            self._control = []
            self.control_size = 0
        if self._whole:
            small += self._whole
            self._whole.clear()
        ready = self._ready
        while ready and room > 0:
            room -= self._take_turn(ready.popleft(), small, out)
        if small:
            out.append(b"".join(small))
            small.clear()
        return out

    def _take_turn(self, stream: Stream, small: list[Buffer], out: list[Buffer]) -> int:
        """Write one DATA frame of the stream, and what stands before and behind it."""
        stream.line = None
        size = stream.queued
        trailers = stream.trailers
        # Whether the next frame is the last, unless trailers come.
        last = END_STREAM if stream.ended and trailers is None else 0
        spent = 0
        if stream.blocks:
            blocks = stream.blocks
            stream.blocks = ()
            for block in blocks[:-1]:
                spent += self._write_block(stream.id, block, 0, small)
            spent += self._write_block(
                stream.id, blocks[-1], 0 if size else last, small
            )
        elif last and not size:
            small.append(pack_header(0, END_STREAM, stream.id))
            spent = HEADER_SIZE
        if size:
            written = self._write_data(stream, last, small, out)
            if stream.queued:
                return spent + written
            spent += written
        if trailers is not None:
            spent += self._write_block(stream.id, trailers, END_STREAM, small)
        if stream.ended:
            self.finished.append(stream)
        return spent

    def _write_data(
        self, stream: Stream, last: int, small: list[Buffer], out: list[Buffer]
    ) -> int:
        """Write one DATA frame, as far as the windows allow, and queue up again."""
        size = stream.queued
        if size > self._max_frame_size:  # noqa: PLR1730 - half the cost of min()
            size = self._max_frame_size
        if size > self.window or size > stream.send_window:
            size = min(self.window, stream.send_window)
            if size <= 0:
                if stream.send_window > 0:
                    stream.line = self._blocked
                    self._blocked.append(stream)
                return 0
            if size >= FRUITFUL_WINDOW:
                self.fruitful += 1
        else:
            self.fruitful += 1
        self.window -= size
        stream.send_window -= size
        stream.queued -= size
        stream.sent += size
        if stream.queued:
            last = 0
            stream.line = self._ready
            self._ready.append(stream)
        small.append(pack_header(size << 8, last, stream.id))
        body = stream.body
        if len(body) == 1 and len(body[0]) == size <= _JOINED:
            small.append(body.pop())
        else:
            self._write_body(body, size, small, out)
        return HEADER_SIZE + size

    def _write_block(
        self, stream_id: int, block: bytes, last: int, small: list[Buffer]
    ) -> int:
        """Write HEADERS, and CONTINUATION where the block does not fit one frame."""
        if self._table_update_due:
            self._table_update_due = False
            block = TABLE_UPDATE + block
        size = len(block)
        most = self._max_frame_size
        if size <= most:
            small += (
                pack_header(size << 8 | HEADERS, END_HEADERS | last, stream_id),
                block,
            )
            return HEADER_SIZE + size
        small += (pack_header(most << 8 | HEADERS, last, stream_id), block[:most])
        for start in range(most, size, most):
            piece = block[start : start + most]
            flags = END_HEADERS if start + most >= size else 0
            small += (
                pack_header(len(piece) << 8 | CONTINUATION, flags, stream_id),
                piece,
            )
        return size + HEADER_SIZE * -(-size // most)

    @staticmethod
    def _write_body(
        body: deque[Buffer], size: int, small: list[Buffer], out: list[Buffer]
    ) -> None:
        while size:
            chunk = body.popleft()
            if len(chunk) > size:
                view = memoryview(chunk)
                body.appendleft(view[size:])
                chunk = view[:size]
            size -= len(chunk)
            if len(chunk) > _JOINED:
                out.append(b"".join(small))
                small.clear()
                out.append(chunk)
            else:
                small.append(chunk)
