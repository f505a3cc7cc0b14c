"""The binary tensor extension over both HTTP versions: what is sent, and no copies."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from kserve_lite import InferRequest, InferResponse, Model, Tensor
from kserve_lite.rest.replies import Reply
from tests.transports.client import Answer, model_of, serving
from tests.transports.h2client import connected

pytestmark = pytest.mark.anyio

INFER = "/v2/models/m/infer"
SIZE = "inference-header-content-length"
both_versions = pytest.mark.parametrize("version", ["http1", "http2"])


async def echo(request: InferRequest) -> InferResponse:
    return InferResponse(request.inputs)


def binary(
    *arrays: np.ndarray, parameters: dict[str, Any] | None = None, **members: Any
) -> tuple[tuple[str, str], bytes]:
    """The header and the body of a request with FP32 tensors a, b, ..."""
    inputs = [
        {
            "name": name,
            "shape": array.shape,
            "datatype": "FP32",
            "parameters": {"binary_data_size": array.nbytes},
        }
        for name, array in zip("abc", arrays, strict=False)
    ]
    given = {"binary_data_output": True} if parameters is None else parameters
    head = json.dumps({"inputs": inputs, "parameters": given, **members}).encode()
    return (SIZE, str(len(head))), head + b"".join(a.tobytes() for a in arrays)


def split(answer: Answer) -> tuple[Any, bytes]:
    size = int(answer.headers[SIZE])
    return json.loads(answer.body[:size]), answer.body[size:]


@both_versions
@pytest.mark.parametrize("count", [3, 150_528])
@pytest.mark.parametrize("announced", [True, False])
async def test_in_and_out(version: str, count: int, announced: bool) -> None:
    first = np.arange(count, dtype=np.float32)
    second = -first
    header, body = binary(first, second)
    async with serving(echo) as server, connected(version, server.port) as client:
        for _ in range(3):
            answer = await client.fetch(
                "POST", INFER, header, body=body, announced=announced
            )
            assert answer.status == 200
            assert answer.headers["content-type"] == "application/octet-stream"
            assert int(answer.headers["content-length"]) == len(answer.body)
            document, tensors = split(answer)
            assert [output["parameters"] for output in document["outputs"]] == [
                {"binary_data_size": 4 * count}
            ] * 2
            assert all("data" not in output for output in document["outputs"])
            assert tensors == first.tobytes() + second.tobytes()


@both_versions
async def test_binary_in_and_json_out(version: str) -> None:
    header, body = binary(np.array([1, 2.5], np.float32), parameters={})
    async with serving(echo) as server, connected(version, server.port) as client:
        answer = await client.fetch("POST", INFER, header, body=body)
        assert answer.headers["content-type"] == "application/json"
        assert SIZE not in answer.headers
        assert answer.json["outputs"][0]["data"] == [1, 2.5]


@both_versions
async def test_some_outputs_binary_in_the_order_asked_for(version: str) -> None:
    asked = [
        {"name": "c"},
        {"name": "b", "parameters": {"binary_data": True}},
        {"name": "a", "parameters": {"binary_data": False}},
    ]
    arrays = [np.array([number], np.float32) for number in (1, 2, 3)]
    header, body = binary(*arrays, outputs=asked, parameters={})
    async with serving(echo) as server, connected(version, server.port) as client:
        document, tensors = split(await client.fetch("POST", INFER, header, body=body))
    assert [output["name"] for output in document["outputs"]] == ["c", "b", "a"]
    assert [output.get("data") for output in document["outputs"]] == [[3], None, [1]]
    assert tensors == arrays[1].tobytes()


@both_versions
@pytest.mark.parametrize("lies", ["-1", "x", "1e2", "", "99999", "9" * 30, "5"])
async def test_a_length_that_lies(version: str, lies: str) -> None:
    async def never(request: InferRequest) -> None:
        raise AssertionError

    _, body = binary(np.zeros(2, np.float32))
    async with serving(never) as server, connected(version, server.port) as client:
        answer = await client.fetch("POST", INFER, (SIZE, lies), body=body)
        assert answer.status == 400
        assert set(answer.json) == {"error"}
        # The connection goes on.
        assert (await client.fetch("GET", "/v2/health/live")).status == 200


@both_versions
async def test_tensors_that_lie_say_so(version: str) -> None:
    header, body = binary(np.zeros(2, np.float32))
    async with serving(echo) as server, connected(version, server.port) as client:
        for wrong, word in ((body[:-1], "7"), (body + b"x", "1")):
            answer = await client.fetch("POST", INFER, header, body=wrong)
            assert answer.status == 400
            assert word in answer.json["error"]


@pytest.mark.parametrize("version", ["http1", "http2"])
async def test_arrays_are_views_of_the_body_and_answers_views_of_the_arrays(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zero copies in and out, seen where the endpoints meet the transport."""
    bodies: list[Any] = []
    seen: list[np.ndarray] = []
    replies: list[Reply] = []
    result = np.arange(200_000, dtype=np.float32)

    async def predict(x: np.ndarray) -> np.ndarray:
        seen.append(x)
        return result

    async with serving(predict) as server:
        answer_by = server._listener.app

        async def spy(request: Any, body: Any, client: Any) -> Reply:
            bodies.append(body)
            replies.append(await answer_by(request, body, client))
            return replies[-1]

        monkeypatch.setattr(server._listener, "app", spy)
        async with connected(version, server.port) as client:
            header, body = binary(-result)
            answer = await client.fetch("POST", INFER, header, body=body)
        assert split(answer)[1] == result.tobytes()
    assert (seen[0] == -result).all()
    assert np.shares_memory(seen[0], np.frombuffer(bodies[0], np.uint8))
    pieces = replies[0].body
    assert isinstance(pieces, list)
    assert np.shares_memory(np.frombuffer(pieces[-1], np.uint8), result)


