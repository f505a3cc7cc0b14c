"""Triton's HTTP client, sync and aio, with JSON tensors.

By default it sends tensors by the binary tensor extension, which the server does not
have yet; hence `binary_data=False` everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.http
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from tests.clients.models import make_echo, make_sums
from tests.support import ServerThread

PAIRS = np.array([[1, 2], [3, 4]], np.float32)


@pytest.fixture(scope="module")
def server() -> Iterator[ServerThread]:
    with ServerThread(make_echo(), make_sums()) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: ServerThread) -> Iterator[Any]:
    with tritonclient.http.InferenceServerClient(
        f"127.0.0.1:{server.port}", concurrency=4
    ) as client:
        yield client


def tensor(array: np.ndarray, name: str = "in0") -> Any:
    made = tritonclient.http.InferInput(
        name, array.shape, np_to_triton_dtype(array.dtype)
    )
    return made.set_data_from_numpy(array, binary_data=False)


def output(name: str) -> Any:
    return tritonclient.http.InferRequestedOutput(name, binary_data=False)


def test_live_ready_and_metadata(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("sums")
    assert client.is_model_ready("sums", "3")
    assert not client.is_model_ready("nobody")
    assert client.get_server_metadata()["name"] == "kserve-lite"
    model = client.get_model_metadata("sums")
    assert (model["name"], model["versions"]) == ("sums", ["3"])
    assert model["inputs"] == [{"name": "pairs", "datatype": "FP32", "shape": [-1, 2]}]


ARRAYS = [
    np.array([True, False]),
    *(
        np.array([[np.iinfo(kind).min, np.iinfo(kind).max]], kind)
        for kind in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")
    ),
    np.array([[0.5, -2.25]], np.float32),
    np.array([[0.1, 1e300]], np.float64),
    np.array(["é", ""], object),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: array.dtype.name)
def test_datatypes(client: Any, array: np.ndarray) -> None:
    result = client.infer(
        "echo", [tensor(array)], outputs=[output("in0")], request_id="7"
    )
    answer = result.as_numpy("in0")
    assert answer.tolist() == array.tolist()
    assert answer.dtype == array.dtype
    assert result.get_response()["id"] == "7"


def test_calls_in_the_background(client: Any) -> None:
    pending = [
        client.async_infer(
            "sums", [tensor(PAIRS * n, "pairs")], outputs=[output("sums")]
        )
        for n in range(8)
    ]
    for n, call in enumerate(pending):
        assert call.get_result().as_numpy("sums").tolist() == [3 * n, 7 * n]


def test_errors(client: Any) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.infer("nobody", [tensor(PAIRS)])
    assert caught.value.message() == "Model with name nobody does not exist."
    assert caught.value.status() == "404"
    with pytest.raises(InferenceServerException, match="'pairs'") as caught:
        client.infer("sums", [tensor(np.zeros(3, np.float32), "pairs")])
    assert caught.value.status() == "400"


def test_large_json(client: Any) -> None:
    values = np.arange(100_000, dtype=np.float32)
    result = client.infer("echo", [tensor(values)], outputs=[output("in0")])
    assert result.as_numpy("in0").tolist() == values.tolist()


@pytest.mark.anyio
async def test_aio(server: ServerThread) -> None:
    url = f"127.0.0.1:{server.port}"
    async with tritonclient.http.aio.InferenceServerClient(url) as client:
        assert await client.is_server_live()
        assert await client.is_model_ready("sums")
        result = await client.infer(
            "sums", [tensor(PAIRS, "pairs")], outputs=[output("sums")]
        )
        assert result.as_numpy("sums").tolist() == [3, 7]
