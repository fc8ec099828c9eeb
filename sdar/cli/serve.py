"""`sdar serve`: makes the process a service, with its settings, logs and libraries set up first."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
from operator import attrgetter
from pathlib import Path

from sdar.config import RunConfig, load_config
from sdar.connect import locate_model
from sdar.contracts.roles import ROLES, Libraries, ModelUse, Role, RoleSpec
from sdar.engines.vllm_weights import vllm_environment
from sdar.process.settings import Settings, apply_environment, load_settings, thread_environment
from sdar.process.telemetry import configure_logging
from sdar.process.tracing import serve_traces


def serve_service(role: Role, config_path: Path | None) -> None:
    """Run a service of a run until SIGTERM.

    Raises:
        SdarError: the configuration, a port or a dependency forbids it; other errors are defects
            and keep their traceback.
    """
    row = ROLES[role]
    settings = load_settings()
    config = load_config(config_path or settings.config)
    check_addresses(row, config, settings)
    if row.model is not ModelUse.NOTHING:
        config = locate_model(config, with_weights=row.model is ModelUse.WEIGHTS)

    configure_logging(role, settings.instance, settings.log_level, settings.log_format)
    apply_environment(find_library_environment(row, config))
    # Only now, for its libraries read these variables as they are imported.
    service = importlib.import_module(f"services.{role}.service")

    # A service without the bus is seen in the spans of those who call it, and the ranks of a
    # learner in those of the first one.
    is_traced = row.uses_bus and settings.rank == 0
    with serve_traces(settings, role, config.name) if is_traced else contextlib.nullcontext():
        asyncio.run(service.serve(config, settings))


def check_addresses(row: RoleSpec, config: RunConfig, settings: Settings) -> None:
    """See that a role knows where those that it calls in this run listen.

    Raises:
        ConfigurationError: the variable of one of them is not set.
    """
    for call in row.calls:
        if config.has(call.presence) and not call.is_told:
            settings.find_address(call.role)


def find_library_environment(row: RoleSpec, config: RunConfig) -> dict[str, str]:
    """Variables that math libraries and vLLM read at their import: set before a service is."""
    num_threads = int(attrgetter(row.threads)(config)) if row.threads else 1
    has_vllm = row.libraries is Libraries.VLLM
    if row.libraries is Libraries.AS_SCORER:
        has_vllm = config.teacher.scorer == "vllm"
    if has_vllm:
        return vllm_environment(num_threads)
    return thread_environment(num_threads) | {"DS_LOG_LEVEL": "error"}
