"""JSON to arrays and back: two lanes, one meaning."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kserve_lite.codecs import json_tensors, v1, v2
from kserve_lite.codecs.json_tensors import (
    MAX_DIMENSIONS,
    Lane,
    _Odd,
    _read_fast,
    dumps,
    loads,
    read,
    strings,
    to_array,
)
from kserve_lite.errors import InvalidInput
from kserve_lite.messages import InferRequest
from kserve_lite.tensors import DATATYPES, numpy_dtype

Build: TypeAlias = Callable[[Any, Lane], Any]
SIZES = [0, math.inf]
lanes = pytest.mark.parametrize("size", SIZES, ids=["fast", "referee"])


def array_of(datatype: str | None) -> Build:
    """Read the whole document as one array."""

    def build(root: Any, lane: Lane) -> np.ndarray:
        return lane.array(root, datatype, "x")

    return build


def said(value: Any) -> Any:
    """A value as tests compare it: arrays by dtype, shape and bits."""
    if isinstance(value, np.ndarray):
        bits = value.tolist() if value.dtype == object else value.tobytes()
        return value.dtype.str, value.shape, bits, value.flags.writeable
    if isinstance(value, InferRequest):
        tensors = [
            (t.name, t.datatype, said(t.array), dict(t.parameters))
            for t in value.inputs
        ]
        return value.id, tensors, value.outputs, dict(value.parameters)
    return value


def outcome(read_it: Callable[[], Any], size: float) -> Any:
    """What reading gives with the fast lane from `size` bytes on; errors as text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_tensors, "FAST_BODY_SIZE", size)
        try:
            return said(read_it())
        except InvalidInput as error:
            return f"refused: {error.reason}"


def agreed(read_it: Callable[[], Any]) -> Any:
    """The outcome, which must be the same with and without the fast lane."""
    fast, referee = (outcome(read_it, size) for size in SIZES)
    assert fast == referee
    return referee


def is_fast(body: bytes, build: Build) -> bool:
    """Whether the fast lane answers for the body itself."""
    try:
        _read_fast(body, build)
    except (_Odd, InvalidInput):
        return False
    return True


# --- both lanes agree ---------------------------------------------------------------

INTEGERS = st.one_of(
    st.integers(-3, 3).map(str),
    st.integers(-(2**63), 2**64 - 1).map(str),
    st.sampled_from(
        [
            "-0",
            str(2**53 + 1),
            str(2**63 - 1),
            str(2**63),
            str(-(2**63)),
            str(-(2**63) - 1),
            str(2**64 - 1),
            str(2**64),
            "1" + 30 * "0",
        ]
    ),
)
FLOATS = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.floats(width=32, allow_nan=False, allow_infinity=False).map(repr),
    st.sampled_from(
        [
            "-0.0",
            "1.0",
            "0e5",
            "1E5",
            "1e+2",
            "-1.5e-3",
            "1e308",
            "-1.7976931348623157e308",
            "1e400",
            "5e-324",
            "1e-400",
            "9007199254740993.0",
            "18446744073709551616.0",
            "0.1000000000000000055511151231257827021181583404541015625",
        ]
    ),
)
WORDS = st.sampled_from(["true", "false", "null", '"a"', '"[1"', '"\\u00e9"', "{}"])
FAULTY = st.sampled_from(["01", "+1", "1.", ".5", "NaN", "Infinity", "tru", "'a'", ""])
LEAVES = [
    st.integers(-9, 9).map(str),
    INTEGERS,
    FLOATS,
    st.one_of(INTEGERS, FLOATS),
    st.sampled_from(["true", "false"]),
    st.sampled_from(['"a"', '""', '"\\ud83d\\ude00"', '{"b64": "YQ=="}']),
]
Tree: TypeAlias = Any  # a list of trees, or the text of a leaf


def written(tree: Tree, comma: str) -> str:
    if isinstance(tree, str):
        return tree
    return "[" + comma.join(written(child, comma) for child in tree) + "]"


def lists_in(tree: Tree) -> list[list[Tree]]:
    if isinstance(tree, str):
        return []
    return [tree, *(inner for child in tree for inner in lists_in(child))]


