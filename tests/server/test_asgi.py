"""`asgi()`: the REST API in other people's servers, the same as in ours."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import httpx
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.routing import Mount

from kserve_lite import (
    Model,
    ModelDefinitionError,
    SettingsError,
    StartupError,
    asgi,
    serve,
)
from kserve_lite.model import Phase
from kserve_lite.server.asgi_stream import AnswerCut
from tests.transports.client import PATIENCE, echo, model_of, post, until

pytestmark = pytest.mark.anyio

TRACE = "0af7651916cd43dd8448eb211c80319c"
IDS = {"x-request-id": "r1", "traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}


def double(x: np.ndarray) -> np.ndarray:
    return x * 2


async def tell(payload: dict[str, str]) -> AsyncIterator[str]:
    for word in payload["text_input"].split():
        yield word


def models() -> tuple[Model, ...]:
    return (
        Model("m", predict=double),
        Model("story", predict=tell),
        Model("a: b", predict=echo),
    )


def client_of(app: Any) -> httpx.AsyncClient:
    """A client that calls the application, without its lifespan."""
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test", headers=IDS
    )


class Scripted:
    """One request of a client that does what it is told, message by message."""

    def __init__(self, path: str = "/v1/models/m:predict", **scope: Any) -> None:
        self.scope: dict[str, Any] = {
            "type": "http",
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [],
            "client": ("127.0.0.1", 1),
            **scope,
        }
        self.sent: list[dict[str, Any]] = []
        self._come: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    def body(self, data: bytes, *, more: bool = False) -> None:
        self._come.put_nowait({"type": "http.request", "body": data, "more_body": more})

    def leave(self) -> None:
        self._come.put_nowait({"type": "http.disconnect"})

    async def receive(self) -> dict[str, Any]:
        return await self._come.get()

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    async def run(self, app: Any) -> None:
        with anyio.fail_after(PATIENCE):
            await app(self.scope, self.receive, self.send)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])

    @property
    def answer(self) -> bytes:
        return b"".join(message["body"] for message in self.sent[1:])


# --- the same answers ------------------------------------------------------------


TENSOR = '{"name":"x","shape":[2],"datatype":"FP32"'
BINARY = (
    f'{{"id":"1","inputs":[{TENSOR},"parameters":{{"binary_data_size":8}}}}],'
    '"parameters":{"binary_data_output":true}}'
).encode()
REQUESTS: dict[str, tuple[str, str, bytes, dict[str, str]]] = {
    "v1": ("POST", "/v1/models/m:predict", b'{"instances":[[1,2]]}', {}),
    "v2": (
        "POST",
        "/v2/models/m/infer",
        f'{{"id":"1","inputs":[{TENSOR},"data":[1,2]}}]}}'.encode(),
        {},
    ),
    "binary": (
        "POST",
        "/v2/models/m/infer",
        BINARY + np.array([1, 2], np.float32).tobytes(),
        {"inference-header-content-length": str(len(BINARY))},
    ),
    "stream": ("POST", "/v2/models/story/generate_stream", b'{"text_input":"a b"}', {}),
    "v1 stream": ("POST", "/v1/models/story:predict", b'{"text_input":"a b"}', {}),
    "a name to encode": (
        "POST",
        "/v1/models/a%3A%20b:predict",
        b'{"instances":[1]}',
        {},
    ),
    "live": ("GET", "/v2/health/live", b"", {}),
    "ready": ("GET", "/v2/health/ready", b"", {}),
    "a head": ("HEAD", "/v2/models/m", b"", {}),
    "openapi": ("GET", "/openapi.json", b"", {}),
    "a query": ("GET", "/v2/models/m?a=b", b"", {}),
    "no model": ("POST", "/v1/models/none:predict", b"{}", {}),
    "no path": ("GET", "/no/such", b"", {}),
    "no method": ("DELETE", "/v2/models/m", b"", {}),
    "no json": ("POST", "/v1/models/m:predict", b"{", {}),
    "encoded": ("POST", "/v1/models/m:predict", b"x", {"content-encoding": "gzip"}),
    "a slash too many": ("GET", "/v2/models/?a=b", b"", {}),
    "not from here": (
        "POST",
        "/v2/repository/models/m/load",
        b"",
        {"x-forwarded-for": "192.0.2.1"},
    ),
    "a load": ("POST", "/v2/repository/models/m/load", b"", {}),
}


def seen(response: httpx.Response) -> tuple[int, dict[str, str], bytes]:
    """An answer, less what is another one each time."""
    headers = dict(response.headers)
    for name in ("date", "server", "transfer-encoding", "connection"):
        headers.pop(name, None)
    trace = headers.pop("traceparent").split("-")
    assert (trace[1], trace[3]) == (TRACE, "01")
    return response.status_code, headers, response.content


@pytest.mark.parametrize("name", REQUESTS)
async def test_the_answers_are_those_of_our_own_server(name: str) -> None:
    method, path, body, headers = REQUESTS[name]
    async with (
        serve(*models(), host="127.0.0.1", http_port=0) as server,
        httpx.AsyncClient(base_url=server.url, headers=IDS) as client,
    ):
        ours = await client.request(method, path, content=body, headers=headers)
    app = asgi(*models())
    async with app, client_of(app) as client:
        theirs = await client.request(method, path, content=body, headers=headers)
    assert seen(theirs) == seen(ours)
    assert "date" not in theirs.headers
    assert "server" not in theirs.headers
    assert "x-request-id" in theirs.headers


async def test_requests_are_counted() -> None:
    app = asgi(*models(), max_body_size=100)
    async with app, client_of(app) as client:
        for body in (b"[1]", bytes(101)):
            await client.post("/v1/models/a%3A%20b:predict", content=body)
        metrics = (await client.get("/metrics")).text
    counted = [line for line in metrics.splitlines() if "requests_total{" in line]
    assert [line.rpartition(" ")[2] for line in counted] == ["1.0", "1.0"], counted
    assert any('"a: b"' in line and '"200"' in line for line in counted)
    assert any('"413"' in line for line in counted)
    assert 'workers{state="ready"} 1.0' in metrics


async def test_a_large_body_goes_in_pieces_of_bytes() -> None:
    def large(x: np.ndarray) -> np.ndarray:
        return np.arange(1_500_000, dtype=np.float32)

    app = asgi(Model("m", predict=large))
    request = Scripted(
        "/v2/models/m/infer",
        headers=[(b"inference-header-content-length", b"%d" % len(BINARY))],
    )
    request.body(BINARY + bytes(8))
    async with app:
        await request.run(app)
    start, *pieces = request.sent
    assert start["type"] == "http.response.start"
    assert {type(piece["body"]) for piece in pieces} == {bytes}
    assert max(len(piece["body"]) for piece in pieces) == 1024 * 1024
    assert [piece["more_body"] for piece in pieces] == [True] * (len(pieces) - 1) + [
        False
    ]
    assert int(request.headers[b"content-length"]) == len(request.answer)
    array = np.frombuffer(request.answer[-6_000_000:], np.float32)
    assert (array == np.arange(1_500_000)).all()


async def test_a_large_body_of_one_buffer_goes_in_pieces_too() -> None:
    body = bytes(range(256)) * 10_000

    async def predict(payload: Any) -> bytes:
        return body

    app = asgi(model_of(predict))
    request = Scripted()
    request.body(b"[1]")
    async with app:
        await request.run(app)
    assert request.answer == body
    assert [piece["more_body"] for piece in request.sent[1:]] == [True, True, False]


async def test_a_head_has_no_body() -> None:
    app = asgi(model_of(echo))
    request = Scripted("/v2/models/m", method="HEAD")
    request.body(b"")
    async with app:
        await request.run(app)
    assert int(request.headers[b"content-length"]) > 0
    assert request.sent[1:] == [
        {"type": "http.response.body", "body": b"", "more_body": False}
    ]


async def test_a_body_in_pieces_is_one() -> None:
    app = asgi(model_of(echo))
    request = Scripted()
    for piece in (b'{"insta', b'nces"', b"", b": [1]"):
        request.body(piece, more=True)
    request.body(b"}")
    async with app:
        await request.run(app)
    assert json.loads(request.answer) == {"instances": [1]}


def test_grpc_costs_nothing_here() -> None:
    """0.1 s and 7 MB."""
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_GRPC],
        cwd=Path(__file__).parent.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stdout == "[1] []\n", ran.stderr


WITHOUT_GRPC = """
import asyncio, sys
from kserve_lite import Model, asgi

