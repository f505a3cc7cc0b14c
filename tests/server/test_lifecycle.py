"""A server inside a program that goes on: start, ready, drain, stop, nothing left."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import AsyncIterator
from typing import Any

import anyio
import httpx
import numpy as np
import pytest

from kserve_lite import Model, ModelDefinitionError, StartupError, serve
from kserve_lite.model import Phase
from kserve_lite.server.sockets import listen_on
from kserve_lite.transports.http1 import Http1
from tests.transports.client import (
    LIVE,
    PATIENCE,
    Client,
    echo,
    get,
    in_background,
    model_of,
    predict,
    until,
)

pytestmark = pytest.mark.anyio

HERE: dict[str, Any] = {"http_port": 0, "host": "127.0.0.1"}


async def status(client: Client, path: str) -> int:
    return (await client.ask(get(path))).status


# --- start ------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [True, False])
async def test_live_while_loading_and_ready_after(plain: bool) -> None:
    model = model_of(echo)
    go_on = threading.Event()
    go_on_async = anyio.Event()

    def load() -> str:
        go_on.wait(PATIENCE)
        return "the state"

    async def async_load() -> str:
        await go_on_async.wait()
        return "the state"

    model.load(load if plain else async_load)
    server = serve(model, **HERE)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(server._serve)
        await until(lambda: server._ports and model.phase is Phase.LOADING)
        async with Client(server.port) as client:
            assert await status(client, "/v2/health/live") == 200
            assert await status(client, "/v2/health/ready") == 503
            assert await status(client, "/v2/models/m/ready") == 503
            assert (await client.ask(predict(1))).status == 503
            go_on.set()
            go_on_async.set()
            await until(lambda: model.phase is Phase.READY)
            assert await status(client, "/v2/health/ready") == 200
            assert await status(client, "/v2/models/m/ready") == 200
            assert (await client.ask(predict(1))).status == 200
            assert model.state == "the state"
        server.stop()


async def test_not_ready_while_one_of_two_loads() -> None:
    first, second = model_of(echo, "first"), model_of(echo, "second")
    go_on = anyio.Event()

    @second.load
    async def load() -> None:
        await go_on.wait()

    server = serve(first, second, **HERE)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(server._serve)
        await until(lambda: second.phase is Phase.LOADING)
        async with Client(server.port) as client:
            assert await status(client, "/v2/health/ready") == 503
            assert await status(client, "/v2/models/first/ready") == 200
            assert await status(client, "/v2/models/second/ready") == 503
            go_on.set()
            await until(lambda: second.phase is Phase.READY)
            assert await status(client, "/v2/health/ready") == 200
        server.stop()


async def test_a_failing_load_says_where() -> None:
    model = model_of(echo)

    @model.load
    def load() -> None:
        np.load("/no/such/weights.npz")

    with pytest.raises(StartupError) as caught:
        async with serve(model, **HERE):
            pytest.fail("it must not start")
    text = str(caught.value)
    assert "model 'm' failed to load: FileNotFoundError: " in text
    # The line of the user's own function, not the one inside numpy.
    assert "(test_lifecycle.py:" in text
    assert text.endswith(", in load)")
    assert isinstance(caught.value.__cause__, FileNotFoundError)


async def test_a_failed_start_can_be_tried_again() -> None:
    first, second = model_of(echo, "first"), model_of(echo, "second")
    fails = True

    @first.load
    async def load() -> None:
        if fails:
            raise SystemExit(3)

    with pytest.raises(StartupError, match="SystemExit: 3"):
        await serve(first, second, **HERE)
    fails = False
    async with serve(first, second, **HERE) as server, Client(server.port) as client:
        assert await status(client, "/v2/health/ready") == 200


async def test_a_port_in_use_and_then_a_free_one() -> None:
    model = model_of(echo)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=f"port {port} on 127.0.0.1 is in use"):
            await serve(model, http_port=port, host="127.0.0.1")
    async with serve(model, **HERE) as server, Client(server.port) as client:
        assert await status(client, "/v2/health/ready") == 200


async def test_localhost_is_what_the_machine_has_of_it() -> None:
    async with serve(model_of(echo), http_port=0, host="localhost") as server:
        assert server.url == f"http://localhost:{server.port}"
        async with Client(server.port) as client:
            assert (await client.ask(LIVE)).status == 200


@pytest.mark.parametrize("host", ["no such host", "x" * 64, "192.0.2.1", "a..b"])
async def test_hosts_that_are_none(host: str) -> None:
    with pytest.raises(StartupError, match="cannot listen on"):
        await serve(model_of(echo), http_port=0, host=host)


async def test_a_port_before_the_start_is_an_error() -> None:
    server = serve(model_of(echo), **HERE)
    with pytest.raises(RuntimeError, match="does not listen yet"):
        server.port  # noqa: B018


async def test_definition_errors() -> None:
    with pytest.raises(StartupError, match="no model"):
        serve()
    with pytest.raises(ModelDefinitionError, match="no predict handler"):
        await serve(Model("m"), **HERE)
    with pytest.raises(ModelDefinitionError, match="Two models are named 'm'"):
        await serve(model_of(echo), model_of(echo), **HERE)


async def test_late_registration_is_an_error() -> None:
    model = model_of(echo)
    async with serve(model, **HERE):
        with pytest.raises(ModelDefinitionError, match="is being served"):
            model.postprocess(echo)


async def test_one_model_is_served_once_at_a_time_and_again_afterwards() -> None:
    model = model_of(echo)
    for _ in range(2):
        async with serve(model, **HERE) as server, Client(server.port) as client:
            with pytest.raises(ModelDefinitionError, match="served already"):
                await serve(model, **HERE)
            # The one that serves it is not disturbed.
            assert (await client.ask(predict(1))).json == {"instances": [1]}


async def test_two_servers_at_the_same_time() -> None:
    async with (
        serve(model_of(echo), **HERE) as one,
        serve(model_of(echo), **HERE) as other,
        httpx.AsyncClient() as client,
    ):
        assert one.port != other.port
        for server in (one, other):
            response = await client.get(f"{server.url}/v2/health/ready")
            assert response.json() == {"ready": True}


async def test_models_and_versions_over_rest() -> None:
    def versioned(version: str | None) -> Model:
        async def predicts(payload: Any) -> Any:
            return {"outputs": [], "parameters": {"version": version}}

        return Model("m", version=version, predict=predicts)

    models = [versioned("9"), versioned("10"), model_of(echo, "other one")]
    async with serve(*models, **HERE) as server, Client(server.port) as client:

        async def version(path: str) -> Any:
            body = b'{"inputs":[{"name":"a","shape":[1],"datatype":"BOOL","data":[1]}]}'
            lines = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}"
            answer = await client.ask(lines.encode() + b"\r\n\r\n" + body)
            return answer.status, answer.json.get("model_version")

        assert await version("/v2/models/m/versions/9/infer") == (200, "9")
        assert await version("/v2/models/m/versions/10/infer") == (200, "10")
        assert await version("/v2/models/m/infer") == (200, "10")
        assert (await version("/v2/models/m/versions/11/infer"))[0] == 404
        metadata = (await client.ask(get("/v2/models/m/versions/9"))).json
        assert metadata["versions"] == ["9", "10"]
        assert await status(client, "/v2/models/m/versions/9/ready") == 200
        assert await status(client, "/v2/models/m/versions/11/ready") == 404
        assert await status(client, "/v2/models/other%20one/ready") == 200
        assert (await client.ask(get("/v1/models"))).json == {
            "models": ["m", "other one"]
        }


# --- stop -------------------------------------------------------------------------


class Gate:
    """A predict handler that waits; and how it fared."""

    def __init__(self) -> None:
        self.started = anyio.Event()
        self.go_on = anyio.Event()
        self.cancelled = False

    async def __call__(self, payload: Any) -> Any:
        self.started.set()
        try:
            await self.go_on.wait()
        except anyio.get_cancelled_exc_class():
            self.cancelled = True
            raise
        return payload


async def test_a_stop_finishes_what_is_in_flight() -> None:
    gate = Gate()
    server = serve(model_of(gate), **HERE)
    async with in_background(server) as ended, Client(server.port) as busy:
        async with Client(server.port) as idle, Client(server.port) as late:
            assert (await idle.ask(LIVE)).status == 200
            # A request of which half has come is in flight too.
            await late.send(LIVE[:-2])
            await busy.send(predict(1))
            await gate.started.wait()
            await until(lambda: len(server._listener._connections) == 3)
            await until(lambda: not all(map(idle_one, server._listener._connections)))
            server.stop()
            assert await idle.rest() == b""
            with pytest.raises(ConnectionRefusedError):
                async with Client(server.port):
                    pass
            answer = await late.ask(b"\r\n")
            assert (answer.status, answer.headers["connection"]) == (200, "close")
            assert await late.rest() == b""
            assert not ended.is_set()
        gate.go_on.set()
        answer = await busy.answer()
        assert answer.json == {"instances": [1]}
        assert answer.headers["connection"] == "close"
        assert await busy.rest() == b""
        with anyio.fail_after(PATIENCE):
            await ended.wait()
    assert server.report.startswith("drained 1, aborted 0, in ")


async def test_a_stop_waits_for_a_slow_reader_and_no_longer() -> None:
    async def large(payload: Any) -> bytes:
        return bytes(20_000_000)

    server = serve(model_of(large), **HERE)
    async with (
        in_background(server) as ended,
        Client(server.port, receive_buffer=4096) as client,
    ):
        await client.send(predict(1))
        assert "connection" not in (await client.head()).headers
        (connection,) = server._listener._connections
        await until(lambda: connection.stalled)
        server.stop()
        # The head promised to stay; it is closed all the same.
        assert len(await client.rest()) == 20_000_000
        with anyio.fail_after(PATIENCE):
            await ended.wait()
    assert server.report.startswith("drained 1, aborted 0, in ")


def idle_one(connection: Any) -> bool:
    return phase(connection) in ("IDLE", "ANSWER")


def phase(connection: Any) -> str:
    """What an HTTP/1.1 connection waits for."""
    return connection._phase.name if isinstance(connection, Http1) else "FIRST BYTES"


async def test_not_ready_and_still_live_while_draining() -> None:
    gate = Gate()
    server = serve(model_of(gate), **HERE)
    async with in_background(server), Client(server.port) as busy:
        async with Client(server.port) as probe:
            await busy.send(predict(1))
            await gate.started.wait()
            # The head is begun before the stop: a new connection is not accepted.
            await probe.send(get("/v2/health/ready")[:-2])
            await until(
                lambda: any(phase(c) == "HEAD" for c in server._listener._connections)
            )
            server.stop()
            assert (await probe.ask(b"\r\n")).status == 503
        gate.go_on.set()
        assert (await busy.answer()).status == 200


@pytest.mark.parametrize("how", ["grace period", "at once", "at once, later"])
async def test_what_does_not_finish_is_aborted(how: str) -> None:
    gate = Gate()
    grace = 0.1 if how == "grace period" else 60
    server = serve(model_of(gate), grace_period=grace, **HERE)
    async with in_background(server) as ended, Client(server.port) as client:
        await client.send(predict(1))
        await gate.started.wait()
        server.stop(at_once=how == "at once")
        if how == "at once, later":
            await until(lambda: server._listener.draining)
            server.stop(at_once=True)
        assert await client.rest_or_reset() == b""
        with anyio.fail_after(PATIENCE):
            await ended.wait()
    assert gate.cancelled
    assert server.report.startswith("drained 0, aborted 1, in ")


async def test_a_stop_at_once_with_nothing_in_flight() -> None:
    server = serve(model_of(echo), **HERE)
    async with server, Client(server.port) as client:
        assert (await client.ask(LIVE)).status == 200
        server.stop(at_once=True)
    assert server.report.startswith("drained 0, aborted 0, in ")


async def test_a_stop_before_the_start_loads_nothing() -> None:
    model = model_of(echo)

    @model.load
    def load() -> None:
        pytest.fail("it must not load")

    server = serve(model, **HERE)
    server.stop()
    with anyio.fail_after(PATIENCE):
        await server
    assert model.phase is Phase.UNLOADED


async def test_a_stop_cancels_a_load() -> None:
    first, second = model_of(echo, "first"), model_of(echo, "second")
    started = anyio.Event()

    @first.load
    async def load() -> None:
        started.set()
        await anyio.sleep_forever()

    server = serve(first, second, **HERE)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(server._serve)
        await started.wait()
        server.stop()
    assert (first.phase, second.phase) == (Phase.UNLOADED, Phase.UNLOADED)


@pytest.mark.parametrize("plain", [True, False])
async def test_unload_gets_the_state(plain: bool) -> None:
    model = Model("m", predict=echo, load=lambda: ["the state"])
    seen: list[Any] = []

    def unload(state: Any) -> None:
        seen.append(state)

    async def async_unload(state: Any) -> None:
        await asyncio.sleep(0)
        seen.append(state)

    model.unload(unload if plain else async_unload)
    async with serve(model, **HERE):
        assert seen == []
    assert seen == [["the state"]]
    assert model.state is None


async def test_every_model_is_unloaded_whatever_one_does(
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, second = model_of(echo, "first"), model_of(echo, "second")
    unloaded: list[str] = []

    @first.unload
    def fail() -> None:
        raise OSError("will not go")

    @second.unload
    def unload() -> None:
        unloaded.append("second")

    async with serve(first, second, **HERE):
        pass
    assert unloaded == ["second"]
    assert "the unload handler of model first failed" in caplog.text


async def test_a_hanging_unload_can_be_given_up() -> None:
    first, second = model_of(echo, "first"), model_of(echo, "second")
    hangs = anyio.Event()
    unloaded = anyio.Event()

    @first.unload
    async def hang() -> None:
        hangs.set()
        await anyio.sleep_forever()

    @second.unload
    async def unload() -> None:
        unloaded.set()

    server = serve(first, second, **HERE)
    async with in_background(server) as ended:
        server.stop()
        await hangs.wait()
        server.stop(at_once=True)
        with anyio.fail_after(PATIENCE):
            await ended.wait()
    assert unloaded.is_set()


class Odd(Exception):
    """An exception of the program around the server."""


@pytest.mark.parametrize(
    "error", [Odd("odd"), SystemExit(3), ExceptionGroup("group", [Odd("odd")])]
)
async def test_exceptions_of_the_body_come_out_as_they_are(
    error: BaseException,
) -> None:
    with pytest.raises(type(error)) as caught:
        async with serve(model_of(echo), **HERE):
            raise error
    assert caught.value is error


async def test_a_body_is_left_by_a_loops_break() -> None:
    for _ in range(2):
        async with serve(model_of(echo), **HERE):
            break


async def everything_open() -> tuple[set[str], list[str], list[Any], list[Any]]:
    """Tasks, kserve-lite's threads, log handlers and signal handlers."""
    tasks = {task.get_name() for task in asyncio.all_tasks()}
    threads = [
        thread for thread in threading.enumerate() if "kserve-lite" in thread.name
    ]
    for thread in threads:  # what was told to end is given the time to do so
        await asyncio.to_thread(thread.join, PATIENCE)
    alive = [thread.name for thread in threads if thread.is_alive()]
    logger = logging.getLogger("kserve_lite")
    logs = [*logger.handlers, *logging.getLogger().handlers, logger.level]
    signals = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    return tasks, alive, [*logs, logger.propagate], signals


