"""CloudEvents for V1: the event of a request in, the event of its answer out.

In binary mode the attributes are `ce-*` headers and the body is the data; in structured
mode the body is a JSON object with both. https://github.com/cloudevents/spec, 1.0.2:
bindings/http-protocol-binding.md ("HTTP" below), formats/json-format.md ("JSON").

The package `cloudevents` says which events there are and makes those of answers; it
takes 35 to 75 ms to import, so that `prepare()` does when the first event comes. How
data and headers are read and written is ours: the package takes three passes of
Python's own json for data, knows no arrays, and leaves percent-encoding out.
"""

from __future__ import annotations

import base64
import binascii
import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import quote, unquote

import orjson

from kserve_lite.codecs import v1
from kserve_lite.codecs.json_tensors import Body, Lane, dumps, loads, read
from kserve_lite.errors import InvalidInput
from kserve_lite.messages import InferRequest

# Reads tensors from a node of JSON; see `v1.build_tensors`.
Build: TypeAlias = Callable[[Any, Lane], InferRequest]

STRUCTURED_TYPE = "application/cloudevents+json"
TEXT = b"text/plain; charset=utf-8"
OCTETS = b"application/octet-stream"
_JSON_TYPE = "application/json"
_TYPE = "io.kserve.inference.response"
_REQUIRED = ("id", "source", "specversion", "type")
_HEADERS = tuple(f"ce-{name}" for name in _REQUIRED)
# What an answer's event has of its own, whatever came.
_OWN = frozenset(
    ("data", "datacontentencoding", "datacontenttype", "id", "specversion", "time")
)
# A longer version is not repeated to the client that sent it.
_MAX_SHOWN = 64
# What headers hold as it is: HTTP 3.1.3.2.
_SAFE = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) not in '"%')


@dataclass(frozen=True, slots=True)
class EventSettings:
    """What the CloudEvents that answer say of themselves.

    ce_type: the type of CloudEvents that answer.
    ce_source: their source; without it io.kserve.inference.<name of the model>.
    ce_merge: whether they have the attributes of the request's event, extensions
        included, where they have none of their own.
    """

    ce_type: str = _TYPE
    ce_source: str = ""
    ce_merge: bool = False


class Mode(enum.Enum):
    """How an event comes, and its answer goes."""

    BINARY = "attributes in headers, data in the body"
    STRUCTURED = "all in one JSON object"
    OTHER = "several at once, or in a format that is not read here"


class Event(NamedTuple):
    """An event that came. payload: its data, as the handler gets it."""

    attributes: dict[str, Any]
    payload: Any


def mode_of(headers: Mapping[str, str]) -> Mode | None:
    """How a request is an event, by its headers; None: it is none (HTTP 3)."""
    media = _media_type(headers.get("content-type", ""))
    if media.startswith("application/cloudevents"):
        return Mode.STRUCTURED if media == STRUCTURED_TYPE else Mode.OTHER
    # As in KServe, one that lacks a required attribute is an ordinary request.
    return Mode.BINARY if all(name in headers for name in _HEADERS) else None


def prepared() -> bool:
    """Whether nothing is left to import."""
    return bool(_package.cache_info().currsize)


def prepare() -> None:
    """Import what events need; in a thread, if others wait."""
    _package()


@cache
def _package() -> Any:
    """The package's older interface, which its version 2 has under another name.

    KServe's SDK, which may be installed beside, wants a version before 2.
    """
    try:
        return import_module("cloudevents.v1.http")
    except ImportError:
        return import_module("cloudevents.http")


# --- what comes ---


def read_event(
    mode: Mode,
    headers: Mapping[str, str],
    body: Body,
    build: Build | None,
    check: Callable[[Any], Any] = v1.checked,
) -> Event:
    """Read a binary or structured event.

    build: reads the data as tensors; None: the payload is the data's JSON value, or
    what `check` makes of that.
    Data that was sent as bytes is JSON whatever its type says, as in V1; where it is
    not, and is not said to be, the payload is the bytes.
    Raises InvalidInput.
    """
    if mode is Mode.BINARY:
        attributes: dict[str, Any] = {
            name[3:]: unquote(value)
            for name, value in headers.items()
            if name.startswith("ce-")
        }
        # HTTP 3.1.3: this one attribute is the content type.
        attributes["datacontenttype"] = headers.get("content-type", "")
        _check(attributes)
        return Event(attributes, _payload(body, attributes, build, check))
    if build is None:
        members = loads(body)
        members = members if isinstance(members, dict) else None
        return _unwrapped(members, check, lambda node: node, None)

    def unwrapped(root: Any, lane: Lane) -> Event:
        data_of = lambda node: build(node, lane)  # noqa: E731
        return _unwrapped(lane.members(root), data_of, lane.plain, build)

    return read(body, unwrapped)