app = asgi(Model("m", predict=lambda payload: payload))
path = "/v1/models/m:predict"
scope = {"type": "http", "method": "POST", "path": path, "headers": []}

async def receive():
    return {"type": "http.request", "body": b"[1]"}

async def send(message):
    print(message.get("body", b"").decode(), end="")

async def main():
    async with app:
        await app(scope, receive, send)

asyncio.run(main())
print("", sorted({"grpclib", "google.protobuf"} & set(sys.modules)))
"""


# --- its life --------------------------------------------------------------------


async def test_a_lifespan_loads_and_unloads() -> None:
    seen: list[str] = []
    model = Model("m", predict=echo, load=lambda: seen.append("load"))
    model.unload(lambda: seen.append("unload"))
    app = asgi(model)
    for _ in range(2):  # a test client starts an application for every test
        life = Scripted(type="lifespan")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(life.run, app)
            life.leave()  # whatever it is called: the first message is the start
            await until(partial(getattr, life, "sent"))
            assert life.sent == [{"type": "lifespan.startup.complete"}]
            assert seen.pop() == "load"
            async with client_of(app) as client:
                assert (await client.get("/v2/health/ready")).status_code == 200
            life.leave()
        assert life.sent[1] == {"type": "lifespan.shutdown.complete"}
        assert seen.pop() == "unload"
        assert model.phase is Phase.UNLOADED


async def test_a_stop_that_fails_is_told(caplog: pytest.LogCaptureFixture) -> None:
    app = asgi(model_of(echo))
    life = Scripted(type="lifespan")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(life.run, app)
        life.leave()
        await until(partial(getattr, life, "sent"))
        application = app._application
        assert application is not None
        unload = application.unload

        async def broken() -> None:
            await unload()
            raise OSError("no more disk")

        application.unload = broken  # type: ignore[method-assign]
        life.leave()
    assert life.sent[1:] == [
        {"type": "lifespan.shutdown.failed", "message": "OSError: no more disk"}
    ]
    assert "failed to stop" in caplog.text
    async with app:  # it can be started again
        pass


async def test_a_failing_load_fails_the_start_in_one_line() -> None:
    def load() -> None:
        raise OSError("no weights")

    app = asgi(Model("m", predict=echo, load=load))
    life = Scripted(type="lifespan")
    life.leave()
    await life.run(app)
    (message,) = life.sent
    assert message["type"] == "lifespan.startup.failed"
    text = message["message"]
    assert text.startswith(
        "model 'm' failed to load: OSError: no weights (test_asgi.py"
    )
    assert "\n" not in text
    with pytest.raises(StartupError, match="no weights"):
        async with app:
            pytest.fail("it must not start")


async def test_a_model_that_others_serve_fails_the_start() -> None:
    model = model_of(echo)
    async with serve(model, host="127.0.0.1", http_port=0):
        life = Scripted(type="lifespan")
        life.leave()
        await life.run(asgi(model))
        assert "served already" in life.sent[0]["message"]
        with pytest.raises(ModelDefinitionError, match="served already"):
            async with asgi(model):
                pytest.fail("it must not start")
        assert model.phase is Phase.READY


async def test_started_twice() -> None:
    app = asgi(model_of(echo))
    async with app:
        with pytest.raises(StartupError, match="runs already"):
            async with app:
                pytest.fail("it must not start")
        async with client_of(app) as client:
            assert (await client.get("/v2/health/ready")).status_code == 200


async def test_not_started_is_said(caplog: pytest.LogCaptureFixture) -> None:
    app = asgi(model_of(echo))
    async with client_of(app) as client:
        for _ in range(2):
            answer = await client.get("/v2/health/ready")
            assert answer.status_code == 503
            assert answer.json() == {"error": "Server is not ready."}
    assert caplog.text.count("in the lifespan of the application around it") == 1


async def test_a_stop_finishes_what_is_in_flight() -> None:
    started, go_on = anyio.Event(), anyio.Event()

    async def predict(payload: Any) -> Any:
        started.set()
        await go_on.wait()
        return payload

    app = asgi(model_of(predict))
    request = Scripted()
    request.body(b'{"instances": [1]}')
    async with anyio.create_task_group() as tasks:

        async def live() -> None:
            async with app:
                tasks.start_soon(request.run, app)
                await started.wait()

        tasks.start_soon(live)
        await started.wait()
        await until(lambda: app._application is None)
        assert not request.sent
        go_on.set()
    assert (request.status, json.loads(request.answer)) == (200, {"instances": [1]})


@pytest.mark.parametrize("http_version", ["1.1", "2"])
async def test_a_stop_waits_for_a_body_that_still_arrives(http_version: str) -> None:
    unloaded: list[bool] = []
    model = model_of(echo)
    model.unload(lambda: unloaded.append(True))
    app = asgi(model)
    request = Scripted(http_version=http_version)
    request.body(b'{"instances"', more=True)
    async with anyio.create_task_group() as tasks:

        async def live() -> None:
            async with app:
                tasks.start_soon(request.run, app)
                await until(lambda: app._arriving)

        tasks.start_soon(live)
        await until(lambda: app._requests and app._application is None)
        assert not request.sent
        assert not unloaded
        request.body(b": [1]}")
    assert (request.status, json.loads(request.answer)) == (200, {"instances": [1]})
    assert unloaded == [True]


@pytest.mark.parametrize(("http_version", "closes"), [("1.1", True), ("2", False)])
async def test_a_body_that_does_not_arrive_before_the_stop_is_over(
    http_version: str, closes: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kserve_lite.access")
    app = asgi(model_of(echo), grace_period=0.1)
    request = Scripted(http_version=http_version, headers=[(b"x-request-id", b"mine")])
    request.body(b"{", more=True)
    async with anyio.create_task_group() as tasks:
        async with app:
            tasks.start_soon(request.run, app)
            await until(lambda: app._arriving)
        # It has been answered, and all is told, when the stop is over.
        assert request.status == 503
        assert told(caplog) == [(503, len(request.answer), "mine")]
    assert (request.headers.get(b"connection") == b"close") is closes
    assert json.loads(request.answer) == {"error": "Server is not ready."}


async def test_a_request_amid_the_stop_is_not_told_of_a_start(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = asgi(model_of(echo))
    first, late = Scripted(), Scripted()
    first.body(b"[", more=True)
    late.body(b"[1]")
    async with anyio.create_task_group() as tasks:

        async def live() -> None:
            async with app:
                tasks.start_soon(first.run, app)
                await until(lambda: app._arriving)

        tasks.start_soon(live)
        await until(lambda: app._requests and app._application is None)
        await late.run(app)
        assert late.status == 503
        assert json.loads(late.answer) == {"error": "Server is not ready."}
        assert caplog.text == ""
        first.body(b"1]")
    assert first.status == 200
    again = Scripted()
    again.body(b"[1]")
    await again.run(app)
    assert again.status == 503
    assert "is not running" in caplog.text


async def test_what_does_not_finish_is_told_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    started = anyio.Event()
    ended: list[str] = []

    async def predict(payload: Any) -> Any:
        started.set()
        try:
            await anyio.sleep_forever()
        finally:
            await asyncio.sleep(0)  # cleaning up may take an await
            ended.append("cleaned up")

    caplog.set_level(logging.INFO, "kserve_lite.access")
    app = asgi(model_of(predict), grace_period=0.1)
    request = Scripted(headers=[(b"x-request-id", b"mine")])
    request.body(b'{"instances": [1]}')
    async with anyio.create_task_group() as tasks, app:
        tasks.start_soon(request.run, app)
        await started.wait()
    assert request.status == 503
    assert ended == ["cleaned up"]
    assert request.headers[b"x-request-id"] == b"mine"
    assert told(caplog) == [(503, len(request.answer), "mine")]


def told(caplog: pytest.LogCaptureFixture) -> list[tuple[int, int, str]]:
    """Status, bytes and id of each request, as the access log has them."""
    return [
        (known["status"], known["bytes"], known["request_id"])
        for known in map(vars, caplog.records)
        if known["name"] == "kserve_lite.access"
    ]


async def test_a_request_that_is_cut_before_it_begins(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The task that answers may be cancelled before its first step."""
    caplog.set_level(logging.INFO, "kserve_lite.access")
    app = asgi(model_of(echo))
    request = Scripted(headers=[(b"x-request-id", b"mine")])

    async def receive() -> dict[str, Any]:
        # All of it comes at once: the next thing to run is what is put here.
        if not app._exchanges:
            asyncio.get_running_loop().call_soon(cut)
            return {"type": "http.request", "body": b"[1]"}
        return await request.receive()

    def cut() -> None:
        for task in app._exchanges:
            task.cancel()

    async with app:
        await app(request.scope, receive, request.send)
    assert request.status == 503
    assert request.headers[b"x-request-id"] == b"mine"
    assert told(caplog) == [(503, len(request.answer), "mine")]


