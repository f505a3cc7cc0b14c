"""The standard services, asked by gRPC's own packages for them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from kserve_lite import Model
from kserve_lite.codecs.proto import POOL
from tests.clients.calls import INFERENCE
from tests.clients.models import make_echo, make_sums
from tests.support import ServerThread

PATIENCE = 20
HEALTH = "grpc.health.v1.Health"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


@pytest.fixture(scope="module")
def channel() -> Iterator[Any]:
    with (
        ServerThread(make_echo(), make_sums()) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        yield channel


def asked(service: str = "") -> Any:
    return health_pb2.HealthCheckRequest(service=service)


@pytest.mark.parametrize("service", ["", INFERENCE, "echo", "sums"])
def test_check(channel: Any, service: str) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    assert stub.Check(asked(service)).status == SERVING


def test_check_of_what_there_is_not(channel: Any) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Check(asked("nobody"))
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.NOT_FOUND


def test_watch_of_what_there_is_not(channel: Any) -> None:
    watch = health_pb2_grpc.HealthStub(channel).Watch(asked("nobody"), timeout=PATIENCE)
    assert next(watch).status == SERVICE_UNKNOWN
    watch.cancel()


def test_watch_tells_of_a_load_and_of_a_stop() -> None:
    go_on = threading.Event()
    late = Model("late", predict=lambda payload: payload)

    @late.load
    def load() -> None:
        assert go_on.wait(PATIENCE)

    with contextlib.ExitStack() as after:
        server = ServerThread(late)
        # It is entered when it is ready, and asked before.
        starting = threading.Thread(target=server.__enter__)
        starting.start()
        after.callback(starting.join)
        after.callback(go_on.set)
        while not hasattr(server, "server") or not server.server._ports:
            starting.join(0.01)
        channel = after.enter_context(grpc.insecure_channel(f"127.0.0.1:{server.port}"))
        stub = health_pb2_grpc.HealthStub(channel)
        assert stub.Check(asked()).status == NOT_SERVING
        watches = [stub.Watch(asked(name), timeout=PATIENCE) for name in ("", "late")]
        assert [next(watch).status for watch in watches] == [NOT_SERVING] * 2
        go_on.set()
        assert [next(watch).status for watch in watches] == [SERVING] * 2
        starting.join()
        server.__exit__()
        assert [next(watch).status for watch in watches] == [NOT_SERVING] * 2
        assert [next(watch, None) for watch in watches] == [None] * 2


def test_reflection_lists_and_describes_the_services(channel: Any) -> None:
    database = ProtoReflectionDescriptorDatabase(channel)
    services = list(database.get_services())
    assert {INFERENCE, HEALTH} < set(services)
    # A pool that knows nothing learns everything from the server.
    pool = DescriptorPool(database)
    for name in services:
        described, own = pool.FindServiceByName(name), POOL.FindServiceByName(name)
        assert [m.name for m in described.methods] == [m.name for m in own.methods]
    request = pool.FindMessageTypeByName("inference.ModelInferRequest")
    assert request.fields_by_name["raw_input_contents"].number == 7
    with pytest.raises(KeyError):
        database.FindFileContainingSymbol("no.such.Service")
    with pytest.raises(KeyError):
        database.FindFileByName("no_such.proto")
    own_file = POOL.FindFileContainingSymbol(INFERENCE).name
    assert database.FindFileByName(own_file).package == "inference"
