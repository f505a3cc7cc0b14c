"""Spans of OpenTelemetry, one for each request, with the extra `[otel]`.

A request's span is begun before its handlers run and is current while they do, in
threads too, so that spans of their own become its children; its parent is the one that
`traceparent` names. The ids that the client gets are the span's. Names and attributes
follow the semantic conventions for HTTP servers and for gRPC; what a peer sent is
escaped and cut, queries are left out. A request that the transport refused by itself,
without an exchange, has no span.

Spans go to the program's TracerProvider if it has set one, else to one made here of the
OTEL_* variables; the sampler decides, by default as the caller's flags say. This is the
only module that imports OpenTelemetry, and only once tracing is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from threading import Thread
from time import perf_counter_ns, time_ns
from typing import TYPE_CHECKING, Any, NamedTuple

from kserve_lite.dispatch.statistics import BATCH, QUEUE, Times
from kserve_lite.errors import StartupError
from kserve_lite.records import Record
from kserve_lite.rest.routes import ROUTES, match, origin_form
from kserve_lite.server.access import MAX_PATH, MAX_WORD
from kserve_lite.server.escaping import visible
from kserve_lite.telling import failed
from kserve_lite.version import __version__

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

# What W3C asks to pass on (Trace Context 3.3.1.5, Baggage 3.3.2); of more, nothing is.
MAX_STATE = 512
MAX_BAGGAGE = 8192
_NOT_BEGUN = "a span could not be begun"
# Seconds that a stop waits for spans to be sent.
PATIENCE = 5.0

# In the order of their numbers: github.com/grpc/grpc, doc/statuscodes.md.
_GRPC = """
    OK CANCELLED UNKNOWN INVALID_ARGUMENT DEADLINE_EXCEEDED NOT_FOUND ALREADY_EXISTS
    PERMISSION_DENIED RESOURCE_EXHAUSTED FAILED_PRECONDITION ABORTED OUT_OF_RANGE
    UNIMPLEMENTED INTERNAL UNAVAILABLE DATA_LOSS UNAUTHENTICATED
