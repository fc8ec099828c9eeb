"""What only the Redis bus promises: it outlives outages and restarts, heals missing groups and says what is wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import redis.asyncio as redis

from sdar.contracts.errors import BusUnavailableError, ConfigurationError
from sdar.contracts.streams import ConsumerGroup, RunKeys, Stream
from sdar.contracts.types import GroupOutcome, LedgerEvent
from sdar.runtime.bus import BEFORE_FIRST, BusLimits
from sdar.runtime.embedded_redis import EmbeddedRedis
from sdar.runtime.ledger import format_group_id
from sdar.runtime.redis_bus import RedisBus

TASKS, LEDGER, ROLLOUT, GATEWAY = Stream.TASKS, Stream.LEDGER, ConsumerGroup.ROLLOUT, ConsumerGroup.GATEWAY
WIRING = {TASKS: (ROLLOUT,), LEDGER: (GATEWAY,)}
LIMITS = BusLimits(max_entries=100, publish_timeout_s=0.2, trim_interval_s=0.0, outage_tolerance_s=10.0)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path) as server:
        yield server


@pytest.fixture
async def bus(server: EmbeddedRedis) -> AsyncIterator[RedisBus]:
    bus = RedisBus(server.url, "run", WIRING, LIMITS)
    yield bus
    await bus.close()


@pytest.fixture
async def client(server: EmbeddedRedis) -> AsyncIterator[redis.Redis]:
    client = redis.Redis.from_url(server.url)
    yield client
    await client.aclose()


def event(number: int, outcome: GroupOutcome) -> LedgerEvent:
    return LedgerEvent("run", format_group_id(number), outcome, num_trajectories=2, policy_version=0)


class Reports:
    """What the bus said about being held up, in order; `arrived` is set by each."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.arrived = asyncio.Event()

    def __call__(self, reason: str) -> None:
        self.reasons.append(reason)
        self.arrived.set()

    async def wait_for(self, num_reasons: int) -> None:
        async with asyncio.timeout(10.0):
            while len(self.reasons) < num_reasons:
                self.arrived.clear()
                await self.arrived.wait()


@pytest.mark.parametrize(("fsync", "end"), [("everysec", EmbeddedRedis.stop), ("always", EmbeddedRedis.kill)])
async def test_nothing_is_lost_when_redis_restarts(
    tmp_path: Path, fsync: Literal["everysec", "always"], end: Callable[[EmbeddedRedis], None]
) -> None:
    with EmbeddedRedis(tmp_path, fsync=fsync) as server:
        bus = RedisBus(server.url, "run", WIRING, LIMITS)
        await bus.publish(TASKS, [b"0", b"1", b"2", b"3"])
        held = await bus.read(TASKS, ROLLOUT, "a", max_count=3)
        await bus.commit({LEDGER: [b"done 0"]}, held[:1], {"cursor": b"1"})
        end(server)
        server.start()
        assert [d.payload for d in await bus.reclaim(TASKS, ROLLOUT, "b", min_idle_s=0.0, max_count=9)] == [b"1", b"2"]
        assert [d.payload for d in await bus.read(TASKS, ROLLOUT, "b", max_count=9)] == [b"3"]
        assert [entry.payload for entry in await bus.tail(LEDGER, BEFORE_FIRST, max_count=9)] == [b"done 0"]
        assert await bus.load_state("cursor") == b"1"
        await bus.close()


async def test_calls_wait_out_a_short_outage(server: EmbeddedRedis, bus: RedisBus) -> None:
    reading = asyncio.create_task(bus.read(TASKS, ROLLOUT, "a", max_count=1, block_s=30.0))
    await bus.ping()
    server.kill()
    publishing = asyncio.create_task(bus.publish(TASKS, [b"1"]))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not publishing.done()
    server.start()
    async with asyncio.timeout(10.0):
        await publishing
        assert [delivery.payload for delivery in await reading] == [b"1"]


async def test_a_long_outage_says_where_and_what_to_do(server: EmbeddedRedis) -> None:
    bus = RedisBus(server.url, "run", WIRING, BusLimits(outage_tolerance_s=0.1))
    server.kill()
    with pytest.raises(BusUnavailableError, match=r"127\.0\.0\.1:\d+/0 did not answer for 0\.1 s .* SDAR_REDIS_URL"):
        await bus.ping()
    await bus.close()


async def test_no_message_shows_the_password() -> None:
    bus = RedisBus("redis://user:secret@127.0.0.1:1/0", "run", WIRING, BusLimits(outage_tolerance_s=0.0))
    with pytest.raises(BusUnavailableError) as caught:
        await bus.ping()
    assert "secret" not in f"{caught.value} {caught.value.fields}"
    await bus.close()


