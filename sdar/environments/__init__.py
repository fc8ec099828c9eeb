"""What one imports to write an environment: the base class, its records, and `serve`.

class GuessNumber(Environment): ...

if __name__ == "__main__":
    serve(GuessNumber)
"""

from __future__ import annotations

from collections.abc import Mapping

from sdar.contracts.errors import ConfigurationError
from sdar.contracts.types import Task
from sdar.environments.base import Environment, Observation, StepResult
from sdar.environments.registry import Option, locate_class
from sdar.environments.thoughts import drop_thoughts

__all__ = ["Environment", "Observation", "StepResult", "Task", "drop_thoughts", "serve"]


def serve(
    *environments: type[Environment],
    options: Mapping[str, Option] | None = None,
    host: str = "127.0.0.1",
    port: int = 50051,
    probe_port: int = 0,
    num_workers: int = 0,
    capacity: int = 512,
    step_timeout_s: float = 30.0,
) -> None:
    """Serve environments over gRPC until SIGTERM or Ctrl-C.

    The server sees to sessions, leases, retries, worker processes, metrics, health and shutdown.
    One line on stdout says where it listens; logs go to stderr.

    Args:
        environments: classes, each served under its `name`.
        options: keyword arguments of their constructors.
        port: of gRPC. probe_port: of /healthz, /readyz and /metrics. 0 takes a free one.
        num_workers: processes that play; 0 for one per usable core.
        capacity: sessions held at once.
        step_timeout_s: a call that takes longer is hung, and its worker process is killed.

    Raises:
        ConfigurationError: an environment cannot be built or imported by a worker.
        ConflictError: a port is taken.
    """
    # Here, not above: a worker process imports this module for the base class alone, and needs no
    # server.
    from sdar.environments.serving import serve_until_stopped
    from sdar.environments.sessions import SessionLimits

    _check_names(environments)
    sources = {environment.name: locate_class(environment, options) for environment in environments}
    serve_until_stopped(
        sources,
        SessionLimits(max_sessions=capacity, step_timeout_s=step_timeout_s),
        host=host,
        port=port,
        probe_port=probe_port,
        num_workers=num_workers,
    )


def _check_names(environments: tuple[type[Environment], ...]) -> None:
    names = [getattr(environment, "name", "") for environment in environments]
    if not names or not all(names) or len(set(names)) < len(names):
        raise ConfigurationError(
            f"serve got classes named {names}, expected one or more, each with a name of its own. "
            "Set `name` on the class."
        )
