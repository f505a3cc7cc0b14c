"""The models that the clients of this folder call."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any

import anyio
import numpy as np

from kserve_lite import InferRequest, InferResponse, Model, TensorSpec


def make_echo() -> Model:
    """A model that answers with what it got, on every protocol."""
    model = Model("echo")

    @model.predict
    async def predict(payload: dict[str, Any] | InferRequest) -> object:
        if isinstance(payload, InferRequest):
            return InferResponse(payload.inputs)
        return {"predictions": payload["instances"]}

    @model.explain
    async def explain(payload: dict[str, Any]) -> object:
        return {"explanations": payload["instances"]}

    return model


def make_sums() -> Model:
    """A model whose metadata says all: the sums of pairs, in a thread."""
    model = Model("sums", version="3")

    @model.predict
    def predict(
        pairs: Annotated[np.ndarray, TensorSpec("FP32", [-1, 2], "pairs")],
    ) -> Annotated[np.ndarray, TensorSpec("FP32", [-1], "sums")]:
        sums: np.ndarray = pairs.sum(axis=1)
        return sums

    return model


def make_count() -> Model:
    """A model that answers with a stream: 0, 1, ... below the number it gets."""
    model = Model("count")

    @model.predict
    async def predict(limit: np.ndarray) -> AsyncIterator[np.ndarray]:
        for number in range(int(limit[0])):
            yield np.array([number], np.int64)

    return model


def make_mirror() -> Model:
    """A model that sends the headers `x-sent` and `x-sent-bin` back."""
    model = Model("mirror")

    @model.predict
    async def predict(
        payload: InferRequest,
        headers: Mapping[str, Any],
        response_headers: dict[str, Any],
    ) -> InferResponse:
        for name in ("x-sent", "x-sent-bin"):
            if name in headers:
                response_headers[name] = headers[name]
        return InferResponse(payload.inputs)

    return model


class Waiting:
    """A model whose handler waits; what becomes of it is told by events."""

    def __init__(self) -> None:
        self.model = Model("waiting", predict=self.predict)
        self.started = threading.Event()
        self.cancelled = threading.Event()

    async def predict(self, payload: InferRequest) -> InferResponse:
        self.started.set()
        try:
            await anyio.sleep_forever()
        except BaseException:
            self.cancelled.set()
            raise
        raise AssertionError
