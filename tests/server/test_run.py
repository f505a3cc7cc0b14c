"""Servers that own their process: flags, signals, and one line when they cannot start.

Real processes and real signals; every process is stopped by the test that started it.
"""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kserve_lite.version import __version__
from tests.server.process import ECHO, PATIENCE, App, Result, finish

PREDICT = "/v1/models/m:predict"
ONE = {"instances": [1]}
CLI = ("-m", "kserve_lite", "run")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with programs that serve."""
    path = tmp_path_factory.mktemp("apps")
    for name, text in APPS.items():
        (path / f"{name}.py").write_text(text)
    return path


APPS = {
    "app": ECHO,
    "stdin": """
import os
from kserve_lite import Model, run

model = Model("m")

@model.predict
def predict(payload):
    os.write(1, b"started\\n")  # whole lines, whatever else prints
    os.read(0, 1)
    return payload

if __name__ == "__main__":
    run(model)
""",
    "stream": """
import os
from kserve_lite import Model, run

model = Model("m")

@model.predict
def predict(payload):
    yield "first"
    print("started", flush=True)
    os.read(0, 1)
    yield "second"

if __name__ == "__main__":
    run(model)
""",
    "load": """
import os
from kserve_lite import Model, run

model = Model("m")

@model.load
def load():
    print("started", flush=True)
    os.read(0, 1)

@model.predict
def predict(payload):
    return payload

@model.unload
def unload():
    print("unloaded", flush=True)

if __name__ == "__main__":
    run(model)
""",
    "async_load": """
import anyio
from kserve_lite import Model, run

first, second = Model("first"), Model("second")

@first.load
async def load():
    print("started", flush=True)
    await anyio.sleep_forever()

@first.predict
@second.predict
def predict(payload):
    return payload

if __name__ == "__main__":
    run(first, second)
""",
    "unload": """
import os
from kserve_lite import Model, run

model = Model("m")

@model.load
def load():
    return "the state"

@model.predict
def predict(payload):
    return payload

@model.unload
def unload(state):
    print("unloading", state, flush=True)
    os.read(0, 1)

if __name__ == "__main__":
    run(model)
""",
    "tensors": """
from typing import Annotated
import numpy as np
from kserve_lite import Model, TensorSpec, run

model = Model("it's a model")

@model.predict
def predict(
    a: Annotated[np.ndarray, TensorSpec("FP32", [-1, 3], "it's")],
    b: Annotated[np.ndarray, TensorSpec("BYTES", [-1, 1])],
) -> Annotated[np.ndarray, TensorSpec("FP32", [-1])]:
    return a.sum(axis=1)

if __name__ == "__main__":
    run(model)
""",
    "two": """
from kserve_lite import Model, run

def predict(payload):
    return payload

a = Model("a", predict=predict)
b = Model("b", predict=predict)
again = a
""",
    "arguments": ECHO.replace(
        "run(model)", 'run(model, http_port=1, host="192.0.2.1")'
    ),
    "misspelt": ECHO.replace("run(model)", "run(model, htpp_port=1)"),
    "at_import": ECHO.replace('if __name__ == "__main__":\n    run', "run"),
    "no_model": "x = 1\n",
    "raises": "import os\n\n\ndef f():\n    raise ValueError('one\\ntwo')\n\n\nf()\n",
    "exits": "import sys\n\nsys.exit('enough')\n",
    "imports": "import there_is_no_such_module\n",
    "syntax": "x = = 1\n",
    "bad_model": "from kserve_lite import Model\n\nmodel = Model('a/b')\n",
    "no_predict": "from kserve_lite import Model\n\nmodel = Model('m')\n",
    "same_names": """
from kserve_lite import Model

def predict(payload):
    return payload

a = Model("m", predict=predict)
b = Model("m", predict=predict)
""",
    "bad_load": """
from kserve_lite import Model, run

model = Model("m")

def helper():
    raise OSError("no such\\nweights")

@model.load
def load():
    helper()

@model.predict
def predict(payload):
    return payload

if __name__ == "__main__":
    run(model)
""",
    "exit_load": """
import sys
from kserve_lite import Model, run

model = Model("m")

@model.load
async def load():
    sys.exit(3)

@model.predict
def predict(payload):
    return payload

if __name__ == "__main__":
    run(model)
