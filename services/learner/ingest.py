"""From stream entries to batches of whole groups: completion, duplicates, staleness, no signal.

`GroupBuffer` decides and does no I/O; `GroupSource` reads the stream and writes what was decided.
An entry of a group that will be trained stays unacknowledged: the main loop acknowledges it when a
checkpoint holds its effect. Everything else is acknowledged in the transaction that books why. What
is held is bounded by the gateway's admission.

Groups are served earliest deadline first: the one that goes stale soonest is trained first, so a
long episode, which arrives late and with old tokens, is not the one that waits. The choice depends
on what has arrived and on nothing else: a learner that resumes makes the batches again that it
would have made.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import Self

import numpy as np
import numpy.typing as npt
import structlog

from sdar.algorithms.advantages import compute_advantages, has_signal
from sdar.bus.leases import Leases
from sdar.bus.protocol import Bus, Delivery, parse_entry_id
from sdar.config import RunConfig
from sdar.contracts import codec
from sdar.contracts.errors import SdarError
from sdar.contracts.streams import ConsumerGroup
from sdar.contracts.types import (
    FailureStage,
    GroupOutcome,
    LedgerEvent,
    Purpose,
    ScoredTrajectory,
)
from sdar.process import tracing
from services.learner.progress import REMEMBERED_UPDATES, Progress

log = structlog.get_logger()

NOT_FINITE = "its optimizer step was skipped: a loss or the gradient norm was no finite number"
"""Why a group is refused whose step was not taken."""
_BLOCK_S = 0.25
"""Longest wait for an entry before the main loop looks whether it should stop."""


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Episodes of one task from one attempt, in the order of their index, and the stream entries
    that brought them.

    Attributes:
        policy_version: of the oldest sampled token.
        teacher_version: of the oldest score, None if there is none.
        arrived: place in the stream of the last entry.
    """

    group_id: str
    items: tuple[ScoredTrajectory, ...]
    deliveries: tuple[Delivery, ...]
    policy_version: int
    teacher_version: int | None
    arrived: tuple[int, int]

    @classmethod
    def of(cls, group_id: str, pairs: Iterable[tuple[ScoredTrajectory, Delivery]]) -> Self:
        items, deliveries = zip(*sorted(pairs, key=_by_episode), strict=True)
        sampled_by = [item.trajectory.min_policy_version for item in items]
        scored_by = [item.score.teacher_version for item in items if item.score is not None]
        places = [parse_entry_id(delivery.entry_id) for delivery in deliveries]
        return cls(
            group_id,
            items,
            deliveries,
            policy_version=min(sampled_by),
            teacher_version=min(scored_by, default=None),
            arrived=max(places),
        )

    @property
    def payloads(self) -> list[bytes]:
        return [delivery.payload for delivery in self.deliveries]

    @property
    def episode_turns(self) -> tuple[int, ...]:
        return tuple(len(item.trajectory.turns) for item in self.items)

    @property
    def successes(self) -> list[tuple[str, bool]]:
        """Task type and success of each episode."""
        trajectories = [item.trajectory for item in self.items]
        return [(trajectory.task.task_type, trajectory.is_success) for trajectory in trajectories]


def _by_episode(pair: tuple[ScoredTrajectory, Delivery]) -> int:
    return pair[0].trajectory.episode_index


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a group won't be trained."""

    outcome: GroupOutcome
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Dropped:
    """A group that won't be trained.

    Attributes:
        group: the attempt that was judged, which may lack episodes.
        deliveries: every entry of it, of all its attempts.
    """

    group: Group
    verdict: Verdict
    deliveries: tuple[Delivery, ...]

    @property
    def group_id(self) -> str:
        return self.group.group_id


