"""A gRPC server with health, reflection, a check of every call's token, and typed errors.

    service = RpcService("sdar.v1.PolicyService", add_PolicyServiceServicer_to_server, servicer)
    server = build_server(host, port, [service])
    await server.start()
    await server.set_ready(True)
    ...
    await server.stop(grace_s)

A handler raises SdarError. What it raises by mistake becomes INTERNAL with a correlation id that is
in the server's log, and nothing of its text. The server asks each call for a token before it looks
at its bytes. It knows no service.
"""

from __future__ import annotations

import functools
import inspect
import urllib.parse
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from sdar.contracts.errors import ConflictError, InvalidInputError, SdarError
from sdar.wire.door import CLIENT, Door
from sdar.wire.rpc_errors import abort, abort_unexpected, abort_unimplemented
from sdar.wire.rpc_methods import MAX_CONCURRENT_CALLS, MAX_MESSAGE_BYTES, find_needed_role
from sdar.wire.security import OPEN, Security
from sdar.wire.tls import Certificates, Tls

log = structlog.get_logger()

Continuation: TypeAlias = (
    "Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]]"
)
"""How an interceptor gets the handler of a call from the interceptors behind it."""
Admit = Callable[[Any], Awaitable[None]]
"""Lets the call of a context in, or ends it with the error that says why not."""


# Interceptors are generic in their stubs only, hence the ignores.
class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Turns exceptions of unary handlers into statuses with typed details.

    Streaming handlers (health, reflection) pass as they are.
    """

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler = await continuation(handler_call_details)
        if handler is None or handler.unary_unary is None:
            return handler
        return grpc.unary_unary_rpc_method_handler(
            _catch_errors(handler, handler_call_details.method),
            # Parsed inside: what gRPC makes of a bad message has no type and blames the server.
            request_deserializer=None,
            response_serializer=handler.response_serializer,
        )


def _catch_errors(handler: Any, method: str) -> Callable[[bytes, Any], Awaitable[Any]]:
    """A unary handler's answer to the bytes of a request, with its errors as statuses."""

    async def answer(data: bytes, context: Any) -> Any:
        try:
            request = _parse_request(handler.request_deserializer, data, method)
            response: Any = handler.unary_unary(request, context)
            return await response if inspect.isawaitable(response) else response
        except SdarError as error:
            await abort(context, error)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            if _is_left_out(error, context):
                await abort_unimplemented(context, method)
            correlation_id = uuid.uuid4().hex[:12]
            log.exception("rpc_failed", method=method, correlation_id=correlation_id)
            await abort_unexpected(context, method, correlation_id)

    return answer


def _is_left_out(error: Exception, context: Any) -> bool:
    # The generated base class sets this code where a servicer leaves a method out; the same
    # exception from inside a handler is a defect like any other.
    if not isinstance(error, NotImplementedError):
        return False
    return bool(context.code() == grpc.StatusCode.UNIMPLEMENTED)


def _parse_request(parse: Callable[[bytes], Any] | None, data: bytes, method: str) -> Any:
    if parse is None:
        return data
    try:
        return parse(data)
    except DecodeError as error:
        raise InvalidInputError(
            f"{method}: {len(data)} bytes are not its request ({error}). Send what proto/sdar/v1 "
            "says, text as UTF-8."
        ) from error


@dataclass(frozen=True, slots=True)
class RpcService:
    """A servicer, the generated function that adds it, and the service's full name
    (`sdar.v1.PolicyService`).
    """

    name: str
    add_to_server: Callable[[Any, Any], None]
    servicer: object


