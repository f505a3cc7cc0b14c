"""V2 with binary tensors: what follows the JSON of a body, in and out."""

from __future__ import annotations

import json
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest

from kserve_lite.codecs import json_tensors, v2
from kserve_lite.errors import InvalidInput
from kserve_lite.messages import InferRequest, InferResponse, RequestedOutput
from kserve_lite.tensors import DATATYPES, Tensor, numpy_dtype

SECRET = 100 * "s3cr3t"


@pytest.fixture(params=[0, math.inf], ids=["fast", "referee"], autouse=True)
def _lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test of this file runs over both lanes of JSON."""
    monkeypatch.setattr(json_tensors, "FAST_BODY_SIZE", request.param)


def tensor(size: Any = ..., **changes: Any) -> dict[str, Any]:
    """A binary input, with changes; a field that is `...` is left out."""
    parameters = {} if size is ... else {"binary_data_size": size}
    fields = {"name": "x", "datatype": "FP32", "shape": [2], "parameters": parameters}
    return {k: v for k, v in (fields | changes).items() if v is not ...}


def decoded(
    document: object, rest: bytes = b"", *, json_size: int | None = None
) -> InferRequest:
    head = json.dumps(document).encode()
    size = len(head) if json_size is None else json_size
    return v2.decode(head + rest, model_name="m", json_size=size)


def refused(document: object, rest: bytes = b"", **how: Any) -> str:
    with pytest.raises(InvalidInput) as caught:
        decoded(document, rest, **how)
    reason = caught.value.reason
    assert "s3cr3t" not in reason
    return reason


# --- requests -----------------------------------------------------------------------

# What each datatype looks like on the wire, written out by hand.
LITERALS: dict[str, tuple[bytes, list[Any]]] = {
    "BOOL": (b"\x01\x00", [True, False]),
    "UINT8": (b"\x01\xff", [1, 255]),
    "UINT16": (b"\x01\x00\x00\x80", [1, 2**15]),
    "UINT32": (b"\x01\x00\x00\x00\x00\x00\x00\x80", [1, 2**31]),
    "UINT64": (b"\x01" + bytes(14) + b"\x80", [1, 2**63]),
    "INT8": (b"\x01\xff", [1, -1]),
    "INT16": (b"\x01\x00\xfe\xff", [1, -2]),
    "INT32": (b"\x01\x00\x00\x00\xfe\xff\xff\xff", [1, -2]),
    "INT64": (b"\x01" + bytes(7) + b"\xfe" + 7 * b"\xff", [1, -2]),
    "FP16": (b"\x00\x3c\x00\xc0", [1.0, -2.0]),
    "BF16": (b"\x80\x3f\x00\xc0", [1.0, -2.0]),
    "FP32": (b"\x00\x00\x80\x3f\x00\x00\x00\xc0", [1.0, -2.0]),
    "FP64": (bytes(6) + b"\xf0\x3f" + bytes(7) + b"\xc0", [1.0, -2.0]),
    "BYTES": (b"\x02\x00\x00\x00\xff\xfe\x00\x00\x00\x00", [b"\xff\xfe", b""]),
}


def test_literals_are_all_datatypes() -> None:
    assert LITERALS.keys() == DATATYPES.keys()


@pytest.mark.parametrize("datatype", DATATYPES)
def test_each_datatype_both_ways(datatype: str) -> None:
    data, values = LITERALS[datatype]
    node = tensor(len(data), datatype=datatype.lower(), shape=["1", 2])
    request = decoded({"inputs": [node]}, data)
    (given,) = request.inputs
    assert (given.name, given.datatype, given.shape) == ("x", datatype, (1, 2))
    assert given.array.dtype == numpy_dtype(datatype)
    assert given.array.tolist() == [values]
    assert given.parameters == {}
    head, rest = parted(given, binary=True)
    assert head["outputs"] == [
        {
            "name": "x",
            "shape": [1, 2],
            "datatype": datatype,
            "parameters": {"binary_data_size": len(data)},
        }
    ]
    assert rest == data


def test_binary_and_json_inputs_are_mixed() -> None:
    request = decoded(
        {
            "id": "7",
            "parameters": {"binary_data_output": True},
            "inputs": [
                tensor(2, name="a", datatype="UINT8"),
                tensor(name="b", datatype="INT8", data=[3, 4]),
                tensor(0, name="c", shape=[0]),
                tensor(name="d", datatype="INT8", shape=[1], data=[[5]]),
                tensor(
                    7,
                    name="e",
                    datatype="BYTES",
                    shape=[1, 1],
                    parameters={"p": "q", "binary_data_size": 7, "none": None},
                ),
            ],
            "outputs": [{"name": "o", "parameters": {"binary_data": True}}],
        },
        b"\x01\x02" + b"\x03\x00\x00\x00abc",
    )
    assert request.names == ("a", "b", "c", "d", "e")
    assert [given.array.tolist() for given in request.inputs] == [
        [1, 2],
        [3, 4],
        [],
        [5],
        [[b"abc"]],
    ]
    assert request["c"].dtype == np.float32
    assert [dict(given.parameters) for given in request.inputs] == [
        {},
        {},
        {},
        {},
        {"p": "q"},
    ]
    assert request.id == "7"
    assert request.parameters == {"binary_data_output": True}
    assert request.outputs == (RequestedOutput("o", {"binary_data": True}),)


def test_a_body_of_json_only_may_give_its_length() -> None:
    request = decoded({"inputs": [tensor(data=[1, 2])]})
    assert request["x"].tolist() == [1, 2]
    assert decoded({"inputs": []}).inputs == ()


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("datatype", [name for name in DATATYPES if name != "BYTES"])
def test_numbers_are_views_of_the_body(datatype: str, kind: type) -> None:
    count, width = 3000, DATATYPES[datatype].width
    size = count * width
    inputs = [
        tensor(size, name=name, datatype=datatype, shape=[count]) for name in "ab"
    ]
    head = json.dumps({"inputs": inputs}).encode()
    body = kind(head + bytes(size) + size * b"\x01")
    request = v2.decode(body, model_name="m", json_size=len(head))
    whole = np.frombuffer(body, np.uint8)
    for name, octet in (("a", 0), ("b", 1)):
        assert np.shares_memory(request[name], whole)
        assert request[name].tobytes() == bytes([octet]) * size


def test_booleans_are_true_or_false() -> None:
    request = decoded({"inputs": [tensor(2, datatype="BOOL")]}, b"\x02\x00")
    assert request["x"].tobytes() == b"\x01\x00"


@pytest.mark.parametrize(
    ("shape", "size"), [([], 4), ([0], 0), ([2, 0, 3], 0), ([1] * 32, 4)]
)
def test_shapes(shape: list[int], size: int) -> None:
    request = decoded({"inputs": [tensor(size, shape=shape)]}, bytes(size))
    assert request["x"].shape == tuple(shape)
    answered = Tensor("x", request["x"], "FP32")
    head, rest = parted(answered, binary=True)
    assert head["outputs"][0]["shape"] == shape
    assert rest == bytes(size)


def test_a_large_document_with_a_small_binary_part_is_read_fast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(json_tensors, "FAST_BODY_SIZE", 8 * 1024)
    monkeypatch.setattr(json_tensors, "loads", None)  # the other lane's
    values = list(range(5000))
    inputs = [
        tensor(2, name="a", datatype="UINT8"),
        tensor(name="b", shape=[5000], data=values),
        tensor(1, name="c", datatype="UINT8", shape=[1]),
    ]
    request = decoded({"inputs": inputs}, b"\x01\x02\x03")
    assert request["b"].tolist() == values
    assert request["a"].tolist() == [1, 2]
    assert request["c"].tolist() == [3]


def test_a_small_document_with_a_large_binary_part_is_not_read_fast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(json_tensors, "FAST_BODY_SIZE", 8 * 1024)
    monkeypatch.setattr(json_tensors, "_read_fast", None)
    request = decoded({"inputs": [tensor(80_000, shape=[20_000])]}, bytes(80_000))
    assert request["x"].shape == (20_000,)


def test_the_tensors_are_found_again_when_a_document_is_read_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The fast lane gives up at the strings, behind the first binary input."""
    monkeypatch.setattr(json_tensors, "FAST_BODY_SIZE", 0)
    lanes: list[str] = []
    build = v2._build

    def counted(root: Any, lane: Any, **how: Any) -> InferRequest:
        lanes.append(type(lane).__name__)
        return build(root, lane, **how)

    monkeypatch.setattr(v2, "_build", counted)
    inputs = [
        tensor(1, name="a", datatype="UINT8", shape=[1]),
        tensor(name="b", datatype="BYTES", data=["s", "t"]),
        tensor(1, name="c", datatype="UINT8", shape=[1]),
    ]
    request = decoded({"inputs": inputs}, b"\x01\x02")
    assert lanes == ["_FastLane", "_Referee"]
    assert (request["a"].tolist(), request["c"].tolist()) == ([1], [2])


