"""Unpacks tar and zip archives, as if whoever made them meant harm.

Files and folders only, with names that stay inside; no links, devices or set-uid bits;
no more members, bytes, or bytes for each byte of the archive, than are allowed here. A
refusal leaves what was written so far where it does not count.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, Any

from kserve_lite.errors import StartupError
from kserve_lite.server.storage.remotes import safe_name
from kserve_lite.server.storage.staging import local

# Files and folders of one archive: the largest model repositories have thousands.
MOST_MEMBERS = 100_000
# What is unpacked may have so many times the archive's size, or `LEAST_TOTAL` if that
# is more: weights shrink to half, logs to a tenth, bombs to a thousandth.
MOST_RATIO = 100
LEAST_TOTAL = 64 * 1024 * 1024
# Bytes of one header: tarfile reads each as a whole, whatever size it says it has.
MOST_HEADER = 4 * 1024 * 1024

_CHUNK = 1024 * 1024
_TARS: dict[str, Any] = {
    ".tar": open,
    ".tar.gz": gzip.open,
    ".tgz": gzip.open,
    ".tar.bz2": bz2.open,
    ".tbz2": bz2.open,
    ".tar.xz": lzma.open,
    ".txz": lzma.open,
}
_BROKEN = (
    tarfile.TarError,
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    lzma.LZMAError,
    zlib.error,
    EOFError,
    NotImplementedError,  # a method of compression that Python does not know
    RuntimeError,  # a zip file with a password
    ValueError,
    UnicodeError,
)


def is_archive(name: str) -> bool:
    """Whether a file is one by its name: a .npz, .pt or .keras is a zip inside, too."""
    return name.lower().endswith((*_TARS, ".zip"))


def unpack(archive: Path, folder: Path, free: int) -> None:
    """Unpack an archive into a folder, which is made.

    free: bytes that the disk has room for. Raises StartupError.
    """
    name = archive.name
    size = archive.stat().st_size
    limits = _Limits(name, max(MOST_RATIO * size, LEAST_TOTAL), free)

    def bounded(stream: Any) -> Any:
        return _Bounded(stream, limits)

    with local(f"{folder} cannot be made"):
        folder.mkdir()
    try:
        if name.lower().endswith(".zip"):
            with (
                zipfile.ZipFile(archive) as opened,
                closing(_of_zip(opened, limits)) as members,
            ):
                _write_all(members, folder, limits)
        else:
            how = next(h for end, h in _TARS.items() if name.lower().endswith(end))
            with (
                how(archive, "rb") as stream,
                tarfile.open(fileobj=bounded(stream), mode="r:") as tar,
            ):
                _write_all(_of_tar(tar, limits), folder, limits)
    except StartupError:
        raise
    # bz2 has no error of its own: what it finds wrong is an OSError without a number.
    except (*_BROKEN, OSError) as error:
        raise StartupError(
            f"storage_uri: the archive {name} cannot be read: it is damaged or not "
            "what its name says; make it anew"
        ) from error


class _Limits:
    """Counts what comes out of an archive."""

    def __init__(self, name: str, most: int, free: int) -> None:
        self.name = name
        self.most = most
        self._free = free
        self._members = self._total = 0

    def member(self, size: int) -> None:
        """Count a member, by the size that it says it has."""
        self._members += 1
        self._total += size
        if self._members > MOST_MEMBERS:
            raise self.error(f"it has more than {MOST_MEMBERS} members")
        if self._total > self.most:
            raise self.error(f"it would grow beyond {self.most} bytes")
        if self._total > self._free:
            raise StartupError(
                f"storage_uri: there is not enough room on the disk to unpack "
                f"{self.name}: {self._free} bytes are free; give --model_dir elsewhere"
            )

    def error(self, why: str) -> StartupError:
        return StartupError(
            f"storage_uri: the archive {self.name} is refused: {why}; store its files "
            "as a folder, or make it without"
        )


class _Bounded:
    """A stream for tarfile, of which no more is read than is allowed."""

    def __init__(self, stream: Any, limits: _Limits) -> None:
        self._stream = stream
        self._limits = limits
        # Headers, and what fills up blocks, come on top of the members.
        self._most = limits.most + 2048 * MOST_MEMBERS

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MOST_HEADER or self._stream.tell() > self._most:
            raise self._limits.error("it has a header that is too long")
        found: bytes = self._stream.read(size)
        return found

    def tell(self) -> int:
        position: int = self._stream.tell()
        return position

    def seek(self, position: int) -> int:
        if position > self._most:
            raise self._limits.error(f"it would grow beyond {self._limits.most} bytes")
        reached: int = self._stream.seek(position)
        return reached


# A member: its name, its size, whether it may be executed, and its content (None: a
# folder).
_Member = tuple[str, int, bool, IO[bytes] | None]


def _of_tar(tar: tarfile.TarFile, limits: _Limits) -> Iterator[_Member]:
    for info in tar:
        tar.members = []  # type: ignore[attr-defined]  # it would keep all of them
        if not (info.isdir() or info.isreg()) or info.issparse():
            raise limits.error("it holds links, devices or sparse files")
        content = tar.extractfile(info) if info.isreg() else None
        yield info.name, info.size, bool(info.mode & stat.S_IXUSR), content


def _of_zip(opened: zipfile.ZipFile, limits: _Limits) -> Generator[_Member]:
    for info in opened.infolist():
        mode = info.external_attr >> 16
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise limits.error("it holds links or devices")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            # What Python has for the others gives all that a piece holds, which may be
            # twenty thousand times the piece, however little is asked for.
            raise limits.error("it is compressed by another method than deflate")
        name = info.orig_filename
        if info.is_dir():
            yield name, 0, False, None
        else:
            with opened.open(info) as content:
                yield name, info.file_size, bool(mode & stat.S_IXUSR), content


def _write_all(members: Iterator[_Member], folder: Path, limits: _Limits) -> None:
    where = f"storage_uri: the archive {limits.name}"
    for name, size, is_program, content in members:
        limits.member(size)
        # `tar cf model.tar .` writes ./ before each.
        plain = name.removesuffix("/") if content is None else name
        while plain.startswith("./"):
            plain = plain[2:]
        if content is None and plain in ("", "."):
            continue
        path = folder / safe_name(plain, where)
        _make(path.parent if content is not None else path, limits)
        if content is not None:
            _write(path, content, size, limits)
            path.chmod(0o755 if is_program else 0o644)


def _make(folder: Path, limits: _Limits) -> None:
    """Make a folder and those above it, which count: one name may have hundreds."""
    with local(f"{folder} cannot be made"):
        above = folder
        while not above.exists():
            limits.member(0)
            above = above.parent
        folder.mkdir(parents=True, exist_ok=True)


def _write(path: Path, content: IO[bytes], size: int, limits: _Limits) -> None:
    with local(f"{path} cannot be written"):
        try:
            file = path.open("xb")
        except FileExistsError:
            raise limits.error("it holds one name twice") from None
    left = size
    with file:
        while left:
            chunk = content.read(min(_CHUNK, left))
            if not chunk:
                raise EOFError
            left -= len(chunk)
            with local(f"{path} cannot be written"):
                file.write(chunk)
    if content.read(1):
        raise limits.error("a member is longer than it says")
