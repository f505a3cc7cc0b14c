"""Random arrivals, cancels, deadlines, failures, loads and unloads of one model.

Whatever the schedule: every request has exactly one outcome, an answer made of its own
rows or a fault that its history explains, and in the end nothing is left of any.
"""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kserve_lite import InferRequest, InferResponse, InvalidInput, Model, Tensor
from kserve_lite.dispatch.dataplane import DataPlane
from kserve_lite.dispatch.repository import Repository
from kserve_lite.dispatch.settings import DispatchSettings
from kserve_lite.errors import InferenceFault, Kind
from kserve_lite.handlers import Stage
from kserve_lite.messages import Context
from kserve_lite.registry import Registry
from tests.transports.client import PATIENCE

KINDS = ("async", "gated", "batched", "auto", "thread")
# Rows with these values fail in the handler, in one way or another.
MALFORMED, BROKEN = -1.0, -2.0
BUSY = {Kind.OVERLOADED, Kind.NOT_READY, Kind.NOT_FOUND}

requests = st.tuples(
    st.just("ask"),
    st.integers(1, 3),
    st.sampled_from([1.0] * 6 + [MALFORMED, BROKEN]),
    st.booleans(),
)
others = st.tuples(
    st.sampled_from(["cancel", "late", "let", "turn", "unload", "load"]),
    st.integers(0, 30),
)
schedules = st.lists(st.one_of(requests, requests, others), max_size=40)


class World:
    """A model behind a data plane; its calls wait until they are let go."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.gates: list[asyncio.Event] = []
        self.open = False
        self.outcomes: list[list[Any]] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.values: list[float] = []
        self.cancelled: set[int] = set()
        self.timed: set[int] = set()
        self.model = Model("m", max_concurrency=2 if kind == "gated" else None)
        if kind in ("batched", "auto"):
            delay: Any = "auto" if kind == "auto" else 0
            self.model.predict(max_batch_size=4, max_delay_ms=delay)(self.predict)
        elif kind == "thread":
            self.model.predict(self.plain)
        else:
            self.model.predict(self.predict)
        self.dataplane = DataPlane(
            Registry(),
            DispatchSettings(max_in_flight=8, max_queue_size=4, grace_period=5.0),
        )
        self.repository = Repository(self.dataplane)

    async def predict(self, x: np.ndarray) -> np.ndarray:
        if not self.open:
            gate = asyncio.Event()
            self.gates.append(gate)
            await gate.wait()
        return self.plain(x)

    def plain(self, x: np.ndarray) -> np.ndarray:
        if (x == MALFORMED).any():
            raise InvalidInput("malformed")
        if (x == BROKEN).any():
            raise ValueError("broken")
        return x * 2

    async def start(self) -> None:
        self.model.freeze()
        self.dataplane.registry.add(self.model)
        await self.repository.load(self.model)

    def ask(self, rows: int, value: float, timed: bool) -> None:
        number = len(self.tasks)
        self.outcomes.append([])
        self.values.append(value)
        if timed:
            self.timed.add(number)
        self.tasks.append(asyncio.create_task(self._ask(number, rows, value, timed)))

    async def _ask(self, number: int, rows: int, value: float, timed: bool) -> None:
        own = float(1000 + number)
        array = np.full(rows, own if value > 0 else value, np.float32)
        request = InferRequest("m", (Tensor("x", array, "FP32"),), id=str(number))
        deadline = asyncio.get_running_loop().time() + 3600 if timed else None
        context = Context("m", None, "v2", None, deadline)
        try:
            model = self.dataplane.find("m")
            plan = model.plan(Stage.PREDICT)
            answer = await self.dataplane.infer(model, plan, request, context)
        except InferenceFault as fault:
            self.outcomes[number].append(fault)
            return
        except asyncio.CancelledError:
            self.outcomes[number].append("cancelled")
            raise
        assert isinstance(answer, InferResponse)
        assert answer.id == str(number)
        assert answer.outputs[0].array.tolist() == [own * 2] * rows
        self.outcomes[number].append("answered")

    def expire(self, index: int) -> None:
        """The time of a request that has a deadline of its own passes."""
        watched = [t for t in self.dataplane._deadlines._own if t in self.tasks]
        if watched:
            self.dataplane._deadlines._expire(watched[index % len(watched)])

    def cancel(self, index: int) -> None:
        if self.tasks:
            number = index % len(self.tasks)
            if not self.tasks[number].done():
                self.cancelled.add(number)
                self.tasks[number].cancel()

    def check(self, number: int) -> None:
        (outcome,) = self.outcomes[number]
        value = self.values[number]
        if outcome == "cancelled":
            assert number in self.cancelled
        elif outcome == "answered":
            assert value > 0
        elif outcome.kind is Kind.INVALID_INPUT:
            assert value == MALFORMED
        elif outcome.kind is Kind.MODEL_FAILED:
            # A broken row fails its batch, and nobody else's.
            batched = self.kind in ("batched", "auto") and BROKEN in self.values
            assert value == BROKEN or batched
        elif outcome.kind is Kind.DEADLINE_EXCEEDED:
            assert number in self.timed
        else:
            assert outcome.kind in BUSY


async def play(kind: str, schedule: list[Any]) -> None:
    world = World(kind)
    await world.start()
    lives: list[asyncio.Task[None]] = []
    for step in schedule:
        match step:
            case ("ask", rows, value, timed):
                world.ask(rows, value, timed)
                await asyncio.sleep(0)
            case ("cancel", index):
                world.cancel(index)
            case ("late", index):
                world.expire(index)
            case ("let", index) if world.gates:
                world.gates.pop(index % len(world.gates)).set()
            case ("turn", index):
                for _ in range(index % 5):
                    await asyncio.sleep(0)
            case ("unload" | "load" as verb, _):
                work = getattr(world.repository, f"{verb}_named")("m")
                lives.append(asyncio.create_task(work))
                await asyncio.sleep(0)
    world.open = True
    while world.gates:
        world.gates.pop().set()
        await asyncio.sleep(0)
    with anyio.fail_after(PATIENCE):
        results = await asyncio.gather(*lives, return_exceptions=True)
        await asyncio.gather(*world.tasks, return_exceptions=True)
    assert all(r is None or isinstance(r, InferenceFault) for r in results)
    for number in range(len(world.tasks)):
        world.check(number)
    dataplane = world.dataplane
    with anyio.fail_after(PATIENCE):
        while any(r.in_flight for r in dataplane.running.values()):  # noqa: ASYNC110
            await asyncio.sleep(0)
    assert all(running.waiting == 0 for running in dataplane.running.values())
    assert dataplane.stages.offload.waiting == 0
    deadlines = dataplane._deadlines
    assert not (deadlines._own)
    assert not (deadlines._queue)
    assert not (deadlines._late)
    statistics = dataplane.statistics[world.model]
    answered = sum(outcome == ["answered"] for outcome in world.outcomes)
    assert statistics.successes == answered
    await world.repository.close()
    dataplane.close()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(schedule=schedules)
def test_any_schedule(kind: str, schedule: list[Any]) -> None:
    asyncio.run(play(kind, schedule))
