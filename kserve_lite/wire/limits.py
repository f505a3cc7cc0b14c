"""Every bound that the wire layer puts on a peer, in one place.

What each number really bounds, and what others chose, stands beside it. Bounds on time
are not here, since this layer has no clock: see `transports/timeouts.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

# The fast lane refuses longer heads and leaves them to h11, so that one regular
# expression never runs over more than this. Heads of real clients have 100 to 1,500
# bytes.
FAST_HEAD_SIZE = 8 * 1024

# A body of up to this size gets its whole buffer at once. A larger one starts here and
# doubles as bytes arrive, so that a peer that announces a large body and sends nothing
# costs this much and no more. Chosen so that a 224x224 FP32 image (602 KB) is read
# without a move.
FIRST_BODY_BUFFER = 1024 * 1024


@dataclass(frozen=True, slots=True)
class WireLimits:
    """Bounds on one message.

    max_head_size: bytes of request line and header fields together; beyond it 431. It
        also bounds what is kept of pipelined requests while one is being answered
        (nginx 32 KB, h11 16 KB, uvicorn 64 KB, Node 16 KB).
    max_body_size: bytes of one request body, announced or chunked; beyond it 413
        (nginx 1 MB, KServe unbounded over REST and 8 MiB over gRPC, Triton unbounded).
    """

    max_head_size: int = 64 * 1024
    max_body_size: int = 100 * 1024 * 1024
