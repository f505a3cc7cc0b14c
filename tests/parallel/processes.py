"""Server processes with Ray below them: begun, asked, stopped, with nothing left."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import grpc
import httpx
import numpy as np

from kserve_lite import InferResponse
from kserve_lite.codecs.proto import message_class
from kserve_lite.codecs.v2_client import asked, read_proto, write_proto

ROOT = Path(__file__).parents[2]
# Seconds, on a machine that is busy with other things.
PATIENCE = 240.0


def wait_for(condition: Callable[[], Any], what: str = "") -> Any:
    """Return what a condition gives, once it gives something true."""
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"it did not come about: {what or condition}")
        time.sleep(0.05)
    return value


class Program:
    """A server process; what it writes goes into a file, since nobody reads it."""

    def __init__(self, *command: str, folder: Path, **variables: str) -> None:
        self.folder = folder
        self._log = folder / "log"
        self.http = httpx.Client()
        environment = {k: v for k, v in os.environ.items() if k != "PORT"}
        environment |= {"PYTHONPATH": str(ROOT), "MEETING": str(folder), **variables}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, *command),
                    *("--host", "127.0.0.1", "--http_port", "0"),
                ],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if error is not None:
            print(self.log)

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def ready(self) -> Self:
        """Wait for its banner."""

        def banner() -> Any:
            if self.process.poll() is not None:
                raise AssertionError(f"it ended:\n{self.log}")
            return re.search(r" serves .* on (http://\S+)\n", self.log)

        url = wait_for(banner, "a banner")[1]
        self.address = url.removeprefix("http://")
        self.http.base_url, self.http.timeout = url, PATIENCE
        return self

    def post(self, path: str, value: Any, **headers: str) -> httpx.Response:
        given = {name.replace("_", "-"): text for name, text in headers.items()}
        return self.http.post(path, json=value, headers=given)

    def predict(self, model: str, value: Any, **headers: str) -> httpx.Response:
        return self.post(f"/v1/models/{model}:predict", value, **headers)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        return self.process.wait(PATIENCE)


def below(pid: int) -> set[int]:
    """The processes that a process has begun, and these, and so on."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text()
        except OSError:
            continue
        parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
    found = {pid}
    while more := {p for p, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def alive(pids: set[int]) -> set[int]:
    """Which of some processes still are, those aside that only wait to be reaped."""
    found = set()
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z":
            found.add(pid)
    return found


@contextmanager
def together(*calls: Callable[[], Any]) -> Iterator[list[Any]]:
    """Run functions at the same time; after the block all results are there."""
    results: list[Any] = [None] * len(calls)

    def run(index: int) -> None:
        try:
            results[index] = calls[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    try:
        yield results
    finally:
        for thread in threads:
            thread.join()


class Grpc:
    """A client of a server's gRPC, with messages of the pool that kserve-lite has."""

    def __init__(self, address: str) -> None:
        options = [
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
        ]
        self._channel = grpc.insecure_channel(address, options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def infer(self, model: str, array: np.ndarray) -> InferResponse:
        """Send an array as the input x; raises grpc.RpcError."""
        call = self._channel.unary_unary(
            f"{SERVICE}/ModelInfer",
            request_serializer=_written,
            response_deserializer=message_class(
                "inference.ModelInferResponse"
            ).FromString,
        )
        return read_proto(call(_request(model, array), timeout=PATIENCE))

    def stream(self, model: str, array: np.ndarray) -> list[InferResponse]:
        call = self._channel.stream_stream(
            f"{SERVICE}/ModelStreamInfer",
            request_serializer=_written,
            response_deserializer=message_class(
                "inference.ModelStreamInferResponse"
            ).FromString,
        )
        answers = call(iter([_request(model, array)]), timeout=PATIENCE)
        return [read_proto(answer.infer_response) for answer in answers]


SERVICE = "/inference.GRPCInferenceService"


def _request(model: str, array: np.ndarray) -> Any:
    return write_proto(asked({"x": array}, {}, ()), model=model, version=None)


def _written(message: Any) -> bytes:
    return bytes(message.SerializeToString())


def rows(response: httpx.Response, output: str) -> Any:
    """An output's data of a V2 answer."""
    answer = json.loads(response.content)
    return next(o["data"] for o in answer["outputs"] if o["name"] == output)
