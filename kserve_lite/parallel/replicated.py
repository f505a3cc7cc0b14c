"""A model whose replicas run on Ray Serve, as a model of this server.

`replicated()` gives a model of the same name, inputs and outputs. Its load handler
deploys the replicas, its predict handler asks one of them, its ready handler counts
them: to the rest of the server it is a model like any other.

What becomes of a request whose replica dies: before the replica has taken it, Ray
Serve's router sends it to another one. Once it was taken it may have run, so it is sent
again only if the model is `idempotent`; otherwise it fails, as the model's failure and
not as "try again", which clients do by themselves.
"""

from __future__ import annotations

import asyncio
import logging
import re
import signal
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from time import monotonic
from typing import Any

import anyio

from kserve_lite.dispatch.settings import DispatchSettings
from kserve_lite.dispatch.statistics import Spent
from kserve_lite.errors import (
    InferenceError,
    InferenceFault,
    ModelNotReady,
    Overloaded,
    StartupError,
)
from kserve_lite.handlers import Call, Form, Handler, Stage, read_handler
from kserve_lite.messages import Context, InferRequest
from kserve_lite.model import Deployment, Model
from kserve_lite.parallel.cluster import POLL, Cluster
from kserve_lite.parallel.outcomes import Asked, Outcome, raised
from kserve_lite.parallel.replica import Replica
from kserve_lite.parallel.shipping import ship_code_of
from kserve_lite.records import new_id
from kserve_lite.tensors import Tensor

log = logging.getLogger("kserve_lite")

# Seconds for which the number of replicas is known; asking takes tens of milliseconds.
FRESH = 1.0
# Seconds after which a request waits for the number rather than take what was.
STALE = 5.0
# Seconds between Ray Serve's looks at a replica, which is replaced when it is dead or
# has not been ready three times in a row; Ray's default is 10.
HEALTH = 1.0
# Replicas of a model that may die while they start; one whose load fails is the last.
STARTS = 3
ROUTER = "kserve_lite.parallel.routing.LeastBusy"
# Replicas that an idempotent request is brought to, one after the other.
ATTEMPTS = 3
# Tensors of more bytes go through Ray's object store, where they are read in place;
# smaller requests straight to the replica, which takes half the time.
LARGE = 1024 * 1024


def replicated(
    model: Model,
    cluster: Cluster,
    settings: DispatchSettings,
    count: Callable[[Model, Spent], None],
) -> Model:
    """Return the model that stands for the replicas of a model with a deployment.

    count: is told what a replica has done for a request.
    """
    model.freeze()
    handlers: dict[Stage, Handler] = {}
    front = _Front(model, cluster, settings, count)
    cluster.planned.append(front.begin)
    lives: dict[Stage, Callable[..., Any]] = {
        Stage.LOAD: front.load,
        Stage.UNLOAD: front.unload,
        Stage.READY: front.ready,
    }
    for stage, function in lives.items():
        handlers[stage] = read_handler(stage, function)
    for verb in (Stage.PREDICT, Stage.EXPLAIN):
        plan = model.plan(verb)
        if plan:
            entry = plan[0]
            streams = plan[-1].call is Call.GENERATOR or (
                verb is Stage.PREDICT
                and model.deployment is not None
                and model.deployment.streams
            )
            handlers[verb] = replace(
                entry,
                stage=verb,
                function=front.streaming(verb) if streams else front.asking(verb),
                # What is declared is checked in the replica, by the handler's own form.
                form=Form.JSON if entry.form is Form.JSON else Form.REQUEST,
                takes={},
                injected=("context", "state"),
                call=Call.GENERATOR if streams else Call.AWAIT,
                outputs=(),
                is_plain=False,
                batching=None,
            )
    front.model = model.with_handlers(handlers)
    return front.model


@dataclass(eq=False, slots=True)
class Placement:
    """One deployment of a model: the state of its stand-in, as a load gives it.

    is_remote: it is reached through ray://, where answers come whole.
    running: how many replicas could be asked at `counted`, by time.monotonic().
    """

    app: str
    handle: Any
    is_remote: bool = False
    running: int = 0
    counted: float = -STALE
    counting: asyncio.Task[None] | None = None


