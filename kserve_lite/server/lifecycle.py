"""A server's life: startup, serve, drain, stop.

It listens before the models load, so that liveness answers from the first moment; it is
ready when every model is. A stop, however it comes, accepts nothing more, finishes what
is in flight within the grace period, unloads, and leaves nothing behind.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import TracebackType
from typing import Any

import anyio

from kserve_lite.model import Model
from kserve_lite.server.application import Application
from kserve_lite.server.settings import Settings, make_settings
from kserve_lite.server.sockets import PortInUse, listen_on
from kserve_lite.server.tls import tls_context
from kserve_lite.transports.listener import Listener

log = logging.getLogger("kserve_lite")


class Server:
    """Serves models inside a running event loop; made by `serve()`.

    Use it as `async with serve(model) as server:`, which enters when every model is
    ready and stops at the end of the block, or `await serve(model)`, which serves until
    `server.stop()` or cancellation.
    """

    def __init__(self, models: tuple[Model, ...], settings: Settings) -> None:
        self.settings = settings
        self.application = Application(models, settings)
        self.dataplane = self.application.dataplane
        self.report = ""
        self._port: int | None = None
        self._grpc_port: int | None = None
        self._stopping = anyio.Event()
        # Made when it is entered: a Server may be built outside an event loop.
        self._finishing: anyio.CancelScope | None = None
        self._listener: Listener
        self._life: AbstractAsyncContextManager[None] | None = None

    @property
    def port(self) -> int:
        """The port that it listens on, also where the setting was 0."""
        if self._port is None:
            raise RuntimeError("the server does not listen yet: enter it first")
        return self._port

    @property
    def grpc_port(self) -> int | None:
        """The second port, which serves the same; None where there is none."""
        return self._grpc_port

    @property
    def url(self) -> str:
        """An URL of the server that works from this machine."""
        host = self.settings.server.host
        everywhere = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}  # noqa: S104
        shown = everywhere.get(host, f"[{host}]" if ":" in host else host)
        scheme = "https" if self.settings.server.ssl_certfile else "http"
        return f"{scheme}://{shown}:{self.port}"

    def stop(self, *, at_once: bool = False) -> None:
        """Begin to stop; with `at_once` what is in flight is cut, not finished.

        Asked for once more, `at_once` also gives up an unload handler that hangs.
        """
        self._stopping.set()
        self.application.stop()
        if at_once:
            if self._finishing is not None:
                self._finishing.cancel()
            self.application.hurry()

    @property
    def stopped(self) -> bool:
        """Whether a stop has been asked for."""
        return self._stopping.is_set()

    async def wait_stopped(self) -> None:
        """Wait until a stop is asked for."""
        await self._stopping.wait()

    async def __aenter__(self) -> Server:
        self._life = self._live()
        await self._life.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> bool | None:
        if self._life is None:
            return None
        return await self._life.__aexit__(exc_type, exc, tb)

    def __await__(self) -> Generator[Any, None, None]:
        return self._serve().__await__()

    async def _serve(self) -> None:
        async with self:
            await self.wait_stopped()

    @asynccontextmanager
    async def _live(self) -> AsyncGenerator[None]:
        # Cancelled before it is entered if a stop at once is the first one.
        self._finishing = draining = anyio.CancelScope(shield=True)
        server = self.settings.server
        self._listener = Listener(
            self.application.rest.answer,
            rpc=self.application.rpc.answer if server.enable_grpc else None,
            tls=tls_context(
                server.ssl_certfile, server.ssl_keyfile, server.ssl_ca_certs
            ),
            limits=self.settings.connection,
            wire_limits=self.settings.wire,
        )
        try:
            await self._startup()
            yield
        finally:
            with draining:
                await self._shutdown()
            with anyio.CancelScope(shield=True):
                await self._listener.abort()
                await self.application.unload()

    async def _startup(self) -> None:
        self.application.register()
        server = self.settings.server
        sockets = listen_on(server.host, server.http_port)
        self._port = sockets[0].getsockname()[1]
        await self._listener.listen(sockets)
        if server.enable_grpc:
            await self._listen_twice()
        await self.application.load()

    async def _listen_twice(self) -> None:
        """Open the second port, unless nobody asked for it and it cannot be had."""
        server = self.settings.server
        asked = "grpc_port" in self.settings.given
        if not asked and 0 in (server.http_port, server.grpc_port):
            return
        if server.grpc_port == server.http_port != 0:
            return
        try:
            sockets = listen_on(server.host, server.grpc_port, "grpc_port")
        except PortInUse as error:
            if asked:
                raise
            log.warning("%s; without it, gRPC is served on %d", error, self.port)
            return
        self._grpc_port = sockets[0].getsockname()[1]
        await self._listener.listen(sockets)

    async def _shutdown(self) -> None:
        """Let what is in flight finish, within the grace period."""
        self.stop()
        started = time.monotonic()
        in_flight = self._listener.in_flight
        try:
            with anyio.move_on_after(self.settings.dispatch.grace_period):
                await self._listener.drain()
        finally:
            aborted = self._listener.in_flight
            self.report = (
                f"drained {max(0, in_flight - aborted)}, aborted {aborted}, "
                f"in {time.monotonic() - started:.1f} s"
            )
            log.info("stopped: %s", self.report)


def serve(*models: Model, **settings: Any) -> Server:
    """Serve models inside a running asyncio (or anyio on asyncio) program.

    settings: what the command line has as flags, by name: `http_port=0` say.

    It installs no signal handlers, configures no logging, reads no environment
    variables and leaves nothing behind. Raises SettingsError for unknown settings;
    entering it raises StartupError for a port in use or a load that fails.
    """
    return Server(models, make_settings(settings))
