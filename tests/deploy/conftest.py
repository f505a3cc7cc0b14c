"""A program to write manifests of, in a folder of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

APP = """
from kserve_lite import Model

print("a module that prints while it is imported")
model = Model("doubler")
other = Model("other")
capital = Model("My_Model 2")
front = Model("front")


@model.load
def load():
    return model.path("factor").read_text()


@model.predict
def predict(payload, state):
    return {"predictions": [int(state) * row for row in payload["instances"]]}


@other.predict
@capital.predict
def echo(payload):
    return payload


@front.preprocess
def preprocess(payload):
    return {"instances": [row + 100 for row in payload["instances"]]}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with served_app.py, which is the current one."""
    (tmp_path / "served_app.py").write_text(APP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "served_app", raising=False)
    return tmp_path
