"""Owns how gRPC is spoken: servers with health and reflection, channels with deadlines and retries, errors that keep a type.

Server side:  server = build_server(host, port, [RpcService("sdar.v1.PolicyService", add_PolicyServiceServicer_to_server, it)])
              await server.start(); await server.set_ready(True); ...; await server.stop(grace_s)
Client side:  channel = connect("host:port"); response = await call(PolicyServiceStub(channel).Generate, request, timeout_s=30)

A handler raises SdarError; the caller gets the same class back, with its fields. What a handler raises by mistake becomes
INTERNAL with a correlation id that is in the server's log, and nothing of its text. It knows no service.
Both sides take a `Security`: the server asks each call for a token before it looks at its bytes, the channel shows one.
"""

from __future__ import annotations

import inspect
import json
import urllib.parse
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TypeVar

import grpc
import grpc.aio
import structlog
from google.protobuf import descriptor_pb2
from google.protobuf.message import DecodeError
from google.rpc import status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from sdar.contracts.errors import (
    CapacityError,
    ConflictError,
    CorruptionError,
    EnvironmentFailedError,
    ForbiddenError,
    InvalidInputError,
    RefusedError,
    SdarError,
    UnauthenticatedError,
    UnavailableError,
    UnknownResourceError,
)
from sdar.runtime.security import CLIENT, OPEN, Certificates, Door, Role, Security, Tls
from sdar.runtime.telemetry import ERROR_ANSWERS
from sdar.v1 import environment_pb2, error_pb2, gateway_pb2, policy_pb2, teacher_pb2

