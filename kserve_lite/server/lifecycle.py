"""A server's life: startup, serve, drain, stop.

It listens before the models load, so that liveness answers from the first moment; it is
ready when every model is. A stop, however it comes, accepts nothing more, finishes what
is in flight within the grace period, unloads, and leaves nothing behind.
"""

from __future__ import annotations

import logging
import time
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Generator,
    Iterable,
)
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import anyio

from kserve_lite.counters import Board, State
from kserve_lite.dispatch.repository import Source
from kserve_lite.errors import InferenceFault, SettingsError
from kserve_lite.model import Model
from kserve_lite.server.application import Application
from kserve_lite.server.settings import Settings, make_settings
from kserve_lite.server.sockets import Ports, open_ports
from kserve_lite.server.tls import tls_context
from kserve_lite.transports.accepting import Share
from kserve_lite.transports.listener import Listener

log = logging.getLogger("kserve_lite")


@dataclass(frozen=True, slots=True)
class Seat:
    """What a server is given that is one of several on the same ports.

    board, index: of all of them, and the number of its own sheet. ports: they listen
    already. admitted: returns when it may accept connections, which is asked when its
    models are loaded; without it, it accepts at once. unloaded: names of models that it
    does not load. unloads: is told before it unloads its models in the end. loaded:
    names of models that clients had its siblings load, for a guest to bring.
    """

    board: Board
    index: int
    ports: Ports
    admitted: Callable[[], Awaitable[None]] | None = None
    unloaded: frozenset[str] = frozenset()
    unloads: Callable[[], Awaitable[None]] | None = None
    loaded: tuple[str, ...] = ()


class Guest(Source, Protocol):
    """A program that brings and takes models while a server of its own runs."""

    async def begin(self, server: Server) -> None:
        """Called on the event loop before the models are loaded."""

    async def end(self) -> None:
        """Called when all models are unloaded."""


class Server:
    """Serves models inside a running event loop; made by `serve()`.

    Use it as `async with serve(model) as server:`, which enters when every model is
    ready and stops at the end of the block, or `await serve(model)`, which serves until
    `server.stop()` or cancellation.
    """

    def __init__(
        self,
        models: tuple[Model, ...],
        settings: Settings,
        *,
        seat: Seat | None = None,
        own_process: bool = False,
        guest: Guest | None = None,
    ) -> None:
        self.settings = settings
        self._seat = seat
        self._guest = guest
        self.application = Application(
            models,
            settings,
            board=seat.board if seat else None,
            index=seat.index if seat else 0,
            own_process=own_process,
            source=guest,
        )
        self.dataplane = self.application.dataplane
        self.report = ""
        self.drained = self.aborted = 0
        self._ports: list[int] = []
        self._stopping = anyio.Event()
        # Made when it is entered: a Server may be built outside an event loop.
        self._finishing: anyio.CancelScope | None = None
        self._listener: Listener
        self._life: AbstractAsyncContextManager[None] | None = None

    @property
    def port(self) -> int:
        """The port that it listens on, also where the setting was 0."""
        if not self._ports:
            raise RuntimeError("the server does not listen yet: enter it first")
        return self._ports[0]

    @property
    def grpc_port(self) -> int | None:
        """The second port, which serves the same; None where there is none."""
        return self._ports[1] if len(self._ports) > 1 else None

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
        self.application.sheet.state = State.STOPPING
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
            self.application.answer,
            rpc=self.application.call,
            refuses=self.application.refuses,
            ended=self.application.ended,
            sheet=self.application.sheet,
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
                if self._seat is not None and self._seat.unloads is not None:
                    await self._seat.unloads()
                await self.application.unload()
                if self._guest is not None:
                    await self._guest.end()

    async def _startup(self) -> None:
        application, seat = self.application, self._seat
        if self._guest is not None:
            await self._guest.begin(self)
        application.register()
        ports = seat.ports if seat else open_ports(self.settings)
        self._ports = ports.numbers
        if seat is None or seat.admitted is None:
            application.sheet.state = State.SERVING
            await self._listen(ports)
            await application.load(seat.unloaded if seat else ())
            await self.bring(seat.loaded if seat else ())
            await self._loaded()
        else:
            application.sheet.state = State.STARTING
            await application.load(seat.unloaded)
            await self.bring(seat.loaded)
            await self._admission(seat.admitted)
            # Before it listens: what loads here must not make the siblings unready.
            await self._loaded()
            await self._listen(ports)

    async def bring(self, names: Iterable[str]) -> None:
        """Have the guest, if there is one, load models as its siblings have.

        What fails is logged, and is not there.
        """
        if self._guest is None:  # its models are those that it began with
            return
        for name in names:
            try:
                await self.application.repository.obey("load", name)
            except InferenceFault as error:
                log.error("model %s, which clients loaded: %s", name, error)

    async def _loaded(self) -> None:
        """Tell the siblings, if there are any, whether the models are ready."""
        is_ready = self._seat is None or await self.dataplane.own_ready()
        if not self.stopped:
            self.application.sheet.state = State.READY if is_ready else State.SERVING

    async def _listen(self, ports: Ports) -> None:
        if self.stopped:
            ports.close()
            return
        seat = self._seat
        share = Share(seat.board, seat.index) if seat else None
        for sockets in ports:
            await self._listener.listen(sockets, share)

    async def _admission(self, admitted: Callable[[], Awaitable[None]]) -> None:
        """Wait for it; or for a stop, which comes instead."""
        async with anyio.create_task_group() as tasks:

            async def give_up() -> None:
                await self.wait_stopped()
                tasks.cancel_scope.cancel()

            tasks.start_soon(give_up)
            await admitted()
            tasks.cancel_scope.cancel()

    async def _shutdown(self) -> None:
        """Let what is in flight finish, within the grace period."""
        self.stop()
        started = time.monotonic()
        in_flight = self._listener.in_flight
        try:
            with anyio.move_on_after(self.settings.dispatch.grace_period):
                await self._listener.drain()
        finally:
            self.aborted = aborted = self._listener.in_flight
            self.drained = drained = max(0, in_flight - aborted)
            self.report = report(drained, aborted, time.monotonic() - started)
            # Of several that stop the supervisor reports the sum.
            level = logging.DEBUG if self._seat else logging.INFO
            log.log(level, "stopped: %s", self.report)


def report(drained: int, aborted: int, seconds: float) -> str:
    """What a stop tells."""
    return f"drained {drained}, aborted {aborted}, in {seconds:.1f} s"


def serve(*models: Model, **settings: Any) -> Server:
    """Serve models inside a running asyncio (or anyio on asyncio) program.

    settings: what the command line has as flags, by name: `http_port=0` say.

    It installs no signal handlers, configures no logging, reads no environment
    variables and leaves nothing behind. Raises SettingsError for unknown settings;
    entering it raises StartupError for a port in use or a load that fails.
    """
    made = make_settings(settings)
    if made.server.workers > 1 or made.server.reload:
        raise SettingsError(
            "workers and reload start processes of their own, and serve() serves in "
            "the one that calls it: use run(), or the command kserve-lite run"
        )
    return Server(models, made)
