"""A server's life: startup, serve, drain, stop.

It listens before the models load, so that liveness answers from the first moment; it is
ready when every model is. A stop, however it comes, accepts nothing more, finishes what
is in flight within the grace period, unloads, and leaves nothing behind.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import AsyncGenerator, Generator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import anyio

from kserve_lite.dispatch.dataplane import DataPlane
from kserve_lite.dispatch.repository import Repository
from kserve_lite.errors import StartupError
from kserve_lite.handlers import Stage
from kserve_lite.model import Model
from kserve_lite.registry import Registry
from kserve_lite.rest.endpoints import Endpoints
from kserve_lite.server.settings import Settings, make_settings
from kserve_lite.server.sockets import PortInUse, listen_on
from kserve_lite.server.tls import tls_context
from kserve_lite.transports.listener import Listener

if TYPE_CHECKING:
    from kserve_lite.rpc.app import Rpc

log = logging.getLogger("kserve_lite")


class Server:
    """Serves models inside a running event loop; made by `serve()`.

    Use it as `async with serve(model) as server:`, which enters when every model is
    ready and stops at the end of the block, or `await serve(model)`, which serves until
    `server.stop()` or cancellation.
    """

    def __init__(self, models: tuple[Model, ...], settings: Settings) -> None:
        if not models:
            raise StartupError("there is no model to serve: give at least one")
        self.settings = settings
        self.dataplane = DataPlane(Registry(), settings.dispatch)
        self.repository = Repository(self.dataplane)
        self.report = ""
        self._models = models
        self._port: int | None = None
        self._grpc_port: int | None = None
        self._stopping = anyio.Event()
        # Made when it is entered: a Server may be built outside an event loop.
        self._loading: anyio.CancelScope | None = None
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
        self.dataplane.accepting = False
        if self._loading is not None:
            self._loading.cancel()
        if at_once and self._finishing is not None:
            self._finishing.cancel()

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
            Endpoints(self.dataplane, self.repository).answer,
            rpc=self._rpc().answer if server.enable_grpc else None,
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
                await self._dismantle()

    async def _startup(self) -> None:
        model_dir = Path(self.settings.server.model_dir)
        for model in self._models:
            model.freeze()
            model.model_dir = model_dir
            self.dataplane.registry.add(model)
        server = self.settings.server
        sockets = listen_on(server.host, server.http_port)
        self._port = sockets[0].getsockname()[1]
        await self._listener.listen(sockets)
        if server.enable_grpc:
            await self._listen_twice()
        with anyio.CancelScope() as self._loading:
            for model in self._models:
                if not self.stopped:
                    await self._load(model)

    def _rpc(self) -> Rpc:
        # Here and not above: grpclib and protobuf take 0.1 s and 7 MB.
        from kserve_lite.rpc.app import Rpc

        return Rpc(
            self.dataplane,
            self.repository,
            max_message_size=self.settings.wire.max_body_size,
        )

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

    async def _load(self, model: Model) -> None:
        try:
            await self.repository.load(model)
        except (Exception, SystemExit) as error:  # user code may raise anything
            log.debug("loading %s failed", model.name, exc_info=error)
            raise StartupError(
                f"model {model.name!r} failed to load: {type(error).__name__}: {error} "
                f"({_where(model, error)})"
            ) from error

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

    async def _dismantle(self) -> None:
        await self._listener.abort()
        await self.repository.close()
        for model in self.dataplane.registry:
            # A handler that hangs, or waits for threads that do, must not keep it up.
            grace = self.settings.dispatch.grace_period
            with anyio.move_on_after(grace) as self._finishing:
                await self.repository.unload(model)
        self.dataplane.close()


def serve(*models: Model, **settings: Any) -> Server:
    """Serve models inside a running asyncio (or anyio on asyncio) program.

    settings: what the command line has as flags, by name: `http_port=0` say.

    It installs no signal handlers, configures no logging, reads no environment
    variables and leaves nothing behind. Raises SettingsError for unknown settings;
    entering it raises StartupError for a port in use or a load that fails.
    """
    return Server(models, make_settings(settings))


def _where(model: Model, error: BaseException) -> str:
    """The place in the user's own file where a load failed."""
    frames = traceback.extract_tb(error.__traceback__)
    handler = model.handler(Stage.LOAD)
    code = getattr(handler.function, "__code__", None) if handler else None
    own = [frame for frame in frames if code and frame.filename == code.co_filename]
    frame = (own or list(frames))[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}, in {frame.name}"
