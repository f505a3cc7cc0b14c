"""The service `inference.GRPCInferenceService`: the Open Inference Protocol.

Each method goes through the same door as REST, so that both answer alike. The order of
a prediction: the message is a message, the model exists and is ready, the tensors fit,
the model runs.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from kserve_lite.codecs import v2_protobuf
from kserve_lite.codecs.proto import message_class
from kserve_lite.dispatch.dataplane import DataPlane
from kserve_lite.errors import Forbidden, InferenceFault, Kind, Unsupported
from kserve_lite.handlers import Stage
from kserve_lite.messages import Answer, Context, InferResponse, StreamAnswer
from kserve_lite.model import Model
from kserve_lite.rpc.call import Call, Message
from kserve_lite.rpc.methods import Action, Messages, Method, methods_of
from kserve_lite.rpc.statuses import text_of
from kserve_lite.version import __version__
from kserve_lite.wire.events import Buffer

SERVICE = "inference.GRPCInferenceService"

# A global, since reading a member off its class costs 0.12 us in Python 3.11.
_PREDICT = Stage.PREDICT

# What metadata may hold: the gRPC specification's Custom-Metadata.
_NAME = re.compile(r"[0-9a-z_.\-]+")
_VALUE = re.compile(r"[ -~]*")
# What belongs to HTTP or gRPC is the server's to say, whatever a handler sets.
_RESERVED = frozenset(
    (
        "connection",
        "content-encoding",
        "content-length",
        "content-type",
        "keep-alive",
        "te",
        "transfer-encoding",
        "upgrade",
        "user-agent",
    )
)


def _message(name: str) -> Any:
    return message_class(f"inference.{name}")


class InferenceService:
    """Answers for the models behind a data plane.

    model_control: whether anybody may load and unload models, not only this machine.
    """

    def __init__(self, dataplane: DataPlane, *, model_control: bool) -> None:
        self.dataplane = dataplane
        self.model_control = model_control

    def methods(self) -> dict[str, Method]:
        actions: dict[str, Action] = {
            "ServerLive": self.server_live,
            "ServerReady": self.server_ready,
            "ModelReady": self.model_ready,
            "ServerMetadata": self.server_metadata,
            "ModelMetadata": self.model_metadata,
            "ModelInfer": self.model_infer,
            "ModelStreamInfer": self.model_stream_infer,
            "RepositoryModelLoad": self.model_load,
            "RepositoryModelUnload": self.model_unload,
        }
        both = ("ModelInfer", "ModelStreamInfer")
        return methods_of(
            SERVICE,
            actions,
            self.dataplane.idle,
            read=dict.fromkeys(both, v2_protobuf.parse),
            write=dict.fromkeys(both, _as_it_is),
        )

    async def server_live(self, *_: object) -> Any:
        return _ServerLiveResponse(live=True)

    async def server_ready(self, *_: object) -> Any:
        return _ServerReadyResponse(ready=await self.dataplane.ready())

    async def model_ready(self, request: Any, _: Call) -> Any:
        model = self.dataplane.get(request.name, request.version or None)
        return _ModelReadyResponse(ready=await self.dataplane.model_ready(model))

    async def server_metadata(self, *_: object) -> Any:
        return _ServerMetadataResponse(name="kserve-lite", version=__version__)

    async def model_metadata(self, request: Any, _: Call) -> Any:
        model = self.dataplane.get(request.name, request.version or None)
        reply = _ModelMetadataResponse(
            name=model.name, versions=self.dataplane.registry.versions(model.name)
        )
        for specs, target in (
            (model.inputs, reply.inputs),
            (model.outputs, reply.outputs),
        ):
            for spec in specs:
                target.add(name=spec.name, datatype=spec.datatype, shape=spec.shape)
        return reply

    async def model_infer(self, parsed: v2_protobuf.Parsed, call: Call) -> list[Buffer]:
        model, context, request, raw = await self._asked(parsed, call)
        plan = model.plan(_PREDICT)
        answer = await self.dataplane.infer(model, plan, request, context)
        if isinstance(answer, StreamAnswer):
            await answer.items.aclose()
            raise Unsupported(
                f"Model {model.name} answers with a stream: call ModelStreamInfer."
            )
        return self._encoded(model, context, call, answer, raw)

    async def model_stream_infer(self, messages: Messages) -> None:
        """Answer requests one after the other, in order; a fault ends none but its own.

        Nothing more is read while a request is being answered.
        """
        while (parsed := await messages.receive()) is not None:
            try:
                async with aclosing(self._answers(parsed, messages.call)) as answers:
                    async for answer in answers:
                        await messages.send(v2_protobuf.in_stream(answer))
            except InferenceFault as fault:
                if fault.kind is Kind.DEADLINE_EXCEEDED:  # of the call as a whole
                    raise
                failed = _ModelStreamInferResponse(error_message=text_of(fault))
                await messages.send(failed.SerializeToString())

    async def _answers(
        self, parsed: v2_protobuf.Parsed, call: Call
    ) -> AsyncGenerator[list[Buffer], None]:
        """The answers to one request of a stream; raises InferenceFault."""
        model, context, request, raw = await self._asked(parsed, call)
        plan = model.plan(_PREDICT)
        answer = await self.dataplane.infer(model, plan, request, context)
        if not isinstance(answer, StreamAnswer):
            yield self._encoded(model, context, call, answer, raw)
            return
        async with aclosing(answer.items) as items:
            async for item in items:
                yield self._encoded(model, context, call, item, raw)

    async def _asked(
        self, parsed: v2_protobuf.Parsed, call: Call
    ) -> tuple[Model, Context, Any, bool]:
        """The model that a request asks for, the context, the request, whether raw."""
        message = parsed.message
        dataplane = self.dataplane
        model = dataplane.find(message.model_name, message.model_version or None)
        if model.is_checked:
            await dataplane.check(model)
        request, raw = v2_protobuf.decode(parsed)
        context = Context(
            model.name,
            model.version,
            "grpc",
            call.headers(),
            call.deadline(),
            call.is_gone,
        )
        return model, context, request, raw

    def _encoded(
        self,
        model: Model,
        context: Context,
        call: Call,
        answer: Answer,
        raw: bool,
    ) -> list[Buffer]:
        """Write an answer; what it cannot say is the model's failure."""
        try:
            if not isinstance(answer, InferResponse):
                raise TypeError("a gRPC answer is made of tensors; bytes came")
            if context.response_headers:
                call.initial = own_metadata(context.response_headers)
            return v2_protobuf.encode(answer, raw=raw)
        except (TypeError, ValueError) as error:
            raise self.dataplane.model_failed(model, context, error) from error

    async def model_load(self, request: Any, call: Call) -> Any:
        self._allow_control(call)
        await self.dataplane.load_named(request.model_name)
        return _ModelLoadResponse(model_name=request.model_name, isLoaded=True)

    async def model_unload(self, request: Any, call: Call) -> Any:
        self._allow_control(call)
        await self.dataplane.unload_named(request.model_name)
        return _ModelUnloadResponse(model_name=request.model_name, isUnloaded=True)

    def _allow_control(self, call: Call) -> None:
        if not self.model_control and not is_loopback(call.host):
            raise Forbidden(
                "Models may be loaded and unloaded only from the server's own machine, "
                "unless the server runs with enable_model_control."
            )


