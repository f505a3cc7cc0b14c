from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.forwarding.predictor import Seen, predictor_models
from tests.forwarding.recorder import Recorder, Reply, recorder
from tests.support import ServerThread


class Predictor(NamedTuple):
    host: str
    seen: Seen


@pytest.fixture(scope="package")
def predictor() -> Iterator[Predictor]:
    seen = Seen()
    with ServerThread(*predictor_models(seen)) as server:
        yield Predictor(f"127.0.0.1:{server.port}", seen)


@pytest.fixture(scope="package")
def shared_recorder() -> Iterator[Recorder]:
    with recorder() as kept:
        yield kept


@pytest.fixture
def recorded(shared_recorder: Recorder) -> Recorder:
    shared_recorder.closed.clear()
    shared_recorder.in_turn(Reply())
    return shared_recorder
