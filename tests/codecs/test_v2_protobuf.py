"""V2 protobuf: ModelInfer's messages in and out, over both lanes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kserve_lite.codecs import proto, v2_protobuf
from kserve_lite.codecs.proto import requests as requests_module
from kserve_lite.codecs.proto import responses as responses_module
from kserve_lite.codecs.proto import wire
from kserve_lite.codecs.proto.contents import CONTENTS
from kserve_lite.codecs.proto.varints import CHUNK, read_varints, write_varints
from kserve_lite.errors import InvalidInput
from kserve_lite.messages import (
    MAX_ENTRIES,
    InferRequest,
    InferResponse,
    RequestedOutput,
)
from kserve_lite.tensors import DATATYPES, Tensor, numpy_dtype

Request = requests_module.ModelInferRequest
Response = responses_module.ModelInferResponse


@pytest.fixture(params=[0, math.inf], ids=["fast", "protobuf"], autouse=True)
def _lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test of this file runs over both lanes."""
    monkeypatch.setattr(wire, "FAST_SIZE", request.param)


def message(**fields: Any) -> Any:
    return Request(model_name="m", **fields)


def typed(datatype: str, values: list[Any], shape: list[int] | None = None) -> Any:
    """A request with one input of typed contents."""
    given_shape = [len(values)] if shape is None else shape
    request = message(id="1")
    tensor = request.inputs.add(name="x", datatype=datatype, shape=given_shape)
    getattr(tensor.contents, CONTENTS[datatype].field).extend(values)
    return request


def raw(datatype: str, shape: list[int], data: bytes) -> Any:
    request = message(id="1")
    request.inputs.add(name="x", datatype=datatype, shape=shape)
    request.raw_input_contents.append(data)
    return request


def decoded(body: Any) -> InferRequest:
    data = body if isinstance(body, bytes) else body.SerializeToString()
    return v2_protobuf.decode(v2_protobuf.parse(data))[0]


def refused(body: Any) -> str:
    with pytest.raises(InvalidInput) as caught:
        decoded(body)
    reason = caught.value.reason
    assert "s3cr3t" not in reason
    return reason


def encoded(*tensors: Tensor, raw: bool = False, **fields: Any) -> Any:
    response = InferResponse(tensors, **({"id": "1", "model_name": "m"} | fields))
    pieces = v2_protobuf.encode(response, raw=raw)
    return Response.FromString(b"".join(map(bytes, pieces)))


# --- requests -----------------------------------------------------------------------


def test_a_request() -> None:
    request = message(id="7", model_version="3")
    request.parameters["b"].bool_param = True
    request.parameters["i"].int64_param = -5
    request.parameters["s"].string_param = "é"
    request.parameters["d"].double_param = 1.5
    request.parameters["u"].uint64_param = 2**64 - 1
    assert request.parameters["none"] is not None  # present, and without a value
    x = request.inputs.add(name="x", datatype="FP32", shape=[1, 2])
    x.contents.fp32_contents.extend([1, 2.5])
    x.parameters["p"].string_param = "q"
    y = request.inputs.add(name="y", datatype="INT8", shape=[2])
    y.contents.int_contents.extend([3, -4])
    request.outputs.add(name="o").parameters["c"].int64_param = 1
    got = decoded(request)
    assert (got.model_name, got.id, got.model_version) == ("m", "7", "3")
    assert got.parameters == {
        "b": True,
        "i": -5,
        "s": "é",
        "d": 1.5,
        "u": 2**64 - 1,
    }
    assert got.names == ("x", "y")
    assert got["x"].tolist() == [[1, 2.5]]
    assert got["x"].dtype == np.float32
    assert got.inputs[0].parameters == {"p": "q"}
    assert got["y"].tolist() == [3, -4]
    assert got["y"].dtype == np.int8
    assert got.outputs == (RequestedOutput("o", {"c": 1}),)


def test_what_may_be_left_out() -> None:
    got = decoded(message())
    assert got == InferRequest("m", ())
    assert decoded(b"").model_name == ""


