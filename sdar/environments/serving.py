"""Runs an environment server with its probes in this process, until SIGTERM."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import Callable, Mapping

import structlog
from prometheus_client import REGISTRY

from sdar.contracts.errors import ConfigurationError
from sdar.environments.registry import EnvironmentSource, is_loading
from sdar.environments.server import serve_environments
from sdar.environments.sessions import SessionLimits, SessionManager
from sdar.environments.workers import WorkerHost
from sdar.process.lifecycle import run_until_stopped
from sdar.process.settings import Settings, apply_environment, load_settings, thread_environment
from sdar.process.telemetry import Health, configure_logging, serve_probes
from sdar.wire.security import Security

_EVERY_ADDRESS = ("0.0.0.0", "::")
_DRAIN_S = 5.0
"""Of a server that somebody started by hand and waits for."""

log = structlog.get_logger()


def serve_until_stopped(
    environments: Mapping[str, EnvironmentSource],
    limits: SessionLimits | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 50051,
    probe_port: int = 0,
    num_workers: int = 0,
) -> None:
    """Serve the environments until SIGTERM or Ctrl-C, as a process of its own.

    Logs go to stderr. Once it is ready, one line on stdout says where it listens.

    Args:
        environments: by the names they are served under.
        limits: of the server as a whole.
        port: of gRPC. probe_port: of /healthz, /readyz and /metrics. 0 takes a free one.
        num_workers: processes that play; 0 for one per usable core.

    Raises:
        ConfigurationError: an environment cannot be built. ConflictError: a port is taken.
    """
    _refuse_in_worker()
    settings = load_settings()
    configure_logging("envs", settings.instance, settings.log_level, settings.log_format)
    # Inherited by the workers, of which each has one core.
    apply_environment(thread_environment(1))
    print_address = functools.partial(_print_address, list(environments), host)
    asyncio.run(
        serve_sources(
            environments,
            limits or SessionLimits(),
            settings,
            host=host,
            port=port,
            probe_port=probe_port,
            num_workers=num_workers,
            on_ready=print_address,
        )
    )


async def serve_sources(
    environments: Mapping[str, EnvironmentSource],
    limits: SessionLimits,
    settings: Settings,
    *,
    host: str,
    port: int,
    probe_port: int,
    num_workers: int = 0,
    on_ready: Callable[[int], None] = lambda port: None,
    drain_s: float = _DRAIN_S,
) -> None:
    """Serve the environments with this process's settings; see `serve_environments`."""
    health = Health()
    # Of the process, not of a run: who shares a server sets it where the server is started.
    limits = dataclasses.replace(limits, max_sessions_per_client=settings.max_sessions_per_client)
    serve = functools.partial(
        serve_environments,
        sessions=SessionManager(WorkerHost(environments, num_workers), limits),
        host=host,
        port=port,
        health=health,
        security=Security.from_settings(settings),
        on_ready=on_ready,
        drain_s=drain_s,
    )
    with serve_probes(host, probe_port, health, REGISTRY):
        await run_until_stopped(serve)


def _refuse_in_worker() -> None:
    """A worker that served would start workers, which would serve, and so on."""
    if is_loading():
        raise ConfigurationError(
            "A worker process imports this module for its environment, and the module begins to "
            'serve at once. Put the call of serve() under `if __name__ == "__main__":`.'
        )


def _print_address(names: list[str], host: str, port: int) -> None:
    # A colon: an address of IPv6.
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    # What is bound to every address is called by one, and a certificate names that.
    called = f"localhost:{port}" if host in _EVERY_ADDRESS else address
    print(f"Serving {', '.join(names)} on {address}. Check it: sdar env check {called}", flush=True)
