"""ModelServer: its flags and arguments, what it starts with, and its repository."""

from __future__ import annotations

import argparse
import http.client
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

import kserve_lite.compat as kserve
from kserve_lite.compat import Model, ModelRepository, ModelServer, model_server
from kserve_lite.compat.errors import NoModelReady
from kserve_lite.compat.flags import Chosen
from kserve_lite.compat.predictor_config import get_predictor_config
from tests.compat.support import CompatThread
from tests.server.process import App, finish

HERE = Path(__file__).parent


def chosen(
    *argv: str, environment: dict[str, str] | None = None, **arguments: Any
) -> Chosen:
    return Chosen(arguments, argv, environment or {})


# --- flags and arguments --------------------------------------------------------------


def test_an_argument_beats_a_flag_which_beats_the_environment() -> None:
    environment = {"PORT": "1001"}
    flag = ("--http_port", "1002")
    assert chosen(environment=environment).settings.server.http_port == 1001
    assert chosen(*flag, environment=environment).settings.server.http_port == 1002
    beaten = chosen(*flag, environment=environment, http_port=1003)
    assert beaten.settings.server.http_port == 1003
    assert chosen().settings.server.http_port == 8080


def test_kserves_words_become_settings() -> None:
    settings = chosen(
        *("--event-loop", "asyncio", "--timeout-keep-alive=5", "--workers", "3"),
        *("--enable_grpc", "false", "--max_asyncio_workers", "7"),
        *("--grpc_max_receive_message_length", str(2**28)),
        *("--log_config_file", "log.json", "--enable_latency_logging", "yes"),
        grace_period=9,
    ).settings
    server, dispatch = settings.server, settings.dispatch
    assert (server.event_loop, server.workers) == ("asyncio", 3)
    assert (server.enable_grpc, server.log_config) == (False, "log.json")
    assert dispatch.enable_latency_logging
    assert (dispatch.max_asyncio_workers, dispatch.grace_period) == (7, 9)
    assert settings.connection.timeout_keep_alive == 5
    assert settings.wire.max_body_size == 2**28


def test_latency_logging_is_off_unless_asked_for() -> None:
    assert not chosen().settings.dispatch.enable_latency_logging


def test_kserve_lites_own_flags_and_arguments_work_too() -> None:
    settings = chosen("--host=127.0.0.1", "--log-format", "json", max_in_flight=5)
    assert settings.settings.server.host == "127.0.0.1"
    assert settings.settings.server.log_format == "json"
    assert settings.settings.dispatch.max_in_flight == 5


def test_the_programs_own_flags_are_its_own() -> None:
    own = ("--model_dir", "s3://a/b", "--storage_uri=x://", "--work", "2", "--mine")
    server = chosen(*own, "extra", "--model_name", "m").settings.server
    assert server.model_dir == "/mnt/models"
    assert (server.storage_uri, server.model_name, server.workers) == ("", "", 1)


def test_an_unusable_value_ends_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        chosen("--http_port", "eighty")
    assert "--http_port" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        ModelServer(no_such_setting=1)
    assert "no_such_setting" in capsys.readouterr().err


def test_tls_moves_the_port(tmp_path: Path) -> None:
    files: dict[str, Any] = {"ssl_certfile": "c.pem", "ssl_keyfile": "k.pem"}
    variables = {"KSERVE_TLS_CERT_FILE": "c.pem", "KSERVE_TLS_KEY_FILE": "k.pem"}
    assert chosen(**files).settings.server.http_port == 8443
    assert chosen(environment=variables).settings.server.http_port == 8443
    assert chosen(**files, http_port=9000).settings.server.http_port == 9000
    assert chosen(**files, http_port=0).settings.server.http_port == 0
    assert chosen(ssl_certfile="c.pem").settings.server.http_port == 8080


def test_what_does_nothing_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "kserve_lite"):
        chosen("--max_threads", "2", "--http_port", "1", enable_docs_url=True).tell()
    assert len(caplog.messages) == 2
    assert "max_asyncio_workers" in caplog.text
    assert "/openapi.json" in caplog.text


def test_the_parser_is_for_programs_to_extend() -> None:
    parser = argparse.ArgumentParser(parents=[model_server.parser])
    parser.add_argument("--mine")
    args = parser.parse_args(["--mine", "1", "--model_name", "m", "--workers", "2"])
    assert (args.mine, args.model_name, args.workers) == ("1", "m", 2)
    assert (args.predictor_host, args.max_threads) == (None, 4)
    assert args.enable_latency_logging is False


def test_args_are_those_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--model_name", "named", "--other"])
    model_server._parsed.cache_clear()
    assert model_server.args.model_name == "named"
    model_server._parsed.cache_clear()


def test_what_is_not_offered_is_said() -> None:
    # In the words of an `import` that asks for it, too.
    with pytest.raises(ImportError, match=r"FastAPI.*kserve_lite\.asgi"):
        from kserve_lite.compat.model_server import app  # noqa: F401
    with pytest.raises(ImportError, match="pip install kserve"):
        from kserve_lite.compat import V1beta1InferenceService  # noqa: F401
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = kserve.nothing
    assert kserve.RESTConfig.__name__ == "RESTConfig"