def plain_trees() -> st.SearchStrategy[Tree]:
    """Regular arrays of small integers."""
    row = st.lists(st.integers(0, 9).map(str), min_size=2, max_size=2)
    return st.one_of(row, st.lists(row, min_size=1, max_size=3))


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """Nested arrays, mostly regular, with at most some faults."""
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 1, 2, 3, 0]), max_size=3))
    leaf = draw(st.sampled_from(LEAVES))

    def grow(depth: int) -> Tree:
        if depth == len(shape):
            return draw(leaf)
        return [grow(depth + 1) for _ in range(shape[depth])]

    tree = grow(0)
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2]))):
        lists = lists_in(tree)
        if not lists:
            break
        target = draw(st.sampled_from(lists))
        other = draw(st.one_of(INTEGERS, FLOATS, WORDS, FAULTY))
        change = draw(st.sampled_from(["add", "drop", "nest", "leaf", "list"]))
        at = draw(st.integers(0, max(0, len(target) - 1)))
        if change == "add":
            target.insert(at, other)
        elif not target:
            target.append([])
        elif change == "drop":
            del target[at]
        elif change == "nest":
            target[at] = [target[at]]
        elif change == "leaf":
            target[at] = other
        else:
            target[at] = [other, other]
    return tree


@st.composite
def texts(draw: st.DrawFn) -> bytes:
    tree = draw(st.one_of(plain_trees(), trees()))
    text = written(tree, draw(st.sampled_from([",", ", ", ",\n\t"])))
    before, after = draw(
        st.sampled_from(
            [
                *3 * [("", ""), (" \r\n", "\t ")],
                ("\ufeff", ""),
                ("", "]"),
                ("", ",1"),
                ("", "\0"),
                ("[", ""),
                ("x", ""),
                ("\0", ""),
            ]
        )
    )
    return (before + text + after).encode()


DATATYPES_OR_NONE = st.sampled_from(
    [None, None, "FP32", "FP32", "FP64", "INT64", "INT32", "UINT64", *DATATYPES]
)
many = settings(
    deadline=None, max_examples=500, suppress_health_check=[HealthCheck.too_slow]
)


def test_an_array_is_the_same_in_both_lanes() -> None:
    taken: Counter[bool] = Counter()

    @many
    @given(body=texts(), datatype=DATATYPES_OR_NONE)
    @example(b"[[1,[2]],[3,4]]", None)
    @example(b"[[1,2],[3],[4,5,6]]", "FP32")
    @example(b"[[1,2],[3,[4]]]", "INT64")
    @example(b"[1,[2]]", "FP64")
    @example(b"[[1],2]", "FP64")
    @example(b"[[],[1,2]]", "FP64")
    @example(b"[]", None)
    @example(b"[[],[]]", "INT8")
    @example(b"[-0]", "FP32")
    @example(b"[18446744073709551615]", None)
    @example(b"[18446744073709551615, 0.5]", None)
    @example(b"[9007199254740993, 0.5]", "INT64")
    def check(body: bytes, datatype: str | None) -> None:
        build = array_of(datatype)
        agreed(lambda: read(body, build))
        taken[is_fast(body, build)] += 1

    check()
    assert min(taken[True], taken[False]) > 50


NAMES = st.sampled_from(
    ["a", "b", "instances", "inputs", "b64", "\\u0061", "x\\u0000y", "\u00e9", ""]
)


@st.composite
def v1_bodies(draw: st.DrawFn) -> bytes:
    values = trees().map(lambda tree: written(tree, ","))
    form = draw(st.sampled_from(["rows", "rows", "named", "named", "column", "odd"]))
    if form == "odd":
        pairs = draw(st.lists(st.tuples(NAMES, values), max_size=3))
        text = "{" + ",".join(f'"{name}":{value}' for name, value in pairs) + "}"
        return text.encode()
    if form == "column":
        return f'{{"inputs":{draw(values)}}}'.encode()
    if form == "rows":
        return f'{{"x":1,"instances":{draw(values)}}}'.encode()
    names = draw(st.lists(NAMES, min_size=1, max_size=2))
    rows = []
    count = draw(st.integers(1, 3))
    columns = [draw(st.sampled_from([LEAVES[0], LEAVES[3], values])) for _ in names]
    cells = [draw(column) for column in columns]
    for _ in range(count):
        if draw(st.integers(0, 3)) == 0:
            cells = [draw(column) for column in columns]
        row = [f'"{n}":{c}' for n, c in zip(names, cells, strict=True)]
        rows.append("{" + ",".join(row) + "}")
    return f'{{"instances":[{",".join(rows)}]}}'.encode()


