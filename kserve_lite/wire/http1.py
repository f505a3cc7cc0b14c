"""One HTTP/1.1 connection, server side, bytes to events and back (RFC 9112).

Two lanes read a head. The fast lane is one strict, compiled grammar for what clients
of a model server really send. Whatever does not match it, wrong or merely unusual, goes
untouched to h11, the referee, which also reads all chunked bodies and words every
refusal's status. Invariant, held by a property test: what the fast lane accepts, h11
accepts too, with the same method, target, headers, body and end of message.

Bodies of announced length are read straight into one buffer by either lane: the owner
of the socket asks `body_buffer()` where the next bytes belong. While a request is being
answered nothing is parsed: what arrives is kept for `next_cycle()`, and the owner stops
reading once `kept` is larger than `max_head_size`.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable
from http import HTTPStatus
from typing import NamedTuple

import h11

from kserve_lite.wire.events import (
    ID_NAMES,
    Buffer,
    ContinueWanted,
    Data,
    EndOfMessage,
    Event,
    Headers,
    Outgoing,
    RawHeaders,
    Refusal,
    Request,
    Response,
    make,
)
from kserve_lite.wire.limits import FAST_HEAD_SIZE, FIRST_BODY_BUFFER, WireLimits

STREAM = 1
_END = EndOfMessage(STREAM)
# Bodies up to this size are copied together with their heads.
SMALL = 8 * 1024

# Possessive quantifiers: a head that does not match fails in linear time. A field value
# here is visible ASCII with single or several blanks inside, nothing else.
_FAST_HEAD = re.compile(
    rb"(GET|POST|HEAD|PUT|DELETE|PATCH|OPTIONS) (/[!-~]*+) HTTP/1\.1\r\n"
    rb"((?:[!#$%&'*+\-.^_`|~0-9A-Za-z]++:[ \t]*+"
    rb"(?:[!-~]++(?:[ \t]++[!-~]++)*+)?+[ \t]*+\r\n)++)\r\n"
)
_END_OF_HEAD = re.compile(rb"\n\r?\n")
_REQUEST_LINE = re.compile(rb"[!-~][^\r\n]* HTTP/(\d+)\.(\d+)[ \t]*\r?\n")
_LENGTH = re.compile(rb"[0-9]{1,15}")
_NOT_FAST = frozenset((b"transfer-encoding", b"expect", b"upgrade"))
# RFC 9112 6.3: an answer of these ends with its head, whatever its headers say.
_BODILESS = frozenset((204, 304))

_ID_FIELDS = b"%b: %%b\r\n%b: %%b\r\n" % ID_NAMES
_USUAL_HEAD = b"%%b%bcontent-length: %%d\r\n\r\n" % _ID_FIELDS
_STATUS_LINE = {
    status.value: b"HTTP/1.1 %d %s\r\n" % (status, status.phrase.encode())
    for status in HTTPStatus
}
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class _State(enum.Enum):
    HEAD = "waiting for a head, or inside one"
    BODY = "inside a body of announced length"
    CHUNKED = "inside a chunked body, which h11 reads"
    ANSWERING = "a request is complete: nothing is parsed until next_cycle()"
    CLOSED = "refused: whatever else arrives is dropped"


# Reading a member off its class costs 0.12 us in Python 3.11, a global a quarter of it.
_HEAD, _BODY, _CHUNKED, _ANSWERING, _CLOSED = _State


class _Head(NamedTuple):
    """What one head means for the messages that follow."""

    request: Request
    content_length: int
    keep_alive: bool
    is_head: bool
    is_http10: bool


class Http1Connection:
    """The server's side of one HTTP/1.1 connection.

    `keep_alive` may be set to False at any time before the answer's head is sent: the
    answer then carries `connection: close`. `kept`, the same object all along, holds
    what has arrived of heads and, while a request is being answered, of the next ones.

    drops: is asked when a body has yet to come, wholly or in part; True: it is read and
        forgotten, so that no `Data` follows. `dropped` then tells so.
    """

    def __init__(
        self,
        limits: WireLimits | None = None,
        *,
        drops: Callable[[Request], bool] = lambda _: False,
    ) -> None:
        self.limits = limits or WireLimits()
        self.keep_alive = True
        self._state = _HEAD
        self.kept = bytearray()
        self._scanned = 0
        # Clients on a kept connection send the same head again and again: the last one
        # is remembered, byte for byte, with its meaning. `_last_whole` is the size of
        # it with its body where that is small and the connection stays, else 0.
        self._last_bytes = b""
        self._last_head: _Head | None = None
        self._last_whole = 0
        # So does the server: the same headers, object for object, within one second.
        self._last_answered: RawHeaders = ()
        self._last_status = 0
        self._last_block = b""
        self._body = bytearray()
        self._body_filled = 0
        self._body_length = 0
        self._drops = drops
        self.dropped = False
        self._referee: h11.Connection | None = None
        self._chunked_size = 0
        self._head_request = False
        self._http10 = False
        self._chunked_answer = False
        self._bodiless_answer = False

    @property
    def between_messages(self) -> bool:
        """Nothing of a next request has arrived."""
        return self._state is _HEAD and not self.kept

    @property
    def inside_body(self) -> bool:
        """The head is complete and the body is not."""
        return self._state is _BODY or self._state is _CHUNKED

    @property
    def missing(self) -> int:
        """Bytes of an announced body that have yet to come."""
        return self._body_length - self._body_filled

    def receive_again(self, data: Buffer) -> Request | None:
        """Take a small whole request with the last one's head, as most are.

        None: it is not, and `receive()` is to take the data.
        """
        head = self._last_head
        if len(data) != self._last_whole or self._state is not _HEAD or self.kept:
            return None
        last, raw = self._last_bytes, bytes(data)
        if head is None or not raw.startswith(last):
            return None
        self._state = _ANSWERING
        _, method, target, headers, _ = head[0]
        body = raw[len(last) :]
        return make(Request, (STREAM, method, target, headers, body))

    def receive(self, data: Buffer) -> list[Event]:
        """Take bytes that arrived; return what they complete, in order."""
        state = self._state
        if state is _HEAD:
            head = self._last_head
            if head is not None and not self.kept:
                known = len(self._last_bytes)
                if bytes(data[:known]) == self._last_bytes:
                    return self._accept(head, memoryview(data)[known:])
            self.kept += data
            return self._read_head()
        if state is _BODY:
            return self._receive_body(data)
        if state is _CHUNKED:
            return self._receive_chunked(data)
        if state is _ANSWERING:
            self.kept += data
        return []

    def body_buffer(self) -> memoryview | None:
        """Where the next bytes of an announced body belong; None: use `receive()`."""
        if self._state is not _BODY or self.dropped:
            return None
        if self._body_filled == len(self._body):
            # Doubling in place: extending by fresh zeros would hold them twice.
            self._body *= 2
            del self._body[self._body_length :]
        return memoryview(self._body)[self._body_filled :]

    def body_received(self, count: int) -> list[Event]:
        """Say that `count` bytes were written into `body_buffer()`, or dropped."""
        self._body_filled += count
        if self.missing:
            return []
        self._state = _ANSWERING
        if self.dropped:
            return [_END]
        body, self._body = self._body, bytearray()
        return [Data(STREAM, body), _END]

    def next_cycle(self) -> list[Event]:
        """The answer is complete: go on with the next request (RFC 9112 9.3.2).

        After an answer that closes, whatever else came is dropped (9.6).
        """
        if not self.keep_alive:
            self._state = _CLOSED
            self.kept.clear()
            return []
        self._state = _HEAD
        # A refusal may come next, which is not framed as this answer was.
        self._head_request = self._http10 = False
        return self._read_head() if self.kept else []

    def refuse(self, status: int, reason: str) -> Refusal:
        """Give the connection up: what arrives from here on is dropped."""
        self._state = _CLOSED
        self.kept.clear()
        self._body = bytearray()
        self._referee = None
        self.keep_alive = False
        return Refusal(STREAM, status, reason)

    def send(self, *events: Outgoing) -> list[Buffer]:
        """Return the bytes of an answer's events, unjoined: tensors are not copied."""
        first = events[0]
        if type(first) is Response and first.headers is self._last_answered:
            usual = self._usual_answer(first)
            if usual is not None:
                return usual
        out: list[Buffer] = []
        for event in events:
            if type(event) is Response:
                self._answer_head(event, out)
            elif type(event) is Data:
                self._answer_data(event.data, out)
            elif self._chunked_answer and not self._bodiless_answer:
                out.append(b"0\r\n\r\n")
        return out

    def _answer_data(self, data: Buffer, out: list[Buffer]) -> None:
        if self._bodiless_answer or not data:
            return
        if self._chunked_answer:
            out += (b"%x\r\n" % len(data), data, b"\r\n")
        else:
            out.append(data)

    def _usual_answer(self, answer: Response) -> list[Buffer] | None:
        """A whole answer like the last one but for ids and body, as most are.

        None: it is not.
        """
        _, status, _, body, _, ids = answer
        if (
            body is None
            or ids is None
            or status != self._last_status
            or not self.keep_alive
            or self._head_request
            or self._http10
        ):
            return None
        self._bodiless_answer = self._chunked_answer = False
        request_id, traceparent = ids
        head = self._last_block, request_id, traceparent, len(body)
        if len(body) > SMALL:
            return [_USUAL_HEAD % head, body]
        return [_USUAL_HEAD % head + body]

    def _answer_head(self, response: Response, out: list[Buffer]) -> None:
        _, status, headers, body, _, ids = response
        own = b"" if ids is None else _ID_FIELDS % ids
        if headers is not self._last_answered or status != self._last_status:
            self._last_answered = headers
            self._last_status = 0 if status in _BODILESS else status
            self._last_block = _STATUS_LINE[status] + b"".join(
                [b"%b: %b\r\n" % field for field in headers]
            )
        ends_here = status in _BODILESS
        self._bodiless_answer = ends_here or self._head_request
        self._chunked_answer = False
        out.append(self._last_block + own)
        if body is not None and not ends_here:
            out.append(b"content-length: %d\r\n" % len(body))
        elif not ends_here:
            self._frame_answer(headers, out)
        if not self.keep_alive:
            out.append(b"connection: close\r\n")
        elif self._http10:
            out.append(b"connection: keep-alive\r\n")
        out.append(b"\r\n")
        if body and not self._bodiless_answer:
            out.append(body)

    def _frame_answer(self, headers: RawHeaders, out: list[Buffer]) -> None:
        if any(name == b"content-length" for name, _ in headers):
            return
        if self._http10:
            # RFC 9112 6.1: never chunked to HTTP/1.0; the close ends the body.
            self.keep_alive = False
        else:
            self._chunked_answer = True
            out.append(b"transfer-encoding: chunked\r\n")

    def _read_head(self) -> list[Event]:
        buffer = self.kept
        while buffer[:2] == b"\r\n":  # RFC 9112 2.2: empty lines before a request line
            del buffer[:2]
        end = _END_OF_HEAD.search(buffer, max(0, self._scanned - 2))
        if end is None:
            self._scanned = len(buffer)
            return self._unfinished_head()
        self._scanned = 0
        raw = self._taken(end.end())
        if len(raw) > self.limits.max_head_size:
            return [self._head_too_large()]
        head = self._last_head if raw == self._last_bytes else _fast_head(raw)
        if head is None:
            return self._ask_referee(raw)
        self._last_bytes = raw
        self._last_head = head
        length = head.content_length
        usual = head.keep_alive and not head.is_head
        fits = length <= min(self.limits.max_body_size, SMALL)
        self._last_whole = len(raw) + length if usual and fits else 0
        return self._accept(head, self._taken(length))

    def _taken(self, size: int) -> bytes:
        """Take at most `size` bytes from the front of the buffer.

        Taking all and putting back what is too much would copy, for each of thousands
        of pipelined requests, all that follow it.
        """
        taken = bytes(memoryview(self.kept)[:size])
        del self.kept[:size]
        return taken

    def _unfinished_head(self) -> list[Event]:
        buffer = self.kept
        line_end = buffer.find(b"\n")
        # A TLS hello or other binary noise never becomes a request line: no waiting.
        noise = bool(buffer) and not (0x21 <= buffer[0] <= 0x7E or buffer[0] == 13)
        if noise or (line_end >= 0 and not _REQUEST_LINE.match(buffer)):
            return [self._close_silently()]
        if len(buffer) > self.limits.max_head_size:
            return [self._head_too_large()]
        return []

    def _close_silently(self) -> Refusal:
        refusal = self.refuse(400, "the first line is no HTTP/1.x request line")
        return refusal._replace(status=None)

    def _head_too_large(self) -> Refusal:
        limit = self.limits.max_head_size
        return self.refuse(
            431, f"The request's head is larger than {limit} bytes (max_head_size)."
        )

    def _accept(self, head: _Head, rest: Buffer) -> list[Event]:
        """A complete head without transfer coding: what follows has a known length.

        rest: what came behind the head; where the buffer holds more, no more than the
            body.
        """
        request, length, keep_alive, self._head_request, self._http10 = head
        if not keep_alive:
            self.keep_alive = False
        if length > self.limits.max_body_size:
            return [self._body_too_large(f"{length} bytes were announced")]
        came = len(rest)
        if came >= length:
            self._state = _ANSWERING
            if came > length:
                self.kept += memoryview(rest)[length:]
                rest = rest[:length]
            return [make(Request, (*request[:4], bytes(rest)))]
        self.dropped = self._drops(request)
        if not self.dropped:
            self._body = bytearray(min(length, max(FIRST_BODY_BUFFER, came)))
            # Through a view: a bytearray's slice would make a copy of the rest first.
            memoryview(self._body)[:came] = rest
        self._body_filled = came
        self._body_length = length
        self._state = _BODY
        return [request]

    def _receive_body(self, data: Buffer) -> list[Event]:
        """The copying twin of `body_buffer()`, for owners without direct reads."""
        events: list[Event] = []
        rest = memoryview(data)
        if self.dropped:
            count = min(len(rest), self.missing)
            rest = rest[count:]
            events += self.body_received(count)
        while rest and (target := self.body_buffer()) is not None:
            count = min(len(target), len(rest))
            target[:count] = rest[:count]
            target.release()
            rest = rest[count:]
            events += self.body_received(count)
        self.kept += rest
        return events

    def _body_too_large(self, came: str) -> Refusal:
        limit = self.limits.max_body_size
        return self.refuse(
            413, f"The body may have {limit} bytes (max_body_size); {came}."
        )

    def _ask_referee(self, raw: bytes) -> list[Event]:
        line = _REQUEST_LINE.match(raw)
        if line is None or raw.startswith(b"PRI "):  # HTTP/2's preface, gone wrong
            return [self._close_silently()]
        if line[1] != b"1":
            return [self.refuse(505, "The HTTP version must be 1.0 or 1.1.")]
        referee = h11.Connection(
            h11.SERVER, max_incomplete_event_size=self.limits.max_head_size
        )
        try:
            referee.receive_data(raw)
            request = referee.next_event()
        except h11.RemoteProtocolError as error:
            return [self._refuse_as(error)]
        if not isinstance(request, h11.Request):
            return [self.refuse(400, "The request's head is not valid HTTP/1.1.")]
        return self._accept_unusual(request, referee)

    def _refuse_as(self, error: h11.RemoteProtocolError) -> Refusal:
        # h11's own texts quote the request; the status is enough to word ours.
        status = error.error_status_hint
        if status == 431:
            return self._head_too_large()
        if status == 501:
            return self.refuse(501, "The only transfer coding served is chunked.")
        part = "body" if self._state is _CHUNKED else "head"
        return self.refuse(status, f"The request's {part} is not valid HTTP/1.1.")

    def _accept_unusual(
        self, request: h11.Request, referee: h11.Connection
    ) -> list[Event]:
        raw: RawHeaders = tuple((bytes(n), bytes(v)) for n, v in request.headers)
        names = [name for name, _ in raw]
        chunked = b"transfer-encoding" in names
        http10 = self._http10 = request.http_version < b"1.1"
        self._head_request = request.method == b"HEAD"
        if chunked and (b"content-length" in names or http10):
            # RFC 9112 6.1: two framings, or one that HTTP/1.0 does not have, are how
            # requests are smuggled past a proxy.
            return [
                self.refuse(400, "A request is framed by content-length or chunked.")
            ]
        expect = next((value for name, value in raw if name == b"expect"), None)
        if expect is not None and expect.lower() != b"100-continue":
            return [self.refuse(417, "The only expectation served is 100-continue.")]
        head = _Head(
            Request(
                STREAM, request.method.decode(), request.target.decode(), Headers(raw)
            ),
            next((int(v) for n, v in raw if n == b"content-length"), 0),
            _keeps_alive(raw, http10),
            is_head=request.method == b"HEAD",
            is_http10=http10,
        )
        body_has_begun = bool(self.kept)
        if chunked:
            self._referee = referee
            self.dropped = self._drops(head.request)
            self._chunked_size = 0
            self._state = _CHUNKED
            self.keep_alive = self.keep_alive and head.keep_alive
            events: list[Event] = [head.request]
            events += self._receive_chunked(self._taken(len(self.kept)))
        else:
            events = self._accept(head, self._taken(head.content_length))
        if expect and not http10 and self.inside_body and not body_has_begun:
            events.append(ContinueWanted(STREAM))
        return events

    def _receive_chunked(self, data: Buffer) -> list[Event]:
        referee = self._referee
        events: list[Event] = []
        if referee is None or not data:  # h11 reads b"" as the end
            return events
        try:
            referee.receive_data(bytes(data))
            while True:
                event = referee.next_event()
                if isinstance(event, h11.Data):
                    self._chunked_size += len(event.data)
                    if self._chunked_size > self.limits.max_body_size:
                        events.append(self._body_too_large("more than that came"))
                        return events
                    if not self.dropped:
                        events.append(Data(STREAM, event.data))
                elif isinstance(event, h11.EndOfMessage):
                    self.kept += referee.trailing_data[0]
                    self._referee = None
                    self._state = _ANSWERING
                    events.append(_END)
                    return events
                else:
                    return events
        except h11.RemoteProtocolError as error:
            events.append(self._refuse_as(error))
            return events


