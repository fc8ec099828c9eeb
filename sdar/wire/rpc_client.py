"""Calls to gRPC servers: channels with this process's token, deadlines and retries.

    channel = connect("host:port")
    response = await call(PolicyServiceStub(channel).Generate, request, timeout_s=30)

What the server raised, the caller gets: the same class of SdarError, with its fields.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
import grpc.aio

from sdar.wire.rpc_errors import raise_from_rpc_error
from sdar.wire.rpc_methods import MAX_MESSAGE_BYTES, build_method_configs
from sdar.wire.security import OPEN, Security

Response = TypeVar("Response")


class _UnaryTokenInterceptor(grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]
    """Shows the token with each call.

    gRPC's own call credentials would do that too, in a thread of theirs, which costs 0.3 ms a call.
    """

    def __init__(self, security: Security) -> None:
        self._security = security

    async def intercept_unary_unary(
        self, continuation: Any, client_call_details: Any, request: Any
    ) -> Any:
        return await continuation(_show_token(client_call_details, self._security), request)


class _StreamTokenInterceptor(grpc.aio.StreamStreamClientInterceptor):  # type: ignore[type-arg]
    """Shows the token with each reflection.

    A class of its own, since gRPC takes an interceptor for one kind of call only.
    """

    def __init__(self, security: Security) -> None:
        self._security = security

    async def intercept_stream_stream(
        self, continuation: Any, client_call_details: Any, request_iterator: Any
    ) -> Any:
        return await continuation(
            _show_token(client_call_details, self._security), request_iterator
        )


def _show_token(details: Any, security: Security) -> grpc.aio.ClientCallDetails:
    metadata = grpc.aio.Metadata(*(details.metadata or ()))
    if token := security.token_to_present():
        metadata["authorization"] = f"Bearer {token}"
    return grpc.aio.ClientCallDetails(
        details.method, details.timeout, metadata, details.credentials, details.wait_for_ready
    )


def connect(
    address: str,
    security: Security = OPEN,
    *,
    is_sticky: bool = False,
    host: str = "",
    max_message_bytes: int = MAX_MESSAGE_BYTES,
) -> grpc.aio.Channel:
    """Open a channel; nothing is sent before the first call. Close it with `await channel.close()`.

    Calls go round robin over all addresses the name resolves to. With `is_sticky` they stay with
    one of them while its connection lives: what sessions need, for only the server that opened one
    knows it.

    Args:
        address: `host:port`, or any target gRPC resolves (`dns:///envs:9093`).
        security: what the server is verified against and shown. Certificates are read now, the
            token at each call.
        host: the name that the caller looked up to get `address`. The server's certificate has to
            be for that name.
    """
    options = _list_channel_options(is_sticky, max_message_bytes)
    if host:
        options += [("grpc.default_authority", host), ("grpc.ssl_target_name_override", host)]
    else:
        security.check_target(address)
    return _open_channel(address, security, options)


def _list_channel_options(is_sticky: bool, max_message_bytes: int) -> list[tuple[str, str | int]]:
    # Shuffled, so that the clients of a service of several pods do not all pick its first one.
    balancing: dict[str, Any] = (
        {"pick_first": {"shuffleAddressList": True}} if is_sticky else {"round_robin": {}}
    )
    config = {"loadBalancingConfig": [balancing], "methodConfig": build_method_configs()}
    return [
        ("grpc.service_config", json.dumps(config)),
        ("grpc.enable_retries", 1),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        # Notice a peer that vanished while a call waits on it; not more often than strict servers
        # bear.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 5_000),
        # How long one attempt to connect may take: an address without a machine never answers.
        ("grpc.min_reconnect_backoff_ms", 5_000),
    ]


def _open_channel(
    address: str, security: Security, options: list[tuple[str, str | int]]
) -> grpc.aio.Channel:
    interceptors: list[Any] = []
    if security.token_to_present():
        interceptors = [_UnaryTokenInterceptor(security), _StreamTokenInterceptor(security)]
    if security.tls is None:
        return grpc.aio.insecure_channel(address, options=options, interceptors=interceptors)
    files = security.tls.files.get()
    credentials = grpc.ssl_channel_credentials(files.authority, files.key, files.chain)
    return grpc.aio.secure_channel(address, credentials, options=options, interceptors=interceptors)


async def call(
    method: Callable[..., Awaitable[Response]], request: Any, *, timeout_s: float, peer: str = ""
) -> Response:
    """Make one unary call under a deadline, retries included.

    Raises:
        SdarError: the class the server raised; UnavailableError if it cannot be reached or the
            deadline passes.
    """
    try:
        return await method(request, timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        raise_from_rpc_error(error, peer)
