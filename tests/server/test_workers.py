"""Several processes that serve as one: start, balance, failures, readiness, models.

Real processes, real signals and real clients. Linux tells who is whose child.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from kserve_lite import Model, SettingsError, serve
from kserve_lite.counters import Board
from kserve_lite.server.control import LONGEST
from kserve_lite.server.orders import MOST
from kserve_lite.server.sockets import Ports
from kserve_lite.server.worker import Assignment
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
from tests.server.process import PATIENCE, environment, finish
from tests.server.test_run import CLI, free_port, one_line, report
from tests.transports.client import echo, model_of

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="needs Linux's /proc"
)

LOOPS = ["asyncio", "uvloop"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "app.py").write_text(APP)
    return tmp_path


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two workers for the tests that leave them as they were."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "app.py").write_text(APP)
    second = free_port()
    with Fleet(folder, "--grpc_port", str(second), "--worker_timeout", "0") as fleet:
        fleet.second = second
        yield fleet
        assert fleet.stop().status == 0


# --- start ------------------------------------------------------------------------


WAYS: list[tuple[str, ...]] = [
    ("app.py",),
    ("-m", "app"),
    (*CLI, "app:model"),
]


@pytest.mark.parametrize("program", WAYS, ids=" ".join)
def test_ways_to_start(folder: Path, program: tuple[str, ...]) -> None:
    with Fleet(folder, program=program) as fleet:
        workers = fleet.serving(2)
        assert memory_of(fleet.process.pid) == memory_of(min(workers))
        result = fleet.stop()
        assert not any(exists(pid) for pid in workers)
    assert (result.status, report(result)) == (0, (0, 0))
    assert result.errors == []


def test_the_banner_comes_once_when_all_are_ready(folder: Path) -> None:
    (folder / "load waits").touch()
    with Fleet(folder, "--http_port", "0", workers=3, serves=False) as fleet:
        until(lambda: len(fleet.workers) == 3)
        (folder / "load waits").unlink()
        seen = fleet.log("curl")
        assert seen.count("serves m on") == 1
        assert "Traceback" not in seen
        result = fleet.stop()
    assert "serves m on" not in result.err


def test_the_argument_of_run_counts(folder: Path) -> None:
    """And a program that goes elsewhere before it serves is started where it was."""
    (folder / "elsewhere").mkdir()
    text = APP.replace("run(model)", "os.chdir('elsewhere'); run(model, workers=2)")
    (folder / "app.py").write_text(text)
    with Fleet(folder, workers=0) as fleet:
        assert len(fleet.serving(2)) == 2


def test_the_supervisor_does_not_import_the_program(folder: Path) -> None:
    (folder / "app.py").write_text(
        APP + "\nwith open('imports', 'a') as file: file.write(f'{os.getpid()} ')\n"
    )
    with Fleet(folder, program=(*CLI, "app:model")) as fleet:
        workers = fleet.serving(2)
        imported = {int(pid) for pid in (folder / "imports").read_text().split()}
    assert imported == workers


def test_what_a_worker_starts_is_no_worker(folder: Path) -> None:
    """Not before `run()` has been called, and not after."""
    text = """
import signal, subprocess, sys
code = "from kserve_lite.server.worker import assignment; print(assignment())"
code += "; import signal; print(signal.pthread_sigmask(signal.SIG_BLOCK, []))"
done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
assert done.stdout == "None\\nset()\\n", done
"""
    load = """def load():
    assert 'KSERVE_LITE_WORKER' not in os.environ
    for name in os.listdir('/proc/self/fd'):
        if int(name) > 2 and os.path.exists(f'/proc/self/fd/{name}'):
            assert not os.get_inheritable(int(name)), name
    status = subprocess.run(["cat", "/proc/self/status"], capture_output=True)
    masks = dict(line.split(b":") for line in status.stdout.splitlines())
    assert not int(masks[b"SigBlk"], 16)
    assert not int(masks[b"SigIgn"], 16) & 1 << signal.SIGHUP - 1
