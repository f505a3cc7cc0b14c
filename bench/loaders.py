"""The programs that make the load, wrk and h2load, and what they report.

Each runs for some seconds against one URL and gives back a `Seen`. Both are told to
use one thread: on two cores a second one would take the server's. Neither checks a
body, but h2load counts its bytes, which is what finds gRPC errors: they come with
status 200 and no message. Standard library only.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import machine
from cases import Headers, Load

HERE = Path(__file__).resolve().parent
# Where each program comes from, said when it is missing.
ORIGIN = {
    "wrk": "the package wrk of Debian and Ubuntu",
    "h2load": "the package nghttp2-client of Debian and Ubuntu",
    "nghttp": "the package nghttp2-client of Debian and Ubuntu",
    "curl": "the package curl of Debian and Ubuntu",
}
_RATE = re.compile(r"^finished in .*?, ([\d.]+) req/s", re.MULTILINE)
_DONE = re.compile(r"^requests: .*? (\d+) done, .*? (\d+) failed", re.MULTILINE)
_GOOD = re.compile(r"^status codes: (\d+) 2xx", re.MULTILINE)
_DATA = re.compile(r"\((\d+)\) data$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Request:
    """What is sent, again and again; `body` is a file."""

    url: str
    headers: Headers
    body: Path

    def options(self) -> list[str]:
        """As h2load and nghttp take them."""
        each = [
            part for name, value in self.headers for part in ("-H", f"{name}: {value}")
        ]
        return ["-d", str(self.body), *each, self.url]


@dataclass(frozen=True, slots=True)
class Seen:
    """What a load program saw in one run; latencies in milliseconds."""

    requests: int
    rate: float
    p50: float
    p99: float
    longest: float
    errors: int


def require(programs: Iterable[str]) -> None:
    """Stop, and say what to install, unless all of these programs are here."""
    for program in sorted(set(programs)):
        if shutil.which(program) is None:
            raise SystemExit(
                f"{program} is not on the PATH, and what was asked for needs it: "
                f"install {ORIGIN[program]}, or leave out what does"
            )


def command(load: Load, seconds: int) -> list[str]:
    """How the program is called, less the request itself."""
    if load.program == "wrk":
        # The timeout only matters to large bodies; 2 s would count as errors.
        argv = ["wrk", "-t1", f"-c{load.connections}", f"-d{seconds}s"]
        return [*argv, "--timeout", "60s"]
    argv = ["h2load", "-t1", f"-c{load.connections}", f"-m{load.streams}"]
    argv += [f"-D{seconds}"]
    return [*argv, "--h1"] if load.protocol == "HTTP/1.1" else argv


def run(load: Load, request: Request, *, seconds: int, answer_bytes: int) -> Seen:
    """Load one server; `answer_bytes` is the size of the body of a right answer."""
    if load.program == "wrk":
        return _wrk(load, request, seconds)
    return _h2load(load, request, seconds, answer_bytes)


def _wrk(load: Load, request: Request, seconds: int) -> Seen:
    argv = [*command(load, seconds), "-s", str(HERE / "post.lua"), request.url]
    headers = "".join(f"{name}: {value}\n" for name, value in request.headers)
    env = dict(os.environ, BENCH_BODY=str(request.body), BENCH_HEADERS=headers)
    text = subprocess.check_output(
        argv, env=env, text=True, preexec_fn=_scheduling(load)
    )
    lines = [line for line in text.splitlines() if line.startswith("BENCH ")]
    seen = json.loads(lines[0].removeprefix("BENCH "))
    if not seen["requests"]:
        raise SystemExit(f"not one answer in {seconds} s:\n{text}")
    return Seen(
        requests=seen["requests"],
        rate=seen["requests"] / seen["duration_us"] * 1e6,
        p50=seen["p50_us"] / 1000,
        p99=seen["p99_us"] / 1000,
        longest=seen["max_us"] / 1000,
        errors=sum(seen["errors"].values()),
    )


def _h2load(load: Load, request: Request, seconds: int, answer_bytes: int) -> Seen:
    argv = command(load, seconds)
    with tempfile.TemporaryDirectory() as scratch:
        # It prints a mean and a longest time only; percentiles need every request.
        log = Path(scratch) / "requests.tsv"
        argv += [f"--log-file={log}", *request.options()]
        text = subprocess.check_output(argv, text=True, preexec_fn=_scheduling(load))
        times = sorted(int(row.rpartition(b"\t")[2]) for row in log.open("rb"))
    try:
        rate = float(_found(_RATE, text)[0])
        done, failed = map(int, _found(_DONE, text))
        good = int(_found(_GOOD, text)[0])
        data = int(_found(_DATA, text)[0])
    except LookupError:
        raise SystemExit(f"h2load printed something unexpected:\n{text}") from None
    if not times:
        raise SystemExit(f"not one answer in {seconds} s:\n{text}")
    # A gRPC error has no message, and any other wrong answer is hardly as long as the
    # right one. What came of answers cut short at the end only adds bytes. The three
    # counts overlap (a status other than 2xx is also a failure), hence no sum.
    short = max(0, done - data // answer_bytes)
    return Seen(
        requests=done,
        rate=rate,
        p50=times[len(times) // 2] / 1000,
        p99=times[len(times) * 99 // 100] / 1000,
        longest=times[-1] / 1000,
        errors=max(failed, done - good, short),
    )


def _scheduling(load: Load) -> Callable[[], None] | None:
    return machine.go_first if load.apart else None


def _found(pattern: re.Pattern[str], text: str) -> tuple[str, ...]:
    match = pattern.search(text)
    if match is None:
        raise LookupError(pattern.pattern)
    return match.groups()