FP32_A: dict[str, str | None] = {"a": "FP32"}
BUILD_V1 = partial(
    v1.build_tensors, model_name="m", datatype_of=FP32_A.get, unnamed="x"
)


def read_v1(body: bytes) -> InferRequest:
    return v1.decode_tensors(body, model_name="m", datatype_of=FP32_A.get, unnamed="x")


def test_a_v1_body_is_the_same_in_both_lanes() -> None:
    taken: Counter[bool] = Counter()

    @many
    @given(body=v1_bodies())
    @example(b'{"instances":[{"b":1},{"b":[1]}]}')
    @example(b'{"instances":[{"b":[1]},{"b":[1.0]}]}')
    @example(b'{"instances":[{"b":[]},{"b":[]}]}')
    @example(b'{"instances":[1],"instances":[2]}')
    @example(b'{"instances":[{"a":[1],"a":[2]}]}')
    @example(b'{"instances":[1,2],"\\u0000":1}')
    @example(b'{"instances":[[1,2]],"x":[[]]}')
    def check(body: bytes) -> None:
        agreed(lambda: read_v1(body))
        taken[is_fast(body, BUILD_V1)] += 1

    check()
    assert min(taken[True], taken[False]) > 50


OUTPUTS = [',"outputs":[{"name":"o"}]', ',"outputs":[1]']


@st.composite
def v2_bodies(draw: st.DrawFn) -> bytes:
    inputs = []
    for index in range(draw(st.integers(0, 2))):
        tree = draw(st.one_of(plain_trees(), plain_trees(), trees()))
        leaves = written(tree, ",").count(",") + 1
        shape = draw(
            st.sampled_from(
                [*3 * [f"[{leaves}]", f'[1,"{leaves}"]'], "[1]", "[]", "[0]", "[-1]"]
            )
        )
        datatype = draw(st.sampled_from([*3 * ["FP64", "fp32"], *DATATYPES, "FP8"]))
        fields = [
            f'"name":"i{index}"',
            f'"shape":{shape}',
            f'"datatype":"{datatype}"',
            f'"data":{written(tree, ",")}',
            *draw(
                st.lists(
                    st.sampled_from(
                        [
                            '"parameters":{"a":-0,"b":"\\u00e9","c":null}',
                            '"parameters":[1]',
                            '"parameters":{"a":[1]}',
                            '"more":{"x":[1]}',
                            '"more":1',
                        ]
                    ),
                    max_size=1,
                )
            ),
        ]
        inputs.append("{" + ",".join(draw(st.permutations(fields))) + "}")
    rest = draw(
        st.sampled_from(
            [
                "",
                "",
                ',"id":"7"',
                ',"id":7',
                ',"outputs":[{"name":"o"}]',
                ',"outputs":[1]',
            ]
        )
    )
    return f'{{"inputs":[{",".join(inputs)}]{rest}}}'.encode()


def test_a_v2_body_is_the_same_in_both_lanes() -> None:
    taken: Counter[bool] = Counter()

    @many
    @given(body=v2_bodies())
    def check(body: bytes) -> None:
        agreed(lambda: v2.decode(body, model_name="m"))
        taken[is_fast(body, partial(v2._build, model_name="m"))] += 1

    check()
    assert min(taken[True], taken[False]) > 50


@settings(deadline=None, max_examples=500)
@given(st.binary(max_size=30), st.binary(max_size=5))
def test_bytes_that_are_no_json(before: bytes, after: bytes) -> None:
    body = before + b'{"instances":[[1,2]]}' + after
    agreed(lambda: read_v1(body))
    agreed(lambda: v2.decode(body, model_name="m"))


@pytest.mark.parametrize(
    "body",
    [
        b"[[1,2],[3,4]]",
        b"[1.5,2]",
        b"[[[1]]]",
        b" [ 1 , 2 ] ",
    ],
)
def test_the_fast_lane_takes_plain_numbers(body: bytes) -> None:
    assert is_fast(body, array_of(None))
    assert is_fast(body, array_of("FP32"))


def test_the_fast_lane_takes_all_of_64_bits() -> None:
    assert is_fast(b"[0,18446744073709551615]", array_of("UINT64"))
    assert is_fast(b"[9223372036854775807,-9223372036854775808]", array_of("INT64"))


