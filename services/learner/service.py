"""The learner process: builds its parts from a run's configuration and serves until stopped.

On one machine `sdar serve learner` starts the other ranks itself. Under torchrun (RANK and
WORLD_SIZE are set) every rank is such a process. Only rank 0 has a bus and checkpoints to look
after; the first rank of each machine answers probes.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import signal
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from sdar.bus.protocol import Bus
from sdar.config import RunConfig
from sdar.connect import build_bus, build_weight_store
from sdar.contracts.errors import ConfigurationError
from sdar.model.gpus import count_gpus
from sdar.process.gpu_time import GpuTime
from sdar.process.lifecycle import run_until_stopped
from sdar.process.settings import Settings
from sdar.process.telemetry import Health, serve_probes
from sdar.weights.store import WeightStore
from services.learner.checkpoint import Checkpoint, CheckpointStore
from services.learner.followers import FollowerProcesses, build_follower
from services.learner.metrics import LearnerMetrics
from services.learner.progress import Progress
from services.learner.ranks import Ranks, join_ranks, stand_alone
from services.learner.train import Learner
from services.learner.update import Trainer, build_trainer

_MAX_SILENCE_S = 1800.0
"""Longest healthy silence of the main loop: one step of a large model, or its checkpoint."""


async def serve(config: RunConfig, settings: Settings) -> None:
    """Train a run until SIGTERM, as rank 0 or, under torchrun, as any rank.

    Raises:
        ConfigurationError: model, checkpoint or ranks cannot be used. ConflictError: a port or the
            checkpoints are taken.
        CorruptionError: every checkpoint is damaged. SupersededError: another learner has taken
            over.
    """
    _check_num_ranks(config, settings)
    if settings.rank > 0:
        await _serve_follower(config, settings)
    else:
        await _serve_leader(config, settings)


def _check_num_ranks(config: RunConfig, settings: Settings) -> None:
    if settings.world_size > 1 and settings.world_size != config.training.num_ranks:
        raise ConfigurationError(
            f"training.num_ranks is {config.training.num_ranks}, but {settings.world_size} ranks "
            "were started. "
            "Let torchrun's --nnodes times --nproc-per-node make the same number."
        )


async def _serve_leader(config: RunConfig, settings: Settings) -> None:
    health = Health(max_silence_s=_MAX_SILENCE_S)
    async with contextlib.AsyncExitStack() as cleanup:
        registry = cleanup.enter_context(serve_probes(settings.host, settings.probe_port, health))
        # Of all ranks: the others have no /metrics.
        registry.register(GpuTime(count_gpus(config.training.num_ranks)))
        bus = build_bus(config, settings, on_blocked=health.report_blocked)
        cleanup.push_async_callback(bus.close)
        followers = (
            FollowerProcesses(config)
            if settings.world_size == 1 and config.training.num_ranks > 1
            else None
        )
        if followers is not None:
            cleanup.enter_context(followers)
        learner = await cleanup.enter_async_context(
            open_learner(
                config,
                bus,
                build_weight_store(config, settings),
                settings.checkpoints,
                consumer=settings.instance,
                store_address=None if followers is None else followers.store_address,
                health=health,
                metrics=LearnerMetrics(registry),
            )
        )
        beside = [bus.hurry]
        if followers is not None:
            beside.append(followers.watch)
        if config.training.num_ranks > 1:
            beside.append(learner.keep_ranks)
        await run_until_stopped(learner.run, *beside)


@contextlib.asynccontextmanager
async def open_learner(
    config: RunConfig,
    bus: Bus,
    weights: WeightStore,
    checkpoint_dir: Path,
    *,
    consumer: str = "learner",
    store_address: tuple[str, int] | None = None,
    health: Health | None = None,
    metrics: LearnerMetrics | None = None,
) -> AsyncIterator[Learner]:
    """A learner on rank 0, resumed from its newest checkpoint; call its `run`. With `num_ranks` 1
    it stands alone.

    Args:
        store_address: where the other ranks meet; None for a lone rank or under
            torchrun.
    """
    checkpoints = CheckpointStore(checkpoint_dir, config)
    with contextlib.closing(checkpoints), ThreadPoolExecutor(1, "torch") as torch_thread:
        loop = asyncio.get_running_loop()
        trainer, found = await loop.run_in_executor(
            torch_thread, contextvars.copy_context().run, _build, config, checkpoints, store_address
        )
        # Whatever ends the learner, the other ranks have to be let go.
        try:
            yield Learner(
                config,
                bus,
                weights,
                trainer,
                checkpoints,
                Progress() if found is None else found.progress,
                torch_thread=torch_thread,
                consumer=consumer,
                snapshot=None if found is None else found.snapshot,
                health=health,
                metrics=metrics,
            )
        finally:
            await loop.run_in_executor(torch_thread, trainer.stop)


def _build(
    config: RunConfig, checkpoints: CheckpointStore, store_address: tuple[str, int] | None
) -> tuple[Trainer, Checkpoint | None]:
    """In the torch thread: thread counts are a property of the thread that sets them."""
    torch.set_num_threads(config.training.num_threads)
    found = checkpoints.find_newest()
    num_ranks = config.training.num_ranks
    ranks: Ranks = stand_alone() if num_ranks == 1 else join_ranks(0, num_ranks, store_address)
    path = None if found is None else found.path
    ranks.send_checkpoint(path)
    return build_trainer(config, ranks, path), found


async def _serve_follower(config: RunConfig, settings: Settings) -> None:
    """A rank that does what rank 0 says, started by torchrun.

    A signal asks it to leave: rank 0 hears of it at the next beat, drains, and lets all ranks end.
    """
    leaving = asyncio.Event()
    health = Health(max_silence_s=_MAX_SILENCE_S)
    loop = asyncio.get_running_loop()

    def take_signals() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, leaving.set)
        health.mark_ready("following")

    def work() -> None:
        ranks = join_ranks(settings.rank, settings.world_size, local_rank=settings.local_rank)
        follower = build_follower(config, ranks)
        # Before, a signal ends the process at once: nothing is trained yet, and the others would
        # wait in vain.
        loop.call_soon_threadsafe(take_signals)
        follower.follow(health.beat, leaving.is_set)

    is_first = settings.local_rank == 0
    with (
        serve_probes(settings.host, settings.probe_port, health)
        if is_first
        else contextlib.nullcontext()
    ):
        await asyncio.to_thread(work)
