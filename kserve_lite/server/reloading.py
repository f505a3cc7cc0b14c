"""Tells when a file of a program changes, for `--reload`.

By watchfiles, of the extra `[reload]`, which the kernel tells of changes. It waits for
them in a thread, which no cancellation ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from kserve_lite.errors import StartupError


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