@pytest.mark.parametrize(
    "body",
    [
        b"[[1,[2]],[3,4]]",
        b"[[1,2],[3],[4,5,6]]",
        b"[1,[2]]",
        b"[[1],2]",
        b"[[1,2],[3]]",
        b"[[[1,2]],[[3],[4]]]",
        b"[[],[1]]",
        b"[]",
        b"[true]",
        b"[null]",
        b'["a"]',
        b"[1,true]",
        b"[{}]",
        b"\xef\xbb\xbf[1]",
        b"[1]]",
        b"[1",
        b"[1e400]",
        b"[18446744073709551616]",
    ],
)
def test_the_fast_lane_leaves_the_rest_to_the_referee(body: bytes) -> None:
    for datatype in (None, "FP32", "INT64", "UINT64"):
        assert not is_fast(body, array_of(datatype))
        agreed(lambda: read(body, array_of(datatype)))  # noqa: B023


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
@lanes
def test_every_kind_of_body(
    kind: type, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_tensors, "FAST_BODY_SIZE", size)
    array = read(kind(b"[[1,2],[3,4]]"), array_of("INT16"))
    assert array.tolist() == [[1, 2], [3, 4]]
    assert array.dtype == np.int16


def test_large_bodies_go_through_the_fast_lane() -> None:
    lanes_seen: list[str] = []

    def build(root: Any, lane: Lane) -> np.ndarray:
        lanes_seen.append(type(lane).__name__)
        return lane.array(root, "FP32", "x")

    values = np.arange(5000, dtype=np.float32).reshape(50, 100)
    assert (read(dumps(values), build) == values).all()
    read(b"[1]", build)
    assert lanes_seen == ["_FastLane", "_Referee"]


@pytest.mark.parametrize(
    "depth", [1, 31, 32, 33, 63, 64, 65, 66, 300, 500, 1022, 1023, 1024, 1025, 50_000]
)
@pytest.mark.parametrize("inside", ["", "1", "1.5,2", "true", '"a"'])
def test_deep_nesting(depth: int, inside: str) -> None:
    text = depth * "[" + inside + depth * "]"
    taken = depth <= MAX_DIMENSIONS
    for datatype in (None, "FP64", "BYTES"):
        result = agreed(lambda: read(text.encode(), array_of(datatype)))  # noqa: B023
        fits = (
            datatype is None
            or inside == ""
            or (inside == '"a"') == (datatype == "BYTES")
        )
        if inside == "true" and datatype == "FP64":
            fits = False
        assert isinstance(result, str) is not (taken and fits)
    for body in (f'{{"instances":{text}}}', f'{{"instances":[{{"a":{text}}}]}}'):
        agreed(lambda: read_v1(body.encode()))  # noqa: B023
    document = f'{{"inputs":{text},"parameters":{text},"more":{text}}}'.encode()
    agreed(lambda: v2.decode(document, model_name="m"))


def test_deep_objects() -> None:
    for depth in (10, 400, 1000, 1030, 20_000):
        text = (depth * '{"a":' + "1" + depth * "}").encode()
        agreed(lambda: read_v1(b'{"instances":[' + text + b"]}"))  # noqa: B023
        agreed(
            lambda: v2.decode(
                b'{"inputs":[],"parameters":' + text + b"}",  # noqa: B023
                model_name="m",
            )
        )


# --- what a datatype holds ---------------------------------------------------------


def read_as(text: str, datatype: str | None, size: float) -> np.ndarray:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_tensors, "FAST_BODY_SIZE", size)
        array: np.ndarray = read(text.encode(), array_of(datatype))
        return array


def refused(text: str, datatype: str | None) -> str:
    """The one reason that both lanes refuse with; it names the input."""
    result = agreed(lambda: read(text.encode(), array_of(datatype)))
    assert isinstance(result, str)
    assert result.startswith("refused: Input 'x': ")
    return result.removeprefix("refused: Input 'x': ")


INTEGER_TYPES = [row.name for row in DATATYPES.values() if row.kind == "int"]
FLOAT_TYPES = [row.name for row in DATATYPES.values() if row.kind == "float"]


@lanes
@pytest.mark.parametrize("datatype", INTEGER_TYPES)
def test_bounds_of_integers(datatype: str, size: float) -> None:
    bounds = np.iinfo(numpy_dtype(datatype))
    lowest, highest = int(bounds.min), int(bounds.max)
    array = read_as(f"[{lowest},{highest}]", datatype, size)
    assert array.dtype == numpy_dtype(datatype)
    assert array.tolist() == [lowest, highest]
    for one_beyond in (lowest - 1, highest + 1):
        assert datatype in refused(f"[{one_beyond}]", datatype)
        assert datatype in refused(f"[1,{one_beyond}]", datatype)
        assert datatype in refused(f"[-1,{one_beyond}]", datatype)


