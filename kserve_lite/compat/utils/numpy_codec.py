"""Datatypes of the protocol to numpy's and back, as KServe's SDK names the functions.

BF16 is ml_dtypes' bfloat16; KServe has none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kserve_lite.tensors import DATATYPES, numpy_dtype

if TYPE_CHECKING:
    import numpy as np

_BY_DTYPE = {row.dtype: row.name for row in DATATYPES.values()}


def to_np_dtype(dtype: str) -> Any:
    """Return numpy's type for a datatype, `np.float32` for FP32; None: no such one."""
    if dtype not in DATATYPES:
        return None
    found = numpy_dtype(dtype)
    return bool if dtype == "BOOL" else found.type


def from_np_dtype(np_dtype: np.dtype[Any] | type[Any]) -> str | None:
    """Return the datatype for numpy's type, or None: text and dates are BYTES."""
    import numpy as np

    dtype: np.dtype[Any] = np.dtype(np_dtype)
    return "BYTES" if dtype.kind in "SUOM" else _BY_DTYPE.get(dtype.name)
