"""All exceptions of the project, each with its gRPC status and its HTTP code.

Every message says what failed, where, what was found and what to do.

SdarError
├── InvalidInputError            the caller sent something wrong; repeating it cannot help
│   ├── ConfigurationError       a run configuration or setting
│   ├── ContractError            a message or record that contradicts itself (lengths, ranges)
│   └── UnknownResourceError     a task, session, run or environment that does not exist
├── RefusedError                 well-formed, but the state forbids it now
│   ├── StaleError               older than the staleness bound
│   ├── ConflictError            somebody else holds it (a run directory, a port, a step index)
│   │   ├── LeaseLostError       an entry went to another consumer or to a later attempt
│   │   └── SupersededError      another process took a role that only one may hold
│   ├── CapacityError            full; retry after a while
│   ├── UnauthenticatedError     no token, or a wrong one
│   └── ForbiddenError           a token whose role does not allow it
├── UnavailableError             a dependency is away; retrying is right
│   ├── BusUnavailableError      Redis
│   ├── WeightsUnavailableError  the weight store, or a version in it
│   └── EnvironmentFailedError   an environment that died, hung or answered nonsense
├── CorruptionError              bytes that do not match their checksum or cannot be decoded
└── EngineFailedError            the sampler died; only a restart of its service helps
"""

from __future__ import annotations

import http


class SdarError(Exception):
    """Base of all errors this project raises on purpose.

    Args:
        message: one or two sentences: what failed, where, what was found, what to do.
        fields: machine-readable details (ids, bounds); they travel in typed error details.

    Attributes:
        stage: the `FailureStage` of a task group that it ended, where the player noted it; empty
            otherwise. It does not travel.
    """

    stage: str = ""

    grpc_status: str = "INTERNAL"
    http_status: int = http.HTTPStatus.INTERNAL_SERVER_ERROR

    def __init__(self, message: str, **fields: object) -> None:
        super().__init__(message)
        self.message = message
        # As texts: what a caller in another process gets is what one in this process gets.
        self.fields = {name: str(value) for name, value in fields.items()}

    @property
    def reason(self) -> str:
        """Name of the error's class on the wire: `LEASE_LOST` for `LeaseLostError`."""
        name = type(self).__name__.removesuffix("Error")
        # An underscore before each capital but the first.
        return "".join("_" + c if c.isupper() and i else c for i, c in enumerate(name)).upper()


class InvalidInputError(SdarError):
    grpc_status = "INVALID_ARGUMENT"
    http_status = http.HTTPStatus.UNPROCESSABLE_ENTITY


class ConfigurationError(InvalidInputError):
    """A run configuration or a setting that cannot be used."""


class ContractError(InvalidInputError):
    """A record that contradicts itself."""


class UnknownResourceError(InvalidInputError):
    grpc_status = "NOT_FOUND"
    http_status = http.HTTPStatus.NOT_FOUND


class RefusedError(SdarError):
    grpc_status = "FAILED_PRECONDITION"
    http_status = http.HTTPStatus.CONFLICT


class StaleError(RefusedError):
    """Older than the staleness bound allows."""


class ConflictError(RefusedError):
    """Held by somebody else, or out of order."""


class LeaseLostError(ConflictError):
    """Another consumer has the work now, and nothing of ours was published. Drop it and go on."""


class SupersededError(ConflictError):
    """Another process holds this role now: end, without writing anything more."""


class UnauthenticatedError(RefusedError):
    grpc_status = "UNAUTHENTICATED"
    http_status = http.HTTPStatus.UNAUTHORIZED


class ForbiddenError(RefusedError):
    grpc_status = "PERMISSION_DENIED"
    http_status = http.HTTPStatus.FORBIDDEN


class CapacityError(RefusedError):
    grpc_status = "RESOURCE_EXHAUSTED"
    http_status = http.HTTPStatus.TOO_MANY_REQUESTS


class UnavailableError(SdarError):
    grpc_status = "UNAVAILABLE"
    http_status = http.HTTPStatus.SERVICE_UNAVAILABLE


class BusUnavailableError(UnavailableError):
    """Redis cannot be reached."""


class WeightsUnavailableError(UnavailableError):
    """The weight store, or the asked version in it, cannot be read."""


class EnvironmentFailedError(UnavailableError):
    """An environment died, hung past its deadline or answered nonsense."""


class CorruptionError(SdarError):
    grpc_status = "DATA_LOSS"


class EngineFailedError(SdarError):
    """The sampler died or holds weights of no version.

    It is no UnavailableError, since repeating the call cannot help.
    """
