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
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from kserve_lite import __version__
from tests.clients.models import (
    DATATYPES,
    Waiting,
    make_blend,
    make_count,
    make_countdown,
    make_echo,
    make_kinds,
    make_loads,
    make_mirror,
    make_sums,
    make_times,
)
from tests.support import ServerThread

PATIENCE = 20
PAIRS = np.array([[1, 2], [3, 4]], np.float32)
UNLUCKY = np.array([[13, 0]], np.int32)


@pytest.fixture(scope="module")
def server() -> Iterator[ServerThread]:
    models = (
        make_echo(),
        make_sums(),
        make_count(),
        make_mirror(),
        make_blend(),
        make_countdown(),
        make_kinds(),
        make_times("1"),
        make_times("2"),
    )
    with ServerThread(*models) as server:
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
    server = client.get_server_metadata()
    assert (server.name, server.version) == ("kserve-lite", __version__)
    assert {"model_configuration", "model_repository", "statistics"} <= set(
        server.extensions
    )
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
    unlucky = [tensor(UNLUCKY, "left"), tensor(UNLUCKY, "right")]
    with pytest.raises(InferenceServerException) as caught:
        client.infer("blend", unlucky)
    assert caught.value.status() == "StatusCode.INTERNAL"
    assert "unlucky" not in caught.value.message()


def test_tensors_in_shared_memory_are_refused(client: Any) -> None:
    elsewhere = tritonclient.grpc.InferInput("in0", [2, 2], "FP32")
    elsewhere.set_shared_memory("region", 16)
    with pytest.raises(InferenceServerException, match="'in0'") as caught:
        client.infer("echo", [elsewhere])
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_versions(client: Any) -> None:
    for version, factor in (("", 2), ("1", 1), ("2", 2)):
        assert client.is_model_ready("times", version)
        found = client.get_model_metadata("times", version)
        assert list(found.versions) == ["1", "2"]
        assert client.get_model_config("times", version).config.name == "times"
        result = client.infer("times", [tensor(PAIRS)], version)
        assert result.as_numpy("output-0").tolist() == (PAIRS * factor).tolist()
        assert result.get_response().model_version == (version or "2")
    with pytest.raises(InferenceServerException) as caught:
        client.infer("times", [tensor(PAIRS)], "3")
    assert caught.value.status() == "StatusCode.NOT_FOUND"


TYPES = ["TYPE_STRING" if name == "BYTES" else f"TYPE_{name}" for name in DATATYPES]


def test_config(client: Any) -> None:
    config = client.get_model_config("blend").config
    assert config.name == "blend"
    assert not config.model_transaction_policy.decoupled
    dims = [2] if config.max_batch_size else [-1, 2]
    int32 = model_config_pb2.TYPE_INT32
    for tensors, names in (
        (config.input, "left right"),
        (config.output, "sums products"),
    ):
        found = [(one.name, one.data_type, list(one.dims)) for one in tensors]
        assert found == [(name, int32, dims) for name in names.split()]
    config = client.get_model_config("kinds").config
    for tensors in (config.input, config.output):
        types = [model_config_pb2.DataType.Name(one.data_type) for one in tensors]
        assert types == TYPES
    as_json = client.get_model_config("countdown", as_json=True)["config"]
    assert as_json["model_transaction_policy"] == {"decoupled": True}
    with pytest.raises(InferenceServerException) as caught:
        client.get_model_config("nobody")
    assert caught.value.status() == "StatusCode.NOT_FOUND"


def counts(message: Any) -> dict[tuple[str, str], tuple[int, int, int]]:
    """Inferences, successes and failures by model and version."""
    return {
        (one.name, one.version): (
            one.inference_count,
            one.inference_stats.success.count,
            one.inference_stats.fail.count,
        )
        for one in message.model_stats
    }


def test_statistics_count_what_was_asked() -> None:
    models = (make_blend(), make_times("1"), make_times("2"), make_countdown())
    with ServerThread(*models) as server, connected(server) as client:
        before = counts(client.get_inference_statistics())
        assert set(before.values()) == {(0, 0, 0)}
        (blend,) = (key for key in before if key[0] == "blend")
        (countdown,) = (key for key in before if key[0] == "countdown")
        for _ in range(3):
            client.infer("times", [tensor(PAIRS)])
        client.infer("times", [tensor(PAIRS)], "1")
        left = np.array([[1, 2]], np.int32)
        client.infer("blend", [tensor(left, "left"), tensor(left, "right")])
        for _ in range(2):
            with pytest.raises(InferenceServerException):
                client.infer(
                    "blend", [tensor(UNLUCKY, "left"), tensor(UNLUCKY, "right")]
                )
        with Stream(client) as stream:
            stream.ask("countdown", tensor(np.array([3], np.int32), "start"))
            stream.ask("countdown", tensor(np.array([14], np.int32), "start"))
            assert [stream.number() for _ in range(4)] == [3, 2, 1, 14]
            assert stream.error()
        assert counts(client.get_inference_statistics()) == {
            blend: (1, 1, 2),
            ("times", "1"): (1, 1, 0),
            ("times", "2"): (3, 3, 0),
            countdown: (1, 1, 1),
        }
        one = client.get_inference_statistics("times", "1")
        assert counts(one) == {("times", "1"): (1, 1, 0)}
        (found,) = one.model_stats
        assert found.execution_count == 1
        assert found.last_inference > 0
        spent = found.inference_stats
        parts = (
            spent.queue,
            spent.compute_input,
            spent.compute_infer,
            spent.compute_output,
        )
        assert [part.count for part in parts] == [1, 1, 1, 1]
        assert sum(part.ns for part in parts) == spent.success.ns > 0
        with pytest.raises(InferenceServerException) as caught:
            client.get_inference_statistics("nobody")
        assert caught.value.status() == "StatusCode.NOT_FOUND"