class _Front:
    """Between the handlers of the model that stands for replicas, and these."""

    model: Model

    def __init__(
        self,
        original: Model,
        cluster: Cluster,
        settings: DispatchSettings,
        count: Callable[[Model, Spent], None],
    ) -> None:
        self._count_spent = count
        self._original = original
        self._deployment = original.deployment or Deployment(1)
        self._cluster = cluster
        self._settings = settings
        self._begun: Placement | None = None

    # --- life --------------------------------------------------------------------

    async def load(self) -> Placement:
        run = anyio.to_thread.run_sync
        try:
            await run(self._cluster.join, abandon_on_cancel=True)
        finally:
            _keep_signals()
        await run(self._cluster.begin)
        if self._begun is None:
            await run(self.begin)
        placement, self._begun = self._begun, None
        assert placement is not None  # noqa: S101 - begin() has made it, or raised
        try:
            while not await run(  # noqa: ASYNC110 - Ray has to be asked
                self._cluster.started, placement.app
            ):
                await anyio.sleep(POLL)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await run(self._cluster.delete, placement.app)
            raise
        return placement

    async def unload(self, state: Placement) -> None:
        if state.counting is not None:
            state.counting.cancel()
        await anyio.to_thread.run_sync(self._cluster.delete, state.app)

    async def ready(self, state: Placement) -> bool:
        """Whether at least one replica can be asked; every request asks, so cheap.

        What is known is taken for FRESH seconds, and to STALE while it is looked up.
        """
        age = monotonic() - state.counted
        if age >= FRESH:
            if state.counting is None:
                loop = asyncio.get_running_loop()
                state.counting = loop.create_task(self._count(state))
            if age >= STALE or not state.running:
                await asyncio.wait([state.counting])
        return state.running > 0

    async def _count(self, state: Placement) -> None:
        count = partial(
            self._cluster.running, state.app, may_sleep=_may_sleep(self._deployment)
        )
        try:
            state.running = await anyio.to_thread.run_sync(count)
        except Exception as error:  # noqa: BLE001 - of Ray's, whose head may be away
            log.warning("replicas of %s cannot be counted: %s", self.model.name, error)
            if monotonic() - state.counted >= STALE:
                state.running = 0
        else:
            state.counted = monotonic()
        finally:
            state.counting = None

    def begin(self) -> None:
        """Have the replicas start; `load` waits for them."""
        from ray import serve

        deployment, model = self._deployment, self._original
        name, folder = self.model.name, str(self.model.model_dir)
        replicas = deployment.replicas
        scale: dict[str, Any] = {"num_replicas": replicas}
        if not isinstance(replicas, int):
            scale = {"autoscaling_config": dict(replicas)}
        needs = _needs(deployment)
        self._cluster.check(name, needs)
        make = deployment.make
        if make is None:
            ship_code_of(model)
        most = self._settings.max_in_flight
        try:
            kind: Any = serve.deployment(
                Replica,
                name=_plain(deployment.name or name),
                ray_actor_options=dict(deployment.options),
                # Its own queues are bounded, and say so.
                max_ongoing_requests=most,
                graceful_shutdown_timeout_s=self._settings.grace_period,
                graceful_shutdown_wait_loop_s=POLL,
                health_check_period_s=HEALTH,
                request_router_config={"request_router_class": ROUTER},
                max_constructor_retry_count=STARTS,
                logging_config={"enable_access_log": False, "log_level": "WARNING"},
                **scale,
            )
        except (TypeError, ValueError) as error:
            raise StartupError(
                f"Ray Serve does not take the replicas or resources of model {name!r}: "
                f"{' '.join(str(error).split())[:300]}"
            ) from error
        bound = kind.bind(make or (lambda: model), name, folder, self._settings)
        # Not one that another server has on the same cluster.
        app = f"{_plain(name)}-{new_id()[:8]}"
        handle = self._cluster.deploy(app, bound, needs)
        self._begun = Placement(app, handle, self._cluster.is_remote)

    # --- requests ----------------------------------------------------------------

    def asking(self, verb: Stage) -> Callable[..., Any]:
        async def ask(payload: Any, context: Context, state: Placement) -> Any:
            return await self._collected(verb, payload, context, state)

        return ask

    def streaming(self, verb: Stage) -> Callable[..., Any]:
        async def stream(
            payload: Any, context: Context, state: Placement
        ) -> AsyncGenerator[Any, None]:
            if state.is_remote:  # where Ray streams nothing
                async for item in await self._collected(verb, payload, context, state):
                    yield item
                return
            handle = _to(state, "stream", payload, context).options(stream=True)
            items = handle.remote(verb, _sendable(payload), Asked.of(context))
            try:
                async for item in items:
                    if not isinstance(item, Outcome):
                        yield item
                        continue
                    if item.spent is not None:
                        self._count_spent(self.model, item.spent)
                    if item.fault is not None:
                        raise raised(item.fault, context.request_id)
                    context.response_headers.update(item.headers)
            except InferenceFault:
                raise
            except Exception as error:
                raise self._failure(error, state) from error
            finally:
                items.cancel()

        return stream

    async def _collected(
        self, verb: Stage, payload: Any, context: Context, state: Placement
    ) -> Any:
        """The whole answer; of an iterator, what it has given."""
        outcome = await self._ask(verb, payload, context, state)
        if outcome.spent is not None:
            self._count_spent(self.model, outcome.spent)
        if outcome.fault is not None:
            raise raised(outcome.fault, context.request_id)
        context.response_headers.update(outcome.headers)
        return _each(outcome.value) if outcome.items else outcome.value

    async def _ask(
        self, verb: Stage, payload: Any, context: Context, state: Placement
    ) -> Outcome:
        handle = _to(state, "infer", payload, context)
        payload = _sendable(payload)
        attempts = ATTEMPTS if self._deployment.idempotent else 1
        while True:
            attempts -= 1
            response = handle.remote(verb, payload, Asked.of(context))
            try:
                outcome: Outcome = await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            except Exception as error:
                if attempts and _is_lost(error):
                    state.counted = min(state.counted, monotonic() - FRESH)
                    log.warning("a replica of %s died; asking another", self.model.name)
                    continue
                raise self._failure(error, state) from error
            return outcome

    def _failure(self, error: Exception, state: Placement) -> Exception:
        """What an error of Ray's means to the caller."""
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

        state.counted = min(state.counted, monotonic() - FRESH)
        if isinstance(error, BackPressureError):
            return Overloaded("The replicas of the model have too much to do.")
        if isinstance(error, DeploymentUnavailableError):
            return ModelNotReady(self.model.name)
        if _is_lost(error):
            log.warning("a replica of %s died amid a request", self.model.name)
            return InferenceError(
                "The replica that had the request died; it may have run."
            )
        # Ray makes errors that are instances of their causes' classes: of none that
        # means something to a client. `dataplane.py` logs both.
        return RuntimeError("a replica failed as it must not")


