"""Where tensors stand in the messages of the inference service."""

from __future__ import annotations

from typing import NamedTuple


class Contents(NamedTuple):
    """Where a datatype's values stand in InferTensorContents.

    width: bytes of a value in the packed field, 0 for varints; None: not packed.
    dtype: numpy's name of what the field holds.
    """

    field: str
    number: int
    width: int | None
    dtype: str


_INT = Contents("int_contents", 2, 0, "int32")
_UINT = Contents("uint_contents", 4, 0, "uint32")
# FP16 and BF16 have no field: they travel raw.
CONTENTS: dict[str, Contents] = {
    "BOOL": Contents("bool_contents", 1, 0, "bool"),
    "INT8": _INT,
    "INT16": _INT,
    "INT32": _INT,
    "INT64": Contents("int64_contents", 3, 0, "int64"),
    "UINT8": _UINT,
    "UINT16": _UINT,
    "UINT32": _UINT,
    "UINT64": Contents("uint64_contents", 5, 0, "uint64"),
    "FP32": Contents("fp32_contents", 6, 4, "float32"),
    "FP64": Contents("fp64_contents", 7, 8, "float64"),
    "BYTES": Contents("bytes_contents", 8, None, "object"),
}
