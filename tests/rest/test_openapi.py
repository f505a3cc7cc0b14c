"""`/openapi.json` is valid OpenAPI 3.1, and a real server answers as it says."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Annotated, Any
from urllib.parse import quote

import numpy as np
import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from kserve_lite import InferRequest, InferResponse, Model, Tensor, TensorSpec
from kserve_lite.registry import Registry
from kserve_lite.rest.examples import MOST_ELEMENTS
from kserve_lite.rest.openapi import openapi_document
from kserve_lite.rest.routes import ROUTES, Route, match
from kserve_lite.tensors import DATATYPES
from tests.rest.oip import check
from tests.support import RawAnswer, ServerThread, exchange

Document = dict[str, Any]
Rows = Annotated[np.ndarray, TensorSpec("FP32", [-1, 2])]
Image = Annotated[np.ndarray, TensorSpec("UINT8", [-1, 3, 224, 224])]


def rows_predict(rows: Rows) -> np.ndarray:
    return rows * 2


def echo(request: InferRequest) -> InferResponse:
    return InferResponse(
        tuple(Tensor(t.name, t.array, t.datatype) for t in request.inputs)
    )


def texts_predict(
    text: Annotated[np.ndarray, TensorSpec("BYTES", [-1])],
    often: Annotated[np.ndarray, TensorSpec("INT64", [-1, 1])],
) -> tuple[np.ndarray, np.ndarray]:
    return text, often


def columns_predict(
    a: Annotated[np.ndarray, TensorSpec("FP32", [2, 3])],
    b: Annotated[np.ndarray, TensorSpec("INT32", [-1])],
) -> np.ndarray:
    product: np.ndarray = a * b
    return product


def image_predict(image: Image, rows: Rows | None = None) -> np.ndarray:
    first: np.ndarray = image[:, 0, 0, :1]
    return first


def masked_predict(rows: Rows, mask: Image | None = None) -> np.ndarray:
    assert mask is None
    return rows


def sum_predict(numbers: dict[str, Any]) -> Document:
    return {"predictions": [sum(numbers["instances"])]}


def story_predict(story: dict[str, Any]) -> Iterator[str]:
    yield from story["text_input"].split()


def items_predict(rows: Rows) -> Iterator[np.ndarray]:
    yield rows
    yield rows


def declared(name: str, *specs: TensorSpec) -> Model:
    return Model(name, inputs=specs, predict=echo)


def models() -> tuple[Model, ...]:
    every = [TensorSpec(name, [-1, 2], name.lower()) for name in DATATYPES]
    given = {"inputs": [{"name": "x", "shape": [1], "datatype": "INT8", "data": [7]}]}
    return (
        Model("rows", predict=rows_predict, explain=rows_predict),
        declared("every", *every),
        Model("texts", predict=texts_predict),
        Model("image", predict=image_predict),
        Model("masked", predict=masked_predict),
        Model("columns", predict=columns_predict),
        declared("pairs", TensorSpec("FP32", [2, 3], "a")),
        declared("scalar", TensorSpec("FP32", [], "a"), TensorSpec("BOOL", [-1], "b")),
        declared("empty", TensorSpec("FP32", [0, 2], "a")),
        declared("full", TensorSpec("FP32", [MOST_ELEMENTS], "a")),
        declared("fuller", TensorSpec("FP32", [MOST_ELEMENTS + 1], "a")),
        declared("id", TensorSpec("FP32", [1], "id")),
        Model("any", predict=echo),
        Model("given", predict=echo, example=given),
        Model("sum", predict=sum_predict, example={"instances": [1, 2]}),
        Model("story", predict=story_predict, example={"text_input": "once upon"}),
        Model("items", predict=items_predict),
        Model("json", predict=sum_predict),
        Model("many", version="9", predict=rows_predict),
        Model("many", version="10", predict=texts_predict),
        Model("many", predict=sum_predict),
        *(Model(name, version="1/ü", predict=rows_predict) for name in ODD_NAMES),
    )


ODD_NAMES = ("a b", "a_b", "100%", "%41", "{model}", "{version}", "ü", "stats", "x:y")


@pytest.fixture(scope="module")
def server() -> Iterator[ServerThread]:
    with ServerThread(*models(), enable_grpc=False) as running:
        yield running


def send(
    server: ServerThread, method: str, path: str, body: bytes | None = None
) -> RawAnswer:
    head = f"{method} {path} HTTP/1.1\r\nhost: x\r\n"
    if body is not None:
        head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
    answer = exchange(server.port, f"{head}\r\n".encode() + (body or b""), method)
    assert answer.complete
    return answer


@pytest.fixture(scope="module")
def document(server: ServerThread) -> Document:
    answer = send(server, "GET", "/openapi.json")
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    found: Document = json.loads(answer.body)
    return found


def document_of(*served: Model) -> Document:
    """The document of models that no server serves."""
    registry = Registry()
    for model in served:
        model.freeze()
        registry.add(model)
    return openapi_document(registry, ROUTES)


def operations(document: Document) -> Iterator[tuple[str, str, Document]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def example(document: Document, path: str, api: str = "v2") -> Any:
    """The example of a model's prediction; None where there is none."""
    path = f"/v1/models/{path}" if api == "v1" else f"/v2/models/{path}"
    content = document["paths"][path]["post"]["requestBody"]["content"]
    return content["application/json"].get("example")


