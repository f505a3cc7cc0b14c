"""The web process of a Procfile, started as the image of a buildpack starts it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support import banner_url

ROOT = Path(__file__).parents[2]
WHAT_WEB_IS = re.compile(r"web: (kserve-lite run (\S+) --http_port \$PORT)\n")


def web(tree: Path) -> tuple[str, Path]:
    """The command of the web process, and the program that it runs."""
    found = WHAT_WEB_IS.fullmatch((tree / "Procfile").read_text())
    assert found is not None
    program, _, model = found[2].partition(":")
    assert model == "model"
    return found[1], tree / program


def begun(tree: Path, **variables: str) -> subprocess.Popen[str]:
    """Begin the web process as a buildpack's image does.

    PORT is 0, for which the system gives a free port.
    """
    command, _ = web(tree)
    scripts = Path(sys.executable).parent
    return subprocess.Popen(
        # The image listens everywhere, a test on this machine only.
        ["bash", "-c", f"{command} --host 127.0.0.1"],
        cwd=tree,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PATH": f"{scripts}:{os.environ['PATH']}",
            "PORT": "0",
            **variables,
        },
    )


@contextmanager
def started(tree: Path, **variables: str) -> Iterator[str]:
    """Run the web process; it must stop when it is told to."""
    process = begun(tree, **variables)
    try:
        url = banner_url(process)
        assert not url.endswith(":8080")  # the default, without PORT
        yield url
        # To the process that was started: no shell may stand before the server.
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
        assert "drained" in said
        assert process.returncode == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
