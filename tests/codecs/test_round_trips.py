"""Tensors there and back over every encoding of V2, bit for bit.

What an answer says is sent again as a request, and must be the same array: over JSON
what JSON can say, over the binary extension, gRPC's raw and its typed contents all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kserve_lite.codecs import json_tensors, v2, v2_protobuf
from kserve_lite.codecs.proto import requests, responses, wire
from kserve_lite.codecs.proto.contents import CONTENTS
from kserve_lite.errors import InvalidInput
from kserve_lite.messages import InferRequest, InferResponse
from kserve_lite.tensors import DATATYPES, Tensor, numpy_dtype

QUIET = settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
BINARY = InferRequest("m", (), parameters={"binary_data_output": True})


def tensor_of(datatype: str, shape: tuple[int, ...], data: bytes) -> np.ndarray:
    return np.frombuffer(data, numpy_dtype(datatype)).reshape(shape).copy()


@st.composite
def arrays(draw: st.DrawFn, datatype: str) -> np.ndarray:
    """Any bits of a datatype in any shape and memory order."""
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3))
    count = math.prod(shape)
    if datatype == "BYTES":
        elements = st.lists(st.binary(max_size=5), min_size=count, max_size=count)
        array = np.fromiter(draw(elements), object, count).reshape(shape)
    elif datatype == "BOOL":
        array = draw(hnp.arrays(np.bool_, shape))
    else:
        size = count * DATATYPES[datatype].width
        array = tensor_of(
            datatype, shape, draw(st.binary(min_size=size, max_size=size))
        )
    return array.T if draw(st.booleans()) else array


# What random bits seldom hit: infinities, -0.0, denormals, quiet and signalling NaN.
ODD = {
    "FP16": "007c 00fc 0080 0100 007e 017e ffff 017c 01fc",
    "BF16": "807f 80ff 0080 0100 c07f c17f ffff 817f 81ff",
    "FP32": "0000807f 000080ff 00000080 01000000 0000c07f 0100c07f 0100807f 010080ff",
    "FP64": "000000000000f07f 000000000000f0ff 0000000000000080 0100000000000000 "
    "000000000000f87f 010000000000f87f 010000000000f07f 010000000000f0ff",
}


def over_json(tensor: Tensor) -> Tensor:
    (body,), json_size = v2.encode(InferResponse((tensor,), id="1", model_name="m"))
    assert json_size is None
    head = json.loads(bytes(body))
    text = json.dumps({"inputs": head["outputs"]}).encode()
    return v2.decode(text, model_name="m").inputs[0]


def over_binary(tensor: Tensor) -> Tensor:
    response = InferResponse((tensor,), id="1", model_name="m")
    pieces, json_size = v2.encode(response, BINARY)
    assert json_size is not None
    body = b"".join(pieces)
    head = json.loads(body[:json_size])
    text = json.dumps({"inputs": head["outputs"]}).encode()
    whole = text + body[json_size:]
    return v2.decode(whole, model_name="m", json_size=len(text)).inputs[0]


def over_grpc(tensor: Tensor, *, raw: bool) -> Tensor:
    response = InferResponse((tensor,), id="1", model_name="m")
    pieces = v2_protobuf.encode(response, raw=raw)
    answer: Any = responses.ModelInferResponse.FromString(b"".join(pieces))
    message: Any = requests.ModelInferRequest(model_name="m")
    for output in answer.outputs:  # the same fields under the same numbers
        message.inputs.add().MergeFromString(output.SerializeToString())
    message.raw_input_contents.extend(answer.raw_output_contents)
    request, is_raw = v2_protobuf.decode(v2_protobuf.parse(message.SerializeToString()))
    assert is_raw == raw
    return request.inputs[0]


def over_raw(tensor: Tensor) -> Tensor:
    return over_grpc(tensor, raw=True)


def over_typed(tensor: Tensor) -> Tensor:
    return over_grpc(tensor, raw=False)


def check_same(over: Callable[[Tensor], Tensor], array: np.ndarray) -> None:
    sent = Tensor.from_array("y", array)
    came = over(sent)
    assert (came.name, came.datatype) == ("y", sent.datatype)
    assert (came.shape, came.array.dtype) == (array.shape, array.dtype)
    assert not came.parameters
    if sent.datatype == "BYTES":
        assert came.array.tolist() == array.tolist()
    else:
        assert came.array.tobytes() == array.tobytes()


@pytest.fixture(params=[0, math.inf], ids=["fast", "small"])
def _lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lane for large messages or that for small ones, whatever their size."""
    monkeypatch.setattr(json_tensors, "FAST_BODY_SIZE", request.param)
    monkeypatch.setattr(wire, "FAST_SIZE", request.param)


over_both_lanes = pytest.mark.usefixtures("_lane")

PATHS = [
    (over, datatype)
    for over in (over_binary, over_raw, over_typed)
    for datatype in (CONTENTS if over is over_typed else DATATYPES)
]


