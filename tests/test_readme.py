"""Every command and snippet of the README is run; its tables are generated.

`python -m tests.test_readme` writes the tables anew.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml  # type: ignore[import-untyped]

from kserve_lite import Model
from kserve_lite.rest.routes import ROUTES
from kserve_lite.server.settings import known_settings
from tests.support import ServerThread, running

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.M | re.S)


def snippet(part: str) -> str:
    """The one Python snippet with a part."""
    (found,) = [block for block in blocks("python") if part in block]
    return found


def commands() -> list[str]:
    lines = "\n".join(blocks("console")).splitlines()
    return [line[2:].partition(" #")[0].strip() for line in lines if line[:2] == "$ "]


def settings_table() -> str:
    rows = ["| name | default | environment | what it is |", "|---|---|---|---|"]
    for setting in known_settings().values():
        variable = f"`{setting.variable}`" if setting.variable else ""
        rows.append(
            f"| `{setting.name}` | {setting.shown} | {variable} | {setting.text} |"
        )
    return "\n".join(rows)


def routes_table() -> str:
    rows = ["| method | path | what it answers |", "|---|---|---|"]
    rows += [f"| {r.method} | `{r.pattern}` | {r.summary} |" for r in ROUTES]
    return "\n".join(rows)


TABLES = {"settings": settings_table, "routes": routes_table}


def with_tables(text: str) -> str:
    for name, table in TABLES.items():
        pattern = rf"(?<=<!-- {name}: )(.*? -->\n).*?(?=<!-- end of {name} -->)"
        found = re.search(pattern, text, re.DOTALL)
        assert found is not None
        new = f"{found[1]}\n{table()}\n\n"
        text = text[: found.start()] + new + text[found.end() :]
    return text


def test_tables_are_up_to_date() -> None:
    assert README.read_text() == with_tables(README.read_text())


def as_run_here(command: str) -> list[str]:
    words = shlex.split(command)
    if words[0] == "python":
        words[0] = sys.executable
    if words[0] == "kserve-lite":
        words[:1] = [sys.executable, "-m", "kserve_lite"]
    return words


def curl(command: str, url: str, cwd: Path) -> object:
    here = re.sub(r"https?://(127\.0\.0\.1|localhost):8080", url, command)
    shell = here.replace("curl ", "curl -sS --fail ", 1)
    return json.loads(
        subprocess.run(
            shell, shell=True, check=True, capture_output=True, cwd=cwd
        ).stdout
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A fresh folder with the README's app.py in it, and nothing else."""
    (tmp_path / "app.py").write_text(snippet("# app.py"))
    return tmp_path


def test_the_first_program_answers_as_shown(folder: Path) -> None:
    console = blocks("console")[1].splitlines()
    shown = [
        (line[2:], console[index + 1])
        for index, line in enumerate(console)
        if line.startswith("$ curl")
    ]
    assert len(shown) == 2
    with running(*as_run_here("python app.py"), cwd=folder) as url:
        for command, answer in shown:
            got, expected = curl(command, url, folder), json.loads(answer)
            assert isinstance(got, dict)
            if "id" in expected:
                assert got.pop("id")
                assert expected.pop("id") == "..."
            assert got == expected


@pytest.mark.parametrize(
    "command",
    [
        command
        for command in commands()
        if re.match(r"(python|kserve-lite run) .*app", command)
        and "--ssl" not in command
    ],
)
def test_serving_commands(command: str, folder: Path) -> None:
    with running(*as_run_here(command), cwd=folder) as url:
        models = curl("curl http://127.0.0.1:8080/v1/models", url, folder)
        assert models == {"models": ["doubler"]}


def test_a_program_of_kserves_moves_as_shown(tmp_path: Path) -> None:
    program = snippet("# moved.py")
    (tmp_path / "moved.py").write_text(program)
    with running(*as_run_here("python moved.py"), cwd=tmp_path) as url:
        ask = "http://127.0.0.1:8080/v1/models/echo:predict"
        body = """'{"instances": [1]}'"""
        assert curl(f"curl -d {body} {ask}", url, tmp_path) == {"predictions": [1]}
    # Nothing but the import differs from what KServe's own SDK takes.
    before = program.replace("kserve_lite.compat", "kserve")
    assert "from kserve import Model, ModelServer" in before


