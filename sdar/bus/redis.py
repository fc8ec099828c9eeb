"""Owns the bus over Redis Streams. It speaks to one Redis (6.2 or newer) and looks into no payload
but the account's.

How the protocol's promises are kept:

- One script per commit (`redis_scripts.COMMIT`), applied whole or not at all. Its id leaves a mark
  that outlives every retry: a commit whose reply was lost is recognised when it comes again.
- Leases are the groups' pending lists: consumer and delivery count of an entry must still be those
  of the delivery.
- Capacity is known from the length that each commit brings back, so a commit that finds room costs
  one round trip.
- Trimming goes up to the oldest entry that some group has not acknowledged, declared or merely
  existing in Redis. A group that does not exist yet has acknowledged nothing.
- Outages and a Redis without room are waited out: `redis_connection`.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from redis import exceptions as redis_errors
from redis.commands.core import AsyncScript

from sdar.bus import redis_scripts
from sdar.bus.ledger import CLOSING, LedgerAccount, parse_group_number
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
from sdar.bus.redis_connection import Command, OnBlocked, RedisConnection, format_client_name
from sdar.bus.snapshot import (
    BusSnapshot,
    build_account,
    decode_snapshot,
    encode_snapshot,
    unpack_numbers,
)
from sdar.contracts.codec import encode_ledger_event
from sdar.contracts.errors import CapacityError
from sdar.contracts.streams import BROADCAST_MAX_ENTRIES, ConsumerGroup, RunKeys, Stream
from sdar.contracts.types import GroupOutcome, LedgerEvent

_Argument = str | bytes | int | float
_Reader = tuple[Stream, ConsumerGroup, str]

_PAYLOAD = b"p"
_MAX_BLOCK_S = 5.0
"""Longest single blocking read: well under the reply timeout, so that a silent server and a quiet
stream look different.
"""
_PAGE = 256
_FIRST_POLL_S, _MAX_POLL_S = 0.01, 0.25
_LEAST_MARK_S = 600.0
"""Least life of a commit's mark. It is longer than any retry of one reply goes on."""
_BUFFERED = b"b"
_HANDED_BACK_MS = 24 * 3600 * 1000
"""An idle time beyond all doubt: longer than any consumer is waited for."""
_FORGET_AFTER_S = 3600.0
"""Pods come and go under ever new names. A name that holds nothing and was silent for so long is
forgotten.
"""


