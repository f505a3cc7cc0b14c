"""From a service's actions to what grpclib calls: the boundary of errors.

An action takes a message and its `Call` and returns the answer; one that reads or
writes several messages takes `Messages`. It raises `InferenceFault`, which becomes a
status here, by the table in `statuses.py`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import anyio
from grpclib.const import Cardinality, Handler
from grpclib.exceptions import GRPCError
from grpclib.server import Stream

from kserve_lite.codecs.proto import POOL, message_class
from kserve_lite.codecs.proto.wire import read_message
from kserve_lite.errors import DeadlineExceeded, InferenceFault, InvalidInput
from kserve_lite.rpc.call import Call, Idle, Message
from kserve_lite.rpc.statuses import STATUS, details_of, trailers_of
from kserve_lite.wire.events import Buffer

log = logging.getLogger("kserve_lite")

Action: TypeAlias = Callable[..., Awaitable[Any]]
Served: TypeAlias = "Stream[Any, Any]"  # grpclib's view of a call
Work: TypeAlias = Callable[[Call], Awaitable[None]]
Reader: TypeAlias = Callable[[Buffer], Any]
Writer: TypeAlias = Callable[[Any], Message]


_CARDINALITY = {tuple(member.value): member for member in Cardinality}


class Method(NamedTuple):
    """How a method is served.

    handler: for grpclib. unary: runs a call of one message and one answer without it,
    to its end or to whatever exception; None where several messages go either way.
    """

    handler: Handler
    unary: Work | None


def methods_of(
    service: str,
    actions: Mapping[str, Action],
    idle: Idle,
    *,
    read: Mapping[str, Reader] | None = None,
    write: Mapping[str, Writer] | None = None,
) -> dict[str, Method]:
    """The methods of a service of our `.proto` files, by path.

    actions: by method name; every method has one. idle: in which streams wait for their
    clients. read, write: how messages are read and written, by method name, where not
    protobuf does it alone.
    """
    methods = {}
    for method in POOL.FindServiceByName(service).methods:
        name, action = method.name, actions[method.name]
        asked, answered = method.input_type.full_name, method.output_type.full_name
        streams = (method.client_streaming, method.server_streaming)
        reader = (read or {}).get(name) or _reader(asked)
        writer = (write or {}).get(name) or message_class(answered).SerializeToString
        unary = None
        if any(streams):
            work = _streaming(reader, action, writer, idle)
        else:
            unary = _unary(reader, action, writer)
            work = unary
        # The types are None, since messages do not pass through grpclib.
        handler = Handler(_guarded(work), _CARDINALITY[streams], None, None)
        methods[f"/{service}/{name}"] = Method(handler, unary)
    return methods


def _reader(name: str) -> Reader:
    kind = message_class(name)
    return lambda body: read_message(kind, body)


class Messages:
    """The messages of a streaming call, read and written as its method says."""

    def __init__(self, call: Call, read: Reader, write: Writer, idle: Idle) -> None:
        self.call = call
        self._idle = idle
        self._read = read
        self._write = write

    async def receive(self) -> Any | None:
        """The next message; None where the caller sends no more.

        Raises ServerNotReady when the server stops meanwhile.
        """
        body = await self.call.receive(self._idle)
        return None if body is None else self._read(body)

    async def send(self, message: Any) -> None:
        await self.call.send(self._write(message))


def _call_of(stream: Served) -> Call:
    """Our call; it stands where grpclib expects to find the peer's address."""
    call: Any = stream.peer
    return call  # type: ignore[no-any-return]


def _guarded(work: Work) -> Callable[[Served], Awaitable[None]]:
    """The boundary: nothing but a GRPCError may reach grpclib, which logs the rest."""

    async def run(stream: Served) -> None:
        call = _call_of(stream)
        try:
            if call.fault is not None:
                raise call.fault
            await work(call)
        except GRPCError:
            raise
        except InferenceFault as fault:
            await _refuse(stream, fault)
        except Exception:
            log.exception("answering a call failed: a bug in kserve-lite")
            await _refuse(
                stream, InferenceFault("The server failed. Its log has more.")
            )

    return run


def _unary(read: Reader, action: Action, write: Writer) -> Work:
    async def work(call: Call) -> None:
        body = await call.receive()
        if body is None:
            raise InvalidInput("The call came without a message.")
        await call.finish(write(await action(read(body), call)))

    return work


def _streaming(read: Reader, action: Action, write: Writer, idle: Idle) -> Work:
    """A method that reads or writes several messages, within the caller's deadline.

    The deadline of a unary call is kept by dispatch, which waits for nothing else.
    """

    async def work(call: Call) -> None:
        deadline = call.deadline()
        remaining = None if deadline is None else deadline - time.monotonic()
        try:
            with anyio.fail_after(remaining):
                await action(Messages(call, read, write, idle))
        except TimeoutError as error:
            raise DeadlineExceeded from error

    return work


async def _refuse(stream: Served, fault: InferenceFault) -> None:
    """End a call with the status of a fault."""
    await stream.send_trailing_metadata(
        status=STATUS[fault.kind],
        status_message=details_of(fault),
        metadata=trailers_of(fault),
    )