""",
}

REPORT = re.compile(
    r"stopped: drained (\d+), aborted (\d+), in \d+\.\d s$", re.MULTILINE
)


def report(result: Result) -> tuple[int, int]:
    """What the one line about the stop counts."""
    found = REPORT.findall(result.err)
    assert len(found) == 1, result.err
    drained, aborted = found[0]
    return int(drained), int(aborted)


# --- it serves --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["app", "tensors"])
def test_the_line_of_the_banner_works_when_pasted(folder: Path, name: str) -> None:
    with App(f"{name}.py", "--http_port", "0", cwd=folder) as app:
        done = subprocess.run(
            ["sh", "-c", app.curl + " -s -o /dev/null -w '%{http_code}'"],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=True,
        )
        assert done.stdout == "200", app.curl
        assert (":predict" in app.curl) == (name == "tensors")
        result = app.stop()
    assert (result.status, report(result)) == (0, (0, 0))
    assert result.errors == []


WAYS: list[tuple[str, ...]] = [
    ("app.py", "--http-port=0"),
    ("app.py", "--http_port=0"),
    (*CLI, "app:model", "--http_port", "0"),
    (*CLI, "app", "--http-port", "0"),
    (*CLI, "app.py:model", "--http-port", "0"),
    (*CLI, "--http-port", "0", "app.py"),
    ("-c", "from kserve_lite.cli import main; main()", "run", "app", "--http_port=0"),
]


@pytest.mark.parametrize("arguments", WAYS, ids=" ".join)
def test_ways_to_start(folder: Path, arguments: tuple[str, ...]) -> None:
    with App(*arguments, cwd=folder) as app:
        assert app.ask(PREDICT, ONE) == (200, ONE)
        assert app.stop().status == 0


@pytest.mark.parametrize(
    "targets", [("two:a", "two:b"), ("two",), ("two:again", "two")]
)
def test_several_models(folder: Path, targets: tuple[str, ...]) -> None:
    with App(*CLI, *targets, "--http_port", "0", cwd=folder) as app:
        assert app.ask("/v2/models") == (200, {"models": ["a", "b"]})
        for name in "ab":
            assert app.ask(f"/v1/models/{name}:predict", ONE) == (200, ONE)


def test_a_file_of_another_folder(folder: Path, tmp_path: Path) -> None:
    with App(*CLI, f"{folder}/app.py:model", "--http_port", "0", cwd=tmp_path) as app:
        assert app.ask(PREDICT, ONE) == (200, ONE)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def test_port_of_the_environment_beats_the_argument(folder: Path) -> None:
    port = free_port()
    with App("arguments.py", cwd=folder, PORT=str(port)) as app:
        assert app.port == port
        assert app.ask("/v2/health/live") == (200, {"live": True})


def test_a_flag_beats_the_environment(folder: Path) -> None:
    port = free_port()
    with App("arguments.py", "--http_port", str(port), cwd=folder, PORT="1") as app:
        assert app.port == port


def test_log_level_of_the_environment_and_of_the_flag(folder: Path) -> None:
    flags = ("app.py", "--http_port", "0")
    with App(*flags, cwd=folder, KSERVE_LOGLEVEL="warning") as app:
        assert app.lines[0].startswith("kserve-lite serves")
        assert app.stop().err == ""
    with App(*flags, "--log_level", "info", cwd=folder, KSERVE_LOGLEVEL="ERROR") as app:
        assert app.lines[0].endswith("loaded m in 0.00 s")


LATENCY = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} \d+ kserve_lite\.trace "
    r"requestId: (\S+), "
    r"preprocess_ms: [\d.e-]+, explain_ms: [\d.e-]+, predict_ms: [\d.e-]+, "
    r"postprocess_ms: [\d.e-]+"
)


@pytest.mark.parametrize(
    ("flags", "logs"),
    [
        (("--enable_latency_logging", "--http_port", "0"), True),
        (("--http_port", "0", "--enable-latency-logging"), True),
        (("--enable_latency_logging", "true", "--http_port", "0"), True),
        (("--enable_latency_logging", "false", "--http_port", "0"), False),
        (("--enable-latency-logging=False", "--http_port", "0"), False),
    ],
    ids=str,
)
def test_latency_logging(folder: Path, flags: tuple[str, ...], logs: bool) -> None:
    with App("app.py", *flags, cwd=folder) as app:
        assert app.ask(PREDICT, ONE) == (200, ONE)
        connection = http.client.HTTPConnection("127.0.0.1", app.port)
        connection.request("POST", PREDICT, "{}", {"x-request-id": "abc"})
        assert connection.getresponse().status == 200
        connection.close()
        result = app.stop()
    found = [m[1] for line in result.err.splitlines() if (m := LATENCY.fullmatch(line))]
    if not logs:
        assert not found
        return
    made, given = found
    assert re.fullmatch("[0-9a-f]{32}", made)
    assert given == "abc"


@pytest.mark.parametrize("loop", ["auto", "asyncio", "uvloop"])
def test_event_loops(folder: Path, loop: str) -> None:
    text = ECHO.replace(
        "    return payload",
        "    import asyncio\n    return type(asyncio.get_running_loop()).__module__",
    )
    (folder / f"loop_{loop}.py").write_text(text)
    flags = ("--http_port", "0", "--event_loop", loop)
    with App(f"loop_{loop}.py", *flags, cwd=folder) as app:
        connection = app.begin(PREDICT, ONE)
        module = connection.getresponse().read().decode()
        connection.close()
    assert module.startswith("asyncio" if loop == "asyncio" else "uvloop")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("app.py", "--help"), "--max_body_size"),
        (("-m", "kserve_lite", "run", "--help"), "--max_body_size"),
        (("-m", "kserve_lite", "--help"), "kserve-lite run app:model"),
        (("-m", "kserve_lite"), "kserve-lite run app:model"),
        (("-m", "kserve_lite", "--version"), __version__),
        (("-m", "kserve_lite", "run", "--version"), __version__),
        (("app.py", "--version"), __version__),
    ],
)
def test_help_and_version(
    folder: Path, arguments: tuple[str, ...], expected: str
) -> None:
    result = finish(*arguments, cwd=folder)
    assert (result.status, result.err) == (0, "")
    assert expected in result.out


# --- it stops ---------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_signal_finishes_what_is_in_flight(
    folder: Path, number: signal.Signals, loop: str
) -> None:
    flags = ("--http_port", "0", "--event_loop", loop)
    with App("stdin.py", *flags, cwd=folder) as app:
        connections = [app.begin(PREDICT, {"instances": [n]}) for n in range(2)]
        assert [app.said(), app.said()] == ["started", "started"]
        app.signal(number)
        refused(app.port)
        app.release()
        app.release()
        for index, connection in enumerate(connections):
            response = connection.getresponse()
            assert response.status == 200
            assert response.headers["connection"] == "close"
            assert response.read() == b'{"instances":[%d]}' % index
            connection.close()
        result = app.wait()
    assert (result.status, report(result)) == (0, (2, 0))
    assert result.errors == []
    assert f"{number.name}: stopping" in result.err


def refused(port: int) -> None:
    """Wait until the port is closed: the stop has begun."""
    ends = time.monotonic() + PATIENCE
    while time.monotonic() < ends:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            return
        time.sleep(0.01)
    raise AssertionError("the port is still open")


@pytest.mark.parametrize("name", ["stdin", "stream"])
def test_a_second_signal_stops_at_once(folder: Path, name: str) -> None:
    with App(f"{name}.py", "--http_port", "0", cwd=folder) as app:
        connection = app.begin(PREDICT, ONE)
        assert app.said() == "started"
        app.signal(signal.SIGTERM)
        refused(app.port)
        app.signal(signal.SIGTERM)
        # The handler waits for a line that never comes: only the process can end it.
        status = app.process.wait(PATIENCE)
        result = app.wait()
        connection.close()
    assert (status, report(result)) == (0, (0, 1))
    assert "1 handlers still run; leaving without them" in result.err


def test_the_grace_period_ends_what_hangs(folder: Path) -> None:
    flags = ("--http_port", "0", "--grace_period", "0.2")
    with App("stdin.py", *flags, cwd=folder) as app:
        connection = app.begin(PREDICT, ONE)
        assert app.said() == "started"
        app.signal(signal.SIGTERM)
        status = app.process.wait(PATIENCE)
        result = app.wait()
        connection.close()
    assert (status, report(result)) == (0, (0, 1))


@pytest.mark.parametrize("name", ["load", "async_load"])
def test_a_signal_ends_a_long_load(folder: Path, name: str) -> None:
    with App(f"{name}.py", "--http_port", "0", cwd=folder, serves=False) as app:
        assert app.said() == "started"
        app.signal(signal.SIGTERM)
        status = app.process.wait(PATIENCE)
        result = app.wait()
    assert (status, result.errors, result.out) == (0, [], "")
    assert report(result) == (0, 0)


def test_unload_runs_at_the_end(folder: Path) -> None:
    with App("unload.py", "--http_port", "0", cwd=folder) as app:
        app.signal(signal.SIGTERM)
        assert app.said() == "unloading the state"
        app.release()
        assert app.wait().status == 0


def test_a_second_signal_gives_up_a_hanging_unload(folder: Path) -> None:
    with App("unload.py", "--http_port", "0", cwd=folder) as app:
        app.signal(signal.SIGTERM)
        assert app.said() == "unloading the state"
        app.signal(signal.SIGTERM)
        assert app.process.wait(PATIENCE) == 0
        assert app.wait().errors == []


# --- it cannot start --------------------------------------------------------------


@pytest.fixture(scope="module")
def taken() -> Iterator[int]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock.getsockname()[1]


def one_line(result: Result) -> str:
    """The one line that says why; nothing else is there, a traceback least of all."""
    assert result.status not in (0, None)
    assert result.out == ""
    (line,) = result.errors
    assert line.startswith("kserve-lite: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("bad_load.py",), ["'m'", "OSError: no such weights", "bad_load.py:"]),
        ((*CLI, "bad_load:model"), ["OSError: no such weights", "bad_load.py:"]),
        (("exit_load.py",), ["'m'", "SystemExit: 3", "exit_load.py:"]),
        (("misspelt.py",), ["'htpp_port'", "did you mean 'http_port'"]),
        (("app.py", "--htp_port", "1"), ["--htp_port", "did you mean 'http_port'"]),
        (("app.py", "--htp-port=1"), ["--htp_port", "did you mean 'http_port'"]),
        (("app.py", "--http_port", "many"), ["--http_port", "'many'"]),
        (("app.py", "--http_port", "70000"), ["--http_port", "'70000'"]),
        (("app.py", "--http_port", "-1"), ["--http_port"]),
        (("app.py", "--http_port"), ["--http_port"]),
        (("app.py", "--grpc_port", "70000"), ["--grpc_port", "'70000'"]),
        (("app.py", "--enable_grpc=perhaps"), ["--enable_grpc", "true or false"]),
        (("app.py", "--ssl_keyfile", "key.pem"), ["--ssl_keyfile", "--ssl_certfile"]),
        (("app.py", "--ssl_certfile", "no.pem"), ["--ssl_certfile", "no.pem"]),
        (("app.py", "--grace_period", "nan"), ["--grace_period"]),
        (("app.py", "--enable_latency_logging=perhaps"), ["true or false"]),
        (("app.py", "--event_loop", "trio"), ["auto, asyncio, uvloop"]),
        (("app.py", "--log_level", "loud"), ["DEBUG, INFO"]),
        (("app.py", "more"), ["'more'"]),
        (("app.py", "-x"), ["'-x'"]),
        (("app.py", "--host", "no such host"), ["'no such host'", "--host"]),
        (("app.py", "--host", "x" * 64), ["x" * 64, "--host"]),
        (("app.py", "--host", "192.0.2.1"), ["192.0.2.1"]),
        ((*CLI,), ["module[:name]"]),
        ((*CLI, "nowhere"), ["no module 'nowhere'"]),
        ((*CLI, "nowhere.deeper:model"), ["no module 'nowhere.deeper'"]),
        ((*CLI, "nowhere.py"), ["no file nowhere.py"]),
        ((*CLI, ":model"), [":model"]),
        ((*CLI, "app:modle"), ["no 'modle'", "did you mean app:model?"]),
        ((*CLI, "app:predict"), ["app:predict is a function"]),
        ((*CLI, "no_model"), ["no_model defines no Model"]),
        ((*CLI, "no_model:x"), ["no_model:x is a int"]),
        ((*CLI, "raises"), ["raises", "ValueError: one two", "raises.py:5"]),
        ((*CLI, "exits"), ["SystemExit: enough", "exits.py:3"]),
        ((*CLI, "imports"), ["there_is_no_such_module", "imports.py:1"]),
        ((*CLI, "syntax"), ["SyntaxError", "syntax.py"]),
        ((*CLI, "bad_model"), ["'a/b'"]),
        ((*CLI, "no_predict"), ["'m'", "@model.predict"]),
        ((*CLI, "same_names"), ["'m'", "same version"]),
        ((*CLI, "at_import"), ["at_import", "__main__"]),
        (("-m", "kserve_lite", "serve"), ["'serve'", "run"]),
        (("-m", "kserve_lite", "--bogus"), ["'--bogus'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_one_line_says_why_it_cannot_start(
    folder: Path, arguments: tuple[str, ...], words: list[str]
) -> None:
    # Port 0 of the environment: what starts although it should not takes no real one.
    result = finish(*arguments, cwd=folder, PORT="0")
    line = one_line(result)
    for word in words:
        assert word in line


@pytest.mark.parametrize("arguments", [("app.py",), (*CLI, "app")])
def test_a_port_in_use(folder: Path, arguments: tuple[str, ...], taken: int) -> None:
    flags = ("--host", "127.0.0.1", "--http_port", str(taken))
    line = one_line(finish(*arguments, *flags, cwd=folder))
    assert f"port {taken} on 127.0.0.1 is in use" in line
    assert "--http_port" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may use every port")
def test_a_privileged_port(folder: Path) -> None:
    line = one_line(finish("app.py", "--http_port", "1", cwd=folder))
    assert "ports below 1024" in line


@pytest.mark.parametrize(
    "variables", [{"PORT": "many"}, {"KSERVE_LOGLEVEL": "loud", "PORT": "0"}]
)
def test_bad_environment(folder: Path, variables: dict[str, str]) -> None:
    line = one_line(finish("app.py", cwd=folder, **variables))
    assert f"${next(iter(variables))}" in line


def test_no_model_at_all(folder: Path) -> None:
    text = "from kserve_lite import run; run(argv=[])"
    assert "no model" in one_line(finish("-c", text, cwd=folder))
