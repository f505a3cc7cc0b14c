"""Compare kserve-lite with KServe on this machine, in one run, with wrk and h2load.

`python bench/compare.py [--case v1-echo ...]` starts one process of each server on a
free loopback port, checks that all give the same answer to the same request, then
loads them in turn for several rounds, in an order that shifts by one each round. It
prints each round, the medians and the ratios, and writes bench/results/<case>.json
and .svg. KServe lives in an environment of its own, bench/.kserve-venv, made on the
first run. bench/README.md says how to read the result.

Standard library only, so that any interpreter runs it.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import answers
import loaders
import machine
import report
from cases import CASES, Case, Load

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
KSERVE_VERSION = "0.21.0"
KSERVE_PYTHON = HERE / ".kserve-venv" / "bin" / "python"


@dataclass(frozen=True, slots=True)
class Contender:
    """A server of the comparison, and how it is loaded.

    `{handler}`, `{port}` and `{grpc_port}` are filled into `argv`.
    """

    name: str
    python: Path
    argv: tuple[str, ...]
    load: Load

    @property
    def is_lite(self) -> bool:
        return self.argv[0].endswith("_lite.py")


@dataclass(frozen=True, slots=True)
class Round:
    """What one run of wrk or h2load saw, and how much of the machine each side took."""

    requests_per_second: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    errors: int
    server_cpu: float  # cores
    client_cpu: float  # cores, of wrk or h2load
    other_cpu: float  # cores taken by whatever else ran here
    cpu_us_per_request: float


@dataclass(slots=True)
class Server:
    """A running contender and what has been learnt of it."""

    contender: Contender
    process: subprocess.Popen[bytes]
    port: int
    grpc_port: int  # of KServe; kserve-lite has one port for everything
    ready_seconds: float = 0.0
    idle_kib: int = 0
    loaded_kib: int = 0
    peak_kib: int = 0
    extensions: list[str] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)


def lite(python: Path, load: Load) -> Contender:
    argv = ("serve_lite.py", "{handler}", "--http_port", "{port}")
    return Contender("kserve-lite", python, (*argv, "--host", "127.0.0.1"), load)


def contenders(case: Case, options: argparse.Namespace) -> list[Contender]:
    load = case.load
    if load.program == "wrk" and options.connections is not None:
        load = replace(load, connections=options.connections)
    every = [lite(options.python, load)]
    if case.rival is not None:
        every.append(replace(every[0], name=case.against, load=case.rival))
    else:
        kserve = ("serve_kserve.py", "{handler}", "--port", "{port}")
        grpc = ("--grpc_port", "{grpc_port}") if load.protocol == "gRPC" else ()
        argv, uvloop = (*kserve, *grpc), (*kserve, *grpc, "--uvloop")
        every.append(Contender("kserve", KSERVE_PYTHON, argv, load))
        every.append(Contender("kserve-uvloop", KSERVE_PYTHON, uvloop, load))
    if options.only is None:
        return every
    return [one for one in every if one.is_lite == (options.only == "lite")]


def ensure_kserve() -> None:
    """Make bench/.kserve-venv, unless it already holds the pinned KServe."""
    exists = KSERVE_PYTHON.exists()
    if exists and machine.versions(KSERVE_PYTHON).get("kserve") == KSERVE_VERSION:
        return
    print(f"installing kserve {KSERVE_VERSION} into {KSERVE_PYTHON.parents[1]}")
    venv = str(KSERVE_PYTHON.parents[1])
    subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
    pins = str(HERE / "kserve-requirements.txt")
    install = [str(KSERVE_PYTHON), "-m", "pip", "install", "-q", "-r", pins]
    subprocess.run(install, check=True)


def free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1]), int(other.getsockname()[1])


@contextlib.contextmanager
def started(contender: Contender, case: Case, logs: Path) -> Iterator[Server]:
    port, grpc_port = free_ports()
    names = {"handler": case.handler, "port": port, "grpc_port": grpc_port}
    filled = [part.format(**names) for part in contender.argv]
    argv = [str(contender.python), str(HERE / filled[0]), *filled[1:]]
    # kserve-lite reads these two of KServe's variables as well, and must not here.
    env = {k: v for k, v in os.environ.items() if k not in ("KSERVE_LOGLEVEL", "PORT")}
    if contender.is_lite:
        env["PYTHONPATH"] = str(ROOT)
    else:
        env["KSERVE_LOGLEVEL"] = "WARNING"
    log = logs / f"{contender.name}.log"
    begin = time.monotonic()
    with log.open("wb") as sink:
        process = subprocess.Popen(argv, env=env, stdout=sink, stderr=sink)
    try:
        server = Server(contender, process, port, grpc_port)
        while not is_ready(port):
            if process.poll() is not None or time.monotonic() - begin > 60:
                tail = log.read_text(errors="replace")[-2000:]
                raise SystemExit(f"{contender.name} did not become ready:\n{tail}")
            time.sleep(0.01)
        server.ready_seconds = time.monotonic() - begin
        time.sleep(1.0)  # Let start-up work end, so that idle memory is idle memory.
        server.idle_kib = machine.memory(process.pid, "VmRSS")
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def load_port(server: Server) -> int:
    contender = server.contender
    if contender.load.protocol == "gRPC" and not contender.is_lite:
        return server.grpc_port
    return server.port


def request_to(server: Server, case: Case, body: Path) -> loaders.Request:
    url = f"http://127.0.0.1:{load_port(server)}{case.path}"
    return loaders.Request(url, case.headers, body)


def ask_all(servers: Sequence[Server], case: Case, body: Path) -> list[answers.Answer]:
    """The answer of each server to the request of the case; all must be the same."""
    if case.load.protocol == "gRPC":
        ports = [load_port(one) for one in servers]
        found = answers.ask_grpc(ports, case, body, KSERVE_PYTHON)
    else:
        found = []
        for one in servers:
            request = request_to(one, case, body)
            http2 = one.contender.load.protocol == "HTTP/2"
            found.append(answers.ask_rest(one.contender.name, request, http2=http2))
    first = found[0]
    for other in found[1:]:
        if not answers.same(first.value, other.value):
            shown = f"{first.value!r:.400}\n{other.value!r:.400}"
            raise SystemExit(f"answers differ:\n{shown}")
    return found


def load(
    server: Server, case: Case, body: Path, *, seconds: int, answer_bytes: int
) -> Round:
    request, pid = request_to(server, case, body), server.process.pid
    before = machine.seconds(pid)
    seen = loaders.run(
        server.contender.load, request, seconds=seconds, answer_bytes=answer_bytes
    )
    after = machine.seconds(pid)
    # Requests that were left unanswered are still computed, at the cost of who is next.
    machine.wait_until_idle(pid, limit=30.0)
    wall, own, client, busy = (b - a for a, b in zip(before, after, strict=True))
    return Round(
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


def median(server: Server, name: str) -> float:
    return float(statistics.median(getattr(one, name) for one in server.rounds))


def ratios(servers: Sequence[Server]) -> dict[str, dict[str, float]]:
    """Of the first server to each other one; min and max are of rounds side by side."""
    first, *others = servers
    found = {}
    if first.contender.name != "kserve-lite":
        return {}
    for other in others:
        pairs = zip(first.rounds, other.rounds, strict=True)
        each = [a.requests_per_second / b.requests_per_second for a, b in pairs]
        rates = [median(one, "requests_per_second") for one in (first, other)]
        costs = [median(one, "cpu_us_per_request") for one in (other, first)]
        found[f"kserve-lite / {other.contender.name}"] = {
            "of_medians": rates[0] / rates[1],
            "min": min(each),
            "max": max(each),
            "cpu_per_request": costs[0] / costs[1],
        }
    return found


def run_rounds(
    servers: Sequence[Server],
    turn: Callable[[Server], Round],
    options: argparse.Namespace,
) -> int:
    """Give the servers their turns; return how many rounds were thrown away.

    A round counts or is thrown away for all servers at once, and only what other
    programs took of the machine decides, never a rate: so it cannot favour anyone.
    """
    discarded = 0
    number = 0
    while number < options.rounds:
        machine.wait_until_quiet(options.wait, report.QUIET)
        shift = number % len(servers)
        order = [*servers[shift:], *servers[:shift]]
        seen = {}
        for one in order:
            name = one.contender.name
            seen[name] = turn(one)
            values = [getattr(seen[name], column) for column in report.COLUMNS]
            note = f"  {seen[name].errors} ERRORS" if seen[name].errors else ""
            print(report.line(str(number + 1), name, values) + note, flush=True)
        disturbed = any(one.other_cpu > report.QUIET for one in seen.values())
        if disturbed and discarded < options.retries:
            discarded += 1
            print("        disturbed by other programs: thrown away")
            continue
        for one in servers:
            one.rounds.append(seen[one.contender.name])
        number += 1
    return discarded


def warm_up(seconds: int) -> int:
    """How long a load goes before the rounds, which have so many seconds."""
    return min(seconds, max(2, seconds // 4))


def conclude_server(server: Server) -> None:
    """Note what a server has come to after its last round, and print its medians."""
    pid = server.process.pid
    server.loaded_kib = machine.memory(pid, "VmRSS")
    server.peak_kib = machine.memory(pid, "VmHWM")
    server.extensions = machine.mapped_extensions(pid)
    values = [median(server, column) for column in report.COLUMNS]
    print(report.line("median", server.contender.name, values))


def summary(server: Server, reply: answers.Answer, seconds: int) -> dict[str, Any]:
    load = server.contender.load
    return {
        "load": str(load),
        "client": " ".join(loaders.command(load, seconds)),
        "median": {column: median(server, column) for column in report.COLUMNS},
        "ready_seconds": server.ready_seconds,
        "rss_kib": {"idle": server.idle_kib, "after_load": server.loaded_kib}
        | {"peak": server.peak_kib},
        "extensions_mapped": server.extensions,
        "answer_bytes": reply.size,
        "rounds": [asdict(one) for one in server.rounds],
    }


def measure(
    case: Case, chosen: Sequence[Contender], options: argparse.Namespace
) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        body = scratch / "body"
        body.write_bytes(case.body())
        servers = [stack.enter_context(started(c, case, scratch)) for c in chosen]
        replies = ask_all(servers, case, body)
        names = [one.contender.name for one in servers]
        sizes = dict(zip(names, (one.size for one in replies), strict=True))
        size = body.stat().st_size
        loads = {str(one.contender.load): None for one in servers}
        seconds = options.seconds or case.seconds
        print(f"\n{case.name}: {case.what}; {size:,} byte body", end=", ")
        print(f"{' against '.join(loads)}, {seconds} s a round")
        report.heads()

        def turn(server: Server, seconds: int = seconds) -> Round:
            size = sizes[server.contender.name]
            return load(server, case, body, seconds=seconds, answer_bytes=size)

        for one in servers:  # Warm-up: fills caches, and is not counted.
            turn(one, warm_up(seconds))
        discarded = run_rounds(servers, turn, options)
        for one in servers:
            conclude_server(one)
    found = ratios(servers)
    reached = found.get(f"kserve-lite / {case.against}")
    met = reached and case.target and reached["of_medians"] >= case.target
    return {
        "case": case.name,
        "what": case.what,
        "request": {"path": case.path, "body_bytes": size},
        "answers_byte_equal": len({one.content for one in replies}) == 1,
        "seconds": seconds,
        "rounds_thrown_away": discarded,
        "target": case.target,
        "target_is_against": case.against,
        "target_met": met,
        "ratios": found,
        "servers": {
            one.contender.name: summary(one, reply, seconds)
            for one, reply in zip(servers, replies, strict=True)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    help_seconds = "of each round (default: 5; 10 and 30 where answers take long)"
    parser.add_argument("--seconds", type=int, help=help_seconds)
    parser.add_argument("--rounds", type=int, default=3)
    help_retries = "disturbed rounds to throw away and repeat"
    parser.add_argument("--retries", type=int, default=0, help=help_retries)
    help_wait = "seconds to wait at most for a quiet machine before each round"
    parser.add_argument("--wait", type=float, default=0.0, help=help_wait)
    help_connections = "of wrk (default: 16); h2load's are fixed by the case"
    parser.add_argument("--connections", type=int, help=help_connections)
    names = [case.name for case in CASES]
    parser.add_argument("--case", nargs="+", choices=names, default=names)
    parser.add_argument("--only", choices=("lite", "kserve"), help="measure one side")
    help_python = "interpreter for kserve-lite (default: this one)"
    parser.add_argument("--python", type=Path, default=sys.executable, help=help_python)
    help_results = "folder for the JSON and the plot (default: bench/results)"
    default_results = HERE / "results"
    parser.add_argument(
        "--results", type=Path, default=default_results, help=help_results
    )
    options = parser.parse_args()
    # Else `timeout` or `kill` would end this program and leave its servers running.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    cases = [case for case in CASES if case.name in options.case]
    require_programs(cases)
    ensure_kserve()
    known = machine.facts(
        {
            "kserve-lite's environment": options.python,
            "kserve's environment": KSERVE_PYTHON,
        }
    )
    known |= {
        "switched_off": report.SWITCHED_OFF,
        "not_measured": report.NOT_MEASURED,
    }
    for case in cases:
        chosen = contenders(case, options)
        if not chosen:
            print(f"\n{case.name}: kserve-lite only, so nothing to measure here")
            continue
        result = known | measure(case, chosen, options)
        report.conclude(result)
        # Half a comparison must not replace a whole one.
        suffix = f".{options.only}" if options.only and not case.rival else ""
        report.write(result, options.results, suffix)


def require_programs(cases: Sequence[Case]) -> None:
    programs = {case.load.program for case in cases}
    if any(case.load.protocol == "HTTP/2" for case in cases):
        loaders.require([*programs, "nghttp"])
    loaders.require(programs)


if __name__ == "__main__":
    main()
