"""The service `inference.GRPCInferenceService`: the Open Inference Protocol.

And Triton's extensions of it: https://github.com/triton-inference-server/server,
docs/protocol, and `grpc_service.proto` of its repository `common`.
Each method goes through the same door as REST, so that both answer alike. The order of
a prediction: the message is a message, the model exists and is ready, the tensors fit,
the model runs.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from kserve_lite.codecs import v2_protobuf
from kserve_lite.codecs.proto import message_class, message_from
from kserve_lite.codecs.raw_tensors import check_count
from kserve_lite.dispatch import descriptions
from kserve_lite.dispatch.dataplane import DataPlane
from kserve_lite.dispatch.repository import Repository, check_load_parameters
from kserve_lite.errors import InferenceFault, InvalidInput, Kind, Unsupported
from kserve_lite.handlers import Stage
from kserve_lite.messages import (
    Answer,
    Context,
    InferRequest,
    InferResponse,
    StreamAnswer,
)
from kserve_lite.model import Model
from kserve_lite.records import new_id
from kserve_lite.rpc.call import Call, Message
from kserve_lite.rpc.methods import Action, Messages, Method, methods_of
from kserve_lite.rpc.statuses import text_of
from kserve_lite.wire.events import Buffer

SERVICE = "inference.GRPCInferenceService"

# A global, since reading a member off its class costs 0.12 us in Python 3.11.
_PREDICT = Stage.PREDICT

# A request of a stream asks by the first to be told by the second which of its answers
# is the last; a model that answers in pieces then gives one more, without outputs.
_ENABLE_FINAL = "triton_enable_empty_final_response"
_FINAL = "triton_final_response"

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
        "traceparent",
        "transfer-encoding",
        "upgrade",
        "user-agent",
        "x-request-id",
    )
)


def _message(name: str) -> Any:
    return message_class(f"inference.{name}")


class InferenceService:
    """Answers for the models behind a data plane."""

    def __init__(self, dataplane: DataPlane, repository: Repository) -> None:
        self.dataplane = dataplane
        self.repository = repository

    def methods(self) -> dict[str, Method]:
        actions: dict[str, Action] = {
            "ServerLive": self.server_live,
            "ServerReady": self.server_ready,
            "ModelReady": self.model_ready,
            "ServerMetadata": self.server_metadata,
            "ModelMetadata": self.model_metadata,
            "ModelInfer": self.model_infer,
            "ModelStreamInfer": self.model_stream_infer,
            "ModelConfig": self.model_config,
            "ModelStatistics": self.model_statistics,
            "RepositoryIndex": self.repository_index,
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

    async def model_ready(self, request: Any, call: Call) -> Any:
        call.record.model = request.name
        model = self.dataplane.get(request.name, request.version or None)
        return _ModelReadyResponse(ready=await self.dataplane.model_ready(model))

    async def server_metadata(self, *_: object) -> Any:
        return message_from(_ServerMetadataResponse, descriptions.server_metadata())

    async def model_metadata(self, request: Any, call: Call) -> Any:
        call.record.model = request.name
        model = self.dataplane.get(request.name, request.version or None)
        versions = self.dataplane.registry.versions(model.name)
        document = descriptions.model_metadata(model, versions)
        # KServe's SDK names a platform over REST only.
        del document["platform"]
        return message_from(_ModelMetadataResponse, document)

    async def model_config(self, request: Any, call: Call) -> Any:
        call.record.model = request.name
        model = self.dataplane.get(request.name, request.version or None)
        document = {"config": descriptions.model_config(model)}
        return message_from(_ModelConfigResponse, document)

    async def model_statistics(self, request: Any, call: Call) -> Any:
        call.record.model = request.name
        name, version = request.name or None, request.version or None
        document = descriptions.statistics(self.dataplane, name, version)
        return message_from(_ModelStatisticsResponse, document)

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
                if parsed.message.id:
                    failed.infer_response.id = parsed.message.id
                await messages.send(failed.SerializeToString())

    async def _answers(
        self, parsed: v2_protobuf.Parsed, call: Call
    ) -> AsyncGenerator[list[Buffer], None]:
        """The answers to one request of a stream; raises InferenceFault.

        After a fault there is no final one: Triton's clients take that for the end too.
        """
        model, context, request, raw = await self._asked(parsed, call)
        told = _is_told_the_end(request)
        plan = model.plan(_PREDICT)
        answer = await self.dataplane.infer(model, plan, request, context)
        if not isinstance(answer, StreamAnswer):
            final = True if told else None
            yield self._encoded(model, context, call, answer, raw, final=final)
            return
        final = False if told else None
        async with aclosing(answer.items) as items:
            async for item in items:
                yield self._encoded(model, context, call, item, raw, final=final)
        if told:
            end = InferResponse((), request.id or new_id(), model.name, model.version)
            yield self._encoded(model, context, call, end, raw, final=True)

    async def _asked(
        self, parsed: v2_protobuf.Parsed, call: Call
    ) -> tuple[Model, Context, Any, bool]:
        """The model that a request asks for, the context, the request, whether raw."""
        message = parsed.message
        dataplane = self.dataplane
        call.record.model = message.model_name
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
            call.record,
        )
        return model, context, request, raw

    def _encoded(
        self,
        model: Model,
        context: Context,
        call: Call,
        answer: Answer,
        raw: bool,
        *,
        final: bool | None = None,
    ) -> list[Buffer]:
        """Write an answer; what it cannot say is the model's failure.

        final: whether it is a request's last; None where the client does not ask.
        """
        try:
            if not isinstance(answer, InferResponse):
                raise TypeError("a gRPC answer is made of tensors; bytes came")
            if final is not None:
                # A new dict: the handler may keep the one that it gave.
                answer.parameters = {**(answer.parameters or {}), _FINAL: final}
            if context.response_headers:
                call.initial = own_metadata(context.response_headers)
            return v2_protobuf.encode(answer, raw=raw)
        except (TypeError, ValueError) as error:
            raise self.dataplane.model_failed(model, context, error) from error

    async def repository_index(self, request: Any, _: Call) -> Any:
        if request.repository_name:
            raise Unsupported("There is one repository: leave out repository_name.")
        models = await self.repository.index(ready=request.ready)
        return message_from(_RepositoryIndexResponse, {"models": models})

    async def model_load(self, request: Any, call: Call) -> Any:
        call.record.model = request.triton_model_name or request.model_name
        self.repository.check_control(call.record.peer, call.headers())
        check_count("parameters", request.parameters)
        check_load_parameters(request.parameters)
        name = call.record.model
        await self.repository.load_named(name)
        return _ModelLoadResponse(model_name=name, isLoaded=True)

    async def model_unload(self, request: Any, call: Call) -> Any:
        name = call.record.model = request.triton_model_name or request.model_name
        self.repository.check_control(call.record.peer, call.headers())
        await self.repository.unload_named(name)
        return _ModelUnloadResponse(model_name=name, isUnloaded=True)


_ServerLiveResponse = _message("ServerLiveResponse")
_ServerReadyResponse = _message("ServerReadyResponse")
_ModelReadyResponse = _message("ModelReadyResponse")
_ServerMetadataResponse = _message("ServerMetadataResponse")
_ModelMetadataResponse = _message("ModelMetadataResponse")
_ModelConfigResponse = _message("ModelConfigResponse")
_ModelStatisticsResponse = _message("ModelStatisticsResponse")
_RepositoryIndexResponse = _message("RepositoryIndexResponse")
_ModelStreamInferResponse = _message("ModelStreamInferResponse")
_ModelLoadResponse = _message("RepositoryModelLoadResponse")
_ModelUnloadResponse = _message("RepositoryModelUnloadResponse")


def _is_told_the_end(request: InferRequest) -> bool:
    """Whether the client asks which answer is the last; raises InvalidInput."""
    told = request.parameters.get(_ENABLE_FINAL, False)
    if not isinstance(told, bool):
        raise InvalidInput(f"The parameter {_ENABLE_FINAL} must be a bool_param.")
    return told


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
