"""`run(model)`: a server that owns its process, with flags, signals and logs.

With several workers the process supervises others, which run the same program and come
here, too; which of these it is, this file finds out.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio

from kserve_lite.errors import KServeLiteError, StartupError
from kserve_lite.model import Model
from kserve_lite.server.banner import banner
from kserve_lite.server.lifecycle import Guest, Server
from kserve_lite.server.logs import configure_logging
from kserve_lite.server.settings import Settings, make_settings, parse_flags
from kserve_lite.server.starting import STARTED_IN
from kserve_lite.server.worker import Worker, assignment, unblock_signals

log = logging.getLogger("kserve_lite")

# Of mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

# Seconds after which a thread that keeps the interpreter gives it up to one that waits,
# Python's own being 0.005: with six handlers that compute in Python the event loop is
# one of seven that wait for it, several times a request.
SWITCH_INTERVAL = 0.0001

# Set while the command line imports the user's module, whose run() must then wait.
importing: str | None = None


def run(*models: Model, argv: Sequence[str] | None = None, **settings: Any) -> None:
    """Serve models until SIGTERM or SIGINT; the last line of an `app.py`.

    argv: the command line to read flags from; default: that of the process.
    settings: defaults by the flags' names; flags and environment beat them.

    With `workers` above 1, or `reload`, this process supervises others, each of which
    runs the same command line up to this call: what a program does before, it does in
    each. SIGHUP then restarts them one by one, without a request failing. What it does
    after this call, or at exit, has 3 seconds in each: then the process is killed.

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
            lambda: models,
            make_settings(settings, environment=os.environ, flags=flags),
            program_folder(),
        )
    except KServeLiteError as error:
        fail(error)


def program_folder() -> Path:
    """Where the program is that runs."""
    folder = Path(STARTED_IN or "")
    program = folder / sys.argv[0]
    return program.resolve().parent if program.is_file() else folder.resolve()


def fail(error: KServeLiteError) -> None:
    """End the process with one line that says why; of many workers' lines, with one."""
    _tell(error)
    sys.exit(1)


def _tell(error: BaseException) -> None:
    line = " ".join(str(error).split())
    given = assignment()
    if given is not None:
        given.fail(line)
    else:
        print(f"kserve-lite: {line}", file=sys.stderr, flush=True)


def serve_process(
    find: Callable[[], tuple[Model, ...]],
    settings: Settings,
    *folders: Path,
    guest: Guest | None = None,
) -> None:
    """Serve in this process, or in several, until a signal; or raise KServeLiteError.

    find: returns the models; not called where other processes serve. folders: with the
    program's files. guest: brings further models, so that there may be none at first.
    """
    given = assignment()
    if given is None and (settings.server.workers > 1 or settings.server.reload):
        configure_logging(settings.server)
        # Here and not above: it takes 10 ms, which most processes can do without.
        from kserve_lite.server.supervisor import supervise

        supervise(settings, *folders)
        return
    if given is not None:  # the supervisor has fetched the files
        settings = replace(settings, server=replace(settings.server, storage_uri=""))
    models = find()
    # A program that configures logging does so while it is imported.
    configure_logging(settings.server)
    _keep_freed_memory()
    sys.setswitchinterval(SWITCH_INTERVAL)
    worker = Worker(given) if given is not None else None
    seat = worker.seat if worker is not None else None
    server = Server(models, settings, seat=seat, own_process=True, guest=guest)
    try:
        anyio.run(
            _serve_until_signal,
            server,
            worker,
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


async def _serve_until_signal(server: Server, worker: Worker | None) -> None:
    async with anyio.create_task_group() as tasks:
        if threading.current_thread() is threading.main_thread():
            await tasks.start(_watch_signals, server, worker is not None)
        if worker is not None:
            await worker.open(server)
            unblock_signals()
            tasks.start_soon(worker.run)
        failure: KServeLiteError | None = None
        try:
            async with server:
                if not server.stopped and worker is not None:
                    worker.ready(_banner(server))
                elif not server.stopped:
                    with contextlib.suppress(OSError):  # a terminal may be closed now
                        print(_banner(server), file=sys.stderr, flush=True)
                await server.wait_stopped()
        except KServeLiteError as error:  # kept out of the task group, which wraps it
            failure = error
        if worker is not None and failure is None:
            worker.stopped()
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
    server: Server, is_worker: bool, *, task_status: anyio.abc.TaskStatus[None]
) -> None:
    """The first signal stops the server, the second one at once.

    Not in a worker: a terminal, or systemd, sends signals to all processes, and the
    supervisor passes on what they mean.
    """
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async for number in signals:
            if is_worker:
                server.stop()
                continue
            log.info("%s: stopping", signal.Signals(number).name)
            server.stop(at_once=server.stopped)


def _leave(server: Server) -> None:
    """End a process whose handlers still run: Python would wait for them."""
    error = sys.exc_info()[1]
    log.warning("%d handlers still run; leaving without them", server.dataplane.threads)
    if error is not None:
        _tell(error)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if error is None else 1)
