"""KServe's models on Ray Serve: deployments as models, and a handle as a model.

    @serve.deployment(num_replicas=2, ray_actor_options={"num_cpus": 1})
    class AlexNetModel(Model): ...

    ModelServer().start({"custom-model": AlexNetModel})

Replicas of a class are those of `kserve_lite.parallel`, each of which makes the model
anew. Ray itself is imported by who makes a deployment, not here.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from kserve_lite.compat.model import BaseKServeModel, InferenceModel, InferenceVerb
from kserve_lite.compat.model import Model as KServeModel
from kserve_lite.compat.model_repository import ModelRepository
from kserve_lite.compat.serving import Served
from kserve_lite.errors import InferenceFault
from kserve_lite.model import Deployment
from kserve_lite.model import Model as NativeModel
from kserve_lite.parallel.outcomes import fault_of, raised


class RayModel(InferenceModel):
    """A model whose requests an application of Ray Serve answers, which runs already.

    handle: of a deployment of a `Model`; it is called with the payload, the headers
    and, to explain, the verb.
    """

    def __init__(self, name: str, handle: Any) -> None:
        super().__init__(name)
        self._handle = handle

    async def __call__(
        self,
        body: Any,
        headers: dict[str, str] | None = None,
        verb: InferenceVerb = InferenceVerb.PREDICT,
    ) -> Any:
        # Not a deployment's own __call__ may take one that KServe's never sent.
        how = {} if verb is InferenceVerb.PREDICT else {"verb": verb}
        response = self._handle.remote(body, headers=dict(headers or {}), **how)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except Exception as error:
            # Ray raises an instance of the cause's class, without what that was given.
            cause = getattr(error, "cause", None)
            if isinstance(cause, InferenceFault):
                raise raised(fault_of(cause), "") from error
            raise

    async def get_input_types(self) -> Any:
        return await self._handle.get_input_types.remote()

    async def get_output_types(self) -> Any:
        return await self._handle.get_output_types.remote()


def is_deployment(value: object) -> bool:
    """Whether `@serve.deployment` made it, of a class of KServe models."""
    kind = getattr(value, "func_or_class", None)
    return inspect.isclass(kind) and issubclass(kind, BaseKServeModel)


def replicated(name: str, deployed: Any, *, on_loop: bool) -> NativeModel:
    """The native model that stands for the replicas of a deployment.

    deployed: what `@serve.deployment` made; its number of replicas or autoscaling, its
    ray_actor_options and its name count. The class is called without arguments, or with
    the name where it needs one.
    """
    kind: Any = deployed.func_or_class
    config = deployed._deployment_config.autoscaling_config  # noqa: SLF001 - no other way
    replicas = deployed.num_replicas if config is None else dict(config)
    model = Served(_Elsewhere(name), name, ModelRepository(), on_loop=True)
    model.deployment = Deployment(
        replicas,
        deployed.ray_actor_options or {},
        name=deployed.name,
        make=partial(_made, kind, name, on_loop=on_loop),
        streams=inspect.isasyncgenfunction(getattr(kind, "predict", None)),
    )
    return model


class _Elsewhere(KServeModel):
    """In the place of a model that only replicas make: it says what a request gets."""


def _made(kind: Callable[..., BaseKServeModel], name: str, *, on_loop: bool) -> Served:
    """Make the model, in a replica."""
    try:
        inspect.signature(kind).bind()
    except TypeError:
        model = kind(name)
    else:
        model = kind()
    if not model.ready:  # most constructors load
        model.load()
    model.start()
    repository = ModelRepository()
    repository.update(model, name)
    return Served(model, name, repository, on_loop=on_loop)
