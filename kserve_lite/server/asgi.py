"""The REST API as an ASGI 3 application: to run under uvicorn, or mounted in another.

A request takes the same way as over our own sockets, through `transports.exchange`, on
a stream that speaks ASGI's messages. What an ASGI server does is left to it: sockets,
TLS, HTTP's framing, slow readers, `date` and `server`. gRPC needs trailers, which ASGI
has not: `serve()` beside the other server has them.
https://asgi.readthedocs.io/en/latest/specs/: www and lifespan.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import TracebackType
from typing import Any

import anyio

from kserve_lite.counters import State
from kserve_lite.errors import (
    KServeLiteError,
    ServerNotReady,
    SettingsError,
    StartupError,
)
from kserve_lite.model import Model
from kserve_lite.records import Record
from kserve_lite.rest.replies import Reply, error_reply, fault_reply
from kserve_lite.server.application import Application
from kserve_lite.server.asgi_stream import (
    AsgiStream,
    Disconnected,
    Message,
    Receive,
    Refused,
    Scope,
    Send,
    read_body,
    split_target,
)
from kserve_lite.server.settings import Settings, known_settings, make_settings
from kserve_lite.transports.exchange import cut, exchange, record_of, send_refusal
from kserve_lite.transports.timeouts import CANCEL_AGAIN
from kserve_lite.wire.events import Buffer, Headers, Request

log = logging.getLogger("kserve_lite")

# The settings that mean something where another server listens.
_USED = {
    "access_log",
    "body_timeout",
    "ce_merge",
    "ce_source",
    "ce_type",
    "enable_tracing",
    "max_body_size",
    "model_dir",
    "model_name",
    "storage_allow_patterns",
    "storage_ignore_patterns",
    "storage_uri",
}


def asgi(*models: Model, **settings: Any) -> Asgi:
    """Return the REST API of models as an ASGI application.

    settings: as `serve()` takes them, less those of what it does not do: it does not
    listen, write log files or start processes.

    Run it as it is (`uvicorn app:app`): its lifespan loads the models. Mounted in
    another application it gets none, so that one's lifespan enters it:

        app = asgi(model)

        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            async with app:
                yield

        outer = FastAPI(lifespan=lifespan)
        outer.mount("/models", app)

    Raises SettingsError for settings that it has no use for, StartupError without a
    model. Entering it raises StartupError for a load that fails.
    """
    made = make_settings({"enable_grpc": False} | settings)
    known = known_settings()
    for name in settings:
        if known[name].group != "dispatch" and name not in _USED:
            raise SettingsError(
                f"asgi() has no use for {name}: that is for the server that runs the "
                "application"
            )
    if not models:
        raise StartupError("there is no model to serve: give at least one")
    return Asgi(models, made)


class Asgi:
    """An ASGI application; made by `asgi()`."""

    def __init__(self, models: tuple[Model, ...], settings: Settings) -> None:
        self.settings = settings
        self._models = models
        self._application: Application | None = None
        self._life: AbstractAsyncContextManager[None] | None = None
        self._has_warned = False
        # What a stop waits for, from a request's first message to its answer's last;
        # and of those the bodies that still arrive, and the answers in the making.
        self._requests: set[asyncio.Future[None]] = set()
        self._arriving: set[anyio.CancelScope] = set()
        self._exchanges: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Asgi:
        """Load the models; raise StartupError, in one line, where one fails."""
        if self._life is not None:
            raise StartupError(
                "this asgi() application runs already: let either the ASGI server's "
                "lifespan start it or `async with`, not both"
            )
        self._life = self._live()
        try:
            await self._life.__aenter__()
        except BaseException:
            self._life = None
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> bool | None:
        """Finish what is in flight, within the grace period, and unload the models."""
        if self._life is None:
            return None
        try:
            return await self._life.__aexit__(exc_type, exc, tb)
        finally:
            self._life = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one scope: of type http or lifespan; a websocket is refused."""
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1000})  # 403, says the spec
        else:
            raise NotImplementedError("the ASGI scope is neither http nor lifespan")

    # --- its life ------------------------------------------------------------------

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await self.__aenter__()
        except KServeLiteError as error:
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        try:
            await send({"type": "lifespan.startup.complete"})
            await receive()
        finally:
            left = await self._leave()
        await send(left)

    async def _leave(self) -> Message:
        """Stop, and return how that went."""
        try:
            await self.__aexit__(None, None, None)
        except Exception as error:
            log.exception("an asgi() application failed to stop")
            message = f"{type(error).__name__}: {error}"
            return {"type": "lifespan.shutdown.failed", "message": message}
        return {"type": "lifespan.shutdown.complete"}

    @asynccontextmanager
    async def _live(self) -> AsyncGenerator[None]:
        # A new one each time: test clients start an application for every test.
        application = Application(self._models, self.settings)
        try:
            application.register()
            application.sheet.state = State.SERVING
            self._application = application
            await application.load()
            application.sheet.state = State.READY
            yield
        finally:
            self._application = None
            application.sheet.state = State.STOPPING
            with anyio.CancelScope(shield=True):
                application.stop()
                await self._finish(self.settings.dispatch.grace_period)
                await application.unload()

    async def _finish(self, seconds: float) -> None:
        """Let what is in flight finish, so many seconds; then end it."""
        if not self._requests:
            return
        _, late = await asyncio.wait(self._requests, timeout=seconds)
        if late:
            for arriving in self._arriving:
                arriving.cancel()
            await _end(set(self._exchanges))
            # They are told so, unless their clients do not even read that.
            await asyncio.wait(late, timeout=CANCEL_AGAIN)

    # --- a request -----------------------------------------------------------------

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        application = self._application
        stream = AsgiStream(scope, send)
        headers = Headers(tuple((bytes(n), bytes(v)) for n, v in scope["headers"]))
        prefix, target = split_target(scope)
        request = Request(1, scope["method"], target, headers)
        if application is None:
            if self._life is None:
                self._warn()
            send_refusal(fault_reply(ServerNotReady()), request, stream, _unheard)
            await stream.flush()
            return
        ended = asyncio.get_running_loop().create_future()
        self._requests.add(ended)
        try:
            body = await self._body(
                application, request, stream=stream, receive=receive
            )
            if body is not None:
                await self._answer(
                    application,
                    request,
                    body,
                    stream=stream,
                    receive=receive,
                    prefix=prefix,
                )
        finally:
            self._requests.discard(ended)
            ended.set_result(None)

    async def _body(
        self,
        application: Application,
        request: Request,
        *,
        stream: AsgiStream,
        receive: Receive,
    ) -> Buffer | None:
        """A request's body; None where it does not come and all has been said."""
        refused: Reply
        with anyio.CancelScope() as arriving:
            self._arriving.add(arriving)
            try:
                return await read_body(
                    request.headers,
                    receive,
                    limit=self.settings.wire.max_body_size,
                    seconds=self.settings.connection.body_timeout,
                )
            except Disconnected:
                cut(request, stream, application.ended)
                return None
            except Refused as error:
                refused = error_reply(error.status, error.reason)
            finally:
                self._arriving.discard(arriving)
        if arriving.cancelled_caught:  # the grace period of a stop is over
            refused = fault_reply(ServerNotReady())
        if stream.http < "2":
            # The rest of the body is not read, so nothing can follow it.
            close = (b"connection", b"close")
            refused = refused._replace(headers=(*refused.headers, close))
        send_refusal(refused, request, stream, application.ended)
        await stream.flush()
        return None

    async def _answer(
        self,
        application: Application,
        request: Request,
        body: Buffer,
        *,
        stream: AsgiStream,
        receive: Receive,
        prefix: bytes,
    ) -> None:
        async def answer(
            request: Request, body: Buffer | None, record: Record
        ) -> Reply:
            reply = await application.answer(request, body, record)
            return _seen_from(prefix, reply, record) if prefix else reply

        def ended(record: Record) -> None:
            stream.settle(record)
            application.ended(record)

        async def run() -> None:
            await exchange(answer, request, body, stream, ended)
            if stream.complete:
                await stream.drain()

        # A task of its own, that it can be cancelled as over our own connections: once,
        # not at every await as by a cancel scope, so that handlers can clean up.
        answering = asyncio.get_running_loop().create_task(run())
        self._exchanges.add(answering)
        watching = asyncio.get_running_loop().create_task(
            _watch(receive, stream, answering)
        )
        try:
            await asyncio.wait((answering,))
        finally:
            with anyio.CancelScope(shield=True):
                await _end({answering, watching})
                # What is wrong with receiving shows in the answer, if anywhere.
                await asyncio.gather(watching, return_exceptions=True)
            self._exchanges.discard(answering)
            if not stream.settled:  # cancelled before the task's first step
                ended(record_of(request, stream))
        await stream.close()

    def _warn(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            log.error(
                "an asgi() application got a request and is not running, so that no "
                "model is loaded: enter it, `async with app:`, in the lifespan of the "
                "application around it, or have the ASGI server run lifespans"
            )


async def _watch(
    receive: Receive, stream: AsgiStream, answering: asyncio.Task[None]
) -> None:
    """Cancel what answers when the client goes.

    Nothing else may come after the body; what comes all the same, from a middleware
    that replays it without end say, tells nothing.
    """
    message = await receive()
    if message["type"] == "http.disconnect":
        stream.lost = True
        answering.cancel()


async def _end(tasks: set[asyncio.Task[None]]) -> None:
    """Cancel tasks until they have ended: some go on in spite of the first time."""
    while tasks := {task for task in tasks if not task.done()}:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=CANCEL_AGAIN)


def _seen_from(prefix: bytes, reply: Reply, record: Record) -> Reply:
    """An answer that has paths in it, for an application that is mounted there."""
    if reply.status == 307:
        moved = [(n, prefix + v if n == b"location" else v) for n, v in reply.headers]
        return reply._replace(headers=tuple(moved))
    if record.action == "openapi" and isinstance(reply.body, bytes):
        document = {**json.loads(reply.body), "servers": [{"url": prefix.decode()}]}
        return reply._replace(body=json.dumps(document).encode())
    return reply


def _unheard(_: Record) -> None:
    """Nobody counts the requests of an application that does not run."""
