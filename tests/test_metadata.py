"""Declared inputs and outputs: how they are declared, shown and enforced.

What may be sent is the same on every protocol, so one table of requests goes over V1,
V2 and gRPC to real servers. Nothing here looks inside the package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Annotated, Any, NamedTuple

import grpc
import httpx
import numpy as np
import numpy.typing as npt
import pytest
import torch

from kserve_lite import (
    InferRequest,
    InferResponse,
    Model,
    ModelDefinitionError,
    Tensor,
    TensorSpec,
)
from tests.clients.calls import Stub, message
from tests.support import ServerThread

PATIENCE = 20
CONTENTS = {"FP32": "fp32", "FP64": "fp64", "INT64": "int64", "BOOL": "bool"}
PROTOCOLS = ("v1", "v2", "grpc")

A = TensorSpec("FP32", [-1, 2], "a")
B = TensorSpec("INT64", [-1], "b")
MASK = TensorSpec("BOOL", [-1], "mask", optional=True)

Inputs = dict[str, tuple[str, Any]]
Predict = Callable[..., Any]


class Answer(NamedTuple):
    """error: the server's words, None for an answer; data: outputs by name."""

    status: object
    error: str | None
    data: Any


class Asker:
    """Asks the models of a server the same thing over every protocol."""

    def __init__(self, *models: Model) -> None:
        self._models = models
        self._stack = ExitStack()

    def __enter__(self) -> Asker:
        server = self._stack.enter_context(ServerThread(*self._models))
        self.http = self._stack.enter_context(
            httpx.Client(base_url=server.url, timeout=PATIENCE)
        )
        channel = grpc.insecure_channel(
            f"127.0.0.1:{server.port}", [("grpc.use_local_subchannel_pool", 1)]
        )
        self.stub = Stub(self._stack.enter_context(channel))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def ask(self, protocol: str, model: str, inputs: Inputs) -> Answer:
        return {"v1": self._v1, "v2": self._v2, "grpc": self._grpc}[protocol](
            model, inputs
        )

    def post(self, path: str, body: object) -> Answer:
        answer = self.http.post(path, json=body)
        value = answer.json()
        wrong = answer.status_code != 200
        return Answer(answer.status_code, value["error"] if wrong else None, value)

    def _v1(self, model: str, inputs: Inputs) -> Answer:
        """As columns; rows of `{}` where there are none."""
        columns = {name: data for name, (_, data) in inputs.items()}
        body: object = {"inputs": columns} if columns else {"instances": [{}]}
        return self.post(f"/v1/models/{model}:predict", body)

    def _v2(self, model: str, inputs: Inputs) -> Answer:
        tensors = [
            {"name": n, "datatype": d, "shape": list(np.shape(data)), "data": data}
            for n, (d, data) in inputs.items()
        ]
        answer = self.post(f"/v2/models/{model}/infer", {"inputs": tensors})
        if answer.error is not None:
            return answer
        return answer._replace(
            data={o["name"]: o["data"] for o in answer.data["outputs"]}
        )

    def _grpc(self, model: str, inputs: Inputs) -> Answer:
        request = message("ModelInferRequest", model_name=model)
        for name, (datatype, data) in inputs.items():
            array = np.array(data)
            tensor = request.inputs.add(name=name, datatype=datatype, shape=array.shape)
            _contents(tensor).extend(array.ravel().tolist())
        try:
            answer = self.stub.ModelInfer(request, timeout=PATIENCE)
        except grpc.RpcError as error:
            call: Any = error
            return Answer(call.code(), call.details(), None)
        return Answer(
            grpc.StatusCode.OK, None, {o.name: [*_contents(o)] for o in answer.outputs}
        )


def _contents(tensor: Any) -> Any:
    return getattr(tensor.contents, f"{CONTENTS[tensor.datatype]}_contents")


BAD = {"v1": 400, "v2": 400, "grpc": grpc.StatusCode.INVALID_ARGUMENT}
FAILED = {"v1": 500, "v2": 500, "grpc": grpc.StatusCode.INTERNAL}

# --- definition ---------------------------------------------------------------------


def one(x: np.ndarray) -> np.ndarray:
    return x


