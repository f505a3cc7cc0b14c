"""One exchange in ASGI's messages: where a request goes, how its answer is sent.

What `transports.exchange` sees as a stream, and what it knows nothing of: mounts.
https://asgi.readthedocs.io/en/latest/specs/www.html
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeAlias, cast
from urllib.parse import quote, unquote

from kserve_lite.errors import KServeLiteError, ServerNotReady
from kserve_lite.records import Record
from kserve_lite.rest.replies import error_reply, fault_reply
from kserve_lite.transports.exchange import sent_headers
from kserve_lite.transports.timeouts import MIN_RATE
from kserve_lite.wire.events import (
    Buffer,
    Data,
    EndOfMessage,
    Headers,
    Outgoing,
    Response,
    fields_of_ids,
)

log = logging.getLogger("kserve_lite")

Scope: TypeAlias = dict[str, Any]
Message: TypeAlias = dict[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]

# Bytes of a body that are handed over at once: ASGI wants them as `bytes`, so that they
# are copied, and a large tensor must not be in memory twice for it.
_PIECE = 1024 * 1024


class AnswerCut(KServeLiteError):
    """An answer ended before its end, which only an exception tells an ASGI server."""

    def __init__(self) -> None:
        super().__init__("an answer was cut short; the log of kserve_lite says why")


class Disconnected(Exception):
    """The client has gone before its request was complete."""


class Refused(Exception):
    """The body is not taken."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class AsgiStream:
    """One request's answer as ASGI messages: what `exchange` sends to.

    Sending is waited for in ASGI, so that events are kept until `drain()`, and there
    always are some to wait for.
    """

    def __init__(self, scope: Scope, send: Send) -> None:
        self.http: str = scope.get("http_version", "1.1")
        client = scope.get("client")
        self.peer = str(client[0]) if client else ""
        self.lost = False
        self.complete = False
        self.settled = False
        self._is_head = scope["method"] == "HEAD"
        self._put = send
        self._events: deque[Outgoing] = deque()
        self._has_started = False
        self._has_failed = False
        self._error: Exception | None = None

    def is_gone(self) -> bool:
        return self.lost

    def send(self, *events: Outgoing) -> None:
        self._events.extend(events)

    @property
    def stalled(self) -> bool:
        return bool(self._events)

    async def drain(self) -> None:
        await asyncio.sleep(0)
        try:
            await self.flush()
        except Exception as error:  # noqa: BLE001 - a middleware's, handed back to it
            self._error = error
        if self.lost or self._error is not None:
            raise asyncio.CancelledError

    async def flush(self) -> None:
        """Send what is kept; raises what others raise who see the answer pass."""
        try:
            while self._events:
                for message in self._messages(self._events.popleft()):
                    self._has_started = True
                    await self._put(message)
        except OSError as error:  # the client has gone, by the specification
            log.debug("an answer could not be sent", exc_info=error)
            self.lost = True
            self._events.clear()

    def abort(self) -> None:
        self._has_failed = True

    def end(self, complete: bool) -> None:
        self.complete = complete and not self._has_failed

    def settle(self, record: Record) -> None:
        """Put something in place of an answer that nothing can be sent of any more.

        Once, when the exchange is over; `close()` sends it.
        """
        self.settled = True
        if self.complete or self._is_doomed():
            return
        self._events.clear()
        reply = fault_reply(ServerNotReady())
        if self._has_failed:
            reply = error_reply(500, "The server failed. Its log has more.")
        body = cast("bytes", reply.body)
        record.code, record.sent = reply.status, len(body)
        headers = sent_headers(0, reply.headers)
        self.send(Response(1, reply.status, headers, body, ids=record.ids))

    def _is_doomed(self) -> bool:
        return self.lost or self._has_started or self._error is not None

    async def close(self) -> None:
        """See to it that an answer that is not complete does not look so."""
        if self._error is not None:
            raise self._error
        if self.complete or self.lost:
            return
        if self._has_started:
            raise AnswerCut
        await self.flush()

    def _messages(self, event: Outgoing) -> Iterator[Message]:
        if isinstance(event, Response):
            # Less date and server, which come first.
            headers = [*event.headers[2:], *fields_of_ids(event.ids)]
            if event.body is not None:
                headers.append((b"content-length", b"%d" % len(event.body)))
            yield {
                "type": "http.response.start",
                "status": event.status,
                "headers": headers,
            }
            if event.body is not None:
                yield from self._pieces(event.body, more=False)
        elif isinstance(event, Data):
            yield from self._pieces(event.data, more=True)
        elif isinstance(event, EndOfMessage):
            yield from self._pieces(b"", more=False)

    def _pieces(self, data: Buffer, *, more: bool) -> Iterator[Message]:
        size = 0 if self._is_head else len(data)
        view = memoryview(data)
        for start in range(0, size or 1, _PIECE):
            last = start + _PIECE >= size
            yield {
                "type": "http.response.body",
                "body": bytes(view[start : min(start + _PIECE, size)]),
                "more_body": more or not last,
            }


async def read_body(
    headers: Headers, receive: Receive, *, limit: int, seconds: float
) -> Buffer:
    """Collect a request's body, within the bounds that our own server has.

    limit: of its bytes. seconds: that it may take, plus one for each `MIN_RATE` bytes.
    Raises Refused, and Disconnected.
    """
    announced = headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise Refused(413, _too_large(limit, f"{announced} bytes were announced"))
    started = asyncio.get_running_loop().time()
    body: Buffer = b""
    try:
        async with asyncio.timeout_at(started + seconds) as timeout:
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise Disconnected
                data = message.get("body", b"")
                if len(body) + len(data) > limit:
                    raise Refused(413, _too_large(limit, "more than that came"))
                body = _gathered(body, data)
                if not message.get("more_body", False):
                    return body
                timeout.reschedule(started + seconds + len(body) / MIN_RATE)
    except TimeoutError:
        reason = "The request's body did not arrive in time."
        raise Refused(408, reason) from None


def _gathered(body: Buffer, data: bytes) -> Buffer:
    if not body:
        return data
    if not isinstance(body, bytearray):
        body = bytearray(body)
    body += data
    return body


def _too_large(limit: int, came: str) -> str:
    return f"The body may have {limit} bytes (max_body_size); {came}."


def split_target(scope: Scope) -> tuple[bytes, str]:
    """What the application is mounted at, as a location begins, and the target below.

    ASGI's `path` has the mount's `root_path` in it, and is decoded. `raw_path` is not,
    so that a name with a slash in it stays one segment; not every server gives it.
    """
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    raw = (scope.get("raw_path") or b"").partition(b"?")[0].decode("latin-1")
    usable = raw.isascii() and raw and unquote(raw) == path
    target = raw if usable else quote(path, safe="/:")
    prefix = ""
    if root:
        segments = target.split("/")
        depth = root.count("/") + 1
        if unquote("/".join(segments[:depth])) == root:
            prefix = quote(root, safe="/:")
            target = "/" + "/".join(segments[depth:])
    query = scope.get("query_string", b"").decode("ascii", "ignore")
    return prefix.encode(), f"{target}?{query}" if query else target