@lanes
@pytest.mark.parametrize("datatype", INTEGER_TYPES)
def test_whole_floats_are_integers(datatype: str, size: float) -> None:
    array = read_as("[1.0,2e0,-0.0]", datatype, size)
    assert array.dtype == numpy_dtype(datatype)
    assert array.tolist() == [1, 2, 0]
    for text in ("[1.5]", "[1,1.5]", "[1e-300]", "[1e300]", "[-1e19,1]"):
        assert datatype in refused(text, datatype)


@pytest.mark.parametrize("datatype", ["INT64", "UINT64"])
def test_integers_are_never_rounded(datatype: str) -> None:
    """A double beside a large integer must not take its last digit."""
    assert datatype in refused("[9007199254740993, 1.0]", datatype)
    assert datatype in refused("[9007199254740993.0]", datatype)
    exact = read_as("[9007199254740993]", datatype, 0)
    assert exact.tolist() == [9007199254740993]


LARGEST = {
    "FP16": ("65504", "65519.99", "65520"),
    "BF16": ("3.3895313892515355e38", "3.39e38", "3.3961775292304957e38"),
    "FP32": ("3.4028234663852886e38", "3.40282350e38", "3.4028235677973366e38"),
}


@lanes
@pytest.mark.parametrize("datatype", LARGEST)
@pytest.mark.parametrize("sign", ["", "-"])
def test_bounds_of_floats(datatype: str, sign: str, size: float) -> None:
    largest, rounds_to_it, beyond = LARGEST[datatype]
    dtype = numpy_dtype(datatype)
    array = read_as(f"[{sign}{largest},{sign}{rounds_to_it}]", datatype, size)
    assert array.dtype == dtype
    highest = float(dtype.type(largest))
    assert np.abs(array.astype(np.float64)).tolist() == [highest, highest]
    for text in (beyond, "1e300"):
        assert refused(f"[0,{sign}{text}]", datatype) == (
            f"{datatype} cannot hold numbers that are too large."
        )


@lanes
@pytest.mark.parametrize("datatype", FLOAT_TYPES)
def test_integers_are_floats(datatype: str, size: float) -> None:
    array = read_as("[1,-0,2]", datatype, size)
    assert array.dtype == numpy_dtype(datatype)
    assert array.astype(np.float64).tolist() == [1.0, 0.0, 2.0]


@lanes
@pytest.mark.parametrize("datatype", [*FLOAT_TYPES, None])
def test_the_sign_of_zero_stays(datatype: str | None, size: float) -> None:
    array = read_as("[-0.0,0.0]", datatype, size)
    assert np.signbit(array.astype(np.float64)).tolist() == [True, False]


@lanes
def test_tiny_floats(size: float) -> None:
    array = read_as("[5e-324,1e-400,-1e-400,2.2250738585072014e-308]", "FP64", size)
    assert array.tolist() == [5e-324, 0.0, -0.0, 2.2250738585072014e-308]
    assert read_as("[1e-46,1.4e-45]", "FP32", size).tolist() == [0.0, 2.0**-149]


@pytest.mark.parametrize("datatype", [*DATATYPES, None])
def test_numbers_beyond_a_double_are_malformed(datatype: str | None) -> None:
    result = agreed(lambda: read(b"[1e400]", array_of(datatype)))
    assert result.startswith("refused: Unrecognized request format: ")
    assert "1e400" not in result


@lanes
@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("[1,2]", np.int64),
        ("[9223372036854775807,-9223372036854775808]", np.int64),
        ("[9223372036854775808,0]", np.uint64),
        ("[18446744073709551616]", np.float64),
        ("[1,2.0]", np.float64),
        ("[18446744073709551615,0.5]", np.float64),
        ("[]", np.float64),
        ("[[],[]]", np.float64),
        ("[true,false]", np.bool_),
        ('["a"]', object),
    ],
)
def test_what_nothing_declares(text: str, dtype: type, size: float) -> None:
    array = read_as(text, None, size)
    assert array.dtype == dtype
    expected = [b"a"] if dtype is object else np.array(json.loads(text), dtype).tolist()
    assert array.tolist() == expected


