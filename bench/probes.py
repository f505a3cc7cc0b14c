"""Whether kserve-lite answers probes while every thread is busy with a prediction.

`python bench/probes.py [--way python ...]` starts a server, gives every thread that it
has for `def` handlers a prediction that lasts, and meanwhile sends GET /v2/health/live
200 times a second for some seconds, on a schedule (open_loop.py). It prints a line for
each way of being busy and round and writes bench/results/probes.json. No KServe: it
calls a `def` on its event loop, so there a probe waits until the prediction has ended.

Standard library only, so that any interpreter runs it.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import machine
import report
from cases import WRK, Case
from compare import Contender, Server, started
from open_loop import offer, percentile, request_bytes

HERE = Path(__file__).resolve().parent
RATE = 200  # probes a second
BAR = 10.0  # ms, p99
THREADS = min(32, (os.cpu_count() or 1) + 4)  # as kserve-lite takes by default
WAYS = {
    "idle": "no prediction runs",
    "sleep": "time.sleep",
    "torch": "torch, 1024 x 1024 matrix products: all cores, without the GIL",
    "python": "bytecode that keeps the GIL until it is taken away",
}
NOT_MEASURED = (
    "one call into C that keeps the GIL, which stops every thread of the process until "
    "it returns; probes on new connections; gRPC and HTTP/2"
)


@dataclass(frozen=True, slots=True)
class Probed:
    """One round; latencies are from when a probe was due, `late` is the client's."""

    p50_ms: float
    p99_ms: float
    max_ms: float
    late_p99_ms: float
    failed: int  # any answer but 200, or none
    server_cpu: float  # cores
    client_cpu: float
    other_cpu: float


def post(port: int, model: str, payload: dict[str, Any]) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", f"/v1/models/{model}:predict", json.dumps(payload))
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise SystemExit(f"{model} answered {answer.status}: {content[:300]!r}")
        return json.loads(content)["predictions"]
    finally:
        connection.close()


def occupied(port: int, *, release: bool = False) -> int:
    return int(post(port, "threads", {"release": release})[0])


@contextlib.contextmanager
def all_threads(port: int, way: str) -> Iterator[None]:
    """Every thread of the server has a prediction to run, from entry to exit."""
    occupied(port)  # Takes back the last release.
    callers = [
        threading.Thread(target=post, args=(port, "busy", {"how": way}))
        for _ in range(THREADS)
    ]
    for caller in callers:
        caller.start()
    end = time.monotonic() + 20
    while (found := occupied(port)) < THREADS:
        if time.monotonic() > end:
            raise SystemExit(f"{found} of {THREADS} threads became busy")
        time.sleep(0.05)
    yield
    if occupied(port, release=True) != THREADS:
        raise SystemExit("not every thread was busy to the end")
    for caller in callers:
        caller.join()


def measure(server: Server, request: Path, seconds: float) -> Probed:
    pid = server.process.pid
    before = machine.seconds(pid)
    seen = offer(server.port, request, seconds=seconds, connections=1, rate=RATE)
    after = machine.seconds(pid)
    wall, own, client, busy = (b - a for a, b in zip(before, after, strict=True))
    latencies = [one.latency_ms for one in seen.samples]
    return Probed(
        p50_ms=percentile(latencies, 50),
        p99_ms=percentile(latencies, 99),
        max_ms=max(latencies),
        late_p99_ms=percentile([one.late_ms for one in seen.samples], 99),
        failed=sum(one.status != 200 for one in seen.samples),
        server_cpu=own / wall,
        client_cpu=client / wall,
        other_cpu=max(0.0, busy - own - client) / wall,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", nargs="+", choices=WAYS, default=list(WAYS))
    help_python = "interpreter for kserve-lite, with torch (default: this one)"
    parser.add_argument("--python", type=Path, default=sys.executable, help=help_python)
    help_results = "folder for the JSON (default: bench/results)"
    default_results = HERE / "results"
    parser.add_argument(
        "--results", type=Path, default=default_results, help=help_results
    )
    options = parser.parse_args()
    known = machine.facts({"kserve-lite's environment": options.python})
    argv = ("serve_busy_lite.py", "--http_port", "{port}", "--host", "127.0.0.1")
    contender = Contender("kserve-lite", options.python, argv, WRK)
    case = Case("probes", "/v2/health/live", "", bytes, "")
    print(f"probes: {RATE} GET {case.path} a second, {options.seconds:g} s a round,")
    print(f"with a prediction in each of {THREADS} threads")
    heads = ("p50 ms", "p99 ms", "max ms", "late p99", "other CPU", "failed")
    print(f"{'round':7}{'busy with':14}" + "".join(f"{head:>10}" for head in heads))
    rounds: dict[str, list[Probed]] = {way: [] for way in options.way}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        request = scratch / "request"
        request.write_bytes(request_bytes("GET", case.path))
        with started(contender, case, scratch) as server:
            for number in range(options.rounds):
                for way, seen in rounds.items():
                    with contextlib.ExitStack() as stack:
                        if way != "idle":
                            stack.enter_context(all_threads(server.port, way))
                        one = measure(server, request, options.seconds)
                    seen.append(one)
                    values = (
                        one.p50_ms,
                        one.p99_ms,
                        one.max_ms,
                        one.late_p99_ms,
                        one.other_cpu,
                    )
                    text = "".join(f"{value:10.2f}" for value in values)
                    print(f"{number + 1:<7}{way:14}{text}{one.failed:10}", flush=True)
    worst = {way: max(one.p99_ms for one in seen) for way, seen in rounds.items()}
    failed = any(one.failed for seen in rounds.values() for one in seen)
    for way, p99 in worst.items():
        met = "met" if p99 < BAR else "NOT met"
        print(f"{way}: p99 {p99:.2f} ms at most; bar {BAR:g} ms: {met}")
    if failed:
        print("WARNING: some probes failed")
    if any(one.other_cpu > report.QUIET for seen in rounds.values() for one in seen):
        print("WARNING: other programs ran on this machine: measure again")
    result = known | {
        "case": "probes",
        "what": f"GET {case.path}, {RATE} a second, all {THREADS} threads busy",
        "switched_off": {"kserve-lite": report.SWITCHED_OFF["kserve-lite"]},
        "not_measured": NOT_MEASURED,
        "seconds": options.seconds,
        "bar_ms": BAR,
        "bar_met": not failed and all(p99 < BAR for p99 in worst.values()),
        "ways": {
            way: {
                "what": WAYS[way],
                "worst_p99_ms": worst[way],
                "rounds": [asdict(one) for one in seen],
            }
            for way, seen in rounds.items()
        },
    }
    report.save(result, options.results / "probes.json")


if __name__ == "__main__":
    main()
