"""The repository extension over REST: index, load and unload while requests run."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

from kserve_lite import Model, serve
from kserve_lite.dispatch.repository import FORWARDED
from kserve_lite.records import Record
from kserve_lite.rest.replies import Reply
from tests.transports.client import (
    PATIENCE,
    Client,
    echo,
    get,
    nothing_unhandled,
    post,
    predict,
    serving,
    until,
)
from tests.transports.h2client import connected

pytestmark = pytest.mark.anyio

LOAD, UNLOAD = "/v2/repository/models/m/load", "/v2/repository/models/m/unload"
INDEX = "/v2/repository/index"
both_versions = pytest.mark.parametrize("version", ["http1", "http2"])


class Life:
    """A model whose load counts up and, from the second on, waits to be let through.

    What it answers with is the number of the load that it runs on.
    """

    def __init__(self) -> None:
        self.model = Model("m")
        self.model.load(self.load)
        self.model.predict(self.predict)
        self.model.unload(self.unload)
        self.loads = 0
        self.loading = threading.Event()
        self.let_load = threading.Event()
        self.fails = False
        self.predicting = threading.Event()
        self.let_predict = threading.Event()
        self.unloaded: list[int] = []

    def load(self) -> int:
        self.loads += 1
        if self.loads > 1:
            self.loading.set()
            assert self.let_load.wait(PATIENCE)
        if self.fails:
            raise RuntimeError("secret")
        return self.loads

    def predict(self, payload: dict[str, Any], state: int) -> dict[str, Any]:
        if payload["instances"] == ["wait"]:
            self.predicting.set()
            assert self.let_predict.wait(PATIENCE)
        return {"predictions": [state]}

    def unload(self, state: int) -> None:
        self.unloaded.append(state)


async def index_of(client: Client, **asked: Any) -> Any:
    answer = await client.ask(post(json.dumps(asked).encode(), path=INDEX))
    assert answer.status == 200
    return answer.json


@both_versions
async def test_load_and_unload(version: str) -> None:
    life = Life()
    life.let_load.set()
    async with serving(life.model) as server, connected(version, server.port) as client:
        for _ in range(2):
            answer = await client.fetch("POST", UNLOAD, body=b"")
            assert answer.json == {"name": "m", "unload": True}
            assert (await client.fetch("POST", UNLOAD, body=b"")).status == 404
            assert (await client.fetch("GET", "/v2/models/m")).status == 404
            assert (await client.fetch("GET", "/v2/models")).json == {"models": []}
            body = b'{"instances":[1]}'
            path = "/v1/models/m:predict"
            assert (await client.fetch("POST", path, body=body)).status == 404
            answer = await client.fetch("POST", LOAD, body=b"{}")
            assert answer.json == {"name": "m", "load": True}
            answer = await client.fetch("POST", path, body=body)
            assert answer.json == {"predictions": [life.loads]}
        assert life.unloaded == [1, 2]
        unknown = "/v2/repository/models/other"
        assert (await client.fetch("POST", f"{unknown}/load", body=b"")).status == 503
        assert (await client.fetch("POST", f"{unknown}/unload", body=b"")).status == 404
        assert (await client.fetch("GET", LOAD)).status == 405


async def test_the_index_follows_a_models_life() -> None:
    life = Life()
    entry = {"name": "m", "version": "1", "state": "READY", "reason": ""}
    async with serving(life.model) as server, Client(server.port) as client:
        assert await index_of(client) == [entry]
        assert (await client.ask(post(b"", path=UNLOAD))).status == 200
        entry |= {"state": "UNAVAILABLE", "reason": "it was unloaded"}
        assert await index_of(client) == [entry]
        assert await index_of(client, ready=True) == []
        async with Client(server.port) as other:
            await other.send(post(b"", path=LOAD))
            await until(life.loading.is_set)
            assert await index_of(client) == [
                entry | {"state": "LOADING", "reason": ""}
            ]
            answer = await client.ask(predict(1))
            assert answer.status == 503
            life.fails = True
            life.let_load.set()
            answer = await other.answer()
        assert answer.status == 503
        assert "secret" not in answer.json["error"]
        (failed,) = await index_of(client)
        assert failed["state"] == "UNAVAILABLE"
        assert "load handler failed" in failed["reason"]
        assert "secret" not in failed["reason"]
        life.fails = False
        assert (await client.ask(post(b"", path=LOAD))).status == 200
        assert await index_of(client, ready=True) == [
            {"name": "m", "version": "1", "state": "READY", "reason": ""}
        ]


@pytest.mark.parametrize("body", [b"[]", b"{", b'{"ready": 1}', b"7"])
async def test_an_index_that_is_asked_for_wrongly(body: bytes) -> None:
    async with serving(echo) as server, Client(server.port) as client:
        assert (await client.ask(post(body, path=INDEX))).status == 400


async def test_a_model_whose_ready_handler_says_no() -> None:
    model = Model("m", predict=echo, ready=lambda: False)
    async with serving(model) as server, Client(server.port) as client:
        (entry,) = await index_of(client)
        assert (entry["state"], entry["reason"]) == (
            "UNAVAILABLE",
            "its ready handler says no",
        )


async def test_loading_again_goes_on_serving_and_then_ends_the_old() -> None:
    life = Life()
    async with (
        serving(life.model) as server,
        Client(server.port) as client,
        Client(server.port) as loads,
        Client(server.port) as waits,
    ):
        await waits.send(predict("wait"))
        await until(life.predicting.is_set)
        await loads.send(post(b"", path=LOAD))
        await until(life.loading.is_set)
        # What is loaded serves on, and so does the server.
        assert (await client.ask(predict(1))).json == {"predictions": [1]}
        assert (await client.ask(get("/v2/health/ready"))).status == 200
        life.let_load.set()
        await until(lambda: life.model.state == 2)
        assert (await client.ask(predict(1))).json == {"predictions": [2]}
        # The old load is not unloaded under a request that runs on it.
        assert life.unloaded == []
        life.let_predict.set()
        assert (await waits.answer()).json == {"predictions": [1]}
        assert (await loads.answer()).json == {"name": "m", "load": True}
        assert life.unloaded == [1]
    assert life.unloaded == [1, 2]


async def test_a_failing_reload_leaves_what_was_loaded() -> None:
    life = Life()
    life.let_load.set()
    life.fails = False
    async with serving(life.model) as server, Client(server.port) as client:
        life.fails = True
        answer = await client.ask(post(b"", path=LOAD))
        assert answer.status == 503
        assert "still answers" in answer.json["error"]
        assert (await client.ask(predict(1))).json == {"predictions": [1]}
        assert (await index_of(client))[0]["state"] == "READY"


async def test_unloading_waits_for_what_is_in_flight() -> None:
    life = Life()
    async with (
        serving(life.model) as server,
        Client(server.port) as client,
        Client(server.port) as unloads,
        Client(server.port) as waits,
    ):
        await waits.send(predict("wait"))
        await until(life.predicting.is_set)
        await unloads.send(post(b"", path=UNLOAD))
        await until(lambda: life.model.phase.name == "UNLOADING")
        assert (await index_of(client))[0]["state"] == "UNLOADING"
        assert (await client.ask(predict(1))).status == 503
        assert life.unloaded == []
        life.let_predict.set()
        assert (await waits.answer()).json == {"predictions": [1]}
        assert (await unloads.answer()).status == 200
        assert life.unloaded == [1]


async def test_unloading_waits_for_streams() -> None:
    go_on = anyio.Event()
    order: list[str] = []
    model = Model("m")

    @model.predict
    async def stream(payload: Any) -> AsyncIterator[str]:
        yield "one"
        await go_on.wait()
        yield "two"
        order.append("streamed")

    @model.unload
    async def unload() -> None:
        order.append("unloaded")

    async with (
        serving(model) as server,
        Client(server.port) as client,
        Client(server.port) as unloads,
    ):
        await client.send(predict(1))
        await client.head()
        assert await client.chunk() == b"one"
        await unloads.send(post(b"", path=UNLOAD))
        await until(lambda: model.phase.name == "UNLOADING")
        go_on.set()
        assert await client.chunk() == b"two"
        assert (await unloads.answer()).status == 200
    assert order == ["streamed", "unloaded"]


async def test_unloading_waits_for_a_thread_whose_client_has_gone() -> None:
    life = Life()
    async with serving(life.model) as server, Client(server.port) as unloads:
        async with Client(server.port) as client:
            await client.send(predict("wait"))
            await until(life.predicting.is_set)
        statistics = server.dataplane.statistics[life.model]
        await until(lambda: statistics.failures)
        await unloads.send(post(b"", path=UNLOAD))
        await until(lambda: life.model.phase.name == "UNLOADING")
        assert life.unloaded == []
        life.let_predict.set()
        assert (await unloads.answer()).status == 200
        assert life.unloaded == [1]


async def test_unloading_waits_no_longer_than_the_grace_period(
    caplog: pytest.LogCaptureFixture,
) -> None:
    life = Life()
    async with (
        serving(life.model, grace_period=0.05) as server,
        Client(server.port) as unloads,
        Client(server.port) as waits,
    ):
        await waits.send(predict("wait"))
        await until(life.predicting.is_set)
        assert (await unloads.ask(post(b"", path=UNLOAD))).status == 200
        assert life.unloaded == [1]
        assert "1 requests or threads still run" in caplog.text
        life.let_predict.set()
        assert (await waits.answer()).json == {"predictions": [1]}


async def test_a_client_that_goes_away_leaves_the_model_loaded(
    caplog: pytest.LogCaptureFixture,
) -> None:
    life = Life()
    async with serving(life.model) as server:
        with nothing_unhandled(caplog):
            async with Client(server.port) as client:
                await client.send(post(b"", path=LOAD))
                await until(life.loading.is_set)
            await until(lambda: not server._listener._connections)
            async with Client(server.port) as waits, Client(server.port) as client:
                # One at a time: this one waits for the load that nobody waits for.
                await waits.send(post(b"", path=UNLOAD))
                life.let_load.set()
                assert (await waits.answer()).status == 200
                assert life.unloaded == [1, 2]


async def test_a_failed_load_that_nobody_waits_for_is_only_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    life = Life()
    async with serving(life.model) as server:
        async with Client(server.port) as client:
            await client.send(post(b"", path=LOAD))
            await until(life.loading.is_set)
        await until(lambda: not server._listener._connections)
        life.fails = True
        life.let_load.set()
        await until(lambda: "loading model m failed" in caplog.text)
    assert "never retrieved" not in caplog.text


async def test_a_stop_gives_up_a_load_that_hangs() -> None:
    model = Model("m", predict=echo)
    loads = 0

    @model.load
    async def load() -> None:
        nonlocal loads
        loads += 1
        if loads > 1:
            await asyncio.Event().wait()

    server = serve(model, http_port=0, host="127.0.0.1", grace_period=0.05)
    with anyio.fail_after(PATIENCE):
        async with server, Client(server.port) as client:
            await client.send(post(b"", path=LOAD))
            await until(lambda: loads == 2)
    assert model.phase.name == "UNLOADED"


async def test_control_is_for_this_machine_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving(echo) as server, Client(server.port) as client:
        for header in FORWARDED:
            for path in (LOAD, UNLOAD):
                answer = await client.ask(post(b"", f"{header}: x", path=path))
                assert answer.status == 403
                assert "enable_model_control" in answer.json["error"]
        assert (await client.ask(post(b"", path=INDEX))).status == 200
    async with (
        serving(echo, enable_model_control=True) as server,
        Client(server.port) as client,
    ):
        answer = await client.ask(post(b"", "X-Forwarded-For: 9.9.9.9", path=LOAD))
        assert answer.status == 200


@both_versions
async def test_control_from_another_machine(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen from the endpoints: connections of tests come from loopback only."""

    async with serving(echo) as server:
        answer_by = server._listener.app

        async def from_elsewhere(request: Any, body: Any, record: Record) -> Reply:
            record.peer = "192.0.2.7"
            return await answer_by(request, body, record)

        monkeypatch.setattr(server._listener, "app", from_elsewhere)
        async with connected(version, server.port) as client:
            for path in (LOAD, UNLOAD):
                answer = await client.fetch("POST", path, body=b"")
                assert answer.status == 403
            assert (await client.fetch("GET", "/v2/models/m/ready")).status == 200