SAMPLES: dict[str, list[Any]] = {
    "BOOL": [True, False, True],
    "INT8": [-128, 0, 127],
    "INT16": [-(2**15), 1, 2**15 - 1],
    "INT32": [-(2**31), 1, 2**31 - 1],
    "INT64": [-(2**63), 1, 2**63 - 1],
    "UINT8": [0, 128, 255],
    "UINT16": [0, 300, 2**16 - 1],
    "UINT32": [0, 300, 2**32 - 1],
    "UINT64": [0, 300, 2**64 - 1],
    "FP16": [0.5, -1.0, math.inf],
    "BF16": [0.5, -1.0, math.inf],
    "FP32": [0.5, -1.0, math.inf],
    "FP64": [0.1, -1.0, math.inf],
    "BYTES": [b"", b"a\0", b"\xff\xfe"],
}


def sample(datatype: str) -> np.ndarray:
    if datatype == "BYTES":
        array = np.empty(3, object)
        array[:] = SAMPLES[datatype]
        return array
    return np.array(SAMPLES[datatype], numpy_dtype(datatype))


def raw_bytes(datatype: str) -> bytes:
    if datatype == "BYTES":
        elements: list[bytes] = SAMPLES[datatype]
        return b"".join(len(e).to_bytes(4, "little") + e for e in elements)
    return sample(datatype).tobytes()


def test_samples_are_all_datatypes() -> None:
    assert SAMPLES.keys() == DATATYPES.keys()


@pytest.mark.parametrize("datatype", CONTENTS)
def test_typed_contents_both_ways(datatype: str) -> None:
    got = decoded(typed(datatype, SAMPLES[datatype], [3, 1]))
    assert got["x"].dtype == numpy_dtype(datatype)
    assert got["x"].tolist() == [[value] for value in SAMPLES[datatype]]
    answer = encoded(*got.inputs)
    (output,) = answer.outputs
    assert (output.name, output.datatype, list(output.shape)) == ("x", datatype, [3, 1])
    filled = [field.name for field, _ in output.contents.ListFields()]
    assert filled == [CONTENTS[datatype].field]
    assert list(getattr(output.contents, filled[0])) == SAMPLES[datatype]
    assert not answer.raw_output_contents
    assert not output.parameters


@pytest.mark.parametrize("datatype", DATATYPES)
def test_raw_contents_both_ways(datatype: str) -> None:
    got, is_raw = v2_protobuf.decode(
        v2_protobuf.parse(
            raw(datatype, [1, 3], raw_bytes(datatype)).SerializeToString()
        )
    )
    assert is_raw
    assert got["x"].dtype == numpy_dtype(datatype)
    assert got["x"].shape == (1, 3)
    assert got["x"].reshape(-1).tolist() == SAMPLES[datatype]
    answer = encoded(*got.inputs, raw=True)
    assert list(answer.raw_output_contents) == [raw_bytes(datatype)]
    (output,) = answer.outputs
    assert not output.HasField("contents")
    assert not output.parameters


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_precision_travels_raw_only(datatype: str) -> None:
    request = message()
    tensor = request.inputs.add(name="x", datatype=datatype, shape=[1])
    tensor.contents.fp32_contents.append(1)
    reason = refused(request)
    assert "'x'" in reason
    assert datatype in reason
    assert "raw_input_contents" in reason
    whole = Tensor("a", np.array([1], np.int32), "INT32")
    answer = encoded(whole, Tensor("x", sample(datatype), datatype))
    assert [len(data) for data in answer.raw_output_contents] == [4, 6]


@pytest.mark.parametrize(
    ("shape", "count"), [([], 1), ([0], 0), ([2, 0, 3], 0), ([1] * 32, 1), ([2, 2], 4)]
)
@pytest.mark.parametrize("is_raw", [True, False])
def test_shapes(shape: list[int], count: int, *, is_raw: bool) -> None:
    body = (
        raw("INT32", shape, bytes(4 * count))
        if is_raw
        else typed("INT32", [0] * count, shape)
    )
    got = decoded(body)
    assert got["x"].shape == tuple(shape)
    answer = encoded(*got.inputs, raw=is_raw)
    assert list(answer.outputs[0].shape) == shape
    if not count and not is_raw:
        assert answer.outputs[0].HasField("contents")


