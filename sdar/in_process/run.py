"""Plays a whole run in one process: every service's main loop on the in-memory bus.

It is for experiments over many seeds and for tests. What differs from `sdar run` is chosen here:
the bus, the sampler (`TransformersEngine`) and environments without gRPC. Scheduling, episodes,
scores, updates and accounts are the services' own.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sdar.bus.protocol import BEFORE_FIRST
from sdar.config import RunConfig
from sdar.contracts.errors import ConfigurationError, UnavailableError
from sdar.environments.registry import load_environment
from sdar.environments.sessions import SessionLimits, SessionManager
from sdar.in_process.environment_host import InProcessHost
from sdar.in_process.local_services import (
    LocalEnvironmentCatalog,
    LocalEnvironmentClient,
    LocalSkills,
)
from sdar.in_process.memory_bus import MemoryBus
from sdar.in_process.transformers_engine import TransformersEngine
from sdar.process.lifecycle import run_until_stopped, wait_or_stop
from sdar.process.settings import Settings
from sdar.process.telemetry import Health
from sdar.weights.store import WeightStore
from services.gateway.history import History
from services.gateway.scheduler import Scheduler
from services.gateway.state import RunPhase
from services.gateway.status import describe_run
from services.gateway.watch import Watch
from services.learner.checkpoint import CheckpointStore
from services.learner.progress import Progress
from services.learner.ranks import stand_alone
from services.learner.train import Learner
from services.learner.update import build_trainer
from services.rollout.metrics import RolloutMetrics
from services.rollout.service import build_rules
from services.rollout.worker import RolloutLimits, RolloutWorker
from services.teacher.metrics import TeacherMetrics
from services.teacher.service import build_retriever, build_scorer, build_teacher
from services.teacher.worker import TeacherWorker

Main = Callable[[asyncio.Event], Coroutine[Any, Any, None]]
OnUpdates = Callable[[int], None]
"""Called now and then with the number of updates done."""

_LOOK_EVERY_S = 0.25


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished run.

    `status` is as the gateway's API gives it. `records` are all metric records, oldest first.
    """

    status: dict[str, Any]
    records: list[dict[str, Any]]


def run_in_process(config: RunConfig, on_updates: OnUpdates = lambda num_updates: None) -> Outcome:
    """Run `config` to its end in this process, on one torch thread; nothing of it stays on disk.

    Raises:
        ConfigurationError: it cannot be run like this. UnavailableError: it gave up, or a signal
            stopped it.
        Other errors: a service's own.
    """
    # Models are tiny here: more threads cost more than they compute.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="sdar-") as directory:
        return asyncio.run(play_run(config, Path(directory), on_updates))


async def play_run(
    config: RunConfig, directory: Path, on_updates: OnUpdates = lambda num_updates: None
) -> Outcome:
    """Like `run_in_process`, on the running event loop; weights and checkpoints in `directory`."""
    if config.training.num_ranks > 1:
        raise ConfigurationError(
            "training.num_ranks is over 1; a run in one process has one rank. Set it to 1."
        )
    settings = Settings(
        weights_url=str(directory / "weights"),
        checkpoints=directory / "checkpoints",
        instance="in-process",
    )
    settings.checkpoints.mkdir(parents=True, exist_ok=True)
    bus = MemoryBus(config.stream_consumers)
    async with contextlib.AsyncExitStack() as cleanup:
        sessions = _build_sessions(config)
        await sessions.start()
        cleanup.push_async_callback(sessions.close_all)
        scheduler = _build_scheduler(config, bus, sessions)
        watch = Watch(scheduler, bus)
        mains: list[Main] = [scheduler.run]
        mains.append(await _build_rollout(config, settings, bus, sessions, cleanup))
        if config.needs_teacher:
            mains += await _build_teacher(config, settings, bus, cleanup)
        mains.append(_build_learner(config, settings, bus, cleanup))
        mains.append(_watch(scheduler, on_updates))
        await run_until_stopped(*mains)
        # The services are done; what they published last has yet to be read.
        await scheduler.history.follow(bus)
        await watch.refresh()
        status = describe_run(scheduler, watch).model_dump(mode="json")
    _check_finished(config, scheduler)
    return Outcome(status, _list_records(scheduler.history))


