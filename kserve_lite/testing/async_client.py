"""The test client inside an event loop; `client.py` is the same for plain tests."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from types import TracebackType
from typing import Any, Literal, TypeAlias
from urllib.parse import quote

from kserve_lite.codecs import v2_client
from kserve_lite.codecs.json_tensors import dumps, loads
from kserve_lite.errors import StartupError
from kserve_lite.model import Model
from kserve_lite.server.settings import make_settings
from kserve_lite.tensors import Parameters
from kserve_lite.testing.answers import Inferred, Refused, Response, checked, inferred
from kserve_lite.testing.memory import InMemory

Over: TypeAlias = Literal["json", "binary", "grpc"]
_SERVICE = "/inference.GRPCInferenceService"
_JSON_SIZE = "inference-header-content-length"


class AsyncClient:
    """Models, and a client of theirs, in the event loop that runs.

    settings: as `serve()` takes them; those of ports, TLS and workers change nothing,
    nor do log_level, log_format and log_config: lines, access lines too, go where the
    program has logging write them. Models may be loaded and unloaded
    (`enable_model_control`) unless that is said to be false. Entering it loads the
    models and raises StartupError where one fails; leaving it cuts what is still in
    flight and unloads them. Calls may run at the same time. Raises SettingsError,
    StartupError without a model.

    model: the model's name; may be left out where there is only one. headers: of the
    request, metadata over gRPC. The methods of V1, V2 and generate raise Refused where
    the answer is an error, ConnectionError where it is cut short.
    """

    def __init__(self, *models: Model, **settings: Any) -> None:
        if not models:
            raise StartupError("there is no model to test: give at least one")
        self.settings = made = make_settings({"enable_model_control": True, **settings})
        self._server = InMemory(models, made)
        self._models = models
        self._life: AbstractAsyncContextManager[None]

    async def __aenter__(self) -> AsyncClient:
        self._life = self._server.running()
        await self._life.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        await self._life.__aexit__(exc_type, exc, tb)

    async def request(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        content: bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        """Send any HTTP request and return its answer, whatever the status.

        json: the body, which may have numpy arrays in it; or else content: its bytes.
        """
        body = content if json is None else dumps(json)
        parts = self._server.http(method, path, body, headers or {})
        async with aclosing(parts):
            head: Any = await anext(parts)
            chunks = [part async for part in parts if isinstance(part, bytes)]
        fields = {n.decode(): v.decode("latin-1") for n, v in head.headers}
        return Response(head.status_code, fields, b"".join(chunks))

    async def stream(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        content: bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> AsyncGenerator[bytes]:
        """Send any HTTP request and give the pieces of its body as they come.

        Closing it closes the connection, so that the model sees its client go. Raises
        Refused for a status of 400 or more.
        """
        body = content if json is None else dumps(json)
        parts = self._server.http(method, path, body, headers or {})
        async with aclosing(parts):
            head: Any = await anext(parts)
            if head.status_code >= 400:
                rest = [part async for part in parts if isinstance(part, bytes)]
                checked(Response(head.status_code, {}, b"".join(rest)))
            async for part in parts:
                if isinstance(part, bytes):
                    yield part

    async def predict(
        self,
        payload: Any,
        model: str | None = None,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """V1's predict: a JSON body in, `{"instances": [...]}` say, its answer out."""
        return await self._v1("predict", payload, model, headers)

    async def explain(
        self,
        payload: Any,
        model: str | None = None,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """V1's explain."""
        return await self._v1("explain", payload, model, headers)

    async def _v1(
        self,
        verb: str,
        payload: Any,
        model: str | None,
        headers: Mapping[str, str] | None,
    ) -> Any:
        path = f"/v1/models/{self._name(model)}:{verb}"
        answer = await self.request(
            "POST", path, content=dumps(payload), headers=headers
        )
        return checked(answer).json()

    async def infer(
        self,
        inputs: Mapping[str, Any],
        model: str | None = None,
        *,
        over: Over = "binary",
        version: str | None = None,
        outputs: Sequence[str] = (),
        parameters: Parameters | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Inferred:
        """V2's infer: arrays (numpy's or torch's) by name in and out.

        over: "json", "binary" (REST with binary tensors) or "grpc". outputs: the names
        of those that are wanted, in order; empty: all.
        """
        asked = v2_client.asked(inputs, parameters or {}, outputs)
        if over == "grpc":
            name = self._name(model, quoted=False)
            message = v2_client.write_proto(asked, model=name, version=version)
            calls = self._rpc("ModelInfer", message, headers, streams=False)
            async with aclosing(calls):
                reply, metadata = await anext(calls)
            return inferred(v2_client.read_proto(reply), metadata)
        body, size = v2_client.write_json(asked, binary=over == "binary")
        of_version = "" if version is None else f"/versions/{quote(version, safe='')}"
        path = f"/v2/models/{self._name(model)}{of_version}/infer"
        own = {} if size is None else {_JSON_SIZE: str(size)}
        answer = await self.request(
            "POST", path, content=body, headers={**own, **(headers or {})}
        )
        came = checked(answer).headers.get(_JSON_SIZE)
        read = v2_client.read_json(answer.body, None if came is None else int(came))
        return inferred(read, answer.headers)

    async def infer_stream(
        self,
        inputs: Mapping[str, Any],
        model: str | None = None,
        *,
        version: str | None = None,
        outputs: Sequence[str] = (),
        parameters: Parameters | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncGenerator[Inferred]:
        """V2's ModelStreamInfer over gRPC: one request, its answers as they come."""
        asked = v2_client.asked(inputs, parameters or {}, outputs)
        name = self._name(model, quoted=False)
        message = v2_client.write_proto(asked, model=name, version=version)
        calls = self._rpc("ModelStreamInfer", message, headers, streams=True)
        async with aclosing(calls):
            async for reply, metadata in calls:
                if reply.error_message:
                    raise Refused("OK", reply.error_message)
                yield inferred(v2_client.read_proto(reply.infer_response), metadata)

    async def generate(
        self,
        members: Mapping[str, Any],
        model: str | None = None,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """V2's generate: JSON members in, `{"text_input": "..."}` say, and out."""
        path = f"/v2/models/{self._name(model)}/generate"
        answer = await self.request("POST", path, json=members, headers=headers)
        document: dict[str, Any] = checked(answer).json()
        return document

    async def generate_stream(
        self,
        members: Mapping[str, Any],
        model: str | None = None,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncGenerator[dict[str, Any]]:
        """V2's generate_stream: the answers as they come."""
        path = f"/v2/models/{self._name(model)}/generate_stream"
        chunks = self.stream("POST", path, json=members, headers=headers)
        came = b""
        async with aclosing(chunks):
            async for chunk in chunks:
                *events, came = (came + chunk).split(b"\n\n")
                for event in events:
                    document: dict[str, Any] = loads(event.removeprefix(b"data: "))
                    if list(document) == ["error"]:
                        raise Refused(200, document["error"])
                    yield document

    async def _rpc(
        self,
        method: str,
        message: Any,
        metadata: Mapping[str, str] | None,
        *,
        streams: bool,
    ) -> AsyncGenerator[tuple[Any, dict[str, str]]]:
        """Call a method with one message; give each reply, and the initial metadata."""
        from grpclib.exceptions import GRPCError, StreamTerminatedError

        from kserve_lite.codecs.proto import message_class

        reply = message_class(f"inference.{method}Response")
        path, kinds = f"{_SERVICE}/{method}", (type(message), reply)
        try:
            call = self._server.rpc(path, kinds, metadata or {}, streams=streams)
            async with call as stream:
                await stream.send_message(message, end=True)
                async for came in stream:
                    own = dict(stream.initial_metadata or {})
                    yield came, {name: str(value) for name, value in own.items()}
        except GRPCError as error:
            raise Refused(error.status.name, error.message or "") from None
        except StreamTerminatedError as error:
            raise ConnectionError("the answer was cut short") from error

    def _name(self, model: str | None, *, quoted: bool = True) -> str:
        if model is None:
            # Asked for late: the setting model_name changes a model's name.
            model, *others = dict.fromkeys(each.name for each in self._models)
            if others:
                raise ValueError(f"say which model: {', '.join((model, *others))}")
        return quote(model, safe="") if quoted else model
