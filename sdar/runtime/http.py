"""Owns how an HTTP server is bound and run beside other parts of a process: uvicorn without its hold on signals."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import uvicorn

from sdar.contracts.errors import ConflictError


class HttpServer(uvicorn.Server):
    """uvicorn without its own signal handlers: signals belong to `sdar.runtime.lifecycle`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind_http(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        ConflictError: the port is taken, or the address is none of this machine's.
    """
    # TCP by name: asyncio sends small answers at once (TCP_NODELAY) only where the socket says so. It is 40 ms a call.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise ConflictError(
            f"Cannot serve HTTP on {host}:{port}: {error.strerror}. Free the port or give another (a service of a run takes "
            "it from SDAR_HTTP_PORT).",
            port=port,
        ) from error
    return listener
