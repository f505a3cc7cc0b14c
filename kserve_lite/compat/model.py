"""A model as code for KServe's SDK writes it: a class whose methods are overridden.

Nothing here runs a request of a server: `serving.py` makes a native model of these
methods, and the one way to run requests runs that. `Model.__call__` is for code that
calls a model by itself, in a test say.
"""

from __future__ import annotations

import asyncio
import enum
import inspect
import os
from abc import ABC, abstractmethod
from copy import copy
from itertools import pairwise
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary

from kserve_lite.codecs.json_tensors import loads
from kserve_lite.codecs.v1 import encode_tensors
from kserve_lite.compat.constants.constants import PredictorProtocol
from kserve_lite.compat.errors import InvalidInput
from kserve_lite.compat.logging import trace_logger
from kserve_lite.compat.predictor_config import PredictorConfig, get_predictor_config
from kserve_lite.compat.protocol.requests import InferRequest
from kserve_lite.compat.protocol.responses import InferResponse
from kserve_lite.handlers import Stage
from kserve_lite.messages import Context
from kserve_lite.messages import InferResponse as NativeResponse

if TYPE_CHECKING:
    from kserve_lite.forwarding import Upstream

InferReturnValueTypes: TypeAlias = Any
InferReturnType: TypeAlias = Any


class InferenceVerb(enum.Enum):
    """What a model is asked to do."""

    EXPLAIN = 1
    PREDICT = 2


class Headers(dict[str, str]):
    """A request's headers, a dict of the handlers' own, and the request's context."""

    context: Context | None = None

    def __reduce__(self) -> tuple[type[dict[str, str]], tuple[dict[str, str]]]:
        # Handlers copy them, and send them to other processes, where no context can go.
        return dict, (dict(self),)


class BaseKServeModel(ABC):
    """What a repository and a server know of a model.

    ready: whether it answers. engine: whether `start_engine` is to be run by the
    server, on its event loop.
    """

    @abstractmethod
    def __init__(self, name: str) -> None:
        self.name = name
        self.ready = False
        self.engine = False

    async def healthy(self) -> bool:
        """Whether the model is ready, asked before each request and by probes."""
        return self.ready

    def load(self) -> Any:
        """Load the model; called by the program itself, before `ModelServer.start`."""
        self.ready = True
        return self.ready

    def start(self) -> None:
        """Called by `ModelServer.start`."""
        self.ready = True

    async def start_engine(self) -> None:
        """Called on the server's event loop where `engine` is set."""
        self.ready = True

    def stop(self) -> None:
        """Called when the model is unloaded, or the server stops."""
        self.ready = False

    def stop_engine(self) -> None:
        """Called after `stop` where `engine` is set."""
        self.ready = False


class InferenceModel(BaseKServeModel):
    """A model that is one call: a request's payload in, the answer out."""

    @abstractmethod
    def __call__(
        self,
        body: Any,
        headers: dict[str, str] | None = None,
        verb: InferenceVerb = InferenceVerb.PREDICT,
    ) -> Any:
        """Return the answer, or the answer and a dict of headers for it."""

    def get_input_types(self) -> Any:
        """Dicts of name, datatype and shape: shown as metadata, not enforced."""
        return []

    def get_output_types(self) -> Any:
        """Dicts of name, datatype and shape: shown as metadata, not enforced."""
        return []


