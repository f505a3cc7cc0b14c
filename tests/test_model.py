"""What a user may write: decorators, parameters by name, payloads by annotation."""

from __future__ import annotations

import contextvars
import functools
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import torch

from kserve_lite import (
    Context,
    InferRequest,
    InferResponse,
    Model,
    ModelDefinitionError,
    Tensor,
    TensorSpec,
    serve,
)
from tests.support import RawAnswer, ServerThread, exchange

if TYPE_CHECKING:
    from nowhere import Missing  # type: ignore[import-not-found]


def post(server: ServerThread, path: str, body: object, headers: str = "") -> RawAnswer:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {len(text)}"
    return exchange(server.port, head.encode() + b"\r\n\r\n" + text)


def ask(predict: Callable[..., Any], body: object, path: str = "v1") -> Any:
    """Serve one function, send one body, return the answer's JSON."""
    with ServerThread(Model("m", predict=predict)) as server:
        paths = {"v1": "/v1/models/m:predict", "v2": "/v2/models/m/infer"}
        return json.loads(post(server, paths[path], body).body)


def v2(*inputs: tuple[str, list[int], str, list[Any]], **more: Any) -> dict[str, Any]:
    fields = ("name", "shape", "datatype", "data")
    return {"inputs": [dict(zip(fields, i, strict=True)) for i in inputs], **more}


# --- definition -----------------------------------------------------------------


def test_decorators_return_the_function_unchanged() -> None:
    model = Model("m")

    def function(payload: object) -> object:
        return payload

    def bare() -> int:
        return 1

    def stateful(state: object) -> bool:
        return bool(state)

    assert model.predict(function) is function
    assert model.preprocess(function) is function
    assert model.postprocess(function) is function
    assert model.explain(function) is function
    assert model.load(bare) is bare
    assert model.ready(stateful) is stateful
    assert model.unload(stateful) is stateful


@pytest.mark.parametrize(
    ("define", "words"),
    [
        (lambda m: (m.predict(lambda p: p), m.predict(lambda p: p)), "already"),
        (lambda m: m.predict(lambda p, stat: p), "Did you mean 'state'"),
        (lambda m: m.predict(lambda p, **rest: p), "by name"),
        (lambda m: m.predict(lambda p, *rest: p), "by name"),
        (lambda m: m.predict(lambda: 1), "payload"),
        (lambda m: m.predict(lambda state, p: p), "first"),
        (lambda m: m.predict(lambda p, state, /: p), "'state' by position"),
        (lambda m: m.predict(lambda *, p: p), "'p' by name only"),
        (lambda m: m.load(lambda state: 1), "nothing"),
        (lambda m: m.ready(lambda headers: True), "state"),
        (lambda m: m.predict("text"), "must be a function"),
        (lambda m: Model("a/b"), "'/'"),
        (lambda m: Model(""), "character"),
        (lambda m: Model("m", predct=print), "predct"),  # type: ignore[call-arg]
        (lambda m: TensorSpec("FLOAT", [1]), "FP32"),
        (lambda m: TensorSpec("FP32", [-2]), "-1"),
    ],
)
def test_what_cannot_work_is_an_error_where_it_is_written(
    define: Callable[[Model], object], words: str
) -> None:
    with pytest.raises(ModelDefinitionError, match=words):
        define(Model("m"))


def test_an_annotation_that_is_not_defined_says_so() -> None:
    def predict(payload: Missing) -> object:
        return payload

    with pytest.raises(ModelDefinitionError, match=r"Missing.*TYPE_CHECKING"):
        Model("m", predict=predict)


def test_variables_of_enclosing_functions_may_have_no_value_yet() -> None:
    bound = TensorSpec("FP32", [-1])

    def predict(x: Annotated[np.ndarray, bound]) -> dict[str, Any]:
        return {"shape": bound.shape, "factor": factor}

    model = Model("m", predict=predict)
    factor = 3
    assert model.inputs == (TensorSpec("FP32", (-1,), "x"),)
    with ServerThread(model) as server:
        answer = post(server, "/v1/models/m:predict", {"instances": [1]})
        assert json.loads(answer.body) == {"shape": [-1], "factor": 3}

    def unseen(x: Annotated[np.ndarray, later]) -> object:
        return later

    with pytest.raises(ModelDefinitionError, match=r"'later'.*not defined"):
        Model("m", predict=unseen)
    later = bound


