"""A server without a port: each connection is a pair of sockets, its other end ours.

All the rest is real: the transports, both versions of HTTP, h11 and grpclib as clients.
It runs in the caller's event loop. Nothing here knows what the messages say.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import anyio
import h11

from kserve_lite.counters import State
from kserve_lite.model import Model
from kserve_lite.server.application import Application
from kserve_lite.server.settings import Settings
from kserve_lite.transports.listener import Listener
from kserve_lite.transports.timeouts import READ_SIZE

if TYPE_CHECKING:
    from grpclib.client import Channel, Stream

# Who asks, as servers, logs and handlers see it.
_AUTHORITY = "kserve-lite.test"


class InMemory:
    """Models behind the server's own wire, within `running()`.

    Entering it loads the models and raises StartupError where one fails. Leaving it
    cuts what is still in flight and unloads them.
    """

    def __init__(self, models: tuple[Model, ...], settings: Settings) -> None:
        self._models = models
        self._settings = settings
        self._listener: Listener | None = None
        self._channel: Channel | None = None

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        settings = self._settings
        application = Application(self._models, settings)
        self._listener = listener = Listener(
            application.answer,
            rpc=application.call,
            refuses=application.refuses,
            ended=application.ended,
            sheet=application.sheet,
            limits=settings.connection,
            wire_limits=settings.wire,
        )
        try:
            application.register()
            application.sheet.state = State.SERVING
            await application.load()
            application.sheet.state = State.READY
            yield
        finally:
            self._listener = None
            application.stop()
            if self._channel is not None:
                self._channel.close()
                self._channel = None
            with anyio.CancelScope(shield=True):
                await listener.abort()
                await application.unload()

    def _entered(self) -> Listener:
        if self._listener is None:
            raise RuntimeError("the client is not entered: use it as a context manager")
        return self._listener

    async def _connect(self) -> socket.socket:
        """Open a connection; return the client's end."""
        listener = self._entered()
        ours, theirs = socket.socketpair()
        try:
            await listener.connect(theirs)
        except BaseException:
            ours.close()
            theirs.close()
            raise
        return ours

    async def http(
        self, method: str, target: str, body: bytes, headers: Mapping[str, str]
    ) -> AsyncGenerator[h11.Response | bytes]:
        """Send a request on a connection of its own; give its answer's head, then body.

        Closing the generator closes the connection. Raises ConnectionError where the
        answer ends before its end, ValueError for what is no request.
        """
        fields = {"host": _AUTHORITY}
        if body or method not in ("GET", "HEAD"):
            fields["content-length"] = str(len(body))
        fields |= {name.lower(): value for name, value in headers.items()}
        wire = h11.Connection(h11.CLIENT)
        try:
            head = wire.send(
                h11.Request(method=method, target=target, headers=[*fields.items()])
            )
            wire.send(h11.Data(body))
            wire.send(h11.EndOfMessage())
        except h11.LocalProtocolError as error:
            raise ValueError(f"this is no HTTP request: {error}") from error
        reader, writer = await asyncio.open_unix_connection(sock=await self._connect())
        try:
            with suppress(ConnectionError):  # it may be refused before all is sent
                writer.writelines((head or b"", body))
                await writer.drain()
            while not isinstance(event := await _next(wire, reader), h11.EndOfMessage):
                if isinstance(event, h11.Response):
                    yield event
                elif isinstance(event, h11.Data):
                    yield bytes(event.data)
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    def rpc(
        self,
        path: str,
        kinds: tuple[Any, Any],
        metadata: Mapping[str, str],
        *,
        streams: bool,
    ) -> Stream[Any, Any]:
        """Begin a gRPC call, on a connection that all of them share.

        kinds: the message classes of request and reply.
        """
        from grpclib.const import Cardinality

        self._entered()
        if self._channel is None:
            self._channel = self._make_channel()
        kind = Cardinality.STREAM_STREAM if streams else Cardinality.UNARY_UNARY
        return self._channel.request(path, kind, *kinds, metadata=dict(metadata))

    def _make_channel(self) -> Channel:
        from grpclib.client import Channel
        from grpclib.protocol import H2Protocol

        connect = self._connect

        class OfPair(Channel):
            # The one place in grpclib where a connection comes from.
            async def _create_connection(self) -> H2Protocol:
                _, protocol = await self._loop.create_unix_connection(
                    self._protocol_factory, sock=await connect()
                )
                return protocol

        return OfPair(_AUTHORITY, 80)


async def _next(wire: h11.Connection, reader: asyncio.StreamReader) -> Any:
    """The next event of an answer."""
    try:
        while (event := wire.next_event()) is h11.NEED_DATA:
            wire.receive_data(await reader.read(READ_SIZE))
    except (h11.RemoteProtocolError, ConnectionError) as error:
        raise ConnectionError("the answer was cut short") from error
    return event
