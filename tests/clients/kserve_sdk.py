"""KServe's clients and its generated stubs; run by `test_apart.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import kserve
import numpy as np
import pytest
from kserve.protocol.grpc import grpc_predict_v2_pb2 as messages
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

from tests.certificates import Authority
from tests.clients.models import make_echo, make_mirror, make_sums
from tests.support import ServerThread

PATIENCE = 20
PAIRS = np.array([[1, 2], [3, 4]], np.float32)


@pytest.fixture
def anyio_backend() -> str:
    """grpcio's poller belongs to one kind of event loop; the server runs on uvloop."""
    return "asyncio"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module", params=["plain", "tls"])
def server(
    request: pytest.FixtureRequest, authority: Authority
) -> Iterator[ServerThread]:
    settings = authority.settings if request.param == "tls" else {}
    models = make_echo(), make_sums(), make_mirror()
    with ServerThread(*models, **settings) as server:
        yield server


def rest(authority: Authority, protocol: str) -> Any:
    """A REST client; where it can, which is over TLS, it speaks HTTP/2."""
    config = kserve.RESTConfig(
        protocol=protocol, http2=True, verify=authority.trusting(), timeout=PATIENCE
    )
    return kserve.InferenceRESTClient(config)


def rpc(server: ServerThread, authority: Authority) -> Any:
    address = f"localhost:{server.port}"
    if not server.url.startswith("https"):
        return kserve.InferenceGRPCClient(address)
    return kserve.InferenceGRPCClient(
        address, use_ssl=True, root_certificates=str(authority.ca)
    )


def infer_request(model: str, array: np.ndarray, datatype: str, raw: bool) -> Any:
    tensor = kserve.InferInput("in0", list(array.shape), datatype)
    tensor.set_data_from_numpy(array, binary_data=raw)
    return kserve.InferRequest(model, [tensor], request_id="7")


@pytest.mark.anyio
async def test_rest_v1(server: ServerThread, authority: Authority) -> None:
    async with rest(authority, "v1") as client:
        url = server.url
        assert await client.is_server_live(url)
        assert await client.is_model_ready(url, "echo")
        body = {"instances": [[1, 2]]}
        answer = await client.infer(url, body, model_name="echo")
        assert answer == {"predictions": [[1, 2]]}
        answer = await client.explain(url, "echo", body)
        assert answer == {"explanations": [[1, 2]]}
        with pytest.raises(httpx.HTTPStatusError, match="pairs"):
            await client.infer(url, {"instances": [[1, 2, 3]]}, model_name="sums")
        with pytest.raises(httpx.HTTPStatusError, match="nobody does not exist"):
            await client.infer(url, body, model_name="nobody")


@pytest.mark.anyio
async def test_rest_v2(server: ServerThread, authority: Authority) -> None:
    async with rest(authority, "v2") as client:
        url = server.url
        assert await client.is_server_live(url)
        assert await client.is_server_ready(url)
        assert await client.is_model_ready(url, "sums")
        assert not await client.is_model_ready(url, "nobody")
        request = infer_request("sums", PAIRS, "FP32", raw=False)
        headers: dict[str, str] = {}
        answer = await client.infer(
            url, request, model_name="sums", response_headers=headers
        )
        assert answer.id == "7"
        assert answer.get_output_by_name("sums").as_numpy().tolist() == [3, 7]
        assert headers["content-type"] == "application/json"
        with pytest.raises(httpx.HTTPStatusError, match="nobody does not exist"):
            await client.infer(url, request, model_name="nobody")


@pytest.mark.anyio
async def test_grpc(server: ServerThread, authority: Authority) -> None:
    async with rpc(server, authority) as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("sums")
        for raw in (False, True):
            request = infer_request("sums", PAIRS, "FP32", raw)
            answer = await client.infer(request, headers=[("x-any", "1")])
            assert (answer.id, answer.model_name) == ("7", "sums")
            assert answer.get_output_by_name("sums").as_numpy().tolist() == [3, 7]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.is_model_ready("nobody")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.infer(infer_request("sums", PAIRS[:, 0], "FP32", raw=True))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


DATATYPES = {
    "BOOL": np.array([True, False]),
    "INT8": np.array([[-128, 127]], np.int8),
    "INT64": np.array([-(2**63), 2**63 - 1]),
    "UINT64": np.array([0, 2**64 - 1], np.uint64),
    "FP16": np.array([0.5, -2.25], np.float16),
    "FP64": np.array([0.1, 1e300]),
    "BYTES": np.array([b"a", b"", "é".encode()], object),
}


@pytest.mark.anyio
@pytest.mark.parametrize("datatype", DATATYPES)
async def test_grpc_datatypes(
    server: ServerThread, authority: Authority, datatype: str
) -> None:
    array = DATATYPES[datatype]
    async with rpc(server, authority) as client:
        answer = await client.infer(infer_request("echo", array, datatype, raw=True))
        output = answer.get_output_by_name("in0")
        assert output.datatype == datatype
        assert output.as_numpy().tolist() == array.tolist()


def test_generated_stubs(server: ServerThread, authority: Authority) -> None:
    address = f"localhost:{server.port}"
    if server.url.startswith("https"):
        credentials = grpc.ssl_channel_credentials(authority.ca.read_bytes())
        channel = grpc.secure_channel(address, credentials)
    else:
        channel = grpc.insecure_channel(address)
    with channel:
        stub = GRPCInferenceServiceStub(channel)
        assert stub.ServerLive(messages.ServerLiveRequest(), timeout=PATIENCE).live
        about = stub.ServerMetadata(messages.ServerMetadataRequest())
        assert about.name == "kserve-lite"
        model = stub.ModelMetadata(messages.ModelMetadataRequest(name="sums"))
        assert list(model.inputs[0].shape) == [-1, 2]
        request = messages.ModelInferRequest(model_name="mirror", id="7")
        request.parameters["whole"].int64_param = 1
        request.inputs.add(name="in0", datatype="FP32", shape=[2, 2])
        request.raw_input_contents.append(PAIRS.tobytes())
        answer, call = stub.ModelInfer.with_call(request, metadata=[("x-sent", "one")])
        assert answer.raw_output_contents == [PAIRS.tobytes()]
        assert dict(call.initial_metadata())["x-sent"] == "one"
        loaded = stub.RepositoryModelLoad(
            messages.RepositoryModelLoadRequest(model_name="echo")
        )
        assert loaded.isLoaded
