"""The inference service: what the models are, predictions, streams."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Any

import anyio
import numpy as np
import pytest

from kserve_lite import (
    Context,
    InferenceError,
    InferRequest,
    InferResponse,
    InvalidInput,
    Model,
    ModelNotFound,
    ModelNotReady,
    Overloaded,
    ServerNotReady,
    Tensor,
    TensorSpec,
    Unsupported,
    __version__,
)
from kserve_lite.rpc.inference import own_metadata
from tests.rpc.stream import (
    INFERENCE,
    Answer,
    App,
    MemoryStream,
    answer_in,
    asking,
    doubling,
    framed,
    proto,
    request_for,
)

pytestmark = pytest.mark.anyio


def raising(error: BaseException) -> Model:
    model = Model("m")

    @model.predict
    async def predict(request: InferRequest) -> object:
        raise error

    return model


# --- the server and its models ------------------------------------------------------


async def test_the_server() -> None:
    async with App(doubling()) as app:
        live = await app.call("ServerLive", proto("ServerLiveRequest"))
        assert live.read("ServerLiveResponse").live
        ready = await app.call("ServerReady", proto("ServerReadyRequest"))
        assert ready.read("ServerReadyResponse").ready
        about = await app.call("ServerMetadata", proto("ServerMetadataRequest"))
        got = about.read("ServerMetadataResponse")
        assert (got.name, got.version) == ("kserve-lite", __version__)
        app.dataplane.accepting = False
        ready = await app.call("ServerReady", proto("ServerReadyRequest"))
        assert not ready.read("ServerReadyResponse").ready


async def test_no_model_is_not_ready() -> None:
    async with App() as app:
        ready = await app.call("ServerReady", proto("ServerReadyRequest"))
        assert not ready.read("ServerReadyResponse").ready


async def test_model_ready() -> None:
    unready = Model("unready")

    @unready.predict
    def predict(x: np.ndarray) -> np.ndarray:
        return x

    @unready.ready
    def ready() -> bool:
        return False

    async with App(doubling(version="1"), unready) as app:

        async def asked(name: str, version: str = "") -> Answer:
            request = proto("ModelReadyRequest", name=name, version=version)
            return await app.call("ModelReady", request)

        assert (await asked("m")).read("ModelReadyResponse").ready
        assert (await asked("m", "1")).read("ModelReadyResponse").ready
        assert not (await asked("unready")).read("ModelReadyResponse").ready
        assert (await asked("m", "2")).text == "Model m has no version 2."
        assert (await asked("zz")).code == 5
        answer = await app.call("ModelInfer", asking(model_name="unready"))
        assert answer.code == 14
        assert answer.text == "Model with name unready is not ready."


async def test_model_metadata() -> None:
    model = Model("m", version="2")

    @model.predict
    def predict(
        a: Annotated[np.ndarray, TensorSpec("FP32", [-1, 4], "in")],
    ) -> Annotated[np.ndarray, TensorSpec("INT64", [-1])]:
        raise NotImplementedError

    async with App(model, doubling()) as app:
        request = proto("ModelMetadataRequest", name="m")
        got = (await app.call("ModelMetadata", request)).read("ModelMetadataResponse")
        assert (got.name, list(got.versions)) == ("m", ["2"])
        (spec,) = got.inputs
        assert (spec.name, spec.datatype, list(spec.shape)) == ("in", "FP32", [-1, 4])
        assert got.outputs[0].name == "output-0"
        unknown = proto("ModelMetadataRequest", name="zz")
        assert (await app.call("ModelMetadata", unknown)).code == 5


# --- predictions --------------------------------------------------------------------


async def test_a_prediction() -> None:
    async with App(doubling(version="3")) as app:
        reply = (await app.call("ModelInfer", asking())).read("ModelInferResponse")
        assert (reply.model_name, reply.model_version, reply.id) == ("m", "3", "1")
        (output,) = reply.outputs
        assert (output.name, output.datatype) == ("output-0", "FP32")
        assert list(output.contents.fp32_contents) == [2, 4]
        wrong = asking(model_version="4")
        assert (await app.call("ModelInfer", wrong)).code == 5


async def test_an_id_is_made_where_the_client_gave_none() -> None:
    async with App(doubling()) as app:
        request = asking()
        request.id = ""
        reply = (await app.call("ModelInfer", request)).read("ModelInferResponse")
        assert len(reply.id) == 32


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (InvalidInput("bad é%\n"), 3, "bad é%\n"),
        (ModelNotFound("zz"), 5, "Model with name zz does not exist."),
        (ModelNotReady("zz"), 14, "Model with name zz is not ready."),
        (ServerNotReady(), 14, "Server is not ready."),
        (Overloaded("full"), 14, "full"),
        (Unsupported("no"), 12, "no"),
        (NotImplementedError(), 12, "Not implemented."),
        (InferenceError("why", "STAT"), 13, "[STAT] why"),
    ],
)
async def test_faults(error: BaseException, code: int, text: str) -> None:
    async with App(raising(error)) as app:
        answer = await app.call("ModelInfer", asking())
        assert (answer.code, answer.text) == (code, text)
        assert answer.messages == []
        stream = await app.call("ModelStreamInfer", asking())
        assert (stream.code, len(stream.messages)) == (0, 1)
        assert text.encode() in stream.messages[0]


@pytest.mark.parametrize(
    "error",
    [ValueError("s3cr3t"), TimeoutError(), SystemExit(1), asyncio.CancelledError()],
)
async def test_a_failing_model(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    async with App(raising(error)) as app:
        metadata = {"x-request-id": "r-17"}
        answer = await app.call("ModelInfer", asking(), metadata=metadata)
        assert (answer.code, answer.text) == (13, "Internal server error")
        assert answer.trailers["x-request-id"] == "r-17"
        assert [r.name for r in caplog.records if r.levelno >= logging.WARNING] == [
            "kserve_lite"
        ]
        assert "r-17" in caplog.text


async def test_expose_errors() -> None:
    async with App(raising(ValueError("why")), expose_errors=True) as app:
        answer = await app.call("ModelInfer", asking())
        assert answer.text.startswith("ValueError: why.")


@pytest.mark.parametrize(
    "result",
    [b"bytes", "text", [1], None, {"a": 1}, np.array([1], np.complex64)],
)
async def test_what_a_handler_may_not_return(
    result: object, caplog: pytest.LogCaptureFixture
) -> None:
    model = Model("m")

    @model.predict
    async def predict(request: InferRequest) -> object:
        return result

    async with App(model) as app:
        assert (await app.call("ModelInfer", asking())).code == 13
        answer = await app.call("ModelStreamInfer", asking())
        assert (answer.code, len(answer.messages)) == (0, 1)


async def test_proto_shaped_dicts() -> None:
    model = Model("m")

    @model.predict
    def predict(request: InferRequest) -> object:
        common = {"shape": [2]}
        return {
            "outputs": [
                {"name": "a", "datatype": "FP32", "contents": {"fp32_contents": [1, 2]}}
                | common,
                {
                    "name": "b",
                    "datatype": "BYTES",
                    "contents": {"bytes_contents": [b"\xff", "é"], "int_contents": []},
                }
                | common,
                {"name": "c", "datatype": "UINT8", "data": [3, 4]} | common,
            ]
        }

    async with App(model) as app:
        reply = (await app.call("ModelInfer", asking())).read("ModelInferResponse")
        a, b, c = reply.outputs
        assert list(a.contents.fp32_contents) == [1, 2]
        assert list(b.contents.bytes_contents) == [b"\xff", "é".encode()]
        assert list(c.contents.uint_contents) == [3, 4]


async def test_requested_outputs() -> None:
    model = Model("m")

    @model.predict
    def predict(request: InferRequest) -> object:
        return {name: np.array([1]) for name in "abc"}

    async with App(model) as app:
        request = asking(outputs=[{"name": "c"}, {"name": "a"}])
        reply = (await app.call("ModelInfer", request)).read("ModelInferResponse")
        assert [output.name for output in reply.outputs] == ["c", "a"]
        answer = await app.call("ModelInfer", asking(outputs=[{"name": "d"}]))
        assert answer.code == 3
        assert answer.text == "Unexpected inference output 'd' for model 'm'"


async def test_response_headers_are_initial_metadata() -> None:
    model = Model("m")

    @model.predict
    def predict(request: InferRequest, response_headers: dict[str, Any]) -> object:
        response_headers |= {
            "X-Mine": "v 1",
            "x-number": 5,
            "x-bin": b"\0\xff",
            "empty": "",
            "content-type": "application/x-mine",
            "content-length": "1",
            "grpc-status": "7",
            "x-request-id": "mine",
            "te": "x",
        }
        return InferResponse(request.inputs)

    async with App(model) as app:
        for method in ("ModelInfer", "ModelStreamInfer"):
            answer = await app.call(method, asking())
            assert len(answer.head.pop("x-request-id")) == 32
            assert len(answer.head.pop("traceparent")) == 55
            assert answer.head == {
                "content-type": "application/grpc",
                "grpc-accept-encoding": "identity,gzip",
                "x-mine": "v 1",
                "x-number": "5",
                "x-bin": "AP8",
            }
            assert answer.code == 0


@pytest.mark.parametrize("name", ["a b", "a:b", "é", ":path", ""])
def test_names_that_metadata_cannot_have(name: str) -> None:
    with pytest.raises(ValueError, match="forbidden"):
        own_metadata({name: "x"})


@pytest.mark.parametrize("value", ["é", "a\nb", "a\0b"])
async def test_values_that_metadata_cannot_have(
    value: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = Model("m")

    @model.predict
    def predict(request: InferRequest, response_headers: dict[str, Any]) -> object:
        response_headers["a"] = value
        return InferResponse(request.inputs)

    async with App(model) as app:
        assert (await app.call("ModelInfer", asking())).code == 13
        assert "forbidden character" in caplog.text


# --- streams ------------------------------------------------------------------------


def counting(kind: str, closed: list[bool]) -> Model:
    """A model that answers x with x items."""
    model = Model("m")

    def item(number: int) -> object:
        return InferResponse((Tensor("n", np.array([number]), "INT64"),))

    def plain(request: InferRequest) -> Iterator[object]:
        try:
            for number in range(int(request["x"][0])):
                yield item(number)
        finally:
            closed.append(True)

    async def plain_async(request: InferRequest) -> AsyncIterator[object]:
        try:
            for number in range(int(request["x"][0])):
                yield item(number)
        finally:
            closed.append(True)

    async def returned(request: InferRequest) -> object:
        return plain_async(request)

    handlers: dict[str, Callable[..., Any]] = {
        "sync": plain,
        "async": plain_async,
        "returned": returned,
    }
    model.predict(handlers[kind])
    return model


def items_of(answer: Answer) -> list[Any]:
    kind = type(proto("ModelStreamInferResponse"))
    read = [kind.FromString(message) for message in answer.messages]
    return [
        item.error_message
        or (
            item.infer_response.id,
            list(item.infer_response.outputs[0].contents.int64_contents),
        )
        for item in read
    ]


@pytest.mark.parametrize("kind", ["sync", "async", "returned"])
async def test_several_answers_to_a_request(kind: str) -> None:
    closed: list[bool] = []
    async with App(counting(kind, closed)) as app:
        first, second = asking((2,)), asking((1,))
        second.id = "2"
        answer = await app.call("ModelStreamInfer", first, asking((0,)), second)
        assert answer.code == 0
        assert items_of(answer) == [("1", [0]), ("1", [1]), ("2", [0])]
        assert len(closed) == 3


@pytest.mark.parametrize("kind", ["sync", "async", "returned"])
async def test_a_stream_needs_the_streaming_method(kind: str) -> None:
    closed: list[bool] = []
    async with App(counting(kind, closed)) as app:
        answer = await app.call("ModelInfer", asking((2,)))
        assert answer.code == 12
        assert "ModelStreamInfer" in answer.text


async def test_a_fault_ends_its_own_request_only() -> None:
    async with App(doubling()) as app:
        unknown = asking(model_name="zz")
        wrong = asking()
        wrong.inputs[0].shape[0] = 3
        answer = await app.call("ModelStreamInfer", unknown, wrong, asking())
        assert answer.code == 0
        kind = type(proto("ModelStreamInferResponse"))
        first, second, third = map(kind.FromString, answer.messages)
        assert first.error_message == "Model with name zz does not exist."
        assert first.infer_response == proto("ModelInferResponse", id="1")
        assert "must have 3 elements" in second.error_message
        assert list(third.infer_response.outputs[0].contents.fp32_contents) == [2, 4]


async def test_an_error_after_some_items(caplog: pytest.LogCaptureFixture) -> None:
    model = Model("m")

    @model.predict
    async def predict(request: InferRequest) -> AsyncIterator[object]:
        yield np.array([1])
        raise ValueError("s3cr3t")

    async with App(model) as app:
        answer = await app.call("ModelStreamInfer", asking(), asking())
        assert answer.code == 0
        ok, failed, again, failed_again = items_of(answer)
        assert ok == again == ("1", [1])
        assert failed.startswith("The model failed to answer. The server's log has")
        assert failed_again == failed  # the id is the call's
        assert "s3cr3t" in caplog.text


async def test_an_item_that_is_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    model = Model("m")

    @model.predict
    def predict(request: InferRequest) -> Iterator[object]:
        yield [1]
        raise AssertionError("asked for more")

    async with App(model) as app:
        (failed,) = items_of(await app.call("ModelStreamInfer", asking()))
        assert failed.startswith("The model failed")


async def test_a_malformed_message_ends_the_stream() -> None:
    async with App(doubling()) as app:
        body = framed(asking()) + b"\0\0\0\0\1\xff" + framed(asking())
        answer = await app.call("ModelStreamInfer", body=body)
        assert (answer.code, len(answer.messages)) == (3, 1)


async def test_a_stream_without_requests() -> None:
    async with App(doubling()) as app:
        answer = await app.call("ModelStreamInfer")
        assert (answer.code, answer.messages) == (0, [])


async def test_items_go_when_they_are_made_and_requests_wait() -> None:
    model = Model("m")
    go_on = anyio.Event()

    @model.predict
    async def predict(request: InferRequest) -> AsyncIterator[object]:
        yield np.array([1])
        await go_on.wait()
        yield np.array([2])

    async with App(model) as app:
        stream = MemoryStream(framed(asking(), asking()))
        request = request_for(f"/{INFERENCE}/ModelStreamInfer")
        with anyio.fail_after(5):
            async with asyncio.TaskGroup() as group:
                group.create_task(app.answer(request, stream))
                await stream.until_sent(1)
                (prefix, body) = stream.reads  # the second request is not read yet
                assert prefix == (5, True)
                assert not body[1]
                assert len(stream.sent) == 1
                go_on.set()
        assert stream.drains == 4
        assert [item[1] for item in items_of(answer_in(stream.sent))] == [
            [1],
            [2],
            [1],
            [2],
        ]


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_a_client_that_goes_stops_the_generator(kind: str) -> None:
    closed: list[bool] = []
    async with App(counting(kind, closed)) as app:
        stream = MemoryStream()
        stream.feed(framed(asking((1e9,))))
        request = request_for(f"/{INFERENCE}/ModelStreamInfer")
        task = asyncio.create_task(app.answer(request, stream))
        await stream.until_sent(3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        count = len(stream.sent)
        with anyio.fail_after(5):
            while not closed:  # noqa: ASYNC110 - a thread closes the plain one
                await anyio.sleep(0.001)
        assert len(stream.sent) == count


async def test_a_stop_ends_streams_that_wait_for_their_clients() -> None:
    async with App(doubling()) as app:
        stream = MemoryStream()
        stream.feed(framed(asking()))
        request = request_for(f"/{INFERENCE}/ModelStreamInfer")
        with anyio.fail_after(5):
            async with asyncio.TaskGroup() as group:
                group.create_task(app.answer(request, stream))
                await stream.until_sent(1)
                await asyncio.sleep(0)
                app.dataplane.accepting = False
        answer = answer_in(stream.sent)
        assert (answer.code, len(answer.messages)) == (14, 1)
        late = await app.call("ModelStreamInfer", asking())
        assert late.code == 14


async def test_a_stop_lets_a_stream_answer_what_it_has_begun() -> None:
    model = Model("m")
    started, go_on = anyio.Event(), anyio.Event()

    @model.predict
    async def predict(request: InferRequest) -> np.ndarray:
        started.set()
        await go_on.wait()
        return np.array([1])

    async with App(model) as app:
        stream = MemoryStream()
        stream.feed(framed(asking()))
        request = request_for(f"/{INFERENCE}/ModelStreamInfer")
        with anyio.fail_after(5):
            async with asyncio.TaskGroup() as group:
                group.create_task(app.answer(request, stream))
                await started.wait()
                app.dataplane.accepting = False
                go_on.set()
        answer = answer_in(stream.sent)
        assert (answer.code, len(answer.messages)) == (14, 1)


async def test_the_context_knows_when_the_client_has_gone() -> None:
    model = Model("m")
    seen: list[bool] = []
    stream = MemoryStream(framed(asking()))

    @model.predict
    async def predict(request: InferRequest, context: Context) -> object:
        seen.append(context.disconnected)
        stream.gone = True
        seen.append(context.disconnected)
        return InferResponse(request.inputs)

    async with App(model) as app:
        await app.answer(request_for(f"/{INFERENCE}/ModelInfer"), stream)
        assert seen == [False, True]
