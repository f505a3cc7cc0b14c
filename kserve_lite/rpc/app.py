"""The gRPC API as one thing: a request's head and its stream in, a call answered.

`Rpc.answer` is to gRPC what `rest.endpoints.Endpoints.answer` is to REST.
"""

from __future__ import annotations

from typing import Any

from grpclib.encoding.proto import ProtoCodec
from grpclib.events import _DispatchServerEvents
from grpclib.server import request_handler

from kserve_lite.dispatch.dataplane import DataPlane
from kserve_lite.dispatch.repository import Repository
from kserve_lite.records import Record
from kserve_lite.rpc.call import Call, CallStream
from kserve_lite.rpc.health import SERVICE as HEALTH
from kserve_lite.rpc.health import HealthService
from kserve_lite.rpc.inference import SERVICE as INFERENCE
from kserve_lite.rpc.inference import InferenceService
from kserve_lite.rpc.reflection import ReflectionService
from kserve_lite.wire.events import Request

_REFLECTIONS = ("v1", "v1alpha")
_PROTOBUF = frozenset(("application/grpc", "application/grpc+proto"))


class Rpc:
    """Answers the gRPC calls of a server.

    max_message_size: bytes of one request message, inflated or not.
    """

    def __init__(
        self, dataplane: DataPlane, repository: Repository, *, max_message_size: int
    ) -> None:
        self._limit = max_message_size
        self._codec = ProtoCodec()  # only for the content type that it stands for
        self._events = _DispatchServerEvents()
        methods = InferenceService(dataplane, repository).methods()
        methods |= HealthService(dataplane).methods()
        names = [f"grpc.reflection.{v}.ServerReflection" for v in _REFLECTIONS]
        for version in _REFLECTIONS:
            services = (INFERENCE, HEALTH, *names)
            reflection = ReflectionService(version, services, dataplane.idle)
            methods |= reflection.methods()
        self._mapping = {path: method.handler for path, method in methods.items()}
        self._unary = {
            path: method.unary for path, method in methods.items() if method.unary
        }

    async def answer(
        self, request: Request, stream: CallStream, record: Record
    ) -> None:
        """Run one call on its stream; raises nothing but CancelledError.

        Then the peer has gone or the server gives up, and nothing is sent.

        Two lanes, as for HTTP/1.1: a well-formed unary call is answered at once;
        grpclib has every other call, and ends those that fail.
        """
        headers = request.headers
        call: Any = Call(stream, request, self._limit, record)
        if request.target in self._mapping:
            record.action = request.target.rpartition("/")[2]
        unary = self._unary.get(request.target)
        if (
            unary is not None
            and request.method == "POST"
            and headers.get("content-type") in _PROTOBUF
            and headers.get("te") == "trailers"
        ):
            try:
                await unary(call)
                return
            except Exception as error:  # noqa: BLE001 - raised again in grpclib's lane
                call.fault = error
        # Only what grpclib decides by. It decodes metadata and deadlines strictly and
        # logs what a peer does wrong there as our fault; `Call` does both instead.
        known = [
            (":method", request.method),
            (":path", request.target),
            ("content-type", headers.get("content-type", "")),
            ("te", headers.get("te", "")),
        ]
        await request_handler(
            self._mapping, call, known, self._codec, None, self._events, _nothing
        )


def _nothing() -> None:
    """grpclib's hook for the end of a call: the transport sees that by itself."""
