"""Every setting of the server, from one source for all ways in.

Each layer defines its own small frozen dataclass; here they are put together, and the
command line, the environment and keyword arguments are read by walking their fields.
What is not a field is an error that names the nearest one. A flag beats the
environment, which beats an argument of `run()`, which beats the default.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from kserve_lite.dispatch.settings import DispatchSettings
from kserve_lite.errors import SettingsError
from kserve_lite.transports.timeouts import ConnectionLimits
from kserve_lite.version import __version__
from kserve_lite.wire.limits import WireLimits

# KServe and Knative say these in the environment.
ENVIRONMENT = {"PORT": "http_port", "KSERVE_LOGLEVEL": "log_level"}
CHOICES = {
    "event_loop": ("auto", "asyncio", "uvloop"),
    "log_format": ("text", "json"),
    "log_level": ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
}
_TRUE = frozenset(("y", "yes", "t", "true", "on", "1"))
_FALSE = frozenset(("n", "no", "f", "false", "off", "0"))


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Where and how the server runs.

    http_port: the port for every protocol; 0 takes a free one. $PORT sets it too.
    grpc_port: a second port, which serves the same. Unless it is given, the server does
        without where it is in use, and where http_port is 0.
    enable_grpc: whether to serve gRPC at all.
    ssl_certfile: a PEM file with the server's certificate chain: serve TLS only.
    ssl_keyfile: the PEM file with its private key, if that is another file.
    ssl_ca_certs: a PEM file with the authorities that clients' certificates must come
        from; without it none is asked for.
    host: the address to listen on; the default is every IPv4 address of the machine,
        as a container needs it; 127.0.0.1 keeps the server to this machine.
    model_dir: the folder with the model's files, what `model.path()` is relative to.
    event_loop: auto takes uvloop where it is installed.
    workers: processes that serve, each with models of its own.
    reload: start again when a file of the program changes (development).
    log_level: of the server's log lines. $KSERVE_LOGLEVEL sets it too.
    log_format: text for people, json for machines: one object a line.
    log_config: a file for logging.config.dictConfig, JSON or YAML, that takes the place
        of what log_level and log_format do.
    access_log: a line for each request.
    """

    http_port: int = 8080
    grpc_port: int = 8081
    enable_grpc: bool = True
    ssl_certfile: str = ""
    ssl_keyfile: str = ""
    ssl_ca_certs: str = ""
    host: str = "0.0.0.0"  # noqa: S104 - a container is reached from outside
    model_dir: str = "/mnt/models"
    event_loop: str = "auto"
    workers: int = 1
    reload: bool = False
    log_level: str = "INFO"
    log_format: str = "text"
    log_config: str = ""
    access_log: bool = True


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings, grouped by the layer that they belong to.

    given: the names of those that are not just defaults.
    """

    server: ServerSettings = field(default_factory=ServerSettings)
    dispatch: DispatchSettings = field(default_factory=DispatchSettings)
    connection: ConnectionLimits = field(default_factory=ConnectionLimits)
    wire: WireLimits = field(default_factory=WireLimits)
    given: frozenset[str] = frozenset()


_GROUPS: dict[str, Any] = {
    "server": ServerSettings,
    "dispatch": DispatchSettings,
    "connection": ConnectionLimits,
    "wire": WireLimits,
}


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: where it belongs, its type, default and description."""

    name: str
    group: str
    type: type
    default: Any
    text: str


def known_settings() -> dict[str, Setting]:
    """Every setting by name; descriptions come from the dataclasses' docstrings."""
    known = {}
    for group, layer in _GROUPS.items():
        texts = _descriptions(layer)
        for item in dataclasses.fields(layer):
            known[item.name] = Setting(
                item.name,
                group,
                type(item.default),
                item.default,
                texts.get(item.name, ""),
            )
    return known


def _descriptions(layer: type) -> dict[str, str]:
    text = inspect.getdoc(layer) or ""
    found = re.findall(r"^(\w+): (.*(?:\n {4}.*)*)", text, re.MULTILINE)
    return {name: re.sub(r"\s+", " ", words) for name, words in found}


