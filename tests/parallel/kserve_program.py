"""KServe's ways to Ray Serve in one program: a dict of deployments, and a handle."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from typing import Any

import ray
from ray import serve

from kserve_lite.compat import (
    InferOutput,
    InferRequest,
    InferResponse,
    Model,
    ModelRepository,
    ModelServer,
)
from kserve_lite.compat.errors import InvalidInput
from kserve_lite.compat.ray import RayModel


@serve.deployment(
    name="custom-model",
    num_replicas=2,
    ray_actor_options={"num_cpus": 0.2, "resources": {}},
)
class Doubler(Model):
    def __init__(self) -> None:
        self.name = "custom-model"
        super().__init__(self.name)
        self.load()

    def load(self) -> bool:
        self.factor = 2
        self.ready = True
        return self.ready

    def preprocess(self, payload: Any, headers: Any = None) -> Any:
        return payload

    async def predict(
        self, payload: Any, headers: Any = None, response_headers: Any = None
    ) -> Any:
        if isinstance(payload, InferRequest):
            array = payload.inputs[0].as_numpy() * self.factor
            output = InferOutput("y", list(array.shape), "FP32")
            output.set_data_from_numpy(array)
            return InferResponse(payload.id, self.name, [output])
        if payload.get("refuse"):
            raise InvalidInput("not this")
        return {"predictions": [os.getpid(), headers["x-test"]]}

    def explain(self, payload: Any, headers: Any = None) -> Any:
        return {"explanations": payload["instances"]}


@serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 0.1})
class Teller(Model):
    def __init__(self, name: str) -> None:
        super().__init__(name)  # not loaded: the replica does that

    def load(self) -> bool:
        self.greeting = "hello"
        return bool(super().load())

    # What a program may do, and KServe's own types do not say.
    async def predict(  # type: ignore[override]
        self, payload: Any, headers: Any = None, response_headers: Any = None
    ) -> AsyncGenerator[str]:
        yield self.greeting
        await asyncio.sleep(0)
        yield " again"


class Elsewhere(Model):
    """What the handle of an application of the program's own leads to."""

    def __init__(self) -> None:
        super().__init__("elsewhere")
        self.ready = True

    async def predict(
        self, payload: Any, headers: Any = None, response_headers: Any = None
    ) -> Any:
        if payload.get("refuse"):
            raise InvalidInput("nor this")
        return {"predictions": [headers["x-test"]]}

    async def explain(self, payload: Any, headers: Any = None) -> Any:
        return {"explanations": payload["instances"]}


if __name__ == "__main__":
    ray.init("local", include_dashboard=False, configure_logging=False)
    own: Any = serve.deployment(Elsewhere, ray_actor_options={"num_cpus": 0.1})
    handle = serve.run(own.bind(), name="own", route_prefix=None)
    model = RayModel("by-handle", handle)
    model.load()
    repository = ModelRepository()
    repository.update(model)
    ModelServer(registered_models=repository).start(
        {"custom-model": Doubler, "teller": Teller}
    )
