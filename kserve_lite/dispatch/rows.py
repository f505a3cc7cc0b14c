"""The rows of requests: what may go together, put together, and taken apart again.

Arrays are numpy's or torch's, by parameter name. Nothing here waits or knows the time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeAlias

from kserve_lite.errors import InvalidInput
from kserve_lite.tensors import is_array

# By parameter name: numpy arrays or torch tensors; None for an optional one left out.
Arrays: TypeAlias = Mapping[str, Any]


def measured(arrays: Arrays, most: int, parameters: Hashable) -> tuple[int, Hashable]:
    """The number of rows, and what requests of one batch have alike.

    Raises InvalidInput.
    """
    rows, first = 0, ""
    parts: list[Hashable] = []
    for name, array in arrays.items():
        if array is None:
            parts.append((name, None))
            continue
        shape = array.shape
        if not shape:
            raise InvalidInput(
                f"Input '{name}': the first dimension is that of the rows, "
                "got a scalar, of shape []."
            )
        if not first:
            rows, first = shape[0], name
            if not 0 < rows <= most:
                raise InvalidInput(
                    f"Input '{name}': expected 1 to {most} rows, got {rows}."
                )
        elif shape[0] != rows:
            raise InvalidInput(
                f"Input '{name}': expected {rows} rows as input '{first}' has, "
                f"got {shape[0]}."
            )
        parts.append((name, type(array), array.dtype, array.device, shape[1:]))
    if not first:
        raise InvalidInput(f"No input: expected one of 1 to {most} rows.")
    if len(parts) == 1:
        return rows, (parts[0], parameters)
    # The order is the client's.
    return rows, (frozenset(parts), parameters)


def joined(requests: list[Arrays]) -> dict[str, Any]:
    """The arrays of a batch; those of one request as they are."""
    if len(requests) == 1:
        return dict(requests[0])
    return {
        name: _concatenated([arrays[name] for arrays in requests])
        for name in requests[0]
    }


def _concatenated(arrays: list[Any]) -> Any:
    if arrays[0] is None:
        return None
    torch = sys.modules.get("torch")  # whoever has a tensor has imported it
    if torch is not None and isinstance(arrays[0], torch.Tensor):
        return torch.cat(arrays)
    import numpy as np

    return np.concatenate(arrays)


def split(result: Any, sizes: list[int], rows: int) -> list[Any]:
    """Each request's rows of a batch's result, as views, in its structure.

    Raises TypeError or ValueError in words for the author of the handler.
    """
    if is_array(result):
        _check_rows("an array", result, rows)
        return [result] if len(sizes) == 1 else _slices(result, sizes)
    if isinstance(result, dict):
        names, arrays = list(result), list(result.values())
    elif isinstance(result, tuple):
        names, arrays = list(range(len(result))), list(result)
    else:
        names, arrays = [], []
    if not arrays:
        raise TypeError(
            "with max_batch_size, a handler returns an array, or a tuple or dict of "
            f"arrays; it returned {_kind(result)}"
        )
    for name, array in zip(names, arrays, strict=True):
        if not is_array(array):
            raise TypeError(
                "with max_batch_size, a handler returns an array, or a tuple or dict "
                f"of arrays; its result {name!r} is {_kind(array)}"
            )
        _check_rows(f"result {name!r}", array, rows)
    if len(sizes) == 1:
        return [result]
    columns = zip(*(_slices(array, sizes) for array in arrays), strict=True)
    if isinstance(result, dict):
        return [dict(zip(names, column, strict=True)) for column in columns]
    make: Callable[[Any], Any] = getattr(result, "_make", tuple)  # a named tuple's
    return [make(column) for column in columns]


def _kind(value: Any) -> str:
    if isinstance(value, (tuple, dict)) and not value:
        return f"an empty {type(value).__name__}"
    return f"of type {type(value).__name__}"


def _check_rows(what: str, array: Any, rows: int) -> None:
    shape = tuple(array.shape)
    if not shape or shape[0] != rows:
        raise ValueError(
            f"a batch of {rows} rows needs results of {rows} rows: the handler "
            f"returned {what} of shape {list(shape)}"
        )


def _slices(array: Any, sizes: list[int]) -> list[Any]:
    slices, start = [], 0
    for size in sizes:
        slices.append(array[start : start + size])
        start += size
    return slices
