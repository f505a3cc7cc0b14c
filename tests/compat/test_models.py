"""KServe's models behind the real server: what methods get, where they run, and what
becomes of what they return.
"""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from starlette.exceptions import HTTPException

from kserve_lite.compat import (
    InferOutput,
    InferResponse,
    Model,
    PredictorConfig,
)
from kserve_lite.compat.errors import InvalidInput
from kserve_lite.compat.model import (
    BaseKServeModel,
    InferenceModel,
    InferenceVerb,
    get_latency_ms,
    is_v2,
)
from kserve_lite.compat.predictor_config import (
    get_predictor_config,
    set_predictor_config,
)
from kserve_lite.compat.protocol.grpc.grpc_predict_v2_pb2 import (
    ModelInferRequest,
    ModelInferResponse,
    ModelStreamInferResponse,
)
from tests.compat.support import CompatThread
from tests.support import ServerThread

ROWS = {"instances": [[1, 2], [3, 4]]}


class Ready(Model):
    def __init__(self, name: str, **more: Any) -> None:
        super().__init__(name, **more)
        self.ready = True


class Where(Ready):
    """Tells in which thread each method ran."""

    def preprocess(self, payload: Any, headers: Any = None) -> Any:
        return {"preprocess": threading.current_thread().name}

    def validate(self, payload: Any) -> Any:
        return payload | {"validate": threading.current_thread().name}

    async def predict(
        self, payload: Any, headers: Any = None, response_headers: Any = None
    ) -> Any:
        return payload | {"predict": threading.current_thread().name}

    def postprocess(
        self, result: Any, headers: Any = None, response_headers: Any = None
    ) -> Any:
        return result | {"postprocess": threading.current_thread().name}


class Remembers(Ready):
    """Keeps a request on itself; `most` is how many were amid its methods."""

    most = within = 0

    def preprocess(self, payload: Any, headers: Any = None) -> Any:
        self.within += 1
        self.most = max(self.most, self.within)
        self.seen = payload["n"]
        return payload

    def predict(
        self, payload: Any, headers: Any = None, response_headers: Any = None
    ) -> Any:
        return {"saw": self.seen}

    def postprocess(
        self, result: Any, headers: Any = None, response_headers: Any = None
    ) -> Any:
        self.within -= 1
        return result


class Plain(Ready):
    async def predict(
        self, payload: Any, headers: Any = None, response_headers: Any = None
    ) -> Any:
        return {"predictions": payload["instances"]}


class Wraps(Plain):
    """Takes what is no list, and makes a list of it."""

    def preprocess(self, payload: Any, headers: Any = None) -> Any:
        return {"instances": [payload["instances"]]}


class Said(Ready):
    """Returns what the request's `kind` asks for."""

    async def predict(
        self, payload: Any, headers: Any = None, response_headers: Any = None
    ) -> Any:
        outputs = [InferOutput("o", [2], "FP32", [0.5, 1.5])]
        strange = ModelInferResponse()
        strange.outputs.add(name="o", datatype="FP31", shape=[1])
        kinds: dict[str, Any] = {
            "copies": [pickle.loads(pickle.dumps(headers)), copy.deepcopy(headers)],
            "strange": strange,
            "array": np.arange(3),
            "tuple": (np.arange(2), 1),
            "scalar": np.float32(1.5),
            "response": InferResponse("r1", "said", outputs),
            "message": InferResponse("r1", "said", outputs).to_grpc(),
        }
        return kinds[payload["kind"]]


class Chunks(Ready):
    async def predict(  # type: ignore[override]
        self, payload: Any, headers: Any = None, response_headers: Any = None
    ) -> AsyncIterator[Any]:
        for word in payload["instances"]:
            yield f"{word} "


class PlainChunks(Ready):
    def predict(  # type: ignore[override]
        self, payload: Any, headers: Any = None, response_headers: Any = None
    ) -> Iterator[Any]:
        yield from payload["instances"]


