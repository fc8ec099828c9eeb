"""Entries lent to a Redis stream's consumers: read, taken over from the dead, renewed, handed back.

A lease is an entry's row in the pending list of its consumer group: consumer and delivery count
must still be those of the delivery. A read whose reply was lost has lent entries that nobody saw;
the next read of that consumer returns them first.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from redis import exceptions as redis_errors

from sdar.bus import redis_scripts
from sdar.bus.protocol import BEFORE_FIRST, SUSPECT_FACTOR, Delivery
from sdar.bus.redis_connection import Witness, format_client_name
from sdar.bus.redis_session import PAYLOAD, RedisSession, Request, check_roles, decode
from sdar.contracts.streams import ConsumerGroup, Stream

_Reader = tuple[Stream, ConsumerGroup, str]
"""A consumer group of a stream, and the name of one consumer in it."""
_Row = tuple[bytes, bytes]
"""Id and payload of an entry."""

_MAX_BLOCK_S = 5.0
"""Longest single blocking read. It is well under the reply timeout, so that a silent server and a
quiet stream look different.
"""
_PAGE = 256
_HANDED_BACK_MS = 24 * 3600 * 1000
"""An idle time beyond all doubt: longer than any consumer is waited for."""


class RedisConsuming:
    """The consuming half of a `RedisBus`; its methods are those of `Bus`."""

    def __init__(self, session: RedisSession) -> None:
        self._session = session
        self._last_read: dict[_Reader, str] = {}
        self._interrupted_reads: set[_Reader] = set()

    async def read(
        self,
        stream: Stream,
        group: ConsumerGroup,
        consumer: str,
        max_count: int,
        block_s: float = 0.0,
    ) -> list[Delivery]:
        self._session.wiring.check_group(stream, group)
        reader = (stream, group, consumer)
        deadline = time.monotonic() + block_s
        entries: list[_Row] = []
        while not entries:
            # A long wait is several shorter reads; without one there is a single read, which does
            # not block.
            block_ms = to_block_ms(deadline - time.monotonic())
            read_once = partial(self._read_once, reader, max_count, block_ms)
            entries = await self._with_group(stream, group, read_once)
            if time.monotonic() >= deadline:
                break
        if entries:
            self._last_read[reader] = decode(entries[-1][0])
        return [Delivery(*reader, decode(entry_id), payload) for entry_id, payload in entries]

    async def _read_once(self, reader: _Reader, max_count: int, block_ms: int | None) -> list[_Row]:
        try:
            return await self._read_unseen_or_new(reader, max_count, block_ms)
        except BaseException:
            # Entries may have been lent to this consumer by a reply that never came. A cancelled
            # read is no different from a broken connection: Redis has done it or not.
            self._interrupted_reads.add(reader)
            raise

    async def _read_unseen_or_new(
        self, reader: _Reader, max_count: int, block_ms: int | None
    ) -> list[_Row]:
        """New entries; before them those that an interrupted read was lent."""
        if reader in self._interrupted_reads:
            unseen = await self._list_unseen(reader, max_count)
            if unseen:
                return unseen
            self._interrupted_reads.discard(reader)
        if self._session.tenures:
            return await self._read_in_role(reader, max_count, block_ms)
        return await self._read_new(reader, max_count, block_ms)

    async def _read_new(self, reader: _Reader, max_count: int, block_ms: int | None) -> list[_Row]:
        stream, group, consumer = reader
        key = self._session.keys.stream(stream)
        reply: Any = await self._session.client.xreadgroup(
            group, consumer, {key: ">"}, count=max_count, block=block_ms
        )
        # One stream was asked for, so there is one list of entries, or no reply at all.
        return [
            (entry_id, fields[PAYLOAD])
            for _, entries in reply or ()
            for entry_id, fields in entries
        ]

    async def _list_unseen(self, reader: _Reader, max_count: int) -> list[_Row]:
        """Entries lent to this consumer that no read has returned.

        They are newer than all that a read has returned, and at their first attempt.
        """
        stream, group, consumer = reader
        request = Request([self._session.keys.stream(stream)])
        request.add(group, consumer, self._last_read.get(reader, BEFORE_FIRST), max_count)
        entries = await self._session.call_script(redis_scripts.LIST_UNSEEN, request)
        return [(entry_id, fields[1]) for entry_id, fields in entries]

    async def _read_in_role(
        self, reader: _Reader, max_count: int, block_ms: int | None
    ) -> list[_Row]:
        """New entries, as the holder of a role.

        A superseded process must not take entries: its successor would wait for them.
        """
        stream, group, consumer = reader
        key = self._session.keys.stream(stream)
        request = Request([key])
        self._session.add_roles(request)
        request.add(group, consumer, max_count)
        entries, last_id = await self._call_read_in_role(request)
        if not entries and block_ms is not None:
            # A script cannot block: wait for the entry after the group's last, then take it.
            await self._session.client.xread({key: last_id}, count=1, block=block_ms)
            entries, _ = await self._call_read_in_role(request)
        return [(entry_id, fields[1]) for entry_id, fields in entries]

    async def _call_read_in_role(self, request: Request) -> tuple[list[Any], bytes]:
        """New entries; or none, and the id of the last one that the consumer group was given."""
        reply = await self._session.call_script(redis_scripts.READ_IN_ROLE, request)
        _, entries, *last_id = check_roles(reply)
        return entries, last_id[0] if last_id else b""

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
        self._session.wiring.check_group(stream, group)
        taken: list[Delivery] = []
        while len(taken) < max_count:
            page = await self._list_pending(stream, group, min_idle_s, after_id, held_by)
            if not page:
                break
            # On from the page's end, whether or not anything of it is taken: what the living hold
            # must not hide the dead behind it.
            after_id = decode(page[-1]["message_id"])
            dead = await self._select_dead(page, min_idle_s)
            # Of those taken for dead, another may have taken some meanwhile: then the next ones.
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
            return await self._session.client.xpending_range(
                self._session.keys.stream(stream),
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
        # Without a bound nobody is asked: the caller knows that whoever held them is gone.
        if not min_idle_s:
            return pending
        witness = await self._session.connection.fetch_witness()
        if witness.settled_s < min_idle_s:
            # Redis or the network was away, which makes everybody idle and nobody connected. Let
            # them come back and renew.
            return []
        return [row for row in pending if self._is_dead(row, witness, min_idle_s)]

    def _is_dead(self, row: dict[str, Any], witness: Witness, min_idle_s: float) -> bool:
        """Whether the consumer of an entry is taken for dead."""
        if row["time_since_delivered"] >= SUSPECT_FACTOR * min_idle_s * 1000:
            return True
        # Where nobody may ask who is connected, only the long bound is left.
        if witness.names is None:
            return False
        name = format_client_name(self._session.run_id, decode(row["consumer"]))
        return name not in witness.names

    async def _take_over(
        self,
        stream: Stream,
        group: ConsumerGroup,
        consumer: str,
        min_idle_s: float,
        pending: list[dict[str, Any]],
    ) -> list[Delivery]:
        request = Request([self._session.keys.stream(stream)])
        self._session.add_roles(request)
        request.add(group, consumer, int(min_idle_s * 1000))
        request.add_list((row["message_id"], row["times_delivered"]) for row in pending)
        _, *rows = await self._session.run_in_role(redis_scripts.RECLAIM, request)
        return [Delivery(stream, group, consumer, row[0].decode(), row[1], row[2]) for row in rows]

    async def renew(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        return await self._set_idle(deliveries, 0)

    async def hand_back(self, deliveries: Sequence[Delivery]) -> None:
        await self._set_idle(deliveries, _HANDED_BACK_MS)

    async def _set_idle(self, deliveries: Sequence[Delivery], idle_ms: int) -> list[Delivery]:
        held: set[Delivery] = set()
        # One script for each, for it works on one stream's consumer group.
        by_holder: defaultdict[_Reader, list[Delivery]] = defaultdict(list)
        for delivery in deliveries:
            by_holder[delivery.stream, delivery.group, delivery.consumer].append(delivery)
        for (stream, group, consumer), lent in by_holder.items():
            request = Request([self._session.keys.stream(stream)])
            request.add(group, consumer, idle_ms)
            request.add_list((delivery.entry_id, delivery.num_deliveries) for delivery in lent)
            indices = await self._session.run_script(redis_scripts.RENEW, request)
            held.update(lent[index] for index in indices)
        return [delivery for delivery in deliveries if delivery in held]

    async def _with_group(
        self, stream: Stream, group: ConsumerGroup, operation: Callable[[], Awaitable[Any]]
    ) -> Any:
        """Run `operation`; create the consumer group where it is missing, and repeat.

        It is missing at first, and when Redis was emptied. It begins at the stream's beginning.
        """
        while True:
            try:
                return await self._session.run(operation)
            except redis_errors.ResponseError as error:
                if not _is_missing_group(error):
                    raise
            await self._create_group(stream, group)

    async def _create_group(self, stream: Stream, group: ConsumerGroup) -> None:
        try:
            await self._session.run(
                lambda: self._session.client.xgroup_create(
                    self._session.keys.stream(stream), group, BEFORE_FIRST, mkstream=True
                )
            )
        except redis_errors.ResponseError as error:
            # Another process was first, which is as good.
            if not str(error).startswith("BUSYGROUP"):
                raise


def to_block_ms(remaining_s: float) -> int | None:
    """Redis' BLOCK argument; None does not block (0 would block for ever)."""
    return max(1, int(min(remaining_s, _MAX_BLOCK_S) * 1000)) if remaining_s > 0 else None


def _is_missing_group(reply: object) -> bool:
    # UNBLOCKED: the stream was deleted under a blocking read.
    return isinstance(reply, redis_errors.ResponseError) and str(reply).startswith(
        ("NOGROUP", "UNBLOCKED")
    )