def test_the_predictor_is_what_the_flags_say(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--predictor_host", "p", "--predictor_protocol", "v2")
    more = ("--predictor_use_ssl", "true", "--enable_predictor_health_check")
    monkeypatch.setattr(sys, "argv", ["x", *flags, *more])
    ModelServer()
    config = get_predictor_config()
    assert config is not None
    assert (config.predictor_base_url, config.protocol) == ("https://p", "v2")
    assert config.predictor_health_check
    ModelServer(predictor_config=kserve.PredictorConfig("other"))
    config = get_predictor_config()
    assert config is not None
    assert (config.predictor_base_url, config.use_ssl) == ("http://other", False)


# --- what it starts with --------------------------------------------------------------


class Echo(Model):
    def __init__(self, name: str, ready: bool = True) -> None:
        super().__init__(name)
        self.ready = ready

    async def predict(
        self, payload: Any, headers: Any = None, response_headers: Any = None
    ) -> Any:
        return {"by": self.name, "is": id(self)}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> ModelServer:
    monkeypatch.setattr(sys, "argv", ["x"])
    return ModelServer(http_port=0)


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ({"m": object()}, "'m' is something else"),
        ((Echo("a"),), "Unknown model collection type"),
        ([object()], "BaseKServeModel"),
    ],
)
def test_start_takes_a_list_of_models(
    server: ModelServer, models: Any, words: str
) -> None:
    with pytest.raises(RuntimeError, match=words):
        server.start(models)


def test_start_needs_a_model_that_is_ready(server: ModelServer) -> None:
    with pytest.raises(NoModelReady, match="Models with names a,b are not ready"):
        server.start([Echo("a", ready=False), Echo("b", ready=False)])


def test_a_model_needs_a_name(server: ModelServer) -> None:
    with pytest.raises(ValueError, match="name"):
        server.register_model(Echo(""))


PROGRAM = """
import asyncio, os, sys, threading
from kserve_lite.compat import Model, ModelRepository, ModelServer

class Echo(Model):
    def __init__(self, name):
        super().__init__(name)
        self.load()
    async def predict(self, payload, headers=None, response_headers=None):
        if "lose" in payload:
            asyncio.get_running_loop().call_soon(lambda: 1 / 0)
        if "stop" in payload:
            threading.Thread(target=server.stop, args=(15,)).start()
        return {"by": self.name, "process": os.getpid()}
    def stop(self):
        print("stopped", self.name, flush=True)
        super().stop()

class Engine(Echo):
    def __init__(self, name):
        super().__init__(name)
        self.engine = True
    async def start_engine(self):
        print("engine", self.name, flush=True)
        if "fails" in sys.argv:
            raise OSError("no device")
    def stop_engine(self):
        print("engine stopped", flush=True)

class Late(Echo):
    def __init__(self, name):
        Model.__init__(self, name)

class Repository(ModelRepository):
    async def load(self, name):
        if name == "new":
            self.update(Echo("new"))

def lost(loop, context):
    print("lost", type(context["exception"]).__name__, flush=True)

if __name__ == "__main__":
    server = ModelServer(registered_models=Repository())
    server.register_exception_handler(lost)
    engine = Engine("engine")
    server.register_model(engine, "second")
    server.start([engine, Late("late")] if "none" not in sys.argv else [])
    print("left", flush=True)
"""


FLAGS = ("--http_port", "0", "--grpc_port", "0", "--access_log", "false")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("program")
    (folder / "program.py").write_text(PROGRAM)
    return folder


def test_a_life(folder: Path) -> None:
    """Names, engine, uncaught exceptions, and a stop from within."""
    with App("program.py", *FLAGS, cwd=folder) as app:
        assert app.said() == "engine engine"
        # Not ready when it was given, so it is not served.
        assert app.ask("/v1/models") == (200, {"models": ["second", "engine"]})
        assert app.ask("/v2/health/ready") == (200, {"ready": True})
        for name in ("engine", "second"):
            status, answer = app.ask(f"/v1/models/{name}:predict", {})
            assert (status, answer["by"]) == (200, "engine")
        app.ask("/v1/models/engine:predict", {"lose": 1})
        assert app.said() == "lost ZeroDivisionError"
        app.ask("/v1/models/engine:predict", {"stop": 1})
        result = app.wait()
    assert result.status == 0
    said = result.out.splitlines()
    assert sorted(said[:-1]) == sorted(2 * ["stopped engine", "engine stopped"])
    assert said[-1] == "left"


def test_an_engine_that_fails_ends_the_program(folder: Path) -> None:
    done = finish(
        "program.py", "fails", "--http_port", "0", "--host=127.0.0.1", cwd=folder
    )
    assert done.status == 1
    assert "OSError: no device" in done.err