def make_settings(
    arguments: Mapping[str, Any] | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, str] | None = None,
) -> Settings:
    """Put settings together; raise SettingsError for unknown or unusable ones."""
    known = known_settings()
    values: dict[str, Any] = {}
    for name, value in (arguments or {}).items():
        if name not in known:
            raise SettingsError(_unknown(f"setting {name!r}", name, known))
        values[name] = _convert(known[name], value, name)
    for variable, name in ENVIRONMENT.items():
        if environment and environment.get(variable):
            values[name] = _convert(known[name], environment[variable], f"${variable}")
    for name, text in (flags or {}).items():
        values[name] = _convert(known[name], text, f"--{name}")
    return Settings(
        given=frozenset(values),
        **{
            group: layer(
                **{
                    name: value
                    for name, value in values.items()
                    if known[name].group == group
                }
            )
            for group, layer in _GROUPS.items()
        },
    )


def parse_flags(
    argv: Sequence[str], prog: str, description: str, *positionals: str
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Read a command line; return positional arguments and given flags, as text.

    `--http-port` and `--http_port` are the same. A switch may stand alone or have a
    value (`--enable_latency_logging false`). Raises SettingsError for unknown flags.
    """
    known = known_settings()
    parser = _Parser(
        prog=prog, description=description, allow_abbrev=False, add_help=True
    )
    parser.add_argument("--version", action="version", version=__version__)
    for name in positionals:
        parser.add_argument(name, nargs="+", metavar=f"module[:{name}]")
    for setting in known.values():
        text = setting.text.replace("%", "%%")
        parser.add_argument(
            f"--{setting.name}",
            metavar=setting.type.__name__,
            default=argparse.SUPPRESS,
            help=f"{text} Default: {setting.default}",
        )
    given = vars(parser.parse_args(_plain_flags(argv, known)))
    return (
        {name: given.pop(name) for name in positionals},
        {name: str(text) for name, text in given.items()},
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message}; see {self.prog} --help")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        # Intermixed: `run app:a --http_port 9000 app:b` is two models.
        parsed, unknown = self.parse_known_intermixed_args(args, namespace)
        for flag in unknown:
            if flag.startswith("--"):
                name = flag[2:].partition("=")[0]
                raise SettingsError(_unknown(f"flag --{name}", name, known_settings()))
        if unknown:
            self.error(f"unexpected argument {unknown[0]!r}")
        return parsed


def _plain_flags(argv: Sequence[str], known: Mapping[str, Setting]) -> list[str]:
    """Spell flags with underscores, and give a switch that stands alone its value."""
    plain = []
    for index, argument in enumerate(argv):
        if not argument.startswith("--"):
            plain.append(argument)
            continue
        flag, equals, value = argument.partition("=")
        flag = "--" + flag[2:].replace("-", "_")
        plain.append(flag + equals + value)
        setting = known.get(flag[2:])
        if setting is not None and setting.type is bool and not equals:
            following = argv[index + 1].lower() if index + 1 < len(argv) else ""
            if following not in _TRUE | _FALSE:
                plain.append("true")
    return plain


def _unknown(what: str, name: str, known: Mapping[str, Setting]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
    return f"there is no {what}; {hint}"


def _convert(setting: Setting, value: Any, source: str) -> Any:
    """Turn a value, text from outside or an argument, into the setting's type."""
    try:
        converted = _as_type(setting.type, value)
    except (TypeError, ValueError):
        raise SettingsError(
            f"{source} must be {_EXPECTED[setting.type]}, got {value!r}"
        ) from None
    if setting.name == "log_level":
        converted = converted.upper()
    choices = CHOICES.get(setting.name)
    if choices and converted not in choices:
        raise SettingsError(
            f"{source} must be one of {', '.join(choices)}, got {value!r}"
        )
    if isinstance(converted, (int, float)) and not 0 <= converted < 2**63:
        raise SettingsError(f"{source} must not be negative or huge, got {value!r}")
    if setting.name in ("http_port", "grpc_port") and converted > 65535:
        raise SettingsError(f"{source} must be a port, 0 to 65535, got {value!r}")
    return converted


_EXPECTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number of seconds",
    str: "text",
}


def _as_type(wanted: type, value: Any) -> Any:
    if wanted is bool:
        text = str(value).lower()
        if text in _TRUE | _FALSE:
            return text in _TRUE
        raise ValueError
    if wanted is str:
        return str(value)
    if isinstance(value, bool) or (wanted is int and isinstance(value, float)):
        raise TypeError
    return wanted(value)
