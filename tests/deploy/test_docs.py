"""docs/deploy.md: every command is run here, or is of a tool that tests do not have."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from kserve_lite.cli import main
from kserve_lite.deployment import FLAGS
from kserve_lite.server.settings import known_settings
from tests.deploy.schema import build
from tests.support import running

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "deploy.md"
# What needs a builder, a container engine or a cluster. All else is run.
ELSEWHERE = re.compile(r"((SERVICE|INGRESS)=\$\(kubectl|pack|docker|kubectl|grpcurl) ")


def commands() -> list[str]:
    blocks = re.findall(r"^```console\n(.*?)^```", GUIDE.read_text(), re.M | re.S)
    lines = "".join(blocks).splitlines()
    assert all(line.startswith("$ ") for line in lines)
    return [line[2:] for line in lines]


def of(program: str) -> list[str]:
    return [command for command in commands() if command.startswith(f"{program} ")]


MANIFESTS = of("kserve-lite manifest")
REQUESTS = of("curl")
SERVED = of("kserve-lite run")


def test_every_command_is_run_or_cannot_be() -> None:
    run = {*MANIFESTS, *REQUESTS, *SERVED}
    assert [c for c in commands() if c not in run and not ELSEWHERE.match(c)] == []
    assert len(MANIFESTS) > 4
    assert len(REQUESTS) > 4


@pytest.mark.parametrize("command", MANIFESTS)
def test_manifests(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "app", raising=False)
    shown, _, applied = command.partition(" | ")
    assert applied in ("", "kubectl apply -f -")
    main(shlex.split(shown)[1:])
    documents = list(yaml.safe_load_all(capsys.readouterr().out))
    assert documents[-1]["kind"] == "InferenceService"
    for document in documents:
        version = document["apiVersion"].removeprefix("serving.kserve.io/v")
        build(f"V{version}{document['kind']}", document, document["kind"])
    monkeypatch.delitem(sys.modules, "app")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where the guide's own server listens."""
    (command,) = SERVED
    program = [sys.executable, "-m", "kserve_lite", *shlex.split(command)[1:]]
    with running(*program, cwd=ROOT) as url:  # which takes another port
        yield url.removeprefix("http://")


@pytest.mark.parametrize("command", REQUESTS)
def test_requests(command: str, address: str) -> None:
    """The server is in the ingress's place, and gets the Host that it passes on."""
    here = command.replace("127.0.0.1:8080", address)
    ran = subprocess.run(
        here.replace("curl ", "curl -sS --fail ", 1),
        shell=True,
        check=True,
        capture_output=True,
        cwd=ROOT,
        env={
            **os.environ,
            "INGRESS": address,
            "SERVICE": "digits.default.example.com",
        },
    )
    answer = json.loads(ran.stdout)
    if ":predict" in command:
        assert answer["predictions"][0]["digit"] == 3
    elif "/infer" in command:
        assert answer["outputs"][0]["data"] == [3]
    else:
        assert answer["ready"] is True


def test_what_it_names_is_there() -> None:
    text = GUIDE.read_text()
    known = FLAGS.keys() | known_settings().keys()
    named = set(re.findall(r"`--([a-z_]+)", text))
    assert named - known == set()
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (GUIDE.parent / link).exists(), link
    # The table of files says what is in them.
    for name in re.findall(r"^\| `([\w.-]+)` \|", text, re.M):
        assert (ROOT / name).exists(), name
    for name in ("runtime.txt", ".python-version"):
        assert f"`{(ROOT / name).read_text().strip()}`" in text