# --- refusals -----------------------------------------------------------------------


@pytest.mark.parametrize("json_size", [-1, 16, 10**30])
def test_the_json_ends_within_the_body(json_size: int) -> None:
    assert refused({"inputs": []}, b"a", json_size=json_size) == (
        f"The JSON is said to have {json_size} bytes, the body has 15."
    )


def test_the_json_is_as_long_as_is_said() -> None:
    document = {"inputs": [tensor(2, name=SECRET)]}
    reason = refused(document, b"ab", json_size=20)
    assert reason.startswith("Unrecognized request format: ")
    assert refused(document, b"ab", json_size=0).startswith("Unrecognized request")
    assert refused({"inputs": []}, b"ab", json_size=15) == (
        "Unrecognized request format: unexpected content after document: "
        "line 1 column 15 (char 14)"
    )


LEFT = "the body has {} bytes left."
FIRST = "element 0 needs"
AFTER = (
    "Input 'x' of shape BYTES[{}] must have {} elements; {} bytes are left after them."
)


@pytest.mark.parametrize(
    ("inputs", "rest", "reason"),
    [
        (
            [tensor(8)],
            b"s3cr3t",
            "Input 'x' has a binary_data_size of 8; " + LEFT.format(6),
        ),
        (
            [tensor(8), tensor(8, name="y")],
            bytes(15),
            "Input 'y' has a binary_data_size of 8; " + LEFT.format(7),
        ),
        (
            [tensor(2**63)],
            b"",
            f"Input 'x' has a binary_data_size of {2**63}; " + LEFT.format(0),
        ),
        ([tensor(8)], 9 * b"s", "The body has 1 bytes after its last tensor."),
        (
            [tensor(data=[1, 2])],
            b"s3cr3t",
            "The body has 6 bytes after its last tensor.",
        ),
        ([], b"s3cr3t", "The body has 6 bytes after its last tensor."),
        (
            [tensor(7)],
            bytes(7),
            "Input 'x' of shape FP32[2] must have 8 bytes, got 7.",
        ),
        (
            [tensor(0)],
            b"",
            "Input 'x' of shape FP32[2] must have 8 bytes, got 0.",
        ),
        (
            [tensor(8, shape=[2, 3])],
            bytes(8),
            "Input 'x' of shape FP32[2,3] must have 24 bytes, got 8.",
        ),
        (
            [tensor(4, shape=[0])],
            bytes(4),
            "Input 'x' of shape FP32[0] must have 0 bytes, got 4.",
        ),
        (
            [tensor(0, shape=[0, 2**62, 2**62])],
            b"",
            f"Input 'x': no tensor can have the shape FP32[0,{2**62},{2**62}].",
        ),
        (
            [tensor(7, datatype="BYTES", shape=[1])],
            b"\x04\0\0\0abc",
            f"Input 'x' of shape BYTES[1]: {FIRST} 8 bytes, 7 are left.",
        ),
        (
            [tensor(7, datatype="BYTES"), tensor(9, name="y", datatype="UINT8")],
            b"\x03\0\0\0abc" + bytes(9),
            "Input 'x' of shape BYTES[2] must have 2 elements, got 1.",
        ),
        (
            [tensor(10, datatype="BYTES")],
            b"\x03\0\0\0abc\x01\0\0",
            "Input 'x' of shape BYTES[2]: element 1 needs 4 bytes, 3 are left.",
        ),
        (
            [tensor(8, datatype="BYTES", shape=[1])],
            b"\xff\xff\xff\xffs3cr",
            f"Input 'x' of shape BYTES[1]: {FIRST} 4294967299 bytes, 8 are left.",
        ),
        (
            [tensor(4000, datatype="BYTES", shape=[1])],
            bytes(4000),
            AFTER.format(1, 1, 3996),
        ),
        (
            [tensor(4, datatype="BYTES", shape=[0])],
            bytes(4),
            AFTER.format(0, 0, 4),
        ),
        (
            [tensor(0, datatype="BYTES", shape=[2**40])],
            b"",
            f"Input 'x' of shape BYTES[{2**40}] must have {2**40} elements, got 0.",
        ),
        (
            [tensor(8, data=[1, 2])],
            bytes(8),
            "Input 'x' has both data and a binary_data_size.",
        ),
        (
            [tensor(datatype="UINT8")],
            bytes(2),
            "'data' field is missing for input 'x' for model 'm'",
        ),
        (
            [tensor(None)],
            bytes(8),
            "'data' field is missing for input 'x' for model 'm'",
        ),
        (
            [tensor(2, datatype="UINT8"), tensor(2, datatype="UINT8")],
            bytes(4),
            "Two inputs have the same name.",
        ),
    ],
)
def test_the_binary_part_must_be_what_the_json_says(
    inputs: list[Any], rest: bytes, reason: str
) -> None:
    assert refused({"inputs": inputs}, rest) == reason


