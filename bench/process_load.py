"""The parts of process.py that load servers: `workers` and `observing`.

Both go by the rounds of compare.py, with two differences. What a server takes of the
machine is that of its whole tree; and what this program itself takes, which reads a
pipe in one of the parts, is the client's.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import re
import resource
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import answers
import loaders
import machine
import report
import trees
from cases import CASES, WRK, Case, Load
from compare import (
    Contender,
    Round,
    Server,
    ask_all,
    median,
    request_to,
    run_rounds,
    warm_up,
)

CALLS = Load("h2load", "gRPC", 8, 2)
ECHO = next(case for case in CASES if case.name == "v1-echo")
INFER = next(case for case in CASES if case.name == "grpc-small")
AT_LEAST_SCALED = 1.7
AT_LEAST_OBSERVED = 0.85


@dataclass(frozen=True, slots=True)
class Way:
    """How two workers are compared with one."""

    handler: str  # of serve_burn_lite.py
    case: Case
    load: Load


WAYS = {
    "http1": Way("def", ECHO, WRK),
    "http1-async": Way("async", ECHO, WRK),
    "grpc": Way("def", INFER, CALLS),
}


@dataclass(slots=True)
class Shares:
    """How a round was spread over the workers of a server, in the middle of it."""

    connections: list[int] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)  # cores, over the whole round


def lite(
    name: str, options: argparse.Namespace, load: Load, *argv: str, extra: str = ""
) -> Contender:
    flags = ("--http_port", "{port}", "--host", "127.0.0.1", *extra.split())
    return Contender(name, options.python, (*argv, *flags), load)


def client_seconds() -> float:
    own = resource.getrusage(resource.RUSAGE_SELF)
    return own.ru_utime + own.ru_stime + machine.children_seconds()


def load(
    server: Server, case: Case, body: Path, *, seconds: int, answer_bytes: int
) -> tuple[Round, Shares]:
    """One round: as in compare.py, for all processes of the server."""
    pids = trees.tree(server.process.pid)
    serving = trees.workers(server.process.pid)
    shares = Shares()

    def look() -> None:
        shares.connections = trees.connections(server.port, serving)

    in_the_middle = threading.Timer(seconds / 2, look)
    request = request_to(server, case, body)
    before, cpu = _times(), trees.cpu_seconds(pids)
    in_the_middle.start()
    try:
        seen = loaders.run(
            server.contender.load, request, seconds=seconds, answer_bytes=answer_bytes
        )
    finally:
        in_the_middle.join()
    after, later = _times(), trees.cpu_seconds(pids)
    trees.wait_until_idle(server.process.pid)
    each = {pid: b - a for pid, a, b in zip(pids, cpu, later, strict=True)}
    own = sum(each.values())
    wall, client, busy = (b - a for a, b in zip(before, after, strict=True))
    shares.cpu = [each[pid] / wall for pid in serving]
    taken = Round(
        requests_per_second=seen.rate,
        p50_ms=seen.p50,
        p99_ms=seen.p99,
        max_ms=seen.longest,
        errors=seen.errors,
        server_cpu=own / wall,
        client_cpu=client / wall,
        other_cpu=max(0.0, busy - own - client) / wall,
        cpu_us_per_request=own * 1e6 / max(1, seen.requests),
    )
    return taken, shares


def _times() -> tuple[float, float, float]:
    return time.monotonic(), client_seconds(), machine.machine_seconds()


def ratio(one: Server, other: Server) -> dict[str, float]:
    """Of requests a second; min and max are of rounds side by side."""
    pairs = zip(one.rounds, other.rounds, strict=True)
    each = [a.requests_per_second / b.requests_per_second for a, b in pairs]
    rates = [median(server, "requests_per_second") for server in (one, other)]
    costs = [median(server, "cpu_us_per_request") for server in (other, one)]
    return {
        "of_medians": rates[0] / rates[1],
        "min": min(each),
        "max": max(each),
        "cpu_per_request": costs[0] / costs[1],
    }


def rounds_of(
    servers: Sequence[Server], case: Case, options: argparse.Namespace
) -> tuple[int, dict[str, list[Shares]], dict[str, answers.Answer]]:
    """Load the servers in turn; `Server.rounds` has what came of it.

    Gives back how many rounds were thrown away, the shares of every round, the one of
    the warm-up and those thrown away among them, and the answers before any load.
    """
    spread: dict[str, list[Shares]] = {one.contender.name: [] for one in servers}
    with tempfile.TemporaryDirectory() as scratch:
        body = Path(scratch) / "body"
        body.write_bytes(case.body())
        found = ask_all(servers, case, body)
        replies = {
            one.contender.name: reply for one, reply in zip(servers, found, strict=True)
        }

        def turn(server: Server, seconds: int = options.seconds) -> Round:
            name = server.contender.name
            size = replies[name].size
            one, shares = load(server, case, body, seconds=seconds, answer_bytes=size)
            spread[name].append(shares)
            return one

        report.heads()
        for one in servers:
            turn(one, warm_up(options.seconds))
        discarded = run_rounds(servers, turn, options)
    for one in servers:
        values = [median(one, column) for column in report.COLUMNS]
        print(report.line("median", one.contender.name, values))
    return discarded, spread, replies


def summary(server: Server, seconds: int) -> dict[str, Any]:
    return {
        "argv": " ".join(server.contender.argv),
        "client": " ".join(loaders.command(server.contender.load, seconds)),
        "median": {column: median(server, column) for column in report.COLUMNS},
        "rounds": [asdict(one) for one in server.rounds],
    }


def doubts(servers: Sequence[Server]) -> list[str]:
    found = []
    for one in servers:
        name = one.contender.name
        if any(each.errors for each in one.rounds):
            found.append(f"{name} had errors: its rate means nothing")
        if any(each.other_cpu > report.QUIET for each in one.rounds):
            found.append(f"other programs ran beside {name}: measure again")
    return found


# --- workers --------------------------------------------------------------------------


def workers(options: argparse.Namespace) -> dict[str, Any]:
    """Two workers next to one, with a handler that computes."""
    ways, bars, warnings = {}, {}, []
    for name, way in WAYS.items():
        print(
            f"\nworkers, {name}: a handler (`{way.handler}`) that computes, {way.load}"
        )
        with contextlib.ExitStack() as stack:
            logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            script = ("serve_burn_lite.py", way.handler)
            servers = [
                stack.enter_context(trees.started(one, "", logs))
                for one in (
                    lite(
                        f"workers-{count}",
                        options,
                        way.load,
                        *script,
                        extra=f"--workers {count} --access_log false",
                    )
                    for count in (2, 1)
                )
            ]
            discarded, spread, _ = rounds_of(servers, way.case, options)
        two, one = servers
        found = ratio(two, one)
        shares = spread[two.contender.name]
        shown = " ".join("/".join(map(str, each.connections)) for each in shares)
        print(f"connections by worker: {shown}")
        bars[f"workers, {name}: 2 / 1 by req/s"] = {
            "value": found["of_medians"],
            "bar": f">= {AT_LEAST_SCALED}",
            "met": found["of_medians"] >= AT_LEAST_SCALED,
        }
        warnings += doubts(servers)
        ways[name] = {
            "handler": way.handler,
            "request": {"path": way.case.path},
            "load": str(way.load),
            "rounds_thrown_away": discarded,
            "ratio": found,
            "spread": [asdict(each) for each in shares],
            "servers": {
                each.contender.name: summary(each, options.seconds) for each in servers
            },
        }
    return {
        "what": "a handler of bytecode, some 2.5 ms, with 2 workers next to 1",
        "switched_off": {"kserve-lite": "the access log (--access_log false)"},
        "not_measured": "more than 2 workers; HTTP/2 without gRPC; new connections",
        "seconds": options.seconds,
        "bars": bars,
        "warnings": warnings,
        "ways": ways,
    }


# --- observing ------------------------------------------------------------------------

OBSERVED = {
    "log-to-file": "as a user starts it, standard output to a file on disk",
    "log-to-pipe": "the same, to a pipe that this program reads",
    "no-log": "--access_log false",
    "uncounted": "the same, and nothing is counted: no user can have this",
}


@dataclass(slots=True)
class Reader:
    """Reads a pipe to its end, and counts the lines of predictions."""

    pipe: IO[bytes]
    lines: int = 0

    def run(self) -> None:
        with self.pipe:
            rest = b""
            while chunk := os.read(self.pipe.fileno(), 65536):
                whole, end, last = (rest + chunk).rpartition(b"\n")
                self.lines += (whole + end).count(b":predict ")
                rest = last


def counted(port: int) -> int:
    """How many predictions `/metrics` tells of."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    pattern = r'^kserve_lite_requests_total\{.*method="predict".*\} (\S+)$'
    return sum(int(float(one)) for one in re.findall(pattern, text, re.MULTILINE))


