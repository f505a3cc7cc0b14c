"""A program for KServe's SDK with models on Ray Serve: each method is what it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.parallel.processes import Grpc, Program, alive, below, rows, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    folder = tmp_path_factory.mktemp("kserve")
    program = Path(__file__).with_name("kserve_program.py")
    with Program(str(program), "--grpc_port", "0", folder=folder) as server:
        yield server.ready()
        left = below(server.process.pid)
        assert server.stop() == 0, server.log
        wait_for(lambda: not alive(left), "the end of Ray's processes")


def test_a_deployment_is_replicated(server: Program) -> None:
    said = [
        server.predict("custom-model", {}, x_test="of the client") for _ in range(12)
    ]
    pids = {answer.json()["predictions"][0] for answer in said}
    assert len(pids) == 2
    assert server.process.pid not in pids
    assert {answer.json()["predictions"][1] for answer in said} == {"of the client"}


def test_tensors_of_a_deployment(server: Program) -> None:
    tensor = {"name": "x", "shape": [2], "datatype": "FP32", "data": [1, 2]}
    said = server.post("/v2/models/custom-model/infer", {"inputs": [tensor]})
    assert rows(said, "y") == [2.0, 4.0]
    with Grpc(server.address) as client:
        answer = client.infer("custom-model", np.array([3, 4], np.float32))
    assert answer.outputs[0].array.tolist() == [6.0, 8.0]


@pytest.mark.parametrize("model", ["custom-model", "by-handle"])
def test_explain_stays_explain(server: Program, model: str) -> None:
    answer = server.post(f"/v1/models/{model}:explain", {"instances": [1]})
    assert answer.json() == {"explanations": [1]}


@pytest.mark.parametrize(
    ("model", "words"), [("custom-model", "not this"), ("by-handle", "nor this")]
)
def test_what_a_model_refuses(server: Program, model: str, words: str) -> None:
    answer = server.predict(model, {"refuse": True}, x_test="x")
    assert (answer.status_code, answer.json()) == (400, {"error": words})


def test_an_exception_stays_in_the_log(server: Program) -> None:
    answer = server.predict("by-handle", {"instances": []})  # KeyError: 'x-test'
    assert answer.status_code == 500
    assert "x-test" not in answer.text


def test_a_handle(server: Program) -> None:
    answer = server.predict("by-handle", {}, x_test="of the client")
    assert answer.json() == {"predictions": ["of the client"]}


def test_a_stream_of_a_class_with_arguments(server: Program) -> None:
    answer = server.predict("teller", {})
    assert answer.text == "hello again"
    assert answer.headers["transfer-encoding"] == "chunked"
