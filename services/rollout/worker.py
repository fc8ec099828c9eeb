"""Owns the rollout worker's MAIN LOOP: task groups off one stream, finished episodes onto the next. Never looks into a prompt.

A group is acknowledged in the transaction that publishes all its episodes, or its failure; until then it belongs to nobody for
long: a worker that dies stops renewing its claims, and another one plays the group.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import structlog

from sdar.contracts import codec
from sdar.contracts.errors import BusUnavailableError, CapacityError, EngineFailedError, SdarError, UnavailableError
from sdar.contracts.streams import ConsumerGroup, Stream
from sdar.contracts.types import GroupOutcome, LedgerEvent, MetricRecord, Purpose, TaskGroup, Trajectory
from sdar.runtime.bus import Bus, Delivery, Publications
from sdar.runtime.lifecycle import wait_or_stop
from sdar.runtime.telemetry import Health
from services.rollout.engine import Engine
from services.rollout.environment_client import EnvironmentDirectory
from services.rollout.episode import EpisodeRules, EpisodeSlots, play_group
from services.rollout.metrics import RolloutMetrics
from services.rollout.policy import PolicyFollower
from services.rollout.skill_client import SkillSource

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """Bounds of the main loop.

    Attributes:
        max_concurrent_episodes: episodes in flight; groups are read while their episodes fit.
        read_block_s: how long a quiet stream is waited on; also how late a stop or a failure is noticed.
        claim_idle_s: a group that its worker has not renewed for so long is taken over; renewals are four times as frequent.
        max_deliveries: a group delivered more often than this is taken to kill whoever plays it.
        grace_s: how long running groups may go on after a stop; what is not finished then is left to others.
        report_interval_s: time between two records on the `metrics` stream.
    """

    max_concurrent_episodes: int
    read_block_s: float = 0.5
    claim_idle_s: float = 20.0
    max_deliveries: int = 5
    grace_s: float = 20.0
    report_interval_s: float = 2.0


@dataclass(frozen=True, slots=True)
class _InHand:
    """A group being played, and how many episodes it takes."""

    delivery: Delivery
    num_episodes: int
    task: asyncio.Task[None]


class RolloutWorker:
    """One consumer of `tasks`.

    Args:
        environments: clients by the address a group names.
        instance: unique consumer name.
        skills: what the student is told; none for all methods but skill_grpo.
    """

    def __init__(
        self,
        bus: Bus,
        engine: Engine,
        environments: EnvironmentDirectory,
        rules: EpisodeRules,
        *,
        run_id: str,
        instance: str,
        limits: WorkerLimits,
        health: Health,
        metrics: RolloutMetrics,
        skills: SkillSource | None = None,
    ) -> None:
        self._bus, self._engine, self._environments, self._rules = bus, engine, environments, rules
        self._run_id, self._instance = run_id, instance
        self._limits, self._health, self._metrics, self._skills = limits, health, metrics, skills
        self._slots = EpisodeSlots(limits.max_concurrent_episodes)
        self._follower = PolicyFollower(bus, engine, limits.read_block_s)
        self._in_hand: dict[str, _InHand] = {}
        self._largest_group = 0
        self._failure: BaseException | None = None

    async def run(self, stopping: asyncio.Event) -> None:
        """MAIN LOOP: read, play, publish and acknowledge, until told to stop; then finish what is in hand."""
        await self._follower.catch_up()
        self._health.mark_ready()
        async with self._background():
            while not stopping.is_set():
                for delivery in await self._read():
                    self._begin(delivery)
                self._check_alive()
                self._health.beat()
            self._health.mark_unready("draining")
            await self._drain()

    async def _read(self) -> list[Delivery]:
        room = self._room()
        if room < 1:
            tasks = [group.task for group in self._in_hand.values()]
            await asyncio.wait(tasks, timeout=self._limits.read_block_s, return_when=asyncio.FIRST_COMPLETED)
            return []
        return await self._bus.read(
            Stream.TASKS, ConsumerGroup.ROLLOUT, self._instance, self._max_groups(room), self._limits.read_block_s
        )

    def _begin(self, delivery: Delivery) -> None:
        """Start on a group. Its size counts at once, so that no more is read than can be played."""
        try:
            group = codec.decode_task_group(delivery.payload)
        except SdarError as error:
            work, num_episodes = self._set_aside(delivery, None, f"The task group cannot be read: {error}"), 0
        else:
            work, num_episodes = self._handle(group, delivery), group.group_size
            self._largest_group = max(self._largest_group, group.group_size)
        task = asyncio.create_task(work, name=f"group_{delivery.entry_id}")
        self._in_hand[delivery.entry_id] = _InHand(delivery, num_episodes, task)
        self._metrics.observe_running(len(self._in_hand))
        task.add_done_callback(lambda task: self._finish(delivery.entry_id, task))

    async def _handle(self, group: TaskGroup, delivery: Delivery) -> None:
        """Play one group, then publish and acknowledge it. Whatever happens here ends in the ledger or with the service."""
        if delivery.num_deliveries > self._limits.max_deliveries:
            reason = f"Delivered {delivery.num_deliveries} times without an end. Look for what kills its workers."
            return await self._set_aside(delivery, group, reason)
        try:
            trajectories = await self._play(group, delivery.num_deliveries - 1)
        except (EngineFailedError, BusUnavailableError):
            raise
        except UnavailableError as error:
            if not self._engine.is_alive:
                raise
            return await self._give_up(group, delivery, error)
        except SdarError as error:
            return await self._give_up(group, delivery, error)
        except Exception as error:
            # The worker's boundary: one group must not end the others.
            log.exception("group_broke_worker", group_id=group.group_id)
            return await self._set_aside(delivery, group, f"Playing it raised {type(error).__name__}: {error}.")
        await self._publish(group, trajectories, delivery)

    async def _play(self, group: TaskGroup, attempt: int) -> list[Trajectory]:
        is_evaluation = group.purpose is Purpose.EVALUATION
        skill_text = await self._skills.retrieve(group.task, group.group_id) if self._skills else ""
        if not is_evaluation:
            await self._follower.reached(group.admitted_version)
        async with self._follower.pinned(group.admitted_version) if is_evaluation else contextlib.nullcontext():
            return await play_group(
                group,
                attempt,
                engine=self._engine,
                environment=self._environments.get(group.environment_address),
                rules=self._rules,
                skill_text=skill_text,
                slots=self._slots,
            )

    async def _publish(self, group: TaskGroup, trajectories: list[Trajectory], delivery: Delivery) -> None:
        payloads = [codec.encode_trajectory(trajectory) for trajectory in trajectories]
        if group.purpose is Purpose.EVALUATION:
            publications: Publications = {Stream.EVALUATIONS: payloads}
        else:
            version = max(trajectory.max_policy_version for trajectory in trajectories)
            event = LedgerEvent(self._run_id, group.group_id, GroupOutcome.GENERATED, len(trajectories), version)
            publications = {Stream.TRAJECTORIES: payloads, Stream.LEDGER: [codec.encode_ledger_event(event)]}
        await self._commit(publications, delivery)
        self._metrics.observe_group(trajectories)
        log.info(
            "group_played",
            group_id=group.group_id,
            purpose=group.purpose.value,
            num_episodes=len(trajectories),
            num_successes=sum(trajectory.is_success for trajectory in trajectories),
            policy_version=max(trajectory.max_policy_version for trajectory in trajectories),
        )

    async def _give_up(self, group: TaskGroup, delivery: Delivery, error: SdarError) -> None:
        """Close the group's account. An evaluation's too: its gateway must not wait for what will never come."""
        log.error("group_failed", group_id=group.group_id, purpose=group.purpose.value, error=str(error))
        await self._commit({Stream.LEDGER: [self._failure_event(group, error.message)]}, delivery)
        self._metrics.observe_failure(group.purpose)

    async def _set_aside(self, delivery: Delivery, group: TaskGroup | None, reason: str) -> None:
        log.error("dead_letter", entry_id=delivery.entry_id, group_id=group.group_id if group else None, reason=reason)
        publications: Publications = {Stream.LEDGER: [self._failure_event(group, reason)]} if group else {}
        await self._bus.dead_letter(delivery, reason, publications)
        self._metrics.observe_dead_letter()

    def _failure_event(self, group: TaskGroup, reason: str) -> bytes:
        event = LedgerEvent(self._run_id, group.group_id, GroupOutcome.FAILED, 0, self._engine.policy_version, reason)
        return codec.encode_ledger_event(event)

    async def _commit(self, publications: Publications, delivery: Delivery) -> None:
        """Publish and acknowledge in one transaction: a crash before it repeats work, it never loses it."""
        while True:
            try:
                return await self._bus.commit(publications, [delivery])
            except CapacityError as error:
                # The bus has waited already; what is played is not thrown away because its readers are slow.
                log.warning("stream_full", error=str(error))

    # ---- what runs beside the loop

    @contextlib.asynccontextmanager
    async def _background(self) -> AsyncIterator[None]:
        """Follow the policy, keep claims and report while the loop runs; a loop that dies takes the worker along."""
        over = asyncio.Event()
        loops = (self._follower.run, self._keep_claims, self._report)
        tasks = [asyncio.create_task(loop(over), name=loop.__qualname__) for loop in loops]
        for task in tasks:
            task.add_done_callback(self._note_failure)
        try:
            yield
        finally:
            over.set()
            for group in self._in_hand.values():
                # Not finished within the grace: left pending, for another worker to claim.
                group.task.cancel()
            await asyncio.gather(*tasks, *(group.task for group in self._in_hand.values()), return_exceptions=True)
        self._check_alive()

    async def _keep_claims(self, over: asyncio.Event) -> None:
        """Renew what is in hand, take over what dead workers left."""
        is_over = False
        while not is_over:
            await self._renew()
            if (room := self._room()) > 0:
                await self._reclaim(self._max_groups(room))
            is_over = await wait_or_stop(over, self._limits.claim_idle_s / 4)

    async def _renew(self) -> None:
        in_hand = list(self._in_hand.values())
        held = {delivery.entry_id for delivery in await self._bus.renew([group.delivery for group in in_hand])}
        for group in in_hand:
            entry_id = group.delivery.entry_id
            # A group that has just been published is acknowledged, hence not held, and not lost.
            if entry_id not in held and entry_id in self._in_hand and not group.task.done():
                log.warning("claim_lost", entry_id=entry_id)
                group.task.cancel()

    async def _reclaim(self, max_groups: int) -> None:
        idle_s = self._limits.claim_idle_s
        for delivery in await self._bus.reclaim(Stream.TASKS, ConsumerGroup.ROLLOUT, self._instance, idle_s, max_groups):
            if delivery.entry_id not in self._in_hand:
                log.info("group_reclaimed", entry_id=delivery.entry_id, num_deliveries=delivery.num_deliveries)
                self._metrics.observe_reclaimed(1)
                self._begin(delivery)

    async def _report(self, over: asyncio.Event) -> None:
        """What this worker did, on the `metrics` stream and to Prometheus."""
        while not await wait_or_stop(over, self._limits.report_interval_s):
            engine, clock = self._engine, self._rules.clock
            self._metrics.observe_engine(engine.stats, clock, engine.policy_version, self._follower.newest_version)
            values = self._metrics.collect_window(engine.stats, clock, self._slots.num_running)
            record = MetricRecord(self._run_id, "rollout", self._instance, engine.policy_version, time.time(), values)
            await self._bus.publish(Stream.METRICS, [codec.encode_metric_record(record)])

    async def _drain(self) -> None:
        deadline = time.monotonic() + self._limits.grace_s
        while self._in_hand and (remaining_s := deadline - time.monotonic()) > 0:
            self._check_alive()
            tasks = [group.task for group in self._in_hand.values()]
            await asyncio.wait(tasks, timeout=min(remaining_s, self._limits.read_block_s))
            self._health.beat()
        log.info("worker_drained", num_left=len(self._in_hand))

    def _room(self) -> int:
        return self._limits.max_concurrent_episodes - sum(group.num_episodes for group in self._in_hand.values())

    def _max_groups(self, room: int) -> int:
        """Groups that fit if all are as large as the largest seen; one until any was seen. Its episodes wait for slots."""
        return max(1, room // self._largest_group) if self._largest_group else 1

    def _finish(self, entry_id: str, task: asyncio.Task[None]) -> None:
        del self._in_hand[entry_id]
        self._metrics.observe_running(len(self._in_hand))
        self._note_failure(task)

    def _note_failure(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self._failure = self._failure or task.exception()

    def _check_alive(self) -> None:
        """A dead engine, a lost bus or a dead background loop ends the service: it must not live on half alive."""
        if self._failure is not None:
            raise self._failure
        if not self._engine.is_alive:
            raise EngineFailedError("The engine has died; its log on stderr says why. Restart the service.")