def observing(options: argparse.Namespace) -> dict[str, Any]:
    """What the access log and counting cost a V1 echo.

    Each round has servers of its own, and medians over many rounds count: two of the
    same command differ in speed by more than what is looked for.
    """
    print("\nobserving: V1 echo, what log and metrics cost")
    totals: list[Server] = []
    found: Counter[str] = Counter()
    logged: Counter[str] = Counter()
    discarded = 0
    once = argparse.Namespace(**vars(options) | {"rounds": 1})
    for number in range(options.rounds):
        with contextlib.ExitStack() as stack:
            # Not in /tmp, which may be memory.
            scratch = tempfile.TemporaryDirectory(dir="/var/tmp")
            logs = Path(stack.enter_context(scratch))
            access = stack.enter_context((logs / "access.log").open("wb"))
            servers, reader = _observed(options, stack, logs, access)
            shift = number % len(servers)
            order = [*servers[shift:], *servers[:shift]]
            discarded += rounds_of(order, ECHO, once)[0]
            time.sleep(0.5)  # Lines are written together, a few times a second.
            found.update({one.contender.name: counted(one.port) for one in servers})
            with (logs / "access.log").open("rb") as text:
                logged["log-to-file"] += sum(b":predict " in line for line in text)
            logged["log-to-pipe"] += reader.lines
        if not totals:
            totals = servers
            continue
        for total, one in zip(totals, servers, strict=True):
            total.rounds += one.rounds
    if found["uncounted"]:
        raise SystemExit(
            "the yardstick counts requests: serve_uncounted_lite.py is old"
        )
    for one in totals:
        values = [median(one, column) for column in report.COLUMNS]
        print(report.line("all", one.contender.name, values))
    warnings = doubts(totals)
    for name, lines in logged.items():
        print(f"{name}: {lines:,} lines for {found[name]:,} requests")
        if lines != found[name]:
            warnings.append(f"{name} did not write a line for each request")
    bare = totals[-1]
    ratios = {one.contender.name: ratio(one, bare) for one in totals[:-1]}
    bars = {}
    for name in logged:
        for by, value in {
            "req/s": ratios[name]["of_medians"],
            "CPU a request": ratios[name]["cpu_per_request"],
        }.items():
            bars[f"observing, {name} / uncounted by {by}"] = {
                "value": value,
                "bar": f">= {AT_LEAST_OBSERVED}",
                "met": value >= AT_LEAST_OBSERVED,
            }
    return {
        "what": "V1 echo with access log and metrics, and without",
        "switched_off": OBSERVED,
        "not_measured": "JSON lines; tracing; latency log; a scrape under load; gRPC",
        "seconds": options.seconds,
        "rounds_thrown_away": discarded,
        "bars": bars,
        "warnings": warnings,
        "requests_counted": dict(found),
        "lines_written": dict(logged),
        "ratios_to_uncounted": ratios,
        "servers": {
            one.contender.name: summary(one, options.seconds) for one in totals
        },
    }


def _observed(
    options: argparse.Namespace,
    stack: contextlib.ExitStack,
    logs: Path,
    access: IO[bytes],
) -> tuple[list[Server], Reader]:
    """Start the servers of OBSERVED; the reader is of the one that logs to a pipe."""
    echo, off = ("serve_echo_lite.py",), "--access_log false"
    plans: dict[str, tuple[tuple[str, ...], str, IO[bytes] | int]] = {
        "log-to-file": (echo, "", access),
        "log-to-pipe": (echo, "", subprocess.PIPE),
        "no-log": (echo, off, access),
        "uncounted": (("serve_uncounted_lite.py",), off, access),
    }
    servers = []
    for name, (argv, extra, out) in plans.items():
        one = lite(name, options, WRK, *argv, extra=extra)
        servers.append(stack.enter_context(trees.started(one, "", logs, out=out)))
        pipe = servers[-1].process.stdout
        if pipe is not None:
            reader = Reader(pipe)
            threading.Thread(target=reader.run, daemon=True).start()
    return servers, reader
