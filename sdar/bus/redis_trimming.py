"""Keeps Redis streams short: removes entries that every consumer group has acknowledged.

Trimming goes up to the oldest entry that some consumer group has not acknowledged. Groups that this
run declares count, and so do others that exist in Redis. One that is declared and does not exist
yet has acknowledged nothing. Consumers that have long been gone are forgotten.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from redis import exceptions as redis_errors

from sdar.bus import redis_scripts
from sdar.bus.protocol import BEFORE_FIRST, StreamLag, parse_entry_id
from sdar.bus.redis_connection import Command
from sdar.bus.redis_session import RedisSession, Request, decode
from sdar.contracts.streams import ConsumerGroup, Stream

_FORGET_AFTER_S = 3600.0
"""A consumer that holds nothing and was silent for so long is forgotten.

Pods come and go under ever new names, and Redis would keep them all.
"""


class RedisTrimming:
    """What a `RedisBus` knows of how far the consumer groups of a stream are."""

    def __init__(self, session: RedisSession) -> None:
        self._session = session
        self._next_trim_at: dict[Stream, float] = {}
        self._next_forgetting_at: dict[Stream, float] = {}

    async def trim_now_and_then(self, streams: Iterable[Stream]) -> None:
        """Trim those of these streams that have not been for a while."""
        now = time.monotonic()
        due = [
            stream
            for stream in streams
            if now >= self._next_trim_at.get(stream, 0.0) and stream in self._session.wiring.groups
        ]
        # Before the trim: commits that come while it is under way need not trim as well.
        for stream in due:
            self._next_trim_at[stream] = now + self._session.limits.trim_interval_s
        await self.trim_streams(due)
        for stream in due:
            if now >= self._next_forgetting_at.get(stream, 0.0):
                self._next_forgetting_at[stream] = now + _FORGET_AFTER_S
                request = Request([self._session.keys.stream(stream)])
                request.add(int(1000 * _FORGET_AFTER_S))
                await self._session.run_script(redis_scripts.FORGET_CONSUMERS, request)

    async def trim_streams(self, streams: Sequence[Stream]) -> int:
        """Remove what every consumer group has acknowledged; returns the number of entries."""
        floors = {stream: await self._fetch_floor(stream) for stream in streams}
        commands: list[Command] = [
            ("XTRIM", self._session.keys.stream(stream), "MINID", "=", floor)
            for stream, floor in floors.items()
            if floor
        ]
        return sum(await self._session.send(commands))

    async def _fetch_floor(self, stream: Stream) -> str | None:
        """The oldest entry id that some consumer group still needs.

        None where a declared group does not exist yet: then nothing can be said to be finished.
        """
        # Groups are read before their pending entries. Whatever is delivered in between only makes
        # the floor too low.
        groups = await self._fetch_groups(stream)
        if not set(self._session.wiring.groups[stream]) <= groups.keys():
            return None
        oldest_pending = await self._fetch_oldest_pending(stream, groups)
        floors = []
        for name, info in groups.items():
            if name in oldest_pending:
                floors.append(parse_entry_id(oldest_pending[name]))
            else:
                # Everything it was given is acknowledged: it needs what comes after the last.
                milliseconds, sequence = parse_entry_id(decode(info["last-delivered-id"]))
                floors.append((milliseconds, sequence + 1))
        milliseconds, sequence = min(floors)
        return f"{milliseconds}-{sequence}"

    async def _fetch_oldest_pending(
        self, stream: Stream, groups: Mapping[str, dict[str, Any]]
    ) -> dict[str, str]:
        """The id of the oldest pending entry, by the name of each consumer group that has any."""
        names = [name for name, info in groups.items() if info["pending"]]
        key = self._session.keys.stream(stream)
        summaries = await self._session.send([("XPENDING", key, name) for name in names])
        return {
            name: decode(summary["min"])
            for name, summary in zip(names, summaries, strict=True)
            # Acknowledged since the groups were read.
            if summary["min"]
        }

    async def _fetch_groups(self, stream: Stream) -> dict[str, dict[str, Any]]:
        """Redis' record of each consumer group of a stream by name; empty without the stream."""
        try:
            reply = await self._session.run(
                lambda: self._session.client.xinfo_groups(self._session.keys.stream(stream))
            )
        except redis_errors.ResponseError as error:
            if "no such key" not in str(error):
                raise
            return {}
        return {decode(info["name"]): info for info in reply}

    async def stream_lag(self, stream: Stream, group: ConsumerGroup) -> StreamLag:
        """How far a consumer group is behind, see `Bus.stream_lag`."""
        self._session.wiring.check_group(stream, group)
        key = self._session.keys.stream(stream)
        groups = await self._fetch_groups(stream)
        info = groups.get(group, {"last-delivered-id": BEFORE_FIRST, "pending": 0})
        last_delivered = decode(info["last-delivered-id"])
        first_undelivered = ("XRANGE", key, f"({last_delivered}", "+", "COUNT", 1)
        # Redis' clock, for it gave the entries the times that stand in their ids.
        commands: list[Command] = [("TIME",), first_undelivered]
        commands += [("XPENDING", key, group)] if info["pending"] else []
        (seconds, microseconds), undelivered, *pending = await self._session.send(commands)
        num_undelivered = info.get("lag") if undelivered else 0
        # Redis before 7.0 has no lag, and later ones do not know it after some deletions.
        if num_undelivered is None:
            request = Request([key])
            request.add(last_delivered)
            num_undelivered = await self._session.run_script(redis_scripts.COUNT_AFTER, request)
        ids = [entry_id for entry_id, _ in undelivered]
        ids += [summary["min"] for summary in pending if summary["min"]]
        now_s = seconds + microseconds / 1e6
        num_pending = sum(summary["pending"] for summary in pending)
        return StreamLag(int(num_undelivered), num_pending, _compute_age(ids, now_s))


def _compute_age(entry_ids: Sequence[bytes | str], now_s: float) -> float:
    """Seconds since the oldest of these entries was published; 0 without any."""
    published_ms = [parse_entry_id(decode(entry_id))[0] for entry_id in entry_ids]
    return max(0.0, now_s - min(published_ms) / 1e3) if published_ms else 0.0