@pytest.mark.parametrize("size", [-1, -(2**70), 8.0, "8", True, False, 2**70, SECRET])
def test_the_size_must_be_a_whole_number(size: Any) -> None:
    assert refused({"inputs": [tensor(size)]}, bytes(8)) == (
        "Input 'x': binary_data_size must be a whole number from 0 up."
    )


@pytest.mark.parametrize("size", [8, -1, "8"])
def test_without_a_length_of_the_json_nothing_is_binary(size: Any) -> None:
    body = json.dumps({"inputs": [tensor(size)]}).encode()
    with pytest.raises(InvalidInput) as caught:
        v2.decode(body, model_name="m")
    assert caught.value.reason == "'data' field is missing for input 'x' for model 'm'"
    body = json.dumps({"inputs": [tensor(size, data=[1, 2])]}).encode()
    with pytest.raises(InvalidInput, match=r"'x' has both data and a binary_data_size"):
        v2.decode(body, model_name="m")


@pytest.mark.parametrize("flag", [1, 0, "true", 1.5, SECRET])
def test_flags_must_be_booleans(flag: Any) -> None:
    whole = {"inputs": [], "parameters": {"binary_data_output": flag}}
    assert refused(whole) == (
        "binary_data_output of the request must be true or false."
    )
    one = {
        "inputs": [],
        "outputs": [{"name": "o", "parameters": {"binary_data": flag}}],
    }
    assert refused(one) == "binary_data of output 'o' must be true or false."
    # A handler may have changed what came.
    answer = InferResponse((), id="1", model_name="m")
    for request in (
        InferRequest("m", (), parameters={"binary_data_output": flag}),
        InferRequest("m", (), outputs=(RequestedOutput("o", {"binary_data": flag}),)),
    ):
        with pytest.raises(InvalidInput):
            v2.encode(answer, request)


