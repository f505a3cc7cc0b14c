"""Servers that have processes of Ray, loaded in turn by wrk.

What counts as a side's processor time is that of the processes that answer, its front
and its replicas; Ray's daemons, which all sides share, are counted apart. Knows nothing
of what the sides are.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import loaders
import machine
import process_load
import report
import trees
from compare import Round, Server, median, run_rounds, warm_up


@dataclass(frozen=True, slots=True)
class Side:
    """A server, what it is sent, and the processes that answer for it.

    others: all processes of Ray, less those that are among `pids`.
    """

    server: Server
    request: loaders.Request
    answer_bytes: int
    pids: Sequence[int]
    others: Sequence[int] = ()


def titled(pids: Sequence[int], *titles: str) -> list[int]:
    """The actors of these names, which Ray writes into their command lines."""
    names = [f"ray::{title}" for title in titles]
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):  # It has ended meanwhile.
            line = Path(f"/proc/{pid}/cmdline").read_text()
            if any(name in line for name in names):
                found.append(pid)
    return found


def pss(pids: Sequence[int]) -> int:
    """Of all together, KiB."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += trees.memory(pid).pss
    return total


def turn(side: Side, seconds: int) -> tuple[Round, float]:
    """One round, and the cores that the rest of the cluster took meanwhile."""
    before, cpu, rest = _times(), trees.cpu_seconds(side.pids), _rest(side)
    seen = loaders.run(
        side.server.contender.load,
        side.request,
        seconds=seconds,
        answer_bytes=side.answer_bytes,
    )
    after, later, then = _times(), trees.cpu_seconds(side.pids), _rest(side)
    for pid in side.pids:
        machine.wait_until_idle(pid, limit=5.0)
    wall, client, busy = (b - a for a, b in zip(before, after, strict=True))
    own = sum(later) - sum(cpu)
    beside = sum(took - rest[pid] for pid, took in then.items() if pid in rest)
    one = Round(
        requests_per_second=seen.rate,
        p50_ms=seen.p50,
        p99_ms=seen.p99,
        max_ms=seen.longest,
        errors=seen.errors,
        server_cpu=own / wall,
        client_cpu=client / wall,
        other_cpu=max(0.0, busy - own - beside - client) / wall,
        cpu_us_per_request=own * 1e6 / max(1, seen.requests),
    )
    return one, beside / wall


def _times() -> tuple[float, float, float]:
    return time.monotonic(), process_load.client_seconds(), machine.machine_seconds()


def _rest(side: Side) -> dict[int, float]:
    """What Ray's own processes took so far; idle ones may end at any time."""
    found = {}
    for pid in set(side.others) - set(side.pids):
        with contextlib.suppress(OSError):
            found[pid] = machine.server_seconds(pid)
    return found


def compared(sides: Sequence[Side], options: argparse.Namespace) -> dict[str, Any]:
    """Load all in turn, and put the first beside each other one."""
    by_name = {side.server.contender.name: side for side in sides}
    rest: list[float] = []

    def taking(server: Server, seconds: int = options.seconds) -> Round:
        one, cores = turn(by_name[server.contender.name], seconds)
        rest.append(cores)
        return one

    servers = [side.server for side in sides]
    report.heads()
    for server in servers:
        taking(server, warm_up(options.seconds))
    discarded = run_rounds(servers, taking, options)
    for server in servers:
        values = [median(server, column) for column in report.COLUMNS]
        print(report.line("median", server.contender.name, values))
    own, *others = servers
    ratios = {}
    for other in others:
        label = f"{own.contender.name} / {other.contender.name}"
        ratios[label] = process_load.ratio(own, other) | {
            "p50": median(own, "p50_ms") / median(other, "p50_ms")
        }
        shown = ", ".join(f"{key} {value:.2f}" for key, value in ratios[label].items())
        print(f"{label}: {shown}")
    return {
        "rounds_thrown_away": discarded,
        "cores_of_the_rest_of_ray": statistics.median(rest),
        "ratios": ratios,
        "warnings": process_load.doubts(servers),
        "servers": {
            one.contender.name: {
                "median": {column: median(one, column) for column in report.COLUMNS},
                "rounds": [asdict(each) for each in one.rounds],
            }
            for one in servers
        },
    }