class Late(Ready):
    """Its plain methods return what has to be awaited."""

    def preprocess(self, payload: Any, headers: Any = None) -> Any:
        return self._later(payload["instances"])

    def predict(
        self, payload: Any, headers: Any = None, response_headers: Any = None
    ) -> Any:
        return self._later({"predictions": payload})

    async def _later(self, value: Any) -> Any:
        await asyncio.sleep(0)
        return value


class Shared(Ready):
    """Its methods share the request's headers and those of the answer."""

    def __init__(self, name: str) -> None:
        super().__init__(name, return_response_headers=True)

    async def preprocess(self, payload: Any, headers: Any = None) -> Any:
        headers["x-mine"] = "set in preprocess"
        return payload

    def predict(
        self, payload: Any, headers: Any = None, response_headers: Any = None
    ) -> Any:
        response_headers["x-seen"] = headers["x-mine"]
        return {"type": type(headers).__name__, "is_dict": isinstance(headers, dict)}

    async def postprocess(
        self, result: Any, headers: Any = None, response_headers: Any = None
    ) -> Any:
        response_headers["x-both"] = response_headers["x-seen"].upper()
        return result


class Sent(Ready):
    """Tells what it sees of its inputs."""

    async def predict(
        self, payload: Any, headers: Any = None, response_headers: Any = None
    ) -> Any:
        seen = [
            {
                "data": entry.data,
                "dtype": str(entry.as_numpy().dtype),
                "types": sorted({type(v).__name__ for v in entry.as_numpy().flat}),
            }
            for entry in payload.inputs
        ]
        told = json.dumps([seen, payload.id, payload.use_binary_outputs], default=str)
        return InferResponse("x", self.name, [InferOutput("o", [1], "BYTES", [told])])


class OverGrpc(Ready):
    """Answers in the way that the request's parameter asks for."""

    def predict(
        self, payload: Any, headers: Any = None, response_headers: Any = None
    ) -> Any:
        assert payload.from_grpc
        way = payload.parameters["way"].string_param
        doubled = payload.inputs[0].as_numpy() * 2
        if way == "dict":
            output = {"name": "o", "datatype": "FP32", "shape": list(doubled.shape)}
            contents = {"fp32_contents": doubled.flatten().tolist()}
            outputs = [output | {"contents": contents}]
            return {"id": "d", "model_name": self.name, "outputs": outputs}
        made = InferOutput("o", list(doubled.shape), "FP32", doubled)
        response = InferResponse("d", self.name, [made])
        return response.to_grpc() if way == "message" else response


class Typed(Ready):
    """Its metadata is not what it takes and gives, which KServe never minded."""

    async def get_input_types(self) -> Any:
        return [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]

    def get_output_types(self) -> Any:
        return [{"name": "y", "datatype": "fp32", "shape": [1]}]

    async def predict(
        self, payload: Any, headers: Any = None, response_headers: Any = None
    ) -> Any:
        outputs = [InferOutput("other", [1], "INT32", [7])]
        return InferResponse("x", self.name, outputs)


class Untyped(Typed):
    def get_output_types(self) -> Any:
        return [{"name": "y", "datatype": "STRING", "shape": [1]}]


class Called(InferenceModel):
    """A model that is nothing but a call."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.ready = True

    async def __call__(
        self,
        body: Any,
        headers: dict[str, str] | None = None,
        verb: InferenceVerb = InferenceVerb.PREDICT,
    ) -> Any:
        return {"verb": verb.name, "body": body}, {"x-called": "yes"}


class NoInference(BaseKServeModel):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.ready = True


class Unhealthy(Ready):
    def healthy(self) -> Any:
        return False


class Strict(Ready):
    def validate(self, payload: Any) -> Any:
        raise InvalidInput("not like this")


class FastApi(Ready):
    """Raises what the application of KServe's server would answer with."""

    async def predict(
        self, payload: Any, headers: Any = None, response_headers: Any = None
    ) -> Any:
        raise HTTPException(payload["status"], "said to the client")


