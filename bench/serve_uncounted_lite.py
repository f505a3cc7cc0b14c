"""serve_echo_lite.py with nothing counted: the yardstick of process.py, `observing`.

No user can have this server: what counts requests, bytes and times is replaced by what
does nothing. Records of requests, with their ids, are made all the same, since answers
have them as headers. process.py checks that `/metrics` shows no request.
"""

from __future__ import annotations

from typing import Any

import serve_echo_lite

from kserve_lite.counters import Counter, Histogram
from kserve_lite.dispatch.statistics import Statistics
from kserve_lite.server.application import Application


def nothing(*_: Any) -> None:
    """In the place of a method that counts."""


REPLACED = (
    (Application, "ended"),
    (Statistics, "count"),
    (Counter, "add"),
    (Counter, "set"),
    (Histogram, "observe"),
    (Histogram, "observe_all"),
)

if __name__ == "__main__":
    for owner, name in REPLACED:
        getattr(owner, name)  # One that has gone would leave its heir counting.
        setattr(owner, name, nothing)
    serve_echo_lite.main()
