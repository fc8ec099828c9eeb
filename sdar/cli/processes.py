"""Starts, watches, restarts and stops the service processes of a run on one machine."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from sdar.contracts.errors import ConflictError, SdarError
from sdar.contracts.roles import find_role_name
from sdar.process.ports import find_free_port
from sdar.wire.http_client import client_options
from sdar.wire.security import OPEN, Security

_PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>
_PROBE_TIMEOUT_S = 2.0
_MAX_RESTARTS = 5
_RESTART_WINDOW_S = 600.0
_LAST_LINES = 3
REFUSED_EXIT_CODE = 2
"""A service that ends with this code reported why, and would do so again: it is not restarted."""


class ServiceFailedError(SdarError):
    """A service cannot run; the message holds its own last words."""


@dataclass
class ServiceProcess:
    """One service in a process group of its own, so that what it starts ends with it."""

    name: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    log_path: Path
    probe_url: str
    security: Security = OPEN
    """What its probe's server is verified by: the gateway's is its HTTP API."""
    process: subprocess.Popen[bytes] | None = None
    restarts: list[float] = field(default_factory=list)
    """When it was restarted, by the monotonic clock."""

    def command(self) -> list[str]:
        return [sys.executable, "-m", "sdar.cli.main", *self.arguments]

    def start(self) -> None:
        # Appended, so that the log of a service that died is still there after its restart.
        with self.log_path.open("ab") as log_file:
            self.process = subprocess.Popen(
                self.command(),
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                start_new_session=True,  # Ctrl-C is the supervisor's: it drains in order
                preexec_fn=end_with_parent,
            )

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def is_ready(self) -> bool:
        """Whether its probe answers that it is."""
        try:
            answer = httpx.get(
                f"{self.probe_url}/readyz",
                timeout=_PROBE_TIMEOUT_S,
                **client_options(self.security),
            )
        except httpx.HTTPError:
            return False
        return answer.status_code == httpx.codes.OK

    def terminate(self) -> None:
        if self.process is not None and self.is_running:
            self.process.terminate()

    def kill(self) -> None:
        """End the whole group, orphans included."""
        if self.process is not None:
            # Its group may be empty by now.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def last_words(self) -> str:
        """The error that the service reported last, or the end of its log."""
        lines: list[str] = []
        if self.log_path.exists():
            lines = self.log_path.read_text(errors="replace").splitlines()

        for line in reversed(lines):
            if line.startswith("error: "):
                return line.removeprefix("error: ")
        return " / ".join(map(str.strip, lines[-_LAST_LINES:])) or "it logged nothing"


class Fleet:
    """All services of a run.

    Args:
        max_restarts: how often a service may die within ten minutes and be restarted.
    """

    def __init__(self, max_restarts: int = _MAX_RESTARTS) -> None:
        self.services: list[ServiceProcess] = []
        self._max_restarts = max_restarts

    def add(self, service: ServiceProcess) -> None:
        service.start()
        self.services.append(service)

    def list_of_role(self, role: str) -> list[ServiceProcess]:
        return [service for service in self.services if find_role_name(service.name) == role]

    def not_ready(self) -> list[str]:
        return [service.name for service in self.services if not service.is_ready()]

    def check(self) -> list[str]:
        """Restart services that died.

        Returns:
            Their names.

        Raises:
            ServiceFailedError: a service refused to run, or died too often.
        """
        restarted = []
        for service in self.services:
            if service.process is None or service.is_running:
                continue
            self._restart(service, service.process.returncode)
            restarted.append(service.name)
        return restarted

    def _restart(self, service: ServiceProcess, code: int) -> None:
        if code == REFUSED_EXIT_CODE:
            raise ServiceFailedError(
                f"The {service.name} service cannot run: {service.last_words()}"
            )

        now = time.monotonic()
        service.restarts = [at for at in service.restarts if now - at < _RESTART_WINDOW_S]
        if len(service.restarts) >= self._max_restarts:
            raise ServiceFailedError(
                f"The {service.name} service died {self._max_restarts + 1} times within "
                f"{_RESTART_WINDOW_S / 60:.0f} "
                f"minutes, last with code {code}: {service.last_words()}. Its log is "
                f"{service.log_path}."
            )

        service.kill()  # what it left behind in its process group
        service.restarts.append(now)
        service.start()

    def stop(self, roles: tuple[str, ...], timeout_s: float) -> list[str]:
        """Ask the services of these roles to drain, and wait for them.

        Returns:
            Names of those that did not end in time and were killed.
        """
        stopping: list[ServiceProcess] = []
        for role in roles:
            stopping += self.list_of_role(role)
        # All are asked before one is waited for: they drain side by side.
        for service in stopping:
            service.terminate()

        deadline = time.monotonic() + timeout_s
        killed = []
        for service in stopping:
            try:
                if service.process is not None:
                    service.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                killed.append(service.name)
            # Also one that ended: it may have left processes behind.
            service.kill()
        return killed

    def kill(self) -> None:
        for service in self.services:
            service.kill()


def choose_port(host: str, wanted: int = 0) -> int:
    """`wanted` if it is free, or with 0 any free port.

    Raises:
        ConflictError: the wanted port is taken.
    """
    if wanted == 0:
        return find_free_port(host)
    with socket.socket(socket.AF_INET) as probe:
        # As servers do: a port whose connections ended a moment ago is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, wanted))
        except OSError as error:
            raise ConflictError(
                f"Port {wanted} on {host} is taken. Stop what listens there or choose another "
                "--port (0 takes any free one).",
                port=wanted,
            ) from error
    return wanted


def end_with_parent() -> None:
    """Ask the kernel for SIGTERM when the supervisor dies, however it dies: no orphans."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
