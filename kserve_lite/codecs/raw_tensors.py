"""Raw tensors to arrays and back, and the checks that REST and gRPC word alike.

A raw tensor is its elements in row-major order, little-endian, with nothing between;
an element of BYTES is its length as a uint32 and that many bytes, a BOOL is one byte.
So they travel after the JSON of a REST body (the binary tensor extension,
https://github.com/kserve/open-inference-protocol) and in gRPC's raw contents. Numbers
are not copied in either direction. Nothing here knows JSON or protobuf.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence, Sized
from functools import cache
from struct import Struct
from typing import TYPE_CHECKING, Any

from kserve_lite.errors import InvalidInput, Unsupported
from kserve_lite.messages import MAX_ENTRIES, RequestedOutput
from kserve_lite.tensors import (
    DATATYPES,
    Tensor,
    describe,
    element_count,
    numpy_dtype,
)

if TYPE_CHECKING:
    import numpy as np

    from kserve_lite.wire.events import Buffer

_LENGTH = Struct("<I")


@cache
def little_endian(datatype: str) -> np.dtype[Any]:
    """The numpy dtype of a datatype as its bytes travel; BYTES has none."""
    dtype = numpy_dtype(datatype)
    # newbyteorder would make another object of it, which prints in another way.
    return dtype if sys.byteorder == "little" else dtype.newbyteorder("<")


# --- in -------------------------------------------------------------------------------


def from_raw(
    data: Buffer, datatype: str, shape: tuple[int, ...], name: str
) -> np.ndarray:
    """Return the raw bytes of one tensor as an array of `shape`, a view on `data`.

    What is no view: BYTES, and a BOOL with a byte other than 0 and 1, which would be
    neither true nor false to numpy. Raises InvalidInput where the bytes do not fit.
    """
    import numpy as np

    if datatype == "BYTES":
        return shaped(_split(data, shape, name), datatype, shape, name)
    expected = DATATYPES[datatype].width * element_count(shape)
    if len(data) != expected:
        raise InvalidInput(
            f"Input '{name}' of shape {describe(datatype, shape)} must have "
            f"{expected} bytes, got {len(data)}."
        )
    if datatype == "BOOL":
        array = np.frombuffer(data, np.uint8)
        array = array.view(bool) if not (array > 1).any() else array != 0
    else:
        array = np.frombuffer(data, little_endian(datatype))
    return shaped(array, datatype, shape, name)


def _split(data: Buffer, shape: tuple[int, ...], name: str) -> np.ndarray:
    """The elements of BYTES, flat; never more than the shape has.

    A sender that says one element and sends a million costs one.
    """
    data = bytes(data)
    count = element_count(shape)
    unpack = _LENGTH.unpack_from
    elements: list[bytes] = []
    position, size = 0, len(data)
    while position < size and len(elements) < count:
        begin = position + 4
        end = begin + (unpack(data, position)[0] if begin <= size else 0)
        if end > size:
            raise InvalidInput(
                f"Input '{name}' of shape {describe('BYTES', shape)}: element "
                f"{len(elements)} needs {end - position} bytes, "
                f"{size - position} are left."
            )
        elements.append(data[begin:end])
        position = end
    if position < size:
        raise InvalidInput(
            f"Input '{name}' of shape {describe('BYTES', shape)} must have {count} "
            f"elements; {size - position} bytes are left after them."
        )
    return objects(elements)


def objects(elements: Sequence[bytes]) -> np.ndarray:
    """Return a flat array of BYTES."""
    import numpy as np

    return np.fromiter(elements, object, len(elements))


def shaped(
    array: np.ndarray, datatype: str, shape: tuple[int, ...], name: str
) -> np.ndarray:
    """Give an array its shape; raise InvalidInput where it has not as many elements."""
    count = element_count(shape)
    if array.size != count:
        raise InvalidInput(
            f"Input '{name}' of shape {describe(datatype, shape)} must have "
            f"{count} elements, got {array.size}."
        )
    try:
        return array.reshape(shape)
    except ValueError:  # no elements, and sizes whose product numpy cannot hold
        raise InvalidInput(
            f"Input '{name}': no tensor can have the shape {describe(datatype, shape)}."
        ) from None


# --- out ------------------------------------------------------------------------------


def raw_of(tensor: Tensor) -> Buffer:
    """Return the raw bytes of a tensor, of numbers in one piece without copying them.

    Raises TypeError or ValueError where the array holds what the tensor's datatype
    cannot, in words for the author of the model.
    """
    flat = flattened(tensor)
    if tensor.datatype != "BYTES":
        return octets(flat)
    pack = _LENGTH.pack
    elements = elements_of(flat)
    return b"".join([part for e in elements for part in (pack(len(e)), e)])


def flattened(tensor: Tensor) -> np.ndarray:
    """The values in row-major order, of the type that the tensor says; see `raw_of`."""
    flat = tensor.array.reshape(-1)
    if tensor.datatype == "BYTES":
        return flat
    dtype = little_endian(tensor.datatype)
    if flat.dtype == dtype:
        return flat
    # A Tensor may be built by hand, with an array of another type than it says.
    cast: np.ndarray = flat.astype(dtype, casting="same_kind")
    if dtype.kind in "iu" and not (cast == flat).all():
        raise ValueError(f"output '{tensor.name}' has values beyond {tensor.datatype}")
    return cast


def octets(flat: np.ndarray) -> memoryview:
    """The bytes of a flat array, copied only where it is not in one piece."""
    import numpy as np

    return np.ascontiguousarray(flat).view(np.uint8).data


def elements_of(flat: np.ndarray) -> list[bytes]:
    """The elements of a BYTES array; text is written as UTF-8."""
    came: list[Any] = flat.tolist()
    if set(map(type, came)) == {bytes}:
        return came
    elements = []
    for element in came:
        if isinstance(element, str):
            element = element.encode()
        elif not isinstance(element, bytes):
            raise TypeError(
                f"an element of BYTES must be bytes or str, not "
                f"{type(element).__name__}"
            )
        elements.append(element)
    return elements


def joined(pieces: Iterable[Buffer], *, below: float) -> list[Buffer]:
    """Join neighbours of fewer than `below` bytes: only large pieces stand alone."""
    together: list[Buffer] = []
    small: list[Buffer] = []
    for piece in pieces:
        if len(piece) < below:
            small.append(piece)
            continue
        if small:
            together.append(b"".join(small))
            small = []
        together.append(piece)
    if small:
        together.append(b"".join(small))
    return together


# --- checks of a request --------------------------------------------------------------


def known_datatype(datatype: object, name: str) -> str:
    """Return a datatype that the protocol has; raise InvalidInput for all else."""
    if isinstance(datatype, str) and datatype in DATATYPES:
        return datatype
    # Only what is short and plain is named: never a request's data.
    plain = (
        isinstance(datatype, str)
        and len(datatype) <= 16
        and datatype.isascii()
        and datatype.isalnum()
    )
    came = f"'{datatype}'" if plain else "something else"
    raise InvalidInput(
        f"Input '{name}' must have a datatype out of {', '.join(DATATYPES)}; "
        f"got {came}."
    )


def check_count(what: str, entries: Sized) -> None:
    """Raise InvalidInput for more than MAX_ENTRIES of something."""
    if len(entries) > MAX_ENTRIES:
        raise InvalidInput(
            f"A request may have at most {MAX_ENTRIES} {what}, got {len(entries)}."
        )


# Parameters of a requested output by which Triton's extensions ask for another kind of
# answer.
NOT_OFFERED = frozenset(("classification", "shared_memory_region"))


def check_names(inputs: Sequence[Tensor], outputs: Sequence[RequestedOutput]) -> None:
    """Raise InvalidInput where two inputs, or two requested outputs, share a name.

    An output asked for a thousand times would be written a thousand times: a small
    request for a huge answer. Raises Unsupported for an output that is wanted in a way
    that is not offered: the client would take the plain tensor for what it asked for.
    """
    if len(inputs) > 1 and len({tensor.name for tensor in inputs}) != len(inputs):
        raise InvalidInput("Two inputs have the same name.")
    if len(outputs) > 1 and len({output.name for output in outputs}) != len(outputs):
        raise InvalidInput("Two requested outputs have the same name.")
    for output in outputs:
        if output.parameters and not NOT_OFFERED.isdisjoint(output.parameters):
            raise Unsupported(
                "Outputs come as tensors in the answer: neither as classes "
                "(classification) nor in shared memory."
            )