def test_integers_that_no_datatype_holds_together() -> None:
    assert "integers out of range" in refused("[-1,18446744073709551615]", None)


@lanes
@pytest.mark.parametrize("datatype", DATATYPES)
@pytest.mark.parametrize(("text", "shape"), [("[]", (0,)), ("[[],[]]", (2, 0))])
def test_empty_arrays(
    text: str, shape: tuple[int, ...], datatype: str, size: float
) -> None:
    array = read_as(text, datatype, size)
    assert array.shape == shape
    assert array.dtype == numpy_dtype(datatype)


@lanes
def test_booleans(size: float) -> None:
    assert read_as("[[true],[false]]", "BOOL", size).tolist() == [[True], [False]]
    assert read_as("[1,0]", "BOOL", size).tolist() == [True, False]
    assert read_as("[1.0,0]", "BOOL", size).tolist() == [True, False]
    assert read_as("[1.0,0]", "BOOL", size).dtype == np.bool_


MIXED = "the elements must be all numbers, all booleans or all strings, got "


@pytest.mark.parametrize(
    ("text", "datatype", "reason"),
    [
        ("[2]", "BOOL", "BOOL cannot hold numbers other than 0 and 1."),
        ("[true]", "FP32", "FP32 cannot hold booleans."),
        ("[true]", "INT8", "INT8 cannot hold booleans."),
        ("[true]", "BYTES", "BYTES cannot hold booleans."),
        ("[1]", "BYTES", "BYTES cannot hold numbers."),
        ('["a"]', "FP32", "FP32 cannot hold strings."),
        ('["a"]', "BOOL", "BOOL cannot hold strings."),
        ("[true,1]", "FP32", "booleans and numbers are mixed."),
        ("[true,1]", None, "booleans and numbers are mixed."),
        (
            '[1,"a"]',
            None,
            MIXED + "numbers and strings.",
        ),
        (
            "[1,null]",
            "FP32",
            MIXED + "null and numbers.",
        ),
        (
            "[{},true]",
            None,
            MIXED + "booleans and objects.",
        ),
        ("[[1],[2,3]]", None, "the rows of the data differ in length or depth."),
        ("[[1],2]", "FP32", "the rows of the data differ in length or depth."),
        ("[[true],true]", None, "the rows of the data differ in length or depth."),
        ('[["a"],"b"]', "BYTES", "the rows of the data differ in length or depth."),
        ('[["a"],["b","c"]]', None, "the rows of the data differ in length or depth."),
        ("1", "FP32", "the data must be a list."),
        ("{}", None, "the data must be a list."),
        ('"a"', "BYTES", "the data must be a list."),
        ("null", "BYTES", "the data must be a list."),
        ('["a",{"b64":"!"}]', "BYTES", "b64 is not valid base64."),
        ('[{"b64":"YQ"}]', None, "b64 is not valid base64."),
        ('[{"b64":"\u00e9"}]', None, "b64 is not valid base64."),
        (
            '[{"b64":"YQ==","c":1}]',
            None,
            'an object among the data must be {"b64": "<base64 text>"}.',
        ),
        (
            '[{"b64":1}]',
            None,
            'an object among the data must be {"b64": "<base64 text>"}.',
        ),
    ],
)
def test_refused_data(text: str, datatype: str | None, reason: str) -> None:
    assert refused(text, datatype) == reason


def test_refusals_repeat_nothing_of_the_data() -> None:
    secret = 100 * "s3cr3t"
    for body in (
        f'["{secret}",1]',
        f'[{{"b64":"{secret}!"}}]',
        f'[{{"{secret}":1}}]',
        f'{{"{secret}":1}}',
        f'["{secret}"',
        f'"{secret}" {secret}',
        secret,
    ):
        for datatype in (None, "FP32"):
            result = agreed(lambda: read(body.encode(), array_of(datatype)))  # noqa: B023
            assert result.startswith("refused: ")
            assert "s3cr3t" not in result


@lanes
def test_strings_and_base64(size: float) -> None:
    array = read_as('[["a","\\u00e9"],[{"b64":"/wA="},""]]', None, size)
    assert array.dtype == object
    assert array.tolist() == [[b"a", "é".encode()], [b"\xff\0", b""]]


@pytest.mark.parametrize(
    "body", [b"", b" ", b"{", b'{"a":1,}', b"[1]x", b"\xff", b'"\xff"', b'"\\ud800"']
)
def test_malformed_json(body: bytes) -> None:
    with pytest.raises(InvalidInput, match=r"^Unrecognized request format: .+"):
        loads(body)


