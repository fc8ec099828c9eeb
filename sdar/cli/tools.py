"""Calls the tools that run containers, kubectl, docker and Compose, and passes on their errors."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence

from sdar.contracts.errors import ConfigurationError, UnavailableError

_TIMEOUT_S = 60.0
_SHOWN_WORDS = 4
_LAST_LINES = 3


def find_compose() -> list[str]:
    """How Compose is called here: version 2 is a plugin of docker, version 1 a command of its own.

    Raises:
        ConfigurationError: there is neither.
    """
    if shutil.which("docker"):
        # docker may be here without the plugin.
        version = subprocess.run(["docker", "compose", "version"], capture_output=True)
        if version.returncode == 0:
            return ["docker", "compose"]
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    raise ConfigurationError(
        "--compose needs `docker compose` or `docker-compose`, and neither is here. Install one."
    )


def run_tool(command: Sequence[str]) -> str:
    """What kubectl, docker or Compose prints.

    Raises:
        ConfigurationError: it is not installed.
        UnavailableError: it fails; its own words say why.
    """
    shown = f"`{' '.join(command[:_SHOWN_WORDS])} ...`"
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError as error:
        raise missing_tool(command[0]) from error
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"{shown} printed nothing for {_TIMEOUT_S:.0f} s.") from error
    if done.returncode:
        raise UnavailableError(f"{shown} failed: {_describe_failure(done)}")
    return done.stdout


def _describe_failure(done: subprocess.CompletedProcess[str]) -> str:
    # kubectl's remark on the exit code of a command in a container explains nothing.
    remark = "command terminated with"
    words = filter(None, done.stderr.splitlines())
    lines = [line for line in words if not line.startswith(remark)]
    if lines:
        return " ".join(lines[-_LAST_LINES:])
    # Compose 1 prints nothing about a container that is not there.
    return f"it printed nothing, code {done.returncode}. Look whether that container runs."


def missing_tool(name: str) -> ConfigurationError:
    return ConfigurationError(
        f"{name} is not installed here, or not on PATH. Install it, or ask by --gateway URL."
    )
