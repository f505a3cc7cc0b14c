"""What a store tells of its files: values, and what may be the name of one.

The vocabulary of this folder. Names come from whoever wrote into the bucket or archive:
none may lead out of the folder that it is put into.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from kserve_lite.errors import StartupError

# Bytes read at once, of each of the files that are fetched at a time.
CHUNK = 8 * 1024 * 1024

# A file's name, size and tag.
Identity: TypeAlias = tuple[str, int | None, str]

# What this folder's own files begin with.
OWN = ".kserve-lite"

_CONTROLS = re.compile(r"[\x00-\x1f\x7f\\]")


@dataclass(frozen=True, slots=True)
class Remote:
    """A file in a store.

    name: relative to what the URI names, with slashes. path: what the store calls it.
    size: bytes; None where it does not tell. tag: changes with the content; "" where
    nothing tells of that. algorithm, checksum: md5, sha256, sha1, crc32c, or blob
    (Git's SHA-1), and its value in hexadecimal; "" where there is none.
    """

    name: str
    path: str
    size: int | None
    tag: str
    algorithm: str = ""
    checksum: str = ""

    @property
    def identity(self) -> Identity:
        """What tells whether it is still the same."""
        return self.name, self.size, self.tag


class Store(Protocol):
    """Where files come from. Its methods raise what its packages do: see `faults`."""

    def files(self) -> list[Remote]:
        """All files that the URI names."""
        ...

    def read(self, remote: Remote, offset: int) -> tuple[int, Generator[bytes]]:
        """Give a file's bytes from an offset on, or from the one that is returned.

        Raises Changed where it is not any more what `files` has told.
        """
        ...

    def vouches(self, remote: Remote) -> bool:
        """Whether its checksum is one of the content; asked where they differ."""
        ...


class Changed(Exception):
    """A file was written in the store while it was fetched."""


class Missing(Exception):
    """There is nothing in the store under that name."""


def safe_name(name: str, where: str) -> str:
    """A file's name, relative and with plain segments; else StartupError.

    where: what it is in, for the error.
    """
    segments = name.split("/")
    if _CONTROLS.search(name) or any(part in ("", ".", "..") for part in segments):
        shown = ascii(name[:80])
        raise StartupError(
            f"{where} holds the name {shown}, which could lead out of the folder, or "
            "stands for none: rename it there, or leave it out"
        )
    if segments[0].startswith(OWN):
        raise StartupError(
            f"{where} holds {name[:80]!a}: names with {OWN} are for this server"
        )
    return name
