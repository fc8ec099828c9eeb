"""The messages between an environment server and its workers: a length, then one JSON object.

JSON and not pickle: an environment that was taken over must not be able to run code in the server.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

MAX_FRAME_BYTES = 32 * 1024 * 1024
"""Half of the largest gRPC message, so that what passes here can be sent on."""

_LENGTH = struct.Struct(">I")
_encode = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


class FrameTooLargeError(ValueError):
    """The object does not fit into a frame."""


def pack_frame(value: dict[str, Any]) -> bytes:
    """Raises FrameTooLargeError, or TypeError for what JSON cannot hold."""
    # ASCII with escapes: lone surrogates come through, too, and are refused where answers are
    # checked.
    data = _encode(value).encode("ascii")
    if len(data) > MAX_FRAME_BYTES:
        raise FrameTooLargeError(f"{len(data)} bytes, the limit is {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(data)) + data


class FrameReader:
    """Frames out of a stream of bytes that arrive in any pieces."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """The objects that `data` completes. Raises ValueError for what is no frame."""
        self._buffer += data
        # Cut off once at the end: to do so after each frame would copy the rest each time.
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            end = start + _LENGTH.size + length
            # Before it is waited for: a worker must not make the server hold gigabytes.
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {length} bytes, the limit is {MAX_FRAME_BYTES}")
            if len(self._buffer) < end:
                break
            yield json.loads(self._buffer[start + _LENGTH.size : end].decode("ascii"))
            start = end
        del self._buffer[:start]
