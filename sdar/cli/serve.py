"""Owns how a process becomes a service: settings, logs, library switches, then the service's own
main.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
from pathlib import Path

from sdar.config import RunConfig, load_config
from sdar.connect import locate_model
from sdar.engines.vllm_weights import vllm_environment
from sdar.process.settings import Settings, apply_environment, load_settings, thread_environment
from sdar.process.telemetry import configure_logging
from sdar.process.tracing import serve_traces


def serve_service(name: str, config_path: Path | None) -> None:
    """Run service `name` of a run until SIGTERM.

    Raises:
        SdarError: the configuration, a port or a dependency forbids it; other errors are defects
            and keep their traceback.
    """
    settings = load_settings()
    config = load_config(config_path or settings.config)
    if name != "envs":
        config = locate_model(config, with_weights=name != "gateway")
    configure_logging(name, settings.instance, settings.log_level, settings.log_format)
    apply_environment(_library_environment(name, config))
    service = importlib.import_module(f"services.{name}.service")
    # Environments are seen from the rollout workers, ranks from the first one.
    is_traced = name != "envs" and settings.rank == 0
    with serve_traces(settings, name, config.name) if is_traced else contextlib.nullcontext():
        asyncio.run(_serve(service.serve, config, settings))


async def _serve(serve: object, config: RunConfig, settings: Settings) -> None:
    await serve(config, settings)  # type: ignore[operator]


def _library_environment(name: str, config: RunConfig) -> dict[str, str]:
    """Switches that math libraries and vLLM read when they are imported, which is why they are set
    before a service is.
    """
    threads = {
        "rollout": config.rollout.num_threads,
        "teacher": config.teacher.num_threads,
        "learner": config.training.num_threads,
    }
    num_threads = threads.get(name, 1)
    if name == "rollout" or (name == "teacher" and config.teacher.scorer == "vllm"):
        return vllm_environment(num_threads)
    return thread_environment(num_threads) | {"DS_LOG_LEVEL": "error"}