"""
    (folder / "app.py").write_text(text + APP.replace("def load():", load))
    with Fleet(folder) as fleet:
        assert len(fleet.serving(2)) == 2


@pytest.mark.parametrize("count", ["0", "-1", "many", "1025"])
def test_a_number_of_workers_that_cannot_be(folder: Path, count: str) -> None:
    line = one_line(finish("app.py", "--workers", count, cwd=folder, PORT="0"))
    assert "--workers" in line


def test_a_program_without_a_file_cannot_be_started_again(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-", "--workers", "2", "--http_port", "0"],
        input=APP,
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("kserve-lite: --workers and --reload start this ")
    assert len(done.stderr.splitlines()) == 1


def test_serve_has_no_workers() -> None:
    for settings in ({"workers": 2}, {"reload": True}):
        with pytest.raises(SettingsError, match="use run"):
            serve(model_of(echo), **settings)


# --- connections --------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
def test_kept_connections_are_shared_evenly(folder: Path, loop: str) -> None:
    with Fleet(folder, "--event_loop", loop) as fleet, fleet.kept(64) as connections:
        shares = Counter(pid_of(connection) for connection in connections)
    # 32 each, but where the machine gives one of them no time to come.
    assert len(shares) == 2
    assert min(shares.values()) >= 16, shares


def test_all_protocols_come_to_all_workers(shared: Fleet) -> None:
    workers = shared.serving(2)
    for port in (shared.port, shared.second):
        with Load(port) as load:
            until(lambda: load.failures or workers | {"grpc"} <= set(load.answers))
        assert load.failures == []


def test_a_blocked_worker_holds_up_no_new_connection(shared: Fleet) -> None:
    folder, workers = shared.folder, shared.serving(2)
    (folder / "blocks").touch()
    blocked = shared.begin(PREDICT, {"instances": ["block"]})
    until((folder / "is blocked").exists)
    (other,) = {shared.pid() for _ in range(20)}
    assert other in workers
    (folder / "blocks").unlink()
    assert status_of(blocked) == 200
    blocked.close()


def test_too_many_open_files_only_delay(shared: Fleet) -> None:
    workers = shared.serving(2)
    before = {pid: limit_files(pid) for pid in workers}
    with shared.kept(4) as connections:
        shared.log("no connection can be accepted: Too many open files")
        for pid in workers:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before[pid])
        assert {pid_of(connection) for connection in connections} <= workers


def limit_files(pid: int) -> tuple[int, int]:
    """Have a process open no further file; return what it was allowed."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, before[1]))
    return before


def test_what_is_in_flight_is_known_of_all_workers(shared: Fleet) -> None:
    """Also when one alone is asked for metrics; and that it is over."""
    gate, workers = shared.folder / "gate", shared.serving(2)
    gate.touch()
    with shared.kept(17) as (asked, *connections):

        def known() -> str:
            asked.request("GET", "/metrics")
            return asked.getresponse().read().decode()

        for connection in connections:
            connection.request("POST", PREDICT, '{"instances": ["gate"]}')
        in_flight = 'kserve_lite_requests_in_flight{model_name="m"}'
        until(lambda: f"{in_flight} 16.0" in known())
        gate.unlink()
        owners = {json.loads(c.getresponse().read())["pid"] for c in connections}
        assert owners == workers
        until(lambda: f"{in_flight} 0.0" in known())


# --- failures -----------------------------------------------------------------------


def test_a_killed_worker_loses_only_what_it_held(folder: Path) -> None:
    with Fleet(folder) as fleet:
        first, second = sorted(fleet.serving(2))
        with fleet.kept(8) as connections, Load(fleet.port) as load:
            owners = [pid_of(connection) for connection in connections]
            load.more()
            os.kill(first, signal.SIGKILL)
            for owner, connection in zip(owners, connections, strict=True):
                if owner == second:
                    assert pid_of(connection) == second
            seen = fleet.log(f"worker {first} failed: it was ended by SIGKILL")
            until(lambda: len(fleet.workers) == 2)
            fleet.log("loaded m")
            load.more()
        # Each of the clients had one connection, and one request on it, at most.
        assert len(load.failures) <= 6
        assert "starting another in 0.2 s" in seen
        assert first not in fleet.serving(2)
        assert "kserve_lite_worker_restarts_total 1.0" in metrics(fleet)
        assert 'kserve_lite_workers{state="ready"} 2.0' in metrics(fleet)
        assert fleet.stop().status == 0


def test_a_worker_that_cannot_be_started_is_tried_again(folder: Path) -> None:
    """Neither then nor at a restart is it the end of those that serve."""
    with Fleet(folder) as fleet:
        first, second = sorted(fleet.serving(2))
        before = limit_files(fleet.process.pid)
        fleet.signal(signal.SIGHUP)
        reason = "it could not be started: [Errno 24] Too many open files"
        fleet.log(f"the workers that serve go on: {reason}")
        os.kill(first, signal.SIGRTMIN + 1)
        fleet.log(f"worker {first} failed: it was ended by signal ")
        fleet.log(f"a worker failed: {reason}; starting another in 0.4 s")
        resource.prlimit(fleet.process.pid, resource.RLIMIT_NOFILE, before)
        assert second in fleet.serving(2)
        assert fleet.stop().status == 0


