"""Who of a run connects to whom, as the table of services says."""

from __future__ import annotations

from sdar.config import RunConfig
from sdar.contracts.roles import ROLES, Port
from tools.chart_schema import find_port_number

REDIS = "redis"
REDIS_PORT = 6379


def list_connections(config: RunConfig) -> set[tuple[str, str, int]]:
    """(from, to, port) of every connection between the services of a run, Redis among them."""
    present = [row for row in ROLES.values() if config.has(row.presence)]
    to_redis = {(row.name, REDIS, REDIS_PORT) for row in present if row.uses_bus}
    calls = [(row.name, call) for row in present for call in row.calls]
    grpc = find_port_number(Port.GRPC)
    return to_redis | {(name, call.role, grpc) for name, call in calls if config.has(call.presence)}