def test_a_model_with_replicas_is_declared_as_shown() -> None:
    """That it serves is shown in tests/parallel, where Ray is."""
    names: dict[str, Any] = {"Model": Model}
    exec(snippet('Model("big"'), names)
    deployment = names["model"].deployment
    assert (deployment.replicas, deployment.options) == (2, {"num_gpus": 0.5})


def test_grpc_and_http2_on_the_same_port(folder: Path) -> None:
    (http2,) = [c for c in commands() if "--http2" in c]
    assert "python ask.py" in commands()
    with running(*as_run_here("python app.py"), cwd=folder) as url:
        assert curl(http2, url, folder) == {"predictions": [[2, 4]]}
        asked = subprocess.run(
            [
                *(sys.executable, "-c"),
                snippet("# ask.py").replace("127.0.0.1:8080", url.split("//")[1]),
            ],
            check=True,
            capture_output=True,
            text=True,
        )
    assert asked.stdout == "[2. 5.]\n"
    assert asked.stdout in README.read_text()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_tls_as_shown(folder: Path) -> None:
    certify, serve, ask = (
        next(c for c in commands() if re.match(start, c))
        for start in ("openssl", "python .*--ssl", "curl --cacert")
    )
    subprocess.run(shlex.split(certify), cwd=folder, check=True, capture_output=True)
    with running(*as_run_here(serve), cwd=folder) as url:
        answer = curl(ask, url.replace("127.0.0.1", "localhost"), folder)
    assert answer == {"predictions": [[2, 4]]}


