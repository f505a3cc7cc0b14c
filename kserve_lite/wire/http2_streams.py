"""One HTTP/2 stream, and the credit that bounds what streams may send us.

`Stream` is what `http2.py` knows of a request that is not yet answered: how much of its
body may still come, and what of its answer is still to go. `Credit` hands out the
receive windows (RFC 9113 5.2 and 6.9); `http2_output.py` keeps to the peer's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from kserve_lite.wire.events import Buffer
from kserve_lite.wire.frames import make_window_update
from kserve_lite.wire.limits import STREAM_WINDOW, WINDOW_SLACK, WireLimits


class Stream:
    """One stream from its HEADERS until its answer is handed out or it is reset."""

    __slots__ = (
        "blocks",
        "body",
        "ended",
        "expected",
        "held",
        "id",
        "is_head",
        "lent",
        "line",
        "queued",
        "receiving",
        "refused",
        "send_window",
        "sent",
        "trailers",
        "window",
    )

    def __init__(
        self, stream_id: int, window: int, send_window: int, expected: int
    ) -> None:
        self.id = stream_id
        # The request: whether more of it may come, what the announced length leaves of
        # it (-1: none announced), the window that the peer has, the bytes that the
        # owner has not acknowledged, what of both comes out of the shared budget.
        self.receiving = True
        self.expected = expected
        self.window = window
        self.held = 0
        self.lent = 0
        # Refused: no Request was told, and what else comes of it is dropped.
        self.refused = False
        self.is_head = False
        # The answer: encoded heads, body, trailers; the queue in which it waits.
        self.send_window = send_window
        self.blocks: tuple[bytes, ...] = ()
        self.body: deque[Buffer] = deque()
        self.queued = 0
        self.sent = 0
        self.trailers: bytes | None = None
        self.ended = False
        self.line: deque[Stream] | None = None


class Credit:
    """How much more each stream may send.

    What a stream may still send and what it sent and is held are one sum, which is what
    it can cost in memory. It starts at `initial` and doubles only as bytes arrive, so a
    large body takes few updates and an announcement alone costs nothing; it never
    passes `max_body_size` and some slack.

    What all sums have beyond `initial` is lent out of one budget. A stream that the
    budget has nothing left for waits until others give back, but one at a time may
    overdraw it, or streams that hold the budget while all wait would wait for ever.
    """

    def __init__(self, limits: WireLimits, queue: Callable[[bytes], None]) -> None:
        self._most = limits.max_body_size + WINDOW_SLACK
        self.initial = min(STREAM_WINDOW, self._most)
        self.low = self.initial // 2
        self._budget = limits.max_held_bodies or 2 * limits.max_body_size
        self._lent = 0
        self._waiting: dict[int, Stream] = {}
        self._overdrawing: Stream | None = None
        self._queue = queue

    def refill(self, stream: Stream) -> None:
        """Open the stream's window, where it is low and that is possible."""
        if not stream.receiving or stream.refused or stream.window >= self.low:
            return
        now = stream.window + stream.held
        wanted = self._wanted(stream)
        if wanted - now < self.initial // 8 and stream.window > WINDOW_SLACK // 2:
            return  # not worth a frame
        lent = max(0, wanted - self.initial)
        free = self._budget - self._lent + stream.lent
        if lent > free and not self._may_overdraw(stream):
            wanted -= lent - max(0, free)
            lent = max(0, wanted - self.initial)
            if wanted - now < self.initial // 4:
                self._waiting[stream.id] = stream
                return
        if wanted <= now:
            return
        self._waiting.pop(stream.id, None)
        self._lent += lent - stream.lent
        stream.lent = lent
        stream.window += wanted - now
        self._queue(make_window_update(stream.id, wanted - now))

    def acknowledge(self, stream: Stream, count: int) -> None:
        """Take note that `count` bytes of the stream are held no longer."""
        stream.held = max(0, stream.held - count)
        if stream.lent:
            self._give_back(stream, stream.held + stream.window * stream.receiving)
        if stream.window < self.low:
            self.refill(stream)

    def complete(self, stream: Stream) -> None:
        """Take note that nothing more comes: only what the stream holds counts."""
        if self._waiting:
            self._waiting.pop(stream.id, None)
        if stream.lent:
            self._give_back(stream, stream.held)

    def release(self, stream: Stream) -> None:
        """Take note that the stream is over."""
        if self._waiting:
            self._waiting.pop(stream.id, None)
        if stream.lent:
            self._give_back(stream, 0)

    def _wanted(self, stream: Stream) -> int:
        """What window and held bytes together should be."""
        target = self.initial
        while target - stream.held < self.initial - self.initial // 4:
            target *= 2
        if stream.expected >= 0:
            # The slack is for padding, which counts in the window and not as body.
            target = min(target, stream.held + stream.expected + WINDOW_SLACK)
        return min(target, self._most)

    def _may_overdraw(self, stream: Stream) -> bool:
        # While streams wait there is one that overdraws, and when it has given back
        # the oldest of them comes next: so None means that nobody else wants it.
        if self._overdrawing is None:
            self._overdrawing = stream
        return self._overdrawing is stream

    def _give_back(self, stream: Stream, needed: int) -> None:
        lent = max(0, needed - self.initial)
        if lent >= stream.lent:
            return
        self._lent -= stream.lent - lent
        stream.lent = lent
        if self._lent <= self._budget:
            self._overdrawing = None
        for stream_id in sorted(self._waiting):
            waiting = self._waiting.pop(stream_id)
            self.refill(waiting)
            if stream_id in self._waiting:
                break