@dataclass(slots=True)
class IngestCounts:
    """What became of groups since the counts were last taken."""

    num_skipped: int = 0
    num_stale: int = 0
    num_cancelled: int = 0
    num_failed: int = 0
    num_duplicates: int = 0
    stale_turns: list[int] = field(default_factory=list)
    """Turns of each episode that was dropped as stale."""
    dropped: list[tuple[str, bool]] = field(default_factory=list)
    """Task type and success of each episode of a group that wasn't trained."""

    def add(self, dropped: Dropped) -> None:
        outcome = dropped.verdict.outcome
        self.num_stale += outcome is GroupOutcome.STALE
        self.num_skipped += outcome is GroupOutcome.SKIPPED
        self.num_cancelled += outcome is GroupOutcome.CANCELLED
        self.num_failed += outcome is GroupOutcome.FAILED
        self.dropped += dropped.group.successes
        if outcome is GroupOutcome.STALE:
            self.stale_turns += dropped.group.episode_turns

    def add_refused(self, groups: Sequence[Group]) -> None:
        """Groups whose optimizer step was skipped in an update of which others were taken."""
        self.num_failed += len(groups)
        for group in groups:
            self.dropped += group.successes

    def take(self) -> IngestCounts:
        """The counts so far; they begin again at nothing."""
        taken = replace(self)
        fresh = IngestCounts()
        for each in fields(self):
            setattr(self, each.name, getattr(fresh, each.name))
        return taken


