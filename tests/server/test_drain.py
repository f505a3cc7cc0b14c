"""The end of a server, of one process and of several: what it still answers.

And a rolling restart, in which no request fails. Real processes, signals and clients.
"""

from __future__ import annotations

import asyncio
import http.client
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import anyio
import grpc.aio
import numpy as np
import pytest

from tests.clients.calls import Stub, infer_request
from tests.server.fleet import (
    APP,
    PREDICT,
    Fleet,
    Load,
    exists,
    is_alive,
    memory_of,
    pid_of,
    status_of,
    until,
)
from tests.server.process import PATIENCE, environment
from tests.server.test_run import refused, report
from tests.transports.client import Client
from tests.transports.h2client import H2Client

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="needs Linux's /proc"
)

GATE = b'{"instances": ["gate"]}'
HEAD = b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
REQUEST = HEAD % (PREDICT.encode(), len(GATE)) + GATE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "app.py").write_text(APP)
    return tmp_path


# --- what is in flight ------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stop_amid_200_requests_fails_none(folder: Path, workers: int) -> None:
    """Of REST on HTTP/1.1 and HTTP/2, and gRPC."""
    (folder / "gate").touch()
    with Fleet(folder, workers=workers) as fleet:
        statuses = asyncio.run(_stop_amid(fleet, folder))
        assert statuses == [200] * 140 + ["OK"] * 60
        pids = fleet.workers
        result = fleet.wait()
        assert not any(exists(pid) for pid in pids)
    assert (result.status, report(result)) == (0, (200, 0))
    assert result.errors == []


async def _stop_amid(fleet: Fleet, folder: Path) -> list[object]:
    found: list[list[object]] = [[], [], []]

    async def rest() -> None:
        async with Client(fleet.port) as client:
            answer = await client.ask(REQUEST)
            assert answer.headers["connection"] == "close"
            found[0].append(answer.status)

    async def h2() -> None:
        async with H2Client(fleet.port) as client:
            streams = [await client.predict("gate") for _ in range(30)]
            for stream in streams:
                found[1].append((await client.answer(stream)).status)

    async def rpc() -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        target = f"127.0.0.1:{fleet.port}"
        async with grpc.aio.insecure_channel(target, options=options) as channel:
            stub, request = Stub(channel), infer_request("m", np.arange(3))
            calls = [stub.ModelInfer(request, timeout=PATIENCE) for _ in range(20)]
            for call in calls:
                await call
                found[2].append((await call.code()).name)

    async with anyio.create_task_group() as tasks:
        for client in [rest] * 80 + [h2] * 2 + [rpc] * 3:
            tasks.start_soon(client)
        came = folder / "came"
        with anyio.fail_after(PATIENCE):
            while not came.exists() or came.stat().st_size < 200:  # noqa: ASYNC110
                await anyio.sleep(0.01)
        fleet.signal(signal.SIGTERM)
        await asyncio.to_thread(refused, fleet.port)
        (folder / "gate").unlink()
    return [status for some in found for status in some]


@pytest.mark.parametrize(
    ("loop", "workers"), [("asyncio", 0), ("uvloop", 0), ("uvloop", 2)]
)
def test_what_waits_to_be_accepted_is_answered(
    folder: Path, loop: str, workers: int
) -> None:
    """Connections that were open, and requests that were sent, when the stop began."""
    (folder / "blocks").touch()
    flags = ("--event_loop", loop)
    with Fleet(folder, *flags, workers=workers) as fleet, fleet.kept(2) as idle:
        owners = {pid_of(connection): connection for connection in idle}
        blocked = []
        for connection in owners.values():
            connection.request("POST", PREDICT, '{"instances": ["block"]}')
            blocked.append(connection)
        until(lambda: _lines(folder / "is blocked") == len(owners))
        with fleet.kept(20) as waiting:
            for connection in waiting:
                connection.request("POST", PREDICT, '{"instances": ["pid"]}')
            fleet.signal(signal.SIGTERM)
            time.sleep(0.2)  # the signal is to be what the event loop meets first
            (folder / "blocks").unlink()
            statuses = [status_of(connection) for connection in waiting]
            statuses += [status_of(connection) for connection in blocked]
        result = fleet.wait()
    assert statuses == [200] * (20 + len(owners))
    assert result.status == 0