def test_raw_booleans_are_true_or_false() -> None:
    got = decoded(raw("BOOL", [3], b"\x02\x00\x01"))
    assert got["x"].tobytes() == b"\x01\x00\x01"


def with_two_names() -> Any:
    request = typed("INT32", [1])
    request.inputs.append(request.inputs[0])
    return request


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (typed("FP32", [1.0], [3]), ["'x'", "FP32[3]", "3 elements", "got 1"]),
        (typed("UINT8", [1, 2], [1]), ["'x'", "UINT8[1]", "1 elements", "got 2"]),
        (typed("FP32", [], [2]), ["'x'", "got 0"]),
        (raw("FP32", [3], b"1234"), ["'x'", "FP32[3]", "12 bytes", "got 4"]),
        (
            raw("BYTES", [1], b"\x04\0\0\0abc"),
            ["'x'", "BYTES[1]", "element 0", "needs 8 bytes", "7 are left"],
        ),
        (
            raw("BYTES", [2], b"\0\0\0\0\x04\0\0"),
            ["'x'", "BYTES[2]", "element 1", "needs 4 bytes", "3 are left"],
        ),
        (
            raw("BYTES", [1], b"\0\0\0\0\0\0\0\0"),
            ["'x'", "BYTES[1]", "1 elements", "4 bytes are left"],
        ),
        (raw("BYTES", [2], b"\0\0\0\0"), ["'x'", "BYTES[2]", "got 1"]),
        (typed("INT8", [128]), ["'x'", "INT8", "-128 to 127"]),
        (typed("INT16", [-32769]), ["'x'", "INT16", "-32768 to 32767"]),
        (typed("UINT8", [256]), ["'x'", "UINT8", "0 to 255"]),
        (typed("UINT16", [65536]), ["'x'", "UINT16", "0 to 65535"]),
        (typed("FP32", [1.0], [-1]), ["'x'", "from 0 up", "-1"]),
        (typed("FP32", [1.0], [1] * 33), ["'x'", "32 dimensions", "got 33"]),
        (typed("FP32", [], [2**62, 0, 2**62]), ["'x'", "no tensor"]),
        (with_two_names(), ["Two inputs have the same name."]),
        (
            message(outputs=[{"name": "o"}, {"name": "p"}, {"name": "o"}]),
            ["Two requested outputs have the same name."],
        ),
        (
            message(inputs=[{"name": "x", "datatype": "fp32"}]),
            ["'x'", "FP32", "'fp32'"],
        ),
        (
            message(inputs=[{"name": "x", "datatype": "s3cr3t" * 9}]),
            ["'x'", "something else"],
        ),
        (
            message(inputs=[{"name": "x"}], raw_input_contents=[b"", b""]),
            [
                "the number of inputs (1) does not match the expected number of",
                "raw input contents (2) for model 'm'.",
            ],
        ),
        (
            message(
                inputs=[
                    {
                        "name": "in0",
                        "datatype": "FP32",
                        "shape": [1],
                        "contents": {"fp32_contents": [1]},
                    }
                ],
                raw_input_contents=[b"0000"],
            ),
            [
                "contents field must not be specified when using",
                "raw_input_contents for input 'in0' for model 'm'",
            ],
        ),
        (
            message(
                inputs=[
                    {
                        "name": "x",
                        "datatype": "FP32",
                        "shape": [1],
                        "contents": {
                            "int_contents": [1],
                            "bytes_contents": [b"s3cr3t"],
                        },
                    }
                ]
            ),
            ["'x'", "fp32_contents", "int_contents, bytes_contents"],
        ),
    ],
)
def test_what_does_not_fit_together(body: Any, words: list[str]) -> None:
    reason = refused(body)
    for word in words:
        assert word in reason


