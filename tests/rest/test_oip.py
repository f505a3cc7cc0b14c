"""The validator of the Open Inference Protocol: our answers pass, wrong ones do not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
import pytest

from kserve_lite import InferRequest, InferResponse, Model, Tensor, TensorSpec
from kserve_lite.rest.routes import ROUTES
from tests.golden.models import MODELS
from tests.golden.replay import RECORDS, request_bytes
from tests.rest.oip import check
from tests.support import RawAnswer, ServerThread, exchange

JSON = {"content-type": "application/json"}


# --- The validator can fail ---


def judge(
    path: str,
    document: object,
    *,
    method: str = "GET",
    status: int = 200,
    headers: dict[str, str] | None = None,
) -> None:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    given = {**JSON, "content-length": str(len(body)), **(headers or {})}
    check(method, path, status, {k: v for k, v in given.items() if v}, body)


INFER = "/v2/models/m/infer"


def response(**changes: Any) -> dict[str, Any]:
    output = {"name": "o", "shape": [2], "datatype": "INT8", "data": [1, -2], **changes}
    return {"model_name": "m", "id": "1", "outputs": [output]}


def without(member: str) -> dict[str, Any]:
    document = response()
    del document["outputs"][0][member]
    return document


def binary(size: object, datatype: str = "INT16", shape: object = (2,)) -> bytes:
    output = {
        "name": "o",
        "shape": shape,
        "datatype": datatype,
        "parameters": {"binary_data_size": size},
    }
    return json.dumps({"model_name": "m", "outputs": [output]}).encode()


def judge_binary(head: bytes, tail: bytes, **headers: str) -> None:
    judge(
        INFER,
        head + tail,
        method="POST",
        headers={
            "content-type": "application/octet-stream",
            "inference-header-content-length": str(len(head)),
            **headers,
        },
    )


@pytest.mark.parametrize(
    ("path", "document"),
    [
        ("/", {"status": "alive"}),
        ("/v2", {"name": "s", "version": "1", "extensions": []}),
        ("/v2/health/live", {"live": True}),
        ("/v2/models/a%20b", {"name": "a b", "platform": ""}),
        ("/v2/models/m/ready", {"name": "m", "ready": True}),
        (
            "/v2/models/m/versions/2?x",
            {"name": "m", "versions": ["2"], "platform": "", "inputs": []},
        ),
    ],
)
def test_accepts_documents(path: str, document: object) -> None:
    judge(path, document)


@pytest.mark.parametrize(
    ("datatype", "shape", "data"),
    [
        ("INT8", [2], [-128, 127]),
        ("UINT64", [1], [2**64 - 1]),
        ("FP32", [3], [1, 0.5, None]),
        ("BOOL", [2, 1], [[True], [False]]),
        ("BYTES", [1], ["a"]),
        ("FP16", [], [1.5]),
        ("INT32", [0, 7], []),
    ],
)
def test_accepts_tensors(datatype: str, shape: list[int], data: list[Any]) -> None:
    document = response(datatype=datatype, shape=shape, data=data)
    judge(INFER, document, method="POST")


@pytest.mark.parametrize(
    ("datatype", "shape", "tail"),
    [
        ("INT16", [2], b"abcd"),
        ("BF16", [], b"ab"),
        ("BOOL", [3], b"\x00\x01\x01"),
        ("BYTES", [2], b"\x01\x00\x00\x00a\x00\x00\x00\x00"),
        ("FP64", [0], b""),
    ],
)
def test_accepts_binary(datatype: str, shape: list[int], tail: bytes) -> None:
    judge_binary(binary(len(tail), datatype, shape), tail)


def test_accepts_events() -> None:
    events = b'data: {"model_name":"m","text_output":"a"}\n\ndata: {"error":"x"}\n\n'
    stream = {
        "content-type": "text/event-stream",
        "content-length": "",
        "transfer-encoding": "chunked",
    }
    path = "/v2/models/m/generate_stream"
    judge(path, events, method="POST", headers=stream)
    for wrong in (
        events[:-1],
        events[6:],
        events + events,
        events.replace(b"}\n\n", b"}\ndata: 1\n\n"),
        events.replace(b'"m"', b'"n"'),
    ):
        with pytest.raises(AssertionError):
            judge(path, wrong, method="POST", headers=stream)
    with pytest.raises(AssertionError, match="streams events"):
        judge(path, {"model_name": "m"}, method="POST")
    with pytest.raises(AssertionError, match="only generate_stream"):
        judge(path.removesuffix("_stream"), events, method="POST", headers=stream)


@pytest.mark.parametrize(
    ("document", "match"),
    [
        (without("name"), "'name' is a required"),
        (without("shape"), "'shape' is a required"),
        (without("datatype"), "'datatype' is a required"),
        (without("data"), "neither data nor"),
        (response(datatype="int8"), "not one of"),
        (response(datatype="BYTES"), "is no BYTES"),
        (response(datatype="BOOL"), "is no BOOL"),
        (response(datatype="UINT8"), "is no UINT8"),
        (response(data=[1, 128]), "128 is no INT8"),
        (response(data=[1, 1.5]), "1.5 is no INT8"),
        (response(data=[1, True]), "True is no INT8"),
        (response(data=[1, None]), "None is no INT8"),
        (response(data=["1", "2"]), "is no INT8"),
        (response(data=1), "not of type 'array'"),
        (response(data=[1]), "has 1 elements"),
        (response(data=[[1, 2]]), "not nested as"),
        (response(data=[[1], 2]), "nests too deep"),
        (response(shape=[2, 1], data=[[1], 2]), "nested too little"),
        (response(shape=[-1]), "less than the minimum"),
        (response(shape=["2"]), "not of type 'integer'"),
        (response(parameters={"a": {}}), "not of type"),
        (response(parameters={"binary_data_size": 2}), "no header length"),
        (response(extra=1), "unexpected"),
        (response() | {"extra": 1}, "unexpected"),
        (response() | {"id": 7}, "not of type 'string'"),
        (response() | {"id": None}, "not of type 'string'"),
        (response() | {"model_version": None}, "not of type 'string'"),
        (response() | {"model_name": "n"}, "answers for m"),
        ({"model_name": "m"}, "'outputs' is a required"),
        ({"outputs": []}, "'model_name' is a required"),
        ([], "not of type 'object'"),
        (b'{"model_name":"m","outputs":[],"outputs":[]}', "twice"),
        (b'{"model_name":"m","outputs":[NaN]}', "not JSON"),
        (b'{"model_name":"m"', "not JSON"),
        (b'{"model_name":"\xff","outputs":[]}', "not UTF-8"),
    ],
)
def test_refuses_responses(document: object, match: str) -> None:
    with pytest.raises(AssertionError, match=match):
        judge(INFER, document, method="POST")


def test_refuses_two_outputs_of_one_name() -> None:
    document = response()
    document["outputs"] *= 2
    with pytest.raises(AssertionError, match="one name"):
        judge(INFER, document, method="POST")


def test_refuses_another_version() -> None:
    path = "/v2/models/m/versions/2/infer"
    judge(path, response() | {"model_version": "2"}, method="POST")
    for other in ({}, {"model_version": "1"}):
        with pytest.raises(AssertionError, match="answers for 2"):
            judge(path, response() | other, method="POST")


BAD_BOOL = (b"\x00\x02", binary(2, "BOOL"), "neither 0 nor 1")
LENGTHS = b"\x01\x00\x00\x00a\x02\x00\x00\x00bc"


@pytest.mark.parametrize(
    ("tail", "head", "match"),
    [
        (b"abcd", binary(3), "not 3 bytes"),
        (b"abc", binary(3), "not 3 bytes"),
        (b"abc", binary(4), "3 are left"),
        (b"abcde", binary(4), "1 bytes are left behind"),
        (b"abcd", binary("4"), "binary_data_size is"),
        (b"abcd", binary(True), "binary_data_size is"),
        (b"", binary(-1), "-1 bytes"),
        BAD_BOOL,
        (LENGTHS, binary(11, "BYTES", [3]), "no length"),
        (LENGTHS, binary(11, "BYTES", [1]), "behind its last"),
        (LENGTHS[:-1], binary(10, "BYTES"), "cut off"),
    ],
)
def test_refuses_binary(tail: bytes, head: bytes, match: str) -> None:
    with pytest.raises(AssertionError, match=match):
        judge_binary(head, tail)


def test_refuses_binary_headers() -> None:
    head = binary(4)
    for headers, match in (
        ({"content-type": "application/json"}, "content type"),
        ({"content-type": ""}, "content type"),
        ({"inference-header-content-length": ""}, "content type"),
        ({"inference-header-content-length": "-1"}, "is '-1'"),
        ({"inference-header-content-length": "9999"}, "says 9999"),
        ({"inference-header-content-length": str(len(head) - 1)}, "not JSON"),
    ):
        with pytest.raises(AssertionError, match=match):
            judge_binary(head, b"abcd", **headers)
    both = response(parameters={"binary_data_size": 0})
    with pytest.raises(AssertionError, match="data and a binary size"):
        judge_binary(json.dumps(both).encode(), b"")


@pytest.mark.parametrize(
    ("headers", "match"),
    [
        ({"transfer-encoding": "chunked"}, "both"),
        ({"content-length": ""}, "neither"),
        ({"content-length": "", "transfer-encoding": "gzip"}, "coding gzip"),
        ({"content-length": "9"}, "says 9"),
        ({"content-length": "+13"}, "content-length is"),
        ({"content-type": ""}, "content type is None"),
        ({"content-type": "text/plain"}, "content type is text/plain"),
        ({"content-encoding": "gzip"}, "coded"),
    ],
)
def test_refuses_framing(headers: dict[str, str], match: str) -> None:
    with pytest.raises(AssertionError, match=match):
        judge("/v2/health/live", {"live": True}, headers=headers)


@pytest.mark.parametrize(
    ("status", "document"),
    [
        (400, {"error": ""}),
        (400, {"error": {"message": "x"}}),
        (400, {"detail": "x"}),
        (400, {"error": "x", "code": 1}),
        (400, b""),
        (405, {"error": "x"}),  # without `allow`
        (201, {"live": True}),
        (307, b""),  # without `location`
        (101, b""),
    ],
)
def test_refuses_errors_and_statuses(status: int, document: object) -> None:
    with pytest.raises(AssertionError):
        judge("/v2/health/live", document, status=status)


@pytest.mark.parametrize(
    ("path", "document"),
    [
        ("/v2/health/live", {"live": False}),
        ("/v2/health/live", {"live": 1}),
        ("/v2", {"name": "s", "version": "1"}),
        ("/v2/models/m", {"name": "n", "platform": ""}),
        ("/v2/models/m", {"name": "m", "platform": "", "versions": None}),
        ("/v2/models/m/versions/2", {"name": "m", "platform": "", "versions": ["1"]}),
        ("/v2/models/m/ready", {"name": "m"}),
        ("/v2/models/m/stats", {"model_stats": [{}]}),
        ("/v2/models/m/config", {"name": "m"}),
        ("/v2/unheard", {}),
        ("/v2/models/m/infer", response()),  # GET
    ],
)
def test_refuses_documents(path: str, document: object) -> None:
    with pytest.raises(AssertionError):
        judge(path, document)


def test_head_has_no_body() -> None:
    check("HEAD", "/v2", 200, {**JSON, "content-length": "9"}, b"")
    with pytest.raises(AssertionError, match="HEAD has a body"):
        check("HEAD", "/v2", 200, {**JSON, "content-length": "1"}, b"1")


def test_v1_is_not_its_business() -> None:
    with pytest.raises(ValueError, match="V1"):
        judge("/v1/models", {"models": []})


# --- A real server passes ---

versioned = [Model("many", version="1"), Model("many", version="2")]
named = Model("a b%{ü}", version="1.0/β")
text = Model("text")
doubler = Model("doubler")
every = Model("every")


async def first_of(x: np.ndarray) -> np.ndarray:
    return x[:1]


for model in (*versioned, named):
    model.predict(first_of)


@text.predict
def text_predict(text_input: np.ndarray) -> dict[str, np.ndarray]:
    return {"text_output": text_input}


@doubler.predict
def doubler_predict(
    x: Annotated[np.ndarray, TensorSpec("FP32", [-1, 2])],
    y: Annotated[np.ndarray, TensorSpec("BYTES", [-1])],
) -> dict[str, np.ndarray]:
    return {"doubled": x * 2, "same": y}


@every.predict
async def every_predict(request: InferRequest) -> InferResponse:
    return InferResponse(
        tuple(Tensor(t.name, t.array, t.datatype) for t in request.inputs),
        parameters={"a": 1, "b": "c", "d": True},
    )


@pytest.fixture(scope="module")
def server() -> Iterator[ServerThread]:
    mine = (*versioned, named, text, doubler, every)
    with ServerThread(*MODELS, *mine, enable_grpc=False) as running:
        yield running


def send(
    server: ServerThread,
    method: str,
    path: str,
    body: bytes | None = None,
    **headers: str,
) -> RawAnswer:
    """Send a request; its answer has passed the validator."""
    lines = [f"{method} {path} HTTP/1.1", "host: x"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if body is not None:
        lines.append(f"content-length: {len(body)}")
    head = "\r\n".join(lines).encode() + b"\r\n\r\n"
    answer = exchange(server.port, head + (body or b""), method)
    assert answer.complete
    check(method, path, answer.status, answer.headers, answer.body)
    return answer


def of_tensor(tensor: dict[str, Any], **further: Any) -> bytes:
    return json.dumps({"inputs": [tensor], **further}).encode()


# Loading and unloading the others would change what later tests meet.
EVERYWHERE = [
    (route.method, route.pattern, target)
    for route in ROUTES
    if route.pattern != "/metrics"  # which is Prometheus's protocol
    for target in ("zz", "every", "many", "notready", "boom")
    if not route.pattern.startswith("/v1")
    and (target == "zz" or not route.pattern.startswith("/v2/repository/models"))
]


@pytest.mark.parametrize(("method", "pattern", "target"), EVERYWHERE)
def test_every_route(
    method: str, pattern: str, target: str, server: ServerThread
) -> None:
    path = pattern.replace("{model}", target).replace("{version}", "2")
    one = {"name": "text_input", "shape": [1], "datatype": "FP32", "data": [1]}
    body = of_tensor(one) if path.endswith("infer") else b'{"text_input": 1.0}'
    if path.endswith("index"):
        body = b"{}"
    send(server, method, path, body if method == "POST" else None)
    if method == "GET":
        send(server, "HEAD", path)
    send(server, "DELETE", path)
    send(server, method, f"{path}/" if path != "/" else path)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b"{",
        b'{"inputs": 1}',
        b'{"inputs": [{}]}',
        b'{"inputs": []}',
        b'{"inputs": [{"name": "a", "shape": [2], "datatype": "FP32", "data": [1]}]}',
        b'{"inputs": [{"name": "a", "shape": [1], "datatype": "X", "data": [1]}]}',
        b'{"inputs": [{"name": "\xff"}]}',
        b'{"text_input": [[1], 2]}',
        b'{"id": 1, "ready": 1}',
    ],
)
@pytest.mark.parametrize("verb", ["infer", "generate", "generate_stream"])
def test_bad_requests(body: bytes, verb: str, server: ServerThread) -> None:
    send(server, "POST", f"/v2/models/doubler/{verb}", body)


@pytest.mark.parametrize("form", ["json", "binary", "all_binary"])
@pytest.mark.parametrize(
    ("datatype", "value"),
    [
        *((f"{u}INT{n}", 3) for u in ("", "U") for n in (8, 16, 32, 64)),
        *((f"FP{n}", 0.1) for n in (16, 32, 64)),
        ("BF16", 0.1),
        ("BOOL", True),
        ("BYTES", "ü"),
    ],
)
def test_every_datatype(
    datatype: str, value: Any, form: str, server: ServerThread
) -> None:
    tensor = {"name": "t", "shape": [2, 1], "datatype": datatype, "data": [value] * 2}
    also = {"name": "u", "shape": [1], "datatype": "INT8", "data": [1]}
    request: dict[str, Any] = {"id": "x", "inputs": [tensor, also]}
    if form == "binary":
        request["outputs"] = [
            {"name": "t", "parameters": {"binary_data": True}},
            {"name": "u"},
        ]
    elif form == "all_binary":
        request["parameters"] = {"binary_data_output": True}
    path = "/v2/models/every/infer"
    answer = send(server, "POST", path, json.dumps(request).encode())
    assert answer.status == 200
    is_binary = "inference-header-content-length" in answer.headers
    assert is_binary == (form != "json")


def test_binary_requests(server: ServerThread) -> None:
    tensor = {"name": "t", "shape": [2], "datatype": "BYTES"}
    raw = b"\x01\x00\x00\x00\xff\x00\x00\x00\x00"
    head = of_tensor(
        {**tensor, "parameters": {"binary_data_size": len(raw)}},
        parameters={"binary_data_output": True},
    )
    path = "/v2/models/every/infer"
    for said, tail, status in (
        (len(head), raw, 200),
        (len(head), raw[:-1], 400),
        (len(head), raw + b"x", 400),
        (len(head) - 1, raw, 400),
        (99999, raw, 400),
        ("x", raw, 400),
    ):
        answer = send(
            server,
            "POST",
            path,
            head + tail,
            Inference_Header_Content_Length=str(said),
        )
        assert answer.status == status, answer.body


@pytest.mark.parametrize(
    "request_head",
    [
        b"GET /v2 HTTP/1.1\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\nhost: x\r\ncontent-length: x\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\nhost: x\r\n" + b"a: %s\r\n" % (b"b" * 99_999),
        b"GET /v2 HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\nhost: x\r\ncontent-encoding: gzip\r\n\r\n",
        b"POST /v2 HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999999\r\n\r\n",
        b"GET /v2 HTTP/3.7\r\nhost: x\r\n\r\n",
        b"GET http://x/v2 HTTP/1.1\r\nhost: x\r\nx-request-timeout-ms: -\r\n\r\n",
    ],
)
def test_requests_that_are_hardly_http(
    request_head: bytes, server: ServerThread
) -> None:
    answer = exchange(server.port, request_head, "GET")
    check("GET", "/v2", answer.status, answer.headers, answer.body)


def test_names_that_need_percent_encoding(server: ServerThread) -> None:
    path = "/v2/models/a%20b%25%7B%C3%BC%7D/versions/1.0%2F%CE%B2"
    assert send(server, "GET", path).status == 200
    assert send(server, "GET", f"{path}/ready").status == 200
    assert send(server, "GET", f"{path}/stats").status == 200
    one = {"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}
    assert send(server, "POST", f"{path}/infer", of_tensor(one)).status == 200


def test_generates(server: ServerThread) -> None:
    body = b'{"text_input": "a"}'
    for verb in ("generate", "generate_stream"):
        answer = send(server, "POST", f"/v2/models/text/{verb}", body)
        assert answer.status == 200, answer.body
        assert b'"text_output":"a"' in answer.body


def test_statistics_of_what_was_asked(server: ServerThread) -> None:
    one = {"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}
    assert send(server, "POST", "/v2/models/many/infer", of_tensor(one)).status == 200
    answer = send(server, "GET", "/v2/models/many/versions/2/stats")
    (entry,) = json.loads(answer.body)["model_stats"]
    assert entry["inference_count"] > 0


# A handler that answers V2 with bytes of its own writes whatever it wants.
OWN_BYTES = {"v2_ret_bytes"}
OF_V2 = [
    record
    for record in RECORDS
    if not record["path"].startswith("/v1") and record["name"] not in OWN_BYTES
]


@pytest.mark.parametrize("record", OF_V2, ids=[record["name"] for record in OF_V2])
def test_recorded_requests(record: dict[str, Any], server: ServerThread) -> None:
    answer = exchange(server.port, request_bytes(record), record["method"])
    assert answer.complete
    check(record["method"], record["path"], answer.status, answer.headers, answer.body)


def test_loads_and_unloads() -> None:
    model = Model("m", predict=first_of)
    with ServerThread(model, enable_grpc=False) as server:
        for verb, status in (
            ("load", 200),
            ("unload", 200),
            ("unload", 404),
            ("load", 200),
        ):
            path = f"/v2/repository/models/m/{verb}"
            assert send(server, "POST", path, b"").status == status
            assert send(server, "POST", "/v2/repository/index", b"").status == 200
