"""The cases of the comparison, one row each, and the bodies that they send.

`handler` names the function that both server scripts define for the case, so that a
row cannot be measured with two different handlers. Bodies are made from a fixed seed:
two runs send the same bytes. Standard library only, since any interpreter may run it.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to measure; `target` is the ratio to KServe as shipped to reach."""

    name: str
    path: str
    handler: str
    body: Callable[[], bytes]
    what: str
    target: float | None = None


def _v1_row() -> bytes:
    return b'{"instances":[[1,2,3,4]]}'


def _v2_row() -> bytes:
    # With an id: without one each server makes up its own, and answers would differ.
    tensor = '{"name":"x","shape":[1,4],"datatype":"FP32","data":[1.0,2.0,3.0,4.0]}'
    return f'{{"id":"1","inputs":[{tensor}]}}'.encode()


def _v1_image() -> bytes:
    # Each value is rounded to float32 and then written as a double, which is what a
    # client sends that calls `array.tolist()`: about 20 characters a number.
    draw = random.Random(0)
    flat = [draw.gauss(0.0, 1.0) for _ in range(3 * 224 * 224)]
    layout = f"{len(flat)}f"
    values = struct.unpack(layout, struct.pack(layout, *flat))
    rows = [values[start : start + 224] for start in range(0, len(values), 224)]
    image = [rows[start : start + 224] for start in range(0, len(rows), 224)]
    return json.dumps({"instances": [image]}, separators=(",", ":")).encode()


V1 = "/v1/models/echo:predict"
V2 = "/v2/models/echo/infer"

CASES = (
    Case("v1-echo", V1, "echo", _v1_row, "V1 JSON echo, async def", target=10.0),
    Case("v2-echo", V2, "tensor", _v2_row, "V2 JSON echo of FP32 [1,4], async def"),
    Case("v1-sync", V1, "echo_sync", _v1_row, "V1 JSON echo, def"),
    Case("v1-image", V1, "image", _v1_image, "V1 JSON 1x3x224x224 to FP32, mean"),
)
