"""Spans of requests: what they say, whose children they are, and where they go."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import grpc
import httpx
import numpy as np
import pytest
from opentelemetry import baggage, propagate, trace
from opentelemetry.exporter.otlp.proto.common._internal.trace_encoder import (
    encode_spans,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
)
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, Sampler, SamplingResult
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from kserve_lite import Model, serve, telling
from kserve_lite.errors import StartupError
from kserve_lite.records import Record
from kserve_lite.server import tracing
from kserve_lite.server.tracing import Tracing, make_tracing
from kserve_lite.testing import Client
from tests.server.process import PATIENCE, App

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
PREDICT = "/v1/models/m:predict"
INFER = "/inference.GRPCInferenceService/ModelInfer"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> Iterator[Tracing]:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield Tracing(provider, provider.force_flush)
    provider.shutdown()


def record_of(
    target: str = PREDICT,
    *,
    method: str = "POST",
    http: str = "1.1",
    peer: str = "10.1.2.3",
    **headers: str,
) -> Record:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return Record(http, method, target, given, peer, lambda: False)


def traced(
    spans: Tracing, record: Record, *, is_call: bool = False, **known: Any
) -> ReadableSpan:
    """Begin and end a request, as a task of its own would."""

    def request() -> None:
        spans.begin(record, is_call=is_call)
        for name, value in {"code": 200, **known}.items():
            setattr(record, name, value)
        spans.end(record)

    contextvars.copy_context().run(request)
    exporter = spans._tracer.span_processor._span_processors[0].span_exporter
    return exporter.get_finished_spans()[-1]  # type: ignore[no-any-return]


def parts(span: ReadableSpan) -> tuple[str, str, str]:
    ids = span.get_span_context()
    assert ids is not None
    return (
        f"{ids.trace_id:032x}",
        f"{ids.span_id:016x}",
        f"{ids.trace_flags:02x}",
    )


# --- what a span says ----------------------------------------------------------------


def test_http(spans: Tracing) -> None:
    record = record_of(f"{PREDICT}?token=secret", user_agent="curl/8", x_request_id="a")
    span = traced(spans, record, model="m", protocol="v1", sent=15)
    assert span.name == "POST /v1/models/{model}:predict"
    assert span.kind is SpanKind.SERVER
    assert span.status.status_code is StatusCode.UNSET
    assert dict(span.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": "/v1/models/{model}:predict",
        "http.response.status_code": 200,
        "http.response.body.size": 15,
        "url.path": PREDICT,
        "network.protocol.name": "http",
        "network.protocol.version": "1.1",
        "client.address": "10.1.2.3",
        "user_agent.original": "curl/8",
        "kserve_lite.protocol": "v1",
        "kserve_lite.model": "m",
        "kserve_lite.request_id": "a",
    }
    assert span.start_time is not None
    assert span.end_time is not None
    assert span.start_time < span.end_time


@pytest.mark.parametrize(
    "code", ["OK", "CANCELLED", "INVALID_ARGUMENT", "INTERNAL", "UNAVAILABLE"]
)
def test_grpc_calls(spans: Tracing, code: str) -> None:
    record = record_of(INFER, http="2", content_type="application/grpc+proto")
    known = {"code": code, "action": "ModelInfer", "protocol": "grpc"}
    span = traced(spans, record, is_call=True, **known)
    told = dict(span.attributes or {})
    assert span.name == "inference.GRPCInferenceService/ModelInfer"
    assert told["rpc.system"] == "grpc"
    assert told["rpc.service"] == "inference.GRPCInferenceService"
    assert told["rpc.method"] == "ModelInfer"
    number = getattr(grpc.StatusCode, code).value[0]
    assert told["rpc.grpc.status_code"] == number
    assert "http.response.status_code" not in told
    failed = code in ("INTERNAL", "UNAVAILABLE")
    assert (span.status.status_code is StatusCode.ERROR) is failed
    assert told.get("error.type") == (code if failed else None)


def test_every_status_of_grpc_is_known() -> None:
    assert [each.value[0] for each in grpc.StatusCode] == [
        tracing._GRPC.index(each.name) for each in grpc.StatusCode
    ]


@pytest.mark.parametrize(
    ("code", "failed"), [(404, ""), (499, ""), (500, "500"), (503, "503"), ("", "-")]
)
def test_what_failed(spans: Tracing, code: int | str, failed: str) -> None:
    span = traced(spans, record_of(), code=code)
    told = dict(span.attributes or {})
    assert (span.status.status_code is StatusCode.ERROR) is bool(failed)
    assert told.get("error.type", "") == failed.replace("-", "unanswered")
    assert told.get("http.response.status_code") == (code or None)


@pytest.mark.parametrize(
    ("method", "target", "name"),
    [
        ("GET", "/", "GET /"),
        ("GET", "/v1/models", "GET /v1/models"),
        ("GET", "/v2/models", "GET /v2/models"),
        ("HEAD", "/v2/health/live", "HEAD /v2/health/live"),
        ("GET", "/v1/models/a", "GET /v1/models/{model}"),
        ("GET", "/v2/models/a/ready", "GET /v2/models/{model}/ready"),
        (
            "POST",
            "/v2/models/a/versions/1/infer?x",
            "POST /v2/models/{model}/versions/{version}/infer",
        ),
        ("POST", "http://host/v1/models/a:explain", "POST /v1/models/{model}:explain"),
        ("GET", "/nowhere/at/all", "GET"),
        ("DELETE", PREDICT, "DELETE"),
        ("SECRET", PREDICT, "HTTP"),
    ],
)
def test_names_are_few(spans: Tracing, method: str, target: str, name: str) -> None:
    span = traced(spans, record_of(target, method=method))
    told = dict(span.attributes or {})
    assert span.name == name
    assert told.get("http.route") == (name.partition(" ")[2] or None)
    known = method != "SECRET"
    assert told["http.request.method"] == (method if known else "_OTHER")
    assert told.get("http.request.method_original") == (None if known else method)


@pytest.mark.parametrize("code", ["UNIMPLEMENTED", "UNKNOWN", "CANCELLED", ""])
def test_a_grpc_method_that_does_not_exist_names_no_span(
    spans: Tracing, code: str
) -> None:
    record = record_of("/made.Up/Method", http="2", content_type="application/grpc")
    assert traced(spans, record, is_call=True, code=code).name == "grpc _OTHER"
    record = record_of(INFER, http="2", content_type="application/grpc")
    span = traced(spans, record, is_call=True, code=code, action="ModelInfer")
    assert span.name.endswith("/ModelInfer")


@pytest.mark.parametrize("http", ["1.1", "2"])
def test_a_content_type_makes_no_call(spans: Tracing, http: str) -> None:
    record = record_of(
        "/made-up", method="GET", http=http, content_type="application/grpc"
    )
    span = traced(spans, record, code=404)
    assert span.name == "GET"
    told = dict(span.attributes or {})
    assert told["http.response.status_code"] == 404
    assert not [name for name in told if name.startswith("rpc.")]


@pytest.mark.parametrize(
    "text", ["\ud800\n\x1b", "x" * 65536, "\U0001f600" * 65536], ids=range(3)
)
@pytest.mark.parametrize("is_call", [False, True])
def test_what_a_peer_sends_is_only_text(
    spans: Tracing, text: str, is_call: bool
) -> None:
    record = record_of(
        f"/{text}/{text}",
        method=text,
        peer=text,
        user_agent=text,
        tracestate=f"a={text}",
        baggage=f"a={text}",
        traceparent=f"{TRACEPARENT}-{text}",
    )
    span = traced(spans, record, is_call=is_call, model=text, action="x", code=404)
    for value in [span.name, *(span.attributes or {}).values()]:
        assert str(value).isprintable()
        assert len(str(value).encode()) <= 1024
    assert len(encode_spans([span]).SerializeToString()) < 8192


# --- whose child it is ---------------------------------------------------------------


def test_the_ids_are_those_that_the_client_gets(spans: Tracing) -> None:
    record = record_of(
        traceparent=TRACEPARENT, tracestate="vendor=1", baggage="user=alice"
    )
    seen = []

    def request() -> None:
        spans.begin(record)
        seen.append((record.trace, record.traceparent, baggage.get_baggage("user")))
        spans.end(record)

    contextvars.copy_context().run(request)
    span = traced(spans, record_of(traceparent=TRACEPARENT, tracestate="vendor=1"))
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == PARENT
    context = span.get_span_context()
    assert context is not None
    assert context.trace_state.to_header() == "vendor=1"
    trace_id, span_id, flags = seen[0][0]
    assert trace_id == TRACE
    assert span_id != PARENT
    assert flags == "01"
    assert seen[0][1] == f"00-{TRACE}-{span_id}-01"
    assert seen[0][2] == "alice"


def test_the_exported_ids_are_the_records(spans: Tracing) -> None:
    for headers in ({}, {"traceparent": TRACEPARENT}, {"traceparent": "nonsense"}):
        record = record_of(**headers)
        span = traced(spans, record)
        assert parts(span) == record.trace
        assert (record.trace[0] == TRACE) is (headers == {"traceparent": TRACEPARENT})
        assert (span.parent is None) is (headers != {"traceparent": TRACEPARENT})


def test_a_caller_that_is_not_sampled(
    spans: Tracing, exporter: InMemorySpanExporter
) -> None:
    record = record_of(traceparent=f"00-{TRACE}-{PARENT}-00")
    spans.begin(record)
    trace_id, span_id, flags = record.trace
    record.code = 500
    spans.end(record)
    assert exporter.get_finished_spans() == ()
    assert (trace_id, flags) == (TRACE, "00")
    assert span_id != PARENT


def test_too_long_a_state_is_left_out(spans: Tracing) -> None:
    for length, kept in ((256, True), (600, False)):
        state = ",".join(f"v{n}={'x' * 90}" for n in range(length // 90))
        span = traced(spans, record_of(traceparent=TRACEPARENT, tracestate=state))
        context = span.get_span_context()
        assert context is not None
        assert bool(context.trace_state) is kept


# --- what is current -----------------------------------------------------------------


def test_it_is_current_from_beginning_to_end(spans: Tracing) -> None:
    outside = trace.get_current_span()
    record = record_of()
    spans.begin(record)
    current = trace.get_current_span().get_span_context()
    assert f"{current.span_id:016x}" == record.trace[1]
    spans.end(record)
    assert trace.get_current_span() is outside
    assert spans._open == {}


def test_ending_elsewhere_twice_or_without_a_beginning(
    spans: Tracing, exporter: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    record = record_of()
    contextvars.copy_context().run(spans.begin, record)
    spans.end(record)
    spans.end(record)
    spans.end(record_of())
    assert len(exporter.get_finished_spans()) == 1
    assert spans._open == {}
    assert caplog.text == ""


def test_requests_do_not_mix(spans: Tracing, exporter: InMemorySpanExporter) -> None:
    async def request(number: int, go: asyncio.Event) -> str:
        record = record_of(f"/v1/models/m{number}:predict")
        spans.begin(record)
        await go.wait()
        with spans.stage("predict", {}):
            await asyncio.sleep(0)
            await asyncio.to_thread(lambda: spans._tracer.start_span("own").end())
        record.code = 200
        spans.end(record)
        return record.trace[0]

    async def all_of_them() -> list[str]:
        go = asyncio.Event()
        tasks = [asyncio.create_task(request(n, go)) for n in range(10)]
        await asyncio.sleep(0)
        go.set()
        return await asyncio.gather(*tasks)

    expected = asyncio.run(all_of_them())
    found: dict[str, list[ReadableSpan]] = {}
    for span in exporter.get_finished_spans():
        found.setdefault(parts(span)[0], []).append(span)
    assert sorted(found) == sorted(expected)
    for own, predict, server in found.values():
        assert (own.name, predict.name) == ("own", "predict")
        assert own.parent == predict.get_span_context()
        assert predict.parent == server.get_span_context()


def test_a_stage_tells_of_its_queue_and_its_failure(
    spans: Tracing, exporter: InMemorySpanExporter
) -> None:
    record = record_of()
    times = {"queue": 1000}
    spans.begin(record)

    def handler() -> None:
        with spans.stage("predict", times):
            times["queue"] += 2000
            times["batch"] = 500
            times["preprocess"] = 1
            raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        handler()
    with spans.stage("postprocess", times):
        pass
    spans.end(record)
    queue, batch, predict, postprocess, _ = exporter.get_finished_spans()
    assert [each.name for each in (queue, batch, predict, postprocess)] == [
        "queue",
        "batch",
        "predict",
        "postprocess",
    ]
    assert queue.parent == batch.parent == predict.get_span_context()
    begun = predict.start_time
    assert begun is not None
    assert (queue.start_time, queue.end_time) == (begun, begun + 2000)
    assert (batch.start_time, batch.end_time) == (begun + 2000, begun + 2500)
    assert predict.status.status_code is StatusCode.ERROR
    assert [event.name for event in predict.events] == ["exception"]
    assert postprocess.status.status_code is StatusCode.UNSET


@pytest.fixture
def exported(
    monkeypatch: pytest.MonkeyPatch, exporter: InMemorySpanExporter
) -> Iterator[TracerProvider]:
    """The program's provider, whose spans the exporter has."""
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    yield provider
    provider.shutdown()


