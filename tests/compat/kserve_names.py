"""What the installed package `kserve` offers, read from its source.

It is not imported: that would fill the default registries of protobuf and of
prometheus_client.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

# What code for models, servers and their clients imports from.
MODULES = (
    "constants.constants",
    "context",
    "errors",
    "inference_client",
    "logging",
    "metrics",
    "model",
    "model_repository",
    "model_server",
    "predictor_config",
    "protocol.dataplane",
    "protocol.infer_type",
    "protocol.model_repository_extension",
    "ray",
    "utils.inference_client_factory",
    "utils.numpy_codec",
    "utils.utils",
)


def source(module: str) -> str:
    """The source of a module of kserve; "" is the package itself."""
    folder = Path(str(distribution("kserve").locate_file("kserve")))
    path = folder.joinpath(*module.split(".")) if module else folder
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return file.read_text()


def exported() -> set[str]:
    """The names that `kserve/__init__.py` imports."""
    return {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(source("")))
        if isinstance(node, ast.ImportFrom) and node.module != "__future__"
        for alias in node.names
    }


def defined(module: str) -> set[str]:
    """The public names that a module defines, and `Class.member` of its classes."""
    found = set()
    for node in ast.parse(source(module)).body:
        if isinstance(node, ast.ClassDef):
            if not node.name.startswith("_"):
                found.add(node.name)
                found |= {f"{node.name}.{name}" for name in members(node)}
        else:
            found |= set(names_of(node))
    return {name for name in found if not name.startswith("_")}


def members(node: ast.ClassDef) -> set[str]:
    """The public members of a class, and the attributes that its methods set."""
    found = set()
    for part in node.body:
        found |= set(names_of(part))
        if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found |= {
                target.attr
                for target in ast.walk(part)
                if isinstance(target, ast.Attribute)
                and isinstance(target.ctx, ast.Store)
                and isinstance(target.value, ast.Name)
                and target.value.id == "self"
            }
    return {name for name in found if not name.startswith("_")}


def names_of(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        yield node.target.id
    elif isinstance(node, ast.Assign):
        for target in node.targets:
            yield from (n.id for n in ast.walk(target) if isinstance(n, ast.Name))


def flags() -> set[str]:
    """The flags of KServe's server."""
    found = re.findall(r'"(--[a-z_-]+)"', source("model_server"))
    return set(found)


def variables() -> set[str]:
    """The environment variables that these modules read."""
    pattern = r'(?:getenv\(|environ\.get\(|_ENV = )\s*"([A-Z_]+)"'
    return {
        name
        for module in (*MODULES, "protocol.rest.openai.config")
        for name in re.findall(pattern, source(module))
    }
