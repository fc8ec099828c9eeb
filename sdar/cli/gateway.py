"""Calls of a run's gateway from the command line: its address, the token, and its refusals.

`python -m sdar.cli.gateway METHOD PATH` asks the gateway of the container that it runs in. That is
how a gateway that only its cluster reaches is asked from outside (`sdar.cli.places`): the address,
the token and the certificates are in the container.
"""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlencode, urlsplit

import httpx

from sdar.cli.tools import run_tool
from sdar.contracts.errors import (
    ConfigurationError,
    ForbiddenError,
    InvalidInputError,
    RefusedError,
    SdarError,
    UnauthenticatedError,
    UnavailableError,
    UnknownResourceError,
)
from sdar.process.settings import load_settings
from sdar.wire.http_client import open_http
from sdar.wire.security import Security

_TIMEOUT_S = 10.0
_LEAST_ERROR = 300
_HINT = (
    "Start the run, give another address with --gateway, or correct SDAR_TLS_CA: both sides speak "
    "TLS, or neither does."
)
_ERRORS: dict[int, type[SdarError]] = {
    401: UnauthenticatedError,
    403: ForbiddenError,
    404: UnknownResourceError,
    409: RefusedError,
    422: InvalidInputError,
}


class Gateway(ABC):
    """Calls to one gateway. Answers are parsed JSON; a refusal is raised as its status' error.

    Args:
        address: what it is called in errors.
    """

    def __init__(self, address: str) -> None:
        self.address = address

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:  # noqa: B027  # not every one has connections
        """Let connections go."""

    @abstractmethod
    def exchange(self, method: str, path: str) -> tuple[int, Any]:
        """The status of an answer and its JSON, whatever it says. Raises UnavailableError if there
        is none.
        """

    def get(self, path: str, **query: str | int) -> Any:
        return self._ask("GET", f"{path}?{urlencode(query)}" if query else path)

    def post(self, path: str) -> Any:
        return self._ask("POST", path)

    def _ask(self, method: str, path: str) -> Any:
        status, body = self.exchange(method, path)
        if status < _LEAST_ERROR:
            return body

        # What stands between, such as an ingress, answers with a body of its own.
        error = body.get("error", {}) if isinstance(body, dict) else {}
        message = error.get(
            "message", f"The gateway at {self.address} answers {status} to {method} {path}."
        )
        raise _ERRORS.get(status, UnavailableError)(message)


class GatewayClient(Gateway):
    """One that is reached at its address.

    Args:
        hint: what to do if none answers.
    """

    def __init__(self, address: str, security: Security, hint: str = _HINT) -> None:
        super().__init__(address)
        self._hint = hint
        self._http = open_http(address, security, timeout_s=_TIMEOUT_S)

    def close(self) -> None:
        self._http.close()

    def exchange(self, method: str, path: str) -> tuple[int, Any]:
        try:
            answer = self._http.request(method, path)
            return answer.status_code, answer.json()
        except (httpx.HTTPError, json.JSONDecodeError) as error:
            # Some errors of httpx have no text.
            reason = str(error).rstrip(".") or type(error).__name__
            raise UnavailableError(
                f"No gateway answers at {self.address}: {reason}. {self._hint}"
            ) from error


class ContainerGateway(Gateway):
    """One that is asked from inside its container.

    Args:
        command: runs what follows it there.
    """

    def __init__(self, address: str, command: Sequence[str]) -> None:
        super().__init__(address)
        self._command = command

    def exchange(self, method: str, path: str) -> tuple[int, Any]:
        text = run_tool([*self._command, "python", "-m", "sdar.cli.gateway", method, path])
        try:
            answer = json.loads(text)
        except json.JSONDecodeError as error:
            raise UnavailableError(f"{self.address} answers no JSON but {text[:200]!r}.") from error
        if "unavailable" in answer:
            raise UnavailableError(f"Asked in {self.address}: {answer['unavailable']}")
        return answer["status"], answer["body"]


def open_gateway(url: str | None, runs_dir: Path) -> GatewayClient:
    """The gateway at `url`, else the one of SDAR_GATEWAY_URL, else that of the one run that is
    running under `runs_dir`.

    Raises:
        ConfigurationError: no address is given, and none or several runs are running.
    """
    settings = load_settings()
    given = url or settings.gateway_url
    address = _read_address(given) if given else _find_running(runs_dir)
    return GatewayClient(address, Security.from_settings(settings))


def _read_address(url: str) -> str:
    """`host:port` of a URL; its scheme is chosen by this process's TLS settings."""
    # Without the slashes, the host of HOST:PORT would be read as a scheme.
    parts = urlsplit(url if "://" in url else f"//{url}")
    try:
        port = parts.port
    except ValueError:
        port = None

    is_http = parts.scheme in ("", "http", "https")
    has_address = bool(parts.hostname) and port is not None
    has_path = bool(parts.path.strip("/"))
    if not is_http or not has_address or has_path:
        raise ConfigurationError(f"{url!r} is no gateway's address. Write http://HOST:PORT.")
    # Without a user and a password.
    return parts.netloc.rpartition("@")[2]


def _find_running(runs_dir: Path) -> str:
    # Its import takes half a second, which a call inside a container saves.
    from sdar.cli.run_directory import list_running

    running = list_running(runs_dir)
    if len(running) == 1:
        return next(iter(running.values()))
    if running:
        found = [f"{name} (--gateway {address})" for name, address in sorted(running.items())]
        raise ConfigurationError(
            f"Several runs are running under {runs_dir}: {', '.join(found)}. Say which."
        )
    raise ConfigurationError(
        f"No run is running under {runs_dir}. Give its gateway with --gateway http://HOST:PORT or "
        "SDAR_GATEWAY_URL."
    )


def answer_in_container(method: str, path: str) -> dict[str, Any]:
    """What this container's own gateway says, or why it says nothing."""
    settings = load_settings()
    security = Security.from_settings(settings)
    if settings.gateway_url:
        address = _read_address(settings.gateway_url)
    else:
        # Certificates name hosts rather than addresses.
        host = "127.0.0.1" if security.tls is None else "localhost"
        address = f"{host}:{settings.http_port}"

    hint = "It may be starting: see `sdar logs gateway`."
    try:
        with GatewayClient(address, security, hint) as client:
            status, body = client.exchange(method, path)
    except UnavailableError as error:
        return {"unavailable": error.message}
    return {"status": status, "body": body}


if __name__ == "__main__":
    print(json.dumps(answer_in_container(*sys.argv[1:])))
