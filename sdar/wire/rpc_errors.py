"""Carries errors over gRPC: the caller gets the class of SdarError that the server raised."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn, Protocol

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import status_pb2

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
from sdar.process.telemetry import ERROR_ANSWERS, PROCESS
from sdar.v1 import error_pb2

Trailers = tuple[tuple[str, str | bytes], ...]

_DETAILS_KEY = "grpc-status-details-bin"
_PUSHBACK_KEY = "grpc-retry-pushback-ms"
# HTTP/2 peers refuse header blocks over 8 KiB or so; texts that arrive in errors (a bad task id)
# can be of any length.
_MAX_ERROR_TEXT_BYTES = 1024
_MAX_ERROR_FIELD_BYTES = 128
_MAX_ERROR_FIELDS = 8


def _walk(kind: type[SdarError]) -> Iterator[type[SdarError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _walk(child)


def _error_kinds() -> dict[str, type[SdarError]]:
    """Errors by their name on the wire; listed at each use, since a service may define its own."""
    return {kind("").reason: kind for kind in _walk(SdarError)}


# What a status means when nobody says more: another project's server, a proxy, or the transport
# itself.
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
    if len(data) <= max_bytes:
        return data.decode()
    # The cut may fall within a character; its first bytes are dropped, too.
    return data[:max_bytes].decode("utf-8", errors="ignore") + "…"


def _trailers(code: grpc.StatusCode, reason: str, message: str, fields: dict[str, str]) -> Trailers:
    """Trailing metadata that carries a google.rpc.Status with one ErrorDetail."""
    shortened = {
        name: _shorten(value, _MAX_ERROR_FIELD_BYTES)
        for name, value in list(fields.items())[:_MAX_ERROR_FIELDS]
    }
    status = status_pb2.Status(code=code.value[0], message=message)
    status.details.add().Pack(
        error_pb2.ErrorDetail(reason=reason, message=message, fields=shortened)
    )
    return ((_DETAILS_KEY, status.SerializeToString()),)


def read_error_detail(error: grpc.aio.AioRpcError) -> error_pb2.ErrorDetail | None:
    """The ErrorDetail in the trailers; None if there is none, or none that can be read.

    The peer may be anybody, and an error about its error would hide the call's own.
    """
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
    """The SdarError of a failed call: the class the server raised, or the nearest to the status.

    Args:
        error: what awaiting a call raised.
        peer: address or name of the server, for the message.
    """
    detail = read_error_detail(error)
    if detail is not None:
        return _error_from_detail(detail, error.code(), peer)
    return _error_from_status(error.code(), error.details() or "", peer)


def _error_from_detail(
    detail: error_pb2.ErrorDetail, code: grpc.StatusCode, peer: str
) -> SdarError:
    # A reason that this build does not know comes from a newer server: its status says the rest.
    kind = _error_kinds().get(detail.reason) or _KIND_OF_CODE.get(code, SdarError)
    raised = kind(detail.message or f"Call{_at(peer)} failed with {code.name}.")
    if peer and isinstance(raised, UnauthenticatedError | ForbiddenError):
        # The server does not know the name that it was called by, but whoever mends the token needs
        # it.
        raised = kind(f"Refused by {peer}: {raised.message}")
    # Not through kwargs: a peer may name a field "message".
    raised.fields = {**detail.fields, "grpc_code": code.name, "peer": peer}
    return raised


def _error_from_status(code: grpc.StatusCode, text: str, peer: str) -> SdarError:
    at = _at(peer)
    # gRPC has one code for too many calls and for too large a message. Only the first may be
    # repeated, so the second gets another class.
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in text:
        return InvalidInputError(
            f"Message{at} over the size limit: {text}. Send less in one call.",
            grpc_code=code.name,
            peer=peer,
        )
    kind = _KIND_OF_CODE.get(code, SdarError)
    return kind(
        f"Call{at} failed with {code.name}: {text or 'no details'}.{_REMEDIES.get(code, '')}",
        grpc_code=code.name,
        peer=peer,
    )


def _at(peer: str) -> str:
    return f" at {peer}" if peer else ""


_REMEDIES = {
    grpc.StatusCode.UNAVAILABLE: (
        " Check that the server runs, that the address is right, and that both sides speak TLS "
        "with certificates the other accepts, or neither does (SDAR_TLS_CERT, SDAR_TLS_CA)."
    ),
    grpc.StatusCode.DEADLINE_EXCEEDED: " Check the server's load, or allow more time.",
    grpc.StatusCode.UNIMPLEMENTED: (
        " Check that the address belongs to this service and that both sides have one version."
    ),
}


def raise_from_rpc_error(error: grpc.aio.AioRpcError, peer: str = "") -> NoReturn:
    """Raise what `error_from_rpc` makes of it, with the original as its cause."""
    raise error_from_rpc(error, peer) from error


class _Context(Protocol):
    """The part of a handler's context that errors need."""

    async def abort(
        self, code: grpc.StatusCode, details: str = ..., trailing_metadata: Any = ...
    ) -> NoReturn: ...


async def abort(context: _Context, error: SdarError) -> NoReturn:
    PROCESS.count(ERROR_ANSWERS, protocol="grpc", reason=error.reason)
    code = grpc.StatusCode[error.grpc_status]
    message = _shorten(error.message, _MAX_ERROR_TEXT_BYTES)
    trailers = _trailers(code, error.reason, message, error.fields)
    if isinstance(error, EnvironmentFailedError):
        # The session is gone with its environment: a channel that repeats the call would report the
        # wrong error.
        trailers += ((_PUSHBACK_KEY, "-1"),)
    await context.abort(code, message, trailers)


async def abort_unimplemented(context: _Context, method: str) -> NoReturn:
    PROCESS.count(ERROR_ANSWERS, protocol="grpc", reason="UNIMPLEMENTED")
    code = grpc.StatusCode.UNIMPLEMENTED
    message = f"{method} is not offered by this server."
    await context.abort(code, message, _trailers(code, "UNIMPLEMENTED", message, {}))


async def abort_unexpected(context: _Context, method: str, correlation_id: str) -> NoReturn:
    PROCESS.count(ERROR_ANSWERS, protocol="grpc", reason="INTERNAL")
    code = grpc.StatusCode.INTERNAL
    message = (
        f"{method} failed on an unexpected error. Look for correlation id {correlation_id} in the "
        "server's log."
    )
    await context.abort(
        code, message, _trailers(code, "INTERNAL", message, {"correlation_id": correlation_id})
    )