def _lines(path: Path) -> int:
    return len(path.read_text()) if path.exists() else 0


@pytest.mark.parametrize("workers", [0, 2])
def test_kept_connections_have_a_last_request(folder: Path, workers: int) -> None:
    """A client cannot know that its idle connection is about to be closed."""
    with Fleet(folder, workers=workers) as fleet, fleet.kept(10) as connections:
        for connection in connections:
            pid_of(connection)
        fleet.signal(signal.SIGTERM)
        refused(fleet.port)
        for connection in connections:
            connection.request("POST", PREDICT, '{"instances": ["pid"]}')
            response = connection.getresponse()
            assert response.status == 200
            assert response.headers["connection"] == "close"
            response.read()
        result = fleet.wait()
    assert result.status == 0


@pytest.mark.parametrize("group", [False, True])
def test_a_second_signal_stops_at_once(folder: Path, group: bool) -> None:
    """Sent to the supervisor, or to all processes, as a terminal's Ctrl-C is."""
    (folder / "gate").touch()
    number = signal.SIGINT if group else signal.SIGTERM
    with Fleet(folder) as fleet:
        pids = fleet.workers

        def send() -> None:
            if group:
                os.killpg(fleet.process.pid, number)
            else:
                fleet.signal(number)

        connection = fleet.begin(PREDICT, {"instances": ["gate"]})
        until(lambda: _lines(folder / "came") == 1)
        send()
        refused(fleet.port)
        assert connection.sock is not None
        assert all(is_alive(pid) for pid in pids if pid in fleet.workers)
        assert fleet.workers  # one waits for the request
        send()
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            status_of(connection)
        connection.close()
        result = fleet.wait()
        assert not any(exists(pid) for pid in pids)
    assert (result.status, report(result)) == (0, (0, 1))
    assert result.errors == []


def test_the_first_signal_to_all_processes_is_one(folder: Path) -> None:
    (folder / "gate").touch()
    with Fleet(folder) as fleet:
        connection = fleet.begin(PREDICT, {"instances": ["gate"]})
        until(lambda: _lines(folder / "came") == 1)
        os.killpg(fleet.process.pid, signal.SIGINT)
        refused(fleet.port)
        # What is no wish for a stop does not count as a second one.
        fleet.signal(signal.SIGHUP)
        fleet.log("SIGHUP: the server is stopping already")
        (folder / "gate").unlink()
        assert status_of(connection) == 200
        connection.close()
        result = fleet.wait()
    assert (result.status, report(result)) == (0, (1, 0))


def test_a_worker_that_ends_amid_a_stop_is_told(folder: Path) -> None:
    """What it held is lost: the log and the status tell."""
    (folder / "gate").touch()
    with Fleet(folder) as fleet, fleet.kept(1) as (connection,):
        holder = pid_of(connection)
        connection.request("POST", PREDICT, GATE)
        until(lambda: _lines(folder / "came") == 1)
        fleet.signal(signal.SIGTERM)
        refused(fleet.port)
        os.kill(holder, signal.SIGKILL)
        result = fleet.wait()
    assert f"worker {holder} had not finished what it held: it was ended" in result.err
    assert result.errors == [
        "kserve-lite: a worker ended amid the stop: what it still held is lost"
    ]
    assert (result.status, report(result)) == (1, (0, 0))


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_an_unload_handler_may_block(folder: Path, loop: str) -> None:
    """A worker that unloads serves nobody, and is not killed for it."""
    unload = """
@model.unload
async def unload():
    time.sleep(1)
    open(f"{os.getpid()} unloaded", "x").close()

if __name__"""
    (folder / "app.py").write_text(APP.replace("\nif __name__", unload))
    with Fleet(folder, "--worker_timeout", "0.5", "--event_loop", loop) as fleet:
        workers = fleet.serving(2)
        result = fleet.stop()
    assert {int(file.name.split()[0]) for file in folder.glob("* unloaded")} == workers
    assert (result.status, report(result)) == (0, (0, 0))


