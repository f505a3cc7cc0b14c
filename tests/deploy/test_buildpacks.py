"""The files that buildpacks read: each builder's rules, and the web process itself.

The rules are those of Heroku's Python buildpacks (heroku/buildpacks-python 1.0 and
later, in heroku/builder:24; heroku/heroku-buildpack-python of early 2024, in
heroku/buildpacks:20), of its Procfile buildpack and of the project descriptor 0.2.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from kserve_lite.cli import main
from tests.deploy.web import ROOT, started, web

ALEXNET = ROOT / "examples" / "alexnet"
SETS = pytest.mark.parametrize("tree", [ROOT, ALEXNET], ids=["digits", "alexnet"])

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# More than one of these is an error for both builders of today.
PACKAGE_MANAGERS = ("requirements.txt", "poetry.lock", "uv.lock", "Pipfile", "pdm.lock")
# heroku/buildpacks:20 is of May 2024; that is what Python 3.11 was.
NEWEST_IN_20 = (3, 11, 9)


def excluded(tree: Path) -> list[str]:
    """The patterns that `pack` leaves out; only the plain ones, which are enough."""
    project = tomllib.loads((tree / "project.toml").read_text())
    patterns: list[str] = project["io"]["buildpacks"]["exclude"]
    for pattern in patterns:
        assert re.fullmatch(r"/[\w./-]+|\w+", pattern), pattern
    return patterns


def is_built(tree: Path, path: str) -> bool:
    """Whether a file of the tree is in the image that a new builder makes."""
    assert (tree / path).exists(), path
    parts = path.split("/")
    above = {"/" + "/".join(parts[:n]) for n in range(1, len(parts) + 1)}
    return not any(pattern in above | set(parts) for pattern in excluded(tree))


@SETS
def test_new_builders_find_one_package_manager_and_no_runtime_txt(tree: Path) -> None:
    there = [name for name in PACKAGE_MANAGERS if (tree / name).exists()]
    assert there == ["requirements.txt"]
    assert is_built(tree, "requirements.txt")
    assert is_built(tree, ".python-version")
    assert not is_built(tree, "runtime.txt")


@SETS
def test_both_python_versions_are_one(tree: Path) -> None:
    # X.Y there has the newest X.Y.Z; nothing beside it but comments.
    version = re.fullmatch(
        r"(\d+\.\d+)(\.\d+)?\n", (tree / ".python-version").read_text()
    )
    # X.Y.Z here, of a release that the old builder has.
    exact = re.fullmatch(
        r"python-(\d+\.\d+\.\d+)\n", (tree / "runtime.txt").read_text()
    )
    assert version is not None
    assert exact is not None
    assert exact[1].startswith(f"{version[1]}.")
    assert tuple(map(int, exact[1].split("."))) <= NEWEST_IN_20
    needed = SpecifierSet(PYPROJECT["project"]["requires-python"])
    assert exact[1] in needed
    classifier = f"Programming Language :: Python :: {version[1]}"
    assert classifier in PYPROJECT["project"]["classifiers"]


@SETS
def test_the_descriptor_is_one(tree: Path) -> None:
    project = tomllib.loads((tree / "project.toml").read_text())
    assert project["_"]["schema-version"] == "0.2"
    buildpacks = project["io"]["buildpacks"]
    # Beside exclude, include is an error.
    assert buildpacks.keys() == {"builder", "exclude"}
    assert buildpacks["builder"] == "heroku/builder:24"


@SETS
def test_the_image_has_what_the_program_needs(tree: Path) -> None:
    for path in ("Procfile", str(web(tree)[1].relative_to(tree))):
        assert is_built(tree, path)
    if tree == ROOT:
        # requirements.txt says ".", so pip builds the package there.
        described = PYPROJECT["project"]
        for path in (
            *(
                "pyproject.toml",
                "kserve_lite/__init__.py",
                "examples/digits/weights.npz",
            ),
            *(described["readme"], *described["license-files"]),
        ):
            assert is_built(tree, path)
        assert not is_built(tree, "tests")


def requirements(tree: Path) -> tuple[list[str], list[str]]:
    """The options and the requirements, as pip reads them."""
    lines = (tree / "requirements.txt").read_text().splitlines()
    meant = [line for line in lines if line and not line.startswith("#")]
    options = [line for line in meant if line.startswith("-")]
    return options, [line for line in meant if line not in options]


def test_the_top_folder_installs_this_checkout() -> None:
    assert requirements(ROOT) == ([], ["."])


def test_alexnet_installs_torch_for_the_cpu_as_the_extra_says() -> None:
    options, lines = requirements(ALEXNET)
    assert options == ["--extra-index-url https://download.pytorch.org/whl/cpu"]
    wanted = {parsed.name: parsed for parsed in map(Requirement, lines)}
    extra = PYPROJECT["project"]["optional-dependencies"]["torch"]
    for need in map(Requirement, extra):
        # No version: of two builds of the newest one pip takes the local one, +cpu.
        assert not wanted.pop(need.name).specifier
    (package,) = wanted.values()
    assert package.name == PYPROJECT["project"]["name"]
    assert package.extras == {"torch"}


def asked(readme: Path, url: str) -> Any:
    """Run the first V1 request that a README shows, where the README says."""
    text = re.sub(r"\\\n *", "", readme.read_text())
    (command, *_) = re.findall(
        r"^ *(curl .*:predict.*-d @.*|curl -d @.*:predict)$", text, re.M
    )
    here = re.sub(r"(http://)?(localhost|127\.0\.0\.1):8080", url, command)
    words = shlex.split(here)
    answer = subprocess.run(
        [words[0], "-sS", "--fail", *words[1:]],
        cwd=ROOT if "examples/" in command else readme.parent,
        check=True,
        capture_output=True,
    )
    return json.loads(answer.stdout)


def test_the_web_process_of_digits_answers() -> None:
    with started(ROOT) as url:
        answer = asked(ROOT / "examples" / "digits" / "README.md", url)
    assert answer["predictions"][0]["digit"] == 3


@SETS
def test_the_manifest_of_the_same_program(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the Procfile runs is what `kserve-lite manifest` takes, as it is."""
    monkeypatch.chdir(tree)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "app", raising=False)
    command, _ = web(tree)
    main(["manifest", command.split()[2], "--image", "a/b:1", "--buildpack"])
    assert f"name: {tree.name if tree == ALEXNET else 'digits'}\n" in (
        capsys.readouterr().out
    )
    monkeypatch.delitem(sys.modules, "app")