def metrics(fleet: Fleet) -> str:
    import urllib.request

    with urllib.request.urlopen(f"{fleet.url}/metrics", timeout=PATIENCE) as answer:
        text: str = answer.read().decode()
        return text


def test_a_blocked_worker_is_seen_and_replaced(folder: Path) -> None:
    (folder / "blocks").touch()
    with Fleet(folder, "--worker_timeout", "1.5") as fleet:
        workers = fleet.serving(2)
        blocked = fleet.begin(PREDICT, {"instances": ["block"]})
        seen = fleet.log("was blocked for 1.5 s (worker_timeout)")
        assert "has been blocked for 1." in seen
        assert "plain def" in seen
        with pytest.raises((ConnectionResetError, http.client.RemoteDisconnected)):
            status_of(blocked)
        blocked.close()
        assert len(fleet.serving(2) & workers) == 1


def test_a_machine_that_was_suspended_has_no_blocked_worker(folder: Path) -> None:
    with Fleet(folder, "--worker_timeout", "1") as fleet:
        workers = fleet.serving(2)
        os.killpg(fleet.process.pid, signal.SIGSTOP)
        time.sleep(1.3)
        os.killpg(fleet.process.pid, signal.SIGCONT)
        assert fleet.serving(2) == workers
        # One that is stopped alone is as good as blocked.
        os.kill(min(workers), signal.SIGSTOP)
        fleet.log(f"worker {min(workers)} failed: its event loop was blocked for 1 s")
        assert max(workers) in fleet.serving(2)


def test_a_long_load_is_no_blocked_loop(folder: Path) -> None:
    """At the start, and on demand."""
    text = APP.replace(
        "@model.load\ndef load():",
        "@model.load\nasync def load():\n    open('loads', 'a').write('x')",
    )
    (folder / "app.py").write_text(text)
    (folder / "load waits").touch()
    with Fleet(folder, "--worker_timeout", "0.8", serves=False) as fleet:
        loads = folder / "loads"
        until(lambda: loads.exists() and loads.stat().st_size == 2)
        workers = fleet.workers
        time.sleep(1.2)  # what is waited for is that nothing happens
        (folder / "load waits").unlink()
        fleet._read_banner()
        assert fleet.serving(2) == workers
        (folder / "load waits").touch()
        connection = fleet.begin("/v2/repository/models/m/load", {})
        until(lambda: loads.stat().st_size == 4)
        time.sleep(1.2)
        (folder / "load waits").unlink()
        assert status_of(connection) == 200
        connection.close()
        assert fleet.serving(2) == workers


def test_a_load_that_fails_at_the_start_is_told_once(folder: Path) -> None:
    (folder / "load fails").touch()
    flags = ("--http_port", "0", "--workers", "3", "--host", "127.0.0.1")
    result = finish("app.py", *flags, cwd=folder)
    assert result.status == 1
    (line,) = result.errors
    assert line.startswith("kserve-lite: model 'm' failed to load: OSError: no such")
    assert "app.py:" in line