# --- answers ------------------------------------------------------------------------


def asking(
    default: bool | None = None, outputs: dict[str, bool | None] | None = None
) -> InferRequest:
    return InferRequest(
        "m",
        (),
        parameters={} if default is None else {"binary_data_output": default},
        outputs=tuple(
            RequestedOutput(name, {} if flag is None else {"binary_data": flag})
            for name, flag in (outputs or {}).items()
        ),
    )


def encoded(
    *tensors: Tensor, request: InferRequest | None
) -> tuple[list[Any], int | None]:
    return v2.encode(InferResponse(tensors, id="1", model_name="m"), request)


def parted(*tensors: Tensor, binary: bool) -> tuple[Any, bytes]:
    pieces, json_size = encoded(*tensors, request=asking(default=binary))
    body = b"".join(pieces)
    return json.loads(body[:json_size]), body[
        len(body) if json_size is None else json_size :
    ]


def two() -> tuple[Tensor, Tensor]:
    return (
        Tensor("a", np.array([1, 2], np.uint8), "UINT8"),
        Tensor("b", np.array([b"\xff", "é"], object), "BYTES"),
    )


def test_an_answer() -> None:
    response = InferResponse(
        (
            Tensor("a", np.array([[1, 2]], np.int16), "INT16", {"p": 1}),
            Tensor("b", np.array([3], np.int8), "INT8"),
        ),
        id="7",
        model_name="m",
        model_version="3",
        parameters={"q": "é"},
    )
    request = asking(outputs={"a": True, "b": None})
    pieces, json_size = v2.encode(response, request)
    head = (
        '{"model_name":"m","model_version":"3","id":"7","parameters":{"q":"é"},'
        '"outputs":[{"name":"a","shape":[1,2],"datatype":"INT16",'
        '"parameters":{"p":1,"binary_data_size":4}},'
        '{"name":"b","shape":[1],"datatype":"INT8","data":[3]}]}'
    ).encode()
    assert pieces == [head + b"\x01\x00\x02\x00"]
    assert json_size == len(head)


