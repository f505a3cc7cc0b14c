"""What crosses between a server and a replica arrives as it was; without Ray."""

from __future__ import annotations

import pickle
from time import monotonic

import pytest

from kserve_lite import InvalidInput
from kserve_lite.errors import (
    InferenceFault,
    Kind,
    ModelFailed,
    ModelNotFound,
    Overloaded,
)
from kserve_lite.messages import Context
from kserve_lite.parallel.outcomes import Asked, Outcome, fault_of, raised


@pytest.mark.parametrize("kind", Kind)
def test_every_kind_of_fault_survives(kind: Kind) -> None:
    error = InferenceFault("Words for the client \u00e9.")
    error.kind = kind
    outcome = pickle.loads(pickle.dumps(Outcome(fault=fault_of(error))))
    again = raised(outcome.fault, "id")
    assert (again.kind, again.reason) == (kind, error.reason)


@pytest.mark.parametrize(
    "error", [InvalidInput("x"), ModelNotFound("m", "2"), Overloaded("y")]
)
def test_faults_of_every_class_survive(error: InferenceFault) -> None:
    again = raised(fault_of(error), "id")
    assert (again.kind, str(again)) == (error.kind, str(error))


@pytest.mark.parametrize("exposed", [None, "ValueError: no."])
def test_a_failure_keeps_what_it_says(exposed: str | None) -> None:
    error = ModelFailed("id-1", exposed)
    again = raised(pickle.loads(pickle.dumps(fault_of(error))), "id-1")
    assert isinstance(again, ModelFailed)
    assert (again.request_id, again.exposed, again.reason) == (
        "id-1",
        exposed,
        error.reason,
    )


def test_a_request_keeps_its_ids_and_its_time() -> None:
    headers = {"x-request-id": "mine", "x-other": "1"}
    context = Context("m", protocol="grpc", headers=headers, deadline=monotonic() + 50)
    asked = pickle.loads(pickle.dumps(Asked.of(context)))
    record = asked.record(lambda: True)
    assert record.request_id == "mine"
    assert record.traceparent == context.traceparent
    assert record.is_gone()
    assert asked.headers == headers
    assert 0 < asked.remaining <= 50