def test_mixed_annotations_are_refused() -> None:
    def either(x: np.ndarray | dict[str, Any]) -> object:
        return x

    def libraries(x: np.ndarray | torch.Tensor | None) -> object:
        return x

    def declared(x: Annotated[torch.Tensor, SPEC] | str) -> object:
        return x

    def second(x: dict[str, Any], y: np.ndarray) -> object:
        return x, y

    for mixed in (either, libraries, declared):
        with pytest.raises(ModelDefinitionError, match="mixes"):
            Model("m", predict=mixed)
    with pytest.raises(ModelDefinitionError, match="no tensor"):
        Model("m", predict=second)


@pytest.mark.anyio
async def test_a_model_without_predict_cannot_be_served() -> None:
    with pytest.raises(ModelDefinitionError, match="no predict handler"):
        async with serve(Model("m"), http_port=0, host="127.0.0.1"):
            pass


@pytest.mark.anyio
async def test_registering_while_served_is_an_error() -> None:
    model = Model("m", predict=lambda payload: payload)
    async with serve(model, http_port=0, host="127.0.0.1"):
        with pytest.raises(ModelDefinitionError, match="before run"):
            model.explain(lambda payload: payload)


# --- payloads and results --------------------------------------------------------


def test_json_handlers_get_json_on_v1_and_a_request_on_v2() -> None:
    def predict(payload: Any) -> object:
        if isinstance(payload, InferRequest):
            return np.array([len(payload.inputs)])
        return {"got": payload}

    assert ask(predict, {"any": [1, "x"]}) == {"got": {"any": [1, "x"]}}
    answer = ask(predict, v2(("a", [1], "FP32", [1])), "v2")
    assert answer["outputs"][0]["data"] == [1]


def test_request_handlers_get_a_request_on_both() -> None:
    def predict(request: InferRequest) -> dict[str, np.ndarray]:
        assert "a" in request
        return {name: request[name] * 2 for name in request.names}

    rows = {"instances": [{"a": [1, 2], "b": 3}, {"a": [4, 5], "b": 6}]}
    assert ask(predict, rows) == {
        "predictions": [{"a": [2, 4], "b": 6}, {"a": [8, 10], "b": 12}]
    }
    columns = {"inputs": {"a": [[1, 2]], "b": [3]}}
    assert ask(predict, columns) == {"predictions": [{"a": [2, 4], "b": 6}]}
    answer = ask(predict, v2(("a", [2], "INT8", [1, 2])), "v2")
    assert answer["outputs"] == [
        {"name": "a", "shape": [2], "datatype": "INT8", "data": [2, 4]}
    ]


def test_one_array_takes_whatever_name_the_input_has() -> None:
    def predict(x: np.ndarray) -> np.ndarray:
        return x + 1

    assert ask(predict, {"instances": [[1], [2]]}) == {"predictions": [[2], [3]]}
    assert ask(predict, {"inputs": [[1.5]]}) == {"predictions": [[2.5]]}
    answer = ask(predict, v2(("anything", [1], "FP64", [1])), "v2")
    assert answer["outputs"][0]["name"] == "output-0"


def test_several_arrays_come_by_name() -> None:
    def predict(a: np.ndarray, state: object, b: np.ndarray) -> np.ndarray:
        assert state is None
        difference: np.ndarray = a - b
        return difference

    rows = {"instances": [{"b": 1, "a": 10}, {"a": 20, "b": 2}]}
    assert ask(predict, rows) == {"predictions": [9, 18]}
    both = v2(("b", [1], "INT32", [1]), ("a", [1], "INT32", [5]))
    assert ask(predict, both, "v2")["outputs"][0]["data"] == [4]
    one = ask(predict, v2(("a", [1], "INT32", [5])), "v2")
    assert one == {"error": "The model takes the inputs a, b; missing: b."}
    plain = ask(predict, {"instances": [1, 2]})
    assert plain == {"error": "The model takes the inputs a, b; missing: a, b."}


