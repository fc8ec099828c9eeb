"""Redis streams kept short: entries that every group has acknowledged go, consumers long gone too.

Trimming goes up to the oldest entry that some group has not acknowledged, declared or merely
existing in Redis. A group that does not exist yet has acknowledged nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from redis import exceptions as redis_errors

from sdar.bus import redis_scripts
from sdar.bus.protocol import BEFORE_FIRST, StreamLag, parse_entry_id
from sdar.bus.redis_connection import Command
from sdar.bus.redis_session import RedisSession, Request, decode
from sdar.contracts.streams import ConsumerGroup, Stream

_FORGET_AFTER_S = 3600.0
"""Pods come and go under ever new names. A name that holds nothing and was silent for so long is
forgotten.
"""


class RedisTrimming:
    """What a `RedisBus` knows of how far the groups of a stream are."""

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
        """Remove what every group has acknowledged; returns the number of entries."""
        floors = {stream: await self._fetch_floor(stream) for stream in streams}
        commands: list[Command] = [
            ("XTRIM", self._session.keys.stream(stream), "MINID", "=", floor)
            for stream, floor in floors.items()
            if floor
        ]
        return sum(await self._session.send(commands))

    async def _fetch_floor(self, stream: Stream) -> str | None:
        """The oldest entry id that some group still needs, None if nothing can be said to be
        finished.
        """
        groups = await self._fetch_groups(stream)
        if not set(self._session.wiring.groups[stream]) <= groups.keys():
            return None
        names = [name for name, info in groups.items() if info["pending"]]
        summaries = await self._session.send(
            [("XPENDING", self._session.keys.stream(stream), name) for name in names]
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
                decode(oldest_pending.get(name, info["last-delivered-id"]))
            )
            floors.append((milliseconds, sequence + (name not in oldest_pending)))
        milliseconds, sequence = min(floors)
        return f"{milliseconds}-{sequence}"

    async def _fetch_groups(self, stream: Stream) -> dict[str, dict[str, Any]]:
        """Redis' record of each group of a stream by name; empty if there is no such stream."""
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
        """How far a group is behind, see `Bus.stream_lag`."""
        self._session.wiring.check_group(stream, group)
        key = self._session.keys.stream(stream)
        groups = await self._fetch_groups(stream)
        info = groups.get(group, {"last-delivered-id": BEFORE_FIRST, "pending": 0})
        last_delivered = decode(info["last-delivered-id"])
        first_undelivered = ("XRANGE", key, f"({last_delivered}", "+", "COUNT", 1)
        commands: list[Command] = [("TIME",), first_undelivered]
        commands += [("XPENDING", key, group)] if info["pending"] else []
        (seconds, microseconds), undelivered, *pending = await self._session.send(commands)
        num_undelivered = info.get("lag") if undelivered else 0
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