def wait_for_spans(exporter: InMemorySpanExporter, count: int) -> list[ReadableSpan]:
    """Requests end after their answers."""
    due = time.monotonic() + PATIENCE
    while len(exporter.get_finished_spans()) < count:
        assert time.monotonic() < due
        time.sleep(0.005)
    return list(exporter.get_finished_spans())


@pytest.mark.usefixtures("exported")
def test_what_a_request_waits_for_is_seen(exporter: InMemorySpanExporter) -> None:
    model = Model("m")

    @model.predict(max_batch_size=2)
    async def batched(x: np.ndarray) -> np.ndarray:
        return 2 * x

    threaded = Model("t", predict=lambda payload: payload)
    with Client(model, threaded, enable_tracing=True) as client:
        client.infer({"x": np.ones(1)}, "m", over="grpc")
        client.predict([1], "t")
        found = wait_for_spans(exporter, 6)
    assert sorted(each.name for each in found) == [
        "POST /v1/models/{model}:predict",
        "batch",
        "inference.GRPCInferenceService/ModelInfer",
        "predict",
        "predict",
        "queue",
    ]
    of_id = {parts(each)[1]: each for each in found}
    for each in found:
        if each.name in ("queue", "batch"):
            assert each.parent is not None
            parent = of_id[f"{each.parent.span_id:016x}"]
            assert parent.name == "predict"
            assert each.start_time == parent.start_time


