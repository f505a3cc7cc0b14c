"""The house rule: a module imports only from lower layers or its own folder.

Imports under `TYPE_CHECKING` count. Third-party packages may appear only where the
table says, and heavy ones only inside functions.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "kserve_lite"

# The longest prefix of a module's name counts.
LAYERS = {
    "kserve_lite": 9,
    "kserve_lite.version": 0,
    "kserve_lite.errors": 0,
    "kserve_lite.wire": 1,
    "kserve_lite.counters": 1,
    "kserve_lite.records": 1,
    "kserve_lite.telling": 1,
    "kserve_lite.metrics": 1,
    "kserve_lite.tensors": 1,
    "kserve_lite.messages": 1,
    "kserve_lite.codecs": 2,
    "kserve_lite.handlers": 3,
    "kserve_lite.model": 3,
    "kserve_lite.registry": 3,
    "kserve_lite.dispatch": 4,
    "kserve_lite.forwarding": 5,
    "kserve_lite.rest": 5,
    "kserve_lite.rpc": 5,
    "kserve_lite.transports": 6,
    "kserve_lite.parallel": 6,
    "kserve_lite.server": 7,
    "kserve_lite.deployment": 8,
    "kserve_lite.manifest": 8,
    "kserve_lite.cli": 8,
    "kserve_lite.compat": 8,
    "kserve_lite.testing": 8,
    "kserve_lite.__main__": 9,
}
# Modules of one layer that stand side by side import in this order only.
ORDER = [
    "kserve_lite.counters",
    "kserve_lite.records",
    "kserve_lite.metrics",
    "kserve_lite.tensors",
    "kserve_lite.messages",
    "kserve_lite.handlers",
    "kserve_lite.model",
    "kserve_lite.registry",
    "kserve_lite.deployment",
    "kserve_lite.manifest",
    "kserve_lite.cli",
]

THIRD_PARTY = {
    "cloudevents": {
        "kserve_lite.codecs.cloudevents",
        "kserve_lite.compat.utils.utils",
    },
    "ray": {"kserve_lite.parallel", "kserve_lite.compat.ray"},
    "anyio": {
        "kserve_lite.dispatch",
        "kserve_lite.forwarding",
        "kserve_lite.parallel",
        "kserve_lite.rpc",
        "kserve_lite.transports",
        "kserve_lite.server",
        "kserve_lite.testing",
    },
    "h11": {"kserve_lite.wire", "kserve_lite.testing"},
    "h2": {"kserve_lite.forwarding.channel"},  # of grpclib
    "hpack": {"kserve_lite.wire"},
    "grpclib": {
        "kserve_lite.compat.grpc_client",
        "kserve_lite.forwarding.channel",
        "kserve_lite.rpc",
        "kserve_lite.testing",
    },
    "google": {
        "kserve_lite.codecs.proto",
        "kserve_lite.codecs.v2_protobuf",
        "kserve_lite.forwarding.channel",
    },
    "httpx": {"kserve_lite.compat.rest_client", "kserve_lite.forwarding.rest"},
    "multidict": {"kserve_lite.forwarding.channel"},
    "orjson": {"kserve_lite.codecs", "kserve_lite.rest"},
    "simdjson": {"kserve_lite.codecs"},
    "numpy": {
        "kserve_lite.tensors",
        "kserve_lite.messages",
        "kserve_lite.codecs",
        "kserve_lite.compat",
        "kserve_lite.dispatch",
        "kserve_lite.forwarding",
        "kserve_lite.testing",
    },
    "pandas": {"kserve_lite.compat.utils.frames"},
    "ml_dtypes": {"kserve_lite.tensors"},
    "watchfiles": {"kserve_lite.server"},
    "prometheus_client": {"kserve_lite.server"},
    "torch": {"kserve_lite.tensors"},
    "opentelemetry": {"kserve_lite.server.tracing"},
    "fsspec": {"kserve_lite.server.storage"},
    "google_crc32c": {"kserve_lite.server.storage"},
    "yaml": {"kserve_lite.server.logs"},
}
# These cost time and memory: imported where used, or for types only.
LATE = {
    "fsspec",
    "google_crc32c",
    "ray",
    "cloudevents",
    "httpx",
    "ml_dtypes",
    "numpy",
    "opentelemetry",
    "pandas",
    "prometheus_client",
    "simdjson",
    "torch",
    "yaml",
}
# These import grpclib and protobuf, or Ray, and so are themselves imported where used.
LATE_MODULES = (
    "kserve_lite.rpc",
    "kserve_lite.codecs.proto",
    "kserve_lite.codecs.v2_protobuf",
    "kserve_lite.forwarding.channel",
    "kserve_lite.parallel.routing",
)


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = path
    return found


def layer_of(module: str) -> tuple[int, str]:
    """The layer of a module, and the entry of `LAYERS` that says so."""
    prefix = module
    while prefix not in LAYERS:
        prefix = prefix.rpartition(".")[0]
    return LAYERS[prefix], prefix


def imports(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Every imported module, and whether the import runs when the module does."""
    late = {
        id(node)
        for scope in ast.walk(tree)
        if isinstance(scope, (ast.FunctionDef, ast.AsyncFunctionDef))
        or (isinstance(scope, ast.If) and "TYPE_CHECKING" in ast.dump(scope.test))
        for node in ast.walk(scope)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) not in late
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or "", id(node) not in late
            if (node.module or "").startswith("kserve_lite"):
                for alias in node.names:
                    if f"{node.module}.{alias.name}" in modules():
                        yield f"{node.module}.{alias.name}", id(node) not in late


