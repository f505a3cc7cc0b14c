"""The headers of an answer that are its handler's: checked, and kept from framing it.

What a handler sets reaches the client unless it would break the message, which is the
author's mistake, or say what only the server knows.
"""

from __future__ import annotations

import re

from kserve_lite.messages import Context
from kserve_lite.rest.replies import JSON
from kserve_lite.wire.events import RawHeaders

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
# The binary tensor extension's header: the bytes of JSON before the tensors.
JSON_SIZE = "inference-header-content-length"
# What frames a message, and its ids, are the server's to say, whatever a handler sets.
_FRAMING = frozenset(
    (
        "x-request-id",
        "traceparent",
        "content-length",
        "transfer-encoding",
        "connection",
        "keep-alive",
        "upgrade",
        JSON_SIZE,
    )
)


def own_headers(context: Context) -> RawHeaders:
    """The headers that the handler set, less those that frame the message.

    Raises ValueError for a name or value that would break the message (RFC 9110 5.5).
    """
    raw = []
    for name, value in context.response_headers.items():
        name, value = name.lower(), str(value).strip(" \t")
        if not _TOKEN.fullmatch(name) or not _VALUE.fullmatch(value):
            raise ValueError(f"the response header {name!r} has a forbidden character")
        if name not in _FRAMING:
            raw.append((name.encode("ascii"), value.encode("latin-1")))
    return tuple(raw)


def with_type(own: RawHeaders, content_type: bytes = JSON[1]) -> RawHeaders:
    """Add a content type unless the handler set one."""
    if any(name == b"content-type" for name, _ in own):
        return own
    return ((b"content-type", content_type), *own)


def without_type(own: RawHeaders) -> RawHeaders:
    return tuple(pair for pair in own if pair[0] != b"content-type") if own else own


def with_fields(fields: RawHeaders, own: RawHeaders) -> RawHeaders:
    """Add fields of the server's, in place of those of the same names."""
    taken = dict(fields)
    return (*fields, *(pair for pair in own if pair[0] not in taken))