def test_ctrl_c_while_it_starts(folder: Path) -> None:
    """Workers that import the program end without a word."""
    text = "import os\nopen(f'{os.getpid()}.pid', 'w').close()\n"
    text += (
        "while os.path.exists('import waits') and 'KSERVE_LITE_WORKER' in os.environ:"
    )
    text += "\n    __import__('time').sleep(0.01)\n"
    (folder / "app.py").write_text(text + APP)
    with Fleet(folder, serves=False) as fleet:
        until(lambda: len(list(folder.glob("*.pid"))) == 3)
        os.killpg(fleet.process.pid, signal.SIGINT)
        result = fleet.wait()
    assert (result.status, report(result)) == (0, (0, 0))
    assert result.errors == []


def test_the_grace_period_ends_what_hangs(folder: Path) -> None:
    (folder / "gate").touch()
    with Fleet(folder, "--grace_period", "0.2") as fleet:
        connection = fleet.begin(PREDICT, {"instances": ["gate"]})
        until(lambda: _lines(folder / "came") == 1)
        result = fleet.stop()
        connection.close()
    assert (result.status, report(result)) == (0, (0, 1))


# --- nothing is left ----------------------------------------------------------------


@pytest.mark.parametrize("blocks", [False, True])
def test_workers_end_with_their_supervisor(folder: Path, blocks: bool) -> None:
    """Killed, it can tell nobody; one whose event loop is blocked cannot be told."""
    (folder / "gate").touch()
    (folder / "blocks").touch()
    with Fleet(folder, "--worker_timeout", "1") as fleet:
        pids = fleet.serving(2) if not blocks else fleet.workers
        memory = memory_of(fleet.process.pid)
        what = "block" if blocks else "gate"
        connection = fleet.begin(PREDICT, {"instances": [what]})
        until(lambda: _lines(folder / ("is blocked" if blocks else "came")) >= 1)
        fleet.signal(signal.SIGKILL)
        refused(fleet.port) if not blocks else None
        if not blocks:
            (folder / "gate").unlink()
            assert status_of(connection) == 200
        until(lambda: not any(exists(pid) or is_alive(pid) for pid in pids))
        connection.close()
        refused(fleet.port)
    assert memory
    assert not memory & {inode for pid in _pids() for inode in _memory_of(pid)}


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _memory_of(pid: int) -> set[int]:
    try:
        return memory_of(pid)
    except OSError:  # it has ended, or is none of ours
        return set()


# --- restarts -----------------------------------------------------------------------


def test_a_rolling_restart_fails_no_request(folder: Path) -> None:
    with Fleet(folder) as fleet:
        workers = fleet.serving(2)
        with Load(fleet.port) as load:
            load.more()
            (folder / "app.py").write_text(APP + "\nprint('new')\n")
            fleet.signal(signal.SIGHUP)
            fleet.log("all workers are restarted")
            load.more()
        assert load.failures == []
        new = fleet.serving(2)
        assert not new & workers
        assert new <= set(load.answers)
        assert not any(exists(pid) for pid in workers)
        assert fleet.stop().status == 0


def test_a_restart_that_fails_leaves_what_serves(folder: Path) -> None:
    with Fleet(folder) as fleet:
        workers = fleet.serving(2)
        (folder / "load fails").touch()
        fleet.signal(signal.SIGHUP)
        seen = fleet.log("the restart is given up")
        assert "OSError: no such weights" in seen
        assert fleet.serving(2) == workers
        assert fleet.ready()


def test_a_stop_amid_a_restart(folder: Path) -> None:
    with Fleet(folder) as fleet:
        workers = fleet.serving(2)
        (folder / "load waits").touch()
        fleet.signal(signal.SIGHUP)
        until(lambda: len(fleet.workers) == 3)
        pids = fleet.workers
        assert pids > workers
        assert fleet.pid() in workers
        result = fleet.stop()
        assert not any(exists(pid) for pid in pids)
    assert result.status == 0


def test_a_terminal_that_is_closed_stops_it(folder: Path) -> None:
    """Its hangup is the signal that otherwise means a restart."""
    ours, theirs = pty.openpty()
    command = (
        f"exec {sys.executable} app.py --workers 2 --http_port 0 --host 127.0.0.1 "
        f"< {os.ttyname(theirs)} 2> {os.ttyname(theirs)}"
    )
    process = subprocess.Popen(
        ["sh", "-c", command],
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        seen = b""
        while b"curl" not in seen:
            seen += os.read(ours, 1000)
        os.close(theirs)
        os.close(ours)
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
