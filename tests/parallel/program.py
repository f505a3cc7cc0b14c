"""The server of `test_replicas.py`: a program of its own, whose models have replicas.

Tests and handlers meet in the folder $MEETING: each waits for files of the other.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from kserve_lite import InferRequest, InvalidInput, Model, TensorSpec, run

FOLDER = Path(os.environ.get("MEETING", "/nonexistent"))
PATIENCE = 30.0
LITTLE = {"num_cpus": 0.1}

many = Model("many", replicas=2, resources=LITTLE)
sturdy = Model(
    "sturdy",
    replicas=2,
    idempotent=True,
    max_concurrency=1,
    resources={**LITTLE, "runtime_env": {"env_vars": {"WHO": "sturdy"}}},
)
tensors = Model(
    "tensors",
    replicas=1,
    resources=LITTLE,
    outputs=[
        TensorSpec("FP32", [-1, -1], name="y"),
        TensorSpec("INT64", [-1], name="rows"),
    ],
)
stream = Model(
    "stream", replicas={"min_replicas": 1, "max_replicas": 2}, resources=LITTLE
)


def mark(name: str) -> int:
    """Write a line into a file; return how many it has now."""
    with (FOLDER / name).open("a+") as file:
        file.write(f"{os.getpid()}\n")
        file.flush()
        file.seek(0)
        return len(file.readlines())


def met(tag: str) -> bool:
    return len(list(FOLDER.glob(f"{tag}-*"))) == 2


@many.load
def load() -> str:
    mark("loaded")
    return f"state of {os.getpid()}"


@many.unload
async def unload(state: str) -> None:
    await asyncio.sleep(0)
    mark("unloaded")
    print("a replica says goodbye", state, flush=True)


@many.predict
async def predict(
    payload: dict[str, Any],
    state: str,
    headers: Any,
    response_headers: dict[str, str],
    context: Any,
) -> Any:
    tag = payload.get("tag", "")
    match payload["do"]:
        case "tell":
            response_headers["x-replica"] = str(os.getpid())
            return {
                "pid": os.getpid(),
                "state": state,
                "header": headers.get("x-test"),
                "id": context.request_id,
                "protocol": context.protocol,
                "model": context.model_name,
                "remaining": context.remaining(),
                "path": str(many.path("weights")),
                "size": len(payload.get("filling", "")),
                "answer": "x" * payload.get("wants", 0),
            }
        case "meet":
            mark(f"{tag}-{os.getpid()}")
            end = time.monotonic() + PATIENCE
            while not met(tag) and time.monotonic() < end:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            return {"met": met(tag), "pid": os.getpid()}
        case "wait":
            mark(f"{tag}-began")
            while not (FOLDER / f"{tag}-go").exists():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            return {"answered": True}
        case "hang":
            mark(f"{tag}-began")
            try:
                await asyncio.sleep(PATIENCE)
            finally:
                mark(f"{tag}-cancelled")
        case "refuse":
            raise InvalidInput("There is no such thing.")
        case "fail":
            raise ValueError("secret words")
        case "die":
            mark(f"{tag}-ran")
            os._exit(1)
        case "iterator":
            return iter(["one ", "two"])
        case "lock":
            return {"predictions": asyncio.Lock(), "thing": open(os.devnull)}  # noqa
    return {"predictions": []}


@many.explain
async def explain(payload: dict[str, Any]) -> Any:
    return {"explanations": payload["instances"]}


@sturdy.predict
def work(payload: dict[str, Any]) -> Any:
    tag = payload.get("tag", "")
    if payload["do"] == "meet":
        mark(f"{tag}-{os.getpid()}")
        end = time.monotonic() + PATIENCE
        while not met(tag) and time.monotonic() < end:
            time.sleep(0.01)
        return {"met": met(tag), "pid": os.getpid()}
    if payload["do"] == "die once" and mark(f"{tag}-ran") == 1:
        os._exit(1)
    return {"pid": os.getpid(), "who": os.environ.get("WHO")}


@tensors.load
def factor() -> float:
    return 2.0


@tensors.preprocess
def seen(
    x: Annotated[np.ndarray, TensorSpec("FP32", [-1, -1], name="x")],
    response_headers: dict[str, str],
) -> np.ndarray:
    kind = "writable" if x.flags.writeable else "read-only"
    response_headers["x-came"] = f"{type(x).__name__} {x.dtype} {kind}"
    return x


@tensors.predict(max_batch_size=8, max_delay_ms=100)
def double(x: np.ndarray, state: float) -> dict[str, np.ndarray]:
    return {"y": x * np.float32(state), "rows": np.full(len(x), len(x))}


@tensors.postprocess
def judged(result: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if result["y"][0, 0] == 66:
        return {"y": result["y"][0], "rows": result["rows"]}
    return result


@stream.predict
async def parts(payload: Any, response_headers: dict[str, str]) -> AsyncGenerator[Any]:
    if isinstance(payload, InferRequest):
        for number in payload["x"].ravel():
            yield np.array([number])
        return
    tag = payload.get("tag") or payload.get("text_input", "")
    response_headers["x-pid"] = str(os.getpid())
    yield "one "
    end = time.monotonic() + PATIENCE
    try:
        go = FOLDER / f"{tag}-go"
        while not go.exists() and time.monotonic() < end:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    finally:
        mark(f"{tag}-closed")
    if payload.get("do") == "fail":
        raise ValueError("secret words")
    yield "two"


if __name__ == "__main__":
    run(many, sturdy, tensors, stream)
