"""What a batch takes, and whether waiting for more rows pays: learned as they come.

Pure: both are told the time and have no clock, loop or queue. How the policy was chosen
is in bench/NOTES.md, "Batching".
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Hashable

from kserve_lite.handlers import Batching

# Rows after an opening that are remembered; of 16 times 22 openings at the most.
MOST_REMEMBERED = 256


class Cost:
    """What a batch of n rows takes, learned: `per_row * n + fixed` seconds.

    Of each size (in half octaves) the median of the last 7 batches counts, the less the
    longer ago it was, but never nothing: where all batches have one size, only the old
    ones of another still tell what is fixed. Least squares of relative errors, with
    neither part negative and a slight belief in half and half, which is all there is
    before two sizes were seen: believing in nothing fixed, two clients in turn would
    stay batches of one for ever.
    """

    KEPT, HALF_LIFE, LEAST, BELIEF = 7, 64, 0.05, 0.01

    def __init__(self) -> None:
        self._sizes: dict[int, deque[tuple[float, int]]] = {}
        self._last: dict[int, int] = {}
        self._count = 0
        self._is_fitted = True
        self._per_row = self._fixed = 0.0

    @property
    def known(self) -> bool:
        """Whether any batch was seen."""
        return self._count > 0

    @property
    def per_row(self) -> float:
        """Seconds that each row adds."""
        self._fit()
        return self._per_row

    @property
    def fixed(self) -> float:
        """Seconds of a batch, however many rows it has."""
        self._fit()
        return self._fixed

    def seconds(self, rows: int) -> float:
        """What a batch of so many rows is expected to take; 0 if nothing is known."""
        self._fit()
        return self._per_row * rows + self._fixed

    def observe(self, rows: int, seconds: float) -> None:
        """Learn that a batch of so many rows took so long."""
        size = int(2 * math.log2(rows))
        kept = self._sizes.get(size)
        if kept is None:
            kept = self._sizes[size] = deque(maxlen=self.KEPT)
        kept.append((max(seconds, 1e-9), rows))
        self._count += 1
        self._last[size] = self._count
        self._is_fitted = False

    def _fit(self) -> None:
        if self._is_fitted:
            return
        self._is_fitted = True
        weight = x = y = xx = xy = 0.0  # weight, and weighted sums over the sizes
        for size, kept in self._sizes.items():
            seconds, rows = sorted(kept)[len(kept) // 2]
            age = self._count - self._last[size]
            share = max(self.LEAST, 0.5 ** (age / self.HALF_LIFE)) / seconds**2
            weight += share
            x += share * rows
            y += share * seconds
            xx += share * rows * rows
            xy += share * rows * seconds
        mean, belief = x / weight, self.BELIEF * weight
        xx_, x_, weight_ = xx + belief * mean**2, x - belief * mean, weight + belief
        determinant = xx_ * weight_ - x_ * x_
        self._per_row = (xy * weight_ - x_ * y) / determinant
        self._fixed = (xx_ * y - x_ * xy) / determinant
        if self._fixed < 0:
            self._per_row, self._fixed = xy / xx, 0.0
        elif self._per_row < 0:
            self._per_row, self._fixed = 0.0, y / weight


class Opening:
    """The moment from which a batch could start, and when rows came after it.

    key: the group of the batch. began: the moment, when a slot became free while rows
    waited, or when the first came to a free slot. kind: which of the two (True is the
    latter), and how many rows ended last before, in octaves. offsets: seconds from the
    moment to the arrival of each row.
    """

    __slots__ = ("began", "key", "kind", "offsets")

    def __init__(self, key: Hashable, began: float, kind: tuple[bool, int]) -> None:
        self.key = key
        self.began = began
        self.kind = kind
        self.offsets: list[float] = []

    def add(self, key: Hashable, now: float, rows: int) -> None:
        """Rows of a group came: at most as many as a batch may have."""
        if key == self.key and len(self.offsets) < MOST_REMEMBERED:
            self.offsets.extend([now - self.began] * rows)


class Patience:
    """Whether a batch that could start should wait for more rows.

    What comes next depends on what ended last: the clients of a batch come back in a
    burst soon after it, so that the mean rate, or the gaps between arrivals, mislead.
    So arrivals are remembered by the time since the opening, for each kind of opening
    (how many rows ended with it, in octaves, and whether the model was idle), to the
    end of the batch. Rows that come while it runs count too: nothing needs to be tried
    to be known, and a client alone, who never comes back meanwhile, never waits.

    n rows wait on if for some w: (expected arrivals k within w) * fixed > n * w. That
    is when a row's share of fixed and idle time shrinks: (fixed + w) / (n + k) is less
    than fixed / n.

    Of remembered openings only rows beyond as many as already came count, and two rows
    of them all are left out, as the best of many chances looks better than it is (with
    none, Poisson arrivals at 0.7 of capacity took 3 % longer instead of 1.6).
    """

    KEPT, FEWEST, LEFT_OUT = 16, 4, 2
    # Seconds: below, timers are too coarse to win anything.
    LEAST_FIXED = 0.0002

    def __init__(self, batching: Batching, cost: Cost) -> None:
        self._most = batching.max_batch_size
        goal = batching.latency_goal_ms
        self._goal = None if goal is None else goal / 1000
        self._cost = cost
        self._past: dict[tuple[bool, int], deque[list[float]]] = {}

    def learn(self, opening: Opening) -> None:
        """The batch of an opening has ended."""
        past = self._past.get(opening.kind)
        if past is None:
            past = self._past[opening.kind] = deque(maxlen=self.KEPT)
        past.append(opening.offsets)

    def until(self, opening: Opening, now: float, *, rows: int, first: float) -> float:
        """When a batch should start if no more rows come: `now`, or later.

        rows: that it has. first: when the oldest came.
        """
        past = self._past.get(opening.kind)
        fixed = self._cost.fixed
        if not past or fixed < self.LEAST_FIXED:
            return now
        age = now - opening.began
        seen = len(opening.offsets)
        coming: list[float] = []
        for offsets in past:
            if len(offsets) > seen and offsets[-1] > age:
                coming += offsets[max(seen, bisect_right(offsets, age)) :]
        coming.sort()
        pays = fixed / max(len(past), self.FEWEST)
        best, end = 0.0, age
        enough = (self._most - rows) * len(past) + self.LEFT_OUT
        for count, offset in enumerate(coming[:enough], 1 - self.LEFT_OUT):
            gain = count * pays - rows * (offset - age)
            if gain > best:
                best, end = gain, offset
        takes = self._cost.seconds(rows)
        if self._goal is None:
            latest = opening.began + takes
        else:
            latest = first + self._goal - takes
        return max(now, min(opening.began + end, latest))
