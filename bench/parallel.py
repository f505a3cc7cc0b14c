"""One replica of ours beside plain Ray Serve: requests a second, p50, p99, CPU.

`python bench/parallel.py [--only echo ...]` starts one Ray cluster of this machine on
which both sides run: Ray Serve's own HTTP in front of a replica, and our server in
front of another one. After both have given the same answer, wrk loads them in turn, in
an order that shifts by one each round, with 1, 4 and 16 connections. What else runs on
the cluster, Ray's own daemons, is counted apart. Writes
bench/results/parallel-<part>.json; bench/README.md says how to read it.

Standard library only, so that any interpreter runs it.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import answers
import loaders
import machine
import report
import trees
from cases import CASES, Headers, Load, image_values
from compare import HERE, Contender, Server, free_ports
from parallel_sides import Side, compared, titled
from parallel_ways import MODELS, ways

CONNECTIONS = (1, 4, 16)
AT_LEAST = 1.5
SWITCHED_OFF = {
    "kserve-lite": "the access log (--access_log false)",
    "ray-serve": "the access log (logging_config) and the dashboard",
    "ray-serve-wide": "the same; changed: max_ongoing_requests=1000, shipped is 5",
}


@dataclass(frozen=True, slots=True)
class Part:
    """What is asked of both sides; the case is ours, `body` and `headers` theirs."""

    case: str
    raw: bool = False  # theirs: the tensor's bytes alone


PARTS = {"echo": Part("v1-echo"), "tensor": Part("v2-binary", raw=True)}


@contextlib.contextmanager
def cluster(
    handler: str, options: argparse.Namespace, logs: Path
) -> Iterator[tuple[subprocess.Popen[bytes], int, str]]:
    """Plain Ray Serve: its process, its port, and its cluster's address."""
    port, _ = free_ports()
    argv = [str(options.python), str(HERE / "serve_ray_http.py"), handler]
    out, log = logs / "address", logs / "ray.log"
    with out.open("wb") as told, log.open("wb") as sink:
        process = subprocess.Popen(
            [*argv, "--port", str(port)], stdout=told, stderr=sink
        )
    try:
        begin = time.monotonic()
        while not (found := re.search(r"^[\d.]+:\d+$", out.read_text(), re.MULTILINE)):
            if process.poll() is not None or time.monotonic() - begin > 120:
                tail = log.read_text(errors="replace")[-2000:]
                raise SystemExit(f"Ray Serve did not start:\n{tail}")
            time.sleep(0.1)
        yield process, port, found[0]
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()  # Ray's own processes end with it.
            process.wait()


def lite(name: str, handler: str, options: argparse.Namespace, *argv: str) -> Contender:
    flags = ("--http_port", "{port}", "--host", "127.0.0.1", "--access_log", "false")
    script = ("serve_parallel_lite.py", handler)
    return Contender(name, options.python, (*script, *flags, *argv), loads()[0])


def loads() -> list[Load]:
    return [Load("wrk", "HTTP/1.1", count) for count in CONNECTIONS]


def ask(url: str, headers: Headers, body: bytes) -> tuple[bytes, str]:
    connection = http.client.HTTPConnection(url.split("/")[2], timeout=60)
    try:
        path = "/" + url.split("/", 3)[3]
        connection.request("POST", path, body, dict(headers))
        response = connection.getresponse()
        content = response.read()
        if response.status != 200:
            raise SystemExit(f"{url}: {response.status} {content[:300]!r}")
        return content, response.headers.get("inference-header-content-length", "")
    finally:
        connection.close()


