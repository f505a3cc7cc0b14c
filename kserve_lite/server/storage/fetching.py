"""Brings what a storage URI names into a folder: all of it, checked, or an error.

Asks the store what there is, also where an earlier fetch is complete: what has not
changed is not fetched again. Some files come at a time, in pieces; a file that breaks
off goes on from where it was, now or at the next start. One process at a time fetches
into a folder. Runs in threads, and knows no event loop but in `fetch_off_loop`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import closing, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from kserve_lite.errors import StartupError
from kserve_lite.server.storage.archives import is_archive, unpack
from kserve_lite.server.storage.faults import Fault
from kserve_lite.server.storage.fsspec_store import FsspecStore
from kserve_lite.server.storage.http_store import HttpStore
from kserve_lite.server.storage.progress import Progress, amount
from kserve_lite.server.storage.remotes import (
    CHUNK,
    Changed,
    Remote,
    Store,
    safe_name,
)
from kserve_lite.server.storage.retrying import Corrupt, Failed, Patience
from kserve_lite.server.storage.staging import (
    Found,
    Staging,
    Stopped,
    local,
    locked,
    look,
)
from kserve_lite.server.storage.uris import Source, digest, patterns, source_of

if TYPE_CHECKING:
    from kserve_lite.server.settings import ServerSettings

log = logging.getLogger("kserve_lite")

# Files that are fetched at a time; each takes up to `CHUNK` bytes of memory, or two.
AT_A_TIME = 4

# Seconds that a fetch is waited for that is to stop: it does between two pieces.
TO_STOP = 1.0


async def fetch_off_loop(server: ServerSettings, *, bar: bool) -> None:
    """Run `fetch_files` in a thread, with the URI and folder of the settings."""
    stopping, done = threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            fetch_files(
                source_of(server.storage_uri),
                Path(server.model_dir),
                allow=patterns(server.storage_allow_patterns),
                ignore=patterns(server.storage_ignore_patterns),
                stopping=stopping,
                bar=bar,
            )
        except BaseException as error:  # noqa: BLE001 - for the thread that waits
            failures.append(error)
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(done.set)

    # Not anyio's threads: the interpreter would wait for them at its end, and this one
    # may wait for a store that hangs.
    threading.Thread(target=work, name="kserve-lite-fetch", daemon=True).start()
    try:
        await done.wait()
    finally:
        stopping.set()
        with anyio.move_on_after(TO_STOP, shield=True):
            await done.wait()
    if failures:
        raise failures[0]


def fetch_files(
    source: Source,
    folder: Path,
    *,
    allow: Sequence[str] = (),
    ignore: Sequence[str] = (),
    stopping: threading.Event | None = None,
    bar: bool = False,
) -> None:
    """Have what an URI names in a folder; where others have filled it, leave it so.

    allow, ignore: patterns for names relative to the URI, with * for slashes too; a web
    server's one file is fetched whatever it is called. bar: whether a terminal may
    show one. Raises StartupError, and Stopped when `stopping` is set.
    """
    stopping = stopping or threading.Event()
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 - keeps links as they are
    key = digest(source.uri)
    if not look(folder, key).others:
        with locked(folder, stopping):
            # Whoever had the lock may have fetched it.
            found = look(folder, key)
            if not found.others:
                fetch = _Fetch(source, folder, found, stopping=stopping, bar=bar)
                fetch.run(key, allow, ignore)
                return
    log.info("%s is filled: %s is not fetched", folder, source.shown)


class _Fetch:
    """One fetch, while this process is the only one at it."""

    def __init__(
        self,
        source: Source,
        folder: Path,
        found: Found,
        *,
        stopping: threading.Event,
        bar: bool,
    ) -> None:
        self._source = source
        self._folder = folder
        self._found = found
        self._stopping = stopping
        self._again = Patience(source.shown, stopping)
        self._bar = bar
        self._progress: Progress
        self._staging: Staging
        self._store: Store

    def run(self, key: str, allow: Sequence[str], ignore: Sequence[str]) -> None:
        """Ask the store, and fetch what is not here."""
        found = self._found
        try:
            self._store = self._again(self._connect)
            remotes = self._again(self._store.files)
        except Failed as failed:
            if found.files is None or failed.fault not in (Fault.BUSY, Fault.NO_HOST):
                raise
            log.warning("%s; serving what is in %s", failed, self._folder)
            return
        if self._source.scheme == "http":
            allow = ignore = ()
        wanted = _wanted(self._source, remotes, allow, ignore)
        if found.files is not None and _same(wanted, found):
            log.debug("%s has not changed", self._source.shown)
            return
        self._staging = staging = Staging(self._folder, key, wanted)
        single = len(wanted) == 1 and is_archive(wanted[0].name)
        # An archive's own name is not among the files that it has given.
        kept = Found() if single else found
        self._transfer([r for r in wanted if not staging.is_whole(r, kept)], wanted)
        if single:
            archive = staging.whole(wanted[0])
            unpack(archive, staging.unpacked, staging.free)
            staging.finish(staging.unpacked)
        else:
            here = [r.name for r in wanted if not staging.whole(r).exists()]
            staging.finish(staging.top, here)

    def _connect(self) -> Store:
        if self._source.scheme == "http":
            return HttpStore(self._source)
        return FsspecStore(self._source)

    # --- many files -------------------------------------------------------------------

    def _transfer(self, missing: Sequence[Remote], wanted: Sequence[Remote]) -> None:
        total = _sum(wanted)
        begun = sum(_size(self._staging.part(remote)) for remote in missing)
        left = _sum(missing)
        here = begun if left is None or total is None else total - left + begun
        if left is not None and left - begun > self._staging.free:
            raise StartupError(
                f"storage_uri {self._source.shown}: {amount(left - begun)} are to come "
                f"and {amount(self._staging.free)} are free for {self._folder}: make "
                "room, or give --model_dir elsewhere"
            )
        self._progress = Progress(
            self._source.shown, len(wanted), total, here=here, bar=self._bar
        )
        waiting, errors = deque(missing), list[BaseException]()

        def work() -> None:
            while waiting and not errors:
                with suppress(IndexError):
                    remote = waiting.popleft()
                    try:
                        self._fetch(remote)
                    except BaseException as error:  # noqa: BLE001 - for who has begun it
                        errors.append(error)
                        self._stopping.set()  # nobody waits for the others

        threads = [
            threading.Thread(target=work, name="kserve-lite-fetch", daemon=True)
            for _ in range(min(AT_A_TIME, len(missing)))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._progress.finish(complete=not errors)
        if errors:
            raise next((e for e in errors if not isinstance(e, Stopped)), errors[0])

    # --- one file ---------------------------------------------------------------------

    def _fetch(self, remote: Remote) -> None:
        """Fetch a file, going on where it broke off; check it."""
        part = self._staging.part(remote)

        def attempt() -> None:
            self._read_into(part, remote)
            self._check(part, remote)
            with local(f"{self._staging.whole(remote)} cannot be written"):
                part.replace(self._staging.whole(remote))

        self._again(attempt, what=remote.name, reached=lambda: _size(part))

    def _read_into(self, part: Path, remote: Remote) -> None:
        offset = _size(part)
        if not remote.tag or (remote.size is not None and offset > remote.size):
            self._progress.add(-offset)
            with local(f"{part} cannot be removed"):
                part.unlink(missing_ok=True)
            offset = 0
        if offset and offset == remote.size:
            return
        with local(f"{part} cannot be written"):
            file = part.open("ab")
        with file:
            came, chunks = self._store.read(remote, offset)
            self._progress.add(came - offset)
            with local(f"{part} cannot be written"):
                file.truncate(came)
            with closing(chunks):
                for chunk in chunks:
                    came += len(chunk)
                    if remote.size is not None and came > remote.size:
                        raise Changed
                    with local(f"{part} cannot be written"):
                        file.write(chunk)
                    self._progress.add(len(chunk))
                    if self._stopping.is_set():
                        raise Stopped
            with local(f"{part} cannot be written"):
                file.flush()
                os.fsync(file.fileno())

    def _check(self, part: Path, remote: Remote) -> None:
        size = _size(part)
        if remote.size is not None and size != remote.size:
            raise ConnectionError("it ended early")
        if not remote.checksum:
            return
        found = _checksum(part, remote.algorithm, size)
        if found and found != remote.checksum and self._store.vouches(remote):
            self._progress.add(-size)
            part.unlink()
            raise Corrupt


def _wanted(
    source: Source,
    remotes: Sequence[Remote],
    allow: Sequence[str],
    ignore: Sequence[str],
) -> list[Remote]:
    """Those that the patterns let through, with names that can be files here."""
    wanted = [
        remote
        for remote in remotes
        if (not allow or any(fnmatchcase(remote.name, p) for p in allow))
        and not any(fnmatchcase(remote.name, p) for p in ignore)
    ]
    if not wanted:
        raise StartupError(
            f"storage_uri {source.shown}: storage_allow_patterns and "
            f"storage_ignore_patterns leave none of its {len(remotes)} files"
        )
    names = {safe_name(r.name, f"storage_uri {source.shown}") for r in wanted}
    for name in names:
        for parent in Path(name).parents:
            if parent.as_posix() in names:
                raise StartupError(
                    f"storage_uri {source.shown}: {parent.as_posix()!r} is a file and "
                    "a folder there: leave one out by --storage_ignore_patterns"
                )
    return wanted


def _same(wanted: Sequence[Remote], found: Found) -> bool:
    """Whether all is as it was; what nothing tells of is taken to have changed."""
    now = {remote.identity for remote in wanted}
    return now == found.remotes and all(remote.tag for remote in wanted)


def _sum(remotes: Sequence[Remote]) -> int | None:
    sizes = [remote.size for remote in remotes]
    return None if None in sizes else sum(size or 0 for size in sizes)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _checksum(path: Path, algorithm: str, size: int) -> str:
    """Of a file's content, in hexadecimal; "" where nothing here can compute it."""
    found: Any
    if algorithm == "crc32c":
        try:
            from google_crc32c import Checksum  # gcsfs brings it
        except ImportError:
            return ""
        found = Checksum()  # type: ignore[no-untyped-call]
    elif algorithm == "blob":  # Git's: of a header and the content
        found = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    else:
        found = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            found.update(chunk)
    return str(found.digest().hex())