@pytest.mark.usefixtures("exported")
def test_peers_choose_no_names(exporter: InMemorySpanExporter) -> None:
    with Client(Model("m", predict=lambda payload: payload), enable_tracing=True) as c:
        kind = {"content-type": "application/grpc"}
        assert c.request("GET", "/made-up", headers=kind).status == 404
        (span,) = wait_for_spans(exporter, 1)
    assert span.name == "GET"


# --- whom they hurt ------------------------------------------------------------------


def test_a_processor_that_fails_hurts_no_request(
    exported: TracerProvider,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken(SpanProcessor):
        def on_end(self, span: ReadableSpan) -> None:
            if span.kind is SpanKind.SERVER:
                raise ValueError("a processor's")

    monkeypatch.setattr(telling, "_said", set())
    caplog.set_level(logging.INFO, "kserve_lite.access")
    exported.add_span_processor(Broken())
    with Client(Model("m", predict=lambda payload: payload), enable_tracing=True) as c:
        for number in range(3):
            assert c.predict([number]) == [number]
        counted = c.request("GET", "/metrics").body.decode()
    (line,) = [each for each in counted.splitlines() if "requests_total{" in each]
    assert line.endswith(" 3.0")
    lines = [r for r in caplog.records if r.name == "kserve_lite.access"]
    assert len(lines) == 4
    failures = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert [r.getMessage() for r in failures] == [
        "the tracing of a request failed; it is said only once"
    ]


class BrokenSampler(Sampler):
    """Fails at spans of some kinds."""

    def __init__(self, *kinds: SpanKind) -> None:
        self.kinds = kinds

    def should_sample(self, *args: Any, **kwargs: Any) -> SamplingResult:
        kind = kwargs.get("kind", args[3] if len(args) > 3 else None)
        if kind in self.kinds:
            raise ValueError("a sampler's")
        return ALWAYS_ON.should_sample(*args, **kwargs)

    def get_description(self) -> str:
        return "broken"


class BrokenPropagator(TraceContextTextMapPropagator):
    def extract(self, *_: Any, **__: Any) -> Any:
        raise ValueError("a propagator's")


class BrokenProcessor(SpanProcessor):
    def on_end(self, span: ReadableSpan) -> None:
        if span.kind is not SpanKind.SERVER:
            raise ValueError("a processor's")


OVER: tuple[Literal["json", "grpc"], ...] = ("json", "grpc", "json")
NOT_BEGUN = "a span could not be begun; it is said only once"
NOT_ENDED = "a span could not be ended; it is said only once"


@pytest.mark.parametrize(
    "case",
    [
        # The children of a request without a span are there.
        (BrokenSampler(SpanKind.SERVER), {"predict", "queue", "batch"}, NOT_BEGUN),
        (BrokenPropagator(), {"predict", "queue", "batch"}, NOT_BEGUN),
        (BrokenSampler(SpanKind.INTERNAL), {"POST", INFER[1:]}, NOT_BEGUN),
        (BrokenSampler(SpanKind.SERVER, SpanKind.INTERNAL), set(), NOT_BEGUN),
        (BrokenProcessor(), {"POST", INFER[1:]}, NOT_ENDED),
    ],
)
def test_a_programs_own_code_that_fails_hurts_no_request(
    case: tuple[Any, set[str], str],
    exported: TracerProvider,
    exporter: InMemorySpanExporter,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken, names, said = case
    monkeypatch.setattr(telling, "_said", set())
    if isinstance(broken, Sampler):
        exported.sampler = broken
    elif isinstance(broken, SpanProcessor):
        first = exported._active_span_processor._span_processors
        exported._active_span_processor._span_processors = (broken, *first)
    else:
        monkeypatch.setattr(propagate, "extract", broken.extract)
    batched, failing = Model("m"), Model("f")

    @batched.predict(max_batch_size=2)
    async def double(x: np.ndarray) -> np.ndarray:
        return 2 * x

    @failing.predict
    def fail(payload: Any) -> Any:
        raise ValueError("a handler's")

    with Client(batched, failing, enable_tracing=True) as client:
        for over in OVER:
            answer = client.infer({"x": np.ones(2)}, "m", over=over)
            assert answer["output-0"].tolist() == [2, 2]
        ids = {"x-request-id": "mine"}
        path = "/v1/models/f:predict"
        failed = client.request("POST", path, json={}, headers=ids)
        assert failed.status == 500
        assert failed.headers["x-request-id"] == "mine"
        counted = client.request("GET", "/metrics").body.decode()
    (predicted,) = [
        line
        for line in counted.splitlines()
        if "requests_total{" in line and 'code="500"' in line
    ]
    assert predicted.endswith(" 1.0")
    found = {span.name.partition(" ")[0] for span in exporter.get_finished_spans()}
    assert found - {"GET"} == names
    ours = [r.getMessage() for r in caplog.records if "once" in r.getMessage()]
    assert ours == [said]


# --- whose provider ------------------------------------------------------------------


@pytest.mark.parametrize(
    "package", ["opentelemetry", "opentelemetry.sdk.trace", "opentelemetry.sdk"]
)
def test_without_the_packages(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setattr(trace, "get_tracer_provider", trace.ProxyTracerProvider)
    for name in list(sys.modules):
        if name == package or name.startswith(f"{package}."):
            monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(StartupError, match=r"pip install kserve-lite\[otel\]"):
        make_tracing()


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin", "offers 'zipkin'"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "offers 'otlp_proto_grpc'"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "-1", "OTEL_"),
    ],
)
def test_variables_that_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: str
) -> None:
    monkeypatch.setattr(trace, "get_tracer_provider", trace.ProxyTracerProvider)
    monkeypatch.setenv(variable, value)
    with pytest.raises(StartupError, match=words):
        make_tracing()


