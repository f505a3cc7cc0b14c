"""The errors of compat: what they say, what they are, what a server makes of them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from kserve_lite import Model
from kserve_lite.compat import errors as ours
from kserve_lite.errors import InferenceFault, SettingsError, StartupError
from kserve_lite.testing import Client, Refused

Make = Callable[[], Exception]
# What raises it, what the client reads, its status by V1 and by gRPC.
FAULTS: dict[str, tuple[Make, str, int, str]] = {
    "input": (lambda: ours.InvalidInput("bad"), "bad", 400, "INVALID_ARGUMENT"),
    "error": (lambda: ours.InferenceError("bad"), "bad", 500, "INTERNAL"),
    "status": (
        lambda: ours.InferenceError("bad", "S", {"deep": 1}),
        "[S] bad",
        500,
        "INTERNAL",
    ),
    "found": (
        lambda: ours.ModelNotFound("m"),
        "Model with name m does not exist.",
        404,
        "NOT_FOUND",
    ),
    "ready": (
        lambda: ours.ModelNotReady("m", "Wait."),
        "Model with name m is not ready. Wait.",
        503,
        "UNAVAILABLE",
    ),
    "server": (
        lambda: ours.ServerNotReady("Wait."),
        "Server is not ready. Wait.",
        503,
        "UNAVAILABLE",
    ),
    "live": (ours.ServerNotLive, "Server is not live.", 503, "UNAVAILABLE"),
    "protocol": (
        lambda: ours.UnsupportedProtocol("v9"),
        "Unsupported protocol v9.",
        501,
        "UNIMPLEMENTED",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_raised_error_reaches_the_client(name: str) -> None:
    make, text, status, code = FAULTS[name]
    model = Model("m")

    @model.predict
    async def predict(payload: Any) -> Any:
        raise make()

    with Client(model) as client:
        with pytest.raises(Refused) as refused:
            client.predict({"instances": [1]})
        assert (refused.value.code, refused.value.reason) == (status, text)
        with pytest.raises(Refused) as refused:
            client.infer({}, over="grpc")
        assert (refused.value.code, refused.value.reason) == (code, text)


@pytest.mark.parametrize("name", FAULTS)
def test_an_error_says_the_same_everywhere(name: str) -> None:
    make, text, _, _ = FAULTS[name]
    error = make()
    assert isinstance(error, InferenceFault)
    assert (str(error), error.reason) == (text, text)
    assert getattr(error, "error_msg", text) == text


def test_the_members_of_kserves_errors() -> None:
    failed = ours.InferenceError("bad", status="S", debug_details={"deep": 1})
    assert (failed.status, failed.debug_details) == ("S", {"deep": 1})
    assert ours.ModelNotReady("m").model_name == "m"
    assert ours.ModelMissingError("/a/b").path == "/a/b"
    assert str(ours.ModelMissingError("/a/b")) == "/a/b"
    many = ours.WorkersShouldBeLessThanMaxWorkersError(2)
    assert many.reason == str(many) == "Workers cannot be greater than 2"


def test_what_code_for_kserve_catches() -> None:
    for kind in (
        ours.InferenceError,
        ours.ModelNotReady,
        ours.ServerNotReady,
        ours.ServerNotLive,
        ours.NoModelReady,
    ):
        assert issubclass(kind, RuntimeError)
    assert issubclass(ours.InvalidInput, ValueError)


def test_errors_of_the_start_end_it_in_one_line() -> None:
    models = [SimpleNamespace(name=name) for name in "ab"]
    one = ours.NoModelReady(models[:1], "Why.")
    assert str(one) == "Model with name a is not ready. Why."
    both = ours.NoModelReady(models)
    assert str(both) == "Models with names a,b are not ready."
    assert isinstance(both, StartupError)
    assert isinstance(ours.WorkersShouldBeLessThanMaxWorkersError(1), SettingsError)


def test_a_missing_models_path_is_not_for_clients() -> None:
    model = Model("m")

    @model.predict
    async def predict(payload: Any) -> Any:
        raise ours.ModelMissingError("/secret/path")

    with Client(model) as client:
        answer = client.request("POST", "/v1/models/m:predict", json={"instances": []})
        assert answer.status == 500
        assert "secret" not in json.loads(answer.body)["error"]


def test_translated() -> None:
    from kserve_lite import errors

    with pytest.raises(ours.InvalidInput, match="why"), ours.translated():
        raise errors.InvalidInput("why")
    assert pickle.loads(pickle.dumps(ours.InvalidInput("x"))).reason == "x"
