"""Runs the suites of clients that cannot be in one process.

The messages of KServe and of Triton have the same names in protobuf's one default pool:
whichever is imported second fails. The suites are ordinary ones that can also be run by
hand: `pytest tests/clients/triton_grpc.py`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    "suite", ["kserve_sdk.py", "pytriton_client.py", "triton_grpc.py"]
)
def test_suite(suite: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", HERE / suite],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
