"""`utils`, `constants` and `logging` of compat: what KServe's do not do, or do wrong.

What is the same as KServe's is in `beside_kserve.py`.
"""

from __future__ import annotations

import builtins
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kserve_lite.compat import logging as logs
from kserve_lite.compat.constants import constants
from kserve_lite.compat.errors import InferenceError, InvalidInput
from kserve_lite.compat.protocol.infer_type import InferInput, InferRequest
from kserve_lite.compat.utils import utils
from kserve_lite.compat.utils.numpy_codec import from_np_dtype, to_np_dtype
from kserve_lite.errors import SettingsError
from kserve_lite.tensors import DATATYPES


def test_bf16_is_a_type() -> None:
    for datatype in DATATYPES:
        assert from_np_dtype(np.dtype(to_np_dtype(datatype))) == datatype
    assert from_np_dtype(np.dtype("complex64")) is None
    assert to_np_dtype("COMPLEX") is None


@pytest.mark.parametrize(
    "payload",
    [
        {},
        {"instances": 1},
        {"instances": [[1], [2, 3]]},
        {"instances": [{"a": 1}, 2]},
        [],
        InferRequest("m", []),
    ],
)
def test_a_request_that_is_none_is_the_senders_fault(payload: Any) -> None:
    with pytest.raises(InvalidInput):
        utils.get_predict_input(payload)