Response = TypeVar("Response")
Trailers = tuple[tuple[str, str | bytes], ...]

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""A trajectory of 50 turns and 100,000 tokens takes about 1 MiB; texts of an environment take more."""
MAX_CONCURRENT_CALLS = 16_384
"""Calls a server holds at once; further ones are refused."""

_DETAILS_KEY = "grpc-status-details-bin"
_PUSHBACK_KEY = "grpc-retry-pushback-ms"
# HTTP/2 peers refuse header blocks over 8 KiB or so; texts that arrive in errors (a bad task id) can be of any length.
_MAX_ERROR_TEXT_BYTES = 1024
_MAX_ERROR_FIELD_BYTES = 128
_MAX_ERROR_FIELDS = 8

log = structlog.get_logger()


# ---- errors on the wire


def _walk(kind: type[SdarError]) -> Iterator[type[SdarError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _walk(child)


def _error_kinds() -> dict[str, type[SdarError]]:
    """Errors by the name they have on the wire; read at each use, for a service may define its own."""
    return {kind("").reason: kind for kind in _walk(SdarError)}


# What a status means when nobody says more: another project's server, a proxy, or the transport itself.
_KIND_OF_CODE: dict[grpc.StatusCode, type[SdarError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidInputError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidInputError,
    grpc.StatusCode.UNIMPLEMENTED: InvalidInputError,
    grpc.StatusCode.NOT_FOUND: UnknownResourceError,
    grpc.StatusCode.ALREADY_EXISTS: ConflictError,
    grpc.StatusCode.ABORTED: ConflictError,
    grpc.StatusCode.FAILED_PRECONDITION: RefusedError,
    grpc.StatusCode.PERMISSION_DENIED: ForbiddenError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: CapacityError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: UnavailableError,
    grpc.StatusCode.CANCELLED: UnavailableError,
    grpc.StatusCode.DATA_LOSS: CorruptionError,
}


def _shorten(text: str, max_bytes: int) -> str:
    data = text.encode("utf-8", errors="replace")
    return data.decode() if len(data) <= max_bytes else data[:max_bytes].decode("utf-8", errors="ignore") + "…"


def _trailers(code: grpc.StatusCode, reason: str, message: str, fields: dict[str, str]) -> Trailers:
    """Trailing metadata that carries a google.rpc.Status with one ErrorDetail."""
    shortened = {name: _shorten(value, _MAX_ERROR_FIELD_BYTES) for name, value in list(fields.items())[:_MAX_ERROR_FIELDS]}
    status = status_pb2.Status(code=code.value[0], message=message)
    status.details.add().Pack(error_pb2.ErrorDetail(reason=reason, message=message, fields=shortened))
    return ((_DETAILS_KEY, status.SerializeToString()),)


def read_error_detail(error: grpc.aio.AioRpcError) -> error_pb2.ErrorDetail | None:
    """The ErrorDetail in the trailers; None if there is none or it cannot be read, for the peer may be anybody."""
    trailers: Any = error.trailing_metadata() or ()
    for key, value in trailers:
        if key != _DETAILS_KEY or not isinstance(value, bytes):
            continue
        detail = error_pb2.ErrorDetail()
        try:
            status = status_pb2.Status.FromString(value)
            return next((detail for packed in status.details if packed.Unpack(detail)), None)
        except DecodeError:
            return None
    return None


def error_from_rpc(error: grpc.aio.AioRpcError, peer: str = "") -> SdarError:
    """The SdarError that a failed call stands for: the class the server raised, or the nearest one to the status.

    Args:
        error: what awaiting a call raised.
        peer: address or name of the server, for the message.
    """
    code, text = error.code(), error.details() or ""
    at = f" at {peer}" if peer else ""
    detail = read_error_detail(error)
    if detail is not None:
        kind = _error_kinds().get(detail.reason) or _KIND_OF_CODE.get(code, SdarError)
        # Not through kwargs: a peer may name a field "message".
        told = kind(detail.message or f"Call{at} failed with {code.name}.")
        if peer and isinstance(told, UnauthenticatedError | ForbiddenError):
            # A door does not know by which name it was found; whoever mends the token must.
            told = kind(f"Refused by {peer}: {told.message}")
        told.fields = {**detail.fields, "grpc_code": code.name, "peer": peer}
        return told
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in text:
        return InvalidInputError(
            f"Message{at} over the size limit: {text}. Send less in one call.", grpc_code=code.name, peer=peer
        )
    kind = _KIND_OF_CODE.get(code, SdarError)
    return kind(
        f"Call{at} failed with {code.name}: {text or 'no details'}.{_REMEDIES.get(code, '')}", grpc_code=code.name, peer=peer
    )


_REMEDIES = {
    grpc.StatusCode.UNAVAILABLE: " Check that the server runs, that the address is right, and that both sides speak TLS with "
    "certificates the other accepts, or neither does (SDAR_TLS_CERT, SDAR_TLS_CA).",
    grpc.StatusCode.DEADLINE_EXCEEDED: " Check the server's load, or allow more time.",
    grpc.StatusCode.UNIMPLEMENTED: " Check that the address belongs to this service and that both sides have one version.",
}


def raise_from_rpc_error(error: grpc.aio.AioRpcError, peer: str = "") -> NoReturn:
    """Raise what `error_from_rpc` makes of it, with the original as its cause."""
    raise error_from_rpc(error, peer) from error


# ---- servers


class _Context(Protocol):
    """The part of a handler's context that errors need."""

    async def abort(self, code: grpc.StatusCode, details: str = ..., trailing_metadata: Any = ...) -> NoReturn: ...


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # Generic in its stubs only.
    """Turns exceptions of unary handlers into statuses with typed details. Streaming handlers (health, reflection) pass."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler = await continuation(handler_call_details)
        if handler is None or handler.unary_unary is None:
            return handler
        answer, parse, method = handler.unary_unary, handler.request_deserializer, handler_call_details.method

        async def guarded(data: bytes, context: Any) -> Any:
            try:
                response: Any = answer(_parse_request(parse, data, method), context)
                return await response if inspect.isawaitable(response) else response
            except SdarError as error:
                await _abort(context, error)
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                # The generated base class sets this code where a servicer leaves a method out; the same exception from
                # inside a handler is a defect like any other.
                if isinstance(error, NotImplementedError) and context.code() == grpc.StatusCode.UNIMPLEMENTED:
                    await _abort_unimplemented(context, method)
                correlation_id = uuid.uuid4().hex[:12]
                log.exception("rpc_failed", method=method, correlation_id=correlation_id)
                await _abort_unexpected(context, method, correlation_id)

        return grpc.unary_unary_rpc_method_handler(
            guarded,
            # Parsed inside: what gRPC makes of a bad message has no type and blames the server.
            request_deserializer=None,
            response_serializer=handler.response_serializer,
        )


async def _abort(context: _Context, error: SdarError) -> NoReturn:
    ERROR_ANSWERS.labels("grpc", error.reason).inc()
    code = grpc.StatusCode[error.grpc_status]
    message = _shorten(error.message, _MAX_ERROR_TEXT_BYTES)
    trailers = _trailers(code, error.reason, message, error.fields)
    if isinstance(error, EnvironmentFailedError):
        # The session is gone with its environment: a channel that repeats the call would report the wrong error.
        trailers += ((_PUSHBACK_KEY, "-1"),)
    await context.abort(code, message, trailers)


def _parse_request(parse: Callable[[bytes], Any] | None, data: bytes, method: str) -> Any:
    if parse is None:
        return data
    try:
        return parse(data)
    except DecodeError as error:
        raise InvalidInputError(
            f"{method}: {len(data)} bytes are not its request ({error}). Send what proto/sdar/v1 says, text as UTF-8."
        ) from error


async def _abort_unimplemented(context: _Context, method: str) -> NoReturn:
    ERROR_ANSWERS.labels("grpc", "UNIMPLEMENTED").inc()
    code = grpc.StatusCode.UNIMPLEMENTED
    message = f"{method} is not offered by this server."
    await context.abort(code, message, _trailers(code, "UNIMPLEMENTED", message, {}))


async def _abort_unexpected(context: _Context, method: str, correlation_id: str) -> NoReturn:
    ERROR_ANSWERS.labels("grpc", "INTERNAL").inc()
    code = grpc.StatusCode.INTERNAL
    message = f"{method} failed on an unexpected error. Look for correlation id {correlation_id} in the server's log."
    await context.abort(code, message, _trailers(code, "INTERNAL", message, {"correlation_id": correlation_id}))


@dataclass(frozen=True, slots=True)
class RpcService:
    """A servicer, the generated function that adds it, and the service's full name (`sdar.v1.PolicyService`)."""

    name: str
    add_to_server: Callable[[Any, Any], None]
    servicer: object


