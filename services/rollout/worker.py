"""Owns the rollout worker's MAIN LOOP: task groups off one stream, finished episodes onto the next.
Never looks into a prompt.

A group is acknowledged in the transaction that publishes all its episodes, or its failure; until
then it belongs to nobody for long. Every delivery of a group is one attempt at it, numbered by the
bus, so no two workers ever share a number:

- A worker that dies, or is silent for too long, loses its groups to another one; what it still
  brings is refused.
- A worker that starts under the name of one that died takes that one's groups back at once.
- A group whose environment failed is taken back from oneself, after a pause, and played again whole
  in new sessions. An environment that cannot be reached is first waited for
  (`environment_client.OPEN_PATIENCE_S`); that costs no attempt.

After `max_attempts` in all, by whomever, a group is given up. A stop lets running groups end for
`grace_s` and hands back what is left: whoever looks next begins it again. What could not be handed
back follows when its lease lapses.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass, field

import structlog

from sdar.bus.leases import Leases, WorkerLimits, wait_for_room
from sdar.bus.protocol import Bus, Delivery, Publications
from sdar.contracts import codec
from sdar.contracts.errors import (
    BusUnavailableError,
    EngineFailedError,
    LeaseLostError,
    SdarError,
    UnavailableError,
    WeightsUnavailableError,
)
from sdar.contracts.streams import ConsumerGroup, Stream
from sdar.contracts.types import (
    GroupOutcome,
    LedgerEvent,
    MetricRecord,
    Purpose,
    TaskGroup,
    Trajectory,
)
from sdar.process import tracing
from sdar.process.lifecycle import wait_or_stop
from sdar.process.telemetry import Health
from sdar.weights.pins import PinnedVersions
from services.rollout.engine import Engine
from services.rollout.environment_client import EnvironmentDirectory
from services.rollout.episode import Attempt, EpisodeRules, EpisodeSlots, play_group
from services.rollout.metrics import RolloutMetrics
from services.rollout.policy import ServedPolicy
from services.rollout.skill_client import SkillSource

log = structlog.get_logger()

_PAGE = 100
_LONGEST_RETRY_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutLimits(WorkerLimits):
    """Bounds of the main loop. A group whose environment fails at its last attempt is failed.

    Attributes:
        max_concurrent_episodes: episodes in flight; groups are read while their episodes fit.
        retry_delay_s: pause before the second attempt after an environment failed, half as much
            more or less by chance; it doubles with every attempt.
        grace_s: how long running groups may go on after a stop; what is not finished then is handed
            back.
    """

    max_concurrent_episodes: int
    retry_delay_s: float = 1.0
    grace_s: float = 20.0


@dataclass(slots=True, eq=False)
class _InHand:
    """An attempt at a group.

    Attributes:
        num_episodes: how many it plays.
        is_waiting: it failed and the next attempt will replace it.
        is_ending: its end is being committed; the commit finds out whether the claim was lost.
    """

    delivery: Delivery
    num_episodes: int = 0
    is_waiting: bool = False
    is_ending: bool = False
    task: asyncio.Task[None] = field(init=False)


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
        limits: RolloutLimits,
        health: Health,
        metrics: RolloutMetrics,
        skills: SkillSource | None = None,
    ) -> None:
        self._bus = bus
        self._engine = engine
        self._environments = environments
        self._rules = rules
        self._run_id = run_id
        self._instance = instance
        self._limits = limits
        self._health = health
        self._metrics = metrics
        self._skills = skills
        self._slots = EpisodeSlots(limits.max_concurrent_episodes)
        self._leases = Leases(bus, Stream.TASKS, ConsumerGroup.ROLLOUT, instance, limits.lease_s)
        pins = PinnedVersions(bus, f"{ConsumerGroup.ROLLOUT}.{instance}")
        self._policy = ServedPolicy(bus, engine, pins, metrics, limits.read_block_s)
        self._in_hand: set[_InHand] = set()
        self._largest_group = 0
        self._is_leaving = False
        self._failure: BaseException | None = None

    async def run(self, stopping: asyncio.Event) -> None:
        """MAIN LOOP: read, play, publish and acknowledge, until told to stop; then finish what is
        in hand.
        """
        await self._policy.catch_up()
        async with self._background():
            self._health.mark_ready()
            while not stopping.is_set():
                for delivery in await self._read():
                    self._begin(delivery)
                self._check_alive()
                self._health.beat()
            self._is_leaving = True
            self._health.mark_unready("draining")
            await self._drain()

    async def _read(self) -> list[Delivery]:
        room = self._room()
        if room < 1:
            tasks = [hand.task for hand in self._in_hand]
            await asyncio.wait(
                tasks, timeout=self._limits.read_block_s, return_when=asyncio.FIRST_COMPLETED
            )
            return []
        return await self._leases.read(self._max_groups(room), self._limits.read_block_s)

    def _begin(self, delivery: Delivery) -> None:
        """Start on an attempt. Its size counts at once, so that no more is read than can be played."""
        hand = _InHand(delivery)
        try:
            group = codec.decode_task_group(delivery.payload)
        except SdarError as error:
            work = self._refuse(hand, f"The task group cannot be read: {error}")
        else:
            work = self._handle(group, hand)
            hand.num_episodes = group.group_size
            self._largest_group = max(self._largest_group, group.group_size)
        hand.task = asyncio.create_task(work, name=f"group_{delivery.entry_id}")
        self._in_hand.add(hand)
        self._metrics.observe_running(len(self._in_hand))
        hand.task.add_done_callback(lambda task: self._finish(hand))

    async def _handle(self, group: TaskGroup, hand: _InHand) -> None:
        """One attempt. Whatever happens here ends in the ledger, in the next attempt, or with the
        service.
        """
        attempt, is_published = Attempt(hand.delivery.num_deliveries - 1), False
        try:
            if attempt.number >= self._limits.max_attempts:
                reason = f"Delivered {attempt.number + 1} times without an end. Look for what kills its workers."
                await self._set_aside(group, hand, reason)
            elif trajectories := await self._try(group, hand, attempt):
                await self._publish(group, trajectories, hand)
                is_published = True
        except LeaseLostError as error:
            # Another attempt at the group is under way: nothing of this one may get in beside it.
            log.warning(
                "late_result_refused",
                group_id=group.group_id,
                attempt=attempt.number,
                error=str(error),
            )
            self._metrics.observe_late_result()
        finally:
            if not is_published:
                self._metrics.observe_repeated_tokens(attempt.num_sampled_tokens)

    async def _try(self, group: TaskGroup, hand: _InHand, attempt: Attempt) -> list[Trajectory]:
        """Play the group; empty if it failed and that has been dealt with."""
        try:
            with _trace(group, attempt):
                return await self._play(group, attempt)
        except (EngineFailedError, BusUnavailableError):
            raise
        except WeightsUnavailableError as error:
            await self._give_up(group, hand, error.message)
        except UnavailableError as error:
            if not self._engine.is_alive:
                raise
            await self._try_again(group, hand, error)
        except SdarError as error:
            await self._give_up(group, hand, error.message)
        except Exception as error:
            # The worker's boundary: one group must not end the others.
            log.exception("group_broke_worker", group_id=group.group_id)
            await self._set_aside(
                group, hand, f"Playing it raised {type(error).__name__}: {error}."
            )
        return []

    async def _play(self, group: TaskGroup, attempt: Attempt) -> list[Trajectory]:
        is_evaluation = group.purpose is Purpose.EVALUATION
        skill_text = await self._skills.retrieve(group.task, group.group_id) if self._skills else ""
        if not is_evaluation:
            await self._policy.reached(group.admitted_version)
        async with (
            self._policy.pinned(group.admitted_version)
            if is_evaluation
            else contextlib.nullcontext()
        ):
            return await play_group(
                group,
                attempt,
                engine=self._engine,
                environment=self._environments.get(group.environment_address),
                rules=self._rules,
                skill_text=skill_text,
                slots=self._slots,
            )

    async def _try_again(self, group: TaskGroup, hand: _InHand, error: UnavailableError) -> None:
        """Begin the next attempt after a pause in which this one holds no slot; give the group up
        if there is none left.
        """
        num_attempts = hand.delivery.num_deliveries
        if num_attempts >= self._limits.max_attempts:
            return await self._give_up(
                group, hand, f"Given up after {num_attempts} attempts: {error.message}"
            )
        delay_s = min(
            _LONGEST_RETRY_S, self._limits.retry_delay_s * 2 ** (num_attempts - 1)
        ) * random.uniform(0.5, 1.5)
        log.warning(
            "group_retried",
            group_id=group.group_id,
            attempt=num_attempts - 1,
            retry_in_s=round(delay_s, 2),
            error=str(error),
        )
        self._metrics.observe_retry()
        hand.is_waiting = True
        await asyncio.sleep(delay_s)
        if (again := await self._leases.begin_again(hand.delivery)) is not None:
            self._begin(again)

    async def _publish(
        self, group: TaskGroup, trajectories: list[Trajectory], hand: _InHand
    ) -> None:
        payloads = [codec.encode_trajectory(trajectory) for trajectory in trajectories]
        version = max(trajectory.max_policy_version for trajectory in trajectories)
        if group.purpose is Purpose.EVALUATION:
            await self._commit({Stream.EVALUATIONS: payloads}, hand)
        else:
            turns = tuple(len(trajectory.turns) for trajectory in trajectories)
            outcome = GroupOutcome.GENERATED
            event = LedgerEvent(
                self._run_id,
                group.group_id,
                outcome,
                len(trajectories),
                version,
                episode_turns=turns,
            )
            await self._commit({Stream.TRAJECTORIES: payloads}, hand, event)
        self._metrics.observe_group(trajectories)
        log.info(
            "group_played",
            group_id=group.group_id,
            attempt=hand.delivery.num_deliveries - 1,
            purpose=group.purpose.value,
            num_episodes=len(trajectories),
            num_successes=sum(trajectory.is_success for trajectory in trajectories),
            num_tokens=sum(trajectory.num_response_tokens for trajectory in trajectories),
            policy_version=version,
        )

    async def _give_up(self, group: TaskGroup, hand: _InHand, reason: str) -> None:
        """Close the group's account. An evaluation's too: its gateway must not wait for what will
        never come.
        """
        log.error(
            "group_failed", group_id=group.group_id, purpose=group.purpose.value, reason=reason
        )
        await self._commit({}, hand, self._describe_failure(group, reason))
        self._metrics.observe_failure(group.purpose)

    async def _set_aside(self, group: TaskGroup, hand: _InHand, reason: str) -> None:
        log.error(
            "dead_letter", entry_id=hand.delivery.entry_id, group_id=group.group_id, reason=reason
        )
        hand.is_ending = True
        await self._bus.dead_letter(hand.delivery, reason, [self._describe_failure(group, reason)])
        self._metrics.observe_dead_letter()

    async def _refuse(self, hand: _InHand, reason: str) -> None:
        """Set aside what names no group."""
        log.error("dead_letter", entry_id=hand.delivery.entry_id, reason=reason)
        hand.is_ending = True
        try:
            await self._bus.dead_letter(hand.delivery, reason)
        except LeaseLostError as error:
            log.warning("late_result_refused", entry_id=hand.delivery.entry_id, error=str(error))
        else:
            self._metrics.observe_dead_letter()

    def _describe_failure(self, group: TaskGroup, reason: str) -> LedgerEvent:
        return LedgerEvent(
            self._run_id,
            group.group_id,
            GroupOutcome.FAILED,
            0,
            self._engine.policy_version,
            reason,
        )

    async def _commit(
        self, publications: Publications, hand: _InHand, *transitions: LedgerEvent
    ) -> None:
        """Publish, acknowledge and book in one transaction: a crash before it repeats work, it
        never loses it.
        """
        hand.is_ending = True
        await wait_for_room(
            lambda: self._bus.commit(publications, [hand.delivery], transitions=transitions)
        )

    # ---- what runs beside the loop

    @contextlib.asynccontextmanager
    async def _background(self) -> AsyncIterator[None]:
        """Follow the policy, keep leases and report while the loop runs; a loop that dies takes the
        worker along.
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
            over.set()
            unfinished = list(self._in_hand)
            for hand in unfinished:
                hand.task.cancel()
            # The loop that renews leases goes first: a renewal after the hand-back would undo it.
            await asyncio.gather(*tasks[:1], return_exceptions=True)
            await self._leases.hand_back([hand.delivery for hand in unfinished])
            await asyncio.gather(
                *tasks, *(hand.task for hand in unfinished), return_exceptions=True
            )
        self._check_alive()

    async def _take_back(self) -> None:
        """Begin anew, before anything else, what an earlier life of this worker held."""
        while deliveries := await self._leases.take_back(_PAGE):
            self._begin_reclaimed(deliveries)

    async def _keep_leases(self, over: asyncio.Event) -> None:
        """Renew what is in hand, take over what dead workers left: before new groups, hence without
        room for them, too.
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
            # Not held and not lost: an attempt that is published already, or that the next one has
            # replaced.
            is_over = (
                hand.is_ending or hand.is_waiting or hand.task.done() or hand.task.cancelling()
            )
            if hand.delivery in lost and not is_over:
                entry_id, attempt = hand.delivery.entry_id, hand.delivery.num_deliveries - 1
                log.warning("claim_lost", entry_id=entry_id, attempt=attempt)
                hand.task.cancel()

    def _begin_reclaimed(self, deliveries: list[Delivery]) -> None:
        for delivery in deliveries:
            log.info(
                "group_reclaimed",
                entry_id=delivery.entry_id,
                num_deliveries=delivery.num_deliveries,
            )
            self._metrics.observe_reclaimed()
            self._begin(delivery)

    async def _report(self, over: asyncio.Event) -> None:
        """What this worker did, on the `metrics` stream and to Prometheus."""
        while not await wait_or_stop(over, self._limits.report_interval_s):
            engine, clock = self._engine, self._rules.clock
            self._metrics.observe_engine(
                engine.stats, clock, engine.policy_version, self._policy.newest_version
            )
            values = self._metrics.collect_window(engine.stats, clock, self._slots.num_running)
            values["waiting_sessions"] = float(self._environments.num_waiting)
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
        """Episodes that may be begun. Groups that wait for their next attempt take no room while
        there are few of them.
        """
        num_playing = sum(hand.num_episodes for hand in self._in_hand if not hand.is_waiting)
        return min(self._limits.max_concurrent_episodes - num_playing, self._room_in_hand())

    def _room_in_hand(self) -> int:
        """Episodes that may be held: twice as many as are played at once."""
        return 2 * self._limits.max_concurrent_episodes - sum(
            hand.num_episodes for hand in self._in_hand
        )

    def _max_groups(self, room: int) -> int:
        """Groups that fit if all are as large as the largest seen; one until any was seen. Its
        episodes wait for slots.
        """
        return max(1, room // self._largest_group) if self._largest_group else 1

    def _finish(self, hand: _InHand) -> None:
        self._in_hand.remove(hand)
        self._metrics.observe_running(len(self._in_hand))
        self._note_failure(hand.task)

    def _note_failure(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if self._failure is None:
            self._failure = error

    def _check_alive(self) -> None:
        """A dead engine, a lost bus or a dead background loop ends the service: it must not live on
        half alive.
        """
        if self._failure is not None:
            raise self._failure
        if not self._engine.is_alive:
            raise EngineFailedError(
                "The engine has died; its log on stderr says why. Restart the service."
            )


def _trace(group: TaskGroup, attempt: Attempt) -> tracing.Span:
    """Evaluations are no trajectory's way to an update."""
    if group.purpose is Purpose.EVALUATION:
        return tracing.NOTHING
    return tracing.group_span(
        "rollout.attempt", group.group_id, attempt=attempt.number, group_size=group.group_size
    )
