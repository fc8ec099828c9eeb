"""The main program of an environment worker: reads requests, has them played, writes answers.

The environment server starts it, and it ends when that server does. It imports neither gRPC nor
asyncio: its memory is for the environments.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import os
import resource
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from sdar.contracts.errors import ConfigurationError
from sdar.environments.base import Environment
from sdar.environments.frames import FrameReader, FrameTooLargeError, pack_frame
from sdar.environments.player import Answer, Player
from sdar.environments.registry import EnvironmentSource

_READ_BYTES = 1 << 18
_LAST_WORDS_S = 3.0
"""How long environments may take to close once the server is gone."""


def main(fd: int) -> None:
    """Serve the server at the other end of the socket `fd` until it hangs up."""
    # The server ends a hung worker with SIGABRT: then its log shows where it hung.
    faulthandler.enable()
    # SIGABRT would also write all of the process's memory to disk.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with socket.socket(fileno=fd) as connection:
        threading.Thread(target=_end_with_server, args=(connection,), daemon=True).start()
        # The server may have been killed; then there is nobody to answer.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            _Worker(connection).run()


class _Worker:
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        # Blocking environments answer from threads, and a frame must not be cut by another.
        self._sending = threading.Lock()

    def run(self) -> None:
        # The first request names the environments; its answer says whether they could be built.
        requests = self._read()
        setup = next(requests, None)
        if setup is None:
            return
        player = self._build(setup)
        if player is None:
            return

        for request in requests:
            player.play(request, functools.partial(self._reply, request["id"]))
        player.close()

    def _build(self, setup: dict[str, Any]) -> Player | None:
        builders: dict[str, Callable[[], Environment]] = {}
        for name, source in setup["environments"].items():
            builders[name] = EnvironmentSource(**source).build
        try:
            player = Player(builders)
        except ConfigurationError as error:
            self._reply(setup["id"], {"configuration": error.message})
            return None
        self._reply(setup["id"], {})
        return player

    def _read(self) -> Iterator[dict[str, Any]]:
        frames = FrameReader()
        while data := self._connection.recv(_READ_BYTES):
            yield from frames.feed(data)

    def _reply(self, id: int, answer: Answer) -> None:
        try:
            frame = pack_frame({"id": id, **answer})
        except FrameTooLargeError as error:
            frame = pack_frame({"id": id, "failure": f"answered {error}"})
        except (TypeError, ValueError, RecursionError) as error:
            failure = f"answered what is neither text, number nor boolean: {error}"
            frame = pack_frame({"id": id, "failure": failure})
        with self._sending:
            self._connection.sendall(frame)


def _end_with_server(connection: socket.socket) -> None:
    """End this process also if an environment hangs when the server goes away."""
    hang_up = select.poll()
    # No events are asked for: POLLHUP is always reported.
    hang_up.register(connection, 0)
    hang_up.poll()
    time.sleep(_LAST_WORDS_S)
    os._exit(1)