def states(client: Any) -> dict[tuple[str, str], str]:
    index = client.get_model_repository_index()
    return {(one.name, one.version): one.state for one in index.models}


def test_models_are_unloaded_and_loaded() -> None:
    models = (make_loads(), make_times("1"), make_times("2"))
    with ServerThread(*models) as server, connected(server) as client:
        index = states(client)
        assert {name for name, _ in index} == {"loads", "times"}
        assert {("times", "1"), ("times", "2")} < index.keys()
        assert set(index.values()) == {"READY"}

        client.unload_model("loads")
        with pytest.raises(InferenceServerException) as caught:
            client.infer("loads", [tensor(PAIRS)])
        assert caught.value.status() == "StatusCode.NOT_FOUND"
        gone = {key for key, state in states(client).items() if state == "UNAVAILABLE"}
        assert {name for name, _ in gone} == {"loads"}

        client.load_model("loads")
        assert client.is_model_ready("loads")
        result = client.infer("loads", [tensor(PAIRS)])
        assert result.as_numpy("output-0").tolist() == [[2, 2], [2, 2]]
        assert states(client) == index

        for control in (client.load_model, client.unload_model):
            with pytest.raises(InferenceServerException, match="nobody") as caught:
                control("nobody")
            assert caught.value.status() == "StatusCode.NOT_FOUND"
        with pytest.raises(InferenceServerException, match="config") as caught:
            client.load_model("loads", config='{"name": "loads"}')
        assert caught.value.status() == "StatusCode.UNIMPLEMENTED"


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


class Stream:
    """The client's stream as a queue of answers; left, nothing must be left in it."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._answers: queue.Queue[tuple[Any, Any]] = queue.Queue()

    def __enter__(self) -> Stream:
        self._client.start_stream(self._keep)
        return self

    def __exit__(self, failure: object, *_: object) -> None:
        self._client.stop_stream()
        assert failure is not None or self._answers.empty()

    def _keep(self, result: Any, error: Any) -> None:
        self._answers.put((result, error))

    def ask(self, model: str, *inputs: Any, **more: Any) -> None:
        self._client.async_stream_infer(model, list(inputs), **more)

    def answer(self) -> Any:
        result, error = self._answers.get(timeout=PATIENCE)
        assert error is None
        return result

    def number(self) -> int:
        return int(self.answer().as_numpy("number").item())

    def error(self) -> str:
        result, error = self._answers.get(timeout=PATIENCE)
        assert result is None
        return str(error.message())


def test_a_stream(client: Any) -> None:
    with Stream(client) as stream:
        stream.ask("count", tensor(np.array([3]), "limit"))
        stream.ask("nobody", tensor(PAIRS))
        stream.ask("sums", tensor(PAIRS, "pairs"), request_id="7")
        for number in range(3):
            assert stream.answer().as_numpy("output-0").tolist() == [number]
        assert stream.error() == "Model with name nobody does not exist."
        result = stream.answer()
        assert result.as_numpy("sums").tolist() == [3, 7]
        assert result.get_response().id == "7"


def is_final(result: Any) -> bool:
    parameters = result.get_response().parameters
    return bool(parameters["triton_final_response"].bool_param)


@pytest.mark.parametrize("start", [0, 2])
def test_the_end_of_a_request_in_a_stream(client: Any, start: int) -> None:
    asked = tensor(np.array([start], np.int32), "start")
    with Stream(client) as stream:
        stream.ask("countdown", asked, request_id="7", enable_empty_final_response=True)
        for number in range(start, 0, -1):
            result = stream.answer()
            assert not is_final(result)
            assert result.as_numpy("number").tolist() == [number]
        last = stream.answer()
        assert is_final(last)
        response = last.get_response()
        assert (response.model_name, response.id) == ("countdown", "7")
        assert not response.outputs
        assert not response.raw_output_contents


def test_a_failure_ends_a_request_in_a_stream_once(client: Any) -> None:
    inputs = [tensor(np.array([number], np.int32), "start") for number in (14, 1)]
    with Stream(client) as stream:
        for asked in inputs:
            stream.ask("countdown", asked, enable_empty_final_response=True)
        assert stream.number() == 14
        assert "unlucky" not in stream.error()
        assert stream.number() == 1
        assert is_final(stream.answer())


def test_one_answer_in_a_stream_is_the_final_one(client: Any) -> None:
    with Stream(client) as stream:
        pairs = tensor(PAIRS, "pairs")
        stream.ask("sums", pairs, enable_empty_final_response=True)
        result = stream.answer()
        assert result.as_numpy("sums").tolist() == [3, 7]
        assert is_final(result)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_aio(server: ServerThread) -> None:
    url = f"127.0.0.1:{server.port}"
    async with tritonclient.grpc.aio.InferenceServerClient(url) as client:
        assert await client.is_server_live()
        assert await client.is_model_ready("sums")
        assert (await client.get_model_config("sums")).config.name == "sums"
        index = await client.get_model_repository_index()
        assert ("times", "2") in [(one.name, one.version) for one in index.models]
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