def _unwrapped(
    members: dict[str, Any] | None,
    data_of: Callable[[Any], Any],
    plain: Callable[[Any], Any],
    build: Build | None,
) -> Event:
    """An event from the members of its envelope (JSON 3)."""
    if members is None:
        raise InvalidInput("The event must be a JSON object.")
    members = dict(members)
    encoded = members.pop("data_base64", None)
    has_data = "data" in members
    data = members.pop("data", None)
    attributes = {name: plain(node) for name, node in members.items()}
    _check(attributes)
    if attributes.get("datacontentencoding") == "base64":  # version 0.3
        encoded, has_data = data, False
    if has_data == (encoded is not None):
        raise InvalidInput("The event must have data, or data_base64, and not both.")
    if has_data:
        return Event(attributes, data_of(data))
    octets = _decoded(plain(encoded))
    return Event(attributes, _payload(octets, attributes, build, data_of))


def _decoded(text: Any) -> bytes:
    try:
        return binascii.a2b_base64(text.encode("ascii"), strict_mode=True)
    except (AttributeError, ValueError):
        raise InvalidInput("The event's data is no valid base64.") from None


def _payload(
    data: Body,
    attributes: Mapping[str, Any],
    build: Build | None,
    check: Callable[[Any], Any],
) -> Any:
    """The payload of data that is bytes."""
    if build is not None:
        return read(data, build)
    try:
        value = loads(data)
    except InvalidInput:
        if _says_json(attributes):
            raise
        return bytes(data)
    return check(value)


def _check(attributes: Mapping[str, Any]) -> None:
    """Raise InvalidInput for attributes that no event has."""
    for name in _REQUIRED:
        value = attributes.get(name)
        if type(value) is not str or not value:
            raise InvalidInput(f'The event has no "{name}", which must be text.')
    headers = {f"ce-{name}": attributes[name] for name in _REQUIRED}
    package = _package()
    try:
        # Only these: an extension called "extensions" would be too much for it.
        package.from_http(headers, None)
    except Exception:  # noqa: BLE001 - its kinds of errors differ between versions
        version = attributes["specversion"]
        shown = version if len(version) <= _MAX_SHOWN and version.isprintable() else ""
        reason = f"Found invalid specversion {shown}".rstrip()
        # KServe's words.
        raise InvalidInput(f"Cloud Event Exceptions: {reason}") from None


def _media_type(text: str) -> str:
    """A content type without parameters, which has no case (RFC 9110 8.3.1)."""
    return text.partition(";")[0].strip().lower()


def _says_json(attributes: Mapping[str, Any]) -> bool:
    """Whether data is said to be JSON: JSON 3.1 does where nothing is said.

    `curl -d` says that it is a form unless it is told otherwise.
    """
    said = attributes.get("datacontenttype") or _JSON_TYPE
    if not isinstance(said, str):
        return False
    return _media_type(said) == "application/x-www-form-urlencoded" or _is_json(said)


def _is_json(content_type: str) -> bool:
    return _media_type(content_type).endswith(("/json", "+json"))


# --- what goes ---


def answering(
    received: Event, model_name: str, settings: EventSettings
) -> dict[str, Any]:
    """The attributes of the event that answers another one: a new one's."""
    attributes: dict[str, Any] = {}
    if settings.ce_merge:
        # The package would take "TYPE" for "type".
        attributes = {
            name: value
            for name, value in received.attributes.items()
            if name not in _OWN and name == name.lower()
        }
    attributes["type"] = _scalar(settings.ce_type or _TYPE)
    source = settings.ce_source or f"io.kserve.inference.{model_name}"
    attributes["source"] = _scalar(source)
    event = _package().CloudEvent(attributes)
    return {name: event[name] for name in event}


def _scalar(text: str) -> str:
    """Text without what is no Unicode scalar value, as variables may have it."""
    return text.encode(errors="replace").decode()


def header_fields(attributes: Mapping[str, Any]) -> tuple[tuple[bytes, bytes], ...]:
    """The attributes of a binary event as header fields (HTTP 3.1.3.2)."""
    return tuple(
        (f"ce-{name}".encode("ascii"), quote(value, _SAFE, errors="replace").encode())
        for name, value in attributes.items()
    )


def raw_type(data: bytes) -> bytes:
    """The type of data of which its author says none."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return OCTETS
    return TEXT


def envelope(
    attributes: Mapping[str, Any], data: bytes, content_type: str = ""
) -> bytes:
    """A structured event.

    data: JSON, unless there is a content type: then bytes, which are JSON, text or
    base64 in the event (JSON 3.1).
    """
    members = dict(attributes)
    if not content_type:
        members["data"] = orjson.Fragment(data)
        return dumps(members)
    members["datacontenttype"] = content_type
    try:
        if _is_json(content_type):
            loads(data)
            members["data"] = orjson.Fragment(data)
        else:
            members["data"] = data.decode()
    except (InvalidInput, UnicodeDecodeError):
        members["data_base64"] = base64.b64encode(data).decode("ascii")
    return dumps(members)