def test_a_disabled_sdk_leaves_the_ids_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "get_tracer_provider", trace.ProxyTracerProvider)
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    made = make_tracing()
    assert made is not None
    record = record_of(traceparent=TRACEPARENT)
    contextvars.copy_context().run(made.begin, record)
    assert record.trace[0] == TRACE
    assert record.trace[1] != PARENT
    made.end(record)
    made.close()


# --- where they go -------------------------------------------------------------------


class Receiver(ThreadingHTTPServer):
    """An OTLP/HTTP collector; `silent`: one that takes requests and never answers."""

    daemon_threads = True

    def __init__(self, *, silent: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), _Collect)
        self.silent = silent
        self.go = threading.Event()
        self.asked = threading.Event()
        self.requests: list[ExportTraceServiceRequest] = []
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,))
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def spans(self) -> dict[str, Any]:
        return {
            span.name: span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        }

    def close(self) -> None:
        self.go.set()
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Collect(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.asked.set()
        if self.server.silent:
            self.server.go.wait()
            return
        self.server.requests.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


APP = """
from opentelemetry import trace
from kserve_lite import Model, run

model = Model("m")
tracer = trace.get_tracer("app")

@model.preprocess
async def preprocess(payload):
    with tracer.start_as_current_span("look up"):
        return payload

@model.predict
def predict(payload):
    with tracer.start_as_current_span("compute"):
        return payload

if __name__ == "__main__":
    run(model)
"""


def test_a_process_sends_its_spans(tmp_path: Path, receiver: Receiver) -> None:
    (tmp_path / "app.py").write_text(APP)
    flags = ("--http_port", "0", "--enable_tracing")
    to = receiver.endpoint
    with App("app.py", *flags, cwd=tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=to) as app:
        answer = httpx.post(
            app.url + PREDICT, json={"x": 1}, headers={"traceparent": TRACEPARENT}
        )
        assert answer.status_code == 200
        with grpc.insecure_channel(f"127.0.0.1:{app.port}") as channel:
            live = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
            _, call = live.with_call(b"", metadata=(("traceparent", TRACEPARENT),))
        assert app.stop().status == 0
    spans = receiver.spans
    server = spans["POST /v1/models/{model}:predict"]
    assert server.parent_span_id.hex() == PARENT
    assert answer.headers["traceparent"] == f"00-{TRACE}-{server.span_id.hex()}-01"
    for child, parent in (
        ("preprocess", server.name),
        ("predict", server.name),
        ("look up", "preprocess"),
        ("compute", "predict"),
    ):
        assert spans[child].parent_span_id == spans[parent].span_id
    called = spans["inference.GRPCInferenceService/ServerLive"]
    assert called.parent_span_id.hex() == PARENT
    told = dict(call.initial_metadata()) | dict(call.trailing_metadata())
    assert told["traceparent"] == f"00-{TRACE}-{called.span_id.hex()}-01"
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE}
    resource = receiver.requests[0].resource_spans[0].resource
    names = {each.key: each.value.string_value for each in resource.attributes}
    assert names["service.name"] == "kserve-lite"


