"""What a setting may be: text or an argument in, the setting's type out, or an error.

The bounds are tables by the setting's name. Nothing here knows where a setting comes
from; who asks says it, for the error.
"""

from __future__ import annotations

import operator
import os
from typing import Any

from kserve_lite.errors import SettingsError

CHOICES = {
    "event_loop": ("auto", "asyncio", "uvloop"),
    "log_format": ("text", "json"),
    "log_level": ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
    "predictor_protocol": ("v1", "v2", "grpc-v2"),
}
# Numbers are 0 or more unless it is said here.
LEAST: dict[str, float] = {
    "workers": 1,
    "max_in_flight": 1,
    "max_queue_size": 1,
    "max_connections": 1,
    "max_streams": 1,
    "max_head_size": 256,
    "max_body_size": 1,
    # 0 would end every connection before its first byte.
    "timeout_keep_alive": 0.01,
    "head_timeout": 0.01,
    "body_timeout": 0.01,
    "write_timeout": 0.01,
}
MOST: dict[str, float] = {
    "http_port": 65535,
    "grpc_port": 65535,
    "workers": 1024,
    # They go into 32 bits (RFC 9113 section 6.5.1).
    "max_streams": 2**31 - 1,
    "max_head_size": 2**31 - 1,
    "predictor_request_retries": 100,
}
# 30 years: uvloop counts milliseconds in 64 bits.
_MOST_OF = {int: 2**63 - 1, float: 10**9}
_TRUE = frozenset(("y", "yes", "t", "true", "on", "1"))
_FALSE = frozenset(("n", "no", "f", "false", "off", "0"))
SWITCHES = _TRUE | _FALSE


def convert(wanted: type, value: Any, *, name: str, origin: str) -> Any:
    """Turn a value, text from outside or an argument, into the setting's type."""
    try:
        converted = _as_type(wanted, value)
    except (TypeError, ValueError, OverflowError):
        raise SettingsError(
            f"{origin} must be {_EXPECTED[wanted]}, got {value!r}"
        ) from None
    if name == "log_level":
        converted = converted.upper()
    choices = CHOICES.get(name)
    if choices and converted not in choices:
        raise SettingsError(
            f"{origin} must be one of {', '.join(choices)}, got {value!r}"
        )
    if wanted in _MOST_OF:
        least = LEAST.get(name, 0)
        most = MOST.get(name, _MOST_OF[wanted])
        if not converted >= least:  # nan too
            raise SettingsError(f"{origin} must be at least {least}, got {value!r}")
        if converted > most:
            raise SettingsError(f"{origin} must be at most {most}, got {value!r}")
    if name == "model_name" and "/" in converted:
        raise SettingsError(
            f"{origin} must be one segment of a URL, without '/', got {value!r}"
        )
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
        if text in SWITCHES:
            return text in _TRUE
        raise ValueError
    if wanted is str:
        text = os.fspath(value)
        if isinstance(text, str):
            return text
        raise TypeError
    if isinstance(value, bool):
        raise TypeError
    if wanted is float or isinstance(value, str):
        return wanted(value)
    return operator.index(value)
