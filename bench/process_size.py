"""The parts of process.py about a server that is just there: `start` and `memory`.

One server runs at a time: a start has the machine to itself, and PSS divides a page by
all processes that have it. Those that are compared take turns in each round.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import loaders
import machine
import report
import trees
from cases import CASES, WRK, Case, Load
from compare import KSERVE_PYTHON, Contender, Server, ask_all, request_to
from process_load import client_seconds

READY = "/v2/models/echo/ready"
POLL = 0.002  # seconds
AT_MOST_START = 0.4
AT_MOST_MEMORY = 0.45
# New connections each time, and many: each worker is to have some.
CALLS = Load("h2load", "gRPC", 16)
ECHO = next(case for case in CASES if case.name == "v1-echo")
INFER = next(case for case in CASES if case.name == "grpc-small")
GRPC = ("--grpc_port", "{grpc_port}")
WORKERS = ("--workers", "2")


def contender(name: str, python: Path, *extra: str) -> Contender:
    """Of kserve-lite or of KServe, by its name."""
    if name.startswith("kserve-lite"):
        ours = ("serve_echo_lite.py", "--http_port", "{port}", "--host", "127.0.0.1")
        return Contender(name, python, (*ours, *extra), WRK)
    theirs = ("serve_kserve.py", "echo_both", "--port", "{port}")
    return Contender(name, KSERVE_PYTHON, (*theirs, *extra), WRK)


# --- start ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """From the start of the process to the first 200."""

    seconds: float
    cpu_seconds: float  # of all processes of the server
    other_cpu: float  # cores


def start(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds until a model is ready."""
    python = options.python
    # Of what each one has a rival: the same, as far as it can be, on KServe.
    pairs = (
        (contender("kserve-lite", python), contender("kserve", python, *GRPC)),
        (
            contender("kserve-lite-no-grpc", python, "--enable_grpc", "false"),
            contender("kserve-no-grpc", python),
        ),
        (
            contender("kserve-lite-workers-2", python, *WORKERS),
            contender("kserve-workers-2", python, *GRPC, *WORKERS),
        ),
    )
    chosen = [one for pair in pairs for one in pair]
    print(f"\nstart: seconds to the first 200 of GET {READY}, asked every 2 ms")
    print(f"{'round':7}{'server':24}{'seconds':>10}{'CPU s':>10}{'others':>10}")
    seen: dict[str, list[Start]] = {one.name: [] for one in chosen}
    with tempfile.TemporaryDirectory() as logs:
        for one in chosen:
            _start(one, Path(logs))  # Reads every file once, and compiles it.
        for number in range(options.rounds):
            machine.wait_until_quiet(options.wait, report.QUIET)
            shift = number % len(chosen)
            for one in (*chosen[shift:], *chosen[:shift]):
                taken = _start(one, Path(logs))
                seen[one.name].append(taken)
                _print(str(number + 1), one.name, taken)
    middle = {name: _median(each) for name, each in seen.items()}
    for name, each in middle.items():
        _print("median", name, each)
    bars = {}
    ratios = {
        f"{a.name} / {b.name}": _ratio(seen[a.name], seen[b.name]) for a, b in pairs
    }
    for name, found in ratios.items():
        bars[f"start, {name}"] = {
            "value": found["of_medians"],
            "bar": f"<= {AT_MOST_START}",
            "met": found["of_medians"] <= AT_MOST_START,
        }
    return {
        "what": f"seconds from exec to the first 200 of GET {READY}, page cache warm",
        "switched_off": report.SWITCHED_OFF["kserve"],
        "not_measured": "a cold page cache; a model that loads anything",
        "bars": bars,
        "warnings": [
            f"other programs ran while {name} started: measure again"
            for name, each in middle.items()
            if each.other_cpu > report.QUIET
        ],
        "ratios": ratios,
        "servers": {
            one.name: {
                "argv": " ".join(one.argv),
                "path": _path(one),
                "median": asdict(middle[one.name]),
                "rounds": [asdict(each) for each in seen[one.name]],
            }
            for one in chosen
        },
    }


def _path(one: Contender) -> str:
    """What is asked: of several workers of kserve-lite, whether all are ready.

    KServe has no such thing: the first of its workers that serves answers.
    """
    return trees.READY if one.is_lite and "--workers" in one.argv else READY


def _start(one: Contender, logs: Path) -> Start:
    argv, port, _ = trees.prepared(one, "")
    path, log = _path(one), logs / f"{one.name}.log"
    client, busy = client_seconds(), machine.machine_seconds()
    begin = time.monotonic()
    with trees.spawned(one, argv, log, subprocess.DEVNULL) as process:
        while not trees.says_ready(port, path):
            trees.stop_unless_alive(one, process, log, begin)
            time.sleep(POLL)
        wall = time.monotonic() - begin
        busy = machine.machine_seconds() - busy
        own = sum(trees.cpu_seconds(trees.tree(process.pid)))
        client = client_seconds() - client
        return Start(wall, own, max(0.0, busy - own - client) / wall)


def _print(label: str, name: str, one: Start) -> None:
    values = (one.seconds, one.cpu_seconds, one.other_cpu)
    text = "".join(f"{value:10.3f}" for value in values)
    print(f"{label:7}{name:24}{text}", flush=True)


def _median(seen: Sequence[Start]) -> Start:
    return Start(
        statistics.median(one.seconds for one in seen),
        statistics.median(one.cpu_seconds for one in seen),
        statistics.median(one.other_cpu for one in seen),
    )


