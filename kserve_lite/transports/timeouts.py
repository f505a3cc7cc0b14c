"""Every bound on time, and on the number of connections, that a peer can drive."""

from __future__ import annotations

from dataclasses import dataclass

# Bytes read from a socket at once, into one buffer that all connections share.
READ_SIZE = 256 * 1024

# A transfer slower than this, on top of its timeout, is cut: a peer that sends or reads
# a byte a second would hold its connection for days (Apache's mod_reqtimeout: 500 B/s).
MIN_RATE = 1024


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Bounds on one connection in seconds, and on all of them in number.

    timeout_keep_alive: seconds that a connection may be idle between requests; then it
        is closed (KServe 65, nginx 75).
    head_timeout: seconds from the first byte of a request's head to its last; then 408
        (nginx 60).
    body_timeout: seconds from a head to the last byte of the body, plus one for each
        KiB that came; then 408.
    write_timeout: seconds in which the peer reads less than 1 KiB a second of an
        answer; then the connection is cut (nginx's send_timeout 60).
    max_connections: connections open at the same time; a further one gets 503 (nginx
        512 a worker).
    """

    timeout_keep_alive: float = 65.0
    head_timeout: float = 20.0
    body_timeout: float = 60.0
    write_timeout: float = 60.0
    max_connections: int = 2048


# Connections that the kernel holds until they are accepted; Linux caps it by
# net.core.somaxconn (4096).
BACKLOG = 2048

# After a refusal the connection is read on for so long, and what comes is dropped:
# closing at once would reset it and could destroy the answer before it is read
# (RFC 9112 section 9.6).
LINGER = 2.0

# Seconds after which a handler that outlives its cancellation is cancelled once more.
CANCEL_AGAIN = 1.0

# A client that closes its sending side may still be waiting for the answer
# (`shutdown`, `nc -N`) or may be gone: both look the same from here. It is answered if
# that takes no longer than this, then the request is cancelled.
HALF_CLOSED = 0.5

# How often an HTTP/2 connection with open streams is looked after, at most: deadlines
# of streams are kept to within this.
WATCH_EVERY = 1.0

# Bytes of an answer that wait for the peer to read before the handler waits too, a
# stream (asyncio's own high-water mark is 64 KiB a connection).
STREAM_BUFFER = 64 * 1024

# How long a stop waits for the peer to answer the first GOAWAY (RFC 9113 section 6.8)
# with a PING before it says which stream was the last.
GOAWAY_WAIT = 1.0

# How long a stop waits for a further request on a connection that is idle, as nginx's
# keepalive_min_timeout: closing at once would lose what is just being sent.
LAST_REQUEST = 1.0

# Turns of the event loop between accepting a connection and telling of it.
TURNS_OF_ACCEPTING = 3

# How often a TLS connection that closes is asked whether all of its answer is sent.
CLOSING_EVERY = 0.05
