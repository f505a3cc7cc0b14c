"""Models of KServe that forward: to a predictor by any protocol, to an explainer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from kserve_lite import Context, Tensor
from kserve_lite import InferRequest as NativeRequest
from kserve_lite import InferResponse as NativeResponse
from kserve_lite import Model as NativeModel
from kserve_lite.compat import (
    InferInput,
    InferRequest,
    InferResponse,
    Model,
    PredictorConfig,
)
from kserve_lite.compat.predictor_config import (
    get_predictor_config,
    set_predictor_config,
)
from tests.compat.support import CompatThread
from tests.support import ServerThread

PROTOCOLS = ("v1", "v2", "grpc-v2")


def predictor() -> NativeModel:
    """Doubles rows or tensors, and says which request id reached it."""
    model = NativeModel("m")

    @model.predict
    async def predict(payload: Any, context: Context) -> Any:
        context.response_headers["x-reached"] = context.headers.get("x-request-id", "")
        if isinstance(payload, NativeRequest):
            doubled = payload.inputs[0].array * 2
            return NativeResponse((Tensor.from_array("output-0", doubled),))
        rows = payload["instances"]
        if rows == ["id"]:
            return {"predictions": [context.headers["x-request-id"]]}
        return {"predictions": [[2 * value for value in row] for row in rows]}

    @model.explain
    async def explain(payload: Any) -> Any:
        return {"explanations": payload["instances"]}

    return model


class Plain(Model):
    """Forwards and does nothing else."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.ready = True


class Adding(Plain):
    """Adds one before, by a plain method, and tells what came after."""

    def preprocess(self, payload: Any, headers: Any = None) -> Any:
        rows = [[value + 1 for value in row] for row in payload["instances"]]
        return {"instances": rows}

    def predict(
        self, payload: Any, headers: Any = None, response_headers: Any = None
    ) -> Any:
        return super().predict(payload, headers)

    def postprocess(
        self, result: Any, headers: Any = None, response_headers: Any = None
    ) -> Any:
        return {"predictions": result["predictions"], "type": type(result).__name__}


class Tensors(Plain):
    """Makes a V2 request of V1's rows, and rows of the answer."""

    async def preprocess(self, payload: Any, headers: Any = None) -> Any:
        rows = payload["instances"]
        tensor = InferInput("x", [len(rows), len(rows[0])], "FP32", rows)
        return InferRequest(self.name, [tensor])

    async def postprocess(
        self, result: Any, headers: Any = None, response_headers: Any = None
    ) -> Any:
        if isinstance(result, InferResponse):
            return {"predictions": result.outputs[0].as_numpy().tolist()}
        return result | {"by": "v1"}


@pytest.fixture(scope="module")
def upstream() -> Iterator[str]:
    with ServerThread(predictor()) as running:
        yield f"127.0.0.1:{running.port}"


@pytest.fixture(scope="module", params=PROTOCOLS)
def url(request: pytest.FixtureRequest, upstream: str) -> Iterator[str]:
    """A server of transformers, all of the predictor's model."""
    before = get_predictor_config()
    set_predictor_config(PredictorConfig(upstream, request.param))
    models: list[Model] = [Plain("m"), Adding("m"), Tensors("m"), Plain("unknown")]
    models[0].explainer_host = upstream
    repository = CompatThread()
    for name, model in zip(("m", "adding", "tensors", "zz"), models, strict=True):
        repository.repository.update(model, name)
    with repository as running:
        yield running.url
    set_predictor_config(before)


def ask(url: str, name: str, rows: Any, verb: str = "predict") -> httpx.Response:
    return httpx.post(
        f"{url}/v1/models/{name}:{verb}",
        json={"instances": rows},
        headers={"x-request-id": "asked-1"},
        timeout=30,
        verify=False,
    )


def test_v1_is_forwarded_by_every_protocol(url: str) -> None:
    answer = ask(url, "m", [[1.5, 2.0]])
    assert answer.status_code == 200, answer.text
    assert answer.json() == {"predictions": [[3.0, 4.0]]}


def test_v2_is_forwarded_by_every_protocol(url: str) -> None:
    tensor = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1.5, 2.0]}
    answer = httpx.post(f"{url}/v2/models/m/infer", json={"inputs": [tensor]})
    assert answer.status_code == 200, answer.text
    assert np.ravel(answer.json()["outputs"][0]["data"]).tolist() == [3.0, 4.0]


def test_methods_around_it_see_json(url: str) -> None:
    answer = ask(url, "adding", [[1.5, 2.0]])
    assert answer.json() == {"predictions": [[5.0, 6.0]], "type": "dict"}


def test_an_infer_request_is_forwarded_by_every_protocol(url: str) -> None:
    config = get_predictor_config()
    assert config is not None
    by = {"by": "v1"} if config.protocol == "v1" else {}
    answer = ask(url, "tensors", [[1.5, 2.0]])
    assert answer.json() == {"predictions": [[3.0, 4.0]]} | by


def test_an_explainer_is_asked_by_v1(url: str) -> None:
    answer = ask(url, "m", [[1]], "explain")
    assert answer.status_code == 200, answer.text
    assert answer.json() == {"explanations": [[1]]}


def test_a_refusal_keeps_its_status_and_tells_no_address(
    url: str, upstream: str
) -> None:
    answer = ask(url, "zz", [[1.5]])
    assert answer.status_code == 404
    assert upstream not in answer.text


def test_the_request_id_goes_along(upstream: str) -> None:
    set_predictor_config(PredictorConfig(upstream))
    try:
        with CompatThread(Plain("m")) as running:
            answer = ask(running.url, "m", ["id"])
    finally:
        set_predictor_config(None)
    assert answer.json() == {"predictions": ["asked-1"]}


def test_health_is_the_predictors_where_it_is_asked_for(upstream: str) -> None:
    set_predictor_config(PredictorConfig(upstream, predictor_health_check=True))
    try:
        known, unknown = Plain("m"), Plain("zz")
        with CompatThread(known, unknown) as running:
            for name, status in (("m", 200), ("zz", 503)):
                ready = httpx.get(f"{running.url}/v2/models/{name}/ready")
                assert ready.status_code == status
            assert ask(running.url, "m", [[1]]).status_code == 200
            # Not asked for readiness first, but asked to predict.
            assert ask(running.url, "zz", [[1]]).status_code == 404
    finally:
        set_predictor_config(None)


def test_without_a_predictor_it_is_said() -> None:
    set_predictor_config(PredictorConfig(None))
    try:
        with CompatThread(Plain("m")) as running:
            answer = ask(running.url, "m", [[1]])
    finally:
        set_predictor_config(None)
    assert answer.status_code == 501
    assert answer.json() == {"error": "Could not find predictor_host."}