def test_make_commands_exist_and_serve_the_digits_example() -> None:
    makes = [command for command in commands() if command.startswith("make ")]
    assert makes == ["make serve", "make test"]
    for command in makes:
        dry = subprocess.run(
            [*command.split(), "--dry-run"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        )
        assert "error" not in dry.stderr.lower()
    (digits,) = [c for c in commands() if "examples/digits/input.json" in c]
    serve = [sys.executable, "examples/digits/app.py"]
    with running(*serve, cwd=ROOT) as url:
        answer = curl(digits, url, ROOT)
        assert isinstance(answer, dict)
        assert answer["predictions"][0]["digit"] == 3


def test_the_manifest_as_shown(folder: Path) -> None:
    (shown,) = [c for c in commands() if c.startswith("kserve-lite manifest")]
    command, _, applied = shown.partition(" | ")
    assert applied == "kubectl apply -f -"
    ran = run_in(folder, *as_run_here(command)[1:])
    service = yaml.safe_load(ran.stdout)
    assert service["kind"] == "InferenceService", ran.stderr
    assert service["metadata"]["name"] == "doubler"


def test_every_command_is_run_by_a_test_here() -> None:
    covered = re.compile(
        r"pip install \.$|make (serve|test)$|curl .*(doubler|digits|story)|"
        r"python (app|ask|story|moved)\.py|kserve-lite (run|manifest) app|openssl|"
        r"uvicorn mounted:app|"
        r"(pack|docker) "  # not here: docs/deploy.md
    )
    assert [c for c in commands() if not covered.match(c)] == []


def test_the_package_installs_from_a_checkout(tmp_path: Path) -> None:
    """`pip install .`, without its dependencies, which the environment has."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "kserve_lite", source / "kserve_lite")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    target = tmp_path / "target"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--target", target, "."], cwd=source, check=True)
    assert (target / "kserve_lite" / "py.typed").exists()
    assert (target / "bin" / "kserve-lite").exists()
    imported = subprocess.run(
        [sys.executable, "-c", "import kserve_lite; print(kserve_lite.__file__)"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert imported.stdout.startswith(str(target))


def test_the_handlers_snippet_serves() -> None:
    names: dict[str, object] = {}
    exec(snippet("scorer ="), names)
    scorer, counter = names["scorer"], names["counter"]
    with ServerThread(scorer, counter) as server:  # type: ignore[arg-type]
        url = "http://127.0.0.1:8080/v1/models"
        body = """'{"instances": [[1, 2]]}'"""
        answer = curl(f"curl -d {body} {url}/scorer:predict", server.url, ROOT)
        assert answer == {"predictions": [[1.0]]}
        streamed = subprocess.run(
            [
                "curl",
                "-sS",
                "-d",
                '{"to": 2}',
                f"{server.url}/v1/models/counter:predict",
            ],
            check=True,
            capture_output=True,
        )
        assert streamed.stdout == b"data: 0\n\ndata: 1\n\n"


def test_the_declared_model_serves_and_refuses() -> None:
    names: dict[str, Any] = {}
    exec(snippet("totals ="), names)
    with ServerThread(names["totals"]) as server:
        ask = f"{server.url}/v1/models/totals:predict"
        rows = [[1, 2, 3, 4]]
        answer = httpx.post(ask, json={"inputs": {"rows": rows}})
        assert answer.json() == {"predictions": [10.0]}
        weighed = {"inputs": {"rows": rows, "weights": [2, 2, 2, 2]}}
        assert httpx.post(ask, json=weighed).json() == {"predictions": [20.0]}
        answer = httpx.post(ask, json={"inputs": {"rows": [[1, 2, 3]]}})
        assert answer.status_code == 400
        for word in ("rows", "FP32[-1,4]", "FP32[1,3]"):
            assert word in answer.json()["error"]


def test_the_batched_model_serves() -> None:
    names: dict[str, Any] = {}
    exec(snippet("classifier ="), names)
    with ServerThread(names["classifier"]) as server:
        ask = f"{server.url}/v1/models/classifier:predict"
        answer = httpx.post(ask, json={"instances": [[1.0, 2, 3, 4]] * 2})
        first, second = answer.json()["predictions"]
        assert len(first) == 3
        assert first == second


def test_generate_as_shown(tmp_path: Path) -> None:
    (tmp_path / "story.py").write_text(snippet("# story.py"))
    (console,) = [block for block in blocks("console") if "story.py" in block]
    serve, *asked = re.findall(r"^\$ (.*)\n((?:[^$].*\n|\n)*)", console, re.M)
    assert len(asked) == 2
    with running(*as_run_here(serve[0]), cwd=tmp_path) as url:
        for command, shown in asked:
            here = command.replace("http://127.0.0.1:8080", url)
            ran = subprocess.run(
                f"{here} -sS --fail", shell=True, check=True, capture_output=True
            )
            assert ran.stdout.decode().rstrip() == shown.rstrip()


def test_a_program_of_its_own(folder: Path) -> None:
    (folder / "beside.py").write_text(snippet("# beside.py"))
    ran = run_in(folder, "beside.py")
    assert re.fullmatch(r"ready on http://127\.0\.0\.1:\d+\n", ran.stdout), ran.stderr


def test_mounted_in_fastapi(folder: Path) -> None:
    (folder / "mounted.py").write_text(snippet("# mounted.py"))
    (shown,) = [c for c in commands() if ":8000/models/" in c]
    assert "uvicorn mounted:app" in commands()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "uvicorn", "mounted:app"),
                *("--fd", str(listening.fileno())),
            ],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            pass_fds=[listening.fileno()],
            stderr=subprocess.DEVNULL,
        )
        try:
            # It listens already, so that curl waits until it answers.
            assert curl(shown.replace(":8000", ":8080"), url, folder) == {
                "predictions": [[2, 4]]
            }
        finally:
            server.terminate()
            assert server.wait(30) in (0, -signal.SIGTERM)


def test_a_test_of_a_model(folder: Path) -> None:
    (folder / "test_app.py").write_text(snippet("# test_app.py"))
    ran = run_in(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_app.py")
    assert "4 passed" in ran.stdout, ran.stdout


def run_in(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
