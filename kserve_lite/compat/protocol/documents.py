"""Tensors of KServe's SDK to and from V2's JSON, with or without raw tensors after it,
and its protobuf messages.

Requests and answers name their tensors "inputs" and "outputs" and are alike in all
else. Nothing here changes a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from kserve_lite.codecs.json_tensors import dumps, loads
from kserve_lite.codecs.raw_tensors import elements_of, flattened, raw_of
from kserve_lite.compat.errors import InvalidInput, translated
from kserve_lite.compat.protocol.byte_tensors import utf8
from kserve_lite.compat.protocol.parameters import (
    BINARY_SIZE,
    plain_parameters,
    to_grpc_parameters,
)
from kserve_lite.compat.protocol.tensors import InferTensor
from kserve_lite.tensors import DATATYPES, Tensor

if TYPE_CHECKING:
    from kserve_lite.wire.events import Buffer

T = TypeVar("T", bound=InferTensor)

_REQUIRED = object()


# --- in -------------------------------------------------------------------------------


class Attached:
    """The raw tensors after a body's JSON, handed out one after the other."""

    def __init__(self, rest: memoryview) -> None:
        self._rest = rest

    def take(self, size: Any, name: str) -> bytes:
        if type(size) is not int or not 0 <= size <= len(self._rest):
            raise InvalidInput(
                f"'{name}' must have a {BINARY_SIZE} of the bytes that come after the "
                f"JSON; {len(self._rest)} are left."
            )
        taken, self._rest = bytes(self._rest[:size]), self._rest[size:]
        return taken


def document_of(body: bytes, json_length: int) -> tuple[dict[str, Any], Attached]:
    """The JSON of a body and what comes after it; raises InvalidInput."""
    if not 0 <= json_length <= len(body):
        raise InvalidInput(
            f"The JSON is said to have {json_length} bytes, the body has {len(body)}."
        )
    whole = memoryview(body)
    with translated():
        document = loads(whole[:json_length])
    if not isinstance(document, dict):
        raise InvalidInput("The body's JSON must be an object.")
    return document, Attached(whole[json_length:])


def member(node: Any, name: str, default: Any = _REQUIRED) -> Any:
    """A member of a dict, or an attribute; `default` where it lacks or is null."""
    is_mapping = isinstance(node, Mapping)
    value = node.get(name) if is_mapping else getattr(node, name, None)
    if value is not None:
        return value
    if default is _REQUIRED:
        raise InvalidInput(f"'{name}' is missing.")
    return default


def entries_of(node: Any, name: str, default: Any = _REQUIRED) -> list[Any]:
    entries = member(node, name, default)
    if not isinstance(entries, list):
        raise InvalidInput(f"'{name}' must be a list.")
    return entries


def of_document(kind: type[T], node: Any, binary: Attached | None, default: Any) -> T:
    """Make a tensor of its JSON; raise InvalidInput where it is malformed.

    default: the parameters of one that has none.
    """
    name, datatype = member(node, "name"), member(node, "datatype")
    if not isinstance(name, str) or not isinstance(datatype, str):
        raise InvalidInput("'name' and 'datatype' of a tensor must be strings.")
    shape = _shape(node, name)
    parameters = member(node, "parameters", default)
    if parameters is not None and not isinstance(parameters, Mapping):
        raise InvalidInput(f"'parameters' of '{name}' must be an object.")
    data = member(node, "data", None)
    size = parameters and parameters.get(BINARY_SIZE)
    if data is None and binary is not None and size is not None:
        raw = binary.take(size, name)
        made = kind(name, shape, datatype, None, plain_parameters(parameters))
        made.read_raw(raw)
        return made
    if data is None:
        raise InvalidInput(f"'{name}' has no data.")
    return kind(name, shape, datatype, data, parameters)


def _shape(node: Any, name: str) -> list[int]:
    sizes = []
    for size in entries_of(node, "shape"):
        # Some clients of KServe send the numbers as strings.
        if isinstance(size, str) and size.isascii() and size.isdecimal():
            size = int(size) if len(size) < 20 else None
        if type(size) is not int:
            raise InvalidInput(f"'shape' of '{name}' must be a list of numbers.")
        sizes.append(size)
    return sizes


def of_message(kind: type[T], tensor: Any, parameters: Any) -> T:
    """Make a tensor of its message, its values being the contents there."""
    data = get_content(tensor.datatype, tensor.contents)
    return kind(tensor.name, list(tensor.shape), tensor.datatype, data, parameters)


def get_content(datatype: str, data: Any) -> list[Any]:
    """Return the values of a datatype in InferTensorContents.

    Empty for FP16 and BF16, which travel raw only; raises InvalidInput for datatypes
    that the protocol has not.
    """
    from kserve_lite.codecs.proto.contents import CONTENTS

    if datatype in CONTENTS:
        return list(getattr(data, CONTENTS[datatype].field))
    if datatype in DATATYPES:
        return []
    raise InvalidInput(f"A datatype must be one of {', '.join(DATATYPES)}.")


# --- out ------------------------------------------------------------------------------


class Sent(NamedTuple):
    """A tensor on its way. data: its JSON values; None: it goes raw."""

    tensor: Tensor
    data: Any


def flat_list(tensor: Tensor) -> list[Any]:
    """The values of a tensor as JSON has them, flat.

    Raises InferenceError for bytes that are not UTF-8.
    """
    if tensor.datatype == "BYTES":
        return utf8(tensor.array.reshape(-1), tensor.name)
    values: list[Any] = flattened(tensor).tolist()
    return values


def rest_of(
    document: dict[str, Any], name: str, sent: Iterable[Sent]
) -> tuple[dict[str, Any] | bytes, int | None]:
    """Put tensors into a document, as its member `name`.

    Returns it and None, or with raw tensors the body and how many bytes are JSON.
    """
    pieces: list[Buffer] = []
    entries = document[name]
    for tensor, data in sent:
        size = None
        if data is None:
            pieces.append(raw_of(tensor))
            size = len(pieces[-1])
        entry: dict[str, Any] = {
            "name": tensor.name,
            "shape": list(tensor.shape),
            "datatype": tensor.datatype,
        }
        if parameters := plain_parameters(tensor.parameters, size=size):
            entry["parameters"] = parameters
        if data is not None:
            entry["data"] = data
        entries.append(entry)
    if not pieces:
        return document, None
    head = dumps(document)
    return b"".join((head, *pieces)), len(head)


def write_tensors(
    target: Any, raw_contents: Any, tensors: Sequence[Tensor], *, raw: bool
) -> None:
    """Write tensors into a message's repeated fields.

    raw: whether they go raw; all do if one has to, since raw contents belong to tensors
    by position.
    """
    from kserve_lite.codecs.proto.contents import CONTENTS

    raw = raw or any(tensor.datatype not in CONTENTS for tensor in tensors)
    for tensor in tensors:
        octets = bytes(raw_of(tensor)) if raw else None
        size = None if octets is None else len(octets)
        parameters = plain_parameters(tensor.parameters, size=size)
        entry = target.add(
            name=tensor.name,
            datatype=tensor.datatype,
            shape=tensor.shape,
            parameters=to_grpc_parameters(parameters),
        )
        if octets is not None:
            raw_contents.append(octets)
            continue
        flat = flattened(tensor)
        is_bytes = tensor.datatype == "BYTES"
        values = elements_of(flat) if is_bytes else flat.tolist()
        entry.contents.SetInParent()
        getattr(entry.contents, CONTENTS[tensor.datatype].field).extend(values)