class _Remembered:
    """The last `count` group ids that were added."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._order: deque[str] = deque()
        self._ids: set[str] = set()

    def __contains__(self, group_id: str) -> bool:
        return group_id in self._ids

    def add(self, group_ids: Iterable[str]) -> None:
        for group_id in group_ids:
            # One that is there keeps its place: added again it would be forgotten twice.
            if group_id not in self._ids:
                self._ids.add(group_id)
                self._order.append(group_id)
            if len(self._order) > self._count:
                self._ids.remove(self._order.popleft())


_Pairs = dict[int, tuple[ScoredTrajectory, Delivery]]
"""Episodes of one attempt at a group so far, by episode index."""


class GroupBuffer:
    """Groups on their way to a batch."""

    def __init__(self) -> None:
        self._partial: dict[tuple[str, int], _Pairs] = {}
        self._complete: dict[str, Group] = {}

    @property
    def num_complete(self) -> int:
        return len(self._complete)

    def add(self, item: ScoredTrajectory, delivery: Delivery) -> list[Delivery]:
        """Take one episode in; returns entries that are superfluous and may be acknowledged.

        The first attempt at a group that is complete wins. A duplicate is superfluous because the
        entry that it repeats stays pending.
        """
        trajectory = item.trajectory
        group_id = trajectory.group_id
        key = (group_id, trajectory.attempt)
        if group_id in self._complete or trajectory.episode_index in self._partial.get(key, ()):
            return [delivery]
        partial = self._partial.setdefault(key, {})
        partial[trajectory.episode_index] = (item, delivery)
        if len(partial) < trajectory.group_size:
            return []
        del self._partial[key]
        self._complete[group_id] = Group.of(group_id, partial.values())
        # Its other attempts have nothing left to win.
        return _list_deliveries(self._pop_partial(group_id))

    def drop(self, group_id: str) -> list[Delivery]:
        """Forget a group; returns its entries."""
        groups = self._pop_partial(group_id)
        if group_id in self._complete:
            groups.append(self._complete.pop(group_id))
        return _list_deliveries(groups)

    def drop_where(self, judge: Callable[[Group, bool], Verdict | None]) -> list[Dropped]:
        """Take out the groups that `judge(group, is_complete)` gives a verdict on.

        Of an incomplete group it judges the newest attempt.
        """
        # Sorted by attempt, so that of each group the newest one is what stays in the mapping.
        newest = {
            key[0]: Group.of(key[0], pairs.values())
            for key, pairs in sorted(self._partial.items(), key=_by_attempt)
        }
        judged = [(group, judge(group, True)) for group in self._complete.values()]
        judged += [(group, judge(group, False)) for group in newest.values()]
        return [
            Dropped(group, verdict, tuple(self.drop(group.group_id)))
            for group, verdict in judged
            if verdict is not None
        ]

    def take(self, count: int, deadline: Callable[[Group], int]) -> list[Group] | None:
        """The `count` whole groups with the earliest deadlines; None if there are fewer.

        Among equal deadlines by arrival, so that a learner that resumes chooses the same again.
        """
        if len(self._complete) < count:
            return None
        ordered = sorted(self._complete.values(), key=lambda g: (deadline(g), g.arrived))
        return [self._complete.pop(group.group_id) for group in ordered[:count]]

    def _pop_partial(self, group_id: str) -> list[Group]:
        keys = [key for key in self._partial if key[0] == group_id]
        return [Group.of(group_id, self._partial.pop(key).values()) for key in keys]


def _list_deliveries(groups: Iterable[Group]) -> list[Delivery]:
    return list(chain.from_iterable(group.deliveries for group in groups))


def _by_attempt(entry: tuple[tuple[str, int], _Pairs]) -> tuple[str, int]:
    return entry[0]


class GroupSource:
    """Reads the learner's input stream and yields batches."""

    def __init__(self, config: RunConfig, bus: Bus, consumer: str, vocabulary_size: int) -> None:
        self.counts = IngestCounts()
        self.buffer = GroupBuffer()
        self._config = config
        self._bus = bus
        self._vocabulary_size = vocabulary_size
        self._method = config.method.row
        self._leases = Leases(bus, config.learner_input, ConsumerGroup.LEARNER, consumer)
        self._max_count = config.training.groups_per_update * config.training.group_size
        self._progress = Progress()
        # Apart, so that a run that skips most groups does not forget the few it trains.
        num_remembered = REMEMBERED_UPDATES * config.training.groups_per_update
        self._trained = _Remembered(num_remembered)
        self._dropped = _Remembered(num_remembered)
        self._versions_in_checkpoint: dict[str, int] = {}
        self._refused_in_checkpoint: frozenset[str] = frozenset()

    async def reclaim(self, progress: Progress) -> None:
        """After a start: have again all that an earlier life read and did not acknowledge.

        Groups whose updates the checkpoint holds are booked in the transaction that acknowledges
        their entries: the crash came between the checkpoint and that.
        """
        self._progress = progress
        self._versions_in_checkpoint = progress.list_trained()
        self._refused_in_checkpoint = frozenset(progress.refused_groups)
        self._trained.add(self._versions_in_checkpoint)
        self._dropped.add(progress.refused_groups)
        deliveries = await self._leases.take_all(self._max_count)
        await self._accept(deliveries)
        if deliveries:
            log.info(
                "entries_reclaimed",
                num_entries=len(deliveries),
                num_groups=self.buffer.num_complete,
            )

    async def next_batch(
        self, progress: Progress, stopping: asyncio.Event, beat: Callable[[], None] = lambda: None
    ) -> list[Group] | None:
        """The next groups to train on, none staler than the bound at this moment; None when asked
        to stop first.

        Args:
            beat: called at every look at the stream: waiting long is not being dead.
        """
        self._progress = progress
        count = self._config.training.groups_per_update
        while not stopping.is_set():
            beat()
            # With enough at hand it only takes in what is there: among it may be a nearer deadline.
            await self._read(_BLOCK_S if self.buffer.num_complete < count else 0.0)
            await self._settle(self.buffer.drop_where(self._judge))
            if groups := self.buffer.take(count, self._compute_deadline):
                self._trained.add(group.group_id for group in groups)
                return groups
        return None

    async def refuse(self, groups: Sequence[Group]) -> None:
        """Close a batch of which no optimizer step was taken, without waiting for a checkpoint."""
        verdict = Verdict(GroupOutcome.FAILED, NOT_FINITE)
        await self._settle([Dropped(group, verdict, group.deliveries) for group in groups])

    async def cancel_all(self, reason: str) -> None:
        """Close every group that is here or arrives now as CANCELLED: there is no update left for
        it.
        """
        await self._read(_BLOCK_S)
        await self._settle(
            self.buffer.drop_where(lambda *_: Verdict(GroupOutcome.CANCELLED, reason))
        )

    async def _read(self, block_s: float) -> None:
        """Take in all that is there, waiting up to `block_s` for the first.

        All of it, since the choice by deadline must see everything.
        """
        num_read = self._max_count
        while num_read == self._max_count:
            page = await self._leases.read(self._max_count, block_s)
            await self._accept(page)
            num_read = len(page)
            block_s = 0.0

    async def _accept(self, deliveries: Sequence[Delivery]) -> None:
        """Take entries into the buffer; acknowledge those that change nothing."""
        superfluous: list[Delivery] = []
        # Of groups that the checkpoint holds and that may not be booked yet.
        durable: dict[str, _Pairs] = {}
        for item, delivery in await self._decode_all(deliveries):
            group_id = item.trajectory.group_id
            if group_id in self._versions_in_checkpoint or group_id in self._refused_in_checkpoint:
                durable.setdefault(group_id, {})[item.trajectory.episode_index] = (item, delivery)
            if group_id in self._trained or group_id in self._dropped:
                superfluous.append(delivery)
            # After the look at the ids: an entry of a closed group is no reason to fail it.
            elif reason := self._find_fault(item):
                await self._refuse(item, delivery, reason)
            else:
                superfluous += self.buffer.add(item, delivery)
        if superfluous:
            self.counts.num_duplicates += len(superfluous)
            booked = [self._book_durable(*entry) for entry in durable.items()]
            await self._bus.commit({}, superfluous, transitions=booked)

    def _book_durable(self, group_id: str, pairs: _Pairs) -> LedgerEvent:
        """Booked once more if it was booked before, which the bus ignores."""
        group = Group.of(group_id, pairs.values())
        if group_id in self._refused_in_checkpoint:
            return book_refused(self._config, group, self._progress.policy_version)
        return book_trained(self._config, group, self._versions_in_checkpoint[group_id])

    async def _decode_all(
        self, deliveries: Sequence[Delivery]
    ) -> list[tuple[ScoredTrajectory, Delivery]]:
        """The entries that can be read; the others are set aside as dead letters."""
        decoded = []
        for delivery in deliveries:
            try:
                item = decode_item(delivery.payload, needs_teacher=self._method.needs_teacher)
            except SdarError as error:
                await self._bus.dead_letter(delivery, str(error))
                log.error("entry_unreadable", entry_id=delivery.entry_id, error=str(error))
            else:
                decoded.append((item, delivery))
        return decoded

    def _find_fault(self, item: ScoredTrajectory) -> str:
        """Why an entry would break or poison an update; empty if it would not."""
        trajectory = item.trajectory
        largest = max(
            int(tokens.max(initial=0))
            for turn in trajectory.turns
            for tokens in (turn.prompt_token_ids, turn.response_token_ids)
        )
        faults = {
            f"run_id is {trajectory.run_id!r}, not {self._config.name!r}": trajectory.run_id
            != self._config.name,
            "an evaluation episode is never trained on": trajectory.purpose is not Purpose.TRAIN,
            "the teacher score is missing": self._method.needs_teacher and item.score is None,
            f"token id {largest} is outside the vocabulary of {self._vocabulary_size}": largest
            >= self._vocabulary_size,
            "a turn has an empty prompt": any(
                not len(turn.prompt_token_ids) for turn in trajectory.turns
            ),
            # Each reward is finite, and their sum need not be.
            f"its rewards add up to {trajectory.episode_return}": not math.isfinite(
                trajectory.episode_return
            ),
        }
        return "; ".join(text for text, is_so in faults.items() if is_so)

    async def _refuse(self, item: ScoredTrajectory, delivery: Delivery, reason: str) -> None:
        """Set one entry aside; its group can never be whole again, so it fails as a whole."""
        group_id = item.trajectory.group_id
        others = self.buffer.drop(group_id)
        self._dropped.add([group_id])
        # The letter and the outcome of its group in one transaction; the others may come again.
        event = self._event(
            group_id, GroupOutcome.FAILED, f"{item.trajectory.trajectory_id}: {reason}", 0
        )
        await self._bus.dead_letter(delivery, reason, [event])
        await self._bus.acknowledge(others)
        self.counts.num_failed += 1
        log.error("trajectory_refused", trajectory_id=item.trajectory.trajectory_id, reason=reason)

    def _judge(self, group: Group, is_complete: bool) -> Verdict | None:
        """STALE or SKIPPED, or None for a group that may be trained (or completed) now."""
        training = self._config.training
        if self._progress.num_updates > self._compute_deadline(group):
            return Verdict(GroupOutcome.STALE, self._explain_staleness(group, is_complete))
        # Only of a whole group is it known whether all episodes scored the same.
        is_skipping = training.skip_zero_signal and not self._method.learns_without_advantage
        if is_complete and is_skipping and not self._has_signal(group):
            return Verdict(GroupOutcome.SKIPPED, "every episode scored the same")
        return None

    def _explain_staleness(self, group: Group, is_complete: bool) -> str:
        max_staleness = self._config.training.max_staleness
        staleness = self._progress.compute_staleness(group.policy_version)
        if staleness <= max_staleness:
            return f"teacher past its lag of {self._config.teacher.max_lag}"
        reason = f"oldest token {staleness} updates behind, bound {max_staleness}"
        if is_complete:
            return reason
        group_size = group.items[0].trajectory.group_size
        return f"{reason}, {len(group.items)} of {group_size} episodes here"

    def _compute_deadline(self, group: Group) -> int:
        """The last number of updates done at which the group may still be trained."""
        progress = self._progress
        max_staleness = self._config.training.max_staleness
        deadline = progress.count_updates(group.policy_version) + max_staleness
        if group.teacher_version is None:
            return deadline
        # A score may be behind the newest policy by its lag when it is made, and then ages as the
        # tokens do.
        scored_at = progress.count_updates(group.teacher_version)
        return min(deadline, scored_at + max_staleness + self._config.teacher.max_lag)

    def _has_signal(self, group: Group) -> bool:
        return has_signal(compute_group_advantages(self._config, group.items))

    async def _settle(self, dropped: Sequence[Dropped]) -> None:
        """Book groups that won't be trained and acknowledge their entries, in one transaction."""
        if not dropped:
            return
        events = [
            self._event(d.group_id, d.verdict.outcome, d.verdict.reason, len(d.deliveries))
            for d in dropped
        ]
        entries = list(chain.from_iterable(group.deliveries for group in dropped))
        await self._bus.commit({}, entries, transitions=events)
        # After the commit: until it is written these entries are still to be judged.
        self._dropped.add(group.group_id for group in dropped)
        for group in dropped:
            _trace_dropped(group)
            self.counts.add(group)
        log.info(
            "groups_dropped",
            num_groups=len(events),
            first=f"{events[0].outcome}: {events[0].reason}",
        )

    def _event(
        self, group_id: str, outcome: GroupOutcome, reason: str, num_trajectories: int
    ) -> LedgerEvent:
        return LedgerEvent(
            self._config.name,
            group_id,
            outcome,
            num_trajectories,
            self._progress.policy_version,
            reason,
            stage=FailureStage.LEARNER if outcome is GroupOutcome.FAILED else "",
        )