def two(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return a, b


def of_request(request: InferRequest) -> dict[str, np.ndarray]:
    return {name: request[name] for name in request.names}


def of_json(payload: Any) -> Any:
    return payload


def annotated(
    a: Annotated[np.ndarray, A], b: Annotated[np.ndarray, B]
) -> tuple[Annotated[np.ndarray, A], Annotated[np.ndarray, B]]:
    return a, b


def namesakes(
    a: Annotated[np.ndarray, TensorSpec("FP32", [-1], "b")], b: np.ndarray
) -> object:
    return a, b


def returns_namesakes(
    x: np.ndarray,
) -> tuple[
    Annotated[np.ndarray, TensorSpec("FP32", [-1], "output-1")],
    Annotated[np.ndarray, TensorSpec("FP32", [-1])],
]:
    return x, x


def returns_optional(
    x: np.ndarray,
) -> Annotated[np.ndarray, TensorSpec("FP32", [-1], optional=True)]:
    return x


def must_have_optional(x: np.ndarray, mask: Annotated[np.ndarray, MASK]) -> object:
    return x, mask


ANY = TensorSpec("FP32", [-1])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"inputs": [A, A]}, "two inputs named 'a'"),
        ({"inputs": [A, ANY]}, "without a name"),
        ({"inputs": A}, "list of TensorSpec"),
        ({"inputs": ["FP32"]}, "list of TensorSpec"),
        ({"inputs": "FP32"}, "list of TensorSpec"),
        ({"outputs": {"a": A}}, "list of TensorSpec"),
        ({"outputs": [A, A]}, "two outputs named 'a'"),
        (
            {"outputs": [TensorSpec("FP32", [1], "output-1"), ANY]},
            "two outputs named 'output-1'",
        ),
        ({"outputs": [MASK]}, "optional output"),
        ({"example": [1, 2]}, "must be a request body, a dict; it is list"),
        ({"predict": namesakes}, "named 'b'"),
        ({"predict": returns_namesakes}, "two outputs named 'output-1'"),
        ({"predict": returns_optional}, "optional output"),
        ({"predict": must_have_optional}, "'mask'.*cannot be left out"),
    ],
)
def test_what_cannot_be_declared(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelDefinitionError, match=words):
        Model("m", **fields)


def optional_mask(a: np.ndarray, mask: np.ndarray | None = None) -> object:
    return a, mask


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"predict": two, "inputs": [A]}, r"declares 1 inputs.*takes 2 \(a, b\)"),
        ({"predict": one, "inputs": [A, B]}, r"declares 2 inputs.*takes 1 \(x\)"),
        ({"predict": annotated, "inputs": [A, B]}, "'a'.*one of the two places"),
        ({"predict": annotated, "outputs": [A, B]}, "predict handler.*two places"),
        ({"predict": of_request, "inputs": [ANY]}, "without a name"),
        ({"predict": of_json, "inputs": [ANY]}, "without a name"),
        ({"predict": two, "inputs": [A, MASK]}, "'b'.*cannot be left out"),
        (
            {"predict": of_json, "preprocess": one, "inputs": [A, B]},
            "preprocess handler 'one' takes 1",
        ),
        (
            {"predict": of_json, "explain": one, "inputs": [A, B]},
            "explain handler 'one' takes 1",
        ),
        (
            {"predict": of_json, "postprocess": annotated, "outputs": [A]},
            "postprocess handler",
        ),
    ],
)
def test_declarations_that_do_not_fit_the_handlers_end_the_start(
    fields: dict[str, Any], words: str
) -> None:
    model = Model("m", **fields)
    with pytest.raises(ModelDefinitionError, match=words):
        model.freeze()
    # Nothing was half done: it fails in the same words again.
    with pytest.raises(ModelDefinitionError, match=words):
        model.freeze()


def test_the_example_is_kept() -> None:
    body = {"instances": [1]}
    assert Model("m", predict=of_json, example=body).example is body
    assert Model("m", predict=of_json).example is None


# --- shown --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        Model("m", predict=annotated),
        Model("m", predict=two, inputs=[A, B], outputs=[A, B]),
        Model("m", predict=of_request, inputs=(A, B), outputs=(A, B)),
        Model("m", predict=of_json, inputs=[A, B], outputs=[A, B]),
        Model("m", predict=two, preprocess=of_json, inputs=[A, B], outputs=[A, B]),
    ],
    ids=["annotations", "arrays", "request", "json", "preprocess"],
)
def test_metadata_is_the_same_however_it_was_declared(model: Model) -> None:
    assert model.inputs == model.outputs == (A, B)
    with Asker(model) as asker:
        assert model.inputs == model.outputs == (A, B)
        shown = asker.http.get("/v2/models/m").json()
        assert shown["inputs"] == [
            {"name": "a", "datatype": "FP32", "shape": [-1, 2]},
            {"name": "b", "datatype": "INT64", "shape": [-1]},
        ]
        assert shown["outputs"] == shown["inputs"]
        told = asker.stub.ModelMetadata(message("ModelMetadataRequest", name="m"))
        for specs in (told.inputs, told.outputs):
            assert [(s.name, s.datatype, list(s.shape)) for s in specs] == [
                ("a", "FP32", [-1, 2]),
                ("b", "INT64", [-1]),
            ]


