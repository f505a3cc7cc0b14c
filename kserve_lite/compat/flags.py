"""KServe's command line, and what each of its words is to the native settings.

`FLAGS` is the table; the parser that programs extend, and the reader of what was really
given, walk it. An argument of `ModelServer` beats a flag, a flag the environment. What
neither table knows is the program's own.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kserve_lite.compat.constants.constants import (
    DEFAULT_GRPC_PORT,
    DEFAULT_HTTP_PORT,
    DEFAULT_HTTPS_PORT,
    KSERVE_TLS_CERT_FILE_ENV,
    KSERVE_TLS_KEY_FILE_ENV,
    MAX_GRPC_MESSAGE_LENGTH,
)
from kserve_lite.compat.predictor_config import PredictorConfig
from kserve_lite.server.settings import (
    ELSEWHERE,
    ENVIRONMENT,
    Settings,
    known_settings,
    make_settings,
)
from kserve_lite.server.values import SWITCHES, convert
from kserve_lite.wire.limits import WireLimits

log = logging.getLogger("kserve_lite")


class Flag(NamedTuple):
    """One flag of KServe's server.

    native: the setting that it is here; "": it is none, see `ELSEWHERE`.
    """

    name: str
    kind: type
    default: Any
    text: str
    native: str = ""
    choices: tuple[str, ...] = ()


_PROTOCOLS = ("v1", "v2", "grpc-v2")
_LOOPS = ("auto", "asyncio", "uvloop")
FLAGS = (
    Flag("http_port", int, DEFAULT_HTTP_PORT, "The HTTP port.", "http_port"),
    Flag("grpc_port", int, DEFAULT_GRPC_PORT, "The gRPC port.", "grpc_port"),
    Flag("workers", int, 1, "Processes that serve.", "workers"),
    Flag("max_threads", int, 4, "Does nothing: see max_asyncio_workers."),
    Flag(
        "max_asyncio_workers",
        int,
        None,
        "Threads for `def` methods of all models.",
        "max_asyncio_workers",
    ),
    Flag("enable_grpc", bool, True, "Whether to serve gRPC.", "enable_grpc"),
    Flag("enable_docs_url", bool, False, "Does nothing: see /openapi.json."),
    Flag(
        "enable_latency_logging",
        bool,
        False,
        "A line a request with the milliseconds of its stages.",
        "enable_latency_logging",
    ),
    Flag("configure_logging", bool, True, "Does nothing: see log_config_file."),
    Flag("log_config_file", str, None, "JSON or YAML for logging.", "log_config"),
    Flag("access_log_format", str, None, "Does nothing: see log_format."),
    Flag("event-loop", str, "auto", "Which event loop.", "event_loop", _LOOPS),
    Flag(
        "timeout-keep-alive",
        int,
        65,
        "Seconds that a connection may be idle.",
        "timeout_keep_alive",
    ),
    Flag("model_name", str, "model", "A name, for the program to read."),
    Flag("predictor_host", str, None, "The predictor of a transformer."),
    Flag("protocol", str, "v1", "Does nothing.", choices=_PROTOCOLS),
    Flag("predictor_protocol", str, "v1", "What it speaks.", choices=_PROTOCOLS),
    Flag("predictor_use_ssl", bool, False, "Whether it is asked by TLS."),
    Flag("predictor_request_timeout_seconds", int, 600, "Seconds for its answer."),
    Flag("predictor_request_retries", int, 0, "How often it is asked again."),
    Flag(
        "grpc_max_send_message_length",
        int,
        MAX_GRPC_MESSAGE_LENGTH,
        "Does nothing: answers may have any size.",
    ),
    Flag(
        "grpc_max_receive_message_length",
        int,
        MAX_GRPC_MESSAGE_LENGTH,
        "Bytes of a request, where that is more than max_body_size.",
    ),
    Flag("ssl_certfile", str, None, "The server's certificate.", "ssl_certfile"),
    Flag("ssl_keyfile", str, None, "Its private key.", "ssl_keyfile"),
    Flag(
        "sync_handlers_on_loop",
        bool,
        False,
        "Run `def` methods on the event loop, one after the other, as KServe does.",
    ),
)
HEALTH_CHECK = "enable_predictor_health_check"
_KNOWN = {flag.name.replace("-", "_"): flag for flag in FLAGS}
# Native settings that mean nothing to these models, which load and forward by
# themselves: flags of these names are the program's own.
_NOT_NATIVE = {
    "explainer_host",
    "model_dir",
    "model_name",
    "predictor_ca_certs",
    "storage_allow_patterns",
    "storage_ignore_patterns",
    "storage_uri",
    HEALTH_CHECK,
}


def make_parser() -> argparse.ArgumentParser:
    """KServe's parser, for `ArgumentParser(parents=[parser])`."""
    parser = argparse.ArgumentParser(
        add_help=False,
        # Else a flag of ours, --timeout say, would be taken for an abbreviation.
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    variables = {
        "ssl_certfile": os.environ.get(KSERVE_TLS_CERT_FILE_ENV),
        "ssl_keyfile": os.environ.get(KSERVE_TLS_KEY_FILE_ENV),
    }
    for flag in FLAGS:
        _add(parser, flag, variables.get(flag.name, flag.default))
    parser.add_argument(
        f"--{HEALTH_CHECK}",
        action="store_true",
        help="Be ready only while the predictor is.",
    )
    return parser


def _add(parser: argparse.ArgumentParser, flag: Flag, default: Any) -> None:
    spellings = dict.fromkeys((flag.name, flag.name.replace("-", "_")))
    parser.add_argument(
        *(f"--{name}" for name in spellings),
        dest=flag.name.replace("-", "_"),
        type=_switch if flag.kind is bool else flag.kind,
        default=default,
        choices=flag.choices or None,
        help=flag.text,
    )


def _switch(text: str) -> bool:
    if text.lower() not in SWITCHES:
        raise argparse.ArgumentTypeError(f"true or false, not {text!r}")
    return bool(convert(bool, text, name="", origin=""))


def given_flags(argv: Sequence[str]) -> dict[str, Any]:
    """The flags of a command line that KServe or kserve-lite knows, by name.

    Ends the process, as argparse does, where one of KServe's has an unusable value.
    """
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in FLAGS:
        _add(reader, flag, argparse.SUPPRESS)
    reader.add_argument(
        f"--{HEALTH_CHECK}", action="store_true", default=argparse.SUPPRESS
    )
    for name, setting in known_settings().items():
        if name in _KNOWN or name in _NOT_NATIVE:
            continue
        spellings = dict.fromkeys((name, name.replace("_", "-")))
        options = [f"--{spelling}" for spelling in spellings]
        if setting.type is bool:
            reader.add_argument(
                *options, dest=name, nargs="?", const="true", default=argparse.SUPPRESS
            )
        else:
            reader.add_argument(*options, dest=name, default=argparse.SUPPRESS)
    return vars(reader.parse_known_args(list(argv))[0])


class Chosen:
    """What arguments, flags and environment come to.

    arguments: of `ModelServer`, by KServe's names; None: not given.
    """

    def __init__(
        self,
        arguments: Mapping[str, Any],
        argv: Sequence[str],
        environment: Mapping[str, str],
    ) -> None:
        given = {name: v for name, v in arguments.items() if v is not None}
        self._given = given_flags(argv) | given
        self._environment = environment
        self.settings = self._settings()

    def value(self, name: str) -> Any:
        """What one of KServe's flags comes to."""
        if name in self._given:
            return self._given[name]
        flag = _KNOWN[name]
        return self._environment.get(_VARIABLES.get(flag.native, "")) or flag.default

    @property
    def predictor_config(self) -> PredictorConfig:
        """What the flags say of a predictor."""
        return PredictorConfig(
            self.value("predictor_host"),
            self.value("predictor_protocol"),
            self.value("predictor_use_ssl"),
            self.value("predictor_request_timeout_seconds"),
            self.value("predictor_request_retries"),
            self._given.get(HEALTH_CHECK, False),
        )

    def tell(self) -> None:
        """Log which port TLS moved to, and what was given and does nothing."""
        if self.settings.server.http_port == DEFAULT_HTTPS_PORT:
            log.info("TLS is served on port %d", DEFAULT_HTTPS_PORT)
        for name in self._given:
            flag = _KNOWN.get(name)
            if flag is None or flag.native or name == "grpc_max_receive_message_length":
                continue
            if name in ELSEWHERE and not name.startswith("predictor_"):
                log.info("%s does nothing here: %s", name, ELSEWHERE[name])

    def _settings(self) -> Settings:
        native = {
            _KNOWN[name].native if name in _KNOWN else name: value
            for name, value in self._given.items()
            if name not in _NOT_NATIVE and (name not in _KNOWN or _KNOWN[name].native)
        }
        longest = self._given.get("grpc_max_receive_message_length", 0)
        if longest > WireLimits().max_body_size:
            native.setdefault("max_body_size", longest)
        has_tls = self.value("ssl_certfile") and self.value("ssl_keyfile")
        if has_tls and self.value("http_port") == DEFAULT_HTTP_PORT:  # text is $PORT
            native["http_port"] = DEFAULT_HTTPS_PORT
        environment = {
            variable: text
            for variable, text in self._environment.items()
            if ENVIRONMENT.get(variable) not in native.keys() | _NOT_NATIVE
        }
        return make_settings(native, environment=environment)


_VARIABLES = {name: variable for variable, name in ENVIRONMENT.items()}
