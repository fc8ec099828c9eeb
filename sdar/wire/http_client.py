"""An HTTP client for our own servers: with their certificate and our token, and without proxies.

with open_http("host:port", security) as http: http.get("/v1/run")
"""

from __future__ import annotations

import ssl
from collections.abc import Generator
from typing import Any

import httpx

from sdar.wire.security import OPEN, Security


class _BearerToken(httpx.Auth):
    def __init__(self, security: Security) -> None:
        self._security = security

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        # Where this process verifies its peers, one that is addressed without TLS is not verified.
        is_unverified = self._security.tls is not None and request.url.scheme != "https"
        if (token := self._security.token_to_present()) and not is_unverified:
            request.headers["Authorization"] = f"Bearer {token}"
        yield request


def find_base_url(address: str, security: Security) -> str:
    """`http://host:port`, or with https where this process speaks TLS."""
    return f"{'http' if security.tls is None else 'https'}://{address}"


def open_http(address: str, security: Security = OPEN, *, timeout_s: float = 5.0) -> httpx.Client:
    """A client of one of our HTTP servers: verifies it, shows the token and uses no proxy.

    Args:
        address: `host:port`.
    """
    security.check_target(address)
    return httpx.Client(
        base_url=find_base_url(address, security), timeout=timeout_s, **client_options(security)
    )


def client_options(security: Security) -> dict[str, Any]:
    """Arguments of `httpx.Client` that make it a client of our own servers."""
    verify: ssl.SSLContext | bool = (
        True if security.tls is None else security.tls.build_client_context()
    )
    # Not from the environment, whose proxies are meant for the outside and would see our token.
    return {"verify": verify, "auth": _BearerToken(security), "trust_env": False}
