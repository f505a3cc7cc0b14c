"""The REST API: a request with its whole body in, a `Reply` out, no socket.

`Endpoints.answer` is the boundary at which errors become statuses. Each row of
`routes.ROUTES` names a method of `Endpoints`, which tells about the server and its
models, or of `Predictions`, which runs them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import orjson

from kserve_lite.codecs.cloudevents import EventSettings
from kserve_lite.codecs.json_tensors import loads
from kserve_lite.dispatch import descriptions
from kserve_lite.dispatch.dataplane import DataPlane
from kserve_lite.dispatch.repository import Repository, check_load_parameters
from kserve_lite.errors import (
    InferenceFault,
    InvalidInput,
    Kind,
    ModelNotReady,
    Overloaded,
    ServerNotReady,
)
from kserve_lite.records import Record
from kserve_lite.rest.openapi import openapi_document
from kserve_lite.rest.predictions import Predictions
from kserve_lite.rest.replies import Reply, error_reply, fault_reply, json_reply
from kserve_lite.rest.routes import ROUTES, Match, match, origin_form
from kserve_lite.wire.events import Buffer, Request

log = logging.getLogger("kserve_lite")

Action: TypeAlias = Callable[[Request, Match, Buffer, Record], Awaitable[Reply]]


# Given the header Accept, the content type and the body of `/metrics`.
Metrics: TypeAlias = Callable[[str | None], Awaitable[tuple[bytes, bytes]]]


class Endpoints:
    """Answers requests for the models behind a data plane."""

    def __init__(
        self,
        dataplane: DataPlane,
        repository: Repository,
        *,
        metrics: Metrics,
        events: EventSettings,
    ) -> None:
        self.dataplane = dataplane
        self.repository = repository
        self._metrics = metrics
        self._described: tuple[asyncio.Event, Reply] | None = None
        predictions = Predictions(dataplane, events)
        self._actions: dict[str, Action] = {}
        self._inferring: set[str] = set()
        for action in {route.action for route in ROUTES}:
            infers = hasattr(predictions, action)
            self._actions[action] = getattr(predictions if infers else self, action)
            if infers:
                self._inferring.add(action)

    def refuses(self, request: Request) -> bool:
        """Whether a request cannot be brought to its model now, whatever its body.

        That body is then not worth keeping: refused uploads take no memory.
        """
        leads_to = match(request.target).get(request.method)
        if leads_to is None or leads_to.action not in self._inferring:
            return False
        try:
            self.dataplane.find(leads_to.model, leads_to.version)
        except InferenceFault:
            return True
        return False

    async def answer(
        self, request: Request, body: Buffer | None, record: Record
    ) -> Reply:
        """Answer a request; never raises but for cancellation.

        body: None where `refuses()` said so as it began to come.
        """
        try:
            methods = match(request.target)
            leads_to = methods.get(request.method)
            if leads_to is None:
                return _unserved(request.target, methods)
            record.action, record.model = leads_to.action, leads_to.model
            record.protocol = leads_to.protocol
            if request.headers.get("content-encoding", "identity") != "identity":
                return _ENCODED
            if body is None:
                self.dataplane.find(leads_to.model, leads_to.version)
                # What it was refused for has passed, but its body is not here.
                raise Overloaded(
                    "The model could not take the request as it began: try again."
                )
            return await self._actions[leads_to.action](request, leads_to, body, record)
        except InferenceFault as fault:
            return fault_reply(fault)
        except Exception:  # the boundary: a bug here must not end the connection
            log.exception("answering %s failed: a bug in kserve-lite", request.method)
            return error_reply(500, "The server failed. Its log has more.")

    async def alive(self, *_: Any) -> Reply:
        return json_reply(b'{"status":"alive"}')

    async def live(self, *_: Any) -> Reply:
        return json_reply(b'{"live":true}')

    async def ready(self, *_: Any) -> Reply:
        if not await self.dataplane.ready():
            raise ServerNotReady
        return json_reply(b'{"ready":true}')

    async def openapi(self, *_: Any) -> Reply:
        # 9 ms for 30 models: kept until one is loaded or unloaded.
        change = self.dataplane.change()
        if self._described is None or self._described[0] is not change:
            document = openapi_document(self.dataplane.served(), ROUTES)
            self._described = change, _document(document)
        return self._described[1]

    async def metrics(self, request: Request, *_: Any) -> Reply:
        content_type, body = await self._metrics(request.headers.get("accept"))
        return Reply(200, ((b"content-type", content_type),), body)

    async def server_metadata(self, *_: Any) -> Reply:
        return _document(descriptions.server_metadata())

    async def model_names(self, *_: Any) -> Reply:
        return _document({"models": self.dataplane.names()})

    async def model_metadata(self, _: Request, leads_to: Match, *__: Any) -> Reply:
        model = self.dataplane.get(leads_to.model, leads_to.version)
        versions = self.dataplane.registry.versions(model.name)
        return _document(descriptions.model_metadata(model, versions))

    async def model_config(self, _: Request, leads_to: Match, *__: Any) -> Reply:
        model = self.dataplane.get(leads_to.model, leads_to.version)
        return _document(descriptions.model_config(model))

    async def statistics(self, _: Request, leads_to: Match, *__: Any) -> Reply:
        name, version = leads_to.model or None, leads_to.version
        return _document(descriptions.statistics(self.dataplane, name, version))

    async def v1_ready(self, _: Request, leads_to: Match, *__: Any) -> Reply:
        model = self.dataplane.get(leads_to.model, leads_to.version)
        await self.dataplane.check(model)
        return _document({"name": model.name, "ready": True})

    v2_ready = v1_ready

    async def repository_index(
        self, _: Request, __: Match, body: Buffer, ___: Record
    ) -> Reply:
        asked = loads(body) if body else {}
        ready = asked.get("ready", False) if isinstance(asked, dict) else None
        if not isinstance(ready, bool):
            raise InvalidInput('The body may be an object with "ready", a boolean.')
        return _document(await self.repository.index(ready=ready))

    async def model_load(
        self, request: Request, leads_to: Match, body: Buffer, record: Record
    ) -> Reply:
        self.repository.check_control(record.peer, request.headers)
        _refuse_override(body)
        try:
            await self.repository.load_named(leads_to.model)
        except InferenceFault as fault:
            # By kind: of another worker's ModelNotFound no more comes here.
            if fault.kind is not Kind.NOT_FOUND:
                raise
            # KServe's status for it, which its clients look for.
            raise ModelNotReady(leads_to.model) from None
        return _document({"name": leads_to.model, "load": True})

    async def model_unload(
        self, request: Request, leads_to: Match, _: Buffer, record: Record
    ) -> Reply:
        self.repository.check_control(record.peer, request.headers)
        await self.repository.unload_named(leads_to.model)
        return _document({"name": leads_to.model, "unload": True})


def _document(value: object) -> Reply:
    return json_reply(orjson.dumps(value))


def _refuse_override(body: Buffer) -> None:
    """Raise Unsupported where a load brings a configuration or files (Triton's).

    Otherwise the body does not matter; KServe's SDK does not even read it.
    """
    try:
        parameters = orjson.loads(body)["parameters"]
    except (ValueError, LookupError, TypeError):
        return
    check_load_parameters(parameters if isinstance(parameters, dict) else ())


# RFC 9110 section 15.5.16: the body of such a request would be read as it is.
_ENCODED = error_reply(
    415,
    "Bodies are read as they are: send this one without Content-Encoding.",
    ((b"accept-encoding", b"identity"),),
)


def _unserved(target: str, methods: dict[str, Match]) -> Reply:
    """Say that a path has other methods, lies elsewhere or does not exist."""
    if methods:
        allowed = ", ".join(sorted(methods))
        return error_reply(
            405,
            f"The method is not allowed here; allowed: {allowed}.",
            ((b"allow", allowed.encode()),),
        )
    target = origin_form(target)
    path = target.partition("?")[0]
    bare = path.rstrip("/")
    # A path of ours never begins with two slashes, so the location stays on this host.
    if bare != path and match(bare):
        location = bare + target[len(path) :]
        return Reply(307, ((b"location", location.encode("ascii")),), b"")
    return error_reply(404, "There is no such path.")
