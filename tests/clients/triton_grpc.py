"""Triton's gRPC client, sync and aio; run by `test_apart.py`."""

from __future__ import annotations

import queue
from collections.abc import AsyncIterator, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from tests.clients.models import Waiting, make_count, make_echo, make_mirror, make_sums
from tests.support import ServerThread

PATIENCE = 20
PAIRS = np.array([[1, 2], [3, 4]], np.float32)


@pytest.fixture(scope="module")
def server() -> Iterator[ServerThread]:
    with ServerThread(make_echo(), make_sums(), make_count(), make_mirror()) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: ServerThread) -> Iterator[Any]:
    with connected(server) as client:
        yield client


def connected(server: ServerThread) -> Any:
    return tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{server.port}")


def tensor(array: np.ndarray, name: str = "in0") -> Any:
    made = tritonclient.grpc.InferInput(
        name, array.shape, np_to_triton_dtype(array.dtype)
    )
    return made.set_data_from_numpy(array)


def test_live_ready_and_metadata(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("sums")
    assert client.is_model_ready("sums", "3")
    assert client.get_server_metadata().name == "kserve-lite"
    model = client.get_model_metadata("sums")
    assert (model.name, list(model.versions)) == ("sums", ["3"])
    (pairs,) = model.inputs
    assert (pairs.name, pairs.datatype, list(pairs.shape)) == ("pairs", "FP32", [-1, 2])
    as_json = client.get_model_metadata("sums", as_json=True)
    assert as_json["outputs"] == [{"name": "sums", "datatype": "FP32", "shape": ["-1"]}]


ARRAYS = [
    np.array([True, False]),
    *(
        np.array([[np.iinfo(kind).min, np.iinfo(kind).max]], kind)
        for kind in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")
    ),
    *(
        np.array([[0.5, -2.25]], kind)
        for kind in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)
    ),
    np.array([b"\x00\xff", b"", "é".encode()], object),
    np.zeros((0, 3), np.float32),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: array.dtype.name)
def test_datatypes(client: Any, array: np.ndarray) -> None:
    result = client.infer("echo", [tensor(array)], request_id="7")
    answer = result.as_numpy("in0")
    assert answer.tolist() == array.tolist()
    assert answer.shape == array.shape
    assert answer.dtype == array.dtype
    assert result.get_response().id == "7"


def test_requested_outputs(client: Any) -> None:
    inputs = [tensor(PAIRS, "a"), tensor(PAIRS * 2, "b")]
    wanted = [tritonclient.grpc.InferRequestedOutput("b")]
    result = client.infer("echo", inputs, outputs=wanted)
    assert result.as_numpy("b").tolist() == (PAIRS * 2).tolist()
    assert [one.name for one in result.get_response().outputs] == ["b"]


def test_parameters_headers_and_compression(client: Any) -> None:
    values = np.arange(10_000, dtype=np.int64)
    result = client.infer(
        "mirror",
        [tensor(values)],
        headers={"x-sent": "one"},
        parameters={"text": "a", "whole": 1, "yes": True, "real": 0.5},
        compression_algorithm="gzip",
        client_timeout=PATIENCE,
    )
    assert result.as_numpy("in0").tolist() == values.tolist()


def test_large_tensors(client: Any) -> None:
    values = np.arange(5 * 1024 * 1024, dtype=np.float32)
    answer = client.infer("echo", [tensor(values)]).as_numpy("in0")
    assert np.array_equal(answer, values)


def test_errors(client: Any) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.infer("nobody", [tensor(PAIRS)])
    assert caught.value.message() == "Model with name nobody does not exist."
    assert caught.value.status() == "StatusCode.NOT_FOUND"
    with pytest.raises(InferenceServerException, match="'pairs'") as caught:
        client.infer("sums", [tensor(np.zeros((1, 3), np.float32), "pairs")])
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    with pytest.raises(InferenceServerException) as caught:
        client.get_model_repository_index()
    assert caught.value.status() == "StatusCode.UNIMPLEMENTED"


def test_models_are_loaded_and_unloaded(client: Any) -> None:
    # Triton asks with other field numbers than KServe, so that here the name is empty.
    with pytest.raises(InferenceServerException) as caught:
        client.unload_model("count")
    assert caught.value.status() == "StatusCode.NOT_FOUND"


def test_a_call_in_the_background_and_one_that_is_cancelled() -> None:
    waiting = Waiting()
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()

    def keep(result: Any, error: Any) -> None:
        answers.put((result, error))

    with (
        ServerThread(waiting.model, make_sums()) as server,
        connected(server) as client,
    ):
        client.async_infer("sums", [tensor(PAIRS, "pairs")], keep)
        result, error = answers.get(timeout=PATIENCE)
        assert error is None
        assert result.as_numpy("sums").tolist() == [3, 7]
        call = client.async_infer("waiting", [tensor(PAIRS)], keep)
        assert waiting.started.wait(PATIENCE)
        call.cancel()
        assert waiting.cancelled.wait(PATIENCE)
        result, error = answers.get(timeout=PATIENCE)
        assert (result, error.status()) == (None, "StatusCode.CANCELLED")


def test_a_stream(client: Any) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    try:
        client.async_stream_infer("count", [tensor(np.array([3]), "limit")])
        client.async_stream_infer("nobody", [tensor(PAIRS)])
        client.async_stream_infer("sums", [tensor(PAIRS, "pairs")], request_id="7")
        for number in range(3):
            result, error = answers.get(timeout=PATIENCE)
            assert error is None
            assert result.as_numpy("output-0").tolist() == [number]
        result, error = answers.get(timeout=PATIENCE)
        assert result is None
        assert error.message() == "Model with name nobody does not exist."
        result, error = answers.get(timeout=PATIENCE)
        assert result.as_numpy("sums").tolist() == [3, 7]
        assert result.get_response().id == "7"
    finally:
        client.stop_stream()
    assert answers.empty()


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_aio(server: ServerThread) -> None:
    url = f"127.0.0.1:{server.port}"
    async with tritonclient.grpc.aio.InferenceServerClient(url) as client:
        assert await client.is_server_live()
        assert await client.is_model_ready("sums")
        result = await client.infer("sums", [tensor(PAIRS, "pairs")])
        assert result.as_numpy("sums").tolist() == [3, 7]

        async def requests() -> AsyncIterator[dict[str, Any]]:
            for limit in (1, 2):
                inputs = [tensor(np.array([limit]), "limit")]
                yield {"model_name": "count", "inputs": inputs}

        found = []
        async for result, error in client.stream_infer(requests()):
            assert error is None
            found += result.as_numpy("output-0").tolist()
        assert found == [0, 0, 1]
