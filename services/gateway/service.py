"""Owns the gateway process: builds its parts from a run's configuration and serves HTTP and gRPC
until told to stop.
"""

from __future__ import annotations

import asyncio
import functools

from prometheus_client import REGISTRY
from tokenizers import Tokenizer

from sdar.config import RunConfig
from sdar.connect import build_bus
from sdar.contracts.streams import Stream
from sdar.process.lifecycle import run_until_stopped
from sdar.process.settings import Settings
from sdar.process.telemetry import Health
from sdar.v1 import gateway_pb2_grpc
from sdar.wire.http_server import bind_http, build_http_server
from sdar.wire.rpc_server import RpcService, build_server
from sdar.wire.security import Security

from .app import build_app
from .environments import GrpcEnvironmentCatalog
from .grpc_service import GatewayServicer
from .history import History
from .metrics import build_metrics
from .scaling.cluster import KubernetesCluster
from .scaling.file import ScalingFileReader
from .scaling.metrics import ScalingMetrics
from .scaling.scaler import Scaler
from .scheduler import Scheduler
from .watch import Watch

_MAX_SILENCE_S = 300.0
"""Longest healthy silence of the main loop: it may wait two minutes for room in a full stream."""


async def serve(config: RunConfig, settings: Settings) -> None:
    """Run the gateway of one run until SIGTERM."""
    security = Security.from_settings(settings)
    listener = bind_http(settings.host, settings.http_port)
    health = Health(max_silence_s=_MAX_SILENCE_S)
    bus = build_bus(config, settings, on_blocked=health.report_blocked)
    watch_bus = build_bus(config, settings)
    await bus.ping()
    metrics = build_metrics()
    history = History(Stream.SCORED if config.needs_teacher else Stream.TRAJECTORIES)
    scheduler = Scheduler(
        config,
        bus,
        GrpcEnvironmentCatalog(security),
        history,
        health,
        default_address=settings.envs_address,
        metrics=metrics,
        is_scaled=settings.scaling is not None,
    )
    watch = Watch(scheduler, watch_bus, metrics)
    scaling_metrics, scaler = ScalingMetrics(REGISTRY), None
    if settings.scaling is not None:
        scaler = Scaler(
            scheduler,
            watch,
            ScalingFileReader(settings.scaling),
            KubernetesCluster(),
            scaling_metrics,
        )
    # Without transformers, which the gateway's image does not have; loaded when the first
    # trajectory is asked for.
    load_tokenizer = functools.cache(
        lambda: Tokenizer.from_file(str(config.model.path / "tokenizer.json"))
    )
    app = build_app(scheduler, watch, watch_bus, load_tokenizer=load_tokenizer, scaler=scaler)
    http_server = build_http_server(app, settings.host, security)
    add_to_server = gateway_pb2_grpc.add_GatewayServiceServicer_to_server
    grpc_service = RpcService("sdar.v1.GatewayService", add_to_server, GatewayServicer(scheduler))
    grpc_server = build_server(settings.host, settings.grpc_port, [grpc_service], security)

    async def answer_http(stopping: asyncio.Event) -> None:
        serving = asyncio.create_task(http_server.serve(sockets=[listener]))
        waiting = asyncio.create_task(stopping.wait())
        await asyncio.wait((serving, waiting), return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        http_server.should_exit = True
        await serving

    async def answer_grpc(stopping: asyncio.Event) -> None:
        await grpc_server.start()
        await grpc_server.set_ready(True)
        await stopping.wait()
        await grpc_server.stop(grace_s=2.0)

    try:
        mains = [
            scheduler.run,
            watch.run,
            answer_http,
            answer_grpc,
            bus.hurry,
            *([scaler.run] if scaler else []),
        ]
        await run_until_stopped(*mains)
    finally:
        await bus.close()
        await watch_bus.close()
