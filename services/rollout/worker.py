"""The rollout worker's MAIN LOOP: reads task groups, has them played, publishes their episodes.

It decides how many groups are in hand; what becomes of one is decided in
`services.rollout.attempts`.

A group is acknowledged in the transaction that publishes all its episodes, or its failure. Until
then a worker only has a lease on it. Every delivery of a group is one attempt at it, numbered by
the bus, so no two workers ever share a number:

- A worker that dies, or is silent for too long, loses its groups to another one; what it still
  brings is refused.
- A worker that starts under the name of one that died takes that one's groups back at once.
- A group whose environment failed is taken back by the same worker, after a pause, and played again
  whole in new sessions. An environment that cannot be reached is first waited for
  (`environment_client.OPEN_PATIENCE_S`); that costs no attempt.

After `max_attempts` in all, by whichever workers, a group is given up. A stop lets running groups
end for `grace_s` and hands back what is left: whoever looks next begins it again. What could not be
handed back reaches another worker when its lease lapses.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass

import structlog

from sdar.bus.leases import Leases, WorkerLimits
from sdar.bus.protocol import Bus, Delivery
from sdar.contracts import codec
from sdar.contracts.errors import EngineFailedError, SdarError
from sdar.contracts.streams import ConsumerGroup, Stream
from sdar.contracts.types import MetricRecord
from sdar.process.lifecycle import wait_or_stop
from sdar.process.telemetry import Health
from sdar.weights.pins import PinnedVersions
from services.rollout.attempts import AttemptInHand, GroupPlayer
from services.rollout.engine import Engine
from services.rollout.environment_client import EnvironmentDirectory
from services.rollout.episode import EpisodeRules, EpisodeSlots
from services.rollout.metrics import DISPROOFS, RECLAIMED_GROUPS, RolloutMetrics
from services.rollout.policy import ServedPolicy
from services.rollout.skill_client import SkillSource

log = structlog.get_logger()

_PAGE = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutLimits(WorkerLimits):
    """Bounds of the main loop. A group whose environment fails at its last attempt is failed.

    Attributes:
        max_concurrent_episodes: episodes in flight; groups are read while their episodes fit.
        retry_delay_s: pause before the second attempt after an environment failed, varied by chance
            by up to half; it doubles with every attempt.
        grace_s: how long running groups may go on after a stop. What is not finished then is handed
            back.
    """

    max_concurrent_episodes: int
    retry_delay_s: float = 1.0
    grace_s: float = 20.0


class RolloutWorker:
    """One consumer of `tasks`.

    Args:
        environments: clients by the address a group names.
        instance: unique consumer name.
        skills: what the student sees of skills; none for all methods but skill_grpo.
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
        limits: RolloutLimits,
        health: Health,
        metrics: RolloutMetrics,
        skills: SkillSource | None = None,
    ) -> None:
        self._bus = bus
        self._engine = engine
        self._environments = environments
        self._clock = rules.clock
        self._run_id = run_id
        self._instance = instance
        self._limits = limits
        self._health = health
        self._metrics = metrics
        self._slots = EpisodeSlots(limits.max_concurrent_episodes)
        self._leases = Leases(bus, Stream.TASKS, ConsumerGroup.ROLLOUT, instance, limits.lease_s)
        pins = PinnedVersions(bus, f"{ConsumerGroup.ROLLOUT}.{instance}")
        self._policy = ServedPolicy(bus, engine, pins, metrics, limits.read_block_s)
        self._player = GroupPlayer(
            bus,
            engine,
            environments,
            rules,
            run_id=run_id,
            leases=self._leases,
            policy=self._policy,
            slots=self._slots,
            metrics=metrics,
            begin=self._begin,
            max_attempts=limits.max_attempts,
            retry_delay_s=limits.retry_delay_s,
            skills=skills,
        )
        self._in_hand: set[AttemptInHand] = set()
        self._largest_group = 0
        self._is_leaving = False
        self._failure: BaseException | None = None

    async def run(self, stopping: asyncio.Event) -> None:
        """MAIN LOOP: read, play, publish and acknowledge, until a stop is asked for.

        Then what is in hand is finished, or handed back.
        """
        # Before the first group: otherwise it would be sampled from the base, however late a worker
        # joins the run.
        await self._policy.catch_up()
        async with self._background():
            self._health.mark_ready()
            while not stopping.is_set():
                for delivery in await self._read():
                    self._begin(delivery)
                self._check_alive()
                self._health.beat()
            # What is left: no more is read or taken over, and `_drain` lets what runs come to its
            # end.
            self._is_leaving = True
            self._health.mark_unready("draining")
            await self._drain()

    async def _read(self) -> list[Delivery]:
        room = self._room()
        if room < 1:
            # Not longer than a read may block: the loop has to beat and to notice a stop.
            tasks = [hand.task for hand in self._in_hand]
            await asyncio.wait(
                tasks, timeout=self._limits.read_block_s, return_when=asyncio.FIRST_COMPLETED
            )
            return []
        return await self._leases.read(self._max_groups(room), self._limits.read_block_s)

    def _begin(self, delivery: Delivery) -> None:
        """Start on an attempt. Its size counts at once: no more is read than can be played."""
        hand = AttemptInHand(delivery)
        try:
            group = codec.decode_task_group(delivery.payload)
        except SdarError as error:
            work = self._player.refuse(hand, f"The task group cannot be read: {error}")
        else:
            work = self._player.play(group, hand)
            hand.num_episodes = group.group_size
            self._largest_group = max(self._largest_group, group.group_size)
        hand.task = asyncio.create_task(work, name=f"group_{delivery.entry_id}")
        self._in_hand.add(hand)
        self._metrics.observe_running(len(self._in_hand))
        hand.task.add_done_callback(lambda task: self._finish(hand))

    @contextlib.asynccontextmanager
    async def _background(self) -> AsyncIterator[None]:
        """Keep leases, switch policies and report while the body runs.

        A loop that dies ends the worker.
        """
        over = asyncio.Event()
        loops = (self._keep_leases, self._policy.run, self._report)
        tasks: list[asyncio.Task[None]] = []
        try:
            await self._take_back()
            tasks += [asyncio.create_task(loop(over), name=loop.__qualname__) for loop in loops]
            for task in tasks:
                task.add_done_callback(self._note_failure)
            yield
        finally:
            # Also when a loop died: one that ends has no use for another's task groups.
            self._is_leaving = True
            over.set()
            # The loop that renews leases goes first: a renewal after the hand-back would undo it.
            await self._end_unfinished(keeping=tasks[:1])
            await asyncio.gather(*tasks, return_exceptions=True)
        self._check_alive()

    async def _end_unfinished(self, keeping: Sequence[asyncio.Task[None]]) -> None:
        """Cancel what is in hand; hand it back once the tasks `keeping` its leases have ended."""
        unfinished = list(self._in_hand)
        for hand in unfinished:
            hand.task.cancel()
        await asyncio.gather(*keeping, return_exceptions=True)
        # A take-over that was under way when its loop was told to end has begun these.
        late = [hand for hand in self._in_hand if hand not in unfinished]
        for hand in late:
            hand.task.cancel()
        unfinished += late
        attempts = [hand.task for hand in unfinished]
        # Before the attempts have closed their sessions, which may take a while: nobody waits.
        await self._leases.hand_back([hand.delivery for hand in unfinished])
        await asyncio.gather(*attempts, return_exceptions=True)

    async def _take_back(self) -> None:
        """Begin anew, before anything else, what an earlier life of this worker held."""
        while deliveries := await self._leases.take_back(_PAGE):
            self._begin_reclaimed(deliveries)

    async def _keep_leases(self, over: asyncio.Event) -> None:
        """Renew what is in hand, and take over what dead workers left.

        That comes before new groups: it is taken over without room for new ones too.
        """
        await self._take_over()
        async for lost in self._leases.keep(self._list_in_hand, over):
            self._drop(lost)
            await self._take_over()

    def _list_in_hand(self) -> list[Delivery]:
        return [hand.delivery for hand in self._in_hand]

    async def _take_over(self) -> None:
        # One that is leaving would only hand it back once more, and every attempt counts.
        if not self._is_leaving and (room := self._room_in_hand()) > 0:
            self._begin_reclaimed(await self._leases.take_over(self._max_groups(room)))

    def _drop(self, lost: Collection[Delivery]) -> None:
        """End attempts whose lease is another's now."""
        for hand in list(self._in_hand):
            if hand.delivery in lost and not hand.is_over:
                log.warning(
                    "claim_lost",
                    entry_id=hand.delivery.entry_id,
                    attempt=hand.delivery.num_deliveries - 1,
                )
                hand.task.cancel()

    def _begin_reclaimed(self, deliveries: list[Delivery]) -> None:
        for delivery in deliveries:
            log.info(
                "group_reclaimed",
                entry_id=delivery.entry_id,
                num_deliveries=delivery.num_deliveries,
            )
            self._metrics.count(RECLAIMED_GROUPS)
            self._begin(delivery)

    async def _report(self, over: asyncio.Event) -> None:
        """What this worker did, on the `metrics` stream and to Prometheus."""
        while not await wait_or_stop(over, self._limits.report_interval_s):
            engine = self._engine
            clock = self._clock
            self._metrics.observe_engine(
                engine.stats, clock, engine.policy_version, self._policy.newest_version
            )
            self._metrics.set(DISPROOFS, self._policy.num_disproofs)
            values = self._metrics.collect_record(
                self._slots.num_running, self._environments.num_waiting
            )
            record = MetricRecord(
                self._run_id, "rollout", self._instance, engine.policy_version, time.time(), values
            )
            await self._bus.publish(Stream.METRICS, [codec.encode_metric_record(record)])

    async def _drain(self) -> None:
        deadline = time.monotonic() + self._limits.grace_s
        while self._in_hand and (remaining_s := deadline - time.monotonic()) > 0:
            self._check_alive()
            tasks = [hand.task for hand in self._in_hand]
            await asyncio.wait(tasks, timeout=min(remaining_s, self._limits.read_block_s))
            self._health.beat()
        log.info("worker_drained", num_left=len(self._in_hand))

    def _room(self) -> int:
        """Episodes that may be begun.

        Groups that wait for their next attempt take no room while there are few of them.
        """
        num_playing = sum(hand.num_episodes for hand in self._in_hand if not hand.is_waiting)
        return min(self._limits.max_concurrent_episodes - num_playing, self._room_in_hand())

    def _room_in_hand(self) -> int:
        """Episodes that may be held: twice as many as are played at once."""
        # A bound, or a run whose environments all fail would gather groups that wait.
        num_held = sum(hand.num_episodes for hand in self._in_hand)
        return 2 * self._limits.max_concurrent_episodes - num_held

    def _max_groups(self, room: int) -> int:
        """Groups that fit if all are as large as the largest seen; one until any was seen.

        Episodes that do not fit after all wait for slots.
        """
        return max(1, room // self._largest_group) if self._largest_group else 1

    def _finish(self, hand: AttemptInHand) -> None:
        self._in_hand.remove(hand)
        self._metrics.observe_running(len(self._in_hand))
        self._note_failure(hand.task)

    def _note_failure(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        # The first one: those after it are mostly its consequences.
        if self._failure is None:
            self._failure = error

    def _check_alive(self) -> None:
        """Raises what has failed: a dead engine, a lost bus or a dead loop ends the service.

        It must not live on half alive.
        """
        if self._failure is not None:
            raise self._failure
        if not self._engine.is_alive:
            raise EngineFailedError(
                "The engine has died; its log on stderr says why. Restart the service."
            )
