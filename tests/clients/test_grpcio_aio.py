"""grpcio's asyncio client, with calls made by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest

from tests.clients.calls import Stub, infer_request, message
from tests.clients.models import Waiting, make_count, make_echo, make_mirror, make_sums
from tests.support import ServerThread

pytestmark = pytest.mark.anyio
PATIENCE = 20
PAIR = np.array([[1, 2]], np.float32)


@pytest.fixture
def anyio_backend() -> str:
    """grpcio's poller belongs to one kind of event loop; the server runs on uvloop."""
    return "asyncio"


@pytest.fixture(scope="module")
def server() -> Iterator[ServerThread]:
    with ServerThread(make_echo(), make_sums(), make_count(), make_mirror()) as server:
        yield server


@pytest.fixture
async def stub(server: ServerThread) -> AsyncIterator[Stub]:
    async with connected(server) as channel:
        yield Stub(channel)


def connected(server: ServerThread) -> Any:
    return grpc.aio.insecure_channel(
        f"127.0.0.1:{server.port}", options=[("grpc.use_local_subchannel_pool", 1)]
    )


async def test_live_ready_and_metadata(stub: Stub) -> None:
    assert (await stub.ServerLive(message("ServerLiveRequest"))).live
    assert (await stub.ServerReady(message("ServerReadyRequest"))).ready
    assert (await stub.ModelReady(message("ModelReadyRequest", name="echo"))).ready
    model = await stub.ModelMetadata(message("ModelMetadataRequest", name="sums"))
    assert [tensor.name for tensor in model.inputs] == ["pairs"]


async def test_many_calls_at_a_time(stub: Stub) -> None:
    async def ask(n: int) -> int:
        request = infer_request("echo", np.array([n]))
        answer = await stub.ModelInfer(request, timeout=PATIENCE)
        return int.from_bytes(answer.raw_output_contents[0], "little")

    numbers = range(200)
    assert await asyncio.gather(*map(ask, numbers)) == list(numbers)


async def test_errors(stub: Stub) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ModelInfer(infer_request("nobody", PAIR))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert caught.value.details() == "Model with name nobody does not exist."


async def test_metadata_goes_in_and_response_headers_come_out(stub: Stub) -> None:
    call = stub.ModelInfer(infer_request("mirror", PAIR), metadata=(("x-sent", "one"),))
    assert (await call.initial_metadata())["x-sent"] == "one"
    assert (await call).outputs
    assert await call.code() is grpc.StatusCode.OK


async def test_deadlines_and_cancellation() -> None:
    waiting = Waiting()
    with ServerThread(waiting.model) as server:
        async with connected(server) as channel:
            stub = Stub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ModelInfer(infer_request("waiting", PAIR), timeout=0.2)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert await asyncio.to_thread(waiting.cancelled.wait, PATIENCE)
            waiting.started.clear()
            waiting.cancelled.clear()
            call = stub.ModelInfer(infer_request("waiting", PAIR))
            task = asyncio.ensure_future(call)
            assert await asyncio.to_thread(waiting.started.wait, PATIENCE)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(waiting.cancelled.wait, PATIENCE)


async def test_a_stream_that_is_written_and_read_by_turns(stub: Stub) -> None:
    call = stub.ModelStreamInfer(timeout=PATIENCE)
    for limit in (1, 3):
        await call.write(infer_request("count", np.array([limit])))
        for number in range(limit):
            answer = (await call.read()).infer_response
            assert answer.raw_output_contents[0] == number.to_bytes(8, "little")
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK
