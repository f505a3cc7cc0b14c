"""httpx over HTTP/1.1, and over HTTP/2, which it speaks by ALPN only; and h2 itself."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import anyio
import h2.config
import h2.connection
import h2.events
import httpx
import numpy as np
import pytest

from tests.certificates import Authority
from tests.clients.models import make_echo, make_sums
from tests.support import ServerThread

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module", params=["plain", "tls"])
def server(
    request: pytest.FixtureRequest, authority: Authority
) -> Iterator[ServerThread]:
    settings = authority.settings if request.param == "tls" else {}
    with ServerThread(make_echo(), make_sums(), **settings) as server:
        yield server


async def test_both_apis(server: ServerThread, authority: Authority) -> None:
    async with httpx.AsyncClient(
        base_url=server.url, verify=authority.trusting(), http2=True
    ) as client:
        answer = await client.post(
            "/v1/models/sums:predict", json={"instances": [[1, 2], [3, 4]]}
        )
        assert answer.json() == {"predictions": [3, 7]}
        tls = server.url.startswith("https")
        assert answer.http_version == ("HTTP/2" if tls else "HTTP/1.1")
        tensor = {"name": "a", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}
        answer = await client.post("/v2/models/sums/infer", json={"inputs": [tensor]})
        assert answer.json()["outputs"][0]["data"] == [3]
        wrong = tensor | {"shape": [1, 3]}
        answer = await client.post("/v2/models/sums/infer", json={"inputs": [wrong]})
        assert answer.status_code == 400
        assert (await client.get("/nowhere")).status_code == 404


async def test_many_at_a_time(server: ServerThread, authority: Authority) -> None:
    async with httpx.AsyncClient(
        base_url=server.url, verify=authority.trusting(), http2=True, timeout=20
    ) as client:

        async def ask(n: int) -> None:
            values = np.full(2000, n).tolist()
            answer = await client.post(
                "/v1/models/echo:predict", json={"instances": values}
            )
            assert answer.json() == {"predictions": values}

        async with anyio.create_task_group() as tasks:
            for n in range(50):
                tasks.start_soon(ask, n)


def test_a_client_that_has_sent_all_is_answered_and_left() -> None:
    """It closes its sending side while it waits; the server then closes its own."""
    with (
        ServerThread(make_echo()) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=20) as sock,
    ):
        client = h2.connection.H2Connection(h2.config.H2Configuration())
        client.initiate_connection()
        client.send_headers(
            1,
            [
                (":method", "GET"),
                (":path", "/v2/health/live"),
                (":scheme", "http"),
                (":authority", "x"),
            ],
            end_stream=True,
        )
        sock.sendall(client.data_to_send())
        sock.shutdown(socket.SHUT_WR)
        body = b""
        while data := sock.recv(1 << 16):
            for event in client.receive_data(data):
                if isinstance(event, h2.events.DataReceived):
                    body += event.data or b""
        assert body == b'{"live":true}'