def _trace_dropped(group: Dropped) -> None:
    outcome = group.verdict.outcome.value
    tracing.record("learner.drop", group.group_id, time.time(), outcome=outcome)


def book_trained(config: RunConfig, group: Group, policy_version: int) -> LedgerEvent:
    """The event that a durable checkpoint holds what this group did to the weights.

    Args:
        policy_version: what the group's update led to.
    """
    turns = group.episode_turns
    return LedgerEvent(
        config.name,
        group.group_id,
        GroupOutcome.TRAINED,
        len(turns),
        policy_version,
        episode_turns=turns,
    )


def book_refused(config: RunConfig, group: Group, policy_version: int) -> LedgerEvent:
    """The event that a group's optimizer step was skipped in an update of which others were taken.

    Args:
        policy_version: what that update led to.
    """
    return LedgerEvent(
        config.name,
        group.group_id,
        GroupOutcome.FAILED,
        len(group.items),
        policy_version,
        NOT_FINITE,
        stage=FailureStage.LEARNER,
    )


def decode_item(payload: bytes, *, needs_teacher: bool) -> ScoredTrajectory:
    """One entry of the learner's stream, which is `scored` or, for methods without a teacher,
    `trajectories`.
    """
    if needs_teacher:
        return codec.decode_scored_trajectory(payload)
    return ScoredTrajectory(codec.decode_trajectory(payload), None)


def compute_group_advantages(
    config: RunConfig, items: Sequence[ScoredTrajectory]
) -> list[npt.NDArray[np.float64]]:
    """Advantage of every turn of every episode of one group, as the run's configuration has it."""
    level = config.method.advantage_level
    # The rollout has taken an episode's penalty from its rewards already; only one per turn is left
    # to the learner.
    penalty = config.environment.invalid_action_penalty if level == "turn" else 0.0
    return compute_advantages([item.trajectory for item in items], level, penalty)
