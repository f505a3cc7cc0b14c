"""grpcio's synchronous client, with calls made by hand."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from kserve_lite import InferRequest, InferResponse, Model, __version__
from kserve_lite.codecs.proto import message_class
from tests.clients.calls import INFERENCE, Stub, infer_request, message
from tests.clients.models import Waiting, make_count, make_echo, make_mirror, make_sums
from tests.support import ServerThread

PATIENCE = 20
SERVING, SERVICE_UNKNOWN = 1, 3
PAIR = np.array([[1, 2]], np.float32)
MEGABYTE = 1024 * 1024


@pytest.fixture(scope="module")
def server() -> Iterator[ServerThread]:
    with ServerThread(make_echo(), make_sums(), make_count(), make_mirror()) as server:
        yield server


@pytest.fixture(scope="module")
def stub(server: ServerThread) -> Iterator[Stub]:
    with connected(server) as channel:
        yield Stub(channel)


def connected(server: ServerThread, **options: Any) -> Any:
    """A channel with its own connection, where grpcio would share one."""
    return grpc.insecure_channel(
        f"127.0.0.1:{server.port}",
        options=[
            ("grpc.use_local_subchannel_pool", 1),
            *((f"grpc.{name}", value) for name, value in options.items()),
        ],
    )


def failure(call: Any, request: Any, **options: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=PATIENCE, **options)
    error: Any = caught.value  # it is a grpc.Call too
    return error.code(), error.details()


# --- what there is ----------------------------------------------------------------


def test_live_ready_and_metadata(stub: Stub) -> None:
    assert stub.ServerLive(message("ServerLiveRequest")).live
    assert stub.ServerReady(message("ServerReadyRequest")).ready
    assert stub.ModelReady(message("ModelReadyRequest", name="sums")).ready
    versioned = message("ModelReadyRequest", name="sums", version="3")
    assert stub.ModelReady(versioned).ready
    about = stub.ServerMetadata(message("ServerMetadataRequest"))
    assert (about.name, about.version) == ("kserve-lite", __version__)
    model = stub.ModelMetadata(message("ModelMetadataRequest", name="sums"))
    assert (model.name, list(model.versions)) == ("sums", ["3"])
    (pairs,), (sums,) = model.inputs, model.outputs
    assert (pairs.name, pairs.datatype, list(pairs.shape)) == ("pairs", "FP32", [-1, 2])
    assert (sums.name, sums.datatype, list(sums.shape)) == ("sums", "FP32", [-1])


def test_raw_and_typed_tensors(stub: Stub) -> None:
    raw = stub.ModelInfer(infer_request("sums", PAIR, id="7"))
    assert (raw.model_name, raw.model_version, raw.id) == ("sums", "3", "7")
    assert np.frombuffer(raw.raw_output_contents[0], np.float32).tolist() == [3]
    request = message("ModelInferRequest", model_name="sums")
    tensor = request.inputs.add(name="any", datatype="FP32", shape=[2, 2])
    tensor.contents.fp32_contents.extend([1, 2, 3, 4])
    typed = stub.ModelInfer(request)
    assert list(typed.outputs[0].contents.fp32_contents) == [3, 7]
    assert not typed.raw_output_contents


def test_models_are_loaded_and_unloaded(stub: Stub) -> None:
    gone = stub.RepositoryModelUnload(
        message("RepositoryModelUnloadRequest", model_name="count")
    )
    assert (gone.model_name, gone.isUnloaded) == ("count", True)
    ready = message("ModelReadyRequest", name="count")
    assert failure(stub.ModelReady, ready)[0] is grpc.StatusCode.NOT_FOUND
    back = stub.RepositoryModelLoad(
        message("RepositoryModelLoadRequest", model_name="count")
    )
    assert (back.model_name, back.isLoaded) == ("count", True)
    assert stub.ModelReady(ready).ready


def test_index_configuration_and_statistics(stub: Stub) -> None:
    index = stub.RepositoryIndex(message("RepositoryIndexRequest", ready=True))
    states = {model.name: (model.state, model.reason) for model in index.models}
    assert states["sums"] == ("READY", "")
    asked = message("ModelConfigRequest", name="sums")
    config = stub.ModelConfig(asked).config
    (given,), (sums,) = config.input, config.output
    assert (given.name, sums.name, list(sums.dims)) == ("pairs", "sums", [-1])
    before = statistics(stub)
    assert stub.ModelInfer(infer_request("sums", PAIR)).outputs
    assert statistics(stub).success.count == before.success.count + 1
    assert statistics(stub).success.ns > before.success.ns


def statistics(stub: Stub) -> Any:
    asked = message("ModelStatisticsRequest", name="sums", version="3")
    (entry,) = stub.ModelStatistics(asked).model_stats
    assert (entry.name, entry.version) == ("sums", "3")
    return entry.inference_stats


@pytest.mark.parametrize("name", ["x-forwarded-for", "forwarded"])
def test_what_a_proxy_passes_on_may_not_load_or_unload(stub: Stub, name: str) -> None:
    metadata = [(name, "192.0.2.1")]
    unload = message("RepositoryModelUnloadRequest", model_name="count")
    load = message("RepositoryModelLoadRequest", model_name="count")
    for call, request in (
        (stub.RepositoryModelUnload, unload),
        (stub.RepositoryModelLoad, load),
    ):
        code, details = failure(call, request, metadata=metadata)
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert "enable_model_control" in details
    with (
        ServerThread(make_count(), enable_model_control=True) as open_to_all,
        connected(open_to_all) as channel,
    ):
        remote = Stub(channel)
        assert remote.RepositoryModelUnload(unload, metadata=metadata).isUnloaded
        assert remote.RepositoryModelLoad(load, metadata=metadata).isLoaded


def test_a_client_that_goes_away_leaves_its_model_loaded() -> None:
    loads: list[int] = []
    started, go_on = threading.Event(), threading.Event()
    model = Model("late", predict=lambda payload: payload)

    @model.load
    def load() -> None:
        loads.append(1)
        if len(loads) > 1:
            started.set()
            assert go_on.wait(PATIENCE)

    with ServerThread(model) as server, connected(server) as channel:
        stub = Stub(channel)
        unload = message("RepositoryModelUnloadRequest", model_name="late")
        stub.RepositoryModelUnload(unload)
        watch = Stub(channel, "grpc.health.v1.Health").Watch(
            message_class("grpc.health.v1.HealthCheckRequest")(service="late"),
            timeout=PATIENCE,
        )
        assert next(watch).status == SERVICE_UNKNOWN
        request = message("RepositoryModelLoadRequest", model_name="late")
        with connected(server) as other:
            call = Stub(other).RepositoryModelLoad.future(request)
            assert started.wait(PATIENCE)
            call.cancel()
        go_on.set()
        while (status := next(watch).status) != SERVING:
            assert status != SERVICE_UNKNOWN
        watch.cancel()
        assert stub.ModelReady(message("ModelReadyRequest", name="late")).ready


# --- errors -------------------------------------------------------------------------


def test_an_unknown_model(stub: Stub) -> None:
    assert failure(stub.ModelInfer, infer_request("nobody", PAIR)) == (
        grpc.StatusCode.NOT_FOUND,
        "Model with name nobody does not exist.",
    )
    assert failure(stub.ModelInfer, infer_request("sums", PAIR, model_version="4")) == (
        grpc.StatusCode.NOT_FOUND,
        "Model sums has no version 4.",
    )


def test_a_wrong_tensor_is_named_with_what_was_expected_and_what_came(
    stub: Stub,
) -> None:
    triple = np.zeros((1, 3), np.float32)
    code, details = failure(stub.ModelInfer, infer_request("sums", triple))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    for word in ("'in0'", "[-1,2]", "[1,3]"):
        assert word in details.replace(", ", ","), details
    integers = np.zeros((1, 2), np.int64)
    code, details = failure(stub.ModelInfer, infer_request("sums", integers))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    for word in ("'in0'", "FP32", "INT64"):
        assert word in details, details


def test_an_unknown_method_and_an_unknown_service(server: ServerThread) -> None:
    with connected(server) as channel:
        for path in (f"/{INFERENCE}/Nothing", "/nobody.Service/Method"):
            call = channel.unary_unary(path)
            assert failure(call, b"")[0] is grpc.StatusCode.UNIMPLEMENTED


def test_what_is_no_message(server: ServerThread) -> None:
    with connected(server) as channel:
        call = channel.unary_unary(f"/{INFERENCE}/ModelInfer")
        code, _ = failure(call, b"\xff\xff\xff")
        assert code is grpc.StatusCode.INVALID_ARGUMENT


def test_a_failing_model_tells_nothing_but_a_request_id(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def predict(payload: InferRequest) -> InferResponse:
        raise ValueError("the secret")

    with (
        ServerThread(Model("fails", predict=predict)) as server,
        connected(server) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        Stub(channel).ModelInfer(
            infer_request("fails", PAIR), metadata=[("x-request-id", "abc")]
        )
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in error.details()
    assert ("x-request-id", "abc") in error.trailing_metadata()
    assert "request id abc" in caplog.text


# --- a call's life --------------------------------------------------------------------


def test_a_deadline_passes_while_another_call_goes_on() -> None:
    waiting = Waiting()
    go_on = threading.Event()

    def predict(payload: InferRequest) -> InferResponse:
        assert go_on.wait(PATIENCE)
        return InferResponse(payload.inputs)

    slow = Model("slow", predict=predict)
    with (
        ServerThread(waiting.model, slow) as server,
        connected(server) as channel,
    ):
        stub = Stub(channel)
        other = stub.ModelInfer.future(infer_request("slow", PAIR), timeout=PATIENCE)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(infer_request("waiting", PAIR), timeout=0.2)
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert waiting.cancelled.wait(PATIENCE)
        assert not other.done()
        go_on.set()
        assert other.result(PATIENCE).model_name == "slow"


@pytest.mark.parametrize("way", ["cancel", "close"])
def test_a_call_that_is_given_up_cancels_its_handler(way: str) -> None:
    waiting = Waiting()
    with (
        ServerThread(waiting.model, make_echo()) as server,
        connected(server) as sibling,
    ):
        channel = connected(server)
        call = Stub(channel).ModelInfer.future(infer_request("waiting", PAIR))
        assert waiting.started.wait(PATIENCE)
        if way == "cancel":
            call.cancel()
        channel.close()
        assert waiting.cancelled.wait(PATIENCE)
        assert call.code() is grpc.StatusCode.CANCELLED
        # Nobody else is harmed.
        assert Stub(sibling).ModelInfer(infer_request("echo", PAIR)).outputs


def test_a_call_in_flight_is_finished_by_a_stop() -> None:
    started, go_on = threading.Event(), threading.Event()

    def predict(payload: InferRequest) -> InferResponse:
        started.set()
        assert go_on.wait(PATIENCE)
        return InferResponse(payload.inputs)

    with contextlib.ExitStack() as after:
        with ServerThread(Model("slow", predict=predict)) as server:
            channel = after.enter_context(connected(server))
            call = Stub(channel).ModelInfer.future(infer_request("slow", PAIR))
            assert started.wait(PATIENCE)

            async def finish() -> None:
                await server.server.wait_stopped()
                go_on.set()

            asyncio.run_coroutine_threadsafe(finish(), server._loop)
        # It has ended, although the client keeps its connection.
        assert call.result(PATIENCE).model_name == "slow"
    assert "drained 1, aborted 0" in server.server.report


def test_metadata_goes_in_and_response_headers_come_out(stub: Stub) -> None:
    _, call = stub.ModelInfer.with_call(
        infer_request("mirror", PAIR),
        metadata=[("x-sent", "one, two"), ("x-sent-bin", b"\x00\xff")],
    )
    metadata = dict(call.initial_metadata())
    assert metadata["x-sent"] == "one, two"
    assert metadata["x-sent-bin"] == b"\x00\xff"
    assert call.code() is grpc.StatusCode.OK


# --- streams --------------------------------------------------------------------------


def counted(limit: int) -> Any:
    return infer_request("count", np.array([limit]))


def number(answer: Any) -> int:
    assert answer.error_message == ""
    (data,) = answer.infer_response.raw_output_contents
    return int.from_bytes(data, "little")


def test_a_stream_of_requests_and_answers(stub: Stub) -> None:
    requests = [counted(3), counted(0), counted(2), infer_request("echo", PAIR)]
    answers = list(stub.ModelStreamInfer(iter(requests), timeout=PATIENCE))
    assert [number(answer) for answer in answers[:-1]] == [0, 1, 2, 0, 1]
    assert answers[-1].infer_response.raw_output_contents == [PAIR.tobytes()]


def test_a_stream_goes_on_after_a_fault(stub: Stub) -> None:
    requests = [infer_request("nobody", PAIR), counted(1)]
    refused, first = stub.ModelStreamInfer(iter(requests), timeout=PATIENCE)
    assert refused.error_message == "Model with name nobody does not exist."
    assert not refused.HasField("infer_response")
    assert number(first) == 0


def test_a_stream_is_answered_as_it_goes(stub: Stub) -> None:
    turns: list[threading.Event] = [threading.Event() for _ in range(3)]

    def requests() -> Iterator[Any]:
        for turn in turns:
            assert turn.wait(PATIENCE)
            yield counted(1)

    answers = stub.ModelStreamInfer(requests(), timeout=PATIENCE)
    for turn in turns:
        turn.set()
        assert number(next(answers)) == 0
    assert next(answers, None) is None


def test_a_stream_tells_the_last_answer_of_a_request(stub: Stub) -> None:
    requests = [counted(2), infer_request("echo", PAIR), counted(1)]
    for number, request in enumerate(requests[:2]):
        request.id = str(number)
        request.parameters["triton_enable_empty_final_response"].bool_param = True
    answers = stub.ModelStreamInfer(iter(requests), timeout=PATIENCE)
    replies = [answer.infer_response for answer in answers]
    assert [reply.id for reply in replies[:4]] == ["0", "0", "0", "1"]
    assert [len(reply.outputs) for reply in replies] == [1, 1, 0, 1, 1]
    finals = [reply.parameters.get("triton_final_response") for reply in replies]
    assert [final and final.bool_param for final in finals] == [
        False,
        False,
        True,
        True,
        None,
    ]


def test_a_stream_that_is_given_up(stub: Stub) -> None:
    answers = stub.ModelStreamInfer(iter([counted(10**9)]), timeout=PATIENCE)
    assert [number(next(answers)) for _ in range(3)] == [0, 1, 2]
    answers.cancel()
    with pytest.raises(grpc.RpcError) as caught:
        for _ in answers:
            pass
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.CANCELLED
    assert [number(one) for one in stub.ModelStreamInfer(iter([counted(1)]))] == [0]


@pytest.mark.parametrize("kind", ["plain", "async"])
@pytest.mark.parametrize("way", ["cancel", "close"])
def test_a_client_that_goes_away_stops_its_generator(kind: str, way: str) -> None:
    closed = threading.Event()

    def plain(limit: np.ndarray) -> Iterator[np.ndarray]:
        try:
            for number in range(int(limit[0])):
                yield np.array([number])
        finally:
            closed.set()

    async def awaited(limit: np.ndarray) -> AsyncIterator[np.ndarray]:
        try:
            for number in range(int(limit[0])):
                yield np.array([number])
        finally:
            closed.set()

    model = Model("count", predict=plain if kind == "plain" else awaited)
    with ServerThread(model) as server:
        channel = connected(server)
        answers = Stub(channel).ModelStreamInfer(iter([counted(10**9)]))
        assert [number(next(answers)) for _ in range(3)] == [0, 1, 2]
        assert not closed.is_set()
        if way == "cancel":
            answers.cancel()
        channel.close()
        assert closed.wait(PATIENCE)


def test_a_stream_as_one_answer_is_unsupported(stub: Stub) -> None:
    code, details = failure(stub.ModelInfer, counted(3))
    assert code is grpc.StatusCode.UNIMPLEMENTED
    assert "ModelStreamInfer" in details


# --- sizes and numbers ----------------------------------------------------------------


def test_a_message_above_the_limit() -> None:
    with (
        ServerThread(make_echo(), max_body_size=MEGABYTE) as server,
        connected(server) as channel,
    ):
        stub = Stub(channel)
        large = infer_request("echo", np.zeros(MEGABYTE // 4, np.float32))
        code, details = failure(stub.ModelInfer, large)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert str(MEGABYTE) in details
        # A bomb is stopped at the limit, and the connection goes on.
        code, details = failure(
            stub.ModelInfer, large, compression=grpc.Compression.Gzip
        )
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert stub.ModelInfer(infer_request("echo", PAIR)).outputs


@pytest.mark.parametrize("size", [0, 1, 100_000])
def test_compressed_messages(stub: Stub, size: int) -> None:
    values = np.arange(size, dtype=np.float32)
    answer = stub.ModelInfer(
        infer_request("echo", values), compression=grpc.Compression.Gzip
    )
    assert answer.raw_output_contents == [values.tobytes()]


def test_another_compression_is_refused_with_what_is_taken(stub: Stub) -> None:
    code, details = failure(
        stub.ModelInfer,
        infer_request("echo", np.zeros(1000, np.float32)),
        compression=grpc.Compression.Deflate,
    )
    assert code is grpc.StatusCode.UNIMPLEMENTED
    assert "gzip" in details


def test_large_tensors_both_ways(server: ServerThread) -> None:
    values = np.arange(5 * MEGABYTE, dtype=np.float32)
    with connected(server, max_receive_message_length=64 * MEGABYTE) as channel:
        stub = Stub(channel)
        for _ in range(2):
            answer = stub.ModelInfer(infer_request("echo", values), timeout=PATIENCE)
            assert answer.raw_output_contents[0] == values.tobytes()
    # A client that takes less says so itself, and goes on.
    with connected(server) as channel:
        stub = Stub(channel)
        code, _ = failure(stub.ModelInfer, infer_request("echo", values))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert stub.ModelInfer(infer_request("echo", PAIR)).outputs


def test_many_calls_at_a_time_on_one_channel(server: ServerThread) -> None:
    with connected(server) as channel:
        stub = Stub(channel)
        calls = [
            stub.ModelInfer.future(
                infer_request("echo", np.array([n]), id=str(n)), timeout=PATIENCE
            )
            for n in range(200)
        ]
        for n, call in enumerate(calls):
            answer = call.result(PATIENCE)
            assert answer.id == str(n)
            assert int.from_bytes(answer.raw_output_contents[0], "little") == n


def test_more_calls_than_streams_wait_their_turn() -> None:
    with (
        ServerThread(make_echo(), max_streams=8) as server,
        connected(server) as channel,
        concurrent.futures.ThreadPoolExecutor(40) as threads,
    ):
        stub = Stub(channel)

        def ask(n: int) -> str:
            request = infer_request("echo", PAIR, id=str(n))
            answer: str = stub.ModelInfer(request, timeout=PATIENCE).id
            return answer

        assert list(threads.map(ask, range(200))) == [str(n) for n in range(200)]
