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
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import structlog

from sdar.bus.protocol import BEFORE_FIRST, Bus, Delivery, Publications, parse_entry_id
from sdar.contracts import codec
from sdar.contracts.errors import (
    BusUnavailableError,
    CapacityError,
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
from services.rollout.metrics import (
    DEAD_LETTERS,
    FAILED_GROUPS,
    LATE_RESULTS,
    RECLAIMED_GROUPS,
    REPEATED_TOKENS,
    RETRIED_GROUPS,
    RolloutMetrics,
)
from services.rollout.policy import PolicyFollower
from services.rollout.skill_client import SkillSource

log = structlog.get_logger()

_PAGE = 100
_LONGEST_RETRY_S = 10.0
_HAND_BACK_S = 5.0
"""Longest wait for the bus to take groups back: a stop must not hang on a Redis that is away."""
_LARGEST_SEQUENCE = 2**64 - 1
"""Of an entry id's second part."""


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """Bounds of the main loop.

    Attributes:
        max_concurrent_episodes: episodes in flight; groups are read while their episodes fit.
        read_block_s: how long a quiet stream is waited on; also how late a stop or a failure is
            noticed.
        claim_idle_s: a group that its worker has not renewed for so long is taken over, if that one
            is gone (see `Bus.reclaim`); renewals are four times as frequent.
        max_attempts: times a group is begun in all. One whose environment fails then is failed; one
            that is delivered once more is taken to kill whoever plays it and set aside.
        retry_delay_s: pause before the second attempt after an environment failed, half as much
            more or less by chance; it doubles with every attempt.
        grace_s: how long running groups may go on after a stop; what is not finished then is handed
            back.
        report_interval_s: time between two records on the `metrics` stream.
    """

    max_concurrent_episodes: int
    read_block_s: float = 0.5
    claim_idle_s: float = 10.0
    max_attempts: int = 5
    retry_delay_s: float = 1.0
    grace_s: float = 20.0
    report_interval_s: float = 2.0


@dataclass(slots=True, eq=False)
class _InHand:
    """An attempt at a group.

    Attributes:
        num_episodes: how many it plays.
        is_waiting: it failed and will be followed by the next attempt.
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
        limits: WorkerLimits,
        health: Health,
        metrics: RolloutMetrics,
        skills: SkillSource | None = None,
    ) -> None:
        self._bus, self._engine, self._environments, self._rules = bus, engine, environments, rules
        self._run_id, self._instance = run_id, instance
        self._limits, self._health, self._metrics, self._skills = limits, health, metrics, skills
        self._slots = EpisodeSlots(limits.max_concurrent_episodes)
        pins = PinnedVersions(bus, f"{ConsumerGroup.ROLLOUT}.{instance}")
        self._follower = PolicyFollower(bus, engine, pins, metrics, limits.read_block_s)
        self._in_hand: set[_InHand] = set()
        self._largest_group = 0
        self._is_leaving = False
        self._failure: BaseException | None = None

    async def run(self, stopping: asyncio.Event) -> None:
        """MAIN LOOP: read, play, publish and acknowledge, until told to stop; then finish what is
        in hand.
        """
        await self._follower.catch_up()
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
        return await self._bus.read(
            Stream.TASKS,
            ConsumerGroup.ROLLOUT,
            self._instance,
            self._max_groups(room),
            self._limits.read_block_s,
        )

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
            self._metrics.count(LATE_RESULTS)
        finally:
            if not is_published:
                self._metrics.count(REPEATED_TOKENS, attempt.num_sampled_tokens)

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
            await self._follower.reached(group.admitted_version)
        async with (
            self._follower.pinned(group.admitted_version)
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
        self._metrics.count(RETRIED_GROUPS)
        hand.is_waiting = True
        await asyncio.sleep(delay_s)
        if await self._bus.renew([hand.delivery]):
            for delivery in await self._reclaim_own(_precede(hand.delivery.entry_id), 1):
                self._begin(delivery)

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
        self._metrics.count(FAILED_GROUPS, purpose=group.purpose)

    async def _set_aside(self, group: TaskGroup, hand: _InHand, reason: str) -> None:
        log.error(
            "dead_letter", entry_id=hand.delivery.entry_id, group_id=group.group_id, reason=reason
        )
        hand.is_ending = True
        await self._bus.dead_letter(hand.delivery, reason, [self._describe_failure(group, reason)])
        self._metrics.count(DEAD_LETTERS)

    async def _refuse(self, hand: _InHand, reason: str) -> None:
        """Set aside what names no group."""
        log.error("dead_letter", entry_id=hand.delivery.entry_id, reason=reason)
        hand.is_ending = True
        try:
            await self._bus.dead_letter(hand.delivery, reason)
        except LeaseLostError as error:
            log.warning("late_result_refused", entry_id=hand.delivery.entry_id, error=str(error))
        else:
            self._metrics.count(DEAD_LETTERS)

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
        while True:
            try:
                return await self._bus.commit(
                    publications, [hand.delivery], transitions=transitions
                )
            except CapacityError as error:
                # The bus has waited already; what is played is not thrown away because its readers
                # are slow.
                log.warning("stream_full", error=str(error))

    # ---- what runs beside the loop

    @contextlib.asynccontextmanager
    async def _background(self) -> AsyncIterator[None]:
        """Follow the policy, keep claims and report while the loop runs; a loop that dies takes the
        worker along.
        """
        over = asyncio.Event()
        loops = (self._keep_claims, self._follower.run, self._report)
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
            # The loop that renews claims goes first: a renewal after the hand-back would undo it.
            await asyncio.gather(*tasks[:1], return_exceptions=True)
            await self._hand_back([hand.delivery for hand in unfinished])
            await asyncio.gather(
                *tasks, *(hand.task for hand in unfinished), return_exceptions=True
            )
        self._check_alive()

    async def _hand_back(self, deliveries: list[Delivery]) -> None:
        """Leave to others at once what this worker does not finish; else they would wait for its
        lease to lapse.
        """
        if not deliveries:
            return
        try:
            async with asyncio.timeout(_HAND_BACK_S):
                await self._bus.hand_back(deliveries)
        except (SdarError, TimeoutError) as error:
            log.warning("groups_not_handed_back", num_groups=len(deliveries), error=str(error))
        else:
            log.info("groups_handed_back", num_groups=len(deliveries))

    async def _take_back(self) -> None:
        """Begin anew, before anything else, what an earlier life of this worker held."""
        after_id = BEFORE_FIRST
        while deliveries := await self._reclaim_own(after_id, _PAGE):
            self._begin_reclaimed(deliveries)
            after_id = deliveries[-1].entry_id

    async def _reclaim_own(self, after_id: str, max_count: int) -> list[Delivery]:
        """What this worker's name holds, as another attempt; results of the one before are refused
        from now on.
        """
        name = self._instance
        return await self._bus.reclaim(
            Stream.TASKS, ConsumerGroup.ROLLOUT, name, 0.0, max_count, after_id, held_by=name
        )

    async def _keep_claims(self, over: asyncio.Event) -> None:
        """Renew what is in hand, take over what dead workers left: before new groups, hence without
        room for them, too.
        """
        tasks, rollout, idle_s = Stream.TASKS, ConsumerGroup.ROLLOUT, self._limits.claim_idle_s
        is_over = False
        while not is_over:
            await self._renew()
            # One that is leaving would only hand it back once more, and every attempt counts.
            if not self._is_leaving and (room := self._room_in_hand()) > 0:
                taken = await self._bus.reclaim(
                    tasks, rollout, self._instance, idle_s, self._max_groups(room)
                )
                self._begin_reclaimed(taken)
            is_over = await wait_or_stop(over, idle_s / 4)

    async def _renew(self) -> None:
        in_hand = list(self._in_hand)
        held = {
            (one.entry_id, one.num_deliveries)
            for one in await self._bus.renew([hand.delivery for hand in in_hand])
        }
        for hand in in_hand:
            # Not held and not lost: an attempt that is published already, or that its own follower
            # has replaced.
            is_over = (
                hand.is_ending or hand.is_waiting or hand.task.done() or hand.task.cancelling()
            )
            entry_id, number = hand.delivery.entry_id, hand.delivery.num_deliveries
            if (entry_id, number) not in held and not is_over:
                log.warning("claim_lost", entry_id=entry_id, attempt=number - 1)
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
            engine, clock = self._engine, self._rules.clock
            self._metrics.observe_engine(
                engine.stats, clock, engine.policy_version, self._follower.newest_version
            )
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


def _precede(entry_id: str) -> str:
    """The id right before an entry's: what comes after it begins with that entry."""
    milliseconds, sequence = parse_entry_id(entry_id)
    return (
        f"{milliseconds}-{sequence - 1}" if sequence else f"{milliseconds - 1}-{_LARGEST_SEQUENCE}"
    )
