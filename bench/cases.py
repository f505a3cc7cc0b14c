"""The cases of the comparison, one row each, and the bodies that they send.

`handler` names the function that both server scripts define for the case, so that a
row cannot be measured with two different handlers. Bodies are made from a fixed seed:
two runs send the same bytes. Standard library only, since any interpreter may run it;
so the two gRPC messages are written by hand, and KServe's own classes read them back
before any load.
"""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Load:
    """Who keeps `connections` times `streams` requests in flight, and how they go.

    apart: the client waits for no processor that the server computes on, as it would on
    a machine of its own; see `machine.go_first`. Else it takes its turn.
    """

    program: Literal["wrk", "h2load"]
    protocol: Literal["HTTP/1.1", "HTTP/2", "gRPC"]
    connections: int
    streams: int = 1  # at a time on one connection
    apart: bool = False

    def __str__(self) -> str:
        streams = f" x {self.streams} streams" if self.streams > 1 else ""
        return f"{self.protocol}, {self.connections} connections{streams}"


WRK = Load("wrk", "HTTP/1.1", 16)
GRPC = Load("h2load", "gRPC", 4, 4)
# As many requests in flight either way, from the same program. h2load has one request
# at a time on an HTTP/1.1 connection where there is a body, so 64 connections it is.
HTTP2 = Load("h2load", "HTTP/2", 4, 16)
HTTP1 = Load("h2load", "HTTP/1.1", 64)
# For cases in which a server answers a few requests a second: with 16 in flight, what
# is begun and not answered when a round ends would be much of what the round counts.
FEW = Load("wrk", "HTTP/1.1", 4)

V1 = "/v1/models/echo:predict"
V2 = "/v2/models/echo/infer"
INFER = "/inference.GRPCInferenceService/ModelInfer"
# Where the JSON ends and tensors begin, in requests and answers (the binary tensor data
# extension of V2).
JSON_SIZE = "inference-header-content-length"
IMAGE = (1, 3, 224, 224)

Headers = tuple[tuple[str, str], ...]
JSON: Headers = (("content-type", "application/json"),)
PROTOBUF: Headers = (("content-type", "application/grpc"), ("te", "trailers"))


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to measure; `target` is the ratio to reach, to `against`.

    With `rival`, the other side is not KServe but kserve-lite itself, loaded so.
    `headers` go with every request; `seconds` is how long a round is, unless
    `--seconds` says. If a request has JSON_SIZE among its headers, so must its answer.
    """

    name: str
    path: str
    handler: str
    body: Callable[[], bytes]
    what: str
    target: float | None = None
    load: Load = WRK
    rival: Load | None = None
    headers: Headers = JSON
    seconds: int = 5

    @property
    def against(self) -> str:
        return "kserve" if self.rival is None else "kserve-lite-http1"


def _v1_row() -> bytes:
    return b'{"instances":[[1,2,3,4]]}'


def _v2_row() -> bytes:
    # With an id: without one each server makes up its own, and answers would differ.
    tensor = '{"name":"x","shape":[1,4],"datatype":"FP32","data":[1.0,2.0,3.0,4.0]}'
    return f'{{"id":"1","inputs":[{tensor}]}}'.encode()


def image_values() -> bytes:
    """1x3x224x224 float32 values, little-endian."""
    draw = random.Random(0)
    flat = [draw.gauss(0.0, 1.0) for _ in range(3 * 224 * 224)]
    return struct.pack(f"<{len(flat)}f", *flat)


def _image_doubles() -> tuple[float, ...]:
    # Each value is rounded to float32 and then written as a double, which is what a
    # client sends that calls `array.tolist()`: about 20 characters a number.
    packed = image_values()
    return struct.unpack(f"<{len(packed) // 4}f", packed)


def _v1_image() -> bytes:
    values = _image_doubles()
    rows = [values[start : start + 224] for start in range(0, len(values), 224)]
    image = [rows[start : start + 224] for start in range(0, len(rows), 224)]
    return json.dumps({"instances": [image]}, separators=(",", ":")).encode()


def _v2_image() -> bytes:
    tensor: dict[str, Any] = {"name": "x", "shape": IMAGE, "datatype": "FP32"}
    tensor["data"] = _image_doubles()
    return json.dumps({"id": "1", "inputs": [tensor]}, separators=(",", ":")).encode()


def binary_head(shape: Sequence[int]) -> bytes:
    """The JSON before one binary FP32 tensor, which asks for a binary answer too."""
    tensor: dict[str, Any] = {"name": "x", "shape": shape, "datatype": "FP32"}
    tensor["parameters"] = {"binary_data_size": 4 * math.prod(shape)}
    whole = {"id": "1", "parameters": {"binary_data_output": True}, "inputs": [tensor]}
    return json.dumps(whole, separators=(",", ":")).encode()


def binary_headers(head: bytes) -> Headers:
    # Not application/json: KServe parses such a body as JSON as a whole, and fails.
    kind = ("content-type", "application/octet-stream")
    return (kind, (JSON_SIZE, str(len(head))))


def _v2_binary() -> bytes:
    return binary_head(IMAGE) + image_values()


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, content: bytes) -> bytes:
    """A protobuf field of wire type 2: string, bytes, message or packed numbers."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _model_infer(shape: Sequence[int], values: bytes, *, raw: bool) -> bytes:
    """A ModelInferRequest with one FP32 input, behind the five bytes of gRPC.

    The field numbers are those of grpc_predict_v2.proto; `raw` chooses between
    raw_input_contents (7) and fp32_contents (6) of the input's contents (5).
    """
    tensor = _field(1, b"x") + _field(2, b"FP32")
    tensor += _field(3, b"".join(map(_varint, shape)))
    if not raw:
        tensor += _field(5, _field(6, values))
    message = _field(1, b"echo") + _field(3, b"1") + _field(5, tensor)
    if raw:
        message += _field(7, values)
    return struct.pack(">BI", 0, len(message)) + message