def test_npt_annotations_are_arrays() -> None:
    def predict(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return x

    assert ask(predict, {"instances": [1]}) == {"predictions": [1]}


def test_torch_tensors_in_and_out() -> None:
    def predict(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert isinstance(x, torch.Tensor)
        return x.float().requires_grad_() * 2, y.to(torch.bfloat16)

    rows = {"instances": [{"x": [1.0, 2.0], "y": 1}, {"x": [3.0, 4.0], "y": 2}]}
    assert ask(predict, rows) == {
        "predictions": [
            {"output-0": [2.0, 4.0], "output-1": 1.0},
            {"output-0": [6.0, 8.0], "output-1": 2.0},
        ]
    }
    answer = ask(predict, v2(("x", [1], "BF16", [1.5]), ("y", [1], "FP32", [2])), "v2")
    assert [o["datatype"] for o in answer["outputs"]] == ["FP32", "BF16"]
    assert [o["data"] for o in answer["outputs"]] == [[3.0], [2.0]]


def test_a_torch_tensor_shares_the_memory_of_the_array() -> None:
    from kserve_lite.tensors import as_numpy, as_torch

    array = np.arange(4, dtype=np.float32)
    tensor = as_torch(array, "x")
    tensor[0] = 9
    assert array[0] == 9
    assert as_numpy(tensor) is not None
    assert np.shares_memory(as_numpy(tensor), array)


def test_bytes_for_a_torch_handler_are_a_clear_400() -> None:
    def predict(x: torch.Tensor) -> torch.Tensor:
        return x

    answer = ask(predict, v2(("x", [1], "BYTES", ["a"])), "v2")
    assert answer == {"error": "Input 'x' is BYTES: this model takes numbers."}


SPEC = TensorSpec("FP32", [-1, 2])


def declared(
    x: Annotated[np.ndarray, SPEC],
) -> Annotated[np.ndarray, TensorSpec("FP32", [-1, 2], "doubled")]:
    assert x.dtype == np.float32
    return x * np.float64(2)


def test_specs_are_metadata_and_enforced() -> None:
    with ServerThread(Model("m", version="3", predict=declared)) as server:
        request = b"GET /v2/models/m HTTP/1.1\r\nHost: x\r\n\r\n"
        assert json.loads(exchange(server.port, request, "GET").body) == {
            "name": "m",
            "versions": ["3"],
            "platform": "python",
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}],
            "outputs": [{"name": "doubled", "datatype": "FP32", "shape": [-1, 2]}],
        }
        fits = post(server, "/v2/models/m/infer", v2(("x", [1, 2], "FP32", [1, 2])))
        assert json.loads(fits.body)["outputs"] == [
            {"name": "doubled", "shape": [1, 2], "datatype": "FP32", "data": [2.0, 4.0]}
        ]
        assert json.loads(fits.body)["model_version"] == "3"
        for body, got in [
            (v2(("x", [1, 2], "FP64", [1, 2])), "FP64[1,2]"),
            (v2(("x", [2], "FP32", [1, 2])), "FP32[2]"),
            (v2(("x", [1, 3], "FP32", [1, 2, 3])), "FP32[1,3]"),
        ]:
            refused = post(server, "/v2/models/m/infer", body)
            assert refused.status == 400
            assert json.loads(refused.body) == {
                "error": f"Input 'x' must be FP32[-1,2], got {got}."
            }
        rows = post(server, "/v1/models/m:predict", {"instances": [[1, 2, 3]]})
        assert (rows.status, b"FP32[1,3]" in rows.body) == (400, True)


def test_outputs_are_held_to_their_declaration() -> None:
    def predict(x: np.ndarray) -> Annotated[np.ndarray, TensorSpec("INT32", [-1])]:
        return x

    assert ask(predict, {"instances": [1, 2]}) == {"predictions": [1, 2]}
    for body in ({"instances": [1.5]}, {"instances": [[1]]}):
        assert "error" in ask(predict, body)


@pytest.mark.parametrize(
    ("result", "v1_answer"),
    [
        ({"a": 1}, {"a": 1}),
        ([1, 2], [1, 2]),
        (None, None),
        (np.array([[1, 2]]), {"predictions": [[1, 2]]}),
        (
            (np.array([1]), np.array([2])),
            {"predictions": [{"output-0": 1, "output-1": 2}]},
        ),
        (np.array(["a", "b"]), {"predictions": ["a", "b"]}),
        (np.array([b"\xff"], object), {"predictions": [{"b64": "/w=="}]}),
        (np.arange(6).reshape(2, 3).T, {"predictions": [[0, 3], [1, 4], [2, 5]]}),
        (np.array(5), {"predictions": 5}),
        ({"scores": np.array([1])}, {"scores": [1]}),
        (InferResponse((Tensor.from_array("o", np.array([1])),)), {"predictions": [1]}),
    ],
)
def test_results_on_v1(result: object, v1_answer: object) -> None:
    def predict(payload: dict[str, Any]) -> object:
        return result

    assert ask(predict, {}) == v1_answer


