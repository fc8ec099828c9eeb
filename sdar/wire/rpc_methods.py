"""Facts of the wire contract's methods: the role each needs, which may be repeated, sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection

from sdar.v1 import environment_pb2, gateway_pb2, policy_pb2, teacher_pb2
from sdar.wire.tokens import Role

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""A trajectory of 50 turns and 100,000 tokens takes 1 MiB; an environment's texts take more."""
MAX_CONCURRENT_CALLS = 16_384
"""Calls a server holds at once; further ones are refused."""

_FILES = (environment_pb2, gateway_pb2, policy_pb2, teacher_pb2)


def _list_methods() -> Iterator[MethodDescriptor]:
    """All methods of the wire contract."""
    for file in _FILES:
        for service in file.DESCRIPTOR.services_by_name.values():
            yield from service.methods


_READ_METHODS = {
    f"/{method.containing_service.full_name}/{method.name}"
    for method in _list_methods()
    if method.GetOptions().idempotency_level == descriptor_pb2.MethodOptions.NO_SIDE_EFFECTS
}
_OPEN_PREFIX = f"/{health.SERVICE_NAME}/"
_REFLECTION_PREFIX = f"/{reflection.SERVICE_NAME}/"


def find_needed_role(method: str) -> Role | None:
    """The role that calling a method takes.

    None for health, read for what the contract declares free of side effects, else operate.

    Args:
        method: its path, `/sdar.v1.PolicyService/GetPolicy`.
    """
    if method.startswith(_OPEN_PREFIX):
        return None
    is_read = method in _READ_METHODS or method.startswith(_REFLECTION_PREFIX)
    return Role.READ if is_read else Role.OPERATE


def build_method_configs() -> list[dict[str, Any]]:
    """Retry policy for each method that the contract declares safe to repeat."""
    safe = [
        {"service": method.containing_service.full_name, "method": method.name}
        for method in _list_methods()
        if method.GetOptions().idempotency_level != descriptor_pb2.MethodOptions.IDEMPOTENCY_UNKNOWN
    ]
    policy = {
        # Within a second: for a connection that broke. A server that stays away is waited for by
        # whoever calls, who can log it and stop.
        "maxAttempts": 4,
        "initialBackoff": "0.1s",
        "maxBackoff": "2s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    return [{"name": safe, "retryPolicy": policy}]
