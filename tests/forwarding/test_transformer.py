"""A server that forwards, with a predictor of ours behind it, over every protocol."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import anyio
import httpx
import numpy as np
import pytest

from kserve_lite import Context, InferRequest, InferResponse, Model, Tensor
from kserve_lite.errors import InferenceFault, Kind, ModelDefinitionError, StartupError
from kserve_lite.forwarding import ForwardingSettings, Upstream
from kserve_lite.testing import AsyncClient, Client
from tests.certificates import Authority
from tests.forwarding.conftest import Predictor
from tests.forwarding.recorder import Recorder, Reply, recorder
from tests.server.fleet import Fleet
from tests.support import ServerThread

PROTOCOLS = ("v1", "v2", "grpc-v2")
PREDICT = "/v1/models/{}:predict"
STATUSES = {
    "invalid": (400, "the row is too short"),
    "unknown": (404, "Model with name inner does not exist."),
    "forbidden": (403, "not yours"),
    "overloaded": (503, "The predictor"),
    "unsupported": (501, "The predictor does not do this."),
    "failed": (500, "The predictor failed to answer."),
}


def transformer(
    predictor: str, protocol: str, *names: str, **more: Any
) -> ServerThread:
    return ServerThread(
        *map(Model, names),
        predictor_host=predictor,
        predictor_protocol=protocol,
        **more,
    )


@pytest.fixture(scope="module")
def through(predictor: Predictor) -> Iterator[dict[str, ServerThread]]:
    names = ("double", "faulty", "slow", "nobody")
    with ExitStack() as stack:
        yield {
            protocol: stack.enter_context(transformer(predictor.host, protocol, *names))
            for protocol in PROTOCOLS
        }


def post(
    server: ServerThread, model: str, value: Any, **headers: str
) -> httpx.Response:
    names = {name.replace("_", "-"): text for name, text in headers.items()}
    url = server.url + PREDICT.format(model)
    return httpx.post(url, json={"instances": [value]}, headers=names, timeout=30)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("what", STATUSES)
def test_the_predictors_status_is_kept(
    through: dict[str, ServerThread],
    predictor: Predictor,
    protocol: str,
    what: str,
) -> None:
    status, text = STATUSES[what]
    body = {
        "inputs": [{"name": "x", "datatype": "BYTES", "shape": [1], "data": [what]}]
    }
    server = through[protocol]
    v2 = httpx.post(f"{server.url}/v2/models/faulty/infer", json=body)
    for answer in (post(server, "faulty", what), v2):
        assert answer.status_code == status, answer.text
        assert answer.json()["error"].startswith(text)
        assert "secret" not in answer.text
        assert predictor.host not in answer.text
        assert "127.0.0.1" not in str(answer.headers)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_model_that_the_predictor_does_not_have(
    through: dict[str, ServerThread], protocol: str
) -> None:
    answer = post(through[protocol], "nobody", [1])
    assert answer.status_code == 404
    assert answer.json() == {"error": "Model with name nobody does not exist."}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_headers_and_deadlines_go_along(
    through: dict[str, ServerThread], predictor: Predictor, protocol: str
) -> None:
    answer = post(
        through[protocol],
        "double",
        [1, 2],
        x_request_id="the-id",
        authorization="Bearer t",
        cookie="c=1",
        x_request_timeout_ms="20000",
    )
    assert answer.status_code == 200
    seen = predictor.seen
    assert seen.headers["x-request-id"] == answer.headers["x-request-id"] == "the-id"
    ours, theirs = answer.headers["traceparent"], seen.headers["traceparent"]
    assert ours[:35] == theirs[:35]
    assert seen.headers["authorization"] == "Bearer t"
    assert "cookie" not in seen.headers
    assert seen.remaining is not None
    assert 0 < seen.remaining <= 20


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_deadline_ends_both(
    through: dict[str, ServerThread], predictor: Predictor, protocol: str
) -> None:
    seen = predictor.seen
    seen.began.clear()
    seen.cancelled.clear()
    answer = post(through[protocol], "slow", 1, x_request_timeout_ms="300")
    assert answer.status_code == 504
    # On a slow machine the time may be over before the predictor is asked.
    assert not seen.began.is_set() or seen.cancelled.wait(10)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_cancelled_it_lets_go_of_the_predictor(
    predictor: Predictor, protocol: str
) -> None:
    seen = predictor.seen
    seen.began.clear()
    seen.cancelled.clear()
    request = InferRequest("slow", (Tensor("x", np.ones(1), "FP64"),))

    async def ask() -> None:
        settings = ForwardingSettings(
            predictor_host=predictor.host, predictor_protocol=protocol
        )
        upstream = Upstream(settings, predictor.host)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(upstream.infer, request, Context("slow", protocol="v2"))
            assert await anyio.to_thread.run_sync(seen.began.wait, 10)
            tasks.cancel_scope.cancel()
        assert await anyio.to_thread.run_sync(seen.cancelled.wait, 10)
        # What others ask for goes on as before.
        double = InferRequest("double", (Tensor("x", np.ones((1, 1)), "FP64"),))
        answer = await upstream.infer(double, Context("double", protocol="v2"))
        assert isinstance(answer, InferResponse)
        await upstream.close()

    anyio.run(ask)


class Between:
    """A way to a server that ends connections as soon as they are used, if told so."""

    def __init__(self, host: str) -> None:
        self._host, _, port = host.rpartition(":")
        self._port = int(port)
        self.drops = 0  # how often more
        self.connections = 0

    async def carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.connections += 1
        there, back = await asyncio.open_connection(self._host, self._port)
        answers = asyncio.ensure_future(self._copy(there, writer))
        while data := await reader.read(1 << 16):
            if self.drops:
                self.drops -= 1
                break
            back.write(data)
        back.close()
        writer.close()
        await answers

    async def _copy(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_connection_that_ends_as_it_is_used(
    predictor: Predictor, protocol: str
) -> None:
    async def ask() -> None:
        between = Between(predictor.host)
        server = await asyncio.start_server(between.carry, "127.0.0.1", 0)
        host = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        settings = ForwardingSettings(predictor_host=host, predictor_protocol=protocol)
        upstream = Upstream(settings, host)
        request = InferRequest("double", (Tensor("x", np.ones((1, 1)), "FP64"),))

        async def infer() -> Any:
            return await upstream.infer(request, Context("double", protocol="v2"))

        await infer()
        assert between.connections == 1
        between.drops = 1
        answer = await infer()
        assert answer.outputs[0].array.tolist() == [[2.0]]
        assert (between.connections, between.drops) == (2, 0)
        # A new one that ends so is no accident.
        await infer()
        before, between.drops = between.connections, 99
        with pytest.raises(InferenceFault) as caught:
            await infer()
        assert caught.value.kind is Kind.MODEL_FAILED
        assert between.connections == before + 1
        await upstream.close()
        server.close()
        await server.wait_closed()
        # Its tasks have come to their end, or would be destroyed while pending.
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.wait_for(asyncio.gather(*others), 10)

    anyio.run(ask)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_answer_is_bounded(predictor: Predictor, protocol: str) -> None:
    async def ask() -> None:
        settings = ForwardingSettings(
            predictor_host=predictor.host, predictor_protocol=protocol
        )
        upstream = Upstream(settings, predictor.host, max_size=10_000)
        request = InferRequest("large", (Tensor("x", np.ones(1), "FP64"),))
        with pytest.raises(InferenceFault) as caught:
            await upstream.infer(request, Context("large", protocol="v2"))
        assert caught.value.kind is Kind.MODEL_FAILED
        double = InferRequest("double", (Tensor("x", np.ones((1, 1)), "FP64"),))
        await upstream.infer(double, Context("double", protocol="v2"))
        await upstream.close()

    anyio.run(ask)


@pytest.mark.parametrize("protocol", ["v1", "grpc-v2"])
def test_a_predictor_that_was_started_again(protocol: str) -> None:
    def inner() -> Model:
        model = Model("m")
        model.predict(lambda payload: {"predictions": ["done"]})
        return model

    def tensors() -> Model:
        model = Model("m")

        @model.predict
        async def predict(payload: InferRequest) -> InferResponse:
            return InferResponse(payload.inputs)

        return model

    make = inner if protocol == "v1" else tensors
    with ExitStack() as first, ExitStack() as second:
        port = first.enter_context(ServerThread(make())).port
        with transformer(f"127.0.0.1:{port}", protocol, "m") as server:
            assert post(server, "m", 1).status_code == 200
            first.close()
            gone = post(server, "m", 1)
            assert gone.status_code == 503
            assert gone.json() == {"error": "The predictor cannot be reached."}
            second.enter_context(ServerThread(make(), http_port=port))
            assert post(server, "m", 1).status_code == 200


@pytest.mark.parametrize(
    ("protocol", "own"),
    [*((each, "none") for each in PROTOCOLS), ("v1", "def"), ("v1", "async")],
)
def test_ready_only_while_the_predictor_is(
    protocol: str, own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    says = {"predictor": True, "own": True}
    asked: list[str] = []
    inner, outer = Model("m"), Model("m")

    @inner.ready
    async def inner_ready() -> bool:
        asked.append("predictor")
        return says["predictor"]

    @inner.predict
    async def predict(payload: InferRequest) -> InferResponse:
        return InferResponse(payload.inputs)

    if own == "def":

        @outer.ready
        def checked(state: object) -> bool:
            return says["own"]

    elif own == "async":

        @outer.ready
        async def awaited() -> bool:
            return says["own"]

    monkeypatch.setattr("kserve_lite.forwarding.health.COUNTS_FOR", 0.0)
    with ServerThread(inner) as there:
        here = ServerThread(
            outer,
            predictor_host=f"127.0.0.1:{there.port}",
            predictor_protocol=protocol,
            enable_predictor_health_check=True,
        )

        def statuses() -> set[int]:
            paths = ("/v2/health/ready", "/v1/models/m", "/v2/models/m/ready")
            return {httpx.get(here.url + path).status_code for path in paths}

        with here:
            assert statuses() == {200}
            says["predictor"] = False
            assert statuses() == {503}
            says["predictor"] = True
            if own == "none":
                # Its requests do not wait for the check: the predictor makes it anyway.
                asked.clear()
                assert post(here, "m", 1).status_code == 200
                assert len(asked) == 1
            else:
                says["own"] = False
                assert statuses() == {503}


def test_health_checks_that_come_together_ask_once(recorded: Recorder) -> None:
    recorded.in_turn(Reply(body=b'{"name":"m","ready":"False"}'))

    async def ask() -> None:
        settings = ForwardingSettings(predictor_host=recorded.host)
        upstream = Upstream(settings, recorded.host)
        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(upstream.ready, "m")
        assert not await upstream.ready("m")
        await upstream.close()

    anyio.run(ask)
    assert [asked.path for asked in recorded.asked] == ["/v1/models/m"]


def test_health_checks_of_several_models_do_not_wait(recorded: Recorder) -> None:
    both = threading.Barrier(2)

    def answer(_: Any) -> Reply:
        both.wait(10)
        return Reply(body=b"{}")

    recorded.answer = answer
    told: list[bool] = []

    async def ask() -> None:
        settings = ForwardingSettings(predictor_host=recorded.host)
        upstream = Upstream(settings, recorded.host)

        async def check(name: str) -> None:
            told.append(await upstream.ready(name))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(check, "a")
            tasks.start_soon(check, "b")
        await upstream.close()

    anyio.run(ask)
    assert told == [True, True]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tls(protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority(tmp_path)
    inner = Model("m")

    @inner.predict
    async def predict(payload: InferRequest) -> InferResponse:
        return InferResponse(payload.inputs)

    with ServerThread(inner, **authority.settings) as there:
        host = f"localhost:{there.port}"
        trusting = {"predictor_ca_certs": str(authority.ca)}
        with transformer(host, protocol, "m", predictor_use_ssl=True, **trusting) as s:
            assert post(s, "m", 1).status_code == 200
        with transformer(host, protocol, "m", predictor_use_ssl=True) as s:
            refused = post(s, "m", 1)
        assert refused.status_code == 503
        assert refused.json() == {"error": "The predictor cannot be reached."}
        # What OpenSSL goes by itself.
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca))
        with transformer(host, protocol, "m", predictor_use_ssl=True) as s:
            assert post(s, "m", 1).status_code == 200


def test_authorities_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "no.pem").write_text("no certificate")
    for name, words in (("none.pem", "No such file"), ("no.pem", "no certificate")):
        settings = ForwardingSettings(
            predictor_host="h",
            predictor_use_ssl=True,
            predictor_ca_certs=str(tmp_path / name),
        )
        with pytest.raises(StartupError, match=words):
            Upstream(settings, "h")


def test_explanations_come_from_the_explainer(recorded: Recorder) -> None:
    recorded.in_turn(Reply(body=b'{"explanations":[[0.5]]}'))
    model = Model("m", predict=lambda payload: {"predictions": []})

    @model.preprocess
    async def preprocess(payload: Any) -> Any:
        return {"instances": [2 * v for v in payload["instances"]]}

    async def ask() -> None:
        async with AsyncClient(model, explainer_host=recorded.host) as client:
            answer = await client.explain({"instances": [1]})
            assert answer == {"explanations": [[0.5]]}

    anyio.run(ask)
    (asked,) = recorded.asked
    assert asked.path == "/v1/models/m:explain"
    assert json.loads(asked.body) == {"instances": [2]}


def test_a_model_without_predict_needs_a_predictor(recorded: Recorder) -> None:
    model = Model("m")
    with pytest.raises(ModelDefinitionError, match="--predictor_host"), Client(model):
        pass
    with Client(model, predictor_host=recorded.host) as client:
        assert client.predict({"instances": [1]}) == {"predictions": [1]}
    # Its next server is to say it again, and may say another.
    with pytest.raises(ModelDefinitionError, match="--predictor_host"), Client(model):
        pass
    other = "localhost:" + recorded.host.rpartition(":")[2]
    checked = {"enable_predictor_health_check": True}
    with Client(model, predictor_host=other, **checked) as client:
        assert client.predict({"instances": [1]}) == {"predictions": [1]}
    assert recorded.asked[-1].headers["host"].startswith("localhost")


def test_a_server_that_is_refused_a_model_leaves_it_alone(recorded: Recorder) -> None:
    model = Model("m")
    with recorder() as other, Client(model, predictor_host=recorded.host) as client:
        with pytest.raises(ModelDefinitionError, match="served already"):
            Client(model, predictor_host=other.host).__enter__()
        assert client.predict({"instances": [1]}) == {"predictions": [1]}
        assert not other.asked
    assert len(recorded.asked) == 1


def test_what_is_missing_is_said_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    with (
        pytest.raises(StartupError, match=r"pip install 'kserve-lite\[client\]'"),
        Client(Model("m"), predictor_host="h"),
    ):
        pass


APP = """
from kserve_lite import Model, run

model = Model("double")

@model.preprocess
async def preprocess(payload):
    import os
    return payload | {"pid": os.getpid()}

if __name__ == "__main__":
    run(model)
"""


def test_every_worker_forwards(tmp_path: Path, predictor: Predictor) -> None:
    (tmp_path / "app.py").write_text(APP)
    flags = ("--predictor_host", predictor.host, "--enable-predictor-health-check")
    with Fleet(tmp_path, *flags) as fleet:
        pids = set()
        # Which worker accepts is chance; 64 at one of the two are not.
        with fleet.kept(64) as connections:
            for connection in connections:
                body = json.dumps({"instances": [[1]]})
                connection.request("POST", PREDICT.format("double"), body)
                with connection.getresponse() as response:
                    answer = json.loads(response.read())
                assert answer["predictions"] == [[2]]
                pids.add(answer["pid"])
        assert len(pids) == 2
        assert fleet.ready()
        assert fleet.stop().status == 0
