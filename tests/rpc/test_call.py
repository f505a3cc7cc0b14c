"""The life of one call: its head, its messages, its status, byte by byte."""

from __future__ import annotations

import asyncio
import gzip
import logging
from collections.abc import Iterator
from typing import Any

import anyio
import numpy as np
import pytest

from kserve_lite import Context, InferRequest, InferResponse, Model
from kserve_lite.rpc import call as call_module
from kserve_lite.wire.events import Data, Response
from tests.rpc.stream import (
    INFERENCE,
    LIMIT,
    App,
    MemoryStream,
    answer_in,
    binary,
    framed,
    proto,
    request_for,
)

pytestmark = pytest.mark.anyio

LIVE = proto("ServerLiveRequest")


@pytest.fixture(autouse=True)
def nothing_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing that a peer does is an error of ours."""
    yield
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


def seeing() -> tuple[Model, list[Any]]:
    """A model that keeps what it was given."""
    model = Model("m")
    seen: list[Any] = []

    @model.predict
    async def predict(request: InferRequest, headers: Any, context: Context) -> Any:
        seen.append((request, headers, context))
        return InferResponse(request.inputs)

    return model, seen


def asking(model_name: str = "m", size: int = 2) -> Any:
    request = proto("ModelInferRequest", model_name=model_name, id="1")
    tensor = request.inputs.add(name="x", datatype="FP32", shape=[size])
    tensor.contents.fp32_contents.extend([1.5] * size)
    return request


async def test_a_unary_answer_leaves_in_one_piece() -> None:
    model, _ = seeing()
    async with App(model) as app:
        for message, method in ((LIVE, "ServerLive"), (asking(), "ModelInfer")):
            stream = MemoryStream(framed(message))
            await app.answer(request_for(f"/{INFERENCE}/{method}"), stream)
            ((whole,),) = stream.sent
            assert isinstance(whole, Response)
            assert whole.body
            # The same objects each time: the wire remembers how they are encoded.
            assert whole.headers is call_module.HEAD
            assert whole.trailers is call_module.OK
            assert stream.drains == 0


async def test_a_large_message_is_not_copied() -> None:
    model = Model("m")
    array = np.zeros(50_000, np.float32)

    @model.predict
    async def predict(x: np.ndarray) -> np.ndarray:
        return array

    async with App(model) as app:
        stream = MemoryStream(framed(asking()))
        stream.stalled = True
        await app.answer(request_for(f"/{INFERENCE}/ModelInfer"), stream)
        assert stream.drains == 1
        (events,) = stream.sent
        views = [np.frombuffer(e.data, np.uint8) for e in events if isinstance(e, Data)]
        assert any(np.shares_memory(view, array) for view in views)
        assert answer_in(stream.sent).read("ModelInferResponse").id == "1"


async def test_a_message_may_come_in_any_pieces() -> None:
    model, seen = seeing()
    async with App(model) as app:
        stream = MemoryStream()
        request = request_for(f"/{INFERENCE}/ModelInfer")
        async with asyncio.TaskGroup() as group:
            group.create_task(app.answer(request, stream))
            for byte in framed(asking(size=3)):
                stream.feed(bytes([byte]))
                await asyncio.sleep(0)
            stream.end()
        assert answer_in(stream.sent).code == 0
        assert seen[0][0]["x"].tolist() == [1.5] * 3


async def test_the_answer_does_not_wait_for_the_end_of_the_request() -> None:
    async with App() as app:
        stream = MemoryStream()
        stream.feed(framed(LIVE))
        with anyio.fail_after(5):
            await app.answer(request_for(f"/{INFERENCE}/ServerLive"), stream)
        assert answer_in(stream.sent).code == 0


# --- heads --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "http", "code"),
    [
        ({"content-type": "application/grpc+proto"}, 200, 0),
        ({"content-type": "application/grpc+json"}, 415, 2),
        ({"content-type": "application/grpc-web"}, 415, 2),
        ({"te": ""}, 400, 2),
    ],
)
async def test_heads(metadata: dict[str, str], http: int, code: int) -> None:
    async with App() as app:
        answer = await app.call("ServerLive", LIVE, metadata=metadata)
        assert (answer.http, answer.code) == (http, code)


async def test_only_post() -> None:
    async with App() as app:
        stream = MemoryStream(b"")
        request = request_for(f"/{INFERENCE}/ServerLive")._replace(method="GET")
        await app.answer(request, stream)
        assert answer_in(stream.sent).http == 405


@pytest.mark.parametrize("service", [INFERENCE, "other.Service"])
async def test_an_unknown_method(service: str) -> None:
    async with App() as app:
        answer = await app.call("Nothing", LIVE, service=service)
        assert (answer.http, answer.code) == (200, 12)
        assert answer.head["content-type"] == "application/grpc"


# --- messages -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        (b"", 3, "without a message"),
        (b"\0\0\0", 3, "inside the prefix"),
        (b"\0\0\0\0\x05abc", 3, "3 of 5 bytes"),
        (b"\2\0\0\0\0", 3, "unknown flag"),
        (b"\1\0\0\0\0", 3, "no grpc-encoding"),
        (b"\0\0\0\0\1\xff", 3, "no valid inference.ServerLiveRequest"),
        (b"\0\xff\xff\xff\xff", 8, f"may have {LIMIT} bytes (max_body_size)"),
        (b"\0\xff\xff\xff\xff", 8, "4294967295 came"),
    ],
)
async def test_broken_messages(body: bytes, code: int, words: str) -> None:
    async with App() as app:
        answer = await app.call("ServerLive", body=body)
        assert answer.code == code
        assert words in answer.text


async def test_a_message_that_is_too_long_is_refused_before_it_comes() -> None:
    async with App() as app:
        stream = MemoryStream()
        stream.feed(b"\0" + (LIMIT + 1).to_bytes(4, "big"))
        with anyio.fail_after(5):
            await app.answer(request_for(f"/{INFERENCE}/ServerLive"), stream)
        assert answer_in(stream.sent).code == 8


def compressed(message: bytes) -> bytes:
    data = gzip.compress(message)
    return b"\1" + len(data).to_bytes(4, "big") + data


GZIP = {"grpc-encoding": "gzip"}


@pytest.mark.parametrize("size", [2, 200_000])
async def test_gzip(size: int) -> None:
    model, seen = seeing()
    async with App(model) as app:
        message = asking(size=size).SerializeToString()
        answer = await app.call("ModelInfer", body=compressed(message), metadata=GZIP)
        assert answer.code == 0, answer.text
        assert seen[0][0]["x"].tolist() == [1.5] * size


async def test_noise_in_gzip() -> None:
    """Numbers that do not shrink: more than one step in and out."""
    model, seen = seeing()
    numbers = np.random.default_rng(1).random(240_000, np.float32)
    request = proto("ModelInferRequest", model_name="m", id="1")
    request.inputs.add(name="x", datatype="FP32", shape=[240_000])
    request.raw_input_contents.append(numbers.tobytes())
    async with App(model) as app:
        body = compressed(request.SerializeToString())
        answer = await app.call("ModelInfer", body=body, metadata=GZIP)
        assert answer.code == 0, answer.text
        assert (seen[0][0]["x"] == numbers).all()


async def test_what_is_not_compressed_may_say_gzip() -> None:
    async with App() as app:
        assert (await app.call("ServerLive", LIVE, metadata=GZIP)).code == 0


@pytest.mark.parametrize(
    ("data", "code", "words"),
    [
        (gzip.compress(bytes(LIMIT + 1)), 8, "max_body_size"),
        (gzip.compress(bytes(50 * LIMIT)), 8, "max_body_size"),
        (gzip.compress(b"abc")[:-1], 3, "no valid gzip"),
        (gzip.compress(b"abc") + b"x", 3, "no valid gzip"),
        (b"abc", 3, "no valid gzip"),
        (b"", 3, "no valid gzip"),
    ],
)
async def test_bad_gzip(data: bytes, code: int, words: str) -> None:
    async with App() as app:
        body = b"\1" + len(data).to_bytes(4, "big") + data
        answer = await app.call("ServerLive", body=body, metadata=GZIP)
        assert answer.code == code
        assert words in answer.text


async def test_other_compressions() -> None:
    async with App() as app:
        metadata = {"grpc-encoding": "snappy"}
        body = b"\1\0\0\0\1x"
        answer = await app.call("ServerLive", body=body, metadata=metadata)
        assert answer.code == 12
        assert answer.head["grpc-accept-encoding"] == "identity,gzip"


# --- metadata, deadlines, cancellation ----------------------------------------------


async def test_metadata_are_the_headers() -> None:
    model, seen = seeing()
    metadata = {"x-request-id": "r1", "a": "b", "b-bin": binary(b"\xff\0\1")}
    async with App(model) as app:
        assert (await app.call("ModelInfer", asking(), metadata=metadata)).code == 0
        _, headers, context = seen[0]
        assert headers["a"] == "b"
        assert headers["b-bin"] == b"\xff\0\1"
        assert headers["user-agent"] == "test/1"
        assert context.request_id == "r1"
        assert context.protocol == "grpc"
        assert not context.disconnected
        with pytest.raises(TypeError):
            headers["a"] = "c"


@pytest.mark.parametrize(
    ("value", "got"),
    [("AAE", b"\0\1"), ("AAE=", b"\0\1"), ("", b""), ("AA,AQ", b"\1")],
)
async def test_binary_metadata(value: str, got: bytes) -> None:
    model, seen = seeing()
    async with App(model) as app:
        await app.call("ModelInfer", asking(), metadata={"b-bin": value})
        assert seen[0][1]["b-bin"] == got


@pytest.mark.parametrize("value", ["A", "A!==", "é"])
async def test_binary_metadata_that_is_none(value: str) -> None:
    model, seen = seeing()
    async with App(model) as app:
        answer = await app.call("ModelInfer", asking(), metadata={"b-bin": value})
        assert answer.code == 3
        assert not seen


async def test_the_deadline_reaches_the_handler() -> None:
    model, seen = seeing()
    async with App(model) as app:
        for text, seconds in (("2H", 7200), ("5S", 5), ("90000000u", 90)):
            await app.call("ModelInfer", asking(), metadata={"grpc-timeout": text})
            assert seen.pop()[2].remaining() == pytest.approx(seconds, abs=2)
        # As over REST; grpc-timeout, the protocol's own, counts before it.
        as_rest = {"x-request-timeout-ms": "90000"}
        await app.call("ModelInfer", asking(), metadata=as_rest)
        assert seen.pop()[2].remaining() == pytest.approx(90, abs=2)
        await app.call(
            "ModelInfer", asking(), metadata={"grpc-timeout": "5S"} | as_rest
        )
        assert seen.pop()[2].remaining() == pytest.approx(5, abs=2)


@pytest.mark.parametrize(
    "text", ["", "5", "S", "-1S", "123456789S", "1.5S", "1s", "²S"]
)
async def test_malformed_timeouts(text: str) -> None:
    model, seen = seeing()
    async with App(model) as app:
        for method in ("ModelInfer", "ModelStreamInfer"):
            metadata = {"grpc-timeout": text}
            answer = await app.call(method, asking(), metadata=metadata)
            assert answer.code == 3
        assert not seen


@pytest.mark.parametrize("method", ["ModelInfer", "ModelStreamInfer"])
@pytest.mark.parametrize("limit", ["0m", "20m"])
async def test_past_the_deadline(method: str, limit: str) -> None:
    model = Model("m")
    cancelled = []

    @model.predict
    async def predict(request: InferRequest) -> Any:
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.append(True)

    async with App(model) as app:
        metadata = {"grpc-timeout": limit}
        answer = await app.call(method, asking(), metadata=metadata)
        assert answer.code == 4
        assert answer.text == "The deadline of the request has passed."
        assert cancelled in ([True], [])


@pytest.mark.parametrize("method", ["ModelInfer", "ModelStreamInfer"])
@pytest.mark.parametrize("body", [b"", b"\0\0", framed(asking())])
async def test_a_cancelled_call_sends_nothing(method: str, body: bytes) -> None:
    model = Model("m")
    started = anyio.Event()

    @model.predict
    async def predict(request: InferRequest) -> Any:
        started.set()
        await anyio.sleep_forever()

    async with App(model) as app:
        stream = MemoryStream()
        stream.feed(body)
        request = request_for(f"/{INFERENCE}/{method}")
        task = asyncio.create_task(app.answer(request, stream))
        if len(body) > 2:
            await started.wait()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()
        assert stream.sent == []


async def test_a_bug_of_ours_is_internal(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with App() as app:

        def broken() -> None:
            raise LookupError("s3cr3t")

        monkeypatch.setattr(app.dataplane, "ready", broken)
        answer = await app.call("ServerReady", proto("ServerReadyRequest"))
        assert answer.code == 13
        assert answer.text == "The server failed. Its log has more."
        assert "a bug in kserve-lite" in caplog.text
        caplog.clear()


def test_every_method_is_served() -> None:
    from kserve_lite.codecs.proto import POOL

    served = set(App().rpc._mapping)
    for name in (
        INFERENCE,
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    ):
        for method in POOL.FindServiceByName(name).methods:
            served.discard(f"/{name}/{method.name}")
    assert not served
