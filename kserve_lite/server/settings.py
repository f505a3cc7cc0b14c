"""Every setting of the server, from one source for all ways in.

Each layer defines its own small frozen dataclass; here they are put together, and the
command line, the environment and keyword arguments are read by walking their fields.
What is not a field is an error that names the nearest one. A flag beats the
environment, which beats an argument of `run()`, which beats the default; storage_uri
and model_dir are one thing in this: where storage_uri is from a stronger place it says
the folder, else model_dir does, and what storage_uri names is fetched into it.
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

from kserve_lite.codecs.cloudevents import EventSettings
from kserve_lite.dispatch.settings import DispatchSettings
from kserve_lite.errors import SettingsError
from kserve_lite.forwarding.settings import ForwardingSettings
from kserve_lite.parallel.settings import ParallelSettings
from kserve_lite.server.storage.uris import folder_for, is_remote, patterns, source_of
from kserve_lite.server.values import SWITCHES, convert
from kserve_lite.transports.timeouts import ConnectionLimits
from kserve_lite.version import __version__
from kserve_lite.wire.limits import WireLimits

# What Knative, KServe and its webhook say. There is no variable for each setting: a
# manifest has `args` for that, and Kubernetes makes KSERVE_LITE_PORT and its like, with
# other meanings, where a service is named kserve-lite.
ENVIRONMENT = {
    "PORT": "http_port",
    "STORAGE_URI": "storage_uri",
    "STORAGE_ALLOW_PATTERNS": "storage_allow_patterns",
    "STORAGE_IGNORE_PATTERNS": "storage_ignore_patterns",
    "CE_TYPE": "ce_type",
    "CE_SOURCE": "ce_source",
    "CE_MERGE": "ce_merge",
    "REQUESTS_CA_BUNDLE": "predictor_ca_certs",
    "KSERVE_LOGLEVEL": "log_level",
    "KSERVE_TLS_CERT_FILE": "ssl_certfile",
    "KSERVE_TLS_KEY_FILE": "ssl_keyfile",
}
# What KServe's server has as flags, and what does their work here.
ELSEWHERE = {
    "max_threads": "max_asyncio_workers bounds the threads of every protocol",
    "enable_docs_url": "/openapi.json is always there",
    "configure_logging": "log_config takes a configuration of your own, and a program "
    "that logs by itself can embed serve()",
    "log_config_file": "log_config takes the file",
    "access_log_format": "log_format chooses text or json, access_log turns it off",
    "grpc_max_receive_message_length": "max_body_size bounds requests of every "
    "protocol",
    "grpc_max_send_message_length": "answers may have any size: leave it out",
    "protocol": "every protocol is served: leave it out",
}
# What other servers call things, where the nearest name would be a wrong one.
ELSEWHERE |= {
    other: f"did you mean {name!r}?"
    for other, name in {
        "bind": "host",
        "graceful_timeout": "grace_period",
        "log_file": "log_config",
        "model_path": "model_dir",
        "threads": "max_asyncio_workers",
        "timeout": "request_timeout",
    }.items()
} | {
    name: f"write it into the program: {where}({name}=...)"
    for name, where in {
        "max_batch_size": "@model.predict",
        "max_concurrency": "Model",
    }.items()
}


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Where and how the server runs.

    http_port: the port for every protocol; 0 takes a free one.
    grpc_port: a second port, which serves the same. Unless it is given, the server does
        without where it is in use, and where http_port is 0.
    enable_grpc: whether to serve gRPC at all.
    ssl_certfile: a PEM file with the server's certificate chain: serve TLS only.
    ssl_keyfile: the PEM file with its private key, if that is another file.
    ssl_ca_certs: a PEM file with the authorities that clients' certificates must come
        from; without it none is asked for.
    host: the address to listen on; the default is every IPv4 address of the machine,
        as a container needs it; 127.0.0.1 keeps the server to this machine.
    model_name: the name to serve the model under, whatever its program calls it; for
        one model only.
    model_dir: the folder with the model's files, what `model.path()` is relative to.
        With a storage_uri, the folder to fetch into; if it is filled it is used as it
        is.
    storage_uri: where the model's files are: a folder, file:///folder, s3://, gs://,
        hf://, https:// (a file or an archive), Azure's blobs; see docs/storage.md. They
        are fetched before models load, into model_dir if that is given, else a folder
        of ~/.cache/kserve-lite; not where /mnt/models is filled, as KServe does it.
    storage_allow_patterns: fetch only files that one of these matches, `*.json,*.bin`
        say, or a JSON list of them; * stands for slashes too.
    storage_ignore_patterns: fetch no files that one of these matches.
    event_loop: auto, asyncio or uvloop; auto takes uvloop where it is installed.
    workers: processes that serve, each with models of its own.
    worker_timeout: seconds that the event loop of a worker may be blocked once its
        models are loaded, by an async handler that computes say; then it is killed and
        another one started. After one second the log tells. 0: never.
    reload: start again when a file of the program changes (development).
    log_level: of the server's log lines: DEBUG, INFO, WARNING, ERROR or CRITICAL.
    log_format: text for people, json for machines: one object a line.
    log_config: a file for logging.config.dictConfig, JSON or YAML, that takes the place
        of what log_level and log_format do.
    access_log: a line for each request.
    enable_tracing: a span of OpenTelemetry for each request, sent where the OTEL_*
        variables say; needs the extra [otel].
    """

    http_port: int = 8080
    grpc_port: int = 8081
    enable_grpc: bool = True
    ssl_certfile: str = ""
    ssl_keyfile: str = ""
    ssl_ca_certs: str = ""
    host: str = "0.0.0.0"  # noqa: S104 - a container is reached from outside
    model_name: str = ""
    model_dir: str = "/mnt/models"
    storage_uri: str = ""
    storage_allow_patterns: str = ""
    storage_ignore_patterns: str = ""
    event_loop: str = "auto"
    workers: int = 1
    worker_timeout: float = 5.0
    reload: bool = False
    log_level: str = "INFO"
    log_format: str = "text"
    log_config: str = ""
    access_log: bool = True
    enable_tracing: bool = False


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings, grouped by the layer that they belong to.

    given: the names of those that are not just defaults.
    """

    server: ServerSettings = field(default_factory=ServerSettings)
    dispatch: DispatchSettings = field(default_factory=DispatchSettings)
    forwarding: ForwardingSettings = field(default_factory=ForwardingSettings)
    events: EventSettings = field(default_factory=EventSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    connection: ConnectionLimits = field(default_factory=ConnectionLimits)
    wire: WireLimits = field(default_factory=WireLimits)
    given: frozenset[str] = frozenset()


_GROUPS: dict[str, Any] = {
    "server": ServerSettings,
    "dispatch": DispatchSettings,
    "forwarding": ForwardingSettings,
    "events": EventSettings,
    "parallel": ParallelSettings,
    "connection": ConnectionLimits,
    "wire": WireLimits,
}


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: where it belongs, its type, default and description.

    variable: the name of the environment variable that sets it, or "".
    """

    name: str
    group: str
    type: type
    default: Any
    text: str
    variable: str

    @property
    def shown(self) -> str:
        """The default, as people write it."""
        if self.type is bool:
            return str(self.default).lower()
        if self.type is float:
            return f"{self.default:g} s"
        if self.text.startswith("bytes") and self.default:
            for unit, size in (("MiB", 2**20), ("KiB", 2**10), ("bytes", 1)):
                if self.default % size == 0:
                    return f"{self.default // size} {unit}"
        return str(self.default) or "none"