# What may hold more than its schema names: outputs by name, and any document.
OPEN = ("GenerateRequest", "GenerateResponse", "OpenApi", "V1Request", "V1Answer")


def close(schema: Any) -> None:
    """Let every object of a schema have only the members that it names."""
    if isinstance(schema, list):
        for element in schema:
            close(element)
    elif isinstance(schema, dict):
        if schema.get("type") == "object":
            schema.setdefault("additionalProperties", False)
        for element in schema.values():
            close(element)


def fits(document: Document, schema: Document, value: object) -> None:
    components = copy.deepcopy(document["components"])
    for name, component in components["schemas"].items():
        if name not in OPEN:
            close(component)
    Draft202012Validator({**schema, "components": components}).validate(value)


# --- The document ---


@pytest.mark.parametrize(
    "served",
    [(), (Model("m", predict=echo),)],
    ids=["none", "bare"],
)
def test_is_openapi(served: tuple[Model, ...]) -> None:
    found = document_of(*served)
    assert found["openapi"].startswith("3.1.")
    OpenAPIV31SpecValidator(found).validate()
    assert json.loads(json.dumps(found)) == found


def test_the_server_gives_it(document: Document) -> None:
    OpenAPIV31SpecValidator(document).validate()
    assert document == document_of(*models())


def test_component_schemas_are_schemas_and_used(document: Document) -> None:
    text = json.dumps(document)
    for name, schema in document["components"]["schemas"].items():
        Draft202012Validator.check_schema(schema)
        assert f'"#/components/schemas/{name}"' in text or name == "GenerateResponse"


@pytest.mark.parametrize(
    "route", ROUTES, ids=[f"{r.method} {r.pattern}" for r in ROUTES]
)
def test_every_route_is_in_it(route: Route) -> None:
    found = document_of(Model("m", version="1", predict=echo, explain=echo))
    path = route.pattern.replace("{model}", "m").replace("{version}", "1")
    assert found["paths"][path][route.method.lower()]["summary"] == route.summary


def test_nothing_else_is_in_it() -> None:
    found = document_of(Model("m", version="1", predict=echo, explain=echo))
    assert len(list(operations(found))) == len(ROUTES)


def test_every_path_leads_to_its_route(document: Document) -> None:
    for method, path, operation in operations(document):
        described = {r.action for r in ROUTES if r.summary == operation["summary"]}
        assert match(path)[method].action in described


def test_operation_ids_are_names_and_differ(document: Document) -> None:
    ids = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(ids)) == len(ids)
    assert all(name.isascii() and name.isidentifier() for name in ids)


def test_tags_are_the_apis(document: Document) -> None:
    names = {tag["name"] for tag in document["tags"]}
    for _, path, operation in operations(document):
        (tag,) = operation["tags"]
        assert tag in names
        assert tag.lower() == path.split("/")[1] or tag in ("Repository", "Server")
        assert (tag == "Repository") == path.startswith("/v2/repository/")


