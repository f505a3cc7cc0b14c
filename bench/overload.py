"""What kserve-lite does with twice the load that it can carry.

`python bench/overload.py` starts AlexNet with batching and, in each round, first finds
the peak with a closed loop that is never refused, then offers multiples of it on a
schedule (open_loop.py, Poisson arrivals): how many answers a second come in time,
how fast the others are refused, and whether anything else happens. Prints each step and
the targets, and writes bench/results/overload.json. Bodies are those of alexnet.py,
602 KB, refused or not. No KServe: it refuses nothing, so what waits grows for ever.

Standard library only, so that any interpreter runs it.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import alexnet
import machine
import report
from alexnet import CASE, LITE, WAYS
from compare import Server, started
from open_loop import offer, percentile, request_bytes

HERE = Path(__file__).resolve().parent
GOODPUT_TARGET = 0.95  # of the peak of the same round
REFUSED_TARGET = 10.0  # ms, median
SETTLING = 1.0  # seconds at the start of a step that do not count: queues fill
# In flight at the peak: as many full batches as run at a time, and one that waits.
CLOSED = 48
CONNECTIONS = 64  # at first, of an open loop
COLUMNS = (
    "offered",
    "200/s",
    "good/s",
    "p50 ms",
    "p99 ms",
    "refused",
    "ref p50",
    "ref p99",
)
MORE_COLUMNS = ("late p99", "srv CPU", "cli CPU", "others")


@dataclass(frozen=True, slots=True)
class Step:
    """What came of one load. All latencies are from when a request was due.

    `ok_rate` counts answers 200 a second, `good_rate` those of them that came in time,
    and `offered` requests a second, all without the first second. `late` is how late
    the client itself sent.
    """

    load: str
    offered: float
    ok_rate: float
    good_rate: float
    p50_ms: float
    p99_ms: float
    refused: int
    refused_p50_ms: float | None
    refused_p99_ms: float | None
    late_p99_ms: float
    statuses: dict[str, int]
    connections: int
    server_cpu: float  # cores
    client_cpu: float
    other_cpu: float

    def line(self, number: int) -> str:
        values = (self.offered, self.ok_rate, self.good_rate, self.p50_ms, self.p99_ms)
        refused = (self.refused_p50_ms or 0.0, self.refused_p99_ms or 0.0)
        cpu = (self.server_cpu, self.client_cpu, self.other_cpu)
        text = "".join(f"{value:10.1f}" for value in values) + f"{self.refused:10}"
        text += "".join(f"{value:10.2f}" for value in (*refused, self.late_p99_ms))
        return f"{number:<7}{self.load:8}{text}" + "".join(
            f"{one:10.2f}" for one in cpu
        )


def step(server: Server, request: Path, load: str, *, options: Any, **how: Any) -> Step:
    """Load the server; `how` is `offer`'s: connections, rate and seed."""
    pid, seconds = server.process.pid, options.seconds + SETTLING
    before = machine.seconds(pid)
    seen = offer(server.port, request, seconds=seconds, **how)
    after = machine.seconds(pid)
    machine.wait_until_idle(pid, limit=30.0)
    wall, own, client, busy = (b - a for a, b in zip(before, after, strict=True))
    due = [one for one in seen.samples if one.due >= SETTLING]
    ended = [one for one in seen.samples if SETTLING <= one.end < seconds]
    right = [one for one in ended if one.status == 200]
    good = [one for one in right if one.latency_ms <= options.goal_ms]
    answered, refused = seen.latencies(200), seen.latencies(503)
    return Step(
        load=load,
        offered=len(due) / options.seconds,
        ok_rate=len(right) / options.seconds,
        good_rate=len(good) / options.seconds,
        p50_ms=percentile(answered, 50),
        p99_ms=percentile(answered, 99),
        refused=len(refused),
        refused_p50_ms=percentile(refused, 50) if refused else None,
        refused_p99_ms=percentile(refused, 99) if refused else None,
        late_p99_ms=percentile([one.late_ms for one in seen.samples], 99),
        statuses=seen.statuses(),
        connections=seen.connections,
        server_cpu=own / wall,
        client_cpu=client / wall,
        other_cpu=max(0.0, busy - own - client) / wall,
    )


def run_round(
    server: Server, patient: Path, hasty: Path, number: int, options: Any
) -> tuple[Step, list[Step]]:
    """The peak, by requests without a deadline, and a step for each multiple of it."""
    peak = step(server, patient, "peak", options=options, connections=options.closed)
    print(peak.line(number), flush=True)
    if peak.refused or not peak.ok_rate:
        raise SystemExit(f"no peak: {peak.statuses}")
    steps = []
    for times in options.times:
        rate = times * peak.ok_rate
        how = {"connections": CONNECTIONS, "rate": rate, "seed": number}
        steps.append(step(server, hasty, f"{times:g}x", options=options, **how))
        print(steps[-1].line(number), flush=True)
        strange = {
            status: count
            for status, count in steps[-1].statuses.items()
            if status not in ("200", "503", "504")
        }
        if strange:
            print(f"  WARNING: answers that were not 200, 503 or 504: {strange}")
    return peak, steps


