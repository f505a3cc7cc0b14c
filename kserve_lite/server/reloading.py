"""Tells when a file of a program changes, for `--reload`.

By watchfiles, of the extra `[reload]`, which the kernel tells: nothing is polled.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

from kserve_lite.errors import StartupError


def changes(*folders: Path) -> AsyncIterator[list[Path]]:
    """The .py files that change in some folders, those that change together at once.

    What is hidden or a virtual environment is left out, as watchfiles says. Raises
    StartupError where watchfiles is missing.
    """
    try:
        from watchfiles import PythonFilter, awatch
    except ImportError as error:
        raise StartupError(
            "--reload needs watchfiles, which is not installed: "
            "pip install 'kserve-lite[reload]'"
        ) from error

    async def found() -> AsyncIterator[list[Path]]:
        async for some in awatch(*folders, watch_filter=PythonFilter()):
            yield sorted({Path(path) for _, path in some})

    return found()
