"""CloudEvents read and written, against the package `cloudevents` as the other side."""

from __future__ import annotations

import base64
import json
import math
from functools import partial
from importlib import import_module
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kserve_lite.codecs import cloudevents, json_tensors, v1
from kserve_lite.codecs.cloudevents import Event, EventSettings, Mode
from kserve_lite.errors import InvalidInput

try:
    PACKAGE: Any = import_module("cloudevents.v1.http")
except ImportError:
    PACKAGE = import_module("cloudevents.http")

CE = {
    "ce-specversion": "1.0",
    "ce-id": "1",
    "ce-source": "/s",
    "ce-type": "t",
}
ENVELOPE = {name[3:]: value for name, value in CE.items()}
INSTANCES = {"instances": [[1, 2], [3, 4]]}
NAMES = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=1, max_size=20)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
NO_DATATYPES: dict[str, str] = {}
BUILD = partial(
    v1.build_tensors, model_name="m", datatype_of=NO_DATATYPES.get, unnamed="input-0"
)


def binary(body: bytes, content_type: str | None = None, **more: str) -> Any:
    """The payload of a binary event for a handler that takes JSON."""
    headers = CE | ({} if content_type is None else {"content-type": content_type})
    return cloudevents.read_event(Mode.BINARY, headers | more, body, None).payload


def structured(members: Any) -> Event:
    body = members if isinstance(members, bytes) else json.dumps(members).encode()
    return cloudevents.read_event(Mode.STRUCTURED, {}, body, None)


# --- which requests are events --------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "mode"),
    [
        (CE, Mode.BINARY),
        (CE | {"content-type": "application/json"}, Mode.BINARY),
        (CE | {"content-type": "avro/binary"}, Mode.BINARY),
        ({"content-type": "application/cloudevents+json"}, Mode.STRUCTURED),
        (
            {"content-type": " Application/CloudEvents+JSON ; charset=UTF-8"},
            Mode.STRUCTURED,
        ),
        # HTTP 3: the content type decides, whatever other headers say.
        (CE | {"content-type": "application/cloudevents+json"}, Mode.STRUCTURED),
        ({"content-type": "application/cloudevents-batch+json"}, Mode.OTHER),
        ({"content-type": "application/cloudevents+avro"}, Mode.OTHER),
        ({"content-type": "application/cloudevents"}, Mode.OTHER),
        ({}, None),
        ({"content-type": "application/json; charset=utf-8"}, None),
        ({"content-type": "text/plain"}, None),
    ],
)
def test_modes(headers: dict[str, str], mode: Mode | None) -> None:
    assert cloudevents.mode_of(headers) is mode


@pytest.mark.parametrize("missing", CE)
def test_a_required_attribute_that_lacks(missing: str) -> None:
    headers = {name: value for name, value in CE.items() if name != missing}
    assert cloudevents.mode_of(headers) is None
    members = {n: v for n, v in ENVELOPE.items() if n != missing[3:]} | {"data": 1}
    with pytest.raises(InvalidInput, match=f'no "{missing[3:]}"'):
        structured(members)


# --- data -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "application/json",
        "Application/JSON; charset=utf-8",
        "application/x-www-form-urlencoded",
        "application/vnd.x+json",
        "text/json",
        "text/plain",
        "application/octet-stream",
    ],
)
def test_data_is_json_where_it_can_be(content_type: str | None) -> None:
    assert binary(b'{"instances": [1]}', content_type) == {"instances": [1]}


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "application/json",
        "APPLICATION/json;v=1",
        "application/x-www-form-urlencoded; charset=utf-8",
        "application/vnd.x+json",
    ],
)
@pytest.mark.parametrize("body", [b"{", b"", b"\xff", b"Obj\x01"])
def test_data_that_should_be_json(content_type: str | None, body: bytes) -> None:
    with pytest.raises(InvalidInput, match="Unrecognized request format"):
        binary(body, content_type)


@pytest.mark.parametrize("body", [b"Obj\x01\x04\xff", b"", b"a,b\n"])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_data_of_another_type_is_bytes(body: bytes, kind: type) -> None:
    payload = binary(kind(body), "avro/binary")
    assert (type(payload), payload) == (bytes, body)
    encoded = base64.b64encode(body).decode()
    members = ENVELOPE | {"datacontenttype": "avro/binary", "data_base64": encoded}
    assert structured(members).payload == body