async def test_settings() -> None:
    with pytest.raises(SettingsError, match="asgi\\(\\) has no use for http_port"):
        asgi(model_of(echo), http_port=80)
    with pytest.raises(SettingsError, match="did you mean 'max_body_size'"):
        asgi(model_of(echo), max_bodysize=80)
    with pytest.raises(StartupError, match="no model"):
        asgi()


async def test_events_are_answered_as_the_settings_say() -> None:
    names = ("specversion", "id", "source", "type")
    event = {f"ce-{name}": "1.0" for name in names}
    app = asgi(model_of(echo), ce_type="T", ce_source="S")
    async with app, client_of(app) as client:
        path = "/v1/models/m:predict"
        answer = await client.post(path, json=[1], headers=event)
    assert answer.json() == [1]
    assert [answer.headers[f"ce-{name}"] for name in names[2:]] == ["S", "T"]


async def test_other_scopes() -> None:
    app = asgi(model_of(echo))
    request = Scripted(type="websocket")
    request.leave()
    await request.run(app)
    assert request.sent == [{"type": "websocket.close", "code": 1000}]
    with pytest.raises(NotImplementedError):
        await Scripted(type="telepathy").run(app)


# --- bounds ----------------------------------------------------------------------


@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_that_is_too_large(announced: bool) -> None:
    app = asgi(model_of(echo), max_body_size=10)
    headers = [(b"content-length", b"11")] if announced else []
    request = Scripted(headers=headers)
    if not announced:
        request.body(b"x" * 10, more=True)
        request.body(b"x", more=True)
    async with app:
        await request.run(app)
    assert request.status == 413
    assert "max_body_size" in json.loads(request.answer)["error"]
    # The rest was not read.
    assert request.headers[b"connection"] == b"close"


