"""A bus in the memory of one process that behaves like `RedisBus`, for tests and in-process runs.

One instance is shared by all who would share a Redis; `close` therefore keeps it usable. To
distinguish several processes (two learners, a consumer that dies), give each a `view()` of its own.
It lives on one event loop and holds everything in memory, so nothing survives the process.
"""

from __future__ import annotations

import asyncio
import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

from sdar.bus.ledger import LedgerAccount, parse_group_number
from sdar.bus.protocol import (
    BEFORE_FIRST,
    DEAD_LETTERS_MAX_ENTRIES,
    SUSPECT_FACTOR,
    BusLimits,
    BusMemory,
    Consumers,
    DeadLetter,
    Delivery,
    Entry,
    Publications,
    StreamLag,
    Wiring,
    build_emptied_error,
    build_lease_error,
    build_letter_error,
    build_role_error,
    check_letter_id,
    format_capacity_message,
    has_effects,
    is_entry_id,
    parse_entry_id,
)
from sdar.bus.snapshot import BusSnapshot, decode_snapshot, encode_snapshot
from sdar.contracts.codec import encode_ledger_event
from sdar.contracts.errors import CapacityError
from sdar.contracts.streams import BROADCAST_MAX_ENTRIES, ConsumerGroup, Stream
from sdar.contracts.types import GroupOutcome, LedgerEvent

_Id = tuple[int, int]


@dataclass(slots=True)
class _Claim:
    """The lease of an entry: who has it, since when, and its attempt's number."""

    consumer: str
    claimed_at_s: float
    num_deliveries: int

    def take(self, consumer: str, now_s: float) -> None:
        self.consumer = consumer
        self.claimed_at_s = now_s
        # A new attempt: what the earlier holder commits for its own is refused from now on.
        self.num_deliveries += 1


@dataclass(slots=True)
class _Group:
    """Where a consumer group stands; `pending` are the leases, in the order of the entries."""

    last_delivered: _Id = (0, 0)
    pending: dict[_Id, _Claim] = field(default_factory=dict)


@dataclass(slots=True)
class _Log:
    """One stream: its entries by id, oldest first, and where its groups stand."""

    entries: dict[_Id, bytes] = field(default_factory=dict)
    last_id: _Id = (0, 0)
    groups: dict[ConsumerGroup, _Group] = field(default_factory=dict)

    def append(self, payload: bytes) -> None:
        self.last_id = _next_id(self.last_id)
        self.entries[self.last_id] = payload

    def after(self, entry_id: _Id) -> list[_Id]:
        return [other for other in self.entries if other > entry_id]

    def drop_before(self, floor: _Id) -> int:
        finished = [entry_id for entry_id in self.entries if entry_id < floor]
        for entry_id in finished:
            del self.entries[entry_id]
        return len(finished)


@dataclass(slots=True)
class _Store:
    """What all handles of one bus share, as processes share a Redis."""

    wiring: Wiring
    logs: dict[Stream, _Log]
    states: dict[str, bytes] = field(default_factory=dict)
    account: LedgerAccount = field(default_factory=LedgerAccount)
    letters: dict[_Id, DeadLetter] = field(default_factory=dict)
    last_letter_id: _Id = (0, 0)
    tenures: dict[ConsumerGroup, object] = field(default_factory=dict)
    connections: Counter[str] = field(default_factory=Counter)
    pins: dict[str, tuple[float, frozenset[int]]] = field(default_factory=dict)
    retired: set[int] = field(default_factory=set)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def is_held(self, delivery: Delivery) -> bool:
        """Whether this is the newest attempt at its entry, and its consumer still has it."""
        pending = self.logs[delivery.stream].groups[delivery.group].pending
        claim = pending.get(parse_entry_id(delivery.entry_id))
        if claim is None or claim.consumer != delivery.consumer:
            return False
        return claim.num_deliveries == delivery.num_deliveries


