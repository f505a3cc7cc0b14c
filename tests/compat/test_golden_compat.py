"""Replays all recorded requests and calls to the very program that they are from.

`golden_models.py` is a copy of the contract's `models.py`, code for KServe's SDK with
nothing but its imports changed, and runs with two workers. No record is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.golden import calls, replay
from tests.server.process import App

PROGRAM = Path(__file__).parent / "golden_models.py"
FLAGS = ("--http_port", "0", "--grpc_port", "0", "--workers", "2")


@pytest.fixture(scope="module")
def app() -> Iterator[App]:
    with App(PROGRAM.name, *FLAGS, cwd=PROGRAM.parent) as app:
        yield app


@pytest.fixture(scope="module")
def channel(app: App) -> Iterator[grpc.Channel]:
    ports = next(line for line in app.lines if line.startswith("  gRPC"))
    with grpc.insecure_channel(ports.split()[-1]) as channel:  # the one of its own
        yield channel


@pytest.mark.parametrize("record", replay.RECORDS, ids=replay.NAMES)
def test_rest_record(record: dict[str, Any], app: App) -> None:
    replay.check(record, app.port)


@pytest.mark.parametrize(("name", "holds"), replay.HOLDS)
def test_any_rest_body_holds_what_its_reason_says(
    name: str, holds: Any, app: App
) -> None:
    replay.check_holds(name, holds, app.port)


@pytest.mark.parametrize(
    "record", calls.RECORDS, ids=[r["name"] for r in calls.RECORDS]
)
def test_grpc_record(record: dict[str, Any], channel: grpc.Channel) -> None:
    calls.check(record, channel)


@pytest.mark.parametrize(("name", "holds"), calls.HOLDS)
def test_any_grpc_answer_holds_what_its_reason_says(
    name: str, holds: Any, channel: grpc.Channel
) -> None:
    calls.check_holds(name, holds, channel)


def test_it_stops(app: App) -> None:
    assert app.stop().status == 0


def test_copy_is_the_contract() -> None:
    shared = replay.CONTRACT / "models.py"
    if not shared.exists():
        pytest.skip("the contract is not beside this checkout")
    assert PROGRAM.read_bytes() == shared.read_bytes()