def test_bytes_and_text_answer_v1_as_they_are() -> None:
    with ServerThread(
        Model("b", predict=lambda payload: b"\x00\xff"),
        Model("s", predict=lambda payload: "h\u00e9"),
    ) as server:
        assert post(server, "/v1/models/b:predict", {}).body == b"\x00\xff"
        assert post(server, "/v1/models/s:predict", {}).body == "h\u00e9".encode()


def sync_items(
    payload: dict[str, Any], response_headers: dict[str, str]
) -> Iterator[Any]:
    response_headers["content-type"] = "text/event-stream"
    response_headers["x-mine"] = "1"
    yield "a"
    yield b"b"
    yield {"c": np.float32(1.5)}


async def async_items(
    payload: dict[str, Any], response_headers: dict[str, str]
) -> AsyncIterator[Any]:
    for item in sync_items(payload, response_headers):
        yield item


@pytest.mark.parametrize("predict", [sync_items, async_items])
def test_streams_keep_the_handlers_headers(predict: Callable[..., Any]) -> None:
    with ServerThread(Model("m", predict=predict)) as server:
        answer = post(server, "/v1/models/m:predict", {})
        assert answer.chunked
        assert answer.complete
        assert answer.headers["content-type"] == "text/event-stream"
        assert answer.headers["x-mine"] == "1"
        assert answer.body == b'ab{"c":1.5}\n'


def test_a_postprocess_may_wrap_a_stream() -> None:
    def predict(payload: dict[str, Any]) -> Iterator[str]:
        yield from "ab"

    def postprocess(items: Any) -> Iterator[str]:
        for item in items:
            yield item.upper()

    with ServerThread(Model("m", predict=predict, postprocess=postprocess)) as server:
        assert post(server, "/v1/models/m:predict", {}).body == b"AB"


# --- stages, state, context ------------------------------------------------------


def test_stages_run_in_order_with_state_and_context() -> None:
    model = Model("m")
    seen: list[str] = []

    @model.load
    def load() -> dict[str, int]:
        return {"factor": 3}

    @model.preprocess
    async def preprocess(payload: dict[str, Any], headers: dict[str, str]) -> int:
        seen.append("preprocess")
        assert headers["x-give"] == "7"
        with pytest.raises(TypeError):
            headers["x-give"] = "8"
        return int(headers["x-give"])

    @model.predict
    def predict(number: int, state: dict[str, int], context: Context) -> int:
        seen.append("predict")
        assert context.model_name == "m"
        assert context.protocol == "v1"
        assert context.request_id == "rid-1"
        assert not context.disconnected
        remaining = context.remaining()
        assert remaining is not None
        assert 0 < remaining <= 60
        return number * state["factor"]

    @model.explain
    def explain(number: int) -> dict[str, int]:
        return {"explained": number}

    @model.postprocess
    async def postprocess(result: Any) -> dict[str, Any]:
        seen.append("postprocess")
        return {"result": result}

    headers = "x-give: 7\r\nX-Request-Id: rid-1\r\nx-request-timeout-ms: 60000\r\n"
    with ServerThread(model) as server:
        answer = post(server, "/v1/models/m:predict", {}, headers)
        assert json.loads(answer.body) == {"result": 21}
        assert seen == ["preprocess", "predict", "postprocess"]
        explained = post(server, "/v1/models/m:explain", {}, headers)
        assert json.loads(explained.body) == {"result": {"explained": 7}}


