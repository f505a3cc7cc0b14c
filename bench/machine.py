"""What the machine says: versions, memory of a process, and processor time.

Everything is read from /proc and from the programs themselves, so Linux only. Nothing
here knows of cases or rounds; compare.py asks before and after each of them. A client
may also be given its place before all that compute.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import resource
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, cast

PACKAGES = ("kserve", "uvicorn", "fastapi", "starlette", "pydantic", "uvloop")
TRANSPORT = ("httptools", "h11", "hpack", "anyio", "orjson", "numpy")
GRPC = ("grpcio", "grpclib", "protobuf")
TORCH = ("torch", "torchvision")
EXTENSIONS = ("uvloop", "httptools", "orjson")
ROOT = Path(__file__).resolve().parent.parent


def go_first() -> None:
    """Make this process a real-time one, before all that compute, where it may be.

    A client on another machine waits for none of the server's processors.
    """
    with contextlib.suppress(PermissionError):  # permitted to root
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))


def versions(python: Path) -> dict[str, str]:
    script = (
        "import importlib.metadata as m, json, platform, sys\n"
        "found = {'python': platform.python_version()}\n"
        "for name in sys.argv[1:]:\n"
        "    try: found[name] = m.version(name)\n"
        "    except m.PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    argv = [str(python), "-c", script, *PACKAGES, *TRANSPORT, *GRPC, *TORCH]
    return cast("dict[str, str]", json.loads(subprocess.check_output(argv)))


def output_of(*argv: str) -> str:
    """The first line that a command prints; of two streams, the one with text."""
    result = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, check=False)
    return (result.stdout or result.stderr).strip().partition("\n")[0]


def facts(environments: dict[str, Path]) -> dict[str, Any]:
    """What a result says of where it was taken; kserve-lite's interpreter first."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    models = [line for line in cpuinfo.splitlines() if line.startswith("model name")]
    commit = output_of("git", "describe", "--always", "--abbrev=12")
    changed = output_of("git", "status", "--porcelain", "kserve_lite") != ""
    commit = "not committed" if commit.startswith("fatal") else f"git {commit}"
    found = {name: versions(python) for name, python in environments.items()}
    lite = next(iter(found.values()))
    lite["kserve-lite"] = commit + (" with uncommitted changes" if changed else "")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpu": models[0].partition(":")[2].strip() if models else "unknown",
            "cores": len(os.sched_getaffinity(0)),
            "kernel": platform.release(),
        },
        "versions": programs() | found,
    }


def programs() -> dict[str, Any]:
    """The versions of the programs that send, as far as they are here."""
    found = {}
    for name, flag in {"wrk": "-v", "h2load": "--version", "curl": "--version"}.items():
        if shutil.which(name):
            text = output_of(name, flag).partition(" Copyright")[0]
            found[name] = text.partition(" (")[0]
    return found


def memory(pid: int, key: str) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    lines = (line.split() for line in status.splitlines())
    return next(int(line[1]) for line in lines if line[0] == f"{key}:")


def reset_peak(pid: int) -> None:
    """Let VmHWM begin anew at what is resident now (proc(5), clear_refs)."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def mapped_extensions(pid: int) -> list[str]:
    maps = Path(f"/proc/{pid}/maps").read_text()
    return [name for name in EXTENSIONS if f"/{name}/" in maps]


def server_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def machine_seconds() -> float:
    """Busy time of all cores, and what the host took from them (steal)."""
    busy = Path("/proc/stat").read_text().split()
    ticks = sum(int(busy[at]) for at in (1, 2, 3, 6, 7, 8))
    return ticks / os.sysconf("SC_CLK_TCK")


def children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def seconds(pid: int) -> tuple[float, float, float, float]:
    """Now, and the processor time of a server, of finished children, of the machine."""
    return time.monotonic(), server_seconds(pid), children_seconds(), machine_seconds()


def wait_until_idle(pid: int, limit: float) -> None:
    """Return once a process took no processor time for 0.1 s, or after `limit`."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        before = server_seconds(pid)
        time.sleep(0.1)
        if server_seconds(pid) == before:
            return


def wait_until_quiet(limit: float, cores: float) -> None:
    """Return once everything here took under `cores` for a second, or after `limit`."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        before = machine_seconds()
        time.sleep(1.0)
        if machine_seconds() - before < cores:
            return
