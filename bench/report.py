"""What becomes of a result: a few printed lines, a JSON file and a bar chart.

A result is the plain dict that is written as JSON, so what is printed can also be read
from the file later. Measures nothing; says what makes a result doubtful.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chart import Bar, draw

COLUMNS = {
    "requests_per_second": "req/s",
    "p50_ms": "p50 ms",
    "p99_ms": "p99 ms",
    "server_cpu": "srv CPU",
    "client_cpu": "cli CPU",
    "other_cpu": "others",
    "cpu_us_per_request": "us/req",
}
# Cores that other programs may take during a round before it is called disturbed. Not
# less: with 3 MB bodies the kernel's own work, charged to nobody, is 0.05 to 0.15.
QUIET = 0.2
SWITCHED_OFF = {
    "kserve": "gRPC but in the gRPC cases (enable_grpc=False), latency log "
    "(enable_latency_logging=False), uvicorn access log (access_log=False), logs below "
    "WARNING (KSERVE_LOGLEVEL)",
    "kserve-uvloop": "the same as kserve; switched on: uvloop, which KServe 0.21 does "
    "not use in one process, by an event loop policy set before it starts",
    "kserve-lite": "nothing: as a user starts it, no option but port and host",
}
NOT_MEASURED = (
    "TLS, large answers over gRPC, streaming, compression, "
    "batching, several workers, "
    "a real model's compute, a network between client and server, open-loop latency "
    "(wrk and h2load send the next request when the last is answered, so p99 hides "
    "queueing)"
)


def line(label: str, name: str, values: Sequence[float]) -> str:
    rate, *rest = values
    # KServe answers few large tensors a second, and 2 is not 2.4.
    shown = f"{rate:10,.0f}" if rate >= 100 else f"{rate:10.1f}"
    return f"{label:7}{name:18}{shown}" + "".join(f"{one:10.2f}" for one in rest)


def heads() -> None:
    columns = "".join(f"{head:>10}" for head in COLUMNS.values())
    print(f"{'round':7}{'server':18}{columns}")


def conclude(result: dict[str, Any]) -> None:
    """Print what the table leaves out: memory, ratios, and what makes them doubtful."""
    for name, server in result["servers"].items():
        idle, after, peak = (kib / 1024 for kib in server["rss_kib"].values())
        print(f"{name}: RSS {idle:.0f} MiB idle, {after:.0f} after load", end=", ")
        print(f"{peak:.0f} peak; ready in {server['ready_seconds']:.2f} s; ", end="")
        print(f"maps {', '.join(server['extensions_mapped']) or 'no extension'}")
        rounds = server["rounds"]
        if any(one["errors"] for one in rounds):
            print(f"  WARNING: {name} had errors: its rate means nothing")
        if any(one["other_cpu"] > QUIET for one in rounds):
            print("  WARNING: other programs ran on this machine: measure again")
        if any(one["client_cpu"] > 0.9 for one in rounds):
            print(f"  WARNING: the client was the bottleneck: {name} may be faster")
    for name, ratio in result["ratios"].items():
        print(f"{name}: {ratio['of_medians']:.2f}x of medians", end=" ")
        print(f"({ratio['min']:.2f} to {ratio['max']:.2f} over rounds)", end="; ")
        print(f"{ratio['cpu_per_request']:.2f}x by CPU a request")
    if result["target_met"] is not None:
        met = "met" if result["target_met"] else "NOT met"
        print(f"target {result['target']:g}x {result['target_is_against']}: {met}")


def save(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def write(result: dict[str, Any], results: Path, suffix: str) -> None:
    stem = results / (result["case"] + suffix)
    save(result, stem.with_name(stem.name + ".json"))
    bars = []
    for name, server in result["servers"].items():
        rates = [one["requests_per_second"] for one in server["rounds"]]
        bars.append(Bar(name, statistics.median(rates), min(rates), max(rates)))
    place = f"{result['machine']['cpu']}, {result['machine']['cores']} cores"
    title = f"{result['case']}: {result['what']}, requests a second"
    loads = dict.fromkeys(one["load"] for one in result["servers"].values())
    note = f"one process; {' against '.join(loads)}; {place}"
    stem.with_name(stem.name + ".svg").write_text(draw(title, note, bars))