class Model(InferenceModel):
    """A model whose requests run preprocess, validate, predict or explain, postprocess.

    name: how clients address it. return_response_headers: predict and postprocess get
    a third argument, a dict for headers of the answer.

    Methods may be `async def`, which run on the event loop, or `def`, which run in
    threads, several at a time. The payload is V1's decoded JSON, or an InferRequest.
    A model without `predict` forwards to the predictor of `predictor_config`, one
    without `explain` to `explainer_host`.
    """

    def __init__(self, name: str, return_response_headers: bool = False) -> None:
        super().__init__(name)
        self.explainer_host: str | None = None
        self.enable_latency_logging = False
        self.required_response_headers = return_response_headers

    @property
    def predictor_config(self) -> PredictorConfig | None:
        return get_predictor_config()

    async def __call__(
        self,
        body: Any,
        headers: dict[str, str] | None = None,
        verb: InferenceVerb = InferenceVerb.PREDICT,
    ) -> tuple[Any, dict[str, str]]:
        """Run the model's methods in order, all of them on the event loop.

        Returns the answer and the headers that the methods set for it.
        """
        response_headers: dict[str, str] = {}
        more = (response_headers,) if self.required_response_headers else ()
        clock = [perf_counter()]

        async def run(method: Any, *arguments: Any) -> Any:
            value = method(*arguments)
            value = await value if inspect.isawaitable(value) else value
            clock.append(perf_counter())
            return value

        value = await run(self.preprocess, body, headers)
        value = await run(self.validate, value)
        if verb is InferenceVerb.EXPLAIN:
            value = await run(self.explain, value, headers)
        elif verb is InferenceVerb.PREDICT:
            value = await run(self.predict, value, headers, *more)
        else:
            raise NotImplementedError(f"there is no verb {verb!r}")
        value = await run(self.postprocess, value, headers, *more)
        if self.enable_latency_logging:
            took = [round((b - a) * 1e3, 6) for a, b in pairwise(clock)]
            is_explain = verb is InferenceVerb.EXPLAIN
            trace_logger.info(
                "requestId: %s, preprocess_ms: %s, explain_ms: %s, predict_ms: %s, "
                "postprocess_ms: %s",
                (headers or {}).get("x-request-id", "N.A."),
                took[0],
                took[2] if is_explain else 0,
                0 if is_explain else took[2],
                took[3],
            )
        return value, response_headers

    async def preprocess(self, payload: Any, headers: Any = None) -> Any:
        """Turn a request's payload into that of predict or explain."""
        return payload

    def validate(self, payload: Any) -> Any:
        """Raise InvalidInput for a payload that no predictor of the protocol takes.

        Runs after preprocess: in its thread, or on the event loop where that is an
        `async def`.
        """
        config = self.predictor_config
        if config is None or not isinstance(payload, dict):
            return payload
        named = {"v1": "instances", "v2": "inputs"}.get(config.protocol, "")
        if named in payload and not isinstance(payload[named], list):
            raise InvalidInput(f'Expected "{named}" to be a list')
        return payload

    async def predict(
        self, payload: Any, headers: Any = None, response_headers: Any = None
    ) -> Any:
        """Return what the predictor of `predictor_config` answers.

        Raises NotImplementedError where there is none, InferenceFault where it fails.
        """
        config = self.predictor_config
        if config is None:
            raise NotImplementedError("Could not find PredictorConfig.")
        if not config.predictor_host:
            raise NotImplementedError("Could not find predictor_host.")
        return await self._forward(Stage.PREDICT, payload, headers)

    async def explain(self, payload: Any, headers: Any = None) -> Any:
        """Return what the explainer at `explainer_host` answers, asked by V1.

        Raises NotImplementedError where there is none, InferenceFault where it fails.
        """
        if self.explainer_host is None:
            raise NotImplementedError("Could not find explainer_host.")
        return await self._forward(Stage.EXPLAIN, payload, headers)

    async def postprocess(
        self, result: Any, headers: Any = None, response_headers: Any = None
    ) -> Any:
        """Turn predict's or explain's result into the answer."""
        return result

    async def _forward(self, verb: Stage, payload: Any, headers: Any) -> Any:
        if hasattr(payload, "raw_input_contents"):
            payload = InferRequest.from_grpc(payload)
        is_json = not isinstance(payload, InferRequest)
        # Handlers pass on the headers that they got, which know the request; a dict of
        # their own gives what it has.
        context = copy(getattr(headers, "context", None))
        if context is None:
            context = Context(self.name, None, "v1" if is_json else "v2", headers or {})
        came_by = context.protocol
        context.model_name = self.name  # it may be served under another
        if is_json:  # and so is what the handler wants back
            context.protocol = "v1"
        answer = await upstream_of(self, verb).infer(
            payload if is_json else payload.to_native(), context, verb
        )
        if not isinstance(answer, NativeResponse):
            return answer
        if came_by == "v1" and is_json and not _is_v2(payload):
            return loads(encode_tensors(answer, "predictions"))
        return InferResponse.from_native(answer)


def _is_v2(payload: Any) -> bool:
    """Whether JSON is a V2 request: a V2 predictor's answer is then left as it is."""
    inputs = payload.get("inputs") if isinstance(payload, dict) else None
    return isinstance(inputs, list) and any(
        isinstance(tensor, dict) and "datatype" in tensor for tensor in inputs
    )


# A connection belongs to the event loop that opened it.
_UPSTREAMS: WeakKeyDictionary[Any, dict[Any, Upstream]] = WeakKeyDictionary()


def upstream_of(model: Model, verb: Stage) -> Upstream:
    """The kept connection of this event loop to the predictor or explainer."""
    # Late: what speaks HTTP/2 to others costs time and memory.
    from kserve_lite.forwarding import ForwardingSettings, Upstream

    config = model.predictor_config or PredictorConfig(None)
    if verb is Stage.EXPLAIN:
        host = model.explainer_host or ""
        which: dict[str, Any] = {"explainer_host": host}
    else:
        host = config.predictor_host or ""
        which = {"predictor_host": host, "predictor_protocol": config.protocol}
    settings = ForwardingSettings(
        **which,
        predictor_use_ssl=config.use_ssl,
        predictor_ca_certs=os.environ.get("REQUESTS_CA_BUNDLE", "")
        or os.environ.get("CURL_CA_BUNDLE", ""),
        predictor_request_timeout_seconds=config.timeout,
        predictor_request_retries=config.retries,
    )
    loop = asyncio.get_running_loop()
    known = _UPSTREAMS.setdefault(loop, {})
    if settings not in known:
        explains = verb is Stage.EXPLAIN
        known[settings] = Upstream(settings, host, explains=explains)
    return known[settings]


async def close_upstreams() -> None:
    """Close what this event loop has open to predictors and explainers."""
    for upstream in _UPSTREAMS.pop(asyncio.get_running_loop(), {}).values():
        await upstream.close()


def is_v2(protocol: PredictorProtocol) -> bool:
    """Whether a protocol is V2, over REST or gRPC."""
    return protocol != PredictorProtocol.REST_V1


def get_latency_ms(start: float, end: float) -> float:
    """Milliseconds between two times in seconds."""
    return round((end - start) * 1e3, 9)
