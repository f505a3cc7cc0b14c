"""What guards an HTTP/2 connection from its peer: budgets, and the streams of the past.

Everything that a peer can make us do without sending a request to be answered is
counted against a budget, which useful frames and the passing of time give back.
"""

from __future__ import annotations

from collections import OrderedDict, deque

from kserve_lite.wire.frames import ConnectionFault, ErrorCode
from kserve_lite.wire.limits import (
    CONTROL_BUDGET,
    CONTROL_BUDGET_PER_SECOND,
    REMEMBERED_GAPS,
    REMEMBERED_RESETS,
    RESET_BUDGET,
    RESET_BUDGET_PER_SECOND,
)


class Budgets:
    """How many control frames and resets are still borne."""

    __slots__ = ("control", "resets")

    def __init__(self) -> None:
        self.control = CONTROL_BUDGET
        self.resets = RESET_BUDGET

    def spend(self, count: int = 1) -> None:
        """Bear frames that carry no part of a request."""
        self.control -= count
        if self.control < 0:
            raise ConnectionFault(
                ErrorCode.ENHANCE_YOUR_CALM, "too many control frames"
            )

    def spend_reset(self) -> None:
        """Bear a stream that ends by the peer's reset or for the peer's mistake."""
        self.resets -= 1
        if self.resets < 0:
            raise ConnectionFault(
                ErrorCode.ENHANCE_YOUR_CALM, "too many streams were reset"
            )

    def earn(self, count: int) -> None:
        """Give back for something useful."""
        self.control = min(CONTROL_BUDGET, self.control + count)

    def replenish(self) -> None:
        """Give back for a second that passed."""
        self.earn(CONTROL_BUDGET_PER_SECOND)
        self.resets = min(RESET_BUDGET, self.resets + RESET_BUDGET_PER_SECOND)


class PastStreams:
    """The streams that are over, as far as late frames on them need it.

    highest: the last stream that the peer opened. final: the last stream that our final
    GOAWAY promised to serve, None before it (RFC 9113 6.8).
    """

    __slots__ = ("_gaps", "_resets", "final", "highest")

    def __init__(self) -> None:
        self.highest = -1  # so that the first stream is the next but one
        self.final: int | None = None
        # Ids that the peer passed over, as first id and the one that was opened.
        self._gaps: deque[tuple[int, int]] = deque(maxlen=REMEMBERED_GAPS)
        # Streams that we reset, and what was left of their windows.
        self._resets: OrderedDict[int, int] = OrderedDict()

    def pass_over(self, stream_id: int) -> None:
        """Note that a stream is opened which is not the next one."""
        self._gaps.append((self.highest + 2, stream_id))

    def remember_reset(self, stream_id: int, window: int) -> None:
        """Note that we reset a stream whose frames may still be on their way."""
        self._resets[stream_id] = max(0, window)
        if len(self._resets) > REMEMBERED_RESETS:
            self._resets.popitem(last=False)

    def take_late_data(self, stream_id: int, size: int) -> None:
        """Judge DATA on a stream that is not open: it may have been on its way."""
        left = self._resets.get(stream_id)
        if left is None:
            self._refuse(stream_id)
        elif size > left:
            raise ConnectionFault(
                ErrorCode.FLOW_CONTROL_ERROR, "DATA overruns a closed stream"
            )
        else:
            self._resets[stream_id] = left - size

    def take_late_headers(self, stream_id: int) -> None:
        """Judge HEADERS on a stream that is not open."""
        if stream_id not in self._resets:
            self._refuse(stream_id)

    def check_not_idle(self, stream_id: int) -> None:
        """RFC 9113 5.1: hardly any frame may come on a stream that nobody opened."""
        if stream_id == 0 or not stream_id & 1 or stream_id > self.highest:
            raise ConnectionFault(
                ErrorCode.PROTOCOL_ERROR, "a frame's stream is idle or 0"
            )

    def _refuse(self, stream_id: int) -> None:
        """Refuse a frame on a stream that is neither open nor reset by us.

        Returns where it is to be ignored: the stream came too late (RFC 9113 6.8).
        """
        self.check_not_idle(stream_id)
        if self.final is not None and stream_id > self.final:
            return
        if any(first <= stream_id < opened for first, opened in self._gaps):
            # RFC 9113 5.1.1: opening a later stream closed it, unused.
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "stream ids must increase")
        raise ConnectionFault(ErrorCode.STREAM_CLOSED, "a frame's stream is closed")
