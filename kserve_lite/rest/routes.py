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
    """One row: `action` names the method of `endpoints.Endpoints` that answers."""

    method: str
    pattern: str
    action: str
    summary: str


ROUTES: tuple[Route, ...] = (
    Route("GET", "/", "alive", "Whether the server answers"),
    Route("GET", "/v1/models", "model_names", "The models' names"),
    Route("GET", "/v1/models/{model}", "v1_ready", "Whether a model is ready"),
    Route("POST", "/v1/models/{model}:predict", "v1_predict", "Predict"),
    Route("POST", "/v1/models/{model}:explain", "v1_explain", "Explain"),
    Route("GET", "/v2", "server_metadata", "What the server is"),
    Route("GET", "/v2/health/live", "live", "Whether the server lives"),
    Route("GET", "/v2/health/ready", "ready", "Whether every model is ready"),
    Route("GET", "/v2/models", "model_names", "The models' names"),
    Route("GET", "/v2/models/{model}", "model_metadata", "Inputs and outputs"),
    Route("GET", "/v2/models/{model}/ready", "v2_ready", "Whether a model is ready"),
    Route("POST", "/v2/models/{model}/infer", "v2_infer", "Predict"),
    Route(
        "GET",
        "/v2/models/{model}/versions/{version}",
        "model_metadata",
        "Inputs and outputs of a version",
    ),
    Route(
        "GET",
        "/v2/models/{model}/versions/{version}/ready",
        "v2_ready",
        "Whether a version is ready",
    ),
    Route(
        "POST",
        "/v2/models/{model}/versions/{version}/infer",
        "v2_infer",
        "Predict with a version",
    ),
)


class Match(NamedTuple):
    """What one method of a path leads to."""

    action: str
    model: str
    version: str | None


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
                route.action, values.get("model", ""), values.get("version")
            )
            found[route.method] = leads_to
            if route.method == "GET":
                found["HEAD"] = leads_to
    return found


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
