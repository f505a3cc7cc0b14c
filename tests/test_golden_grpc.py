"""Replays the recorded calls of KServe's gRPC clients: we must answer as `want` says.

To one server that serves `tests/golden/models.py`; `tests/golden/calls.py` says how
they are sent and compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from tests.golden import calls
from tests.golden.models import MODELS
from tests.golden.replay import CONTRACT
from tests.support import ServerThread


@pytest.fixture(scope="module")
def channel() -> Iterator[grpc.Channel]:
    with (
        ServerThread(*MODELS) as running,
        grpc.insecure_channel(f"127.0.0.1:{running.port}") as channel,
    ):
        yield channel


@pytest.mark.parametrize(
    "record", calls.RECORDS, ids=[r["name"] for r in calls.RECORDS]
)
def test_record(record: dict[str, Any], channel: grpc.Channel) -> None:
    calls.check(record, channel)


@pytest.mark.parametrize(("name", "holds"), calls.HOLDS)
def test_any_body_holds_what_its_reason_says(
    name: str, holds: Any, channel: grpc.Channel
) -> None:
    calls.check_holds(name, holds, channel)


def test_copy_is_the_contract() -> None:
    shared = CONTRACT / "grpc.jsonl"
    if not shared.exists():
        pytest.skip("the contract is not beside this checkout")
    assert calls.COPY.read_bytes() == shared.read_bytes()
