"""The REST API: a request with its whole body in, a `Reply` out, no socket.

`Endpoints.answer` is the boundary at which errors become statuses; each method below it
is one row of `routes.ROUTES`. Order of a prediction: the model exists (404), is ready
(503), the body is read (400), the model runs.
"""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeAlias

import orjson

from kserve_lite.codecs import v1, v2
from kserve_lite.dispatch.binding import declared_datatype, unnamed_input
from kserve_lite.dispatch.dataplane import DataPlane
from kserve_lite.errors import (
    InferenceFault,
    ServerNotReady,
    Unsupported,
)
from kserve_lite.handlers import Form, Stage
from kserve_lite.messages import (
    Context,
    InferResponse,
    JsonAnswer,
    RawAnswer,
    StreamAnswer,
    asked_deadline,
)
from kserve_lite.model import Model
from kserve_lite.rest.replies import (
    JSON,
    Reply,
    error_reply,
    fault_reply,
    json_reply,
)
from kserve_lite.rest.routes import ROUTES, Match, match, origin_form
from kserve_lite.version import __version__
from kserve_lite.wire.events import Buffer, RawHeaders, Request

log = logging.getLogger("kserve_lite")

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
# What frames a message is the server's to say, whatever a handler sets.
_FRAMING = frozenset(
    ("content-length", "transfer-encoding", "connection", "keep-alive", "upgrade")
)
_JSON_ONLY: RawHeaders = (JSON,)
# Globals, since reading a member off its class costs 0.12 us in Python 3.11.
_PREDICT = Stage.PREDICT
_JSON_FORM = Form.JSON

Action: TypeAlias = Callable[..., Awaitable[Reply]]


class Endpoints:
    """Answers requests for the models behind a data plane."""

    def __init__(self, dataplane: DataPlane) -> None:
        self.dataplane = dataplane
        self._actions: dict[str, Action] = {
            route.action: getattr(self, route.action) for route in ROUTES
        }

    async def answer(
        self, request: Request, body: Buffer, gone: Callable[[], bool]
    ) -> Reply:
        """Answer a request; never raises but for cancellation.

        gone: says whether the client has disconnected.
        """
        try:
            methods = match(request.target)
            leads_to = methods.get(request.method)
            if leads_to is None:
                return _unserved(request.target, methods)
            if request.headers.get("content-encoding", "identity") != "identity":
                return _ENCODED
            return await self._actions[leads_to.action](request, leads_to, body, gone)
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

    async def server_metadata(self, *_: Any) -> Reply:
        return json_reply(
            orjson.dumps(
                {"name": "kserve-lite", "version": __version__, "extensions": []}
            )
        )

    async def model_names(self, *_: Any) -> Reply:
        return json_reply(orjson.dumps({"models": self.dataplane.names()}))

    async def model_metadata(self, request: Request, leads_to: Match, *_: Any) -> Reply:
        model = self.dataplane.get(leads_to.model, leads_to.version)
        return json_reply(
            orjson.dumps(
                {
                    "name": model.name,
                    "versions": self.dataplane.registry.versions(model.name),
                    "platform": "python",
                    "inputs": [_tensor_metadata(spec) for spec in model.inputs],
                    "outputs": [_tensor_metadata(spec) for spec in model.outputs],
                }
            )
        )

    async def v1_ready(self, request: Request, leads_to: Match, *_: Any) -> Reply:
        model = self.dataplane.get(leads_to.model, leads_to.version)
        await self.dataplane.check(model)
        return json_reply(orjson.dumps({"name": model.name, "ready": True}))

    v2_ready = v1_ready

    async def v1_predict(
        self,
        request: Request,
        leads_to: Match,
        body: Buffer,
        gone: Callable[[], bool],
        verb: Stage = _PREDICT,
    ) -> Reply:
        dataplane = self.dataplane
        model = dataplane.find(leads_to.model)
        if model.is_checked:
            await dataplane.check(model)
        plan = model.plan(verb)
        if not plan:
            raise Unsupported(f"Model {model.name} has no {verb} handler.")
        context = _context(request, model, "v1", gone)
        entry = plan[0]
        payload: Any
        if entry.form is _JSON_FORM:
            payload = v1.decode(body)
        else:
            payload = v1.decode_tensors(
                body,
                model_name=model.name,
                datatype_of=lambda name: declared_datatype(entry, name),
                unnamed=unnamed_input(entry),
            )
        answer = await dataplane.infer(model, plan, payload, context)
        try:
            own = _own_headers(context) if context.response_headers else ()
            if isinstance(answer, JsonAnswer):
                headers = _with_type(own) if own else _JSON_ONLY
                return Reply(200, headers, v1.encode(answer.value))
            if isinstance(answer, InferResponse):
                key = "predictions" if verb is _PREDICT else "explanations"
                return Reply(200, _with_type(own), v1.encode_tensors(answer, key))
            if isinstance(answer, RawAnswer):
                return Reply(200, own, answer.data)
        except (TypeError, ValueError) as error:
            raise self.dataplane.model_failed(model, context, error) from error
        return await self._v1_stream(model, context, answer)

    async def v1_explain(
        self,
        request: Request,
        leads_to: Match,
        body: Buffer,
        gone: Callable[[], bool],
    ) -> Reply:
        return await self.v1_predict(request, leads_to, body, gone, Stage.EXPLAIN)

    async def v2_infer(
        self,
        request: Request,
        leads_to: Match,
        body: Buffer,
        gone: Callable[[], bool],
    ) -> Reply:
        model = self.dataplane.find(leads_to.model, leads_to.version)
        if model.is_checked:
            await self.dataplane.check(model)
        context = _context(request, model, "v2", gone)
        if "inference-header-content-length" in request.headers:
            raise Unsupported(
                "Binary tensors are not served yet: send the tensors as JSON, without "
                "the header inference-header-content-length."
            )
        payload = v2.decode(body, model_name=model.name)
        plan = model.plan(_PREDICT)
        answer = await self.dataplane.infer(model, plan, payload, context)
        try:
            own = _own_headers(context)
            if isinstance(answer, RawAnswer):
                return Reply(200, own, answer.data)
            if isinstance(answer, InferResponse):
                typed = tuple(pair for pair in own if pair[0] != b"content-type")
                return Reply(200, (JSON, *typed), v2.encode(answer))
            raise TypeError(f"a V2 answer cannot be a {type(answer).__name__}")
        except (TypeError, ValueError) as error:
            raise self.dataplane.model_failed(model, context, error) from error

    async def _v1_stream(
        self, model: Model, context: Context, answer: StreamAnswer
    ) -> Reply:
        """Begin a stream: only with its first item are headers and success known."""
        items = answer.items
        try:
            first = await anext(items, b"")
            headers = _own_headers(context)
            if not isinstance(first, (str, bytes)):
                headers = _with_type(headers, b"application/x-ndjson")
            head = _item(first)
        except (Exception, SystemExit) as error:  # user code may raise anything
            await items.aclose()
            if isinstance(error, InferenceFault):
                raise
            raise self.dataplane.model_failed(model, context, error) from error
        return Reply(200, headers, self._rest(head, items, model, context))

    async def _rest(
        self,
        head: bytes,
        items: AsyncGenerator[Any, None],
        model: Model,
        context: Context,
    ) -> AsyncGenerator[bytes, None]:
        try:
            yield head
            async for item in items:
                yield _item(item)
        except (Exception, SystemExit) as error:  # user code may raise anything
            # The status is sent: the transport cuts the stream short, which every
            # client sees as an error.
            raise self.dataplane.model_failed(model, context, error) from error
        finally:
            await items.aclose()


