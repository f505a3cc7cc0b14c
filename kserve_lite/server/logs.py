"""Log lines of a server that owns its process."""

from __future__ import annotations

import logging

FORMAT = (
    "%(asctime)s.%(msecs)03d %(process)s %(name)s %(levelname)s "
    "[%(filename)s:%(funcName)s():%(lineno)s] %(message)s"
)
DATE_FORMAT = "%Y-%m-%d %H:%M:%S"


def configure_logging(level: str) -> None:
    """Write the server's log lines to standard error.

    A program that configured logging itself keeps its own way; only the level is set.
    """
    logger = logging.getLogger("kserve_lite")
    logger.setLevel(level)
    if logger.handlers or logging.getLogger().handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(FORMAT, DATE_FORMAT))
    logger.addHandler(handler)
    logger.propagate = False
