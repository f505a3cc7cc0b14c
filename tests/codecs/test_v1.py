"""V1 JSON: rows and columns in, predictions out."""

from __future__ import annotations

import json
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kserve_lite.codecs import json_tensors, v1
from kserve_lite.errors import InvalidInput
from kserve_lite.messages import InferRequest, InferResponse
from kserve_lite.tensors import Tensor


@pytest.fixture(params=[0, math.inf], ids=["fast", "referee"], autouse=True)
def _lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test of this file runs over both lanes."""
    monkeypatch.setattr(json_tensors, "FAST_BODY_SIZE", request.param)


def decoded(body: str, **datatypes: str) -> InferRequest:
    return v1.decode_tensors(
        body.encode(), model_name="m", datatype_of=datatypes.get, unnamed="x"
    )


def columns(body: str, **datatypes: str) -> dict[str, tuple[str, object]]:
    request = decoded(body, **datatypes)
    assert request.model_name == "m"
    assert request.id is None
    return {t.name: (t.datatype, t.array.tolist()) for t in request.inputs}


def refused(body: str, **datatypes: str) -> str:
    with pytest.raises(InvalidInput) as caught:
        decoded(body, **datatypes)
    return caught.value.reason


# --- JSON handlers ------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        '{"instances":[1,[2],{"a":null}]}',
        '{"instances":[]}',
        '{"inputs":{"a":1},"more":true}',
        '{"anything":0}',
        "[1,2]",
        '"text"',
        "null",
        "3.5",
    ],
)
def test_json_as_it_is(body: str) -> None:
    assert v1.decode(body.encode()) == json.loads(body)


@pytest.mark.parametrize("instances", ['"a"', "1", "null", "{}", "true"])
def test_instances_must_be_a_list(instances: str) -> None:
    body = f'{{"instances":{instances}}}'
    with pytest.raises(InvalidInput, match=r'^Expected "instances" to be a list$'):
        v1.decode(body.encode())
    assert refused(body) == 'Expected "instances" to be a list'


@pytest.mark.parametrize("body", ["", "{", '{"instances": [1}', "s3cr3t", "{'a': 1}"])
def test_malformed(body: str) -> None:
    for reason in (refused(body), refused(body, x="FP32")):
        assert reason.startswith("Unrecognized request format: ")
        assert "s3cr3t" not in reason
    with pytest.raises(InvalidInput, match=r"^Unrecognized request format: "):
        v1.decode(body.encode())


# --- rows ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instances", "datatype", "values"),
    [
        ("[1,2]", "INT64", [1, 2]),
        ("[[1,2.5],[3,4]]", "FP64", [[1.0, 2.5], [3.0, 4.0]]),
        ("[[[1]],[[2]]]", "INT64", [[[1]], [[2]]]),
        ("[true,false]", "BOOL", [True, False]),
        ('["a","é"]', "BYTES", [b"a", "é".encode()]),
        ("[]", "FP64", []),
        ('[{"b64":"/wA="},{"b64":""}]', "BYTES", [b"\xff\0", b""]),
        ('[[{"b64":"/w=="},"a"]]', "BYTES", [[b"\xff", b"a"]]),
    ],
)
def test_plain_rows_are_one_input(
    instances: str, datatype: str, values: object
) -> None:
    assert columns(f'{{"instances":{instances}}}') == {"x": (datatype, values)}


def test_rows_are_read_as_what_the_model_declares() -> None:
    assert columns('{"instances":[[1,2]]}', x="FP32") == {"x": ("FP32", [[1.0, 2.0]])}
    assert columns('{"instances":[1,0]}', x="BOOL") == {"x": ("BOOL", [True, False])}
    assert columns('{"instances":[1]}', x="BF16") == {"x": ("BF16", [1.0])}
    assert columns('{"instances":[1]}', y="FP32") == {"x": ("INT64", [1])}


def test_named_rows_are_one_input_a_name() -> None:
    body = '{"instances":[{"a":1,"b":[1.5,2]},{"b":[3,4.5],"a":2}]}'
    assert columns(body) == {
        "a": ("INT64", [1, 2]),
        "b": ("FP64", [[1.5, 2.0], [3.0, 4.5]]),
    }
    assert columns(body, a="FP32", b="FP32") == {
        "a": ("FP32", [1.0, 2.0]),
        "b": ("FP32", [[1.5, 2.0], [3.0, 4.5]]),
    }
    assert decoded(body).names == ("a", "b")


def test_named_rows_of_text_and_base64() -> None:
    body = '{"instances":[{"t":"a","b64":{"b64":"/w=="}},{"t":"b","b64":{"b64":""}}]}'
    assert columns(body) == {
        "t": ("BYTES", [b"a", b"b"]),
        "b64": ("BYTES", [b"\xff", b""]),
    }


def test_one_named_value_b64_is_bytes() -> None:
    assert columns('{"instances":[{"b64":"YQ=="}]}') == {"x": ("BYTES", [b"a"])}


def test_integers_and_floats_of_a_column_are_floats() -> None:
    body = '{"instances":[{"a":1},{"a":2.5}]}'
    assert columns(body) == {"a": ("FP64", [1.0, 2.5])}
    body = '{"instances":[{"a":[1]},{"a":[2.5]}]}'
    assert columns(body) == {"a": ("FP64", [[1.0], [2.5]])}


@pytest.mark.parametrize(
    "instances",
    [
        '[{"a":1},{"b":1}]',
        '[{"a":1},{"a":1,"b":2}]',
        '[{"a":1,"b":2},{"a":1}]',
        '[{"a":1},1]',
        '[{"a":1},[1]]',
        '[{"a":1},{}]',
    ],
)
def test_rows_must_have_the_same_names(instances: str) -> None:
    assert refused(f'{{"instances":{instances}}}') == (
        "The instances differ in the names of their values: each must have the names "
        "that the first one has."
    )


def test_columns_of_rows_must_fit_together() -> None:
    reason = "Input 'b': the rows of the data differ in length or depth."
    assert refused('{"instances":[{"b":[1]},{"b":[1,2]}]}') == reason
    assert refused('{"instances":[{"b":[1]},{"b":1}]}') == reason
    assert refused('{"instances":[{"b":1},{"b":[1]}]}') == reason


# --- columns ------------------------------------------------------------------------


def test_inputs_are_columns() -> None:
    body = '{"inputs":{"a":[1,2],"b":[[1.5],[2]]}}'
    assert columns(body) == {
        "a": ("INT64", [1, 2]),
        "b": ("FP64", [[1.5], [2.0]]),
    }
    assert columns(body, a="UINT8") == columns(body) | {"a": ("UINT8", [1, 2])}


def test_inputs_without_a_name() -> None:
    assert columns('{"inputs":[[1,2]]}') == {"x": ("INT64", [[1, 2]])}


def test_instances_come_before_inputs() -> None:
    assert columns('{"inputs":[1],"instances":[2]}') == {"x": ("INT64", [2])}


def test_unknown_members_are_ignored() -> None:
    body = '{"signature_name":"s","parameters":{"a":[1]},"instances":[2]}'
    assert columns(body) == {"x": ("INT64", [2])}


@pytest.mark.parametrize("inputs", ["1", '"a"', "null", "true"])
def test_inputs_must_be_lists(inputs: str) -> None:
    assert refused(f'{{"inputs":{inputs}}}') == "Input 'x': the data must be a list."


def test_no_columns_are_no_inputs() -> None:
    assert columns('{"inputs":{}}') == {}


def test_columns_must_be_lists() -> None:
    reason = "Input 'a': the data must be a list."
    assert refused('{"inputs":{"a":1}}') == reason
    assert refused('{"inputs":{"a":{"b":[1]}}}') == reason


@pytest.mark.parametrize("body", ["[1]", "1", "null", '"a"'])
def test_the_body_must_be_an_object(body: str) -> None:
    assert refused(body) == "The body must be an object with instances or inputs."


def test_the_body_must_have_data() -> None:
    reason = 'The body has neither "instances" nor "inputs".'
    assert refused('{"s3cr3t":[1]}') == reason
    assert refused("{}") == reason


def test_data_that_is_not_what_the_model_declares() -> None:
    body = '{"instances":[{"a":300}]}'
    assert refused(body, a="UINT8") == (
        "Input 'a': UINT8 cannot hold integers outside 0..255."
    )
    assert refused('{"instances":["s3cr3t"]}', x="FP32") == (
        "Input 'x': FP32 cannot hold strings."
    )


# --- answers ------------------------------------------------------------------------


def test_encode() -> None:
    value = {"predictions": np.array([[1.5, np.nan]], np.float32), 1: "é"}
    assert v1.encode(value) == '{"predictions":[[1.5,null]],"1":"é"}'.encode()
    assert v1.encode(None) == b"null"
    with pytest.raises(TypeError):
        v1.encode({"a": b"x"})


def answered(key: str = "predictions", **outputs: np.ndarray) -> object:
    tensors = tuple(Tensor.from_array(name, array) for name, array in outputs.items())
    return json.loads(v1.encode_tensors(InferResponse(tensors), key))


@pytest.mark.parametrize(
    ("array", "rows"),
    [
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (np.array([[1, 2], [3, 4]]).T, [[1, 3], [2, 4]]),
        (np.array([0.5, np.nan, np.inf], np.float32), [0.5, None, None]),
        (np.array([0.5], np.float16), [0.5]),
        (np.array([[0.5]], ml_dtypes.bfloat16), [[0.5]]),
        (np.array([True, False]), [True, False]),
        (np.array(3.0), 3.0),
        (np.zeros((2, 0)), [[], []]),
        (np.array(["a", "é"]), ["a", "é"]),
        (np.array([b"a", b"\xff"]), ["a", {"b64": "/w=="}]),
        (np.array([[b"a", "b"]], object), [["a", "b"]]),
        (np.array(b"a", object), "a"),
    ],
)
def test_one_output_is_its_rows(array: np.ndarray, rows: object) -> None:
    assert answered(y=array) == {"predictions": rows}
    assert answered("explanations", y=array) == {"explanations": rows}


def test_several_outputs_are_named_rows() -> None:
    assert answered(
        a=np.array([1, 2]),
        b=np.array([[0.5, 1], [2, np.nan]], np.float32),
        c=np.array([b"x", b"\xff"], object),
        d=np.array([0.5, 1], ml_dtypes.bfloat16),
        e=np.array([True, False]),
    ) == {
        "predictions": [
            {"a": 1, "b": [0.5, 1.0], "c": "x", "d": 0.5, "e": True},
            {"a": 2, "b": [2.0, None], "c": {"b64": "/w=="}, "d": 1.0, "e": False},
        ]
    }


def test_several_scalars_are_one_row() -> None:
    assert answered(a=np.array(1), b=np.array([2.0]), c=np.array(b"x", object)) == {
        "predictions": [{"a": 1, "b": 2.0, "c": "x"}]
    }


def test_several_outputs_must_have_as_many_rows() -> None:
    with pytest.raises(ValueError, match="differ in their number of rows"):
        answered(a=np.zeros(2), b=np.zeros(3))
    with pytest.raises(ValueError, match="differ in their number of rows"):
        answered(a=np.zeros(()), b=np.zeros(2))


FINITE = st.floats(allow_nan=False, allow_infinity=False)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(
        st.lists(
            st.floats(allow_nan=False, allow_infinity=False), min_size=2, max_size=2
        ),
        min_size=1,
        max_size=5,
    )
)
def test_rows_come_back_as_they_went(rows: list[list[float]]) -> None:
    request = decoded(json.dumps({"instances": rows}))
    (tensor,) = request.inputs
    text = v1.encode_tensors(InferResponse((tensor,)), "predictions")
    assert json.loads(text) == {"predictions": rows}