@pytest.mark.parametrize(
    "body",
    [
        b"\xff",
        b"\x0a\x05ab",
        b"\x0a\x01\xff",  # no UTF-8
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\x2a\x02\x0a\x7f",
        b"\x2a\x09\x12\x04FP32\x2a\x01\x32",
        b"\x2a\x0d\x12\x04FP32\x2a\x05\x32\x03abc",
        b"\x2a\x0c\x12\x05UINT8\x2a\x03\x22\x01\x80",
        b"\x02\x00",
        b"\x0b",
    ],
)
def test_malformed_messages(body: bytes) -> None:
    assert refused(body) == "The message is no valid inference.ModelInferRequest."


def test_what_is_looked_at_one_by_one_is_bounded() -> None:
    many = MAX_ENTRIES + 1
    inputs = message(inputs=[{"datatype": "BOOL", "shape": [0]}] * many)
    outputs = message(outputs=[{"name": "o"}] * many)
    parameters, own = message(), message(inputs=[{"name": "x", "datatype": "BOOL"}])
    own.inputs[0].contents.bool_contents.append(True)
    for target in (parameters.parameters, own.inputs[0].parameters):
        for index in range(many):
            target[str(index)].bool_param = True
    for what, body in (
        ("inputs", inputs),
        ("outputs", outputs),
        ("parameters", parameters),
        ("parameters", own),
    ):
        assert refused(body) == f"A request may have at most 4096 {what}, got {many}."


def test_repeated_parts_are_merged_as_protobuf_does() -> None:
    whole = typed("INT32", [1, 2, 3])
    data = whole.SerializeToString()
    # Contents in two parts, the packed field twice, an unpacked field, a name twice.
    part = requests_module.InferInputTensor(name="y", datatype="INT32", shape=[6])
    part.contents.int_contents.extend([1, 2])
    more = requests_module.InferInputTensor(name="x")
    more.contents.int_contents.extend([3])
    unpacked = b"\x2a\x02\x10\x04" + b"\x2a\x06\x12\x01\x05\x12\x01\x06"
    tensor = part.SerializeToString() + more.SerializeToString() + unpacked
    body = b"\x0a\x01z" + b"\x2a" + bytes([len(tensor)]) + tensor + b"\x0a\x01m"
    got = decoded(body)
    assert got.model_name == "m"
    assert got["x"].tolist() == [1, 2, 3, 4, 5, 6]
    assert decoded(data)["x"].tolist() == [1, 2, 3]


def test_large_tensors_are_views_of_the_body() -> None:
    numbers = np.arange(100_000, dtype=np.float32)
    for body in (
        raw("FP32", [100_000], numbers.tobytes()),
        typed("FP32", numbers.tolist()),
    ):
        data = bytearray(body.SerializeToString())
        array = v2_protobuf.decode(v2_protobuf.parse(data))[0]["x"]
        assert (array == numbers).all()
        if wire.FAST_SIZE == 0:
            assert np.shares_memory(array, np.frombuffer(data, np.uint8))


# --- answers ------------------------------------------------------------------------


def test_an_answer() -> None:
    array = np.array([[1, 2]], np.int64)
    answer = encoded(
        Tensor("o", array, "INT64", {"s": "t", "n": np.int64(4)}),
        id="7",
        model_version="3",
        parameters={"b": True, "i": -1, "u": 2**63, "d": 0.5, "none": None},
    )
    assert (answer.model_name, answer.id, answer.model_version) == ("m", "7", "3")
    assert {
        name: getattr(value, value.WhichOneof("parameter_choice"))
        for name, value in answer.parameters.items()
    } == {"b": True, "i": -1, "u": 2**63, "d": 0.5}
    (output,) = answer.outputs
    assert output.parameters["s"].string_param == "t"
    assert output.parameters["n"].int64_param == 4


def test_outputs_keep_their_order() -> None:
    """Small and large outputs are written in different ways."""
    sizes = [1, 5_000, 2, 6_000, 3]
    tensors = [
        Tensor(f"o{index}", np.full(size, index, np.uint8), "UINT8")
        for index, size in enumerate(sizes)
    ]
    for is_raw in (True, False):
        answer = encoded(*tensors, raw=is_raw)
        assert [list(output.shape) for output in answer.outputs] == [
            [size] for size in sizes
        ]
        if is_raw:
            assert list(map(len, answer.raw_output_contents)) == sizes
        else:
            lengths = [len(output.contents.uint_contents) for output in answer.outputs]
            assert lengths == sizes


