"""How a supervisor starts its own program once more, as a worker.

The counterpart of `worker.assignment()`: what is written into the environment here, and
what descriptors go along, is read there.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from typing import Any

from kserve_lite.counters import Board
from kserve_lite.errors import StartupError
from kserve_lite.server.sockets import Ports
from kserve_lite.server.worker import VARIABLE

# Where this process was started, which its command may be relative to: a program may
# go elsewhere before it serves. None: the folder is no more.
STARTED_IN: str | None = None
with suppress(OSError):
    STARTED_IN = os.getcwd()  # noqa: PTH109 - a string is what is wanted


def command() -> list[str]:
    """What starts this program once more; raises StartupError where nothing does."""
    arguments = sys.orig_argv[1:]
    is_there = sys.argv and sys.argv[0] not in ("", "-")
    if hasattr(sys, "ps1") or not is_there:
        raise StartupError(
            "--workers and --reload start this program again, and it has no file to be "
            "started from: write it to a file and run that, or use --workers 1"
        )
    return [sys.executable, *arguments]


def start(
    control: socket.socket,
    board: Board,
    index: int,
    ports: Ports,
    *,
    waits: bool,
    unloaded: tuple[str, ...],
    loaded: tuple[str, ...],
) -> subprocess.Popen[bytes]:
    """Start this program once more, as a worker; its `Assignment` says what is given.

    Raises OSError.
    """
    first = [sock.fileno() for sock in ports.first]
    second = [sock.fileno() for sock in ports.second]
    given: dict[str, Any] = {
        "control": [control.fileno(), os.fstat(control.fileno()).st_ino],
        "board": board.fd,
        "sheets": len(board.sheets),
        "index": index,
        "first": first,
        "second": second,
        "waits": waits,
        "unloaded": unloaded,
        "loaded": loaded,
    }
    # A terminal's Ctrl-C comes to every process. Until the worker listens to it, it
    # would end with a traceback: the signal waits, as a started process inherits that.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        return subprocess.Popen(  # noqa: S603 - the very command of this process
            command(),
            cwd=STARTED_IN,
            env={**os.environ, VARIABLE: json.dumps(given)},
            pass_fds=(control.fileno(), board.fd, *first, *second),
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
