"""The routes of the V1 and V2 REST APIs, as a table, and how a target finds its route.

A pattern's `{model}` and `{version}` match one path segment, percent-decoded. `{model}`
may be followed by a verb (`:predict`). A path that several routes match has all their
methods; GET brings HEAD along (RFC 9110 section 9.3.2).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple
from urllib.parse import unquote


class Route(NamedTuple):
    """One row: `action` names the method of `endpoints.Endpoints` that answers.

    takes, gives: the schemas (`schemas.py`) of the request's and the answer's body.
    """

    method: str
    pattern: str
    action: str
    summary: str
    gives: str
    takes: str = ""


def _of_model(
    method: str, path: str, action: str, summary: str, *s: str
) -> list[Route]:
    """A route of V2 for a model, and the same for one of its versions."""
    versioned = f"{summary}, of one version"
    return [
        Route(method, f"/v2/models/{{model}}{path}", action, summary, *s),
        Route(
            method,
            f"/v2/models/{{model}}/versions/{{version}}{path}",
            action,
            versioned,
            *s,
        ),
    ]


_LOAD = "/v2/repository/models/{model}"
ROUTES: tuple[Route, ...] = (
    Route("GET", "/", "alive", "Whether the server answers", "Alive"),
    Route("GET", "/openapi.json", "openapi", "What this API is", "OpenApi"),
    Route("GET", "/metrics", "metrics", "What is counted, for Prometheus", "Metrics"),
    Route("GET", "/v1/models", "model_names", "The models' names", "ModelNames"),
    Route(
        "GET",
        "/v1/models/{model}",
        "v1_ready",
        "Whether a model is ready",
        "ModelReady",
    ),
    Route(
        "POST",
        "/v1/models/{model}:predict",
        "v1_predict",
        "Predict",
        "V1Answer",
        "V1Request",
    ),
    Route(
        "POST",
        "/v1/models/{model}:explain",
        "v1_explain",
        "Explain",
        "V1Answer",
        "V1Request",
    ),
    Route("GET", "/v2", "server_metadata", "What the server is", "ServerMetadata"),
    Route("GET", "/v2/health/live", "live", "Whether the server lives", "Live"),
    Route("GET", "/v2/health/ready", "ready", "Whether every model is ready", "Ready"),
    Route("GET", "/v2/models", "model_names", "The models' names", "ModelNames"),
    *_of_model("GET", "", "model_metadata", "Inputs and outputs", "ModelMetadata"),
    *_of_model("GET", "/ready", "v2_ready", "Whether it is ready", "ModelReady"),
    *_of_model(
        "POST", "/infer", "v2_infer", "Predict", "InferResponse", "InferRequest"
    ),
    *_of_model(
        "POST",
        "/generate",
        "generate",
        "Predict: JSON members in and out",
        "GenerateResponse",
        "GenerateRequest",
    ),
    *_of_model(
        "POST",
        "/generate_stream",
        "generate_stream",
        "The same, each item as a Server-Sent Event",
        "GenerateResponse",
        "GenerateRequest",
    ),
    *_of_model(
        "GET", "/config", "model_config", "Triton's configuration", "ModelConfig"
    ),
    *_of_model("GET", "/stats", "statistics", "What it has done so far", "Statistics"),
    # Last of those that a path matches: it is no model's metadata.
    Route(
        "GET",
        "/v2/models/stats",
        "statistics",
        "What all models have done so far",
        "Statistics",
    ),
    Route(
        "POST",
        "/v2/repository/index",
        "repository_index",
        "Every model with its state",
        "Index",
        "IndexRequest",
    ),
    Route("POST", f"{_LOAD}/load", "model_load", "Load a model, again", "ModelLoad"),
    Route("POST", f"{_LOAD}/unload", "model_unload", "Unload a model", "ModelUnload"),
)


class Match(NamedTuple):
    """What one method of a path leads to.

    protocol: "v1", "v2" or "generate"; "http" where no protocol of inference is asked.
    """

    action: str
    model: str
    version: str | None
    protocol: str


# Remembered paths are bounded in number and in length: a peer chooses them.
_REMEMBERED_LENGTH = 256


def match(target: str) -> dict[str, Match]:
    """Return what a request target leads to, by method; empty: no such path."""
    if len(target) <= _REMEMBERED_LENGTH:
        return _remembered(target)
    return _match(target)


def origin_form(target: str) -> str:
    """The path and query of a target in absolute form (RFC 9112 section 3.2.2)."""
    scheme, separator, rest = target.partition("://")
    if separator and scheme.lower() in ("http", "https"):
        return "/" + rest.partition("/")[2]
    return target


def _match(target: str) -> dict[str, Match]:
    segments = origin_form(target).partition("?")[0].split("/")
    found: dict[str, Match] = {}
    for route in ROUTES:
        values = _fit(route.pattern.split("/"), segments)
        if values is not None:
            leads_to = Match(
                route.action,
                values.get("model", ""),
                values.get("version"),
                _protocol_of(route),
            )
            found[route.method] = leads_to
            if route.method == "GET":
                found["HEAD"] = leads_to
    return found


def _protocol_of(route: Route) -> str:
    if route.action.startswith("generate"):
        return "generate"
    first = route.pattern.split("/")[1]
    return first if first in ("v1", "v2") else "http"


def _fit(pattern: list[str], segments: list[str]) -> dict[str, str] | None:
    if len(pattern) != len(segments):
        return None
    values: dict[str, str] = {}
    for part, segment in zip(pattern, segments, strict=True):
        if not part.startswith("{"):
            if part != segment:
                return None
            continue
        name, _, suffix = part.removeprefix("{").partition("}")
        if not segment.endswith(suffix) or len(segment) == len(suffix):
            return None
        raw = segment.removesuffix(suffix)
        try:
            values[name] = unquote(raw, errors="strict")
        except UnicodeDecodeError:
            return None
    return values


_remembered = lru_cache(maxsize=1024)(_match)
