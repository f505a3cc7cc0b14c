"""A replica as an object of this process: what it says of its work; without Ray."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

from kserve_lite import Context, InferRequest, InvalidInput, Model, Tensor
from kserve_lite.dispatch.settings import DispatchSettings
from kserve_lite.handlers import Stage
from kserve_lite.parallel.outcomes import Asked, Outcome
from kserve_lite.parallel.replica import Replica

pytestmark = pytest.mark.anyio
ASKED = Asked.of(Context("m", protocol="v2"))


@asynccontextmanager
async def replica(model: Model, folder: Path) -> AsyncIterator[Replica]:
    """Make and end a replica as Ray Serve does."""

    class Served(Replica):
        def __del__(self) -> None:  # type: ignore[override]  # awaited below
            pass

    served: Any = object.__new__(Served)
    await served.__init__(lambda: model, "m", str(folder), DispatchSettings())
    yield served
    await Replica.__del__(served)


async def test_batches_are_told_once(tmp_path: Path) -> None:
    model = Model("m")

    @model.predict(max_batch_size=4, max_delay_ms=60_000)
    async def predict(x: np.ndarray) -> np.ndarray:
        return x

    outcomes: list[Outcome] = []

    async def ask(served: Replica, rows: int) -> None:
        tensor = Tensor("x", np.zeros((rows, 2), np.float32), "FP32")
        request = InferRequest("m", (tensor,))
        outcomes.append(await served.infer(Stage.PREDICT, request, ASKED))

    async with replica(model, tmp_path) as served:
        async with anyio.create_task_group() as group:
            for rows in (1, 3):
                group.start_soon(ask, served, rows)
        await ask(served, 4)
    first, second, third = (o.spent for o in outcomes if o.spent is not None)
    assert {rows: calls for rows, (calls, _) in first.batches.items()} == {4: 1}
    assert second.batches == {}
    ((rows, (calls, ns)),) = third.batches.items()
    assert (rows, calls) == (4, 1)
    assert ns > 0
    assert third.times[Stage.PREDICT] > 0


@pytest.mark.parametrize("fails", [False, True])
async def test_a_stream_tells_at_its_end(tmp_path: Path, fails: bool) -> None:
    model = Model("m")

    @model.preprocess
    async def preprocess(payload: Any) -> Any:
        return payload

    @model.predict
    async def predict(payload: Any) -> AsyncGenerator[Any]:
        yield "one"
        if fails:
            raise InvalidInput("No.")

    asked = Asked.of(Context("m", protocol="v1"))
    async with replica(model, tmp_path) as served:
        stream = served.stream(Stage.PREDICT, {}, asked)
        first, item, last = [outcome async for outcome in stream]
    assert first == Outcome(headers={})
    assert item == "one"
    assert last.spent.times[Stage.PREPROCESS] > 0
    assert (last.fault is not None) == fails
