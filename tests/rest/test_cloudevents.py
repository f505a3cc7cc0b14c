"""CloudEvents through a server, as senders of events have them."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import pytest

from kserve_lite import InferRequest, Model, TensorSpec
from tests.support import RawAnswer, ServerThread, exchange

try:
    PACKAGE: Any = import_module("cloudevents.v1.conversion")
    EVENTS: Any = import_module("cloudevents.v1.http")
except ImportError:
    PACKAGE = import_module("cloudevents.conversion")
    EVENTS = import_module("cloudevents.http")

ROOT = Path(__file__).parents[2]
STRUCTURED = "application/cloudevents+json"
CE = {
    "ce-specversion": "1.0",
    "ce-id": "36077800",
    "ce-source": "https://example.com/producer",
    "ce-type": "com.example.sample",
}
ENVELOPE = {name[3:]: value for name, value in CE.items()}
ANSWERS = {
    "specversion": "1.0",
    "source": "io.kserve.inference.m",
    "type": "io.kserve.inference.response",
}
STRANGE = 'modèle "100%" 模型'

m, merging = Model("m"), Model("m")
strange = Model(STRANGE)
columns = Model("columns", inputs=[TensorSpec("INT64", [-1], name="a")])
rows = Model("rows", outputs=[TensorSpec("INT64", [-1, -1], "y")])
pair = Model("pair")


@merging.predict
@m.predict
async def m_predict(
    payload: Any, headers: dict[str, str], response_headers: dict[str, str]
) -> Any:
    if isinstance(payload, bytes):
        return {"bytes": len(payload), "type": headers["content-type"]}
    if "headers" in payload:
        response_headers |= payload["headers"]
    if "raw" in payload:
        return base64.b64decode(payload["raw"])
    if "stream" in payload:
        return stream(payload["stream"])
    if "fails" in payload:
        raise ValueError("secret")
    return {"predictions": payload["instances"]}


@m.explain
async def m_explain(payload: Any) -> Any:
    return {"explanations": payload["instances"]}


async def stream(items: list[Any]) -> AsyncIterator[Any]:
    for item in items:
        yield item


@strange.predict
async def strange_predict(payload: Any) -> Any:
    return payload


@columns.predict
def columns_predict(payload: InferRequest) -> Any:
    return {"predictions": payload["a"].tolist()}


@rows.predict
def rows_predict(values: np.ndarray) -> np.ndarray:
    return values * 2


@pair.predict
def pair_predict(a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    return {"sum": a + b, "product": a * b}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerThread]:
    with ServerThread(m, strange, columns, rows, pair, max_body_size=100_000) as served:
        yield served


def ask(
    server: ServerThread,
    body: bytes,
    headers: dict[str, str],
    path: str = "m:predict",
) -> RawAnswer:
    lines = [f"POST /v1/models/{path} HTTP/1.1", "host: test"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    head = "\r\n".join((*lines, f"content-length: {len(body)}", "", ""))
    answer = exchange(server.port, head.encode("latin-1") + body)
    assert answer.complete
    return answer


def binary(
    server: ServerThread,
    data: Any,
    content_type: str | None = "application/json",
    path: str = "m:predict",
    **more: str,
) -> RawAnswer:
    body = data if isinstance(data, bytes) else json.dumps(data).encode()
    headers = CE | more
    if content_type is not None:
        headers["content-type"] = content_type
    return ask(server, body, headers, path)


def structured(
    server: ServerThread, path: str = "m:predict", **members: Any
) -> RawAnswer:
    body = json.dumps(ENVELOPE | members).encode()
    return ask(server, body, {"content-type": STRUCTURED}, path)


def attributes_of(answer: RawAnswer) -> dict[str, str]:
    """Of a binary event, but for its id and time, which must be there."""
    found = {n[3:]: v for n, v in answer.headers.items() if n.startswith("ce-")}
    assert found.pop("id") not in ("", CE["ce-id"])
    assert found.pop("time").endswith("+00:00")
    return found


def members_of(answer: RawAnswer) -> dict[str, Any]:
    """Of a structured event, but for its id and time, which must be there."""
    assert answer.status == 200
    assert answer.headers["content-type"] == STRUCTURED
    assert not any(name.startswith("ce-") for name in answer.headers)
    found: dict[str, Any] = json.loads(answer.body)
    assert found.pop("id") not in ("", CE["ce-id"])
    assert found.pop("time").endswith("+00:00")
    return found


def error_of(answer: RawAnswer) -> str:
    assert answer.headers["content-type"] == "application/json"
    assert not any(name.startswith("ce-") for name in answer.headers)
    error: str = json.loads(answer.body)["error"]
    return error


# --- both modes -----------------------------------------------------------------------

DATA = {"instances": [[1, 2]]}


@pytest.mark.parametrize("verb", ["predict", "explain"])
def test_an_event_is_answered_by_an_event(server: ServerThread, verb: str) -> None:
    key = {"predict": "predictions", "explain": "explanations"}[verb]
    expected = {key: [[1, 2]]}
    secret = {"authorization": "Bearer secret", "cookie": "secret"}
    answer = binary(server, DATA, path=f"m:{verb}", **secret)
    assert answer.status == 200
    assert attributes_of(answer) == ANSWERS
    assert answer.headers["content-type"] == "application/json"
    assert json.loads(answer.body) == expected
    assert set(answer.headers) == {
        *("ce-specversion", "ce-id", "ce-source", "ce-type", "ce-time"),
        *("content-type", "content-length", "date", "server"),
        *("x-request-id", "traceparent"),
    }
    assert members_of(structured(server, f"m:{verb}", data=DATA)) == ANSWERS | {
        "data": expected
    }


def test_ids_are_new(server: ServerThread) -> None:
    answers = [binary(server, DATA) for _ in range(3)]
    assert len({answer.headers["ce-id"] for answer in answers}) == 3


@pytest.mark.parametrize("mode", ["binary", "structured"])
def test_the_package_as_client(server: ServerThread, mode: str) -> None:
    event = EVENTS.CloudEvent({"type": "t", "source": "/s", "ext": "x"}, DATA)
    headers, body = getattr(PACKAGE, f"to_{mode}")(event)
    answer = ask(server, body, headers)
    found = EVENTS.from_http(answer.headers, answer.body)
    assert found.get_data() == {"predictions": [[1, 2]]}
    assert {name: found[name] for name in ANSWERS} == ANSWERS


def test_handlers_of_tensors(server: ServerThread) -> None:
    for data, path, predictions in (
        (DATA, "rows", [[2, 4]]),
        ({"inputs": [[1, 2]]}, "rows", [[2, 4]]),
        ({"inputs": {"a": [1, 2]}}, "columns", [1, 2]),
        (
            {"instances": [{"a": 2, "b": 3}]},
            "pair",
            [{"sum": 5, "product": 6}],
        ),
    ):
        path = f"{path}:predict"
        source = f"io.kserve.inference.{path[:-8]}"
        answer = binary(server, data, path=path)
        assert json.loads(answer.body) == {"predictions": predictions}
        assert attributes_of(answer) == ANSWERS | {"source": source}
        encoded = base64.b64encode(json.dumps(data).encode()).decode()
        for members in ({"data": data}, {"data_base64": encoded}):
            found = members_of(structured(server, path, **members))
            assert found["data"] == {"predictions": predictions}
            assert found["source"] == source


def test_large_tensors(server: ServerThread) -> None:
    data = {"instances": [list(range(5000))] * 2}
    doubled = {"predictions": [list(range(0, 10_000, 2))] * 2}
    answer = binary(server, data, path="rows:predict")
    assert json.loads(answer.body) == doubled
    found = members_of(structured(server, "rows:predict", data=data))
    assert found["data"] == doubled


def test_a_body_that_is_too_large(server: ServerThread) -> None:
    answer = structured(server, data="x" * 100_000)
    assert answer.status == 413
    assert "max_body_size" in error_of(answer)


# --- what is wrong --------------------------------------------------------------------


@pytest.mark.parametrize("path", ["m:predict", "m:explain", "rows:predict"])
def test_malformed_data(server: ServerThread, path: str) -> None:
    for content_type in (None, "application/json", "application/json; charset=utf-8"):
        answer = binary(server, b'{"instances": [', content_type, path)
        assert answer.status == 400
        assert "Unrecognized request format" in error_of(answer)
    answer = ask(server, b"[", {"content-type": STRUCTURED}, path)
    assert answer.status == 400
    answer = structured(server, path)
    assert (answer.status, error_of(answer)) == (
        400,
        "The event must have data, or data_base64, and not both.",
    )


@pytest.mark.parametrize(
    "content_type",
    [
        "application/cloudevents-batch+json",
        "application/cloudevents-batch+json; charset=utf-8",
        "application/cloudevents+xml",
        "application/cloudevents",
    ],
)
def test_other_kinds_of_events(server: ServerThread, content_type: str) -> None:
    answer = ask(server, b"[]", CE | {"content-type": content_type})
    assert answer.status == 415
    assert STRUCTURED in error_of(answer)
    assert answer.headers["accept"] == f"application/json, {STRUCTURED}"


def test_errors_are_no_events(server: ServerThread) -> None:
    answer = binary(server, DATA, path="missing:predict")
    assert (answer.status, error_of(answer)) == (
        404,
        "Model with name missing does not exist.",
    )
    answer = binary(server, {"fails": 1})
    assert answer.status == 500
    assert "secret" not in error_of(answer)
    answer = binary(server, DATA, path="rows:explain")
    assert answer.status == 501
    error_of(answer)


def test_what_lacks_a_required_header_is_no_event(server: ServerThread) -> None:
    for missing in CE:
        headers = {name: value for name, value in CE.items() if name != missing}
        answer = ask(server, json.dumps(DATA).encode(), headers)
        assert json.loads(answer.body) == {"predictions": [[1, 2]]}
        assert not any(name.startswith("ce-") for name in answer.headers)


def test_an_envelope_that_is_not_said_to_be_one_is_json(server: ServerThread) -> None:
    body = json.dumps(ENVELOPE | {"time": "", "data": 0} | DATA).encode()
    answer = ask(server, body, {"content-type": "application/json"})
    assert json.loads(answer.body) == {"predictions": [[1, 2]]}


# --- headers, types -------------------------------------------------------------------


def test_headers_that_kserve_fails_at(server: ServerThread) -> None:
    more = {
        "ce-contenttype": "application/json",
        "ce-datacontenttype": "x",
        "ce-data": "x",
        "ce-extensions": "x",
        "ce-time": "not a time",
        "ce-subject": "caf\xe9 %zz %ff",
    }
    answer = binary(server, DATA, **more)
    assert (answer.status, attributes_of(answer)) == (200, ANSWERS)


def test_data_that_is_no_json(server: ServerThread) -> None:
    answer = binary(server, b"Obj\x01\xff", "avro/binary")
    assert json.loads(answer.body) == {"bytes": 5, "type": "avro/binary"}
    assert answer.headers["content-type"] == "application/json"
    answer = binary(server, b"Obj\x01\xff", "avro/binary", "rows:predict")
    assert answer.status == 400


def test_names_of_models_that_no_header_holds(server: ServerThread) -> None:
    path = f"{quote(STRANGE, safe='')}:predict"
    source = f"io.kserve.inference.{STRANGE}"
    answer = binary(server, DATA, path=path)
    assert answer.status == 200
    assert answer.headers["ce-source"].isascii()
    assert not set(answer.headers["ce-source"]) & {" ", '"'}
    assert unquote(answer.headers["ce-source"]) == source
    assert members_of(structured(server, path, data=DATA))["source"] == source


def test_headers_of_the_handler(server: ServerThread) -> None:
    own = {
        "x-own": "1",
        "content-type": "application/x-mine",
        "ce-id": "mine",
        "CE-Source": "mine",
        "ce-subject": "mine",
    }
    answer = binary(server, DATA | {"headers": own})
    assert attributes_of(answer) == ANSWERS | {"subject": "mine"}
    assert answer.headers["x-own"] == "1"
    assert answer.headers["content-type"] == "application/json"
    answer = structured(server, data=DATA | {"headers": {"x-own": "1"}})
    assert answer.headers["x-own"] == "1"
    assert members_of(answer)["data"] == {"predictions": [[1, 2]]}
    answer = binary(server, DATA | {"headers": {"x-own": "a\nb"}})
    assert answer.status == 500


@pytest.mark.parametrize(
    ("raw", "own", "content_type", "member"),
    [
        ("é".encode(), None, "text/plain; charset=utf-8", {"data": "é"}),
        (b"\xff", None, "application/octet-stream", {"data_base64": "/w=="}),
        (b"a,b", "text/csv", "text/csv", {"data": "a,b"}),
        (b"[1]", "application/json", "application/json", {"data": [1]}),
        (b"\x89P", "image/png", "image/png", {"data_base64": "iVA="}),
    ],
)
def test_text_and_bytes(
    server: ServerThread,
    raw: bytes,
    own: str | None,
    content_type: str,
    member: dict[str, Any],
) -> None:
    data: dict[str, Any] = {"raw": base64.b64encode(raw).decode()}
    if own is not None:
        data["headers"] = {"content-type": own}
    answer = binary(server, data)
    assert (answer.body, answer.headers["content-type"]) == (raw, content_type)
    assert attributes_of(answer) == ANSWERS
    assert members_of(structured(server, data=data)) == ANSWERS | member | {
        "datacontenttype": content_type
    }


@pytest.mark.parametrize(
    ("items", "content_type", "body"),
    [
        (["a", "b"], "text/plain; charset=utf-8", b"ab"),
        ([{"a": 1}, 2], "application/x-ndjson", b'{"a":1}\n2\n'),
        ([], "application/octet-stream", b""),
    ],
)
def test_streams(
    server: ServerThread, items: list[Any], content_type: str, body: bytes
) -> None:
    answer = binary(server, {"stream": items})
    assert (answer.status, answer.chunked) == (200, True)
    assert attributes_of(answer) == ANSWERS
    assert (answer.body, answer.headers["content-type"]) == (body, content_type)
    answer = structured(server, data={"stream": items})
    assert answer.status == 501
    assert "binary" in error_of(answer)


# --- settings, imports ----------------------------------------------------------------


def test_settings() -> None:
    own = {"ce_type": "org.example answer", "ce_source": "/é", "ce_merge": True}
    # A value as it is, percent-encoded, and of an older sender, in ISO-8859-1.
    more = {
        "ce-ext": "x",
        "ce-subject": "%C3%A9%22%0D%0Ax-evil:%201",
        "ce-old": "\xe9",
        "ce-time": "2021-01-28T21:04:43Z",
    }
    with ServerThread(merging, **own) as server:
        answer = binary(server, DATA, **more)
        assert attributes_of(answer) == {
            "specversion": "1.0",
            "type": "org.example%20answer",
            "source": "/%C3%A9",
            "ext": "x",
            "subject": "%C3%A9%22%0D%0Ax-evil:%201",
            "old": "%C3%A9",
        }
        assert members_of(structured(server, data=DATA, ext="x", number=7)) == {
            "specversion": "1.0",
            "type": "org.example answer",
            "source": "/é",
            "ext": "x",
            "number": 7,
            "data": {"predictions": [[1, 2]]},
        }


PROBE = """
import sys
from kserve_lite import Model
from kserve_lite.testing import Client
seen = []
async def predict(payload):
    return payload
with Client(Model("m", predict=predict)) as client:
    for headers in ({}, %r):
        client.request("POST", "/v1/models/m:predict", content=b"[1]", headers=headers)
        seen.append("cloudevents" in sys.modules)
print(seen)
"""


def test_the_package_is_imported_when_the_first_event_comes() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE % CE],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout == "[False, True]\n"


# --- docs/cloudevents.md --------------------------------------------------------------


def test_the_commands_of_the_documentation() -> None:
    text = (ROOT / "docs/cloudevents.md").read_text()
    (console,) = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    lines = console.splitlines()
    assert [line[:6] for line in lines[::2]] == ["$ curl"] * 2
    doubler = Model("doubler", predict=rows_predict)
    with ServerThread(doubler) as server:
        for command, shown in zip(lines[::2], lines[1::2], strict=True):
            here = command[2:].replace("http://127.0.0.1:8080", server.url)
            got = subprocess.run(
                shlex.split(here.replace("curl ", "curl -sS --fail ", 1)),
                check=True,
                capture_output=True,
            )
            expected = json.loads(shown)
            for name, value in json.loads(got.stdout).items():
                assert expected.pop(name) in (value, "...")
            assert expected == {}