def test_workers_obey_the_repository_together(folder: Path) -> None:
    with App("program.py", *FLAGS, "--workers", "2", cwd=folder) as app:
        assert app.ask("/v2/repository/models/new/load", {})[0] == 200
        # As with one worker.
        assert app.ask("/v2/repository/models/unknown/load", {})[0] == 503
        processes = set()
        for _ in range(200):
            status, answer = app.ask("/v1/models/new:predict", {})
            assert (status, answer["by"]) == (200, "new")
            processes.add(answer["process"])
            if len(processes) == 2:
                break
        assert len(processes) == 2
        # One that comes later has what was loaded on demand, from its first request on.
        os.kill(processes.pop(), signal.SIGKILL)
        for _ in range(2000):
            with suppress(OSError, http.client.HTTPException):  # that one's connections
                status, answer = app.ask("/v1/models/new:predict", {})
                assert status == 200
                processes.add(answer["process"])
            if len(processes) == 2:
                break
            time.sleep(0.005)
        assert len(processes) == 2
        assert app.ask("/v2/repository/models/new/unload", {})[0] == 200
        for _ in range(4):
            assert app.ask("/v1/models/new:predict", {})[0] == 404
        app.ask("/v1/models/engine:predict", {"stop": 1})
        result = app.wait()
    assert result.status == 0
    assert result.out.count("stopped new") == 2


def test_without_a_model_it_waits_for_some(folder: Path) -> None:
    """KServe's multi-model mode: ready at once, so that models can be brought."""
    with App("program.py", "none", *FLAGS, cwd=folder, serves=False) as app:
        assert app.process.stderr is not None
        line = next(line for line in app.process.stderr if " on http://" in line)
        app.url = line.split()[-1]
        assert app.ask("/v2/health/ready") == (200, {"ready": True})
        assert app.ask("/v2/repository/models/new/load", {})[0] == 200
        assert app.ask("/v1/models/new:predict", {})[1]["by"] == "new"
        assert app.stop().status == 0


# --- the repository -------------------------------------------------------------------


class Repository(ModelRepository):
    def load(self, name: str) -> Any:
        if name == "raises":
            raise OSError("secret path")
        if name in ("new", "again"):
            self.update(Echo(name))
        if name == "sleepy":
            self.update(Echo(name, ready=False))
        return False

    def load_model(self, name: str) -> Any:
        self.update(Echo(name))


def ask(server: CompatThread, path: str, **more: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json={}, timeout=30, verify=False, **more)


def load(server: CompatThread, name: str, verb: str = "load") -> int:
    return ask(server, f"/v2/repository/models/{name}/{verb}").status_code


def predict(server: CompatThread, name: str) -> httpx.Response:
    return ask(server, f"/v1/models/{name}:predict")


def test_a_repository_loads_and_unloads() -> None:
    with CompatThread(Echo("first"), repository=Repository()) as server:
        assert load(server, "new") == 200
        before = predict(server, "new").json()["is"]
        assert load(server, "new") == 200
        assert predict(server, "new").json()["is"] != before  # another one
        assert load(server, "first") == 200  # it is ready, which is what counts
        assert load(server, "zz") == 503
        failed = ask(server, "/v2/repository/models/raises/load")
        assert failed.status_code == 503
        assert "secret" not in failed.text
        assert load(server, "sleepy") == 503
        assert predict(server, "sleepy").status_code == 503
        index = ask(server, "/v2/repository/index").json()
        assert [entry["name"] for entry in index] == ["first", "new", "sleepy"]
        assert load(server, "new", "unload") == 200
        assert load(server, "new", "unload") == 404
        assert load(server, "zz", "unload") == 404
        assert predict(server, "new").status_code == 404
        assert list(server.repository.models) == ["first", "sleepy"]
        assert load(server, "new") == 200
        assert predict(server, "new").status_code == 200


def test_models_may_come_and_go_at_any_time() -> None:
    """A program may keep its repository by itself, from any thread."""
    with CompatThread(Echo("first"), repository=Repository()) as server:
        server.repository.update(Echo("later"))
        assert wait_for(server, ["first", "later"])
        server.repository.unload("first")
        assert wait_for(server, ["later"])


def wait_for(server: CompatThread, names: list[str]) -> bool:
    done = threading.Event()
    for _ in range(500):
        shown = httpx.get(f"{server.url}/v1/models", verify=False).json()
        if shown == {"models": names}:
            return True
        done.wait(0.01)
    return False


def test_a_folder_of_models(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").touch()
    repository = Repository(str(tmp_path))
    repository.load_models()
    assert list(repository.get_models()) == ["one", "two"]
    one = repository.get_model("one")
    assert one is not None
    assert one.name == "one"
    assert repository.get_model("file") is None
    with pytest.raises(KeyError):
        repository.unload("file")
    repository.set_models_dir("/elsewhere")
    assert repository.models_dir == "/elsewhere"


def test_only_this_machine_loads_models() -> None:
    with CompatThread(Echo("first"), repository=Repository()) as server:
        path = "/v2/repository/models/new/load"
        answer = ask(server, path, headers={"x-forwarded-for": "192.0.2.1"})
        assert answer.status_code == 403
