"""The bus over Redis Streams, on one Redis of version 6.2 or newer.

`RedisBus` is the `Bus` of its parts, each of which says how it keeps the protocol's promises:
`redis_committing`, `redis_consuming`, `redis_trimming` and `redis_account`. They share a
`RedisSession`. Outages and a Redis without room are waited out in `redis_connection`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial

from sdar.bus import redis_scripts
from sdar.bus.ledger import LedgerAccount
from sdar.bus.protocol import (
    BEFORE_FIRST,
    BusLimits,
    BusMemory,
    Consumers,
    DeadLetter,
    Delivery,
    Entry,
    Publications,
    StreamLag,
    check_letter_id,
    is_entry_id,
)
from sdar.bus.redis_account import RedisAccount
from sdar.bus.redis_committing import Commit, RedisCommitting, parse_dead_letter
from sdar.bus.redis_connection import OnBlocked, RedisConnection, format_client_name
from sdar.bus.redis_consuming import RedisConsuming, to_block_ms
from sdar.bus.redis_session import PAYLOAD, RedisSession, Request
from sdar.bus.redis_trimming import RedisTrimming
from sdar.contracts.streams import ConsumerGroup, Stream
from sdar.contracts.types import GroupOutcome, LedgerEvent


class RedisBus:
    """`Bus` over Redis Streams. Connects at the first call, and looks into no payload.

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
        limits = limits or BusLimits()
        name = format_client_name(run_id, client_name) if client_name else ""
        connection = RedisConnection(url, name, limits.outage_tolerance_s, on_blocked)
        self._session = RedisSession(connection, run_id, consumers, limits)
        self._trimming = RedisTrimming(self._session)
        self._committing = RedisCommitting(self._session, self._trimming)
        self._consuming = RedisConsuming(self._session)
        self._account = RedisAccount(self._session)
        self._client = self._session.client
        self._keys = self._session.keys
        self._run = self._session.run

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
        self._session.wiring.check_publish(publications)
        self._session.wiring.check_transitions(transitions)
        commit = Commit(
            publications=publications,
            acknowledgements=acknowledgements,
            state=state or {},
            transitions=transitions,
            retired_letters=retired_letters,
        )
        await self._committing.commit(commit)

    async def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        await self.commit({}, deliveries)

    async def dead_letter(
        self, delivery: Delivery, reason: str, transitions: Sequence[LedgerEvent] = ()
    ) -> None:
        self._session.wiring.check_transitions(transitions)
        letter = (delivery, reason)
        commit = Commit(acknowledgements=[delivery], transitions=transitions, dead_letters=[letter])
        # Applied without waiting for room: it publishes nothing, and letters have their own bound.
        await self._committing.apply(commit)

    async def claim_role(self, role: ConsumerGroup) -> None:
        # Checked here, for every run has processes that claim a role, once, as they start.
        await self._session.connection.check_eviction()
        request = Request([self._keys.tenure(role)])
        tenure = await self._session.run_script(redis_scripts.CLAIM_ROLE, request)
        self._session.tenures[role] = int(tenure)

    async def read(
        self,
        stream: Stream,
        group: ConsumerGroup,
        consumer: str,
        max_count: int,
        block_s: float = 0.0,
    ) -> list[Delivery]:
        return await self._consuming.read(stream, group, consumer, max_count, block_s)

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
        return await self._consuming.reclaim(
            stream, group, consumer, min_idle_s, max_count, after_id, held_by
        )

    async def renew(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        return await self._consuming.renew(deliveries)

    async def hand_back(self, deliveries: Sequence[Delivery]) -> None:
        await self._consuming.hand_back(deliveries)

    async def tail(
        self, stream: Stream, after_id: str, max_count: int, block_s: float = 0.0
    ) -> list[Entry]:
        key = self._keys.stream(stream)
        deadline = time.monotonic() + block_s
        while True:
            # One blocking read is shorter than `block_s` may be, see `redis_consuming`.
            block_ms = to_block_ms(deadline - time.monotonic())
            read_once = partial(self._client.xread, {key: after_id}, max_count, block_ms)
            reply = await self._run(read_once)
            if reply or time.monotonic() >= deadline:
                return [
                    Entry(entry_id.decode(), fields[PAYLOAD])
                    for _, entries in reply or ()
                    for entry_id, fields in entries
                ]

    async def newest(self, stream: Stream) -> Entry | None:
        key = self._keys.stream(stream)
        reply = await self._run(lambda: self._client.xrevrange(key, count=1))
        if not reply:
            return None
        entry_id, fields = reply[0]
        return Entry(entry_id.decode(), fields[PAYLOAD])

    async def list_dead_letters(
        self, max_count: int = 100, before_id: str | None = None
    ) -> list[DeadLetter]:
        # The parenthesis excludes that id itself: it ended the page before.
        newest = "+" if before_id is None else f"({check_letter_id(before_id)}"
        key = self._keys.dead_letters()
        reply = await self._run(lambda: self._client.xrevrange(key, max=newest, count=max_count))
        return [parse_dead_letter(letter_id, fields) for letter_id, fields in reply]

    async def find_dead_letter(self, letter_id: str) -> DeadLetter | None:
        # It may come from a user: Redis would answer an id of another form with an error.
        if not is_entry_id(letter_id):
            return None
        key = self._keys.dead_letters()
        reply = await self._run(lambda: self._client.xrange(key, letter_id, letter_id))
        return parse_dead_letter(*reply[0]) if reply else None

    async def count_dead_letters(self) -> int:
        return int(await self._run(lambda: self._client.xlen(self._keys.dead_letters())))

    async def trim(self) -> int:
        return await self._trimming.trim_streams(list(self._session.wiring.groups))

    async def stream_lag(self, stream: Stream, group: ConsumerGroup) -> StreamLag:
        return await self._trimming.stream_lag(stream, group)

    async def save_state(self, name: str, value: bytes) -> None:
        await self.commit({}, state={name: value})

    async def load_state(self, name: str) -> bytes | None:
        value: bytes | None = await self._run(lambda: self._client.hget(self._keys.states(), name))
        return value

    async def read_ledger(self) -> LedgerAccount:
        return await self._account.read_ledger()

    async def list_closed(self, outcome: GroupOutcome) -> list[int]:
        return await self._account.list_closed(outcome)

    async def take_snapshot(self) -> bytes:
        return await self._account.take_snapshot()

    async def restore_snapshot(self, snapshot: bytes, trained: Collection[int]) -> bool:
        return await self._account.restore_snapshot(snapshot, trained)

    async def pin_versions(self, reader: str, versions: Collection[int], ttl_s: float) -> bool:
        request = Request([self._keys.versions_in_use(), self._keys.versions_retired()])
        request.add(reader, int(ttl_s * 1000))
        request.add_list([version] for version in versions)
        return bool(await self._session.run_script(redis_scripts.PIN_VERSIONS, request))

    async def retire_versions(self, versions: Collection[int]) -> bool:
        request = Request([self._keys.versions_in_use(), self._keys.versions_retired()])
        # In role: a superseded learner must not delete versions of its successor's run.
        self._session.add_roles(request)
        request.add_list([version] for version in versions)
        status, *_ = await self._session.run_in_role(redis_scripts.RETIRE_VERSIONS, request)
        return bool(status == b"done")

    async def memory(self) -> BusMemory:
        info = await self._run(lambda: self._client.info("memory"))
        return BusMemory(used_bytes=int(info["used_memory"]), max_bytes=int(info["maxmemory"]))

    async def ping(self) -> None:
        await self._run(lambda: self._client.ping())

    async def hurry(self, stopping: asyncio.Event) -> None:
        await self._session.connection.hurry(stopping)

    async def close(self) -> None:
        await self._session.connection.close()
