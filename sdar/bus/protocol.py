"""The message bus as services see it: the `Bus` protocol and the records it deals in.

Delivery is at least once and in order of publication; the effect of a commit is exactly once. What
a service must know:

- An entry is leased to a consumer from `read` until it is acknowledged. A consumer that dies leaves
  its entries pending; they reach another one through `reclaim`, as another attempt. Work longer
  than `min_idle_s` keeps its lease with `renew`.
- `commit` publishes outputs, acknowledges inputs, saves states and books transitions of groups in
  one transaction: a crash before it repeats work, none loses it. It is refused whole
  (`LeaseLostError`) when an input is not held any more: the late results of an attempt that was
  taken for dead never get in.
- A commit whose reply was lost is repeated under the same id and applied once.
- A role that only one process may hold is claimed (`claim_role`); a process that another one has
  superseded is refused (`SupersededError`) from then on, so a learner or gateway that comes back
  from a pause cannot write beside its successor.
- A full stream makes its producers wait, and so does a Redis that is away or out of memory. Nothing
  is dropped, except from the broadcast streams, which keep the newest entries.

It never looks into a payload. Implementations: `sdar.bus.redis.RedisBus`,
`sdar.in_process.memory_bus.MemoryBus`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from sdar.bus.ledger import LedgerAccount
from sdar.contracts.errors import (
    ConfigurationError,
    CorruptionError,
    InvalidInputError,
    LeaseLostError,
    SupersededError,
)
from sdar.contracts.streams import BROADCAST_MAX_ENTRIES, ConsumerGroup, Stream
from sdar.contracts.types import GroupOutcome, LedgerEvent

Publications = Mapping[Stream, Sequence[bytes]]
Consumers = Mapping[Stream, Sequence[ConsumerGroup]]

BEFORE_FIRST = "0-0"
"""The entry id that every entry comes after."""

SUSPECT_FACTOR = 3
"""How many times `min_idle_s` a silent consumer is waited for that is still connected.

