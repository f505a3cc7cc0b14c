"""A server of several processes, from outside: its start, its share of the machine.

`spawned` gives a program a process group of its own and ends all of it, whatever has
happened meanwhile: when its first process is killed, KServe's workers live on. What is
asked of a server here counts for its whole tree, the first process and all below it.
Knows nothing of rounds. Linux only; standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import machine
from compare import HERE, ROOT, Contender, Server, free_ports, is_ready

READY = "/v2/health/ready"  # of kserve-lite: whether all of its processes are
_ESTABLISHED = "01"  # in /proc/net/tcp


@dataclass(frozen=True, slots=True)
class Memory:
    """What a process has resident, KiB; in `pss`, what N share counts as one Nth."""

    pss: int
    rss: int


def prepared(contender: Contender, handler: str) -> tuple[list[str], int, int]:
    """The command line of a server, and the two ports that it says."""
    port, grpc_port = free_ports()
    names = {"handler": handler, "port": port, "grpc_port": grpc_port}
    filled = [part.format(**names) for part in contender.argv]
    return [str(contender.python), str(HERE / filled[0]), *filled[1:]], port, grpc_port


@contextlib.contextmanager
def spawned(
    contender: Contender, argv: Sequence[str], log: Path, out: IO[bytes] | int
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server; standard error goes to `log`, standard output to `out`."""
    # As in compare.py: variables that both sides read, and one of them must not.
    env = {k: v for k, v in os.environ.items() if k not in ("KSERVE_LOGLEVEL", "PORT")}
    if contender.is_lite:
        env["PYTHONPATH"] = str(ROOT)
    else:
        env["KSERVE_LOGLEVEL"] = "WARNING"
    with log.open("ab") as sink:
        process = subprocess.Popen(
            argv, env=env, stdout=out, stderr=sink, start_new_session=True
        )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.returncode is None:
        # Not by Popen, which would reap it first if it has ended.
        os.kill(process.pid, signal.SIGTERM)
        end = time.monotonic() + 10
        while time.monotonic() < end and not _has_ended(process):
            time.sleep(0.01)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether it has, unreaped: its number stays that of its group, and no other's."""
    flags = os.WEXITED | os.WNOWAIT | os.WNOHANG
    return os.waitid(os.P_PID, process.pid, flags) is not None


@contextlib.contextmanager
def started(
    contender: Contender,
    handler: str,
    logs: Path,
    *,
    out: IO[bytes] | int = subprocess.DEVNULL,
) -> Iterator[Server]:
    """A server once it is ready and all of its processes have nothing left to do."""
    argv, port, grpc_port = prepared(contender, handler)
    log = logs / f"{contender.name}.log"
    begin = time.monotonic()
    with spawned(contender, argv, log, out) as process:
        while not is_ready(port):
            stop_unless_alive(contender, process, log, begin)
            time.sleep(0.01)
        seconds = time.monotonic() - begin
        # KServe is ready with its first worker, while others still import.
        time.sleep(0.5)
        wait_until_idle(process.pid)
        yield Server(contender, process, port, grpc_port, ready_seconds=seconds)


def stop_unless_alive(
    contender: Contender, process: subprocess.Popen[bytes], log: Path, begin: float
) -> None:
    if _has_ended(process) or time.monotonic() - begin > 60:
        tail = log.read_text(errors="replace")[-2000:]
        raise SystemExit(f"{contender.name} did not become ready:\n{tail}")


def tree(pid: int) -> list[int]:
    """A process, and all below it."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        one = int(path.name)
        with contextlib.suppress(OSError):  # It has ended meanwhile.
            children.setdefault(int(_status(one)[1]), []).append(one)
    found = [pid]
    for one in found:  # It grows on the way.
        found += sorted(children.get(one, []))
    return found


def _status(pid: int) -> list[str]:
    """The fields behind the name: state, parent, ... (proc(5), stat)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def workers(pid: int) -> list[int]:
    """The processes of a server that serve: the first one, if it has no others."""
    below = tree(pid)[1:]
    # KServe's multiprocessing has one more, which looks after semaphores.
    return [one for one in below if "resource_tracker" not in _command(one)] or [pid]


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")


def cpu_seconds(pids: Sequence[int]) -> list[float]:
    """The processor time of each; stops unless all of them live."""
    try:
        found = [machine.server_seconds(one) for one in pids]
        ended = [one for one in pids if _status(one)[0] == "Z"]
    except OSError as error:
        raise SystemExit(f"a process of the server has ended: {error}") from None
    if ended:
        raise SystemExit(f"a process of the server has ended: {ended[0]}")
    return found


def wait_until_idle(pid: int) -> None:
    for one in tree(pid):
        machine.wait_until_idle(one, limit=30.0)


def memory(pid: int) -> Memory:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    found = {line.partition(":")[0]: int(line.split()[1]) for line in lines}
    return Memory(found["Pss"], found["Rss"])


def connections(port: int, pids: Sequence[int]) -> list[int]:
    """How many connections each of the processes has on a port that they serve."""
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    sockets = {
        f"socket:[{row[9]}]"
        for row in rows
        if int(row[1].partition(":")[2], 16) == port and row[3] == _ESTABLISHED
    }
    return [sum(name in sockets for name in _descriptors(pid)) for pid in pids]


def _descriptors(pid: int) -> Iterator[str]:
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # It was closed meanwhile.
            yield str(path.readlink())


def says_ready(port: int, path: str) -> bool:
    """Whether a GET gets a 200, by a plain socket: http.client would take a while."""
    request = f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n"
    with socket.socket() as sock:
        sock.settimeout(5)
        # Else, of many tries at a port where nobody listens yet, one gets that very
        # port for itself and is connected to itself.
        sock.bind(("127.0.0.2", 0))
        try:
            sock.connect(("127.0.0.1", port))
            sock.sendall(request.encode())
            return sock.recv(64).startswith(b"HTTP/1.1 200 ")
        except OSError:
            return False
