"""A client that sends on a schedule, whether or not the last request was answered.

wrk and h2load wait for an answer before they send again, so a slow server slows them
down and its queue goes unseen. This one sends each request when it is due and counts
its latency from then, also if it was sent late ("coordinated omission"). It is
open_loop.c, as wrk is in C: what it takes of a small machine is not the server's, and
in Python it took twice as much. `offer()` builds and runs it. It sends prepared bytes
and reads of an answer the status and the length. Connections are kept alive; one is
taken from a pool, or opened if none is free. Standard library only.
"""

from __future__ import annotations

import atexit
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
# In place of a status: the connection ended first, or the wait for the answer did.
BROKEN, UNANSWERED = 0, -1


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: seconds from the start when it was due, and what came of it.

    `late_ms` is how long after that it was sent, `latency_ms` when its answer had come
    whole, both from `due`.
    """

    due: float
    late_ms: float
    latency_ms: float
    status: int

    @property
    def end(self) -> float:
        return self.due + self.latency_ms / 1000


@dataclass(frozen=True, slots=True)
class Offered:
    """What came of a load: every request, and how many connections it took."""

    samples: Sequence[Sample]
    connections: int

    def statuses(self) -> dict[str, int]:
        named = {BROKEN: "broken", UNANSWERED: "unanswered"}
        found = Counter(named.get(one.status, str(one.status)) for one in self.samples)
        return dict(sorted(found.items()))

    def latencies(self, *statuses: int) -> list[float]:
        return [one.latency_ms for one in self.samples if one.status in statuses]


def percentile(values: Sequence[float], percent: float) -> float:
    """Of some values the one that so many percent do not exceed; NaN of none."""
    if not values:
        return float("nan")
    return sorted(values)[min(len(values) - 1, int(len(values) * percent / 100))]


def request_bytes(
    method: str, path: str, headers: Sequence[tuple[str, str]] = (), body: bytes = b""
) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: 127.0.0.1"]
    lines += [f"{name}: {value}" for name, value in headers]
    if body:
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


@cache
def built() -> str:
    """The program's path, compiled anew for this process, as machines differ."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise SystemExit("the C compiler, cc, is needed: install the package gcc")
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    path = f"{folder}/open_loop"
    argv = [compiler, "-O2", "-std=c11", "-Wall", "-o", path, str(SOURCE), "-lm"]
    subprocess.run(argv, check=True)
    return path


def offer(
    port: int,
    request: Path,
    *,
    seconds: float,
    connections: int,
    rate: float = 0.0,
    seed: int = 0,
) -> Offered:
    """Send a request, a file of it, for so long; return what came of it.

    rate: requests a second, evenly spaced, or with a `seed` as a Poisson process has
    them; 0 is a closed loop, in which an answer is followed by the next request.
    connections: opened before the clock starts. Runs as a process of its own.
    """
    given = (port, request, seconds, rate, seed, connections)
    text = subprocess.check_output([built(), *map(str, given)], text=True)
    opened, *lines = text.splitlines()
    samples = []
    for line in lines:
        due, late, latency, status = line.split()
        sample = Sample(float(due), float(late), float(latency), int(status))
        samples.append(sample)
    return Offered(samples, int(opened))
