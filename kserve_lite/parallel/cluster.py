"""The Ray cluster of a server: joined, or started with the server and stopped with it.

Calls of Ray block for seconds, so all here is for threads other than the event loop's.
Ray is imported late: it costs seconds. What Ray logs of its own work is kept to
warnings; what a replica prints or logs comes through.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any

from kserve_lite.errors import StartupError
from kserve_lite.parallel.outcomes import LOAD_FAILED
from kserve_lite.parallel.settings import ParallelSettings

log = logging.getLogger("kserve_lite")

# Seconds for a cluster to be joined or started: ten are usual on a busy machine.
JOINING = 120.0
# Seconds for its address to take a connection: Ray itself would try for minutes.
CONNECTING = 5.0
# Seconds between two looks at replicas that start or end.
POLL = 0.1
# Between the server and its replicas: as many bytes as a message of gRPC can have.
_MESSAGE = 2**31 - 1


class Cluster:
    """What models with replicas run on; begun with the first of them.

    grace: seconds that `close()` gives to what is in flight.
    """

    def __init__(self, settings: ParallelSettings, grace: float = 30.0) -> None:
        self._address = settings.ray_address
        self._grace = grace
        self._lock = Lock()
        self._home: _Home | None = None
        self._is_ours = False  # we have connected to it
        # What each application that was begun here takes of the cluster.
        self._apps: dict[str, dict[str, float]] = {}
        self._ending: set[str] = set()  # told to end, and not seen to have
        # What begins the applications of models that are loaded soon: replicas of
        # several start at the same time, since each takes seconds.
        self.planned: list[Callable[[], None]] = []

    def join(self) -> None:
        """Connect to the cluster, or start one; once, whoever asks."""
        with self._lock:
            if self._home is not None:
                return
            home = _Home()
            try:
                home.call(self._join, JOINING)
            except TimeoutError:
                raise StartupError(
                    f"the Ray cluster {self._address or 'of this machine'} has not "
                    f"answered for {JOINING:g} s; see --ray_address"
                ) from None
            except BaseException:
                with contextlib.suppress(Exception):
                    home.call(self._end, self._grace)
                home.close()
                raise
            self._home = home

    def begin(self) -> None:
        """Begin what is planned."""
        with self._lock:
            while self.planned:
                self.planned.pop(0)()

    def deploy(self, app: str, bound: Any, needs: Mapping[str, float]) -> Any:
        """Begin an application; return the handle to ask it by.

        Raises StartupError where Ray refuses it.
        """
        from ray import serve

        self._apps[app] = dict(needs)
        target = serve.RunTarget(bound, name=app, route_prefix=None)
        try:
            [handle] = serve.run_many([target], wait_for_applications_running=False)
        except Exception as error:  # what pickle and Ray's checks raise
            with contextlib.suppress(Exception):  # it may have begun all the same
                self.delete(app)
            raise StartupError(
                f"Ray Serve does not take the model of {app}: {_line(error)}; what "
                "cannot be sent to another process is made in the load handler"
            ) from error
        return handle

    def started(self, app: str) -> bool:
        """Whether all replicas of an application run.

        Raises StartupError once Ray Serve has given it up, or a load handler failed.
        """
        from ray import serve

        status = serve.status().applications.get(app)
        if status is None:
            raise StartupError(f"the replicas of {app} were removed while they started")
        messages = [status.message]
        messages += [each.message for each in status.deployments.values()]
        text = "\n".join(messages)
        # A replica that died is tried again; a model that fails would fail again.
        if status.status == "DEPLOY_FAILED" or LOAD_FAILED in text:
            raise StartupError(f"a replica could not start: {_reason(text)}")
        return bool(status.status == "RUNNING")

    def check(self, name: str, needs: Mapping[str, float]) -> None:
        """Raise StartupError where a cluster of ours can never hold the replicas.

        needs: what all of them take. On one that was joined they may wait for a node.
        """
        import ray

        total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        for kind, need in needs.items():
            has = total.get(kind, 0.0)
            others = sum(taken.get(kind, 0.0) for taken in self._apps.values())
            if not need or need + others <= has + 1e-6:
                continue
            beside = f" beside the {others:g} of other models" if others else ""
            text = (
                f"the replicas of model {name!r} need {need:g} {kind}{beside}, and the "
                f"Ray cluster has {has:g}"
            )
            if self._is_local:
                raise StartupError(
                    f"{text}: give fewer replicas or smaller resources, or join a "
                    "larger cluster with --ray_address"
                )
            if need > has:
                log.warning("%s: they wait until it has grown", text)

    def running(self, app: str, *, may_sleep: bool = False) -> int:
        """How many replicas of an application can be asked.

        may_sleep: with none at all it can be asked, too, and starts one.
        """
        from ray import serve

        status = serve.status().applications.get(app)
        if status is None:
            return 0
        count = sum(
            count
            for deployment in status.deployments.values()
            for state, count in deployment.replica_states.items()
            if state == "RUNNING"
        )
        return max(count, 1) if may_sleep and status.status == "RUNNING" else count

    def delete(self, *apps: str) -> None:
        """Have applications end, when what is in flight in their replicas has."""
        from ray import serve

        for app in apps:
            if self._apps.pop(app, None) is not None:
                self._ending.add(app)
                # Without waiting: one after the other takes seconds each.
                serve.delete(app, _blocking=False)

    def close(self) -> None:
        """Remove what this server deployed; end a cluster that it started.

        Its applications are given the grace period to end, all together.
        """
        with self._lock:
            home, self._home = self._home, None
            if home is None:
                return
            try:
                self.delete(*list(self._apps))
                self._wait_ended()
            except Exception as error:  # noqa: BLE001 - the cluster may be gone
                log.warning("what was deployed may be left: %s", _line(error))
            with contextlib.suppress(TimeoutError):
                home.call(self._end, self._grace)
            home.close()

    def _wait_ended(self) -> None:
        from ray import serve

        end = time.monotonic() + self._grace
        while time.monotonic() < end:
            self._ending &= serve.status().applications.keys()
            if not self._ending:
                return
            time.sleep(POLL)
        log.warning("replicas still run after %g s", self._grace)

    @property
    def is_remote(self) -> bool:
        """Whether it is reached through Ray's client, ray://."""
        from ray.util.client import ray

        return bool(ray.is_connected())  # type: ignore[no-untyped-call]

    @property
    def _is_local(self) -> bool:
        return self._is_ours and not self._address

    def _join(self) -> None:
        address = self._address or "local"
        if not self._address:
            # Read when Ray is imported; others' clusters are their owners' business.
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Else Ray leaves out lines that others have written, amid tracebacks, too.
        os.environ.setdefault("RAY_DEDUP_LOGS", "0")
        name = "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"
        os.environ.setdefault(name, str(_MESSAGE))
        _knock(address)
        try:
            import ray
            from ray import serve
        except ImportError as error:
            raise StartupError(
                "models with replicas run on Ray Serve, which is not installed: "
                "pip install 'kserve-lite[ray]'"
            ) from error
        _raise_limit(name)
        if not ray.is_initialized():
            # A program that has joined a cluster itself knows why.
            with _hushed():
                try:
                    ray.init(
                        address,
                        include_dashboard=None if self._address else False,
                        configure_logging=False,
                        log_to_driver=True,
                    )
                except Exception as error:  # Ray raises what its transports do
                    raise StartupError(
                        f"the Ray cluster {address} cannot be joined: "
                        f"{_line(error)}; see --ray_address, and where it asks for "
                        "a token set RAY_AUTH_MODE=token"
                    ) from error
            self._is_ours = True
        for ours in ("ray", "ray.serve"):
            logging.getLogger(ours).setLevel(logging.WARNING)
        # No server of Ray's own; where Serve runs already this changes nothing.
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
        logging.getLogger("ray.serve").setLevel(logging.WARNING)

    def _end(self) -> None:
        # Without serve.shutdown(): with the cluster Serve ends, too, and in between
        # Ray would tell of each call to Serve's controller that it cannot answer.
        import ray

        if self._is_ours:
            ray.shutdown()
            self._is_ours = False


