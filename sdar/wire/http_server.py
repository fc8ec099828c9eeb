"""An HTTP server inside a service's process, and the guard that checks each request first.

    listener = bind_http(host, port)
    server = build_http_server(app, host, security)
    await server.serve([listener])

It knows no route. The guard asks GET and HEAD for the role read and all other methods for operate,
except for the paths that its caller names.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import math
import re
import socket
from collections.abc import Collection, Iterator
from http import HTTPStatus
from typing import Any

import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdar.contracts.errors import ConflictError, ForbiddenError, InvalidInputError, SdarError
from sdar.process.telemetry import ERROR_ANSWERS, PROCESS
from sdar.wire.door import CLIENT, Door
from sdar.wire.security import OPEN, Security, is_loopback
from sdar.wire.tokens import Role

MAX_BODY_BYTES = 1 << 20
MAX_HEADER_BYTES = 64 << 10
MAX_CONNECTIONS = 4096
"""Connections and requests a server holds at once; further ones get 503."""
BODY_TIMEOUT_S = 30.0
_DRAIN_S = 3
"""Longest wait for connections when a server stops. Over TLS an idle client holds one for 30 s."""
OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/metrics"})
"""Open to whoever reaches the port: the page without its data, probes and metrics.

None of them shows a text of an episode.
"""
_READ_METHODS = frozenset({"GET", "HEAD"})
_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cache-control": b"no-store",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
}


class HttpServer(uvicorn.Server):
    """uvicorn without its own signal handlers: signals belong to `sdar.process.lifecycle`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind_http(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        ConflictError: the port is taken, or the address is none of this machine's.
    """
    # TCP by name: asyncio sends small answers at once (TCP_NODELAY) only where the socket says so.
    # Without it a call takes 40 ms more.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise ConflictError(
            f"Cannot serve HTTP on {host}:{port}: {error.strerror}. Free the port or give another "
            "(a service of a run takes it from SDAR_HTTP_PORT).",
            port=port,
        ) from error
    return listener


def build_http_server(
    app: ASGIApp,
    host: str,
    security: Security = OPEN,
    *,
    max_body_bytes: int = MAX_BODY_BYTES,
    read_posts: Collection[str] = (),
    **options: Any,
) -> HttpServer:
    """A server of the application behind its guard; give `serve` the socket of `bind_http`.

    Args:
        host: what the socket is bound to.
        read_posts: paths whose POST changes nothing and takes the role read.
        options: further ones of uvicorn's.

    Raises:
        ConfigurationError: beyond loopback without tokens.
    """
    security.check_bind(host)
    guard = Guard(app, security, host, max_body_bytes=max_body_bytes, read_posts=read_posts)
    if security.tls is not None and security.is_serving_tls:
        # A context of uvicorn's own would read the certificates once and never again.
        context = security.tls.build_server_context()
        options["ssl_context_factory"] = lambda config, default: context
    config = uvicorn.Config(
        guard,
        # uvicorn's other parser bounds no header.
        http="h11",
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        limit_concurrency=MAX_CONNECTIONS,
        log_config=None,
        access_log=False,
        lifespan="off",
        # A client could write any address into them, and calls are counted by address.
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=_DRAIN_S,
        **options,
    )
    return HttpServer(config)


class Guard:
    """Stands before an application and checks tokens, rate, size of bodies and foreign pages.

    On each answer it sets headers that bind a browser.
    """

    def __init__(
        self,
        app: ASGIApp,
        security: Security,
        host: str,
        *,
        max_body_bytes: int = MAX_BODY_BYTES,
        body_timeout_s: float = BODY_TIMEOUT_S,
        read_posts: Collection[str] = (),
    ) -> None:
        self._app = app
        self._door = Door(security)
        self._is_local = security.tokens is None and is_loopback(host)
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s
        self._read_posts = frozenset(read_posts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await _refuse_protocol(scope, send)
        send = _with_headers(send)
        try:
            self._admit(scope)
            if scope["method"] not in _READ_METHODS:
                # Read here as a whole, so that no application has to bound it.
                receive = _replay(await self._read_body(scope, receive), receive)
        except TimeoutError:
            late = InvalidInputError(
                f"The request's body did not arrive within {self._body_timeout_s:g} s. Send it at "
                "once."
            )
            return await build_error_response(late, HTTPStatus.REQUEST_TIMEOUT)(
                scope, receive, send
            )
        except SdarError as error:
            return await build_error_response(error)(scope, receive, send)
        await self._app(scope, receive, send)

    def _admit(self, scope: Scope) -> None:
        method, path = scope["method"], scope["path"]
        # By what a method may change; an application's own routes need not ask.
        is_reading = method in _READ_METHODS
        needed: Role | None = Role.READ if is_reading or path in self._read_posts else Role.OPERATE
        if is_reading and path in OPEN_PATHS:
            needed = None
        headers = [(name.lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        address = scope["client"][0] if scope.get("client") else ""
        shown = [value for name, value in headers if name == b"authorization"]
        CLIENT.set(self._door.admit(needed, shown, address))
        self._check_page(dict(headers))

    def _check_page(self, headers: dict[bytes, str]) -> None:
        """Refuse what a page of another site asks by the browser of somebody on this machine.

        A browser sends the page's address along as the origin. A page whose name resolves to this
        machine (DNS rebinding) sends that name as the host.
        """
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise ForbiddenError(
                f"The page {origin!r} is not of this server. Open the server's own page."
            )
        name = host.rpartition(":")[0] if re.search(r":\d*$", host) else host
        if self._is_local and not is_loopback(name):
            raise ForbiddenError(
                f"This server is for this machine only, asked for as {host!r}. Use 127.0.0.1 or "
                "localhost."
            )

    async def _read_body(self, scope: Scope, receive: Receive) -> bytes:
        announced = next(
            (value for name, value in scope["headers"] if name.lower() == b"content-length"), b"0"
        )
        body = bytearray()
        async with asyncio.timeout(self._body_timeout_s):
            # Bounded by what the header says, and by what comes, should it say nothing or lie.
            while True:
                if max(len(body), int(announced)) > self._max_body_bytes:
                    raise TooLargeError(
                        f"A body of more than {self._max_body_bytes} bytes. Send less in one "
                        "request."
                    )
                message = await receive()
                body += message.get("body", b"")
                if not message.get("more_body", False):
                    return bytes(body)


class TooLargeError(InvalidInputError):
    """A request's body is over the bound."""

    http_status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


async def _refuse_protocol(scope: Scope, send: Send) -> None:
    """No application of ours speaks WebSocket, and none has a lifespan."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})


def _replay(body: bytes, receive: Receive) -> Receive:
    """What the application receives once the body has been read: the body, then whatever comes."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return first.pop() if first else await receive()

    return receive_again


def _with_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            present = {name.lower() for name, _ in message.get("headers", ())}
            added = [(name, value) for name, value in _HEADERS.items() if name not in present]
            message = {**message, "headers": [*message.get("headers", ()), *added]}
        await send(message)

    return send_with_headers


def build_error_response(error: SdarError, status: int | None = None) -> JSONResponse:
    """The answer of every HTTP server of ours to a call that fails."""
    status = int(error.http_status if status is None else status)
    PROCESS.count(ERROR_ANSWERS, protocol="http", reason=error.reason)
    headers = {}
    if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        headers["Retry-After"] = str(math.ceil(float(error.fields.get("retry_after_s", 1))))
    if status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    body = {"reason": error.reason, "message": error.message, "fields": error.fields}
    return JSONResponse({"error": body}, status_code=status, headers=headers)


async def answer_error(_: Request, error: Exception) -> JSONResponse:
    """The exception handler of our applications."""
    assert isinstance(error, SdarError)
    return build_error_response(error)


def build_page_policy(page: str) -> str:
    """Content-Security-Policy of a page: only its own inline script and style run."""

    def hash_inline(tag: str) -> str:
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(map(_hash_source, texts))

    return (
        f"default-src 'none'; script-src {hash_inline('script')}; style-src "
        f"{hash_inline('style')}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hash_source(text: str) -> str:
    """A script or style as the policy names it: 'sha256-...' in quotes, of its bytes in base 64."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
