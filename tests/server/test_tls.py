"""TLS: every protocol over it, who is let in, and what peers can do badly."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import grpc
import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization

from kserve_lite import InferResponse, Model, Server, StartupError, serve
from kserve_lite.transports import newcomer
from tests.certificates import Authority
from tests.clients.calls import Stub, infer_request
from tests.clients.models import make_echo
from tests.server.process import ECHO, PATIENCE, App, finish
from tests.server.test_run import one_line
from tests.transports.client import (
    LIVE,
    Client,
    in_background,
    model_of,
    nothing_unhandled,
    post,
    serving,
)

pytestmark = pytest.mark.anyio

MEGABYTE = 1024 * 1024

# How a client sees a handshake that fails: asyncio seldom gets to send the alert.
REFUSED = (ssl.SSLError, ConnectionError)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority that the server does not know."""
    return Authority(tmp_path_factory.mktemp("stranger"))


@asynccontextmanager
async def encrypted(
    authority: Authority, model: Model | None = None, **settings: Any
) -> AsyncGenerator[Server]:
    async with serving(
        model or make_echo(), **authority.settings, **settings
    ) as server:
        assert server.url == f"https://127.0.0.1:{server.port}"
        yield server


def http(context: ssl.SSLContext, version: int = 1) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        verify=context, http1=version == 1, http2=version == 2, timeout=PATIENCE
    )


