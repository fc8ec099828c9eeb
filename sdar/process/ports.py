"""Ports for servers that must find theirs free again after their own death."""

from __future__ import annotations

import random
import socket
from pathlib import Path

from sdar.contracts.errors import ConflictError

_EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_FIRST = 10_240
_USUAL_FIRST_EPHEMERAL = 32_768
_TRIES = 200


def find_free_port(host: str) -> int:
    """A free TCP port below those that the kernel gives to outgoing connections.

    A port that the kernel chose (`bind` to 0) may be an outgoing connection's by the time its
    killed server starts again.

    Raises:
        ConflictError: none was found.
    """
    end = max(_first_ephemeral(), _FIRST + _TRIES)
    # Drawn, since servers that start together would otherwise all try the same port first.
    for port in random.Random().sample(range(_FIRST, end), _TRIES):
        with socket.socket(socket.AF_INET) as probe:
            # As a server binds: a port whose connections only wait for their end is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise ConflictError(f"None of {_TRIES} ports tried on {host} is free. End what listens there.")


def _first_ephemeral() -> int:
    if not _EPHEMERAL_RANGE.exists():
        return _USUAL_FIRST_EPHEMERAL
    return int(_EPHEMERAL_RANGE.read_text().split()[0])
