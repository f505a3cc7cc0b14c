"""Batching as clients and authors of models meet it, over every protocol."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Annotated, Any

import anyio
import numpy as np
import pytest
import torch

from kserve_lite import (
    Context,
    InferRequest,
    InvalidInput,
    Model,
    ModelDefinitionError,
    TensorSpec,
)
from tests.load.asking import (
    BAD,
    BUSY,
    FAILED,
    LATE,
    OK,
    PROTOCOLS,
    Asker,
    Outcome,
    asking,
    every_protocol,
)
from tests.transports.client import PATIENCE, Client, get, post, serving, until

pytestmark = pytest.mark.anyio


class Gathering:
    """A batched model whose first batch waits to be let go, so that others gather.

    batches: the rows of each call. `fail` is called with the rows before it answers.
    """

    def __init__(self, kind: str = "async", **batching: Any) -> None:
        self.model = Model("m")
        handler = self.plain if kind == "plain" else self.asynchronous
        options = {"max_batch_size": 8} | batching
        self.model.predict(**options)(handler)
        self.batches: list[list[float]] = []
        self.cancelled = 0
        self.fail: Callable[[np.ndarray], Any] = lambda x: None
        self._go_on = threading.Event()

    def go_on(self) -> None:
        self._go_on.set()

    def _take(self, x: np.ndarray) -> bool:
        self.batches.append(x.ravel().tolist())
        return len(self.batches) == 1

    def _answer(self, x: np.ndarray) -> Any:
        wrong = self.fail(x)
        return x * 10 if wrong is None else wrong

    async def asynchronous(self, x: np.ndarray) -> np.ndarray:
        if self._take(x):
            try:
                with anyio.fail_after(PATIENCE):
                    await until(self._go_on.is_set)
            except BaseException:
                self.cancelled += 1
                raise
        return self._answer(x)  # type: ignore[no-any-return]

    def plain(self, x: np.ndarray) -> np.ndarray:
        if self._take(x):
            assert self._go_on.wait(PATIENCE)
        return self._answer(x)  # type: ignore[no-any-return]


async def gathered(
    server: Any, gathering: Gathering, asks: list[tuple[Asker, list[float]]]
) -> list[Outcome]:
    """Ask all at once while the first batch, of the row 0, is inside the model."""
    outcomes: dict[int, Outcome] = {}
    running = server.dataplane.running[gathering.model]

    def is_waiting(count: int) -> bool:
        return bool(running.waiting == count)

    async def ask(index: int, asker: Asker, rows: list[float]) -> None:
        outcomes[index] = await asker.ask(rows, request_id=f"id-{index}")

    async with asking("v1", server) as first, anyio.create_task_group() as tasks:
        tasks.start_soon(first.ask, [0])
        await until(lambda: gathering.batches)
        for index, (asker, rows) in enumerate(asks):
            tasks.start_soon(ask, index, asker, rows)
            await until(partial(is_waiting, index + 1))
        gathering.go_on()
    return [outcomes[index] for index in range(len(asks))]


@pytest.mark.parametrize("kind", ["async", "plain"])
async def test_rows_of_all_protocols_in_one_batch(kind: str) -> None:
    gathering = Gathering(kind)

    # Of one datatype: V1 is untyped, so it is declared.
    model = Model("m", inputs=[TensorSpec("FP32", [-1], "x")])
    handler = gathering.plain if kind == "plain" else gathering.asynchronous
    model.predict(max_batch_size=8)(handler)
    gathering.model = model
    async with serving(model) as server, anyio.create_task_group() as tasks:
        async with (
            asking("v1", server) as v1,
            asking("v1-h2", server) as v1_h2,
            asking("v2", server) as v2,
            asking("v2-h2", server) as v2_h2,
            asking("grpc", server) as grpc,
        ):
            asks: list[tuple[Asker, list[float]]] = [
                (v1, [1]),
                (v1_h2, [2, 3]),
                (v2, [4]),
                (v2_h2, [5]),
                (grpc, [6, 7]),
            ]
            outcomes = await gathered(server, gathering, asks)
            for (asker, rows), outcome in zip(asks, outcomes, strict=True):
                assert asker.is_(outcome, OK)
                assert outcome.rows == [10 * row for row in rows]
        assert gathering.batches == [[0], [1, 2, 3, 4, 5, 6, 7]]
        async with Client(server.port) as client:
            answer = (await client.ask(get("/v2/models/m/stats"))).json
        tasks.cancel_scope.cancel()
    (statistics,) = answer["model_stats"]
    assert statistics["inference_count"] == 6
    assert statistics["execution_count"] == 2
    assert [b["batch_size"] for b in statistics["batch_stats"]] == [1, 7]


@every_protocol
async def test_mates_of_a_malformed_row_are_answered(protocol: str) -> None:
    gathering = Gathering()

    def fail(x: np.ndarray) -> None:
        if (x < 0).any():
            raise InvalidInput("rows must not be negative")

    gathering.fail = fail
    async with (
        serving(gathering.model) as server,
        asking(protocol, server) as one,
        asking(protocol, server) as two,
        asking(protocol, server) as three,
    ):
        good, bad, also = await gathered(
            server, gathering, [(one, [1]), (two, [-1]), (three, [3])]
        )
        assert good.rows == [10]
        assert two.is_(bad, BAD)
        assert "negative" in bad.error
        assert also.rows == [30]


@every_protocol
@pytest.mark.parametrize(
    "wrong", [np.zeros(1), np.zeros(()), "text", (np.zeros(9), np.zeros(2)), None]
)
async def test_a_wrong_result_fails_its_batch_only(
    protocol: str, wrong: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = Model("m")
    calls = 0

    @model.predict(max_batch_size=4)
    async def predict(x: np.ndarray) -> Any:
        nonlocal calls
        calls += 1
        return wrong if calls == 1 else x

    async with serving(model) as server, asking(protocol, server) as asker:
        outcome = await asker.ask([1, 2])
        assert asker.is_(outcome, FAILED)
        assert "predict" not in outcome.error
        assert any(record.exc_info for record in caplog.records)
        assert (await asker.ask([1, 2])).rows == [1, 2]


@every_protocol
async def test_a_failure_of_the_model_fails_its_batch_only(protocol: str) -> None:
    gathering = Gathering()

    def fail(x: np.ndarray) -> None:
        if len(gathering.batches) == 2:
            raise ValueError("secret")

    gathering.fail = fail
    async with (
        serving(gathering.model) as server,
        asking(protocol, server) as one,
        asking(protocol, server) as two,
    ):
        outcomes = await gathered(server, gathering, [(one, [1]), (two, [2])])
        for outcome in outcomes:
            assert one.is_(outcome, FAILED)
            assert "secret" not in outcome.error
        assert (await one.ask([3])).rows == [30]


@every_protocol
async def test_what_waits_longer_than_it_has_is_dropped(protocol: str) -> None:
    gathering = Gathering()
    async with (
        serving(gathering.model) as server,
        asking("v1", server) as first,
        asking(protocol, server) as late,
        asking(protocol, server) as mate,
        anyio.create_task_group() as tasks,
    ):
        running = server.dataplane.running[gathering.model]
        tasks.start_soon(first.ask, [0])
        await until(lambda: gathering.batches)
        tasks.start_soon(mate.ask, [1])
        await until(lambda: running.waiting == 1)
        assert late.is_(await late.ask([2], 50), LATE)
        assert running.waiting == 1
        gathering.go_on()
    assert gathering.batches == [[0], [1]]


async def test_a_client_that_leaves_is_dropped_and_its_mates_are_not() -> None:
    gathering = Gathering()
    async with (
        serving(gathering.model) as server,
        asking("v1", server) as first,
        asking("v1", server) as mate,
        anyio.create_task_group() as tasks,
    ):
        running = server.dataplane.running[gathering.model]
        tasks.start_soon(first.ask, [0])
        await until(lambda: gathering.batches)
        tasks.start_soon(mate.ask, [1])
        await until(lambda: running.waiting == 1)
        async with Client(server.port) as leaves:
            await leaves.send(post(b'{"instances":[2]}'))
            await until(lambda: running.waiting == 2)
        await until(lambda: running.waiting == 1)
        gathering.go_on()
    assert gathering.batches == [[0], [1]]


async def test_a_batch_of_which_all_have_gone_is_cancelled() -> None:
    gathering = Gathering()
    async with serving(gathering.model) as server:
        async with Client(server.port) as leaves:
            await leaves.send(post(b'{"instances":[0]}'))
            await until(lambda: gathering.batches)
        await until(lambda: gathering.cancelled)
        running = server.dataplane.running[gathering.model]
        await until(lambda: not running.in_flight)
        async with asking("v1", server) as asker:
            assert (await asker.ask([1])).rows == [10]


@every_protocol
async def test_the_queue_is_bounded(protocol: str) -> None:
    gathering = Gathering()
    async with (
        serving(gathering.model, max_queue_size=1) as server,
        asking("v1", server) as first,
        asking("v1", server) as second,
        asking(protocol, server) as third,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(first.ask, [0])
        await until(lambda: gathering.batches)
        tasks.start_soon(second.ask, [1])
        running = server.dataplane.running[gathering.model]
        await until(lambda: running.waiting == 1)
        assert third.is_(await third.ask([2]), BUSY)
        gathering.go_on()


@every_protocol
@pytest.mark.parametrize("rows", [[1.0] * 9, []])
async def test_how_many_rows_a_request_may_have(
    protocol: str, rows: list[float]
) -> None:
    model = Model("m", inputs=[TensorSpec("FP32", [-1], "x")])
    model.predict(max_batch_size=8)(Gathering().asynchronous)
    async with serving(model) as server, asking(protocol, server) as asker:
        assert asker.is_(await asker.ask(rows), BAD)


async def test_stages_around_a_batched_one_see_one_request() -> None:
    model = Model("m")
    seen: list[str] = []

    @model.preprocess
    async def before(request: InferRequest, context: Context) -> np.ndarray:
        seen.append(context.protocol)
        more: np.ndarray = request["x"] + 1
        return more

    @model.predict(max_batch_size=8)
    async def predict(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return x, x * 2

    @model.postprocess
    async def after(
        x: np.ndarray, double: np.ndarray, response_headers: dict[str, str]
    ) -> np.ndarray:
        response_headers["x-rows"] = str(len(x))
        total: np.ndarray = x + double
        return total

    async with serving(model) as server, asking("v2", server) as asker:
        outcome = await asker.ask([1, 2, 3])
        assert outcome.rows == [6, 9, 12]
        assert outcome.headers["x-rows"] == "3"
    assert seen == ["v2"]


async def test_several_arrays_and_optional_ones() -> None:
    model = Model("m")
    calls: list[Any] = []

    @model.predict(max_batch_size=8)
    def predict(a: np.ndarray, b: np.ndarray | None = None) -> dict[str, np.ndarray]:
        calls.append(None if b is None else len(b))
        return {"sum": a if b is None else a + b, "a": a}

    async with serving(model) as server, asking("v1", server) as asker:
        path = "/v1/models/m:predict"
        for body, rows in (
            (b'{"inputs":{"a":[1,2],"b":[3,4]}}', [4, 6]),
            (b'{"inputs":{"a":[1,2]}}', [1, 2]),
        ):
            answer = await asker.client.fetch("POST", path, body=body)
            assert [row["sum"] for row in answer.json["predictions"]] == rows
        body = b'{"inputs":{"a":[1,2],"b":[3]}}'
        assert (await asker.client.fetch("POST", path, body=body)).status == 400
    assert calls == [2, None]


async def test_torch() -> None:
    model = Model("m")

    @model.predict(max_batch_size=8, max_delay_ms="auto")
    def predict(
        x: Annotated[torch.Tensor, TensorSpec("FP32", [-1, 2])],
    ) -> torch.Tensor:
        return x.sum(dim=1)

    async with serving(model) as server, anyio.create_task_group() as tasks:

        async def ask(protocol: str) -> None:
            async with asking(protocol, server) as asker:
                for number in range(20):
                    outcome = await asker.ask([[number, 1], [2, 3]])
                    assert outcome.rows == [number + 1, 5]

        for protocol in PROTOCOLS:
            tasks.start_soon(ask, protocol)


@pytest.mark.parametrize("delay", [0, 1, "auto"])
async def test_many_clients_of_all_protocols_get_their_own(delay: Any) -> None:
    model = Model("m", inputs=[TensorSpec("FP32", [-1], "x")])
    sizes: list[int] = []

    @model.predict(max_batch_size=16, max_delay_ms=delay)
    def predict(x: np.ndarray) -> np.ndarray:
        sizes.append(len(x))
        return x + 0.5

    async with serving(model) as server, anyio.create_task_group() as tasks:

        async def ask(protocol: str, client: int) -> None:
            async with asking(protocol, server) as asker:
                for number in range(15):
                    rows = [client * 100.0 + number] * (1 + number % 3)
                    outcome = await asker.ask(rows, request_id=f"{client}-{number}")
                    assert outcome.rows == [row + 0.5 for row in rows]

        for client in range(15):
            tasks.start_soon(ask, PROTOCOLS[client % len(PROTOCOLS)], client)
    assert sum(sizes) == 15 * 5 * 6
    assert max(sizes) <= 16


async def test_unloading_lets_batches_finish() -> None:
    gathering = Gathering()
    unload = "/v2/repository/models/m/unload"
    async with (
        serving(gathering.model) as server,
        asking("v1", server) as first,
        asking("v1", server) as second,
        Client(server.port) as unloads,
        anyio.create_task_group() as tasks,
    ):
        outcomes: list[Outcome] = []

        async def ask(asker: Asker, row: float) -> None:
            outcomes.append(await asker.ask([row]))

        running = server.dataplane.running[gathering.model]
        tasks.start_soon(ask, first, 0)
        await until(lambda: gathering.batches)
        tasks.start_soon(ask, second, 1)
        await until(lambda: running.waiting == 1)
        await unloads.send(post(b"", path=unload))
        await until(lambda: gathering.model.phase.name == "UNLOADING")
        gathering.go_on()
        assert (await unloads.answer()).status == 200
    assert sorted(outcome.rows for outcome in outcomes) == [[0], [10]]


async def test_the_configuration_says_how_many_rows() -> None:
    spec = TensorSpec("FP32", [-1, 2])
    model = Model("m", inputs=[spec], outputs=[spec])
    model.predict(max_batch_size=12, max_delay_ms=3)(lambda_of_rows)
    async with serving(model) as server, Client(server.port) as client:
        config = (await client.ask(get("/v2/models/m/config"))).json
    assert config["max_batch_size"] == 12
    assert config["dynamic_batching"] == {"max_queue_delay_microseconds": 3000}


def lambda_of_rows(x: np.ndarray) -> np.ndarray:
    return x


async def of_json(payload: dict[str, Any]) -> None: ...


async def of_context(x: np.ndarray, context: Context) -> None: ...


async def streaming(x: np.ndarray) -> AsyncIterator[str]:
    yield "x"


@pytest.mark.parametrize(
    ("handler", "word"),
    [(of_json, "np.ndarray"), (of_context, "context"), (streaming, "generator")],
)
async def test_what_cannot_be_batched(handler: Any, word: str) -> None:
    with pytest.raises(ModelDefinitionError, match=word):
        Model("m").predict(max_batch_size=8)(handler)


@pytest.mark.parametrize(
    "batching",
    [
        {},
        {"max_batch_size": 0},
        {"max_batch_size": 2.5},
        {"max_batch_size": 8, "max_delay_ms": -1},
        {"max_batch_size": 8, "max_delay_ms": "often"},
        {"max_batch_size": 8, "max_delay_ms": float("nan")},
        {"max_batch_size": 8, "latency_goal_ms": 5},
        {"max_batch_size": 8, "max_delay_ms": "auto", "latency_goal_ms": 0},
    ],
)
async def test_what_batching_cannot_be(batching: dict[str, Any]) -> None:
    with pytest.raises(ModelDefinitionError):
        Model("m").predict(**batching)