@pytest.mark.parametrize(
    "handed",
    [{"b": np.array([1]), "a": np.array([3])}, (np.array([3]), np.array([1]))],
)
def test_a_preprocess_hands_several_tensors_on(handed: object) -> None:
    def preprocess(payload: dict[str, Any]) -> object:
        return handed

    def predict(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        difference: np.ndarray = a - b
        return difference

    with ServerThread(Model("m", preprocess=preprocess, predict=predict)) as server:
        answer = post(server, "/v1/models/m:predict", {})
        assert json.loads(answer.body) == {"predictions": [2]}


class Doubler:
    async def __call__(self, payload: dict[str, Any]) -> object:
        return {"twice": payload["n"] * 2}

    def method(self, payload: dict[str, Any]) -> object:
        return {"thrice": payload["n"] * 3}


def times(factor: int, payload: dict[str, Any]) -> object:
    return {"times": payload["n"] * factor}


def test_objects_methods_and_partials_are_handlers() -> None:
    assert ask(Doubler(), {"n": 2}) == {"twice": 4}
    assert ask(Doubler().method, {"n": 2}) == {"thrice": 6}
    assert ask(functools.partial(times, 5), {"n": 2}) == {"times": 10}


def test_a_deadline_that_passes_is_504() -> None:
    import anyio

    async def predict(payload: dict[str, Any]) -> None:
        await anyio.sleep_forever()

    with ServerThread(Model("m", predict=predict)) as server:
        answer = post(
            server, "/v1/models/m:predict", {}, "x-request-timeout-ms: 50\r\n"
        )
        assert answer.status == 504
        bad = post(server, "/v1/models/m:predict", {}, "x-request-timeout-ms: x\r\n")
        assert bad.status == 400


def test_failures_stay_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    def predict(payload: dict[str, Any]) -> object:
        raise ValueError("secret")

    with ServerThread(Model("m", predict=predict)) as server:
        answer = post(server, "/v1/models/m:predict", {}, "x-request-id: abc\r\n")
    assert answer.status == 500
    assert answer.headers["x-request-id"] == "abc"
    assert json.loads(answer.body) == {
        "error": "The model failed to answer. The server's log has more under abc."
    }
    assert "ValueError: secret" in caplog.text
    with ServerThread(Model("m", predict=predict), expose_errors=True) as server:
        assert b"ValueError: secret" in post(server, "/v1/models/m:predict", {}).body


@pytest.mark.parametrize(
    "headers", [{"x-a": "1\r\nx-b: 2"}, {"x a": "1"}, {"x-a": "\u20ac"}]
)
def test_headers_that_would_break_the_message_are_a_500(
    headers: dict[str, str],
) -> None:
    def predict(payload: dict[str, Any], response_headers: dict[str, str]) -> object:
        response_headers.update(headers)
        return {}

    with ServerThread(Model("m", predict=predict)) as server:
        answer = post(server, "/v1/models/m:predict", {})
        assert answer.status == 500
        assert "x-b" not in answer.headers


def test_framing_headers_of_a_handler_are_dropped() -> None:
    def predict(payload: dict[str, Any], response_headers: dict[str, str]) -> object:
        response_headers.update(
            {"Content-Length": "1", "Transfer-Encoding": "chunked", "Connection": "x"}
        )
        return {}

    with ServerThread(Model("m", predict=predict)) as server:
        answer = post(server, "/v1/models/m:predict", {})
        assert answer.body == b"{}"
        assert "connection" not in answer.headers
        assert not answer.chunked


REQUEST_OF: contextvars.ContextVar[str] = contextvars.ContextVar("request_of")


def test_context_variables_do_not_outlive_their_request() -> None:
    async def predict(payload: dict[str, Any]) -> object:
        before = REQUEST_OF.get("nobody")
        REQUEST_OF.set(payload["who"])
        return {"before": before}

    with (
        ServerThread(Model("m", predict=predict)) as server,
        httpx.Client(base_url=server.url) as client,  # one kept connection
    ):
        for who in ("a", "b"):
            answer = client.post("/v1/models/m:predict", json={"who": who})
            assert answer.json() == {"before": "nobody"}


def test_a_plain_generator_is_closed_when_its_client_leaves_amid_an_item() -> None:
    inside, closed, go_on = (threading.Event() for _ in range(3))

    def predict(payload: dict[str, Any]) -> Iterator[str]:
        try:
            yield "first"
            inside.set()
            go_on.wait(30)
            yield "second"
        finally:
            closed.set()

    with ServerThread(Model("m", predict=predict)) as server:
        with httpx.Client(base_url=server.url) as client:
            path = "/v1/models/m:predict"
            with client.stream("POST", path, json={}) as answer:
                assert next(answer.iter_text()) == "first"
                assert inside.wait(30)
        go_on.set()
        assert closed.wait(30)