async def test_a_body_of_just_the_size() -> None:
    body = b'{"instances": [1]}'
    app = asgi(model_of(echo), max_body_size=len(body))
    request = Scripted(headers=[(b"content-length", b"%d" % len(body))])
    request.body(body)
    async with app:
        await request.run(app)
    assert request.status == 200


async def test_a_body_that_does_not_come() -> None:
    app = asgi(model_of(echo), body_timeout=0.05)
    request = Scripted(http_version="2")
    request.body(b"{", more=True)
    async with app:
        await request.run(app)
    assert request.status == 408
    assert b"connection" not in request.headers  # HTTP/2 has none


async def test_what_has_come_of_a_body_gives_it_time() -> None:
    app = asgi(model_of(echo), body_timeout=0.01)
    request = Scripted()
    request.body(b" " * 20 * 1024, more=True)  # 20 seconds
    async with app, anyio.create_task_group() as tasks:
        tasks.start_soon(request.run, app)
        late = anyio.current_time() + 0.03
        await until(lambda: anyio.current_time() > late)  # it would have timed out
        assert not request.sent
        request.body(b"[1]")
    assert request.answer == b"[1]"


async def test_a_client_that_goes_in_the_middle_of_its_request(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = asgi(model_of(echo))
    request = Scripted()
    request.body(b"{", more=True)
    request.leave()
    caplog.set_level(logging.INFO, "kserve_lite.access")
    async with app:
        await request.run(app)
    assert request.sent == []
    assert [(status, size) for status, size, _ in told(caplog)] == [(499, 0)]


async def test_a_client_that_goes_cancels_its_handler() -> None:
    started = anyio.Event()
    ended: list[bool] = []

    async def predict(payload: Any, context: Any) -> Any:
        started.set()
        try:
            await anyio.sleep_forever()
        finally:
            await asyncio.sleep(0)
            ended.append(context.disconnected)

    app = asgi(model_of(predict))
    request = Scripted()
    request.body(b'{"instances": [1]}')
    async with app, anyio.create_task_group() as tasks:
        tasks.start_soon(request.run, app)
        await started.wait()
        request.leave()
    assert ended == [True]
    assert request.sent == []


async def test_a_client_that_goes_closes_its_stream() -> None:
    ended = anyio.Event()

    async def predict(payload: Any) -> AsyncIterator[str]:
        try:
            while True:  # it awaits nothing, and is found out all the same
                yield "more"
        finally:
            ended.set()

    app = asgi(model_of(predict))
    request = Scripted()
    request.body(b'{"instances": [1]}')
    async with app, anyio.create_task_group() as tasks:
        tasks.start_soon(request.run, app)
        await until(lambda: len(request.sent) > 3)
        request.leave()
        with anyio.fail_after(PATIENCE):
            await ended.wait()
    assert request.sent[-1]["more_body"]


class Closing(Scripted):
    """A server that says by an exception that the client has gone, or worse."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    async def send(self, message: dict[str, Any]) -> None:
        await super().send(message)
        if len(self.sent) == 3:
            raise self.error


@pytest.mark.parametrize("error", [OSError("gone"), KeyError("a middleware's")])
async def test_sending_that_fails(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    ended = anyio.Event()

    async def predict(payload: Any) -> AsyncIterator[str]:
        try:
            while True:
                yield "more"
        finally:
            ended.set()

    caplog.set_level(logging.DEBUG, "kserve_lite")
    app = asgi(model_of(predict))
    request = Closing(error)
    request.body(b'{"instances": [1]}')
    async with app:
        if isinstance(error, OSError):
            await request.run(app)
        else:
            with pytest.raises(KeyError, match="a middleware's"):
                await request.run(app)
    assert ended.is_set()
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]
    # It may be a middleware's error about a file.
    assert ("OSError: gone" in caplog.text) is isinstance(error, OSError)


async def test_a_cancelled_server_cancels_the_handler() -> None:
    started, ended = anyio.Event(), anyio.Event()

    async def predict(payload: Any) -> Any:
        started.set()
        try:
            await anyio.sleep_forever()
        finally:
            ended.set()

    app = asgi(model_of(predict))
    request = Scripted()
    request.body(b'{"instances": [1]}')
    async with app:
        task = asyncio.create_task(request.run(app))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()
        assert not app._exchanges


async def test_a_middleware_that_says_the_body_again_and_again() -> None:
    app = asgi(model_of(echo))
    request = Scripted()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b'{"instances":[1]}'}

    async with app:
        with anyio.fail_after(PATIENCE):
            await app(request.scope, receive, request.send)
    assert request.status == 200


async def test_a_bug_of_ours_is_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kserve_lite.access")
    app = asgi(model_of(echo))
    request = Scripted(headers=[(b"x-request-id", b"mine")])
    request.body(b'{"instances": [1]}')
    async with app:
        assert app._application is not None

        async def broken(*_: Any) -> Any:
            raise ZeroDivisionError("secret")

        app._application.answer = broken
        await request.run(app)
    assert request.status == 500
    assert b"secret" not in request.answer
    assert "secret" in caplog.text
    assert request.headers[b"x-request-id"] == b"mine"
    assert told(caplog) == [(500, len(request.answer), "mine")]


# --- mounted, and under a real server --------------------------------------------


def mounted(app: Any, kind: str) -> tuple[Any, str]:
    """The application in another one, which runs its life, and where it is."""

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncGenerator[None]:
        async with app:
            yield

    if kind.startswith("fastapi"):
        fastapi = FastAPI(lifespan=lifespan)
        fastapi.mount("/models", app)
        return fastapi, "/models"
    inner = Mount("/of/ours", app=app)
    if kind == "deep":
        routes = [Mount("/deep er", routes=[inner])]
        return Starlette(routes=routes, lifespan=lifespan), "/deep%20er/of/ours"
    if kind == "root":
        return Starlette(routes=[Mount("/", app=app)], lifespan=lifespan), ""
    assert kind == "middleware"
    passing = Middleware(BaseHTTPMiddleware, dispatch=lambda r, call: call(r))
    return (
        Starlette(routes=[inner], middleware=[passing], lifespan=lifespan),
        "/of/ours",
    )


class UvicornThread:
    """uvicorn on a free loopback port, in a thread."""

    def __init__(self, app: Any, **options: Any) -> None:
        self._config = uvicorn.Config(
            app, host="127.0.0.1", port=0, log_config=None, lifespan="on", **options
        )
        self._server = uvicorn.Server(self._config)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="test-uvicorn")

    def _run(self) -> None:
        try:
            self._server.run()
        finally:
            self._ended.set()

    def __enter__(self) -> str:
        self._thread.start()
        while not self._server.started:
            if self._ended.wait(0.005):
                raise AssertionError("uvicorn did not start")
        sock = self._server.servers[0].sockets[0]
        return f"http://127.0.0.1:{sock.getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()


@contextmanager
def asking(app: Any, **options: Any) -> Iterator[httpx.Client]:
    with UvicornThread(app, **options) as url, httpx.Client(base_url=url) as client:
        yield client


@pytest.mark.parametrize(
    "kind", ["fastapi", "fastapi under a root", "deep", "root", "middleware"]
)
def test_mounted(kind: str) -> None:
    own = models()
    outer, prefix = mounted(asgi(*own), kind)
    public = "/public" if "under a root" in kind else ""
    with asking(outer, root_path=public) as client:
        assert client.get(f"{prefix}/v2/health/ready").json() == {"ready": True}
        predicted = client.post(
            f"{prefix}/v1/models/m:predict", json={"instances": [[1, 2]]}
        )
        assert predicted.json() == {"predictions": [[2, 4]]}
        encoded = client.post(f"{prefix}/v1/models/a%3A%20b:predict", json={"a": 1})
        assert encoded.json() == {"a": 1}
        streamed = client.post(
            f"{prefix}/v1/models/story:predict", json={"text_input": "a b"}
        )
        assert streamed.text == "ab"
        moved = client.get(f"{prefix}/v1/models/")
        assert moved.status_code == 307
        assert moved.headers["location"] == f"{public}{prefix}/v1/models"
        assert client.get(f"{prefix}/no/such").json() == {
            "error": "There is no such path."
        }
        described = client.get(f"{prefix}/openapi.json").json()
        servers = [{"url": public + prefix}] if public + prefix else None
        assert described.get("servers") == servers
        assert "/v1/models/m:predict" in described["paths"]
        if prefix:
            assert client.get("/v2/health/ready").status_code == 404
    assert {model.phase for model in own} == {Phase.UNLOADED}


@pytest.mark.parametrize("http", ["h11", "httptools"])
@pytest.mark.parametrize("root", ["", "/behind/a proxy"])
def test_under_uvicorn(http: str, root: str) -> None:
    seen: list[str] = []

    async def predict(payload: Any, headers: dict[str, str], context: Any) -> Any:
        seen.append(context.request_id)
        return payload

    model = model_of(predict)
    with asking(asgi(model), http=http, root_path=root) as client:
        answer = client.post(
            "/v1/models/m:predict", json=[1], headers={"x-request-id": "mine"}
        )
        assert answer.json() == [1]
        assert answer.headers["server"] == "uvicorn"
        assert answer.headers["x-request-id"] == "mine"
        assert answer.headers["content-length"] == str(len(answer.content))
        head = client.head("/v2/models/m")
        get = client.get("/v2/models/m")
        assert head.content == b""
        assert head.headers["content-length"] == get.headers["content-length"]
        moved = client.get("/v1/models/")
        assert moved.headers["location"] == f"{root.replace(' ', '%20')}/v1/models"
    assert seen == ["mine"]
    assert model.phase is Phase.UNLOADED


def test_a_stream_that_fails_is_seen_to_be_cut() -> None:
    async def predict(payload: Any) -> AsyncIterator[str]:
        yield "one"
        raise OSError("secret")

    app, prefix = mounted(asgi(model_of(predict)), "fastapi")
    with asking(app) as client:
        with client.stream("POST", f"{prefix}/v1/models/m:predict", json=[1]) as answer:
            pieces = answer.iter_bytes()
            assert next(pieces) == b"one"
            with pytest.raises(httpx.RemoteProtocolError):
                next(pieces)
        assert client.get(f"{prefix}/v2/health/ready").status_code == 200


async def test_a_stream_that_fails_raises() -> None:
    async def predict(payload: Any) -> AsyncIterator[str]:
        yield "one"
        raise OSError("secret")

    app = asgi(model_of(predict))
    request = Scripted()
    request.body(b"[1]")
    async with app:
        with pytest.raises(AnswerCut) as caught:
            await request.run(app)
    assert "secret" not in str(caught.value)
    assert request.answer == b"one"
    assert request.sent[-1]["more_body"]


def test_a_client_that_goes_is_noticed_under_uvicorn() -> None:
    started, ended = threading.Event(), threading.Event()

    async def predict(payload: Any) -> Any:
        started.set()
        try:
            await asyncio.sleep(PATIENCE)
        finally:
            ended.set()

    outer, prefix = mounted(asgi(model_of(predict)), "middleware")
    with UvicornThread(outer) as url:
        port = int(url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(post(path=f"{prefix}/v1/models/m:predict"))
            assert started.wait(PATIENCE)
            assert not ended.is_set()
        assert ended.wait(PATIENCE / 2)  # it would end by itself after PATIENCE


async def test_a_server_that_gives_no_raw_path() -> None:
    app = asgi(Model("a b", predict=echo))
    request = Scripted("/in/v1/models/a b:predict", root_path="/in", raw_path=None)
    request.body(b"[1]")
    async with app:
        await request.run(app)
    assert request.answer == b"[1]"


async def test_a_prefix_that_others_took_off_already() -> None:
    app = asgi(model_of(echo))
    request = Scripted(root_path="/in", raw_path=b"/outer/in/v1/models/m:predict")
    request.body(b"[1]")
    async with app:
        await request.run(app)
    assert request.answer == b"[1]"


async def test_a_target_that_is_not_ascii() -> None:
    app = asgi(model_of(echo))
    request = Scripted(
        "/v1/models/\xff/", raw_path=b"/v1/models/\xff/", query_string=b"a=\xff"
    )
    request.body(b"")
    async with app:
        await request.run(app)
    assert (request.status, request.headers[b"location"]) == (
        307,
        b"/v1/models/%C3%BF?a=",
    )


@pytest.mark.parametrize(
    ("path", "root", "status"),
    [("/in", "/in", 200), ("/in/", "/in", 200), ("/inner", "/in", 404)],
)
async def test_the_mount_itself(path: str, root: str, status: int) -> None:
    app = asgi(model_of(echo))
    request = Scripted(path, method="GET", root_path=root)
    request.body(b"")
    async with app:
        await request.run(app)
    assert request.status == status
