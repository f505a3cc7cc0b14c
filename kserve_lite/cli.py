"""The commands `kserve-lite run` and `kserve-lite manifest module:name [...]`.

Here the user's modules are imported, and what keeps that from working is one line.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from kserve_lite.deployment import parse, usage
from kserve_lite.errors import KServeLiteError, SettingsError, StartupError
from kserve_lite.manifest import manifests, to_yaml
from kserve_lite.model import Model
from kserve_lite.server import run as running
from kserve_lite.server.settings import make_settings, parse_flags
from kserve_lite.version import __version__

USAGE = """\
usage: kserve-lite run module[:name] [...] [--http_port 8080] [...]
       kserve-lite manifest module[:name] [...] --image IMAGE [...]

run serves the model `name` of a module, or every Model in it. The module is imported
from the current folder; a path to a .py file will do too. manifest prints what KServe
wants to serve the same: an InferenceService, for kubectl.

  kserve-lite run app:model
  kserve-lite run app:a app:b --http_port 9000
  kserve-lite run --help      every flag
  kserve-lite manifest app:model --image registry/app:1 | kubectl apply -f -
  kserve-lite manifest --help
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; what keeps it from starting ends it with one line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(USAGE, end="")
        elif arguments[0] == "--version":
            print(__version__)
        elif arguments[0] in COMMANDS:
            COMMANDS[arguments[0]](arguments[1:])
        else:
            raise _unknown_command(arguments)
    except KServeLiteError as error:
        running.fail(error)


def _unknown_command(arguments: Sequence[str]) -> SettingsError:
    given = arguments[0]
    close = difflib.get_close_matches(given, COMMANDS, n=1)
    if close:
        hint = f"did you mean {close[0]}?"
    elif not given.startswith("-") and (":" in given or given.endswith(".py")):
        hint = f"did you mean kserve-lite run {given}?"
    else:
        hint = "they are run and manifest: kserve-lite run module:name"
    return SettingsError(f"there is no command {given!r}; {hint}")


def _run(arguments: Sequence[str]) -> None:
    positionals, flags = parse_flags(
        arguments,
        "kserve-lite run",
        "Serve models that a module defines.",
        "name",
    )
    settings = make_settings(environment=os.environ, flags=flags)
    targets = positionals["name"]
    files = [Path(target.partition(":")[0]) for target in targets]
    folders = {file.parent if file.suffix == ".py" else Path() for file in files}
    running.serve_process(
        lambda: _find_all(targets), settings, *(folder.resolve() for folder in folders)
    )


def _manifest(arguments: Sequence[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        print(usage(), end="")
        return
    targets, deployment, flags = parse(arguments)
    front = [deployment.transformer] if deployment.transformer else []
    # What a module prints while it is imported would be in the midst of the YAML.
    with contextlib.redirect_stdout(sys.stderr):
        models, transformers = _find_all(targets), _find_all(front)
    objects = manifests(targets, models, transformers, deployment, flags=flags)
    print(to_yaml(objects), end="")


COMMANDS = {"run": _run, "manifest": _manifest}


def _find_all(targets: Sequence[str]) -> tuple[Model, ...]:
    models = {id(model): model for name in targets for model in find_models(name)}
    return tuple(models.values())


def find_models(target: str) -> list[Model]:
    """Import `module:name` or `module`; return the model, or all that it has.

    Raises StartupError, in one line, for a module that is missing or fails and for a
    name that is no Model.
    """
    module_name, _, name = target.partition(":")
    if not module_name:
        raise StartupError(f"{target!r} names no module; give module:name")
    module = _import(module_name)
    there = {key: value for key, value in vars(module).items() if _is_model(value)}
    if not name:
        if not there:
            raise StartupError(
                f"{module_name} defines no Model; write model = Model(...) at the top "
                "level of it, or name another module"
            )
        return list(there.values())
    if name in there:
        return [there[name]]
    if hasattr(module, name):
        kind = type(getattr(module, name)).__name__
        raise StartupError(f"{target} is a {kind}, not a kserve_lite Model")
    close = difflib.get_close_matches(name, there, n=1) or list(there)[:1]
    hint = f"; did you mean {module_name}:{close[0]}?" if close else ""
    raise StartupError(f"{module_name} has no {name!r}{hint}")


def _is_model(value: object) -> bool:
    return isinstance(value, Model)


def _import(name: str) -> ModuleType:
    folder = Path.cwd()
    module_name = name
    if name.endswith(".py"):
        path = Path(name).resolve()
        if not path.is_file():
            raise StartupError(f"there is no file {name}")
        folder, module_name = path.parent, path.stem
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    running.importing = name
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and module_name.split(".")[0] == error.name:
            raise StartupError(
                f"there is no module {module_name!r} in {folder}; give the name of a "
                "module in this folder, or the path of a .py file"
            ) from error
        raise _import_failed(name, error) from error
    except KServeLiteError:
        raise
    except (Exception, SystemExit) as error:  # user code may raise anything
        raise _import_failed(name, error) from error
    finally:
        running.importing = None


def _import_failed(name: str, error: BaseException) -> StartupError:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "importlib" not in frame.filename]
    place = ""
    if own and own[-1].filename != __file__:
        place = f" ({Path(own[-1].filename).name}:{own[-1].lineno})"
    return StartupError(
        f"{name} cannot be imported: {type(error).__name__}: {error}{place}"
    )