class RpcServer:
    """A gRPC server that is bound but not started. `port` is the one it got (0 asks for any)."""

    def __init__(
        self, server: grpc.aio.Server, port: int, names: Sequence[str], health_servicer: Any
    ) -> None:
        self.port = port
        self._server = server
        self._names = names
        self._health = health_servicer

    async def start(self) -> None:
        """Answer calls; health says NOT_SERVING until `set_ready`."""
        await self.set_ready(False)
        await self._server.start()

    async def set_ready(self, is_ready: bool) -> None:
        """Set the health of the server and of each of its services."""
        status = health_pb2.HealthCheckResponse
        for name in ("", *self._names):
            await self._health.set(name, status.SERVING if is_ready else status.NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, let running ones finish for `grace_s`, then cancel them. Safe to
        repeat.
        """
        # First: from here on probes fail, so that no new caller is sent here.
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)

    async def wait_for_termination(self) -> None:
        await self._server.wait_for_termination()


class DoorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Checks the token of every call.

    A call that may not come in is refused before its message is taken from the connection, since a
    stranger's 64 MiB must not fill the memory. Health is open: probes have no token.
    """

    def __init__(self, door: Door) -> None:
        self._door = door

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None
        metadata: Any = handler_call_details.invocation_metadata or ()
        shown = [value for key, value in metadata if key == "authorization"]
        bearer, refusal = self._door.judge(find_needed_role(handler_call_details.method), shown)
        admit = functools.partial(self._admit, bearer, refusal)
        if refusal:
            return _refuse_unread(admit)
        if handler.unary_unary is not None:
            return _guard_unary(handler, admit)
        if handler.stream_stream is not None:  # reflection
            return _guard_stream(handler, admit)
        # Health.Watch, which anyone could hold open without end. What is not guarded is not
        # offered.
        return None

    async def _admit(self, bearer: str, refusal: SdarError | None, context: Any) -> None:
        client = bearer or _address_of(context.peer())
        try:
            # Before the refusal: guessing tokens is bounded, too.
            self._door.count(client)
            if refusal:
                raise refusal
        except SdarError as error:
            await abort(context, error)
        CLIENT.set(client)


def _refuse_unread(admit: Admit) -> Any:
    async def refuse(_: Any, context: Any) -> None:
        await admit(context)

    # As a stream, whatever was called: it reads only the messages it asks for, and asks for none.
    return grpc.stream_stream_rpc_method_handler(refuse)


def _guard_unary(handler: Any, admit: Admit) -> Any:
    async def answer(request: Any, context: Any) -> Any:
        await admit(context)
        response = handler.unary_unary(request, context)
        return await response if inspect.isawaitable(response) else response

    return grpc.unary_unary_rpc_method_handler(
        answer,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )


def _guard_stream(handler: Any, admit: Admit) -> Any:
    async def answer(requests: Any, context: Any) -> AsyncIterator[Any]:
        await admit(context)
        async for response in handler.stream_stream(requests, context):
            yield response

    return grpc.stream_stream_rpc_method_handler(
        answer,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )


def _address_of(peer: str) -> str:
    """`127.0.0.1` of `ipv4:127.0.0.1:51234`: without the port, which differs by connection."""
    kind, _, address = urllib.parse.unquote(peer).partition(":")
    return address.rpartition(":")[0] if kind in ("ipv4", "ipv6") else kind


def build_server(
    host: str,
    port: int,
    services: Sequence[RpcService],
    security: Security = OPEN,
    *,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    max_concurrent_calls: int = MAX_CONCURRENT_CALLS,
) -> RpcServer:
    """Bind a server with the services, health and reflection. Call it with an event loop running.

    Raises:
        ConflictError: the port is taken. ConfigurationError: beyond loopback without tokens.
    """
    security.check_bind(host)
    server = grpc.aio.server(
        # The door first: a stranger's request is not even parsed.
        interceptors=[DoorInterceptor(Door(security)), ErrorInterceptor()],
        options=_list_server_options(max_message_bytes, max_concurrent_calls),
        maximum_concurrent_rpcs=max_concurrent_calls,
    )
    health_servicer: Any = health.aio.HealthServicer()  # type: ignore[attr-defined]
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    for service in services:
        service.add_to_server(service.servicer, server)
    names = [service.name for service in services]
    reflection.enable_server_reflection(
        [*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server
    )
    return RpcServer(server, _bind(server, host, port, security), names, health_servicer)


def _list_server_options(
    max_message_bytes: int, max_concurrent_calls: int
) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        # Two servers on one port would share its calls in silence.
        ("grpc.so_reuseport", 0),
        # Its own bound is 1000 calls that no handler has begun; from there it cancels them at
        # random.
        ("grpc.server.max_pending_requests", max_concurrent_calls),
        ("grpc.server.max_pending_requests_hard_limit", max_concurrent_calls),
        # Our channels ping while they wait; the default server takes that for an attack.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
    ]


def _bind(server: grpc.aio.Server, host: str, port: int, security: Security) -> int:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    is_tls = security.is_serving_tls
    try:
        if security.tls is not None and is_tls:
            return server.add_secure_port(address, _build_server_credentials(security.tls))
        return server.add_insecure_port(address)
    except RuntimeError as error:
        key = (
            " If the port is free, the key in SDAR_TLS_KEY is of a kind that gRPC lacks: use P-256."
            if is_tls
            else ""
        )
        raise ConflictError(
            f"Cannot serve gRPC on {address}. Free the port, or give another port or host (a "
            f"service of a run takes them from SDAR_GRPC_PORT and SDAR_HOST).{key}",
            address=address,
        ) from error


def _build_server_credentials(tls: Tls) -> grpc.ServerCredentials:
    """Certificates that are read again at the handshake after a change."""
    current = tls.files.get()

    def configure(files: Certificates) -> grpc.ServerCertificateConfiguration:
        is_asking = tls.client_auth != "none"
        # The key and the chain are there: a server speaks TLS only where both are.
        pairs: Any = [(files.key, files.chain)]
        return grpc.ssl_server_certificate_configuration(
            pairs, root_certificates=files.authority if is_asking else None
        )

    def fetch() -> Any:  # None for no change, which the stubs do not know
        nonlocal current
        before, current = current, tls.files.get()
        return None if current is before else configure(current)

    return grpc.dynamic_ssl_server_credentials(configure(current), fetch, tls.client_auth != "none")