class MemoryBus:
    """`Bus` in memory. One class because `Bus` is one protocol over one store.

    Args:
        consumers: the groups that consume each stream in this run.
        limits: bounds on entries and waits; trimming happens at every acknowledgement.
    """

    def __init__(self, consumers: Consumers, limits: BusLimits | None = None) -> None:
        wiring = Wiring(consumers)
        logs = {}
        for stream in Stream:
            groups = {group: _Group() for group in wiring.groups.get(stream, ())}
            logs[stream] = _Log(groups=groups)
        self._limits = limits or BusLimits()
        self._store = _Store(wiring, logs)
        self._name = ""
        self._held_tenures: dict[ConsumerGroup, object] = {}

    def view(self, client_name: str = "") -> MemoryBus:
        """Another process's handle on this bus.

        It claims roles for itself, and is connected as `client_name` until `close`.
        """
        view = copy.copy(self)
        view._name = client_name
        view._held_tenures = {}
        self._store.connections[client_name] += bool(client_name)
        return view

    async def publish(self, stream: Stream, payloads: Sequence[bytes]) -> None:
        await self.commit({stream: payloads})

    async def commit(
        self,
        publications: Publications,
        acknowledgements: Sequence[Delivery] = (),
        state: Mapping[str, bytes] | None = None,
        transitions: Sequence[LedgerEvent] = (),
        retired_letters: Sequence[str] = (),
    ) -> None:
        self._store.wiring.check_publish(publications)
        self._store.wiring.check_transitions(transitions)
        await self._wait_for_room(publications)
        # From here on nothing awaits: what is checked still holds when it is applied.
        held = self._check_fences(
            acknowledgements,
            has_effects(publications, state or {}, transitions, retired_letters),
            retired_letters,
        )
        self._apply(publications, held, state or {}, transitions)
        for letter_id in retired_letters:
            self._store.letters.pop(parse_entry_id(letter_id), None)

    async def _wait_for_room(self, publications: Publications) -> None:
        for stream in self._store.wiring.bounded(publications):
            has_room = partial(self._has_room, stream)
            if not await self._wait_until(has_room, self._limits.publish_timeout_s):
                num_entries = len(self._store.logs[stream].entries)
                message = format_capacity_message(stream, num_entries, self._limits)
                raise CapacityError(message, stream=stream, num_entries=num_entries)

    async def claim_role(self, role: ConsumerGroup) -> None:
        # A fresh object is equal to no other: whoever held the role before holds another one.
        self._held_tenures[role] = self._store.tenures[role] = object()

    async def dead_letter(
        self, delivery: Delivery, reason: str, transitions: Sequence[LedgerEvent] = ()
    ) -> None:
        store = self._store
        store.wiring.check_transitions(transitions)
        self._check_fences([delivery], needs_leases=True)
        store.last_letter_id = _next_id(store.last_letter_id)
        store.letters[store.last_letter_id] = DeadLetter(
            letter_id=_format(store.last_letter_id),
            stream=delivery.stream,
            group=delivery.group,
            entry_id=delivery.entry_id,
            payload=delivery.payload,
            num_deliveries=delivery.num_deliveries,
            reason=reason,
            at_s=time.time(),
        )
        if len(store.letters) > DEAD_LETTERS_MAX_ENTRIES:
            del store.letters[next(iter(store.letters))]
        self._apply({}, [delivery], {}, transitions)

    def _has_room(self, stream: Stream) -> bool:
        return len(self._store.logs[stream].entries) < self._limits.max_entries

    def _check_role(self) -> None:
        for role, tenure in self._held_tenures.items():
            if role not in self._store.tenures:
                raise build_emptied_error(role)
            if self._store.tenures[role] is not tenure:
                raise build_role_error(role)

    def _check_fences(
        self,
        acknowledgements: Sequence[Delivery],
        needs_leases: bool,
        retired_letters: Sequence[str] = (),
    ) -> list[Delivery]:
        """The acknowledgements that are held. Nothing awaits between this and the transaction."""
        self._check_role()
        held = [delivery for delivery in acknowledgements if self._store.is_held(delivery)]
        if needs_leases and len(held) < len(acknowledgements):
            raise build_lease_error(
                next(delivery for delivery in acknowledgements if delivery not in held)
            )
        for letter_id in retired_letters:
            if not is_entry_id(letter_id) or parse_entry_id(letter_id) not in self._store.letters:
                raise build_letter_error(letter_id)
        return held

    def _apply(
        self,
        publications: Publications,
        acknowledgements: Iterable[Delivery],
        state: Mapping[str, bytes],
        transitions: Sequence[LedgerEvent],
    ) -> None:
        """The transaction. Nothing awaits in here, so it is atomic on the event loop."""
        for stream, payloads in publications.items():
            self._append(stream, payloads)
        booked = [event for event in transitions if self._book(event)]
        self._append(Stream.LEDGER, list(map(encode_ledger_event, booked)))
        self._store.states.update(state)
        for delivery in acknowledgements:
            pending = self._store.logs[delivery.stream].groups[delivery.group].pending
            pending.pop(parse_entry_id(delivery.entry_id), None)
        self._trim({delivery.stream for delivery in acknowledgements})
        # Wakes everybody who waits, each of whom looks for itself; the next wait is for the next.
        self._store.changed.set()
        self._store.changed = asyncio.Event()

    def _append(self, stream: Stream, payloads: Sequence[bytes]) -> None:
        log = self._store.logs[stream]
        for payload in payloads:
            log.append(payload)
        bound = BROADCAST_MAX_ENTRIES.get(stream, len(log.entries))
        num_over = max(0, len(log.entries) - bound)
        for entry_id in list(islice(log.entries, num_over)):
            del log.entries[entry_id]

    def _book(self, event: LedgerEvent) -> bool:
        """Book a transition; returns whether it belongs into the journal."""
        number = parse_group_number(event.group_id)
        # Evaluation groups are not in the account.
        if number is None:
            return True
        return (
            self._store.account.apply(number, event.outcome)
            and event.outcome is not GroupOutcome.ISSUED
        )

    async def read(
        self,
        stream: Stream,
        group: ConsumerGroup,
        consumer: str,
        max_count: int,
        block_s: float = 0.0,
    ) -> list[Delivery]:
        self._store.wiring.check_group(stream, group)
        log = self._store.logs[stream]
        position = log.groups[group]
        await self._wait_until(lambda: log.last_id > position.last_delivered, block_s)
        # After the wait, in which another process may have taken the role.
        self._check_role()
        deliveries = []
        for entry_id in log.after(position.last_delivered)[:max_count]:
            position.last_delivered = entry_id
            position.pending[entry_id] = _Claim(consumer, time.monotonic(), 1)
            deliveries.append(
                Delivery(stream, group, consumer, _format(entry_id), log.entries[entry_id])
            )
        return deliveries

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
        self._store.wiring.check_group(stream, group)
        self._check_role()
        log = self._store.logs[stream]
        now = time.monotonic()
        floor = parse_entry_id(after_id)
        deliveries: list[Delivery] = []
        for entry_id, claim in log.groups[group].pending.items():
            if len(deliveries) == max_count:
                break
            is_wanted = entry_id > floor and held_by in (None, claim.consumer)
            if is_wanted and self._is_reclaimable(claim, now - claim.claimed_at_s, min_idle_s):
                claim.take(consumer, now)
                number, payload = claim.num_deliveries, log.entries[entry_id]
                deliveries.append(
                    Delivery(stream, group, consumer, _format(entry_id), payload, number)
                )
        return deliveries

    def _is_reclaimable(self, claim: _Claim, idle_s: float, min_idle_s: float) -> bool:
        """Whether the holder has been idle for long enough; one that is connected gets longer."""
        if idle_s < min_idle_s:
            return False
        is_connected = bool(min_idle_s and self._store.connections[claim.consumer])
        return not is_connected or idle_s >= SUSPECT_FACTOR * min_idle_s

    async def renew(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        return self._set_claimed_at(deliveries, time.monotonic())

    async def hand_back(self, deliveries: Sequence[Delivery]) -> None:
        # Idle for ever, so that whoever reclaims next may have it at once.
        self._set_claimed_at(deliveries, -math.inf)

    def _set_claimed_at(
        self, deliveries: Sequence[Delivery], claimed_at_s: float
    ) -> list[Delivery]:
        held = [delivery for delivery in deliveries if self._store.is_held(delivery)]
        for delivery in held:
            pending = self._store.logs[delivery.stream].groups[delivery.group].pending
            pending[parse_entry_id(delivery.entry_id)].claimed_at_s = claimed_at_s
        return held

    async def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        await self.commit({}, deliveries)

    async def tail(
        self, stream: Stream, after_id: str, max_count: int, block_s: float = 0.0
    ) -> list[Entry]:
        log, floor = self._store.logs[stream], parse_entry_id(after_id)
        await self._wait_until(lambda: log.last_id > floor, block_s)
        return [
            Entry(_format(entry_id), log.entries[entry_id])
            for entry_id in log.after(floor)[:max_count]
        ]

    async def newest(self, stream: Stream) -> Entry | None:
        entries = self._store.logs[stream].entries
        entry_id = next(reversed(entries), None)
        return None if entry_id is None else Entry(_format(entry_id), entries[entry_id])

    async def list_dead_letters(
        self, max_count: int = 100, before_id: str | None = None
    ) -> list[DeadLetter]:
        bound = parse_entry_id(check_letter_id(before_id)) if before_id is not None else None
        older = (
            letter
            for letter_id, letter in reversed(self._store.letters.items())
            if bound is None or letter_id < bound
        )
        return list(islice(older, max_count))

    async def find_dead_letter(self, letter_id: str) -> DeadLetter | None:
        return (
            self._store.letters.get(parse_entry_id(letter_id)) if is_entry_id(letter_id) else None
        )

    async def count_dead_letters(self) -> int:
        return len(self._store.letters)

    async def trim(self) -> int:
        return self._trim(self._store.wiring.groups)

    def _trim(self, streams: Iterable[Stream]) -> int:
        num_removed = 0
        for stream in streams:
            log = self._store.logs[stream]
            # An entry may go once every group has acknowledged it: up to a group's oldest lease, or
            # through its last delivery where it has none.
            floors = [
                next(iter(group.pending), (group.last_delivered[0], group.last_delivered[1] + 1))
                for group in log.groups.values()
            ]
            num_removed += log.drop_before(min(floors))
        return num_removed

    async def stream_lag(self, stream: Stream, group: ConsumerGroup) -> StreamLag:
        self._store.wiring.check_group(stream, group)
        log = self._store.logs[stream]
        position = log.groups[group]
        undelivered = log.after(position.last_delivered)
        oldest_ms = min(
            (entry_id[0] for entry_id in (*islice(position.pending, 1), *undelivered[:1])),
            default=None,
        )
        age_s = 0.0 if oldest_ms is None else max(0.0, time.time() - oldest_ms / 1e3)
        return StreamLag(len(undelivered), len(position.pending), age_s)

    async def read_ledger(self) -> LedgerAccount:
        account = self._store.account
        return LedgerAccount(
            account.num_issued, account.num_generated, dict(account.closed), dict(account.open)
        )

    async def list_closed(self, outcome: GroupOutcome) -> list[int]:
        return sorted(
            number for number, ending in self._store.account.ended.items() if ending is outcome
        )

    async def take_snapshot(self) -> bytes:
        self._check_role()
        return encode_snapshot(BusSnapshot(self._store.states, self._store.account))

    async def restore_snapshot(self, snapshot: bytes, trained: Collection[int]) -> bool:
        restored = decode_snapshot(snapshot)
        self._check_role()
        if self._store.account.num_issued:
            return False
        restored.begin_again(trained)
        self._store.states.update(restored.states)
        self._store.account = restored.account
        return True

    async def pin_versions(self, reader: str, versions: Collection[int], ttl_s: float) -> bool:
        if self._store.retired & set(versions):
            return False
        self._store.pins[reader] = (time.monotonic() + ttl_s, frozenset(versions))
        return True

    async def retire_versions(self, versions: Collection[int]) -> bool:
        self._check_role()
        now = time.monotonic()
        if any(
            expires_at > now and pinned & set(versions)
            for expires_at, pinned in self._store.pins.values()
        ):
            return False
        self._store.retired.update(versions)
        return True

    async def memory(self) -> BusMemory:
        num_bytes = 0
        for log in self._store.logs.values():
            num_bytes += sum(len(payload) for payload in log.entries.values())
        return BusMemory(used_bytes=num_bytes, max_bytes=0)

    async def save_state(self, name: str, value: bytes) -> None:
        await self.commit({}, state={name: value})

    async def load_state(self, name: str) -> bytes | None:
        return self._store.states.get(name)

    async def ping(self) -> None:
        """Memory is always there."""

    async def hurry(self, stopping: asyncio.Event) -> None:
        await stopping.wait()

    async def close(self) -> None:
        """Others may still use what this handle shares; only its name goes."""
        if self._name:
            self._store.connections[self._name] -= 1
            self._name = ""

    async def _wait_until(self, predicate: Callable[[], bool], timeout_s: float) -> bool:
        # Not asyncio.wait_for: before Python 3.12 it can swallow a cancellation.
        try:
            async with asyncio.timeout(timeout_s):
                while not predicate():
                    await self._store.changed.wait()
        except TimeoutError:
            return predicate()
        return True


def _next_id(last_id: _Id) -> _Id:
    # As Redis: never below the last one, though the clock may be set back.
    milliseconds = max(int(time.time() * 1000), last_id[0])
    return milliseconds, last_id[1] + 1 if milliseconds == last_id[0] else 0


def _format(entry_id: _Id) -> str:
    return f"{entry_id[0]}-{entry_id[1]}"