_ServerLiveResponse = _message("ServerLiveResponse")
_ServerReadyResponse = _message("ServerReadyResponse")
_ModelReadyResponse = _message("ModelReadyResponse")
_ServerMetadataResponse = _message("ServerMetadataResponse")
_ModelMetadataResponse = _message("ModelMetadataResponse")
_ModelStreamInferResponse = _message("ModelStreamInferResponse")
_ModelLoadResponse = _message("RepositoryModelLoadResponse")
_ModelUnloadResponse = _message("RepositoryModelUnloadResponse")


def _as_it_is(message: Message) -> Message:
    return message


def own_metadata(headers: Mapping[str, Any]) -> dict[str, str | bytes]:
    """The headers that a handler set as initial metadata, less what is not its to set.

    Raises ValueError for a name or value that metadata cannot have.
    """
    metadata: dict[str, str | bytes] = {}
    for name, value in headers.items():
        name = name.lower()
        if name in _RESERVED or name.startswith("grpc-"):
            continue
        if not _NAME.fullmatch(name):
            raise ValueError(f"the response header {name!r} has a forbidden character")
        if name.endswith("-bin"):
            metadata[name] = value if isinstance(value, bytes) else str(value).encode()
            continue
        text = str(value).strip(" \t")
        if not _VALUE.fullmatch(text):
            raise ValueError(f"the response header {name!r} has a forbidden character")
        if text:  # metadata has no empty values
            metadata[name] = text
    return metadata


def is_loopback(host: str) -> bool:
    """Whether a peer's host is this machine: 127.0.0.0/8 or ::1, mapped or not."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)
