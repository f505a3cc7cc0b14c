"""What an Upstream sends, keeps, repeats and takes, as a REST predictor sees it."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, Final

import anyio
import numpy as np
import pytest

from kserve_lite import Context, InferRequest, InferResponse, InvalidInput, Tensor
from kserve_lite.errors import (
    DeadlineExceeded,
    InferenceFault,
    Kind,
    StartupError,
    Unsupported,
)
from kserve_lite.forwarding import ForwardingSettings, Upstream
from kserve_lite.handlers import Stage
from tests.forwarding.recorder import Recorder, Reply, recorder, refusal

V1 = {"instances": [1]}
TENSOR = InferRequest("m", (Tensor("x", np.ones(2, np.float32), "FP32"),))
DONE = {"predictions": [1]}


def context(
    headers: Mapping[str, str] | None = None,
    *,
    protocol: str = "v1",
    within: float | None = None,
) -> Context:
    deadline = None if within is None else time.monotonic() + within
    return Context("m", None, protocol, headers or {}, deadline)


def using(
    recorded: Recorder,
    work: Callable[[Upstream], Awaitable[Any]],
    *,
    max_size: int = 1 << 20,
    **settings: Any,
) -> Any:
    """Run work with an Upstream; return what it returns."""

    async def run() -> Any:
        made = ForwardingSettings(predictor_host=recorded.host, **settings)
        upstream = Upstream(made, recorded.host, max_size=max_size)
        async with aclosing(_Closing(upstream)):
            return await work(upstream)

    return anyio.run(run)


class _Closing:
    def __init__(self, upstream: Upstream) -> None:
        self.aclose = upstream.close


def infer(
    recorded: Recorder,
    payload: Any = None,
    given: Context | None = None,
    times: int = 1,
    **options: Any,
) -> Any:
    """Infer once, or more often; return the last answer."""

    async def work(upstream: Upstream) -> Any:
        answer = None
        for _ in range(times):
            what = V1 if payload is None else payload
            answer = await upstream.infer(what, given or context())
        return answer

    return using(recorded, work, **options)


def fault_of(recorded: Recorder, *args: Any, **options: Any) -> InferenceFault:
    with pytest.raises(InferenceFault) as caught:
        infer(recorded, *args, **options)
    return caught.value


# --- what is sent ---------------------------------------------------------------------


def test_what_goes_along_and_what_does_not(recorded: Recorder) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    came = {
        "x-request-id": "id-1",
        "traceparent": f"00-{trace}-b7ad6b7169203331-01",
        "tracestate": "vendor=1",
        "x-b3-traceid": trace,
        "x-b3-sampled": "1",
        "authorization": "Bearer t",
        "cookie": "c=1",
        "host": "public.example",
        "user-agent": "curl",
        "x-forwarded-for": "10.0.0.1",
        "content-length": "999",
    }
    assert infer(recorded, given=context(came, within=30)) == DONE
    (asked,) = recorded.asked
    assert (asked.method, asked.path) == ("POST", "/v1/models/m:predict")
    headers = dict(asked.headers)
    version, theirs, span, _ = headers.pop("traceparent").split("-")
    assert (version, theirs) == ("00", trace)
    assert span != "b7ad6b7169203331"
    assert 0 < int(headers.pop("x-request-timeout-ms")) <= 30_000
    assert headers == {
        "x-request-id": "id-1",
        "tracestate": "vendor=1",
        "x-b3-traceid": trace,
        "x-b3-sampled": "1",
        "authorization": "Bearer t",
        "host": recorded.host,
        "content-type": "application/json",
        "content-length": str(len(asked.body)),
    }


def test_an_id_and_a_trace_are_made_where_none_came(recorded: Recorder) -> None:
    lone = {"tracestate": "vendor=1", "authorization": "two\nlines"}
    infer(recorded, given=context(lone))
    headers = recorded.asked[0].headers
    assert len(headers["x-request-id"]) == 32
    assert headers["traceparent"].startswith("00-")
    # A state without its trace is nobody's.
    assert not {"tracestate", "authorization"} & set(headers)


@pytest.mark.parametrize(
    ("payload", "body"),
    [
        ({"instances": [[1]], "more": {"a": None}}, None),
        ({"inputs": {"a": [1], "b": [2]}}, None),
        ([1, 2], None),
        (np.array([[1, 2]]), {"instances": [[1, 2]]}),
        ((np.array([1]), np.array([2])), {"instances": [{"input-0": 1, "input-1": 2}]}),
        ({"a": np.array([1]), "b": np.array([2])}, {"instances": [{"a": 1, "b": 2}]}),
        ({"instances": np.array([[1, 2]])}, {"instances": [[1, 2]]}),
        (np.array(7), {"instances": [7]}),
        (TENSOR, {"instances": [1.0, 1.0]}),
        (InferRequest("m", ()), {"instances": []}),
        (
            InferRequest(
                "m", (Tensor("x", np.array([b"\xff", b"a"], object), "BYTES"),)
            ),
            {"instances": [{"b64": "/w=="}, "a"]},
        ),
    ],
)
def test_a_v1_predictor_is_sent_rows(
    recorded: Recorder, payload: Any, body: Any
) -> None:
    infer(recorded, payload)
    assert json.loads(recorded.asked[0].body) == (payload if body is None else body)


NOTHING: Final = Reply(404)
V2_ANSWER: Final = Reply(
    body=b'{"model_name":"m","outputs":[{"name":"y","shape":[1],"datatype":"INT64",'
    b'"data":[3]}]}'
)


def speaks_v2(
    recorded: Recorder,
    reply: Reply = V2_ANSWER,
    *,
    server: Reply = NOTHING,
    model: Reply = NOTHING,
) -> None:
    """Have it answer a V2 request. server, model: what it says of itself and of m."""
    recorded.asked.clear()
    known = {"/v2": server, "/v2/models/m": model}
    recorded.answer = lambda asked: known.get(asked.path, reply)


@pytest.mark.parametrize(
    ("payload", "inputs"),
    [
        ({"instances": [[1, 2]]}, [("input-0", "INT64", [1, 2], [1, 2])]),
        ([1.5], [("input-0", "FP64", [1], [1.5])]),
        (
            {"inputs": {"a": [1], "b": ["x"]}},
            [("a", "INT64", [1], [1]), ("b", "BYTES", [1], ["x"])],
        ),
        (np.ones((1, 2), np.float32), [("input-0", "FP32", [1, 2], [1, 1])]),
        ({"a": np.ones(1, np.int8)}, [("a", "INT8", [1], [1])]),
        (
            {"inputs": [{"name": "a", "shape": [1], "datatype": "FP32", "data": [2]}]},
            [("a", "FP32", [1], [2])],
        ),
        (TENSOR, [("x", "FP32", [2], [1, 1])]),
    ],
)
def test_a_v2_predictor_is_sent_tensors(
    recorded: Recorder, payload: Any, inputs: list[Any]
) -> None:
    speaks_v2(recorded)  # and nothing of extensions
    answer = infer(
        recorded, payload, context({"x-request-id": "r"}), predictor_protocol="v2"
    )
    sent = recorded.asked[-1]
    assert sent.path == "/v2/models/m/infer"
    assert isinstance(answer, InferResponse)
    assert answer.outputs[0].array.tolist() == [3]
    assert sent.headers["content-type"] == "application/json"
    document = json.loads(sent.body)
    assert document["id"] == "r"
    assert document["inputs"] == [
        {"name": name, "datatype": datatype, "shape": shape, "data": data}
        for name, datatype, shape, data in inputs
    ]


TAKES = (
    b'{"inputs":[{"name":"a","datatype":"FP32","shape":[-1]},'
    b'{"name":"b","datatype":"INT8","shape":[-1]}]}'
)
TAKES_ONE = b'{"inputs":[{"name":"a","datatype":"FP32","shape":[-1]}]}'


@pytest.mark.parametrize(
    ("payload", "takes", "inputs"),
    [
        ({"instances": [1]}, TAKES_ONE, [("a", "FP32", [1])]),
        ({"instances": [1.5]}, TAKES_ONE, [("a", "FP32", [1.5])]),
        (np.ones(1), TAKES_ONE, [("a", "FP32", [1])]),
        ((np.ones(1), np.ones(1)), TAKES, [("a", "FP32", [1]), ("b", "INT8", [1])]),
        (
            {"instances": [{"b": 3, "a": 2}]},
            TAKES,
            [("b", "INT8", [3]), ("a", "FP32", [2])],
        ),
        # What does not fit is the predictor's to refuse.
        ({"instances": [1]}, TAKES, [("input-0", "INT64", [1])]),
        ({"instances": ["x"]}, TAKES_ONE, [("a", "BYTES", ["x"])]),
        ({"instances": [1e300]}, TAKES_ONE, [("a", "FP64", [1e300])]),
        (
            {"instances": [{"a": 1, "b": 300}]},
            TAKES,
            [("a", "FP32", [1]), ("b", "INT64", [300])],
        ),
        ({"instances": [1]}, b"no json", [("input-0", "INT64", [1])]),
        ({"instances": [1]}, b'{"inputs":[{}]}', [("input-0", "INT64", [1])]),
        (
            {"instances": [1]},
            b'{"inputs":[{"name":"a","datatype":[]}]}',
            [("input-0", "INT64", [1])],
        ),
    ],
)
def test_v1_is_typed_and_named_as_the_predictor_says(
    recorded: Recorder, payload: Any, takes: bytes, inputs: list[Any]
) -> None:
    speaks_v2(recorded, model=Reply(body=takes))
    infer(recorded, payload, times=2, predictor_protocol="v2")
    assert [a.path for a in recorded.asked].count("/v2/models/m") == 1
    document = json.loads(recorded.asked[-1].body)
    came = [(i["name"], i["datatype"], i["data"]) for i in document["inputs"]]
    assert came == inputs


def test_tensors_go_binary_where_the_predictor_says_so(recorded: Recorder) -> None:
    speaks_v2(recorded, server=Reply(body=b'{"extensions":["binary_tensor_data"]}'))
    given = context(protocol="v2")
    infer(recorded, TENSOR, given, times=3, predictor_protocol="v2")
    assert [a.path for a in recorded.asked] == ["/v2", *["/v2/models/m/infer"] * 3]
    for asked in recorded.asked[1:]:
        size = int(asked.headers["inference-header-content-length"])
        assert asked.body[size:] == np.ones(2, np.float32).tobytes()
        document = json.loads(asked.body[:size])
        assert document["parameters"] == {"binary_data_output": True}


def test_who_was_not_waited_for_is_asked_again(recorded: Recorder) -> None:
    late = threading.Event()
    says = Reply(body=b'{"extensions":["binary_tensor_data"]}')

    def server() -> Reply:
        late.wait(10)
        return says

    recorded.asked.clear()
    recorded.answer = lambda asked: server() if asked.path == "/v2" else V2_ANSWER

    async def work(upstream: Upstream) -> None:
        with pytest.raises(DeadlineExceeded):
            await upstream.infer(TENSOR, context(protocol="v2", within=0.1))
        late.set()
        await upstream.infer(TENSOR, context(protocol="v2"))

    using(recorded, work, predictor_protocol="v2")
    assert "inference-header-content-length" in recorded.asked[-1].headers


def test_how_the_client_wants_its_answer_is_not_told(recorded: Recorder) -> None:
    request = InferRequest(
        "m",
        TENSOR.inputs,
        id="mine",
        parameters={"binary_data_output": True, "kept": 1.5},
    )
    speaks_v2(recorded)
    infer(recorded, request, predictor_protocol="v2")
    document = json.loads(recorded.asked[-1].body)
    assert (document["id"], document["parameters"]) == ("mine", {"kept": 1.5})


def test_a_host_may_have_a_path_and_a_model_any_name(recorded: Recorder) -> None:
    async def ask() -> None:
        host = f"{recorded.host}/base/"
        settings = ForwardingSettings(predictor_host=host)
        upstream = Upstream(settings, host)
        await upstream.infer(V1, Context("a b?c"))
        await upstream.close()

    anyio.run(ask)
    assert recorded.asked[0].path == "/base/v1/models/a%20b%3Fc:predict"


# --- what comes back ------------------------------------------------------------------


def test_a_v1_answer_becomes_tensors_for_others(recorded: Recorder) -> None:
    for body, names in (
        (b'{"predictions":[[1,2]]}', ["output-0"]),
        (b'{"predictions":[{"a":1,"b":2}]}', ["a", "b"]),
        (b'{"predictions":{"a":[1],"b":[2]}}', ["a", "b"]),
        (b'{"outputs":{"a":[1]}}', ["a"]),
    ):
        recorded.in_turn(Reply(body=body))
        answer = infer(recorded, TENSOR, context(protocol="v2"))
        assert [output.name for output in answer.outputs] == names
    recorded.in_turn(Reply(body=b'{"other":1}'))
    with pytest.raises(ValueError, match="predictions"):
        infer(recorded, TENSOR, context(protocol="grpc"))


MALFORMED = [
    Reply(body=b"no json"),
    Reply(body=b""),
    Reply(body=b'{"predictions":[1]}', headers={"content-encoding": "gzip"}),
    Reply(body=b"x" * 2000),
    Reply(headers={"content-length": "100"}, hangs_up=True),
    Reply(302, headers={"location": "/elsewhere"}),
    Reply(204),
    Reply(405),
    Reply(500, b'{"error":"secret"}'),
    Reply(502, b'{"error":"secret"}'),
]


@pytest.mark.parametrize("reply", MALFORMED)
def test_what_is_no_answer_is_the_predictors_failure(
    recorded: Recorder, reply: Reply, caplog: pytest.LogCaptureFixture
) -> None:
    recorded.in_turn(reply)
    given = context({"x-request-id": "r-1"})
    fault = fault_of(recorded, None, given, max_size=1000, predictor_request_retries=3)
    assert fault.kind is Kind.MODEL_FAILED
    assert fault.reason == (
        "The predictor failed to answer. The server's log has more under r-1."
    )
    assert len(recorded.asked) == 1
    (told,) = caplog.messages
    assert "request id r-1" in told
    assert "secret" not in told


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b'{"outputs":1}',
        b'{"outputs":[{"name":1,"shape":[1],"datatype":"FP32","data":[1]}]}',
        b'{"outputs":[{"name":"y","shape":[1],"datatype":"FP99","data":[1]}]}',
        b'{"outputs":[{"name":"y","shape":[2],"datatype":"FP32","data":[1]}]}',
        b'{"outputs":[{"name":"y","shape":["a"],"datatype":"FP32","data":[1]}]}',
        b'{"outputs":[{"name":"y","shape":[1],"datatype":"FP32"}]}',
        b'{"outputs":[{"name":"y","shape":[1],"datatype":"INT8","data":[999]}]}',
        b'{"id":1,"outputs":[]}',
        b'{"parameters":[1],"outputs":[]}',
    ],
)
def test_what_is_no_v2_is_the_predictors_failure(
    recorded: Recorder, body: bytes
) -> None:
    speaks_v2(recorded, Reply(body=body))
    fault = fault_of(recorded, TENSOR, predictor_protocol="v2")
    assert fault.kind is Kind.MODEL_FAILED


@pytest.mark.parametrize("size", ["-1", "99", "x", ""])
def test_a_wrong_json_size_is_the_predictors_failure(
    recorded: Recorder, size: str
) -> None:
    headers = {"inference-header-content-length": size}
    speaks_v2(recorded, Reply(body=b'{"outputs":[]}', headers=headers))
    fault = fault_of(recorded, TENSOR, predictor_protocol="v2")
    assert fault.kind is Kind.MODEL_FAILED


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, Kind.INVALID_INPUT),
        (401, Kind.FORBIDDEN),
        (403, Kind.FORBIDDEN),
        (404, Kind.NOT_FOUND),
        (413, Kind.INVALID_INPUT),
        (422, Kind.INVALID_INPUT),
        (429, Kind.OVERLOADED),
        (501, Kind.UNSUPPORTED),
        (503, Kind.NOT_READY),
        (504, Kind.DEADLINE_EXCEEDED),
    ],
)
def test_a_refusal_keeps_its_kind(recorded: Recorder, status: int, kind: Kind) -> None:
    recorded.in_turn(refusal(status, "its own words"))
    fault = fault_of(recorded)
    assert fault.kind is kind
    assert (fault.reason == "its own words") == (
        status in {400, 401, 403, 404, 413, 422}
    )


def test_who_says_when_to_come_again_has_too_much_to_do(recorded: Recorder) -> None:
    recorded.in_turn(refusal(503, "busy", retry_after="1"))
    assert fault_of(recorded).kind is Kind.OVERLOADED


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("x" * 600, "x" * 512),
        ("two\nlines\x1b[0m \u202e", "two lines [0m"),
        ("at http://inner:1/x", None),
        ("from 10.1.2.3", None),
        ("from fd00::1:2", None),
        (" " * 1000 + "x" * 100 + "http://inner", None),
        ("x" * 2000 + "http://inner", "x" * 512),
        ("x" * (1 << 17), None),
        ("", None),
        (7, None),
        (["a"], None),
    ],
)
def test_words_of_the_predictor(recorded: Recorder, text: Any, shown: Any) -> None:
    recorded.in_turn(refusal(400, text))
    own = "The predictor does not take the request."
    assert fault_of(recorded).reason == (own if shown is None else shown)


def test_the_predictors_host_is_never_told(recorded: Recorder) -> None:
    host = recorded.host.replace("127.0.0.1", "localhost")
    for text in (host, "LOCALHOST is not nice", "pod localhost-0001-xyz"):
        recorded.in_turn(refusal(400, text))

        async def ask() -> None:
            upstream = Upstream(ForwardingSettings(predictor_host=host), host)
            try:
                await upstream.infer(V1, context())
            finally:
                await upstream.close()

        with pytest.raises(InferenceFault) as caught:
            anyio.run(ask)
        assert caught.value.reason == "The predictor does not take the request."


def test_what_comes_behind_an_answer_is_nobodys(recorded: Recorder) -> None:
    body = b'{"predictions":["of another"]}'
    length = str(len(body)).encode()
    forged = b"HTTP/1.1 200 OK\r\ncontent-length: " + length + b"\r\n\r\n" + body
    wrong = Reply(body=Reply().body + forged)
    short = {"content-length": str(len(Reply().body))}
    recorded.in_turn(wrong._replace(headers=short), Reply(body=b'{"predictions":[2]}'))
    assert infer(recorded, times=2) == {"predictions": [2]}


def test_what_a_predictor_writes_does_not_fill_the_log(
    recorded: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    output = {"name": "y", "shape": [1], "data": [1], "datatype": "X" * 100_000}
    speaks_v2(recorded, Reply(body=json.dumps({"outputs": [output]}).encode()))
    fault_of(recorded, TENSOR, predictor_protocol="v2")
    assert "its answer is not V2" in caplog.text
    assert len(caplog.text) < 2000


# --- again, and not again -------------------------------------------------------------


def test_connections_are_kept(recorded: Recorder) -> None:
    infer(recorded, times=5)
    assert len({asked.connection for asked in recorded.asked}) == 1


def test_a_kept_connection_that_was_closed_meanwhile(recorded: Recorder) -> None:
    recorded.in_turn(Reply(hangs_up=True))

    async def work(upstream: Upstream) -> Any:
        await upstream.infer(V1, context())
        assert await anyio.to_thread.run_sync(recorded.closed.wait, 10)
        return await upstream.infer(V1, context())

    assert using(recorded, work) == DONE
    assert len(recorded.asked) == 2


def test_a_kept_connection_that_is_closed_as_it_is_used(recorded: Recorder) -> None:
    recorded.in_turn(Reply(), None, Reply())
    assert infer(recorded, times=2) == DONE
    first, dropped, again = recorded.asked
    assert first.connection == dropped.connection != again.connection
    assert dropped.body == again.body


def test_a_new_connection_that_is_closed_is_not_tried_again(recorded: Recorder) -> None:
    recorded.in_turn(None)
    fault = fault_of(recorded, predictor_request_retries=3)
    assert fault.kind is Kind.MODEL_FAILED
    assert len(recorded.asked) == 1


def test_an_answer_that_is_cut_short_is_not_asked_for_again(recorded: Recorder) -> None:
    recorded.in_turn(Reply(), Reply(headers={"content-length": "99"}, hangs_up=True))
    assert fault_of(recorded, times=2).kind is Kind.MODEL_FAILED
    assert len(recorded.asked) == 2


@pytest.mark.parametrize(
    "reply",
    [refusal(503, "soon"), refusal(429, "busy"), refusal(503, "", retry_after="0")],
)
def test_retries_are_counted(recorded: Recorder, reply: Reply) -> None:
    recorded.in_turn(reply, reply, Reply())
    assert infer(recorded, predictor_request_retries=2) == DONE
    assert len(recorded.asked) == 3
    recorded.in_turn(reply, reply, Reply())
    fault = fault_of(recorded, predictor_request_retries=1)
    assert fault.kind in {Kind.NOT_READY, Kind.OVERLOADED}
    assert len(recorded.asked) == 2
    recorded.in_turn(reply, Reply())
    fault_of(recorded)
    assert len(recorded.asked) == 1


@pytest.mark.parametrize("after", ["3600", "5"])
def test_nobody_waits_for_a_retry_beyond_the_deadline(
    recorded: Recorder, after: str
) -> None:
    recorded.in_turn(refusal(503, "later", retry_after=after))
    given = context(within=4.5)
    fault = fault_of(recorded, None, given, predictor_request_retries=9)
    assert fault.kind is Kind.OVERLOADED
    assert len(recorded.asked) == 1


@pytest.mark.parametrize("status", [400, 404, 500, 501])
def test_what_is_decided_is_not_tried_again(recorded: Recorder, status: int) -> None:
    recorded.in_turn(refusal(status, "no"))
    fault_of(recorded, predictor_request_retries=3)
    assert len(recorded.asked) == 1


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.parametrize("protocol", ["v1", "v2", "grpc-v2"])
@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_who_cannot_be_reached(
    protocol: str, host: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def ask() -> None:
        address = f"{host}:{unused_port()}"
        settings = ForwardingSettings(
            predictor_host=address,
            predictor_protocol=protocol,
            predictor_request_retries=1,
        )
        upstream = Upstream(settings, address)
        try:
            assert not await upstream.ready("m")
            await upstream.infer(TENSOR, context(protocol="v2"))
        finally:
            await upstream.close()

    with pytest.raises(InferenceFault) as caught:
        anyio.run(ask)
    assert caught.value.kind is Kind.NOT_READY
    assert caught.value.reason == "The predictor cannot be reached."
    # It was tried again, and told once: requests may come by the thousand.
    (told,) = caplog.messages
    assert "request id" in told


def test_proxies_of_the_environment_are_for_others(
    recorded: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{unused_port()}")
    assert infer(recorded) == DONE


# --- its time -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("within", "timeout"), [(0.2, 0.0), (0.2, 30.0), (None, 0.2), (30, 0.2)]
)
def test_its_time_is_the_lesser_of_two(within: float | None, timeout: float) -> None:
    with recorder() as kept:
        kept.answer = lambda _: Reply() if kept.closed.wait(20) else None
        # So that its thread sees the client go: the answer is written to nobody.
        with pytest.raises(DeadlineExceeded):
            infer(
                kept,
                given=context(within=within),
                predictor_request_timeout_seconds=timeout,
            )
        # On a slow machine the time may be over before it is asked.
        for asked in kept.asked:
            assert int(asked.headers["x-request-timeout-ms"]) <= 200
        kept.closed.set()


def test_a_deadline_that_has_passed_sends_nothing(recorded: Recorder) -> None:
    with pytest.raises(DeadlineExceeded):
        infer(recorded, given=context(within=-1))
    assert not recorded.asked


# --- explainers, and what cannot be ---------------------------------------------------


def test_explanations_are_v1(recorded: Recorder) -> None:
    recorded.in_turn(Reply(body=b'{"explanations":[0]}'))

    async def explain(upstream: Upstream) -> Any:
        return await upstream.infer(V1, context(), Stage.EXPLAIN)

    assert using(recorded, explain) == {"explanations": [0]}
    assert recorded.asked[0].path == "/v1/models/m:explain"
    with pytest.raises(Unsupported):
        using(recorded, explain, predictor_protocol="v2")


def test_rows_that_v1_cannot_say(recorded: Recorder) -> None:
    uneven = {"a": np.ones(1), "b": np.ones(2)}
    with pytest.raises(InvalidInput, match="number of rows"):
        infer(recorded, uneven)
    with pytest.raises(TypeError, match="a str"):
        infer(recorded, "text", predictor_protocol="v2")
    request = InferRequest("m", TENSOR.inputs, parameters={"p": [1]})
    with pytest.raises(InvalidInput, match="'p'"):
        infer(recorded, request, predictor_protocol="grpc-v2")
    assert not recorded.asked


@pytest.mark.parametrize("protocol", ["v1", "v2"])
def test_without_httpx_the_start_says_so(
    protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "httpx", None)
    settings = ForwardingSettings(predictor_host="h", predictor_protocol=protocol)
    with pytest.raises(StartupError, match=r"pip install 'kserve-lite\[client\]'"):
        Upstream(settings, "h")
    Upstream(ForwardingSettings(predictor_host="h", predictor_protocol="grpc-v2"), "h")
