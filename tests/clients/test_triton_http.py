"""Triton's HTTP client, sync and aio: tensors as binary data and as JSON, and the rest.

Binary is what the client sends and asks for unless it is told otherwise. Every test has
a real server; those that load, unload or count have one of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tritonclient.http
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from kserve_lite import __version__
from tests.clients.models import (
    DATATYPES,
    make_blend,
    make_countdown,
    make_double,
    make_echo,
    make_kinds,
    make_loads,
    make_mirror,
    make_sums,
    make_times,
)
from tests.support import ServerThread

PAIRS = np.array([[1, 2], [3, 4]], np.float32)
UNLUCKY = np.array([[13, 0]], np.int32)


@pytest.fixture(scope="module")
def server() -> Iterator[ServerThread]:
    models = (
        make_echo(),
        make_sums(),
        make_double(),
        make_blend(),
        make_countdown(),
        make_mirror(),
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
    url = f"127.0.0.1:{server.port}"
    return tritonclient.http.InferenceServerClient(url, concurrency=4)


def tensor(array: np.ndarray, name: str = "in0", *, binary: bool = True) -> Any:
    made = tritonclient.http.InferInput(
        name, array.shape, np_to_triton_dtype(array.dtype)
    )
    return made.set_data_from_numpy(array, binary_data=binary)


def output(name: str, *, binary: bool = True) -> Any:
    return tritonclient.http.InferRequestedOutput(name, binary_data=binary)


def is_binary(result: Any, name: str) -> bool:
    """Whether an output came as binary data; it must have come in one of the two."""
    found = result.get_output(name)
    in_binary = "binary_data_size" in (found.get("parameters") or {})
    assert in_binary != ("data" in found)
    return in_binary


def test_live_ready_and_metadata(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("sums")
    assert client.is_model_ready("sums", "3")
    assert not client.is_model_ready("nobody")
    server = client.get_server_metadata()
    assert (server["name"], server["version"]) == ("kserve-lite", __version__)
    assert {
        "binary_tensor_data",
        "model_configuration",
        "model_repository",
        "statistics",
    } <= set(server["extensions"])
    model = client.get_model_metadata("sums")
    assert (model["name"], model["versions"]) == ("sums", ["3"])
    assert model["inputs"] == [{"name": "pairs", "datatype": "FP32", "shape": [-1, 2]}]
    assert model["outputs"] == [{"name": "sums", "datatype": "FP32", "shape": [-1]}]


# --- tensors --------------------------------------------------------------------------

IN_JSON = [
    np.array([True, False]),
    *(
        np.array([[np.iinfo(kind).min, np.iinfo(kind).max]], kind)
        for kind in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")
    ),
    np.array([[0.5, -2.25]], np.float32),
    np.array([[0.1, 1e300]], np.float64),
    np.array(["é", ""], object),
]
IN_BINARY = [
    *IN_JSON[:-1],
    np.array([[0.5, -2.25], [np.inf, 6e-8]], np.float16),
    np.array([[0.5, -2.25], [np.inf, 1e38]], ml_dtypes.bfloat16),
    np.array([[np.inf, -np.inf], [-0.0, 1e-45]], np.float32),
    np.array([[b"\x00\xff\xfe", b"", "é".encode()]], object),
    np.zeros((0, 3), np.float32),
    np.zeros((2, 0), object),
    np.array(7, np.int64),
]


def same(got: np.ndarray, sent: np.ndarray) -> bool:
    if sent.dtype == object:
        return got.shape == sent.shape and got.tolist() == sent.tolist()
    return (got.dtype, got.shape, got.tobytes()) == (
        sent.dtype,
        sent.shape,
        sent.tobytes(),
    )


@pytest.mark.parametrize("array", IN_BINARY, ids=lambda array: array.dtype.name)
def test_datatypes_in_binary(client: Any, array: np.ndarray) -> None:
    result = client.infer("echo", [tensor(array)], request_id="7")
    assert is_binary(result, "in0")
    assert same(result.as_numpy("in0"), array)
    assert result.get_response()["id"] == "7"


@pytest.mark.parametrize("array", IN_JSON, ids=lambda array: array.dtype.name)
def test_datatypes_in_json(client: Any, array: np.ndarray) -> None:
    result = client.infer(
        "echo",
        [tensor(array, binary=False)],
        outputs=[output("in0", binary=False)],
        request_id="7",
    )
    assert not is_binary(result, "in0")
    assert same(result.as_numpy("in0"), array)
    assert result.get_response()["id"] == "7"


@pytest.mark.parametrize("first", [False, True], ids=["json", "binary"])
@pytest.mark.parametrize("second", [False, True], ids=["json", "binary"])
def test_inputs_and_outputs_of_both_kinds(
    client: Any, *, first: bool, second: bool
) -> None:
    sent = {"a": PAIRS, "b": np.array([b"x", b"yz"], object), "c": PAIRS * 2}
    binary = {"a": first, "b": second, "c": first}
    result = client.infer(
        "echo",
        [tensor(sent[name], name, binary=binary[name]) for name in sent],
        outputs=[output(name, binary=not binary[name]) for name in sent],
    )
    for name, array in sent.items():
        assert is_binary(result, name) != binary[name]
        if name == "b" and not is_binary(result, name):
            array = np.array(["x", "yz"], object)
        assert same(result.as_numpy(name), array)


@pytest.mark.parametrize("binary", [False, True], ids=["json", "binary"])
def test_no_requested_output_gets_all_in_binary(client: Any, *, binary: bool) -> None:
    inputs = [tensor(PAIRS, name, binary=binary) for name in "ab"]
    result = client.infer("echo", inputs)
    assert [one["name"] for one in result.get_response()["outputs"]] == ["a", "b"]
    assert is_binary(result, "a")
    assert is_binary(result, "b")


def test_requested_outputs_come_in_their_order(client: Any) -> None:
    inputs = [tensor(PAIRS * n, name) for n, name in enumerate("abc")]
    result = client.infer("echo", inputs, outputs=[output("c"), output("a")])
    assert [one["name"] for one in result.get_response()["outputs"]] == ["c", "a"]
    assert same(result.as_numpy("c"), PAIRS * 2)
    assert same(result.as_numpy("a"), PAIRS * 0)
    assert result.as_numpy("b") is None


def test_declared_inputs_and_outputs(client: Any) -> None:
    right = np.array([[1, 2]], np.int32)
    result = client.infer("blend", [tensor(right, "right"), tensor(right * 2, "left")])
    assert result.as_numpy("sums").tolist() == [[3, 6]]
    assert result.as_numpy("products").tolist() == [[2, 8]]


def test_headers_and_parameters(client: Any) -> None:
    result = client.infer(
        "mirror",
        [tensor(PAIRS)],
        headers={"x-sent": "one"},
        parameters={"text": "a", "whole": 1, "yes": True, "real": 0.5},
        priority=1,
        timeout=1_000_000,
    )
    assert same(result.as_numpy("in0"), PAIRS)


@pytest.mark.parametrize("binary", [False, True], ids=["json", "binary"])
def test_large_tensors(client: Any, *, binary: bool) -> None:
    values = np.arange(1_000_000 if binary else 100_000, dtype=np.float32)
    result = client.infer(
        "echo", [tensor(values, binary=binary)], outputs=[output("in0", binary=binary)]
    )
    assert same(result.as_numpy("in0"), values)


def test_calls_in_the_background(client: Any) -> None:
    pending = [
        client.async_infer("sums", [tensor(PAIRS * n, "pairs")]) for n in range(8)
    ]
    for n, call in enumerate(pending):
        assert call.get_result().as_numpy("sums").tolist() == [3 * n, 7 * n]


# --- errors ---------------------------------------------------------------------------


def test_errors(client: Any) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.infer("nobody", [tensor(PAIRS)])
    assert caught.value.message() == "Model with name nobody does not exist."
    assert caught.value.status() == "404"
    with pytest.raises(InferenceServerException, match="'pairs'") as caught:
        client.infer("sums", [tensor(np.zeros(3, np.float32), "pairs")])
    assert caught.value.status() == "400"
    with pytest.raises(InferenceServerException, match="missing: right") as caught:
        client.infer("blend", [tensor(UNLUCKY, "left")])
    assert caught.value.status() == "400"
    with pytest.raises(InferenceServerException, match="Content-Encoding") as caught:
        client.infer("echo", [tensor(PAIRS)], request_compression_algorithm="gzip")
    assert caught.value.status() == "415"
    with pytest.raises(InferenceServerException, match="nothing") as caught:
        client.infer("echo", [tensor(PAIRS)], outputs=[output("nothing")])
    assert caught.value.status() == "400"
    with pytest.raises(InferenceServerException) as caught:
        client.infer("blend", [tensor(UNLUCKY, "left"), tensor(UNLUCKY, "right")])
    assert caught.value.status() == "500"
    assert "unlucky" not in caught.value.message()


def test_tensors_in_shared_memory_are_refused(client: Any) -> None:
    elsewhere = tritonclient.http.InferInput("in0", [2, 2], "FP32")
    elsewhere.set_shared_memory("region", 16)
    with pytest.raises(InferenceServerException, match="'in0'") as caught:
        client.infer("echo", [elsewhere])
    assert caught.value.status() == "400"


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16])
def test_small_floats_may_come_as_json(client: Any, kind: Any) -> None:
    array = np.array([[0.5, -2.25, 6e-8]], kind)
    result = client.infer(
        "echo", [tensor(array)], outputs=[output("in0", binary=False)]
    )
    assert not is_binary(result, "in0")
    assert same(result.as_numpy("in0"), array)


# --- versions -------------------------------------------------------------------------


def test_versions(client: Any) -> None:
    for version, factor in (("", 2), ("1", 1), ("2", 2)):
        assert client.is_model_ready("times", version)
        assert client.get_model_metadata("times", version)["versions"] == ["1", "2"]
        assert client.get_model_config("times", version)["name"] == "times"
        result = client.infer("times", [tensor(PAIRS)], version)
        assert same(result.as_numpy("output-0"), PAIRS * factor)
        assert result.get_response()["model_version"] == (version or "2")
    assert not client.is_model_ready("times", "3")
    with pytest.raises(InferenceServerException) as caught:
        client.infer("times", [tensor(PAIRS)], "3")
    assert caught.value.status() == "404"


# --- Triton's extensions --------------------------------------------------------------


TYPES = ["TYPE_STRING" if name == "BYTES" else f"TYPE_{name}" for name in DATATYPES]


def test_config(client: Any) -> None:
    config = client.get_model_config("blend")
    assert config["name"] == "blend"
    batch = config["max_batch_size"]
    dims = [2] if batch else [-1, 2]
    for key, names in (("input", "left right"), ("output", "sums products")):
        found = [(one["name"], one["data_type"], one["dims"]) for one in config[key]]
        assert found == [(name, "TYPE_INT32", dims) for name in names.split()]
    config = client.get_model_config("kinds")
    assert config["max_batch_size"] == 0
    for key in ("input", "output"):
        assert [one["data_type"] for one in config[key]] == TYPES
        assert all(one["dims"] == [2] for one in config[key])
    config = client.get_model_config("countdown")
    assert config["model_transaction_policy"] == {"decoupled": True}
    with pytest.raises(InferenceServerException) as caught:
        client.get_model_config("nobody")
    assert caught.value.status() == "404"


def counts(document: dict[str, Any]) -> dict[tuple[str, str], tuple[int, int, int]]:
    """Inferences, successes and failures by model and version."""
    return {
        (one["name"], one["version"]): (
            one["inference_count"],
            one["inference_stats"]["success"]["count"],
            one["inference_stats"]["fail"]["count"],
        )
        for one in document["model_stats"]
    }


def test_statistics_count_what_was_asked() -> None:
    models = (make_blend(), make_times("1"), make_times("2"))
    with ServerThread(*models) as server, connected(server) as client:
        before = counts(client.get_inference_statistics())
        assert set(before.values()) == {(0, 0, 0)}
        (blend,) = (key for key in before if key[0] == "blend")
        for call in [client.async_infer("times", [tensor(PAIRS)]) for _ in range(16)]:
            call.get_result()
        client.infer("times", [tensor(PAIRS)], "1")
        left = np.array([[1, 2]], np.int32)
        client.infer("blend", [tensor(left, "left"), tensor(left, "right")])
        for _ in range(2):
            with pytest.raises(InferenceServerException):
                client.infer(
                    "blend", [tensor(UNLUCKY, "left"), tensor(UNLUCKY, "right")]
                )
        assert counts(client.get_inference_statistics()) == {
            blend: (1, 1, 2),
            ("times", "1"): (1, 1, 0),
            ("times", "2"): (16, 16, 0),
        }
        one = client.get_inference_statistics("times", "1")
        assert counts(one) == {("times", "1"): (1, 1, 0)}
        (found,) = one["model_stats"]
        assert found["execution_count"] == 1
        assert found["last_inference"] > 0
        spent = found["inference_stats"]
        parts = ("queue", "compute_input", "compute_infer", "compute_output")
        assert sum(spent[part]["ns"] for part in parts) == spent["success"]["ns"] > 0
        assert all(spent[part]["count"] == 1 for part in parts)
        assert spent["cache_hit"]["count"] == spent["cache_miss"]["count"] == 0
        with pytest.raises(InferenceServerException) as caught:
            client.get_inference_statistics("nobody")
        assert caught.value.status() == "404"


def states(client: Any) -> dict[tuple[str, str], str]:
    return {
        (one["name"], one["version"]): one["state"]
        for one in client.get_model_repository_index()
    }


def test_models_are_unloaded_and_loaded() -> None:
    models = (make_loads(), make_times("1"), make_times("2"))
    with ServerThread(*models) as server, connected(server) as client:
        index = states(client)
        assert {name for name, _ in index} == {"loads", "times"}
        assert {("times", "1"), ("times", "2")} < index.keys()
        assert set(index.values()) == {"READY"}

        client.unload_model("loads")
        assert not client.is_model_ready("loads")
        with pytest.raises(InferenceServerException) as caught:
            client.infer("loads", [tensor(PAIRS)])
        assert caught.value.status() == "404"
        gone = {key for key, state in states(client).items() if state == "UNAVAILABLE"}
        assert {name for name, _ in gone} == {"loads"}
        with pytest.raises(InferenceServerException):
            client.unload_model("loads")

        client.load_model("loads")
        assert client.is_model_ready("loads")
        result = client.infer("loads", [tensor(PAIRS)])
        assert result.as_numpy("output-0").tolist() == [[2, 2], [2, 2]]
        client.load_model("loads")  # again, while it is loaded
        result = client.infer("loads", [tensor(PAIRS)])
        assert result.as_numpy("output-0").tolist() == [[3, 3], [3, 3]]
        assert states(client) == index

        client.unload_model("times", unload_dependents=True)
        assert not client.is_model_ready("times", "1")
        assert not client.is_model_ready("times", "2")
        # As KServe's server has it: what cannot be loaded is not ready.
        for control, status in (
            (client.load_model, "503"),
            (client.unload_model, "404"),
        ):
            with pytest.raises(InferenceServerException, match="nobody") as caught:
                control("nobody")
            assert caught.value.status() == status
        with pytest.raises(InferenceServerException, match="config") as caught:
            client.load_model("loads", config='{"name": "loads"}')
        assert caught.value.status() == "501"


# --- aio ------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_aio(server: ServerThread) -> None:
    url = f"127.0.0.1:{server.port}"
    async with tritonclient.http.aio.InferenceServerClient(url) as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("sums", "3")
        assert not await client.is_model_ready("nobody")
        assert (await client.get_server_metadata())["name"] == "kserve-lite"
        assert (await client.get_model_metadata("sums"))["versions"] == ["3"]
        assert (await client.get_model_config("sums"))["name"] == "sums"
        index = await client.get_model_repository_index()
        assert ("times", "2") in [(one["name"], one["version"]) for one in index]
        for array in IN_BINARY:
            result = await client.infer("echo", [tensor(array)])
            assert is_binary(result, "in0")
            assert same(result.as_numpy("in0"), array)
        before = counts(await client.get_inference_statistics("sums"))
        for binary in (True, False):
            result = await client.infer(
                "sums",
                [tensor(PAIRS, "pairs", binary=binary)],
                outputs=[output("sums", binary=binary)],
            )
            assert is_binary(result, "sums") == binary
            assert result.as_numpy("sums").tolist() == [3, 7]
        after = counts(await client.get_inference_statistics("sums"))
        ((key, (inferences, successes, failures)),) = before.items()
        assert after == {key: (inferences + 2, successes + 2, failures)}
        with pytest.raises(InferenceServerException) as caught:
            await client.infer("nobody", [tensor(PAIRS)])
        assert caught.value.status() == "404"


@pytest.mark.anyio
async def test_aio_loads_and_unloads() -> None:
    with ServerThread(make_loads()) as server:
        url = f"127.0.0.1:{server.port}"
        async with tritonclient.http.aio.InferenceServerClient(url) as client:
            await client.unload_model("loads")
            assert not await client.is_model_ready("loads")
            await client.load_model("loads")
            result = await client.infer("loads", [tensor(PAIRS)])
            assert result.as_numpy("output-0").tolist() == [[2, 2], [2, 2]]
