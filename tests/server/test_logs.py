"""Log lines for people and for machines, and files that configure logging."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import pty
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kserve_lite.errors import KServeLiteError, SettingsError, StartupError
from kserve_lite.server.logs import JsonFormatter, configure_logging, has_colours
from kserve_lite.server.settings import ServerSettings
from tests.server.logging_state import drop_pytest, fresh_logging
from tests.server.process import ECHO, App, finish

log = logging.getLogger("kserve_lite")
trace = logging.getLogger("kserve_lite.trace")

HEAD = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} "


class Errors:
    """What was written to standard error so far."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self._text = ""

    def getvalue(self) -> str:
        self._text += self._capsys.readouterr().err
        return self._text


@pytest.fixture
def stderr(capsys: pytest.CaptureFixture[str]) -> Iterator[Errors]:
    with fresh_logging():
        yield Errors(capsys)


def configure(**settings: Any) -> None:
    drop_pytest()
    configure_logging(ServerSettings(**settings))


def fail(text: str) -> None:
    try:
        raise ValueError(text)
    except ValueError:
        log.exception("a model failed")


# --- text -------------------------------------------------------------------------


def test_text_is_in_the_format_of_kserve(stderr: Errors) -> None:
    configure()
    log.warning("model %s is slow", "m")
    expected = HEAD + (
        rf"{os.getpid()} kserve_lite WARNING "
        r"\[test_logs\.py:test_text_is_in_the_format_of_kserve\(\):\d+\] "
        r"model m is slow\n"
    )
    assert re.fullmatch(expected, stderr.getvalue())


def test_latencies_tell_no_level_and_no_place(stderr: Errors) -> None:
    configure()
    trace.info("requestId: %s, predict_ms: 1.5", "N.A.")
    expected = (
        HEAD + rf"{os.getpid()} kserve_lite\.trace requestId: N\.A\., predict_ms: 1\.5"
    )
    assert re.fullmatch(expected, stderr.getvalue().rstrip("\n"))


def test_text_from_outside_begins_no_line_and_steers_no_terminal(
    stderr: Errors,
) -> None:
    configure()
    forged = "2026-11-23 05:20:01.123 1 kserve_lite INFO [x.py:y():1] all is well"
    log.warning("name %s", f"m\n{forged}\r\x1b[2J\x9b31m\u202e\u2028.")
    log.warning("marks %s", "\u061c\u200e\u200f\ud800 of\ta modèle 模型")
    fail(f"boom\n{forged}")
    text = stderr.getvalue()
    heads = [line for line in text.split("\n") if re.match(HEAD, line)]
    assert len(heads) == 3
    assert "marks \\u061c\\u200e\\u200f\\ud800 of\ta modèle 模型\n" in text
    assert "\\x0d\\x1b[2J\\x9b31m\\u202e\\u2028." in text
    assert all(c.isprintable() or c in "\n\t" for c in text)
    assert text.count(f"\n    {forged}") == 2
    assert "\n    Traceback (most recent call last):\n" in text


@pytest.mark.parametrize(
    ("no_color", "term", "colours"),
    [("", "xterm", True), ("1", "xterm", False), ("", "dumb", False)],
)
def test_colours_are_for_terminals(
    stderr: Errors,
    monkeypatch: pytest.MonkeyPatch,
    no_color: str,
    term: str,
    colours: bool,
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", term)
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        configure()
        log.warning("a WARNING once")
        terminal.flush()
        written = os.read(leader, 1000)
    os.close(leader)
    assert (b" \x1b[33mWARNING\x1b[0m [" in written) is colours
    assert (b"\x1b" in written) is colours
    assert b"a WARNING once" in written


def test_nothing_but_a_terminal_has_colours() -> None:
    closed = io.StringIO()
    closed.close()
    assert not has_colours(None)
    assert not has_colours(closed)
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        assert not has_colours(nowhere)


# --- JSON -------------------------------------------------------------------------


def test_json_has_one_object_a_line(stderr: Errors) -> None:
    configure(log_format="json")
    log.warning("two\nlines of %s", "\u2028é\x1b", extra={"rows": 3, "names": ["a"]})
    fail("boom\n{}")
    logging.getLogger("kserve_lite.anything").info("below", stack_info=True)
    text = stderr.getvalue()
    assert text.isascii()
    first, second, third = map(json.loads, text.splitlines())
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first.pop("timestamp")
    )
    assert first == {
        "level": "WARNING",
        "logger": "kserve_lite",
        "message": "two\nlines of \u2028é\x1b",
        "process": os.getpid(),
        "rows": 3,
        "names": ["a"],
    }
    assert second["message"] == "a model failed"
    assert second["traceback"].startswith("Traceback (most recent call last):\n")
    assert second["traceback"].endswith("ValueError: boom\n{}")
    assert third["logger"] == "kserve_lite.anything"
    assert third["stack"].startswith("Stack (most recent call last):")


