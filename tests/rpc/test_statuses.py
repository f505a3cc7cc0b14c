"""The table from kinds of errors to gRPC statuses, and how faults are worded."""

from __future__ import annotations

from grpclib.const import Status

from kserve_lite.errors import InferenceFault, InvalidInput, Kind, ModelFailed
from kserve_lite.rest.replies import STATUS as REST
from kserve_lite.rpc.statuses import (
    MAX_TEXT_SIZE,
    STATUS,
    details_of,
    text_of,
    trailers_of,
)


def test_every_kind_has_a_status() -> None:
    assert STATUS.keys() == set(Kind)
    assert STATUS.keys() == REST.keys()
    assert Status.OK not in STATUS.values()
    assert Status.UNKNOWN not in STATUS.values()


def test_faults_of_the_caller_are_so_on_both_sides() -> None:
    """A 4xx there is no failure of the server here, and the other way round."""
    callers = {Status.INVALID_ARGUMENT, Status.NOT_FOUND, Status.PERMISSION_DENIED}
    for kind, status in STATUS.items():
        assert (status in callers) == (REST[kind] < 500)


def test_text_fits_into_a_header() -> None:
    assert text_of(InvalidInput("é")) == "é"
    assert text_of(InvalidInput("a\ud800b")) == "a?b"
    for long in ("x" * 5000, "é" * 5000, "\U0001f600" * 5000):
        text = text_of(InvalidInput(long))
        assert len(text.encode()) <= MAX_TEXT_SIZE + 3
        assert text.endswith("...")
        assert long.startswith(text.removesuffix("..."))


def test_a_failed_model_is_told_by_an_id() -> None:
    failed = ModelFailed("id-1")
    assert details_of(failed) == "Internal server error"
    assert trailers_of(failed) == {"x-request-id": "id-1"}
    assert details_of(ModelFailed("id-1", "ValueError: no.")).startswith("ValueError")
    assert trailers_of(InferenceFault("x")) == {}
