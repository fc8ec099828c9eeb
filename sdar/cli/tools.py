"""Calls of the tools that run containers: kubectl, docker, Compose. Errors keep their words."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence

from sdar.contracts.errors import ConfigurationError, UnavailableError

_TIMEOUT_S = 60.0


def find_compose() -> list[str]:
    """How Compose is called here: version 2 is a plugin of docker, version 1 a command of its own.

    Raises:
        ConfigurationError: there is neither.
    """
    if (
        shutil.which("docker")
        and subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0
    ):
        return ["docker", "compose"]
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    raise ConfigurationError(
        "--compose needs `docker compose` or `docker-compose`, and neither is here. Install one."
    )


def run_tool(command: Sequence[str]) -> str:
    """What kubectl, docker or Compose prints.

    Raises:
        ConfigurationError: it is not installed. UnavailableError: it fails; its own words say why.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError as error:
        raise missing_tool(command[0]) from error
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(
            f"`{' '.join(command[:4])} ...` said nothing for {_TIMEOUT_S:.0f} s."
        ) from error
    if done.returncode:
        words = [
            line
            for line in done.stderr.splitlines()
            if line and not line.startswith("command terminated with")
        ]
        # Compose 1 says nothing of a container that is not there.
        told = (
            " ".join(words[-3:])
            or f"it says nothing, code {done.returncode}. Look whether that container runs."
        )
        raise UnavailableError(f"`{' '.join(command[:4])} ...` failed: {told}")
    return done.stdout


def missing_tool(name: str) -> ConfigurationError:
    return ConfigurationError(
        f"{name} is not installed here, or not on PATH. Install it, or ask by --gateway URL."
    )
