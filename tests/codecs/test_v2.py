"""V2 JSON: the Open Inference Protocol's tensors in and out."""

from __future__ import annotations

import json
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from kserve_lite.codecs import json_tensors, v2
from kserve_lite.errors import InvalidInput
from kserve_lite.messages import (
    MAX_ENTRIES,
    InferRequest,
    InferResponse,
    RequestedOutput,
)
from kserve_lite.tensors import DATATYPES, Tensor, numpy_dtype

SECRET = 100 * "s3cr3t"


@pytest.fixture(params=[0, math.inf], ids=["fast", "referee"], autouse=True)
def _lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test of this file runs over both lanes."""
    monkeypatch.setattr(json_tensors, "FAST_BODY_SIZE", request.param)


def decoded(document: object) -> InferRequest:
    text = document if isinstance(document, str) else json.dumps(document)
    return v2.decode(text.encode(), model_name="m")


def refused(document: object) -> str:
    with pytest.raises(InvalidInput) as caught:
        decoded(document)
    reason = caught.value.reason
    assert "s3cr3t" not in reason
    return reason


def tensor(**changes: Any) -> dict[str, Any]:
    """A good input, with changes; a field that is `...` is left out."""
    fields = {"name": "x", "datatype": "FP32", "shape": [2], "data": [1, 2.5]}
    return {k: v for k, v in (fields | changes).items() if v is not ...}


def with_input(**changes: Any) -> dict[str, Any]:
    return {"inputs": [tensor(**changes)]}


# --- requests -----------------------------------------------------------------------


def test_a_request() -> None:
    request = decoded(
        {
            "id": "7",
            "model_name": "ignored",
            "parameters": {"a": 1, "b": 2.5, "c": "é", "d": True, "e": None},
            "inputs": [
                tensor(parameters={"p": "q", "r": None}),
                tensor(name="y", datatype="INT8", shape=[1, 2], data=[3, 4], more=[1]),
            ],
            "outputs": [{"name": "o", "parameters": {"binary_data": False}}],
            "unknown": {"x": [1, {"y": [2]}]},
        }
    )
    assert request.model_name == "m"
    assert request.id == "7"
    assert request.parameters == {"a": 1, "b": 2.5, "c": "é", "d": True}
    assert request.names == ("x", "y")
    assert request["x"].tolist() == [1.0, 2.5]
    assert request["x"].dtype == np.float32
    assert request["y"].tolist() == [[3, 4]]
    assert request.inputs[0].parameters == {"p": "q"}
    assert request.inputs[1].parameters == {}
    assert request.outputs == (RequestedOutput("o", {"binary_data": False}),)


def test_what_may_be_left_out() -> None:
    request = decoded(with_input())
    assert request.id is None
    assert request.parameters == {}
    assert request.outputs == ()
    same = decoded(with_input() | {"id": None, "parameters": None, "outputs": None})
    assert (same.id, same.parameters, same.outputs) == (None, {}, ())
    assert decoded(with_input() | {"id": ""}).id is None


@pytest.mark.parametrize("datatype", DATATYPES)
def test_datatypes_in_any_case(datatype: str) -> None:
    data = ["a"] if datatype == "BYTES" else [1]
    for given_as in (datatype, datatype.lower(), datatype.title()):
        request = decoded(with_input(datatype=given_as, shape=[1], data=data))
        assert request.inputs[0].datatype == datatype
        assert request["x"].dtype == numpy_dtype(datatype)


@pytest.mark.parametrize(
    ("shape", "data", "values"),
    [
        ([2], [1, 2], [1, 2]),
        ([2, 2], [1, 2, 3, 4], [[1, 2], [3, 4]]),
        ([2, 2], [[1, 2], [3, 4]], [[1, 2], [3, 4]]),
        ([4], [[1, 2], [3, 4]], [1, 2, 3, 4]),
        ([1, 4], [[1, 2], [3, 4]], [[1, 2, 3, 4]]),
        (["2", "1"], [1, 2], [[1], [2]]),
        ([], [5], 5),
        ([0], [], []),
        ([2, 0], [], [[], []]),
        ([2, 0], [[], []], [[], []]),
        ([0, 3], [], []),
        (32 * [1], [5], None),
    ],
)
def test_shapes(shape: list[Any], data: list[Any], values: object) -> None:
    for datatype in ("INT32", "FP64"):
        request = decoded(with_input(datatype=datatype, shape=shape, data=data))
        assert request.inputs[0].shape == tuple(map(int, shape))
        if values is not None:
            assert request["x"].tolist() == values


def test_bytes() -> None:
    data = [["a", "é"], [{"b64": "/w=="}, ""]]
    request = decoded(with_input(datatype="BYTES", shape=[2, 2], data=data))
    assert request["x"].tolist() == [[b"a", "é".encode()], [b"\xff", b""]]


def test_no_inputs() -> None:
    assert decoded({"inputs": []}).inputs == ()


# --- refusals -----------------------------------------------------------------------


@pytest.mark.parametrize("body", ["", "{", f"{SECRET}", f'{{"{SECRET}":1,}}'])
def test_malformed(body: str) -> None:
    assert refused(body).startswith("Unrecognized request format: ")


@pytest.mark.parametrize("body", ["[]", "1", "null", f'"{SECRET}"'])
def test_the_body_must_be_an_object(body: str) -> None:
    assert refused(body) == 'The body must be an object with "inputs".'


@pytest.mark.parametrize("inputs", [..., None, 1, SECRET, {"name": SECRET}])
def test_inputs_must_be_a_list(inputs: Any) -> None:
    document = {} if inputs is ... else {"inputs": inputs}
    assert refused(document) == 'The body must have "inputs", a list of tensors.'


@pytest.mark.parametrize("node", [1, None, SECRET, [tensor()]])
def test_an_input_must_be_an_object(node: object) -> None:
    assert refused({"inputs": [tensor(), node]}) == "inputs[1] must be an object."


@pytest.mark.parametrize("name", [..., None, 1, [SECRET], {"a": SECRET}])
def test_an_input_must_have_a_name(name: Any) -> None:
    reason = 'inputs[0] must have a "name", a string.'
    assert refused(with_input(name=name)) == reason


def test_names_must_differ() -> None:
    assert refused({"inputs": [tensor(), tensor()]}) == (
        "Two inputs have the same name."
    )


@pytest.mark.parametrize(
    ("datatype", "came"),
    [
        ("FP8", "'FP8'"),
        ("string", "'string'"),
        (..., "something else"),
        (None, "something else"),
        (1, "something else"),
        (["FP32"], "something else"),
        ("", "something else"),
        ("FP 32", "something else"),
        (SECRET, "something else"),
    ],
)
def test_the_datatype_must_be_known(datatype: Any, came: str) -> None:
    assert refused(with_input(datatype=datatype)) == (
        "Input 'x' must have a datatype out of BOOL, UINT8, UINT16, UINT32, "
        "UINT64, INT8, INT16, INT32, INT64, FP16, BF16, FP32, FP64, BYTES; "
        f"got {came}."
    )


@pytest.mark.parametrize(
    "shape",
    [
        ...,
        None,
        2,
        "2",
        {"a": 2},
        [2.0],
        [-1],
        [True],
        [None],
        [[2]],
        ["-2"],
        ["2.0"],
        [""],
        ["²"],
        ["٢"],
        [" 2"],
        ["1e0"],
        [SECRET],
        [2**63],
        [2**70],
        ["9" * 19 + "9"],
        ["0" * 30 + "2"],
    ],
)
def test_the_shape_must_be_sizes(shape: Any) -> None:
    assert refused(with_input(shape=shape)) == (
        "Input 'x' must have a \"shape\", a list of numbers from 0 up."
    )


@pytest.mark.parametrize("length", [33, 64, 65, 5000])
def test_a_shape_has_few_dimensions(length: int) -> None:
    assert refused(with_input(shape=length * [1], data=[1])) == (
        f"Input 'x' may have at most 32 dimensions, got {length}."
    )
    reason = refused(with_input(shape=length * [2**62], data=[1]))
    assert reason.startswith("Input 'x' may have at most 32 dimensions")


@pytest.mark.parametrize(
    ("shape", "data", "expected", "got"),
    [
        ([3], [1, 2], "FP32[3] must have 3 elements", 2),
        ([2, 2], [1, 2], "FP32[2,2] must have 4 elements", 2),
        ([], [1, 2], "FP32[] must have 1 elements", 2),
        ([], [], "FP32[] must have 1 elements", 0),
        ([0], [1], "FP32[0] must have 0 elements", 1),
        ([1], [[1, 2], [3, 4]], "FP32[1] must have 1 elements", 4),
    ],
)
def test_the_data_must_fit_the_shape(
    shape: list[int], data: list[Any], expected: str, got: int
) -> None:
    reason = refused(with_input(shape=shape, data=data))
    assert reason == f"Input 'x' of shape {expected}, got {got}."


@pytest.mark.parametrize("shape", [[0, 2**62, 2**62], [2**63 - 1, 0], [0, 2**62, 9]])
def test_empty_tensors_of_sizes_that_cannot_be(shape: list[int]) -> None:
    sizes = ",".join(map(str, shape))
    assert refused(with_input(shape=shape, data=[])) == (
        f"Input 'x': no tensor can have the shape FP32[{sizes}]."
    )


@pytest.mark.parametrize("data", [..., None])
def test_the_data_must_be_there(data: Any) -> None:
    assert refused(with_input(data=data)) == (
        "'data' field is missing for input 'x' for model 'm'"
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data": 1}, "the data must be a list."),
        ({"data": SECRET}, "the data must be a list."),
        ({"data": {"a": 1}}, "the data must be a list."),
        ({"data": [SECRET, SECRET]}, "FP32 cannot hold strings."),
        ({"data": [1, 1e39]}, "FP32 cannot hold numbers that are too large."),
        (
            {"data": [1, 128], "datatype": "INT8"},
            "INT8 cannot hold integers outside -128..127.",
        ),
        (
            {"data": [1, 1.5], "datatype": "int8"},
            "INT8 cannot hold numbers that are no integers in range.",
        ),
        ({"data": [[1], [2, 3]]}, "the rows of the data differ in length or depth."),
        ({"data": [True, False]}, "FP32 cannot hold booleans."),
    ],
)
def test_the_data_must_fit_the_datatype(changes: dict[str, Any], reason: str) -> None:
    assert refused(with_input(**changes)) == f"Input 'x': {reason}"


@pytest.mark.parametrize("request_id", [1, True, [SECRET], {"a": 1}, 1.5])
def test_the_id_must_be_a_string(request_id: object) -> None:
    assert refused(with_input() | {"id": request_id}) == '"id" must be a string.'


@pytest.mark.parametrize(
    ("parameters", "must_be"),
    [
        (1, "an object"),
        (SECRET, "an object"),
        ([], "an object"),
        ({"a": [SECRET]}, "strings, numbers or booleans"),
        ({"a": {"b": SECRET}}, "strings, numbers or booleans"),
    ],
)
def test_parameters_must_be_plain(parameters: object, must_be: str) -> None:
    places = {
        "the request": with_input() | {"parameters": parameters},
        "input 'x'": with_input(parameters=parameters),
        "output 'o'": with_input()
        | {"outputs": [{"name": "o", "parameters": parameters}]},
    }
    for whose, document in places.items():
        assert refused(document) == f'"parameters" of {whose} must be {must_be}.'


@pytest.mark.parametrize("outputs", [1, SECRET, {"name": "o"}, True])
def test_outputs_must_be_a_list(outputs: object) -> None:
    assert refused(with_input() | {"outputs": outputs}) == '"outputs" must be a list.'


@pytest.mark.parametrize("output", [1, SECRET, None, {}, {"name": 1}, ["o"]])
def test_an_output_must_have_a_name(output: object) -> None:
    assert refused(with_input() | {"outputs": [{"name": "o"}, output]}) == (
        'outputs[1] must have a "name", a string.'
    )


def test_requested_outputs_differ() -> None:
    outputs = [{"name": "o"}, {"name": "p"}, {"name": "o"}]
    assert refused(with_input() | {"outputs": outputs}) == (
        "Two requested outputs have the same name."
    )


@pytest.mark.parametrize("count", [MAX_ENTRIES, MAX_ENTRIES + 1])
def test_what_is_looked_at_one_by_one_is_bounded(count: int) -> None:
    nodes = [tensor(name=str(index), data=[1, 2]) for index in range(count)]
    many = {str(index): index for index in range(count)}
    asked = [{"name": str(index)} for index in range(count)]
    documents = [
        ("inputs", {"inputs": nodes}),
        ("outputs", with_input() | {"outputs": asked}),
        ("parameters", with_input() | {"parameters": many}),
        ("parameters", with_input(parameters=many)),
        (
            "parameters",
            with_input() | {"outputs": [{"name": "o", "parameters": many}]},
        ),
    ]
    for what, document in documents:
        if count <= MAX_ENTRIES:
            decoded(document)
        else:
            assert refused(document) == (
                f"A request may have at most 4096 {what}, got 4097."
            )


# --- answers ------------------------------------------------------------------------


def written(response: InferResponse) -> str:
    (body,), json_size = v2.encode(response)
    assert json_size is None
    return bytes(body).decode()


def output_of(array: np.ndarray) -> str:
    """The one output of an answer, from its shape on."""
    text = written(
        InferResponse((Tensor.from_array("y", array),), id="1", model_name="m")
    )
    start = '{"model_name":"m","id":"1","outputs":[{"name":"y","shape":'
    assert text.startswith(start)
    return text.removeprefix(start).removesuffix("}]}")


def test_an_answer() -> None:
    response = InferResponse(
        (
            Tensor("y", np.array([[1, 2]]), "INT64", {"p": 1}),
            Tensor("z", np.array([True]), "BOOL"),
        ),
        id="7",
        model_name="m",
        model_version="3",
        parameters={"q": "é"},
    )
    assert written(response) == (
        '{"model_name":"m","model_version":"3","id":"7","parameters":{"q":"é"},'
        '"outputs":[{"name":"y","shape":[1,2],"datatype":"INT64","parameters":{"p":1},'
        '"data":[1,2]},{"name":"z","shape":[1],"datatype":"BOOL","data":[true]}]}'
    )
    bare = InferResponse((), id="7", model_name="m")
    assert written(bare) == '{"model_name":"m","id":"7","outputs":[]}'


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (
            np.array([0.1], np.float32),
            '[1],"datatype":"FP32","data":[0.10000000149011612]',
        ),
        (np.array([0.1], np.float16), '[1],"datatype":"FP16","data":[0.0999755859375]'),
        (
            np.array([0.1], ml_dtypes.bfloat16),
            '[1],"datatype":"BF16","data":[0.10009765625]',
        ),
        (np.array([0.1]), '[1],"datatype":"FP64","data":[0.1]'),
        (
            np.array([np.nan, np.inf, -np.inf, 1], np.float32),
            '[4],"datatype":"FP32","data":[null,null,null,1.0]',
        ),
        (np.array([[1, 2], [3, 4]]), '[2,2],"datatype":"INT64","data":[1,2,3,4]'),
        (np.array([[1, 2], [3, 4]]).T, '[2,2],"datatype":"INT64","data":[1,3,2,4]'),
        (np.arange(6.0)[::3], '[2],"datatype":"FP64","data":[0.0,3.0]'),
        (np.arange(6)[::-3], '[2],"datatype":"INT64","data":[5,2]'),
        (np.array(5, np.int8), '[],"datatype":"INT8","data":[5]'),
        (np.zeros((2, 0), np.float32), '[2,0],"datatype":"FP32","data":[]'),
        (
            np.array([2**64 - 1], np.uint64),
            '[1],"datatype":"UINT64","data":[18446744073709551615]',
        ),
        (np.array([True, False]), '[2],"datatype":"BOOL","data":[true,false]'),
        (np.array([["a"], ["é"]]), '[2,1],"datatype":"BYTES","data":["a","é"]'),
        (np.array([b"a", "é"], object), '[2],"datatype":"BYTES","data":["a","é"]'),
        (np.array([b"a", b"bc"]), '[2],"datatype":"BYTES","data":["a","bc"]'),
    ],
)
def test_outputs(array: np.ndarray, text: str) -> None:
    assert output_of(array) == text


def test_bytes_that_are_no_text_cannot_be_said() -> None:
    with pytest.raises(InvalidInput) as caught:
        output_of(np.array([b"\xff"], object))
    assert caught.value.reason == (
        "Output 'y' holds bytes that are not UTF-8, which JSON cannot say: ask for "
        "binary output."
    )
    with pytest.raises(TypeError, match="holds NoneType"):
        output_of(np.array([None], object))


# --- answers that a handler spells out ----------------------------------------------


def response(**changes: Any) -> InferResponse:
    return v2.response_of({"outputs": [tensor(**changes)]})


def test_a_handlers_answer() -> None:
    answer = v2.response_of(
        {
            "id": "7",
            "model_name": "m",
            "model_version": 3,
            "parameters": {"a": 1},
            "outputs": [
                tensor(parameters={"p": 1}),
                tensor(name="y", datatype="int8", shape=[1, 2], data=[[3, 4]]),
            ],
        }
    )
    assert (answer.id, answer.model_name, answer.model_version) == ("7", "m", "3")
    assert answer.parameters == {"a": 1}
    assert [(t.name, t.datatype, t.parameters) for t in answer.outputs] == [
        ("x", "FP32", {"p": 1}),
        ("y", "INT8", {}),
    ]
    assert answer.outputs[0].array.dtype == np.float32
    assert answer.outputs[1].array.tolist() == [[3, 4]]


def test_a_handlers_shortest_answer() -> None:
    answer = response()
    assert (answer.id, answer.model_name, answer.model_version) == (None, None, None)
    assert answer.parameters == {}


def test_a_handlers_arrays_are_taken_as_they_are() -> None:
    array = np.array([[1, 2]], np.float32)
    answer = response(data=array, shape=(2,))
    assert answer.outputs[0].array.tolist() == [1.0, 2.0]
    assert np.shares_memory(answer.outputs[0].array, array)
    texts = response(datatype="BYTES", data=np.array(["a", "b"]))
    assert "a" in written(texts)


@pytest.mark.parametrize(
    ("data", "datatype"),
    [
        (np.array([1.0, 2.0]), "FP32"),
        (np.array([1, 2]), "FP16"),
        (np.array([1, 2], np.float32), "UINT8"),
        (np.array([[1], [2]], ml_dtypes.bfloat16), "INT64"),
        (np.array([1, 2], ">i4"), "INT64"),
    ],
)
def test_a_handlers_arrays_become_what_they_are_said_to_be(
    data: np.ndarray, datatype: str
) -> None:
    (output,) = response(data=data, datatype=datatype).outputs
    assert output.array.dtype == numpy_dtype(datatype)
    assert output.array.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": ...}, "name"),
        ({"shape": ...}, "shape"),
        ({"datatype": ...}, "datatype"),
        ({"data": ...}, "data"),
        ({"datatype": "FP8"}, "FP8"),
        ({"datatype": "FP8", "data": np.zeros(2)}, "FP8"),
        ({"datatype": None}, "upper"),
        ({"shape": [3]}, "reshape"),
        ({"shape": "a"}, "a"),
        ({"data": (1, 2)}, "tuple"),
        ({"data": None}, "NoneType"),
        ({"data": [1, "a"]}, "numbers and strings"),
        ({"data": [1j, 1]}, "complex"),
        ({"data": [1, 10**400]}, "too large"),
        ({"data": np.array([1.5, 2]), "datatype": "INT8"}, "no integers"),
        ({"data": np.array([1, 300]), "datatype": "INT8"}, "outside"),
        ({"data": np.array([1j, 2])}, "complex"),
    ],
)
def test_a_handlers_mistakes_are_worded_for_it(
    changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=r"^outputs\[0\] of the answer: ") as caught:
        response(**changes)
    assert said in str(caught.value)


@pytest.mark.parametrize("value", [{}, {"outputs": None}, {"outputs": {"x": 1}}])
def test_a_handlers_answer_needs_outputs(value: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match='needs "outputs", a list of tensors'):
        v2.response_of(value)


def test_a_handlers_output_must_be_a_dict() -> None:
    with pytest.raises(ValueError, match=r"^outputs\[1\] of the answer: "):
        v2.response_of({"outputs": [tensor(), 1]})