class RpcServer:
    """A gRPC server that is bound but not started. `port` is the one it got (0 asks for any)."""

    def __init__(self, server: grpc.aio.Server, port: int, names: Sequence[str], health_servicer: Any) -> None:
        self.port = port
        self._server, self._names, self._health = server, names, health_servicer

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
        """Refuse new calls, let running ones finish for `grace_s`, then cancel them. Safe to repeat."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)

    async def wait_for_termination(self) -> None:
        await self._server.wait_for_termination()


# ---- who may call what

_SERVICES = [
    service
    for file in (environment_pb2, gateway_pb2, policy_pb2, teacher_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
]
_READ_METHODS = {
    f"/{service.full_name}/{method.name}"
    for service in _SERVICES
    for method in service.methods
    if method.GetOptions().idempotency_level == descriptor_pb2.MethodOptions.NO_SIDE_EFFECTS
}
_OPEN_PREFIX = f"/{health.SERVICE_NAME}/"
_REFLECTION_PREFIX = f"/{reflection.SERVICE_NAME}/"


def find_needed_role(method: str) -> Role | None:
    """What calling a method takes: nothing for health, read for what the contract declares free of side effects, else operate.

    Args:
        method: its path, `/sdar.v1.PolicyService/GetPolicy`.
    """
    if method.startswith(_OPEN_PREFIX):
        return None
    is_read = method in _READ_METHODS or method.startswith(_REFLECTION_PREFIX)
    return Role.READ if is_read else Role.OPERATE


class DoorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # Generic in its stubs only.
    """Asks every call whose it is. One that may not come in is refused before its message is taken from the connection: a
    stranger's 64 MiB must not fill the memory. Health is open: probes have no token.
    """

    def __init__(self, door: Door) -> None:
        self._door = door

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None
        metadata: Any = handler_call_details.invocation_metadata or ()
        shown = [value for key, value in metadata if key == "authorization"]
        bearer, refusal = self._door.judge(find_needed_role(handler_call_details.method), shown)

        async def admit(context: Any) -> None:
            client = bearer or _address_of(context.peer())
            try:
                self._door.count(client)
                if refusal:
                    raise refusal
            except SdarError as error:
                await _abort(context, error)
            CLIENT.set(client)

        async def refuse(_: Any, context: Any) -> None:
            await admit(context)

        async def answer_unary(request: Any, context: Any) -> Any:
            await admit(context)
            response = handler.unary_unary(request, context)
            return await response if inspect.isawaitable(response) else response

        async def answer_stream(requests: Any, context: Any) -> AsyncIterator[Any]:
            await admit(context)
            async for response in handler.stream_stream(requests, context):
                yield response

        codec = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if refusal:
            return grpc.stream_stream_rpc_method_handler(refuse)  # reads only what it asks for, which is nothing
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(answer_unary, **codec)
        if handler.stream_stream is not None:  # reflection
            return grpc.stream_stream_rpc_method_handler(answer_stream, **codec)
        # Health.Watch, which anyone could hold open without end. What is not guarded is not offered.
        return None


def _address_of(peer: str) -> str:
    """`127.0.0.1` of `ipv4:127.0.0.1:51234`, without the port: that is another for each connection."""
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
        interceptors=[DoorInterceptor(Door(security)), ErrorInterceptor()],
        options=[
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
            # Two servers on one port would share its calls in silence.
            ("grpc.so_reuseport", 0),
            # Its own bound is 1000 calls that no handler has begun; from there it cancels them at random.
            ("grpc.server.max_pending_requests", max_concurrent_calls),
            ("grpc.server.max_pending_requests_hard_limit", max_concurrent_calls),
            # Our channels ping while they wait; the default server takes that for an attack.
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
        ],
        maximum_concurrent_rpcs=max_concurrent_calls,
    )
    health_servicer: Any = health.aio.HealthServicer()  # type: ignore[attr-defined]
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    for service in services:
        service.add_to_server(service.servicer, server)
    names = [service.name for service in services]
    reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    return RpcServer(server, _bind(server, host, port, security), names, health_servicer)


def _bind(server: grpc.aio.Server, host: str, port: int, security: Security) -> int:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    is_tls = security.is_serving_tls
    try:
        if security.tls is not None and is_tls:
            return server.add_secure_port(address, _build_server_credentials(security.tls))
        return server.add_insecure_port(address)
    except RuntimeError as error:
        key = " If the port is free, the key in SDAR_TLS_KEY is of a kind that gRPC lacks: use P-256." if is_tls else ""
        raise ConflictError(
            f"Cannot serve gRPC on {address}. Free the port, or give another port or host (a service of a run takes them from "
            f"SDAR_GRPC_PORT and SDAR_HOST).{key}",
            address=address,
        ) from error


def _build_server_credentials(tls: Tls) -> grpc.ServerCredentials:
    """Certificates that are read again at the handshake after a change."""
    current = tls.files.get()

    def configure(files: Certificates) -> grpc.ServerCertificateConfiguration:
        is_asking = tls.client_auth != "none"
        # The key and the chain are there: a server speaks TLS only where both are.
        pairs: Any = [(files.key, files.chain)]
        return grpc.ssl_server_certificate_configuration(pairs, root_certificates=files.authority if is_asking else None)

    def fetch() -> Any:  # None for no change, which the stubs do not know
        nonlocal current
        before, current = current, tls.files.get()
        return None if current is before else configure(current)

    return grpc.dynamic_ssl_server_credentials(configure(current), fetch, tls.client_auth != "none")


# ---- channels


def _method_configs() -> list[dict[str, Any]]:
    """Retry policy for each method that the contract declares safe to repeat."""
    safe = [
        {"service": service.full_name, "method": method.name}
        for service in _SERVICES
        for method in service.methods
        if method.GetOptions().idempotency_level != descriptor_pb2.MethodOptions.IDEMPOTENCY_UNKNOWN
    ]
    policy = {
        "maxAttempts": 4,
        "initialBackoff": "0.1s",
        "maxBackoff": "2s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    return [{"name": safe, "retryPolicy": policy}]


class _UnaryTokenInterceptor(grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]
    """Shows the token with each call. gRPC's own call credentials do that too, by a thread of theirs: 0.3 ms a call."""

    def __init__(self, security: Security) -> None:
        self._security = security

    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(_show_token(client_call_details, self._security), request)