def same_answers(part: Part, sides: Sequence[tuple[bytes, str]]) -> None:
    """Stop unless all gave the same: as JSON, or to the bit as tensors."""
    (content, json_size), *others = sides
    if part.raw:
        (own,) = answers.binary(content, int(json_size))["tensors"].values()
        agree = all(own == other for other, _ in others)
    else:
        agree = all(json.loads(content) == json.loads(other) for other, _ in others)
    if not agree:
        raise SystemExit(f"answers differ: {content[:200]!r} {others[0][0][:200]!r}")


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Both sides, at each number of connections."""
    part = PARTS[name]
    case = next(one for one in CASES if one.name == part.case)
    with contextlib.ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ray, port, address = stack.enter_context(cluster(case.handler, options, logs))
        contender = lite("kserve-lite", case.handler, options, "--ray_address", address)
        server = stack.enter_context(trees.started(contender, "", logs))
        own, raw = logs / "own", logs / "raw"
        own.write_bytes(case.body())
        raw.write_bytes(image_values() if part.raw else case.body())
        kind: Headers = (("content-type", "application/octet-stream"),)
        base = f"http://127.0.0.1:{port}"
        requests = {
            "kserve-lite": loaders.Request(
                f"http://127.0.0.1:{server.port}{case.path}", case.headers, own
            )
        }
        for path, label in {"shipped": "ray-serve", "wide": "ray-serve-wide"}.items():
            headers = kind if part.raw else case.headers
            requests[label] = loaders.Request(f"{base}/{path}", headers, raw)
        told = {
            label: ask(one.url, one.headers, one.body.read_bytes())
            for label, one in requests.items()
        }
        same_answers(part, list(told.values()))
        found = [one for one in trees.tree(ray.pid) if one != ray.pid]
        pids = {
            "kserve-lite": [server.process.pid, *titled(found, "ServeReplica:echo-")],
            "ray-serve": titled(found, "ProxyActor", "ServeReplica:shipped"),
            "ray-serve-wide": titled(found, "ProxyActor", "ServeReplica:wide"),
        }
        print(name, pids)
        if any(len(each) != 2 for each in pids.values()):
            raise SystemExit(f"expected a front and a replica each, got {pids}")
        everyone = [ray.pid, server.process.pid, *found]
        memory = {
            label: [trees.memory(pid).pss for pid in each]
            for label, each in pids.items()
        }
        rows = []
        for load in loads():
            print(f"\n{name}: {case.what}; {load}")
            sides = []
            for label, request in requests.items():
                named = Contender(label, options.python, contender.argv, load)
                twin = Server(named, server.process, server.port, 0)
                size = len(told[label][0])
                sides.append(Side(twin, request, size, pids[label], everyone))
            rows.append({"connections": load.connections} | compared(sides, options))
    return {
        "what": f"{case.what}, through one replica",
        "switched_off": SWITCHED_OFF,
        "request": {"bytes": len(case.body()), "raw_bytes": len(image_values())}
        if part.raw
        else {"bytes": len(case.body())},
        "pss_kib_front_and_replica": memory,
        "bars": bars(name, rows),
        "loads": rows,
    }


def bars(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the bars are about: at least so many requests a second, and a lower p50."""
    found = {}
    for row in rows:
        for label, ratio in row["ratios"].items():
            at = f"{name}, {row['connections']} connections, {label}"
            rate, p50 = ratio["of_medians"], ratio["p50"]
            found[f"{at} by req/s"] = {
                "value": rate,
                "bar": f">= {AT_LEAST}",
                "met": rate >= AT_LEAST,
            }
            found[f"{at} by p50"] = {"value": p50, "bar": "< 1", "met": p50 < 1}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parts = [*PARTS, "ways"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--rounds", type=int, default=5)
    help_seconds = "of each round (default: 5)"
    parser.add_argument("--seconds", type=int, default=5, help=help_seconds)
    help_models = "of the part `ways` (default: all)"
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS), help=help_models
    )
    help_retries = "disturbed rounds to throw away and repeat"
    parser.add_argument("--retries", type=int, default=0, help=help_retries)
    help_wait = "seconds to wait at most for a quiet machine before each round"
    parser.add_argument("--wait", type=float, default=0.0, help=help_wait)
    help_python = "interpreter with kserve-lite[ray] (default: this one)"
    parser.add_argument("--python", type=Path, default=sys.executable, help=help_python)
    help_results = "folder for the JSON (default: bench/results)"
    default_results = HERE / "results"
    parser.add_argument(
        "--results", type=Path, default=default_results, help=help_results
    )
    options = parser.parse_args()
    # Else `timeout` or `kill` would end this program and leave its servers running.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    loaders.require(["wrk"])
    # A cluster of this machine wants a token, for which a server that joins one must
    # have been told to look.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    known = machine.facts({"both sides' environment": options.python})
    for name in (part for part in parts if part in options.only):
        result = known | {"case": f"parallel-{name}", "seconds": options.seconds}
        if name == "ways":
            result |= ways(options)
        else:
            result |= measure(name, options)
            conclude(result)
        report.save(result, options.results / f"parallel-{name}.json")


def conclude(result: dict[str, Any]) -> None:
    """Print the bars, and what makes them doubtful."""
    for name, bar in result["bars"].items():
        met = "met" if bar["met"] else "NOT met"
        print(f"{name}: {bar['value']:.2f}; bar {bar['bar']}: {met}")
    for row in result["loads"]:
        for warning in row["warnings"]:
            print(f"WARNING: {row['connections']} connections: {warning}")


if __name__ == "__main__":
    main()
