"""Listening sockets: of one address, and the two ports of a server."""

from __future__ import annotations

import errno
import logging
import socket
from typing import Any, NamedTuple

from kserve_lite.errors import StartupError
from kserve_lite.server.settings import Settings
from kserve_lite.transports.timeouts import BACKLOG

log = logging.getLogger("kserve_lite")

# Seconds without a word, seconds between probes, and probes: gone within two minutes.
KEEP_ALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}


class PortInUse(StartupError):
    """Something listens on the port already."""


class Ports(NamedTuple):
    """The sockets of the port for everything, and of the second one, if there is one.

    Supervisor and workers hold the same sockets, and so their one queue: whoever closes
    them last refuses what still waits in it.
    """

    first: list[socket.socket]
    second: list[socket.socket]

    @property
    def numbers(self) -> list[int]:
        """The numbers of the ports, also where the setting was 0."""
        return [sockets[0].getsockname()[1] for sockets in self if sockets]

    def close(self) -> None:
        for sock in (*self.first, *self.second):
            sock.close()


def open_ports(settings: Settings) -> Ports:
    """Listen on the ports of the settings; raises StartupError.

    The second one is left out if nobody asked for it and it cannot be had.
    """
    server = settings.server
    first = listen_on(server.host, server.http_port)
    asked = "grpc_port" in settings.given
    is_same = server.grpc_port == server.http_port != 0
    is_free = asked or 0 not in (server.http_port, server.grpc_port)
    if is_same or not (server.enable_grpc and is_free):
        return Ports(first, [])
    try:
        return Ports(first, listen_on(server.host, server.grpc_port, "grpc_port"))
    except StartupError as error:
        if asked or not isinstance(error, PortInUse):
            Ports(first, []).close()
            raise
        log.warning("%s; without it, gRPC is served on %d", error, server.http_port)
        return Ports(first, [])


def listen_on(host: str, port: int, flag: str = "http_port") -> list[socket.socket]:
    """Return non-blocking sockets that listen on every address of `host`.

    flag: the setting that the port came from, for errors.

    Addresses that this machine lacks are left out as long as there is another one:
    `localhost` is often also `::1` where IPv6 is turned off.
    Raises StartupError that says what is wrong with host or port and what to do.
    """
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (socket.gaierror, ValueError) as error:  # ValueError: it can be no name
        reason = getattr(error, "strerror", None) or error
        raise StartupError(
            f"cannot listen on host {host!r}: {reason}; give --host an address of this "
            "machine, 127.0.0.1 or 0.0.0.0"
        ) from error
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    for family, address in dict.fromkeys((info[0], info[4]) for info in found):
        if port == 0 and sockets:
            # Every address gets the port that the first one was given.
            address = (address[0], sockets[0].getsockname()[1], *address[2:])
        try:
            sockets.append(_listen(family, address))
        except OSError as error:
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                missing = error
                continue
            for opened in sockets:
                opened.close()
            raise _cannot_listen(host, port, flag, error) from error
    if not sockets and missing is not None:
        raise _cannot_listen(host, port, flag, missing) from missing
    return sockets


def _listen(family: int, address: tuple[Any, ...]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _keep_alive(sock)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def _keep_alive(sock: socket.socket) -> None:
    """Have the kernel find out that an idle client has vanished without a word.

    A call that streams may be idle for as long as its client likes. Linux hands these
    options down to the connections that are accepted.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEP_ALIVE.items():
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _cannot_listen(host: str, port: int, flag: str, error: OSError) -> StartupError:
    if error.errno == errno.EADDRINUSE:
        return PortInUse(
            f"port {port} on {host} is in use: stop what listens there, or give "
            f"--{flag} another port (0 takes a free one)"
        )
    if error.errno == errno.EACCES:
        return StartupError(
            f"port {port} on {host} may not be used by this user: ports below 1024 "
            f"need a privilege; give --{flag} a higher one"
        )
    return StartupError(f"cannot listen on {host}:{port}: {error.strerror}")