def _fast_head(raw: bytes) -> _Head | None:
    """Read a head by the strict grammar; None: leave it to the referee."""
    if len(raw) > FAST_HEAD_SIZE:
        return None
    match = _FAST_HEAD.fullmatch(raw)
    if match is None:
        return None
    headers = []
    length = 0
    hosts = lengths = 0
    for line in match[3][:-2].split(b"\r\n"):
        name, _, value = line.partition(b":")
        name = name.lower()
        value = value.strip(b" \t")
        if name in _NOT_FAST:
            return None
        if name == b"content-length":
            lengths += 1
            if not _LENGTH.fullmatch(value):
                return None
            length = int(value)
        elif name == b"host":
            hosts += 1
        headers.append((name, value))
    if hosts != 1 or lengths > 1:
        return None
    raw_headers = tuple(headers)
    request = Request(
        STREAM, match[1].decode(), match[2].decode(), Headers(raw_headers)
    )
    return _Head(
        request,
        length,
        _keeps_alive(raw_headers, http10=False),
        is_head=match[1] == b"HEAD",
        is_http10=False,
    )


def _keeps_alive(raw: RawHeaders, http10: bool) -> bool:
    """RFC 9112 9.3: HTTP/1.1 stays open unless told otherwise, HTTP/1.0 closes."""
    options = {
        option.strip().lower()
        for name, value in raw
        if name == b"connection"
        for option in value.split(b",")
    }
    if b"close" in options:
        return False
    return not http10 or b"keep-alive" in options
