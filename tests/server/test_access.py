"""The access log: its lines, whom they can hurt, and where they go."""

from __future__ import annotations

import asyncio
import contextvars
import errno
import gc
import io
import json
import logging
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest

from kserve_lite import Model, telling
from kserve_lite.records import Record
from kserve_lite.server import access, lines
from kserve_lite.server.access import FIELDS, AccessLog
from kserve_lite.server.lines import MOST, Lines
from kserve_lite.server.logs import configure_logging
from kserve_lite.server.settings import ServerSettings
from kserve_lite.testing import Client
from tests.server.logging_state import drop_pytest, fresh_logging
from tests.server.process import ECHO, PATIENCE, App

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}"


@pytest.fixture(autouse=True)
def logging_is_fresh() -> Iterator[None]:
    with fresh_logging():
        yield


def record_of(target: str = "/v1/models/m:predict", **known: Any) -> Record:
    headers = known.pop("headers", {})
    peer = known.pop("peer", "10.1.2.3")
    http = known.pop("http", "1.1")
    method = known.pop("method", "POST")
    record = Record(http, method, target, headers, peer, lambda: False)
    for name, value in {
        "model": "m",
        "protocol": "v1",
        "code": 200,
        "sent": 15,
        "took": 1_000_000,
    }.items():
        setattr(record, name, known.pop(name, value))
    assert not known
    return record


def own(stream: TextIO | None, **settings: Any) -> AccessLog:
    """The access log of a server that owns its process."""
    drop_pytest()
    configured = ServerSettings(**settings)
    configure_logging(configured)
    return AccessLog(configured, stream)


async def echo(payload: Any) -> Any:
    return payload


def line_of(record: Record, **settings: Any) -> str:
    stream = io.StringIO()
    log = own(stream, **settings)
    log.write(record)
    log.close()
    (line,) = stream.getvalue().splitlines(keepends=True)
    assert line.endswith("\n")
    return line[:-1]


# --- lines ---------------------------------------------------------------------------


def test_text() -> None:
    headers = {
        "x-request-id": "abc",
        "traceparent": f"00-{'a' * 32}-{'b' * 16}-01",
    }
    expected = (
        rf"{STAMP} {os.getpid()} kserve_lite\.access 10\.1\.2\.3 "
        r'"POST /v1/models/m:predict HTTP/1\.1" 200 15 \d+\.\d\dms v1 m '
        rf"id=abc trace={'a' * 32}"
    )
    assert re.fullmatch(expected, line_of(record_of(headers=headers)))