def test_rows_of_single_values_make_a_frame() -> None:
    payload = {"instances": [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]}
    frame = utils.get_predict_input(payload)
    assert frame["a"].tolist() == [1, 2]
    assert frame["b"].tolist() == ["x", "y"]
    assert utils.get_predict_response(payload, frame, "m") == {
        "predictions": [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    }


def test_a_frame_without_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "pandas":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    request = InferRequest("m", [InferInput("a", [1], "INT8", [1])])
    for ask in (
        request.as_dataframe,
        lambda: utils.get_predict_input({"instances": [{"a": 1}]}),
    ):
        with pytest.raises(ImportError, match="pip install pandas"):
            ask()


def test_a_result_that_no_datatype_fits() -> None:
    request = InferRequest("m", [], "7")
    with pytest.raises(InferenceError, match="complex64"):
        utils.get_predict_response(request, np.zeros(1, np.complex64), "m")
    with pytest.raises(InvalidInput):
        utils.get_predict_response([], [], "m")  # type: ignore[arg-type]


def test_cloudevents_leave_the_requests_attributes_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    came = {
        "specversion": "1.0",
        "id": "1",
        "time": "2024-01-01T00:00:00Z",
        "type": "t",
        "source": "s",
        "subject": "x",
    }
    before = dict(came)
    monkeypatch.setenv("CE_MERGE", "true")
    monkeypatch.setenv("CE_SOURCE", "mine")
    headers, body = utils.create_response_cloudevent("m", {"a": 1}, came, True)
    assert came == before
    assert headers["ce-subject"] == "x"
    assert headers["ce-source"] == "mine"
    assert headers["ce-type"] == "io.kserve.inference.response"
    assert headers["ce-id"] != "1"
    assert json.loads(body) == {"a": 1}
    monkeypatch.delenv("CE_MERGE")
    monkeypatch.delenv("CE_SOURCE")
    headers, body = utils.create_response_cloudevent("m", {"a": 1}, came)
    event = json.loads(body)
    assert utils.is_structured_cloudevent(event)
    assert event["source"] == "io.kserve.inference.m"
    assert "subject" not in event


def test_constants() -> None:
    assert constants.GRPC_CONTENT_DATATYPE_MAPPINGS["INT8"] == "int_contents"
    with pytest.raises(AttributeError, match="NONE"):
        _ = constants.NONE
    assert utils.cpu_count() >= 1


def test_importing_compat_costs_no_heavy_package() -> None:
    """Neither numpy nor protobuf, nor clients: a server may need none of them."""
    code = (
        "import sys, kserve_lite.compat, kserve_lite.compat.inference_client;"
        "from kserve_lite.compat.protocol.grpc import grpc_predict_v2_pb2;"
        "heavy = ('numpy', 'pandas', 'httpx', 'grpc', 'grpclib', 'google.protobuf');"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.stdout.strip() == "[]"


# --- logging --------------------------------------------------------------------------

NAMES = ("kserve", "kserve.trace", "kserve_lite", "kserve_lite.trace")


@pytest.fixture
def loggers() -> Iterator[None]:
    """Loggers that nobody configured, and are again as they were afterwards."""
    known = [
        (log, log.handlers[:], log.level, log.propagate)
        for log in map(logging.getLogger, (*NAMES, ""))
    ]
    for log, *_ in known:
        log.handlers[:] = []
    yield
    for log, handlers, level, propagate in known:
        log.handlers[:] = handlers
        log.setLevel(level)
        log.propagate = propagate


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines()


def config_for(file: Path, names: tuple[str, str]) -> dict[str, Any]:
    handler = {"class": "logging.FileHandler", "filename": str(file)}
    loggers = {name: {"handlers": ["file"], "level": "INFO"} for name in names}
    loggers[names[1]]["propagate"] = False  # type: ignore[assignment]
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "handlers": {"file": handler},
        "loggers": loggers,
    }


@pytest.mark.usefixtures("loggers")
@pytest.mark.parametrize("names", [NAMES[:2], NAMES[2:]])
def test_a_configuration_for_either_name_is_ours(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    file = tmp_path / "log"
    logs.configure_logging(config_for(file, names))
    logs.logger.info("one")
    logs.trace_logger.info("two")
    assert lines(file) == ["one", "two"]
    closed()


@pytest.mark.usefixtures("loggers")
def test_files_of_json_and_of_the_old_format(tmp_path: Path) -> None:
    file = tmp_path / "log"
    json_file = tmp_path / "config.json"
    json_file.write_text(json.dumps(config_for(file, ("kserve", "kserve.trace"))))
    logs.configure_logging(str(json_file))
    logs.logger.info("one")
    assert lines(file) == ["one"]
    closed()
    old = tmp_path / "config.ini"
    old.write_text(
        "[loggers]\nkeys=root,own\n[handlers]\nkeys=file\n[formatters]\nkeys=\n"
        "[logger_root]\nhandlers=\n"
        "[logger_own]\nqualname=kserve\nlevel=INFO\nhandlers=file\n"
        f"[handler_file]\nclass=FileHandler\nargs=({str(file)!r},)\n"
    )
    logs.configure_logging(str(old))
    logs.logger.info("two")
    assert lines(file) == ["one", "two"]
    closed()
    with pytest.raises(SettingsError, match="cannot be read"):
        logs.configure_logging(str(tmp_path / "none.json"))


@pytest.mark.usefixtures("loggers")
def test_without_a_configuration_lines_look_like_the_servers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logging.getLogger().handlers[:] = []  # pytest's, which it put there after `loggers`
    logs.configure_logging()
    logs.logger.info("one")
    logs.configure_logging()  # it is configured: nothing is written twice
    logs.trace_logger.info("two")
    one, two = capsys.readouterr().err.splitlines()
    assert " kserve_lite INFO [test_utils.py:" in one
    assert two.endswith(" kserve_lite.trace two")


@pytest.mark.usefixtures("loggers")
def test_the_default_configuration_can_be_changed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    changed = json.loads(json.dumps(logs.KSERVE_LOG_CONFIG))
    changed["loggers"]["kserve_lite"]["level"] = "ERROR"
    logs.configure_logging(changed)
    logs.logger.info("one")
    logs.logger.error("two\nthree")
    assert capsys.readouterr().err.endswith("two\n    three\n")


def closed() -> None:
    """Close the files that loggers write to; pytest would warn of them."""
    for name in NAMES:
        log = logging.getLogger(name)
        for handler in log.handlers:
            handler.close()
        log.handlers[:] = []