""".split()  # noqa: SIM905 - numbered by eye
# Those that are the server's fault, by the conventions for gRPC servers.
_GRPC_FAILED = frozenset(
    (
        "UNKNOWN",
        "DEADLINE_EXCEEDED",
        "UNIMPLEMENTED",
        "INTERNAL",
        "UNAVAILABLE",
        "DATA_LOSS",
    )
)
# RFC 9110, 5789: what else a peer may think of must not become a name.
_METHODS = frozenset(
    ("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH")
)


def make_tracing(*, own_process: bool = False) -> Tracing:
    """What makes the spans.

    own_process: whether a provider made here is to be the one that
    `opentelemetry.trace.get_tracer()` of handlers and libraries uses. A program that
    embeds the server sets its own, or its handlers make no spans.
    Raises StartupError where the packages are missing or OTEL_* cannot be used.
    """
    try:
        from opentelemetry import trace
    except ImportError as error:
        raise _missing(error) from error
    provider: Any = trace.get_tracer_provider()
    if not isinstance(provider, trace.ProxyTracerProvider):
        # The program's own; the API alone knows no flushing.
        return Tracing(provider, getattr(provider, "force_flush", lambda: None))
    provider = _make_provider()
    if own_process:
        trace.set_tracer_provider(provider)
    return Tracing(provider, provider.shutdown)


def _missing(error: ImportError) -> StartupError:
    return StartupError(
        f"--enable_tracing needs OpenTelemetry, and {error.name or error} is not "
        "installed: pip install kserve-lite[otel]"
    )


class _Open(NamedTuple):
    span: Span
    is_call: bool
    current: Context
    before: Context


class Tracing:
    """Begins and ends the spans of requests; all on the event loop but `close()`."""

    def __init__(self, provider: Any, finish: Callable[[], object]) -> None:
        from opentelemetry import context, propagate, trace

        self._context, self._api = context, trace
        self._extract = propagate.extract
        self._fields = tuple(propagate.get_global_textmap().fields)
        self._tracer = provider.get_tracer("kserve_lite", __version__)
        self._finish = finish
        self._open: dict[Record, _Open] = {}

    def begin(self, record: Record, *, is_call: bool = False) -> None:
        """Begin a request's span and make it current; before anything reads its ids.

        is_call: whether it is a gRPC call, which only those know who answer it: its
        headers are the peer's. In the request's own task. `end()` must follow. Where
        the program's sampler, propagator or span processor raises, there is no span.
        """
        try:
            self._begin(record, is_call)
        except Exception as error:  # noqa: BLE001 - the program's code, see above
            failed(_NOT_BEGUN, error)

    def _begin(self, record: Record, is_call: bool) -> None:
        api = self._api
        parent = self._extract(self._carried(record), self._context.Context())
        name, attributes = _described(record, is_call)
        span = self._tracer.start_span(
            name,
            parent,
            api.SpanKind.SERVER,
            attributes,
            start_time=time_ns() - (perf_counter_ns() - record.started),
        )
        ids = span.get_span_context()
        # OTEL_SDK_DISABLED: there is no span, and the parent's ids are not ours.
        if ids.is_valid and not ids.is_remote:
            record.trace = (
                f"{ids.trace_id:032x}",
                f"{ids.span_id:016x}",
                f"{ids.trace_flags:02x}",
            )
        before = self._context.get_current()
        current = api.set_span_in_context(span, parent)
        self._context.attach(current)
        self._open[record] = _Open(span, is_call, current, before)

    def end(self, record: Record) -> None:
        """End a request's span, as what is known of its answer says.

        Of a request that was never begun, nothing is said.
        """
        opened = self._open.pop(record, None)
        if opened is None:
            return
        # Not detach(): it must be in the task that attached, and this need not be.
        if self._context.get_current() is opened.current:
            self._context.attach(opened.before)
        span = opened.span
        if span.is_recording():
            if opened.is_call and not record.action:
                # There is no such method: a name that the peer made up is none for a
                # span, however the call ended.
                span.update_name("grpc _OTHER")
            error = _tell(span, record)
            if error:
                span.set_attribute("error.type", error)
                span.set_status(self._api.StatusCode.ERROR)
        span.end()

    @contextmanager
    def stage(self, name: str, times: Times) -> Iterator[None]:
        """A child span of the request's for what runs inside: one of its handlers.

        times: what the request spends its time on. What is waited meanwhile, for a turn
        or for a batch, becomes a child at the beginning of this one, where it was. An
        exception is told in the span. Of a stream this is only the beginning.
        """
        begun = time_ns()
        before = [(kind, times.get(kind, 0)) for kind in (QUEUE, BATCH)]
        span = self._child(name, begun)
        if span is None:
            yield
            return
        try:
            with self._api.use_span(span):
                try:
                    yield
                finally:
                    waits = [(kind, times.get(kind, 0) - ns) for kind, ns in before]
                    self._tell_waits(span, begun, waits)
        finally:
            _end(span)

    def _tell_waits(self, span: Span, begun: int, waits: list[tuple[str, int]]) -> None:
        """Tell how long each kind of waiting took, one after the other."""
        for kind, waited in waits:
            if waited > 0 and span.is_recording():
                child = self._child(kind, begun)
                begun += waited
                if child is not None:
                    _end(child, begun)

    def _child(self, name: str, begun: int) -> Span | None:
        """A span below the current one; None where it cannot be begun."""
        try:
            return self._tracer.start_span(  # type: ignore[no-any-return]
                name, start_time=begun
            )
        except Exception as error:  # noqa: BLE001 - as in begin()
            failed(_NOT_BEGUN, error)
            return None

    def close(self) -> None:
        """Send the spans that are still here: waits, some 5 s at the most.

        A provider that was made here is shut down, the program's goes on. Call it in a
        thread, if others use the event loop.
        """
        # The SDK's own waiting has no bound, if nobody answers at the other end.
        thread = Thread(target=self._finish, name="otel-finish", daemon=True)
        thread.start()
        thread.join(PATIENCE)

    def _carried(self, record: Record) -> dict[str, str]:
        """The headers that say what a request is part of, within bounds."""
        found = {}
        for name in self._fields:
            value = record.headers.get(name)
            most = MAX_STATE if name == "tracestate" else MAX_BAGGAGE
            if value is not None and len(value) <= most and value.isascii():
                found[name] = value
        return found


def _end(span: Span, at: int | None = None) -> None:
    """End a span of which a request must not learn what becomes of it."""
    try:
        span.end(at)
    except Exception as error:  # noqa: BLE001 - span processors may be anybody's
        failed("a span could not be ended", error)


def _described(record: Record, is_call: bool) -> tuple[str, dict[str, str]]:
    """The name of a request's span, and what is known of it at its beginning."""
    headers = record.headers
    attributes = {
        "network.protocol.name": "http",
        "network.protocol.version": record.http,
    }
    if record.peer:
        attributes["client.address"] = visible(record.peer, MAX_WORD)
    agent = headers.get("user-agent")
    if agent:
        attributes["user_agent.original"] = visible(agent, MAX_WORD)
    if is_call:
        path = visible(record.target, MAX_WORD)
        service, _, method = path.removeprefix("/").rpartition("/")
        attributes |= {
            "rpc.system": "grpc",
            "rpc.service": service,
            "rpc.method": method,
        }
        return f"{service}/{method}", attributes
    return _http_name(record, attributes), attributes


