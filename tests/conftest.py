"""Fixtures of the whole suite."""

from __future__ import annotations

import os
from typing import Any

import pytest

# Ray has its workers give way to all other processes (nice 15), so to the tests that
# run beside those of Ray: a replica that starts in seconds took more than a minute.
os.environ.setdefault("RAY_worker_niceness", "0")


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """Every async test runs on both event loops."""
    return "asyncio", {"use_uvloop": request.param}


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes that are no words are named by their argument, with a number.

    pytest-xdist's processes must give a test the same name; compressed data has a time.
    """
    if isinstance(val, bytes) and not (val.isascii() and val.decode().isprintable()):
        return argname
    return None
