"""Where files lie until all are there, and how they then get to their folder at once.

    <folder>.partial/            where there is no <folder> yet
    <folder>/.kserve-lite.partial/   where there is one: a volume cannot be renamed
      record.json                what is to come, by name, size and tag
      part/                      what has come of files that are not complete
      whole/                     files that are complete, and checked
      unpacked/                  what an archive holds, while it is unpacked
    <folder>/.kserve-lite.json   the last thing to be written: all that is here is whole

In the first case one rename makes the folder. In the second one files are moved while
there is no `.kserve-lite.json`, and the folder does not count as complete meanwhile.
A kill at any point leaves a state that the next start goes on from.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kserve_lite.errors import StartupError
from kserve_lite.server.storage.remotes import OWN, Identity, Remote

log = logging.getLogger("kserve_lite")

RECORD = f"{OWN}.json"
PARTIAL = f"{OWN}.partial"
LOCK = f"{OWN}.lock"

# Seconds between two looks whether another process is done.
LOOK = 0.1


class Stopped(Exception):
    """The server stops before the files are there."""


@contextmanager
def local(what: str) -> Iterator[None]:
    """Turn what this machine's file system refuses into a StartupError."""
    try:
        yield
    except OSError as error:
        raise StartupError(
            f"storage_uri: {what}: {error.strerror or type(error).__name__}; give "
            "--model_dir with a folder that can be written and has room"
        ) from error


@dataclass(frozen=True, slots=True)
class Found:
    """What a folder holds.

    others: files that are not from here. files: of an earlier and complete fetch, with
    their sizes; remotes: what these were in the store.
    """

    others: bool = False
    files: dict[str, int] | None = None
    remotes: frozenset[Identity] = frozenset()


def look(folder: Path, key: str) -> Found:
    """Find out what a folder holds.

    key: stands for the URI. Raises StartupError where it is another URI's.
    """
    try:
        with suppress(FileNotFoundError):
            names = {*os.listdir(folder)} - {"lost+found", LOCK}  # noqa: PTH208
            return _look_into(folder, names, key)
    except OSError as error:
        raise StartupError(
            f"--model_dir {folder}: it cannot be read: {error.strerror}"
        ) from error
    return Found()


def _look_into(folder: Path, names: set[str], key: str) -> Found:
    record = _read(folder / RECORD)
    staged = _read(folder / PARTIAL / "record.json")
    if RECORD in names:
        owner = record.get("source")
    elif PARTIAL in names and names != {PARTIAL}:
        owner = staged.get("source")
    else:
        return Found(others=bool(names - {PARTIAL}))
    if owner != key:
        raise StartupError(
            f"{folder} holds what was fetched from another storage_uri: give another "
            "--model_dir, or remove what is in it"
        )
    files = record.get("files")
    if files is None or not all(_has(folder / n, size) for n, size in files.items()):
        return Found()
    return Found(files=files, remotes=frozenset(map(tuple, record["remotes"])))


def _has(path: Path, size: int | None) -> bool:
    """Whether there is a file, of that size if one is known."""
    try:
        return path.is_file() and size in (None, path.stat().st_size)
    except OSError:
        return False