def test_only_models_that_explain_are_asked_to(document: Document) -> None:
    assert "/v1/models/rows:explain" in document["paths"]
    assert "/v1/models/json:explain" not in document["paths"]


def test_infer_is_binary_too(document: Document) -> None:
    operation = document["paths"]["/v2/models/any/infer"]["post"]
    assert "application/octet-stream" in operation["requestBody"]["content"]
    (parameter,) = operation["parameters"]
    assert parameter["name"] == "Inference-Header-Content-Length"
    assert parameter["in"] == "header"
    assert "application/octet-stream" in operation["responses"]["200"]["content"]
    stream = document["paths"]["/v2/models/any/generate_stream"]["post"]
    assert list(stream["responses"]["200"]["content"]) == ["text/event-stream"]


def test_names_are_percent_encoded(document: Document) -> None:
    for name in ODD_NAMES:
        encoded = quote(name, safe="")
        assert f"/v2/models/{encoded}/versions/1%2F%C3%BC/infer" in document["paths"]
    assert not any(set(path) & set("{}\x20ü") for path in document["paths"])


def test_a_model_called_stats_hides_behind_the_statistics(document: Document) -> None:
    answer = document["paths"]["/v2/models/stats"]["get"]["responses"]["200"]
    schema = answer["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/Statistics"}


def test_versions(document: Document) -> None:
    """The newest one answers without a version, and has its own example."""
    paths = document["paths"]
    assert "/v2/models/many/versions/9/infer" in paths
    assert "/v2/models/many/versions/10/infer" in paths
    assert not any("/many/versions/None" in path for path in paths)
    assert not any(path.startswith("/v2/models/rows/versions") for path in paths)
    newest = example(document, "many/infer")
    assert newest == example(document, "many/versions/10/infer")
    assert newest == example(document, "texts/infer")
    assert example(document, "many/versions/9/infer") == example(document, "rows/infer")
    assert example(document, "many:predict", "v1") == example(
        document, "texts:predict", "v1"
    )


# --- Examples ---


def tensor(name: str, datatype: str, shape: list[int], data: list[Any]) -> Document:
    return {"name": name, "shape": shape, "datatype": datatype, "data": data}


@pytest.mark.parametrize(
    ("name", "v2", "v1"),
    [
        ("rows", [tensor("rows", "FP32", [1, 2], [1.0, 1.0])], [[1.0, 1.0]]),
        (
            "texts",
            [
                tensor("text", "BYTES", [1], ["text"]),
                tensor("often", "INT64", [1, 1], [1]),
            ],
            [{"text": "text", "often": [1]}],
        ),
        ("masked", [tensor("rows", "FP32", [1, 2], [1.0, 1.0])], [[1.0, 1.0]]),
        (
            "pairs",
            [tensor("a", "FP32", [2, 3], [1.0] * 6)],
            [[1.0, 1.0, 1.0]] * 2,
        ),
        (
            "columns",
            [
                tensor("a", "FP32", [2, 3], [1.0] * 6),
                tensor("b", "INT32", [1], [1]),
            ],
            {"a": [[1.0, 1.0, 1.0]] * 2, "b": [1]},
        ),
        (
            "scalar",
            [tensor("a", "FP32", [], [1.0]), tensor("b", "BOOL", [1], [True])],
            None,
        ),
        ("empty", [tensor("a", "FP32", [0, 2], [])], None),
        ("given", [tensor("x", "INT8", [1], [7])], None),
        ("sum", None, [1, 2]),
        ("any", None, None),
        ("json", None, None),
        ("image", None, None),
        ("fuller", None, None),
        ("items", None, [[1.0, 1.0]]),
    ],
)
def test_examples(name: str, v2: Any, v1: Any, document: Document) -> None:
    assert example(document, f"{name}/infer") == (v2 and {"inputs": v2})
    key = "inputs" if isinstance(v1, dict) else "instances"
    assert example(document, f"{name}:predict", "v1") == (v1 and {key: v1})


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("rows", {"rows": [1.0, 1.0]}),
        ("texts", {"text": "text", "often": 1}),
        ("columns", {"a": [[1.0, 1.0, 1.0]] * 2, "b": 1}),
        ("scalar", {"a": 1.0, "b": True}),
        ("story", {"text_input": "once upon"}),
        ("items", {"rows": [1.0, 1.0]}),
        ("sum", None),  # its example has rows
        ("given", None),
        ("empty", None),
        ("id", None),  # that member is the request's id
        ("image", None),
    ],
)
def test_examples_of_generate(name: str, body: Any, document: Document) -> None:
    assert example(document, f"{name}/generate_stream") == body
    if name != "items":
        assert example(document, f"{name}/generate") == body


