"""`kserve.logging`: the loggers, and how their lines are written.

The loggers are kserve-lite's own, so that a program's lines stand among the server's in
the same format, level and colours: their names are `kserve_lite` and
`kserve_lite.trace`. A configuration written for KServe, which names `kserve` and
`kserve.trace`, is taken for them too. There is no uvicorn here to configure.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from kserve_lite.compat.constants.constants import KSERVE_LOGLEVEL
from kserve_lite.server import logs
from kserve_lite.server.settings import make_settings

KSERVE_LOGGER_NAME = "kserve_lite"
KSERVE_TRACE_LOGGER_NAME = "kserve_lite.trace"
KSERVE_LOGGER_FORMAT = logs.FORMAT
KSERVE_TRACE_LOGGER_FORMAT = logs.TRACE_FORMAT
KSERVE_LOGGER_DATE_FORMAT = logs.DATE_FORMAT

# What the server does by itself, for programs that change some of it.
KSERVE_LOG_CONFIG: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        "kserve": {"()": "kserve_lite.server.logs.TextFormatter"},
        "kserve_trace": {"()": "kserve_lite.server.logs.TextFormatter"},
    },
    "handlers": {
        name: {
            "class": "logging.StreamHandler",
            "formatter": name,
            "stream": "ext://sys.stderr",
        }
        for name in ("kserve", "kserve_trace")
    },
    "loggers": {
        KSERVE_LOGGER_NAME: {
            "handlers": ["kserve"],
            "level": KSERVE_LOGLEVEL,
            "propagate": False,
        },
        KSERVE_TRACE_LOGGER_NAME: {
            "handlers": ["kserve_trace"],
            "level": KSERVE_LOGLEVEL,
            "propagate": False,
        },
    },
}

logger = logging.getLogger(KSERVE_LOGGER_NAME)
trace_logger = logging.getLogger(KSERVE_TRACE_LOGGER_NAME)


def configure_logging(log_config: dict[str, Any] | str | None = None) -> None:
    """Have log lines written as a configuration says.

    log_config: a dict for `logging.config.dictConfig`, a file of one (.json, .yaml,
    .yml), or a file for `logging.config.fileConfig`. None: as the server writes them,
    unless logging is configured already. Raises SettingsError for a file that cannot be
    used, StartupError for YAML without PyYAML, ValueError for a dict that cannot.
    """
    from logging.config import dictConfig, fileConfig

    if log_config is None:
        if not logger.hasHandlers():
            logs.configure_logging(make_settings(environment=os.environ).server)
    elif isinstance(log_config, dict):
        dictConfig(log_config)
    elif log_config.lower().endswith((".json", ".yaml", ".yml")):
        settings = make_settings({"log_config": log_config}, environment=os.environ)
        logs.configure_logging(settings.server)
    else:
        fileConfig(log_config, disable_existing_loggers=False)
    for own, named in ((logger, "kserve"), (trace_logger, "kserve.trace")):
        theirs = logging.getLogger(named)
        if theirs.handlers and not own.handlers:
            own.handlers[:] = theirs.handlers
            own.setLevel(theirs.level)
            own.propagate = theirs.propagate
