"""The kserve-lite side of the comparison: `serve_lite.py HANDLER --http_port N ...`.

The handlers do what those of serve_kserve.py do, written as a kserve-lite user would
write them. What follows the handler's name goes to kserve-lite's own command line.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np

from kserve_lite import Model, TensorSpec, run

FloatArray = np.ndarray[Any, np.dtype[np.float32]]


async def echo(payload: dict[str, Any]) -> dict[str, Any]:
    return {"predictions": payload["instances"]}


def echo_sync(payload: dict[str, Any]) -> dict[str, Any]:
    return {"predictions": payload["instances"]}


async def tensor(x: np.ndarray) -> np.ndarray:
    return x


async def image(
    x: Annotated[np.ndarray, TensorSpec("FP32", [-1, 3, 224, 224])],
) -> np.ndarray:
    mean: FloatArray = x.mean(axis=(1, 2, 3))
    return mean


HANDLERS: dict[str, Callable[..., Any]] = {
    "echo": echo,
    "echo_sync": echo_sync,
    "tensor": tensor,
    "large_tensor": tensor,
    "image": image,
    "image_v2": image,
}


def main() -> None:
    handler = sys.argv.pop(1)
    model = Model("echo")
    model.predict(HANDLERS[handler])
    run(model)


if __name__ == "__main__":
    main()
