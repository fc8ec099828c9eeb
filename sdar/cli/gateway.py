"""Owns how the command line asks a run's gateway: which one is meant, with which token, and what its refusals mean."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpx

from sdar.cli.run_directory import list_running
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
from sdar.runtime.http_client import open_http
from sdar.runtime.security import Security
from sdar.runtime.settings import load_settings

_TIMEOUT_S = 10.0
_ERRORS: dict[int, type[SdarError]] = {
    401: UnauthenticatedError,
    403: ForbiddenError,
    404: UnknownResourceError,
    409: RefusedError,
    422: InvalidInputError,
}


class GatewayClient:
    """Calls to one gateway; answers are parsed JSON, refusals are raised as the errors they tell of."""

    def __init__(self, address: str, security: Security) -> None:
        self.address = address
        self._http = open_http(address, security, timeout_s=_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._http.close()

    def get(self, path: str, **query: str | int) -> Any:
        return self._ask("GET", path, query)

    def post(self, path: str) -> Any:
        return self._ask("POST", path, {})

    def _ask(self, method: str, path: str, query: dict[str, str | int]) -> Any:
        try:
            answer = self._http.request(method, path, params=query)
            body = answer.json()
        except (httpx.HTTPError, json.JSONDecodeError) as error:
            reason = str(error).rstrip(".") or type(error).__name__
            raise UnavailableError(
                f"No gateway answers at {self.address}: {reason}. Start the run, give another "
                "address with --gateway, or correct SDAR_TLS_CA: both sides speak TLS, or neither does."
            ) from error
        if answer.is_success:
            return body
        told = body.get("error", {}) if isinstance(body, dict) else {}
        message = told.get("message", f"The gateway at {self.address} answers {answer.status_code} to {method} {path}.")
        raise _ERRORS.get(answer.status_code, UnavailableError)(message)


def open_gateway(url: str | None, runs_dir: Path) -> GatewayClient:
    """The gateway at `url`, else the one of SDAR_GATEWAY_URL, else that of the one run that is running under `runs_dir`.

    Raises:
        ConfigurationError: none is told and none or several are running.
    """
    settings = load_settings()
    told = url or settings.gateway_url
    return GatewayClient(_read_address(told) if told else _find_running(runs_dir), Security.from_settings(settings))


def _read_address(url: str) -> str:
    """`host:port` of a URL; its scheme is chosen by this process's TLS settings."""
    parts = urlsplit(url if "://" in url else f"//{url}")
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme not in ("", "http", "https") or not parts.hostname or port is None or parts.path.strip("/"):
        raise ConfigurationError(f"{url!r} is no gateway's address. Write http://HOST:PORT.")
    return parts.netloc.rpartition("@")[2]


def _find_running(runs_dir: Path) -> str:
    running = list_running(runs_dir)
    if len(running) == 1:
        return next(iter(running.values()))
    found = ", ".join(f"{name} (--gateway {address})" for name, address in sorted(running.items()))
    raise ConfigurationError(
        f"Several runs are running under {runs_dir}: {found}. Say which."
        if running
        else f"No run is running under {runs_dir}. Give its gateway with --gateway http://HOST:PORT or SDAR_GATEWAY_URL."
    )