def test_instances_that_are_no_list() -> None:
    for content_type in ("application/json", "text/plain"):
        with pytest.raises(InvalidInput, match="to be a list"):
            binary(b'{"instances": 1}', content_type)
    with pytest.raises(InvalidInput, match="to be a list"):
        structured(ENVELOPE | {"data": {"instances": 1}})


@pytest.mark.parametrize("value", [None, 1.5, "text", [1], {"a": {"b": [1]}}])
@pytest.mark.parametrize("declared", [None, "text/xml", "application/json", 5])
def test_structured_data_is_as_it_stands(value: Any, declared: Any) -> None:
    event = structured(ENVELOPE | {"datacontenttype": declared, "data": value})
    assert event.payload == value
    assert event.attributes == ENVELOPE | {"datacontenttype": declared}


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (b"[]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b"{", "Unrecognized request format"),
        (ENVELOPE, "must have data"),
        (ENVELOPE | {"data": 1, "data_base64": ""}, "and not both"),
        (ENVELOPE | {"data_base64": None}, "must have data"),
        (ENVELOPE | {"data_base64": "a"}, "no valid base64"),
        (ENVELOPE | {"data_base64": "é==="}, "no valid base64"),
        (ENVELOPE | {"data_base64": ["YQ=="]}, "no valid base64"),
        (ENVELOPE | {"id": 7, "data": 1}, 'no "id"'),
        (ENVELOPE | {"source": "", "data": 1}, 'no "source"'),
        (ENVELOPE | {"specversion": [], "data": 1}, 'no "specversion"'),
        (ENVELOPE | {"type": None, "data": 1}, 'no "type"'),
    ],
)
def test_what_is_no_event(members: Any, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        structured(members)


@pytest.mark.parametrize(
    ("version", "shown"),
    [
        ("9", " 9"),
        ("1", " 1"),
        ("x" * 64, " " + "x" * 64),
        ("x" * 65, ""),
        ("1.0\x1b[2J", ""),
    ],
)
def test_versions_that_are_not_known(version: str, shown: str) -> None:
    expected = f"Cloud Event Exceptions: Found invalid specversion{shown}"
    with pytest.raises(InvalidInput) as caught:
        binary(b"1", **{"ce-specversion": version})
    assert caught.value.reason == expected
    with pytest.raises(InvalidInput) as caught:
        structured(ENVELOPE | {"specversion": version, "data": 1})
    assert caught.value.reason == expected


def test_base64_of_the_version_before() -> None:
    data = base64.b64encode(json.dumps(INSTANCES).encode()).decode()
    old = {"specversion": "0.3", "datacontentencoding": "base64", "data": data}
    assert structured(ENVELOPE | old).payload == INSTANCES


def test_names_that_mean_something_to_the_package() -> None:
    names = ("data", "extensions", "contenttype", "get", "_attributes", "custom-one")
    headers = {f"ce-{name}": "x" for name in names}
    assert binary(b"[1]", "application/json", **headers) == [1]
    assert structured(ENVELOPE | dict.fromkeys(names, "x")).payload == "x"


@pytest.mark.parametrize("size", [0, math.inf], ids=["fast", "referee"])
@pytest.mark.parametrize("data", [INSTANCES, {"inputs": {"input-0": [[1, 2], [3, 4]]}}])
def test_tensors(size: float, data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_tensors, "FAST_BODY_SIZE", size)
    text = json.dumps(data).encode()
    encoded = base64.b64encode(text).decode()
    extension = {"list": [1, [2]], "object": {"a": "[{"}}
    bodies = [
        ENVELOPE | {"data": data},
        ENVELOPE | extension | {"data": data},
        ENVELOPE | {"datacontenttype": "avro/binary", "data_base64": encoded},
    ]
    events = [
        cloudevents.read_event(Mode.STRUCTURED, {}, json.dumps(body).encode(), BUILD)
        for body in bodies
    ]
    events.append(cloudevents.read_event(Mode.BINARY, CE, text, BUILD))
    for event in events:
        (tensor,) = event.payload.inputs
        assert (tensor.name, tensor.datatype) == ("input-0", "INT64")
        assert tensor.array.tolist() == [[1, 2], [3, 4]]
    assert events[1].attributes == ENVELOPE | extension


@pytest.mark.parametrize("size", [0, math.inf], ids=["fast", "referee"])
@pytest.mark.parametrize(
    "members",
    [
        ENVELOPE,
        ENVELOPE | {"data": "text"},
        ENVELOPE | {"data": None},
        ENVELOPE | {"data": {"instances": [["a"], [1]]}},
        ENVELOPE | {"data_base64": "/w=="},
        {"data": INSTANCES},
        [],
    ],
)
def test_what_are_no_tensors(
    size: float, members: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_tensors, "FAST_BODY_SIZE", size)
    with pytest.raises(InvalidInput):
        cloudevents.read_event(Mode.STRUCTURED, {}, json.dumps(members).encode(), BUILD)


# --- answers --------------------------------------------------------------------------


def answering(attributes: dict[str, Any], **given: Any) -> dict[str, Any]:
    made = cloudevents.answering(Event(attributes, None), "m", EventSettings(**given))
    assert made.pop("id") not in ("1", "")
    assert made.pop("time").endswith("+00:00")
    return made


def test_attributes_of_an_answer() -> None:
    plain = {
        "specversion": "1.0",
        "type": "io.kserve.inference.response",
        "source": "io.kserve.inference.m",
    }
    assert answering(ENVELOPE) == plain
    own = {"ce_type": "T", "ce_source": "S"}
    assert answering(ENVELOPE, **own) == plain | {"type": "T", "source": "S"}
    assert answering(ENVELOPE, ce_type="", ce_source="") == plain
    assert answering({}, ce_source="a\udcff") == plain | {"source": "a?"}


def test_merged_attributes() -> None:
    came = ENVELOPE | {
        "specversion": "0.3",
        "time": "2021-01-28T21:04:43Z",
        "datacontenttype": "application/x-www-form-urlencoded",
        "datacontentencoding": "base64",
        "subject": "s",
        "custom-extension": "x",
        "number": 7,
        "extensions": "e",
        "SPECVERSION": "7",
        "TYPE": "not t",
    }
    assert answering(came, ce_merge=True) == {
        "specversion": "1.0",
        "type": "io.kserve.inference.response",
        "source": "io.kserve.inference.m",
        "subject": "s",
        "custom-extension": "x",
        "number": 7,
        "extensions": "e",
    }


@given(
    extensions=st.dictionaries(NAMES, TEXT, max_size=4),
    name=TEXT,
    data=st.recursive(
        st.none() | st.booleans() | st.integers(-(2**53), 2**53) | TEXT,
        lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
        max_leaves=5,
    ),
)
@settings(max_examples=100, deadline=None)
def test_what_is_written_is_read(
    extensions: dict[str, str], name: str, data: Any
) -> None:
    attributes = cloudevents.answering(
        Event(ENVELOPE | extensions, None), name, EventSettings(ce_merge=True)
    )
    assert attributes["source"] == f"io.kserve.inference.{name}"
    body = v1.encode(data)
    event = structured(cloudevents.envelope(attributes, body))
    assert event == Event(attributes, data)
    fields = cloudevents.header_fields(attributes)
    for _, value in fields:
        assert all(0x21 <= code <= 0x7E for code in value)
        assert b'"' not in value
    headers = {n.decode(): v.decode() for n, v in fields}
    event = cloudevents.read_event(Mode.BINARY, headers, body, None)
    assert event.payload == data
    assert {n: event.attributes[n] for n in attributes} == attributes


def test_the_package_reads_what_is_written() -> None:
    attributes = cloudevents.answering(Event({}, None), "m", EventSettings())
    body = json.dumps({"predictions": [1]}).encode()
    fields = cloudevents.header_fields(attributes)
    headers = {name.decode(): value.decode() for name, value in fields}
    kind = {"content-type": "application/cloudevents+json"}
    for event in (
        PACKAGE.from_http(headers, body),
        PACKAGE.from_http(kind, cloudevents.envelope(attributes, body)),
    ):
        assert event.get_data() == {"predictions": [1]}
        assert {name: event[name] for name in attributes} == attributes


@pytest.mark.parametrize(
    ("data", "content_type", "member"),
    [
        (b"a,b", "text/csv", {"data": "a,b"}),
        (b"[1]", "application/x+json; v=1", {"data": [1]}),
        (b"[1", "application/json", {"data_base64": "WzE="}),
        (b"\xff", "image/png", {"data_base64": "/w=="}),
        (b"", "text/plain", {"data": ""}),
    ],
)
def test_data_that_the_handler_wrote(
    data: bytes, content_type: str, member: dict[str, Any]
) -> None:
    written = json.loads(cloudevents.envelope(ENVELOPE, data, content_type))
    assert written == ENVELOPE | {"datacontenttype": content_type} | member


def test_types_of_data_of_which_nothing_is_said() -> None:
    assert cloudevents.raw_type("é".encode()) == b"text/plain; charset=utf-8"
    assert cloudevents.raw_type(b"\xff") == b"application/octet-stream"
