"""Message compression: what a client sends with gzip is inflated, within a bound.

https://github.com/grpc/grpc/blob/master/doc/compression.md. Answers are not compressed,
which every client takes: tensors hardly shrink, and the time is the model's.
"""

from __future__ import annotations

import asyncio
import zlib

from grpclib.const import Status
from grpclib.exceptions import GRPCError

from kserve_lite.errors import InvalidInput
from kserve_lite.wire.events import Buffer

ACCEPTED = "identity,gzip"

# In steps, since zlib copies what it has not read yet, and since the event loop has
# other connections to serve: some 1 ms each.
_STEP_IN = 64 * 1024
_STEP_OUT = 256 * 1024


async def inflate(body: Buffer, encoding: str, limit: int) -> bytearray:
    """Return the message in `body`, compressed as the header `grpc-encoding` says.

    limit: bytes that it may have; a bomb is not inflated any further than that.
    Raises InvalidInput for what is no gzip, GRPCError for the rest.
    """
    if encoding == "identity":
        raise InvalidInput(
            "A message is marked as compressed and the call has no grpc-encoding."
        )
    if encoding != "gzip":
        raise GRPCError(
            Status.UNIMPLEMENTED,
            f"The grpc-encoding is not supported; the server takes {ACCEPTED}.",
        )
    inflator = zlib.decompressobj(wbits=31)  # 15 and 16: gzip, and nothing else
    message = bytearray()
    view = memoryview(body)
    try:
        for begin in range(0, len(view), _STEP_IN):
            waiting: Buffer = view[begin : begin + _STEP_IN]
            while waiting and not inflator.eof:
                message += inflator.decompress(waiting, _STEP_OUT)
                if len(message) > limit:
                    raise too_long(limit, "more")
                waiting = inflator.unconsumed_tail
                await asyncio.sleep(0)
    except zlib.error:
        raise InvalidInput("A message is no valid gzip.") from None
    # What zlib still holds of the last step is within its window of 32 KB.
    message += inflator.flush()
    if len(message) > limit:
        raise too_long(limit, "more")
    if not inflator.eof or inflator.unused_data:
        raise InvalidInput("A message is no valid gzip.")
    return message


def too_long(limit: int, came: int | str) -> GRPCError:
    """The refusal of a message that is longer than the server takes."""
    return GRPCError(
        Status.RESOURCE_EXHAUSTED,
        f"A message may have {limit} bytes (max_body_size); {came} came.",
    )
