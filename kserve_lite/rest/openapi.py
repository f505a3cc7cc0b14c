"""`/openapi.json`: the route table and the models' metadata as OpenAPI 3.1.

https://spec.openapis.org/oas/v3.1.0. Every path can be called as it stands: a route of
a model is there once a model (and version), percent-encoded, so that a body's example
can be that model's own. An example works when it is sent as it stands: it is the one
that the model's author gave, or made of the declared inputs, or there is none. The
schemas of the bodies are in `schemas.py`; nothing here looks at a request.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import quote

from kserve_lite.handlers import Call, Stage
from kserve_lite.model import Model, Plan
from kserve_lite.registry import Registry
from kserve_lite.rest.examples import Example, example_of
from kserve_lite.rest.routes import Route
from kserve_lite.rest.schemas import SCHEMAS, reference
from kserve_lite.version import __version__

_HEADER = "Inference-Header-Content-Length"
_JSON, _BINARY = "application/json", "application/octet-stream"
_LINES, _EVENTS = "application/x-ndjson", "text/event-stream"
_PROMETHEUS, _OPEN_METRICS = "text/plain", "application/openmetrics-text"
# By how a pattern begins, the first that fits.
_TAGS = (
    ("/v1/", "V1", "KServe's V1 protocol."),
    ("/v2/repository/", "Repository", "Triton's model repository extension."),
    ("/v2", "V2", "The Open Inference Protocol, and extensions of Triton."),
    ("/", "Server", "What the server says of itself."),
)
_SIZE = {
    "description": "How many bytes of the body are JSON; binary tensors follow it.",
    "schema": {"type": "integer", "minimum": 0},
}
_MAY_BE_EMPTY = ("IndexRequest",)


def openapi_document(registry: Registry, routes: Sequence[Route]) -> dict[str, Any]:
    """Return the document for these models and routes, plain values for JSON.

    registry: models whose definition has ended (`Model.freeze`), since only then do
        their handlers have the inputs of `Model(inputs=...)`.

    A route of a version is there for models that have versions, and `:explain` for
    those that explain; without a version, the newest one is described. A body has no
    example where the model declares no inputs and its author gave none, where the
    model streams and the route does not, and where an input that must come has more
    than `MOST_ELEMENTS` elements: then the operation's description says how many
    numbers are wanted.
    """
    paths: dict[str, dict[str, Any]] = {}
    ids: dict[str, int] = {}
    for route in routes:
        for path, model in _targets(route, registry):
            operation = {"operationId": _operation_id(route.method, path, ids)}
            operation |= _operation(route, model)
            # Of two routes that fit one path the later answers, as in `routes.match`.
            paths.setdefault(path, {})[route.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "kserve-lite",
            "version": __version__,
            "description": f"Serves {', '.join(registry.names()) or 'no model'}.",
        },
        "tags": [{"name": name, "description": about} for _, name, about in _TAGS],
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "responses": {
                "Error": {
                    "description": "Anything that goes wrong.",
                    "content": {_JSON: {"schema": reference("Error")}},
                }
            },
        },
    }


def _targets(route: Route, registry: Registry) -> Iterator[tuple[str, Model | None]]:
    """The paths that a route stands for, each with the model that answers there."""
    if "{model}" not in route.pattern:
        yield route.pattern, None
        return
    for name in registry.names():
        of_model = route.pattern.replace("{model}", quote(name, safe=""))
        versions: list[str | None] = [None]
        if "{version}" in route.pattern:
            versions = [*registry.versions(name)]
        for version in versions:
            model = registry.get(name, version)
            if route.action == "v1_explain" and not model.plan(Stage.EXPLAIN):
                continue
            # quote leaves no brace, so a name cannot be taken for the placeholder.
            yield of_model.replace("{version}", quote(version or "", safe="")), model


def _operation_id(method: str, path: str, taken: dict[str, int]) -> str:
    """A name that code can be generated from, numbered where paths look alike in it.

    taken: the names given so far, and how far each has been numbered.
    """
    stem = re.sub(r"[\W_]+", "_", f"{method.lower()}{path}", flags=re.ASCII).strip("_")
    name = stem
    while name in taken:
        taken[stem] += 1
        name = f"{stem}_{taken[stem]}"
    taken[name] = 1
    return name


def _operation(route: Route, model: Model | None) -> dict[str, Any]:
    tag = next(name for start, name, _ in _TAGS if route.pattern.startswith(start))
    operation: dict[str, Any] = {"tags": [tag], "summary": route.summary}
    if route.takes:
        example = _example(route, model) if model else Example()
        if example.instead:
            operation["description"] = example.instead
        media: dict[str, Any] = {"schema": reference(route.takes)}
        if example.body is not None:
            media["example"] = example.body
        content: dict[str, Any] = {_JSON: media}
        if route.takes == "InferRequest":
            operation["parameters"] = [{"name": _HEADER, "in": "header", **_SIZE}]
            content[_BINARY] = {}
        operation["requestBody"] = {
            "required": route.takes not in _MAY_BE_EMPTY,
            "content": content,
        }
    operation["responses"] = {
        "200": _answer(route, model),
        "default": {"$ref": "#/components/responses/Error"},
    }
    return operation


def _answer(route: Route, model: Model | None) -> dict[str, Any]:
    schema = reference(route.gives)
    if model and route.gives == "V1Answer" and _streams(route, model):
        return {
            "description": "Items as they come: text, or a line of JSON each.",
            "content": {_LINES: {"schema": {"type": "string"}}},
        }
    if route.action == "metrics":
        return {
            "description": SCHEMAS[route.gives]["description"],
            "content": {_PROMETHEUS: {"schema": schema}, _OPEN_METRICS: {}},
        }
    if route.action == "generate_stream":
        return {
            "description": f"Events; the data of each is a {route.gives}.",
            "content": {_EVENTS: {"schema": {"type": "string"}}},
        }
    answer: dict[str, Any] = {
        "description": SCHEMAS[route.gives].get("description", f"{route.summary}."),
        "content": {_JSON: {"schema": schema}},
    }
    if route.gives == "InferResponse":
        answer["headers"] = {_HEADER: _SIZE}
        answer["content"][_BINARY] = {}
    return answer


def _plan(route: Route, model: Model) -> Plan:
    explains = route.action == "v1_explain"
    return model.plan(Stage.EXPLAIN if explains else Stage.PREDICT)


def _streams(route: Route, model: Model) -> bool:
    return _plan(route, model)[-1].call is Call.GENERATOR


def _example(route: Route, model: Model) -> Example:
    example = example_of(route.takes, _plan(route, model), model.example)
    if (
        route.action == "generate"
        and _streams(route, model)
        and example.body is not model.example
    ):
        return Example()  # of what streams only text can be put together
    return example
