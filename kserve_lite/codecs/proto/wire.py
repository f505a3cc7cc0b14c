"""The wire format of protobuf messages, as far as it is read and written by hand.

https://protobuf.dev/programming-guides/encoding. Everything else is protobuf's.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from google.protobuf.message import DecodeError

from kserve_lite.errors import InvalidInput

Buffer: TypeAlias = bytes | bytearray | memoryview

# Below this many bytes protobuf alone is as fast; see `v2_protobuf.py`.
FAST_SIZE = 8 * 1024

# protobuf's own Python implementation lets the second one through.
MALFORMED = (DecodeError, UnicodeDecodeError)


def read_message(kind: Any, body: Buffer, *, within: Any = None) -> Any:
    """Read a protobuf message of a class; raise InvalidInput where it is malformed.

    within: the class of the message that came, where `body` is a part of it.
    """
    try:
        return kind.FromString(body)
    except MALFORMED:
        name = (within or kind).DESCRIPTOR.full_name
        raise InvalidInput(f"The message is no valid {name}.") from None


def fields(data: memoryview, most: int) -> list[tuple[int, int, int, int]] | None:
    """The length-delimited fields of a message: number, begin, begin of value, end.

    None where there is any other field, too many, or something odd. Tags of our
    messages have one byte.
    """
    found: list[tuple[int, int, int, int]] = []
    position, size = 0, len(data)
    while position < size:
        begin = position
        tag = data[position]
        position += 1
        if tag & 0x87 != 2 or len(found) == most:  # one byte, wire type 2
            return None
        length = shift = 0
        while True:
            if position == size or shift > 28:
                return None
            octet = data[position]
            position += 1
            length |= (octet & 0x7F) << shift
            if octet < 0x80:
                break
            shift += 7
        end = position + length
        if end > size:
            return None
        found.append((tag >> 3, begin, position, end))
        position = end
    return found


def prefix(number: int, length: int) -> bytes:
    """The tag and length before a length-delimited field's value."""
    octets = bytearray((number << 3 | 2,))
    while length >= 0x80:
        octets.append(length & 0x7F | 0x80)
        length >>= 7
    octets.append(length)
    return bytes(octets)


def delimited(number: int, value: bytes) -> bytes:
    return prefix(number, len(value)) + value