def test_a_long_reason_is_told() -> None:
    """Also where the supervisor is slow to read what was said before."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)  # as an event loop does
    filled = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            filled += theirs.send(b"x" * 1000)
    given = Assignment(theirs, Board(), 0, Ports([], []), False, (), ())
    said = bytearray()

    def fail() -> None:
        with theirs:
            given.fail("y" * 1_000_000)

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join(0.2)  # it is to wait until somebody reads
    with ours:
        while data := ours.recv(10_000):
            said.extend(data)
    thread.join()
    message = json.loads(said[filled:])
    assert message == {"kind": "failed", "reason": "y" * LONGEST}


def test_a_model_that_is_not_there_is_told_once(folder: Path) -> None:
    flags = ("--http_port", "0", "--workers", "3", "--host", "127.0.0.1")
    result = finish(*CLI, "app:modle", *flags, cwd=folder)
    assert result.status == 1
    (line,) = result.errors
    assert "did you mean app:model?" in line


def test_five_quick_failures_are_the_end(folder: Path) -> None:
    with Fleet(folder) as fleet:
        first, second = sorted(fleet.serving(2))
        (folder / "import exits").touch()
        os.kill(first, signal.SIGKILL)
        result = fleet.wait()
        assert not is_alive(second)
    assert result.status == 1
    (line,) = result.errors
    assert line == (
        "kserve-lite: a worker has failed 5 times in a row: it ended by itself with "
        "status 9, before it served"
    )
    assert result.err.count("starting another in") == 4


def test_a_load_that_fails_later_is_tried_again(folder: Path) -> None:
    with Fleet(folder) as fleet:
        first, second = sorted(fleet.serving(2))
        (folder / "load fails").touch()
        os.kill(first, signal.SIGKILL)
        fleet.log("failed: model 'm' failed to load: OSError: no such weights")
        assert fleet.pid() == second
        assert fleet.ready()
        (folder / "load fails").unlink()
        assert second in fleet.serving(2)


def test_no_request_meets_a_worker_that_loads(folder: Path) -> None:
    with Fleet(folder) as fleet:
        first, second = sorted(fleet.serving(2))
        (folder / "load waits").touch()
        os.kill(first, signal.SIGKILL)
        until(lambda: len(fleet.workers - {first}) == 2)
        assert {fleet.pid() for _ in range(20)} == {second}
        assert fleet.ready()
        (folder / "load waits").unlink()
        assert second in fleet.serving(2)


def test_a_worker_that_is_told_to_stop_is_no_failure(folder: Path) -> None:
    with Fleet(folder) as fleet:
        first, second = sorted(fleet.serving(2))
        os.kill(first, signal.SIGTERM)
        fleet.log(f"worker {first} was stopped: starting another in 0.2 s")
        assert second in fleet.serving(2)


# --- readiness --------------------------------------------------------------------


def test_live_from_the_first_moment_and_ready_when_all_are(folder: Path) -> None:
    text = APP.replace('"load waits"', 'f"load waits {os.getpid() % 2}"')
    (folder / "app.py").write_text(text)
    port = free_port()
    waits = [folder / "load waits 0", folder / "load waits 1"]
    for file in waits:
        file.touch()
    with Fleet(folder, "--http_port", str(port), serves=False) as fleet:
        fleet.url = f"http://127.0.0.1:{port}"
        until(lambda: len(fleet.workers) == 2)
        parities = {pid % 2 for pid in fleet.workers}
        until(lambda: connects(fleet) and fleet.ask("/v2/health/live")[0] == 200)
        for parity in (0, 1):
            assert not fleet.ready()
            waits[parity].unlink()
            if parity == 0 and parities == {0, 1}:
                fleet.log("loaded m")
        until(fleet.ready)
        assert {fleet.ready() for _ in range(10)} == {True}


def connects(fleet: Fleet) -> bool:
    try:
        fleet.ask("/v2/health/live")
    except OSError:
        return False
    return True


def test_one_model_that_says_no_is_the_whole_server_s(folder: Path) -> None:
    """At the start, too."""
    text = APP.replace('"not ready"', 'f"not ready {os.getpid()}"')
    text = text.replace("@model.load", "os.path.exists('no') and no()\n\n@model.load")
    no = "def no():\n    open(f'not ready {os.getpid()}', 'x')\n\n"
    (folder / "app.py").write_text(no + text)
    with Fleet(folder) as fleet:
        first = min(fleet.serving(2))
        assert fleet.ready()
        file = folder / f"not ready {first}"
        file.touch()
        until(lambda: {fleet.ready() for _ in range(6)} == {False})
        file.unlink()
        until(lambda: {fleet.ready() for _ in range(6)} == {True})
        (folder / "no").touch()
        os.kill(first, signal.SIGKILL)
        until(lambda: len(fleet.workers - {first}) == 2)
        seen = [metrics(fleet)]
        while 'state="serving"} 1.0' not in seen[-1]:
            assert 'state="ready"} 1.0' in seen[-1]  # not two, not for a moment
            seen.append(metrics(fleet))
        assert not any(fleet.ready() for _ in range(6))


@pytest.mark.anyio
async def test_a_ready_handler_that_raises_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each time that it begins to: it is asked each second."""
    raises: list[type[BaseException]] = []

    async def ready() -> bool:
        for error in raises:
            raise error("no")
        return True

    model = Model("m", predict=echo, ready=ready)
    async with serve(model, http_port=0, host="127.0.0.1") as server:
        told = []
        for error in (OSError, SystemExit):
            assert await server.dataplane.ready()
            raises.append(error)
            assert not await server.dataplane.ready()
            assert not await server.dataplane.ready()
            raises.clear()
            told.append(caplog.text.count("the ready handler of model m failed"))
    assert told == [1, 2]


# --- models -------------------------------------------------------------------------