def known_settings() -> dict[str, Setting]:
    """Every setting by name; descriptions come from the dataclasses' docstrings."""
    variables = {name: variable for variable, name in ENVIRONMENT.items()}
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
                variables.get(item.name, ""),
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
    environment = environment or {}
    _refuse_misspelt(environment)
    values: dict[str, Any] = {}
    said: dict[str, tuple[int, str]] = {}
    sources = (
        {name: (name, value) for name, value in (arguments or {}).items()},
        {
            name: (f"${variable}", environment[variable])
            for variable, name in ENVIRONMENT.items()
            if environment.get(variable)
        },
        {name: (f"--{name}", text) for name, text in (flags or {}).items()},
    )
    for rank, source in enumerate(sources):
        for name, (origin, value) in source.items():
            if name not in known:
                raise SettingsError(_unknown(f"setting {name!r}", name, known))
            values[name] = convert(known[name].type, value, name=name, origin=origin)
            said[name] = (rank, origin)
    given = frozenset(values)
    if values.get("storage_uri"):
        _place(values, said)
    return Settings(
        given=given,
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


def _place(values: dict[str, Any], said: Mapping[str, tuple[int, str]]) -> None:
    """Have model_dir be the folder that storage_uri leads to."""
    uri = values["storage_uri"]
    rank, origin = said["storage_uri"]
    filters = []
    for name in ("storage_allow_patterns", "storage_ignore_patterns"):
        text = values.get(name, "")
        patterns(text, said.get(name, (0, name))[1])
        filters.append(text)
    if rank > said.get("model_dir", (-1, ""))[0]:
        values["model_dir"] = folder_for(uri, origin, *filters)
    elif is_remote(uri):
        source_of(uri, origin)


def parse_flags(
    argv: Sequence[str], prog: str, description: str, *positionals: str
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Read a command line; return positional arguments and given flags, as text.

    `--http-port` and `--http_port` are the same. A switch may stand alone or have a
    value (`--enable_latency_logging false`); a flag that is given twice counts the last
    time. Raises SettingsError for unknown flags.
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
            help=f"{text} Default: {setting.shown}"
            + (f"; environment: ${setting.variable}" if setting.variable else ""),
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
            if following not in SWITCHES:
                plain.append("true")
    return plain


def _unknown(what: str, name: str, known: Mapping[str, Setting]) -> str:
    if name in ELSEWHERE:
        return f"there is no {what}; {ELSEWHERE[name]}"
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
    return f"there is no {what}; {hint}"


def _refuse_misspelt(environment: Mapping[str, str]) -> None:
    """Refuse what can only be a variable of ours, spelt wrong: others are others'."""
    for variable in environment:
        if variable.startswith("KSERVE_") and variable not in ENVIRONMENT:
            # KSERVE_TLS_CA_FILE would be another one, at 0.89.
            close = difflib.get_close_matches(variable, ENVIRONMENT, n=1, cutoff=0.92)
            if close:
                raise SettingsError(
                    f"there is no environment variable ${variable}; did you mean "
                    f"${close[0]}?"
                )
