"""HTTP/2 header blocks: field lists in and out (RFC 7541, RFC 9113 section 8).

Reading: `hpack_decoder` decodes, the rules of RFC 9113 section 8 are applied once, and
the finished head is remembered by the bytes of its block. That is sound only while the
dynamic table is as it was, so any change of it forgets everything.

Writing: blocks are stateless. Fields stand as indexes into the static table or as
literals without indexing (RFC 7541 6.2.2), so that a block depends on nothing but its
fields and is made once in a process rather than once for each answer.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

from hpack.table import HeaderTable

from kserve_lite.wire.events import ID_NAMES, Headers, Ids, RawHeaders
from kserve_lite.wire.frames import ErrorCode, StreamFault
from kserve_lite.wire.hpack_decoder import Decoder, Field
from kserve_lite.wire.limits import (
    HEAD_EXCESS,
    REMEMBERED_HEAD_SIZE,
    REMEMBERED_HEADS,
    WireLimits,
)

# RFC 9110 5.6.2, less upper case (RFC 9113 8.2).
_is_name = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+").fullmatch
# RFC 9113 8.2.1 forbids NUL, CR, LF and surrounding blanks. The other control
# characters are no part of a field value either (RFC 9110 5.5).
_is_value = re.compile(
    rb"(?:[!-~\x80-\xff](?:[\t -~\x80-\xff]*[!-~\x80-\xff])?)?"
).fullmatch
_is_method = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+").fullmatch
_is_scheme = re.compile(rb"[A-Za-z][A-Za-z0-9+\-.]*").fullmatch
_is_path = re.compile(rb"/[!-~]*").fullmatch
# No userinfo (RFC 9113 8.3.1), nothing that ends an authority (RFC 3986 3.2).
_is_authority = re.compile(rb"[^\x00-\x20/?#@\\\x7f-\xff]+").fullmatch
_is_length = re.compile(rb"[0-9]{1,15}").fullmatch

_PSEUDO = frozenset((b":method", b":scheme", b":path", b":authority"))
# RFC 9113 8.2.2: of the connection, which HTTP/2 frames itself.
_OF_CONNECTION = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"transfer-encoding",
        b"upgrade",
    )
)


class Head(NamedTuple):
    """What one header block means as a request's head.

    length: the announced content-length; -1: none. refused: the status and reason that
    the request is answered with instead of being served. special: it is more than a
    plain request, as HEAD, an expectation and a refusal are.
    """

    method: str
    target: str
    headers: Headers
    length: int = -1
    expects_continue: bool = False
    refused: tuple[int, str] | None = None
    special: bool = False


class HeaderReader:
    """The peer's header blocks, in the order in which they came.

    `remembered` may be looked into before `read_head()`: what is in it is valid.
    """

    def __init__(self, limits: WireLimits) -> None:
        self.remembered: dict[bytes, Head] = {}
        self._limits = limits
        self._decoder = Decoder(HEAD_EXCESS * limits.max_head_size)
        self._changed = False  # by the last block

    def read_head(self, block: bytes) -> Head:
        """Read a request's head; raises StreamFault where it is malformed."""
        head = self.remembered.get(block)
        if head is not None:
            return head
        fields, size = self._decode(block)
        if size > self._limits.max_head_size:
            return _refused(
                fields,
                431,
                f"The request's head is larger than {self._limits.max_head_size} "
                "bytes (max_head_size).",
            )
        head = _request_head(fields, self._limits.max_body_size)
        if len(block) <= REMEMBERED_HEAD_SIZE >= size and not self._changed:
            if len(self.remembered) >= REMEMBERED_HEADS:
                self.remembered.clear()
            self.remembered[block] = head
        return head

    def read_trailers(self, block: bytes) -> None:
        """Check trailers, of which nothing is kept; raises StreamFault."""
        fields, size = self._decode(block)
        if size > self._limits.max_head_size:
            raise StreamFault(ErrorCode.ENHANCE_YOUR_CALM)
        for name, value in fields:
            # RFC 9113 8.1: no pseudo-header stands in trailers. Its colon fits no name.
            _check_field(name, value)

    def skip(self, block: bytes) -> None:
        """Keep the state of the compression only (RFC 9113 4.3)."""
        if block not in self.remembered:
            self._decode(block)

    def _decode(self, block: bytes) -> tuple[list[Field], int]:
        """Return the fields and their size; forget what is no longer valid."""
        before = self._decoder.changes
        fields, size = self._decoder.decode(block)
        self._changed = self._decoder.changes != before
        if self._changed:
            self.remembered.clear()
        return fields, size


