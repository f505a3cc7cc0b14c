"""The models of the recorded requests, written with the decorators.

Each does what its namesake in the contract's `golden/models.py` does, which is written
for KServe's SDK.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any

import numpy as np

from kserve_lite import (
    InferenceError,
    InferRequest,
    InferResponse,
    InvalidInput,
    Model,
    ModelNotFound,
    ModelNotReady,
    ServerNotReady,
    Tensor,
    TensorSpec,
    UnsupportedProtocol,
)

Payload = Any

echo = Model("echo")
util = Model("util")
meta = Model("meta")
notready = Model("notready")
boom = Model("boom")
hdr = Model("hdr")
hdrstr = Model("hdrstr")
ret = Model("ret")
v2dict = Model("v2dict")
show = Model("show")
loadable = Model("loadable")


@echo.predict
async def echo_predict(payload: dict[str, Any] | InferRequest) -> object:
    if isinstance(payload, InferRequest):
        return InferResponse(
            tuple(Tensor(t.name, t.array, t.datatype) for t in payload.inputs),
            id=payload.id or "gen-id",
        )
    return {"predictions": payload["instances"]}


@echo.explain
async def echo_explain(payload: dict[str, Any]) -> object:
    return {"explanations": payload["instances"]}


@util.predict
def util_predict(values: np.ndarray) -> np.ndarray:
    return values if values.dtype == object else values * 2


@meta.predict
def meta_predict(
    values: Annotated[np.ndarray, TensorSpec("FP32", [-1, 4], "in")],
) -> Annotated[np.ndarray, TensorSpec("FP32", [-1, 3], "out")]:
    return values[:, :3]


@notready.predict
def notready_predict(payload: Payload) -> object:
    return {"predictions": [0]}


@notready.ready
async def notready_ready() -> bool:
    return False


@boom.predict
async def boom_predict(payload: Payload) -> object:
    parameters = (
        payload.parameters if isinstance(payload, InferRequest) else dict(payload)
    )
    errors: dict[str, BaseException] = {
        "ValueError": ValueError("boom secret=/etc/x"),
        "InvalidInput": InvalidInput("bad input"),
        "InferenceError": InferenceError("inf err"),
        "InferenceErrorStatus": InferenceError("inf err", status="STAT"),
        "NotImplementedError": NotImplementedError("nope"),
        "ModelNotFound": ModelNotFound("zz"),
        "ModelNotReady": ModelNotReady("zz", "detail"),
        "UnsupportedProtocol": UnsupportedProtocol("v9"),
        "KeyError": KeyError("k"),
        "TimeoutError": TimeoutError(),
        "ServerNotReady": ServerNotReady("why"),
        "CancelledError": asyncio.CancelledError(),
        "SystemError": SystemError("sys"),
    }
    raise errors[parameters.get("kind", "ValueError")]


@hdr.predict
async def hdr_predict(payload: Payload, response_headers: dict[str, str]) -> object:
    response_headers["x-my-header"] = "v1"
    response_headers["content-type"] = "application/x-mine"
    response_headers["content-length"] = "1"
    if isinstance(payload, InferRequest):
        one = Tensor("o", np.array([1], np.int32), "INT32")
        return InferResponse((one,), id="x")
    return {"predictions": [1]}


@hdrstr.predict
async def hdrstr_predict(payload: Payload, response_headers: dict[str, str]) -> str:
    response_headers["x-my-header"] = "v1"
    response_headers["content-type"] = "text/csv"
    return "a,b\n1,2\n"


async def events() -> AsyncIterator[str]:
    for number in range(3):
        yield f"data: {number}\n\n"


async def dicts() -> AsyncIterator[object]:
    yield {"a": 1}


async def broken() -> AsyncIterator[str]:
    yield "one"
    raise ValueError("mid-stream")


def plain() -> Iterator[str]:
    yield "x"
    yield "y"


@ret.predict
async def ret_predict(payload: dict[str, Any]) -> object:
    kinds: dict[str, Any] = {
        "str": "hello",
        "bytes": b"\x00\xffraw",
        "list": [1, 2],
        "int": 3,
        "none": None,
        "asyncgen": events,
        "asyncgendict": dicts,
        "asyncgenerr": broken,
        "syncgen": plain,
        "np": {"predictions": np.arange(6, dtype=np.float32).reshape(2, 3)},
        "npscalar": {"predictions": [np.float32(1.5)]},
        "nan": {"predictions": [float("nan"), float("inf"), 1.0]},
        "ndarray": np.arange(3),
        "nonstr": {1: 2},
        "bytesdict": {"a": b"x"},
        "set": {1, 2},
        "bigint": {"a": 2**63},
        "hugeint": {"a": 2**70},
    }
    value = kinds[payload["kind"]]
    return value() if callable(value) else value


@v2dict.predict
async def v2dict_predict(payload: InferRequest | dict[str, Any]) -> object:
    if not isinstance(payload, InferRequest):
        raise AttributeError("'dict' object has no attribute 'parameters'")
    numbers = {"name": "o", "shape": [2], "datatype": "INT32", "data": [1, 2]}
    answer: dict[str, Any] = {"id": "i1", "model_name": "v2dict", "outputs": [numbers]}
    pair = np.array([1, 2], np.int32)
    one = Tensor("o", np.array([1], np.int32), "INT32")
    match payload.parameters.get("kind", "ok"):
        case "ok":
            return answer
        case "noid":
            return {"outputs": [numbers]}
        case "grpcdict":
            typed = {"name": "o", "shape": [2], "datatype": "INT32"}
            return answer | {
                "outputs": [typed | {"contents": {"int_contents": [1, 2]}}]
            }
        case "nodata":
            return answer | {
                "outputs": [{"name": "o", "shape": [3], "datatype": "INT32"}]
            }
        case "list":
            return [1]
        case "bytes":
            return b"rawbytes"
        case "str":
            return "astring"
        case "extra":
            parameters = {"p": "q", "f": 1.5, "b": True, "i": 3}
            return answer | {
                "extra": 1,
                "parameters": parameters,
                "model_version": "7",
            }
        case "params":
            own = {"content_type": "np", "n": 1, "b": True}
            return InferResponse(
                (Tensor("o", pair, "INT32", own),),
                id="rid",
                model_version="3",
                parameters={"a": "b", "n": 1, "t": True},
            )
        case "wrongshape":
            return answer | {"outputs": [numbers | {"shape": [3]}]}
        case "empty":
            nothing = Tensor("o", np.array([], np.int32), "INT32")
            return InferResponse((nothing,), id="rid")
        case "noneid":
            return InferResponse((one,))
        case "intid":
            return answer | {"id": 7}
        case "bf16":
            half = {"name": "o", "shape": [1], "datatype": "BF16", "data": [1.0]}
            return answer | {"outputs": [half]}
        case "fp16":
            half_array = np.array([1.5], np.float16)
            return InferResponse((Tensor.from_array("o", half_array),), id="rid")
        case "nan":
            odd = np.array([np.nan, np.inf, 1.0], np.float32)
            return InferResponse((Tensor.from_array("o", odd),), id="rid")
        case "asyncgen":
            return events()
    raise AssertionError("an unknown kind")


@show.predict
async def show_predict(payload: Payload, headers: dict[str, str]) -> object:
    if isinstance(payload, InferRequest):
        return InferResponse((Tensor("o", np.array(["x"]), "BYTES"),), id="x")
    plain_value = payload if isinstance(payload, (dict, list, str, int)) else None
    return {
        "type": type(payload).__name__,
        "payload": repr(payload) if plain_value is None else plain_value,
        "headers": dict(headers),
    }


@loadable.predict
async def loadable_predict(payload: dict[str, Any] | InferRequest) -> object:
    return await echo_predict(payload)


MODELS = (echo, util, meta, notready, boom, hdr, hdrstr, ret, v2dict, show, loadable)