@asynccontextmanager
async def connection(
    server: Server, context: ssl.SSLContext
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(
        "localhost", server.port, ssl=context
    )
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def asked_by_grpc(
    server: Server,
    credentials: grpc.ChannelCredentials,
    array: np.ndarray,
    model: str = "echo",
) -> np.ndarray:
    def ask() -> np.ndarray:
        options = [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_receive_message_length", -1),
        ]
        address = f"localhost:{server.port}"
        with grpc.secure_channel(address, credentials, options) as channel:
            stub = Stub(channel)
            request = infer_request(model, array)
            answer = stub.ModelInfer(request, timeout=PATIENCE)
            return np.frombuffer(answer.raw_output_contents[0], array.dtype)

    return await asyncio.to_thread(ask)


# --- every protocol ---------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
async def test_http(authority: Authority, version: int) -> None:
    async with (
        encrypted(authority) as server,
        http(authority.trusting(), version) as client,
    ):
        for n in range(3):
            answer = await client.post(
                f"{server.url}/v1/models/echo:predict", json={"instances": [n]}
            )
            assert answer.json() == {"predictions": [n]}
            assert answer.http_version == {1: "HTTP/1.1", 2: "HTTP/2"}[version]


@pytest.mark.parametrize("offered", [(), ("http/1.1",), ("spdy/3",)])
async def test_http1_where_alpn_has_nothing_else(
    authority: Authority, offered: tuple[str, ...]
) -> None:
    async with (
        encrypted(authority) as server,
        connection(server, authority.trusting(*offered)) as (reader, writer),
    ):
        writer.write(LIVE)
        assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"


async def test_grpc(authority: Authority) -> None:
    async with encrypted(authority) as server:
        credentials = grpc.ssl_channel_credentials(authority.ca.read_bytes())
        values = np.arange(4, dtype=np.float32)
        answer = await asked_by_grpc(server, credentials, values)
        assert answer.tolist() == values.tolist()


async def test_many_handshakes_at_a_time(authority: Authority) -> None:
    """None is lost, however early its first bytes come."""
    async with encrypted(authority, head_timeout=5) as server:

        async def ask() -> None:
            context = authority.trusting("http/1.1")
            async with connection(server, context) as (reader, writer):
                writer.write(LIVE)
                assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"

        for _ in range(4):
            async with anyio.create_task_group() as tasks:
                for _ in range(8):
                    tasks.start_soon(ask)


async def test_large_bodies_both_ways(authority: Authority) -> None:
    numbers = {"instances": list(range(300_000))}
    async with encrypted(authority) as server:
        for version in (1, 2):
            async with http(authority.trusting(), version) as client:
                answer = await client.post(
                    f"{server.url}/v1/models/echo:predict", content=json.dumps(numbers)
                )
                assert answer.json()["predictions"] == numbers["instances"]
        credentials = grpc.ssl_channel_credentials(authority.ca.read_bytes())
        values = np.arange(5 * MEGABYTE, dtype=np.float32)
        assert np.array_equal(await asked_by_grpc(server, credentials, values), values)


async def test_an_upload_that_is_refused(authority: Authority) -> None:
    """Its bytes are read and dropped as they are decrypted."""
    entered, go_on = asyncio.Event(), asyncio.Event()

    async def wait(payload: Any) -> Any:
        entered.set()
        await go_on.wait()
        return payload

    async with encrypted(authority, model_of(wait), max_in_flight=1) as server:
        url = f"{server.url}/v1/models/m:predict"
        async with http(authority.trusting()) as one, http(authority.trusting()) as two:
            first = asyncio.create_task(one.post(url, content=b'{"instances":[1]}'))
            await entered.wait()
            large = b'{"instances":[2]}'.ljust(5 * MEGABYTE)
            assert (await two.post(url, content=large)).status_code == 503
            go_on.set()
            assert (await first).status_code == 200
            assert (await two.post(url, content=large)).status_code == 200


async def test_closing_leaves_time_for_a_slow_reader(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of an answer arrives, though it takes longer than closing may."""
    monkeypatch.setattr(newcomer, "LINGER", 0.05)
    size = 8_000_000

    async def large(payload: object) -> bytes:
        return bytes(size)

    def ask(port: int) -> int:
        context = authority.trusting("http/1.1")
        with (
            socket.create_connection(("localhost", port), PATIENCE) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as sock,
        ):
            sock.sendall(
                b"POST /v1/models/large:predict HTTP/1.1\r\nHost: a\r\n"
                b"Connection: close\r\nContent-Length: 2\r\n\r\n{}"
            )
            got = b""
            while piece := sock.recv(200_000):
                got += piece
                time.sleep(0.002)  # a slow reader is what this is about
            return len(got.partition(b"\r\n\r\n")[2])

    model = Model("large", predict=large)
    async with encrypted(authority, model) as server:
        assert await asyncio.to_thread(ask, server.port) == size


async def test_the_second_port_is_encrypted_too(authority: Authority) -> None:
    async with (
        encrypted(authority, grpc_port=0) as server,
        http(authority.trusting(), 2) as client,
    ):
        assert server.grpc_port != server.port
        url = f"https://127.0.0.1:{server.grpc_port}/v2/health/live"
        assert (await client.get(url)).json() == {"live": True}


# --- who is let in ----------------------------------------------------------------


async def test_a_certificate_of_the_client(
    authority: Authority, stranger: Authority
) -> None:
    async with encrypted(authority, ssl_ca_certs=str(authority.ca)) as server:
        live = f"{server.url}/v2/health/live"
        context = authority.trusting(with_certificate=True)
        for version in (1, 2):
            async with http(context, version) as client:
                assert (await client.get(live)).status_code == 200
        without = authority.trusting()
        foreign = authority.trusting()
        foreign.load_cert_chain(stranger.client_cert, stranger.client_key)
        for refused in (without, foreign):
            async with http(refused) as client:
                with pytest.raises(httpx.TransportError):
                    await client.get(live)


async def test_a_certificate_of_the_client_over_grpc(authority: Authority) -> None:
    async with encrypted(authority, ssl_ca_certs=str(authority.ca)) as server:
        ca = authority.ca.read_bytes()
        own = (authority.client_key.read_bytes(), authority.client_cert.read_bytes())
        values = np.arange(4, dtype=np.float32)
        answer = await asked_by_grpc(
            server, grpc.ssl_channel_credentials(ca, *own), values
        )
        assert answer.tolist() == values.tolist()
        with pytest.raises(grpc.RpcError) as caught:
            await asked_by_grpc(server, grpc.ssl_channel_credentials(ca), values)
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
async def test_tls_1_1_is_refused(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    context = authority.trusting()
    context.set_ciphers("ALL:@SECLEVEL=0")  # else the client refuses by itself
    context.minimum_version = ssl.TLSVersion.TLSv1_1
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    with nothing_unhandled(caplog):
        async with encrypted(authority) as server:
            with pytest.raises(REFUSED):
                async with connection(server, context):
                    pass
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            async with connection(server, context) as (_, writer):
                assert writer.get_extra_info("ssl_object").version() == "TLSv1.2"


# --- peers that do it badly -------------------------------------------------------


async def test_plain_http_to_a_port_with_tls(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    with nothing_unhandled(caplog):
        async with encrypted(authority) as server:
            for request in (LIVE, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x00" * 9):
                async with Client(server.port) as client:
                    await client.send(request)
                    assert b"HTTP/1.1 200" not in await client.rest_or_reset()


async def test_tls_to_a_plain_port(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    with nothing_unhandled(caplog):
        async with serving(make_echo()) as server:
            for protocols in ((), ("h2",)):
                with pytest.raises(REFUSED):
                    async with connection(server, authority.trusting(*protocols)):
                        pass


def client_hello() -> bytes:
    outgoing = ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(
        ssl.MemoryBIO(), outgoing, server_hostname="localhost"
    )
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


HELLO = client_hello()


# Named, since a hello is random, and the name of a test must not be.
@pytest.mark.parametrize(
    "sent",
    [b"", HELLO[:1], HELLO[:50], HELLO],
    ids=["nothing", "a byte", "a part", "a hello"],
)
async def test_a_handshake_that_does_not_end_is_cut(
    authority: Authority, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with nothing_unhandled(caplog):
        async with encrypted(authority, head_timeout=0.2) as server:
            async with Client(server.port) as client:
                await client.send(sent)
                await client.rest_or_reset()
            assert not server._listener._connections


@pytest.mark.parametrize(
    "sent", [b"", HELLO[:50], HELLO], ids=["nothing", "a part", "a hello"]
)
async def test_a_client_that_leaves_in_the_handshake_is_forgotten(
    authority: Authority, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with nothing_unhandled(caplog):
        async with encrypted(authority) as server:
            for leave in (Client.close, Client.reset, Client.half_close):
                async with Client(server.port) as client:
                    await client.send(sent)
                    await anyio.sleep(0.01)  # so that it has been read, or not
                    leave(client)
                with anyio.fail_after(PATIENCE):
                    while server._listener._connections:  # noqa: ASYNC110
                        await anyio.sleep(0.005)


@pytest.mark.parametrize(
    "sent", [b"", HELLO[:50], HELLO], ids=["nothing", "a part", "a hello"]
)
async def test_a_stop_does_not_wait_for_handshakes(
    authority: Authority, sent: bytes
) -> None:
    with anyio.fail_after(PATIENCE / 2):
        async with encrypted(authority, head_timeout=PATIENCE) as server:
            client = await Client(server.port).__aenter__()
            await client.send(sent)
            while not server._listener._connections:  # noqa: ASYNC110
                await anyio.sleep(0.005)
            await anyio.sleep(0.01)
        await client.rest_or_reset()
        client.close()
    assert "aborted 0" in server.report


async def test_connections_in_their_handshake_count(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    with nothing_unhandled(caplog):
        async with encrypted(authority, max_connections=2) as server:
            async with Client(server.port) as first, Client(server.port) as second:
                await first.send(HELLO[:50])
                await second.send(HELLO)
                while len(server._listener._connections) < 2:  # noqa: ASYNC110
                    await anyio.sleep(0.005)
                with pytest.raises(REFUSED):
                    async with connection(server, authority.trusting()):
                        pass
            with anyio.fail_after(PATIENCE):
                while server._listener._connections:  # noqa: ASYNC110
                    await anyio.sleep(0.005)
            async with http(authority.trusting()) as client:
                answer = await client.get(f"{server.url}/v2/health/live")
                assert answer.status_code == 200


# --- it stops ---------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["http", "grpc"])
async def test_a_stop_finishes_what_is_in_flight(
    authority: Authority, protocol: str, caplog: pytest.LogCaptureFixture
) -> None:
    # Not HTTP/2 by httpx: the h2 package takes no frame after a GOAWAY.
    started, go_on = anyio.Event(), anyio.Event()

    async def predict(payload: Any) -> Any:
        started.set()
        await go_on.wait()
        return InferResponse(payload.inputs) if protocol == "grpc" else payload

    async def ask() -> None:
        if protocol == "grpc":
            credentials = grpc.ssl_channel_credentials(authority.ca.read_bytes())
            values = np.arange(3, dtype=np.float32)
            answered = await asked_by_grpc(server, credentials, values, "m")
            assert answered.tolist() == values.tolist()
            return
        async with http(authority.trusting()) as client:
            url = f"{server.url}/v1/models/m:predict"
            answer = await client.post(url, json={"instances": [1]})
            assert answer.json() == {"instances": [1]}
            # The client keeps its connection; the server does not.
            with anyio.fail_after(PATIENCE):
                await ended.wait()

    server = serve(
        model_of(predict), http_port=0, host="127.0.0.1", **authority.settings
    )
    with nothing_unhandled(caplog):
        async with in_background(server) as ended, anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            with anyio.fail_after(PATIENCE):
                await started.wait()
                server.stop()
                go_on.set()
    assert "drained 1, aborted 0" in server.report


async def test_an_idle_connection_is_closed_properly(authority: Authority) -> None:
    """With a close_notify, without which a client must take it for an attack."""
    server = serve(make_echo(), http_port=0, host="127.0.0.1", **authority.settings)
    async with (
        in_background(server),
        connection(server, authority.trusting()) as (reader, writer),
    ):
        writer.write(post(b'{"instances":[1]}', path="/v1/models/echo:predict"))
        head = await reader.readuntil(b"\r\n\r\n")
        assert b" 200 OK\r\n" in head
        assert await reader.readexactly(len(b'{"predictions":[1]}'))
        server.stop()
        with anyio.fail_after(PATIENCE):
            assert await reader.read() == b""


# --- processes --------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("apps")
    (path / "app.py").write_text(ECHO)
    return path


def flags(**settings: str | Path) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_the_banner_and_its_line(folder: Path, authority: Authority, loop: str) -> None:
    arguments = flags(http_port="0", event_loop=loop, ssl_certfile=authority.both)
    with App("app.py", *arguments, cwd=folder) as app:
        assert pasted(app.curl, folder) == "200"
        assert " -k " in app.curl
        assert any(" on https://127.0.0.1:" in line for line in app.lines)
        result = app.stop()
    assert (result.status, result.errors) == (0, [])


def test_the_banner_where_clients_need_certificates(
    folder: Path, authority: Authority
) -> None:
    settings = authority.settings | {"ssl_ca_certs": str(authority.ca)}
    with App("app.py", *flags(http_port="0", **settings), cwd=folder) as app:
        assert "--cert client.pem" in app.curl
        assert any("client.pem" in line for line in app.lines if "curl" not in line)
        (folder / "client.pem").write_bytes(
            authority.client_key.read_bytes() + authority.client_cert.read_bytes()
        )
        assert pasted(app.curl, folder) == "200"


def pasted(line: str, folder: Path) -> str:
    done = subprocess.run(
        ["sh", "-c", line + " -s -o answer -w '%{http_code}'"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=folder,
        check=True,
    )
    return done.stdout


def encrypted_key(authority: Authority) -> bytes:
    key = serialization.load_pem_private_key(authority.key.read_bytes(), None)
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )


CASES: dict[str, tuple[dict[str, str], list[str]]] = {
    "no certificate": (
        {"ssl_certfile": "missing.pem", "ssl_keyfile": "key.pem"},
        ["--ssl_certfile", "missing.pem", "No such file"],
    ),
    "no key": (
        {"ssl_certfile": "cert.pem", "ssl_keyfile": "missing.pem"},
        ["--ssl_keyfile", "missing.pem", "No such file"],
    ),
    "a key is missing": ({"ssl_certfile": "cert.pem"}, ["--ssl_keyfile", "cert.pem"]),
    "a folder": (
        {"ssl_certfile": ".", "ssl_keyfile": "key.pem"},
        ["--ssl_certfile", "directory"],
    ),
    "no PEM": (
        {"ssl_certfile": "text.pem", "ssl_keyfile": "key.pem"},
        ["--ssl_certfile", "text.pem", "PEM"],
    ),
    "an empty file": (
        {"ssl_certfile": "empty.pem", "ssl_keyfile": "key.pem"},
        ["--ssl_certfile", "empty.pem", "PEM"],
    ),
    "the key of another": (
        {"ssl_certfile": "cert.pem", "ssl_keyfile": "other.pem"},
        ["other.pem", "cert.pem", "must belong"],
    ),
    "a passphrase": (
        {"ssl_certfile": "cert.pem", "ssl_keyfile": "secret.pem"},
        ["--ssl_keyfile", "secret.pem", "passphrase"],
    ),
    "a key alone": ({"ssl_keyfile": "key.pem"}, ["--ssl_keyfile", "--ssl_certfile"]),
    "authorities alone": (
        {"ssl_ca_certs": "ca.pem"},
        ["--ssl_ca_certs", "--ssl_certfile"],
    ),
    "no authorities": (
        {"ssl_certfile": "both.pem", "ssl_ca_certs": "missing.pem"},
        ["--ssl_ca_certs", "missing.pem", "No such file"],
    ),
    "authorities are no PEM": (
        {"ssl_certfile": "both.pem", "ssl_ca_certs": "text.pem"},
        ["--ssl_ca_certs", "text.pem", "PEM"],
    ),
}


@pytest.fixture(scope="module")
def files(authority: Authority, stranger: Authority) -> Path:
    """The folder with all the files that `CASES` name."""
    folder = authority.key.parent
    (folder / "text.pem").write_text("text\n")
    (folder / "empty.pem").write_text("")
    (folder / "other.pem").write_bytes(stranger.key.read_bytes())
    (folder / "secret.pem").write_bytes(encrypted_key(authority))
    return folder


@pytest.mark.parametrize("case", CASES)
async def test_files_that_are_wrong(
    files: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    settings, words = CASES[case]
    with pytest.raises(StartupError) as caught:
        await serve(make_echo(), http_port=0, host="127.0.0.1", **settings)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("case", ["a key alone", "a passphrase", "no key"])
def test_files_that_are_wrong_end_the_process_with_one_line(
    files: Path, case: str
) -> None:
    (files / "app.py").write_text(ECHO)
    settings, words = CASES[case]
    # Without a terminal and with one, a passphrase is not asked for.
    line = one_line(finish("app.py", *flags(http_port="0", **settings), cwd=files))
    for word in words:
        assert word in line
