"""Runs the suite that compares compat with KServe's SDK in a process of its own.

Importing `kserve` fills protobuf's and prometheus_client's default registries, which
other tests look at.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SUITE = Path(__file__).parent / "beside_kserve.py"


def test_suite() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", SUITE],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
