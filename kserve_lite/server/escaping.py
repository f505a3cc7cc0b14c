"""Text from outside as one line of a log can hold it: visible, and of bounded length.

What ends lines, steers terminals or reverses the order of text is escaped as Python
would escape it; letters of any language stay as they are.
"""

from __future__ import annotations

import json.encoder

# A string as JSON, in ASCII.
quote = json.encoder.encode_basestring_ascii


def visible(text: str, most: int) -> str:
    """Text as at most `most` bytes of UTF-8 that show on one line; cut, it ends in ...

    Quotes and backslashes are escaped like what cannot be seen.
    """
    if (
        len(text) <= most
        and text.isascii()
        and text.isprintable()
        and '"' not in text
        and "\\" not in text
    ):
        return text
    parts: list[str] = []
    size = 0
    for character in text:
        character = "\\" + character if character in '"\\' else escaped(character)
        size += len(character.encode())
        parts.append(character)
        if size > most:
            while size > most - 3:
                size -= len(parts.pop().encode())
            return "".join(parts) + "..."
    return "".join(parts)


def quoted(text: str, most: int) -> str:
    """Text as JSON in ASCII, of at most 2 * `most` + 8 bytes; cut, it ends in ..."""
    if not text.isascii():  # half of a surrogate pair is what readers may refuse
        text = text[: most + 1].encode(errors="backslashreplace").decode()
    whole = quote(text[:most])
    if len(text) <= most and len(whole) <= 2 * most + 2:
        return whole
    if len(whole) > 2 * most + 2:  # 12 bytes each at the most
        text = text[: most // 6]
    return quote(text[:most] + "...")


def escaped(text: str, but: str = "") -> str:
    """Text with Python's escapes for what cannot be seen, but for these characters.

    That is what Unicode calls control, format, surrogate, private and unassigned
    characters, and separators other than the space (`str.isprintable`).
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in but else _escape(character)
        for character in text
    )


def _escape(character: str) -> str:
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