def test_unload_and_load_reach_every_worker(folder: Path) -> None:
    with Fleet(folder) as fleet, fleet.kept(8) as connections:
        workers = fleet.serving(2)
        assert {pid_of(connection) for connection in connections} == workers

        def statuses() -> set[int]:
            found = set()
            for connection in connections:
                connection.request("GET", "/v2/models/m")
                response = connection.getresponse()
                response.read()
                found.add(response.status)
            return found

        assert fleet.ask("/v2/repository/models/m/unload", {})[0] == 200
        assert statuses() == {404}
        assert fleet.ask("/v2/repository/models/m/unload", {})[0] == 404
        # A worker that starts now begins with what holds now.
        os.kill(min(workers), signal.SIGKILL)
        fleet.log("failed: it was ended by SIGKILL")
        until(lambda: len(fleet.workers - {min(workers)}) == 2)
        until(lambda: 'state="ready"} 0.0' in metrics(fleet))
        assert {fleet.ask("/v2/models/m")[0] for _ in range(10)} == {404}
        assert fleet.ask("/v2/repository/models/m/load", {})[0] == 200
        assert fleet.ready()
        assert max(workers) in fleet.serving(2)


def test_a_load_that_fails_is_told(shared: Fleet) -> None:
    file = shared.folder / "load fails"
    file.touch()
    status, answer = shared.ask("/v2/repository/models/m/load", {})
    file.unlink()
    assert status == 503
    assert "What was loaded before still answers." in answer["error"]
    assert len(shared.serving(2)) == 2
    assert shared.ask("/v2/repository/models/other/load", {})[0] == 503


def test_loads_that_wait_are_bounded(shared: Fleet) -> None:
    with shared.kept(MOST + 5) as connections:
        (shared.folder / "load waits").touch()
        for connection in connections:
            connection.request("POST", "/v2/repository/models/m/load", "{}")

        def refused() -> int:
            sockets = [connection.sock for connection in connections]
            return len(select.select(sockets, [], [], 0)[0])

        # One is carried out, and as many wait.
        until(lambda: refused() == 5 - 1)
        (shared.folder / "load waits").unlink()
        statuses = Counter(status_of(connection) for connection in connections)
        assert statuses == {200: MOST + 1, 503: 4}
        assert shared.ready()


def test_a_load_that_takes_too_long_is_told_so(folder: Path) -> None:
    """And what was told not to be done is not done later; what runs, goes on."""
    text = APP.replace("def load():", "def load():\n    open('loads', 'a').write('x')")
    text = text.replace(
        "    run(model)",
        "    from kserve_lite.server import orders\n"
        "    orders.TIMEOUT = 0.5\n"
        "    run(model)",
    )
    (folder / "app.py").write_text(text)
    loads = folder / "loads"
    with Fleet(folder) as fleet, fleet.kept(2) as connections:
        workers = fleet.serving(2)
        loads.write_text("")
        (folder / "load waits").touch()
        for connection in connections:
            connection.request("POST", "/v2/repository/models/m/load", "{}")
        for connection in connections:
            with connection.getresponse() as response:
                assert response.status == 503
                assert json.loads(response.read()) == {
                    "error": "Model with name m is not ready. "
                    "Not all workers have obeyed in time."
                }
        until(lambda: loads.stat().st_size == 2)  # both workers have begun
        (folder / "load waits").unlink()
        tries: list[int] = []

        def loaded() -> bool:
            tries.append(fleet.ask("/v2/repository/models/m/load", {})[0])
            return tries[-1] == 200

        until(loaded)
        assert loads.stat().st_size <= 2 + 2 * len(tries)
        assert fleet.ready()
        assert fleet.serving(2) == workers


def test_workers_that_come_and_go_amid_a_load(folder: Path) -> None:
    """One that dies holds it up no longer; its successor obeys when the others have."""
    with Fleet(folder) as fleet, fleet.kept(1) as (connection,):
        asked = pid_of(connection)
        (other,) = fleet.workers - {asked}
        assert fleet.ask("/v2/repository/models/m/unload", {})[0] == 200
        (folder / "load waits").touch()
        connection.request("POST", "/v2/repository/models/m/load", "{}")
        until(lambda: 'state="ready"} 0.0' in metrics(fleet))
        os.kill(other, signal.SIGKILL)
        fleet.log(f"worker {other} failed")
        until(lambda: 'state="serving"} 2.0' in metrics(fleet))
        (folder / "load waits").unlink()
        assert status_of(connection) == 200
        assert asked in fleet.serving(2)