def test_timestamps_are_of_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        told = json.loads(
            JsonFormatter().format(logging.makeLogRecord({"created": 0.25}))
        )
    finally:
        monkeypatch.undo()
        time.tzset()
    assert told["timestamp"] == "1970-01-01T00:00:00.250Z"


class Unspeakable:
    def __str__(self) -> str:
        raise RuntimeError("never")


def cycle() -> list[Any]:
    rounds: list[Any] = []
    rounds.append(rounds)
    return rounds


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (float("nan"), "nan"),
        (cycle(), "[[...]]"),
        ({1: 2, (): 3}, "{1: 2, (): 3}"),
        (Unspeakable(), "<Unspeakable>"),
        (Path("/x"), "/x"),
        ("\ud800", "\ud800"),
        (10**30, 10**30),
        (b"x", "b'x'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_extra_can_be_told(stderr: Errors, value: Any, shown: Any) -> None:
    configure(log_format="json")
    log.info("it", extra={"value": value, "rows": 3})
    (line,) = stderr.getvalue().splitlines()
    told = json.loads(line, parse_constant=pytest.fail)
    assert told["value"] == shown
    assert told["rows"] == 3
    assert told["message"] == "it"


def test_an_extra_hides_nothing(stderr: Errors) -> None:
    configure(log_format="json")
    log.info("it", extra={"level": "NONE", "timestamp": "", "logger": "mine"})
    told = json.loads(stderr.getvalue())
    assert (told["level"], told["logger"]) == ("INFO", "kserve_lite")
    assert told["timestamp"]


def test_lines_that_nobody_handles_are_json_too(stderr: Errors) -> None:
    configure(log_format="json")
    logging.getLogger("asyncio").error("a task failed")
    logging.getLogger("another").info("it goes well")
    (line,) = stderr.getvalue().splitlines()
    assert json.loads(line)["logger"] == "asyncio"


# --- who configures -----------------------------------------------------------------


def test_the_level(stderr: Errors) -> None:
    configure(log_level="ERROR")
    log.warning("no")
    log.error("yes")
    assert stderr.getvalue().count("\n") == 1


def test_configuring_twice_writes_once(stderr: Errors) -> None:
    configure()
    configure(log_format="json")
    log.info("once")
    assert json.loads(stderr.getvalue())["message"] == "once"


@pytest.mark.parametrize("name", ["", "kserve_lite"])
def test_a_program_that_configured_logging_keeps_its_way(
    stderr: Errors, name: str
) -> None:
    own = io.StringIO()
    handler = logging.StreamHandler(own)
    logging.getLogger(name).addHandler(handler)
    last = logging.lastResort
    configure(log_level="WARNING", log_format="json")
    log.info("no")
    log.error("yes")
    assert stderr.getvalue() == ""
    assert own.getvalue().splitlines() == [
        "log_format json is not used: the program configured logging itself",
        "yes",
    ]
    assert logging.lastResort is last


# --- log_config -----------------------------------------------------------------------

CONFIG = {
    "version": 1,
    "formatters": {"json": {"()": "kserve_lite.server.logs.JsonFormatter"}},
    "handlers": {
        "file": {"class": "logging.FileHandler", "formatter": "json", "delay": True}
    },
    "loggers": {"kserve_lite": {"handlers": ["file"], "level": "DEBUG"}},
}


def config_for(folder: Path) -> dict[str, Any]:
    config = json.loads(json.dumps(CONFIG))
    config["handlers"]["file"]["filename"] = str(folder / "out.log")
    return config  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["log.json", "log.yaml", "log.YML"])