OWN = APP.replace(
    "model = Model",
    """
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

provider = TracerProvider(resource=Resource.create({"service.name": "mine"}))
provider.add_span_processor(BatchSpanProcessor(ConsoleSpanExporter()))
trace.set_tracer_provider(provider)
model = Model""",
)


def test_a_program_keeps_its_own_provider(tmp_path: Path, receiver: Receiver) -> None:
    (tmp_path / "app.py").write_text(OWN)
    flags = ("--http_port", "0", "--enable_tracing", "--access_log", "false")
    to = receiver.endpoint
    with App("app.py", *flags, cwd=tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=to) as app:
        assert app.ask(PREDICT, {"x": 1})[0] == 200
        result = app.stop()
    assert '"name": "POST /v1/models/{model}:predict"' in result.out
    assert '"name": "compute"' in result.out
    assert receiver.requests == []


def test_an_embedded_server_sets_no_provider(
    monkeypatch: pytest.MonkeyPatch, receiver: Receiver
) -> None:
    before = trace.get_tracer_provider()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
    model = Model("m")

    @model.predict
    async def predict(payload: Any) -> Any:
        return payload

    async def life() -> None:
        server = serve(model, http_port=0, host="127.0.0.1", enable_tracing=True)
        async with server, httpx.AsyncClient() as client:
            answer = await client.post(server.url + PREDICT, json={})
            assert answer.status_code == 200

    asyncio.run(life())
    assert trace.get_tracer_provider() is before
    assert set(receiver.spans) == {"POST /v1/models/{model}:predict", "predict"}
    left = [each.name for each in threading.enumerate() if "tel" in each.name.lower()]
    assert left == []


def test_a_collector_that_never_answers_holds_no_stop_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trace, "get_tracer_provider", trace.ProxyTracerProvider)
    monkeypatch.setattr(tracing, "PATIENCE", 0.05)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    silent = Receiver(silent=True)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", silent.endpoint)
    try:
        made = make_tracing()
        assert made is not None
        record = record_of()
        contextvars.copy_context().run(made.begin, record)
        made.end(record)
        made.close()
        assert silent.asked.wait(30)
        finishing = [t for t in threading.enumerate() if t.name == "otel-finish"]
        assert len(finishing) == 1
    finally:
        silent.close()
    finishing[0].join(60)
