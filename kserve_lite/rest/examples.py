"""Bodies that work when they are sent as they stand, for the API's description.

Made of a model's declared inputs, unless its author gave one (`Model(example=)`). -1 in
a shape is taken as 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kserve_lite.handlers import Call, Form, Handler
from kserve_lite.model import Plan
from kserve_lite.tensors import DATATYPES, TensorSpec, describe, element_count

# Inputs of more elements are described in numbers instead: an image of 3 x 224 x 224
# would be half a megabyte of digits.
MOST_ELEMENTS = 1000

# Members of a generate request that name no input.
_NO_TENSORS = frozenset(("id", "parameters"))
# What every datatype of a kind (`tensors.Datatype`) holds.
_VALUES: dict[str, Any] = {"bool": True, "int": 1, "float": 1.0, "bytes": "text"}


class Example(NamedTuple):
    """A body, or why there is none, for the operation's description."""

    body: Any = None
    instead: str = ""


_NONE = Example()


def example_of(schema: str, plan: Plan, given: Mapping[str, Any] | None) -> Example:
    """Return a body that a model's plan takes.

    schema: of `schemas.py`: V1Request, InferRequest or GenerateRequest. given: what the
        model's author gave, which wins where it is such a body.
    """
    entry = plan[0]
    streams = plan[-1].call is Call.GENERATOR
    if schema == "InferRequest" and streams:
        return Example(instead="The model answers in a stream: see generate_stream.")
    if given is not None and _is_for(schema, given, entry):
        return Example(given)
    if schema == "V1Request" and entry.form is Form.JSON:
        return _NONE
    specs: dict[str, TensorSpec] = {}
    for name, optional in entry.takes.items():
        spec = entry.inputs.get(name)
        count = element_count(_sizes(spec)) if spec else 0
        if spec is not None and count <= MOST_ELEMENTS:
            specs[name] = spec
        elif not optional:
            return _NONE if spec is None else Example(instead=_too_large(name, spec))
    if not specs:
        return _NONE
    return Example(_MAKERS[schema](specs, entry.unnamed))


def _is_for(schema: str, given: Mapping[str, Any], entry: Handler) -> bool:
    """Whether the author's example is a body of this kind."""
    inputs = given.get("inputs")
    is_v2 = isinstance(inputs, list) and all(
        isinstance(tensor, dict) and "datatype" in tensor for tensor in inputs
    )
    if schema == "GenerateRequest":
        # A handler of JSON gets the members as they are, there as on V1.
        return entry.form is Form.JSON and not {"instances", "inputs"} & given.keys()
    return is_v2 == (schema == "InferRequest")


def _too_large(name: str, spec: TensorSpec) -> str:
    return (
        f"Input '{name}', {describe(spec.datatype, spec.shape)}, wants "
        f"{element_count(_sizes(spec)):,} numbers, -1 taken as 1: too many to show."
    )


def _sizes(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(1 if size == -1 else size for size in spec.shape)


def _value(spec: TensorSpec) -> Any:
    return _VALUES[DATATYPES[spec.datatype].kind]


def _nested(value: Any, sizes: Sequence[int]) -> Any:
    for size in reversed(sizes):
        value = [value] * size
    return value


def _v1_body(specs: Mapping[str, TensorSpec], unnamed: str) -> Any:
    """Rows; columns where the inputs differ in their number; None: V1 has no scalars.

    A list without rows does not say how wide they are.
    """
    sizes = {name: _sizes(spec) for name, spec in specs.items()}
    if not all(size and 0 not in size for size in sizes.values()):
        return None
    if len({size[0] for size in sizes.values()}) > 1:
        return {"inputs": {n: _nested(_value(specs[n]), s) for n, s in sizes.items()}}
    row = {name: _nested(_value(specs[name]), size[1:]) for name, size in sizes.items()}
    count = next(iter(sizes.values()))[0]
    return {"instances": [row[unnamed] if row.keys() == {unnamed} else row] * count}


def _v2_body(specs: Mapping[str, TensorSpec], _: str) -> Any:
    return {
        "inputs": [
            {
                "name": name,
                "shape": list(_sizes(spec)),
                "datatype": spec.datatype,
                "data": [_value(spec)] * element_count(_sizes(spec)),
            }
            for name, spec in specs.items()
        ]
    }


def _generate_body(specs: Mapping[str, TensorSpec], _: str) -> Any:
    """Members; leading sizes of 1 may be left out.

    None where a name means another thing there, or a list without rows is wanted.
    """
    body: dict[str, Any] = {}
    for name, spec in specs.items():
        sizes = _sizes(spec)
        if name in _NO_TENSORS or 0 in sizes:
            return None
        while sizes[:1] == (1,):
            sizes = sizes[1:]
        body[name] = _nested(_value(spec), sizes)
    return body


_MAKERS = {
    "V1Request": _v1_body,
    "InferRequest": _v2_body,
    "GenerateRequest": _generate_body,
}
