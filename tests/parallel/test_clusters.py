"""The cluster of a server with replicas: joined, started, not to be had, left."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.processes import PATIENCE, ROOT, Program, alive, below, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

APP = """
import os, time
from pathlib import Path
from kserve_lite import Model, run

model = Model("m", replicas=REPLICAS, resources={RESOURCES})

@model.load
def load():
    LOAD

@model.predict
def predict(payload: dict):
    return {"pid": os.getpid(), "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}

if __name__ == "__main__":
    run(model)
"""


REMOTE = """
import asyncio
from kserve_lite import Model, run

model = Model("m", replicas=1, resources={"num_cpus": 0.1})
stream = Model("s", replicas=1, resources={"num_cpus": 0.1})

@model.predict
async def predict(payload: dict):
    if "hang" in payload:
        await asyncio.sleep(100)
    if "fail" in payload:
        raise ValueError("secret")
    return payload

@stream.predict
async def parts(payload: dict):
    yield "one "
    yield "two"

if __name__ == "__main__":
    run(model, stream)
"""


def app(
    folder: Path,
    *,
    replicas: int = 1,
    resources: str = '{"num_cpus": 0.1}',
    load: str = "return None",
) -> str:
    text = APP.replace("{RESOURCES}", resources).replace("LOAD", load)
    text = text.replace("REPLICAS", str(replicas))
    (folder / "app.py").write_text(text)
    return "app.py"


class TwoNodes:
    """The process of `two_nodes.py`."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.parallel.two_nodes"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        told = self._read()
        self.address, self.node = told["address"], told["node"]
        self.remote = told["remote"]

    def tell(self) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise AssertionError("the cluster ended")


@pytest.fixture(scope="module")
def cluster() -> Iterator[TwoNodes]:
    cluster = TwoNodes()
    children = below(cluster.process.pid)
    yield cluster
    cluster.process.communicate("", PATIENCE)
    wait_for(lambda: not alive(children), "an end of the cluster")


def test_a_server_joins_and_leaves_a_cluster(cluster: TwoNodes, tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "helper.py").write_text("def double(x):\n    return 2 * x\n")
    (package / "app.py").write_text(
        "import sys\n"
        "import ray\n"
        "from kserve_lite import Model\n"
        "from package.helper import double\n"
        "known = {'offset': 1}\n"
        "model = Model('m', replicas=2, resources={'num_cpus': 0.5, "
        "'resources': {'x': 0.25}})\n"
        "@model.predict\n"
        "async def predict(payload: dict):\n"
        "    context = ray.get_runtime_context()\n"
        "    return {'node': context.get_node_id(),\n"
        "            'assigned': context.get_assigned_resources(),\n"
        "            'imported': 'package.helper' in sys.modules,\n"
        "            'path': str(model.path('w')),\n"
        "            'answer': double(payload['x']) + known['offset']}\n"
    )
    command = ("-m", "kserve_lite", "run", "package.app:model")
    flags = ("--ray_address", cluster.address, "--model_dir", str(tmp_path))
    with Program(*command, *flags, folder=tmp_path) as server:
        answer = server.ready().predict("m", {"x": 20}).json()
        assert answer["answer"] == 41
        assert answer["node"] == cluster.node
        assert answer["imported"] is False  # its code came along
        assert answer["path"] == str(tmp_path / "w")
        assert answer["assigned"] == {"CPU": 0.5, "x": 0.25}
        told = cluster.tell()
        assert len(told["apps"]) == 2
        assert told["free"] == 0.5
        assert server.stop() == 0, server.log
    wait_for(lambda: cluster.tell()["free"] == 1)
    told = cluster.tell()
    assert told["apps"] == ["other"]
    assert told["other"] == "still here"
    assert told["alive"] == 2


def test_two_replicas_share_a_gpu(cluster: TwoNodes, tmp_path: Path) -> None:
    """One that the node says it has: what is Ray's part of it, on any machine."""
    program = app(tmp_path, replicas=2, resources='{"num_cpus": 0.1, "num_gpus": 0.5}')
    with Program(program, "--ray_address", cluster.address, folder=tmp_path) as server:
        server.ready()
        seen: dict[int, str] = {}

        def both() -> bool:
            answer = server.predict("m", {}).json()
            seen[answer["pid"]] = answer["gpus"]
            return len(seen) == 2

        wait_for(both)
        assert set(seen.values()) == {"0"}
        wait_for(lambda: cluster.tell()["gpus"] == 0)  # Ray sums up now and then
        assert server.stop() == 0, server.log
    wait_for(lambda: cluster.tell()["gpus"] == 1)


def test_a_cluster_behind_ray_client(cluster: TwoNodes, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(REMOTE)
    flags = ("--ray_address", cluster.remote)

    def begun() -> Program | None:
        server = Program("app.py", *flags, folder=tmp_path)
        try:
            return server.ready()
        except AssertionError:
            # Ray gives its own server 30 s to start, which a busy machine may not.
            if "Starting Ray client server failed" not in server.log:
                raise
            return None

    with wait_for(begun) as server:
        assert server.predict("m", {"x": 1}).json() == {"x": 1}
        assert server.predict("m", {"fail": 1}).status_code == 500
        late = server.predict("m", {"hang": 1}, x_request_timeout_ms="300")
        assert late.status_code == 504
        assert server.predict("s", {}).text == "one two"
        assert server.stop() == 0, server.log
    wait_for(lambda: cluster.tell()["apps"] == ["other"])


def test_a_load_that_fails(cluster: TwoNodes, tmp_path: Path) -> None:
    tried = tmp_path / "tried"
    load = f"open({str(tried)!r}, 'a').write('once'); raise ValueError('no weights')"
    program = app(tmp_path, load=load)
    with Program(program, "--ray_address", cluster.address, folder=tmp_path) as server:
        assert server.wait() == 1
        [line] = [line for line in server.log.splitlines() if "kserve-lite:" in line]
    assert "model 'm' failed to load" in line
    assert "start: its load failed: ValueError: no weights (" in line
    assert tried.read_text() == "once"
    assert wait_for(lambda: cluster.tell()["apps"] == ["other"])


def test_a_replica_that_dies_while_it_starts(cluster: TwoNodes, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    load = (
        f"here = Path({str(begun)!r}); (here / str(os.getpid())).touch(); "
        "len(list(here.iterdir())) > 1 or os._exit(1)"
    )
    program = app(tmp_path, load=load)
    with Program(program, "--ray_address", cluster.address, folder=tmp_path) as server:
        pid = server.ready().predict("m", {}).json()["pid"]
        pids = {int(path.name) for path in begun.iterdir()}
        assert len(pids) == 2
        assert pid in pids
        assert server.stop() == 0, server.log


def test_a_stop_while_replicas_start(cluster: TwoNodes, tmp_path: Path) -> None:
    load = 'Path(os.environ["HERE"]).touch(); time.sleep(100)'
    resources = '{"num_cpus": 0.1, "runtime_env": {"env_vars": {"HERE": "%s"}}}' % (
        tmp_path / "begun"
    )
    program = app(tmp_path, load=load, resources=resources)
    flags = ("--ray_address", cluster.address, "--grace_period", "1")
    with Program(program, *flags, folder=tmp_path) as server:
        wait_for((tmp_path / "begun").exists)
        assert server.stop() == 0, server.log
    assert wait_for(lambda: cluster.tell()["apps"] == ["other"])


def is_agent(pid: int) -> bool:
    """Whether a process is one of Ray's agents, or has ended by now."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True
    return b"agent" in command.lower()


def test_nothing_is_left_of_a_server_that_is_killed(tmp_path: Path) -> None:
    with Program(app(tmp_path), folder=tmp_path) as server:
        assert server.ready().predict("m", {}).status_code == 200
        # Ray's two agents of a node give up a minute later, when nobody answers them.
        children = {p for p in below(server.process.pid) if not is_agent(p)}
        server.process.send_signal(signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL
    assert len(children) >= 4  # Ray's control store and raylet, controller, replica
    wait_for(lambda: not alive(children), "an end of Ray's processes")


def test_replicas_that_can_never_fit(tmp_path: Path) -> None:
    program = app(tmp_path, resources='{"num_cpus": 1000}')
    with Program(program, folder=tmp_path) as server:
        assert server.wait() == 1
        [line] = [line for line in server.log.splitlines() if "kserve-lite:" in line]
    assert "the replicas of model 'm' need 1000 CPU, and the Ray cluster has" in line


def test_a_cluster_that_is_not_there(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for given in (address, f"ray://{address}"):
            with Program(
                app(tmp_path), "--ray_address", given, folder=tmp_path
            ) as server:
                assert server.wait() == 1
                line = server.log.splitlines()[-1]
            assert f"the Ray cluster {given} cannot be joined" in line
            assert "--ray_address" in line


def test_without_ray(tmp_path: Path) -> None:
    text = (tmp_path / app(tmp_path)).read_text()
    (tmp_path / "app.py").write_text("import sys\nsys.modules['ray'] = None\n" + text)
    with Program("app.py", folder=tmp_path) as server:
        assert server.wait() == 1
        line = server.log.splitlines()[-1]
    assert "pip install 'kserve-lite[ray]'" in line


def test_several_workers(tmp_path: Path) -> None:
    with Program(app(tmp_path), "--workers", "2", folder=tmp_path) as server:
        assert server.wait() == 1
    assert "leave --workers out" in server.log
