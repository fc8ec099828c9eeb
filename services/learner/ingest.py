"""Owns the way from stream entries to batches of whole groups: completion, duplicates, staleness, zero-signal groups.

`GroupBuffer` decides and does no I/O; `GroupSource` reads the stream and writes what was decided. An entry of a group that will
be trained stays unacknowledged: the main loop acknowledges it when a checkpoint holds its effect. Everything else is
acknowledged in the transaction that tells the ledger why. What is held is bounded by the gateway's admission.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import structlog

from sdar.algorithms.advantages import compute_advantages, has_signal
from sdar.algorithms.methods import get_method
from sdar.config import RunConfig
from sdar.contracts import codec
from sdar.contracts.errors import SdarError
from sdar.contracts.streams import ConsumerGroup, Stream
from sdar.contracts.types import GroupOutcome, LedgerEvent, Purpose, ScoredTrajectory
from sdar.runtime.bus import BEFORE_FIRST, Bus, Delivery
from services.learner.progress import REMEMBERED_UPDATES, Progress

log = structlog.get_logger()

_BLOCK_S = 0.25
"""Longest wait for an entry before the main loop looks whether it should stop."""


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Episodes of one task from one attempt, in the order of their index, and the stream entries that brought them."""

    group_id: str
    items: tuple[ScoredTrajectory, ...]
    deliveries: tuple[Delivery, ...]

    @property
    def payloads(self) -> list[bytes]:
        return [delivery.payload for delivery in self.deliveries]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a group won't be trained."""

    outcome: GroupOutcome
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Dropped:
    """A group that won't be trained, with every entry it brought."""

    group_id: str
    verdict: Verdict
    deliveries: tuple[Delivery, ...]


@dataclass(slots=True)
class IngestCounts:
    """What became of groups since the counts were last taken."""

    num_skipped: int = 0
    num_stale: int = 0
    num_cancelled: int = 0
    num_failed: int = 0
    num_duplicates: int = 0

    def take(self) -> IngestCounts:
        taken = IngestCounts(self.num_skipped, self.num_stale, self.num_cancelled, self.num_failed, self.num_duplicates)
        self.num_skipped = self.num_stale = self.num_cancelled = self.num_failed = self.num_duplicates = 0
        return taken


@dataclass(slots=True)
class _Partial:
    """Episodes of one attempt at a group so far, by episode index."""

    items: dict[int, tuple[ScoredTrajectory, Delivery]] = field(default_factory=dict)

    def to_group(self, group_id: str) -> Group:
        pairs = [self.items[index] for index in sorted(self.items)]
        return Group(group_id, tuple(item for item, _ in pairs), tuple(delivery for _, delivery in pairs))


class GroupBuffer:
    """Groups on their way to a batch, oldest arrival first."""

    def __init__(self) -> None:
        self._partial: dict[tuple[str, int], _Partial] = {}
        self._complete: dict[str, Group] = {}

    @property
    def num_complete(self) -> int:
        return len(self._complete)

    @property
    def num_partial(self) -> int:
        return len(self._partial)

    def add(self, item: ScoredTrajectory, delivery: Delivery) -> list[Delivery]:
        """Take one episode in; returns entries that are superfluous and may be acknowledged at once.

        The first attempt at a group that is complete wins. A duplicate is superfluous because the entry that it repeats stays
        pending.
        """
        trajectory = item.trajectory
        key = (trajectory.group_id, trajectory.attempt)
        partial = self._partial.setdefault(key, _Partial())
        if trajectory.group_id in self._complete or trajectory.episode_index in partial.items:
            if not partial.items:
                del self._partial[key]
            return [delivery]
        partial.items[trajectory.episode_index] = (item, delivery)
        if len(partial.items) < trajectory.group_size:
            return []
        self._complete[trajectory.group_id] = self._partial.pop(key).to_group(trajectory.group_id)
        return [d for group in self._pop_partial(trajectory.group_id) for d in group.deliveries]

    def drop(self, group_id: str) -> list[Delivery]:
        """Forget a group; returns its entries."""
        groups = self._pop_partial(group_id)
        if group_id in self._complete:
            groups.append(self._complete.pop(group_id))
        return [delivery for group in groups for delivery in group.deliveries]

    def drop_where(self, judge: Callable[[Group, bool], Verdict | None]) -> list[Dropped]:
        """Take out the groups that `judge(group, is_complete)` gives a verdict on; it sees the last attempt."""
        newest = {group_id: partial.to_group(group_id) for (group_id, _), partial in sorted(self._partial.items(), key=_by_key)}
        verdicts = {group.group_id: judge(group, True) for group in self._complete.values()}
        verdicts |= {group_id: judge(group, False) for group_id, group in newest.items()}
        return [
            Dropped(group_id, verdict, tuple(self.drop(group_id)))
            for group_id, verdict in verdicts.items()
            if verdict is not None
        ]

    def take(self, count: int) -> list[Group] | None:
        """The `count` groups that were complete first, or None if there are fewer."""
        if len(self._complete) < count:
            return None
        return [self._complete.pop(group_id) for group_id in list(self._complete)[:count]]

    def _pop_partial(self, group_id: str) -> list[Group]:
        keys = [key for key in self._partial if key[0] == group_id]
        return [self._partial.pop(key).to_group(group_id) for key in keys]