def test_names_that_a_declaration_lacks() -> None:
    model = Model("m", inputs=[ANY], outputs=[ANY, ANY])
    assert model.inputs == (ANY,)  # nobody names it yet
    model.predict(one)
    assert [spec.name for spec in model.inputs] == ["x"]
    assert [spec.name for spec in model.outputs] == ["output-0", "output-1"]


def test_the_constructor_says_whether_an_input_is_optional() -> None:
    def arrays(a: np.ndarray, mask: np.ndarray | None = None) -> object:
        return a, mask

    plain = TensorSpec("BOOL", [-1], "mask")
    for model in (
        Model("m", predict=of_request, inputs=[A, MASK]),
        Model("m", predict=arrays, inputs=[A, MASK]),
        Model("m", predict=arrays, inputs=[A, plain]),  # the parameter says it
    ):
        assert model.inputs == (A, MASK)


# --- enforced -----------------------------------------------------------------------

A_DATA = ("FP32", [[1.0, 2.0]])
B_DATA = ("INT64", [3])
MASK_DATA = ("BOOL", [True])
LISTED = "The model takes the inputs a, b, mask (optional);"

REFUSED: dict[str, tuple[Inputs, str]] = {
    "one missing": ({"a": A_DATA}, f"{LISTED} missing: b."),
    "two missing": ({"mask": MASK_DATA}, f"{LISTED} missing: a, b."),
    "none": ({}, f"{LISTED} missing: a, b."),
    "another": (
        {"a": A_DATA, "b": B_DATA, "c": B_DATA},
        f"{LISTED} 'c' is not among them.",
    ),
    "another, unspeakable": (
        {"a": A_DATA, "b": B_DATA, "c" * 65: B_DATA, "d": B_DATA},
        f"{LISTED} 2 more came.",
    ),
    "rank": (
        {"a": ("FP32", [1.0, 2.0]), "b": B_DATA},
        "Input 'a' must be FP32[-1,2], got FP32[2].",
    ),
    "size": (
        {"a": ("FP32", [[1.0, 2.0, 3.0]]), "b": B_DATA},
        "Input 'a' must be FP32[-1,2], got FP32[1,3].",
    ),
    "optional": (
        {"a": A_DATA, "b": B_DATA, "mask": ("BOOL", [[True]])},
        "Input 'mask' must be BOOL[-1], got BOOL[1,1].",
    ),
    "datatype": (
        {"a": ("FP64", [[1.0, 2.0]]), "b": B_DATA},
        "Input 'a' must be FP32[-1,2], got FP64[1,2].",
    ),
}

calls: list[dict[str, str]] = []


def called(**arrays: np.ndarray | None) -> dict[str, np.ndarray]:
    """Record a call of a handler; give what it answers."""
    came = {name: array for name, array in arrays.items() if array is not None}
    calls.append({name: array.dtype.name for name, array in came.items()})
    return {"a": came["a"].sum(axis=1)}


def make_models() -> Iterator[Model]:
    declared: Any = {"inputs": [A, B, MASK]}

    async def arrays(
        a: np.ndarray, b: np.ndarray, mask: np.ndarray | None = None
    ) -> object:
        return called(a=a, b=b, mask=mask)

    async def other_names(
        first: np.ndarray, b: np.ndarray, third: np.ndarray | None
    ) -> object:
        return called(a=first, b=b, mask=third)

    async def annotations(
        a: Annotated[np.ndarray, A],
        b: Annotated[np.ndarray, B],
        mask: Annotated[np.ndarray, MASK] | None,
    ) -> object:
        return called(a=a, b=b, mask=mask)

    async def request(request: InferRequest) -> object:
        return called(**of_request(request))

    def in_thread(request: InferRequest) -> object:
        return called(**of_request(request))

    async def json(payload: Any) -> object:
        return called(**of_request(payload))

    yield Model("arrays", predict=arrays, **declared)
    yield Model("other-names", predict=other_names, **declared)
    yield Model("annotations", predict=annotations)
    yield Model("request", predict=request, **declared)
    yield Model("in-thread", predict=in_thread, **declared)
    yield Model("json", predict=json, **declared)
    yield Model("preprocess", preprocess=request, predict=of_json, **declared)


