"""Sends a program's code to its replicas, which may be on machines that lack it.

Pickle names what is in a module and has the other side import it. Here it is told to
take along the modules that lie where a model's do; installed packages are taken to be
everywhere.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from types import ModuleType

from kserve_lite.handlers import Stage
from kserve_lite.model import Model


def ship_code_of(model: Model) -> None:
    """Have pickle take a model's modules along, and all that lie beside them."""
    from ray import cloudpickle

    handlers = [model.handler(stage) for stage in Stage]
    names = {handler.function.__module__ for handler in handlers if handler}
    folders = {_folder(sys.modules.get(name)) for name in names} - {None}
    for name, module in list(sys.modules.items()):
        folder = _folder(module)
        if folder in folders and name != "__main__":
            top = sys.modules.get(name.partition(".")[0], module)
            cloudpickle.register_pickle_by_value(top)  # type: ignore[no-untyped-call]


def _folder(module: ModuleType | None) -> Path | None:
    """Where a module's program lies; None: nowhere, or where packages are installed."""
    place = getattr(module, "__file__", None)
    if module is None or not place:
        return None
    path = Path(place).resolve()
    depth = 0 if module.__name__ == "__main__" else module.__name__.count(".")
    folder = path.parents[min(depth + (path.stem == "__init__"), len(path.parents) - 1)]
    ours = Path(__file__).resolve().parents[2]
    libraries = (ours / "kserve_lite", *map(Path, sysconfig.get_paths().values()))
    is_installed = any(path.is_relative_to(library) for library in libraries)
    return None if is_installed else folder
