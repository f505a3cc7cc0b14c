"""The second port, and gRPC turned off."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest

from kserve_lite import StartupError, serve
from kserve_lite.server.sockets import listen_on
from tests.clients.calls import Stub, infer_request, message
from tests.clients.models import make_echo
from tests.server.process import ECHO, App, finish
from tests.server.test_run import free_port, one_line
from tests.support import ServerThread
from tests.transports.client import LIVE, Client, serving

PATIENCE = 20
GRPC = ("grpclib", "google", "kserve_lite.rpc")


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock.getsockname()[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "app.py").write_text(ECHO)
    return tmp_path


def stub_of(port: int | None) -> Any:
    return grpc.insecure_channel(
        f"127.0.0.1:{port}", options=[("grpc.use_local_subchannel_pool", 1)]
    )


# --- the second port --------------------------------------------------------------


def test_both_ports_serve_every_protocol() -> None:
    with ServerThread(make_echo(), grpc_port=0) as server:
        second = server.server.grpc_port
        assert second not in (None, 0, server.port)
        for port in (server.port, second):
            url = f"http://127.0.0.1:{port}/v1/models/echo:predict"
            answer = httpx.post(url, json={"instances": [1]})
            assert answer.json() == {"predictions": [1]}
            with stub_of(port) as channel:
                request = infer_request("echo", np.arange(3))
                assert Stub(channel).ModelInfer(request, timeout=PATIENCE).outputs
    for port in (server.port, second):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))


def test_none_is_opened_unasked_where_the_first_is_any_free_one() -> None:
    with ServerThread(make_echo()) as server:
        assert server.server.grpc_port is None


def test_it_is_the_first_one_again() -> None:
    port = free_port()
    with ServerThread(make_echo(), http_port=port, grpc_port=port) as server:
        assert (server.port, server.server.grpc_port) == (port, None)
        with stub_of(port) as channel:
            asked = message("ServerLiveRequest")
            assert Stub(channel).ServerLive(asked, timeout=PATIENCE).live


@pytest.mark.anyio
async def test_a_port_that_was_asked_for_and_is_in_use(taken: int) -> None:
    with pytest.raises(StartupError, match=f"port {taken} .* in use.*--grpc_port"):
        await serve(make_echo(), http_port=0, grpc_port=taken, host="127.0.0.1")
    # The first port is free again.
    port = free_port()
    with pytest.raises(StartupError, match="--grpc_port"):
        await serve(make_echo(), http_port=port, grpc_port=taken, host="127.0.0.1")
    async with (
        serve(make_echo(), http_port=port, grpc_port=port, host="127.0.0.1"),
        Client(port) as client,
    ):
        assert (await client.ask(LIVE)).status == 200


@pytest.mark.anyio
async def test_the_default_port_may_be_in_use(
    taken: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def elsewhere(host: str, port: int, flag: str = "http_port") -> list[socket.socket]:
        asked.append((port, flag))
        return listen_on(host, taken if port == 8081 else port, flag)

    monkeypatch.setattr("kserve_lite.server.sockets.listen_on", elsewhere)
    port = free_port()
    async with (
        serve(make_echo(), http_port=port, host="127.0.0.1") as server,
        Client(port) as client,
    ):
        assert asked == [(port, "http_port"), (8081, "grpc_port")]
        assert server.grpc_port is None
        assert (await client.ask(LIVE)).status == 200
    (warning,) = (r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    assert f"port {taken} on 127.0.0.1 is in use" in warning
    assert f"gRPC is served on {port}" in warning


@pytest.mark.anyio
async def test_an_address_of_both_families_has_both_ports() -> None:
    async with serving(make_echo(), grpc_port=0) as server:
        assert len(server._listener._servers) == 2


def test_the_banner_shows_where_grpc_is(folder: Path) -> None:
    first, second = free_port(), free_port()
    ports = [f"--http_port={first}", f"--grpc_port={second}"]
    with App("app.py", *ports, cwd=folder) as app:
        assert f"  gRPC  127.0.0.1:{first}, 127.0.0.1:{second}" in app.lines
        result = app.stop()
    assert (result.status, result.errors) == (0, [])
    with App("app.py", "--http_port=0", cwd=folder) as app:
        assert f"  gRPC  127.0.0.1:{app.port}" in app.lines
    with App("app.py", "--http_port=0", "--enable_grpc=false", cwd=folder) as app:
        assert not [line for line in app.lines if "gRPC" in line]


def test_a_second_port_in_use_ends_the_process_with_one_line(
    folder: Path, taken: int
) -> None:
    flags = ["--host=127.0.0.1", "--http_port=0", f"--grpc_port={taken}"]
    line = one_line(finish("app.py", *flags, cwd=folder))
    assert f"port {taken} on 127.0.0.1 is in use" in line
    assert "--grpc_port" in line


# --- gRPC turned off --------------------------------------------------------------


def test_without_grpc_a_call_is_unimplemented() -> None:
    with ServerThread(make_echo(), enable_grpc=False, grpc_port=0) as server:
        assert server.server.grpc_port is None
        with stub_of(server.port) as channel:
            stub = Stub(channel)
            calls = (
                (stub.ServerLive, message("ServerLiveRequest")),
                (stub.ModelInfer, infer_request("echo", np.arange(3))),
            )
            for call, request in calls:
                with pytest.raises(grpc.RpcError) as caught:
                    call(request, timeout=PATIENCE)
                error: Any = caught.value
                assert error.code() is grpc.StatusCode.UNIMPLEMENTED, error
        answer = httpx.get(f"{server.url}/v2/health/live")
        assert answer.json() == {"live": True}


SERVING = """
import anyio, sys
from kserve_lite import Model, serve

async def predict(payload):
    return payload

async def main():
    model = Model("m", predict=predict)
    async with serve(model, http_port=0, host="127.0.0.1", enable_grpc={grpc}):
        pass

anyio.run(main)
"""


@pytest.mark.parametrize(
    ("code", "imported"),
    [
        ("import kserve_lite", False),
        ("import kserve_lite.cli", False),
        (SERVING.format(grpc=False), False),
        (SERVING.format(grpc=True), True),
    ],
    ids=["package", "command", "without", "with"],
)
def test_grpc_is_imported_where_it_is_served(
    code: str, imported: bool, tmp_path: Path
) -> None:
    code += "\nimport sys; print(*sys.modules)"
    result = finish("-W", "error", "-c", code, cwd=tmp_path)
    assert result.status == 0, result.err
    found = [
        name
        for name in GRPC
        if any(m == name or m.startswith(f"{name}.") for m in result.out.split())
    ]
    assert found == (list(GRPC) if imported else [])
