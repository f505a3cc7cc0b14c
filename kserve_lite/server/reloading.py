"""Tells when a file of a program changes, for `--reload`.

By watchfiles, of the extra `[reload]`, which the kernel tells of changes. It waits for
them in a thread, which no cancellation ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

import anyio

from kserve_lite.errors import StartupError
from kserve_lite.server.child import Child

log = logging.getLogger("kserve_lite")

# Seconds that requests in flight are given when a file has changed.
RELOAD_GRACE = 2.0


class Reloading:
    """Stops the workers when a file changes; whoever keeps their places starts others.

    workers: those that are alive. folders: where to look. stop: ends it. Raises
    StartupError where watchfiles is missing.
    """

    def __init__(
        self,
        workers: Callable[[], Iterable[Child]],
        *folders: Path,
        stop: asyncio.Event,
    ) -> None:
        self._workers = workers
        self._changes = changes(*folders, stop=stop)
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Stop first, so that no request meets an old program after the change.

        Requests that come meanwhile wait until a new worker is ready. Raises
        StartupError where the folders cannot be watched.
        """
        async for files in self._changes:
            log.info("%s changed: reloading", ", ".join(path.name for path in files))
            self._changed.set()
            self._changed = asyncio.Event()
            workers = list(self._workers())
            for worker in workers:
                worker.stop()
            with anyio.move_on_after(RELOAD_GRACE):
                for worker in workers:
                    await worker.gone.wait()
            for worker in workers:
                worker.stop(at_once=True)
            for worker in workers:
                await worker.gone.wait()

    async def wait(self, worker: Child) -> None:
        """Wait for a change where one has ended, unless that was because of one."""
        if not worker.stopping:
            log.error(
                "%s failed: %s; waiting for a file to change",
                worker.name,
                worker.how_in_a_line,
            )
            await self._changed.wait()


def changes(*folders: Path, stop: asyncio.Event) -> AsyncIterator[list[Path]]:
    """The .py files that change in some folders, those that change together at once.

    stop: ends it, in a moment. What is hidden or a virtual environment is left out, as
    watchfiles says. Raises StartupError where watchfiles is missing, and while it is
    iterated over where the folders cannot be watched.
    """
    try:
        from watchfiles import PythonFilter, awatch
    except ImportError as error:
        raise StartupError(
            "--reload needs watchfiles, which is not installed: "
            "pip install 'kserve-lite[reload]'"
        ) from error

    async def found() -> AsyncIterator[list[Path]]:
        watched = awatch(*folders, watch_filter=PythonFilter(), stop_event=stop)
        try:
            async for some in watched:
                yield sorted({Path(path) for _, path in some})
        except OSError as error:
            raise StartupError(
                f"--reload cannot watch {', '.join(map(str, folders))}: {error}; make "
                "it readable, raise the limit that is named, or leave --reload out"
            ) from error

    return found()
