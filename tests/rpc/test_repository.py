"""Triton's repository extension over gRPC: index, load, unload, and who may."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import anyio
import numpy as np
import pytest

from kserve_lite import Model
from kserve_lite.dispatch.repository import is_loopback
from kserve_lite.messages import MAX_ENTRIES
from kserve_lite.model import Phase
from tests.rpc.stream import (
    INFERENCE,
    Answer,
    App,
    MemoryStream,
    asking,
    doubling,
    framed,
    proto,
    request_for,
)

pytestmark = pytest.mark.anyio

PATIENCE = 10


async def control(app: App, verb: str, name: str, **more: Any) -> Answer:
    request = proto(f"RepositoryModel{verb}Request", model_name=name)
    return await app.call(f"RepositoryModel{verb}", request, **more)


async def index(app: App, **asked: Any) -> dict[tuple[str, str], tuple[str, str]]:
    """State and reason by name and version."""
    request = proto("RepositoryIndexRequest", **asked)
    reply = (await app.call("RepositoryIndex", request)).read("RepositoryIndexResponse")
    return {(m.name, m.version): (m.state, m.reason) for m in reply.models}


async def predicted(app: App) -> list[float]:
    reply = (await app.call("ModelInfer", asking())).read("ModelInferResponse")
    found = reply.outputs[0].contents
    return [*found.fp32_contents, *found.int64_contents]


class Gated:
    """A model that answers how often it was loaded, and waits in each load but one."""

    def __init__(self) -> None:
        self.model = Model("m")
        self.model.load(self.load)
        self.model.predict(self.predict)
        self.loads = 0
        self.started, self.go_on = anyio.Event(), anyio.Event()

    async def load(self) -> int:
        self.loads += 1
        if self.loads > 1:
            self.started.set()
            await self.go_on.wait()
        return self.loads

    async def predict(self, x: np.ndarray, state: int) -> np.ndarray:
        return np.array([state])


# --- index --------------------------------------------------------------------------


async def test_the_index_follows_a_model() -> None:
    unready = Model("unready")
    unready.predict(lambda x: x)
    unready.ready(lambda: False)
    async with App(doubling(version="1"), doubling(version="2"), unready) as app:
        one, two, other = await index(app)
        states = await index(app)
        assert states[one] == states[two] == ("READY", "")
        assert states[other] == ("UNAVAILABLE", "its ready handler says no")
        assert (one[0], two[0], other[0]) == ("m", "m", "unready")
        assert (one[1], two[1]) == ("1", "2")
        assert list(await index(app, ready=True)) == [one, two]
        await control(app, "Unload", "m")
        states = await index(app)
        assert states[one] == states[two] == ("UNAVAILABLE", "it was unloaded")
        assert await index(app, ready=True) == {}
        await control(app, "Load", "m")
        assert list(await index(app, ready=True)) == [one, two]


async def test_the_index_of_a_named_repository() -> None:
    async with App(doubling()) as app:
        request = proto("RepositoryIndexRequest", repository_name="r")
        answer = await app.call("RepositoryIndex", request)
        assert answer.code == 12
        assert "repository_name" in answer.text


# --- loading and unloading ----------------------------------------------------------


async def test_load_and_unload() -> None:
    model = doubling()
    life: list[str] = []
    model.load(lambda: life.append("load"))
    model.unload(lambda: life.append("unload"))
    async with App(model) as app:
        loaded = (await control(app, "Load", "m")).read("RepositoryModelLoadResponse")
        assert (loaded.model_name, loaded.isLoaded) == ("m", True)
        assert life == ["load", "load", "unload"]
        answer = await control(app, "Unload", "m")
        unloaded = answer.read("RepositoryModelUnloadResponse")
        assert (unloaded.model_name, unloaded.isUnloaded) == ("m", True)
        for again in (
            await control(app, "Unload", "m"),
            await app.call("ModelInfer", asking()),
            await app.call("ModelReady", proto("ModelReadyRequest", name="m")),
            await app.call("ModelMetadata", proto("ModelMetadataRequest", name="m")),
            await app.call("ModelConfig", proto("ModelConfigRequest", name="m")),
        ):
            assert again.code == 5
            assert again.text == "Model with name m does not exist."
        assert not await app.dataplane.ready()
        assert (await control(app, "Load", "m")).code == 0
        assert await predicted(app) == [2, 4]
        assert await app.dataplane.ready()
        for verb in ("Load", "Unload"):
            assert (await control(app, verb, "zz")).code == 5


@pytest.mark.parametrize("verb", ["Unload", "Load"])
async def test_tritons_name_of_a_model_goes_before_kserves(verb: str) -> None:
    method, request = f"RepositoryModel{verb}", f"RepositoryModel{verb}Request"
    async with App(doubling()) as app:
        for names in (
            {"triton_model_name": "m"},
            {"triton_model_name": "m", "model_name": "a repository"},
        ):
            await control(app, "Load", "m")
            answer = await app.call(method, proto(request, **names))
            assert answer.read(f"RepositoryModel{verb}Response").model_name == "m"
            assert bool(await index(app, ready=True)) == (verb == "Load")
        await control(app, "Load", "m")
        names = {"triton_model_name": "zz", "model_name": "m"}
        assert (await app.call(method, proto(request, **names))).code == 5


@pytest.mark.parametrize("name", ["config", "file:1/model.onnx"])
async def test_a_load_with_a_configuration_or_files(name: str) -> None:
    model = doubling()
    loads: list[bool] = []
    model.load(lambda: loads.append(True))
    async with App(model) as app:
        request = proto("RepositoryModelLoadRequest", triton_model_name="m")
        request.parameters[name].bytes_param = b"s3cr3t"
        answer = await app.call("RepositoryModelLoad", request)
        assert answer.code == 12
        assert "config and file:..." in answer.text
        assert "s3cr3t" not in answer.text
        assert len(loads) == 1


async def test_other_parameters_do_not_matter() -> None:
    async with App(doubling()) as app:
        for verb in ("Unload", "Load"):
            request = proto(f"RepositoryModel{verb}Request", triton_model_name="m")
            request.parameters["unload_dependents"].bool_param = True
            assert (await app.call(f"RepositoryModel{verb}", request)).code == 0


async def test_parameters_are_bounded() -> None:
    async with App(doubling()) as app:
        request = proto("RepositoryModelLoadRequest", model_name="m")
        for number in range(MAX_ENTRIES):
            request.parameters[str(number)].bool_param = True
        assert (await app.call("RepositoryModelLoad", request)).code == 0
        request.parameters["one more"].bool_param = True
        answer = await app.call("RepositoryModelLoad", request)
        assert answer.code == 3
        assert f"{MAX_ENTRIES} parameters, got {MAX_ENTRIES + 1}" in answer.text


async def test_an_unloaded_model_does_not_make_the_server_unready() -> None:
    other = Model("other")
    other.predict(lambda x: x)
    async with App(doubling(), other) as app:
        await control(app, "Unload", "other")
        assert await app.dataplane.ready()


async def test_all_versions_are_loaded_and_unloaded() -> None:
    async with App(doubling(version="1"), doubling(version="2")) as app:
        await control(app, "Unload", "m")
        assert (await app.call("ModelInfer", asking(model_version="1"))).code == 5
        await control(app, "Load", "m")
        for version in ("1", "2"):
            asked = asking(model_version=version)
            assert (await app.call("ModelInfer", asked)).code == 0


async def test_a_load_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    model = Model("m")
    outcomes = iter([1, ValueError("s3cr3t"), ValueError("s3cr3t"), 2])

    @model.load
    def load() -> object:
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    @model.predict
    def predict(x: np.ndarray, state: int) -> np.ndarray:
        return np.array([state])

    async with App(model) as app:
        answer = await control(app, "Load", "m")
        assert answer.code == 14
        assert answer.text.startswith(
            "Model with name m is not ready. Its load handler"
        )
        assert "s3cr3t" in caplog.text
        assert "s3cr3t" not in answer.text
        # What was loaded before goes on.
        assert await predicted(app) == [1]
        await control(app, "Unload", "m")
        assert (await control(app, "Load", "m")).code == 14
        assert (await app.call("ModelInfer", asking())).code == 14
        ((state, reason),) = (await index(app)).values()
        assert state == "UNAVAILABLE"
        assert "load handler failed" in reason
        assert (await control(app, "Load", "m")).code == 0
        assert await predicted(app) == [2]


async def test_loads_come_one_after_the_other() -> None:
    model = doubling()
    gate = threading.Semaphore(1)

    @model.load
    def load() -> None:
        assert gate.acquire(blocking=False)
        gate.release()

    async with App(model) as app:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(control(app, verb, "m"))
                for verb in ("Load", "Load", "Unload", "Load")
            ]
        assert [task.result().code for task in tasks] == [0] * 4


async def test_a_model_that_is_loaded_again_serves_meanwhile() -> None:
    gated = Gated()
    async with App(gated.model) as app, asyncio.TaskGroup() as group:
        with anyio.fail_after(PATIENCE):
            load = group.create_task(control(app, "Load", "m"))
            await gated.started.wait()
            assert await predicted(app) == [1]
            assert list((await index(app)).values()) == [("READY", "")]
            assert await app.dataplane.ready()
            assert not load.done()
            gated.go_on.set()
            assert (await load).code == 0
            assert await predicted(app) == [2]


async def test_a_client_that_goes_away_leaves_its_model_loaded() -> None:
    gated = Gated()
    async with App(gated.model) as app:
        await control(app, "Unload", "m")
        request = proto("RepositoryModelLoadRequest", model_name="m")
        path = f"/{INFERENCE}/RepositoryModelLoad"
        stream = MemoryStream(framed(request))
        call = asyncio.create_task(app.answer(request_for(path), stream))
        with anyio.fail_after(PATIENCE):
            await gated.started.wait()
            assert list((await index(app)).values()) == [("LOADING", "")]
            assert (await app.call("ModelInfer", asking())).code == 14
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert gated.model.phase is Phase.LOADING
            change = app.dataplane.change()
            gated.go_on.set()
            await change.wait()
            assert list((await index(app)).values()) == [("READY", "")]
            assert await predicted(app) == [2]
            # And the next one who asks does not wait for ever.
            assert (await control(app, "Unload", "m")).code == 0


async def test_an_unload_waits_for_what_is_in_flight() -> None:
    model = Model("m")
    life: list[str] = []
    started, go_on = anyio.Event(), anyio.Event()

    @model.load
    def load() -> list[str]:
        return ["loaded"]

    @model.predict
    async def predict(x: np.ndarray, state: list[str]) -> np.ndarray:
        started.set()
        await go_on.wait()
        life.extend([*state, "answered"])
        return x

    @model.unload
    def unload(state: list[str]) -> None:
        life.extend([*state, "unloaded"])

    async with App(model) as app, asyncio.TaskGroup() as group:
        with anyio.fail_after(PATIENCE):
            answer = group.create_task(app.call("ModelInfer", asking()))
            await started.wait()
            change = app.dataplane.change()
            unloading = group.create_task(control(app, "Unload", "m"))
            await change.wait()
            ((state, reason),) = (await index(app)).values()
            assert (state, reason) == ("UNLOADING", "it finishes what is in flight")
            assert (await app.call("ModelInfer", asking())).code == 14
            assert not life
            assert not unloading.done()
            go_on.set()
            assert (await answer).code == 0
            assert (await unloading).code == 0
            assert life == ["loaded", "answered", "loaded", "unloaded"]


async def test_no_loads_while_the_server_stops() -> None:
    async with App(doubling()) as app:
        app.dataplane.accepting = False
        assert (await control(app, "Load", "m")).code == 14


# --- who may ------------------------------------------------------------------------

FORWARDED = [
    {"x-forwarded-for": "192.0.2.1"},
    {"forwarded": "for=192.0.2.1"},
    {"via": "2 proxy"},
    {"origin": "http://example.org"},
]


@pytest.mark.parametrize("verb", ["Load", "Unload"])
@pytest.mark.parametrize(
    "asked",
    [{"peer": "192.0.2.1"}, {"peer": ""}, *({"metadata": md} for md in FORWARDED)],
    ids=str,
)
async def test_control_is_for_the_same_machine(verb: str, asked: Any) -> None:
    async with App(doubling()) as app:
        answer = await control(app, verb, "m", **asked)
        assert answer.code == 7
        assert "enable_model_control" in answer.text
        assert await predicted(app) == [2, 4]
        assert (await control(app, verb, "m")).code == 0
    async with App(doubling(), enable_model_control=True) as app:
        assert (await control(app, verb, "m", **asked)).code == 0


async def test_whoever_may_ask_may_see_the_index() -> None:
    async with App(doubling()) as app:
        request = proto("RepositoryIndexRequest")
        answer = await app.call("RepositoryIndex", request, peer="192.0.2.1")
        assert len(answer.read("RepositoryIndexResponse").models) == 1


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.9.8.7", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("::ffff:192.0.2.1", False),
        ("0.0.0.0", False),
        ("192.0.2.1", False),
        ("localhost", False),
        ("", False),
    ],
)
def test_loopback(host: str, *, local: bool) -> None:
    assert is_loopback(host) == local
