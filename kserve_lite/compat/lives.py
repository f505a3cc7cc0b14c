"""The models of a `ModelRepository`, kept served while a server runs.

KServe's server looks into the repository at each request. Here the two are brought
together whenever the repository says that it has changed, and after each load and
unload that a client asks for; in each worker of a server for itself.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from kserve_lite.compat.model import BaseKServeModel, close_upstreams
from kserve_lite.compat.model_repository import ModelRepository
from kserve_lite.compat.serving import Served
from kserve_lite.errors import ModelDefinitionError, ModelNotFound, ModelNotReady
from kserve_lite.model import Phase
from kserve_lite.server.lifecycle import Server

log = logging.getLogger("kserve_lite")


class Lives:
    """A guest of a native server: see `kserve_lite.server.lifecycle.Guest`.

    on_loop: run `def` methods on the event loop. engines: models whose engine is to be
    started. on_exception: what the event loop tells of what nobody caught.
    """

    def __init__(
        self,
        repository: ModelRepository,
        *,
        on_loop: bool = False,
        engines: Sequence[BaseKServeModel] = (),
        on_exception: Callable[[Any, dict[str, Any]], None] | None = None,
    ) -> None:
        self.failure: BaseException | None = None  # of an engine
        self._repository = repository
        self._on_loop = on_loop
        self._engines = engines
        self._on_exception = on_exception
        self._served: dict[str, Served] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._changing = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: Server

    def models(self) -> tuple[Served, ...]:
        """The models that the server starts with, made native."""
        for name, model in self._repository.get_models().items():
            self._served[name] = self._native(name, model)
        return tuple(self._served.values())

    def stop(self) -> bool:
        """Have the server stop, from any thread; False where none runs."""
        if self._loop is None:
            return False
        self._loop.call_soon_threadsafe(self._server.stop)
        return True

    async def begin(self, server: Server) -> None:
        self._server = server
        self._loop = loop = asyncio.get_running_loop()
        if self._on_exception is not None:
            loop.set_exception_handler(self._on_exception)
        self._repository.on_change = partial(loop.call_soon_threadsafe, self._changed)
        for model in self._engines:
            self._start(self._run_engine(model))

    async def end(self) -> None:
        self._repository.on_change = None
        self._loop = None
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await close_upstreams()

    async def load(self, name: str) -> None:
        repository = self._repository
        try:
            await self._call(repository.load, name)
        except (Exception, SystemExit) as error:  # user code
            log.exception("the repository failed to load model %s", name)
            detail = "Its load failed; the server's log says why."
            raise ModelNotReady(name, detail) from error
        await self._keep_up(again=name)
        if repository.get_model(name) is None:
            raise ModelNotFound(name)
        if not await self._call(repository.is_model_ready, name):
            raise ModelNotReady(name)

    async def unload(self, name: str) -> None:
        async with self._changing:
            native = self._served.get(name)
            is_served = native is not None and native.phase is not Phase.UNLOADED
            if native is not None and is_served:
                del self._served[name]
                await self._server.application.repository.remove(native)
        if not is_served:
            try:
                await self._call(self._repository.unload, name)
            except KeyError:
                raise ModelNotFound(name) from None
        await self._keep_up()

    async def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call the user's function: in a thread, unless it is async."""
        if self._on_loop or inspect.iscoroutinefunction(function):
            value = function(*arguments)
        else:
            offload = self._server.dataplane.stages.offload
            value = await offload.run(partial(function, *arguments))
        return await value if inspect.isawaitable(value) else value

    def _changed(self) -> None:
        if self._loop is not None and not self._server.stopped:
            self._start(self._keep_up())

    async def _keep_up(self, *, again: str | None = None) -> None:
        """Serve what is in the repository, and nothing else.

        again: a model that is served again if it had been unloaded natively.
        """
        repository = self._server.application.repository
        async with self._changing:
            wanted = dict(self._repository.get_models())
            for name in self._served.keys() - wanted.keys():
                await repository.remove(self._served.pop(name))
            for name, model in wanted.items():
                native = self._served.get(name)
                if native is not None and native.origin is model:
                    is_gone = native.phase is Phase.UNLOADED
                    if not (is_gone and name == again):
                        continue
                made = self._native(name, model)
                try:
                    await repository.add(made)
                except ModelDefinitionError as error:
                    log.error("model %s cannot be served: %s", name, error)
                else:
                    self._served[name] = made

    def _native(self, name: str, model: BaseKServeModel) -> Served:
        return Served(model, name, self._repository, on_loop=self._on_loop)

    async def _run_engine(self, model: BaseKServeModel) -> None:
        try:
            value: Any = model.start_engine()
            if inspect.isawaitable(value):
                await value
        except (Exception, SystemExit) as error:  # user code: the server ends with it
            log.exception("the engine of model %s failed", model.name)
            self.failure = error
            self._server.stop()

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
