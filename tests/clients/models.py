"""The models that the clients of this folder call."""

from __future__ import annotations

import itertools
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


def make_double() -> Model:
    """A model of one input whose first dimension is free on both sides."""
    model = Model("double")

    @model.predict
    def predict(
        rows: Annotated[np.ndarray, TensorSpec("FP32", [-1, 3])],
    ) -> Annotated[np.ndarray, TensorSpec("FP32", [-1, 3], "doubled")]:
        doubled: np.ndarray = rows * 2
        return doubled

    return model


Pairs = Annotated[np.ndarray, TensorSpec("INT32", [-1, 2])]


def make_blend() -> Model:
    """A model of two inputs and two outputs; it fails where `left` has a 13."""
    model = Model("blend")

    @model.predict
    def predict(
        left: Pairs, right: Pairs
    ) -> tuple[
        Annotated[np.ndarray, TensorSpec("INT32", [-1, 2], "sums")],
        Annotated[np.ndarray, TensorSpec("INT32", [-1, 2], "products")],
    ]:
        if 13 in left:
            raise ValueError("unlucky")
        return left + right, left * right

    return model


DATATYPES = (
    *("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"),
    *("FP16", "FP32", "FP64", "BYTES", "BF16"),
)


def make_kinds() -> Model:
    """A model of one input for each datatype, `in-FP32` say, which it sends back."""
    model = Model(
        "kinds",
        inputs=[TensorSpec(datatype, [2], f"in-{datatype}") for datatype in DATATYPES],
        outputs=[
            TensorSpec(datatype, [2], f"out-{datatype}") for datatype in DATATYPES
        ],
    )

    @model.predict
    async def predict(payload: InferRequest) -> dict[str, np.ndarray]:
        return {f"out-{name}": payload[f"in-{name}"] for name in DATATYPES}

    return model


def make_times(version: str) -> Model:
    """A model that multiplies by its version."""
    model = Model("times", version=version)
    factor = int(version)

    @model.predict
    async def predict(values: np.ndarray) -> np.ndarray:
        product: np.ndarray = values * factor
        return product

    return model


def make_loads() -> Model:
    """A model that answers how often it was loaded."""
    model = Model("loads")
    loads = itertools.count(1)

    @model.load
    def load() -> int:
        return next(loads)

    @model.predict
    async def predict(values: np.ndarray, state: int) -> np.ndarray:
        return np.full(values.shape, state, np.int64)

    return model


def make_countdown() -> Model:
    """A model with a stream of declared answers: down to 1, at 13 it fails."""
    model = Model("countdown")

    @model.predict
    async def predict(
        start: Annotated[np.ndarray, TensorSpec("INT32", [1])],
    ) -> Annotated[AsyncIterator[np.ndarray], TensorSpec("INT32", [1], "number")]:
        for number in range(int(start[0]), 0, -1):
            if number == 13:
                raise ValueError("unlucky")
            yield np.array([number], np.int32)

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
