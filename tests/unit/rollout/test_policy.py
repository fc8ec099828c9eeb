"""Which version is served, with a scripted engine and the in-memory bus."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest

from sdar.contracts import codec
from sdar.contracts.errors import UnavailableError, WeightsUnavailableError
from sdar.contracts.streams import Stream
from sdar.runtime.memory_bus import MemoryBus
from services.rollout.policy import PolicyFollower
from tests.support import until
from tests.unit.rollout.fakes import ScriptedEngine, make_manifest


async def publish(bus, *versions):
    await bus.publish(Stream.POLICY_UPDATES, [codec.encode_weights_manifest(make_manifest(version)) for version in versions])


@asynccontextmanager
async def following(engine, *published):
    bus, stopping = MemoryBus({}), asyncio.Event()
    await publish(bus, *published)
    follower = PolicyFollower(bus, engine, block_s=0.01, retry_delays_s=[0.0])
    await follower.catch_up()
    running = asyncio.create_task(follower.run(stopping))
    try:
        yield bus, follower
    finally:
        stopping.set()
        await asyncio.wait([running])
        if (error := running.exception()) is not None:
            raise error


async def test_a_worker_that_joins_loads_only_the_newest_version():
    engine = ScriptedEngine()
    async with following(engine, 0, 1, 2, 3):
        assert engine.updates == [3]


async def test_the_newest_version_is_followed():
    engine = ScriptedEngine()
    async with following(engine, 0) as (bus, follower):
        await publish(bus, 1)
        await until(lambda: engine.policy_version == 1)
        assert follower.newest_version == 1


async def test_the_pinned_version_is_served_until_the_evaluation_is_over_then_the_newest():
    engine = ScriptedEngine()
    async with following(engine, 0, 1) as (bus, follower):
        async with follower.pinned(1):
            await publish(bus, 2)
            await until(lambda: follower.newest_version == 2)
            assert engine.policy_version == 1
        await until(lambda: engine.policy_version == 2)


async def test_an_evaluation_of_an_older_version_goes_back_to_it():
    engine = ScriptedEngine()
    async with following(engine, 1, 2, 3) as (_, follower):
        async with follower.pinned(2):
            assert engine.policy_version == 2
        await until(lambda: engine.policy_version == 3)


async def test_an_evaluation_waits_for_a_version_that_is_not_published_yet():
    engine = ScriptedEngine()
    async with following(engine, 1) as (bus, follower):
        entering = asyncio.create_task(follower.pinned(2).__aenter__())
        await asyncio.sleep(0.03)
        assert not entering.done()
        await publish(bus, 2)
        await entering
        assert engine.policy_version == 2


async def test_pinned_versions_are_served_one_after_the_other_the_oldest_of_those_waiting_first():
    """In hand: 3. Waiting: 5, 2. Order: 3 (never interrupted), 2, 5."""
    engine, order = ScriptedEngine(), []
    async with following(engine, *range(1, 6)) as (_, follower):

        async def evaluate(version):
            async with follower.pinned(version):
                await asyncio.sleep(0.01)
                order.append((version, engine.policy_version))

        async with follower.pinned(3):
            waiting = [asyncio.create_task(evaluate(version)) for version in (5, 2, 2)]
            await asyncio.sleep(0.03)
            assert engine.policy_version == 3
        await asyncio.gather(*waiting)
    assert order == [(2, 2), (2, 2), (5, 5)]


async def test_a_version_that_is_gone_fails_its_evaluation_and_the_previous_one_serves_on():
    engine = ScriptedEngine(missing={2})
    async with following(engine, 1, 2) as (bus, follower):
        assert engine.policy_version == 0
        with pytest.raises(WeightsUnavailableError):
            async with follower.pinned(2):
                pass
        await publish(bus, 3)
        await until(lambda: engine.policy_version == 3)


async def test_a_cancelled_wait_does_not_hold_the_version():
    engine = ScriptedEngine()
    async with following(engine, 1, 2) as (bus, follower):
        waiting = asyncio.create_task(follower.pinned(9).__aenter__())
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.wait([waiting])
        await publish(bus, 3)
        await until(lambda: engine.policy_version == 3)


async def test_a_dead_engine_ends_the_follower():
    engine, bus = ScriptedEngine(), MemoryBus({})
    running = asyncio.create_task(PolicyFollower(bus, engine, block_s=0.01).run(asyncio.Event()))
    engine.is_alive = False
    await publish(bus, 1)
    with pytest.raises(UnavailableError):
        await running


async def test_a_training_group_waits_until_the_version_it_was_admitted_for_is_served():
    engine = ScriptedEngine()
    async with following(engine, 1) as (bus, follower):
        waiting = asyncio.create_task(follower.reached(2))
        async with follower.pinned(1):
            await publish(bus, 2)
            await until(lambda: follower.newest_version == 2)
            assert not waiting.done()
        await asyncio.wait_for(waiting, 5)
        assert engine.policy_version == 2