class PlainFastApi(FastApi):
    def predict(
        self, payload: Any, headers: Any = None, response_headers: Any = None
    ) -> Any:
        if payload.get("late"):
            return super().predict(payload, headers)
        raise HTTPException(payload["status"], "said to the client")


class Tensors(Ready):
    """Streams an answer for each element of its input."""

    async def predict(  # type: ignore[override]
        self, payload: Any, headers: Any = None, response_headers: Any = None
    ) -> AsyncIterator[Any]:
        for value in payload.inputs[0].as_numpy():
            output = InferOutput("o", [1], "FP32", [float(value)])
            yield InferResponse(None, self.name, [output])


class Gated(Ready):
    """Its calls wait until two run at the same time; `most` is how many did."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.lock = threading.Lock()
        self.running = self.most = 0
        self.both = threading.Barrier(2)

    def predict(
        self, payload: Any, headers: Any = None, response_headers: Any = None
    ) -> Any:
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        self.both.wait(20)
        with self.lock:
            self.running -= 1
        return {}


gated = Gated("gated")


@pytest.fixture(scope="module")
def server() -> Iterator[CompatThread]:
    models = (
        Where("where"),
        Said("said"),
        Chunks("chunks"),
        PlainChunks("plain_chunks"),
        Late("late"),
        Shared("shared"),
        Sent("sent"),
        OverGrpc("grpc"),
        Typed("typed"),
        Untyped("untyped"),
        Called("called"),
        NoInference("none"),
        Unhealthy("unhealthy"),
        Strict("strict"),
        FastApi("fastapi"),
        PlainFastApi("plain_fastapi"),
        Tensors("tensors"),
        gated,
    )
    with CompatThread(*models, max_asyncio_workers=2) as server:
        yield server


def ask(server: ServerThread, name: str, payload: Any, verb: str = "predict") -> Any:
    url = f"{server.url}/v1/models/{name}:{verb}"
    return httpx.post(url, json=payload, timeout=30, verify=False)


def infer(server: ServerThread, name: str, *inputs: Any, **more: Any) -> Any:
    url = f"{server.url}/v2/models/{name}/infer"
    return httpx.post(url, json={"inputs": inputs, **more}, timeout=30, verify=False)


def test_plain_methods_run_in_threads_and_async_ones_on_the_loop(
    server: CompatThread,
) -> None:
    ran = ask(server, "where", {}).json()
    assert list(ran) == ["preprocess", "validate", "predict", "postprocess"]
    assert ran.pop("predict") == "test-server"
    assert all(name.startswith("kserve-lite") for name in ran.values())


def test_a_switch_keeps_plain_methods_on_the_loop() -> None:
    with CompatThread(Where("where"), on_loop=True) as server:
        ran = ask(server, "where", {}).json()
    assert set(ran.values()) == {"test-server"}


def test_on_the_loop_one_request_goes_through_all_plain_methods_alone() -> None:
    """So that a model may keep on itself what the next method reads."""
    remembers = Remembers("remembers")
    numbers = range(24)
    with CompatThread(remembers, on_loop=True) as server, ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda n: ask(server, "remembers", {"n": n}).json(), numbers)
        assert [answer["saw"] for answer in answers] == list(numbers)
    assert remembers.most == 1


def test_threads_are_as_many_as_the_setting_says(server: CompatThread) -> None:
    asked = [threading.Thread(target=ask, args=(server, "gated", {})) for _ in range(6)]
    for thread in asked:
        thread.start()
    for thread in asked:
        thread.join(30)
    assert gated.most == 2


def test_what_a_plain_method_leaves_to_be_awaited_is_awaited(
    server: CompatThread,
) -> None:
    assert ask(server, "late", ROWS).json() == {"predictions": ROWS["instances"]}


def test_generators_of_either_kind_stream(server: CompatThread) -> None:
    words = {"instances": ["a", "b"]}
    assert ask(server, "chunks", words).text == "a b "
    answer = ask(server, "plain_chunks", words)
    assert answer.text == "ab"
    assert answer.headers["transfer-encoding"] == "chunked"


def test_streams_go_through_generate_and_grpc_too(server: CompatThread) -> None:
    answer = httpx.post(
        f"{server.url}/v2/models/chunks/generate_stream",
        json={"instances": ["a", "b"]},
        verify=False,
    )
    events = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line]
    assert [event["text_output"] for event in events] == ["a ", "b "]
    request = ModelInferRequest(model_name="tensors", id="7")
    tensor = request.inputs.add(name="x", datatype="FP32", shape=[3])
    tensor.contents.fp32_contents.extend([1, 2, 3])
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stream = channel.stream_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=ModelStreamInferResponse.FromString,
        )
        answers = [a.infer_response for a in stream(iter([request]), timeout=20)]
    values = [answer.outputs[0].contents.fp32_contents[0] for answer in answers]
    assert values == [1, 2, 3]
    assert {answer.id for answer in answers} == {"7"}


@pytest.mark.parametrize(
    ("status", "becomes"), [(404, 404), (418, 400), (503, 503), (500, 500), (599, 500)]
)
@pytest.mark.parametrize("model", ["fastapi", "plain_fastapi"])
@pytest.mark.parametrize("late", [False, True])
def test_an_http_exception_is_the_answer(
    server: CompatThread, model: str, late: bool, status: int, becomes: int
) -> None:
    answer = ask(server, model, {"status": status, "late": late})
    assert answer.status_code == becomes
    assert answer.json() == {"error": "said to the client"}


def test_methods_share_headers_and_set_those_of_the_answer(
    server: CompatThread,
) -> None:
    answer = ask(server, "shared", {})
    assert answer.json()["is_dict"]
    assert answer.headers["x-both"] == "SET IN PREPROCESS"


def test_headers_can_be_copied_and_sent_to_other_processes(
    server: CompatThread,
) -> None:
    for headers in ask(server, "said", {"kind": "copies"}).json():
        assert headers["content-type"] == "application/json"


def test_a_message_that_cannot_be_is_the_models_failure(server: CompatThread) -> None:
    answer = ask(server, "said", {"kind": "strange"})
    assert answer.status_code == 500
    assert "FP" not in answer.text


@pytest.mark.parametrize(
    ("kind", "value"),
    [("array", [0, 1, 2]), ("tuple", [[0, 1], 1]), ("scalar", 1.5)],
)
def test_on_v1_arrays_are_plain_json(
    server: CompatThread, kind: str, value: Any
) -> None:
    answer = ask(server, "said", {"kind": kind})
    assert answer.json() == value
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize("kind", ["response", "message"])
def test_on_v1_a_v2_answer_stays_one(server: CompatThread, kind: str) -> None:
    output = {"name": "o", "shape": [2], "datatype": "FP32", "data": [0.5, 1.5]}
    answer = ask(server, "said", {"kind": kind})
    assert answer.json() == {"id": "r1", "model_name": "said", "outputs": [output]}
    assert answer.headers["content-type"] == "application/json"


def test_data_are_as_sent_and_text_is_text(server: CompatThread) -> None:
    nested = {"name": "a", "shape": [2, 2], "datatype": "FP32"}
    text = {"name": "b", "shape": [2], "datatype": "BYTES", "data": ["x", "é"]}
    answer = infer(server, "sent", nested | {"data": [[1, 2], [3.5, 4]]}, text, id="7")
    (seen, other), request_id, binary = json.loads(
        answer.json()["outputs"][0]["data"][0]
    )
    assert repr(seen["data"]) == "[[1, 2], [3.5, 4]]"
    assert seen["dtype"] == "float32"
    assert other["data"] == ["x", "é"]
    assert other["types"] == ["str"]
    assert (request_id, binary) == ("7", False)


def call(server: ServerThread, request: Any, metadata: Any = ()) -> Any:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        method = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=ModelInferResponse.FromString,
        )
        return method(request, metadata=metadata, timeout=20)


@pytest.mark.parametrize("way", ["dict", "message", "response"])
@pytest.mark.parametrize("raw", [False, True])
def test_over_grpc_every_way_to_answer_works(
    server: CompatThread, way: str, raw: bool
) -> None:
    request = ModelInferRequest(model_name="grpc", id="7")
    request.parameters["way"].string_param = way
    tensor = request.inputs.add(name="x", datatype="FP32", shape=[1, 2])
    if raw:
        request.raw_input_contents.append(np.array([1, 2], np.float32).tobytes())
    else:
        tensor.contents.fp32_contents.extend([1, 2])
    answer = call(server, request)
    assert (answer.id, answer.model_name) == ("d", "grpc")
    assert list(answer.outputs[0].shape) == [1, 2]
    if raw:  # as the request's tensors came
        values = np.frombuffer(answer.raw_output_contents[0], np.float32).tolist()
    else:
        values = list(answer.outputs[0].contents.fp32_contents)
    assert values == [2, 4]


def test_types_are_shown_and_not_enforced(server: CompatThread) -> None:
    shown = httpx.get(f"{server.url}/v2/models/typed", verify=False).json()
    assert shown["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    assert shown["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [1]}]
    sent = {"name": "q", "shape": [1], "datatype": "INT8", "data": [1]}
    assert infer(server, "typed", sent).json()["outputs"][0]["data"] == [7]
    assert (
        httpx.get(f"{server.url}/v2/models/untyped", verify=False).json()["outputs"]
        == []
    )


def test_a_model_that_is_one_call(server: CompatThread) -> None:
    for verb in ("predict", "explain"):
        answer = ask(server, "called", {"a": 1}, verb)
        assert answer.json() == {"verb": verb.upper(), "body": {"a": 1}}
        assert answer.headers["x-called"] == "yes"


def test_instances_need_be_a_list_only_after_preprocess() -> None:
    before = get_predictor_config()
    set_predictor_config(PredictorConfig(None))  # as every ModelServer does
    try:
        with CompatThread(Wraps("wraps"), Plain("plain")) as server:
            answer = ask(server, "wraps", {"instances": {"a": 1}})
            assert answer.json() == {"predictions": [{"a": 1}]}
            event = {"ce-specversion": "1.0", "ce-id": "1", "ce-source": "s"}
            answer = httpx.post(
                f"{server.url}/v1/models/wraps:predict",
                json={"instances": "text"},
                headers=event | {"ce-type": "t"},
                verify=False,
            )
            assert answer.json() == {"predictions": ["text"]}
            answer = ask(server, "plain", {"instances": {"a": 1}})
            assert answer.status_code == 400
            assert answer.json() == {"error": 'Expected "instances" to be a list'}
    finally:
        set_predictor_config(before)


def test_refusals(server: CompatThread) -> None:
    assert ask(server, "none", {}).status_code == 501
    assert ask(server, "unhealthy", {}).status_code == 503
    strict = ask(server, "strict", {})
    assert (strict.status_code, strict.json()) == (400, {"error": "not like this"})


def test_a_model_is_called_by_its_program() -> None:
    asyncio.run(calls_by_hand())


async def calls_by_hand() -> None:
    model = Where("direct")
    value, headers = await model({}, {"x-request-id": "1"})
    assert list(value) == ["preprocess", "validate", "predict", "postprocess"]
    assert headers == {}
    shared = Shared("direct")
    assert (await shared({}, {}))[1]["x-both"] == "SET IN PREPROCESS"
    with pytest.raises(NotImplementedError, match="Could not find explainer_host"):
        await model({}, verb=InferenceVerb.EXPLAIN)
    assert get_latency_ms(1, 1.5) == 500
    assert model.get_input_types() == []


def test_v2_is_what_is_not_v1() -> None:
    from kserve_lite.compat.constants.constants import PredictorProtocol

    assert [is_v2(protocol) for protocol in PredictorProtocol] == [False, True, True]
