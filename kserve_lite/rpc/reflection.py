"""The service `grpc.reflection`, v1 and v1alpha: grpcurl works without .proto files.

https://github.com/grpc/grpc/blob/master/doc/server-reflection.md
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grpclib.const import Status

from kserve_lite.codecs.proto import POOL, message_class
from kserve_lite.rpc.call import Idle
from kserve_lite.rpc.methods import Messages, Method, methods_of


class ReflectionService:
    """Describes the services that a server offers.

    version: "v1" or "v1alpha", which differ in nothing but their names.
    services: the full names of all services. idle: in which to wait for clients.
    """

    def __init__(self, version: str, services: Sequence[str], idle: Idle) -> None:
        self._idle = idle
        self._package = f"grpc.reflection.{version}"
        self._services = services
        self._response = message_class(f"{self._package}.ServerReflectionResponse")

    def methods(self) -> dict[str, Method]:
        return methods_of(
            f"{self._package}.ServerReflection",
            {"ServerReflectionInfo": self.info},
            self._idle,
        )

    async def info(self, messages: Messages) -> None:
        while (request := await messages.receive()) is not None:
            reply = self._response(valid_host=request.host, original_request=request)
            self._answer(request, reply)
            await messages.send(reply)

    def _answer(self, request: Any, reply: Any) -> None:
        kind = request.WhichOneof("message_request")
        try:
            match kind:
                case "list_services":
                    for name in self._services:
                        reply.list_services_response.service.add(name=name)
                case "file_by_filename":
                    _describe(reply, POOL.FindFileByName(request.file_by_filename))
                case "file_containing_symbol":
                    symbol = request.file_containing_symbol
                    _describe(reply, _file_of(symbol))
                case "all_extension_numbers_of_type":
                    name = request.all_extension_numbers_of_type
                    POOL.FindMessageTypeByName(name)  # known, and without extensions
                    reply.all_extension_numbers_response.base_type_name = name
                case "file_containing_extension":
                    raise KeyError
                case _:
                    _fail(reply, Status.INVALID_ARGUMENT, "The request asks nothing.")
        except KeyError:
            _fail(reply, Status.NOT_FOUND, "The server describes no such thing.")


def _file_of(symbol: str) -> Any:
    """The file that defines a symbol; raises KeyError."""
    try:
        return POOL.FindFileContainingSymbol(symbol)
    except KeyError:  # which knows no methods
        return POOL.FindMethodByName(symbol).containing_service.file


def _describe(reply: Any, file: Any) -> None:
    # Our files import no others, so one is all that a client needs.
    reply.file_descriptor_response.file_descriptor_proto.append(file.serialized_pb)


def _fail(reply: Any, status: Status, text: str) -> None:
    reply.error_response.error_code = status.value
    reply.error_response.error_message = text