# JSON as it is, on V1, has no tensors that could be checked.
WAYS = [
    (model.name, protocol)
    for model in make_models()
    for protocol in PROTOCOLS
    if (model.name, protocol) != ("json", "v1")
]


@pytest.fixture(scope="module")
def asker() -> Iterator[Asker]:
    with Asker(*make_models()) as asker:
        yield asker


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    calls.clear()


@pytest.mark.parametrize(("form", "protocol"), WAYS)
def test_requests_that_do_not_fit_never_reach_the_handler(
    asker: Asker, form: str, protocol: str
) -> None:
    for case, (inputs, error) in REFUSED.items():
        if (case, protocol) == ("datatype", "v1"):
            continue  # V1 is untyped: what is declared is how it is read
        answer = asker.ask(protocol, form, inputs)
        assert (answer.status, answer.error) == (BAD[protocol], error), case
    assert calls == []


@pytest.mark.parametrize(("form", "protocol"), WAYS)
def test_requests_that_fit_reach_the_handler_as_declared(
    asker: Asker, form: str, protocol: str
) -> None:
    # Whole numbers: V1 would read INT64 where FP32 is not declared.
    inputs: Inputs = {"b": B_DATA, "a": ("FP32", [[1, 2], [3, 4]])}
    answer = asker.ask(protocol, form, inputs)
    assert answer.error is None
    outputs = {"predictions": [3, 7]} if protocol == "v1" else {"a": [3, 7]}
    assert answer.data == outputs
    assert asker.ask(protocol, form, {**inputs, "mask": MASK_DATA}).error is None
    got = {"a": "float32", "b": "int64"}
    assert calls == [got, {**got, "mask": "bool"}]


def test_rows_of_v1_are_held_to_the_declaration(asker: Asker) -> None:
    path = "/v1/models/request:predict"
    rows = {"instances": [{"a": [1, 2], "b": 1, "mask": True}, {"a": [3, 4], "b": 2}]}
    assert asker.post(path, rows).status == 400  # the rows differ
    del rows["instances"][0]["mask"]
    assert asker.post(path, rows).data == {"predictions": [3, 7]}
    assert calls == [{"a": "float32", "b": "int64"}]
    rows["instances"][1]["a"] = [3, 4.5]
    rows["instances"][1]["b"] = 2.5
    assert asker.post(path, rows).status == 400
    assert len(calls) == 1


def test_a_lone_declared_input_names_plain_rows() -> None:
    model = Model("m", predict=of_request, inputs=[A, MASK])
    with Asker(model) as asker:
        rows = asker.post("/v1/models/m:predict", {"instances": [[1, 2]]})
        assert rows.data == {"predictions": [[1.0, 2.0]]}
        wide = asker.post("/v1/models/m:predict", {"instances": [[1, 2, 3]]})
        assert wide.error == "Input 'a' must be FP32[-1,2], got FP32[1,3]."


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_one_array_parameter_takes_whatever_name_the_input_has(protocol: str) -> None:
    with Asker(Model("m", predict=one, inputs=[A])) as asker:
        assert asker.ask(protocol, "m", {"other": A_DATA}).error is None
        wrong = asker.ask(protocol, "m", {"other": ("FP32", [1.0])})
        assert wrong.error == "Input 'other' must be FP32[-1,2], got FP32[1]."
        both = asker.ask(protocol, "m", {"a": A_DATA, "other": A_DATA})
        assert both.error == "The model takes one input, got 2."


def test_explain_takes_the_declared_inputs_too() -> None:
    model = Model("m", predict=of_request, explain=of_request, inputs=[A])
    with Asker(model) as asker:
        fits = asker.post("/v1/models/m:explain", {"instances": [[1, 2]]})
        assert fits.data == {"explanations": [[1.0, 2.0]]}
        wrong = asker.post("/v1/models/m:explain", {"instances": [1]})
        assert wrong.error == "Input 'a' must be FP32[-1,2], got FP32[1]."


# --- outputs ------------------------------------------------------------------------