class RedisBus:
    """`Bus` over Redis Streams. Connects at the first call.

    Args:
        url: redis://, rediss:// or unix:// address.
        run_id: prefix of every key.
        consumers: the groups that consume each stream in this run; the same in every process of the
            run.
        limits: bounds on entries and waits.
        client_name: the consumer name that this process reads under. While it is connected, others
            take it for alive.
        on_blocked: called with a reason at every retry while Redis is away or full, and with ""
            when that is over.
    """

    def __init__(
        self,
        url: str,
        run_id: str,
        consumers: Consumers,
        limits: BusLimits | None = None,
        *,
        client_name: str = "",
        on_blocked: OnBlocked | None = None,
    ) -> None:
        self._run_id = run_id
        self._keys = RunKeys(run_id)
        self._wiring = Wiring(consumers)
        self._limits = limits or BusLimits()
        self._known_length: dict[Stream, int] = {}
        self._next_trim_at: dict[Stream, float] = {}
        self._next_forgetting_at: dict[Stream, float] = {}
        self._tenures: dict[ConsumerGroup, int] = {}
        self._last_read: dict[_Reader, str] = {}
        self._interrupted_reads: set[_Reader] = set()
        name = format_client_name(run_id, client_name) if client_name else ""
        self._connection = RedisConnection(url, name, self._limits.outage_tolerance_s, on_blocked)
        self._redis = self._connection.client
        self._scripts: dict[str, AsyncScript] = {}
        self._run = self._connection.run
        self._send = self._connection.send

    # --- publishing
    # ----------------------------------------------------------------------------------------------

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
        self._wiring.check_publish(publications)
        self._wiring.check_transitions(transitions)
        for stream in self._wiring.bounded(publications):
            await self._wait_for_room(stream)
        # Before the transaction: a trim that fails after it would make a commit that happened look
        # as if it had not.
        await self._trim_now_and_then({delivery.stream for delivery in acknowledgements})
        await self._transact(
            publications, acknowledgements, state or {}, transitions, retired_letters
        )

    async def dead_letter(
        self, delivery: Delivery, reason: str, transitions: Sequence[LedgerEvent] = ()
    ) -> None:
        self._wiring.check_transitions(transitions)
        await self._transact({}, [delivery], {}, transitions, dead_letters=[(delivery, reason)])

    async def claim_role(self, role: ConsumerGroup) -> None:
        await self._connection.check_eviction()
        self._tenures[role] = int(
            await self._run_script(redis_scripts.CLAIM_ROLE, _Request([self._keys.tenure(role)]))
        )

    async def _transact(
        self,
        publications: Publications,
        acknowledgements: Sequence[Delivery],
        state: Mapping[str, bytes],
        transitions: Sequence[LedgerEvent] = (),
        retired_letters: Sequence[str] = (),
        dead_letters: Sequence[tuple[Delivery, str]] = (),
    ) -> None:
        for letter_id in retired_letters:
            if not is_entry_id(letter_id):
                raise build_letter_error(letter_id)
        bounded = self._wiring.bounded(publications)
        request = _Request(self._name_commit_keys())
        request.add_list([request.index(self._keys.stream(stream))] for stream in bounded)
        request.add(int(1000 * max(_LEAST_MARK_S, 2 * self._limits.outage_tolerance_s)))
        self._add_roles(request)
        request.add(
            int(
                bool(dead_letters) or has_effects(publications, state, transitions, retired_letters)
            )
        )
        request.add_list(
            (
                request.index(self._keys.stream(lent.stream)),
                lent.group,
                lent.consumer,
                lent.entry_id,
                lent.num_deliveries,
            )
            for lent in acknowledgements
        )
        request.add_list([letter_id] for letter_id in retired_letters)
        request.add_list(
            (
                request.index(self._keys.stream(stream)),
                BROADCAST_MAX_ENTRIES.get(stream, ""),
                len(payloads),
                *payloads,
            )
            for stream, payloads in publications.items()
        )
        request.add_list(state.items())
        request.add_list(
            (_format_number(event), event.outcome, encode_ledger_event(event))
            for event in transitions
        )
        request.add_list(
            (DEAD_LETTERS_MAX_ENTRIES, *_count(_dead_letter_fields(delivery, reason)))
            for delivery, reason in dead_letters
        )
        status, *details = await self._run_in_role(redis_scripts.COMMIT, request)
        if status == b"lost":
            raise build_lease_error(acknowledgements[details[0]])
        if status == b"gone":
            raise build_letter_error(details[0].decode())
        self._known_length.update(zip(bounded, details, strict=True))

    def _name_commit_keys(self) -> list[str]:
        """The keys that every commit has, in the order of `redis_scripts.COMMIT`, under a new
        commit's id.
        """
        names = self._keys
        mark = names.commit(secrets.token_hex(8))
        closed = [names.closed_groups(outcome) for outcome in CLOSING]
        account = [names.ledger(), names.open_groups(), names.stream(Stream.LEDGER)]
        return [mark, names.states(), names.dead_letters(), *account, *closed]

    def _add_roles(self, request: _Request) -> None:
        request.add_list(
            (request.index(self._keys.tenure(role)), role, tenure)
            for role, tenure in self._tenures.items()
        )

    async def _run_in_role(self, script: str, request: _Request) -> list[Any]:
        """The reply of a script that checks the roles: a status and more."""
        return _check_roles(await self._run_script(script, request))

    async def _run_script(self, script: str, request: _Request) -> Any:
        return await self._run(lambda: self._call_script(script, request))

    async def _call_script(self, script: str, request: _Request) -> Any:
        # A registered script is sent by its digest, and whole to a server that does not know it
        # (any more).
        if script not in self._scripts:
            self._scripts[script] = self._redis.register_script(script)
        return await self._scripts[script](request.keys, request.arguments)

    async def _wait_for_room(self, stream: Stream) -> None:
        """Returns when the stream is below its bound; trims it while waiting, for its consumers
        trim only now and then.
        """
        max_entries, poll_s = self._limits.max_entries, _FIRST_POLL_S
        deadline = time.monotonic() + self._limits.publish_timeout_s
        while self._known_length.get(stream, 0) >= max_entries:
            await self._trim_streams([stream])
            length = int(await self._run(lambda: self._redis.xlen(self._keys.stream(stream))))
            self._known_length[stream] = length
            if length < max_entries:
                return
            if time.monotonic() >= deadline:
                raise CapacityError(
                    format_capacity_message(stream, length, self._limits),
                    stream=stream,
                    num_entries=length,
                )
            await asyncio.sleep(poll_s)
            poll_s = min(2 * poll_s, _MAX_POLL_S)

    # --- consuming
    # ----------------------------------------------------------------------------------------------

    async def read(
        self,
        stream: Stream,
        group: ConsumerGroup,
        consumer: str,
        max_count: int,
        block_s: float = 0.0,
    ) -> list[Delivery]:
        self._wiring.check_group(stream, group)
        reader = (stream, group, consumer)
        deadline = time.monotonic() + block_s
        while True:
            block_ms = _to_block_ms(deadline - time.monotonic())

            async def read_once(block_ms: int | None = block_ms) -> Any:
                try:
                    return await self._read_once(reader, max_count, block_ms)
                except BaseException:
                    # Entries may have been lent to this consumer by a reply that never came; see
                    # _read_once.
                    self._interrupted_reads.add(reader)
                    raise

            entries = await self._with_group(stream, group, read_once)
            if entries:
                self._last_read[reader] = _decode(entries[-1][0])
            if entries or time.monotonic() >= deadline:
                return [
                    Delivery(stream, group, consumer, _decode(entry_id), payload)
                    for entry_id, payload in entries
                ]

    async def _read_once(
        self, reader: _Reader, max_count: int, block_ms: int | None
    ) -> list[tuple[bytes, bytes]]:
        """Ids and payloads of new entries: first of those that an interrupted read was lent."""
        if reader in self._interrupted_reads:
            unseen = await self._list_unseen(reader, max_count)
            if unseen:
                return unseen
            self._interrupted_reads.discard(reader)
        if self._tenures:
            return await self._read_in_role(reader, max_count, block_ms)
        stream, group, consumer = reader
        key = self._keys.stream(stream)
        reply: Any = await self._redis.xreadgroup(
            group, consumer, {key: ">"}, count=max_count, block=block_ms
        )
        return [
            (entry_id, fields[_PAYLOAD])
            for _, entries in reply or ()
            for entry_id, fields in entries
        ]

    async def _list_unseen(self, reader: _Reader, max_count: int) -> list[tuple[bytes, bytes]]:
        """Entries lent to this consumer that no read has returned: newer than those, and at their
        first attempt.
        """
        stream, group, consumer = reader
        request = _Request([self._keys.stream(stream)])
        request.add(group, consumer, self._last_read.get(reader, BEFORE_FIRST), max_count)
        entries = await self._call_script(redis_scripts.LIST_UNSEEN, request)
        return [(entry_id, fields[1]) for entry_id, fields in entries]

    async def _read_in_role(
        self, reader: _Reader, max_count: int, block_ms: int | None
    ) -> list[tuple[bytes, bytes]]:
        """As the holder of a role: who is followed in it must not take entries that its successor
        would wait for.
        """
        stream, group, consumer = reader
        key = self._keys.stream(stream)
        request = _Request([key])
        self._add_roles(request)
        request.add(group, consumer, max_count)
        _, entries, *last_id = _check_roles(
            await self._call_script(redis_scripts.READ_IN_ROLE, request)
        )
        if not entries and block_ms is not None:
            # A script cannot block: wait for the entry after the group's last, then take it.
            await self._redis.xread({key: last_id[0]}, count=1, block=block_ms)
            _, entries, *_ = _check_roles(
                await self._call_script(redis_scripts.READ_IN_ROLE, request)
            )
        return [(entry_id, fields[1]) for entry_id, fields in entries]

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
        self._wiring.check_group(stream, group)
        taken: list[Delivery] = []
        while len(taken) < max_count:
            page = await self._list_pending(stream, group, min_idle_s, after_id, held_by)
            if not page:
                break
            after_id = _decode(page[-1]["message_id"])
            dead = await self._select_dead(page, min_idle_s)
            while dead and len(taken) < max_count:
                num_wanted = max_count - len(taken)
                taken += await self._take_over(
                    stream, group, consumer, min_idle_s, dead[:num_wanted]
                )
                dead = dead[num_wanted:]
        return taken

    async def _list_pending(
        self,
        stream: Stream,
        group: ConsumerGroup,
        min_idle_s: float,
        after_id: str,
        held_by: str | None,
    ) -> list[dict[str, Any]]:
        """One page of the entries pending for at least `min_idle_s`: Redis' record of each."""

        async def list_once() -> Any:
            return await self._redis.xpending_range(
                self._keys.stream(stream),
                group,
                idle=int(min_idle_s * 1000),
                min=f"({after_id}",
                max="+",
                count=_PAGE,
                consumername=held_by,
            )

        page: list[dict[str, Any]] = await self._with_group(stream, group, list_once)
        return page

    async def _select_dead(
        self, pending: list[dict[str, Any]], min_idle_s: float
    ) -> list[dict[str, Any]]:
        """Those whose consumers are dead, of entries that have been idle for `min_idle_s`."""
        if not min_idle_s:
            return pending
        witness = await self._connection.fetch_witness()
        if witness.settled_s < min_idle_s:
            # Redis or the network was away, which makes everybody idle and nobody connected. Let
            # them come back and renew.
            return []
        return [
            row
            for row in pending
            if row["time_since_delivered"] >= SUSPECT_FACTOR * min_idle_s * 1000
            or (
                witness.names is not None
                and format_client_name(self._run_id, _decode(row["consumer"])) not in witness.names
            )
        ]

    async def _take_over(
        self,
        stream: Stream,
        group: ConsumerGroup,
        consumer: str,
        min_idle_s: float,
        pending: list[dict[str, Any]],
    ) -> list[Delivery]:
        request = _Request([self._keys.stream(stream)])
        self._add_roles(request)
        request.add(group, consumer, int(min_idle_s * 1000))
        request.add_list((row["message_id"], row["times_delivered"]) for row in pending)
        _, *rows = await self._run_in_role(redis_scripts.RECLAIM, request)
        return [Delivery(stream, group, consumer, row[0].decode(), row[1], row[2]) for row in rows]

    async def renew(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        return await self._set_idle(deliveries, 0)

    async def hand_back(self, deliveries: Sequence[Delivery]) -> None:
        await self._set_idle(deliveries, _HANDED_BACK_MS)

    async def _set_idle(self, deliveries: Sequence[Delivery], idle_ms: int) -> list[Delivery]:
        held: set[Delivery] = set()
        by_holder: defaultdict[tuple[Stream, ConsumerGroup, str], list[Delivery]] = defaultdict(
            list
        )
        for delivery in deliveries:
            by_holder[delivery.stream, delivery.group, delivery.consumer].append(delivery)
        for (stream, group, consumer), lent in by_holder.items():
            request = _Request([self._keys.stream(stream)])
            request.add(group, consumer, idle_ms)
            request.add_list((delivery.entry_id, delivery.num_deliveries) for delivery in lent)
            indices = await self._run_script(redis_scripts.RENEW, request)
            held.update(lent[index] for index in indices)
        return [delivery for delivery in deliveries if delivery in held]

    async def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        await self.commit({}, deliveries)

    async def _with_group(
        self, stream: Stream, group: ConsumerGroup, operation: Callable[[], Awaitable[Any]]
    ) -> Any:
        """Run `operation`; if the group is missing (first use, or Redis was flushed), create it at
        the beginning and repeat.
        """
        while True:
            try:
                return await self._run(operation)
            except redis_errors.ResponseError as error:
                if not _is_missing_group(error):
                    raise
            await self._create_group(stream, group)

    async def _create_group(self, stream: Stream, group: ConsumerGroup) -> None:
        try:
            await self._run(
                lambda: self._redis.xgroup_create(
                    self._keys.stream(stream), group, BEFORE_FIRST, mkstream=True
                )
            )
        except redis_errors.ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise

    # --- reading without a group
    # ------------------------------------------------------------------------------------------

    async def tail(
        self, stream: Stream, after_id: str, max_count: int, block_s: float = 0.0
    ) -> list[Entry]:
        key = self._keys.stream(stream)
        deadline = time.monotonic() + block_s
        while True:
            block_ms = _to_block_ms(deadline - time.monotonic())

            async def read_once(block_ms: int | None = block_ms) -> Any:
                return await self._redis.xread({key: after_id}, count=max_count, block=block_ms)

            reply = await self._run(read_once)
            if reply or time.monotonic() >= deadline:
                return [
                    Entry(entry_id.decode(), fields[_PAYLOAD])
                    for _, entries in reply or ()
                    for entry_id, fields in entries
                ]

    async def newest(self, stream: Stream) -> Entry | None:
        reply = await self._run(lambda: self._redis.xrevrange(self._keys.stream(stream), count=1))
        return Entry(reply[0][0].decode(), reply[0][1][_PAYLOAD]) if reply else None

    async def list_dead_letters(
        self, max_count: int = 100, before_id: str | None = None
    ) -> list[DeadLetter]:
        newest = "+" if before_id is None else f"({check_letter_id(before_id)}"
        reply = await self._run(
            lambda: self._redis.xrevrange(self._keys.dead_letters(), max=newest, count=max_count)
        )
        return [_parse_dead_letter(letter_id, fields) for letter_id, fields in reply]

    async def find_dead_letter(self, letter_id: str) -> DeadLetter | None:
        if not is_entry_id(letter_id):
            return None
        reply = await self._run(
            lambda: self._redis.xrange(self._keys.dead_letters(), letter_id, letter_id)
        )
        return _parse_dead_letter(*reply[0]) if reply else None

    async def count_dead_letters(self) -> int:
        return int(await self._run(lambda: self._redis.xlen(self._keys.dead_letters())))

    # --- housekeeping
    # ----------------------------------------------------------------------------------------------

    async def trim(self) -> int:
        return await self._trim_streams(list(self._wiring.groups))

    async def _trim_now_and_then(self, streams: Iterable[Stream]) -> None:
        now = time.monotonic()
        due = [
            stream
            for stream in streams
            if now >= self._next_trim_at.get(stream, 0.0) and stream in self._wiring.groups
        ]
        for stream in due:
            self._next_trim_at[stream] = now + self._limits.trim_interval_s
        await self._trim_streams(due)
        for stream in due:
            if now >= self._next_forgetting_at.get(stream, 0.0):
                self._next_forgetting_at[stream] = now + _FORGET_AFTER_S
                request = _Request([self._keys.stream(stream)])
                request.add(int(1000 * _FORGET_AFTER_S))
                await self._run_script(redis_scripts.FORGET_CONSUMERS, request)

    async def _trim_streams(self, streams: Sequence[Stream]) -> int:
        floors = {stream: await self._fetch_floor(stream) for stream in streams}
        return sum(
            await self._send(
                [
                    ("XTRIM", self._keys.stream(stream), "MINID", "=", floor)
                    for stream, floor in floors.items()
                    if floor
                ]
            )
        )

    async def _fetch_floor(self, stream: Stream) -> str | None:
        """The oldest entry id that some group still needs, None if nothing can be said to be
        finished.
        """
        groups = await self._fetch_groups(stream)
        if not set(self._wiring.groups[stream]) <= groups.keys():
            return None
        names = [name for name, info in groups.items() if info["pending"]]
        summaries = await self._send(
            [("XPENDING", self._keys.stream(stream), name) for name in names]
        )
        # Groups are read before their pending entries. Whatever is delivered in between only makes
        # the floor too low.
        oldest_pending = {
            name: summary["min"]
            for name, summary in zip(names, summaries, strict=True)
            if summary["min"]
        }
        floors = []
        for name, info in groups.items():
            milliseconds, sequence = parse_entry_id(
                _decode(oldest_pending.get(name, info["last-delivered-id"]))
            )
            floors.append((milliseconds, sequence + (name not in oldest_pending)))
        milliseconds, sequence = min(floors)
        return f"{milliseconds}-{sequence}"

    async def _fetch_groups(self, stream: Stream) -> dict[str, dict[str, Any]]:
        """Redis' record of each group of a stream by name; empty if there is no such stream."""
        try:
            reply = await self._run(lambda: self._redis.xinfo_groups(self._keys.stream(stream)))
        except redis_errors.ResponseError as error:
            if "no such key" not in str(error):
                raise
            return {}
        return {_decode(info["name"]): info for info in reply}

    async def stream_lag(self, stream: Stream, group: ConsumerGroup) -> StreamLag:
        self._wiring.check_group(stream, group)
        key = self._keys.stream(stream)
        info = (await self._fetch_groups(stream)).get(
            group, {"last-delivered-id": BEFORE_FIRST, "pending": 0}
        )
        last_delivered = _decode(info["last-delivered-id"])
        commands: list[Command] = [
            ("TIME",),
            ("XRANGE", key, f"({last_delivered}", "+", "COUNT", 1),
        ]
        commands += [("XPENDING", key, group)] if info["pending"] else []
        (seconds, microseconds), undelivered, *pending = await self._send(commands)
        num_undelivered = info.get("lag") if undelivered else 0
        if num_undelivered is None:
            request = _Request([key])
            request.add(last_delivered)
            num_undelivered = await self._run_script(redis_scripts.COUNT_AFTER, request)
        ids = [entry_id for entry_id, _ in undelivered] + [
            summary["min"] for summary in pending if summary["min"]
        ]
        oldest_ms = min((parse_entry_id(_decode(entry_id))[0] for entry_id in ids), default=None)
        age_s = (
            0.0 if oldest_ms is None else max(0.0, seconds + microseconds / 1e6 - oldest_ms / 1e3)
        )
        return StreamLag(
            int(num_undelivered), sum(summary["pending"] for summary in pending), age_s
        )

    async def save_state(self, name: str, value: bytes) -> None:
        await self.commit({}, state={name: value})

    async def load_state(self, name: str) -> bytes | None:
        value: bytes | None = await self._run(lambda: self._redis.hget(self._keys.states(), name))
        return value

    # --- the account
    # ----------------------------------------------------------------------------------------------

    async def read_ledger(self) -> LedgerAccount:
        numbers, open_groups = await self._read_together(self._account_reads(), in_role=False)
        totals = _parse_numbers(numbers)
        counts = {outcome: totals.get(outcome, 0) for outcome in CLOSING}
        return LedgerAccount(
            totals.get("issued", 0), totals.get("generated", 0), counts, _parse_open(open_groups)
        )

    async def list_closed(self, outcome: GroupOutcome) -> list[int]:
        bitmap = await self._run(lambda: self._redis.get(self._keys.closed_groups(outcome)))
        return unpack_numbers(bitmap or b"")

    async def take_snapshot(self) -> bytes:
        bitmaps = [("GET", self._keys.closed_groups(outcome)) for outcome in CLOSING]
        reads = [*self._account_reads(), ("HGETALL", self._keys.states()), *bitmaps]
        numbers, open_groups, states, *closed = await self._read_together(reads, in_role=True)
        totals, packed = (
            _parse_numbers(numbers),
            {o: bitmap or b"" for o, bitmap in zip(CLOSING, closed, strict=True)},
        )
        account = build_account(
            totals.get("issued", 0), totals.get("generated", 0), _parse_open(open_groups), packed
        )
        return encode_snapshot(
            BusSnapshot({name.decode(): value for name, value in _pairs(states)}, account)
        )

    async def restore_snapshot(self, snapshot: bytes, trained: Collection[int]) -> bool:
        restored = decode_snapshot(snapshot)
        restored.close_open_groups(trained)
        account = restored.account
        totals: dict[str, int] = {"issued": account.num_issued, "generated": account.num_generated}
        totals |= {outcome.value: number for outcome, number in account.closed.items()}
        request = _Request([self._keys.ledger(), self._keys.states()])
        self._add_roles(request)
        request.add_list(
            (request.index(self._keys.closed_groups(outcome)), bitmap)
            for outcome, bitmap in restored.pack_closed().items()
            if bitmap
        )
        request.add_list(totals.items())
        request.add_list(restored.states.items())
        [status] = await self._run_in_role(redis_scripts.RESTORE, request)
        return bool(status == b"done")

    def _account_reads(self) -> list[tuple[str, str]]:
        return [("HGETALL", self._keys.ledger()), ("HGETALL", self._keys.open_groups())]

    async def _read_together(self, reads: Sequence[tuple[str, str]], *, in_role: bool) -> list[Any]:
        """The replies to reading commands of one key each, as of one moment."""
        request = _Request([])
        if in_role:
            self._add_roles(request)
        else:
            request.add_list([])
        request.add_list((command, request.index(key)) for command, key in reads)
        _, *replies = await self._run_in_role(redis_scripts.READ_TOGETHER, request)
        return replies

    # --- versions in use, the server
    # --------------------------------------------------------------------------------------

    async def pin_versions(self, reader: str, versions: Collection[int], ttl_s: float) -> bool:
        request = _Request([self._keys.versions_in_use(), self._keys.versions_retired()])
        request.add(reader, int(ttl_s * 1000))
        request.add_list([version] for version in versions)
        return bool(await self._run_script(redis_scripts.PIN_VERSIONS, request))

    async def retire_versions(self, versions: Collection[int]) -> bool:
        request = _Request([self._keys.versions_in_use(), self._keys.versions_retired()])
        self._add_roles(request)
        request.add_list([version] for version in versions)
        status, *_ = await self._run_in_role(redis_scripts.RETIRE_VERSIONS, request)
        return bool(status == b"done")

    async def memory(self) -> BusMemory:
        info = await self._run(lambda: self._redis.info("memory"))
        return BusMemory(used_bytes=int(info["used_memory"]), max_bytes=int(info["maxmemory"]))

    async def ping(self) -> None:
        await self._run(lambda: self._redis.ping())

    async def hurry(self, stopping: asyncio.Event) -> None:
        """Beside a service's mains: once that is asked to stop, no call waits long for a Redis that
        is away or full.
        """
        await self._connection.hurry(stopping)

    async def close(self) -> None:
        await self._connection.close()


class _Request:
    """Keys and arguments of one script, as its `take` reads them: a list is its length and then its
    items' arguments.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self.keys = list(keys)
        self.arguments: list[_Argument] = []
        self._indices: dict[str, int] = {}

    def index(self, key: str) -> int:
        """The key's index in Lua's KEYS; it is added if it is not there."""
        if key not in self._indices:
            self.keys.append(key)
            self._indices[key] = len(self.keys)
        return self._indices[key]

    def add(self, *arguments: _Argument) -> None:
        self.arguments += arguments

    def add_list(self, items: Iterable[Iterable[_Argument]]) -> None:
        at, num_items = len(self.arguments), 0
        self.arguments.append(0)
        for item in items:
            self.arguments += item
            num_items += 1
        self.arguments[at] = num_items


def _format_number(event: LedgerEvent) -> str:
    """The number of the event's group, "" for one without an account."""
    number = parse_group_number(event.group_id)
    return "" if number is None else str(number)


def _check_roles(reply: list[Any]) -> list[Any]:
    if reply[0] == b"superseded":
        raise build_role_error(ConsumerGroup(reply[1].decode()))
    if reply[0] == b"emptied":
        raise build_emptied_error(ConsumerGroup(reply[1].decode()))
    return reply


def _count(fields: list[_Argument]) -> list[_Argument]:
    return [len(fields), *fields]


def _pairs(flat: Sequence[bytes]) -> Iterable[tuple[bytes, bytes]]:
    """Fields and values of a hash as a script returns it."""
    return zip(flat[::2], flat[1::2], strict=True)


def _parse_numbers(fields: Sequence[bytes]) -> dict[str, int]:
    return {name.decode(): int(number) for name, number in _pairs(fields)}


def _parse_open(fields: Sequence[bytes]) -> dict[int, bool]:
    return {int(number): standing == _BUFFERED for number, standing in _pairs(fields)}


def _decode(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _to_block_ms(remaining_s: float) -> int | None:
    """Redis' BLOCK argument; None does not block (0 would block for ever)."""
    return max(1, int(min(remaining_s, _MAX_BLOCK_S) * 1000)) if remaining_s > 0 else None


def _is_missing_group(reply: object) -> bool:
    # UNBLOCKED: the stream was deleted under a blocking read.
    return isinstance(reply, redis_errors.ResponseError) and str(reply).startswith(
        ("NOGROUP", "UNBLOCKED")
    )


def _dead_letter_fields(delivery: Delivery, reason: str) -> list[_Argument]:
    return [
        *(b"stream", delivery.stream, b"group", delivery.group, b"entry_id", delivery.entry_id),
        *(
            b"num_deliveries",
            delivery.num_deliveries,
            b"reason",
            reason,
            b"at_s",
            time.time(),
            _PAYLOAD,
            delivery.payload,
        ),
    ]


def _parse_dead_letter(letter_id: bytes, fields: Mapping[bytes, bytes]) -> DeadLetter:
    return DeadLetter(
        letter_id=letter_id.decode(),
        stream=Stream(fields[b"stream"].decode()),
        group=ConsumerGroup(fields[b"group"].decode()),
        entry_id=fields[b"entry_id"].decode(),
        payload=fields[_PAYLOAD],
        num_deliveries=int(fields[b"num_deliveries"]),
        reason=fields[b"reason"].decode(),
        at_s=float(fields[b"at_s"]),
    )
