"""BYTES tensors: arrays of any text to bytes and to raw bytes, and back."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from kserve_lite.codecs.raw_tensors import objects, raw_of
from kserve_lite.compat.errors import InferenceError, InvalidInput
from kserve_lite.tensors import Tensor

if TYPE_CHECKING:
    import numpy as np


def serialize_byte_tensor(input_tensor: np.ndarray) -> np.ndarray:
    """Return the raw bytes of a BYTES tensor as the one element of an object array.

    An empty tensor gives an array without elements. Raises InferenceError for arrays
    of numbers.
    """
    import numpy as np

    if not input_tensor.size:
        return np.empty([0], np.object_)
    wrapped = np.empty((), np.object_)
    wrapped[()] = bytes(raw_of(Tensor("", as_bytes(input_tensor), "BYTES")))
    return wrapped


def deserialize_bytes_tensor(encoded_tensor: bytes) -> np.ndarray:
    """Return the elements of a raw BYTES tensor as a flat array of bytes.

    Raises InvalidInput where the bytes end amid an element.
    """
    data = bytes(encoded_tensor)
    elements: list[bytes] = []
    position = 0
    while position < len(data):
        begin = position + 4
        length = (
            struct.unpack_from("<I", data, position)[0] if begin <= len(data) else 4
        )
        position = begin + length
        if position > len(data):
            raise InvalidInput(
                f"A raw BYTES tensor ends amid its element {len(elements)}."
            )
        elements.append(data[begin:position])
    return objects(elements)


def as_bytes(array: np.ndarray) -> np.ndarray:
    """Return an array of bytes, text, dates or any objects as one of bytes, flat.

    What is not bytes is written as UTF-8, a date in ISO 8601. Raises InferenceError for
    arrays of numbers.
    """
    if array.dtype.kind not in "OSUM":
        raise InferenceError(f"A BYTES tensor cannot be made of {array.dtype} values.")
    if array.dtype.kind == "M":
        array = array.astype(object)
    flat = array.reshape(-1).tolist()
    return objects([e if isinstance(e, bytes) else str(e).encode() for e in flat])


def text_array(array: np.ndarray) -> np.ndarray:
    """Return an array of bytes as one of str, where they are UTF-8."""
    flat = objects([decoded(element) for element in array.reshape(-1).tolist()])
    return flat.reshape(array.shape)


def decoded(element: Any) -> Any:
    """Return bytes as str where they are UTF-8; all else as it is."""
    try:
        return element.decode() if isinstance(element, bytes) else element
    except UnicodeDecodeError:
        return element


def utf8(array: np.ndarray, name: str) -> list[str]:
    """Return a flat array of bytes as str; raise InferenceError where it is no text."""
    try:
        return [element.decode() for element in array.tolist()]
    except UnicodeDecodeError:
        raise InferenceError(
            f"'{name}' holds bytes that are not UTF-8, which JSON cannot say: send it "
            "as binary data."
        ) from None
