"""Models and what answers for them: all of a server but its sockets.

What listens (`lifecycle.Server`), an ASGI server (`asgi.py`) and tests without a port
(`testing/`) each bring requests to one of these.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import traceback
from collections.abc import Callable, Container
from functools import cached_property
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from kserve_lite.counters import Board
from kserve_lite.dispatch.dataplane import DataPlane
from kserve_lite.dispatch.repository import Repository, Source
from kserve_lite.dispatch.statistics import Spent
from kserve_lite.errors import StartupError
from kserve_lite.handlers import Stage
from kserve_lite.metrics import IN_FLIGHT, RequestCounts
from kserve_lite.model import Model
from kserve_lite.records import Record
from kserve_lite.registry import Registry
from kserve_lite.rest.endpoints import Endpoints
from kserve_lite.rest.replies import Reply
from kserve_lite.server.access import AccessLog
from kserve_lite.server.metrics import Metrics
from kserve_lite.server.settings import Settings
from kserve_lite.server.storage import fetch
from kserve_lite.telling import failed
from kserve_lite.transports.exchange import App, Rpc
from kserve_lite.wire.events import Buffer, Request

if TYPE_CHECKING:
    from kserve_lite.forwarding.models import Forwarding
    from kserve_lite.parallel.cluster import Cluster
    from kserve_lite.rpc.call import CallStream
    from kserve_lite.server.tracing import Tracing

log = logging.getLogger("kserve_lite")


class Application:
    """The models of a server, from their loading to their unloading.

    board, index: where its process counts, and the number of its sheet there.
    own_process: whether the process is the server's, not a program's that embeds it.
    source: where models come from on demand; without it there must be one.
    Whoever brings requests to `answer` and `call` tells `ended` when each is over.
    Raises StartupError without a model.
    """

    def __init__(
        self,
        models: tuple[Model, ...],
        settings: Settings,
        *,
        board: Board | None = None,
        index: int = 0,
        own_process: bool = False,
        source: Source | None = None,
    ) -> None:
        if not models and source is None:
            raise StartupError("there is no model to serve: give at least one")
        self.board = board or Board()
        self.sheet = self.board.sheets[index]
        self.models = models
        self.settings = settings
        self.dataplane = DataPlane(
            Registry(), settings.dispatch, board=self.board, index=index
        )
        self.dataplane.may_be_empty = source is not None
        self.repository = Repository(self.dataplane, source)
        self._rest = Endpoints(
            self.dataplane,
            self.repository,
            metrics=Metrics(self.board, publish=self.publish).render,
            events=settings.events,
        )
        self.refuses = self._rest.refuses
        self._own_process = own_process
        self._tracing: Tracing | None = None
        if settings.server.enable_tracing:
            from kserve_lite.server.tracing import make_tracing

            self._tracing = make_tracing(own_process=own_process)
        if self._tracing is not None:
            self.dataplane.stages.span = self._tracing.stage
        self._access = AccessLog(settings.server)
        count = RequestCounts(self.sheet, self._is_known).count
        # Who is told of requests that are over, and those of whom nobody was told yet.
        self._told: list[tuple[str, Callable[..., None]]] = [("counting", count)]
        if settings.server.access_log:
            self._told.append(("logging", self._access.write))
        self._over: list[Record] = []
        self._forwarding: Forwarding | None = None
        self._cluster: Cluster | None = None
        # Made when they are entered: this may be built outside an event loop.
        self._loading: anyio.CancelScope | None = None
        self._unloading: anyio.CancelScope | None = None

    @cached_property
    def answer(self) -> App:
        """Answers HTTP requests."""
        answer, tracing = self._rest.answer, self._tracing
        if tracing is None:
            return answer

        async def traced(
            request: Request, body: Buffer | None, record: Record
        ) -> Reply:
            tracing.begin(record)
            return await answer(request, body, record)

        return traced

    @cached_property
    def call(self) -> Rpc | None:
        """Answers gRPC calls; None where they are not to be served."""
        if not self.settings.server.enable_grpc:
            return None
        # Late: grpclib and protobuf take 0.1 s and 7 MB.
        from kserve_lite.rpc.app import Rpc as Services

        limit = self.settings.wire.max_body_size
        services = Services(self.dataplane, self.repository, max_message_size=limit)
        answer, tracing = services.answer, self._tracing
        if tracing is None:
            return answer

        async def traced(request: Request, stream: CallStream, record: Record) -> None:
            tracing.begin(record, is_call=True)
            await answer(request, stream, record)

        return traced

    def ended(self, record: Record) -> None:
        """Count and log a request that is over; raises nothing.

        Its span ends now; the rest comes in the next turn of the event loop, for all
        that have ended in this one: one by one, between other work, it takes longer.
        """
        record.took = perf_counter_ns() - record.started
        if self._tracing is not None:
            try:
                self._tracing.end(record)
            except Exception as error:  # noqa: BLE001 - span processors may be anybody's
                failed("the tracing of a request failed", error)
        self._over.append(record)
        if len(self._over) == 1:
            asyncio.get_running_loop().call_soon(self._settle)

    def _settle(self) -> None:
        over, self._over = self._over, []
        for kind, told in self._told:
            try:
                told(*over)
            except Exception as error:  # noqa: BLE001 - log handlers may be anybody's
                failed(f"the {kind} of a request failed", error)
        self.sheet.settle()

    def _is_known(self, name: str) -> bool:
        return name in self.dataplane.registry

    def publish(self) -> None:
        """Bring what holds at this moment onto the sheet."""
        in_flight = dict.fromkeys(self.dataplane.registry.names(), 0)
        for model, running in self.dataplane.running.items():
            in_flight[model.name] += running.in_flight
        for name, number in in_flight.items():
            IN_FLIGHT.on(self.sheet, name).set(number)
        self.sheet.settle()

    def register(self) -> None:
        """Make the models known, so that requests for them are "not ready" yet."""
        model_dir = Path(self.settings.server.model_dir)
        name = self.settings.server.model_name
        names = {model.name for model in self.models}
        if name and len(names) > 1:
            raise StartupError(
                f"model_name {name!r} is for one model, and there are {len(names)}: "
                f"leave it out, or serve one of {', '.join(sorted(names))}"
            )
        self._forwarding = forwarding = self._forwards()
        self.models = tuple(map(self._placed, self.models))
        for model in self.models:
            if forwarding is not None:
                forwarding.attach(model)
            model.freeze()
            model.name = name or model.name
            model.model_dir = model_dir
            self.dataplane.registry.add(model)

    def _placed(self, model: Model) -> Model:
        """The model itself, or what stands for its replicas."""
        if model.deployment is None:
            return model
        if len(self.board.sheets) > 1:
            raise StartupError(
                f"model {model.name!r} has replicas, which one process serves: leave "
                "--workers out"
            )
        # Here and not above: most servers do without.
        from kserve_lite.parallel.cluster import Cluster
        from kserve_lite.parallel.replicated import replicated

        if self._cluster is None:
            grace = self.settings.dispatch.grace_period
            self._cluster = Cluster(self.settings.parallel, grace)
        return replicated(
            model, self._cluster, self.settings.dispatch, self._count_elsewhere
        )

    def _count_elsewhere(self, model: Model, spent: Spent) -> None:
        self.dataplane.statistics_of(model).add_elsewhere(spent)

    def _forwards(self) -> Forwarding | None:
        """What forwards to other servers; None where nothing is to be."""
        given = self.settings.forwarding
        # Where it is imported, a server before this one may have forwarded for a model.
        known = "kserve_lite.forwarding.models" in sys.modules
        if not (given.predictor_host or given.explainer_host or known):
            return None
        # Late: most servers forward nothing.
        from kserve_lite.forwarding.models import Forwarding

        return Forwarding(given, max_size=self.settings.wire.max_body_size)

    async def load(self, leave_out: Container[str] = ()) -> None:
        """Load every model in turn; raise StartupError, with the place, if one fails.

        First what storage_uri names is fetched, if that has to be.

        leave_out: names of models that are as good as unloaded again. Returns early
        where a stop is asked for meanwhile.
        """
        with anyio.CancelScope() as self._loading:
            await fetch(self.settings.server, bar=self._own_process)
            for model in self.models:
                if model.name in leave_out:
                    await self.repository.unload(model)
                elif self.dataplane.accepting:
                    await self._load(model)

    async def _load(self, model: Model) -> None:
        try:
            await self.repository.load(model)
        except (Exception, SystemExit) as error:  # user code may raise anything
            log.debug("loading %s failed", model.name, exc_info=error)
            raise StartupError(
                f"model {model.name!r} failed to load: {type(error).__name__}: {error} "
                f"({_where(model, error)})"
            ) from error

    def stop(self) -> None:
        """Be ready no longer, and load nothing more."""
        self.dataplane.accepting = False
        if self._loading is not None:
            self._loading.cancel()

    def hurry(self) -> None:
        """Give up the unload handler that runs, if one does."""
        if self._unloading is not None:
            self._unloading.cancel()

    async def unload(self) -> None:
        """Unload every model, each within the grace period, and end all threads."""
        await self.repository.close()
        for model in self.dataplane.registry:
            # A handler that hangs, or waits for threads that do, must not keep it up.
            grace = self.settings.dispatch.grace_period
            with anyio.move_on_after(grace) as self._unloading:
                await self.repository.unload(model)
        self._unloading = None
        if self._forwarding is not None:
            await self._forwarding.close()
        if self._cluster is not None:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(self._cluster.close)
        self.dataplane.close()
        self._settle()
        if self._tracing is not None:
            await anyio.to_thread.run_sync(self._tracing.close)
        self._access.close()


def _where(model: Model, error: BaseException) -> str:
    """The place in the user's own file where a load failed."""
    frames = traceback.extract_tb(error.__traceback__)
    handler = model.handler(Stage.LOAD)
    code = getattr(handler.function, "__code__", None) if handler else None
    own = [frame for frame in frames if code and frame.filename == code.co_filename]
    frame = (own or list(frames))[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}, in {frame.name}"
