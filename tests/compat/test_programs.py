"""KServe's two AlexNet programs with nothing but the import changed.

`programs/start_alexnets.py` runs them, and says what the answers must be.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from tests.compat.programs import ask_alexnet
from tests.server.process import environment

PROGRAMS = Path(__file__).parent / "programs"
PICTURE = Path(__file__).parents[2] / "examples" / "alexnet" / "sample.jpg"


class Running(NamedTuple):
    """The programs. addresses: of V1's and gRPC's. lines: what V1's wrote to stderr."""

    addresses: tuple[str, str]
    lines: list[str]
    best: list[float]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    pipes = [os.pipe() for _ in range(2)]
    pids: list[int] = []
    with subprocess.Popen(
        [sys.executable, "start_alexnets.py", PICTURE, *(str(w) for _, w in pipes)],
        cwd=PROGRAMS,
        env=environment(
            TORCH_HOME=str(tmp_path_factory.mktemp("torch")), OMP_NUM_THREADS="1"
        ),
        pass_fds=[w for _, w in pipes],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        for _, w in pipes:
            os.close(w)
        assert process.stdout is not None
        try:
            pids, best = json.loads(process.stdout.readline())
            with os.fdopen(pipes[0][0]) as v1, os.fdopen(pipes[1][0]) as grpc:
                lines = _banner(v1)
                addresses = _address(lines), _address(_banner(grpc))
                yield Running(addresses, lines, best)
                for pid in pids:
                    os.kill(pid, signal.SIGTERM)
                assert process.wait(30) == 0
        finally:
            if process.poll() is None:
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
                process.kill()


def _banner(stderr: Iterator[str]) -> list[str]:
    lines = []
    for line in stderr:
        lines.append(line.rstrip("\n"))
        if line.startswith("  curl "):
            return lines
    raise AssertionError("\n".join(lines))


def _address(lines: list[str]) -> str:
    return next(m[1] for m in (re.search(r" on http://(\S+)$", x) for x in lines) if m)


def test_v1_with_a_picture_in_base64(running: Running) -> None:
    picture = base64.b64encode(PICTURE.read_bytes()).decode()
    body = json.dumps({"instances": [{"image": {"b64": picture}}]})
    # As curl -d sends it.
    form = {"content-type": "application/x-www-form-urlencoded"}
    url = f"http://{running.addresses[0]}/v1/models/alexnet:predict"
    answer = httpx.post(url, content=body, headers=form, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["predictions"][0] == pytest.approx(running.best, rel=1e-3)
    assert answer.headers["my-header"] == "sample"
    assert answer.headers["content-type"] == "application/json"


def test_grpc_with_the_picture_itself(running: Running) -> None:
    asked = ask_alexnet.main(running.addresses[1], PICTURE)
    answer_id, name, shape, data = asyncio.run(asked)
    assert len(answer_id) == 36
    assert (name, shape) == ("output-0", [1, 5])
    assert data == pytest.approx(running.best, rel=1e-3)


def test_the_log_says_what_a_flag_of_kserves_does_not_do(running: Running) -> None:
    told = [line for line in running.lines if "max_threads" in line]
    assert len(told) == 1
    assert "max_asyncio_workers" in told[0]
