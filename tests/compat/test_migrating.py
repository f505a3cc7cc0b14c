"""docs/migrating-from-kserve.md names all that KServe offers, and says the truth of us.

KServe's names are read from its installed source, see `kserve_names.py`.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import textwrap
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.compat import kserve_names

DOCUMENT = Path(__file__).parents[2] / "docs" / "migrating-from-kserve.md"
VERDICTS = ("same", "better", "not offered")


class Row(NamedTuple):
    section: str
    name: str
    verdict: str
    note: str


def rows() -> list[Row]:
    found = []
    section = ""
    for line in DOCUMENT.read_text().splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ").strip("`")
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("| `"):
            continue
        names, verdict, *note = cells
        words = " ".join(note).strip(" |")
        found += [
            Row(section, name, verdict.strip(" |"), words)
            for name in re.findall(r"`([^`]+)`", names)
        ]
    return found


ROWS = rows()


def said(section: str) -> dict[str, Row]:
    return {row.name: row for row in ROWS if row.section == section}


def row_of(section: str, name: str) -> Row | None:
    """The row that names it: itself, a pattern, or its class, which is not offered."""
    known = said(section)
    for pattern, row in known.items():
        if fnmatchcase(name, pattern):
            return row
    owner = known.get(name.partition(".")[0])
    return owner if owner is not None and owner.verdict == "not offered" else None


def test_the_document_is_read() -> None:
    assert len(ROWS) > 250
    assert {row.verdict for row in ROWS} == set(VERDICTS)
    assert len({(row.section, row.name) for row in ROWS}) == len(ROWS)


def test_what_is_not_offered_or_better_says_why() -> None:
    silent = [row.name for row in ROWS if row.verdict != "same" and not row.note]
    assert silent == []


def test_all_that_kserve_exports_is_named() -> None:
    names = kserve_names.exported()
    assert "KServeClient" in names
    assert [n for n in sorted(names) if row_of("kserve", n) is None] == []


@pytest.mark.parametrize("module", kserve_names.MODULES)
def test_all_names_of_a_module_are_named(module: str) -> None:
    names = kserve_names.defined(module)
    assert names
    assert [n for n in sorted(names) if row_of(f"kserve.{module}", n) is None] == []


def test_all_flags_and_variables_are_named() -> None:
    flags, variables = kserve_names.flags(), kserve_names.variables()
    assert {"--workers", "--event-loop"} <= flags
    assert "CE_MERGE" in variables
    assert flags == set(said("Command line"))
    assert variables <= set(said("Environment"))


def test_the_document_names_nothing_that_kserve_has_not() -> None:
    invented = []
    for section in dict.fromkeys(row.section for row in ROWS):
        if not section.startswith("kserve"):
            continue
        module = section.removeprefix("kserve").removeprefix(".")
        names = kserve_names.defined(module) if module else kserve_names.exported()
        invented += [
            f"{section}.{pattern}"
            for pattern in said(section)
            if not any(fnmatchcase(name, pattern) for name in names)
        ]
    assert invented == []


def has(owner: Any, name: str) -> bool:
    """Whether an object has a name; a class also what its methods set."""
    try:
        if hasattr(owner, name):
            return True
    except ImportError:  # it says what there is instead
        return False
    if not inspect.isclass(owner):
        return False
    for kind in owner.__mro__[:-1]:
        if name in getattr(kind, "__annotations__", {}):
            return True
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
        except (OSError, TypeError):
            continue
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and isinstance(node.value, ast.Name)
                and (node.value.id, node.attr) == ("self", name)
            ):
                return True
    return False


def is_ours(module: str, name: str) -> bool:
    """Whether compat has a name, or a class there a member."""
    path = f"kserve_lite.compat{module}"
    try:
        owner: Any = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name != path:
            raise
        return False
    *outer, last = name.split(".")
    for part in outer:
        owner = getattr(owner, part, None)
    return has(owner, last)


OFFERS = [
    row for row in ROWS if row.section.startswith("kserve") and "*" not in row.name
]


@pytest.mark.parametrize("section", dict.fromkeys(row.section for row in OFFERS))
def test_compat_has_what_the_document_says(
    section: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `model_server.args` reads the command line, which is pytest's.
    monkeypatch.setattr(sys, "argv", ["program"])
    module = section.removeprefix("kserve")
    wrong = [
        f"{row.name}: {row.verdict}"
        for row in OFFERS
        if row.section == section
        if is_ours(module, row.name) != (row.verdict != "not offered")
    ]
    assert wrong == []


def test_the_command_line_has_every_flag() -> None:
    """Those that do nothing, too: a manifest that gives them must still start."""
    from kserve_lite.compat.model_server import parser

    known = set(parser._option_string_actions)
    assert set(said("Command line")) <= known


def test_the_rules_bite() -> None:
    assert not is_ours(".errors", "NoSuchError")
    assert not is_ours(".no_such_module", "x")
    assert is_ours(".errors", "InvalidInput.reason")
    assert not is_ours(".errors", "InvalidInput.nonsense")
    assert row_of("kserve", "V1beta1Anything") is not None
    assert row_of("kserve", "Anything") is None
    assert row_of("kserve.protocol.dataplane", "DataPlane.anything") is not None
    assert row_of("kserve.model", "Model.anything") is None