@contextmanager
def locked(folder: Path, stopping: threading.Event) -> Iterator[None]:
    """Be the one process that fetches into a folder, once those before have done it.

    The lock goes with the process, however it ends. Raises Stopped, StartupError.
    """
    with ExitStack() as held, local(f"{folder} cannot be made"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        failure = _lock(folder.with_name(f".{folder.name}{LOCK}"), held, stopping)
        if folder.is_dir():
            # A volume, say: others who mount it have only this in common. NFS locks no
            # folders, but files in them.
            inside = _lock(folder, held, stopping)
            if inside is not None:
                inside = _lock(folder / LOCK, held, stopping)
            failure = failure and inside
        if failure is not None:
            raise failure
        fds = held.pop_all()
    with fds:
        yield


def _lock(path: Path, held: ExitStack, stopping: threading.Event) -> OSError | None:
    """Lock a file or folder until `held` ends; return why it cannot be.

    Raises Stopped.
    """
    is_told = False
    try:
        flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
        fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
        held.callback(os.close, fd)
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not is_told:
                    log.info("another process holds %s: waiting", path)
                is_told = True
            else:
                return None
            if stopping.wait(LOOK):
                raise Stopped
    except OSError as error:
        return error


class Staging:
    """Files on their way into a folder. Its methods raise StartupError.

    What an earlier one has left for the same files is kept.
    """

    def __init__(self, folder: Path, key: str, remotes: Sequence[Remote]) -> None:
        self._folder = folder
        self._key = key
        self._remotes = remotes
        self._in_place = folder.exists()
        root = folder / PARTIAL if self._in_place else _sibling(folder)
        self._root = root
        with local(f"{root} cannot be written"):
            before = _read(root / "record.json")
            if before.get("source") != key:
                _remove(root)
                before = {}
            for name in ("part", "whole"):
                (root / name).mkdir(parents=True, exist_ok=True)
            _remove(root / "unpacked")
            self._drop(before, {remote.identity for remote in remotes})
            _write(root / "record.json", self._record())

    def part(self, remote: Remote) -> Path:
        """Where a file is while it comes."""
        return self._at("part", remote)

    def whole(self, remote: Remote) -> Path:
        """Where a file is when it is complete and checked."""
        return self._at("whole", remote)

    def is_whole(self, remote: Remote, found: Found) -> bool:
        """Whether a file is here, or in the folder already."""
        if _has(self.whole(remote), remote.size):
            return True
        known = remote.identity in found.remotes and remote.tag != ""
        return known and _has(self._folder / remote.name, remote.size)

    @property
    def free(self) -> int:
        """Bytes that the disk has room for."""
        return shutil.disk_usage(self._root).free

    @property
    def unpacked(self) -> Path:
        """Where an archive may be unpacked."""
        return self._root / "unpacked"

    def finish(self, top: Path, kept: Sequence[str] = ()) -> None:
        """Have the folder hold what is in `top`, and the files `kept` that it has."""
        with local(f"{self._folder} cannot be written"):
            folders, files = _tree(top)
            files |= {name: (self._folder / name).stat().st_size for name in kept}
            record = self._record() | {"files": files}
            if not self._in_place:
                _write(top / RECORD, record)
                top.rename(self._folder)
            else:
                self._move(top, folders, files)
                _write(self._folder / RECORD, record)
            _remove(self._root)

    @property
    def top(self) -> Path:
        """The folder with the complete files."""
        return self._root / "whole"

    def _move(self, top: Path, folders: list[str], files: dict[str, int]) -> None:
        old = self._root / "old.json"
        with suppress(FileNotFoundError):
            os.replace(self._folder / RECORD, old)  # noqa: PTH105 - as its neighbours
        for name in set(_read(old).get("files", {})) - files.keys():
            path = self._folder / name
            path.unlink(missing_ok=True)
            for parent in path.relative_to(self._folder).parents[:-1]:
                with suppress(OSError):  # something else is in it
                    (self._folder / parent).rmdir()
        for name in folders:
            (self._folder / name).mkdir(parents=True, exist_ok=True)
        for name in files:
            if (top / name).exists():
                (top / name).replace(self._folder / name)

    def _drop(self, before: dict[str, Any], wanted: set[Identity]) -> None:
        """Remove what is staged of files that are not wanted, or not as they were."""
        for identity in before.get("remotes", []):
            # What has no tag may have changed.
            if tuple(identity) not in wanted or not identity[2]:
                for where in ("part", "whole"):
                    (self._root / where / identity[0]).unlink(missing_ok=True)
        for where in ("part", "whole"):
            names = {str(identity[0]) for identity in wanted}
            for name in _tree(self._root / where)[1].keys() - names:
                (self._root / where / name).unlink()
            for name in reversed(_tree(self._root / where)[0]):
                with suppress(OSError):  # something is in it
                    (self._root / where / name).rmdir()

    def _at(self, where: str, remote: Remote) -> Path:
        path = self._root / where / remote.name
        with local(f"{path.parent} cannot be made"):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _record(self) -> dict[str, Any]:
        return {"source": self._key, "remotes": [r.identity for r in self._remotes]}


def _sibling(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.partial")


def _tree(top: Path) -> tuple[list[str], dict[str, int]]:
    """The folders, and the files with their sizes, below a folder."""
    folders, files = [], {}
    for path in sorted(top.rglob("*")):
        name = path.relative_to(top).as_posix()
        if path.is_dir():
            folders.append(name)
        else:
            files[name] = path.stat().st_size
    return folders, files


def _read(path: Path) -> dict[str, Any]:
    """A record; what cannot be read is as if there were none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, record: dict[str, Any]) -> None:
    fresh = path.with_name(f"{path.name}.new")
    with fresh.open("w") as file:
        json.dump(record, file)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def _remove(path: Path) -> None:
    with suppress(FileNotFoundError):
        shutil.rmtree(path)