@both_versions
async def test_a_handler_sets_headers_but_not_the_framing(version: str) -> None:
    async def predict(x: np.ndarray, response_headers: dict[str, str]) -> np.ndarray:
        response_headers["x-mine"] = "1"
        response_headers["Content-Type"] = "text/plain"
        response_headers["Inference-Header-Content-Length"] = "3"
        return x

    array = np.array([4], np.float32)
    header, body = binary(array)
    async with serving(predict) as server, connected(version, server.port) as client:
        answer = await client.fetch("POST", INFER, header, body=body)
    assert answer.headers["x-mine"] == "1"
    assert answer.headers["content-type"] == "application/octet-stream"
    assert split(answer)[1] == array.tobytes()


@both_versions
async def test_any_bytes(version: str) -> None:
    elements = [b"", b"\xff\xfe\x00", b"x" * 70_000]
    data = b"".join(len(e).to_bytes(4, "little") + e for e in elements)
    head = json.dumps(
        {
            "inputs": [
                {
                    "name": "a",
                    "shape": [3],
                    "datatype": "BYTES",
                    "parameters": {"binary_data_size": len(data)},
                }
            ],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    async with serving(echo) as server, connected(version, server.port) as client:
        answer = await client.fetch(
            "POST", INFER, (SIZE, str(len(head))), body=head + data
        )
        assert split(answer)[1] == data


@both_versions
async def test_every_kind_of_result_honours_the_outputs_asked_for(version: str) -> None:
    one, two = np.array([1], np.float32), np.array([2], np.float32)
    results: dict[str, Any] = {
        "dict": {"one": one, "two": two},
        "response": InferResponse(
            (Tensor.from_array("one", one), Tensor.from_array("two", two))
        ),
        "document": {
            "outputs": [
                {"name": "one", "shape": [1], "datatype": "FP32", "data": [1]},
                {"name": "two", "shape": [1], "datatype": "FP32", "data": [2]},
            ]
        },
        "tuple": (one, two),
    }

    async def predict(request: InferRequest) -> Any:
        return results[request.parameters["kind"]]

    model: Model = model_of(predict)
    async with serving(model) as server, connected(version, server.port) as client:
        for kind in results:
            names = ["output-1", "output-0"] if kind == "tuple" else ["two", "one"]
            for asked in (names, names[:1], [*names, "three"], [names[0]] * 2):
                body = {
                    "id": "7",
                    "inputs": [],
                    "parameters": {"kind": kind},
                    "outputs": [{"name": name} for name in asked],
                }
                answer = await client.fetch(
                    "POST", INFER, body=json.dumps(body).encode()
                )
                if len(set(asked) - {"three"}) < len(asked):
                    assert answer.status == 400, (kind, asked)
                    continue
                assert answer.json["id"] == "7"
                outputs = answer.json["outputs"]
                assert [o["name"] for o in outputs] == asked
                assert [o["data"] for o in outputs] == [[2], [1]][: len(asked)]


@pytest.mark.parametrize("name", ["classification", "shared_memory_region"])
async def test_outputs_in_a_way_that_is_not_offered(name: str) -> None:
    async def never(request: InferRequest) -> None:
        raise AssertionError

    header, body = binary(
        np.zeros(1, np.float32),
        outputs=[{"name": "a", "parameters": {name: 1}}],
        parameters={},
    )
    async with serving(never) as server, connected("http1", server.port) as client:
        answer = await client.fetch("POST", INFER, header, body=body)
        assert answer.status == 501
        assert "neither as classes" in answer.json["error"]
