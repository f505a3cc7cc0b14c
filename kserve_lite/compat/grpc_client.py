"""InferenceGRPCClient: the gRPC client of KServe's SDK, by grpclib.

It keeps one HTTP/2 connection to its server, which all calls share, in the event loop
that makes the first of them. grpcio is not needed; what only grpcio can do is refused
when the client is made. Every failure is an `RpcError`.
"""

# ruff: noqa: ASYNC109 - KServe's calls have a timeout each

from __future__ import annotations

import asyncio
import random
import ssl
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

from kserve_lite.compat.errors import InvalidInput
from kserve_lite.compat.logging import trace_logger
from kserve_lite.compat.protocol.infer_type import InferRequest, InferResponse
from kserve_lite.errors import KServeLiteError, SettingsError
from kserve_lite.forwarding.rest import Broken, Unreachable
from kserve_lite.forwarding.settings import address_of

Headers: TypeAlias = Mapping[str, Any] | Sequence[tuple[str, Any]] | None

# KServe's: seconds before the first retry, doubled for each further one up to the most.
FIRST_DELAY = 0.1
MOST_DELAY = 1.0

_SEND, _RECEIVE = "grpc.max_send_message_length", "grpc.max_receive_message_length"
_RETRIES = "grpc.enable_retries"


class UseClientDefault:
    """For a call's timeout: the client's own. None would mean: no timeout."""


USE_CLIENT_DEFAULT = UseClientDefault()


class RpcError(KServeLiteError):
    """A call that failed, with its status.

    A program that has imported grpcio can catch it as `grpc.RpcError`, too.
    """

    def __init__(self, status: str, details: str) -> None:
        super().__init__(f"{status}: {details}")
        self.status = status
        self._details = details

    def code(self) -> Any:
        """The status: grpcio's StatusCode where that is imported, grpclib's if not."""
        grpc = sys.modules.get("grpc")
        if grpc is not None:
            return grpc.StatusCode[self.status]
        from grpclib.const import Status

        return Status[self.status]

    def details(self) -> str:
        """The words that came with the status."""
        return self._details


def _failed(status: str, details: str) -> RpcError:
    grpc = sys.modules.get("grpc")
    kinds = (RpcError,) if grpc is None else (RpcError, grpc.RpcError)
    error: RpcError = type("RpcError", kinds, {"__module__": __name__})(status, details)
    return error


