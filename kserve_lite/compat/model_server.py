"""`ModelServer`: KServe's way to start a server, with its constructor and its flags.

It chooses settings and hands the models over; the server is the one that `run()` runs.
A program's own flags go into a parser that has `parser` as its parent.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

from kserve_lite.compat.errors import NoModelReady
from kserve_lite.compat.flags import Chosen, make_parser
from kserve_lite.compat.lives import Lives
from kserve_lite.compat.model import BaseKServeModel, Model
from kserve_lite.compat.model_repository import ModelRepository
from kserve_lite.compat.predictor_config import PredictorConfig, set_predictor_config
from kserve_lite.compat.ray import is_deployment, replicated
from kserve_lite.errors import KServeLiteError, StartupError
from kserve_lite.model import Model as NativeModel
from kserve_lite.server import run as running
from kserve_lite.server.logs import configure_logging
from kserve_lite.server.worker import assignment

parser = make_parser()


class ModelServer:
    """Serves models: make it, then `start` it as the last line of a program.

    Each argument beats the flag of its name, which beats the environment; see `parser`
    for the flags and their defaults.

    registered_models: the repository whose models are served, default an empty one.
    grace_period: seconds that a stop gives to what is in flight, default 30.
    predictor_config: default what the flags say.
    sync_handlers_on_loop: run the models' `def` methods on the event loop, one after
        the other, as KServe's SDK does; default False: in threads, several at a time.
    settings: of kserve-lite's own, by name, `host="127.0.0.1"` say.

    max_threads, enable_docs_url and access_log_format do nothing; the log says what
    does their work.
    """

    def __init__(  # noqa: PLR0917 - KServe's
        self,
        http_port: int | None = None,
        grpc_port: int | None = None,
        workers: int | None = None,
        max_threads: int | None = None,
        max_asyncio_workers: int | None = None,
        registered_models: ModelRepository | None = None,
        enable_grpc: bool | None = None,
        enable_docs_url: bool | None = None,
        enable_latency_logging: bool | None = None,
        access_log_format: str | None = None,
        event_loop: str | None = None,
        timeout_keep_alive: int | None = None,
        grace_period: int | None = None,
        predictor_config: PredictorConfig | None = None,
        ssl_certfile: str | None = None,
        ssl_keyfile: str | None = None,
        *,
        sync_handlers_on_loop: bool | None = None,
        **settings: Any,
    ) -> None:
        try:
            self._chosen = chosen = Chosen(
                {
                    "http_port": http_port,
                    "grpc_port": grpc_port,
                    "workers": workers,
                    "max_threads": max_threads,
                    "max_asyncio_workers": max_asyncio_workers,
                    "enable_grpc": enable_grpc,
                    "enable_docs_url": enable_docs_url,
                    "enable_latency_logging": enable_latency_logging,
                    "access_log_format": access_log_format,
                    "event_loop": event_loop,
                    "timeout_keep_alive": timeout_keep_alive,
                    "grace_period": grace_period,
                    "ssl_certfile": ssl_certfile,
                    "ssl_keyfile": ssl_keyfile,
                    "sync_handlers_on_loop": sync_handlers_on_loop,
                }
                | settings,
                sys.argv[1:],
                os.environ,
            )
        except KServeLiteError as error:
            running.fail(error)
        self.registered_models = (
            ModelRepository() if registered_models is None else registered_models
        )
        server, dispatch = chosen.settings.server, chosen.settings.dispatch
        self.http_port = server.http_port
        self.grpc_port = server.grpc_port
        self.workers = server.workers
        self.enable_grpc = server.enable_grpc
        self.enable_latency_logging = dispatch.enable_latency_logging
        self.grace_period = dispatch.grace_period
        set_predictor_config(predictor_config or chosen.predictor_config)
        self._engines: list[BaseKServeModel] = []
        self._deployments: dict[str, Any] = {}
        self._on_exception: Callable[[Any, dict[str, Any]], None] | None = None
        self._lives: Lives | None = None

    def start(self, models: list[BaseKServeModel] | dict[str, Any]) -> None:
        """Serve models until SIGTERM or SIGINT, or `stop`.

        models: those that are `ready` are served, with those that are in
        `registered_models`; an empty list serves these only. `start()` of each is
        called, and its engine started where it has one. Or a dict of deployments of
        Ray Serve by the name to serve them under, `@serve.deployment` on a class of
        models: replicas make the model anew, each for itself; needs the extra [ray].

        What keeps it from starting ends the process with one line and status 1. Raises
        RuntimeError for what is no list of models, NoModelReady where none is ready.
        """
        if running.importing is not None:
            raise StartupError(
                f"{running.importing} calls ModelServer.start() while it is imported: "
                'put the call under if __name__ == "__main__":'
            )
        self._register(models)
        chosen = self._chosen
        self._lives = lives = Lives(
            self.registered_models,
            on_loop=chosen.value("sync_handlers_on_loop"),
            engines=self._engines,
            on_exception=self._on_exception,
        )
        if assignment() is None:
            configure_logging(chosen.settings.server)
            chosen.tell()
        try:
            running.serve_process(
                lambda: (*lives.models(), *self._replicated()),
                chosen.settings,
                running.program_folder(),
                guest=lives,
            )
        except KServeLiteError as error:
            running.fail(error)
        finally:
            self._lives = None
        if lives.failure is not None:
            raise lives.failure

    def stop(self, sig: int | None = None) -> None:
        """Have a server that runs stop, from any thread; in a worker, all of it.

        sig: does not matter.
        """
        if self._lives is None:
            return
        if assignment() is not None:
            os.kill(os.getppid(), signal.SIGTERM)  # the supervisor
        elif not self._lives.stop():
            os.kill(os.getpid(), signal.SIGTERM)  # which this process then is

    def register_model(self, model: BaseKServeModel, name: str | None = None) -> None:
        """Serve a model, also under another name.

        Raises ValueError for a model without a name.
        """
        if not model.name:
            raise ValueError("the model has no name to be registered under")
        self.registered_models.update(model, name or model.name)

    def register_exception_handler(
        self, handler: Callable[[Any, dict[str, Any]], None]
    ) -> None:
        """Have the event loop tell a function of exceptions that nobody caught.

        handler: as asyncio's `loop.set_exception_handler` takes it: tasks of the
        program's own, callbacks. What the models' methods raise is answered and logged
        as ever, and never comes here.
        """
        self._on_exception = handler

    def default_exception_handler(self, loop: Any, context: dict[str, Any]) -> None:
        """Log it as asyncio does, for a handler that leaves something to it."""
        loop.default_exception_handler(context)

    def _replicated(self) -> list[NativeModel]:
        on_loop = self._chosen.value("sync_handlers_on_loop")
        return [
            replicated(name, deployed, on_loop=on_loop)
            for name, deployed in self._deployments.items()
        ]

    def _register(self, models: Any) -> None:
        if isinstance(models, dict):
            for name, deployed in models.items():
                if not is_deployment(deployed):
                    raise RuntimeError(
                        "A dict for ModelServer.start() has the names of models and "
                        "classes of models with @serve.deployment, without bind(); "
                        f"{name!r} is something else"
                    )
            self._deployments = dict(models)
            return
        if not isinstance(models, list):
            raise RuntimeError("Unknown model collection type")
        is_one_ready = False
        for model in models:
            if not isinstance(model, BaseKServeModel):
                raise RuntimeError("Model type should be 'BaseKServeModel'")
            if model.ready:
                is_one_ready = True
                self.register_model(model)
                if isinstance(model, Model):
                    model.enable_latency_logging = self.enable_latency_logging
            model.start()
            if model.engine:
                self._engines.append(model)
        if models and not is_one_ready:
            raise NoModelReady(models)


@cache
def _parsed() -> Any:
    return parser.parse_known_args()[0]


def __getattr__(name: str) -> Any:
    if name == "args":  # not at once: who imports this may have another command line
        return _parsed()
    if name == "app":
        # No AttributeError: of that, `from ... import app` would not tell the words.
        raise ImportError(
            "this server has no FastAPI application: to add routes or middleware, "
            "mount the models into one of yours with kserve_lite.asgi, see "
            "docs/migrating-from-kserve.md"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