class _StreamTokenInterceptor(grpc.aio.StreamStreamClientInterceptor):  # type: ignore[type-arg]
    """The same for reflection. A class of its own: gRPC takes an interceptor for one kind of call only."""

    def __init__(self, security: Security) -> None:
        self._security = security

    async def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await continuation(_show_token(client_call_details, self._security), request_iterator)


def _show_token(details: Any, security: Security) -> grpc.aio.ClientCallDetails:
    metadata = grpc.aio.Metadata(*(details.metadata or ()))
    if token := security.token_to_present():
        metadata["authorization"] = f"Bearer {token}"
    return grpc.aio.ClientCallDetails(details.method, details.timeout, metadata, details.credentials, details.wait_for_ready)


def connect(
    address: str,
    security: Security = OPEN,
    *,
    is_sticky: bool = False,
    host: str = "",
    max_message_bytes: int = MAX_MESSAGE_BYTES,
) -> grpc.aio.Channel:
    """Open a channel; nothing is sent before the first call. Close it with `await channel.close()`.

    Calls go round robin over all addresses the name resolves to. With `is_sticky` they stay with one of them while its
    connection lives: what sessions need, for only the server that opened one knows it.

    Args:
        address: `host:port`, or any target gRPC resolves (`dns:///envs:9093`).
        security: what the server is verified against and shown. Certificates are read now, the token at each call.
        host: the name that `address` was looked up from, by whoever calls this: what its certificate has to show.
    """
    balancing: dict[str, Any] = {"pick_first": {"shuffleAddressList": True}} if is_sticky else {"round_robin": {}}
    config = {"loadBalancingConfig": [balancing], "methodConfig": _method_configs()}
    options = [
        ("grpc.service_config", json.dumps(config)),
        ("grpc.enable_retries", 1),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        # Notice a peer that vanished while a call waits on it; not more often than strict servers bear.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 5_000),
        # How long one attempt to connect may take: an address behind which nobody is answers nothing.
        ("grpc.min_reconnect_backoff_ms", 5_000),
    ]
    if host:
        options += [("grpc.default_authority", host), ("grpc.ssl_target_name_override", host)]
    else:
        security.check_target(address)
    interceptors: list[Any] = []
    if security.token_to_present():
        interceptors = [_UnaryTokenInterceptor(security), _StreamTokenInterceptor(security)]
    if security.tls is None:
        return grpc.aio.insecure_channel(address, options=options, interceptors=interceptors)
    files = security.tls.files.get()
    credentials = grpc.ssl_channel_credentials(files.authority, files.key, files.chain)
    return grpc.aio.secure_channel(address, credentials, options=options, interceptors=interceptors)


async def call(method: Callable[..., Awaitable[Response]], request: Any, *, timeout_s: float, peer: str = "") -> Response:
    """Make one unary call under a deadline, retries included.

    Raises:
        SdarError: the class the server raised; UnavailableError if it cannot be reached or the deadline passes.
    """
    try:
        return await method(request, timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        raise_from_rpc_error(error, peer)