Y = TensorSpec("FP32", [-1], "y")
Z = TensorSpec("INT64", [-1], "z")
FLOATS, INTS = np.array([1.5], np.float32), np.array([2])


def tensors(**arrays: np.ndarray) -> InferResponse:
    return InferResponse(tuple(Tensor.from_array(n, a) for n, a in arrays.items()))


def v2_dict(**arrays: np.ndarray) -> dict[str, Any]:
    names = {"float32": "FP32", "float64": "FP64", "int64": "INT64"}
    return {
        "outputs": [
            {
                "name": name,
                "datatype": names[array.dtype.name],
                "shape": list(array.shape),
                "data": array.tolist(),
            }
            for name, array in arrays.items()
        ]
    }


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "result",
    [
        (FLOATS.astype("f8"), INTS),  # narrowed
        {"z": INTS, "y": FLOATS.astype("f8")},
        tensors(z=INTS, y=FLOATS),
    ],
    ids=["tuple", "dict", "response"],
)
def test_results_that_are_as_declared(result: Any, protocol: str) -> None:
    def predict(x: np.ndarray) -> Any:
        return result

    with Asker(Model("m", predict=predict, outputs=[Y, Z])) as asker:
        answer = asker.ask(protocol, "m", {"x": A_DATA})
    rows = {"predictions": [{"y": 1.5, "z": 2}]}
    assert answer.data == (rows if protocol == "v1" else {"y": [1.5], "z": [2]})


@pytest.mark.parametrize("protocol", ["v2", "grpc"])
def test_dicts_of_v2_are_held_to_the_declaration(
    protocol: str, caplog: pytest.LogCaptureFixture
) -> None:
    results = [v2_dict(z=INTS, y=FLOATS), v2_dict(y=FLOATS, z=FLOATS), v2_dict(y=INTS)]
    remaining = iter(results)

    def predict(request: InferRequest) -> Any:
        return next(remaining)

    with Asker(Model("m", predict=predict, outputs=[Y, Z])) as asker:
        assert asker.ask(protocol, "m", {}).data == {"z": [2], "y": [1.5]}
        assert asker.ask(protocol, "m", {}).status == FAILED[protocol]
        assert "output 'z' is declared INT64[-1], the handler" in caplog.text
        assert asker.ask(protocol, "m", {}).status == FAILED[protocol]
        assert f"{NAMES}y\n" in caplog.text


NAMES = "ValueError: the declared outputs are y, z; the handler returned "


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("result", "logged"),
    [
        (FLOATS, "2 outputs are declared, the handler returned 1"),
        ((INTS.astype("c8"), INTS), "Cannot cast"),
        ((FLOATS, np.array([[2]])), "'z' is declared INT64[-1]"),
        ({"y": FLOATS, "zz": INTS}, f"{NAMES}y, zz"),
        ({"y": FLOATS}, f"{NAMES}y"),
        (tensors(y=FLOATS, zz=INTS), f"{NAMES}y, zz"),
        (tensors(z=INTS), f"{NAMES}z"),
        (InferResponse(()), f"{NAMES}none"),
        (InferResponse(tensors(y=FLOATS, z=INTS).outputs * 2), f"{NAMES}y, z, y, z"),
        (
            tensors(y=FLOATS.astype("f8"), z=INTS),
            "ValueError: output 'y' is declared FP32[-1], the handler returned FP64[1]",
        ),
        (
            tensors(y=FLOATS, z=np.array([[2]])),
            "output 'z' is declared INT64[-1], the handler returned INT64[1,1]",
        ),
    ],
)
def test_results_that_are_not_as_declared_are_the_authors_to_mend(
    result: Any, logged: str, protocol: str, caplog: pytest.LogCaptureFixture
) -> None:
    def predict(x: np.ndarray) -> Any:
        return result

    with Asker(Model("m", predict=predict, outputs=[Y, Z])) as asker:
        answer = asker.ask(protocol, "m", {"x": A_DATA})
    assert answer.status == FAILED[protocol]
    assert logged in caplog.text
    assert answer.error is not None
    assert "declared" not in answer.error


def test_the_outputs_of_a_postprocess_are_those_of_the_model() -> None:
    model = Model("m", predict=one, postprocess=of_json, outputs=[Y])
    with Asker(model) as asker:
        answer = asker.ask("v2", "m", {"x": ("FP64", [1.5])})
        assert answer.data == {"y": [1.5]}
        assert asker.ask("v2", "m", {"x": A_DATA}).status == 500