# RFC 9110 section 15.5.16: the body of such a request would be read as it is.
_ENCODED = error_reply(
    415,
    "Bodies are read as they are: send this one without Content-Encoding.",
    ((b"accept-encoding", b"identity"),),
)


def _item(item: object) -> bytes:
    """One item of a stream: text and bytes as they are, else one line of JSON."""
    if isinstance(item, bytes):
        return item
    if isinstance(item, str):
        return item.encode()
    return v1.encode(item) + b"\n"


def _context(
    request: Request, model: Model, protocol: str, gone: Callable[[], bool]
) -> Context:
    headers = request.headers
    deadline = asked_deadline(headers) if "x-request-timeout-ms" in headers else None
    return Context(model.name, model.version, protocol, headers, deadline, gone)


def _own_headers(context: Context) -> RawHeaders:
    """The headers that the handler set, less those that frame the message.

    Raises ValueError for a name or value that would break the message (RFC 9110 5.5).
    """
    raw = []
    for name, value in context.response_headers.items():
        name, value = name.lower(), str(value).strip(" \t")
        if not _TOKEN.fullmatch(name) or not _VALUE.fullmatch(value):
            raise ValueError(f"the response header {name!r} has a forbidden character")
        if name not in _FRAMING:
            raw.append((name.encode("ascii"), value.encode("latin-1")))
    return tuple(raw)


def _with_type(own: RawHeaders, content_type: bytes = JSON[1]) -> RawHeaders:
    """Add a content type unless the handler set one."""
    if any(name == b"content-type" for name, _ in own):
        return own
    return ((b"content-type", content_type), *own)


def _tensor_metadata(spec: Any) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": spec.shape}


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