async def test_wrong_credentials_fail_at_once(bus: RedisBus, client: redis.Redis) -> None:
    await client.config_set("requirepass", "right")
    with pytest.raises(ConfigurationError, match="refuses the credentials"):
        await bus.ping()


async def test_a_redis_without_memory_is_waited_out_and_reported_and_nothing_is_half_done(
    server: EmbeddedRedis, client: redis.Redis
) -> None:
    reports = Reports()
    bus = RedisBus(server.url, "run", WIRING, replace(LIMITS, outage_tolerance_s=0.0), on_blocked=reports)
    await bus.publish(TASKS, [b"1", b"2"])
    held = await bus.read(TASKS, ROLLOUT, "a", max_count=2)
    await client.config_set("maxmemory", 1)
    committing = asyncio.create_task(
        bus.commit({LEDGER: [b"done"]}, held[:1], {"cursor": b"1"}, [event(0, GroupOutcome.ISSUED)])
    )
    await reports.wait_for(3)
    assert not committing.done()
    assert all("is full: " in reason and "OOM command not allowed" in reason for reason in reports.reasons)
    await bus.acknowledge(held[1:])  # frees memory, so it must not wait
    assert await bus.renew(held) == held[:1]
    assert await bus.newest(LEDGER) is None
    assert await bus.load_state("cursor") is None
    assert (await bus.read_ledger()).num_issued == 0
    assert len([key async for key in client.scan_iter("*:commit:*")]) == 1, "the mark of the first publication alone"
    await client.config_set("maxmemory", 0)
    async with asyncio.timeout(10.0):
        await committing
    assert reports.reasons[-1] == ""
    assert await bus.load_state("cursor") == b"1"
    assert (await bus.read_ledger()).num_issued == 1
    assert await bus.renew(held) == []
    await bus.close()


async def test_groups_come_back_after_redis_was_flushed_even_under_a_blocked_read(bus: RedisBus, client: redis.Redis) -> None:
    reading = asyncio.create_task(bus.read(TASKS, ROLLOUT, "a", max_count=1, block_s=30.0))
    async with asyncio.timeout(10.0):
        num_blocked = 0
        while not num_blocked:
            num_blocked = (await client.info("clients"))["blocked_clients"]
        await client.flushall()
        await bus.publish(TASKS, [b"after"])
        assert [delivery.payload for delivery in await reading] == [b"after"]
    await client.flushall()
    assert await bus.reclaim(TASKS, ROLLOUT, "a", min_idle_s=0.0, max_count=9) == []
    assert (await bus.stream_lag(TASKS, ROLLOUT)).num_pending == 0


async def test_renewing_after_a_flush_holds_nothing(bus: RedisBus, client: redis.Redis) -> None:
    await bus.publish(TASKS, [b"1"])
    held = await bus.read(TASKS, ROLLOUT, "a", max_count=1)
    await client.flushall()
    assert await bus.renew(held) == []


async def test_trimming_spares_groups_that_only_exist_in_redis(bus: RedisBus, client: redis.Redis) -> None:
    await bus.publish(TASKS, [b"1", b"2"])
    await client.xgroup_create(RunKeys("run").stream(TASKS), "archive", "0")
    await bus.acknowledge(await bus.read(TASKS, ROLLOUT, "a", max_count=9))
    assert await bus.trim() == 0


async def test_acknowledging_trims_on_the_way(bus: RedisBus, client: redis.Redis) -> None:
    await bus.publish(TASKS, [b"1", b"2"])
    first, second = await bus.read(TASKS, ROLLOUT, "a", max_count=9)
    await bus.acknowledge([first])
    await bus.acknowledge([second])
    assert await client.xlen(RunKeys("run").stream(TASKS)) == 1, "each acknowledgement trims what was finished before it"


async def test_a_read_can_be_cancelled_at_any_moment(server: EmbeddedRedis) -> None:
    async with AsyncExitStack() as stack, asyncio.timeout(20.0):
        for num_steps in range(30):
            bus = RedisBus(server.url, "run", WIRING, LIMITS)
            stack.push_async_callback(bus.close)
            reading = asyncio.create_task(bus.read(TASKS, ROLLOUT, "a", max_count=1, block_s=30.0))
            for _ in range(num_steps):
                await asyncio.sleep(0)
            reading.cancel()
            await asyncio.wait([reading])
            assert reading.cancelled()


async def test_runs_do_not_see_each_other(server: EmbeddedRedis, bus: RedisBus) -> None:
    other = RedisBus(server.url, "other", WIRING, LIMITS)
    await other.publish(TASKS, [b"theirs"])
    assert await bus.read(TASKS, ROLLOUT, "a", max_count=1) == []
    await other.close()


def test_an_address_that_is_no_redis_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"redis://host:port/0"):
        RedisBus("http://localhost", "run", WIRING)