@pytest.mark.parametrize(
    ("request_", "binary"),
    [
        (None, ""),
        (asking(), ""),
        (asking(default=False), ""),
        (asking(default=True), "ab"),
        (asking(default=True, outputs={"a": None, "b": None}), ""),
        (asking(default=True, outputs={"a": False, "b": True}), "b"),
        (asking(default=False, outputs={"a": True, "b": None}), "a"),
        (asking(outputs={"b": True, "a": True}), "ab"),
        (asking(outputs={"other": True}), ""),
    ],
)
def test_which_outputs_go_binary(request_: InferRequest | None, binary: str) -> None:
    tensors = [Tensor(name, np.array([1], np.uint8), "UINT8") for name in "ab"]
    pieces, json_size = encoded(*tensors, request=request_)
    assert len(pieces) == 1
    assert (json_size is not None) == bool(binary)
    head = json.loads(pieces[0][:json_size])
    for output in head["outputs"]:
        if output["name"] in binary:
            assert output["parameters"] == {"binary_data_size": 1}
            assert "data" not in output
        else:
            assert "parameters" not in output
            assert output["data"] == [1]
    assert json_size is None or pieces[0][json_size:] == b"\x01" * len(binary)


def test_no_outputs_is_json() -> None:
    pieces, json_size = encoded(request=asking(default=True))
    assert pieces == [b'{"model_name":"m","id":"1","outputs":[]}']
    assert json_size is None


def test_bytes_of_any_kind_go_binary() -> None:
    head, rest = parted(*two(), binary=True)
    assert [output["parameters"]["binary_data_size"] for output in head["outputs"]] == [
        2,
        11,
    ]
    assert rest == b"\x01\x02" + b"\x01\0\0\0\xff" + b"\x02\0\0\0\xc3\xa9"
    with pytest.raises(InvalidInput, match="ask for binary output"):
        parted(*two(), binary=False)


def test_a_size_of_the_models_own_is_not_sent() -> None:
    """An echo of a dict may bring one; with data it would mislead the client."""
    echoed = Tensor("a", np.array([1], np.uint8), "UINT8", {"binary_data_size": 99})
    head, _ = parted(echoed, binary=False)
    assert head["outputs"][0].keys() == {"name", "shape", "datatype", "data"}
    head, rest = parted(echoed, binary=True)
    assert head["outputs"][0]["parameters"] == {"binary_data_size": 1}
    assert rest == b"\x01"


@pytest.mark.parametrize("datatype", ["FP32", "BF16", "BOOL"])
def test_large_tensors_are_pieces_of_their_own(datatype: str) -> None:
    dtype = numpy_dtype(datatype)
    large = [np.ones((100, 50), dtype), np.zeros((5000, 1), dtype)]
    small = np.ones(3, dtype)
    tensors = [
        Tensor("a", large[0], datatype),
        Tensor("b", small, datatype),
        Tensor("c", small[:0], datatype),
        Tensor("d", large[1], datatype),
        Tensor("e", small, datatype),
    ]
    pieces, json_size = encoded(*tensors, request=asking(default=True))
    assert json_size is not None
    assert [len(piece) for piece in pieces] == [
        json_size,
        large[0].nbytes,
        small.nbytes,
        large[1].nbytes,
        small.nbytes,
    ]
    for index, array in ((1, large[0]), (3, large[1])):
        assert np.shares_memory(np.frombuffer(pieces[index], np.uint8), array)
    assert b"".join(pieces[1:]) == b"".join(t.array.tobytes() for t in tensors)


def test_arrays_of_any_layout_are_written_row_by_row() -> None:
    base = np.arange(24, dtype=np.int32).reshape(4, 6)
    for array in (base.T, base[::2, ::3], base[::-1], base.astype(">i4"), base[0, 0]):
        _, rest = parted(Tensor("o", np.asarray(array), "INT32"), binary=True)
        assert np.frombuffer(rest, "<i4").tolist() == np.asarray(array).ravel().tolist()


@pytest.mark.parametrize("strided", [False, True])
def test_arrays_in_several_pieces_are_copied_once(*, strided: bool) -> None:
    base = np.zeros((400, 2000), np.float32)
    array = base[:, ::2] if strided else base.T
    request = asking(default=True)
    parted(Tensor("warm", base[0], "FP32"), binary=True)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        encoded(Tensor("o", array, "FP32"), request=request)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert array.nbytes <= peak - before < 1.5 * array.nbytes


def test_arrays_of_another_type_than_the_tensor_says() -> None:
    assert parted(Tensor("o", np.array([1, 2]), "INT8"), binary=True)[1] == b"\x01\x02"
    with pytest.raises(ValueError, match="'o' has values beyond INT8"):
        parted(Tensor("o", np.array([300]), "INT8"), binary=True)
    with pytest.raises(TypeError):
        parted(Tensor("o", np.array([1.5]), "INT8"), binary=True)
    with pytest.raises(TypeError, match="bytes or str"):
        parted(Tensor("o", np.array([1], object), "BYTES"), binary=True)
