"""Through a transformer, from each protocol to each: what clients and handlers see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Annotated, Any

import grpc
import httpx
import numpy as np
import pytest

from kserve_lite import InferRequest, InferResponse, Model, TensorSpec
from kserve_lite.tensors import Tensor
from tests.clients.calls import Stub, infer_request
from tests.forwarding.conftest import Predictor
from tests.support import ServerThread

PROTOCOLS = ("v1", "v2", "grpc-v2")
SPEC = TensorSpec("FP32", [-1, 2])


def plain_transformer() -> Model:
    return Model("double")


def array_transformer() -> Model:
    model = Model("double")

    @model.preprocess
    async def preprocess(x: np.ndarray) -> Annotated[np.ndarray, SPEC]:
        return x.astype("float32") + 1

    @model.postprocess
    async def postprocess(y: np.ndarray) -> np.ndarray:
        return y - 1

    return model


@pytest.fixture(scope="module")
def through(predictor: Predictor) -> Iterator[dict[tuple[str, str], ServerThread]]:
    """Transformers by the predictor's protocol, one plain, one with array handlers."""
    with ExitStack() as stack:
        yield {
            (protocol, kind): stack.enter_context(
                ServerThread(
                    make(),
                    predictor_host=predictor.host,
                    predictor_protocol=protocol,
                )
            )
            for protocol in PROTOCOLS
            for kind, make in (
                ("plain", plain_transformer),
                ("arrays", array_transformer),
            )
        }


def ask(server: ServerThread, over: str, rows: list[list[int]]) -> Any:
    """The rows that come back."""
    if over == "v1":
        answer = httpx.post(
            f"{server.url}/v1/models/double:predict", json={"instances": rows}
        )
        assert answer.status_code == 200, answer.text
        return answer.json()["predictions"]
    array = np.array(rows, np.float32)
    if over == "v2":
        tensor = {"name": "in0", "datatype": "FP32", "shape": array.shape}
        answer = httpx.post(
            f"{server.url}/v2/models/double/infer",
            json={"id": "7", "inputs": [{**tensor, "data": array.tolist()}]},
        )
        assert answer.status_code == 200, answer.text
        document = answer.json()
        assert (document["id"], document["model_name"]) == ("7", "double")
        (output,) = document["outputs"]
        return np.reshape(output["data"], output["shape"]).tolist()
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        reply = Stub(channel).ModelInfer(infer_request("double", array), timeout=20)
    (output,) = reply.outputs
    dtype = {"FP32": np.float32, "FP64": np.float64}[output.datatype]
    raw = np.frombuffer(reply.raw_output_contents[0], dtype)
    return raw.reshape(output.shape).tolist()


@pytest.mark.parametrize("kind", ["plain", "arrays"])
@pytest.mark.parametrize("to", PROTOCOLS)
@pytest.mark.parametrize("over", ["v1", "v2", "grpc"])
def test_every_protocol_reaches_every_other(
    through: dict[tuple[str, str], ServerThread],
    predictor: Predictor,
    over: str,
    to: str,
    kind: str,
) -> None:
    rows = ask(through[to, kind], over, [[1, 2], [3, 4]])
    assert predictor.seen.protocol == to.removesuffix("-v2")
    more = 1 if kind == "arrays" else 0
    assert rows == [[2 + more, 4 + more], [6 + more, 8 + more]]


def test_v1_to_v1_passes_json_as_it_is(
    through: dict[tuple[str, str], ServerThread],
) -> None:
    body = {"instances": [[1, 2.5]], "signature_name": "s", "n": {"deep": [None, "x"]}}
    answer = httpx.post(
        f"{through['v1', 'plain'].url}/v1/models/double:predict", json=body
    )
    assert answer.json() == {
        "predictions": [[2, 5.0]],
        "signature_name": "s",
        "n": {"deep": [None, "x"]},
    }


@pytest.mark.parametrize("to", PROTOCOLS)
def test_generate_gets_one_answer(
    through: dict[tuple[str, str], ServerThread], to: str
) -> None:
    url = f"{through[to, 'plain'].url}/v2/models/double/generate"
    answer = httpx.post(url, json={"id": "7", "x": [[1, 2]]})
    assert answer.status_code == 200, answer.text
    name = "text_output" if to == "v1" else "y"
    assert answer.json() == {"model_name": "double", "id": "7", name: [[2, 4]]}
    streamed = httpx.post(f"{url}_stream", json={"x": [[1, 2]]})
    assert streamed.text.count("data: ") == 1


