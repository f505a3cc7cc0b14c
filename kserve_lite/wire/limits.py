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

# --- HTTP/2 -------------------------------------------------------------------------
# The largest frame we take, SETTINGS_MAX_FRAME_SIZE (RFC 9113 6.5.2): it bounds what is
# kept of an incomplete frame. A tensor of 602 KB is 10 frames rather than 37 (nginx,
# nghttp2 and h2 stay at the protocol's least, 16 KiB; Go takes 1 MiB).
MAX_FRAME_SIZE = 64 * 1024
# What a peer may send on one stream before it hears of us, and what we let it have in
# flight while a body is consumed as it comes (RFC 9113 6.9.2; nginx 64 KiB, Go 1 MiB,
# Envoy 16 MiB or more). A 224x224 FP32 image goes without one WINDOW_UPDATE.
STREAM_WINDOW = 1024 * 1024
# A stream's window and what it holds may pass max_body_size by this much, so that the
# owner of a body without announced length sees that it is too large.
WINDOW_SLACK = 64 * 1024
# SETTINGS_HEADER_TABLE_SIZE: bytes of the peer's dynamic table (RFC 7541 4.2). 4,096 is
# the protocol's default and what nearly all servers use.
HEADER_TABLE_SIZE = 4096
# Header lists of up to this many times max_head_size are decoded, to be answered with
# 431; beyond it, and for header blocks of more bytes, the connection ends. It bounds an
# HPACK bomb, in which one byte stands for 4 KB.
HEAD_EXCESS = 2
# CONTINUATION frames of one header block, CVE-2024-27316 (nghttp2 8; Go bounds the
# bytes only). 128 KiB of header block take 7 of ordinary size.
MAX_CONTINUATIONS = 16
# Dynamic table size updates at the start of one header block: RFC 7541 4.2 needs two.
MAX_TABLE_UPDATES = 2
# Request heads remembered for each connection: that many, with blocks and lists of up
# to that size. Clients on one connection send very few different ones.
REMEMBERED_HEADS = 64
REMEMBERED_HEAD_SIZE = 2048
# Streams that end by a reset, the peer's or ours for the peer's mistake, in a burst and
# given back at each `replenish()`: CVE-2023-44487 and CVE-2025-8671 (nghttp2 1,000 and
# 33 a second, hyper 1,024 of ours). Twice
# max_streams, so that a client whose calls all ran out of time at once is not cut off.
RESET_BUDGET = 512
RESET_BUDGET_PER_SECOND = 32
# Frames that carry no part of a request (SETTINGS, PING, PRIORITY, WINDOW_UPDATE, empty
# and unknown ones), in a burst and given back at each `replenish()`: CVE-2019-9512,
# 9513, 9515 and 9518 (nghttp2 and Envoy 1,000 unwritten answers, Go 10,000). A request
# gives back what an ordinary client spends on it: gRPC's C core sends two WINDOW_UPDATE
# and a PING a call.
CONTROL_BUDGET = 1000
CONTROL_BUDGET_PER_SECOND = 100
CONTROL_BUDGET_PER_REQUEST = 8
# Our DATA gives budget back for the peer's WINDOW_UPDATE frames, unless the peer's
# window cut the frame shorter than this: CVE-2019-9511.
FRUITFUL_WINDOW = 1024
# Bytes of answers to such frames that wait to be written because the peer does not read
# (CVE-2019-9512 and 9515): some 4,000 PINGs.
MAX_CONTROL_OUTPUT = 64 * 1024
# Gaps that a peer leaves between its stream ids: an honest one leaves none.
REMEMBERED_GAPS = 32
# Streams that we reset whose late frames are recognised and dropped (RFC 9113 5.1).
REMEMBERED_RESETS = 1024


@dataclass(frozen=True, slots=True)
class WireLimits:
    """Bounds on one message, and on one connection's messages together.

    max_head_size: bytes of request line and header fields together; beyond it 431. It
        also bounds what is kept of pipelined requests while one is being answered
        (nginx 32 KB, h11 16 KB, uvicorn 64 KB, Node 16 KB).
    max_body_size: bytes of one request body, announced or chunked; beyond it 413
        (nginx 1 MB, KServe unbounded over REST and 8 MiB over gRPC, Triton unbounded).
    max_streams: requests at a time on one HTTP/2 connection; further ones are refused
        unprocessed (nginx 128, Go 250, Envoy and gRPC C-core unbounded).
    max_held_bodies: bytes of incomplete or unanswered request bodies on one HTTP/2
        connection, beyond 1 MiB a stream; past it streams wait for each other. 0: twice
        max_body_size.
    """

    max_head_size: int = 64 * 1024
    max_body_size: int = 100 * 1024 * 1024
    max_streams: int = 256
    max_held_bodies: int = 0