def conclude(
    rounds: Sequence[tuple[Step, list[Step]]], options: Any
) -> list[dict[str, Any]]:
    """Print and return, for each multiple of the peak, what was reached."""
    found = []
    for at, times in enumerate(options.times):
        each = [steps[at].good_rate / peak.ok_rate for peak, steps in rounds]
        medians = [steps[at].refused_p50_ms for _, steps in rounds]
        known = [one for one in medians if one is not None]
        goodput = statistics.median(each)
        refused = statistics.median(known) if known else None
        met = goodput >= GOODPUT_TARGET
        print(f"{times:g}x: goodput {goodput:.3f} of the peak", end=" ")
        print(f"({min(each):.3f} to {max(each):.3f} over rounds)", end=", ")
        print(f"at least {GOODPUT_TARGET:g}: {'met' if met else 'NOT met'}", end="; ")
        if refused is None:
            print("nothing was refused")
        else:
            fast = refused < REFUSED_TARGET
            print(f"refused in {refused:.2f} ms at the median", end=", ")
            print(f"under {REFUSED_TARGET:g}: {'met' if fast else 'NOT met'}")
        found.append({"times": times, "goodput": goodput, "refused_p50_ms": refused})
    quiet = all(
        one.other_cpu <= report.QUIET
        for peak, steps in rounds
        for one in (peak, *steps)
    )
    if not quiet:
        print("WARNING: other programs ran on this machine: measure again")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    help_seconds = f"of each step, after {SETTLING:g} s that do not count"
    parser.add_argument("--seconds", type=float, default=20.0, help=help_seconds)
    parser.add_argument("--rounds", type=int, default=3)
    help_times = "multiples of the peak to offer"
    parser.add_argument(
        "--times", type=float, nargs="+", default=[2.0], help=help_times
    )
    help_goal = "each request's deadline; an answer that takes longer is not good"
    parser.add_argument("--goal_ms", type=int, default=1000, help=help_goal)
    help_closed = "in flight at the peak, and --max_queue_size of the server"
    parser.add_argument("--closed", type=int, default=CLOSED, help=help_closed)
    help_wait = "seconds to wait at most for a quiet machine before each round"
    parser.add_argument("--wait", type=float, default=0.0, help=help_wait)
    ways = [name for name, (script, _) in WAYS.items() if script == LITE]
    parser.add_argument("--server", choices=ways, default="lite-pair")
    help_python = "interpreter for kserve-lite, with torch (default: this one)"
    parser.add_argument("--python", type=Path, default=sys.executable, help=help_python)
    help_results = "folder for the JSON (default: bench/results)"
    default_results = HERE / "results"
    parser.add_argument(
        "--results", type=Path, default=default_results, help=help_results
    )
    options = parser.parse_args()
    # Else `timeout` or `kill` would end this program and leave its server running.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    known = machine.facts({"kserve-lite's environment": options.python})
    # So that nothing is refused at the peak, also where batches are small at first.
    flags = ("--max_queue_size", str(options.closed))
    contender = alexnet.contender(options.server, options.python, None, flags)
    body = CASE.body()
    print(f"overload: {CASE.what}, {options.server}, {' '.join(flags)};", end=" ")
    print(f"{len(body):,} byte body, {options.seconds:g} s a step;", end=" ")
    print(f"in time is {options.goal_ms:g} ms")
    heads = "".join(f"{head:>10}" for head in (*COLUMNS, *MORE_COLUMNS))
    print(f"{'round':7}{'load':8}{heads}")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        # The deadline makes the server refuse sooner; the peak is to have no refusal.
        patient, hasty = scratch / "patient", scratch / "hasty"
        patient.write_bytes(request_bytes("POST", CASE.path, CASE.headers, body))
        deadline = ("x-request-timeout-ms", str(options.goal_ms))
        headers = (*CASE.headers, deadline)
        hasty.write_bytes(request_bytes("POST", CASE.path, headers, body))
        with started(contender, CASE, scratch) as server:
            warm_up(server, patient, options)
            rounds = []
            for number in range(1, options.rounds + 1):
                machine.wait_until_quiet(options.wait, report.QUIET)
                rounds.append(run_round(server, patient, hasty, number, options))
            peak_kib = machine.memory(server.process.pid, "VmHWM")
    result = known | {
        "case": "overload",
        "what": f"{CASE.what}, {options.server}: a peak, then multiples of it",
        "request": {"path": CASE.path, "body_bytes": len(body)},
        "server": " ".join(contender.argv),
        "switched_off": {
            name: alexnet.SWITCHED_OFF[name] for name in (options.server, "all")
        },
        "not_measured": alexnet.NOT_MEASURED,
        "seconds": options.seconds,
        "goal_ms": options.goal_ms,
        "targets": {"goodput": GOODPUT_TARGET, "refused_p50_ms": REFUSED_TARGET},
        "reached": conclude(rounds, options),
        "peak_kib": peak_kib,
        "rounds": [
            {"peak": asdict(peak), "offered": [asdict(one) for one in steps]}
            for peak, steps in rounds
        ],
    }
    report.save(result, options.results / "overload.json")


def warm_up(server: Server, request: Path, options: Any) -> None:
    """Fills caches, and lets an adaptive server learn; is not counted."""
    seconds = max(5.0, options.seconds / 4)
    offer(server.port, request, seconds=seconds, connections=options.closed)


if __name__ == "__main__":
    main()