def test_a_forwarded_prediction_counts_as_one(
    through: dict[tuple[str, str], ServerThread],
) -> None:
    server = through["v2", "plain"]
    before = _predicted(server)
    ask(server, "v1", [[1, 2]])
    assert _predicted(server) == before + 1


def _predicted(server: ServerThread) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    wanted = 'request_predict_seconds_count{model_name="double"} '
    found = [line for line in text.splitlines() if line.startswith(wanted)]
    return float(found[0].removeprefix(wanted)) if found else 0.0


def test_declarations_type_and_name_what_v1_does_not(predictor: Predictor) -> None:
    came: list[InferRequest] = []
    inner = Model("m")

    @inner.predict
    async def predict(payload: InferRequest) -> InferResponse:
        came.append(payload)
        return InferResponse((Tensor("y", payload["x"], "FP32"),))

    outer = Model(
        "m",
        inputs=[TensorSpec("FP32", [-1, 2], name="x")],
        outputs=[TensorSpec("FP32", [-1, 2], name="y")],
    )
    with (
        ServerThread(inner) as there,
        ServerThread(
            outer, predictor_host=f"127.0.0.1:{there.port}", predictor_protocol="v2"
        ) as here,
    ):
        answer = httpx.post(
            f"{here.url}/v1/models/m:predict", json={"instances": [[1, 2]]}
        )
        assert answer.json() == {"predictions": [[1.0, 2.0]]}
        (tensor,) = came[0].inputs
        assert (tensor.name, tensor.datatype) == ("x", "FP32")
        shown = httpx.get(f"{here.url}/v2/models/m").json()
        assert shown["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}]
        wrong = httpx.post(
            f"{here.url}/v1/models/m:predict", json={"instances": [[1, 2, 3]]}
        )
        assert wrong.status_code == 400
        assert len(came) == 1


@pytest.mark.parametrize("to", ["v2", "grpc-v2"])
def test_undeclared_v1_is_named_and_typed_by_the_predictors_metadata(to: str) -> None:
    inner = Model("m")

    @inner.predict
    async def predict(
        a: Annotated[np.ndarray, TensorSpec("FP32", [-1, 2], name="a")],
        b: Annotated[np.ndarray, TensorSpec("INT8", [-1], name="b")],
    ) -> np.ndarray:
        total: np.ndarray = a.sum(axis=1) + b
        return total

    with (
        ServerThread(inner) as there,
        ServerThread(
            Model("m"), predictor_host=f"127.0.0.1:{there.port}", predictor_protocol=to
        ) as here,
    ):
        url = f"{here.url}/v1/models/m:predict"
        rows = {"instances": [{"a": [1, 2], "b": 3}, {"b": 0, "a": [0.5, 0.5]}]}
        assert httpx.post(url, json=rows).json() == {"predictions": [6.0, 1.0]}
        wrong = httpx.post(url, json={"instances": [{"a": [1, 2], "b": 300}]})
        assert wrong.status_code == 400
        assert "'b' must be INT8[-1]" in wrong.json()["error"]


@pytest.mark.parametrize("to", ["v2", "grpc-v2"])
def test_datatypes_go_there_and_back(to: str) -> None:
    echo = Model("m")

    @echo.predict
    async def predict(payload: InferRequest) -> InferResponse:
        return InferResponse(payload.inputs)

    values: dict[str, list[Any]] = {
        "FP16": [1, 2.5],
        "BF16": [1, 2],
        "BYTES": ["a", "é"],
        "BOOL": [True, False],
        "UINT64": [2**64 - 1, 0],
    }
    inputs = [
        {"name": datatype, "datatype": datatype, "shape": [2], "data": data}
        for datatype, data in values.items()
    ]
    with (
        ServerThread(echo) as there,
        ServerThread(
            Model("m"), predictor_host=f"127.0.0.1:{there.port}", predictor_protocol=to
        ) as here,
    ):
        # JSON alone would do for all but the halves, with which all go binary.
        for some in (inputs, inputs[2:]):
            answer = httpx.post(f"{here.url}/v2/models/m/infer", json={"inputs": some})
            assert answer.status_code == 200, answer.text
            assert answer.json()["outputs"] == some
