"""The recorded requests of KServe's REST clients: how one is sent, and what must come.

`rest.jsonl` is a copy of the contract's file. Records are sent in their order, over a
raw socket, to one server. Used by test_golden.py, whose models are written with the
decorators, and by compat/test_golden_compat.py, whose models are KServe's.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from tests.support import RawAnswer, exchange

COPY = Path(__file__).parent / "rest.jsonl"
RECORDS = [json.loads(line) for line in COPY.read_text().splitlines()]
NAMES = [record["name"] for record in RECORDS]
CONTRACT = Path(__file__).parents[3] / "shared" / "contract" / "golden"

# Where a record's `want` and its own reason, or the protocol, say different things:
# * The body `a=b` is not JSON, so "the body is JSON whatever the content type says"
#   makes it malformed: 400, where its `want` says 200.
# * "Bytes that are not UTF-8 cannot be JSON": the request asks for binary output, in
#   which BYTES holds any bytes, so nothing has to be JSON: 200, where it says 400.
DEPARTURES = {"v2_ct_form": 400, "v2_bin_in_BYTES_nonutf8": 200}


# What each CloudEvent has of its own.
FRESH = {"id", "time"}

# What the body must hold where `want` says "any" and gives the reason.
HOLDS: list[tuple[str, Any]] = [
    ("v1_models", lambda body: body["models"][0] == "echo"),
    ("v1_ret_asyncgendict", lambda body: body == {"a": 1}),
    ("v2_no_ct", lambda body: len(body["outputs"]) == 2),
    ("v2_params_null", lambda body: body["id"] == "1"),
    ("v2_ret_noneid", lambda body: body["id"] == "1"),
    ("v2_ret_intid", lambda body: body["id"] == "1"),
    ("v2_ret_bf16", lambda body: body["outputs"][0]["data"] == [1.0]),
    ("v2_ret_fp16", lambda body: body["outputs"][0]["data"] == [1.5]),
    ("v2_json_BF16", lambda body: body["outputs"][0]["data"] == [1.5, 2.0]),
    ("v2_json_scalar_shape_empty", lambda body: body["outputs"][0]["shape"] == []),
    ("v2_model_meta", lambda body: body["inputs"][0]["shape"] == [-1, 4]),
    ("v2_ce_binary", lambda body: len(body["outputs"]) == 2),
    ("v2_ce_structured", lambda body: len(body["outputs"]) == 2),
    ("v1_predict_ct_text_echo", lambda body: body == {"predictions": [1]}),
]


def check(record: dict[str, Any], port: int) -> None:
    """Send a record to a server; fail unless it answers as `want` says."""
    want = record["want"]
    answer = exchange(port, request_bytes(record), record["method"])
    if record["name"] in DEPARTURES:
        assert answer.status == DEPARTURES[record["name"]], answer.body
        return
    assert answer.status == want["status"], answer.body
    assert not ("content-length" in answer.headers and answer.chunked)
    if record["method"] == "HEAD":
        assert answer.body == b""
        assert int(answer.headers["content-length"]) > 0
    elif want["body"] == "same":
        same(record, answer)
        if want["status"] == 200:
            assert answer.headers.get("content-type") == type_of(record)
    if want["body"] == "error":
        error = json.loads(answer.body)
        assert list(error) == ["error"]
        assert isinstance(error["error"], str)
        assert "secret" not in error["error"]
        assert answer.headers["content-type"] == "application/json"


def check_holds(name: str, holds: Any, port: int) -> None:
    """Send a record whose body may be any; fail unless it holds what it must."""
    record = next(record for record in RECORDS if record["name"] == name)
    assert record["want"]["body"] == "any"
    answer = exchange(port, request_bytes(record), record["method"])
    assert holds(json.loads(answer.body)), answer.body


def body_of(record: dict[str, Any], field: str) -> bytes:
    text = record[field]
    if text is None:
        return b""
    if text.startswith("base64:"):
        return base64.b64decode(text.removeprefix("base64:"))
    return str(text).encode()


def request_bytes(record: dict[str, Any]) -> bytes:
    headers = dict(record["request_headers"])
    body = body_of(record, "request_body")
    if headers.get("transfer-encoding") == "chunked":
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    head = [f"{record['method']} {record['path']} HTTP/1.1"]
    head += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [without_nulls(element) for element in value]
    return value


def generated_id(record: dict[str, Any]) -> bool:
    """KServe answered with an id that it made, which ours cannot equal."""
    return "uuid" in record["name"] and '"id"' not in (record["request_body"] or "")


def values_of(body: bytes, headers: dict[str, str]) -> tuple[object, bytes]:
    """A body's JSON, and the bytes of the tensors where those are binary."""
    size = int(headers.get("inference-header-content-length", len(body)))
    return without_nulls(json.loads(body[:size])), body[size:]


def event_of(headers: dict[str, str], body: object) -> dict[str, str]:
    """Take a CloudEvent's attributes, structured or binary, but for the fresh ones."""
    event = {n[3:]: v for n, v in headers.items() if n.startswith("ce-")}
    if headers.get("content-type") == "application/cloudevents+json":
        assert isinstance(body, dict)
        event = body.copy()
        for name in FRESH:
            assert body.pop(name)
    assert not event or event.keys() >= FRESH
    return {name: value for name, value in event.items() if name not in FRESH}


def same(record: dict[str, Any], answer: RawAnswer) -> None:
    theirs = body_of(record, "response_body")
    try:
        expected, their_tensors = values_of(theirs, dict(record["response_headers"]))
    except ValueError:
        assert answer.body == theirs
        return
    got, tensors = values_of(answer.body, answer.headers)
    assert event_of(answer.headers, got) == event_of(
        dict(record["response_headers"]), expected
    )
    if generated_id(record):
        assert isinstance(expected, dict)
        assert isinstance(got, dict)
        assert got.pop("id")
        expected.pop("id")
    assert got == expected
    assert tensors == their_tensors


def type_of(record: dict[str, Any]) -> str | None:
    """KServe's content type; for binary tensors, where it has none, what they are."""
    headers = dict(record["response_headers"])
    binary = "inference-header-content-length" in headers
    return "application/octet-stream" if binary else headers.get("content-type")
