"""What HTTP/2 frames are made of: their numbers, layouts and error codes (RFC 9113).

Constants and packing only. What a frame means is `http2.py`'s business.
"""

from __future__ import annotations

import enum
import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

# RFC 9113 section 6. Plain integers: each frame compares several of them.
DATA = 0
HEADERS = 1
PRIORITY = 2
RST_STREAM = 3
SETTINGS = 4
PUSH_PROMISE = 5
PING = 6
GOAWAY = 7
WINDOW_UPDATE = 8
CONTINUATION = 9

END_STREAM = 0x1
ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
HAS_PRIORITY = 0x20

# RFC 9113 section 6.5.2
SETTINGS_HEADER_TABLE_SIZE = 1
SETTINGS_ENABLE_PUSH = 2
SETTINGS_MAX_CONCURRENT_STREAMS = 3
SETTINGS_INITIAL_WINDOW_SIZE = 4
SETTINGS_MAX_FRAME_SIZE = 5
SETTINGS_MAX_HEADER_LIST_SIZE = 6

DEFAULT_WINDOW = 65_535
MAX_WINDOW = 2**31 - 1
MAX_STREAM_ID = 2**31 - 1
# RFC 9113 4.2: what SETTINGS_MAX_FRAME_SIZE may be.
LEAST_FRAME_SIZE = 2**14
GREATEST_FRAME_SIZE = 2**24 - 1

HEADER_SIZE = 9


class ErrorCode(enum.IntEnum):
    """Why a stream or a connection ended (RFC 9113 section 7)."""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    SETTINGS_TIMEOUT = 0x4
    STREAM_CLOSED = 0x5
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    CONNECT_ERROR = 0xA
    ENHANCE_YOUR_CALM = 0xB
    INADEQUATE_SECURITY = 0xC
    HTTP_1_1_REQUIRED = 0xD


class ConnectionFault(Exception):
    """The peer made a mistake that the whole connection ends with (RFC 9113 5.4.1).

    `reason` is sent to the peer and logged: it never repeats what the peer sent.
    """

    def __init__(self, code: ErrorCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class StreamFault(Exception):
    """The peer made a mistake that one stream ends with (RFC 9113 5.4.2)."""

    def __init__(self, code: ErrorCode) -> None:
        super().__init__(code.name)
        self.code = code


# The length of 24 bits and the type of 8 are read and written as one number of 32.
_HEADER = struct.Struct(">LBL")
pack_header = _HEADER.pack
unpack_header = _HEADER.unpack_from
_SETTING = struct.Struct(">HL")
_WORD = struct.Struct(">L")
_TWO_WORDS = struct.Struct(">LL")
unpack_settings = _SETTING.iter_unpack
unpack_word = _WORD.unpack_from


def make_frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """Build a whole frame."""
    return pack_header(len(payload) << 8 | kind, flags, stream_id) + payload


def make_settings(settings: dict[int, int]) -> bytes:
    """Build a SETTINGS frame (RFC 9113 6.5)."""
    return make_frame(
        SETTINGS, 0, 0, b"".join(_SETTING.pack(*item) for item in settings.items())
    )


def make_window_update(stream_id: int, increment: int) -> bytes:
    """Build a WINDOW_UPDATE frame (RFC 9113 6.9)."""
    return make_frame(WINDOW_UPDATE, 0, stream_id, _WORD.pack(increment))


def make_reset(stream_id: int, code: int) -> bytes:
    """Build an RST_STREAM frame (RFC 9113 6.4)."""
    return make_frame(RST_STREAM, 0, stream_id, _WORD.pack(code))


def make_goaway(last_stream_id: int, code: int, reason: str = "") -> bytes:
    """Build a GOAWAY frame (RFC 9113 6.8)."""
    return make_frame(
        GOAWAY, 0, 0, _TWO_WORDS.pack(last_stream_id, code) + reason.encode()
    )
