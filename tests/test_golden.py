"""Replays the recorded requests of KServe's clients: we must answer as `want` says.

To one server that serves `tests/golden/models.py`; `tests/golden/replay.py` says how
they are sent and compared. `ELSEWHERE` is what only KServe's own classes can answer:
tests/compat/test_golden_compat.py replays all records, these included, to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.golden import replay
from tests.golden.models import MODELS
from tests.support import ServerThread

# They show KServe's own objects and stages, or what its default handlers answer.
ELSEWHERE = {
    "v1_explain_default",
    "v1_order_explain",
    "v1_predict_default_no_predictor",
    "v2_hdr_default_model",
    "v2_params_ok",
}
RECORDS = [r for r in replay.RECORDS if r["name"] not in ELSEWHERE]


@pytest.fixture(scope="module")
def server() -> Iterator[ServerThread]:
    with ServerThread(*MODELS) as running:
        yield running


@pytest.mark.parametrize("record", RECORDS, ids=[r["name"] for r in RECORDS])
def test_record(record: dict[str, Any], server: ServerThread) -> None:
    replay.check(record, server.port)


@pytest.mark.parametrize(("name", "holds"), replay.HOLDS)
def test_any_body_holds_what_its_reason_says(
    name: str, holds: Any, server: ServerThread
) -> None:
    replay.check_holds(name, holds, server.port)


def test_what_is_named_exists() -> None:
    assert set(replay.NAMES) >= ELSEWHERE | set(replay.DEPARTURES)


def test_copy_is_the_contract() -> None:
    shared = replay.CONTRACT / "rest.jsonl"
    if not shared.exists():
        pytest.skip("the contract is not beside this checkout")
    assert replay.COPY.read_bytes() == shared.read_bytes()
