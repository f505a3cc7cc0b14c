"""What the log is told of requests, in the midst of them.

Loggers, LogRecord factories, filters and handlers are the program's, and may raise: a
line that cannot be written is lost, and the request it tells of never learns of that.
Nothing here raises.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

log = logging.getLogger("kserve_lite")

_said: set[str] = set()


def tell(logger: logging.Logger, message: str, fields: Mapping[str, Any]) -> None:
    """Log a line of level INFO, with fields as `extra` gives them.

    What the program's LogRecord factory says under the same names stays: with `extra`
    that would be a KeyError.
    """
    try:
        if not logger.isEnabledFor(logging.INFO):
            return
        # Of our caller, as `logger.info()` finds it.
        file, number, function, _ = logger.findCaller(stacklevel=2)
        record = logger.makeRecord(
            logger.name,
            logging.INFO,
            file,
            number,
            "%s",
            (message,),
            None,
            function,
        )
        for name, value in fields.items():
            record.__dict__.setdefault(name, value)
        logger.handle(record)
    except Exception as error:  # noqa: BLE001 - the program's code, see above
        failed(f"a line of {logger.name} could not be written", error)


def failed(what: str, error: Exception) -> None:
    """Say, once for each `what`, that something besides a request's answer failed.

    what: one of few, since they are remembered.
    """
    if what in _said:
        return
    _said.add(what)
    with suppress(Exception):  # the log itself may be what fails
        log.error("%s; it is said only once", what, exc_info=error)
