"""Compare kserve-lite with KServe on this machine, in one run, with wrk.

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
import json
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import machine
import report
from cases import CASES, Case

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
KSERVE_VERSION = "0.21.0"
KSERVE_PYTHON = HERE / ".kserve-venv" / "bin" / "python"


@dataclass(frozen=True, slots=True)
class Contender:
    """A server of the comparison; `{handler}` and `{port}` are filled into `argv`."""

    name: str
    python: Path
    argv: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Round:
    """What one run of wrk saw, and how much of the machine each side took."""

    requests_per_second: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    errors: int
    server_cpu: float  # cores
    wrk_cpu: float  # cores
    other_cpu: float  # cores taken by whatever else ran here
    cpu_us_per_request: float


@dataclass(slots=True)
class Server:
    """A running contender and what has been learnt of it."""

    contender: Contender
    process: subprocess.Popen[bytes]
    port: int
    ready_seconds: float = 0.0
    idle_kib: int = 0
    loaded_kib: int = 0
    peak_kib: int = 0
    extensions: list[str] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)


def contenders(lite_python: Path, only: str | None) -> list[Contender]:
    lite = ("serve_lite.py", "{handler}", "--http_port", "{port}", "--host")
    kserve = ("serve_kserve.py", "{handler}", "--port", "{port}")
    every = [
        Contender("kserve-lite", lite_python, (*lite, "127.0.0.1")),
        Contender("kserve", KSERVE_PYTHON, kserve),
        Contender("kserve-uvloop", KSERVE_PYTHON, (*kserve, "--uvloop")),
    ]
    if only is None:
        return every
    return [one for one in every if (one.name == "kserve-lite") == (only == "lite")]


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


@contextlib.contextmanager
def started(contender: Contender, case: Case, logs: Path) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    filled = [part.format(handler=case.handler, port=port) for part in contender.argv]
    argv = [str(contender.python), str(HERE / filled[0]), *filled[1:]]
    # kserve-lite reads these two of KServe's variables as well, and must not here.
    env = {k: v for k, v in os.environ.items() if k not in ("KSERVE_LOGLEVEL", "PORT")}
    if contender.name == "kserve-lite":
        env["PYTHONPATH"] = str(ROOT)
    else:
        env["KSERVE_LOGLEVEL"] = "WARNING"
    log = logs / f"{contender.name}.log"
    begin = time.monotonic()
    with log.open("wb") as sink:
        process = subprocess.Popen(argv, env=env, stdout=sink, stderr=sink)
    try:
        server = Server(contender, process, port)
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


def answer(server: Server, case: Case, body: bytes) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    headers = {"content-type": "application/json"}
    connection.request("POST", case.path, body, headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    if response.status != 200:
        shown = content[:300].decode(errors="replace")
        raise SystemExit(f"{server.contender.name}: {response.status} {shown}")
    return content


def same(left: Any, right: Any) -> bool:
    """Equal but for absent against null members, and float32 written two ways."""
    if isinstance(left, dict) and isinstance(right, dict):
        keys = left.keys() | right.keys()
        return all(same(left.get(key), right.get(key)) for key in keys)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=1e-5, abs_tol=1e-7)
    return bool(left == right)


def load(server: Server, case: Case, body: Path, seconds: int, count: int) -> Round:
    url = f"http://127.0.0.1:{server.port}{case.path}"
    # One thread drives all connections: on two cores a second one would take the
    # server's. The timeout only matters to large bodies; 2 s would count as errors.
    argv = ["wrk", "-t1", f"-c{count}", f"-d{seconds}s", "--timeout", "60s"]
    argv += ["-s", str(HERE / "post.lua"), url]
    env = dict(os.environ, BENCH_BODY=str(body))
    pid = server.process.pid
    before = machine.seconds(pid)
    text = subprocess.check_output(argv, env=env, text=True)
    after = machine.seconds(pid)
    wall, own, wrk, busy = (b - a for a, b in zip(before, after, strict=True))
    lines = [line for line in text.splitlines() if line.startswith("BENCH ")]
    seen = json.loads(lines[0].removeprefix("BENCH "))
    return Round(
        requests_per_second=seen["requests"] / seen["duration_us"] * 1e6,
        p50_ms=seen["p50_us"] / 1000,
        p99_ms=seen["p99_us"] / 1000,
        max_ms=seen["max_us"] / 1000,
        errors=sum(seen["errors"].values()),
        server_cpu=own / wall,
        wrk_cpu=wrk / wall,
        other_cpu=max(0.0, busy - own - wrk) / wall,
        cpu_us_per_request=own * 1e6 / max(1, seen["requests"]),
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
    servers: Sequence[Server], case: Case, body: Path, options: argparse.Namespace
) -> int:
    """Load the servers in turn; give back how many rounds were thrown away.

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
            seen[name] = load(one, case, body, options.seconds, options.connections)
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


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    chosen = contenders(options.python, options.only)
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        body = scratch / "body.json"
        body.write_bytes(case.body())
        servers = [stack.enter_context(started(c, case, scratch)) for c in chosen]
        answers = [answer(one, case, body.read_bytes()) for one in servers]
        for other in answers[1:]:
            if not same(json.loads(answers[0]), json.loads(other)):
                raise SystemExit(f"answers differ: {answers[0]!r:.300} {other!r:.300}")
        size = body.stat().st_size
        print(f"\n{case.name}: {case.what}; {size:,} byte body", end=", ")
        print(f"{options.connections} connections, {options.seconds} s a round")
        heads = "".join(f"{head:>10}" for head in report.COLUMNS.values())
        print(f"{'round':7}{'server':15}{heads}")
        for one in servers:  # Warm-up: fills caches, and is not counted.
            load(one, case, body, min(2, options.seconds), options.connections)
        discarded = run_rounds(servers, case, body, options)
        for one in servers:
            one.loaded_kib = machine.memory(one.process.pid, "VmRSS")
            one.peak_kib = machine.memory(one.process.pid, "VmHWM")
            one.extensions = machine.mapped_extensions(one.process.pid)
            values = [median(one, column) for column in report.COLUMNS]
            print(report.line("median", one.contender.name, values))
    found = ratios(servers)
    reached = found.get("kserve-lite / kserve")
    met = reached and case.target and reached["of_medians"] >= case.target
    return {
        "case": case.name,
        "what": case.what,
        "request": {"path": case.path, "body_bytes": size},
        "answers_byte_equal": len(set(answers)) == 1,
        "connections": options.connections,
        "seconds": options.seconds,
        "rounds_thrown_away": discarded,
        "target": case.target,
        "target_met": met,
        "ratios": found,
        "servers": {
            one.contender.name: {
                "median": {column: median(one, column) for column in report.COLUMNS},
                "ready_seconds": one.ready_seconds,
                "rss_kib": {"idle": one.idle_kib, "after_load": one.loaded_kib}
                | {"peak": one.peak_kib},
                "extensions_mapped": one.extensions,
                "answer_bytes": len(content),
                "rounds": [asdict(one_round) for one_round in one.rounds],
            }
            for one, content in zip(servers, answers, strict=True)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=int, default=5, help="of each round")
    parser.add_argument("--rounds", type=int, default=3)
    help_retries = "disturbed rounds to throw away and repeat"
    parser.add_argument("--retries", type=int, default=0, help=help_retries)
    help_wait = "seconds to wait at most for a quiet machine before each round"
    parser.add_argument("--wait", type=float, default=0.0, help=help_wait)
    parser.add_argument("--connections", type=int, default=16)
    names = [case.name for case in CASES]
    parser.add_argument("--case", nargs="+", choices=names, default=names)
    parser.add_argument("--only", choices=("lite", "kserve"), help="measure one side")
    help_python = "interpreter for kserve-lite (default: this one)"
    parser.add_argument("--python", type=Path, default=sys.executable, help=help_python)
    options = parser.parse_args()
    # Else `timeout` or `kill` would end this program and leave its servers running.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    ensure_kserve()
    known = machine.facts(options.python, KSERVE_PYTHON)
    known |= {
        "switched_off": report.SWITCHED_OFF,
        "not_measured": report.NOT_MEASURED,
    }
    for case in CASES:
        if case.name in options.case:
            result = known | measure(case, options)
            report.conclude(result)
            # Half a comparison must not replace a whole one.
            report.write(result, f".{options.only}" if options.only else "")


if __name__ == "__main__":
    main()
