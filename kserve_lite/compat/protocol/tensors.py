"""InferInput and InferOutput: a tensor as code for KServe's SDK sees it.

Its values are what was given, a list or an array, or raw bytes; or they are an array
that nobody has looked at yet, as in every request that a server received and every
answer by `set_data_from_numpy`. A list or bytes are made of that only when `data` or
`_raw_data` is asked for. `to_rest` and `to_grpc` of the request or answer never change
a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from kserve_lite.codecs.raw_tensors import from_raw, raw_of
from kserve_lite.compat.errors import InferenceError, InvalidInput
from kserve_lite.compat.protocol.byte_tensors import (
    as_bytes,
    deserialize_bytes_tensor,
    text_array,
    utf8,
)
from kserve_lite.compat.protocol.parameters import BINARY_SIZE, plain_parameters
from kserve_lite.compat.utils.numpy_codec import from_np_dtype
from kserve_lite.tensors import DATATYPES, Tensor, numpy_dtype

if TYPE_CHECKING:
    import numpy as np


class InferTensor:
    """What inputs and outputs have in common.

    shape: a list; -1 is worked out from the data. datatype: made upper case.
    data: a flat or nested list, or an array; None where it is set later.
    parameters: plain values, or InferParameter messages.
    """

    # What is raised where values, shape and datatype do not fit together: it is the
    # client's fault for an input, the model's for an output.
    _misfit: type[ValueError] = ValueError

    def __init__(
        self,
        name: str,
        shape: list[int],
        datatype: str,
        data: Any = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        self._name = name
        self._shape = shape
        self._datatype = datatype.upper()
        self._parameters = parameters
        self._given = data
        self._octets: bytes | None = None
        # An array that stands for both until one is asked for, and how it is listed;
        # without a way it travels raw.
        self._array: np.ndarray | None = None
        self._listed: Callable[[np.ndarray], list[Any]] | None = None
        self._is_text = False  # whether the array's bytes are shown as str

    @classmethod
    def from_native(
        cls,
        tensor: Tensor,
        *,
        from_grpc: bool = False,
        raw: bool = False,
        as_sent: Callable[[], Any] | None = None,
    ) -> Self:
        """Wrap a tensor of a request or answer; its array is shared.

        from_grpc: the data are flat and BYTES stay bytes; else nested as the shape
        says, and BYTES that are UTF-8 are str. raw: over gRPC, `_raw_data` has the
        values and `data` is empty. as_sent: what gives the data of its JSON; it gives
        None where they are not there.
        """
        parameters = dict(tensor.parameters) or (None if from_grpc else {})
        made = cls(tensor.name, list(tensor.shape), tensor.datatype, None, parameters)
        made._array = tensor.array
        if raw:
            made._given = []
        elif from_grpc:
            made._array = tensor.array.reshape(-1)
            made._listed = _as_list
        else:
            made._is_text = tensor.datatype == "BYTES"
            made._listed = _as_list if as_sent is None else partial(_sent, as_sent)
        return made

    @property
    def name(self) -> str:
        return self._name

    @property
    def datatype(self) -> str:
        return self._datatype

    @property
    def shape(self) -> list[int]:
        return self._shape

    @shape.setter
    def shape(self, shape: list[int]) -> None:
        self._shape = shape

    @property
    def parameters(self) -> Any:
        return self._parameters

    @parameters.setter
    def parameters(self, parameters: Mapping[str, Any] | None) -> None:
        self._parameters = parameters

    @property
    def data(self) -> Any:
        """The values as a list or array; empty or None where they are raw."""
        self._settle()
        return self._given

    @data.setter
    def data(self, data: Any) -> None:
        if data is None:
            self._settle()
        else:  # in the place of whatever raw bytes there were
            self._octets = self._array = self._listed = None
        self._given = data

    @property
    def _raw_data(self) -> bytes | None:
        # Code for KServe's SDK looks at it: nothing else says how a tensor came.
        self._settle()
        return self._octets

    @_raw_data.setter
    def _raw_data(self, octets: bytes | None) -> None:
        self.set_raw(octets)

    def set_raw(self, octets: bytes | None) -> None:
        """Take raw bytes as the values, in the place of `data`; None: no more."""
        self._settle()
        self._octets = octets

    def _settle(self) -> None:
        """Have the values as a list or as bytes, which may then be changed."""
        array = self._array
        if array is None:
            return
        if self._listed is not None:
            self._given = self._listed(text_array(array) if self._is_text else array)
        else:
            self._octets = bytes(raw_of(Tensor(self._name, array, self._datatype)))
        self._array = self._listed = None

    def as_numpy(self) -> np.ndarray:
        """Return the values in their shape.

        An array of the caller's own; a read-only view where the values are raw. Raises
        InvalidInput (of an output ValueError) where values, shape and datatype do not
        fit together.
        """
        array = self._flat_or_shaped()
        if self._array is not None and self._listed is not None:
            array = text_array(array) if self._is_text else array.copy()
        return self._reshaped(array)

    def to_native(self) -> Tensor:
        """Return the tensor that codecs take, sharing an array; see `as_numpy`.

        Also raises where an array holds what the datatype cannot.
        """
        given = self._given
        array = self._array
        if array is None and self._octets is None and _is_array(given):
            if self._datatype == "BYTES":
                array = as_bytes(given)
            else:
                try:
                    dtype = self._dtype()
                    array = given.astype(dtype, casting="same_kind", copy=False)
                except TypeError:
                    raise InferenceError(
                        f"'{self._name}' is {self._datatype}: it cannot hold an array "
                        f"of {given.dtype}."
                    ) from None
        elif array is None:
            array = self._flat_or_shaped()
            if self._datatype == "BYTES" and self._octets is None:
                array = as_bytes(array)
        array = self._reshaped(array)
        parameters = plain_parameters(self._parameters)
        return Tensor(self._name, array, self._datatype, parameters)

    @property
    def is_raw(self) -> bool:
        """Whether the values are raw bytes, or an array that stands for them."""
        if self._array is not None:
            return self._listed is None
        return self._octets is not None

    @property
    def is_array(self) -> bool:
        """Whether `data` is an array: gRPC takes it raw, JSON as numbers."""
        return _is_array(self._given)

    @property
    def as_given(self) -> list[Any] | None:
        """The list that was given, unless it is of BYTES; None: there is none."""
        is_list = self._array is None and self._octets is None
        is_list = is_list and isinstance(self._given, list)
        return self._given if is_list and self._datatype != "BYTES" else None

    def read_raw(self, octets: bytes) -> None:
        """Take the values from a body's raw bytes, to be listed like JSON's."""
        self._octets = octets
        self._array, self._octets = self._reshaped(self._flat_or_shaped()), None
        self._array = self._array.reshape(-1)
        self._listed, self._is_text = _as_list, self._datatype == "BYTES"

    def _dtype(self) -> np.dtype[Any]:
        if self._datatype not in DATATYPES:
            raise self._misfit(
                f"'{self._name}' must have a datatype out of {', '.join(DATATYPES)}."
            )
        return numpy_dtype(self._datatype)

    def _flat_or_shaped(self) -> np.ndarray:
        """The values as an array of the datatype, in whatever shape they are."""
        import numpy as np

        dtype = self._dtype()
        if self._array is not None:
            return self._array
        if self._octets is not None:
            return self._of_raw(self._octets, dtype)
        if self._given is None:
            raise self._misfit(f"'{self._name}' has no data.")
        try:
            return np.array(self._given, dtype)
        except (ValueError, TypeError, OverflowError):
            raise self._misfit(
                f"'{self._name}': the data are no {self._datatype} tensor."
            ) from None

    def _of_raw(self, octets: bytes, dtype: np.dtype[Any]) -> np.ndarray:
        """The values of raw bytes, flat."""
        if self._datatype == "BYTES":
            try:
                return deserialize_bytes_tensor(octets)
            except InvalidInput as fault:
                raise self._misfit(f"'{self._name}': {fault.reason}") from None
        count, rest = divmod(len(octets), dtype.itemsize)
        if rest:
            raise self._misfit(
                f"'{self._name}' has {len(octets)} raw bytes, and {dtype.itemsize} "
                f"make one {self._datatype}."
            )
        return from_raw(octets, self._datatype, (count,), self._name)

    def _reshaped(self, array: np.ndarray) -> np.ndarray:
        if list(array.shape) == list(self._shape):
            return array
        try:
            return array.reshape(tuple(self._shape))
        except ValueError:
            raise self._misfit(
                f"'{self._name}' has {array.size} elements, which do not make the "
                f"shape {list(self._shape)}."
            ) from None

    def set_data_from_numpy(self, tensor: np.ndarray, binary_data: bool = True) -> None:
        """Take the values of an array, which is copied.

        binary_data: they travel as raw bytes, and `parameters` says how many; else as
        JSON numbers or typed contents, BYTES as text. Raises InferenceError for what is
        no array of the datatype and shape, and for bytes that text cannot say.
        """
        import numpy as np

        if not isinstance(tensor, np.ndarray):
            raise InferenceError(
                f"'{self._name}' must be set from a numpy array, not from a "
                f"{type(tensor).__name__}."
            )
        came = from_np_dtype(tensor.dtype)
        if came != self._datatype:
            raise InferenceError(
                f"'{self._name}' is {self._datatype}, the array is "
                f"{came or tensor.dtype}."
            )
        if list(tensor.shape) != list(self._shape):
            raise InferenceError(
                f"'{self._name}' has the shape {list(self._shape)}, the array "
                f"{list(tensor.shape)}."
            )
        parameters = dict(self._parameters or {})
        parameters.pop(BINARY_SIZE, None)
        is_bytes = self._datatype == "BYTES"
        array = as_bytes(tensor) if is_bytes else tensor.reshape(-1).copy()
        self._given = self._octets = self._array = self._listed = None
        if binary_data:
            array.flags.writeable = False
            self._array = array
            size = len(raw_of(Tensor(self._name, array, self._datatype)))
            parameters[BINARY_SIZE] = size
        elif is_bytes:
            self._given = utf8(array, self._name)
        else:
            self._array, self._listed = array, _as_list
        if parameters or self._parameters is not None:
            self._parameters = parameters

    def __eq__(self, other: object) -> bool:
        return (
            type(other) is type(self)
            and self._name == other._name
            and list(self._shape) == list(other._shape)
            and self._datatype == other._datatype
            and self._parameters == other._parameters
            and _equal(self.data, other.data)
            and self._raw_data == other._raw_data
        )

    __hash__ = None  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self._name,
            "shape": self._shape,
            "datatype": self._datatype,
            "data": self.data,
            "parameters": self._parameters,
        }

    def __repr__(self) -> str:
        return shown(self.to_dict())


class InferInput(InferTensor):
    """An input of a request."""

    _misfit = InvalidInput

    def as_string(self) -> list[str]:
        """Return the elements of BYTES as text, flat; raise InvalidInput for others."""
        if self._datatype != "BYTES":
            raise InvalidInput(f"'{self._name}' is {self._datatype}, not BYTES.")
        elements = as_bytes(self._flat_or_shaped()).tolist()
        try:
            return [element.decode() for element in elements]
        except UnicodeDecodeError:
            raise InvalidInput(
                f"'{self._name}' holds bytes that are no text."
            ) from None


class InferOutput(InferTensor):
    """An output of an answer."""


def shown(members: Mapping[str, Any]) -> str:
    """Members as KServe's SDK prints its objects: JSON's look, Python's values."""
    quoted = ("name", "datatype", "id", "model_name")
    return ",".join(
        f'"{name}": "{value}"' if name in quoted else f'"{name}": {value}'
        for name, value in members.items()
    )


def _as_list(array: np.ndarray) -> list[Any]:
    values: list[Any] = array.tolist()
    return values


def _sent(as_sent: Callable[[], Any], array: np.ndarray) -> Any:
    data = as_sent()
    return _as_list(array.reshape(-1)) if data is None else data


def _is_array(value: object) -> bool:
    return hasattr(value, "dtype") and hasattr(value, "reshape")


def _equal(one: Any, other: Any) -> bool:
    if _is_array(one) or _is_array(other):
        import numpy as np

        return np.array_equal(one, other)
    return bool(one == other)