def test_large_raw_outputs_are_not_copied() -> None:
    array = np.zeros((100, 1000), np.float64)
    response = InferResponse((Tensor("o", array, "FP64"),), id="1", model_name="m")
    for is_raw in (True, False):
        pieces = v2_protobuf.encode(response, raw=is_raw)
        views = [np.frombuffer(piece, np.uint8) for piece in pieces]
        if wire.FAST_SIZE == 0:
            assert any(np.shares_memory(view, array) for view in views if view.size)


@pytest.mark.parametrize("is_raw", [True, False])
def test_arrays_of_any_layout(*, is_raw: bool) -> None:
    base = np.arange(24, dtype=np.int32).reshape(4, 6)
    for array in (base.T, base[::2, ::3], base.astype(">i4"), base[0, 0]):
        tensor = Tensor("o", np.asarray(array), "INT32")
        answer = encoded(tensor, raw=is_raw)
        got = (
            np.frombuffer(answer.raw_output_contents[0], "<i4")
            if is_raw
            else np.array(answer.outputs[0].contents.int_contents)
        )
        assert got.tolist() == np.asarray(array).reshape(-1).tolist()


def test_text_is_written_as_utf8() -> None:
    for array in (np.array(["é", "b"]), np.array(["é", b"b"], object)):
        answer = encoded(Tensor("o", array, "BYTES"))
        assert list(answer.outputs[0].contents.bytes_contents) == ["é".encode(), b"b"]


@pytest.mark.parametrize("is_raw", [True, False])
def test_arrays_of_another_type_than_the_tensor_says(*, is_raw: bool) -> None:
    def written(array: np.ndarray, datatype: str) -> None:
        encoded(Tensor("o", array, datatype), raw=is_raw)

    written(np.array([1, 2]), "INT8")
    written(np.array([1.5]), "FP32")
    with pytest.raises(ValueError, match="beyond INT8"):
        written(np.array([300]), "INT8")
    with pytest.raises(TypeError):
        written(np.array([1.5]), "INT8")
    with pytest.raises(TypeError, match="bytes or str"):
        written(np.array([1], object), "BYTES")


@pytest.mark.parametrize("value", [[1], {"a": 1}, -(2**63) - 1, 2**64, "\ud800"])
def test_parameters_that_grpc_has_not(value: object) -> None:
    with pytest.raises((TypeError, ValueError), match="'p'"):
        encoded(parameters={"p": value})


def test_in_a_stream() -> None:
    tensor = Tensor("o", np.zeros(10_000, np.float32), "FP32")
    response = InferResponse((tensor,), id="1", model_name="m")
    pieces = v2_protobuf.in_stream(v2_protobuf.encode(response, raw=True))
    kind = proto.message_class("inference.ModelStreamInferResponse")
    read = kind.FromString(b"".join(map(bytes, pieces)))
    assert read.infer_response.id == "1"
    assert len(read.infer_response.raw_output_contents[0]) == 40_000


# --- properties ---------------------------------------------------------------------

NAMES = st.text(max_size=5)


@st.composite
def requests(draw: st.DrawFn) -> Any:
    """Requests that fit together, and nearly so."""
    request = Request(model_name=draw(NAMES), id=draw(NAMES))
    is_raw = draw(st.booleans())
    names = draw(st.lists(NAMES, max_size=3))
    for name in names:
        datatype = draw(st.sampled_from([*DATATYPES, "odd"]))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        count = math.prod(shape) + draw(st.sampled_from([0, 0, 0, 1]))
        tensor = request.inputs.add(name=name, datatype=datatype, shape=shape)
        values = list(
            itertools.islice(itertools.cycle(SAMPLES.get(datatype, [1])), count)
        )
        if is_raw:
            width = DATATYPES[datatype].width if datatype in DATATYPES else 1
            request.raw_input_contents.append(
                draw(st.binary(max_size=20)) if not width else bytes(count * width)
            )
        elif datatype in CONTENTS:
            getattr(tensor.contents, CONTENTS[datatype].field).extend(values)
    return request


