"""Compat beside KServe's SDK itself, in one process; run by `test_beside_kserve.py`.

`SAME` are calls that must give the same from both. What is better than KServe's, where
that fails, loses something or changes its own objects, is in `test_infer_type.py` and
`test_utils.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import grpc
import httpx
import kserve
import kserve.protocol.infer_type as theirs
import numpy as np
import pytest
from google.protobuf.message import Message
from kserve import InferenceGRPCClient as TheirGRPCClient
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import (
    add_GRPCInferenceServiceServicer_to_server,
)
from kserve.protocol.grpc.interceptors import ExceptionToStatusInterceptor
from kserve.protocol.grpc.servicer import InferenceServicer
from kserve.protocol.model_repository_extension import ModelRepositoryExtension
from kserve.protocol.rest.server import RESTServer

import kserve_lite.compat.protocol.infer_type as ours
from kserve_lite.compat import Model
from kserve_lite.compat.inference_client import (
    InferenceGRPCClient,
    InferenceRESTClient,
    RESTConfig,
)
from kserve_lite.compat.protocol.grpc.grpc_predict_v2_pb2 import (
    ModelInferRequest,
    ModelInferResponse,
)
from tests.compat.support import CompatThread
from tests.compat.tensors import (
    JSON_TYPES,
    TYPES,
    VALUES,
    array_of,
    binary_request,
    grpc_request,
)


def plain(value: Any) -> Any:
    """A value as it can be compared whatever package it is from."""
    if isinstance(value, np.ndarray):
        return ("array", str(value.dtype), value.shape, value.tolist())
    if isinstance(value, Message):
        if "choice" in str(value.DESCRIPTOR.oneofs_by_name.keys()):
            which = value.WhichOneof("parameter_choice")
            return (which, getattr(value, which) if which else None)
        kind = {"ModelInferRequest": ModelInferRequest}.get(
            value.DESCRIPTOR.name, ModelInferResponse
        )
        return kind.FromString(value.SerializeToString(deterministic=True))
    if hasattr(value, "items"):
        return {name: plain(element) for name, element in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(element) for element in value]
    if hasattr(value, "to_dict"):
        return plain(value.to_dict())
    return value


def seen(tensor: Any) -> Any:
    """All that a tensor shows."""
    return plain(
        [
            tensor.name,
            list(tensor.shape),
            tensor.datatype,
            tensor.data,
            tensor._raw_data,
            tensor.parameters or None,
            tensor.to_dict() | {"parameters": None},
            tensor.as_numpy(),
        ]
    )


def seen_request(request: Any) -> Any:
    return plain(
        [
            request.id,
            request.model_name,
            request.model_version,
            request.from_grpc,
            request.use_binary_outputs,
            request.parameters or None,
            [seen(tensor) for tensor in request.inputs],
            [
                (o.name, o.parameters, o.binary_data)
                for o in request.request_outputs or ()
            ],
        ]
    )


def seen_response(response: Any) -> Any:
    return plain(
        [
            response.id,
            response.model_name,
            response.model_version,
            response.from_grpc,
            response.parameters or None,
            [seen(tensor) for tensor in response.outputs],
        ]
    )


def outcome(case: Callable[[ModuleType], Any], package: ModuleType) -> Any:
    """What a case gives; of an exception the built-in classes that code may catch."""
    try:
        return plain(case(package))
    except Exception as error:
        return [c for c in type(error).__mro__ if c in (ValueError, RuntimeError)][:1]


Case = Callable[[Any], Any]
SAME: dict[str, Case] = {}


def same(name: str) -> Callable[[Case], Case]:
    def add(case: Case) -> Case:
        SAME[name] = case
        return case

    return add


def their_module(k: ModuleType, name: str) -> Any:
    package = k.__name__.rpartition(".")[0]
    return getattr(
        __import__(f"{package}.grpc.grpc_predict_v2_pb2", fromlist="x"), name
    )


for kind in ("InferInput", "InferOutput"):
    for datatype in TYPES:

        @same(f"{kind}-{datatype}-list")
        def _(k: Any, kind: str = kind, datatype: str = datatype) -> Any:
            return seen(getattr(k, kind)("a", [2], datatype.lower(), VALUES[datatype]))

        for binary in (True, False):

            @same(f"{kind}-{datatype}-set-{binary}")
            def _(
                k: Any,
                kind: str = kind,
                datatype: str = datatype,
                binary: bool = binary,
            ) -> Any:
                tensor = getattr(k, kind)("a", [1, 2], datatype, parameters={"p": 1})
                tensor.set_data_from_numpy(
                    array_of(datatype).reshape(1, 2), binary_data=binary
                )
                return seen(tensor), tensor.as_numpy().flags.writeable

    @same(f"{kind}-nested")
    def _(k: Any, kind: str = kind) -> Any:
        tensor = getattr(k, kind)("a", [2, -1], "INT32", [[1, 2], [3, 4]])
        return seen(tensor), repr(tensor), str(tensor)

    @same(f"{kind}-array")
    def _(k: Any, kind: str = kind) -> Any:
        return seen(getattr(k, kind)("a", [2, 2], "FP32", np.eye(2)))

    @same(f"{kind}-setters")
    def _(k: Any, kind: str = kind) -> Any:
        tensor = getattr(k, kind)("a", [2], "INT32", [1, 2])
        tensor.shape, tensor.data, tensor.parameters = [1], [5], {"x": "y"}
        return seen(tensor)

    @same(f"{kind}-equal")
    def _(k: Any, kind: str = kind) -> Any:
        made = getattr(k, kind)
        one = made("a", [2], "INT32", [1, 2], {"p": 1})
        others = [
            made("a", [2], "int32", [1, 2], {"p": 1}),
            made("b", [2], "INT32", [1, 2], {"p": 1}),
            made("a", [1], "INT32", [1, 2], {"p": 1}),
            made("a", [2], "INT64", [1, 2], {"p": 1}),
            made("a", [2], "INT32", [1, 3], {"p": 1}),
            made("a", [2], "INT32", [1, 2]),
            1,
        ]
        return [one == other for other in others]

    @same(f"{kind}-mismatches")
    def _(k: Any, kind: str = kind) -> Any:
        def tried(array: Any, shape: list[int], of: str) -> Any:
            tensor = getattr(k, kind)("a", shape, of)
            return outcome(lambda _: tensor.set_data_from_numpy(array), k)

        return [
            tried([1, 2], [2], "INT64"),
            tried(np.zeros(2), [2], "FP32"),
            tried(np.zeros((2, 1)), [2], "FP64"),
            tried(np.zeros(3), [2], "FP64"),
        ]

    @same(f"{kind}-no-text")
    def _(k: Any, kind: str = kind) -> Any:
        tensor = getattr(k, kind)("a", [1], "BYTES")
        tensor.set_data_from_numpy(np.array([b"\xff"], object), binary_data=False)


@same("dates")
def _(k: Any) -> Any:
    dates = np.array(["2024-02-29", "2025-01-01"], "datetime64[D]")
    tensor = k.InferOutput("a", [2], "BYTES")
    tensor.set_data_from_numpy(dates)
    texts = k.InferOutput("a", [2], "BYTES")
    texts.set_data_from_numpy(dates, binary_data=False)
    return seen(tensor), seen(texts)


@same("unknown-datatype")
def _(k: Any) -> Any:
    return k.InferInput("a", [1], "COMPLEX", [1]).as_numpy()


@same("shape-mismatch")
def _(k: Any) -> Any:
    return k.InferInput("a", [3], "INT32", [1, 2]).as_numpy()


@same("as-string")
def _(k: Any) -> Any:
    return k.InferInput("a", [1, 2], "BYTES", [[b"a", b"b"]]).as_string()


@same("as-string-of-numbers")
def _(k: Any) -> Any:
    return k.InferInput("a", [1], "INT8", [1]).as_string()


@same("requested-output")
def _(k: Any) -> Any:
    one = k.RequestedOutput("o", {"binary_data": True})
    other = k.RequestedOutput("o")
    result = [one.name, one.binary_data, other.binary_data, one == other, repr(one)]
    other.parameters = {"binary_data": True}
    return [*result, one == other, other.parameters, str(other)]


@same("serialize")
def _(k: Any) -> Any:
    array = np.array([["a", b"\xff"], ["", "é"]], object)
    raw = k.serialize_byte_tensor(array)
    back = k.deserialize_bytes_tensor(raw.item())
    return raw, back, k.serialize_byte_tensor(np.array([], object))


@same("serialize-numbers")
def _(k: Any) -> Any:
    return k.serialize_byte_tensor(np.zeros(2))


for datatype in TYPES:

    @same(f"request-bytes-{datatype}")
    def _(k: Any, datatype: str = datatype) -> Any:
        body, size = binary_request(
            datatype,
            parameters={"binary_data_output": True},
            request_outputs=[ours.RequestedOutput("o", {"binary_data": True})],
        )
        return seen_request(k.InferRequest.from_bytes(body, size, "m"))

    @same(f"response-bytes-{datatype}")
    def _(k: Any, datatype: str = datatype) -> Any:
        output = ours.InferOutput("a", [2], datatype)
        output.set_data_from_numpy(array_of(datatype))
        answer = ours.InferResponse("7", "m", [output], use_binary_outputs=True)
        return seen_response(k.InferResponse.from_bytes(*answer.to_rest()))

    for raw in (True, False):
        if datatype == "FP16" and not raw:
            continue

        @same(f"request-grpc-{datatype}-{raw}")
        def _(k: Any, datatype: str = datatype, raw: bool = raw) -> Any:
            kind = their_module(k, "ModelInferRequest")
            request = k.InferRequest.from_grpc(grpc_request(kind, datatype, raw=raw))
            return seen_request(request), request.to_grpc(), repr(request)

        @same(f"response-grpc-{datatype}-{raw}")
        def _(k: Any, datatype: str = datatype, raw: bool = raw) -> Any:
            output = ours.InferOutput("a", [2], datatype, VALUES[datatype])
            answer = ours.InferResponse(
                "7", "m", [output], "2", parameters={"x": 1}, use_binary_outputs=raw
            )
            kind = their_module(k, "ModelInferResponse")
            message = kind.FromString(answer.to_grpc().SerializeToString())
            return seen_response(k.InferResponse.from_grpc(message))

        @same(f"response-to-grpc-{datatype}-{raw}")
        def _(k: Any, datatype: str = datatype, raw: bool = raw) -> Any:
            output = k.InferOutput("a", [2], datatype, list(VALUES[datatype]))
            return k.InferResponse(
                "7", "m", [output], "2", parameters={"x": 1}, use_binary_outputs=raw
            ).to_grpc()


for datatype in JSON_TYPES:

    @same(f"request-rest-{datatype}")
    def _(k: Any, datatype: str = datatype) -> Any:
        data = [v.decode() if isinstance(v, bytes) else v for v in VALUES[datatype]]
        listed = k.InferInput("a", [1, 2], datatype, [data], {"p": 1})
        array = k.InferInput("b", [2], datatype, array_of(datatype))
        outputs = [k.RequestedOutput("o", {"binary_data": True})]
        if datatype == "BYTES":
            listed = k.InferInput("a", [2], datatype, data)
        return k.InferRequest(
            "m",
            [listed, array],
            "7",
            parameters={"x": True},
            request_outputs=outputs,
        ).to_rest()

    @same(f"request-rest-raw-{datatype}")
    def _(k: Any, datatype: str = datatype) -> Any:
        raw = k.InferInput("a", [2], datatype)
        raw.set_data_from_numpy(array_of(datatype))
        body, size = k.InferRequest("m", [raw], "7").to_rest()
        return json.loads(body[:size]), body[size:]

    @same(f"response-rest-{datatype}")
    def _(k: Any, datatype: str = datatype) -> Any:
        nested = k.InferOutput("a", [1, 2], datatype, array_of(datatype).reshape(1, 2))
        listed = k.InferOutput("b", [2], datatype, VALUES[datatype], {"p": 1})
        return k.InferResponse(
            "7", "m", [nested, listed], "2", parameters={"x": 1}
        ).to_rest()

    @same(f"response-rest-requested-{datatype}")
    def _(k: Any, datatype: str = datatype) -> Any:
        one = k.InferOutput("a", [2], datatype, array_of(datatype))
        other = k.InferOutput("b", [2], datatype, VALUES[datatype])
        asked = [
            k.RequestedOutput("b", {"binary_data": True}),
            k.RequestedOutput("a"),
        ]
        body, size = k.InferResponse(
            "7", "m", [one, other], use_binary_outputs=True, requested_outputs=asked
        ).to_rest()
        return json.loads(body[:size]), body[size:]

    @same(f"response-from-rest-{datatype}")
    def _(k: Any, datatype: str = datatype) -> Any:
        output = ours.InferOutput("a", [2], datatype, VALUES[datatype])
        answer, _ = ours.InferResponse(
            "7", "m", [output], "2", parameters={"x": 1}
        ).to_rest()
        return seen_response(k.InferResponse.from_rest(answer))


@same("request-names-and-equality")
def _(k: Any) -> Any:
    def made(**more: Any) -> Any:
        return k.InferRequest("m", [k.InferInput("a", [1], "INT8", [1])], "7", **more)

    request = made(parameters={"x": 1})
    found = request.get_input_by_name("a")
    return [
        found is request.inputs[0],
        request.get_input_by_name("z"),
        request == made(parameters={"x": 1}),
        request == made(),
        request == 1,
        request.to_dict(),
        repr(request),
        str(request),
    ]


@same("response-names-and-equality")
def _(k: Any) -> Any:
    def made(**more: Any) -> Any:
        return k.InferResponse("7", "m", [k.InferOutput("a", [1], "INT8", [1])], **more)

    response = made(model_version="2")
    found = response.get_output_by_name("a")
    return [
        found is response.outputs[0],
        response.get_output_by_name("z"),
        response == made(model_version="2"),
        response == made(),
        response == 1,
        response.to_dict(),
        repr(response),
        str(response),
    ]


@same("dataframe")
def _(k: Any) -> Any:
    request = k.InferRequest(
        "m",
        [
            k.InferInput("a", [3], "INT64", [1, 2, 3]),
            k.InferInput("b", [3], "FP32", [0.5, 1.5, 2.5]),
            k.InferInput("c", [3], "BYTES", [b"x", "y", b"z"]),
        ],
    )
    frame = request.as_dataframe()
    return [list(frame.columns), list(map(str, frame.dtypes)), frame.values.tolist()]


@same("requests-binary-outputs")
def _(k: Any) -> Any:
    return [
        k.InferRequest("m", [], parameters=parameters).use_binary_outputs
        for parameters in (None, {}, {"binary_data_output": True}, {"x": 1})
    ]


@same("unexpected-output")
def _(k: Any) -> Any:
    return k.InferResponse(
        "7", "m", [], requested_outputs=[k.RequestedOutput("zz")]
    ).to_rest()


@same("no-data")
def _(k: Any) -> Any:
    return k.InferRequest("m", [k.InferInput("a", [1], "INT8")]).to_rest()


@same("parameters")
def _(k: Any) -> Any:
    given = {"s": "x", "b": True, "i": -3}
    messages = k.to_grpc_parameters(given)
    return messages, k.to_http_parameters(messages), k.to_http_parameters(given)


@same("content")
def _(k: Any) -> Any:
    kind = their_module(k, "InferTensorContents")
    return [
        k.get_content("INT8", kind(int_contents=[1])),
        k.get_content("UINT16", kind(uint_contents=[1])),
        k.get_content("FP16", kind()),
        k.get_content("BYTES", kind(bytes_contents=[b"x"])),
    ]


# --- utils ----------------------------------------------------------------------------

PAYLOADS: dict[str, Any] = {
    "numbers": {"instances": [[1, 2], [3, 4]]},
    "inputs": {"inputs": [1.5], "instances": [1]},
    "strings": {"instances": ["a", "b"]},
    "empty": {"instances": []},
    "columns": {"instances": [{"a": [1, 2], "b": ["x", "y"]}]},
    "rows": {"instances": [[{"a": 1, "b": 2}, {"a": 3, "b": 4}], [{"a": 5, "b": 6}]]},
}


def framed(value: Any) -> Any:
    """A data frame as it can be compared."""
    if type(value).__name__ != "DataFrame":
        return plain(value)
    kinds = list(map(str, value.dtypes))
    return [list(value.columns), kinds, value.index.tolist(), value.values.tolist()]


def utils_of(k: ModuleType) -> Any:
    return __import__(f"{k.__name__.split('.protocol')[0]}.utils.utils", fromlist="x")


for payload_name, payload in PAYLOADS.items():

    @same(f"predict-input-{payload_name}")
    def _(k: Any, payload: Any = payload, name: str = payload_name) -> Any:
        columns = ["b", "a"] if name in ("columns", "rows") else None
        return [
            framed(utils_of(k).get_predict_input(payload)),
            framed(utils_of(k).get_predict_input(payload, columns=columns)),
        ]


for way in ("numbers", "text", "bytes", "frame", "grpc-frame"):

    @same(f"predict-input-v2-{way}")
    def _(k: Any, way: str = way) -> Any:
        inputs = [k.InferInput("a", [2], "FP32", [1.5, 2])]
        parameters: Any = None
        if way == "text":
            inputs = [k.InferInput("a", [2], "BYTES", ["x", "y"])]
        elif way == "bytes":
            inputs = [k.InferInput("a", [2], "BYTES", [b"x", b"y"])]
        elif way != "numbers":
            parameters = {"content_type": "pd"}
            inputs.append(k.InferInput("b", [2], "INT8", [3, 4]))
        if way.startswith("grpc"):
            parameters = k.to_grpc_parameters(parameters)
        request = k.InferRequest("m", inputs, "7", parameters=parameters)
        return framed(utils_of(k).get_predict_input(request))


@same("predict-response-v1")
def _(k: Any) -> Any:
    pd = pytest.importorskip("pandas")

    frame = pd.DataFrame({"a": [1, 2], "b": ["x", "y"]})
    make = utils_of(k).get_predict_response
    return [make({}, result, "m") for result in (np.eye(2), [1, 2], ["a"], frame)]


for binary in (True, False):

    @same(f"predict-response-v2-{binary}")
    def _(k: Any, binary: bool = binary) -> Any:
        pd = pytest.importorskip("pandas")

        frame = pd.DataFrame({"a": [1.5, 2], "b": ["x", "y"]})
        request = k.InferRequest(
            "m", [], "7", parameters={"binary_data_output": binary}
        )
        make = utils_of(k).get_predict_response
        results = (np.eye(2, dtype=np.float32), [1, 2], ["a", "b"], frame)
        return [seen_response(make(request, result, "m")) for result in results]


@same("utils-small")
def _(k: Any) -> Any:
    utils = utils_of(k)
    package = k.__name__.split(".protocol")[0]
    protocols = __import__(f"{package}.constants.constants", fromlist="x")
    wanted = protocols.PredictorProtocol
    attributes = ("time", "type", "source", "id", "specversion", "data")
    event = dict.fromkeys(attributes, 1)
    return [
        [utils.strtobool(word) for word in ("y", "YES", "on", "1", "f", "No", "off")],
        [outcome(lambda _: utils.strtobool("maybe"), k)],
        [utils.is_v1(p) for p in ("v1", "V1", "v2", wanted.REST_V1, wanted.GRPC_V2)],
        [utils.is_v2(p) for p in ("v1", "V2", "v2", wanted.REST_V2, wanted.GRPC_V2)],
        [utils.is_structured_cloudevent(event), utils.is_structured_cloudevent({})],
        len(utils.generate_uuid()),
    ]


@same("to-headers")
def _(k: Any) -> Any:
    class Metadatum(NamedTuple):
        key: str
        value: Any

    class Context:
        def invocation_metadata(self) -> Any:
            pairs = (("a", "1"), ("a", "2"), ("x-bin", b"\xff"))
            return tuple(Metadatum(*pair) for pair in pairs)

        def trailing_metadata(self) -> Any:
            return (Metadatum("t", "3"),)

    return utils_of(k).to_headers(Context())


@same("numpy-codec")
def _(k: Any) -> Any:
    package = k.__name__.split(".protocol")[0]
    codec = __import__(f"{package}.utils.numpy_codec", fromlist="x")
    dtypes = ("U3", "S3", "O", "M8[s]", "c8", *(str(array_of(t).dtype) for t in TYPES))
    return [
        [codec.to_np_dtype(datatype) for datatype in (*TYPES, "NONE")],
        [codec.from_np_dtype(np.dtype(dtype)) for dtype in dtypes],
    ]


# --- and all of them ------------------------------------------------------------------


@pytest.mark.parametrize("name", SAME)
def test_same(name: str) -> None:
    assert outcome(SAME[name], ours) == outcome(SAME[name], theirs)


def test_the_cases_differ_from_failures() -> None:
    """Two failures are equal too: only the cases meant to fail may."""
    meant = {"mismatch", "unknown", "no-text", "numbers", "unexpected", "no-data"}
    failing = {
        name
        for name, case in SAME.items()
        if outcome(case, ours) in ([], [ValueError], [RuntimeError])
    }
    assert {n for n in failing if not any(word in n for word in meant)} == set()


# --- our clients and KServe's server --------------------------------------------------


class Echo(kserve.Model):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__("echo")
        self.ready = True

    async def predict(self, payload: Any, headers: Any = None) -> Any:
        if not isinstance(payload, theirs.InferRequest):
            return {"predictions": payload["instances"]}
        outputs = []
        for tensor in payload.inputs:
            output = theirs.InferOutput(tensor.name, tensor.shape, tensor.datatype)
            binary = payload.use_binary_outputs
            output.set_data_from_numpy(tensor.as_numpy(), binary_data=binary)
            outputs.append(output)
        return theirs.InferResponse(
            payload.id, "echo", outputs, use_binary_outputs=payload.use_binary_outputs
        )


@pytest.fixture(scope="module")
def planes() -> Any:
    registry = kserve.ModelRepository()
    registry.update(Echo())
    plane = DataPlane(registry)
    return plane, ModelRepositoryExtension(registry)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def echo_request(datatype: str, binary: bool) -> ours.InferRequest:
    tensor = ours.InferInput("a", [2], datatype)
    tensor.set_data_from_numpy(array_of(datatype), binary_data=binary)
    parameters = {"binary_data_output": True} if binary else None
    return ours.InferRequest("echo", [tensor], "7", parameters=parameters)


def check_echo(answer: Any, datatype: str) -> None:
    assert (answer.id, answer.model_name) == ("7", "echo")
    wanted = array_of(datatype)
    got = answer.outputs[0].as_numpy()
    assert answer.outputs[0].datatype == datatype
    if datatype == "BYTES":
        got = np.array([e.encode() if isinstance(e, str) else e for e in got], object)
    assert got.tolist() == wanted.tolist()
    assert got.dtype == wanted.dtype


@pytest.mark.filterwarnings("ignore:ORJSONResponse")  # KServe's use of FastAPI
@pytest.mark.anyio
async def test_our_rest_client_asks_kserves_server(planes: Any) -> None:
    from kserve.model_server import app

    RESTServer("kserve.model_server:app", *planes, 0).create_application()
    transport = httpx.ASGITransport(app)
    url = "http://kserve"
    async with InferenceRESTClient(RESTConfig(transport, "v2")) as client:
        assert await client.is_server_live(url)
        assert await client.is_server_ready(url)
        assert await client.is_model_ready(url, "echo")
        assert not await client.is_model_ready(url, "nobody")
        for datatype in TYPES:
            for binary in (True, False):
                if binary or datatype != "FP16":
                    request = echo_request(datatype, binary)
                    check_echo(await client.infer(url, request, "echo"), datatype)
        with pytest.raises(httpx.HTTPStatusError, match="nobody does not exist"):
            await client.infer(url, echo_request("INT8", False), "nobody")
    async with InferenceRESTClient(RESTConfig(transport, "v1")) as client:
        assert await client.is_server_live(url)
        assert await client.is_model_ready(url, "echo")
        answer = await client.infer(url, {"instances": [1]}, "echo")
        assert answer == {"predictions": [1]}


@pytest.mark.anyio
async def test_our_grpc_client_asks_kserves_server(planes: Any) -> None:
    server = grpc.aio.server(interceptors=(ExceptionToStatusInterceptor(),))
    add_GRPCInferenceServiceServicer_to_server(InferenceServicer(*planes), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with InferenceGRPCClient(f"127.0.0.1:{port}") as client:
            assert await client.is_server_live()
            assert await client.is_server_ready()
            assert await client.is_model_ready("echo")
            for datatype in TYPES:
                for raw in (True, False):
                    if raw or datatype != "FP16":
                        answer = await client.infer(echo_request(datatype, raw))
                        check_echo(answer, datatype)
            with pytest.raises(grpc.RpcError) as caught:
                await client.is_model_ready("nobody")
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    finally:
        await server.stop(None)


class OurEcho(Model):
    def predict(
        self, payload: Any, headers: Any = None, response_headers: Any = None
    ) -> Any:
        outputs = []
        for entry in payload.inputs:
            output = ours.InferOutput(entry.name, entry.shape, entry.datatype)
            output.set_data_from_numpy(entry.as_numpy(), binary_data=False)
            outputs.append(output)
        return ours.InferResponse(payload.id, self.name, outputs)


@pytest.mark.anyio
async def test_kserves_grpc_client_asks_our_server() -> None:
    model = OurEcho("echo")
    model.load()
    with CompatThread(model) as server:
        client = TheirGRPCClient(f"127.0.0.1:{server.port}")
        assert await client.is_server_ready()
        assert await client.is_model_ready("echo")
        for raw in (True, False):
            tensor = theirs.InferInput("x", [2], "BYTES")
            elements = np.array([b"a", b"\xc3\xa9"], np.object_)
            tensor.set_data_from_numpy(elements, binary_data=raw)
            request = theirs.InferRequest("echo", [tensor], "7")
            answer = await client.infer(request)
            assert (answer.id, answer.model_name) == ("7", "echo")
            assert answer.outputs[0].as_numpy().tolist() == elements.tolist()
        await client.close()