def may_import(importer: str, imported: str) -> bool:
    own_layer, own = layer_of(importer)
    layer, other = layer_of(imported)
    if own == other:
        return True
    if layer == own_layer and own in ORDER and other in ORDER:
        return ORDER.index(other) < ORDER.index(own)
    # A package's own __init__ is what makes its modules importable at all.
    return layer < own_layer or imported == "kserve_lite"


@pytest.mark.parametrize("module", modules())
def test_imports_point_down(module: str) -> None:
    tree = ast.parse(modules()[module].read_text())
    for imported, _ in imports(tree):
        if imported.split(".")[0] == "kserve_lite":
            assert may_import(module, imported), f"{module} imports {imported}"


@pytest.mark.parametrize("module", modules())
def test_third_party_packages_stay_where_they_belong(module: str) -> None:
    tree = ast.parse(modules()[module].read_text())
    for imported, at_once in imports(tree):
        package = imported.split(".")[0]
        if package == "kserve_lite" or package in sys.stdlib_module_names:
            continue
        assert package in THIRD_PARTY, f"{module} imports {package}"
        places = THIRD_PARTY[package]
        assert any(f"{module}.".startswith(f"{place}.") for place in places), (
            f"{module} imports {package}, which belongs to {places}"
        )
        if not module.startswith(LATE_MODULES):
            early = package in LATE and at_once
            assert not early, f"{module} imports {package} early"


@pytest.mark.parametrize("module", modules())
def test_grpc_is_imported_where_it_is_used(module: str) -> None:
    if module.startswith(LATE_MODULES):
        return
    for imported, at_once in imports(ast.parse(modules()[module].read_text())):
        assert not (at_once and imported.startswith(LATE_MODULES)), (
            f"{module} imports {imported} early"
        )


def test_the_rule_bites() -> None:
    assert not may_import("kserve_lite.wire.http1", "kserve_lite.rest.routes")
    assert not may_import("kserve_lite.tensors", "kserve_lite.messages")
    assert not may_import("kserve_lite.wire.http1", "kserve_lite.tensors")
    assert may_import("kserve_lite.rest.routes", "kserve_lite.wire.events")


def test_every_layer_is_real() -> None:
    for prefix in LAYERS:
        assert prefix in modules(), f"{prefix} is in the table and not in the package"
