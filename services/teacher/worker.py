"""The teacher's MAIN LOOP: reads trajectories, has them scored, publishes the scored ones.

A score gets in once: of a batch whose leases were lost in part, what is still held is published,
and the rest belongs to the teacher that took it over. An episode that cannot be scored fails its
whole task group, whose other scores the learner drops.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import structlog

from sdar.bus.leases import Leases, WorkerLimits, wait_for_room
from sdar.bus.protocol import Bus, Delivery
from sdar.contracts import codec
from sdar.contracts.errors import (
    ContractError,
    CorruptionError,
    LeaseLostError,
    SdarError,
    StaleError,
    UnavailableError,
    WeightsUnavailableError,
)
from sdar.contracts.streams import ConsumerGroup, Stream
from sdar.contracts.types import (
    FailureStage,
    GroupOutcome,
    LedgerEvent,
    MetricRecord,
    Purpose,
    ScoredTrajectory,
    Trajectory,
)
from sdar.process.lifecycle import retry_while_unavailable, wait_or_stop
from sdar.process.telemetry import Health
from services.teacher.metrics import (
    CONTEXT_TOKENS,
    DEAD_LETTERS,
    LAG,
    LATE_RESULTS,
    RECLAIMED_ENTRIES,
    SCORED_TRAJECTORIES,
    VERSION,
    WAITING_SECONDS,
    TeacherMetrics,
)
from services.teacher.teacher import Teacher

log = structlog.get_logger()

_FIRST_BATCH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherLimits(WorkerLimits):
    """Bounds of the main loop.

    Attributes:
        batch_tokens: context tokens read at once, several forward passes' worth: enough to batch
            well, and no batch so long that its scores are late. How long entries are is known only
            from the mean of those before, so it is a target.
        max_batch: most trajectories read at once.
    """

    batch_tokens: int = 65_536
    max_batch: int = 256
    lease_s: float = 20.0


@dataclass(frozen=True, slots=True)
class _Rejected:
    """An entry that can't be scored. `trajectory` is None if it could not even be decoded."""

    delivery: Delivery
    reason: str
    trajectory: Trajectory | None = None


_Accepted = tuple[Delivery, ScoredTrajectory]


@dataclass(frozen=True, slots=True)
class _Batch:
    """What became of one batch of entries."""

    accepted: tuple[_Accepted, ...]
    rejected: tuple[_Rejected, ...]


