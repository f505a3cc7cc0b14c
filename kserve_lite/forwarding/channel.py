"""A predictor over gRPC: one HTTP/2 connection that all calls share, by grpclib.

What grpclib has no setting for is here: how long a connection may take to come about,
and how large an answer may be. grpclib and protobuf are imported with this module, so
import it only where gRPC is spoken.
"""

from __future__ import annotations

import asyncio
import ssl
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import anyio
from google.protobuf.message import DecodeError
from grpclib.client import Channel, Handler, Stream
from grpclib.const import Cardinality
from grpclib.encoding.proto import ProtoCodec
from grpclib.exceptions import GRPCError, StreamTerminatedError
from grpclib.metadata import Deadline
from grpclib.protocol import H2Protocol
from grpclib.utils import Wrapper
from h2.events import DataReceived
from multidict import MultiDict

from kserve_lite.codecs.proto import message_class
from kserve_lite.forwarding.rest import CONNECT_TIMEOUT, Broken, Unreachable
from kserve_lite.forwarding.settings import Address

# Bytes of an answer that are read at a time: however small the frames are that it comes
# in, no more of them than this are kept one by one.
PIECE = 1 << 16
# Seconds for the other side to take part in the end of a connection.
CLOSE_TIMEOUT = 1.0
_SERVICE = "/inference.GRPCInferenceService"


class Refusal(NamedTuple):
    """A status other than OK, by its name, and the words that came with it."""

    code: str
    text: str


class Grpc:
    """A client of one server. max_size: bytes that an answer may have."""

    def __init__(
        self, address: Address, tls: ssl.SSLContext | None, *, max_size: int
    ) -> None:
        self._address = address
        self._tls = tls
        self._max_size = max_size
        # Made when it is used: it belongs to the event loop that runs then.
        self._channel: _Channel | None = None

    async def ask(
        self, method: str, message: Any, metadata: Mapping[str, str], *, left: float
    ) -> Any:
        """Call a method with one message; return its answer, or a Refusal.

        left: seconds after which nobody waits for it; inf: none. Where a connection
        that was there before ends without an answer, it is called once more on a new
        one; see `rest.py`. Raises Unreachable, Broken. Cancelled, it resets its stream.
        """
        if self._channel is None:
            address, tls = self._address, self._tls
            self._channel = _Channel(
                address.host.strip("[]"),
                address.port_for(tls=tls is not None),
                ssl=tls,
            )
        channel = self._channel
        was_connected = channel.is_connected
        call = _Call.of(channel, method, type(message), metadata, left)
        try:
            return await self._apart(call, method, message)
        except Broken:
            if not was_connected or call.answered:
                raise
        call = _Call.of(channel, method, type(message), metadata, left)
        return await self._apart(call, method, message)

    async def _apart(self, call: _Call, method: str, message: Any) -> Any:
        """Run a call in a task of its own.

        grpclib wakes a call whose stream is terminated by cancelling its task, and
        leaves it counted as cancelled: ours, which goes on, must not be.
        """
        work = self._exchange(call, method, message)
        return await asyncio.get_running_loop().create_task(work)

    async def _exchange(self, call: _Call, method: str, message: Any) -> Any:
        kind = message_class(f"inference.{method}Response")
        try:
            async with call:
                await call.send_message(message, end=True)
                data = await call.receive(self._max_size)
            return kind.FromString(data)
        except GRPCError as error:
            return Refusal(error.status.name, error.message or "")
        except (Unreachable, Broken, TimeoutError):
            raise
        except (StreamTerminatedError, OSError, DecodeError) as error:
            raise Broken(f"{type(error).__name__}: {error}") from error
        except Exception as error:  # the wire: grpclib and h2 raise what comes to hand
            raise Broken(f"{type(error).__name__}: {error}") from error

    async def close(self) -> None:
        if self._channel is not None:
            channel, self._channel = self._channel, None
            await channel.finish()


class _Protocol(H2Protocol):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gone = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.processor.processors[DataReceived] = self._data_came

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self.gone.set()

    def _data_came(self, event: DataReceived) -> None:
        if event.data:
            self.processor.process_data_received(event)
        elif event.flow_controlled_length:
            # Padding. grpclib keeps each such frame, and one without that, too, which
            # it takes for the end; a server may send them for ever.
            size = event.flow_controlled_length
            self.connection.ack(event.stream_id, size)


class _Channel(Channel):
    def _protocol_factory(self) -> H2Protocol:
        return _Protocol(Handler(), self._config, self._h2_config)

    async def finish(self) -> None:
        """Close it, and wait for that: the event loop may end next, amid TLS's end."""
        protocol: Any = self._protocol
        self.close()
        if protocol is not None:
            with anyio.move_on_after(CLOSE_TIMEOUT):
                await protocol.gone.wait()

    @property
    def is_connected(self) -> bool:
        return self._connected

    async def _create_connection(self) -> H2Protocol:
        # The one place in grpclib where a connection comes from.
        try:
            with anyio.fail_after(CONNECT_TIMEOUT):
                return await super()._create_connection()
        except (OSError, TimeoutError) as error:
            raise Unreachable(f"{type(error).__name__}: {error}") from error


class _Call(Stream[Any, Any]):
    """A call whose answer is read here, to bound it."""

    answered = False

    async def __aenter__(self) -> _Call:
        # Without grpclib's timer, which a call that finds no connection leaves behind:
        # the deadline is only told.
        self._wrapper = Wrapper()
        return self

    @classmethod
    def of(
        cls,
        channel: Channel,
        method: str,
        kind: Any,
        metadata: Mapping[str, str],
        left: float,
    ) -> _Call:
        own: Any = MultiDict(metadata)
        deadline = None if left == float("inf") else Deadline.from_timeout(left)
        return cls(
            channel,
            f"{_SERVICE}/{method}",
            own,
            Cardinality.UNARY_UNARY,
            kind,
            kind,
            codec=ProtoCodec(),
            status_details_codec=None,
            dispatch=channel.__dispatch__,
            deadline=deadline,
        )

    async def receive(self, max_size: int) -> bytes:
        """The bytes of the answer's message; raises GRPCError for a refusal."""
        await self.recv_initial_metadata()
        self.answered = True
        with self._wrapper:
            head = await self._stream.recv_data(5)
        if len(head) < 5:
            await self.recv_trailing_metadata()  # its status is an error's
            raise Broken("its answer has no message")
        is_compressed, size = struct.unpack(">?I", head)
        if is_compressed:
            raise Broken("its answer is compressed, which was not asked for")
        if size > max_size:
            raise Broken(f"its answer has {size} bytes, more than {max_size}")
        pieces = []
        with self._wrapper:
            while size:
                piece = await self._stream.recv_data(min(size, PIECE))
                if not piece:
                    raise Broken("its answer ended early")
                pieces.append(piece)
                size -= len(piece)
            # Its end, too, is waited for here: what came meanwhile would be kept.
            if await self._stream.recv_data(1):
                raise Broken("its answer has more than one message")
        return b"".join(pieces)
