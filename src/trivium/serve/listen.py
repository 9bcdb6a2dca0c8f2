"""Take the port before anything is loaded, and say who has it where it is taken."""

from __future__ import annotations

import errno
import os
import socket

import psutil

from trivium.base.errors import ConfigError

_BACKLOG = 1024


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 lets the system choose.

    Raises:
        ConfigError: the host is not one of this machine's, or the port is taken or privileged.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port {port}: expected 0 to 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host[:100]!r} cannot be resolved ({error}); use 127.0.0.1 or a name") from None
    family, kind, protocol, _, address = found[0]
    taken = socket.socket(family, kind, protocol)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
        taken.listen(_BACKLOG)
        taken.setblocking(False)
    except OSError as error:
        taken.close()
        raise ConfigError(_why(host, port, error)) from None
    return taken


def _why(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is taken{_holder(port)}; stop that server, or choose another with --port"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"port {port} is privileged; choose one above 1023 with --port"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host {host} is not an address of this machine; use 127.0.0.1"
    return f"cannot listen on {host}:{port}: {error.strerror or error}"


def _holder(port: int) -> str:
    try:
        connections = psutil.net_connections(kind="tcp")
    except (psutil.Error, OSError):
        return ""
    for one in connections:
        if one.status == psutil.CONN_LISTEN and one.laddr and one.laddr.port == port and one.pid:
            return f" by process {one.pid}" + (" (this one)" if one.pid == os.getpid() else "")
    return ""