def _check_finished(config: RunConfig, scheduler: Scheduler) -> None:
    if scheduler.state.phase is RunPhase.FAILED:
        raise UnavailableError(f"Run {config.name} gave up: {scheduler.detail}")
    if scheduler.state.phase is not RunPhase.FINISHED:
        raise UnavailableError(
            f"Run {config.name} was stopped after {scheduler.policy.num_updates} of "
            f"{config.training.num_updates} updates. A run in one process cannot be resumed; start "
            "it again."
        )


def _build_sessions(config: RunConfig) -> SessionManager:
    chosen = config.environment
    limits = SessionLimits(max_sessions=chosen.capacity, step_timeout_s=chosen.step_timeout_s)
    source = load_environment(chosen.name, chosen.options)
    return SessionManager(InProcessHost({chosen.name: source.build}), limits)


def _build_scheduler(config: RunConfig, bus: MemoryBus, sessions: SessionManager) -> Scheduler:
    history = History(config.learner_input)
    return Scheduler(
        config,
        bus,
        LocalEnvironmentCatalog(sessions),
        history,
        Health(),
        default_address="in-process:0",
    )


async def _build_rollout(
    config: RunConfig,
    settings: Settings,
    bus: MemoryBus,
    sessions: SessionManager,
    cleanup: contextlib.AsyncExitStack,
) -> Main:
    rules = build_rules(config)
    engine = TransformersEngine(
        config.model.path,
        dtype=config.model.dtype,
        max_sequence_tokens=config.model.max_sequence_tokens,
        stop_token_ids=rules.tokenizer.stops.ids,
        store=WeightStore(settings.weights_url, config.name),
        seed=config.seed,
    )
    await engine.start()
    cleanup.push_async_callback(engine.stop)
    worker = RolloutWorker(
        bus,
        engine,
        LocalEnvironmentClient(sessions),
        rules,
        run_id=config.name,
        instance=settings.instance,
        limits=RolloutLimits(max_concurrent_episodes=config.rollout.max_concurrent_episodes),
        health=Health(),
        metrics=RolloutMetrics(),
        skills=LocalSkills(build_retriever(config, settings, bus))
        if config.method.row.student_sees_skills
        else None,
    )
    run: Main = worker.run
    return run


async def _build_teacher(
    config: RunConfig, settings: Settings, bus: MemoryBus, cleanup: contextlib.AsyncExitStack
) -> tuple[Main, Main]:
    scorer = build_scorer(config, WeightStore(settings.weights_url, config.name), settings)
    await scorer.start()
    cleanup.push_async_callback(scorer.stop)
    teacher = build_teacher(config, settings, bus, scorer, TeacherMetrics())
    worker = TeacherWorker(
        bus, teacher, run_id=config.name, instance=settings.instance, health=Health()
    )
    return worker.run, worker.report


def _build_learner(
    config: RunConfig, settings: Settings, bus: MemoryBus, cleanup: contextlib.AsyncExitStack
) -> Main:
    checkpoints = CheckpointStore(settings.checkpoints, config)
    cleanup.callback(checkpoints.close)
    # One thread computes for the learner, so that the event loop goes on for all services.
    torch_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="learner-torch")
    cleanup.callback(torch_thread.shutdown)
    trainer = build_trainer(config, stand_alone("cpu"), None)
    cleanup.callback(trainer.stop)
    learner = Learner(
        config,
        bus,
        WeightStore(settings.weights_url, config.name),
        trainer,
        checkpoints,
        Progress(),
        torch_thread=torch_thread,
        consumer=settings.instance,
    )
    run: Main = learner.run
    return run


def _watch(scheduler: Scheduler, on_updates: OnUpdates) -> Main:
    """Report progress, and stop everything once the run is over."""

    async def watch(stopping: asyncio.Event) -> None:
        while not await wait_or_stop(stopping, _LOOK_EVERY_S):
            on_updates(scheduler.policy.num_updates)
            if scheduler.state.phase in (RunPhase.FINISHED, RunPhase.FAILED):
                stopping.set()

    return watch


def _list_records(history: History) -> list[dict[str, Any]]:
    """Metric records as the gateway's API gives them."""
    return [
        {
            "entry_id": entry.entry_id,
            "service": entry.record.service,
            "instance": entry.record.instance,
            "policy_version": entry.record.policy_version,
            "at_s": entry.record.at_s,
            "values": dict(entry.record.values),
        }
        for entry in history.metrics_after(BEFORE_FIRST, len(history.metrics))
    ]