def test_rows_of_a_handler_are_named_by_their_type() -> None:
    with pytest.raises(InvalidInput, match="got complex and numbers"):
        to_array([1, 1j], "FP32", "x")


# --- writing --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": [1, 2.5, None, True, "é"]}, '{"a":[1,2.5,null,true,"é"]}'),
        ({1: 2, None: 3}, '{"1":2,"null":3}'),
        ([math.nan, math.inf, -math.inf], "[null,null,null]"),
        (np.array([1.0, np.nan, np.inf]), "[1.0,null,null]"),
        (np.arange(6).reshape(2, 3), "[[0,1,2],[3,4,5]]"),
        (np.arange(6).reshape(2, 3).T, "[[0,3],[1,4],[2,5]]"),
        (np.arange(6)[::-2], "[5,3,1]"),
        (np.asfortranarray(np.ones((2, 1), np.float32)), "[[1.0],[1.0]]"),
        (np.array(2.5), "2.5"),
        (np.array(7, np.uint64), "7"),
        (np.array(np.nan), "null"),
        (np.float32(0.5), "0.5"),
        (np.float16(0.5), "0.5"),
        (np.int8(-3), "-3"),
        (np.bool_(True), "true"),
        (np.array([True, False]), "[true,false]"),
        (np.array([0.5, 2], np.float16), "[0.5,2.0]"),
        (np.array([0.5, np.nan], ml_dtypes.bfloat16), "[0.5,null]"),
        (np.array([[1, 2], [3, 4]], ml_dtypes.bfloat16).T, "[[1.0,3.0],[2.0,4.0]]"),
        (np.array(0.5, ml_dtypes.bfloat16), "0.5"),
        (ml_dtypes.bfloat16(0.5), "0.5"),
        (np.array(["a", "é"]), '["a","é"]'),
        (np.array([b"a", b"b"]), '["a","b"]'),
        (np.array([["a", b"b"]], object), '[["a","b"]]'),
        (np.array("a"), '"a"'),
        (np.array([], np.float32), "[]"),
        (np.zeros((2, 0)), "[[],[]]"),
        (np.array([2**64 - 1], np.uint64), "[18446744073709551615]"),
        ({"a": {"b": np.array([1])}}, '{"a":{"b":[1]}}'),
    ],
)
def test_dumps(value: object, text: str) -> None:
    assert dumps(value).decode() == text


@pytest.mark.parametrize(
    "value",
    [
        b"a",
        {1, 2},
        object(),
        2**64,
        np.array([1j]),
        np.complex64(1j),
        np.array([b"\xff"], object),
        np.array([None], object),
        np.bytes_(b"a"),
        "\ud800",
        {(1, 2): 3},
    ],
)
def test_dumps_refuses_what_json_cannot_say(value: object) -> None:
    with pytest.raises(TypeError):
        dumps(value)


def test_strings() -> None:
    array = strings(np.array([[b"a", "b"], ["é".encode(), b""]], object), "x")
    assert array.shape == (2, 2)
    assert array.dtype == object
    assert array.tolist() == [["a", "b"], ["é", ""]]
    assert strings(np.array(b"a", object), "x").shape == ()
    assert strings(np.array(["a", "bc"]), "x").tolist() == ["a", "bc"]
    assert strings(np.array([b"a", b"bc"]), "x").tolist() == ["a", "bc"]
    assert strings(np.empty((0, 3), object), "x").shape == (0, 3)


def test_strings_refuse_bytes_that_are_no_text() -> None:
    with pytest.raises(InvalidInput, match="are not UTF-8"):
        strings(np.array([b"a", b"\xff"], object), "x")
    with pytest.raises(TypeError, match="a BYTES tensor holds int"):
        strings(np.array([b"a", 1], object), "x")


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 3), st.sampled_from(list(DATATYPES)), st.randoms())
def test_what_dumps_writes_json_reads(ndim: int, datatype: str, chance: Any) -> None:
    shape = tuple(chance.randrange(4) for _ in range(ndim))
    values = np.array([chance.randrange(2) for _ in range(math.prod(shape))])
    array = values.reshape(shape).astype(numpy_dtype(datatype))
    if datatype == "BYTES":
        array = values.astype("U").astype(object).reshape(shape)
    assert json.loads(dumps(array.T)) == array.T.tolist()