def test_a_file_configures_logging(stderr: Errors, tmp_path: Path, name: str) -> None:
    if not name.endswith(".json"):
        pytest.importorskip("yaml")
    other = logging.getLogger("tests.made.before")
    path = tmp_path / name
    path.write_text(json.dumps(config_for(tmp_path)))  # JSON is YAML, too
    configure(log_config=str(path), log_level="ERROR", log_format="text")
    log.debug("it", extra={"rows": 3})
    for handler in log.handlers:
        handler.close()
    told = json.loads((tmp_path / "out.log").read_text())
    assert (told["message"], told["rows"]) == ("it", 3)
    assert stderr.getvalue() == ""
    assert not other.disabled


def test_a_file_may_silence_what_was_there(stderr: Errors, tmp_path: Path) -> None:
    other = logging.getLogger("tests.made.before")
    path = tmp_path / "log.json"
    path.write_text('{"version": 1, "disable_existing_loggers": true}')
    kept = [
        logger
        for logger in logging.Logger.manager.loggerDict.values()
        if isinstance(logger, logging.Logger) and not logger.disabled
    ]
    try:
        configure(log_config=str(path))
        assert other.disabled
    finally:
        for logger in kept:
            logger.disabled = False


NO_SUCH_FOLDER = {"class": "logging.FileHandler", "filename": "/no/such/folder/x"}
BAD = [
    ("a.json", None, "cannot be read: No such file"),
    ("a.json", b"{", "is no JSON: Expecting property name"),
    ("a.json", b"[" * 100_000, "is no JSON"),
    ("a.json", b"\xff", "is not UTF-8"),
    ("a.json", b"[]", "must hold an object .* it holds list"),
    ("a.json", b"{}", "ValueError: dictionary doesn't specify a version"),
    (
        "a.json",
        b'{"version": 1, "handlers": {"h": {"class": "no.Such"}}}',
        "ValueError: Unable to configure handler 'h': .*no",
    ),
    (
        "a.json",
        json.dumps(CONFIG | {"handlers": {"h": NO_SUCH_FOLDER}}).encode(),
        "Unable to configure handler 'h': .*No such file",
    ),
    ("a.yaml", b"a: [", "is no YAML: "),
    ("a.yaml", b"just text", "must hold an object .* it holds str"),
    ("a.ini", b"[loggers]", "is it JSON or YAML"),
    ("a", b"{}", "is it JSON or YAML"),
]


@pytest.mark.parametrize(("name", "content", "words"), BAD)
@pytest.mark.usefixtures("stderr")
def test_a_file_that_cannot_be_used(
    tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    if name.endswith("yaml"):
        pytest.importorskip("yaml")
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match=f"^--log_config {path}") as caught:
        configure(log_config=str(path))
    assert re.search(words, str(caught.value))


@pytest.mark.usefixtures("stderr")
def test_yaml_without_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    path = tmp_path / "a.yaml"
    path.write_text("version: 1")
    with pytest.raises(StartupError, match="pip install pyyaml") as caught:
        configure(log_config=str(path))
    assert isinstance(caught.value, KServeLiteError)


# --- processes ---------------------------------------------------------------------


def json_lines(text: str) -> list[dict[str, Any]]:
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def test_a_process_that_logs_json(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(ECHO)
    flags = ("--http_port", "0", "--log_format", "json", "--enable_latency_logging")
    with App("app.py", *flags, cwd=tmp_path) as app:
        assert app.ask("/v1/models/m:predict", {"x": 1})[0] == 200
        loaded = json_lines("\n".join(app.lines))
        told = json_lines(app.stop().err)
    assert loaded[-1]["message"].startswith("loaded m")
    latency = next(t for t in told if t["logger"] == "kserve_lite.trace")
    assert latency["model"] == "m"
    assert latency["predict_ms"] > 0
    assert latency["message"].startswith(f"requestId: {latency['request_id']}, pre")


def test_a_process_whose_file_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(ECHO)
    result = finish("app.py", "--log_config", "none.json", cwd=tmp_path)
    assert result.status == 1
    assert result.err == (
        "kserve-lite: --log_config none.json cannot be read: "
        "No such file or directory\n"
    )