def test_json() -> None:
    record = record_of(headers={"x-request-id": 'a"b'})
    told = json.loads(line_of(record, log_format="json"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", told["timestamp"])
    assert told["duration_ms"] > 0
    del told["timestamp"], told["duration_ms"]
    assert told == {
        "level": "INFO",
        "logger": "kserve_lite.access",
        "message": "POST /v1/models/m:predict 200",
        "process": os.getpid(),
        "peer": "10.1.2.3",
        "method": "POST",
        "path": "/v1/models/m:predict",
        "http_version": "1.1",
        "status": 200,
        "bytes": 15,
        "protocol": "v1",
        "model": "m",
        "request_id": 'a"b',
        "trace_id": record.trace[0],
        "span_id": record.trace[1],
    }
    assert set(told) - {"level", "logger", "message", "process"} == set(FIELDS) - {
        "grpc_status",
        "duration_ms",
    }


GRPC = "/inference.GRPCInferenceService/ModelInfer"


@pytest.mark.parametrize(
    ("code", "text", "status", "grpc_status"),
    [
        ("OK", "OK", 200, "OK"),
        ("INVALID_ARGUMENT", "INVALID_ARGUMENT", 200, "INVALID_ARGUMENT"),
        (499, "499", 499, None),
        ("", "-", None, None),
    ],
)
def test_grpc(
    code: int | str, text: str, status: int | None, grpc_status: str | None
) -> None:
    record = record_of(GRPC, http="2", protocol="grpc", code=code)
    assert f'"POST {GRPC} HTTP/2" {text} 15 ' in line_of(record)
    told = json.loads(line_of(record, log_format="json"))
    assert told["status"] == status
    assert told.get("grpc_status") == grpc_status


def test_what_is_not_known_is_a_dash() -> None:
    record = record_of("/", method="GET", peer="", model="", protocol="http", sent=0)
    line = line_of(record)
    assert re.search(r'access - "GET / HTTP/1\.1" 200 0 \S+ms http - id=', line)
    told = json.loads(line_of(record, log_format="json"))
    assert told["peer"] == told["model"] == ""


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize(
    ("target", "shown"),
    [
        ("/v2?token=secret", "/v2?..."),
        ("http://me:secret@host:80/v2?secret", "/v2?..."),
        ("https://me:secret@host/v2", "/v2"),
        ("*", "*"),
        (f"http://secret{'x' * 5000}@host/v2", "/"),
        (f"/v2?{'secret' * 5000}", "/v2?..."),
    ],
    ids=range(6),
)
def test_secrets_of_a_target_are_left_out(
    log_format: str, target: str, shown: str
) -> None:
    line = line_of(record_of(target, method="GET"), log_format=log_format)
    if log_format == "text":
        assert f'"GET {shown} HTTP/1.1"' in line
    else:
        assert json.loads(line)["path"] == shown
    assert "secret" not in line


HOSTILE = [
    'x\n2026-11-23 05:20:01.123 1 kserve_lite.access - "GET / HTTP/1.1" 200 0 - -',
    "a\r\nb\x00\x1b[2J\x7f\x9b31m\x85\u2028\u2029\u202e",
    '" 200 1 0.00ms v1 m id=x "\\',
    "\ud800\udfff\ud83d",
    "modèle 模型 \U0001f600",
    "\\\\\\n",
    "x" * 65536,
    "\x1b" * 65536,
    "\U0001f600" * 65536,
    '"\\' * 65536,
    " " * 65536,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_what_a_peer_sends_is_only_text(text: str) -> None:
    record = record_of(
        f"/{text}",
        model=text,
        peer=text,
        method=text,
        headers={"x-request-id": "\\" * 128},
    )
    for _ in range(2):  # what is remembered is no different
        line = line_of(record)
        assert line.isprintable()
        assert len(line.encode()) < 4096
        # The request is the one quoted part; all else are words.
        found = re.fullmatch(
            rf'{STAMP} \d+ kserve_lite\.access (\S+) "((?:[^"\\]|\\.)*)" 200 15 '
            r"\d+\.\d\dms v1 (\S+) id=\S+ trace=\w{32}",
            line,
        )
        assert found
        assert found[1] == found[3]
        assert found[2].endswith(" HTTP/1.1")

        line = line_of(record, log_format="json")
        assert line.isascii()
        assert line.isprintable()
        assert len(line) < 4096
        told = json.loads(line)
        shown = text.encode(errors="backslashreplace").decode()
        for field in ("model", "peer", "method"):
            begin = told[field].removesuffix("...")
            assert shown.startswith(begin)
            assert begin == shown or told[field].endswith("...")
        assert "/" + shown == told["path"] or told["path"].endswith("...")


def test_what_can_be_read_is_not_escaped() -> None:
    assert " v1 a\\U000e0001b id=" in line_of(record_of(model="a\U000e0001b"))
    assert " v1 modèle\\x20模型 id=" in line_of(record_of(model="modèle 模型"))


def test_the_clock_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    log = own(stream, log_format="json")
    now = 0
    monkeypatch.setattr(access, "time_ns", lambda: now)
    monkeypatch.setattr(access, "perf_counter_ns", lambda: 0)
    for now in (250, 999, 1000, 2100):
        now += 1_700_000_000_000
        now *= 1_000_000
        record = record_of()
        # The last ended a tenth of a second ago.
        record.started, record.took = (
            -300_000_000,
            200_000_000 + 100_000_000 * (now % 1_000_000_000 != 100_000_000),
        )
        log.write(record)
    log.close()
    assert [
        json.loads(line)["timestamp"] for line in stream.getvalue().splitlines()
    ] == [
        "2023-11-14T22:13:20.250Z",
        "2023-11-14T22:13:20.999Z",
        "2023-11-14T22:13:21.000Z",
        "2023-11-14T22:13:22.000Z",
    ]


def remembered(log: AccessLog) -> list[int]:
    """How much of each kind is remembered, of text and of JSON."""
    text = log._format.__self__  # type: ignore[attr-defined]
    caches = (access._known_json, access._known_json_request)
    own = (text._words, text._numbers, text._times) if hasattr(text, "_words") else ()
    return [*map(len, own), *(cache.cache_info().currsize for cache in caches)]


def test_what_is_remembered_is_bounded() -> None:
    stream = io.StringIO()
    long = "x" * 300
    for log_format in ("text", "json"):
        log = own(stream, log_format=log_format)
        for number in range(2000):
            some = {"model": f"m{number}", "peer": f"p{number}", "sent": number}
            log.write(record_of(f"/{number}", took=number * 10_000, **some))
        log.flush()
        before = remembered(log)
        assert 0 < max(before) <= 1024
        last = {"sent": 1999, "took": 1999 * 10_000}
        log.write(record_of(f"/{long}", model=long, peer="p1999", **last))
        log.close()
        assert remembered(log) == before


@pytest.mark.parametrize(
    ("code", "colour"),
    [(200, 32), (307, 36), (404, 33), (503, 31), ("OK", 32), ("INTERNAL", 31)],
)
def test_colours_are_for_terminals(
    monkeypatch: pytest.MonkeyPatch, code: int | str, colour: int
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    leader, follower = os.openpty()
    with os.fdopen(follower, "w") as terminal:
        log = own(terminal)
        log.write(record_of(code=code))
        log.close()
        shown = os.read(leader, 4096).decode()
    os.close(leader)
    assert f'HTTP/1.1" \x1b[{colour}m{code}\x1b[0m 15' in shown
    assert "\x1b" not in line_of(record_of(code=code))


# --- whether and where ---------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{"access_log": False}, {"log_level": "WARNING"}], ids=str
)
def test_off(settings: dict[str, Any]) -> None:
    stream = io.StringIO()
    log = own(stream, **settings)
    log.write(record_of())
    log.close()
    assert stream.getvalue() == ""
    assert not threads()


def threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "access-log"]


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def test_embedded_without_logging_nothing_is_written(
    capfd: pytest.CaptureFixture[str],
) -> None:
    drop_pytest()
    logging.getLogger("kserve_lite.access").setLevel(logging.INFO)
    log = AccessLog(ServerSettings())
    log.write(record_of())
    log.close()
    assert capfd.readouterr() == ("", "")
    assert not threads()


@pytest.mark.parametrize("name", ["kserve_lite.access", "kserve_lite", ""])
def test_a_program_that_configured_logging_gets_records(name: str) -> None:
    drop_pytest()
    handler = Kept()
    logging.getLogger(name).addHandler(handler)
    logging.getLogger(name).setLevel(logging.INFO)
    stream = io.StringIO()
    log = AccessLog(ServerSettings(), stream)
    log.write(record_of("/v2?secret", model="m\n"))
    log.write(record_of(GRPC, code="OK"))
    logging.getLogger(name).setLevel(logging.WARNING)
    log.write(record_of())
    first, second = handler.records
    assert stream.getvalue() == ""
    assert first.getMessage().startswith('10.1.2.3 "POST /v2?... HTTP/1.1" 200 15 ')
    told = vars(first)
    assert [name for name in FIELDS if name not in told] == ["grpc_status"]
    assert (told["status"], told["path"], told["model"]) == (
        200,
        "/v2?...",
        "m\\n"[:1] + "\\x0a",
    )
    assert all(name in vars(second) for name in FIELDS)


NAMES = ("request_id", "model", "path", "trace_id")


@pytest.fixture
def factory_with_names() -> Iterator[None]:
    """A program's LogRecord factory that sets what we would."""
    before = logging.getLogRecordFactory()

    def factory(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = before(*args, **kwargs)
        for name in NAMES:
            setattr(record, name, "the program's")
        return record

    logging.setLogRecordFactory(factory)
    yield
    logging.setLogRecordFactory(before)


@pytest.mark.usefixtures("factory_with_names")
def test_a_programs_own_fields_stay() -> None:
    drop_pytest()
    handler = Kept()
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)
    model = Model("m", predict=echo)
    with Client(model, enable_latency_logging=True) as client:
        assert client.predict([1]) == [1]
    latency, access = (
        next(r for r in handler.records if r.name == f"kserve_lite.{name}")
        for name in ("trace", "access")
    )
    for name in NAMES:
        assert vars(latency)[name] == vars(access)[name] == "the program's"
    assert vars(latency)["predict_ms"] > 0
    assert vars(access)["status"] == 200
    assert (latency.filename, latency.funcName) == ("stages.py", "_log_latency")
    assert latency.getMessage().startswith("requestId: ")


class Picky(Kept):
    """Fails for some lines, as a filter of a program may."""

    def filter(self, record: logging.LogRecord) -> bool:
        if vars(record).get("path") != "/good" and record.name != "kserve_lite":
            raise ValueError("a filter's")
        return True


@pytest.mark.parametrize("is_deaf", [False, True])
def test_a_filter_that_fails_loses_its_line_only(
    monkeypatch: pytest.MonkeyPatch, is_deaf: bool
) -> None:
    monkeypatch.setattr(telling, "_said", set())
    drop_pytest()
    handler = Picky()
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)
    if is_deaf:  # the line about it fails, too

        def fail(record: logging.LogRecord) -> bool:
            if record.levelno >= logging.ERROR:
                raise ValueError("another filter's")
            return True

        logging.getLogger("kserve_lite").addFilter(fail)
    log = AccessLog(ServerSettings())
    try:
        for number in range(2 * access.TOGETHER):
            log.write(record_of("/bad" if number % 2 else "/good"))
        log.close()
        with Client(Model("m", predict=echo), enable_latency_logging=True) as client:
            assert client.predict([1]) == [1]
    finally:
        logging.getLogger("kserve_lite").filters.clear()
    found = [r for r in handler.records if r.name == "kserve_lite.access"]
    assert len(found) == access.TOGETHER
    said = [r.getMessage() for r in handler.records if r.levelno >= logging.ERROR]
    expected = [
        f"a line of kserve_lite.{name} could not be written; it is said only once"
        for name in ("access", "trace")
    ]
    assert said == ([] if is_deaf else expected)


@pytest.mark.parametrize("count", [1, access.TOGETHER])
def test_lines_are_written_in_nobodys_context(count: int) -> None:
    """Else a program's filter would give them all what is current in one request."""
    drop_pytest()
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")
    seen: list[str] = []

    class Asking(Kept):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(variable.get("nobody's"))

    logging.getLogger("kserve_lite.access").addHandler(Asking())
    logging.getLogger("kserve_lite.access").setLevel(logging.INFO)
    log = AccessLog(ServerSettings())

    async def requests() -> None:
        variable.set("the first's")
        for _ in range(count):
            log.write(record_of())
        async with asyncio.timeout(PATIENCE):
            while len(seen) < count:  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    asyncio.run(requests())
    variable.set("the caller's")
    for _ in range(count):
        log.write(record_of())  # where no loop runs
    assert seen == ["nobody's"] * 2 * count


def test_a_handler_of_its_own_takes_the_place_of_standard_output() -> None:
    stream = io.StringIO()
    log = own(stream)
    handler = Kept()
    logging.getLogger("kserve_lite.access").addHandler(handler)
    log.write(record_of())
    log.close()
    assert len(handler.records) == 1
    assert stream.getvalue() == ""


# --- streams -------------------------------------------------------------------------


class Pipe:
    """A pipe whose reader may be slow, or leave."""

    def __init__(self) -> None:
        self.reader, writer = os.pipe()
        self.writer = os.fdopen(writer, "w")

    def read(self, until: Callable[[bytes], bool]) -> bytes:
        """Read on until enough has come."""
        data = b""
        due = time.monotonic() + PATIENCE
        while not until(data):
            assert time.monotonic() < due
            if select.select([self.reader], [], [], 0.05)[0]:
                data += os.read(self.reader, 1000)  # so that it stays full
        return data

    def close(self) -> None:
        os.close(self.reader)


def refuse(*_: object) -> int:
    """In the place of os.pwritev: what Linux before 6.4 does with a pipe."""
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")


@pytest.fixture(params=["at once", "by the thread"])
def pipe(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Pipe]:
    if request.param != "at once":
        monkeypatch.setattr(os, "pwritev", refuse)
    made = Pipe()
    yield made
    made.writer.close()


def test_a_pipe_with_room_takes_lines_at_once() -> None:
    pipe = Pipe()
    written = Lines(pipe.writer)
    line = b"x" * 99 + b"\n"
    written.add(line * 100)
    assert os.read(pipe.reader, 65536) == line * 100
    assert not threads()
    for number in range(1000):
        written.add(b"%04d" % number * 25 + b"\n")
    assert threads()  # it is full by now
    data = pipe.read(lambda data: data.count(b"\n") == 1000)
    assert [int(each[:4]) for each in data.splitlines()] == list(range(1000))
    written.flush(PATIENCE)
    written.add(line)
    assert os.read(pipe.reader, 65536) == line
    written.close(PATIENCE)
    pipe.close()
    pipe.writer.close()


def test_lines_come_without_being_asked_for(pipe: Pipe) -> None:
    written = Lines(pipe.writer)
    written.add(b"one\n")
    written.add(b"two\n")
    assert pipe.read(lambda data: data.count(b"\n") == 2) == b"one\ntwo\n"
    written.close(PATIENCE)
    assert not threads()
    written.add(b"three\n")
    written.close(PATIENCE)
    assert os.read(pipe.reader, 100) == b"three\n"
    pipe.close()


def test_a_pipe_that_takes_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it may of a line that is longer than PIPE_BUF, while its reader reads."""
    take = os.pwritev
    monkeypatch.setattr(
        os, "pwritev", lambda fd, data, *how: take(fd, [data[0][:99]], *how)
    )
    pipe = Pipe()
    written = Lines(pipe.writer)
    lines = b"before\n" + b"x" * 8000 + b"\nafter\n"
    written.add(lines)
    written.add(b"last\n")
    data = pipe.read(lambda data: data.endswith(b"last\n"))
    assert data == lines + b"last\n"
    written.close(PATIENCE)
    pipe.close()
    pipe.writer.close()


def test_a_reader_that_stalls_holds_nobody_up(
    pipe: Pipe, caplog: pytest.LogCaptureFixture
) -> None:
    line = b"x" * 1023 + b"\n"
    written = Lines(pipe.writer)
    total = 8 * MOST // len(line)
    for _ in range(total):
        written.add(line)
    assert written._size <= MOST + len(line)
    dropped = written._dropped
    # What waits, what is being written, and what the pipe holds.
    assert (total - dropped) * len(line) <= 2 * (MOST + len(line)) + 65536
    assert not written.flush(0.05)
    written.close(0.05)  # comes back all the same
    assert threads()
    stop = threading.Event()
    came: list[bytes] = []

    def drain() -> None:
        while True:
            ends = stop.is_set()
            if select.select([pipe.reader], [], [], 0.01)[0]:
                came.append(os.read(pipe.reader, 65536))
            elif ends:
                return

    reader = threading.Thread(target=drain)
    reader.start()
    written.close(PATIENCE)
    stop.set()
    reader.join()
    whole = b"".join(came).splitlines(keepends=True)
    assert set(whole) == {line}
    assert len(whole) == total - dropped
    assert f"{dropped} access lines were dropped" in caplog.text
    assert not threads()
    pipe.close()


def test_lines_of_others_land_between_those_of_a_full_pipe(pipe: Pipe) -> None:
    """Standard error may be the same pipe, and its reader slower than a burst."""
    line, other = b"<" + b"x" * 120 + b">\n", b"a warning\n"
    written = Lines(pipe.writer)
    for _ in range(4000):
        written.add(line)

    def warn() -> None:
        for _ in range(500):
            os.write(pipe.writer.fileno(), other)

    writer = threading.Thread(target=warn)
    writer.start()
    data = pipe.read(lambda data: data.count(b"\n") == 4500)
    writer.join()
    written.close(PATIENCE)
    lines = data.splitlines(keepends=True)
    assert (lines.count(line), lines.count(other)) == (4000, 500)
    pipe.close()


def test_several_processes_share_a_pipe(pipe: Pipe) -> None:
    # Two writers that know nothing of each other, as two processes are.
    written = [Lines(pipe.writer) for _ in range(2)]
    many = 3000
    for number in range(many):
        for name, each in enumerate(written):
            each.add(f"<{name} {number:05d} {'x' * (number % 200)}>\n".encode())
    data = pipe.read(lambda data: data.count(b"\n") == 2 * many).decode()
    for each in written:
        each.close(PATIENCE)
    for name in range(2):
        numbers = re.findall(rf"^<{name} (\d+) x*>$", data, re.MULTILINE)
        assert [int(number) for number in numbers] == list(range(many))
    pipe.close()


@pytest.mark.parametrize("most", [16, 40, 64, 4096])
def test_lines_are_written_whole(most: int) -> None:
    texts = [f"{'é' * (n % 17)}{n}\n" for n in range(100)]
    given = [text.encode() for text in [*texts, "x" * 100 + "\n", "y\n"]]
    chunks = [bytes(chunk) for chunk in lines._chunks(given, most)]
    assert b"".join(chunks) == b"".join(given)
    for chunk in chunks:
        assert chunk.endswith(b"\n")
        assert len(chunk) <= most or chunk.count(b"\n") == 1
    assert len(chunks) < len(given) or most == 16


def test_a_reader_that_leaves(pipe: Pipe, caplog: pytest.LogCaptureFixture) -> None:
    pipe.close()
    written = Lines(pipe.writer)
    for _ in range(3):
        written.add(b"a line\n")
        assert written.flush(PATIENCE)
    assert written.dead
    assert caplog.text.count("cannot be written") == 1
    assert "Broken pipe; no more are" in caplog.text
    written.close(PATIENCE)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_a_full_disk_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123
        written = Lines(full)
        for _ in range(3):
            written.add(b"a line\n")
            assert written.flush(PATIENCE)
        assert not written.dead
        written.close(PATIENCE)
    assert caplog.text.count("No space left on device") == 1


def test_a_pipe_that_does_not_block(pipe: Pipe) -> None:
    os.set_blocking(pipe.writer.fileno(), False)
    written = Lines(pipe.writer)
    for number in range(20_000):
        written.add(f"{number:05d}\n".encode())
    data = pipe.read(lambda data: data.count(b"\n") == 20_000)
    assert [int(line) for line in data.split()] == list(range(20_000))
    written.close(PATIENCE)
    pipe.close()


def test_streams_that_are_no_files(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = io.StringIO()
    written = Lines(memory)
    written.add("é\n".encode())
    written.close(PATIENCE)
    assert memory.getvalue() == "é\n"
    memory.close()
    written.add(b"late\n")
    written.close(PATIENCE)
    assert written.dead
    assert "closed file" in caplog.text
    monkeypatch.setattr(sys, "stdout", None)
    none = own(None)
    none.write(record_of())
    none.close()
    assert not threads()


class Strange(io.StringIO):
    """A program's own stream in the place of standard output."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error: Exception | None = error

    def write(self, text: str) -> int:
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return super().write(text)


@pytest.mark.parametrize(
    "error",
    [
        UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range"),
        ValueError("no errno"),
        OSError("no errno either"),
        KeyError("a bug"),
    ],
    ids=repr,
)
def test_a_stream_that_fails_once_is_not_dead(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    stream = Strange(error)
    written = Lines(stream)
    written.add(b"lost\n")
    assert written.flush(PATIENCE)
    assert not written.dead
    written.add(b"kept\n")
    written.close(PATIENCE)
    assert stream.getvalue() == "kept\n"
    assert caplog.text.count("cannot be written") == 1
    assert "no more are" not in caplog.text


def test_a_log_that_was_never_written_to_closes() -> None:
    log = own(io.StringIO())
    log.flush()
    log.close()
    log.close()
    AccessLog(ServerSettings(access_log=False)).close()


def test_the_garbage_collector_may_write_lines() -> None:
    """A request that was abandoned may end wherever Python allocates."""
    memory = io.StringIO()
    written = Lines(memory)

    class Abandoned:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            written.add(b"abandoned\n")

    with written._lock:
        Abandoned()
        gc.collect()
        written.add(b"here\n")
    written.close(PATIENCE)
    assert memory.getvalue() == "abandoned\nhere\n"


# --- a process -----------------------------------------------------------------------


@pytest.mark.parametrize("flags", [(), ("--access_log", "false")], ids=str)
def test_a_process(tmp_path: Path, flags: tuple[str, ...]) -> None:
    (tmp_path / "app.py").write_text(ECHO)
    with App("app.py", "--http_port", "0", *flags, cwd=tmp_path) as app:
        assert app.ask("/v1/models/m:predict", {"x": 1})[0] == 200
        assert app.ask("/nowhere")[0] == 404
        result = app.stop()
    assert result.status == 0
    peer = r"127\.0\.0\.1"
    expected = [
        rf'{peer} "POST /v1/models/m:predict HTTP/1\.1" 200 7 \S+ms v1 m id=\w{{32}} ',
        rf'{peer} "GET /nowhere HTTP/1\.1" 404 \d+ \S+ms http - id=\w{{32}} ',
    ]
    found = result.out.splitlines()
    assert len(found) == (0 if flags else 2)
    for line, pattern in zip(found, expected, strict=False):
        assert re.match(rf"{STAMP} \d+ kserve_lite\.access {pattern}", line)


def test_several_processes(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(ECHO)
    flags = ("--http_port", "0", "--workers", "2", "--log_format", "json")
    with App("app.py", *flags, cwd=tmp_path) as app:
        for number in range(100):
            assert app.ask("/v1/models/m:predict", {"x": number})[0] == 200
        result = app.stop()
    told = [json.loads(line) for line in result.out.splitlines()]
    assert [each["path"] for each in told] == ["/v1/models/m:predict"] * 100
    assert len({each["request_id"] for each in told}) == 100


def test_a_process_whose_output_nobody_reads(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(ECHO)
    with App("app.py", "--http_port", "0", cwd=tmp_path) as app:
        assert app.process.stdout is not None
        app.process.stdout.close()
        for _ in range(3):
            assert app.ask("/v1/models/m:predict", {"x": 1})[0] == 200
        app.signal(signal.SIGTERM)
        _, errors = app.process.communicate(timeout=PATIENCE)
    assert app.process.returncode == 0
    assert errors.count("access lines cannot be written") == 1
    assert "Traceback" not in errors
