"""Logging as a fresh process has it, for tests that configure it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


def drop_pytest() -> None:
    """Take pytest's handlers away: it adds them between fixtures and tests."""
    root = logging.getLogger()
    root.handlers = [h for h in root.handlers if not _is_pytest(h)]


def _is_pytest(handler: logging.Handler) -> bool:
    return type(handler).__module__.startswith("_pytest")


@contextmanager
def fresh_logging() -> Iterator[None]:
    """No handler but pytest's anywhere; all as it was afterwards."""
    root = logging.getLogger()
    loggers = [
        logging.getLogger(name)
        for name in ("kserve_lite", "kserve_lite.access", "kserve_lite.trace")
    ]
    kept = [(each, each.handlers, each.level, each.propagate) for each in loggers]
    level, last = root.level, logging.lastResort
    try:
        for logger in loggers:
            logger.handlers = []
            logger.setLevel(logging.NOTSET)
            logger.propagate = True
        yield
    finally:
        root.handlers = [h for h in root.handlers if _is_pytest(h)]
        root.setLevel(level)
        logging.lastResort = last
        for logger, handlers, level, propagate in kept:
            logger.handlers = handlers
            logger.setLevel(level)
            logger.propagate = propagate