def _http_name(record: Record, attributes: dict[str, str]) -> str:
    method = record.method
    attributes["http.request.method"] = method
    if method not in _METHODS:
        attributes["http.request.method"] = "_OTHER"
        attributes["http.request.method_original"] = visible(method, MAX_WORD)
        method = "HTTP"
    path = origin_form(record.target[: 2 * MAX_PATH]).partition("?")[0]
    attributes["url.path"] = visible(path, MAX_PATH)
    leads_to = match(record.target).get(record.method)
    if leads_to is None:
        return method
    route = _pattern(leads_to.action, leads_to.version is not None, path[:3])
    attributes["http.route"] = route
    return f"{method} {route}"


@lru_cache
def _pattern(action: str, is_versioned: bool, api: str) -> str:
    """The pattern of a route; one action may be had in several places."""
    patterns = [route.pattern for route in ROUTES if route.action == action]
    return min(
        patterns,
        key=lambda pattern: (
            not pattern.startswith(api),
            ("{version}" in pattern) is not is_versioned,
        ),
    )


def _tell(span: Span, record: Record) -> str:
    """Add what became of a request; return what failed, if the server did."""
    code = record.code
    span.set_attribute("kserve_lite.protocol", record.protocol)
    span.set_attribute("kserve_lite.request_id", record.request_id)
    if record.model:
        span.set_attribute("kserve_lite.model", visible(record.model, MAX_WORD))
    if isinstance(code, int):
        span.set_attribute("http.response.status_code", code)
        span.set_attribute("http.response.body.size", record.sent)
        return str(code) if code >= 500 else ""
    if not code:
        return "unanswered"
    if code in _GRPC:
        span.set_attribute("rpc.grpc.status_code", _GRPC.index(code))
    return code if code in _GRPC_FAILED else ""


def _make_provider() -> TracerProvider:
    """A provider by the OTEL_* variables, with the exporters that they name."""
    try:
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise _missing(error) from error
    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "kserve-lite"}))
    try:
        # It would be shut down at exit too, without a bound for how long it takes.
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        for name in os.environ.get("OTEL_TRACES_EXPORTER", "otlp").split(","):
            if name.strip() != "none":
                exporter = _exporter(name.strip())
                provider.add_span_processor(BatchSpanProcessor(exporter))
    except (ValueError, OSError) as error:
        raise StartupError(f"the OTEL_* variables cannot be used: {error}") from error
    return provider


def _exporter(name: str) -> Any:
    known = name
    if name == "otlp":
        general = os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
        protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", general)
        known = "otlp_proto_grpc" if protocol == "grpc" else "otlp_proto_http"
    from importlib.metadata import entry_points  # 20 ms

    found = entry_points(group="opentelemetry_traces_exporter", name=known)
    if not found and known == "otlp_proto_http":
        raise _missing(ImportError(name="opentelemetry-exporter-otlp-proto-http"))
    for entry in found:
        try:
            return entry.load()()
        except ImportError as error:
            raise _missing(error) from error
    raise StartupError(
        f"OTEL_TRACES_EXPORTER={name}: no package that is installed offers {known!r}; "
        "otlp, console and none are known"
    )
