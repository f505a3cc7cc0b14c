"""The lives of the models behind a data plane: load, unload, and by name on demand.

Triton's model repository extension, for REST and gRPC alike:
https://github.com/triton-inference-server/server,
docs/protocol/extension_model_repository.md. The repository is the set of models that
the server was started with: none is fetched, added or configured by a client, unless
the program brings a `Source` that says what a name stands for.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from functools import partial
from typing import Any, Protocol

import anyio

from kserve_lite.dispatch.dataplane import DataPlane
from kserve_lite.dispatch.running import Running
from kserve_lite.dispatch.statistics import UNVERSIONED
from kserve_lite.errors import (
    Forbidden,
    ModelNotFound,
    ModelNotReady,
    ServerNotReady,
    Unsupported,
)
from kserve_lite.handlers import Stage
from kserve_lite.model import Model, Phase

log = logging.getLogger("kserve_lite")

# The extension's state of each phase, and why it is not READY.
STATES: dict[Phase, tuple[str, str]] = {
    Phase.DEFINED: ("UNAVAILABLE", "it is not loaded yet"),
    Phase.FROZEN: ("UNAVAILABLE", "it is not loaded yet"),
    Phase.LOADING: ("LOADING", ""),
    Phase.READY: ("READY", ""),
    Phase.FAILED: (
        "UNAVAILABLE",
        "its load handler failed; the server's log says why",
    ),
    Phase.UNLOADING: ("UNLOADING", "it finishes what is in flight"),
    Phase.UNLOADED: ("UNAVAILABLE", "it was unloaded"),
}

# A request with one of these did not begin on this machine, although its connection
# did: proxies beside the server (Knative's, Istio's) send the first three, and a
# browser the last with what a page of any site has it send.
FORWARDED = ("forwarded", "x-forwarded-for", "via", "origin")


class Source(Protocol):
    """A program's own way to load and unload models by name.

    Each raises ModelNotFound for a name that it does not know, and load ModelNotReady
    where it fails. They say what came of it by `Repository.add` and `remove`.
    """

    async def load(self, name: str) -> None: ...

    async def unload(self, name: str) -> None: ...


class Repository:
    """Loads and unloads the models of a data plane.

    source: what clients' loads and unloads go to, where the program brings one.
    """

    def __init__(self, dataplane: DataPlane, source: Source | None = None) -> None:
        self._dataplane = dataplane
        self._source = source
        self._control = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        # Has a verb of `obey()` done in all processes of the server, this one included,
        # where it has several.
        self.everywhere: Callable[[str, str], Awaitable[None]] | None = None

    async def load(self, model: Model) -> None:
        """Run the model's load handler; raises what it raises.

        A model that is loaded already goes on serving meanwhile, also if this fails.
        """
        dataplane = self._dataplane
        reload = model.phase is Phase.READY
        if not reload:
            model.enter(Phase.LOADING)
        handler = model.handler(Stage.LOAD)
        started = time.perf_counter_ns()
        try:
            state = await dataplane.stages.call(handler, None) if handler else None
        except BaseException:
            if model.phase is Phase.LOADING:
                model.enter(Phase.FAILED)
            raise
        before = dataplane.running.get(model)
        statistics = dataplane.statistics_of(model)
        took = time.perf_counter_ns() - started
        statistics.loads.observe(took)
        dataplane.running[model] = dataplane.stages.running_of(model, state, statistics)
        model.enter(Phase.READY, state)
        dataplane.changed()
        log.info("loaded %s in %.2f s", model.name, took / 1e9)
        if before is not None:
            await self._finish(model, before)

    async def unload(self, model: Model) -> None:
        """Finish what is in flight, then run the unload handler.

        What the handler raises is logged.
        """
        running = self._dataplane.running.pop(model, None)
        try:
            if running is not None:
                model.enter(Phase.UNLOADING)
                self._dataplane.changed()
                await self._finish(model, running)
        finally:
            if model.phase is not Phase.UNLOADED:
                model.enter(Phase.UNLOADED)
            self._dataplane.changed()

    async def _finish(self, model: Model, running: Running) -> None:
        """End one load of a model: what is in flight, then its unload handler."""
        dataplane = self._dataplane
        if dataplane.accepting:  # else the stop has waited, or has given up
            with anyio.move_on_after(dataplane.settings.grace_period) as waiting:
                await running.drained()
            if waiting.cancelled_caught:
                log.warning(
                    "unloading %s: %d requests or threads still run after %g s",
                    model.name,
                    running.in_flight,
                    dataplane.settings.grace_period,
                )
        if running.batcher is not None:
            running.batcher.close()
        handler = model.handler(Stage.UNLOAD)
        try:
            if handler is not None:
                await dataplane.stages.call(handler, running)
        except Exception:  # user code: the other models must still be unloaded
            log.exception("the unload handler of model %s failed", model.name)

    async def add(self, model: Model) -> None:
        """Load and serve one more model, in the place of the one of its name, if any.

        That one answers until then, finishes what it has begun and is unloaded. Raises
        what the load handler raises.
        """
        dataplane = self._dataplane
        model.freeze()
        await self.load(model)
        # Nothing is awaited between: who asks sees the one or the other.
        before = dataplane.registry.replace(model)
        dataplane.changed()
        if before is not None:
            await self.unload(before)
            dataplane.statistics.pop(before, None)

    async def remove(self, model: Model) -> None:
        """Unload a model and forget it."""
        await self.unload(model)
        self._dataplane.registry.remove(model)
        self._dataplane.statistics.pop(model, None)
        self._dataplane.changed()

    async def load_named(self, name: str) -> None:
        """Load every version of a model, again where it is loaded.

        Raises ModelNotFound, ModelNotReady where a load handler fails, which is logged,
        and ServerNotReady while the server stops.
        """
        await (self.everywhere or self.obey)("load", name)

    async def unload_named(self, name: str) -> None:
        """Unload every version of a model; raises ModelNotFound where none is served.

        From then on it is as if the model did not exist, until it is loaded again.
        """
        await (self.everywhere or self.obey)("unload", name)

    async def obey(self, verb: str, name: str) -> None:
        """Load or unload every version of a model in this process.

        verb: load or unload. Raises what `load_named()` and `unload_named()` do.
        """
        if self._source is not None:
            source = self._source
            work = source.load if verb == "load" else source.unload
        else:
            work = self._load_versions if verb == "load" else self._unload_versions
        await self._alone(partial(work, name))

    async def _alone(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Do one such thing at a time: they walk a model's phases.

        It goes on if who asked for it goes away, so that it leaves a clear phase.
        """
        await self._control.acquire()
        try:
            if not self._dataplane.accepting:
                raise ServerNotReady
            self._task = task = asyncio.get_running_loop().create_task(work())
        except BaseException:
            self._control.release()
            raise
        task.add_done_callback(self._done)
        await asyncio.shield(task)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._task = None
        self._control.release()
        if not task.cancelled():
            task.exception()  # there may be nobody left to ask for it

    async def close(self) -> None:
        """Give up what a client asked for and what has not ended yet."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _load_versions(self, name: str) -> None:
        versions = self._dataplane.registry.of_name(name)
        # At the server's start it is loaded already.
        if any(m.phase in (Phase.FROZEN, Phase.LOADING) for m in versions):
            raise ModelNotReady(name)
        for model in versions:
            await self._load_again(model)

    async def _unload_versions(self, name: str) -> None:
        versions = self._dataplane.registry.of_name(name)
        served = [m for m in versions if m.phase is not Phase.UNLOADED]
        if not served:
            raise ModelNotFound(name)
        if any(m.phase in (Phase.FROZEN, Phase.LOADING) for m in served):
            raise ModelNotReady(name)
        for model in served:
            await self.unload(model)

    async def _load_again(self, model: Model) -> None:
        try:
            await self.load(model)
        except (Exception, SystemExit) as error:  # user code
            log.exception("loading model %s failed", model.name)
            self._dataplane.changed()
            detail = "Its load handler failed; the server's log says why."
            if model.phase is Phase.READY:
                detail += " What was loaded before still answers."
            raise ModelNotReady(model.name, detail) from error

    async def index(self, *, ready: bool = False) -> list[dict[str, str]]:
        """Every model with its state. ready: only those that are READY."""
        entries = []
        for model in self._dataplane.registry:
            state, reason = STATES[model.phase]
            if state == "READY" and not await self._dataplane.model_ready(model):
                state, reason = "UNAVAILABLE", "its ready handler says no"
            if state == "READY" or not ready:
                entries.append(
                    {
                        "name": model.name,
                        "version": model.version or UNVERSIONED,
                        "state": state,
                        "reason": reason,
                    }
                )
        return entries

    def check_control(self, host: str, headers: Mapping[str, Any]) -> None:
        """Raise Forbidden unless a peer may load and unload models.

        host: the peer's address; headers: of its request.
        """
        if self._dataplane.settings.enable_model_control:
            return
        if not is_loopback(host) or any(name in headers for name in FORWARDED):
            raise Forbidden(
                "Models may be loaded and unloaded only from the server's own machine, "
                "unless the server runs with enable_model_control."
            )


def check_load_parameters(names: Iterable[str]) -> None:
    """Raise Unsupported where a load brings a configuration or files.

    names: of the parameters of Triton's extension.
    """
    if any(name == "config" or name.startswith("file:") for name in names):
        raise Unsupported(
            "A model is loaded as its author defined it: leave out the parameters "
            "config and file:... of the load."
        )


def is_loopback(host: str) -> bool:
    """Whether a peer's host is this machine: 127.0.0.0/8 or ::1, mapped or not."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)
