"""PyTriton's clients, over HTTP and gRPC; run by `test_apart.py`.

They ask for the model's configuration first: from it they take the names of inputs and
outputs, and whether a sample gets a batch axis.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from pytriton.client import (
    AsyncioDecoupledModelClient,
    AsyncioModelClient,
    DecoupledModelClient,
    FuturesModelClient,
    ModelClient,
)
from pytriton.client.exceptions import (
    PyTritonClientInferenceServerError,
    PyTritonClientModelDoesntSupportBatchingError,
    PyTritonClientTimeoutError,
)
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

from tests.clients.models import (
    DATATYPES,
    make_blend,
    make_countdown,
    make_double,
    make_kinds,
    make_loads,
    make_sums,
)
from tests.support import ServerThread

# That gRPC's calls have no time limit but for inference; every test has one.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytriton.client.warnings.NotSupportedTimeoutWarning"
)

PATIENCE = 20
# Over REST and in a stream; as the status of a gRPC call.
FAILED = "The model failed to answer|Internal server error"
ROWS = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
LEFT = np.array([[1, 2], [3, 4]], np.int32)
RIGHT = np.array([[5, 6], [7, 8]], np.int32)
UNLUCKY = np.array([[13, 13]], np.int32)


@pytest.fixture(scope="module")
def server() -> Iterator[ServerThread]:
    models = (
        make_double(),
        make_blend(),
        make_sums(),
        make_kinds(),
        make_countdown(),
        make_loads(),
    )
    with ServerThread(*models) as server:
        yield server


@pytest.fixture(params=["http", "grpc"])
def url(server: ServerThread, request: pytest.FixtureRequest) -> str:
    return f"{request.param}://127.0.0.1:{server.port}"


@pytest.fixture
def grpc_url(server: ServerThread) -> str:
    return f"grpc://127.0.0.1:{server.port}"


def connected(client: Any, url: str, model: str, *version: str) -> Any:
    return client(
        url, model, *version, init_timeout_s=PATIENCE, inference_timeout_s=PATIENCE
    )


def as_lists(outputs: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: array.tolist() for name, array in outputs.items()}


def test_a_model_of_one_input(url: str) -> None:
    with connected(ModelClient, url, "double") as client:
        assert client.is_batching_supported
        (spec,) = client.model_config.inputs
        assert (spec.name, spec.shape, spec.dtype) == ("rows", (3,), np.float32)
        batch = client.infer_batch(ROWS)
        assert as_lists(batch) == {"doubled": (ROWS * 2).tolist()}
        assert batch["doubled"].dtype == np.float32
        sample = client.infer_sample(rows=ROWS[0])
        assert as_lists(sample) == {"doubled": [2, 4, 6]}


def test_a_model_of_two_inputs(url: str) -> None:
    sums, products = (LEFT + RIGHT).tolist(), (LEFT * RIGHT).tolist()
    with connected(ModelClient, url, "blend") as client:
        for outputs in (
            client.infer_batch(LEFT, RIGHT),
            client.infer_batch(right=RIGHT, left=LEFT),
        ):
            assert as_lists(outputs) == {"sums": sums, "products": products}
        sample = client.infer_sample(LEFT[1], RIGHT[1])
        assert as_lists(sample) == {"sums": sums[1], "products": products[1]}


def test_datatypes(url: str) -> None:
    sent = {
        name: np.array([b"\x00\xff", b""], object)
        if name == "BYTES"
        else np.array([0, 1], triton_to_np_dtype(name))
        for name in DATATYPES
    }
    with connected(ModelClient, url, "kinds") as client:
        assert not client.is_batching_supported
        found = client.infer_sample(**{f"in-{name}": sent[name] for name in sent})
        assert found.keys() == {f"out-{name}" for name in DATATYPES}
        for name, array in sent.items():
            assert found[f"out-{name}"].dtype == array.dtype
            assert found[f"out-{name}"].tolist() == array.tolist()


def test_a_model_that_says_its_version(url: str) -> None:
    with connected(ModelClient, url, "sums", "3") as client:
        outputs = client.infer_sample(np.array([[1, 2], [3, 4]], np.float32))
        assert as_lists(outputs) == {"sums": [3, 7]}
        with pytest.raises(PyTritonClientModelDoesntSupportBatchingError):
            client.infer_batch(np.array([[1, 2]], np.float32))


def test_parameters_and_headers(url: str) -> None:
    with connected(ModelClient, url, "double") as client:
        outputs = client.infer_batch(
            ROWS, parameters={"text": "a", "whole": 1}, headers={"x-sent": "one"}
        )
        assert as_lists(outputs) == {"doubled": (ROWS * 2).tolist()}


def test_errors(url: str) -> None:
    with connected(ModelClient, url, "blend") as client:
        with pytest.raises(PyTritonClientInferenceServerError, match=FAILED) as caught:
            client.infer_batch(UNLUCKY, UNLUCKY)
        assert "unlucky" not in str(caught.value)
        with pytest.raises(PyTritonClientInferenceServerError, match="missing: right"):
            client.infer_batch(left=LEFT)
        assert as_lists(client.infer_sample(LEFT[0], RIGHT[0]))["sums"] == [6, 8]
    with (
        ModelClient(url, "countdown") as client,
        pytest.raises(PyTritonClientInferenceServerError, match="decoupled"),
    ):
        client.infer_sample(np.array([1], np.int32))


def test_a_model_that_is_not_served(url: str) -> None:
    # Over gRPC the client is told at once; over HTTP it waits for the model.
    told = (InferenceServerException, PyTritonClientTimeoutError)
    with (
        ModelClient(url, "nobody", init_timeout_s=0.1) as client,
        pytest.raises(told, match="nobody"),
    ):
        client.infer_sample(ROWS)


def test_models_are_unloaded_and_loaded(url: str) -> None:
    with ModelClient(url, "loads") as client:
        client.unload_model()
        client.load_model()
        client.wait_for_model(PATIENCE)


def test_futures(url: str) -> None:
    with connected(FuturesModelClient, url, "double") as client:
        pending = [client.infer_batch(ROWS * n) for n in range(4)]
        for n, future in enumerate(pending):
            found = future.result(PATIENCE)
            assert as_lists(found) == {"doubled": (ROWS * 2 * n).tolist()}


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_asyncio(url: str) -> None:
    async with connected(AsyncioModelClient, url, "blend") as client:
        batch = await client.infer_batch(LEFT, RIGHT)
        assert as_lists(batch)["products"] == (LEFT * RIGHT).tolist()
        sample = await client.infer_sample(left=LEFT[1], right=RIGHT[1])
        assert as_lists(sample)["sums"] == [10, 12]
        with pytest.raises(PyTritonClientInferenceServerError, match=FAILED):
            await client.infer_batch(UNLUCKY, UNLUCKY)


def start(number: int) -> np.ndarray:
    return np.array([number], np.int32)


def test_a_stream(grpc_url: str) -> None:
    with connected(DecoupledModelClient, grpc_url, "countdown") as client:
        for first in (3, 0, 1):
            found = [as_lists(item) for item in client.infer_sample(start(first))]
            assert found == [{"number": [n]} for n in range(first, 0, -1)]


def test_a_stream_that_fails(grpc_url: str) -> None:
    with connected(DecoupledModelClient, grpc_url, "countdown") as client:
        answers = client.infer_sample(start(14))
        assert as_lists(next(answers)) == {"number": [14]}
        with pytest.raises(PyTritonClientInferenceServerError, match=FAILED):
            next(answers)
        found = [as_lists(item) for item in client.infer_sample(start(2))]
        assert found == [{"number": [2]}, {"number": [1]}]


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_stream_in_asyncio(grpc_url: str) -> None:
    client = connected(AsyncioDecoupledModelClient, grpc_url, "countdown")
    async with client:
        for first in (3, 0):
            answers = client.infer_sample(start(first))
            found = [as_lists(item) async for item in answers]
            assert found == [{"number": [n]} for n in range(first, 0, -1)]
        with pytest.raises(PyTritonClientInferenceServerError, match=FAILED):
            async for _ in client.infer_sample(start(13)):
                pass