async def test_a_configuration_or_files_are_not_taken() -> None:
    async with serving(echo) as server, Client(server.port) as client:
        for name in ("config", "file:1/model.onnx"):
            body = json.dumps({"parameters": {name: "x"}}).encode()
            answer = await client.ask(post(body, path=LOAD))
            assert answer.status == 501
        body = b'{"parameters": {"unload_dependents": false}}'
        assert (await client.ask(post(body, path=UNLOAD))).status == 200
        assert (await client.ask(post(b"{bad", path=LOAD))).status == 200


async def test_versions_are_loaded_and_unloaded_together() -> None:
    def make(version: str) -> Model:
        async def answer(payload: Any, context: Any) -> Any:
            return {"predictions": [context.model_version]}

        return Model("m", version=version, predict=answer)

    models = [make(version) for version in ("9", "10")]
    async with (
        serve(*models, http_port=0, host="127.0.0.1") as server,
        Client(server.port) as client,
    ):
        assert (await client.ask(predict(1))).json == {"predictions": ["10"]}
        assert [e["version"] for e in await index_of(client)] == ["9", "10"]
        assert (await client.ask(post(b"", path=UNLOAD))).status == 200
        assert {e["state"] for e in await index_of(client)} == {"UNAVAILABLE"}
        assert (await client.ask(post(b"", path=LOAD))).status == 200
        assert {e["state"] for e in await index_of(client)} == {"READY"}
        metadata = (await client.ask(get("/v2/models/m"))).json
        assert metadata["versions"] == ["9", "10"]