class TeacherWorker:
    """One consumer of `trajectories`.

    Args:
        instance: unique consumer name.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        bus: Bus,
        teacher: Teacher,
        *,
        run_id: str,
        instance: str,
        health: Health,
        limits: TeacherLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bus = bus
        self._teacher = teacher
        self._metrics: TeacherMetrics = teacher.metrics
        self._run_id = run_id
        self._instance = instance
        self._health = health
        self._limits = limits or TeacherLimits()
        self._clock = clock
        self._leases = Leases(
            bus, Stream.TRAJECTORIES, ConsumerGroup.TEACHER, instance, self._limits.lease_s
        )
        self._take_over_at = clock()

    async def run(self, stopping: asyncio.Event) -> None:
        """MAIN LOOP: read, score, publish and acknowledge, until a stop is asked for."""
        while not stopping.is_set():
            self._health.beat()
            deliveries = await self._receive()
            if not deliveries:
                continue
            async with self._leases.holding(deliveries):
                batch = await self._score(deliveries, stopping)
                # Publish and acknowledge in one transaction: a crash before it only repeats work.
                await self._publish(batch.accepted, stopping)
                await self._set_aside(batch.rejected)

    async def report(self, stopping: asyncio.Event) -> None:
        """Second loop: what this process did, on the `metrics` stream."""
        while not await wait_or_stop(stopping, self._limits.report_interval_s):
            values = self._metrics.collect_record()
            record = MetricRecord(
                self._run_id,
                "teacher",
                self._instance,
                self._teacher.teacher_version,
                time.time(),
                values,
            )
            try:
                await self._bus.publish(Stream.METRICS, [codec.encode_metric_record(record)])
            except UnavailableError as error:
                # Losing a record is nothing; the main loop decides when a lost bus is the end.
                log.warning("metrics_not_published", error=str(error))

    async def _receive(self) -> list[Delivery]:
        """New entries, as many as are there and make a batch.

        What an earlier process of this name or a dead peer held comes before them.
        """
        if taken := await self._take():
            self._metrics.count(RECLAIMED_ENTRIES, len(taken))
            log.info("entries_reclaimed", num_entries=len(taken))
            return taken
        started_at = self._clock()
        deliveries = await self._leases.read(self._batch_size(), self._limits.read_block_s)
        self._metrics.count(WAITING_SECONDS, self._clock() - started_at)
        return deliveries

    async def _take(self) -> list[Delivery]:
        """At first what an earlier process of this name held; then, now and then, a dead peer's."""
        if own := await self._leases.take_back(self._batch_size()):
            return own
        if self._clock() < self._take_over_at:
            return []
        # No more often than leases are renewed: nothing lapses faster.
        self._take_over_at = self._clock() + self._leases.renewal_interval_s
        return await self._leases.take_over(self._batch_size())

    def _batch_size(self) -> int:
        """Entries to ask for, from the mean length of those scored so far."""
        num_scored = self._metrics.read(SCORED_TRAJECTORIES)
        if not num_scored:
            # Nothing is known yet: few enough not to be late whatever their length.
            return min(_FIRST_BATCH, self._limits.max_batch)
        mean_tokens = self._metrics.read(CONTEXT_TOKENS) / num_scored
        num_fitting = int(self._limits.batch_tokens / max(mean_tokens, 1.0))
        return max(1, min(self._limits.max_batch, num_fitting))

    async def _score(self, deliveries: Sequence[Delivery], stopping: asyncio.Event) -> _Batch:
        started_at = self._clock()
        decoded = [self._decode(delivery) for delivery in deliveries]
        rejected = [item for item in decoded if isinstance(item, _Rejected)]
        wanted = [
            (delivery, item)
            for delivery, item in zip(deliveries, decoded, strict=True)
            if isinstance(item, Trajectory)
        ]
        accepted: list[_Accepted] = []
        for delivery, trajectory, outcome in await self._score_trajectories(wanted, stopping):
            if isinstance(outcome, ScoredTrajectory):
                accepted.append((delivery, outcome))
            else:
                rejected.append(_Rejected(delivery, _describe(outcome), trajectory))
        batch = _Batch(tuple(accepted), tuple(rejected))
        self._log_scored(batch, self._clock() - started_at)
        return batch

    def _log_scored(self, batch: _Batch, duration_s: float) -> None:
        num_tokens = sum(scored.trajectory.num_response_tokens for _, scored in batch.accepted)
        log.info(
            "batch_scored",
            num_trajectories=len(batch.accepted),
            num_rejected=len(batch.rejected),
            num_tokens=num_tokens,
            teacher_version=int(self._metrics.read(VERSION)),
            lag=int(self._metrics.read(LAG)),
            duration_s=round(duration_s, 3),
        )

    def _decode(self, delivery: Delivery) -> Trajectory | _Rejected:
        try:
            trajectory = codec.decode_trajectory(delivery.payload)
        except (ContractError, CorruptionError) as error:
            return _Rejected(delivery, str(error))
        if trajectory.run_id != self._run_id or trajectory.purpose is not Purpose.TRAIN:
            # Without its trajectory: another run's group must not be failed in this run's account.
            reason = (
                f"Trajectory {trajectory.trajectory_id} of run {trajectory.run_id!r} and purpose "
                f"{trajectory.purpose}; this stream carries training episodes of "
                f"{self._run_id!r}. Find what else writes to it."
            )
            return _Rejected(delivery, reason)
        if delivery.num_deliveries > self._limits.max_attempts:
            reason = (
                f"Delivered {delivery.num_deliveries} times and never finished: it may be what "
                "ends the teachers."
            )
            return _Rejected(delivery, reason, trajectory)
        return trajectory

    async def _score_trajectories(
        self, wanted: Sequence[tuple[Delivery, Trajectory]], stopping: asyncio.Event
    ) -> list[tuple[Delivery, Trajectory, ScoredTrajectory | Exception]]:
        """What became of each; nothing if the service stops meanwhile: those stay pending."""
        if not wanted:
            return []
        try:
            outcomes = await self._score_patiently([item for _, item in wanted], stopping)
        except SdarError:
            raise
        except Exception as error:
            # The worker's boundary: find the one entry that does it, spare the others.
            if len(wanted) == 1:
                log.exception("scoring_failed", trajectory_id=wanted[0][1].trajectory_id)
                return [(*wanted[0], error)]
            parts = [await self._score_trajectories([pair], stopping) for pair in wanted]
            return list(itertools.chain.from_iterable(parts))
        # Not strict: there are no outcomes at all after a stop.
        return [(*pair, outcome) for pair, outcome in zip(wanted, outcomes, strict=False)]

    async def _score_patiently(
        self, trajectories: Sequence[Trajectory], stopping: asyncio.Event
    ) -> list[ScoredTrajectory | SdarError]:
        """Score, waiting while weights are unavailable; empty if the service stops meanwhile."""
        outcomes: list[ScoredTrajectory | SdarError] = []

        async def attempt() -> None:
            self._health.beat()
            try:
                outcomes[:] = await self._teacher.score(trajectories)
            except StaleError as error:
                # Tokens of a version whose manifest has not arrived: the stream is behind, not the
                # trajectory.
                raise WeightsUnavailableError(str(error)) from error

        if stopping.is_set():
            # A stop lets the batch in hand finish, without waiting for anything.
            await attempt()
        else:
            await retry_while_unavailable(attempt, stopping, what="policy weights")
        return outcomes

    async def _publish(self, accepted: Sequence[_Accepted], stopping: asyncio.Event) -> None:
        """Commit, however long the learner takes to make room.

        When the service stops first, the entries stay pending.
        """
        while accepted:
            commit = partial(self._commit, accepted)
            try:
                await wait_for_room(commit, stopping, self._health.beat)
                return
            except LeaseLostError as error:
                # Refused as a whole, for a part of it. Without that part it is tried again.
                accepted = await self._keep_held(accepted, error)

    async def _commit(self, accepted: Sequence[_Accepted]) -> None:
        # The outcomes for ucb go in with the scores: an episode teaches the choice of skills once.
        scored = [item for _, item in accepted]
        payloads = [codec.encode_scored_trajectory(item) for item in scored]
        publications = {Stream.SCORED: payloads, **self._teacher.list_outcomes(scored)}
        await self._bus.commit(publications, [delivery for delivery, _ in accepted])

    async def _keep_held(
        self, accepted: Sequence[_Accepted], error: LeaseLostError
    ) -> list[_Accepted]:
        """What is still held of a batch whose commit was refused; the rest is another's."""
        held = await self._leases.renew([delivery for delivery, _ in accepted])
        num_lost = len(accepted) - len(held)
        log.warning("late_result_refused", num_entries=num_lost, error=str(error))
        self._metrics.count(LATE_RESULTS, num_lost)
        return [pair for pair in accepted if pair[0] in held]

    async def _set_aside(self, rejected: Sequence[_Rejected]) -> None:
        """A group that misses an episode is never trained on; its account is closed here."""
        for item in rejected:
            log.error("trajectory_rejected", entry_id=item.delivery.entry_id, reason=item.reason)
            try:
                await self._bus.dead_letter(item.delivery, item.reason, self._describe_loss(item))
            except LeaseLostError as error:
                log.warning("late_result_refused", num_entries=1, error=str(error))
                self._metrics.count(LATE_RESULTS)
            else:
                self._metrics.count(DEAD_LETTERS)

    def _describe_loss(self, rejected: _Rejected) -> list[LedgerEvent]:
        if rejected.trajectory is None:
            return []
        trajectory = rejected.trajectory
        event = LedgerEvent(
            run_id=self._run_id,
            group_id=trajectory.group_id,
            outcome=GroupOutcome.FAILED,
            num_trajectories=trajectory.group_size,
            policy_version=trajectory.max_policy_version,
            reason=rejected.reason,
            stage=FailureStage.TEACHER,
        )
        return [event]


def _describe(error: Exception) -> str:
    return error.message if isinstance(error, SdarError) else f"{type(error).__name__}: {error}"
