"""The environment service of a run: the server of `sdar.environments` for the run's environment."""

from __future__ import annotations

from sdar.config import RunConfig
from sdar.environments.registry import load_environment
from sdar.environments.serving import serve_sources
from sdar.environments.sessions import SessionLimits
from sdar.process.settings import Settings


async def serve(config: RunConfig, settings: Settings) -> None:
    """Serve the run's environment until SIGTERM.

    Raises:
        ConfigurationError: the environment is unknown or cannot be built. ConflictError: a port is
            taken.
    """
    chosen = config.environment
    await serve_sources(
        {chosen.name: load_environment(chosen.name, chosen.options)},
        SessionLimits(max_sessions=chosen.capacity, step_timeout_s=chosen.step_timeout_s),
        settings,
        host=settings.host,
        port=settings.grpc_port,
        probe_port=settings.probe_port,
        drain_s=settings.drain_s,
    )
