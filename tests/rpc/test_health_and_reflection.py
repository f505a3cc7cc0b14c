"""The services beside inference: health checks, and reflection for grpcurl."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool

from kserve_lite import Model
from kserve_lite.rpc import health
from kserve_lite.wire.events import Data
from tests.rpc.stream import (
    INFERENCE,
    Answer,
    App,
    MemoryStream,
    answer_in,
    framed,
    proto,
    request_for,
)

pytestmark = pytest.mark.anyio

HEALTH = "grpc.health.v1.Health"
SERVING, NOT_SERVING, SERVICE_UNKNOWN = 1, 2, 3


def model_named(name: str) -> Model:
    model = Model(name)

    @model.predict
    def predict(x: np.ndarray) -> np.ndarray:
        return x

    return model


def check(service: str) -> Any:
    return proto("grpc.health.v1.HealthCheckRequest", service=service)


def statuses(messages: list[bytes]) -> list[int]:
    kind = type(proto("grpc.health.v1.HealthCheckResponse"))
    return [kind.FromString(message).status for message in messages]


async def test_check() -> None:
    failing = model_named("failing")
    failing.ready(lambda: False)
    async with App(model_named("m"), failing) as app:

        async def status(service: str) -> int:
            answer = await app.call("Check", check(service), service=HEALTH)
            assert answer.code == 0
            return statuses(answer.messages)[0]

        assert await status("m") == SERVING
        assert await status("failing") == NOT_SERVING
        assert await status("") == NOT_SERVING
        assert await status(INFERENCE) == NOT_SERVING
        await app.repository.unload_named("failing")
        assert await status("") == SERVING
        assert await status(INFERENCE) == SERVING
        for unknown in ("failing", "zz", HEALTH):
            answer = await app.call("Check", check(unknown), service=HEALTH)
            assert answer.code == 5
        app.dataplane.accepting = False
        assert await status("") == NOT_SERVING
        assert await status("m") == NOT_SERVING


class Watching:
    """A watch that goes on until its block ends."""

    def __init__(self, app: App, service: str) -> None:
        self.stream = MemoryStream()
        self.stream.feed(framed(check(service)))
        request = request_for(f"/{HEALTH}/Watch")
        self.task = asyncio.create_task(app.answer(request, self.stream))

    async def seen(self, count: int) -> list[int]:
        with anyio.fail_after(10):
            await self.stream.until_sent(count)
        events = [event for sent in self.stream.sent for event in sent]
        data = b"".join(e.data for e in events if isinstance(e, Data))
        return statuses([data[i + 5 : i + 7] for i in range(0, len(data), 7)])

    async def answer(self) -> Answer:
        with anyio.fail_after(10):
            await self.task
        return answer_in(self.stream.sent)

    async def cancel(self) -> None:
        self.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await self.task


async def test_watch_tells_changes_and_ends_with_the_server() -> None:
    async with App(model_named("m")) as app:
        for service in ("", "m"):
            watching = Watching(app, service)
            assert await watching.seen(1) == [SERVING]
            await app.repository.unload_named("m")
            expected = NOT_SERVING if service == "" else SERVICE_UNKNOWN
            assert await watching.seen(2) == [SERVING, expected]
            await app.repository.load_named("m")
            assert (await watching.seen(3))[2] == SERVING
            await watching.cancel()
        watching = Watching(app, "")
        await watching.seen(1)
        app.dataplane.accepting = False
        answer = await watching.answer()
        assert answer.code == 0
        assert statuses(answer.messages) == [SERVING, NOT_SERVING]


async def test_watch_of_an_unknown_service() -> None:
    async with App(model_named("m")) as app:
        watching = Watching(app, "zz")
        assert await watching.seen(1) == [SERVICE_UNKNOWN]
        await watching.cancel()


async def test_watch_asks_ready_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "WATCH_INTERVAL", 0.01)
    model = model_named("m")
    answers = [True]
    model.ready(lambda: answers[-1])
    async with App(model) as app:
        watching = Watching(app, "m")
        assert await watching.seen(1) == [SERVING]
        answers.append(False)
        assert await watching.seen(2) == [SERVING, NOT_SERVING]
        await watching.cancel()


async def test_watch_keeps_the_deadline() -> None:
    async with App(model_named("m")) as app:
        metadata = {"grpc-timeout": "20m"}
        answer = await app.call("Watch", check(""), service=HEALTH, metadata=metadata)
        assert answer.code == 4
        assert statuses(answer.messages) == [SERVING]


# --- reflection ---------------------------------------------------------------------


@pytest.fixture(params=["v1", "v1alpha"])
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def reflect(version: str, *asked: dict[str, Any]) -> list[Any]:
    package = f"grpc.reflection.{version}"
    async with App() as app:
        answer = await app.call(
            "ServerReflectionInfo",
            *(proto(f"{package}.ServerReflectionRequest", **one) for one in asked),
            service=f"{package}.ServerReflection",
        )
    assert answer.code == 0
    kind = type(proto(f"{package}.ServerReflectionResponse"))
    return [kind.FromString(message) for message in answer.messages]


async def test_services(version: str) -> None:
    (reply,) = await reflect(version, {"list_services": "*", "host": "h"})
    assert [service.name for service in reply.list_services_response.service] == [
        INFERENCE,
        HEALTH,
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    ]
    assert reply.valid_host == "h"
    assert reply.original_request.list_services == "*"


@pytest.mark.parametrize(
    "symbol",
    [
        INFERENCE,
        f"{INFERENCE}.ModelInfer",
        "inference.ModelInferRequest.InferInputTensor",
        HEALTH,
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflectionRequest",
    ],
)
async def test_files_of_symbols(version: str, symbol: str) -> None:
    (reply,) = await reflect(version, {"file_containing_symbol": symbol})
    files = reply.file_descriptor_response.file_descriptor_proto
    pool = descriptor_pool.DescriptorPool()
    for file in files:  # enough for a client that knows nothing
        pool.AddSerializedFile(file)
    file = descriptor_pb2.FileDescriptorProto.FromString(files[0])
    assert symbol.startswith(file.package)
    (again,) = await reflect(version, {"file_by_filename": file.name})
    assert again.file_descriptor_response == reply.file_descriptor_response


async def test_what_is_not_described(version: str) -> None:
    extension = {"containing_type": "inference.ModelInferRequest"}
    replies = await reflect(
        version,
        {"file_containing_symbol": "no.Such"},
        {"file_by_filename": "no.proto"},
        {"file_containing_extension": extension},
        {"all_extension_numbers_of_type": "no.Such"},
        {"all_extension_numbers_of_type": "inference.ModelInferRequest"},
        {},
    )
    codes = [reply.error_response.error_code for reply in replies]
    assert codes == [5, 5, 5, 5, 0, 3]
    numbers = replies[4].all_extension_numbers_response
    assert numbers.base_type_name == "inference.ModelInferRequest"
    assert not numbers.extension_number