def _grpc_row() -> bytes:
    return _model_infer([1, 4], struct.pack("<4f", 1.0, 2.0, 3.0, 4.0), raw=False)


def _grpc_raw() -> bytes:
    return _model_infer(IMAGE, image_values(), raw=True)


def _grpc_typed() -> bytes:
    return _model_infer(IMAGE, image_values(), raw=False)


CASES = (
    Case("v1-echo", V1, "echo", _v1_row, "V1 JSON echo, async def", target=10.0),
    Case("v2-echo", V2, "tensor", _v2_row, "V2 JSON echo of FP32 [1,4], async def"),
    Case("v1-sync", V1, "echo_sync", _v1_row, "V1 JSON echo, def"),
    Case("v1-image", V1, "image", _v1_image, "V1 JSON 1x3x224x224 to FP32, mean"),
    Case(
        "v2-binary",
        V2,
        "large_tensor",
        _v2_binary,
        "V2 binary echo of FP32 1x3x224x224, binary out, async def",
        target=40.0,
        load=FEW,
        headers=binary_headers(binary_head(IMAGE)),
        seconds=10,
    ),
    Case(
        "v2-json",
        V2,
        "large_tensor",
        _v2_image,
        "V2 JSON echo of FP32 1x3x224x224, flat data, async def",
        target=15.0,
        load=FEW,
        seconds=30,
    ),
    Case(
        "grpc-small",
        INFER,
        "tensor",
        _grpc_row,
        "gRPC echo of FP32 [1,4] in fp32_contents, async def",
        target=5.0,
        load=GRPC,
        headers=PROTOBUF,
    ),
    Case(
        "grpc-raw",
        INFER,
        "image_v2",
        _grpc_raw,
        "gRPC 1x3x224x224 FP32 in raw_input_contents, mean",
        target=1.2,
        load=GRPC,
        headers=PROTOBUF,
    ),
    Case(
        "grpc-typed",
        INFER,
        "image_v2",
        _grpc_typed,
        "gRPC 1x3x224x224 FP32 in fp32_contents, mean",
        target=10.0,
        load=GRPC,
        headers=PROTOBUF,
    ),
    Case(
        "v2-http2",
        V2,
        "tensor",
        _v2_row,
        "V2 JSON echo of FP32 [1,4], HTTP/2 next to HTTP/1.1",
        target=1.0,
        load=HTTP2,
        rival=HTTP1,
    ),
)
