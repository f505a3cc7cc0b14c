"""The clients of compat against real servers: ours here, KServe's in
`beside_kserve.py`.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
import pytest

from kserve_lite import Model
from kserve_lite.compat.errors import InvalidInput, UnsupportedProtocol
from kserve_lite.compat.inference_client import (
    InferenceGRPCClient,
    InferenceRESTClient,
    RESTConfig,
    RpcError,
)
from kserve_lite.compat.protocol.infer_type import (
    InferInput,
    InferRequest,
    InferResponse,
    RequestedOutput,
)
from kserve_lite.errors import ServerNotReady
from tests.certificates import Authority
from tests.clients.models import Waiting, make_echo, make_mirror, make_sums
from tests.support import ServerThread

pytestmark = pytest.mark.anyio
PATIENCE = 30
PAIRS = np.array([[1, 2], [3, 4]], np.float32)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Failing:
    """A model that refuses as often as it is told to, and counts what it is asked."""

    def __init__(self) -> None:
        self.model = Model("failing", predict=self.predict)
        self.left = self.asked = 0

    async def predict(self, payload: Any) -> Any:
        self.asked += 1
        if self.left:
            self.left -= 1
            raise ServerNotReady
        return payload if isinstance(payload, dict) else np.ones(1, np.float32)

    def times(self, count: int) -> None:
        self.left, self.asked = count, 0


FAILING = Failing()
WAITING = Waiting()


@pytest.fixture(scope="module")
def server() -> Iterator[ServerThread]:
    models = make_echo(), make_sums(), make_mirror(), FAILING.model, WAITING.model
    with ServerThread(*models) as server:
        yield server


def rest(protocol: str, **settings: Any) -> InferenceRESTClient:
    settings = {"timeout": PATIENCE} | settings
    return InferenceRESTClient(RESTConfig(protocol=protocol, **settings))


def rpc(server: ServerThread, **settings: Any) -> InferenceGRPCClient:
    return InferenceGRPCClient(
        f"127.0.0.1:{server.port}", **{"timeout": PATIENCE} | settings
    )


def asked(model: str, *, raw: bool, array: np.ndarray = PAIRS) -> InferRequest:
    tensor = InferInput("in0", list(array.shape), "FP32")
    tensor.set_data_from_numpy(array, binary_data=raw)
    return InferRequest(model, [tensor], "7")


def values_of(answer: InferResponse | dict[str, Any], name: str) -> Any:
    assert isinstance(answer, InferResponse)
    output = answer.get_output_by_name(name)
    assert output is not None
    return output.as_numpy().tolist()


# --- REST -----------------------------------------------------------------------------


async def test_v1(server: ServerThread) -> None:
    url = server.url
    async with rest("V1") as client:
        assert await client.is_server_live(url)
        assert await client.is_model_ready(url, "echo")
        body = {"instances": [[1, 2]]}
        answer = await client.infer(url, body, "echo")
        assert answer == {"predictions": [[1, 2]]}
        answer = await client.explain(url + "/", "echo", body)
        assert answer == {"explanations": [[1, 2]]}
        with pytest.raises(
            httpx.HTTPStatusError, match=r"nobody does not exist.*'404 Not Found'"
        ) as caught:
            await client.infer(url, body, "nobody")
        assert caught.value.response.status_code == 404
        with pytest.raises(httpx.HTTPStatusError):
            await client.is_model_ready(url, "nobody")
        with pytest.raises(ValueError, match="model_name"):
            await client.infer(url, body)
        with pytest.raises(UnsupportedProtocol):
            await client.is_server_ready(url)
        for wrong in ("ftp://a", "/relative", "127.0.0.1:80"):
            with pytest.raises(httpx.InvalidURL):
                await client.infer(wrong, body, "echo")


async def test_a_graphs_answer_is_any_json(server: ServerThread) -> None:
    url = httpx.URL(f"{server.url}/v1/models/echo:predict")
    async with rest("v2") as client:
        answer = await client.infer(url, {"instances": [1]}, is_graph_endpoint=True)
        assert answer == {"predictions": [1]}


@pytest.mark.parametrize("raw", [True, False])
async def test_v2(server: ServerThread, raw: bool) -> None:
    url = server.url
    request = asked("sums", raw=raw)
    headers: dict[str, str] = {}
    given = {"X-Request-Id": "mine"}
    async with rest("v2") as client:
        assert await client.is_server_live(url)
        assert await client.is_server_ready(url)
        assert await client.is_model_ready(url, "sums")
        assert not await client.is_model_ready(url, "nobody")
        answer = await client.infer(
            url, request, "sums", headers=given, response_headers=headers
        )
        assert values_of(answer, "sums") == [3, 7]
        assert isinstance(answer, InferResponse)
        assert (answer.id, answer.model_version) == ("7", "3")
        assert headers["x-request-id"] == "mine"
        assert given == {"X-Request-Id": "mine"}
        request.request_outputs = [RequestedOutput("sums", {"binary_data": True})]
        answer = await client.infer(url, request, "sums")
        assert values_of(answer, "sums") == [3, 7]
        with pytest.raises(httpx.HTTPStatusError, match="nobody does not exist"):
            await client.infer(url, request, "nobody")
        with pytest.raises(UnsupportedProtocol):
            await client.explain(url, "sums", {})


async def test_a_protocol_that_rest_has_not(server: ServerThread) -> None:
    async with rest("grpc-v2") as client:
        for call in (
            client.infer(server.url, {}, "echo"),
            client.explain(server.url, "echo", {}),
            client.is_server_live(server.url),
            client.is_server_ready(server.url),
            client.is_model_ready(server.url, "echo"),
        ):
            with pytest.raises(UnsupportedProtocol):
                await call


async def test_a_models_name_is_one_segment(server: ServerThread) -> None:
    async with rest("v2") as client:
        assert not await client.is_model_ready(server.url, "../models/sums")
        assert not await client.is_model_ready(server.url, "sums?x=#")


async def test_rest_asks_again_what_was_refused_for_now(server: ServerThread) -> None:
    body = {"instances": [1]}
    async with rest("v1", retries=2) as client:
        FAILING.times(2)
        assert await client.infer(server.url, body, "failing") == body
        assert FAILING.asked == 3
        FAILING.times(3)
        with pytest.raises(httpx.HTTPStatusError, match="503"):
            await client.infer(server.url, body, "failing")
        assert FAILING.asked == 3
    async with rest("v1", retries=0) as client:
        FAILING.times(1)
        with pytest.raises(httpx.HTTPStatusError, match="503"):
            await client.infer(server.url, body, "failing")
        assert FAILING.asked == 1


async def test_the_whole_call_has_its_time(server: ServerThread) -> None:
    FAILING.times(1000)
    async with rest("v1", retries=1000) as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.infer(server.url, {"instances": [1]}, "failing", timeout=0.3)
        assert await client.is_server_live(server.url, timeout=None)
        steps = httpx.Timeout(PATIENCE)
        assert await client.is_server_live(server.url, timeout=steps)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@asynccontextmanager
async def late_server(port: int) -> AsyncIterator[None]:
    """A server on a port that refuses connections while the server starts."""
    late = ServerThread(make_sums(), http_port=port)
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(None, late.__enter__)
    try:
        yield
    finally:
        await loop.run_in_executor(None, late.__exit__)


async def test_clients_come_back_for_a_server_that_starts() -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    async with (
        rest("v2", retries=20) as client,
        InferenceGRPCClient(f"127.0.0.1:{port}", retries=20, timeout=PATIENCE) as other,
    ):
        first = asyncio.create_task(client.is_server_ready(url))
        second = asyncio.create_task(other.is_server_ready())
        async with late_server(port):
            assert await first
            assert await second


async def test_nobody_there() -> None:
    port = free_port()
    async with rest("v2", retries=1) as client:
        with pytest.raises(httpx.ConnectError):
            await client.is_server_live(f"http://127.0.0.1:{port}")
    async with InferenceGRPCClient(f"127.0.0.1:{port}", retries=1) as other:
        with pytest.raises(RpcError) as caught:
            await other.is_server_live()
        assert caught.value.status == "UNAVAILABLE"


async def test_tls_with_a_certificate_of_the_client(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    authority = Authority(tmp_path_factory.mktemp("certificates"))
    pair = (str(authority.client_cert), str(authority.client_key))
    trusted = str(authority.ca)
    strict = {**authority.settings, "ssl_ca_certs": trusted}
    with ServerThread(make_sums(), **strict) as server:
        for verify in (trusted, authority.trusting()):
            async with rest("v2", cert=pair, verify=verify, http2=True) as client:
                assert await client.is_model_ready(server.url, "sums")
        async with rest("v2", verify=trusted, retries=0) as client:
            with pytest.raises(httpx.TransportError):
                await client.is_server_live(server.url)
        async with rpc(
            server,
            use_ssl=True,
            root_certificates=trusted,
            certificate_chain=pair[0],
            private_key=pair[1],
        ) as other:
            assert await other.is_model_ready("sums")
        creds = authority.trusting(with_certificate=True)
        async with rpc(server, creds=creds) as other:
            assert await other.is_server_ready()
        async with rpc(
            server, use_ssl=True, root_certificates=trusted, retries=0
        ) as other:
            with pytest.raises(RpcError, match="UNAVAILABLE"):
                await other.is_server_live()


async def test_what_is_asked_is_logged_when_wanted(
    server: ServerThread, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "kserve_lite.trace")
    async with rest("v1", verbose=True) as client:
        await client.infer(server.url, {"instances": [41]}, "echo")
    async with rpc(server, verbose=True) as other:
        await other.infer(asked("sums", raw=False))
        await other.is_server_live()
    assert '"instances":[41]' in caplog.text
    assert '"predictions":[41]' in caplog.text
    assert '"data": [3.0, 7.0]' in caplog.text


async def test_answers_that_are_none() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        headers = {"content-type": "application/json"}
        if "odd" in request.url.path:
            headers["inference-header-content-length"] = "many"
            return httpx.Response(200, headers=headers, content=b"{}")
        status = 500 if request.url.path.endswith("infer") else 200
        return httpx.Response(status, headers=headers, content=b"{")

    async with rest("v2", transport=httpx.MockTransport(answer)) as client:
        with pytest.raises(httpx.HTTPStatusError, match="500"):
            await client.infer("http://a", {}, "m")
        with pytest.raises(InvalidInput, match="no number"):
            await client.infer("http://a", {}, "odd")
        with pytest.raises(InvalidInput):
            await client.is_server_live("http://a")


# --- gRPC -----------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [True, False])
async def test_grpc(server: ServerThread, raw: bool) -> None:
    async with rpc(server) as client:
        assert await client.is_server_live()
        assert await client.is_server_ready(timeout=None)
        assert await client.is_model_ready("sums")
        answer = await client.infer(asked("sums", raw=raw))
        assert (answer.id, answer.model_name) == ("7", "sums")
        assert answer.model_version == "3"
        assert values_of(answer, "sums") == [3, 7]
        metadata: Any
        for metadata in ([("x-sent", "1"), ("x-sent-bin", b"\xff")], {"x-sent": "1"}):
            await client.infer(asked("mirror", raw=raw), headers=metadata)
        with pytest.raises(InvalidInput):
            await client.infer({})  # type: ignore[arg-type]


async def test_a_grpc_status_is_an_error(server: ServerThread) -> None:
    import grpc

    async with rpc(server) as client:
        with pytest.raises(RpcError, match="NOT_FOUND") as caught:
            await client.is_model_ready("nobody")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert caught.value.details() == "Model with name nobody does not exist."
        with pytest.raises(grpc.RpcError) as caught_too:
            await client.infer(asked("sums", raw=True, array=PAIRS[:, 0].copy()))
        assert caught_too.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_grpc_asks_again_what_was_refused_for_now(server: ServerThread) -> None:
    request = asked("failing", raw=True)
    async with rpc(server, retries=2) as client:
        FAILING.times(2)
        assert values_of(await client.infer(request), "output-0") == [1]
        assert FAILING.asked == 3
        FAILING.times(3)
        with pytest.raises(RpcError, match="UNAVAILABLE"):
            await client.infer(request)
        assert FAILING.asked == 3
    async with rpc(server, channel_args=[("grpc.enable_retries", 0)]) as client:
        FAILING.times(1)
        with pytest.raises(RpcError, match="UNAVAILABLE"):
            await client.infer(request)
        assert FAILING.asked == 1


async def test_a_call_that_takes_too_long(server: ServerThread) -> None:
    async with rpc(server, timeout=0.2) as client:
        with pytest.raises(RpcError, match="DEADLINE_EXCEEDED"):
            await client.infer(asked("waiting", raw=True))
        assert await client.is_server_live(timeout=PATIENCE)
    assert await asyncio.to_thread(WAITING.cancelled.wait, PATIENCE)


async def test_the_sizes_of_messages(server: ServerThread) -> None:
    args = [("grpc.max_send_message_length", 100)]
    async with rpc(server, channel_args=args) as client:
        with pytest.raises(RpcError, match="RESOURCE_EXHAUSTED"):
            await client.infer(asked("sums", raw=True, array=np.ones((100, 2), "f4")))
        assert await client.is_server_live()
    args = [("grpc.max_receive_message_length", 10)]
    async with rpc(server, channel_args=args, retries=0) as client:
        with pytest.raises(RpcError, match=r"UNAVAILABLE.*bytes"):
            await client.infer(asked("sums", raw=True))
        assert await client.is_server_live()


async def test_what_only_grpcio_can_do_is_refused() -> None:
    with pytest.raises(TypeError, match="grpcio"):
        InferenceGRPCClient("localhost:1", creds=object())
    with pytest.raises(ValueError, match=r"grpc\.service_config"):
        InferenceGRPCClient(
            "localhost:1", channel_args=[("grpc.service_config", json.dumps({}))]
        )
    for wrong in ("", "a:b", "http://a", "a/b", "unix:/tmp/x"):
        with pytest.raises(ValueError, match="url"):
            InferenceGRPCClient(wrong)


async def test_a_client_can_be_made_before_the_loop() -> None:
    """KServe's programs make them at import."""

    def made() -> tuple[InferenceGRPCClient, InferenceRESTClient]:
        return InferenceGRPCClient("dns:///localhost"), InferenceRESTClient()

    grpc_client, rest_client = await asyncio.to_thread(made)
    await grpc_client.close()
    await rest_client.close()
