"""Owns the environment process: builds the server of a run's environment and its probes, and serves until told to stop."""

from __future__ import annotations

import functools

from prometheus_client import REGISTRY

from sdar.config import RunConfig
from sdar.runtime.lifecycle import run_until_stopped
from sdar.runtime.settings import Settings
from sdar.runtime.telemetry import Health, serve_probes
from services.envs.registry import load_environments
from services.envs.server import serve_environments
from services.envs.sessions import SessionLimits


async def serve(config: RunConfig, settings: Settings) -> None:
    """Serve the run's environment until SIGTERM.

    Raises:
        ConfigurationError: the environment is unknown or cannot be imported. ConflictError: a port is taken.
    """
    health = Health()
    limits = SessionLimits(max_sessions=config.environment.capacity, step_timeout_s=config.environment.step_timeout_s)
    environments = load_environments([config.environment.name])
    with serve_probes(settings.host, settings.probe_port, health, REGISTRY):
        await run_until_stopped(
            functools.partial(
                serve_environments,
                environments=environments,
                limits=limits,
                host=settings.host,
                port=settings.grpc_port,
                health=health,
            )
        )
