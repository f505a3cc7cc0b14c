"""Datatypes and tensors of the Open Inference Protocol.

`DATATYPES` is the one table of datatypes; every codec walks it. numpy is imported where
it is first needed, not here: a model that only handles JSON never pays for it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from kserve_lite.errors import InvalidInput, ModelDefinitionError

if TYPE_CHECKING:
    import numpy as np

Parameters: TypeAlias = Mapping[str, Any]


class Datatype(NamedTuple):
    """One datatype: its protocol name, its numpy dtype, its width in bytes.

    `width` is 0 for BYTES, whose elements differ in length. `kind` groups datatypes by
    what a JSON element must be: "bool", "int", "float" or "bytes".
    """

    name: str
    dtype: str
    width: int
    kind: str


DATATYPES: dict[str, Datatype] = {
    row.name: row
    for row in (
        Datatype("BOOL", "bool", 1, "bool"),
        Datatype("UINT8", "uint8", 1, "int"),
        Datatype("UINT16", "uint16", 2, "int"),
        Datatype("UINT32", "uint32", 4, "int"),
        Datatype("UINT64", "uint64", 8, "int"),
        Datatype("INT8", "int8", 1, "int"),
        Datatype("INT16", "int16", 2, "int"),
        Datatype("INT32", "int32", 4, "int"),
        Datatype("INT64", "int64", 8, "int"),
        Datatype("FP16", "float16", 2, "float"),
        Datatype("BF16", "bfloat16", 2, "float"),
        Datatype("FP32", "float32", 4, "float"),
        Datatype("FP64", "float64", 8, "float"),
        Datatype("BYTES", "object", 0, "bytes"),
    )
}
_BY_DTYPE = {row.dtype: row.name for row in DATATYPES.values()}


def numpy_dtype(datatype: str) -> np.dtype[Any]:
    """Return the numpy dtype of a protocol datatype; BF16 is ml_dtypes' bfloat16."""
    import numpy as np

    if datatype == "BF16":
        import ml_dtypes

        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(DATATYPES[datatype].dtype)


def datatype_of(array: np.ndarray) -> str | None:
    """Return the protocol datatype of an array; None where the protocol has none.

    numpy's str_ and bytes_ arrays count as BYTES, as does an array of objects.
    """
    if array.dtype.kind in "SUO":
        return "BYTES"
    return _BY_DTYPE.get(array.dtype.name)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What an input or output is declared to be.

    datatype: a protocol datatype, "FP32" say.
    shape: one number a dimension; -1 stands for any size.
    name: the tensor's name; default: the parameter's name for an input, `output-N` for
        an output.
    optional: whether requests may leave the input out; outputs are never optional.

    Used in an annotation, `Annotated[np.ndarray, TensorSpec("FP32", [-1, 4])]`, or in
    `Model(inputs=..., outputs=...)`, it is shown as metadata and enforced. Raises
    ModelDefinitionError for a datatype or shape that cannot be.
    """

    datatype: str
    shape: Sequence[int]
    name: str | None = None
    optional: bool = False

    def __post_init__(self) -> None:
        if self.datatype not in DATATYPES:
            raise ModelDefinitionError(
                f"TensorSpec has the unknown datatype {self.datatype!r}: "
                f"use one of {', '.join(DATATYPES)}."
            )
        if any(not isinstance(size, int) or size < -1 for size in self.shape):
            raise ModelDefinitionError(
                f"TensorSpec has the shape {self.shape!r}: "
                "use whole numbers, -1 for a size that may vary."
            )
        object.__setattr__(self, "shape", tuple(self.shape))

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of `shape` is within the declared shape."""
        return len(shape) == len(self.shape) and all(
            want in (-1, got) for want, got in zip(self.shape, shape, strict=True)
        )


@dataclass(slots=True)  # not frozen: see messages.py
class Tensor:
    """A named array with its protocol datatype.

    array: the values in their shape; BYTES is an object array of `bytes`.
    parameters: the tensor's own parameters, empty where the request had none.
    """

    name: str
    array: np.ndarray
    datatype: str
    parameters: Parameters = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @classmethod
    def from_array(
        cls, name: str, array: np.ndarray, parameters: Parameters | None = None
    ) -> Tensor:
        """Make a tensor of an array, its datatype told by the array's dtype.

        Arrays in the other byte order are converted: every codec writes native bytes.
        Raises TypeError for a dtype that the protocol has no datatype for.
        """
        datatype = datatype_of(array)
        if datatype is None:
            raise TypeError(
                f"the protocol has no datatype for arrays of {array.dtype}; "
                f"cast to one of {', '.join(_BY_DTYPE)}"
            )
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        return cls(name, array, datatype, parameters or {})


def element_count(shape: Iterable[int]) -> int:
    """How many elements a tensor of `shape` has; 1 for the shape ()."""
    return math.prod(shape)


def describe(datatype: str | None, shape: Iterable[int]) -> str:
    """Name a datatype and shape in an error: `FP32[-1,4]`."""
    return f"{datatype or 'tensor'}[{','.join(map(str, shape))}]"


def check_fits(tensor: Tensor, spec: TensorSpec) -> None:
    """Raise InvalidInput, naming input, expected and got, unless the tensor fits."""
    if tensor.datatype != spec.datatype or not spec.fits(tensor.shape):
        raise InvalidInput(
            f"Input '{tensor.name}' must be {describe(spec.datatype, spec.shape)}, "
            f"got {describe(tensor.datatype, tensor.shape)}."
        )


def is_array(value: object) -> bool:
    """Whether a value is a numpy array or a torch tensor; imports neither."""
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    return (numpy is not None and isinstance(value, numpy.ndarray)) or (
        torch is not None and isinstance(value, torch.Tensor)
    )


def as_numpy(value: Any) -> np.ndarray:
    """Return a numpy array or torch tensor as a numpy array, sharing memory if it can.

    A torch tensor is detached and, from an accelerator, copied; bfloat16, which torch
    does not hand to numpy, crosses as its bits.
    """
    import numpy as np

    if isinstance(value, np.ndarray):
        return value
    tensor = value.detach().cpu()
    import torch

    if tensor.dtype == torch.bfloat16:
        bits: np.ndarray = tensor.contiguous().view(torch.int16).numpy()
        return bits.view(numpy_dtype("BF16"))
    return np.asarray(tensor.numpy())


def as_torch(array: np.ndarray, name: str) -> Any:
    """Return an array as a torch tensor that shares its memory where that is possible.

    Copies what torch cannot share: arrays that are read-only. Raises InvalidInput for
    BYTES, which torch has no tensor for.
    """
    import torch

    if array.dtype.kind == "O":
        raise InvalidInput(f"Input '{name}' is BYTES: this model takes numbers.")
    if not array.flags.writeable:
        array = array.copy()
    if array.dtype.name == "bfloat16":
        import numpy as np

        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
