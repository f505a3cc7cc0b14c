"""Whether a predictor says that a model is ready: asked for probes, so it never raises.

V1 asks for the model, V2 and gRPC for its readiness, as their protocols have it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from typing import TYPE_CHECKING
from urllib.parse import quote

import anyio

from kserve_lite.codecs.json_tensors import loads
from kserve_lite.errors import InferenceFault
from kserve_lite.forwarding.rest import Broken, Rest, Unreachable

if TYPE_CHECKING:
    from kserve_lite.forwarding.channel import Grpc

log = logging.getLogger("kserve_lite")

# Seconds for a check, less than the 5 that a ready handler has, and for how long its
# result counts: all who ask at about the same time ask once.
TIMEOUT, COUNTS_FOR = 2.0, 0.5


class Health:
    """The health of one server's models. is_v1: whether V1 is spoken over REST."""

    def __init__(self, client: Rest | Grpc, *, is_v1: bool) -> None:
        self._client = client
        self._is_v1 = is_v1
        self._checking: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._known: dict[str, tuple[float, bool]] = {}

    async def ready(self, model_name: str) -> bool:
        # One that is slow to say so of one model keeps no other waiting.
        async with self._checking[model_name]:
            until, known = self._known.get(model_name, (0.0, False))
            if time.monotonic() < until:
                return known
            is_ready = False
            with anyio.move_on_after(TIMEOUT):
                try:
                    is_ready = await self._check(model_name)
                except (Unreachable, Broken) as error:
                    log.debug("the predictor of %s is not ready: %s", model_name, error)
            self._known[model_name] = time.monotonic() + COUNTS_FOR, is_ready
            return is_ready

    async def _check(self, name: str) -> bool:
        if not isinstance(self._client, Rest):
            return await _ready_over_grpc(self._client, name)
        quoted = quote(name, safe="")
        path = f"/v1/models/{quoted}" if self._is_v1 else f"/v2/models/{quoted}/ready"
        answer = await self._client.ask("GET", path, {})
        if answer.status != 200:
            return False
        try:
            document = loads(answer.body)
        except InferenceFault:
            return True  # Triton's has no body
        # KServe has said "False" as well, and others say other things of a model that
        # is ready.
        said = document.get("ready", True) if isinstance(document, dict) else True
        return str(said).lower() != "false"


async def _ready_over_grpc(grpc: Grpc, name: str) -> bool:
    from kserve_lite.codecs.proto import message_class

    request = message_class("inference.ModelReadyRequest")(name=name)
    answer = await grpc.ask("ModelReady", request, {}, left=TIMEOUT)
    return getattr(answer, "ready", False) is True
