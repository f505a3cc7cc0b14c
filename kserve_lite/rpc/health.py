"""The service `grpc.health.v1.Health`, which kubelet and load balancers ask.

https://github.com/grpc/grpc/blob/master/doc/health-checking.md. The empty name and
that of the inference service stand for the server as a whole; any other for a model.
"""

from __future__ import annotations

from typing import Any

import anyio

from kserve_lite.codecs.proto import message_class
from kserve_lite.dispatch.dataplane import DataPlane
from kserve_lite.errors import ModelNotFound
from kserve_lite.rpc.call import Call
from kserve_lite.rpc.inference import SERVICE as INFERENCE
from kserve_lite.rpc.methods import Action, Messages, Method, methods_of

SERVICE = "grpc.health.v1.Health"

# The data plane tells when a model is loaded or the server stops. A model's own `ready`
# handler can only be asked.
WATCH_INTERVAL = 1.0

_Response = message_class("grpc.health.v1.HealthCheckResponse")


class HealthService:
    """Health of a server and its models."""

    def __init__(self, dataplane: DataPlane) -> None:
        self.dataplane = dataplane

    def methods(self) -> dict[str, Method]:
        actions: dict[str, Action] = {"Check": self.check, "Watch": self.watch}
        return methods_of(SERVICE, actions, self.dataplane.idle)

    async def check(self, request: Any, _: Call) -> Any:
        return _Response(status=await self._status(request.service))

    async def watch(self, messages: Messages) -> None:
        """Send the status, and each other one that follows, until the server stops."""
        request = await messages.receive()
        service = request.service if request is not None else ""
        sent = None
        while True:
            # Before the status is asked for, so that no change in between is missed.
            change, stopping = self.dataplane.change(), not self.dataplane.accepting
            try:
                status = await self._status(service)
            except ModelNotFound:
                status = _Response.SERVICE_UNKNOWN
            if status != sent:
                await messages.send(_Response(status=status))
                sent = status
            if stopping:
                return
            with anyio.move_on_after(WATCH_INTERVAL):
                await change.wait()

    async def _status(self, service: str) -> int:
        """The status of a name; raises ModelNotFound."""
        if service in ("", INFERENCE):
            ready = await self.dataplane.ready()
        else:
            model = self.dataplane.get(service)
            ready = self.dataplane.accepting and await self.dataplane.model_ready(model)
        status: int = _Response.SERVING if ready else _Response.NOT_SERVING
        return status