def test_json_that_a_handler_gives_as_it_is_is_not_held() -> None:
    model = Model("m", predict=of_json, inputs=[A], outputs=[Y])
    with Asker(model) as asker:
        body = {"instances": ["of", "another", "kind"]}
        assert asker.post("/v1/models/m:predict", body).data == body


# --- optional inputs ----------------------------------------------------------------

ONES = np.ones(2, np.float32)


def in_union(x: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    return x if bias is None else x + bias


def with_none(x: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    return in_union(x, bias)


def with_array(x: np.ndarray, bias: npt.NDArray[np.float32] = ONES) -> np.ndarray:
    return in_union(x, bias - ONES)  # as if it were not there


BIAS = TensorSpec("FP32", [2])


def inside(x: np.ndarray, bias: Annotated[np.ndarray | None, BIAS]) -> np.ndarray:
    return in_union(x, bias)


def outside(
    x: np.ndarray, state: object, bias: Annotated[np.ndarray, BIAS] | None = None
) -> np.ndarray:
    assert state is None
    return in_union(x, bias)


def first(bias: np.ndarray | None, x: np.ndarray) -> np.ndarray:
    return in_union(x, bias)


def tensors_of_torch(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return x if bias is None else x + bias


def tensors_declared(
    x: torch.Tensor, bias: Annotated[torch.Tensor | None, BIAS]
) -> torch.Tensor:
    return tensors_of_torch(x, bias)


@pytest.mark.parametrize(
    "predict",
    [
        in_union,
        with_none,
        with_array,
        inside,
        outside,
        first,
        tensors_of_torch,
        tensors_declared,
    ],
)
def test_an_optional_input_may_be_absent(predict: Predict) -> None:
    x = ("FP32", [3.0, 4.0])
    bias = ("FP32", [2.0, 3.0])
    added = [4.0, 6.0] if predict is with_array else [5.0, 7.0]
    with Asker(Model("m", predict=predict)) as asker:
        for protocol in ("v2", "grpc"):
            alone = asker.ask(protocol, "m", {"x": x})
            assert alone.data == {"output-0": [3.0, 4.0]}
            both = asker.ask(protocol, "m", {"bias": bias, "x": x})
            assert both.data == {"output-0": added}
            wrong = asker.ask(protocol, "m", {"bias": bias})
            assert wrong.status == BAD[protocol]
            assert "bias (optional)" in (wrong.error or "")
            assert "missing: x." in (wrong.error or "")
        for body, rows in (
            ({"inputs": {"x": x[1]}}, [3.0, 4.0]),
            ({"inputs": {"x": x[1], "bias": bias[1]}}, added),
            ({"instances": [{"x": 3.0}, {"x": 4.0}]}, [3.0, 4.0]),
            ({"instances": [{"x": 3.0, "bias": 2}, {"x": 4.0, "bias": 3}]}, added),
            ({"instances": x[1]}, [3.0, 4.0]),  # the one that must come
        ):
            answer = asker.post("/v1/models/m:predict", body)
            assert answer.data == {"predictions": rows}


@pytest.mark.parametrize(
    ("predict", "inputs"),
    [
        (inside, (TensorSpec("FP32", (2,), "bias", optional=True),)),
        (outside, (TensorSpec("FP32", (2,), "bias", optional=True),)),
        (tensors_declared, (TensorSpec("FP32", (2,), "bias", optional=True),)),
        (with_none, ()),
    ],
)
def test_what_is_optional_is_shown(
    predict: Predict, inputs: tuple[TensorSpec, ...]
) -> None:
    assert Model("m", predict=predict).inputs == inputs


def test_an_optional_input_must_fit_where_it_comes() -> None:
    with Asker(Model("m", predict=inside)) as asker:
        for protocol in PROTOCOLS:
            answer = asker.ask(
                protocol, "m", {"x": ("FP32", [1.0]), "bias": ("FP32", [1.0])}
            )
            assert answer.error == "Input 'bias' must be FP32[2], got FP32[1]."


def only_default(x: np.ndarray = ONES) -> np.ndarray:
    return x


def only_none(x: np.ndarray | None) -> np.ndarray:
    return ONES if x is None else x


async def only_awaited(x: Annotated[np.ndarray, ANY] | None = None) -> np.ndarray:
    return only_none(x)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("predict", [only_default, only_none, only_awaited])
def test_a_handler_whose_only_input_is_optional(
    predict: Predict, protocol: str
) -> None:
    name = "predictions" if protocol == "v1" else "output-0"
    with Asker(Model("m", predict=predict)) as asker:
        assert asker.ask(protocol, "m", {}).data == {name: [1.0, 1.0]}
        given = asker.ask(protocol, "m", {"any": ("FP32", [3.0])})
        assert given.data == {name: [3.0]}
        two = asker.ask(protocol, "m", {"x": B_DATA, "y": B_DATA})
        assert two.error == "The model takes one input or none, got 2."


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_inputs_that_are_all_optional(protocol: str) -> None:
    def predict(
        x: np.ndarray | None = None, y: np.ndarray | None = None
    ) -> npt.NDArray[np.int64]:
        return np.array([x is None, y is None], np.int64)

    name = "predictions" if protocol == "v1" else "output-0"
    with Asker(Model("m", predict=predict)) as asker:
        assert asker.ask(protocol, "m", {}).data == {name: [1, 1]}
        assert asker.ask(protocol, "m", {"y": B_DATA}).data == {name: [1, 0]}
        other = asker.ask(protocol, "m", {"z": B_DATA})
        listed = "The model takes the inputs x (optional), y (optional);"
        assert other.error == f"{listed} 'z' is not among them."


@pytest.mark.parametrize(
    ("handed", "predictions"),
    [
        ({"x": ONES}, [1.0, 1.0]),
        ({"bias": ONES, "x": ONES}, [2.0, 2.0]),
        ((ONES,), [1.0, 1.0]),
        ((ONES, ONES), [2.0, 2.0]),
        (ONES, [1.0, 1.0]),
    ],
)
@pytest.mark.parametrize("predict", [in_union, with_none, outside])
def test_a_stage_before_may_leave_out_what_is_optional(
    predict: Predict, handed: object, predictions: list[float]
) -> None:
    model = Model("m", preprocess=lambda payload: handed, predict=predict)
    with Asker(model) as asker:
        answer = asker.post("/v1/models/m:predict", {})
        assert answer.data == {"predictions": predictions}


@pytest.mark.parametrize(
    "handed", [{"bias": ONES}, {"x": ONES, "y": ONES}, (), (ONES,) * 3, [ONES], None]
)
def test_a_stage_before_that_hands_on_something_else(
    handed: object, caplog: pytest.LogCaptureFixture
) -> None:
    model = Model("m", preprocess=lambda payload: handed, predict=with_none)
    with Asker(model) as asker:
        assert asker.post("/v1/models/m:predict", {}).status == 500
    assert "TypeError: predict takes x, bias (optional): the stage" in caplog.text


def test_a_handler_may_leave_out_what_the_client_does_not_ask_for() -> None:
    model = Model(
        "m",
        outputs=[TensorSpec("FP32", [-1], "y"), TensorSpec("FP32", [-1], "z")],
    )

    @model.predict
    async def predict(request: InferRequest) -> InferResponse:
        names = [output.name for output in request.outputs] or ["y"]
        array = np.zeros(1, np.float32)
        return InferResponse(tuple(Tensor.from_array(n, array) for n in names))

    with Asker(model) as asker:
        path = "/v2/models/m/infer"
        asked = {"inputs": [], "outputs": [{"name": "z"}]}
        answer = asker.post(path, asked)
        assert [output["name"] for output in answer.data["outputs"]] == ["z"]
        # Where the client asks for none, all declared ones must be there.
        assert asker.post(path, {"inputs": []}).status == 500


def test_explain_is_held_to_its_own_outputs() -> None:
    model = Model("m")

    @model.predict
    async def predict(
        x: np.ndarray,
    ) -> Annotated[np.ndarray, TensorSpec("FP32", [-1], "y")]:
        return x

    @model.explain
    async def explain(x: np.ndarray) -> np.ndarray:
        return np.array([[True, False]])

    with Asker(model) as asker:
        answer = asker.post("/v1/models/m:explain", {"instances": [1]})
        assert answer.data == {"explanations": [[True, False]]}


def test_no_inputs_as_columns() -> None:
    model = Model("m")

    @model.predict
    async def predict(x: np.ndarray | None = None) -> dict[str, Any]:
        return {"predictions": x is None}

    with Asker(model) as asker:
        answer = asker.post("/v1/models/m:predict", {"inputs": {}})
        assert answer.data == {"predictions": True}