@over_both_lanes
@pytest.mark.parametrize(("over", "datatype"), PATHS)
def test_any_bits(over: Callable[[Tensor], Tensor], datatype: str) -> None:
    @QUIET
    @given(arrays(datatype))
    def check(array: np.ndarray) -> None:
        check_same(over, array)

    check()


@over_both_lanes
@pytest.mark.parametrize("datatype", DATATYPES)
def test_what_json_can_say(datatype: str) -> None:
    @QUIET
    @given(arrays(datatype))
    def check(array: np.ndarray) -> None:
        if datatype == "BYTES":
            texts = [element.decode("latin-1").encode() for element in array.flat]
            array = np.fromiter(texts, object, array.size).reshape(array.shape)
        elif DATATYPES[datatype].kind == "float":
            with np.errstate(invalid="ignore"):  # at signalling NaN
                array = np.where(np.isfinite(array), array, np.zeros_like(array))
        check_same(over_json, array)

    check()


@over_both_lanes
@pytest.mark.parametrize(
    ("over", "datatype"), [path for path in PATHS if path[1] in ODD]
)
@pytest.mark.parametrize("times", [1, 20])
def test_odd_floats(
    over: Callable[[Tensor], Tensor], datatype: str, times: int
) -> None:
    data = bytes.fromhex(ODD[datatype])
    count = len(data) // DATATYPES[datatype].width
    check_same(over, tensor_of(datatype, (count * times,), data * times))
    for index in range(count):  # a NaN alone, and an infinity
        one = tensor_of(datatype, (count,), data)[index : index + 1]
        check_same(over, one)


@over_both_lanes
@pytest.mark.parametrize("datatype", [name for name in ODD if name != "FP64"])
def test_json_says_the_smallest_numbers(datatype: str) -> None:
    width = DATATYPES[datatype].width
    smallest = b"\x01" + bytes(width - 1) + bytes(width - 1) + b"\x80"
    check_same(over_json, tensor_of(datatype, (2,), smallest))


# --- broken bodies --------------------------------------------------------------------

SIZES = st.one_of(
    st.integers(-1, 20), st.sampled_from([2**62, 2**63, 2**64, 1.0, True, "8", None])
)


@st.composite
def documents(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    """A request that fits together, or nearly so, and its binary part."""
    inputs, rest = [], b""
    for index in range(draw(st.integers(0, 3))):
        datatype = draw(st.sampled_from([*DATATYPES, "odd"]))
        shape: list[Any] = draw(st.lists(st.integers(0, 3), max_size=3))
        width = DATATYPES[datatype].width if datatype in DATATYPES else 1
        count = math.prod(shape)
        node: dict[str, Any] = {
            "name": f"i{index}",
            "datatype": datatype,
            "shape": shape,
        }
        if draw(st.integers(0, 3)):
            elements = draw(st.lists(st.binary(max_size=3), max_size=count))
            data = bytes(count * width) or b"".join(
                len(element).to_bytes(4, "little") + element for element in elements
            )
            node["parameters"] = {"binary_data_size": len(data)}
            rest += data
        else:
            node["data"] = [0] * count
        if not draw(st.integers(0, 7)):
            key = draw(st.sampled_from(["shape", "data", "parameters", "name"]))
            node[key] = draw(st.one_of(SIZES, st.lists(SIZES, max_size=3)))
        if not draw(st.integers(0, 7)):
            node["parameters"] = {"binary_data_size": draw(SIZES)}
        inputs.append(node)
    document: dict[str, Any] = {"inputs": inputs}
    if not draw(st.integers(0, 3)):
        document["parameters"] = {"binary_data_output": draw(SIZES)}
    return document, rest


def outcome(body: bytes, json_size: int | None) -> str:
    """What a body is read as, or why not; nothing but InvalidInput may come out."""
    try:
        request = v2.decode(body, model_name="m", json_size=json_size)
    except InvalidInput as error:
        return error.reason
    tensors = [
        (t.name, t.datatype, t.array.dtype, t.shape, t.array.tolist(), t.parameters)
        for t in request.inputs
    ]
    return repr((tensors, request.parameters))


BROKEN = settings(
    QUIET,
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@BROKEN
@given(documents(), st.data())
def test_broken_bodies(made: tuple[dict[str, Any], bytes], data: st.DataObject) -> None:
    document, rest = made
    text = json.dumps(document).encode()
    body = bytearray(text + rest)
    json_size: int | None = len(text)
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(body)))
        match data.draw(st.sampled_from(["cut", "change", "insert", "size"])):
            case "cut":
                del body[at:]
            case "change" if at < len(body):
                body[at] = data.draw(st.integers(0, 255))
            case "size":
                json_size = data.draw(st.none() | st.integers(-1, len(body) + 1))
            case _:
                body[at:at] = data.draw(st.binary(max_size=4))
    results = set()
    for size in (0, math.inf):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(json_tensors, "FAST_BODY_SIZE", size)
            results.add(outcome(bytes(body), json_size))
    assert len(results) == 1


@over_both_lanes
@BROKEN
@given(st.binary(max_size=40), st.integers(-1, 41))
def test_noise(body: bytes, json_size: int) -> None:
    outcome(body, json_size)