async def test_cancellation_drains_and_leaves_nothing() -> None:
    gate = Gate()

    def plain(payload: Any) -> Any:
        return payload

    async def stream(payload: Any) -> AsyncIterator[str]:
        yield "one"

    models = model_of(gate), model_of(plain, "plain"), model_of(stream, "stream")
    models[1].ready(lambda: True)
    before = await everything_open()
    server = serve(*models, **HERE)
    finished = anyio.Event()
    async with anyio.create_task_group() as tasks:

        async def live() -> None:
            try:
                await server
            finally:
                finished.set()

        tasks.start_soon(live)
        await until(lambda: models[2].phase is Phase.READY)
        port = server.port
        async with Client(port) as client, Client(port) as other:
            for name in ("plain", "stream"):
                request = predict(1).replace(b"models/m:", f"models/{name}:".encode())
                assert (await other.ask(request)).status == 200
            assert await status(other, "/v2/health/ready") == 200
            await client.send(predict(1))
            await gate.started.wait()
            tasks.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await until(lambda: server._listener.draining)
                assert not finished.is_set()
                gate.go_on.set()
                assert (await client.answer()).json == {"instances": [1]}
                with anyio.fail_after(PATIENCE):
                    await finished.wait()
    assert server.report.startswith("drained 1, aborted 0, in ")
    (sock,) = listen_on("127.0.0.1", port)  # the port is free again
    sock.close()
    assert await everything_open() == before


@pytest.mark.skipif(not hasattr(socket, "TCP_KEEPIDLE"), reason="not on this system")
async def test_clients_that_vanish_are_found_out() -> None:
    """The connections that are accepted, not just the sockets that listen."""
    async with serve(model_of(echo), **HERE) as server, Client(server.port) as client:
        assert (await client.ask(predict(1))).status == 200
        (connection,) = server._listener._connections
        sock = connection._transport.get_extra_info("socket")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
