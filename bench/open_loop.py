"""A client that sends on a schedule, whether or not the last request was answered.

wrk and h2load wait for an answer before they send again, so a slow server slows them
down and its queue goes unseen. This one sends each request when it is due and counts
its latency from then, also if it was sent late ("coordinated omission"). `offer()` runs
it in a process of its own; `python bench/open_loop.py --help` is that process. It
sends prepared bytes and reads of an answer the status and the length, so that it leaves
a small machine to the server. Connections are kept alive; one is taken from a pool, or
opened if none is free. Standard library only; on uvloop where that is installed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import machine

# In place of a status: the connection ended first, or the wait for the answer did.
BROKEN, UNANSWERED = 0, -1
LINGER = 10.0  # seconds to wait for answers after the last request
MOST = 1000  # connections; requests beyond wait for one, and their latency says so
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)


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


def offer(
    python: Path, port: int, request: Path, *, seconds: float, how: Sequence[str]
) -> Offered:
    """Run the client; `how` are its options, `request` a file of what it sends."""
    argv = [str(python), str(Path(__file__).resolve()), str(port), str(request)]
    text = subprocess.check_output([*argv, "--seconds", str(seconds), *how], text=True)
    seen = json.loads(text)
    samples = [Sample(*one) for one in seen["samples"]]
    return Offered(samples, seen["connections"])


class Connection(asyncio.Protocol):
    """Sends one request at a time; tells the client when its answer is whole."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.transport: asyncio.Transport
        self.due = 0.0
        self.sent = 0.0
        self.busy = False
        self._head = b""
        self._missing = 0  # bytes of the body
        self._status = 0
        self._closes = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def send(self, due: float) -> None:
        self.due, self.sent, self.busy = due, time.monotonic(), True
        self.transport.write(self.client.request)

    def data_received(self, data: bytes) -> None:
        if self._missing:
            self._missing -= len(data)
        else:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            length = _LENGTH.search(self._head, 0, end + 2)
            if length is None:
                raise SystemExit(f"an answer without a length: {self._head[:300]!r}")
            self._status = int(self._head[9:12])
            self._closes = _CLOSE.search(self._head, 0, end + 2) is not None
            self._missing = int(length[1]) - (len(self._head) - end - 4)
            self._head = b""
        if self._missing == 0:
            self._finish(self._status)

    def connection_lost(self, error: Exception | None) -> None:
        if self.busy:
            self._closes = True
            self._finish(BROKEN)
        else:
            with contextlib.suppress(ValueError):
                self.client.free.remove(self)

    def _finish(self, status: int) -> None:
        self.busy = False
        if self._closes:
            # abort, not close: what is left of a refused body is not to be sent.
            self.transport.abort()
        self.client.finished(self, status, reusable=not self._closes)


class Client:
    """The pool of connections, and the requests that are due."""

    def __init__(self, port: int, request: bytes) -> None:
        self.port = port
        self.request = request
        self.free: list[Connection] = []
        self.opened = 0
        self.samples: list[tuple[float, float, float, int]] = []
        self.start = 0.0
        self.end: float | None = None  # of a closed loop, in which an answer is
        # followed by the next request
        self._waiting: deque[float] = deque()
        self._open = 0
        self._in_flight: set[Connection] = set()
        self._opening: set[asyncio.Task[None]] = set()
        self._settled = asyncio.Event()

    async def connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        self._open += 1
        self.opened += 1
        made = await loop.create_connection(
            lambda: Connection(self), "127.0.0.1", self.port
        )
        return made[1]

    def ask(self, due: float) -> None:
        """Send what is due, on a free connection or on a new one."""
        if self.free:
            self._send(self.free.pop(), due)
            return
        self._waiting.append(due)
        if self._open < MOST:
            task = asyncio.get_running_loop().create_task(self._grow())
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    def finished(self, connection: Connection, status: int, *, reusable: bool) -> None:
        self._in_flight.discard(connection)
        now = time.monotonic()
        self._note(connection, now, status)
        if not reusable:
            self._open -= 1
        if self.end is not None:
            if now < self.end:
                if reusable:
                    self._send(connection, now)
                else:
                    self.ask(now)
        elif not reusable:
            if self._waiting:
                self.ask(self._waiting.popleft())
        elif self._waiting:
            self._send(connection, self._waiting.popleft())
        else:
            self.free.append(connection)

    async def settle(self) -> None:
        """Wait for the answers that are still to come, and count those that do not."""
        if self._in_flight or self._waiting:
            self._settled.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._settled.wait(), LINGER)
        now = time.monotonic()
        for connection in self._in_flight:
            self._note(connection, now, UNANSWERED)
        for due in self._waiting:
            lost = (now - due) * 1000
            self.samples.append((due - self.start, lost, lost, UNANSWERED))

    async def _grow(self) -> None:
        try:
            connection = await self.connect()
        except OSError:
            self._open -= 1
            if self._waiting:
                due = self._waiting.popleft()
                lost = (time.monotonic() - due) * 1000
                self.samples.append((due - self.start, lost, lost, BROKEN))
            return
        if self._waiting:
            self._send(connection, self._waiting.popleft())
        else:
            self.free.append(connection)

    def _send(self, connection: Connection, due: float) -> None:
        self._in_flight.add(connection)
        connection.send(due)

    def _note(self, connection: Connection, now: float, status: int) -> None:
        due = connection.due
        late, latency = (connection.sent - due) * 1000, (now - due) * 1000
        self.samples.append((due - self.start, late, latency, status))
        if not self._in_flight and not self._waiting:
            self._settled.set()


def schedule(
    rate: float, seconds: float, draw: random.Random | None
) -> Iterator[float]:
    """When requests are due: evenly, or with `draw` as a Poisson process has them."""
    at = 0.0
    while at < seconds:
        yield at
        at += draw.expovariate(rate) if draw else 1 / rate


async def run(client: Client, options: argparse.Namespace) -> None:
    client.free = [await client.connect() for _ in range(options.connections)]
    # Otherwise the first requests pay for how the server begins each connection.
    await asyncio.sleep(0.2)
    client.start = time.monotonic()
    if options.rate is None:
        client.end = client.start + options.seconds
        for _ in range(options.connections):
            client.ask(time.monotonic())
        await asyncio.sleep(options.seconds)
    else:
        draw = random.Random(options.seed) if options.poisson else None
        for at in schedule(options.rate, options.seconds, draw):
            pause = client.start + at - time.monotonic()
            # Late already: not another turn of the loop, but let answers in at times.
            if pause > 0 or len(client.samples) % 16 == 0:
                await asyncio.sleep(max(0.0, pause))
            client.ask(client.start + at)
    await client.settle()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("port", type=int)
    parser.add_argument("request", type=Path, help="a file: head and body, as sent")
    parser.add_argument("--seconds", type=float, required=True)
    help_rate = "requests a second; without it a closed loop on all connections"
    parser.add_argument("--rate", type=float, help=help_rate)
    parser.add_argument("--poisson", action="store_true", help="else evenly spaced")
    parser.add_argument("--seed", type=int, default=0, help="of the Poisson arrivals")
    help_connections = "opened before the clock starts"
    parser.add_argument("--connections", type=int, default=16, help=help_connections)
    options = parser.parse_args()
    machine.go_first()
    client = Client(options.port, options.request.read_bytes())
    runner: Any = asyncio
    with contextlib.suppress(ImportError):
        import uvloop as runner  # noqa: PLC0415
    runner.run(run(client, options))
    json.dump({"samples": client.samples, "connections": client.opened}, sys.stdout)


if __name__ == "__main__":
    main()
