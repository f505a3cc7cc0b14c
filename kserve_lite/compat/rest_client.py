"""InferenceRESTClient and RESTConfig: the REST client of KServe's SDK, by httpx.

What KServe's promises is kept here: retries, a client certificate, and a timeout for a
call as a whole. httpx comes with the extra `kserve-lite[client]` and is imported when a
client is made.
"""

# ruff: noqa: ASYNC109 - KServe's calls have a timeout each

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from kserve_lite.codecs.json_tensors import dumps, loads
from kserve_lite.compat.constants.constants import (
    INFERENCE_CONTENT_LENGTH_HEADER,
    PredictorProtocol,
)
from kserve_lite.compat.errors import InvalidInput, UnsupportedProtocol, translated
from kserve_lite.compat.grpc_client import USE_CLIENT_DEFAULT
from kserve_lite.compat.logging import trace_logger
from kserve_lite.compat.protocol.infer_type import InferRequest, InferResponse
from kserve_lite.compat.utils.utils import is_v1, is_v2

if TYPE_CHECKING:
    import httpx

# Seconds before the first retry, doubled for each further one up to the most, which
# also bounds what a server asks for with Retry-After.
FIRST_DELAY = 0.1
MOST_DELAY = 5.0

# The server, or what stands before it, has not begun with the request. Not 504: there
# the request may still run.
_RETRIED = (502, 503)


class RESTConfig:
    """How a client asks.

    transport: httpx's, in the place of a network connection. protocol: "v1" or "v2".
    retries: how often a request is sent again that found no connection, or whose
        prediction or explanation was refused with 502 or 503; with growing pauses, or
        as long as Retry-After says.
    http2: try HTTP/2, which only TLS can agree on.
    timeout: seconds for a call, retries included; None: any number; httpx's own
        Timeout, or a tuple, is for each step of a request.
    cert: the client's certificate, a PEM file or (file, key file[, password]).
    verify: whether the server's is checked; a file or folder of authorities, or an
        ssl.SSLContext. auth: httpx's. verbose: log what is sent and what comes.
    """

    def __init__(  # noqa: PLR0917 - KServe's
        self,
        transport: Any = None,
        protocol: str | PredictorProtocol = "v1",
        retries: int = 3,
        http2: bool = False,
        timeout: Any = 60,
        cert: Any = None,
        verify: str | bool | ssl.SSLContext = True,
        auth: Any = None,
        verbose: bool = False,
    ) -> None:
        self.transport = transport
        self.protocol = (
            protocol.value if isinstance(protocol, PredictorProtocol) else protocol
        )
        self.retries = retries
        self.http2 = http2
        self.timeout = timeout
        self.cert = cert
        self.verify = verify
        self.auth = auth
        self.verbose = verbose


