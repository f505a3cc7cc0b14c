"""ModelInferRequest: from bytes to messages, in two lanes; see `v2_protobuf.py`."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan
from typing import TYPE_CHECKING, Any, NamedTuple

from kserve_lite.codecs.json_tensors import MAX_DIMENSIONS
from kserve_lite.codecs.proto import message_class, wire
from kserve_lite.codecs.proto.contents import CONTENTS, Contents
from kserve_lite.codecs.proto.varints import read_varints
from kserve_lite.codecs.proto.wire import Buffer, fields, read_message
from kserve_lite.codecs.raw_tensors import (
    check_count,
    check_names,
    from_raw,
    known_datatype,
    little_endian,
    objects,
    shaped,
)
from kserve_lite.errors import InvalidInput
from kserve_lite.messages import MAX_ENTRIES, InferRequest, RequestedOutput
from kserve_lite.tensors import DATATYPES, Parameters, Tensor, describe

if TYPE_CHECKING:
    import numpy as np

ModelInferRequest = message_class("inference.ModelInferRequest")
InferInputTensor = message_class("inference.ModelInferRequest.InferInputTensor")
InferTensorContents = message_class("inference.InferTensorContents")


class Parsed(NamedTuple):
    """A ModelInferRequest whose tensors are not looked at yet.

    message: protobuf's, without what was cut out of it.
    raw: `raw_input_contents`. cut: for each input the bytes of its contents, None where
    they are in the message; empty where nothing was cut.
    """

    message: Any
    raw: Sequence[Buffer]
    cut: Sequence[memoryview | None]


def parse(body: Buffer) -> Parsed:
    """Read a ModelInferRequest; raise InvalidInput where it is malformed."""
    if len(body) >= wire.FAST_SIZE:
        parsed = _parse_fast(memoryview(body))
        if parsed is not None:
            return parsed
    message = read_message(ModelInferRequest, body)
    return Parsed(message, message.raw_input_contents, ())


def decode(parsed: Parsed) -> tuple[InferRequest, bool]:
    """Return the request, and whether its tensors came raw.

    Raises InvalidInput for what does not fit together. Arrays of large tensors are
    read-only views of the received bytes.
    """
    message, raw, cut = parsed
    inputs = message.inputs
    model_name = message.model_name
    if len(inputs) > 1 or message.outputs:
        check_count("inputs", inputs)
        check_count("outputs", message.outputs)
    if raw and len(raw) != len(inputs):
        raise InvalidInput(
            f"the number of inputs ({len(inputs)}) does not match the expected number "
            f"of raw input contents ({len(raw)}) for model '{model_name}'."
        )
    tensors = []
    for index, given in enumerate(inputs):
        name, datatype = given.name, given.datatype
        shape = _shape(given, name)
        contents = cut[index] if cut else None
        if raw:
            if contents is not None or given.HasField("contents"):
                raise InvalidInput(
                    "contents field must not be specified when using "
                    f"raw_input_contents for input '{name}' for model '{model_name}'"
                )
            known_datatype(datatype, name)
            array = from_raw(raw[index], datatype, shape, name)
        else:
            array = _from_contents(given, contents, datatype, shape)
        parameters = _parameters(given.parameters) if given.parameters else {}
        tensors.append(Tensor(name, array, datatype, parameters))
    outputs = tuple(map(_requested, message.outputs)) if message.outputs else ()
    if outputs or len(tensors) > 1:
        check_names(tensors, outputs)
    request = InferRequest(
        model_name,
        tuple(tensors),
        id=message.id or None,
        model_version=message.model_version or None,
        parameters=_parameters(message.parameters) if message.parameters else {},
        outputs=outputs,
        raw=bool(raw),
    )
    return request, request.raw


def _shape(given: Any, name: str) -> tuple[int, ...]:
    sizes = given.shape
    if len(sizes) > MAX_DIMENSIONS:
        raise InvalidInput(
            f"Input '{name}' may have at most {MAX_DIMENSIONS} dimensions, "
            f"got {len(sizes)}."
        )
    shape = tuple(sizes[:])
    if shape and min(shape) < 0:
        raise InvalidInput(
            f"Input '{name}' must have a shape of numbers from 0 up, "
            f"got {describe(None, shape)}."
        )
    return shape


def _requested(output: Any) -> RequestedOutput:
    return RequestedOutput(output.name, _parameters(output.parameters))


def _parameters(message: Any) -> Parameters:
    """The values of a map of InferParameter; one without a value is left out."""
    check_count("parameters", message)
    values = {}
    for name, parameter in message.items():
        which = parameter.WhichOneof("parameter_choice")
        if which is not None:
            values[name] = getattr(parameter, which)
    return values


def _from_contents(
    given: Any, cut: memoryview | None, datatype: str, shape: tuple[int, ...]
) -> np.ndarray:
    name = given.name
    known_datatype(datatype, name)
    column = CONTENTS.get(datatype)
    if column is None:
        raise InvalidInput(
            f"Input '{name}' is {datatype}, which travels only in raw_input_contents: "
            "the contents have no field for it."
        )
    array = _from_cut(cut, column, datatype) if cut is not None else None
    if array is None:
        contents = given.contents
        if cut is not None:
            contents = read_message(InferTensorContents, cut, within=ModelInferRequest)
        array = _from_message(contents, column, name, datatype)
    if DATATYPES[datatype].dtype != column.dtype:
        array = _narrowed(array, datatype, name)
    return shaped(array, datatype, shape, name)


def _from_message(
    contents: Any, column: Contents, name: str, datatype: str
) -> np.ndarray:
    import numpy as np

    values = getattr(contents, column.field)
    if not values:
        filled = [field.name for field, _ in contents.ListFields()]
        if filled:
            raise InvalidInput(
                f"Input '{name}' is {datatype}, so its values must be in "
                f"{column.field}, got {', '.join(filled)}."
            )
    if column.width is None:
        return objects(values)
    if column.width and (len(values) > 16 or isnan(sum(values[:]))):
        # As Python's floats, signalling NaN of FP32 become quiet ones; and of more
        # than some 16 numbers the objects take longer than the field written again.
        packed = memoryview(contents.SerializeToString())
        array = _from_cut(packed, column, datatype)
        if array is not None:
            return array
    return np.fromiter(values, column.dtype, len(values))


def _narrowed(array: np.ndarray, datatype: str, name: str) -> np.ndarray:
    """8- and 16-bit integers come as 32-bit ones: cut them, if they fit."""
    import numpy as np

    kind = np.iinfo(DATATYPES[datatype].dtype)
    if array.size and not (array.min() >= kind.min and array.max() <= kind.max):
        raise InvalidInput(
            f"Input '{name}': {datatype} must be {kind.min} to {kind.max}; "
            "the data has a number outside."
        )
    return array.astype(kind.dtype)


# --- the fast lane --------------------------------------------------------------------


def _parse_fast(body: memoryview) -> Parsed | None:
    """Read a large request, its tensors as views; None leaves it to protobuf."""
    outer = fields(body, 4 * MAX_ENTRIES)
    if outer is None:
        return None
    rest, inputs, raw, cut = [], [], [], []
    for number, begin, value, end in outer:
        if number == 7:
            raw.append(body[value:end])
        elif number != 5:
            rest.append(body[begin:end])
        else:
            tensor = body[value:end]
            split = _split_input(tensor) if len(tensor) >= wire.FAST_SIZE else None
            inputs.append(tensor if split is None else split[0])
            cut.append(None if split is None else split[1])
    try:
        message = ModelInferRequest.FromString(b"".join(rest))
        message.inputs.extend(map(InferInputTensor.FromString, inputs))
    except wire.MALFORMED:
        return None
    return Parsed(message, raw, cut)


def _split_input(tensor: memoryview) -> tuple[bytes, memoryview] | None:
    """An input tensor without its contents, and those; None where there are not one."""
    inner = fields(tensor, MAX_ENTRIES) or ()
    contents = [tensor[value:end] for number, _, value, end in inner if number == 5]
    if len(contents) != 1:
        return None
    rest = b"".join(tensor[begin:end] for n, begin, _, end in inner if n != 5)
    return rest, contents[0]


def _from_cut(cut: memoryview, column: Contents, datatype: str) -> np.ndarray | None:
    """The packed numbers of contents that hold nothing else; None: ask protobuf."""
    only = fields(cut, 1)
    if not only or only[0][0] != column.number or column.width is None:
        return None
    packed = cut[only[0][2] :]
    if not column.width:
        return read_varints(packed, column.dtype)
    if len(packed) % column.width:
        return None
    import numpy as np

    return np.frombuffer(packed, little_endian(datatype))
