"""`run(model)`: a server that owns its process, with flags, signals and logs."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio

from kserve_lite.errors import KServeLiteError, StartupError
from kserve_lite.model import Model
from kserve_lite.server.banner import banner
from kserve_lite.server.lifecycle import Server
from kserve_lite.server.logs import configure_logging
from kserve_lite.server.settings import Settings, make_settings, parse_flags

log = logging.getLogger("kserve_lite")

# Of mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

# Set while the command line imports the user's module, whose run() must then wait.
importing: str | None = None


def run(*models: Model, argv: Sequence[str] | None = None, **settings: Any) -> None:
    """Serve models until SIGTERM or SIGINT; the last line of an `app.py`.

    argv: the command line to read flags from; default: that of the process.
    settings: defaults by the flags' names; flags and environment beat them.

    Returns after a clean stop. What keeps it from starting ends the process with one
    line on standard error and status 1.
    """
    if importing is not None:
        raise StartupError(
            f"{importing} calls run() while it is imported: put the call under "
            'if __name__ == "__main__":'
        )
    try:
        _, flags = parse_flags(
            sys.argv[1:] if argv is None else argv,
            prog=f"python {Path(sys.argv[0]).name}",
            description="Serve the models of this program.",
        )
        serve_process(
            models, make_settings(settings, environment=os.environ, flags=flags)
        )
    except KServeLiteError as error:
        fail(error)


def fail(error: KServeLiteError) -> None:
    """End the process with one line that says why."""
    line = " ".join(str(error).split())
    print(f"kserve-lite: {line}", file=sys.stderr, flush=True)
    sys.exit(1)


# Seconds after which a thread that keeps the interpreter gives it up to one that waits,
# Python's own being 0.005: with six handlers that compute in Python the event loop is
# one of seven that wait for it, several times a request.
SWITCH_INTERVAL = 0.0001


def serve_process(models: tuple[Model, ...], settings: Settings) -> None:
    """Serve in this process until a signal; or raise KServeLiteError."""
    configure_logging(settings.server.log_level)
    _keep_freed_memory()
    sys.setswitchinterval(SWITCH_INTERVAL)
    server = Server(models, settings)
    try:
        anyio.run(
            _serve_until_signal,
            server,
            backend_options={"use_uvloop": _use_uvloop(settings.server.event_loop)},
        )
    finally:
        if server.dataplane.threads:
            _leave(server)


def _keep_freed_memory() -> None:
    """Have glibc keep up to 64 MiB of freed memory, for the next large tensors.

    It would give the buffers of each back to the kernel, which then has to clear fresh
    pages for the next: half the time of a gRPC request of 602 KB. Where the C library
    knows no mallopt(), nothing is done.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, 64 * 1024 * 1024)
        mallopt(_M_MMAP_THRESHOLD, 32 * 1024 * 1024)


def _use_uvloop(event_loop: str) -> bool:
    installed = importlib.util.find_spec("uvloop") is not None
    if event_loop == "uvloop" and not installed:
        raise StartupError(
            "--event_loop uvloop: uvloop is not installed; pip install uvloop, or give "
            "--event_loop auto"
        )
    return installed and event_loop != "asyncio"


async def _serve_until_signal(server: Server) -> None:
    async with anyio.create_task_group() as tasks:
        if threading.current_thread() is threading.main_thread():
            await tasks.start(_watch_signals, server)
        failure: KServeLiteError | None = None
        try:
            async with server:
                if not server.stopped:
                    print(_banner(server), file=sys.stderr, flush=True)
                await server.wait_stopped()
        except KServeLiteError as error:  # kept out of the task group, which wraps it
            failure = error
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure


def _banner(server: Server) -> str:
    settings = server.settings.server
    ports = (server.port, server.grpc_port) if settings.enable_grpc else ()
    return banner(
        server.application.models,
        server.url,
        grpc_ports=[port for port in ports if port is not None],
        asks_certificate=bool(settings.ssl_ca_certs),
    )


async def _watch_signals(
    server: Server, *, task_status: anyio.abc.TaskStatus[None]
) -> None:
    """The first signal stops the server, the second one at once."""
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async for number in signals:
            log.info("%s: stopping", signal.Signals(number).name)
            server.stop(at_once=server.stopped)


def _leave(server: Server) -> None:
    """End a process whose handlers still run: Python would wait for them."""
    error = sys.exc_info()[1]
    log.warning("%d handlers still run; leaving without them", server.dataplane.threads)
    if error is not None:
        line = " ".join(str(error).split())
        print(f"kserve-lite: {line}", file=sys.stderr)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if error is None else 1)
