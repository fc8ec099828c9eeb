"""The learner's main loop: take a batch, train on it, publish the policy, report, make it durable.

Torch runs in a thread of its own, so the event loop never waits for a step. The order is the
promise: entries are acknowledged, and their groups booked as trained, in one transaction after the
checkpoint that contains their effect is durable. A crash anywhere repeats work and loses none, and
ends with the same weights. A group whose optimizer step was not finite, and hence skipped, is
booked as failed: with the checkpoint of its update, or at once if no step of its batch was taken.
`durability` holds what waits for a checkpoint, `publishing` how a policy reaches the others,
`ingest` how a batch comes about.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence, Set
from concurrent.futures import Executor

import structlog
from torch import Tensor

from sdar.bus.ledger import parse_group_number
from sdar.bus.protocol import Bus
from sdar.config import RunConfig
from sdar.contracts import codec
from sdar.contracts.errors import UnavailableError
from sdar.contracts.streams import ConsumerGroup, Stream
from sdar.contracts.types import MetricRecord
from sdar.process import tracing
from sdar.process.lifecycle import wait_or_stop
from sdar.process.telemetry import Health
from sdar.weights.store import WeightStore
from services.learner.checkpoint import CheckpointStore
from services.learner.clock import UpdateClock
from services.learner.durability import Durability
from services.learner.ingest import NOT_FINITE, Group, GroupSource
from services.learner.metrics import LearnerMetrics, build_record
from services.learner.progress import Progress
from services.learner.publishing import Publisher
from services.learner.torch_thread import TorchThread
from services.learner.update import Trainer, UpdateResult

log = structlog.get_logger()

_BEAT_S = 2.0
"""Between two signs of life to the other ranks; also how late one that was stopped is heard."""
_LOGGED = (
    "loss",
    "success_mean",
    "trained_success_mean",
    "reward_mean",
    "gate_mean",
    "staleness_mean",
    "tokens_per_s",
    "step_s",
    "wait_share",
)
"""What an update's log line shows of its record."""
_RUN_FINISHED = "run finished"
_STORAGE_RETRY_S = 5.0
"""Between two tries to write to a disk that is full or a weight store that is away."""


