"""What is particular to V2 predictors: requests as they take them, answers read.

Tensors go binary where a predictor says that it knows them so: V2's server metadata
lists `binary_tensor_data`. JSON every predictor knows (MLServer nothing else), but it
takes tens of times longer for large tensors. FP16 and BF16 always go binary, as JSON
has no place for them in KServe's own servers. Over gRPC tensors are always raw.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import anyio

from kserve_lite.codecs import v2_client
from kserve_lite.codecs.json_tensors import loads
from kserve_lite.codecs.v2_client import Asked
from kserve_lite.errors import InferenceFault, InvalidInput, Kind
from kserve_lite.forwarding.failures import OF_GRPC
from kserve_lite.forwarding.rest import Answer, Broken, Rest, Unreachable
from kserve_lite.messages import Context, InferRequest, InferResponse
from kserve_lite.tensors import DATATYPES

if TYPE_CHECKING:
    from kserve_lite.forwarding.channel import Grpc, Refusal

_JSON_SIZE = "inference-header-content-length"
_HALVES = ("FP16", "BF16")
# Seconds that what a predictor knows counts, since another version may take its place,
# and that it may take to say it.
KNOWN_FOR, ASKING_TIMEOUT = 60.0, 2.0
# How the client wants its own answer is between it and this server.
_OF_CLIENT = ("binary_data_output", "triton_enable_empty_final_response")


def asked(request: InferRequest, context: Context, *, asks_outputs: bool) -> Asked:
    """What a predictor is asked; without an id of the client's, under the request's.

    Raises InvalidInput for parameters that V2 has no type for; generate's may be any.
    """
    parameters = {k: v for k, v in request.parameters.items() if k not in _OF_CLIENT}
    for name, value in parameters.items():
        if not isinstance(value, (str, int, float)):
            raise InvalidInput(f"The parameter '{name}' must be text or a number.")
    outputs = [output.name for output in request.outputs] if asks_outputs else []
    request_id = request.id or context.request_id
    return Asked(request.inputs, parameters, outputs, request_id)


class TakesBinary:
    """Whether a predictor takes binary tensors: its own word, asked once a minute."""

    def __init__(self) -> None:
        self._known = False
        self._until = -math.inf

    async def asked(self, request: Asked, rest: Rest) -> bool:
        if any(tensor.datatype in _HALVES for tensor in request.inputs):
            return True
        if time.monotonic() >= self._until:
            self._until = time.monotonic() + KNOWN_FOR  # others need not ask meanwhile
            try:
                self._known = await _says_binary(rest)
            except BaseException:  # nobody was there, or the request was cancelled
                self._until = -math.inf
                raise
        return self._known


async def _says_binary(rest: Rest) -> bool:
    with anyio.move_on_after(ASKING_TIMEOUT):
        try:
            answer = await rest.ask("GET", "/v2", {})
            return "binary_tensor_data" in loads(answer.body)["extensions"]
        except (Broken, InferenceFault, LookupError, TypeError):
            pass
    return False


class Takes:
    """What a predictor's models take, by its own metadata, asked once a minute."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[float, dict[str, str]]] = {}

    async def of(self, model_name: str, client: Rest | Grpc) -> dict[str, str]:
        """The datatypes of a model's inputs by name; empty where it does not say."""
        until, known = self._known.get(model_name, (-math.inf, {}))
        if time.monotonic() < until:
            return known
        if model_name in self._known:
            # One asks again; what was known counts for others that come meanwhile.
            self._known[model_name] = time.monotonic() + KNOWN_FOR, known
        takes = await _inputs_of(model_name, client)
        if takes is None:
            return known
        self._known[model_name] = time.monotonic() + KNOWN_FOR, takes
        return takes


async def _inputs_of(model_name: str, client: Rest | Grpc) -> dict[str, str] | None:
    """None where it could not be asked."""
    with anyio.move_on_after(ASKING_TIMEOUT):
        try:
            if isinstance(client, Rest):
                path = f"/v2/models/{quote(model_name, safe='')}"
                answer = await client.ask("GET", path, {})
                document = loads(answer.body)
                pairs = [(i["name"], i["datatype"]) for i in document["inputs"]]
            else:
                pairs = await _inputs_over_grpc(model_name, client)
            return {str(name): kind for name, kind in pairs if kind in DATATYPES}
        except (Broken, Unreachable):
            return None
        except (InferenceFault, LookupError, TypeError):
            return {}
    return None


async def _inputs_over_grpc(model_name: str, grpc: Grpc) -> list[tuple[str, str]]:
    from kserve_lite.codecs.proto import message_class

    request = message_class("inference.ModelMetadataRequest")(name=model_name)
    answer = await grpc.ask("ModelMetadata", request, {}, left=ASKING_TIMEOUT)
    return [(i.name, i.datatype) for i in getattr(answer, "inputs", ())]


def body_of(request: Asked, *, is_binary: bool) -> tuple[bytes, dict[str, str]]:
    """The body of a request, and the headers that say what it is."""
    body, size = v2_client.write_json(request, binary=is_binary)
    if size is None:
        return body, {"content-type": "application/json"}
    kind = "application/octet-stream"
    return body, {"content-type": kind, _JSON_SIZE: str(size)}


def response_of(answer: Answer) -> InferResponse:
    """Read an answer; raises Broken where it is none."""
    size = answer.headers.get(_JSON_SIZE)
    try:
        json_size = None if size is None else int(size)
        if not 0 <= (json_size or 0) <= len(answer.body):
            raise ValueError(f"it has no {json_size} bytes of JSON")
        return v2_client.read_json(answer.body, json_size)
    except v2_client.MALFORMED as error:
        raise Broken(f"its answer is not V2: {error!r}") from error


def message_of(request: Asked, context: Context) -> Any:
    """The gRPC message of a request; raises TypeError for what gRPC cannot say."""
    return v2_client.write_proto(request, model=context.model_name, version=None)


def response_of_message(message: Any) -> InferResponse:
    """Read a ModelInferResponse; raises Broken where it makes no sense."""
    try:
        return v2_client.read_proto(message)
    except v2_client.MALFORMED as error:
        raise Broken(f"its answer is not V2: {error!r}") from error


def kind_of(refusal: Refusal) -> Kind | None:
    """What a status other than OK is; None: the predictor has failed."""
    # gRPC's libraries say the same of a message that is too large as of a server that
    # has too much to do; the one will be refused again, the other not.
    if refusal.code == "RESOURCE_EXHAUSTED" and "larger than max" in refusal.text:
        return Kind.INVALID_INPUT
    return OF_GRPC.get(refusal.code)
