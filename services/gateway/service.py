"""The gateway process: builds its parts from a run's configuration and serves HTTP and gRPC."""

from __future__ import annotations

import asyncio
import functools
import socket
from collections.abc import Callable, Coroutine
from typing import Any

from prometheus_client import REGISTRY
from tokenizers import Tokenizer

from sdar.bus.protocol import Bus
from sdar.config import RunConfig
from sdar.connect import build_bus
from sdar.process.lifecycle import run_until_stopped
from sdar.process.settings import Settings
from sdar.process.telemetry import Health
from sdar.v1 import gateway_pb2_grpc
from sdar.wire.http_server import HttpServer, bind_http, build_http_server
from sdar.wire.rpc_server import RpcService, build_server
from sdar.wire.security import Security

from .app import build_app
from .environments import GrpcEnvironmentCatalog
from .grpc_service import GatewayServicer
from .history import History
from .metrics import GatewayMetrics, build_metrics
from .scaling.cluster import KubernetesCluster
from .scaling.file import ScalingFileReader
from .scaling.metrics import ScalingMetrics
from .scaling.scaler import Scaler
from .scheduler import Scheduler
from .watch import Watch

Main = Callable[[asyncio.Event], Coroutine[Any, Any, None]]

_MAX_SILENCE_S = 300.0
"""Longest healthy silence of the main loop: it may wait two minutes for room in a full stream."""


async def serve(config: RunConfig, settings: Settings) -> None:
    """Run the gateway of one run until SIGTERM."""
    security = Security.from_settings(settings)
    listener = bind_http(settings.host, settings.http_port)
    health = Health(max_silence_s=_MAX_SILENCE_S)
    bus = build_bus(config, settings, on_blocked=health.report_blocked)
    # A connection of its own, whose calls the scheduler's long ones don't hold up.
    watch_bus = build_bus(config, settings)
    await bus.ping()
    metrics = build_metrics()
    scheduler = _build_scheduler(config, settings, bus, health, metrics, security)
    watch = Watch(scheduler, watch_bus, metrics)
    scaler = _build_scaler(settings, scheduler, watch)
    app = build_app(
        scheduler, watch, watch_bus, load_tokenizer=_defer_tokenizer(config), scaler=scaler
    )
    mains: list[Main] = [
        scheduler.run,
        watch.run,
        _answer_http(build_http_server(app, settings.host, security), listener),
        _answer_grpc(settings, scheduler, security),
        bus.hurry,
    ]
    if scaler is not None:
        mains.append(scaler.run)
    try:
        await run_until_stopped(*mains)
    finally:
        await bus.close()
        await watch_bus.close()


def _build_scheduler(
    config: RunConfig,
    settings: Settings,
    bus: Bus,
    health: Health,
    metrics: GatewayMetrics,
    security: Security,
) -> Scheduler:
    return Scheduler(
        config,
        bus,
        GrpcEnvironmentCatalog(security),
        History(config.learner_input),
        health,
        default_address=settings.envs_address,
        metrics=metrics,
        is_scaled=settings.scaling is not None,
    )


def _build_scaler(settings: Settings, scheduler: Scheduler, watch: Watch) -> Scaler | None:
    # Without a scaling file too, so that /metrics always has these series.
    metrics = ScalingMetrics(REGISTRY)
    if settings.scaling is None:
        return None
    reader = ScalingFileReader(settings.scaling)
    return Scaler(scheduler, watch, reader, KubernetesCluster(), metrics)


def _defer_tokenizer(config: RunConfig) -> Callable[[], Tokenizer]:
    """Load it when the first trajectory is asked for, and without transformers, which the gateway's
    image does not have.
    """

    @functools.cache
    def load() -> Tokenizer:
        return Tokenizer.from_file(str(config.model.path / "tokenizer.json"))

    return load


def _answer_http(server: HttpServer, listener: socket.socket) -> Main:
    async def answer_http(stopping: asyncio.Event) -> None:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        waiting = asyncio.create_task(stopping.wait())
        # The first to end: a server that broke must end the process, too.
        await asyncio.wait((serving, waiting), return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        server.should_exit = True
        await serving

    return answer_http


def _answer_grpc(settings: Settings, scheduler: Scheduler, security: Security) -> Main:
    add_to_server = gateway_pb2_grpc.add_GatewayServiceServicer_to_server
    service = RpcService("sdar.v1.GatewayService", add_to_server, GatewayServicer(scheduler))
    server = build_server(settings.host, settings.grpc_port, [service], security)

    async def answer_grpc(stopping: asyncio.Event) -> None:
        await server.start()
        await server.set_ready(True)
        await stopping.wait()
        await server.stop(grace_s=2.0)

    return answer_grpc