class InferenceGRPCClient:
    """A client of one server of the Open Inference Protocol.

    url: host or host:port; without a port 443 with TLS, else 80. verbose: log what is
    sent and what comes.
    use_ssl: speak TLS. root_certificates: a PEM file with the authorities that the
    server's certificate may come from, instead of the system's. certificate_chain,
    private_key: PEM files of the client's own certificate. creds: an ssl.SSLContext
    that stands for all of these.
    channel_args: of grpcio's the message sizes and `("grpc.enable_retries", 0)`.
    timeout: seconds for a call, retries included; None: any number.
    retries: how often a call is made again that found no connection or was answered
    with UNAVAILABLE, with growing pauses; not one whose connection broke amid it.

    Raises ValueError for what cannot be, TypeError for credentials of grpcio.
    """

    def __init__(  # noqa: PLR0917 - KServe's
        self,
        url: str,
        verbose: bool = False,
        use_ssl: bool = False,
        root_certificates: str | None = None,
        private_key: str | None = None,
        certificate_chain: str | None = None,
        creds: Any = None,
        channel_args: Collection[tuple[str, Any]] | None = None,
        timeout: float | None = 60,
        retries: int | None = 3,
    ) -> None:
        from kserve_lite.forwarding.channel import Grpc

        if creds is not None and not isinstance(creds, ssl.SSLContext):
            raise TypeError(
                f"creds cannot be a {type(creds).__name__}, which only grpcio can read:"
                " give an ssl.SSLContext, or use_ssl with paths of PEM files"
            )
        tls = creds
        if use_ssl and tls is None:
            tls = ssl.create_default_context(cafile=root_certificates)
            if certificate_chain is not None:
                tls.load_cert_chain(certificate_chain, private_key)
        if tls is not None:
            tls.set_alpn_protocols(["h2"])
        arguments = _read_arguments(channel_args or ())
        self._most_sent = arguments.get(_SEND, -1)
        most = arguments.get(_RECEIVE, -1)
        self._retries = (retries or 0) if arguments.get(_RETRIES, 1) else 0
        self._timeout = timeout
        self._verbose = verbose
        try:
            address = address_of(url.removeprefix("dns:").lstrip("/"), "url")
        except SettingsError:
            raise ValueError(f"url must be host or host:port, got {url!r}") from None
        if address.path:
            raise ValueError(f"url {url!r} has a path, which gRPC has no place for")
        self._rpc = Grpc(address, tls, max_size=most if most >= 0 else sys.maxsize)

    async def __aenter__(self) -> InferenceGRPCClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection."""
        await self._rpc.close()

    async def infer(
        self,
        infer_request: InferRequest,
        timeout: float | UseClientDefault | None = USE_CLIENT_DEFAULT,
        headers: Headers = None,
    ) -> InferResponse:
        """Ask for an inference. timeout: as the client's; headers: metadata.

        Raises RpcError, InvalidInput for what is no InferRequest.
        """
        if not isinstance(infer_request, InferRequest):
            raise InvalidInput("Inference is asked for with an InferRequest.")
        message = infer_request.to_grpc()
        if self._verbose:
            trace_logger.info("infer request: %s", infer_request)
        response = InferResponse.from_grpc(
            await self._call("ModelInfer", message, timeout, headers)
        )
        if self._verbose:
            trace_logger.info("infer response: %s", response)
        return response

    async def is_server_ready(
        self,
        timeout: float | UseClientDefault | None = USE_CLIENT_DEFAULT,
        headers: Headers = None,
    ) -> bool:
        """Whether the server is ready; raises RpcError."""
        return bool((await self._ask("ServerReady", {}, timeout, headers)).ready)

    async def is_server_live(
        self,
        timeout: float | UseClientDefault | None = USE_CLIENT_DEFAULT,
        headers: Headers = None,
    ) -> bool:
        """Whether the server is live; raises RpcError."""
        return bool((await self._ask("ServerLive", {}, timeout, headers)).live)

    async def is_model_ready(
        self,
        model_name: str,
        timeout: float | UseClientDefault | None = USE_CLIENT_DEFAULT,
        headers: Headers = None,
    ) -> bool:
        """Whether the model is ready; raises RpcError, also where there is none."""
        members = {"name": model_name}
        return bool((await self._ask("ModelReady", members, timeout, headers)).ready)

    async def _ask(
        self,
        method: str,
        members: dict[str, str],
        timeout: float | UseClientDefault | None,
        headers: Headers,
    ) -> Any:
        from kserve_lite.codecs.proto import message_class

        message = message_class(f"inference.{method}Request")(**members)
        answer = await self._call(method, message, timeout, headers)
        if self._verbose:
            trace_logger.info("%s: %s", method, answer)
        return answer

    async def _call(
        self,
        method: str,
        message: Any,
        timeout: float | UseClientDefault | None,
        headers: Headers,
    ) -> Any:
        if 0 <= self._most_sent < message.ByteSize():
            raise _failed("RESOURCE_EXHAUSTED", "The message is larger than allowed.")
        seconds = self._timeout if isinstance(timeout, UseClientDefault) else timeout
        left = float("inf") if seconds is None else max(seconds, 0.0)
        until = time.monotonic() + left
        metadata: Any = headers or {}
        try:
            async with asyncio.timeout(seconds):
                for pause in (*_pauses(self._retries), None):
                    left = max(until - time.monotonic(), 0.0)
                    try:
                        return await self._try(method, message, metadata, left)
                    except _TryLater as later:
                        if pause is None:
                            raise later.error from None
                    await asyncio.sleep(pause)
        except TimeoutError:
            raise _failed("DEADLINE_EXCEEDED", f"No answer in {seconds} s.") from None

    async def _try(self, method: str, message: Any, metadata: Any, left: float) -> Any:
        """Call once; raises _TryLater where the server has not begun with it."""
        from kserve_lite.forwarding.channel import Refusal

        try:
            answer = await self._rpc.ask(method, message, metadata, left=left)
        except Unreachable as error:
            raise _TryLater(_failed("UNAVAILABLE", f"No connection: {error}")) from None
        except Broken as error:
            raise _failed("UNAVAILABLE", f"The connection broke: {error}") from None
        if not isinstance(answer, Refusal):
            return answer
        failure = _failed(answer.code, answer.text)
        raise _TryLater(failure) if answer.code == "UNAVAILABLE" else failure


class _TryLater(Exception):
    def __init__(self, error: RpcError) -> None:
        self.error = error


def _pauses(retries: int) -> list[float]:
    """Seconds before each retry; a random part keeps clients from coming at once."""
    return [
        min(FIRST_DELAY * 2**number, MOST_DELAY) * random.uniform(0.8, 1.2)  # noqa: S311
        for number in range(retries)
    ]


def _read_arguments(channel_args: Collection[tuple[str, Any]]) -> dict[str, int]:
    arguments = dict(channel_args)
    known = (_SEND, _RECEIVE, _RETRIES)
    for name, value in arguments.items():
        if name not in known or not isinstance(value, int):
            raise ValueError(
                f"channel_args: {name} = {value!r} is grpcio's; here there are "
                f"{', '.join(known)}, and the arguments `timeout` and `retries`"
            )
    return arguments
