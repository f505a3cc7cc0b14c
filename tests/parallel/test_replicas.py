"""What a server with replicas answers: as one with local models does, from others."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest

from tests.parallel.processes import (
    PATIENCE,
    Grpc,
    Program,
    alive,
    below,
    rows,
    together,
    wait_for,
)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

MOST = 6  # max_in_flight


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    folder = tmp_path_factory.mktemp("replicas")
    program = Path(__file__).with_name("program.py")
    flags = ("--max_in_flight", str(MOST), "--access_log", "false")
    with Program(str(program), *flags, folder=folder) as server:
        yield server.ready()


@pytest.fixture(autouse=True)
def log(server: Program) -> Iterator[None]:
    """What the server has logged is shown with a test that fails."""
    before = len(server.log)
    yield
    print(server.log[before:])


def tell(server: Program, **more: Any) -> dict[str, Any]:
    response = server.predict("many", {"do": "tell", **more})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def in_flight(server: Program, model: str) -> int:
    text = server.http.get("/metrics").text
    found = re.search(rf'requests_in_flight{{model_name="{model}"}} (\S+)', text)
    return int(float(found[1])) if found else 0


def pids(server: Program, model: str) -> set[int]:
    return {server.predict(model, {"do": "tell"}).json()["pid"] for _ in range(6)}


@pytest.mark.parametrize("model", ["many", "sturdy"])  # async def, def
def test_two_replicas_are_inside_at_the_same_time(server: Program, model: str) -> None:
    def ask() -> Any:
        return server.predict(model, {"do": "meet", "tag": model}).json()

    with together(ask, ask) as answers:
        pass
    assert [answer["met"] for answer in answers] == [True, True]
    assert len({answer["pid"] for answer in answers}) == 2
    assert server.process.pid not in {answer["pid"] for answer in answers}


def test_context(server: Program) -> None:
    response = server.predict(
        "many",
        {"do": "tell"},
        x_test="of the client",
        x_request_id="id-1",
        x_request_timeout_ms="50000",
    )
    answer = response.json()
    assert answer["header"] == "of the client"
    assert answer["id"] == "id-1"
    assert (answer["protocol"], answer["model"]) == ("v1", "many")
    assert 0 < answer["remaining"] <= 50
    assert answer["state"] == f"state of {answer['pid']}"
    assert answer["path"] == "/mnt/models/weights"
    assert response.headers["x-replica"] == str(answer["pid"])
    assert response.headers["x-request-id"] == "id-1"


def test_large_json_both_ways(server: Program) -> None:
    size = 6 * 1024 * 1024  # above the usual limit of a message of gRPC
    answer = tell(server, filling="f" * size, wants=size)
    assert answer["size"] == len(answer["answer"]) == size


def test_the_stages_of_a_replica_are_counted(server: Program) -> None:
    def counts() -> dict[str, float]:
        text = server.http.get("/metrics").text
        found = re.findall(
            r'^request_(\w+)_seconds_count\{model_name="tensors"\} (\S+)', text, re.M
        )
        return {stage: float(number) for stage, number in found}

    before = counts()
    assert server.predict("tensors", {"instances": [[1, 2]]}).status_code == 200
    after = counts()
    for stage in ("preprocess", "predict", "postprocess"):
        assert after[stage] == before.get(stage, 0) + 1


def test_explain(server: Program) -> None:
    response = server.post("/v1/models/many:explain", {"instances": [1, 2]})
    assert response.json() == {"explanations": [1, 2]}


def test_runtime_env(server: Program) -> None:
    answer = server.predict("sturdy", {"do": "tell"}).json()
    assert answer["who"] == "sturdy"


def test_v1_and_v2_json(server: Program) -> None:
    response = server.predict("tensors", {"instances": [[1, 2]]})
    assert response.json()["predictions"] == [{"y": [2.0, 4.0], "rows": 1}]
    tensor = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [3, 4]}
    response = server.post(
        "/v2/models/tensors/infer",
        {"id": "7", "inputs": [tensor], "outputs": [{"name": "y"}]},
    )
    assert response.headers["x-came"] == "ndarray float32 writable"
    assert response.json()["id"] == "7"
    assert [output["name"] for output in response.json()["outputs"]] == ["y"]
    assert rows(response, "y") == [6.0, 8.0]


@pytest.mark.parametrize("columns", [3, 1_000_000], ids=["small", "large"])
def test_binary_tensors(server: Program, columns: int) -> None:
    array = np.arange(columns, dtype=np.float32)[None]
    with Grpc(server.address) as client:
        (doubled, _) = client.infer("tensors", array).outputs
    np.testing.assert_array_equal(doubled.array, array * 2)

    raw = array.tobytes()
    head = (
        b'{"inputs":[{"name":"x","shape":[1,%d],"datatype":"FP32","parameters":'
        b'{"binary_data_size":%d}}],"outputs":[{"name":"y","parameters":'
        b'{"binary_data":true}}]}' % (columns, len(raw))
    )
    response = server.http.post(
        "/v2/models/tensors/infer",
        content=head + raw,
        headers={"inference-header-content-length": str(len(head))},
    )
    came = response.headers["x-came"]
    assert came.startswith("ndarray float32")
    # In the object store they are everybody's.
    assert came.endswith("read-only") or columns == 3
    assert response.content.endswith((array * 2).tobytes())


def batches(server: Program) -> tuple[float, float, dict[str, Any]]:
    """How many calls for several requests' rows, of how many rows; Triton's words."""
    text = server.http.get("/metrics").text
    calls, total = (
        float(found[1])
        if (
            found := re.search(rf"batch_rows_{what}{{[^}}]*tensors[^}}]*}} (\S+)", text)
        )
        else 0.0
        for what in ("count", "sum")
    )
    (stats,) = server.http.get("/v2/models/tensors/stats").json()["model_stats"]
    return calls, total, stats


def test_rows_of_several_requests_go_through_one_call(server: Program) -> None:
    asked = 0
    calls_before, rows_before, _ = batches(server)

    def ask() -> int:
        answer = server.predict("tensors", {"instances": [[1, 2]]}).json()
        return int(answer["predictions"][0]["rows"])

    def at_once() -> bool:
        nonlocal asked
        asked += 4
        with together(*[ask] * 4) as answers:
            pass
        return any(answer > 1 for answer in answers)

    wait_for(at_once)
    calls, total, stats = batches(server)
    assert total - rows_before == asked
    assert 0 < calls - calls_before < asked
    assert stats["execution_count"] == calls < stats["inference_count"]
    assert (
        sum(b["batch_size"] * b["compute_infer"]["count"] for b in stats["batch_stats"])
        == total
    )


def test_what_is_declared(server: Program) -> None:
    tensor = {"name": "x", "shape": [2], "datatype": "INT64", "data": [3, 4]}
    response = server.post("/v2/models/tensors/infer", {"inputs": [tensor]})
    assert response.status_code == 400
    assert response.json()["error"] == ("Input 'x' must be FP32[-1,-1], got INT64[2].")
    response = server.predict("tensors", {"instances": [[33, 1]]})
    assert response.status_code == 500
    metadata = server.http.get("/v2/models/tensors").json()
    assert metadata["inputs"][0]["datatype"] == "FP32"
    assert [output["name"] for output in metadata["outputs"]] == ["y", "rows"]


def test_statuses(server: Program) -> None:
    response = server.predict("many", {"do": "refuse"})
    assert response.status_code == 400
    assert response.json() == {"error": "There is no such thing."}
    assert server.predict("none", {"do": "tell"}).status_code == 404
    response = server.predict("many", {"do": "fail"}, x_request_id="id-of-a-failure")
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "id-of-a-failure" in response.text
    wait_for(lambda: "ValueError: secret words" in server.log, "a traceback")
    assert "model many failed, request id id-of-a-failure" in server.log
    assert server.predict("many", {"do": "lock"}).status_code == 500
    assert in_flight(server, "many") == 0


def test_statuses_of_grpc(server: Program) -> None:
    array = np.zeros(1, np.float32)
    with Grpc(server.address) as client:
        with pytest.raises(grpc.RpcError) as caught:
            client.infer("tensors", array)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.RpcError) as caught:
            client.infer("many", array)  # its handler takes JSON
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert "Internal server error" in caught.value.details()


def test_deadline(server: Program) -> None:
    response = server.predict(
        "many", {"do": "hang", "tag": "late"}, x_request_timeout_ms="300"
    )
    assert response.status_code == 504
    if (server.folder / "late-began").exists():
        wait_for((server.folder / "late-cancelled").exists)
    assert in_flight(server, "many") == 0


def test_a_client_that_goes_away(server: Program) -> None:
    body = json.dumps({"do": "hang", "tag": "gone"})
    connection = http.client.HTTPConnection(server.address, timeout=PATIENCE)
    connection.request("POST", "/v1/models/many:predict", body)
    wait_for((server.folder / "gone-began").exists)
    connection.close()
    wait_for((server.folder / "gone-cancelled").exists)
    wait_for(lambda: in_flight(server, "many") == 0)


def test_overload(server: Program) -> None:
    def ask() -> Any:
        return server.predict(
            "many", {"do": "hang", "tag": "much"}, x_request_timeout_ms="10000"
        )

    with together(*[ask] * MOST):
        wait_for(lambda: in_flight(server, "many") == MOST)
        response = server.predict("many", {"do": "tell"})
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
    assert in_flight(server, "many") == 0


def streamed(server: Program, value: Any) -> Any:
    return server.http.stream("POST", "/v1/models/stream:predict", json=value)


def test_a_stream_comes_piece_by_piece(server: Program) -> None:
    with streamed(server, {"tag": "pieces"}) as response:
        pieces = response.iter_text()
        assert next(pieces) == "one "
        assert int(response.headers["x-pid"]) in below(server.process.pid)
        (server.folder / "pieces-go").touch()
        assert "".join(pieces) == "two"


def test_a_stream_that_fails(server: Program) -> None:
    (server.folder / "broken-go").touch()
    with streamed(server, {"tag": "broken", "do": "fail"}) as response:
        pieces = response.iter_text()
        assert next(pieces) == "one "
        with pytest.raises(httpx.RemoteProtocolError):
            next(pieces)
    wait_for(lambda: in_flight(server, "stream") == 0)


def test_a_client_that_leaves_a_stream(server: Program) -> None:
    with streamed(server, {"tag": "left"}) as response:
        assert next(response.iter_text()) == "one "
    wait_for((server.folder / "left-closed").exists)
    wait_for(lambda: in_flight(server, "stream") == 0)


def test_streams_of_other_protocols(server: Program) -> None:
    (server.folder / "generated-go").touch()
    response = server.post(
        "/v2/models/stream/generate_stream", {"text_input": "generated"}
    )
    assert re.findall(r'"text_output":"(.*?)"', response.text) == ["one ", "two"]

    with Grpc(server.address) as client:
        answers = client.stream("stream", np.arange(3, dtype=np.float32))
    numbers = [answer.outputs[0].array.tolist() for answer in answers]
    assert numbers == [[0], [1], [2]]


def test_an_iterator(server: Program) -> None:
    response = server.predict("many", {"do": "iterator"})
    assert response.text == "one two"


def test_a_replica_dies_amid_a_request(server: Program) -> None:
    before = pids(server, "many")
    response = server.predict("many", {"do": "die", "tag": "once"})
    assert response.status_code == 500
    assert "may have run" in response.json()["error"]
    victim = int((server.folder / "once-ran").read_text())  # one line: run once
    assert victim in before
    # Ray puts another in its place, and nobody else notices.
    wait_for(lambda: len(now := pids(server, "many")) == 2 and victim not in now)


def test_an_idempotent_request_is_brought_to_another(server: Program) -> None:
    response = server.predict("sturdy", {"do": "die once", "tag": "twice"})
    assert response.status_code == 200, response.text
    ran = (server.folder / "twice-ran").read_text().split()
    assert len(ran) == 2
    assert response.json()["pid"] == int(ran[1]) != int(ran[0])


def test_requests_that_a_dead_replica_has_not_taken(server: Program) -> None:
    victim = tell(server)["pid"]
    os.kill(victim, signal.SIGKILL)
    assert victim not in {tell(server)["pid"] for _ in range(8)}


def test_readiness_follows_the_replicas(server: Program) -> None:
    def is_ready() -> bool:
        return server.http.get("/v2/models/stream/ready").status_code == 200

    def pid() -> int:
        (server.folder / "now-go").touch()
        with streamed(server, {"tag": "now"}) as response:
            response.read()
            return int(response.headers["x-pid"])

    wait_for(is_ready)
    victim = pid()
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: not is_ready(), "not ready")
    assert server.predict("stream", {}).status_code == 503
    wait_for(is_ready, "ready again")
    assert pid() != victim


def test_unload_load_and_load_again(server: Program) -> None:
    before = pids(server, "many")
    path = "/v2/repository/models/many"
    assert server.post(f"{path}/unload", {}).status_code == 200
    assert server.predict("many", {"do": "tell"}).status_code == 404
    wait_for(lambda: not alive(before), "an end of the replicas")
    assert (server.folder / "unloaded").exists()
    assert server.post(f"{path}/load", {}).status_code == 200
    loaded = pids(server, "many")
    assert not loaded & before
    # Once more, while it serves: nothing is lost meanwhile.
    statuses = set()
    with together(lambda: server.post(f"{path}/load", {}).status_code) as codes:
        while codes[0] is None:
            statuses.add(server.predict("many", {"do": "tell"}).status_code)
    assert codes == [200]
    assert statuses == {200}
    assert not pids(server, "many") & loaded


def test_stop(server: Program) -> None:
    """The last one: what is in flight is answered, and nothing is left."""
    children = below(server.process.pid)
    replicas = pids(server, "many")
    with together(
        lambda: server.predict("many", {"do": "wait", "tag": "end"})
    ) as answers:
        wait_for((server.folder / "end-began").exists)
        server.process.terminate()
        wait_for(lambda: "SIGTERM: stopping" in server.log)
        (server.folder / "end-go").touch()
    assert answers[0].json() == {"answered": True}
    assert server.wait() == 0
    unloaded = (server.folder / "unloaded").read_text().split()
    assert replicas <= set(map(int, unloaded)) & children
    wait_for(lambda: not alive(children), "an end of Ray's processes")
    # Of what Ray does by itself it tells warnings only.
    told = [line for line in server.log.splitlines() if "INFO" in line]
    assert told
    assert not [line for line in told if "kserve_lite" not in line]
    assert "never awaited" not in server.log
    assert "infinite retries" not in server.log
