"""Owns the message bus as services see it: the `Bus` protocol and the records it deals in.

Delivery is at least once and in order of publication. What a service must know:

- An entry belongs to a consumer from `read` until it is acknowledged. A consumer that dies leaves its entries pending; they
  reach another one through `reclaim`. Work that lasts longer than the group's `min_idle_s` keeps its claim with `renew`.
- `commit` publishes outputs and acknowledges inputs in one transaction: a crash before it repeats work, none loses it.
- A producer that repeats a transaction whose reply was lost publishes twice, so consumers are idempotent.
- A full stream makes its producers wait. Nothing is dropped, except from the broadcast streams, which keep the newest entries.

It never looks into a payload. Implementations: `sdar.runtime.redis_bus.RedisBus`, `sdar.runtime.memory_bus.MemoryBus`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from sdar.contracts.errors import ConfigurationError
from sdar.contracts.streams import BROADCAST_MAX_ENTRIES, ConsumerGroup, Stream

Publications = Mapping[Stream, Sequence[bytes]]
Consumers = Mapping[Stream, Sequence[ConsumerGroup]]

BEFORE_FIRST = "0-0"
"""The entry id that every entry comes after."""

DEAD_LETTERS_MAX_ENTRIES = 10_000
"""The newest dead letters kept. Each is also an error in the log, so an older one is not the only trace of its entry."""


@dataclass(frozen=True, slots=True)
class BusLimits:
    """Bounds of one bus.

    Attributes:
        max_entries: a group-consumed stream with this many entries, acknowledged-and-trimmed ones not counted, makes producers
            wait. The bound is soft by one commit per producer. It must exceed what a consumer holds unacknowledged in normal
            work (the learner: everything trained since the last checkpoint).
        publish_timeout_s: how long a producer waits for room before `CapacityError`.
        trim_interval_s: least time between two trims of a stream by one bus.
        outage_tolerance_s: how long an unreachable Redis is retried before `BusUnavailableError`.
    """

    max_entries: int = 10_000
    publish_timeout_s: float = 120.0
    trim_interval_s: float = 1.0
    outage_tolerance_s: float = 15.0

    def __post_init__(self) -> None:
        if self.max_entries < 1 or min(self.publish_timeout_s, self.trim_interval_s, self.outage_tolerance_s) < 0:
            raise ConfigurationError(f"Bus limits {self}: max_entries must be at least 1 and no time negative.")


@dataclass(frozen=True, slots=True)
class Delivery:
    """One entry lent to one consumer. `num_deliveries` is 1 at first and grows with each reclaim."""

    stream: Stream
    group: ConsumerGroup
    consumer: str
    entry_id: str
    payload: bytes
    num_deliveries: int = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry read without a group."""

    entry_id: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An entry that a group gave up on, with the reason. `at_s` is Unix time."""

    stream: Stream
    group: ConsumerGroup
    entry_id: str
    payload: bytes
    num_deliveries: int
    reason: str
    at_s: float


@dataclass(frozen=True, slots=True)
class StreamLag:
    """How far a group is behind: entries never delivered, entries delivered but not acknowledged, age of the oldest of both."""

    num_undelivered: int
    num_pending: int
    oldest_age_s: float


class Bus(Protocol):
    """A run's streams and small durable states. Every call raises `BusUnavailableError` when the server stays unreachable."""

    async def publish(self, stream: Stream, payloads: Sequence[bytes]) -> None:
        """Append all payloads, or none, in order; return when the server has them. Same as `commit` with nothing else."""

    async def commit(
        self,
        publications: Publications,
        acknowledgements: Sequence[Delivery] = (),
        state: Mapping[str, bytes] | None = None,
    ) -> None:
        """Publish outputs, acknowledge inputs and save states in one transaction.

        Waits while a published stream is full.

        Raises:
            CapacityError: still full after `publish_timeout_s`; nothing was published or acknowledged.
            ConfigurationError: a published stream has no consumer in this run.
        """

    async def read(
        self, stream: Stream, group: ConsumerGroup, consumer: str, max_count: int, block_s: float = 0.0
    ) -> list[Delivery]:
        """Up to `max_count` entries new to the group, oldest first; waits up to `block_s` for the first."""

    async def reclaim(
        self,
        stream: Stream,
        group: ConsumerGroup,
        consumer: str,
        min_idle_s: float,
        max_count: int,
        after_id: str = BEFORE_FIRST,
    ) -> list[Delivery]:
        """Take over pending entries that nobody renewed for `min_idle_s`, oldest first, of any consumer, this one included.

        A group's only consumer passes 0 after a restart to have everything again, and pages with the last entry's `after_id`.
        """

    async def renew(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Restart the idle clock of deliveries still being worked on; returns those that this consumer still holds."""

    async def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """The group is done with these entries. Acknowledging again is harmless."""

    async def dead_letter(self, delivery: Delivery, reason: str, publications: Publications | None = None) -> None:
        """Set an entry aside with its reason, acknowledge it and publish (the ledger's FAILED event), in one transaction."""

    async def list_dead_letters(self, max_count: int = 100) -> list[DeadLetter]:
        """The newest dead letters, newest first."""

    async def count_dead_letters(self) -> int:
        """Dead letters kept, at most `DEAD_LETTERS_MAX_ENTRIES`."""

    async def tail(self, stream: Stream, after_id: str, max_count: int, block_s: float = 0.0) -> list[Entry]:
        """Entries after `after_id` (at first `BEFORE_FIRST` or `newest`), without a group; waits up to `block_s` for one."""

    async def newest(self, stream: Stream) -> Entry | None:
        """The last entry of a stream, None if it is empty."""

    async def trim(self) -> int:
        """Remove entries that every group of their stream has acknowledged; returns how many. Commits do this now and then."""

    async def stream_lag(self, stream: Stream, group: ConsumerGroup) -> StreamLag:
        """How far the group is behind on the stream."""

    async def save_state(self, name: str, value: bytes) -> None:
        """Keep a small durable value under the run's name for it."""

    async def load_state(self, name: str) -> bytes | None:
        """The last saved value, None if there is none."""

    async def ping(self) -> None:
        """Returns if the server answers."""

    async def close(self) -> None:
        """Release connections. What was read and not acknowledged stays pending."""


class Wiring:
    """Which groups consume which stream in this run; refuses calls that contradict it. Shared by the implementations."""

    def __init__(self, consumers: Consumers) -> None:
        self.groups: dict[Stream, tuple[ConsumerGroup, ...]] = {s: tuple(groups) for s, groups in consumers.items() if groups}
        for stream in self.groups:
            if stream in BROADCAST_MAX_ENTRIES:
                raise ConfigurationError(
                    f"Stream {stream} is broadcast and takes no consumer groups, got {self.groups[stream]}. Use tail()."
                )

    def check_publish(self, publications: Publications) -> None:
        for stream, payloads in publications.items():
            if payloads and stream not in self.groups and stream not in BROADCAST_MAX_ENTRIES:
                raise ConfigurationError(
                    f"Publishing to {stream}: no group consumes it in this run, so its entries would never leave. "
                    "Declare its consumers when the bus is built, or do not publish.",
                    stream=stream,
                )

    def check_group(self, stream: Stream, group: ConsumerGroup) -> None:
        if group not in self.groups.get(stream, ()):
            raise ConfigurationError(
                f"Group {group} does not consume stream {stream} in this run (declared: {self.groups.get(stream, ())}). "
                "Declare it when the bus is built; undeclared groups are not protected from trimming.",
                stream=stream,
                group=group,
            )

    def bounded(self, publications: Publications) -> list[Stream]:
        """The published streams whose producers wait when they are full."""
        return [stream for stream, payloads in publications.items() if payloads and stream in self.groups]


def parse_entry_id(entry_id: str) -> tuple[int, int]:
    """(milliseconds, sequence) of an entry id such as `1700000000000-3`; these order entries."""
    milliseconds, _, sequence = entry_id.partition("-")
    return int(milliseconds), int(sequence or 0)


def format_capacity_message(stream: Stream, num_entries: int, limits: BusLimits) -> str:
    return (
        f"Stream {stream} holds {num_entries} entries its consumers have not finished (max_entries {limits.max_entries}) and "
        f"made no room in {limits.publish_timeout_s:g} s. Check that its consumers run and keep up, or raise the bound."
    )
