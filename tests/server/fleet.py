"""A server of several processes, seen from outside; and clients that never rest."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from tests.clients.calls import Stub, infer_request
from tests.server.process import PATIENCE, App
from tests.transports.h2client import H2Client

PREDICT = "/v1/models/m:predict"

# What the handler does is what the request says; its answer is its process.
APP = """
import os, time
if os.path.exists("import exits"):
    os._exit(9)
import anyio
from kserve_lite import InferResponse, Model, run

model = Model("m")

@model.load
def load():
    if os.path.exists("load fails"):
        raise OSError("no such weights")
    while os.path.exists("load waits"):
        time.sleep(0.01)

@model.ready
async def ready():
    return not os.path.exists("not ready")

@model.predict
async def predict(payload):
    if not isinstance(payload, dict):
        await gate()
        return InferResponse(payload.inputs)
    match payload["instances"][0]:
        case "exit":
            os._exit(7)
        case "block":
            with open("is blocked", "a") as file:
                file.write("x")
            while os.path.exists("blocks"):
                time.sleep(0.01)
        case "gate":
            await gate()
    return {"pid": os.getpid()}

async def gate():
    if os.path.exists("gate"):
        with open("came", "a") as file:
            file.write("x")
    while os.path.exists("gate"):
        await anyio.sleep(0.01)

if __name__ == "__main__":
    run(model)
"""


class Fleet(App):
    """A server with workers. `folder` is where it runs, and where files steer it."""

    new_session = True  # so that its group is its own
    second = 0  # its other port, where a test gave it one

    def __init__(
        self,
        folder: Path,
        *flags: str,
        program: tuple[str, ...] = ("app.py",),
        workers: int = 2,
        **options: Any,
    ) -> None:
        self.folder = folder
        common = ("--http_port", "0", "--access_log", "false")
        wanted = ("--workers", str(workers)) if workers else ()
        super().__init__(*program, *common, *wanted, *flags, cwd=folder, **options)

    @property
    def workers(self) -> set[int]:
        """The processes that it has started and that are alive."""
        pid = self.process.pid
        try:
            found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except OSError:
            return set()
        return {int(child) for child in found if is_alive(int(child))}

    def pid(self, what: Any = "pid") -> int:
        """Which worker answers a request on a new connection."""
        status, answer = self.ask(PREDICT, {"instances": [what]})
        assert status == 200, answer
        found: int = answer["pid"]
        return found

    def serving(self, count: int) -> set[int]:
        """Wait until so many workers answer requests; return them."""
        found: set[int] = set()

        def all_answer() -> bool:
            # The balance of connections leads a further one elsewhere.
            with self.kept(2 * count) as connections:
                found.clear()
                found.update(pid_of(connection) for connection in connections)
            return len(found) == count and found == self.workers

        until(all_answer)
        return found

    @contextmanager
    def kept(self, count: int) -> Iterator[list[http.client.HTTPConnection]]:
        """Connections that stay open."""
        with ExitStack() as stack:
            connections = []
            for _ in range(count):
                connection = http.client.HTTPConnection(
                    "127.0.0.1", self.port, timeout=PATIENCE
                )
                stack.callback(connection.close)
                connection.connect()
                connections.append(connection)
            yield connections

    def log(self, text: str) -> str:
        """Wait for a line of its log; return what was read up to there."""
        assert self.process.stderr is not None
        seen = ""
        for line in self.process.stderr:
            seen += line
            if text in line:
                return seen
        raise AssertionError(f"it ended without saying {text!r}:\n{seen}")

    def ready(self) -> bool:
        return self.ask("/v2/health/ready")[0] == 200


def pid_of(connection: http.client.HTTPConnection, what: Any = "pid") -> int:
    connection.request("POST", PREDICT, json.dumps({"instances": [what]}))
    with connection.getresponse() as response:
        answer = json.loads(response.read())
        assert response.status == 200, answer
    found: int = answer["pid"]
    return found


def status_of(connection: http.client.HTTPConnection) -> int:
    """Read the answer to what was asked on a connection; return its status."""
    with connection.getresponse() as response:
        response.read()
        return response.status


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def exists(pid: int) -> bool:
    """Whether a process exists, be it a zombie."""
    return Path(f"/proc/{pid}").exists()


def until(condition: Callable[[], object], patience: float = PATIENCE) -> None:
    """Wait for something."""
    ends = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < ends, "it did not come about"
        time.sleep(0.02)


class Load:
    """Clients that ask again and again, over every protocol, while it is entered.

    answers: how many came, by worker where it is known. failures: what went wrong.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.answers: Counter[Any] = Counter()
        self.failures: list[str] = []
        self._done = threading.Event()
        clients = (*[self._kept] * 3, self._fresh, self._h2, self._grpc)
        self._threads = [
            threading.Thread(target=self._run, args=(client,)) for client in clients
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()

    def more(self, count: int = 200) -> None:
        """Wait until so many further answers have come."""
        wanted = self.answers.total() + count
        until(lambda: self.answers.total() >= wanted or self.failures)

    def _run(self, client: Callable[[], None]) -> None:
        while not self._done.is_set():
            try:
                client()
            except Exception as error:
                self.failures.append(f"{client.__name__}: {error!r}")

    def _kept(self) -> None:
        connection = http.client.HTTPConnection(
            "127.0.0.1", self.port, timeout=PATIENCE
        )
        try:
            while not self._done.is_set():
                self.answers[pid_of(connection)] += 1
                time.sleep(0.002)
        finally:
            connection.close()

    def _fresh(self) -> None:
        connection = http.client.HTTPConnection(
            "127.0.0.1", self.port, timeout=PATIENCE
        )
        try:
            self.answers[pid_of(connection)] += 1
        finally:
            connection.close()
        time.sleep(0.002)

    def _h2(self) -> None:
        # Not httpx: it gives up what is in flight when GOAWAY comes.
        async def ask() -> None:
            async with H2Client(self.port) as client:
                answer = await client.answer(await client.predict("pid"))
                assert answer.status == 200, answer
                self.answers[answer.json["pid"]] += 1

        asyncio.run(ask())

    def _grpc(self) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        target = f"127.0.0.1:{self.port}"
        with grpc.insecure_channel(target, options=options) as channel:
            stub = Stub(channel)
            request = infer_request("m", np.arange(3))
            while not self._done.is_set():
                stub.ModelInfer(request, timeout=PATIENCE)
                self.answers["grpc"] += 1
                time.sleep(0.002)


def memory_of(pid: int) -> set[int]:
    """The memory that a process shares with others, by inode."""
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            if "memfd:" in str(entry.readlink()):
                found.add(entry.stat().st_ino)
    return found