def _to(state: Placement, method: str, payload: Any, context: Context) -> Any:
    """The handle for a request: by Ray's object store if it is large."""
    # Through ray:// nothing but Ray's own connection leads into the cluster.
    large = state.is_remote or _is_large(payload, context.headers)
    return state.handle.options(method_name=method, _by_reference=large)


def _is_large(payload: Any, headers: Mapping[str, str]) -> bool:
    if isinstance(payload, InferRequest):
        return sum(map(_size, payload.inputs)) > LARGE
    # JSON; what does not say how long it is may be long.
    length = headers.get("content-length", "")
    return (
        not length.isdecimal() or "content-encoding" in headers or int(length) > LARGE
    )


def _size(tensor: Tensor) -> int:
    array = tensor.array
    return sum(map(len, array.flat)) if array.dtype.hasobject else array.nbytes


def _sendable(payload: Any) -> Any:
    """The payload without what only codecs of this process look at."""
    if isinstance(payload, InferRequest) and payload.document is not None:
        return replace(payload, document=None)
    return payload


def _needs(deployment: Deployment) -> dict[str, float]:
    """What the replicas of a deployment take of a cluster at first, all together."""
    replicas, options = deployment.replicas, deployment.options
    if not isinstance(replicas, int):
        replicas = replicas.get("initial_replicas") or replicas.get("min_replicas", 1)
    each = {
        "CPU": options.get("num_cpus", 1),
        "GPU": options.get("num_gpus", 0),
        "memory": options.get("memory", 0),
        **(options.get("resources") or {}),
    }
    return {
        kind: replicas * need
        for kind, need in each.items()
        if isinstance(need, (int, float))
    }


def _may_sleep(deployment: Deployment) -> bool:
    replicas = deployment.replicas
    return not isinstance(replicas, int) and replicas.get("min_replicas", 1) == 0


def _plain(name: str) -> str:
    """A model's name as Ray Serve can take it, which joins names by # and the like."""
    return re.sub(r"[^\w.-]", "-", name, flags=re.ASCII)


def _is_lost(error: Exception) -> bool:
    from ray import exceptions
    from ray.serve.exceptions import ReplicaUnavailableError

    lost = (
        exceptions.RayActorError,
        exceptions.NodeDiedError,
        exceptions.WorkerCrashedError,
        exceptions.ObjectLostError,
        ReplicaUnavailableError,
    )
    return isinstance(error, lost)


async def _each(values: list[Any]) -> AsyncGenerator[Any, None]:
    for value in values:
        yield value


def _keep_signals() -> None:
    """Take back what Ray's core has put in the place of the program's own handler.

    That would end the process 3 seconds after SIGTERM, amid what is to be finished.
    """
    if threading.current_thread() is threading.main_thread():
        handler = signal.getsignal(signal.SIGTERM)
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)
            signal.siginterrupt(signal.SIGTERM, False)