class _Home:
    """A thread to start Ray in: Ray's processes end when the thread does that did it.

    A daemon, unlike an executor's: one that hangs in Ray must not keep the process.
    """

    def __init__(self) -> None:
        self._work: SimpleQueue[tuple[Future[None], Callable[[], None]] | None]
        self._work = SimpleQueue()
        Thread(target=self._run, name="kserve-lite-ray", daemon=True).start()

    def call(self, function: Callable[[], None], timeout: float) -> None:
        done: Future[None] = Future()
        self._work.put((done, function))
        done.result(timeout)

    def close(self) -> None:
        self._work.put(None)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            done, function = work
            try:
                function()
            except BaseException as error:  # noqa: BLE001 - the caller's to handle
                done.set_exception(error)
            else:
                done.set_result(None)


def _knock(address: str) -> None:
    """Raise StartupError unless something listens at HOST:PORT or ray://HOST:PORT."""
    match = re.fullmatch(r"(?:ray://)?\[?([^/\s]+?)\]?:(\d+)", address)
    if match is None:  # auto, local
        return
    try:
        socket.create_connection((match[1], int(match[2])), CONNECTING).close()
    except (OSError, OverflowError) as error:
        raise StartupError(
            f"the Ray cluster {address} cannot be joined: {_line(error)}; see "
            "--ray_address"
        ) from error


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Keep back what Ray warns of while it starts: that all is as it should be."""
    logger = logging.getLogger("ray")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _raise_limit(name: str) -> None:
    """Have answers above gRPC's 4 MB taken where the program imported Ray before us.

    Ray Serve reads the variable when it is imported, into a global here.
    """
    from ray.serve._private.request_router import replica_wrapper

    if getattr(replica_wrapper, name, _MESSAGE) < int(os.environ[name]):
        setattr(replica_wrapper, name, int(os.environ[name]))


def _reason(text: str) -> str:
    """What a replica said of its load, or the last line of what Ray Serve says."""
    _, begins, error = text.rpartition(LOAD_FAILED)
    if begins:
        return begins + " ".join(error.split())[:300]
    lines = [line for line in text.splitlines() if line.strip()]
    return " ".join(lines[-1].split())[:300] if lines else "Ray Serve does not say why"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
