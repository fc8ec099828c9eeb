from __future__ import annotations

import asyncio
import contextlib

import pytest
from structlog.testing import capture_logs

from sdar.contracts.errors import WeightsUnavailableError
from sdar.in_process.memory_bus import MemoryBus
from sdar.weights.pins import PinnedVersions

TTL_S = 0.2


@contextlib.asynccontextmanager
async def keeping(pins):
    stopping = asyncio.Event()
    task = asyncio.create_task(pins.keep(stopping))
    try:
        yield
    finally:
        stopping.set()
        await task


async def test_a_version_stays_in_use_while_it_is_kept_and_no_longer():
    bus = MemoryBus({})
    pins = PinnedVersions(bus, "me", TTL_S)
    async with pins.loading(1):
        pass
    async with keeping(pins):
        await asyncio.sleep(2 * TTL_S)
        assert not await bus.retire_versions([1])
    await asyncio.sleep(TTL_S)
    assert await bus.retire_versions([1])


async def test_while_a_version_is_loaded_the_one_before_is_in_use_and_stays_so_if_loading_fails():
    bus = MemoryBus({})
    pins = PinnedVersions(bus, "me")
    async with pins.loading(1):
        pass

    async def load_a_torn_version() -> None:
        async with pins.loading(2):
            assert not await bus.retire_versions([1])
            assert not await bus.retire_versions([2])
            raise WeightsUnavailableError("torn")

    with pytest.raises(WeightsUnavailableError, match="torn"):
        await load_a_torn_version()
    async with pins.loading(3):
        assert await bus.retire_versions([2])
        assert not await bus.retire_versions([1])
    assert await bus.retire_versions([1])


async def test_a_version_that_is_being_deleted_cannot_be_loaded():
    bus = MemoryBus({})
    await bus.retire_versions([1])
    with pytest.raises(WeightsUnavailableError, match="Policy version 1 is being deleted"):
        async with PinnedVersions(bus, "me").loading(1):
            pass


async def test_a_reader_whose_version_was_deleted_during_a_long_pause_loads_and_keeps_the_next():
    bus = MemoryBus({})
    pins = PinnedVersions(bus, "me", TTL_S)
    async with pins.loading(1):
        pass
    await asyncio.sleep(TTL_S)
    assert await bus.retire_versions([1])
    async with pins.loading(2):
        pass
    async with keeping(pins):
        await asyncio.sleep(2 * TTL_S)
        assert not await bus.retire_versions([2])
    await asyncio.sleep(TTL_S)
    assert await bus.retire_versions([2])
    with capture_logs() as events:
        async with keeping(pins):
            await asyncio.sleep(TTL_S)
    assert [
        event["policy_versions"] for event in events if event["event"] == "versions_retired_in_use"
    ] == [[2]]
