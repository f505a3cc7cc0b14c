"""A predictor over REST: requests out on kept connections, answers in, bounded.

httpx's transport alone, without its client: nothing is redirected, no cookie is kept,
no proxy of the environment gets what is meant for a host of the cluster, and no line
with the predictor's URL is logged a request. httpx is imported late: it is an extra.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from kserve_lite.errors import StartupError
from kserve_lite.forwarding.settings import Address

if TYPE_CHECKING:
    import httpx

# Seconds for a connection to come about: a host that does not answer is as good as one
# that refuses, long before the request's own time is over.
CONNECT_TIMEOUT = 5.0
# Seconds that a connection is kept unused: less than the 5 after which uvicorn, so
# KServe's predictors at their shortest, closes it, so that the two seldom cross.
KEPT_FOR = 4.0
MAX_KEPT = 100


class Answer(NamedTuple):
    """A whole answer. headers: names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Unreachable(Exception):
    """No connection came about."""


class Broken(Exception):
    """The connection broke, or what came is no answer that can be taken."""


class Rest:
    """An HTTP/1.1 client of one server. max_size: bytes that an answer may have.

    Raises StartupError where httpx is missing.
    """

    def __init__(
        self, address: Address, tls: ssl.SSLContext | None, *, max_size: int
    ) -> None:
        try:
            import httpx
        except ImportError as error:
            raise StartupError(
                "to forward requests over REST httpx is needed, which is not "
                "installed: pip install 'kserve-lite[client]'"
            ) from error
        self._httpx = httpx
        self._max_size = max_size
        port = f":{address.port}" if address.port else ""
        scheme = "http" if tls is None else "https"
        self._base = f"{scheme}://{address.host}{port}{address.path}"
        self._urls: dict[str, httpx.URL] = {}
        # False is never used: a plain URL needs no context, and making one takes 20 ms.
        verify: Any = tls if tls is not None else False
        self._kept = httpx.AsyncHTTPTransport(
            verify=verify,
            trust_env=False,
            limits=httpx.Limits(
                max_keepalive_connections=MAX_KEPT, keepalive_expiry=KEPT_FOR
            ),
        )
        self._fresh = httpx.AsyncHTTPTransport(
            verify=verify,
            trust_env=False,
            limits=httpx.Limits(max_keepalive_connections=0),
        )

    async def ask(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: bytes = b"",
    ) -> Answer:
        """Send a request and return its answer, whatever the status.

        A kept connection may be closed by the other side just when it is used again.
        So where one ends before an answer has begun, the request is sent once more, on
        a new connection: RFC 9110 9.2.2 allows that for what may be done twice, and a
        prediction may. On a new connection it is not, and never after an answer began.
        Raises Unreachable, Broken. Cancelled, it closes its connection.
        """
        url = self._urls.get(path)
        if url is None:
            url = self._urls[path] = self._httpx.URL(self._base + path)
        request = self._httpx.Request(method, url, headers=headers, content=body)
        progress = _Progress()
        try:
            return await self._exchange(self._kept, request, progress)
        except Broken:
            if progress.connects or progress.answered:
                raise
        return await self._exchange(self._fresh, request, _Progress())

    async def _exchange(
        self,
        transport: httpx.AsyncHTTPTransport,
        request: httpx.Request,
        progress: _Progress,
    ) -> Answer:
        httpx = self._httpx
        # What else takes long, the request's own time ends.
        timeout = {"connect": CONNECT_TIMEOUT}
        request.extensions = {"timeout": timeout, "trace": progress.trace}
        try:
            response = await transport.handle_async_request(request)
            progress.answered = True
            try:
                body = await self._read(response)
            finally:
                await response.aclose()
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise Unreachable(str(error) or type(error).__name__) from error
        except httpx.TransportError as error:
            raise Broken(f"{type(error).__name__}: {error}") from error
        return Answer(response.status_code, response.headers, body)

    async def _read(self, response: httpx.Response) -> bytes:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise Broken("its answer is compressed, which was not asked for")
        body = bytearray()  # a list's entries take more than what a chunk may have
        stream: Any = response.stream
        async for chunk in stream:
            body += chunk
            if len(body) > self._max_size:
                raise Broken(f"its answer has more than {self._max_size} bytes")
        if _surplus(stream):
            # Else it is what the next request gets as its answer, whosever that is.
            await response.extensions["network_stream"].aclose()
        return bytes(body)

    async def close(self) -> None:
        await asyncio.gather(self._kept.aclose(), self._fresh.aclose())


def _surplus(stream: Any) -> bool:
    """Whether bytes came behind an answer's end, as its Content-Length has it.

    httpx has no way to ask; where it is built in another way, nothing is known.
    """
    inner = ("_httpcore_stream", "_stream", "_connection", "_h11_state")
    for name in (*inner, "trailing_data"):
        stream = getattr(stream, name, None)
    return bool(stream and stream[0])


class _Progress:
    """How far a request has come: whether a connection was made, an answer began."""

    __slots__ = ("answered", "connects")

    def __init__(self) -> None:
        self.connects = self.answered = False

    async def trace(self, event: str, _: Mapping[str, Any]) -> None:
        """Told of httpcore's events."""
        if event == "connection.connect_tcp.started":
            self.connects = True