class Learner:
    """Trains until `num_updates` is reached, then closes what still arrives until it is stopped.

    Args:
        progress: of the checkpoint that `trainer` was built from, or a new one.
        snapshot: of the same checkpoint: what a bus that lost its disk is given back.
        torch_thread: one thread; every call of `trainer` runs there.
    """

    def __init__(
        self,
        config: RunConfig,
        bus: Bus,
        weights: WeightStore,
        trainer: Trainer,
        checkpoints: CheckpointStore,
        progress: Progress,
        *,
        torch_thread: Executor,
        consumer: str,
        snapshot: bytes | None = None,
        health: Health | None = None,
        metrics: LearnerMetrics | None = None,
        storage_retry_s: float = _STORAGE_RETRY_S,
    ) -> None:
        self.config = config
        self.progress = progress
        self._bus = bus
        self._trainer = trainer
        self._consumer = consumer
        self._snapshot = snapshot
        self._stopping = asyncio.Event()
        self._health = health or Health()
        self._torch = TorchThread(torch_thread, self._health, storage_retry_s)
        self._metrics = metrics or LearnerMetrics()
        self._source = GroupSource(config, bus, consumer, trainer.model.vocabulary_size)
        self._publisher = Publisher(config, bus, weights, self._torch)
        self._durability = Durability(config, bus, checkpoints, trainer, self._torch, progress)
        self._clock = UpdateClock()
        self._num_skipped_in_a_row = 0

    @property
    def is_finished(self) -> bool:
        return self.progress.num_updates >= self.config.training.num_updates

    async def run(self, stopping: asyncio.Event) -> None:
        """Resume, train until the run is finished, and close what still arrives.

        Once `stopping` is set, the step in hand is finished and made durable.

        Raises:
            SupersededError: another learner has taken over; nothing was published since.
            CapacityError, WeightsUnavailableError: stopped while it waited for a disk or the weight
                store.
        """
        self._stopping = stopping
        await self._resume()
        while not self.is_finished and (groups := await self._next_batch(stopping)):
            await self._update(groups)
            if self._is_checkpoint_due:
                await self._make_durable()
        if self.progress.num_updates > self._durability.num_updates:
            await self._make_durable()
        await self._close_accounts(stopping)

    async def keep_ranks(self, stopping: asyncio.Event) -> None:
        """Beside `run`, where there are other ranks: be in touch with them while there is nothing
        to train, too.

        A rank that is gone ends this process: no collective that waits for it can be interrupted.

        Raises:
            UnavailableError: a rank is asked to leave, so all drain, and start again together.
        """
        while not await wait_or_stop(stopping, _BEAT_S):
            if num_leaving := await self._count_leaving():
                raise UnavailableError(
                    f"{num_leaving} of the learner's ranks were stopped. Start all again: they go "
                    "on."
                )

    async def _count_leaving(self) -> int:
        try:
            return await self._torch.run(self._trainer.beat)
        except RuntimeError as error:
            log.error(
                "rank_lost",
                error=str(error),
                hint="all ranks end now; started again, they go on together",
            )
            os._exit(1)

    # ---- beginning

    async def _resume(self) -> None:
        """Let the others have a policy, and take back what was read before."""
        # First of all: from here on no other learner can write.
        await self._bus.claim_role(ConsumerGroup.LEARNER)
        # Before a policy is announced: at the first one the gateway takes the bus as it is.
        await self._restore_bus()
        await self._announce()
        await self._source.reclaim(self.progress)
        await self._compare_account()
        self._health.mark_ready("training")
        log.info(
            "learner_ready",
            num_updates=self.progress.num_updates,
            policy_version=self.progress.policy_version,
        )

    async def _announce(self) -> None:
        """Make this policy the newest that is announced, under a version that names only it."""
        announced, stored = await self._publisher.find_newest()
        newest = max(announced, stored)
        if newest > self.progress.policy_version:
            # Updates after the checkpoint were lost, and their versions with them: a version never
            # names two weights.
            self.progress = self.progress.continue_after(newest)
            log.warning(
                "updates_lost", newest_version=newest, continuing_as=self.progress.policy_version
            )
        if announced != self.progress.policy_version:
            await self._publish(await self._torch.run(self._trainer.export))

    async def _restore_bus(self) -> None:
        """Give a bus without an account back what it was at the checkpoint."""
        if self._snapshot is None:
            return
        numbers = map(parse_group_number, self.progress.list_trained())
        if await self._bus.restore_snapshot(
            self._snapshot, trained=[number for number in numbers if number is not None]
        ):
            log.error(
                "bus_restored_from_checkpoint",
                num_updates=self.progress.num_updates,
                hint=(
                    "Redis came up without this run: its disk was lost. What was on its way is "
                    "closed as cancelled"
                ),
            )

    async def _compare_account(self) -> None:
        """Report groups that are booked as trained and that no checkpoint holds.

        What the checkpoint holds is booked by now, so more can only be booked if a newer checkpoint
        is damaged or gone.
        """
        num_lost = (await self._bus.read_ledger()).num_trained - self.progress.num_groups
        if num_lost > 0:
            hint = (
                "they are booked as trained, and the weights have lost them: see "
                "checkpoint_skipped. Training goes on without"
            )
            log.error("trained_groups_lost", num_groups=num_lost, hint=hint)

    # ---- one update

    async def _next_batch(self, stopping: asyncio.Event) -> list[Group] | None:
        with self._clock.measure("wait"):
            return await self._source.next_batch(self.progress, stopping, self._health.beat)

    async def _update(self, groups: list[Group]) -> None:
        before = self.progress
        group_ids = [group.group_id for group in groups]
        with tracing.span_over(
            "learner.update", group_ids, update=before.num_updates + 1, num_groups=len(groups)
        ):
            result = await self._train(groups)
            trained, refused = _split(groups, result.refused)
            self._count_skipped(result, refused)
            if not trained:
                await self._pass_over(groups, result)
                return
            self.progress = before.after_update(
                [group.group_id for group in trained], [group.group_id for group in refused]
            )
            self._durability.add(trained, refused, self.progress)
            await self._publish(result.tensors)
        await self._report(trained, refused, before, result)

    async def _pass_over(self, groups: Sequence[Group], result: UpdateResult) -> None:
        """A batch of which every step was skipped is no update: it makes no version, and no
        checkpoint is waited for to book its groups.
        """
        await self._source.refuse(groups)
        values = self._describe_skipped(result)
        await self._publish_record(values)
        self._metrics.observe_skipped(values)
        self._health.beat()

    def _count_skipped(self, result: UpdateResult, refused: Sequence[Group]) -> None:
        for is_skipped in result.skipped:
            self._num_skipped_in_a_row = self._num_skipped_in_a_row + 1 if is_skipped else 0
        if refused:
            log.error(
                "steps_skipped",
                num_steps=sum(result.skipped),
                num_steps_in_a_row=self._num_skipped_in_a_row,
                group_ids=[group.group_id for group in refused],
                reason=NOT_FINITE,
            )

    def _describe_skipped(self, result: UpdateResult) -> dict[str, float]:
        return {
            "num_skipped_steps": float(sum(result.skipped)),
            "num_skipped_steps_in_a_row": float(self._num_skipped_in_a_row),
        }

    async def _train(self, groups: list[Group]) -> UpdateResult:
        """One update in the torch thread."""
        for group in groups:
            _trace_buffered(group)
        began_s = time.time()
        with (
            self._clock.measure("step"),
            tracing.span("learner.step", policy_version=self.progress.policy_version),
        ):
            result = await self._torch.run(
                self._trainer.update,
                [(group.items, group.payloads) for group in groups],
                update_index=self.progress.num_updates,
                policy_version=self.progress.policy_version,
            )
        _trace_trained(_split(groups, result.refused)[0], self.progress, began_s)
        return result

    async def _publish(self, tensors: dict[str, Tensor]) -> None:
        with (
            self._clock.measure("publish"),
            tracing.span("learner.publish", policy_version=self.progress.policy_version),
        ):
            await self._publisher.publish(
                tensors, self.progress, self._durability.policy_version, self._stopping
            )

    async def _report(
        self,
        trained: Sequence[Group],
        refused: Sequence[Group],
        before: Progress,
        result: UpdateResult,
    ) -> None:
        """Publish what the update was like."""
        num_buffered = self._source.buffer.num_complete
        counts = self._source.counts.take()
        counts.add_refused(refused)
        measured = result.measured | self._describe_skipped(result)
        values = build_record(trained, before, measured, self._clock.take(), counts, num_buffered)
        await self._publish_record(values)
        self._metrics.observe_update(self.progress, values, self._durability.num_unacknowledged)
        self._metrics.observe_episodes(trained, counts.stale_turns)
        self._health.beat()
        shown = {name: round(values[name], 4) for name in _LOGGED if name in values}
        log.info("batch_trained", policy_version=self.progress.policy_version, **shown)

    async def _publish_record(self, values: dict[str, float]) -> None:
        version = self.progress.policy_version
        record = MetricRecord(
            self.config.name, "learner", self._consumer, version, time.time(), values
        )
        await self._bus.publish(Stream.METRICS, [codec.encode_metric_record(record)])

    # ---- ending

    @property
    def _is_checkpoint_due(self) -> bool:
        return (
            self.is_finished
            or self.progress.num_updates % self.config.training.checkpoint_every == 0
        )

    async def _make_durable(self) -> None:
        with self._clock.measure("checkpoint"):
            await self._durability.write_checkpoint(self.progress, self._stopping)
        self.progress = self.progress.after_booking()

    async def _close_accounts(self, stopping: asyncio.Event) -> None:
        """After the last update, cancel the groups that are still on their way.

        Only then has each group an outcome, and the gateway can end the run.
        """
        if self.is_finished:
            self._health.mark_ready(_RUN_FINISHED)
            log.info(
                "training_finished",
                num_updates=self.progress.num_updates,
                policy_version=self.progress.policy_version,
            )
            await self._source.cancel_all(_RUN_FINISHED)
            # Nothing is held any more: what is still pending was read by a process that is gone.
            await self._source.reclaim(self.progress)
        while self.is_finished and not stopping.is_set():
            await self._source.cancel_all(_RUN_FINISHED)
            self._health.beat()


def _split(groups: Sequence[Group], refused: Set[int]) -> tuple[list[Group], list[Group]]:
    """The groups that were trained, and those at the refused places."""
    trained = [group for place, group in enumerate(groups) if place not in refused]
    return trained, [groups[place] for place in sorted(refused)]


def _trace_buffered(group: Group) -> None:
    """The time since a group's last entry came into the stream."""
    arrived_s = group.arrived[0] / 1000
    tracing.record("learner.buffer", group.group_id, arrived_s, num_episodes=len(group.items))


def _trace_trained(groups: Sequence[Group], progress: Progress, began_s: float) -> None:
    """Where each group's trace ends: the step that learned from it, with a link to the update's
    own trace. `progress` is from before the update.
    """
    for group in groups:
        tracing.record(
            "learner.trained",
            group.group_id,
            began_s,
            is_linked=True,
            update=progress.num_updates + 1,
            policy_version=progress.policy_version,
            sampled_version=group.policy_version,
            staleness=progress.compute_staleness(group.policy_version),
        )
