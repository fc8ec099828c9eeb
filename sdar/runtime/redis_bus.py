"""Owns the bus over Redis Streams. It speaks to one Redis (6.2 or newer) and knows no payload type.

How the protocol's promises are kept:

- One MULTI/EXEC per commit. Redis refuses the whole transaction, or runs all of it.
- Capacity is known from the length that each commit brings back, so a commit that finds room costs one round trip.
- Trimming goes up to the oldest entry that some group has not acknowledged, declared or merely existing in Redis. A group
  that does not exist yet has acknowledged nothing.
- Outages shorter than `outage_tolerance_s` are waited out. redis-py's own retries are off: it nests one around connecting
  within one around the command, and together they have no deadline.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import redis.asyncio as redis
from redis import exceptions as redis_errors
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from sdar.contracts.errors import BusUnavailableError, CapacityError, ConfigurationError
from sdar.contracts.streams import BROADCAST_MAX_ENTRIES, ConsumerGroup, RunKeys, Stream
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

_Command = tuple[Any, ...]

_PAYLOAD = b"p"
_CONNECT_TIMEOUT_S = 10.0
_REPLY_TIMEOUT_S = 20.0
_MAX_BLOCK_S = 5.0
"""Longest single blocking read: well under the reply timeout, so that a silent server and a quiet stream look different."""
_ALL = 1_000_000
_FIRST_RETRY_S, _MAX_RETRY_S = 0.05, 1.0
_FIRST_POLL_S, _MAX_POLL_S = 0.01, 0.25

# Redis before 7.0 does not report a group's lag. Counting by pages keeps the server's copy small; the stream is bounded.
_COUNT_AFTER = """
local start, count = '(' .. ARGV[1], 0
while true do
    local page = redis.call('XRANGE', KEYS[1], start, '+', 'COUNT', 256)
    count = count + #page
    if #page < 256 then return count end
    start = '(' .. page[#page][1]
end
"""


class RedisBus:
    """`Bus` over Redis Streams. Connects at the first call.

    Args:
        url: redis://, rediss:// or unix:// address.
        run_id: prefix of every key.
        consumers: the groups that consume each stream in this run; the same in every process of the run.
        limits: bounds on entries and waits.
    """

    def __init__(self, url: str, run_id: str, consumers: Consumers, limits: BusLimits | None = None) -> None:
        self._url = url
        self._keys = RunKeys(run_id)
        self._wiring = Wiring(consumers)
        self._limits = limits or BusLimits()
        self._known_length: dict[Stream, int] = {}
        self._next_trim_at: dict[Stream, float] = {}
        try:
            self._redis = redis.Redis.from_url(
                url,
                protocol=2,
                # redis-py would wait with asyncio.wait_for, which before Python 3.12 can swallow a cancellation. See _run.
                socket_timeout=None,
                socket_connect_timeout=_CONNECT_TIMEOUT_S,
                socket_keepalive=True,
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError as error:
            raise ConfigurationError(f"Redis address {url!r} is not usable: {error}. Use redis://host:port/0.") from error

    # --- publishing -------------------------------------------------------------------------------------------------------

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
            await self._wait_for_room(stream)
        # Before the transaction: a trim that fails after it would make a commit that happened look as if it had not.
        await self._trim_now_and_then({delivery.stream for delivery in acknowledgements})
        await self._transact(publications, acknowledgements, state or {})

    async def dead_letter(self, delivery: Delivery, reason: str, publications: Publications | None = None) -> None:
        self._wiring.check_publish(publications or {})
        # No wait for room: a poisonous entry must be able to leave even when the stream it reports to is full.
        await self._transact(publications or {}, [delivery], {}, dead_letters=[(delivery, reason)])

    async def _transact(
        self,
        publications: Publications,
        acknowledgements: Iterable[Delivery],
        state: Mapping[str, bytes],
        dead_letters: Sequence[tuple[Delivery, str]] = (),
    ) -> None:
        bounded = self._wiring.bounded(publications)
        commands: list[_Command] = []
        for stream, payloads in publications.items():
            key = self._keys.stream(stream)
            bound = ("MAXLEN", BROADCAST_MAX_ENTRIES[stream]) if stream in BROADCAST_MAX_ENTRIES else ()
            commands += [("XADD", key, *bound, "*", _PAYLOAD, payload) for payload in payloads]
        for delivery, reason in dead_letters:
            fields = _dead_letter_fields(delivery, reason)
            commands.append(("XADD", self._keys.dead_letters(), "MAXLEN", DEAD_LETTERS_MAX_ENTRIES, "*", *fields))
        commands += [("SET", self._keys.state(name), value) for name, value in state.items()]
        for (stream, group), entry_ids in _ids_by_group(acknowledgements).items():
            commands.append(("XACK", self._keys.stream(stream), group, *entry_ids))
        commands += [("XLEN", self._keys.stream(stream)) for stream in bounded]
        replies = await self._send(commands, transaction=True)
        self._known_length.update(zip(bounded, replies[len(replies) - len(bounded) :], strict=True))

    async def _wait_for_room(self, stream: Stream) -> None:
        """Returns when the stream is below its bound; trims it while waiting, for its consumers trim only now and then."""
        max_entries, poll_s = self._limits.max_entries, _FIRST_POLL_S
        deadline = time.monotonic() + self._limits.publish_timeout_s
        while self._known_length.get(stream, 0) >= max_entries:
            await self._trim_streams([stream])
            length = int(await self._run(lambda: self._redis.xlen(self._keys.stream(stream))))
            self._known_length[stream] = length
            if length < max_entries:
                return
            if time.monotonic() >= deadline:
                raise CapacityError(format_capacity_message(stream, length, self._limits), stream=stream, num_entries=length)
            await asyncio.sleep(poll_s)
            poll_s = min(2 * poll_s, _MAX_POLL_S)

    # --- consuming --------------------------------------------------------------------------------------------------------

    async def read(
        self, stream: Stream, group: ConsumerGroup, consumer: str, max_count: int, block_s: float = 0.0
    ) -> list[Delivery]:
        self._wiring.check_group(stream, group)
        key = self._keys.stream(stream)
        deadline = time.monotonic() + block_s
        while True:
            block_ms = _to_block_ms(deadline - time.monotonic())

            async def read_once(block_ms: int | None = block_ms) -> Any:
                return await self._redis.xreadgroup(group, consumer, {key: ">"}, count=max_count, block=block_ms)

            reply = await self._with_group(stream, group, read_once)
            if reply or time.monotonic() >= deadline:
                return [
                    Delivery(stream, group, consumer, entry_id.decode(), fields[_PAYLOAD])
                    for _, entries in reply or ()
                    for entry_id, fields in entries
                ]

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
        key = self._keys.stream(stream)
        milliseconds, sequence = parse_entry_id(after_id)
        cursor = f"{milliseconds}-{sequence + 1}"
        claimed: list[tuple[str, bytes]] = []
        # Redis scans a bounded part of the pending list a call and tells where to go on; 0-0 is the end.
        while cursor != BEFORE_FIRST and len(claimed) < max_count:

            async def claim_once(start: str = cursor, count: int = max_count - len(claimed)) -> Any:
                return await self._redis.xautoclaim(key, group, consumer, int(min_idle_s * 1000), start, count=count)

            reply = await self._with_group(stream, group, claim_once)
            cursor = reply[0].decode()
            claimed += [(entry_id.decode(), fields[_PAYLOAD]) for entry_id, fields in reply[1] if entry_id is not None]
        num_deliveries = await self._fetch_held(stream, group, consumer, [entry_id for entry_id, _ in claimed])
        return [
            Delivery(stream, group, consumer, entry_id, payload, num_deliveries[entry_id])
            for entry_id, payload in claimed
            if entry_id in num_deliveries
        ]

    async def renew(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        held: set[Delivery] = set()
        by_holder: defaultdict[tuple[Stream, ConsumerGroup, str], list[Delivery]] = defaultdict(list)
        for delivery in deliveries:
            by_holder[delivery.stream, delivery.group, delivery.consumer].append(delivery)
        for (stream, group, consumer), lent in by_holder.items():
            ids = await self._fetch_held(stream, group, consumer, [delivery.entry_id for delivery in lent])
            held.update(delivery for delivery in lent if delivery.entry_id in ids)
            if ids:
                # JUSTID leaves the delivery count alone: renewing is not another attempt.
                await self._run(
                    partial(self._redis.xclaim, self._keys.stream(stream), group, consumer, 0, list(ids), justid=True)
                )
        return [delivery for delivery in deliveries if delivery in held]

    async def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        await self.commit({}, deliveries)

    async def _fetch_held(
        self, stream: Stream, group: ConsumerGroup, consumer: str, entry_ids: Sequence[str]
    ) -> dict[str, int]:
        """entry id -> number of deliveries, for those of `entry_ids` that are pending with this consumer."""
        if not entry_ids:
            return {}
        key, wanted = self._keys.stream(stream), sorted(entry_ids, key=parse_entry_id)
        try:
            rows = await self._run(
                lambda: self._redis.xpending_range(key, group, wanted[0], wanted[-1], count=_ALL, consumername=consumer)
            )
        except redis_errors.ResponseError as error:
            if not _is_missing_group(error):
                raise
            return {}
        deliveries = {row["message_id"].decode(): int(row["times_delivered"]) for row in rows}
        return {entry_id: deliveries[entry_id] for entry_id in wanted if entry_id in deliveries}

    async def _with_group(self, stream: Stream, group: ConsumerGroup, operation: Callable[[], Awaitable[Any]]) -> Any:
        """Run `operation`; if the group is missing (first use, or Redis was flushed), create it at the beginning and repeat."""
        while True:
            try:
                return await self._run(operation)
            except redis_errors.ResponseError as error:
                if not _is_missing_group(error):
                    raise
            await self._create_group(stream, group)

    async def _create_group(self, stream: Stream, group: ConsumerGroup) -> None:
        try:
            await self._run(lambda: self._redis.xgroup_create(self._keys.stream(stream), group, BEFORE_FIRST, mkstream=True))
        except redis_errors.ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise

    # --- reading without a group ------------------------------------------------------------------------------------------

    async def tail(self, stream: Stream, after_id: str, max_count: int, block_s: float = 0.0) -> list[Entry]:
        key = self._keys.stream(stream)
        deadline = time.monotonic() + block_s
        while True:
            block_ms = _to_block_ms(deadline - time.monotonic())

            async def read_once(block_ms: int | None = block_ms) -> Any:
                return await self._redis.xread({key: after_id}, count=max_count, block=block_ms)

            reply = await self._run(read_once)
            if reply or time.monotonic() >= deadline:
                return [
                    Entry(entry_id.decode(), fields[_PAYLOAD]) for _, entries in reply or () for entry_id, fields in entries
                ]

    async def newest(self, stream: Stream) -> Entry | None:
        reply = await self._run(lambda: self._redis.xrevrange(self._keys.stream(stream), count=1))
        return Entry(reply[0][0].decode(), reply[0][1][_PAYLOAD]) if reply else None

    async def list_dead_letters(self, max_count: int = 100) -> list[DeadLetter]:
        reply = await self._run(lambda: self._redis.xrevrange(self._keys.dead_letters(), count=max_count))
        return [_parse_dead_letter(fields) for _, fields in reply]

    async def count_dead_letters(self) -> int:
        return int(await self._run(lambda: self._redis.xlen(self._keys.dead_letters())))

    # --- housekeeping -----------------------------------------------------------------------------------------------------

    async def trim(self) -> int:
        return await self._trim_streams(list(self._wiring.groups))

    async def _trim_now_and_then(self, streams: Iterable[Stream]) -> None:
        now = time.monotonic()
        due = [stream for stream in streams if now >= self._next_trim_at.get(stream, 0.0) and stream in self._wiring.groups]
        for stream in due:
            self._next_trim_at[stream] = now + self._limits.trim_interval_s
        await self._trim_streams(due)

    async def _trim_streams(self, streams: Sequence[Stream]) -> int:
        floors = {stream: await self._fetch_floor(stream) for stream in streams}
        return sum(
            await self._send(
                [("XTRIM", self._keys.stream(stream), "MINID", "=", floor) for stream, floor in floors.items() if floor]
            )
        )

    async def _fetch_floor(self, stream: Stream) -> str | None:
        """The oldest entry id that some group still needs, None if nothing can be said to be finished."""
        groups = await self._fetch_groups(stream)
        if not set(self._wiring.groups[stream]) <= groups.keys():
            return None
        names = [name for name, info in groups.items() if info["pending"]]
        summaries = await self._send([("XPENDING", self._keys.stream(stream), name) for name in names])
        # Groups are read before their pending entries. Whatever is delivered in between only makes the floor too low.
        oldest_pending = {name: summary["min"] for name, summary in zip(names, summaries, strict=True) if summary["min"]}
        floors = []
        for name, info in groups.items():
            milliseconds, sequence = parse_entry_id(_decode(oldest_pending.get(name, info["last-delivered-id"])))
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
        info = (await self._fetch_groups(stream)).get(group, {"last-delivered-id": BEFORE_FIRST, "pending": 0})
        last_delivered = _decode(info["last-delivered-id"])
        commands: list[_Command] = [("TIME",), ("XRANGE", key, f"({last_delivered}", "+", "COUNT", 1)]
        commands += [("XPENDING", key, group)] if info["pending"] else []
        (seconds, microseconds), undelivered, *pending = await self._send(commands)
        num_undelivered = info.get("lag") if undelivered else 0
        if num_undelivered is None:
            num_undelivered = await self._run(lambda: self._redis.eval(_COUNT_AFTER, 1, key, last_delivered))
        ids = [entry_id for entry_id, _ in undelivered] + [summary["min"] for summary in pending if summary["min"]]
        oldest_ms = min((parse_entry_id(_decode(entry_id))[0] for entry_id in ids), default=None)
        age_s = 0.0 if oldest_ms is None else max(0.0, seconds + microseconds / 1e6 - oldest_ms / 1e3)
        return StreamLag(int(num_undelivered), sum(summary["pending"] for summary in pending), age_s)

    async def save_state(self, name: str, value: bytes) -> None:
        await self.commit({}, state={name: value})

    async def load_state(self, name: str) -> bytes | None:
        value: bytes | None = await self._run(lambda: self._redis.get(self._keys.state(name)))
        return value

    async def ping(self) -> None:
        await self._run(lambda: self._redis.ping())

    async def close(self) -> None:
        await self._redis.aclose()

    async def _send(self, commands: Sequence[_Command], transaction: bool = False) -> list[Any]:
        """Send all commands in one round trip; the replies in their order."""

        async def send_once() -> list[Any]:
            pipeline = self._redis.pipeline(transaction=transaction)
            for command in commands:
                pipeline.execute_command(*command)
            replies: list[Any] = await pipeline.execute()
            return replies

        return await self._run(send_once) if commands else []

    async def _run(self, operation: Callable[[], Awaitable[Any]]) -> Any:
        """Run one Redis operation, again after lost connections until the outage lasts too long.

        Repeating a transaction whose reply was lost can publish it twice: at least once, never less.
        """
        give_up_at, delay_s = time.monotonic() + self._limits.outage_tolerance_s, _FIRST_RETRY_S
        while True:
            try:
                async with asyncio.timeout(_REPLY_TIMEOUT_S):
                    return await operation()
            except (redis_errors.AuthenticationError, redis_errors.AuthorizationError) as error:
                raise ConfigurationError(f"Redis refuses the credentials of {self._place}: {error}. Fix its URL.") from error
            except (redis_errors.ConnectionError, redis_errors.TimeoutError, OSError) as error:
                if time.monotonic() + delay_s > give_up_at:
                    raise BusUnavailableError(
                        f"Redis at {self._place} did not answer for {self._limits.outage_tolerance_s:g} s ({error!r}). "
                        "Check that it runs and that SDAR_REDIS_URL names it; nothing acknowledged is lost.",
                        address=self._place,
                    ) from error
            except redis_errors.ResponseError as error:
                if not _is_write_refusal(error):
                    raise
                raise BusUnavailableError(
                    f"Redis at {self._place} refuses writes: {error}. Give it memory or disk, or address the primary.",
                    address=self._place,
                ) from error
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))
            delay_s = min(2 * delay_s, _MAX_RETRY_S)

    @property
    def _place(self) -> str:
        """The address without credentials."""
        scheme, _, rest = self._url.partition("://")
        return f"{scheme}://{rest.rpartition('@')[2]}"


def _decode(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _to_block_ms(remaining_s: float) -> int | None:
    """Redis' BLOCK argument; None does not block (0 would block for ever)."""
    return max(1, int(min(remaining_s, _MAX_BLOCK_S) * 1000)) if remaining_s > 0 else None


def _is_missing_group(reply: object) -> bool:
    # UNBLOCKED: the stream was deleted under a blocking read.
    return isinstance(reply, redis_errors.ResponseError) and str(reply).startswith(("NOGROUP", "UNBLOCKED"))


def _is_write_refusal(error: redis_errors.ResponseError) -> bool:
    refusals = (redis_errors.OutOfMemoryError, redis_errors.ReadOnlyError)
    return isinstance(error, refusals) or "MISCONF" in str(error)


def _ids_by_group(deliveries: Iterable[Delivery]) -> dict[tuple[Stream, ConsumerGroup], list[str]]:
    ids: defaultdict[tuple[Stream, ConsumerGroup], list[str]] = defaultdict(list)
    for delivery in deliveries:
        ids[delivery.stream, delivery.group].append(delivery.entry_id)
    return dict(ids)


def _dead_letter_fields(delivery: Delivery, reason: str) -> list[str | bytes | int | float]:
    return [
        *(b"stream", delivery.stream, b"group", delivery.group, b"entry_id", delivery.entry_id),
        *(b"num_deliveries", delivery.num_deliveries, b"reason", reason, b"at_s", time.time(), _PAYLOAD, delivery.payload),
    ]


def _parse_dead_letter(fields: Mapping[bytes, bytes]) -> DeadLetter:
    return DeadLetter(
        stream=Stream(fields[b"stream"].decode()),
        group=ConsumerGroup(fields[b"group"].decode()),
        entry_id=fields[b"entry_id"].decode(),
        payload=fields[_PAYLOAD],
        num_deliveries=int(fields[b"num_deliveries"]),
        reason=fields[b"reason"].decode(),
        at_s=float(fields[b"at_s"]),
    )