def _by_key(entry: tuple[tuple[str, int], _Partial]) -> tuple[str, int]:
    return entry[0]


class GroupSource:
    """Reads the learner's input stream and yields batches."""

    def __init__(self, config: RunConfig, bus: Bus, consumer: str, vocabulary_size: int) -> None:
        self.counts = IngestCounts()
        self.buffer = GroupBuffer()
        self._config = config
        self._bus = bus
        self._consumer = consumer
        self._vocabulary_size = vocabulary_size
        self._method = get_method(config.method.name)
        self._stream = Stream.SCORED if self._method.needs_teacher else Stream.TRAJECTORIES
        self._max_count = config.training.groups_per_update * config.training.group_size
        self._progress = Progress()
        self._finished: deque[str] = deque(maxlen=REMEMBERED_UPDATES * config.training.groups_per_update)
        self._finished_ids: set[str] = set()
        self._durable_ids: frozenset[str] = frozenset()

    async def reclaim(self, progress: Progress) -> None:
        """After a start: have again what an earlier life read and did not acknowledge.

        Entries that the checkpoint holds are acknowledged, and the ledger is told again, in case the crash came before.
        """
        self._progress = progress
        self._durable_ids = frozenset(group_id for group_ids in progress.trained_groups for group_id in group_ids)
        self._finish(group_id for group_ids in progress.trained_groups for group_id in group_ids)
        after_id, num_entries = BEFORE_FIRST, 0
        while page := await self._bus.reclaim(
            self._stream, ConsumerGroup.LEARNER, self._consumer, 0.0, self._max_count, after_id
        ):
            after_id, num_entries = page[-1].entry_id, num_entries + len(page)
            await self._accept(page)
        if num_entries:
            log.info("entries_reclaimed", num_entries=num_entries, num_groups=self.buffer.num_complete)

    async def next_batch(
        self, progress: Progress, stopping: asyncio.Event, beat: Callable[[], None] = lambda: None
    ) -> list[Group] | None:
        """The next groups to train on, none staler than the bound at this moment; None when asked to stop first.

        Args:
            beat: called at every look at the stream: waiting long is not being dead.
        """
        self._progress = progress
        while not stopping.is_set():
            beat()
            await self._settle(self.buffer.drop_where(self._judge))
            if groups := self.buffer.take(self._config.training.groups_per_update):
                self._finish(group.group_id for group in groups)
                return groups
            await self._read()
        return None

    async def cancel_all(self, reason: str) -> None:
        """Close every group that is here or arrives now as CANCELLED: there is no update left for it."""
        await self._read()
        await self._settle(self.buffer.drop_where(lambda *_: Verdict(GroupOutcome.CANCELLED, reason)))

    async def _read(self) -> None:
        await self._accept(
            await self._bus.read(self._stream, ConsumerGroup.LEARNER, self._consumer, self._max_count, block_s=_BLOCK_S)
        )

    async def _accept(self, deliveries: Sequence[Delivery]) -> None:
        superfluous: list[Delivery] = []
        trained_before: set[str] = set()
        for delivery in deliveries:
            try:
                item = self._decode(delivery.payload)
            except SdarError as error:
                await self._bus.dead_letter(delivery, str(error))
                log.error("entry_unreadable", entry_id=delivery.entry_id, error=str(error))
                continue
            group_id = item.trajectory.group_id
            if group_id in self._finished_ids:
                superfluous.append(delivery)
                trained_before |= {group_id} & self._durable_ids
            elif reason := self._find_fault(item):
                await self._refuse(item, delivery, reason)
            else:
                superfluous += self.buffer.add(item, delivery)
        if superfluous:
            self.counts.num_duplicates += len(superfluous)
            events = [self._event(group_id, GroupOutcome.TRAINED, "before a restart", 0) for group_id in sorted(trained_before)]
            await self._bus.commit({Stream.LEDGER: [codec.encode_ledger_event(event) for event in events]}, superfluous)

    def _decode(self, payload: bytes) -> ScoredTrajectory:
        return decode_item(payload, needs_teacher=self._method.needs_teacher)

    def _find_fault(self, item: ScoredTrajectory) -> str:
        """Why an entry would break or poison an update; empty if it would not."""
        trajectory = item.trajectory
        largest = max(
            int(tokens.max(initial=0))
            for turn in trajectory.turns
            for tokens in (turn.prompt_token_ids, turn.response_token_ids)
        )
        faults = {
            f"run_id is {trajectory.run_id!r}, not {self._config.name!r}": trajectory.run_id != self._config.name,
            "an evaluation episode is never trained on": trajectory.purpose is not Purpose.TRAIN,
            "the teacher score is missing": self._method.needs_teacher and item.score is None,
            f"token id {largest} is outside the vocabulary of {self._vocabulary_size}": largest >= self._vocabulary_size,
            "a turn has an empty prompt": any(not len(turn.prompt_token_ids) for turn in trajectory.turns),
        }
        return "; ".join(text for text, is_so in faults.items() if is_so)

    async def _refuse(self, item: ScoredTrajectory, delivery: Delivery, reason: str) -> None:
        """Set one entry aside; its group can never be whole again, so it fails as a whole."""
        group_id = item.trajectory.group_id
        others = self.buffer.drop(group_id)
        self._finish([group_id])
        event = self._event(group_id, GroupOutcome.FAILED, f"{item.trajectory.trajectory_id}: {reason}", 0)
        await self._bus.dead_letter(delivery, reason, {Stream.LEDGER: [codec.encode_ledger_event(event)]})
        await self._bus.acknowledge(others)
        self.counts.num_failed += 1
        log.error("trajectory_refused", trajectory_id=item.trajectory.trajectory_id, reason=reason)

    def _judge(self, group: Group, is_complete: bool) -> Verdict | None:
        """STALE or SKIPPED, or None for a group that may be trained (or completed) now."""
        training, progress = self._config.training, self._progress
        staleness = progress.compute_group_staleness(group.items)
        if staleness > training.max_staleness:
            here = "" if is_complete else f", {len(group.items)} of {group.items[0].trajectory.group_size} episodes here"
            return Verdict(GroupOutcome.STALE, f"oldest token {staleness} updates behind, bound {training.max_staleness}{here}")
        lag_bound = training.max_staleness + self._config.teacher.max_lag
        lag = max((progress.compute_staleness(i.score.teacher_version) for i in group.items if i.score is not None), default=0)
        if lag > lag_bound:
            return Verdict(GroupOutcome.STALE, f"teacher {lag} updates behind, bound {lag_bound}")
        is_skipping = training.skip_zero_signal and not self._method.learns_without_advantage
        if is_complete and is_skipping and not self._has_signal(group):
            return Verdict(GroupOutcome.SKIPPED, "every episode scored the same")
        return None

    def _has_signal(self, group: Group) -> bool:
        return has_signal(compute_group_advantages(self._config, group.items))

    async def _settle(self, dropped: Sequence[Dropped]) -> None:
        """Tell the ledger about groups that won't be trained and acknowledge their entries, in one transaction."""
        if not dropped:
            return
        events = [self._event(d.group_id, d.verdict.outcome, d.verdict.reason, len(d.deliveries)) for d in dropped]
        await self._bus.commit(
            {Stream.LEDGER: [codec.encode_ledger_event(event) for event in events]},
            [delivery for group in dropped for delivery in group.deliveries],
        )
        self._finish(group.group_id for group in dropped)
        for event in events:
            self.counts.num_stale += event.outcome is GroupOutcome.STALE
            self.counts.num_skipped += event.outcome is GroupOutcome.SKIPPED
            self.counts.num_cancelled += event.outcome is GroupOutcome.CANCELLED
        log.info("groups_dropped", num_groups=len(events), first=f"{events[0].outcome}: {events[0].reason}")

    def _finish(self, group_ids: Iterable[str]) -> None:
        """Remember that these groups need nothing more; the oldest are forgotten in their order."""
        for group_id in group_ids:
            if len(self._finished) == self._finished.maxlen:
                self._finished_ids.discard(self._finished[0])
            self._finished.append(group_id)
            self._finished_ids.add(group_id)

    def _event(self, group_id: str, outcome: GroupOutcome, reason: str, num_trajectories: int) -> LedgerEvent:
        version = self._progress.policy_version
        return LedgerEvent(self._config.name, group_id, outcome, num_trajectories, version, reason)


def decode_item(payload: bytes, *, needs_teacher: bool) -> ScoredTrajectory:
    """One entry of the learner's stream, which is `scored` or, for methods without a teacher, `trajectories`."""
    if needs_teacher:
        return codec.decode_scored_trajectory(payload)
    return ScoredTrajectory(codec.decode_trajectory(payload), None)


def compute_group_advantages(config: RunConfig, items: Sequence[ScoredTrajectory]) -> list[npt.NDArray[np.float64]]:
    """Advantage of every turn of every episode of one group, as the run's configuration has it."""
    level = config.method.advantage_level
    # The rollout has taken an episode's penalty from its rewards already; only one per turn is left to the learner.
    penalty = config.environment.invalid_action_penalty if level == "turn" else 0.0
    return compute_advantages([item.trajectory for item in items], level, penalty)
