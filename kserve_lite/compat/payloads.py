"""Between the native path and KServe's methods: payloads in, answers and refusals out.

Nothing here calls a model: that is `serving.py`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, closing, nullcontext
from typing import Any

from kserve_lite import messages
from kserve_lite.codecs import v1, v2
from kserve_lite.compat.protocol.requests import InferRequest
from kserve_lite.compat.protocol.responses import InferResponse
from kserve_lite.errors import InferenceFault, InvalidInput, Kind
from kserve_lite.forwarding.failures import OF_HTTP
from kserve_lite.messages import Context


def given(payload: Any, context: Context) -> Any:
    """A request's payload as KServe's methods get it: JSON, or an InferRequest."""
    if not isinstance(payload, messages.InferRequest):
        return payload
    return InferRequest.from_native(
        payload, from_grpc=context.protocol == "grpc", raw=payload.raw
    )


def answer(result: Any, context: Context) -> Any:
    """What a model returned, or each item of it, as the native path takes it.

    Raises ValueError or TypeError, in words for the model's author, for what cannot be
    said.
    """
    if type(result) is dict:
        return result
    if isinstance(result, AsyncIterator):
        return _answers(result, context)
    if isinstance(result, Iterator):
        return _plain_answers(result, context)
    if hasattr(result, "raw_output_contents"):
        try:
            result = InferResponse.from_grpc(result)
        except InvalidInput as fault:  # it is not the client who wrote it
            raise ValueError(fault.reason) from None
    if isinstance(result, InferResponse):
        native = result.to_native()
        return _v2_json(native, context) if context.protocol == "v1" else native
    if context.protocol == "v1" and not isinstance(result, _AS_IT_IS):
        # The native path would name an array's rows.
        return _json(v1.encode(result), context)
    return result


_AS_IT_IS = (dict, list, str, bytes, bytearray, memoryview, int, float, type(None))


def _v2_json(response: messages.InferResponse, context: Context) -> bytes:
    """On V1 an InferResponse is the JSON that it is on V2."""
    response.id = response.id or context.request_id
    response.model_name = response.model_name or context.model_name
    pieces, _ = v2.encode(response)
    return _json(b"".join(pieces), context)


def _json(written: bytes, context: Context) -> bytes:
    own = context.response_headers
    if not any(name.lower() == "content-type" for name in own):
        own["content-type"] = "application/json"
    return written


async def _answers(items: Any, context: Context) -> AsyncIterator[Any]:
    async with aclosing(items) if hasattr(items, "aclose") else nullcontext():
        async for item in items:
            yield answer(item, context)


def _plain_answers(items: Any, context: Context) -> Iterator[Any]:
    with closing(items) if hasattr(items, "close") else nullcontext():
        for item in items:
            yield answer(item, context)


class HttpRefusal(InferenceFault):
    """What a FastAPI HTTPException of a model's method is to the client."""

    def __init__(self, kind: Kind, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def refusal_of(error: Exception) -> HttpRefusal | None:
    """FastAPI's HTTPException as a refusal, under the nearest status; None: no such.

    KServe's server is a FastAPI application, so its models raise these.
    """
    if not any(
        (kind.__module__, kind.__name__) == ("starlette.exceptions", "HTTPException")
        for kind in type(error).__mro__
    ):
        return None
    status = getattr(error, "status_code", 500)
    is_clients = 400 <= status < 500
    otherwise = Kind.INVALID_INPUT if is_clients else Kind.MODEL_FAILED
    return HttpRefusal(
        OF_HTTP.get(status, otherwise), str(getattr(error, "detail", ""))
    )