class InferenceRESTClient:
    """A client of servers of V1 or of V2, the Open Inference Protocol.

    All calls take the server's base URL, headers to send along, and a timeout as
    RESTConfig has it. They raise httpx's errors: HTTPStatusError for a status other
    than 2xx, TimeoutException, ConnectError and so on, InvalidURL for a base URL that
    is none; UnsupportedProtocol for what the protocol does not have.

    Raises ImportError without httpx.
    """

    def __init__(self, config: RESTConfig | None = None) -> None:
        try:
            import httpx
        except ImportError as error:
            raise ImportError(
                "InferenceRESTClient needs httpx, which is not installed: "
                "pip install 'kserve-lite[client]'"
            ) from error
        self._httpx = httpx
        self._config = config or RESTConfig()
        self._client = httpx.AsyncClient(
            transport=self._config.transport,
            http2=self._config.http2,
            timeout=self._config.timeout,
            auth=self._config.auth,
            verify=_context(self._config),
        )

    async def __aenter__(self) -> InferenceRESTClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def infer(  # noqa: PLR0917 - KServe's
        self,
        base_url: httpx.URL | str,
        data: InferRequest | dict[str, Any],
        model_name: str | None = None,
        headers: Mapping[str, str] | None = None,
        response_headers: dict[str, str] | None = None,
        is_graph_endpoint: bool = False,
        timeout: Any = USE_CLIENT_DEFAULT,
    ) -> InferResponse | dict[str, Any]:
        """Ask for a prediction; return its answer, of V2 an InferResponse.

        response_headers: a dict that gets those of the answer. is_graph_endpoint:
        base_url is all of an InferenceGraph's URL, which answers with any JSON. Raises
        ValueError without a model's name.
        """
        sent = dict(headers or {})
        own = {"content-type": "application/json"}
        if isinstance(data, InferRequest):
            body, json_size = data.to_rest()
            if json_size is not None:
                own["content-type"] = "application/octet-stream"
                sent[INFERENCE_CONTENT_LENGTH_HEADER] = str(json_size)
        else:
            body = data
        content = body if isinstance(body, bytes) else dumps(body)
        if is_graph_endpoint:
            url = self._url(base_url, "")
        elif model_name is None:
            raise ValueError("a model_name is needed")
        else:
            url = self._model(base_url, model_name, ":predict", "/infer")
        response = await self._ask("POST", url, _merged(own, sent), timeout, content)
        self._checked(response)
        if response_headers is not None:
            response_headers.update(response.headers)
        if is_graph_endpoint or not self._is_v2:
            document: dict[str, Any] = self._json(response)
            return document
        size = response.headers.get(INFERENCE_CONTENT_LENGTH_HEADER)
        if size is None:
            size = str(len(response.content))
        if not size.isascii() or not size.isdecimal():
            raise InvalidInput(f"{INFERENCE_CONTENT_LENGTH_HEADER} is no number.")
        return InferResponse.from_bytes(response.content, int(size))

    async def explain(
        self,
        base_url: httpx.URL | str,
        model_name: str,
        data: dict[str, Any],
        headers: Mapping[str, str] | None = None,
        timeout: Any = USE_CLIENT_DEFAULT,
    ) -> dict[str, Any]:
        """Ask for an explanation, which only V1 has."""
        url = self._model(base_url, model_name, ":explain", None)
        sent = _merged({"content-type": "application/json"}, headers or {})
        response = await self._ask("POST", url, sent, timeout, dumps(data))
        document: dict[str, Any] = self._json(self._checked(response))
        return document

    async def is_server_ready(
        self,
        base_url: httpx.URL | str,
        headers: Mapping[str, str] | None = None,
        timeout: Any = USE_CLIENT_DEFAULT,
    ) -> bool:
        """Whether the server is ready, which only V2 can say."""
        if not self._is_v2:
            raise UnsupportedProtocol(self._config.protocol)
        url = self._url(base_url, "/v2/health/ready")
        response = self._checked(await self._ask("GET", url, headers, timeout))
        return bool(self._json(response).get("ready"))

    async def is_server_live(
        self,
        base_url: httpx.URL | str,
        headers: Mapping[str, str] | None = None,
        timeout: Any = USE_CLIENT_DEFAULT,
    ) -> bool:
        """Whether the server is live."""
        url = self._url(base_url, "/v2/health/live" if self._is_v2 else "/")
        response = self._checked(await self._ask("GET", url, headers, timeout))
        document = self._json(response)
        if self._is_v2:
            return bool(document.get("live"))
        return str(document.get("status")).lower() == "alive"

    async def is_model_ready(
        self,
        base_url: httpx.URL | str,
        model_name: str,
        headers: Mapping[str, str] | None = None,
        timeout: Any = USE_CLIENT_DEFAULT,
    ) -> bool:
        """Whether the model is ready.

        V2: False for every status that is not 2xx. V1: False for 503, others raise.
        """
        url = self._model(base_url, model_name, "", "/ready")
        response = await self._ask("GET", url, headers, timeout)
        if self._is_v2:
            return bool(response.is_success)
        if response.status_code == 503:
            return False
        # KServe's and ours say true or false, some of V1's servers "True" or "False".
        ready = self._json(self._checked(response)).get("ready")
        return str(ready).lower() == "true"

    @property
    def _is_v2(self) -> bool:
        """Whether it is V2 and not V1; raises UnsupportedProtocol for others."""
        if is_v2(self._config.protocol):
            return True
        if not is_v1(self._config.protocol):
            raise UnsupportedProtocol(self._config.protocol)
        return False

    def _model(
        self, base_url: httpx.URL | str, name: str, v1: str, v2: str | None
    ) -> httpx.URL:
        """The URL of an action, by what follows the model's name; None: it has none."""
        action = v2 if self._is_v2 else v1
        if action is None:
            raise UnsupportedProtocol(self._config.protocol)
        version = "v2" if self._is_v2 else "v1"
        return self._url(base_url, f"/{version}/models/{quote(name, safe='')}{action}")

    def _url(self, base_url: httpx.URL | str, path: str) -> httpx.URL:
        url = self._httpx.URL(base_url)
        if url.scheme not in ("http", "https") or not url.host:
            raise self._httpx.InvalidURL("the base URL must begin with http(s)://host")
        if not path:
            return url
        raw_path, _, query = url.raw_path.partition(b"?")
        whole = raw_path.rstrip(b"/") + path.encode()
        return url.copy_with(raw_path=whole + (b"?" + query if query else b""))

    async def _ask(
        self,
        method: str,
        url: httpx.URL,
        headers: Mapping[str, str] | None,
        timeout: Any,
        content: bytes | None = None,
    ) -> httpx.Response:
        httpx = self._httpx
        if isinstance(
            timeout, (type(USE_CLIENT_DEFAULT), type(httpx.USE_CLIENT_DEFAULT))
        ):
            timeout = self._config.timeout
        seconds = timeout if isinstance(timeout, (int, float)) else None
        if self._config.verbose:
            trace_logger.info("%s %s: %s", method, url, content)
        try:
            async with asyncio.timeout(seconds):
                response = await self._attempts(method, url, headers, timeout, content)
        except TimeoutError:
            raise httpx.ReadTimeout(f"no answer in {seconds} s") from None
        if self._config.verbose:
            trace_logger.info("%s: %s", response.status_code, response.text)
        return response

    async def _attempts(
        self,
        method: str,
        url: httpx.URL,
        headers: Mapping[str, str] | None,
        timeout: Any,
        content: bytes | None,
    ) -> httpx.Response:
        httpx = self._httpx
        left = self._config.retries
        delay = FIRST_DELAY
        while True:
            asked = 0.0
            try:
                response = await self._client.request(
                    method, url, content=content, headers=headers, timeout=timeout
                )
            except (httpx.ConnectError, httpx.ConnectTimeout):
                if left <= 0:
                    raise
            else:
                # A probe's 503 is an answer: the one who asks wants to know it.
                retried = method == "POST" and response.status_code in _RETRIED
                if left <= 0 or not retried:
                    return response
                after = response.headers.get("retry-after", "")
                asked = float(after) if after.isascii() and after.isdecimal() else 0.0
            pause = delay * random.uniform(0.8, 1.2)  # noqa: S311 - not a secret
            await asyncio.sleep(min(max(pause, asked), MOST_DELAY))
            left, delay = left - 1, delay * 2

    def _checked(self, response: httpx.Response) -> httpx.Response:
        if response.is_success:
            return response
        reason: Any = ""
        kind = response.headers.get("content-type", "")
        if kind.partition(";")[0].strip() == "application/json":
            with suppress(InvalidInput):
                reason = self._json(response)
            if isinstance(reason, dict) and "error" in reason:
                reason = reason["error"]
        raise self._httpx.HTTPStatusError(
            f"{reason}, '{response.status_code} {response.reason_phrase}' for url "
            f"'{response.url}'",
            request=response.request,
            response=response,
        )

    def _json(self, response: httpx.Response) -> Any:
        with translated():
            return loads(response.content)


def _merged(own: Mapping[str, str], given: Mapping[str, str]) -> dict[str, str]:
    """Headers, of which those that are given count, whatever their case."""
    names = {name.lower() for name in given}
    return {n: v for n, v in own.items() if n not in names} | dict(given)


def _context(config: RESTConfig) -> ssl.SSLContext | bool:
    """What httpx checks certificates with, and the client's own in it."""
    verify: Any = config.verify
    if isinstance(verify, str):
        if Path(verify).is_dir():
            verify = ssl.create_default_context(capath=verify)
        else:
            verify = ssl.create_default_context(cafile=verify)
    if config.cert is None:
        context: ssl.SSLContext | bool = verify
        return context
    if not isinstance(verify, ssl.SSLContext):
        import httpx

        verify = httpx.create_ssl_context(verify=verify)
    chain = (config.cert,) if isinstance(config.cert, str) else config.cert
    verify.load_cert_chain(*chain)
    made: ssl.SSLContext = verify
    return made
