"""Models and what answers for them: all of a server but its sockets.

What listens (`lifecycle.Server`), an ASGI server (`asgi.py`) and tests without a port
(`testing.py`) each bring requests to one of these.
"""

from __future__ import annotations

import logging
import traceback
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from kserve_lite.counters import Board
from kserve_lite.dispatch.dataplane import DataPlane
from kserve_lite.dispatch.repository import Repository
from kserve_lite.errors import StartupError
from kserve_lite.handlers import Stage
from kserve_lite.model import Model
from kserve_lite.registry import Registry
from kserve_lite.rest.endpoints import Endpoints
from kserve_lite.server.settings import Settings

if TYPE_CHECKING:
    from kserve_lite.rpc.app import Rpc

log = logging.getLogger("kserve_lite")


class Application:
    """The models of a server, from their loading to their unloading.

    board, index: where its process counts, and the number of its sheet there.
    rest: answers HTTP requests. rpc: answers gRPC calls.
    Raises StartupError without a model.
    """

    def __init__(
        self,
        models: tuple[Model, ...],
        settings: Settings,
        *,
        board: Board | None = None,
        index: int = 0,
    ) -> None:
        if not models:
            raise StartupError("there is no model to serve: give at least one")
        self.board = board or Board()
        self.sheet = self.board.sheets[index]
        self.models = models
        self.settings = settings
        self.dataplane = DataPlane(Registry(), settings.dispatch)
        self.repository = Repository(self.dataplane)
        self.rest = Endpoints(self.dataplane, self.repository)
        # Made when they are entered: this may be built outside an event loop.
        self._loading: anyio.CancelScope | None = None
        self._unloading: anyio.CancelScope | None = None

    @cached_property
    def rpc(self) -> Rpc:
        # Late: grpclib and protobuf take 0.1 s and 7 MB.
        from kserve_lite.rpc.app import Rpc

        return Rpc(
            self.dataplane,
            self.repository,
            max_message_size=self.settings.wire.max_body_size,
        )

    def register(self) -> None:
        """Make the models known, so that requests for them are "not ready" yet."""
        model_dir = Path(self.settings.server.model_dir)
        for model in self.models:
            model.freeze()
            model.model_dir = model_dir
            self.dataplane.registry.add(model)

    async def load(self) -> None:
        """Load every model in turn; raise StartupError, with the place, if one fails.

        Returns early where a stop is asked for meanwhile.
        """
        with anyio.CancelScope() as self._loading:
            for model in self.models:
                if self.dataplane.accepting:
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
        self.dataplane.close()


def _where(model: Model, error: BaseException) -> str:
    """The place in the user's own file where a load failed."""
    frames = traceback.extract_tb(error.__traceback__)
    handler = model.handler(Stage.LOAD)
    code = getattr(handler.function, "__code__", None) if handler else None
    own = [frame for frame in frames if code and frame.filename == code.co_filename]
    frame = (own or list(frames))[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}, in {frame.name}"