def test_what_is_too_large_is_said_in_numbers(document: Document) -> None:
    operation = document["paths"]["/v2/models/image/infer"]["post"]
    assert "'image'" in operation["description"]
    assert "150,528 numbers" in operation["description"]
    assert len(json.dumps(document_of(Model("image", predict=image_predict)))) < 30_000
    full = document["paths"]["/v2/models/full/infer"]["post"]
    assert "description" not in full


def test_an_author_s_example_wins() -> None:
    of_v1 = {"instances": [[3, 4]]}
    of_v2 = {"inputs": [tensor("rows", "FP32", [1, 2], [3, 4])]}
    for given, path, api in (
        (of_v1, "m:predict", "v1"),
        (of_v2, "m/infer", "v2"),
    ):
        found = document_of(Model("m", predict=rows_predict, example=given))
        assert example(found, path, api) == given
        others = {"m:predict": "v1", "m/infer": "v2"}
        del others[path]
        ((other, other_api),) = others.items()
        assert example(found, other, other_api) not in (given, None)


# --- A real server answers as it says ---


def test_every_operation_answers_as_described(
    server: ServerThread, document: Document
) -> None:
    sent = 0
    # Unloading comes last.
    for method, path, operation in sorted(
        operations(document), key=lambda found: found[1].endswith("/unload")
    ):
        request = operation.get("requestBody")
        if request is None:
            answer = send(server, method, path, b"" if method == "POST" else None)
        else:
            media = request["content"]["application/json"]
            if "example" not in media and request["required"]:
                continue
            if "example" in media:
                fits(document, media["schema"], media["example"])
            answer = send(
                server, method, path, json.dumps(media.get("example", {})).encode()
            )
            sent += "example" in media
        assert answer.status == 200, (path, answer.body)
        if not path.startswith(("/v1", "/metrics")):
            check(method, path, answer.status, answer.headers, answer.body)
        described = operation["responses"]["200"]["content"]
        content_type = answer.headers.get("content-type", "").partition(";")[0]
        if content_type == "application/json":
            schema = described[content_type]["schema"]
            fits(document, schema, json.loads(answer.body))
        elif content_type == "text/event-stream":
            assert content_type in described
            reference = {"$ref": "#/components/schemas/GenerateResponse"}
            for event in answer.body.decode().removesuffix("\n\n").split("\n\n"):
                fits(document, reference, json.loads(event.removeprefix("data: ")))
        elif path == "/metrics":
            assert content_type in described
        else:
            assert list(described) == ["application/x-ndjson"], path
    assert sent > 50


def test_what_goes_wrong_is_described_too(
    server: ServerThread, document: Document
) -> None:
    error = document["components"]["responses"]["Error"]
    schema = error["content"]["application/json"]["schema"]
    wrong = 0
    for method, path, operation in operations(document):
        assert operation["responses"]["default"]["$ref"].endswith("/Error")
        if "requestBody" in operation:
            answer = send(server, method, path, b"{")
            assert answer.status >= 400
            fits(document, schema, json.loads(answer.body))
            wrong += 1
    assert wrong > 50


def test_an_unloaded_model_leaves() -> None:
    kept, left = Model("kept", predict=echo), Model("left", predict=echo)
    with ServerThread(kept, left, enable_grpc=False) as server:
        assert send(server, "POST", "/v2/repository/models/left/unload").status == 200
        found = json.loads(send(server, "GET", "/openapi.json").body)
    assert "/v2/models/kept" in found["paths"]
    assert "/v2/models/left" not in found["paths"]
