"""What the REST API answers with, and the table from kinds of errors to statuses."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import NamedTuple

import orjson

from kserve_lite.errors import InferenceFault, Kind
from kserve_lite.wire.events import Buffer, RawHeaders

# Total over the kinds, which a test holds. Nobody sees a cancelled request's answer.
STATUS: dict[Kind, int] = {
    Kind.INVALID_INPUT: 400,
    Kind.NOT_FOUND: 404,
    Kind.NOT_READY: 503,
    Kind.UNSUPPORTED: 501,
    Kind.FORBIDDEN: 403,
    Kind.OVERLOADED: 503,
    Kind.DEADLINE_EXCEEDED: 504,
    Kind.CANCELLED: 503,
    Kind.MODEL_FAILED: 500,
    Kind.INTERNAL: 500,
}

JSON = (b"content-type", b"application/json")


class Reply(NamedTuple):
    """An HTTP answer.

    A list as body is its pieces in order, large tensors among them as they lie in
    memory; a generator streams, its items already bytes.
    """

    status: int
    headers: RawHeaders
    body: Buffer | list[Buffer] | AsyncGenerator[bytes, None]


def json_reply(body: bytes, status: int = 200, headers: RawHeaders = ()) -> Reply:
    """An answer whose body is JSON text already."""
    return Reply(status, (JSON, *headers), body)


def error_reply(status: int, reason: str, headers: RawHeaders = ()) -> Reply:
    """The one shape of every error: `{"error": reason}`."""
    return json_reply(orjson.dumps({"error": reason}), status, headers)


def error_body(fault: InferenceFault) -> bytes:
    """The body of a fault's answer."""
    # A handler may word a fault with text from anywhere: what is no Unicode scalar
    # value cannot be JSON.
    return orjson.dumps({"error": fault.reason.encode(errors="replace").decode()})


def fault_reply(fault: InferenceFault) -> Reply:
    """Translate a fault."""
    headers: RawHeaders = ()
    if fault.kind is Kind.OVERLOADED:
        headers = ((b"retry-after", b"1"),)
    return json_reply(error_body(fault), STATUS[fault.kind], headers)
