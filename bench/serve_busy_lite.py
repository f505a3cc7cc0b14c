"""A kserve-lite server whose threads can be kept busy: what probes.py probes.

`serve_busy_lite.py --http_port N ...`. POST {"how": "python"} to the model `busy`
occupies one thread until it is released. `threads` answers how many are occupied, and
releases them if told to; it is `async def`, so it is answered while all threads are.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import torch

from kserve_lite import Model, run

busy = Model("busy")
threads = Model("threads")
occupied: set[int] = set()
released = threading.Event()


def python() -> None:
    """Bytecode only: the thread gives the GIL away when it is asked to, no sooner."""
    count = 0
    for step in range(100_000):
        count += step & 1


def sleep() -> None:
    time.sleep(0.1)


def matrix() -> None:
    """Work without the GIL, on as many threads as torch takes for itself."""
    square = torch.rand(1024, 1024)
    torch.mm(square, square)


WAYS = {"python": python, "sleep": sleep, "torch": matrix}


@busy.predict
def occupy(payload: dict[str, Any]) -> dict[str, Any]:
    occupied.add(threading.get_ident())
    while not released.is_set():
        WAYS[payload["how"]]()
    occupied.discard(threading.get_ident())
    return {"predictions": []}


@threads.predict
async def count(payload: dict[str, Any]) -> dict[str, Any]:
    answer = {"predictions": [len(occupied)]}
    if payload["release"]:
        released.set()
    else:
        released.clear()
    return answer


if __name__ == "__main__":
    run(busy, threads)
