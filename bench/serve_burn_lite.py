"""A handler that computes, for process.py: `serve_burn_lite.py WAY --http_port N ...`.

WAY says how the handler is written: `def`, as one that computes ought to be, or
`async`, which computes on the event loop. It is bytecode only, about 2.5 ms of it on
the machine of the results, so that a load program takes little beside it.
"""

from __future__ import annotations

import sys
from typing import Any

from kserve_lite import InferRequest, InferResponse, Model, run

STEPS = 60_000


def burn(payload: dict[str, Any] | InferRequest) -> Any:
    count = 0
    for step in range(STEPS):
        count += step & 1
    if isinstance(payload, dict):
        return {"predictions": payload["instances"]}
    return InferResponse(payload.inputs)


async def burn_on_loop(payload: dict[str, Any] | InferRequest) -> Any:
    return burn(payload)


WAYS = {"def": burn, "async": burn_on_loop}

if __name__ == "__main__":
    model = Model("echo")
    model.predict(WAYS[sys.argv.pop(1)])
    run(model)