It may only be paused, and would come back to find its work given away.
"""

DEAD_LETTERS_MAX_ENTRIES = 10_000
"""The newest dead letters kept. Older ones go; each was also an error in the log."""

# Redis' ids are two unsigned numbers of 64 bits; any 19 digits fit.
_ENTRY_ID = re.compile(r"\d{1,19}-\d{1,19}", re.ASCII)


@dataclass(frozen=True, slots=True)
class BusLimits:
    """Bounds of one bus.

    Attributes:
        max_entries: a group-consumed stream with this many entries, acknowledged-and-trimmed ones
            not counted, makes producers wait. The bound is soft by one commit per producer. It must
            exceed what a consumer holds unacknowledged in normal work (the learner: everything
            trained since the last checkpoint).
        publish_timeout_s: how long a producer waits for room before `CapacityError`.
        trim_interval_s: least time between two trims of a stream by one bus.
        outage_tolerance_s: how long an unreachable Redis is retried before `BusUnavailableError`.
            One that answers and refuses writes (out of memory or disk) is waited for without bound:
            a restart of the service would not help.
    """

    max_entries: int = 10_000
    publish_timeout_s: float = 120.0
    trim_interval_s: float = 1.0
    outage_tolerance_s: float = 180.0

    def __post_init__(self) -> None:
        times = (self.publish_timeout_s, self.trim_interval_s, self.outage_tolerance_s)
        if self.max_entries < 1 or min(times) < 0:
            raise ConfigurationError(
                f"Bus limits {self}: max_entries must be at least 1 and no time negative."
            )


@dataclass(frozen=True, slots=True)
class Delivery:
    """One entry lent to one consumer; `num_deliveries` is 1 at first, and one more a reclaim."""

    stream: Stream
    group: ConsumerGroup
    consumer: str
    entry_id: str
    payload: bytes
    num_deliveries: int = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry read without a consumer group."""

    entry_id: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An entry that a consumer group gave up on, with the reason.

    Attributes:
        letter_id: names the letter, and orders letters by age.
        at_s: Unix time at which it was set aside.
    """

    letter_id: str
    stream: Stream
    group: ConsumerGroup
    entry_id: str
    payload: bytes
    num_deliveries: int
    reason: str
    at_s: float


@dataclass(frozen=True, slots=True)
class StreamLag:
    """How far a consumer group is behind.

    Attributes:
        num_undelivered: entries that no consumer was given.
        num_pending: entries that were delivered and are not acknowledged.
        oldest_age_s: age of the oldest of both; 0 without any.
    """

    num_undelivered: int
    num_pending: int
    oldest_age_s: float


@dataclass(frozen=True, slots=True)
class BusMemory:
    """What the server holds and may hold, bytes; `max_bytes` is 0 where it has no bound."""

    used_bytes: int
    max_bytes: int


class Bus(Protocol):
    """A run's streams, its account of groups and small durable states.

    Every call raises `BusUnavailableError` when the server stays unreachable. In a process that has
    claimed a role, every call that writes, takes entries or takes a snapshot raises
    `SupersededError` once another one has claimed it, and `CorruptionError` once the server came
    back empty: then the process must start again, to restore its checkpoint's snapshot.
    """

    async def publish(self, stream: Stream, payloads: Sequence[bytes]) -> None:
        """Append all payloads, or none, in order; return when the server has them. Same as `commit`
        with nothing else.
        """

    async def commit(
        self,
        publications: Publications,
        acknowledgements: Sequence[Delivery] = (),
        state: Mapping[str, bytes] | None = None,
        transitions: Sequence[LedgerEvent] = (),
        retired_letters: Sequence[str] = (),
    ) -> None:
        """Publish outputs, acknowledge inputs, save states, book transitions, remove dead letters:
        one transaction.

        A transition that the account has already seen, or that comes after the group's end, changes
        nothing. Each that changes something, ISSUED aside, becomes one entry of `Stream.LEDGER`; of
        groups without an account (an evaluation's) all do. Waits while a published stream is full.
        Transitions do not wait: as many as there are groups, which admission bounds.

        Raises:
            LeaseLostError: something is published, saved or booked on the strength of an input this
                consumer does not hold any more, or a letter is gone; nothing was done.
            CapacityError: still full after `publish_timeout_s`; nothing was done.
            ConfigurationError: a published stream has no consumer in this run.
        """

    async def claim_role(self, role: ConsumerGroup) -> None:
        """Be the only process that writes as `role` (learner, gateway) through this bus.

        That holds until another process claims it, which supersedes this one.
        """

    async def read(
        self,
        stream: Stream,
        group: ConsumerGroup,
        consumer: str,
        max_count: int,
        block_s: float = 0.0,
    ) -> list[Delivery]:
        """Up to `max_count` entries new to the consumer group, oldest first.

        Waits up to `block_s` for the first.
        """

    async def reclaim(
        self,
        stream: Stream,
        group: ConsumerGroup,
        consumer: str,
        min_idle_s: float,
        max_count: int,
        after_id: str = BEFORE_FIRST,
        held_by: str | None = None,
    ) -> list[Delivery]:
        """Take over pending entries of consumers confirmed dead, oldest first, as another attempt.

        `after_id` begins the next page: the id of the last entry of the page before.

        An entry that nobody renewed for `min_idle_s` makes its consumer suspect. It is confirmed
        dead when no connection of its name is left at the server, and taken for dead, connected or
        not, after `SUSPECT_FACTOR` times `min_idle_s`. With `min_idle_s` 0 everything is taken: by
        a role's only process after a restart, or, with `held_by` naming this consumer, what an
        earlier life of it left.
        """

    async def renew(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Restart the idle clock of deliveries still being worked on.

        Returns those that this consumer still holds.
        """

    async def hand_back(self, deliveries: Sequence[Delivery]) -> None:
        """Give up what this consumer still holds of these.

        Whoever reclaims next gets it, at once, as another attempt.
        """

    async def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """The consumer group is done with these entries.

        Harmless for those that this consumer does not hold any more.
        """

    async def dead_letter(
        self, delivery: Delivery, reason: str, transitions: Sequence[LedgerEvent] = ()
    ) -> None:
        """Set an entry aside with its reason, acknowledge it and book what that means for its task
        group, in one transaction.

        Raises LeaseLostError if the entry is not held any more.
        """

    async def list_dead_letters(
        self, max_count: int = 100, before_id: str | None = None
    ) -> list[DeadLetter]:
        """The newest dead letters, newest first; with `before_id` those before that one."""

    async def find_dead_letter(self, letter_id: str) -> DeadLetter | None:
        """One dead letter, None if it is gone."""

    async def count_dead_letters(self) -> int:
        """Dead letters kept, at most `DEAD_LETTERS_MAX_ENTRIES`."""

    async def tail(
        self, stream: Stream, after_id: str, max_count: int, block_s: float = 0.0
    ) -> list[Entry]:
        """Entries after `after_id` (at first `BEFORE_FIRST` or `newest`), to follow a stream.

        Without a consumer group; waits up to `block_s` for one entry.
        """

    async def newest(self, stream: Stream) -> Entry | None:
        """The last entry of a stream, None if it is empty."""

    async def trim(self) -> int:
        """Remove entries that every consumer group of their stream has acknowledged.

        Returns how many. Commits do this now and then.
        """

    async def stream_lag(self, stream: Stream, group: ConsumerGroup) -> StreamLag:
        """How far the consumer group is behind on the stream."""

    async def read_ledger(self) -> LedgerAccount:
        """The account of training task groups as of one moment."""

    async def list_closed(self, outcome: GroupOutcome) -> list[int]:
        """Numbers of all task groups that this outcome closed, ascending."""

    async def take_snapshot(self) -> bytes:
        """States and account as of one moment, for a checkpoint that must survive the loss of the
        server's disk.
        """

    async def restore_snapshot(self, snapshot: bytes, trained: Collection[int]) -> bool:
        """Put a snapshot into a server that has no account yet; returns whether it had none.

        What was on its way is lost with the server's streams. So task groups that were open are
        closed, those in `trained` as TRAINED and all others as CANCELLED, and the state
        `snapshot.RESTORATION` gets a new value.

        Raises CorruptionError if it cannot be read.
        """

    async def pin_versions(self, reader: str, versions: Collection[int], ttl_s: float) -> bool:
        """Declare the policy versions that `reader` holds or begins to load, in place of those
        before, for `ttl_s`.

        Returns False, and changes nothing, if one of them is retired: it is being deleted.
        """

    async def retire_versions(self, versions: Collection[int]) -> bool:
        """Mark all these versions as going to be deleted, unless a reader holds one of them.

        Returns whether they are marked: all of them, or none.
        """

    async def memory(self) -> BusMemory:
        """How much memory the server uses."""

    async def save_state(self, name: str, value: bytes) -> None:
        """Keep a small durable value under the run's name for it."""

    async def load_state(self, name: str) -> bytes | None:
        """The last saved value, None if there is none."""

    async def ping(self) -> None:
        """Returns if the server answers."""

    async def hurry(self, stopping: asyncio.Event) -> None:
        """To be run beside a service's main loops, until `stopping` is set.

        From then on no call waits for long for a server that is away or full.
        """

    async def close(self) -> None:
        """Release connections. What was read and not acknowledged stays pending."""


class Wiring:
    """Which consumer groups read which stream in this run; refuses calls that contradict it.

    The implementations share it.
    """

    def __init__(self, consumers: Consumers) -> None:
        self.groups: dict[Stream, tuple[ConsumerGroup, ...]] = {
            s: tuple(groups) for s, groups in consumers.items() if groups
        }
        for stream in self.groups:
            # A broadcast stream keeps its newest entries, whoever has read them or not.
            if stream in BROADCAST_MAX_ENTRIES:
                raise ConfigurationError(
                    f"Stream {stream} is broadcast and takes no consumer groups, got "
                    f"{self.groups[stream]}. Use tail()."
                )

    def check_publish(self, publications: Publications) -> None:
        for stream, payloads in publications.items():
            if payloads and stream not in self.groups and stream not in BROADCAST_MAX_ENTRIES:
                raise ConfigurationError(
                    f"Publishing to {stream}: no group consumes it in this run, so its entries "
                    "would never leave. Declare its consumers when the bus is built, or do not "
                    "publish.",
                    stream=stream,
                )

    def check_transitions(self, transitions: Sequence[LedgerEvent]) -> None:
        if transitions and Stream.LEDGER not in self.groups:
            raise ConfigurationError(
                f"Booking transitions of groups: no group consumes {Stream.LEDGER} in this run, so "
                "its entries would never leave. Declare its consumer when the bus is built.",
                stream=Stream.LEDGER,
            )

    def check_group(self, stream: Stream, group: ConsumerGroup) -> None:
        if group not in self.groups.get(stream, ()):
            raise ConfigurationError(
                f"Group {group} does not consume stream {stream} in this run (declared: "
                f"{self.groups.get(stream, ())}). Declare it when the bus is built; undeclared "
                "groups are not protected from trimming.",
                stream=stream,
                group=group,
            )

    def bounded(self, publications: Publications) -> list[Stream]:
        """The published streams whose producers wait when they are full."""
        return [
            stream
            for stream, payloads in publications.items()
            if payloads and stream in self.groups
        ]


def parse_entry_id(entry_id: str) -> tuple[int, int]:
    """(milliseconds, sequence) of an entry id such as `1700000000000-3`; these order entries."""
    milliseconds, _, sequence = entry_id.partition("-")
    return int(milliseconds), int(sequence or 0)


def is_entry_id(text: str) -> bool:
    """Whether `text` has the form of an entry's or a dead letter's id; it may come from a user."""
    return _ENTRY_ID.fullmatch(text) is not None


def check_letter_id(letter_id: str) -> str:
    if not is_entry_id(letter_id):
        raise InvalidInputError(
            f"{letter_id[:40]!r} is no id of a dead letter; those look like 1700000000000-0."
        )
    return letter_id


def has_effects(
    publications: Publications,
    state: Mapping[str, bytes],
    transitions: Sequence[LedgerEvent],
    retired_letters: Sequence[str],
) -> bool:
    """Whether a commit does more than acknowledge.

    Then it needs the leases of what it acknowledges: an attempt that lost its lease may still say
    that it is done, but it may bring nothing in.
    """
    return bool(any(publications.values()) or state or transitions or retired_letters)


def build_lease_error(delivery: Delivery) -> LeaseLostError:
    return LeaseLostError(
        f"Entry {delivery.entry_id} of {delivery.stream} is no longer lent to {delivery.consumer} "
        f"as attempt {delivery.num_deliveries}: it was given to another one, or finished. Nothing "
        "was written; drop this work.",
        stream=delivery.stream,
        entry_id=delivery.entry_id,
    )


def build_letter_error(letter_id: str) -> LeaseLostError:
    return LeaseLostError(
        f"There is no dead letter {letter_id} any more. Nothing was written.", letter_id=letter_id
    )


def build_role_error(role: ConsumerGroup) -> SupersededError:
    return SupersededError(
        f"Another process has taken over the role of {role}. Nothing was written; end this one.",
        role=role,
    )


def build_emptied_error(role: ConsumerGroup) -> CorruptionError:
    return CorruptionError(
        f"Redis came back without this run's data: nobody holds the role of {role} there, and this "
        "process did. Start it again: the run goes on from the newest checkpoint. Give Redis a "
        "disk and an append-only file to keep more.",
        role=role,
    )


def format_capacity_message(stream: Stream, num_entries: int, limits: BusLimits) -> str:
    return (
        f"Stream {stream} holds {num_entries} entries its consumers have not finished (max_entries "
        f"{limits.max_entries}) and made no room in {limits.publish_timeout_s:g} s. Check that its "
        "consumers run and keep up, or raise the bound."
    )