def _ratio(ours: Sequence[Start], theirs: Sequence[Start]) -> dict[str, float]:
    each = [a.seconds / b.seconds for a, b in zip(ours, theirs, strict=True)]
    one, other = _median(ours), _median(theirs)
    return {
        "of_medians": one.seconds / other.seconds,
        "min": min(each),
        "max": max(each),
        "cpu_seconds": one.cpu_seconds / other.cpu_seconds,
    }


# --- memory ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Resident:
    """Memory of a server's processes, KiB, after a load."""

    workers: list[trees.Memory]
    supervisor: trees.Memory
    whole_pss: int  # of all of its processes


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """What each of two workers has resident once it has served."""
    both = (
        contender("kserve-lite", options.python, *WORKERS),
        contender("kserve", options.python, *GRPC, *WORKERS),
    )
    print("\nmemory: MiB with 2 workers, after V1 echo and after gRPC as well")
    heads = ("worker PSS", "RSS", "first PSS", "RSS", "all PSS")
    print(f"{'round':7}{'server':13}{'after':7}" + "".join(f"{h:>12}" for h in heads))
    seen: dict[str, dict[str, list[Resident]]] = {
        one.name: {"v1": [], "grpc": []} for one in both
    }
    for number in range(options.rounds):
        for one in both if number % 2 == 0 else both[::-1]:
            for when, found in _measure(one).items():
                seen[one.name][when].append(found)
                values = [_pss(found), _rss(found)]
                values += [found.supervisor.pss, found.supervisor.rss, found.whole_pss]
                text = "".join(f"{value / 1024:12.1f}" for value in values)
                print(f"{number + 1:<7}{one.name:13}{when:7}{text}", flush=True)
    medians = {
        name: {when: _middle(found) for when, found in each.items()}
        for name, each in seen.items()
    }
    ours, theirs = (medians[one.name] for one in both)
    bars = {}
    for when in ours:
        for what in ("worker_pss", "worker_rss"):
            value = ours[when][what] / theirs[when][what]
            bars[f"memory, {what} after {when}"] = {
                "value": value,
                "bar": f"<= {AT_MOST_MEMORY}",
                "met": value <= AT_MOST_MEMORY,
            }
    for name, each in medians.items():
        shown = ", ".join(f"{k} {v / 1024:.1f}" for k, v in each["grpc"].items())
        print(f"{name}: MiB {shown}")
    return {
        "what": "PSS and RSS of a worker (smaps_rollup, KiB), the mean of two",
        "switched_off": report.SWITCHED_OFF["kserve"],
        "not_measured": "a model of any size; KServe with gRPC in its workers, "
        "where it serves none",
        "bars": bars,
        "warnings": [],
        "medians_kib": medians,
        "servers": {
            one.name: {
                "argv": " ".join(one.argv),
                "rounds": {
                    when: [asdict(found) for found in each]
                    for when, each in seen[one.name].items()
                },
            }
            for one in both
        },
    }


def _measure(one: Contender) -> dict[str, Resident]:
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        with trees.started(one, "", scratch) as server:
            trees.cpu_seconds([server.process.pid])  # It lives.
            _load(server, ECHO, WRK, scratch, trees.workers(server.process.pid))
            after_v1 = _resident(server)
            # In KServe, gRPC is the business of the first process alone.
            pids = trees.workers(server.process.pid) if one.is_lite else []
            _load(server, INFER, CALLS, scratch, pids)
            return {"v1": after_v1, "grpc": _resident(server)}


def _load(
    server: Server, case: Case, load: Load, scratch: Path, pids: Sequence[int]
) -> None:
    """Send a second's requests, until each of these processes had some."""
    body = scratch / "body"
    body.write_bytes(case.body())
    same = replace(server, contender=replace(server.contender, load=load))
    (reply,) = ask_all([same], case, body)
    request = request_to(same, case, body)
    idle = set(pids)
    for _ in range(10):
        before = dict(zip(pids, trees.cpu_seconds(pids), strict=True))
        seen = loaders.run(load, request, seconds=1, answer_bytes=reply.size)
        if seen.errors:
            raise SystemExit(f"{server.contender.name}: {seen.errors} errors")
        after = dict(zip(pids, trees.cpu_seconds(pids), strict=True))
        # A worker that had no connection has beaten and answered pings.
        idle -= {pid for pid in pids if after[pid] - before[pid] > 0.1}
        if not idle:
            break
    else:
        raise SystemExit(f"{server.contender.name}: a worker got no connection")
    trees.wait_until_idle(server.process.pid)


def _resident(server: Server) -> Resident:
    pids = trees.tree(server.process.pid)
    found = {pid: trees.memory(pid) for pid in pids}
    serving = trees.workers(server.process.pid)
    return Resident(
        workers=[found[pid] for pid in serving],
        supervisor=found[server.process.pid],
        whole_pss=sum(one.pss for one in found.values()),
    )


def _pss(found: Resident) -> float:
    return statistics.mean(one.pss for one in found.workers)


def _rss(found: Resident) -> float:
    return statistics.mean(one.rss for one in found.workers)


def _middle(found: Sequence[Resident]) -> dict[str, float]:
    return {
        "worker_pss": statistics.median(_pss(one) for one in found),
        "worker_rss": statistics.median(_rss(one) for one in found),
        "supervisor_pss": statistics.median(one.supervisor.pss for one in found),
        "supervisor_rss": statistics.median(one.supervisor.rss for one in found),
        "whole_pss": statistics.median(one.whole_pss for one in found),
    }
