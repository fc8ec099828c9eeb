"""Owns the bus inside one process: the twin of `RedisBus` for tests and single-process use.

One instance is shared by everybody who would share a Redis; `close` therefore keeps it usable. It lives on one event loop and
holds everything in memory, so nothing survives the process.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

from sdar.contracts.errors import CapacityError
from sdar.contracts.streams import BROADCAST_MAX_ENTRIES, ConsumerGroup, Stream
from sdar.runtime.bus import (
    BEFORE_FIRST,
    DEAD_LETTERS_MAX_ENTRIES,
    BusLimits,
    Consumers,
    DeadLetter,
    Delivery,
    Entry,
    Publications,
    StreamLag,
    Wiring,
    format_capacity_message,
    parse_entry_id,
)

_Id = tuple[int, int]


@dataclass(slots=True)
class _Claim:
    consumer: str
    claimed_at_s: float
    num_deliveries: int


@dataclass(slots=True)
class _Group:
    last_delivered: _Id = (0, 0)
    pending: dict[_Id, _Claim] = field(default_factory=dict)


@dataclass(slots=True)
class _Log:
    """One stream: its entries by id, oldest first, and where its groups stand."""

    entries: dict[_Id, bytes] = field(default_factory=dict)
    last_id: _Id = (0, 0)
    groups: dict[ConsumerGroup, _Group] = field(default_factory=dict)

    def append(self, payload: bytes) -> None:
        milliseconds = max(int(time.time() * 1000), self.last_id[0])
        self.last_id = (milliseconds, self.last_id[1] + 1 if milliseconds == self.last_id[0] else 0)
        self.entries[self.last_id] = payload

    def after(self, entry_id: _Id) -> list[_Id]:
        return [other for other in self.entries if other > entry_id]

    def drop_before(self, floor: _Id) -> int:
        finished = [entry_id for entry_id in self.entries if entry_id < floor]
        for entry_id in finished:
            del self.entries[entry_id]
        return len(finished)


class MemoryBus:
    """`Bus` in memory.

    Args:
        consumers: the groups that consume each stream in this run.
        limits: bounds on entries and waits; trimming happens at every acknowledgement.
    """

    def __init__(self, consumers: Consumers, limits: BusLimits | None = None) -> None:
        self._wiring = Wiring(consumers)
        self._limits = limits or BusLimits()
        self._logs = {stream: _Log() for stream in Stream}
        for stream, groups in self._wiring.groups.items():
            self._logs[stream].groups = {group: _Group() for group in groups}
        self._states: dict[str, bytes] = {}
        self._dead_letters: deque[DeadLetter] = deque(maxlen=DEAD_LETTERS_MAX_ENTRIES)
        self._changed = asyncio.Event()

    async def publish(self, stream: Stream, payloads: Sequence[bytes]) -> None:
        await self.commit({stream: payloads})

    async def commit(
        self,
        publications: Publications,
        acknowledgements: Sequence[Delivery] = (),
        state: Mapping[str, bytes] | None = None,
    ) -> None:
        self._wiring.check_publish(publications)
        for stream in self._wiring.bounded(publications):
            if not await self._wait_until(partial(self._has_room, stream), self._limits.publish_timeout_s):
                num_entries = len(self._logs[stream].entries)
                message = format_capacity_message(stream, num_entries, self._limits)
                raise CapacityError(message, stream=stream, num_entries=num_entries)
        self._apply(publications, acknowledgements, state or {})

    async def dead_letter(self, delivery: Delivery, reason: str, publications: Publications | None = None) -> None:
        self._wiring.check_publish(publications or {})
        letter = DeadLetter(
            stream=delivery.stream,
            group=delivery.group,
            entry_id=delivery.entry_id,
            payload=delivery.payload,
            num_deliveries=delivery.num_deliveries,
            reason=reason,
            at_s=time.time(),
        )
        self._dead_letters.append(letter)
        self._apply(publications or {}, [delivery], {})

    def _has_room(self, stream: Stream) -> bool:
        return len(self._logs[stream].entries) < self._limits.max_entries

    def _apply(self, publications: Publications, acknowledgements: Iterable[Delivery], state: Mapping[str, bytes]) -> None:
        """The transaction. Nothing awaits in here, so it is atomic on the event loop."""
        for stream, payloads in publications.items():
            log = self._logs[stream]
            for payload in payloads:
                log.append(payload)
            bound = BROADCAST_MAX_ENTRIES.get(stream, len(log.entries))
            for entry_id in list(islice(log.entries, len(log.entries) - min(bound, len(log.entries)))):
                del log.entries[entry_id]
        self._states.update(state)
        for delivery in acknowledgements:
            self._logs[delivery.stream].groups[delivery.group].pending.pop(parse_entry_id(delivery.entry_id), None)
        self._trim({delivery.stream for delivery in acknowledgements})
        self._changed.set()
        self._changed = asyncio.Event()

    async def read(
        self, stream: Stream, group: ConsumerGroup, consumer: str, max_count: int, block_s: float = 0.0
    ) -> list[Delivery]:
        self._wiring.check_group(stream, group)
        log = self._logs[stream]
        position = log.groups[group]
        await self._wait_until(lambda: log.last_id > position.last_delivered, block_s)
        deliveries = []
        for entry_id in log.after(position.last_delivered)[:max_count]:
            position.last_delivered = entry_id
            position.pending[entry_id] = _Claim(consumer, time.monotonic(), 1)
            deliveries.append(Delivery(stream, group, consumer, _format(entry_id), log.entries[entry_id]))
        return deliveries

    async def reclaim(
        self,
        stream: Stream,
        group: ConsumerGroup,
        consumer: str,
        min_idle_s: float,
        max_count: int,
        after_id: str = BEFORE_FIRST,
    ) -> list[Delivery]:
        self._wiring.check_group(stream, group)
        log, now, floor = self._logs[stream], time.monotonic(), parse_entry_id(after_id)
        deliveries: list[Delivery] = []
        for entry_id, claim in log.groups[group].pending.items():
            if len(deliveries) == max_count:
                break
            if entry_id > floor and now - claim.claimed_at_s >= min_idle_s:
                claim.consumer, claim.claimed_at_s = consumer, now
                claim.num_deliveries += 1
                payload = log.entries[entry_id]
                deliveries.append(Delivery(stream, group, consumer, _format(entry_id), payload, claim.num_deliveries))
        return deliveries

    async def renew(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        held = []
        for delivery in deliveries:
            claim = self._logs[delivery.stream].groups[delivery.group].pending.get(parse_entry_id(delivery.entry_id))
            if claim is not None and claim.consumer == delivery.consumer:
                claim.claimed_at_s = time.monotonic()
                held.append(delivery)
        return held

    async def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        await self.commit({}, deliveries)

    async def tail(self, stream: Stream, after_id: str, max_count: int, block_s: float = 0.0) -> list[Entry]:
        log, floor = self._logs[stream], parse_entry_id(after_id)
        await self._wait_until(lambda: log.last_id > floor, block_s)
        return [Entry(_format(entry_id), log.entries[entry_id]) for entry_id in log.after(floor)[:max_count]]

    async def newest(self, stream: Stream) -> Entry | None:
        entries = self._logs[stream].entries
        entry_id = next(reversed(entries), None)
        return None if entry_id is None else Entry(_format(entry_id), entries[entry_id])

    async def list_dead_letters(self, max_count: int = 100) -> list[DeadLetter]:
        return list(islice(reversed(self._dead_letters), max_count))

    async def count_dead_letters(self) -> int:
        return len(self._dead_letters)

    async def trim(self) -> int:
        return self._trim(self._wiring.groups)

    def _trim(self, streams: Iterable[Stream]) -> int:
        num_removed = 0
        for stream in streams:
            log = self._logs[stream]
            floors = [
                next(iter(group.pending), (group.last_delivered[0], group.last_delivered[1] + 1))
                for group in log.groups.values()
            ]
            num_removed += log.drop_before(min(floors))
        return num_removed

    async def stream_lag(self, stream: Stream, group: ConsumerGroup) -> StreamLag:
        self._wiring.check_group(stream, group)
        log = self._logs[stream]
        position = log.groups[group]
        undelivered = log.after(position.last_delivered)
        oldest_ms = min((entry_id[0] for entry_id in (*islice(position.pending, 1), *undelivered[:1])), default=None)
        age_s = 0.0 if oldest_ms is None else max(0.0, time.time() - oldest_ms / 1e3)
        return StreamLag(len(undelivered), len(position.pending), age_s)

    async def save_state(self, name: str, value: bytes) -> None:
        await self.commit({}, state={name: value})

    async def load_state(self, name: str) -> bytes | None:
        return self._states.get(name)

    async def ping(self) -> None:
        """Memory is always there."""

    async def close(self) -> None:
        """Others may still use this instance; there is nothing to release."""

    async def _wait_until(self, predicate: Callable[[], bool], timeout_s: float) -> bool:
        # Not asyncio.wait_for: before Python 3.12 it can swallow a cancellation.
        try:
            async with asyncio.timeout(timeout_s):
                while not predicate():
                    await self._changed.wait()
        except TimeoutError:
            return predicate()
        return True


def _format(entry_id: _Id) -> str:
    return f"{entry_id[0]}-{entry_id[1]}"