class _Malformed(StreamFault):
    """RFC 9113 8.1.1: a malformed request is a stream error."""

    def __init__(self, reason: str) -> None:
        super().__init__(ErrorCode.PROTOCOL_ERROR)
        self.reason = reason


def _refused(fields: list[Field], status: int, reason: str) -> Head:
    # Whether it was HEAD decides what an answer may carry, so that much is told.
    method = "HEAD" if (b":method", b"HEAD") in fields else "GET"
    return Head(method, "", Headers(), refused=(status, reason), special=True)


@functools.lru_cache(maxsize=256)
def _check_name(name: bytes) -> None:
    """RFC 9113 8.2.1 and 8.2.2. Names are few: each is looked at once."""
    if not _is_name(name):
        raise _Malformed("a field name is not valid")
    if name in _OF_CONNECTION:
        raise _Malformed("a field belongs to the connection")


def _check_field(name: bytes, value: bytes) -> None:
    if len(name) <= 64:
        _check_name(name)
    else:
        _check_name.__wrapped__(name)  # Long ones would fill the memory.
    if not _is_value(value):
        raise _Malformed("a field value is not valid")
    if name == b"te" and value.lower() != b"trailers":
        raise _Malformed("te says something else than trailers")


def _request_head(fields: list[Field], max_body_size: int) -> Head:
    pseudo, regular = _split_pseudo(fields)
    if pseudo.get(b":method") == b"CONNECT":
        return _connect(pseudo, fields)
    method = pseudo.get(b":method", b"")
    path = pseudo.get(b":path", b"")
    scheme = pseudo.get(b":scheme", b"")
    if not (_is_method(method) and _is_scheme(scheme)):
        raise _Malformed(":method or :scheme is missing or not valid")
    if not _is_path(path) and not (path == b"*" and method == b"OPTIONS"):
        raise _Malformed(":path is missing or not valid")
    names = {name for name, _ in regular}
    if b"cookie" in names:
        regular = _join_cookies(regular)
    authority = pseudo.get(b":authority")
    if b"host" in names or authority is None:
        raw = _with_host(authority, scheme, regular)
    else:
        _check_authority(authority)
        raw = ((b"host", authority), *regular)
    length = _announced_length(raw) if b"content-length" in names else -1
    expects = b"expect" in names
    if length > max_body_size:
        return _refused(
            fields,
            413,
            f"The body may have {max_body_size} bytes (max_body_size); "
            f"{length} bytes were announced.",
        )
    if expects and not _is_expectation(raw):
        return _refused(fields, 417, "The only expectation served is 100-continue.")
    return Head(
        method.decode("ascii"),
        path.decode("ascii"),
        Headers(raw),
        length,
        expects,
        special=expects or method == b"HEAD",
    )


def _split_pseudo(fields: list[Field]) -> tuple[dict[bytes, bytes], list[Field]]:
    """RFC 9113 8.3: pseudo-headers come first, each known and once."""
    pseudo: dict[bytes, bytes] = {}
    regular: list[Field] = []
    for field in fields:
        name, value = field
        if name[:1] == b":":
            if regular:
                raise _Malformed("a pseudo-header follows a field")
            if name not in _PSEUDO or name in pseudo:
                raise _Malformed("a pseudo-header is unknown or repeated")
            pseudo[name] = value
        else:
            _check_field(name, value)
            regular.append(field)
    return pseudo, regular


def _connect(pseudo: dict[bytes, bytes], fields: list[Field]) -> Head:
    """RFC 9113 8.5: a tunnel, which a model server has no use for."""
    if b":path" in pseudo or b":scheme" in pseudo or not pseudo.get(b":authority"):
        raise _Malformed("CONNECT has :authority and neither :scheme nor :path")
    return _refused(fields, 501, "CONNECT is not served.")


def _check_authority(authority: bytes) -> None:
    if not _is_authority(authority):
        raise _Malformed(":authority or host is not valid")


def _with_host(
    authority: bytes | None, scheme: bytes, regular: list[Field]
) -> RawHeaders:
    """RFC 9113 8.3.1: :authority and host say the same, and one of them is there."""
    hosts = [value for name, value in regular if name == b"host"]
    if len(hosts) > 1:
        raise _Malformed("host is repeated")
    if hosts:
        _check_authority(hosts[0])
        if authority is not None and authority.lower() != hosts[0].lower():
            raise _Malformed(":authority and host differ")
    elif scheme.lower() in (b"http", b"https"):
        raise _Malformed("neither :authority nor host is there")
    return tuple(regular)


