"""The routes that run a model: V1, V2 and generate, a request in and a `Reply` out.

Order of a prediction: the model exists (404), is ready (503), the body is read (400),
the model runs. Each ends in `DataPlane.infer`; what differs is the codec. A V1 request
may be a CloudEvent: then its answer is one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any, NamedTuple

from kserve_lite.codecs import cloudevents, generate, v1, v2
from kserve_lite.codecs.cloudevents import Mode
from kserve_lite.codecs.json_tensors import loads
from kserve_lite.dispatch.binding import (
    declared_datatype,
    text_name,
    unnamed_input,
)
from kserve_lite.dispatch.dataplane import DataPlane
from kserve_lite.errors import InferenceFault, InvalidInput, Unsupported
from kserve_lite.handlers import Form, Stage
from kserve_lite.messages import (
    Answer,
    Context,
    InferResponse,
    JsonAnswer,
    RawAnswer,
    StreamAnswer,
    asked_deadline,
)
from kserve_lite.model import Model, Plan
from kserve_lite.records import Record
from kserve_lite.rest.headers import (
    JSON_SIZE,
    own_headers,
    with_fields,
    with_type,
    without_type,
)
from kserve_lite.rest.replies import JSON, Reply, error_body, error_reply, json_reply
from kserve_lite.rest.routes import Match
from kserve_lite.wire.events import Buffer, RawHeaders, Request, make

_JSON_ONLY: RawHeaders = (JSON,)
_BINARY = (b"content-type", b"application/octet-stream")
_EVENTS: RawHeaders = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
)
# The content types of nearly all V1 requests; what has another may be an event.
_PLAIN = frozenset((None, "application/json"))
_STRUCTURED: RawHeaders = ((b"content-type", cloudevents.STRUCTURED_TYPE.encode()),)
_NO_SUCH_EVENTS = error_reply(
    415,
    "CloudEvents come one at a time here: with their attributes as ce- headers, or as "
    f"{cloudevents.STRUCTURED_TYPE}.",
    ((b"accept", f"application/json, {cloudevents.STRUCTURED_TYPE}".encode()),),
)
# Globals, since reading a member off its class costs 0.12 us in Python 3.11.
_PREDICT = Stage.PREDICT
_JSON_FORM = Form.JSON
# What the rows of a V1 answer are called.
_KEYS = {_PREDICT: "predictions", Stage.EXPLAIN: "explanations"}


class _Generated(NamedTuple):
    """An answer of the generate extension, and what writing it takes."""

    model: Model
    plan: Plan
    context: Context
    answer: Answer
    request_id: str | None


class Predictions:
    """Answers requests to the models behind a data plane."""

    def __init__(self, dataplane: DataPlane, events: cloudevents.EventSettings) -> None:
        self.dataplane = dataplane
        self._event_settings = events

    async def v1_predict(
        self,
        request: Request,
        leads_to: Match,
        body: Buffer,
        record: Record,
        verb: Stage = _PREDICT,
    ) -> Reply:
        dataplane = self.dataplane
        model = dataplane.find(leads_to.model)
        if model.is_checked:
            await dataplane.check(model)
        plan = model.plan(verb)
        if not plan:
            raise Unsupported(f"Model {model.name} has no {verb} handler.")
        context = _context(request, model, "v1", record)
        asked = request.headers
        if "ce-specversion" in asked or asked.get("content-type") not in _PLAIN:
            mode = cloudevents.mode_of(asked)
            if mode is not None:
                return await self._v1_event(mode, model, context, body, verb)
        entry = plan[0]
        payload: Any
        if entry.form is _JSON_FORM:
            payload = loads(body) if model.any_json else v1.decode(body)
        else:
            payload = v1.decode_tensors(
                body,
                model_name=model.name,
                datatype_of=lambda name: declared_datatype(entry, name),
                unnamed=unnamed_input(entry),
            )
        answer = await dataplane.infer(model, plan, payload, context)
        try:
            own = own_headers(context) if context.response_headers else ()
            if isinstance(answer, JsonAnswer):
                headers = with_type(own) if own else _JSON_ONLY
                return make(Reply, (200, headers, v1.encode(answer.value)))
            if isinstance(answer, InferResponse):
                rows = v1.encode_tensors(answer, _KEYS[verb])
                return Reply(200, with_type(own), rows)
            if isinstance(answer, RawAnswer):
                return Reply(200, own, answer.data)
        except (TypeError, ValueError) as error:
            raise dataplane.model_failed(model, context, error) from error
        return await self._v1_stream(model, context, answer)

    async def v1_explain(
        self, request: Request, leads_to: Match, body: Buffer, record: Record
    ) -> Reply:
        return await self.v1_predict(request, leads_to, body, record, Stage.EXPLAIN)

    async def _v1_event(
        self, mode: Mode, model: Model, context: Context, body: Buffer, verb: Stage
    ) -> Reply:
        """Answer a CloudEvent by another one, of the same mode.

        The answer's data is what a V1 request would get. JSON has the content type of
        JSON, whatever the handler says; text and bytes have the handler's, else that of
        text where they are UTF-8. A stream is the body of a binary event as it comes,
        and too much for a structured one.
        """
        if mode is Mode.OTHER:
            return _NO_SUCH_EVENTS
        if not cloudevents.prepared():
            await asyncio.to_thread(cloudevents.prepare)
        plan = model.plan(verb)
        entry = plan[0]
        build = None
        if entry.form is not _JSON_FORM:
            build = partial(
                v1.build_tensors,
                model_name=model.name,
                datatype_of=partial(declared_datatype, entry),
                unnamed=unnamed_input(entry),
            )
        check = (lambda value: value) if model.any_json else v1.checked
        event = cloudevents.read_event(mode, context.headers, body, build, check)
        answer = await self.dataplane.infer(model, plan, event.payload, context)
        is_structured = mode is Mode.STRUCTURED
        if is_structured and isinstance(answer, StreamAnswer):
            await answer.items.aclose()
            raise Unsupported(
                "The model answers with a stream, which a structured CloudEvent cannot "
                "hold: send a binary one."
            )
        attributes = cloudevents.answering(event, model.name, self._event_settings)
        fields = () if is_structured else cloudevents.header_fields(attributes)
        if isinstance(answer, StreamAnswer):
            reply = await self._v1_stream(model, context, answer, is_event=True)
            return reply._replace(headers=with_fields(fields, reply.headers))
        try:
            own = own_headers(context)
            content_type = b""
            if isinstance(answer, JsonAnswer):
                data = v1.encode(answer.value)
            elif isinstance(answer, InferResponse):
                data = v1.encode_tensors(answer, _KEYS[verb])
            else:
                data = answer.data
                typed = dict(with_type(own, cloudevents.raw_type(data)))
                content_type = typed[b"content-type"]
            own = without_type(own)
            if is_structured:
                said = content_type.decode("latin-1")
                data = cloudevents.envelope(attributes, data, said)
                return Reply(200, (*_STRUCTURED, *own), data)
        except (TypeError, ValueError) as error:
            raise self.dataplane.model_failed(model, context, error) from error
        own = with_type(own, content_type or JSON[1])
        return Reply(200, with_fields(fields, own), data)

    async def _v1_stream(
        self,
        model: Model,
        context: Context,
        answer: StreamAnswer,
        *,
        is_event: bool = False,
    ) -> Reply:
        """Begin a stream: only with its first item are headers and success known."""
        items = answer.items
        try:
            first = await anext(items, b"")
            headers = own_headers(context)
            if not isinstance(first, (str, bytes)):
                headers = with_type(headers, b"application/x-ndjson")
            elif is_event:
                is_text = isinstance(first, str)
                kind = cloudevents.TEXT if is_text else cloudevents.OCTETS
                headers = with_type(headers, kind)
            head = _item(first)
        except (Exception, SystemExit) as error:  # user code may raise anything
            await items.aclose()
            if isinstance(error, InferenceFault):
                raise
            raise self.dataplane.model_failed(model, context, error) from error
        return Reply(200, headers, self._v1_rest(head, items, model, context))

    async def _v1_rest(
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

    async def v2_infer(
        self, request: Request, leads_to: Match, body: Buffer, record: Record
    ) -> Reply:
        dataplane = self.dataplane
        model = dataplane.find(leads_to.model, leads_to.version)
        if model.is_checked:
            await dataplane.check(model)
        context = _context(request, model, "v2", record)
        json_size = None
        if JSON_SIZE in request.headers:
            json_size = _json_size(request.headers[JSON_SIZE], body, model)
        payload = v2.decode(body, model_name=model.name, json_size=json_size)
        answer = await dataplane.infer(model, model.plan(_PREDICT), payload, context)
        try:
            own = own_headers(context) if context.response_headers else ()
            if isinstance(answer, RawAnswer):
                return Reply(200, own, answer.data)
            if not isinstance(answer, InferResponse):
                raise TypeError(f"a V2 answer cannot be a {type(answer).__name__}")
            own = without_type(own)
            pieces, json_size = v2.encode(answer, payload)
        except (TypeError, ValueError) as error:
            raise dataplane.model_failed(model, context, error) from error
        if json_size is None:
            return Reply(200, (JSON, *own), pieces[0])
        size = (JSON_SIZE.encode(), b"%d" % json_size)
        return Reply(200, (_BINARY, size, *own), pieces)

    async def generate(
        self, request: Request, leads_to: Match, body: Buffer, record: Record
    ) -> Reply:
        generated = await self._generated(request, leads_to, body, record)
        answer = generated.answer
        if isinstance(answer, StreamAnswer):
            answer = await _joined(answer)
        written = self._generate_body(generated, answer)
        own = without_type(self._headers_of(generated))
        return json_reply(written, headers=own)

    async def generate_stream(
        self, request: Request, leads_to: Match, body: Buffer, record: Record
    ) -> Reply:
        """Begin a stream: only with its first item are headers and success known."""
        generated = await self._generated(request, leads_to, body, record)
        answer = generated.answer
        items = answer.items if isinstance(answer, StreamAnswer) else _one(answer)
        try:
            first = await anext(items, None)
            head = b"" if first is None else self._event(generated, first)
            headers = _EVENTS + without_type(self._headers_of(generated))
        except BaseException:
            await items.aclose()
            raise
        return Reply(200, headers, self._events(head, items, generated))

    async def _generated(
        self, request: Request, leads_to: Match, body: Buffer, record: Record
    ) -> _Generated:
        dataplane = self.dataplane
        model = dataplane.find(leads_to.model, leads_to.version)
        if model.is_checked:
            await dataplane.check(model)
        context = _context(request, model, "generate", record)
        members = generate.decode(body)
        plan = model.plan(_PREDICT)
        payload: Any = members
        if plan[0].form is not _JSON_FORM:
            payload = generate.tensors_of(
                members,
                model_name=model.name,
                inputs={spec.name or "": spec for spec in model.inputs},
            )
        answer = await dataplane.infer(model, plan, payload, context)
        return _Generated(model, plan, context, answer, members.get("id"))

    async def _events(
        self,
        head: bytes,
        items: AsyncGenerator[Any, None],
        generated: _Generated,
    ) -> AsyncGenerator[bytes, None]:
        async with aclosing(items):
            try:
                yield head
                async for answer in items:
                    yield self._event(generated, answer)
            except InferenceFault as fault:
                # The status is sent: the client learns of it as Triton's clients do.
                yield generate.event(error_body(fault))

    def _event(self, generated: _Generated, answer: Answer) -> bytes:
        return generate.event(self._generate_body(generated, answer))

    def _generate_body(self, generated: _Generated, answer: Answer) -> bytes:
        model, context = generated.model, generated.context
        try:
            return generate.encode(
                answer,
                text=text_name(generated.plan),
                model=(model.name, model.version),
                request_id=generated.request_id,
            )
        except (TypeError, ValueError) as error:
            raise self.dataplane.model_failed(model, context, error) from error

    def _headers_of(self, generated: _Generated) -> RawHeaders:
        try:
            return own_headers(generated.context)
        except ValueError as error:
            model, context = generated.model, generated.context
            raise self.dataplane.model_failed(model, context, error) from error


async def _joined(answer: StreamAnswer) -> Answer:
    """A stream as one answer: pieces of text are one text.

    Raises InvalidInput for several items of anything else.
    """
    text: list[bytes] = []
    async with aclosing(answer.items) as items:
        async for item in items:
            if not isinstance(item, RawAnswer):
                if not text and await anext(items, None) is None:
                    return item  # type: ignore[no-any-return]
                raise InvalidInput(
                    "The model answers with several items, which only generate_stream "
                    "and ModelStreamInfer can send."
                )
            text.append(item.data)
    return RawAnswer(b"".join(text))


async def _one(answer: Answer) -> AsyncGenerator[Answer, None]:
    yield answer


def _item(item: object) -> bytes:
    """One item of a V1 stream: text and bytes as they are, else one line of JSON."""
    if isinstance(item, bytes):
        return item
    if isinstance(item, str):
        return item.encode()
    return v1.encode(item) + b"\n"


def _json_size(text: str, body: Buffer, model: Model) -> int:
    """The length that the binary tensor extension's header gives."""
    if text.isascii() and text.isdecimal() and len(text) < 16:
        return int(text)
    if text.startswith("-"):  # KServe's clients are told what is wrong with the body
        v2.decode(body, model_name=model.name)
    raise InvalidInput(
        f"The header {JSON_SIZE} must be a whole number: the bytes of the JSON that "
        "stands before the tensors."
    )


def _context(request: Request, model: Model, protocol: str, record: Record) -> Context:
    headers = request.headers
    deadline = asked_deadline(headers) if "x-request-timeout-ms" in headers else None
    return Context(model.name, model.version, protocol, headers, deadline, record)
