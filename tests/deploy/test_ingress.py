"""The server answers whatever Host comes: KServe's gateway sends its services' names.

A gateway routes by Host and passes it on: the service's public name, the name in the
cluster, or the pod's own address from a probe, with or without a port. What RFC 9112
section 3.2 forbids is refused all the same.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import grpc
import h2.config
import h2.connection
import h2.events
import numpy as np
import pytest

from kserve_lite import Model
from tests.clients.calls import Stub, infer_request, message
from tests.support import RawAnswer, ServerThread, exchange

HOSTS = [
    "m.default.example.com",
    "M.Default.EXAMPLE.com:8443",
    "m-predictor.default.svc.cluster.local",
    "m-predictor-00001-private.default:80",
    "10.1.2.3:8012",
    "[2001:db8::1]:8080",
    "localhost",
    "under_score.example.com",
    "xn--mnchen-3ya.example.com",
    f"{'a' * 63}.{'b' * 63}.{'c' * 63}.{'d' * 61}",
    "m.default.example.com.",
    "queue-proxy:1",
    "anything:99999",
]
V1 = "/v1/models/m:predict", {"instances": [[1, 2]]}, {"predictions": [[2, 4]]}
V2 = (
    "/v2/models/m/infer",
    {"inputs": [{"name": "x", "datatype": "INT64", "shape": [2], "data": [1, 2]}]},
    [2, 4],
)
PROTOCOLS = pytest.mark.parametrize("asked", [V1, V2], ids=["v1", "v2"])


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    model = Model("m")

    @model.predict
    async def predict(x: np.ndarray) -> np.ndarray:
        return x * 2

    with ServerThread(model) as server:
        yield server.port


def answered(status: int, body: bytes) -> Any:
    assert status == 200, body
    answer = json.loads(body)
    return answer["outputs"][0]["data"] if "outputs" in answer else answer


def http1(
    port: int, path: str, body: Any, *heads: str, version: str = "1.1"
) -> RawAnswer:
    content = json.dumps(body).encode()
    head = "".join(f"{line}\r\n" for line in heads)
    return exchange(
        port,
        f"POST {path} HTTP/{version}\r\n{head}content-length: {len(content)}\r\n"
        "connection: close\r\n\r\n".encode()
        + content,
    )


def http2(
    port: int, path: str, body: Any, *fields: tuple[str, str]
) -> tuple[int, bytes]:
    """The answer to a request with these fields in the place of :authority.

    Its status is 0 where the stream is reset instead.
    """
    content = json.dumps(body).encode()
    # A peer that sends what h2 would not.
    config = h2.config.H2Configuration(
        validate_outbound_headers=False, normalize_outbound_headers=False
    )
    connection = h2.connection.H2Connection(config)
    connection.initiate_connection()
    pseudo = [(":method", "POST"), (":scheme", "http"), (":path", path)]
    others = sorted(fields, key=lambda field: not field[0].startswith(":"))
    connection.send_headers(1, pseudo + others)
    connection.send_data(1, content, end_stream=True)
    status, answer = 0, b""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as peer:
        peer.sendall(connection.data_to_send())
        while True:
            data = peer.recv(1 << 16)
            assert data, "the server closed the connection"
            for event in connection.receive_data(data):
                if isinstance(event, h2.events.ResponseReceived):
                    status = int(dict(event.headers)[b":status"])
                elif isinstance(event, h2.events.DataReceived):
                    answer += event.data
                elif isinstance(event, (h2.events.StreamEnded, h2.events.StreamReset)):
                    return status, answer
            peer.sendall(connection.data_to_send())


@PROTOCOLS
@pytest.mark.parametrize("host", HOSTS)
def test_any_host_over_both_http_versions(
    port: int, host: str, asked: tuple[str, Any, Any]
) -> None:
    path, body, expected = asked
    plain = http1(port, path, body, f"Host: {host}")
    assert answered(plain.status, plain.body) == expected
    assert answered(*http2(port, path, body, (":authority", host))) == expected


@PROTOCOLS
def test_hosts_in_other_places(port: int, asked: tuple[str, Any, Any]) -> None:
    path, body, expected = asked
    # An empty one is a Host (RFC 9112 section 3.2), and HTTP/1.0 needs none.
    for answer in (
        http1(port, path, body, "Host:"),
        http1(port, path, body, version="1.0"),
        http1(port, path, body, "HOST:m.example.com", version="1.0"),
        # A proxy's form of the target (section 3.2.2), which names it once more.
        http1(port, f"http://m.example.com{path}", body, "Host: elsewhere"),
        http1(
            port,
            path,
            body,
            *("Host: m.default.example.com", "X-Forwarded-Host: other:1"),
            *("Forwarded: host=third", "K-Network-Hash: 1"),
        ),
    ):
        assert answered(answer.status, answer.body) == expected
    for fields in (
        [("host", "m.default.example.com")],  # as from a gateway that had HTTP/1.1
        [(":authority", "m.example.com"), ("host", "m.example.com")],
    ):
        assert answered(*http2(port, path, body, *fields)) == expected


def test_none_or_two_are_no_request(port: int) -> None:
    path, body, _ = V1
    assert http1(port, path, body).status == 400
    two = http1(port, path, body, "Host: a.example.com", "Host: b.example.com")
    assert two.status == 400
    assert http2(port, path, body) == (0, b"")
    both = (":authority", "a.example.com"), ("host", "b.example.com")
    assert http2(port, path, body, *both) == (0, b"")


@pytest.mark.parametrize("host", ["m.default.example.com", "M.example.com:8443"])
def test_grpc_with_the_services_name(port: int, host: str) -> None:
    """As `grpcurl -authority` sends it through the gateway."""
    options = [("grpc.default_authority", host)]
    with grpc.insecure_channel(f"127.0.0.1:{port}", options) as channel:
        stub = Stub(channel)
        ready = stub.ModelReady(message("ModelReadyRequest", name="m"), timeout=30)
        assert ready.ready
        request = infer_request("m", np.array([1, 2], np.int64))
        answer = stub.ModelInfer(request, timeout=30)
    (raw,) = answer.raw_output_contents
    assert np.frombuffer(raw, np.int64).tolist() == [2, 4]