def outcome(body: bytes, *, fast: bool, broken: bool = True) -> Any:
    """What a lane makes of a body, comparable.

    broken: count every refusal as the same. The fast lane looks into contents late, so
    where two things are wrong with a message it may name the other one.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "FAST_SIZE", 0 if fast else math.inf)
        try:
            request, is_raw = v2_protobuf.decode(v2_protobuf.parse(body))
        except InvalidInput as error:
            return "refused" if broken else error.reason
    tensors = [
        (t.name, t.datatype, t.array.dtype, t.shape, t.array.tolist(), t.parameters)
        for t in request.inputs
    ]
    # As text, since NaN equals nothing.
    return repr((request.id, request.model_name, request.outputs, tensors, is_raw))


QUIET = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@QUIET
@given(requests())
def test_lanes_agree(request: Any) -> None:
    body = request.SerializeToString()
    fast = outcome(body, fast=True, broken=False)
    assert fast == outcome(body, fast=False, broken=False)


@QUIET
@given(requests(), st.data())
def test_lanes_agree_on_what_is_broken(request: Any, data: st.DataObject) -> None:
    """Nothing but InvalidInput, and the same from both lanes, whatever the bytes."""
    body = bytearray(request.SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(body)))
        match data.draw(st.sampled_from(["cut", "change", "insert"])):
            case "cut":
                del body[at:]
            case "change" if at < len(body):
                body[at] = data.draw(st.integers(0, 255))
            case _:
                body[at:at] = data.draw(st.binary(max_size=4))
    assert outcome(bytes(body), fast=True) == outcome(bytes(body), fast=False)


@QUIET
@given(st.binary(max_size=60))
def test_lanes_agree_on_noise(body: bytes) -> None:
    assert outcome(body, fast=True) == outcome(body, fast=False)


INTEGERS = st.one_of(
    st.integers(0, 200), st.integers(0, 2**64 - 1), st.integers(2**63 - 9, 2**63 + 9)
)


@QUIET
@given(st.lists(INTEGERS, max_size=30), st.sampled_from(["uint64", "int64"]))
def test_varints_both_ways(numbers: list[int], dtype: str) -> None:
    array = np.array(numbers, np.uint64).view(dtype)
    contents = requests_module.InferTensorContents()
    field, other = ("uint64_contents", "int64_contents")[
        :: 1 if dtype[0] == "u" else -1
    ]
    getattr(contents, field).extend(array.tolist())
    packed = write_varints(array)
    assert contents.SerializeToString().endswith(packed)
    read = read_varints(packed, dtype)
    assert read is not None
    assert read.tolist() == array.tolist()
    assert not getattr(contents, other)


@QUIET
@given(st.binary(max_size=40), st.sampled_from(["int32", "uint32", "bool", "uint64"]))
def test_varints_are_read_as_protobuf_reads_them(data: bytes, dtype: str) -> None:
    column = next(c for c in CONTENTS.values() if c.dtype == dtype)
    body = bytes([column.number << 3 | 2, len(data)]) + data
    read = read_varints(data, dtype)
    try:
        contents = requests_module.InferTensorContents.FromString(body)
    except Exception:
        assert read is None
        return
    expected = list(getattr(contents, column.field))
    assert read is None or read.tolist() == expected


@pytest.mark.parametrize("dtype", ["int32", "uint16", "int64", "bool"])
def test_varints_in_chunks(dtype: str) -> None:
    rng = np.random.default_rng(1)
    array = rng.integers(0, 2 if dtype == "bool" else 60_000, 3 * CHUNK).astype(dtype)
    if dtype == "int32":
        array = -array
    read = read_varints(write_varints(array), dtype)
    assert read is not None
    assert (read == array).all()
    assert read.dtype == array.dtype


def test_bfloat16_is_ml_dtypes() -> None:
    assert decoded(raw("BF16", [1], b"\x80\x3f"))["x"].dtype == ml_dtypes.bfloat16
