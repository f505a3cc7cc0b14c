"""Simulates batching: the real `Batcher` in an event loop with a time of its own.

    python bench/simulate_batching.py [seconds]

The loop never sleeps: where it would wait, its clock jumps. The model is a timer of
a * n + b seconds, the clients are coroutines, and every run is the same for its seed.
Prints a Markdown table: rows a second and median latency of no batching, greedy, AUTO
and the best policy of those that wait for so many rows (which know the load).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import selectors
import statistics
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kserve_lite.dispatch.batching import Batcher
from kserve_lite.errors import Overloaded
from kserve_lite.handlers import AUTO, Batching

SIZE = 16
# Seconds a row, seconds a batch.
MODELS = {"AlexNet": (10.6e-3, 15e-3), "cheap": (0.05e-3, 1e-3), "b = 0": (5e-3, 0.0)}
CLIENTS = (1, 2, 4, 16, 64)
LOADS = (0.3, 0.7, 0.95, 1.5)
ROW = np.zeros((1, 1), np.float32)


class JumpingSelector(selectors.SelectSelector):
    """Sleeps by moving the time on."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        self.now += timeout or 0.0
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.selector = JumpingSelector()
        super().__init__(self.selector)

    def time(self) -> float:
        return self.selector.now


@dataclass
class Outcome:
    latencies: list[float] = field(default_factory=list)
    refused: int = 0
    rows: list[int] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.latencies) * 1000 if self.latencies else 0.0


Drive = Callable[[Batcher, Outcome, random.Random], Awaitable[None]]


class Threshold(Batcher):
    """Starts a batch of so many rows, or what came by the delay: needs to be told."""

    def __init__(self, *args: Any, rows: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.threshold = rows

    def _next(self, now: float, *, idle: bool) -> Any:
        group, at = super()._next(now, idle=idle)
        return group, now if group.rows >= self.threshold else at


def simulate(
    model: tuple[float, float],
    drive: Drive,
    delay: float | str,
    *,
    size: int = SIZE,
    rows: int | None = None,
    seed: int = 1,
) -> Outcome:
    per_row, fixed = model
    dice = random.Random(seed)
    outcome = Outcome()

    async def call(arrays: Mapping[str, Any]) -> Any:
        count = len(arrays["x"])
        outcome.rows.append(count)
        # One in fifty is disturbed.
        noise = dice.lognormvariate(0, 0.03) * (1.5 if dice.random() < 0.02 else 1)
        await asyncio.sleep((per_row * count + fixed) * noise)
        return arrays["x"]

    async def main() -> None:
        clock = asyncio.get_running_loop().time
        batching = Batching(size, delay)  # type: ignore[arg-type]
        keywords: dict[str, Any] = {"max_queue_size": 256, "clock": clock}
        if rows is None:
            batcher = Batcher(call, batching, **keywords)
        else:
            batcher = Threshold(call, batching, rows=rows, **keywords)
        await drive(batcher, outcome, random.Random(-seed))

    with contextlib.closing(VirtualLoop()) as loop:
        loop.run_until_complete(main())
    return outcome


async def ask(
    batcher: Batcher, outcome: Outcome, warm: float, end: float = math.inf
) -> None:
    clock = asyncio.get_running_loop().time
    began = clock()
    try:
        await batcher.run({"x": ROW})
    except Overloaded:
        outcome.refused += 1
        return
    if began >= warm and clock() < end:
        outcome.latencies.append(clock() - began)


def closed(clients: int, seconds: float) -> Drive:
    """Each client asks again 0.3 to 3 ms after its answer came."""

    async def drive(batcher: Batcher, outcome: Outcome, dice: random.Random) -> None:
        clock = asyncio.get_running_loop().time
        warm, end = seconds / 10, seconds * 1.1

        async def client() -> None:
            while clock() < end:
                await asyncio.sleep(dice.uniform(0.3e-3, 3e-3))
                await ask(batcher, outcome, warm, end)

        await asyncio.gather(*(client() for _ in range(clients)))

    return drive


def poisson(rate: float, seconds: float) -> Drive:
    async def drive(batcher: Batcher, outcome: Outcome, dice: random.Random) -> None:
        clock = asyncio.get_running_loop().time
        warm, end = seconds / 10, seconds * 1.1
        async with asyncio.TaskGroup() as group:
            while clock() < end:
                await asyncio.sleep(dice.expovariate(rate))
                group.create_task(ask(batcher, outcome, warm, end))

    return drive


def bursts(rows: int, seconds: float) -> Drive:
    """Clients that send some rows within 4 ms, and then nothing for half a second."""

    async def drive(batcher: Batcher, outcome: Outcome, dice: random.Random) -> None:
        clock = asyncio.get_running_loop().time
        warm, end = seconds / 10, seconds * 1.1

        async def late() -> None:
            await asyncio.sleep(dice.uniform(0, 4e-3))
            await ask(batcher, outcome, warm, end)

        async with asyncio.TaskGroup() as group:
            while clock() < end:
                await asyncio.sleep(dice.uniform(0.3, 0.7))
                for _ in range(rows):
                    group.create_task(late())

    return drive


def compare(name: str, load: str, drive: Drive, rows: int, seconds: float) -> None:
    model = MODELS[name]
    alone = simulate(model, drive, 0.0, size=1)
    greedy = simulate(model, drive, 0.0)
    auto = simulate(model, drive, AUTO)
    # The best one: most rows a second where clients wait for answers, else the least
    # median.
    others = [simulate(model, drive, 100.0, rows=count) for count in range(1, rows + 1)]
    if load.endswith("clients"):
        best = max([greedy, *others], key=lambda outcome: len(outcome.latencies))
    else:
        best = min([greedy, *others], key=lambda outcome: outcome.median)
    cells = [
        f"{len(outcome.latencies) / seconds:,.0f} / {outcome.median:,.2f}"
        for outcome in (alone, greedy, auto, best)
    ]
    size = statistics.mean(auto.rows)
    ratio = len(auto.latencies) / len(best.latencies)
    slower = auto.median / greedy.median - 1
    print(
        f"| {name} | {load} | {' | '.join(cells)} | {size:.1f} | {ratio:.3f} "
        f"| {slower:+.1%} |",
        flush=True,
    )


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 20.0
    print(
        "| model | load | no batching | greedy | auto | best | rows of auto "
        "| auto / best, rows | auto / greedy, p50 |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    for name, (per_row, fixed) in MODELS.items():
        short = seconds if name != "cheap" else seconds / 10
        for clients in CLIENTS:
            rows = min(clients, SIZE)
            load = f"{clients} clients"
            compare(name, load, closed(clients, short), rows, short)
        capacity = SIZE / (per_row * SIZE + fixed)
        for share in LOADS:
            load = f"Poisson {share}"
            compare(name, load, poisson(share * capacity, short), 4, short)
        compare(name, "bursts of 8", bursts(8, seconds), 8, seconds)


if __name__ == "__main__":
    main()
