"""A model in one of several ways: `serve_ways_lite.py MODEL WAY --http_port N ...`.

MODEL is what it does: `python` computes in bytecode, `wait` waits for something else,
`torch` is AlexNet. WAY is how it is served: `one` process, `workers` (the same, with
--workers on the command line), `batching`, or two `replicas`. For parallel_ways.py.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from serve_burn_lite import burn

from kserve_lite import Model, run

SECONDS = 0.02  # that `wait` waits


async def wait(payload: dict[str, Any]) -> dict[str, Any]:
    await asyncio.sleep(SECONDS)
    return {"predictions": payload["instances"]}


def classify(x: np.ndarray, state: Any) -> np.ndarray:
    import torch  # noqa: PLC0415 - the other two models do without

    with torch.inference_mode():
        y: np.ndarray = state(torch.from_numpy(x)).numpy()
    return y


def network() -> Any:
    import alexnet_torch  # noqa: PLC0415

    return alexnet_torch.network()


HANDLERS: dict[str, Callable[..., Any]] = {
    "python": burn,
    "wait": wait,
    "torch": classify,
}


def main() -> None:
    handler, way = sys.argv.pop(1), sys.argv.pop(1)
    given: dict[str, Any] = {"replicas": 2} if way == "replicas" else {}
    if handler == "torch":
        given |= {"load": network, "max_concurrency": 1}
    model = Model("echo", **given)
    batching = {"max_batch_size": 16, "max_delay_ms": "auto"}
    how: Any = batching if way == "batching" else {}
    if how:
        model.predict(**how)(HANDLERS[handler])
    else:
        model.predict(HANDLERS[handler])
    run(model)


if __name__ == "__main__":
    main()