def _join_cookies(regular: list[Field]) -> list[Field]:
    """RFC 9113 8.2.3: a cookie that was split for compression is one field again."""
    cookies = [value for name, value in regular if name == b"cookie"]
    place = next(i for i, (name, _) in enumerate(regular) if name == b"cookie")
    others = [field for field in regular if field[0] != b"cookie"]
    others.insert(place, (b"cookie", b"; ".join(cookies)))
    return others


def _announced_length(fields: RawHeaders) -> int:
    """RFC 9110 8.6: several that say the same are one."""
    values = {value for name, value in fields if name == b"content-length"}
    if len(values) > 1 or not _is_length(value := values.pop()):
        raise _Malformed("content-length is not valid")
    return int(value)


def _is_expectation(fields: RawHeaders) -> bool:
    """RFC 9110 10.1.1: there is only one that is known."""
    return all(
        value.lower() == b"100-continue" for name, value in fields if name == b"expect"
    )


# --- writing ------------------------------------------------------------------------

# RFC 7541 6.3: our table has size 0. Said where the peer lowers its setting (4.2).
TABLE_UPDATE = b"\x20"

_STATIC_NAMES: dict[bytes, int] = {}
_STATIC_FIELDS: dict[Field, int] = {}
for _index, _field in enumerate(HeaderTable.STATIC_TABLE, 1):
    _STATIC_NAMES.setdefault(_field[0], _index)
    if _field[1]:
        _STATIC_FIELDS[_field] = _index

_NOT_INDEXED = 0x00
_NEVER_INDEXED = 0x10
# RFC 7541 7.1.3: no proxy on the way is to keep these in a table either.
_SECRET = frozenset((b"set-cookie", b"authorization", b"proxy-authorization"))


def encode_integer(value: int, bits: int, pattern: int) -> bytes:
    """RFC 7541 5.1: an integer behind the bits of `pattern`."""
    most = (1 << bits) - 1
    if value < most:
        return bytes((pattern | value,))
    encoded = bytearray((pattern | most,))
    value -= most
    while value >= 128:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def encode_field(name: bytes, value: bytes) -> bytes:
    """One field, without use of the dynamic table and without Huffman coding.

    Huffman coding would save a third of what little is sent and cost the client more
    time than a short read does.
    """
    index = _STATIC_FIELDS.get((name, value))
    if index is not None:
        return encode_integer(index, 7, 0x80)
    pattern = _NEVER_INDEXED if name in _SECRET else _NOT_INDEXED
    index = _STATIC_NAMES.get(name)
    if index is not None:
        encoded = encode_integer(index, 4, pattern)
    else:
        encoded = bytes((pattern,)) + encode_integer(len(name), 7, 0) + name
    return encoded + encode_integer(len(value), 7, 0) + value


_ID_PREFIXES = [
    bytes((_NOT_INDEXED,)) + encode_integer(len(name), 7, 0) + name for name in ID_NAMES
]


def encode_ids(ids: Ids) -> bytes:
    """The ids of an answer, to be put behind a block that was made before."""
    request_id, traceparent = ids
    return b"".join(
        (
            _ID_PREFIXES[0],
            encode_integer(len(request_id), 7, 0),
            request_id,
            _ID_PREFIXES[1],
            encode_integer(len(traceparent), 7, 0),
            traceparent,
        )
    )


@functools.lru_cache(maxsize=256)
def encode_block(status: int, headers: RawHeaders) -> bytes:
    """The block of an answer's head; of trailers with status 0.

    Fields of the connection are left out: an answer made for HTTP/1.1 may have them.
    """
    start = encode_field(b":status", b"%d" % status) if status else b""
    return start + b"".join(
        encode_field(name, value)
        for name, value in ((name.lower(), value) for name, value in headers)
        if name not in _OF_CONNECTION
    )


_CONTENT_LENGTH = encode_integer(_STATIC_NAMES[b"content-length"], 4, _NOT_INDEXED)


def encode_length(length: int) -> bytes:
    """A content-length, to be put behind a block that was made before."""
    digits = b"%d" % length
    return _CONTENT_LENGTH + bytes((len(digits),)) + digits
