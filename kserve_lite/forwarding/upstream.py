"""Another server that answers requests: whatever came goes out, whatever comes back.

A request's life reads top to bottom in `infer()`: it is written in the predictor's
protocol, sent within the time that is left, again where that can do no harm, and its
answer is read. Connections are kept by `rest.py` and `channel.py`; `bridging.py` turns
one protocol into the other.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import anyio

from kserve_lite.codecs.json_tensors import loads
from kserve_lite.codecs.v2_client import Asked
from kserve_lite.errors import (
    DeadlineExceeded,
    InferenceFault,
    Unsupported,
)
from kserve_lite.forwarding import v2_calls
from kserve_lite.forwarding.bridging import fitted, tensors_of, v1_answer, v1_body
from kserve_lite.forwarding.failures import OF_HTTP, Failure, Failures
from kserve_lite.forwarding.headers import forwarded
from kserve_lite.forwarding.health import Health
from kserve_lite.forwarding.rest import Answer, Broken, Rest, Unreachable
from kserve_lite.forwarding.settings import GRPC, ForwardingSettings, address_of
from kserve_lite.forwarding.tls import client_tls
from kserve_lite.handlers import Stage
from kserve_lite.messages import MAX_TIMEOUT_MS, Context, InferResponse
from kserve_lite.tensors import TensorSpec
from kserve_lite.wire.limits import WireLimits

if TYPE_CHECKING:
    from kserve_lite.forwarding.channel import Grpc

log = logging.getLogger("kserve_lite")

# Seconds before the first retry, at most, and before any.
FIRST_DELAY, LONGEST_DELAY = 0.1, 5.0
# Protocols whose clients say what their tensors are.
_TYPED = ("v2", "grpc")
# Bytes of a refusal that are looked at for its words.
_MAX_REFUSAL = 1 << 16
# The server ends a request whose time is over, and both at once would be one too many.
_GRACE = 0.25

Specs = Sequence[TensorSpec]
Attempt = Callable[[float], Awaitable[Any]]


class Upstream:
    """A server that requests are forwarded to.

    host: `host[:port][/path]`. max_size: bytes that an answer may have. explains:
    whether it is an explainer, which is V1 whatever the predictor speaks.
    Raises SettingsError for a host that is none, StartupError where certificates cannot
    be read or httpx is missing. It connects when it is first asked.
    """

    def __init__(
        self,
        settings: ForwardingSettings,
        host: str,
        *,
        explains: bool = False,
        max_size: int = WireLimits().max_body_size,
    ) -> None:
        self._settings = settings
        self._protocol = "v1" if explains else settings.predictor_protocol
        address = address_of(host, "explainer_host" if explains else "predictor_host")
        self._failures = Failures(
            "explainer" if explains else "predictor", address.host
        )
        tls = client_tls(settings, h2=self._protocol == GRPC)
        self._rest: Rest | None = None
        self._grpc: Grpc | None = None
        if self._protocol == GRPC:
            from kserve_lite.forwarding.channel import Grpc

            self._grpc = Grpc(address, tls, max_size=max_size)
        else:
            self._rest = Rest(address, tls, max_size=max_size)
        self._takes = v2_calls.Takes()
        self._takes_binary = v2_calls.TakesBinary()
        self._told = -math.inf
        client = self._grpc or self._rest_of()
        self._health = Health(client, is_v1=self._protocol == "v1")

    async def infer(
        self,
        payload: Any,
        context: Context,
        verb: Stage = Stage.PREDICT,
        *,
        inputs: Specs = (),
        outputs: Specs = (),
        asks_outputs: bool = True,
    ) -> Any:
        """Have a request answered; returns decoded V1 JSON or an InferResponse.

        payload: decoded V1 JSON, an InferRequest, or what a preprocess handler may
            return: an array, a tuple or dict of arrays. inputs, outputs: what is
            declared of them, for what goes from one protocol into the other.
        asks_outputs: whether the outputs that the payload asks for are the predictor's.
        A V1 predictor's answer to a V2 client becomes an InferResponse.
        Raises InferenceFault; TypeError and ValueError, in words for the author of the
        model, for what cannot go from one protocol into the other.
        """
        left = self._settings.predictor_request_timeout_seconds or math.inf
        remaining = context.remaining()
        if remaining is not None and remaining < left:
            left, late = remaining, _GRACE
        else:
            late = 0.0
        if left <= 0:
            raise DeadlineExceeded
        ends = time.monotonic() + left
        try:
            with anyio.fail_after(None if left == math.inf else left + late):
                attempt = await self._written(
                    payload, context, verb, inputs, asks_outputs
                )
                answer = await self._tried(attempt, ends, context)
        except TimeoutError:
            raise DeadlineExceeded from None
        if isinstance(answer, InferResponse) or context.protocol == "v1":
            return answer
        return v1_answer(answer, context, outputs)

    async def _written(
        self,
        payload: Any,
        context: Context,
        verb: Stage,
        inputs: Specs,
        asks_outputs: bool,
    ) -> Attempt:
        """The request as the predictor takes it, ready to be sent, more than once."""
        headers = forwarded(context)
        if verb is Stage.EXPLAIN and self._protocol != "v1":
            raise Unsupported("Explanations are V1 only: they need a V1 explainer.")
        if self._protocol == "v1":
            body = v1_body(payload, context, inputs)
            return partial(self._ask_v1, body, headers, context, verb)
        tensors = tensors_of(payload, context, inputs)
        came_typed = context.protocol in _TYPED and tensors is payload
        if not inputs and not came_typed:
            client = self._grpc or self._rest_of()
            tensors = fitted(tensors, await self._takes.of(context.model_name, client))
        request = v2_calls.asked(tensors, context, asks_outputs=asks_outputs)
        if self._grpc is not None:
            message = v2_calls.message_of(request, context)
            return partial(self._ask_grpc, message, headers, context)
        return partial(self._ask_v2, request, headers, context)

    async def _tried(self, attempt: Attempt, ends: float, context: Context) -> Any:
        """Make an attempt, and others where they are allowed and have the time."""
        retries = self._settings.predictor_request_retries
        delay = FIRST_DELAY
        while True:
            try:
                return await attempt(ends - time.monotonic())
            except Unreachable as error:
                failure = self._failures.unreachable(str(error))
            except Broken as error:
                failure = self._failures.failed(str(error), context.request_id)
            except Failure as error:
                failure = error
            self._tell(failure, context)
            # Between half and all of it, so that those that failed together part.
            pause = max(delay * random.uniform(0.5, 1), failure.after)  # noqa: S311
            left = ends - time.monotonic() - pause
            if not failure.again or retries <= 0 or left <= 0 or pause > LONGEST_DELAY:
                raise failure.fault from None
            retries -= 1
            delay = min(2 * delay, LONGEST_DELAY)
            await anyio.sleep(pause)

    def _tell(self, failure: Failure, context: Context) -> None:
        """Log what the client is not told; of many alike, one a second."""
        now = time.monotonic()
        if not failure.why or (failure.again and now < self._told + 1):
            return
        if failure.again:
            self._told = now
        log.warning(
            "forwarding for model %s: %s; request id %s",
            context.model_name,
            failure.why,
            context.request_id,
        )

    # --- the protocols ----------------------------------------------------------------

    async def _ask_v1(
        self,
        body: bytes,
        headers: dict[str, str],
        context: Context,
        verb: Stage,
        left: float,
    ) -> Any:
        path = f"/v1/models/{quote(context.model_name, safe='')}:{verb.value}"
        own = {"content-type": "application/json", **_time_left(left)}
        answer = await self._asked_rest("POST", path, headers | own, body, context)
        try:
            return loads(answer.body)
        except InferenceFault as error:
            raise Broken(f"its answer is no JSON: {error}") from error

    async def _ask_v2(
        self,
        request: Asked,
        headers: dict[str, str],
        context: Context,
        left: float,
    ) -> InferResponse:
        is_binary = await self._takes_binary.asked(request, self._rest_of())
        body, own = v2_calls.body_of(request, is_binary=is_binary)
        own |= _time_left(left)
        path = f"/v2/models/{quote(context.model_name, safe='')}/infer"
        answer = await self._asked_rest("POST", path, headers | own, body, context)
        return v2_calls.response_of(answer)

    async def _ask_grpc(
        self, message: Any, headers: dict[str, str], context: Context, left: float
    ) -> InferResponse:
        from kserve_lite.forwarding.channel import Refusal

        answer = await self._grpc_of().ask("ModelInfer", message, headers, left=left)
        if not isinstance(answer, Refusal):
            return v2_calls.response_of_message(answer)
        raise self._failures.refused(
            v2_calls.kind_of(answer),
            answer.text,
            status=answer.code,
            model=context.model_name,
            request_id=context.request_id,
        )

    async def _asked_rest(
        self,
        method: str,
        path: str,
        headers: dict[str, str],
        body: bytes,
        context: Context,
    ) -> Answer:
        """Ask over REST; raises Failure for all but success."""
        answer = await self._rest_of().ask(method, path, headers, body)
        if answer.status == 200:
            return answer
        document = None
        with suppress(InferenceFault):
            if len(answer.body) <= _MAX_REFUSAL:
                document = loads(answer.body)
        after = answer.headers.get("retry-after", "")
        raise self._failures.refused(
            OF_HTTP.get(answer.status),
            document.get("error") if isinstance(document, dict) else None,
            status=answer.status,
            model=context.model_name,
            request_id=context.request_id,
            after=float(after) if after.isdecimal() and len(after) < 9 else None,
        )

    def _rest_of(self) -> Rest:
        if self._rest is None:
            raise RuntimeError("the predictor is asked over gRPC")
        return self._rest

    def _grpc_of(self) -> Grpc:
        if self._grpc is None:
            raise RuntimeError("the predictor is asked over REST")
        return self._grpc

    # --- its life ---------------------------------------------------------------------

    async def ready(self, model_name: str) -> bool:
        """Whether it says that it has the model and that it is ready; raises nothing.

        Who cannot be asked within 2 s is not.
        """
        return await self._health.ready(model_name)

    async def close(self) -> None:
        """Close its connections."""
        if self._rest is not None:
            await self._rest.close()
        if self._grpc is not None:
            await self._grpc.close()


def _time_left(left: float) -> dict[str, str]:
    """Until when an answer is waited for; a predictor of ours ends its work then."""
    if left == math.inf:
        return {}
    milliseconds = min(max(1, int(left * 1e3)), MAX_TIMEOUT_MS)
    return {"x-request-timeout-ms": str(milliseconds)}
