"""AlexNet on kserve-lite: `serve_alexnet_lite.py WAY --http_port N ...`.

WAY is a key of WAYS: how the model is defined, as a user would. A second model,
`batches`, answers how many batches of which size the first has run since it was last
asked. What follows goes to kserve-lite's own command line.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any, Literal

import torch
from alexnet_torch import network

from kserve_lite import Model, run

batches = Model("batches")
sizes: Counter[int] = Counter()


def predict(x: torch.Tensor, state: torch.nn.Module) -> torch.Tensor:
    sizes[len(x)] += 1
    with torch.inference_mode():
        y: torch.Tensor = state(x)
        return y


def batching(max_delay_ms: float | Literal["auto"]) -> Model:
    model = Model("alexnet", max_concurrency=1, load=network)
    model.predict(max_batch_size=16, max_delay_ms=max_delay_ms)(predict)
    return model


def pair() -> Model:
    """Two batches at once, each on one core, in place of one on both."""
    torch.set_num_threads(1)
    model = Model("alexnet", max_concurrency=2, load=network)
    model.predict(max_batch_size=16, max_delay_ms="auto")(predict)
    return model


def single() -> Model:
    return Model("alexnet", max_concurrency=1, load=network, predict=predict)


def threaded() -> Model:
    return Model("alexnet", load=network, predict=predict)


WAYS = {
    "batching": lambda: batching("auto"),
    "greedy": lambda: batching(0),
    "pair": pair,
    "single": single,
    "threaded": threaded,
}


@batches.predict
async def seen(payload: dict[str, Any]) -> dict[str, Any]:
    found = {str(size): count for size, count in sorted(sizes.items())}
    sizes.clear()
    return {"predictions": found}


if __name__ == "__main__":
    run(WAYS[sys.argv.pop(1)](), batches)
