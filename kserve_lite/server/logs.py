"""Log lines: where those of "kserve_lite" go, and what they look like.

For people (`log_format` text): KServe's format, the level in colour on a terminal.
For machines (json): one object a line, `timestamp` (ISO 8601, UTC), `level`, `logger`,
`message`, `process`, then what was logged as `extra`, and `traceback`; lines of loggers
that nobody configured are written the same way. All go to standard error, but those of
requests, see `access.py`. With `log_config` the file says it all instead.

Only a server that owns its process calls this. What requests bring may be part of any
line: neither format lets it begin a line of its own or move a terminal's cursor.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from kserve_lite.errors import SettingsError, StartupError
from kserve_lite.server.escaping import escaped
from kserve_lite.server.settings import ServerSettings

log = logging.getLogger("kserve_lite")

# KServe's: the lines of latencies tell no place, since it is always the same.
FORMAT = (
    "%(asctime)s.%(msecs)03d %(process)s %(name)s %(levelname)s "
    "[%(filename)s:%(funcName)s():%(lineno)s] %(message)s"
)
TRACE_FORMAT = "%(asctime)s.%(msecs)03d %(process)s %(name)s %(message)s"
DATE_FORMAT = "%Y-%m-%d %H:%M:%S"

RED, GREEN, YELLOW, CYAN, GREY = 31, 32, 33, 36, 90


def configure_logging(settings: ServerSettings) -> None:
    """Have the log lines of this process written as its settings say.

    A program that configured logging itself keeps its own way; only the level is set.
    Raises SettingsError for a log_config that cannot be used, StartupError where it is
    YAML and PyYAML is missing.
    """
    if settings.log_config:
        _configure_from(Path(settings.log_config))
        return
    for own in [h for h in log.handlers if isinstance(h, OwnHandler)]:
        log.removeHandler(own)
    log.setLevel(settings.log_level)
    if log.handlers or logging.getLogger().handlers:
        if settings.log_format != "text":
            log.warning(
                "log_format %s is not used: the program configured logging itself",
                settings.log_format,
            )
        return
    handler = OwnHandler(sys.stderr)
    if settings.log_format == "json":
        handler.setFormatter(JsonFormatter())
        # What Python writes with that no handler was found for: libraries, asyncio.
        logging.lastResort = last = logging.StreamHandler(sys.stderr)
        last.setLevel(logging.WARNING)
        last.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(TextFormatter(has_colours(sys.stderr)))
    log.addHandler(handler)
    log.propagate = False


class OwnHandler(logging.StreamHandler[TextIO]):
    """The handler that is ours, and so is nobody's wish for anything else."""


def has_colours(stream: TextIO | None) -> bool:
    """Whether to colour: on a terminal, unless $NO_COLOR is set (no-color.org)."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def coloured(text: str, colour: int) -> str:
    return f"\x1b[{colour}m{text}\x1b[0m"


_COLOURS = {
    "DEBUG": GREY,
    "INFO": GREEN,
    "WARNING": YELLOW,
    "ERROR": RED,
    "CRITICAL": RED,
}


class TextFormatter(logging.Formatter):
    """KServe's format; lines after the first, of tracebacks say, are indented."""

    def __init__(self, colours: bool = False) -> None:
        super().__init__(FORMAT, DATE_FORMAT)
        self._trace = logging.Formatter(TRACE_FORMAT, DATE_FORMAT)
        self._has_colours = colours

    def format(self, record: logging.LogRecord) -> str:
        if record.name == "kserve_lite.trace":
            text = self._trace.format(record)
        else:
            text = super().format(record)
        text = escaped(text, "\n\t").replace("\n", "\n    ")
        if self._has_colours and record.levelname in _COLOURS:
            level = coloured(record.levelname, _COLOURS[record.levelname])
            text = text.replace(f" {record.levelname} ", f" {level} ", 1)
        return text


# What every LogRecord has, `message` and `asctime` being set by formatters.
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {
    "message",
    "asctime",
    "taskName",
}


class JsonFormatter(logging.Formatter):
    """One JSON object a line, in ASCII; what `extra` brings never hides the rest."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "timestamp": utc(record.created),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "process": record.process,
        }
        if record.exc_info and record.exc_info[0] is not None:
            fields["traceback"] = self.formatException(record.exc_info)
        elif record.exc_text:
            fields["traceback"] = record.exc_text
        if record.stack_info:
            fields["stack"] = record.stack_info
        for name, value in record.__dict__.items():
            if name not in _STANDARD:
                fields.setdefault(name, value)
        return _dumps(fields)


def utc(seconds: float) -> str:
    """A time of the clock as ISO 8601 with milliseconds."""
    text = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


def _dumps(fields: dict[str, Any]) -> str:
    try:
        return json.dumps(fields, default=_text, allow_nan=False)
    except (ValueError, TypeError, RecursionError):  # NaN, cycles, keys, depth
        return json.dumps(
            {
                name: value if type(value) in (str, int, bool) else _text(value)
                for name, value in fields.items()
            }
        )


def _text(value: Any) -> str:
    try:
        return str(value)
    except Exception:  # noqa: BLE001 - user code, and the line matters more
        return f"<{type(value).__name__}>"


def _configure_from(path: Path) -> None:
    from logging.config import dictConfig  # 10 ms, with what it imports

    config = _read(path)
    if not isinstance(config, dict):
        raise SettingsError(
            f"--log_config {path} must hold an object for logging.config.dictConfig, "
            f"it holds {type(config).__name__}"
        )
    # Python's default silences what was imported before, which is nearly everything.
    config.setdefault("disable_existing_loggers", False)
    try:
        dictConfig(config)
    except Exception as error:  # handlers and formatters may be anybody's code
        why = f"{error}: {error.__cause__}" if error.__cause__ else str(error)
        raise SettingsError(
            f"--log_config {path} cannot be used: {type(error).__name__}: {why}"
        ) from error


def _read(path: Path) -> Any:
    kind = path.suffix.lower()
    if kind not in (".json", ".yaml", ".yml"):
        raise SettingsError(
            f"--log_config {path}: is it JSON or YAML? Name it .json, .yaml or .yml"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(
            f"--log_config {path} cannot be read: {error.strerror}"
        ) from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"--log_config {path} is not UTF-8 text") from error
    if kind == ".json":
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SettingsError(f"--log_config {path} is no JSON: {error}") from error
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError as error:
        raise StartupError(
            f"--log_config {path} is YAML and PyYAML is not installed: "
            "pip install pyyaml, or write it as JSON"
        ) from error
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise SettingsError(f"--log_config {path} is no YAML: {error}") from error
