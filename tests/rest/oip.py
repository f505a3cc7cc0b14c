"""Judges REST answers by the Open Inference Protocol, strictly and on its own.

Written from the protocol (github.com/kserve/open-inference-protocol: inference_rest.md,
generate_rest.yaml), the binary tensor, statistics, model configuration, repository and
generate extensions of Triton, and the contract's sections 1.2 and 1.6. It may not
import the package: what it knows of datatypes and of documents is written down here.
Stricter than the protocol in that nothing unknown may be in an answer, names must be
those of the path, and no member may come twice. More lenient in one thing, which KServe
does too: NaN and infinity, which JSON has not, are null.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

from jsonschema import Draft202012Validator

Document = dict[str, Any]

# Bytes an element; BYTES has none, its elements say their lengths.
WIDTHS = {
    "BOOL": 1,
    "UINT8": 1,
    "UINT16": 2,
    "UINT32": 4,
    "UINT64": 8,
    "INT8": 1,
    "INT16": 2,
    "INT32": 4,
    "INT64": 8,
    "FP16": 2,
    "BF16": 2,
    "FP32": 4,
    "FP64": 8,
    "BYTES": None,
}


def _closed(optional: Document | None = None, /, **required: Any) -> Document:
    """An object with these members and no others."""
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
        "additionalProperties": False,
    }


def _list(items: Document) -> Document:
    return {"type": "array", "items": items}


TEXT: Document = {"type": "string"}
NAME: Document = {"type": "string", "minLength": 1}
COUNT: Document = {"type": "integer", "minimum": 0}
TRUE_OR_FALSE: Document = {"type": "boolean"}
DATATYPE: Document = {"enum": list(WIDTHS)}
PARAMETERS: Document = {
    "type": "object",
    "additionalProperties": {"type": ["string", "number", "boolean"]},
}
DECLARED = _closed(
    name=NAME, datatype=DATATYPE, shape=_list({"type": "integer", "minimum": -1})
)
OUTPUT = _closed(
    {"parameters": PARAMETERS, "data": {"type": "array"}},
    name=NAME,
    shape=_list(COUNT),
    datatype=DATATYPE,
)
TIMED = _closed(count=COUNT, ns=COUNT)
PHASES = ("compute_input", "compute_infer", "compute_output")
MODEL_STATISTICS = _closed(
    {
        "memory_usage": {"type": "array"},
        "response_stats": {"type": "object"},
    },
    name=NAME,
    version=TEXT,
    last_inference=COUNT,
    inference_count=COUNT,
    execution_count=COUNT,
    inference_stats=_closed(
        **dict.fromkeys(
            ("success", "fail", "queue", *PHASES, "cache_hit", "cache_miss"), TIMED
        )
    ),
    batch_stats=_list(_closed(batch_size=COUNT, **dict.fromkeys(PHASES, TIMED))),
)
CONFIGURED = {
    "name": NAME,
    "data_type": {"enum": [f"TYPE_{n}" for n in (*WIDTHS, "STRING") if n != "BYTES"]},
    "dims": _list({"type": "integer", "minimum": -1}),
}

ERROR = _closed(error={"type": "string", "minLength": 1})
SERVER_METADATA = _closed(name=NAME, version=NAME, extensions=_list(NAME))
MODEL_METADATA = _closed(
    {
        "versions": _list(NAME),
        "inputs": _list(DECLARED),
        "outputs": _list(DECLARED),
        "parameters": PARAMETERS,
    },
    name=NAME,
    platform=TEXT,
)
INFER_RESPONSE = _closed(
    {"model_version": TEXT, "id": TEXT, "parameters": PARAMETERS},
    model_name=NAME,
    outputs=_list(OUTPUT),
)
# Beside the model's name, one member an output, by the output's name.
GENERATE_RESPONSE: Document = {
    "type": "object",
    "properties": {"model_name": NAME, "model_version": TEXT, "id": TEXT},
    "required": ["model_name"],
}
MODEL_CONFIG: Document = {
    "type": "object",
    "properties": {
        "name": NAME,
        "platform": TEXT,
        "backend": TEXT,
        "max_batch_size": COUNT,
        "input": _list(_closed({"optional": TRUE_OR_FALSE}, **CONFIGURED)),
        "output": _list(_closed(**CONFIGURED)),
        "dynamic_batching": _closed(max_queue_delay_microseconds=COUNT),
        "model_transaction_policy": _closed(decoupled=TRUE_OR_FALSE),
    },
    "required": ["name", "max_batch_size", "input", "output"],
}
EVENTS = ("text/event-stream", "text/event-stream; charset=utf-8")
STATES = ["UNKNOWN", "READY", "UNAVAILABLE", "LOADING", "UNLOADING"]
INDEX = _list(
    _closed(
        {
            "version": TEXT,
            "state": {"enum": STATES},
            "reason": TEXT,
        },
        name=NAME,
    )
)

Further = Callable[["_Answer", Any], None]


class _Answer(NamedTuple):
    model: str
    version: str | None
    headers: Mapping[str, str]
    body: bytes


class _Row(NamedTuple):
    """What a path answers with 200: a document, and what no schema can say of it."""

    method: str
    path: re.Pattern[str]
    schema: Document
    further: Further | None = None


def check(
    method: str, path: str, status: int, headers: Mapping[str, str], body: bytes
) -> None:
    """Raise AssertionError, in clear text, unless the answer is one of the protocol.

    path: as it was sent, percent-encoded; a query is not looked at. headers: names in
    any case. body: without the transfer encoding. Raises ValueError for a path of V1,
    which the protocol says nothing about.
    """
    path = path.partition("?")[0]
    if path == "/v1" or path.startswith("/v1/"):
        raise ValueError("V1 is not the Open Inference Protocol")
    headers = {name.lower(): value for name, value in headers.items()}
    _framing(method, headers, body)
    if method == "HEAD":
        assert not body, "the answer to HEAD has a body"
        return
    if status == 307:
        assert headers.get("location", "").startswith("/"), "307 without a location"
        assert not body, "307 with a body"
        return
    if status != 200:
        assert 400 <= status <= 599, f"status {status} is none of the protocol"
        if status == 405:
            assert headers.get("allow"), "405 does not say what is allowed"
        _is_json(headers)
        assert "inference-header-content-length" not in headers, "an error is no tensor"
        _fits(ERROR, _parse(body))
        return
    row, answer = _find(method, path, headers, body)
    if row.schema is GENERATE_RESPONSE and headers.get("content-type") in EVENTS:
        assert path.endswith("/generate_stream"), "only generate_stream streams"
        _events(answer)
        return
    if row.schema is INFER_RESPONSE:
        _infer(answer)
        return
    assert not path.endswith("/generate_stream"), "generate_stream streams events"
    _is_json(headers)
    document = _parse(body)
    _fits(row.schema, document)
    if row.further:
        row.further(answer, document)


def _framing(method: str, headers: Mapping[str, str], body: bytes) -> None:
    """RFC 9112 section 6: one way to tell where the body ends, and it is true."""
    length, coding = headers.get("content-length"), headers.get("transfer-encoding")
    assert not (length and coding), "both content-length and transfer-encoding"
    assert length or coding, "neither content-length nor transfer-encoding"
    if coding:
        assert coding.lower() == "chunked", f"the transfer encoding {coding}"
    if length:
        assert re.fullmatch(r"[0-9]+", length), f"content-length is {length!r}"
        assert method == "HEAD" or int(length) == len(body), (
            f"content-length says {length}, the body has {len(body)} bytes"
        )
    assert "content-encoding" not in headers, "nobody asked for a coded body"


def _is_json(headers: Mapping[str, str]) -> None:
    got = headers.get("content-type")
    assert got == "application/json", f"the content type is {got}, not application/json"


def _find(
    method: str, path: str, headers: Mapping[str, str], body: bytes
) -> tuple[_Row, _Answer]:
    for row in _ROWS:
        found = row.path.fullmatch(path)
        if found and row.method == method:
            parts = {
                name: None if raw is None else unquote_to_bytes(raw).decode()
                for name, raw in found.groupdict().items()
            }
            return row, _Answer(
                parts.get("model") or "", parts.get("version"), headers, body
            )
    raise AssertionError(f"200 from {method} {path}, which is not in the protocol")


def _parse(body: bytes) -> Any:
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise AssertionError(f"the body is not UTF-8: {error}") from None
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except ValueError as error:
        raise AssertionError(f"the body is not JSON: {error}") from None


def _once(pairs: list[tuple[str, Any]]) -> Document:
    names = [name for name, _ in pairs]
    assert len(set(names)) == len(names), f"a member comes twice: {names}"
    return dict(pairs)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _fits(schema: Document, document: Any) -> None:
    faults = [
        f"{error.json_path}: {error.message}"
        for error in Draft202012Validator(schema).iter_errors(document)
    ]
    assert not faults, "; ".join(faults)


def _infer(answer: _Answer) -> None:
    """An inference response, all JSON or with binary tensors behind the JSON."""
    header = answer.headers.get("inference-header-content-length")
    content_type = answer.headers.get("content-type")
    json_size = len(answer.body)
    if header is None:
        _is_json(answer.headers)
    else:
        assert content_type == "application/octet-stream", (
            f"a binary answer's content type is {content_type}"
        )
        assert re.fullmatch(r"[0-9]+", header), (
            f"inference-header-content-length is {header!r}"
        )
        json_size = int(header)
        assert json_size <= len(answer.body), (
            f"the header says {json_size} bytes of JSON, the body has "
            f"{len(answer.body)}"
        )
    document = _parse(answer.body[:json_size])
    _fits(INFER_RESPONSE, document)
    _same(answer, document["model_name"])
    if answer.version is not None:
        got = document.get("model_version")
        assert got == answer.version, f"version {got} answers for {answer.version}"
    names = [output["name"] for output in document["outputs"]]
    assert len(set(names)) == len(names), f"two outputs have one name: {names}"
    rest = answer.body[json_size:]
    for output in document["outputs"]:
        rest = _output(output, rest, binary=header is not None)
    assert not rest, f"{len(rest)} bytes are left behind the last tensor"


def _output(output: Document, rest: bytes, *, binary: bool) -> bytes:
    """Check one output; return what is left of the binary part behind it."""
    name, parameters = output["name"], output.get("parameters", {})
    size = parameters.get("binary_data_size")
    if size is None:
        assert "data" in output, f"output {name} has neither data nor a binary size"
        flat = _flat(output["data"], output["shape"], name)
        for element in flat:
            assert _holds(output["datatype"], element), (
                f"output {name}: {element!r} is no {output['datatype']}"
            )
        return rest
    assert binary, f"output {name} is binary, the answer has no header length"
    assert "data" not in output, f"output {name} has data and a binary size"
    assert type(size) is int, f"output {name}: binary_data_size is {size!r}"
    assert 0 <= size <= len(rest), (
        f"output {name} has {size} bytes, {len(rest)} are left"
    )
    count, width = prod(output["shape"]), WIDTHS[output["datatype"]]
    raw, rest = rest[:size], rest[size:]
    if width is not None:
        assert size == count * width, (
            f"output {name}: {count} elements of {width} bytes are not {size} bytes"
        )
        if output["datatype"] == "BOOL":
            assert set(raw) <= {0, 1}, f"output {name}: a BOOL is neither 0 nor 1"
        return rest
    for index in range(count):
        assert len(raw) >= 4, f"output {name}: element {index} has no length"
        length = int.from_bytes(raw[:4], "little")
        assert len(raw) >= 4 + length, (
            f"output {name}: element {index} of {length} bytes is cut off"
        )
        raw = raw[4 + length :]
    assert not raw, f"output {name}: {len(raw)} bytes are behind its last element"
    return rest


def _flat(data: list[Any], shape: list[int], name: str) -> list[Any]:
    """The elements of data that is flat, or nested as the shape says."""
    if not any(isinstance(element, list) for element in data):
        assert len(data) == prod(shape), (
            f"output {name} of shape {shape} has {len(data)} elements"
        )
        return data
    level: list[Any] = [data]
    for size in shape:
        for row in level:
            assert isinstance(row, list), f"output {name} is nested too little"
            assert len(row) == size, f"output {name} is not nested as {shape}"
        level = [element for row in level for element in row]
    assert not any(isinstance(e, list) for e in level), f"output {name} nests too deep"
    return level


def _holds(datatype: str, element: Any) -> bool:
    if datatype == "BOOL":
        return isinstance(element, bool)
    if datatype == "BYTES":
        return isinstance(element, str)
    if isinstance(element, bool):
        return False
    if datatype in ("FP16", "BF16", "FP32", "FP64"):
        return element is None or isinstance(element, (int, float))
    if not isinstance(element, int):
        return False
    bits = 8 * (WIDTHS[datatype] or 0)
    if datatype.startswith("U"):
        return 0 <= element < 1 << bits
    return -(1 << bits - 1) <= element < 1 << bits - 1


def _events(answer: _Answer) -> None:
    """Server-Sent Events, each a generate response; an error may only be the last."""
    text = answer.body.decode()
    assert text.endswith("\n\n") or not text, "the last event does not end"
    events = text.split("\n\n")[:-1]
    for index, event in enumerate(events):
        assert event.startswith("data: "), f"event {index} has no data"
        assert "\n" not in event, f"event {index} has more than one line"
        document = _parse(event.removeprefix("data: ").encode())
        if isinstance(document, dict) and "error" in document:
            _fits(ERROR, document)
            assert index == len(events) - 1, "an event comes behind an error"
        else:
            _fits(GENERATE_RESPONSE, document)
            _generated(answer, document)


def _generated(answer: _Answer, document: Document) -> None:
    _same(answer, document["model_name"])
    if answer.version is not None:
        assert document.get("model_version") == answer.version


def _same(answer: _Answer, name: str) -> None:
    assert name == answer.model, f"{name} answers for {answer.model}"


def _named(answer: _Answer, document: Document) -> None:
    _same(answer, document["name"])


def _described(answer: _Answer, document: Document) -> None:
    _named(answer, document)
    if answer.version is not None:
        assert answer.version in document.get("versions", []), (
            f"version {answer.version} is not among the versions"
        )


def _counted(answer: _Answer, document: Document) -> None:
    for entry in document["model_stats"]:
        if answer.model:
            _same(answer, entry["name"])
        if answer.version is not None:
            assert entry["version"] == answer.version
    if answer.version is not None:
        assert len(document["model_stats"]) == 1, "one version has one entry"


_V2 = r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[^/]+))?"
_LOADED = r"/v2/repository/models/(?P<model>[^/]+)"
_NAMES = _closed(models=_list(NAME))
_STATISTICS = _closed(model_stats=_list(MODEL_STATISTICS))
_ROWS = tuple(
    _Row(method, re.compile(path), schema, further)
    for method, path, schema, further in (
        ("GET", "/", _closed(status={"const": "alive"}), None),
        (
            "GET",
            "/openapi.json",
            {"type": "object", "required": ["openapi", "info", "paths"]},
            None,
        ),
        ("GET", "/v2", SERVER_METADATA, None),
        ("GET", "/v2/health/live", _closed(live={"const": True}), None),
        ("GET", "/v2/health/ready", _closed(ready={"const": True}), None),
        ("GET", "/v2/models", _NAMES, None),
        ("GET", "/v2/models/stats", _STATISTICS, None),
        ("GET", _V2, MODEL_METADATA, _described),
        ("GET", f"{_V2}/ready", _closed(name=NAME, ready={"const": True}), _named),
        ("POST", f"{_V2}/infer", INFER_RESPONSE, None),
        ("POST", f"{_V2}/generate", GENERATE_RESPONSE, _generated),
        ("POST", f"{_V2}/generate_stream", GENERATE_RESPONSE, None),
        ("GET", f"{_V2}/stats", _STATISTICS, _counted),
        ("GET", f"{_V2}/config", MODEL_CONFIG, _named),
        ("POST", "/v2/repository/index", INDEX, None),
        ("POST", f"{_LOADED}/load", _closed(name=NAME, load={"const": True}), _named),
        (
            "POST",
            f"{_LOADED}/unload",
            _closed(name=NAME, unload={"const": True}),
            _named,
        ),
    )
)
