"""What a reader of weights knows of the versions that were published."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from sdar.contracts import codec
from sdar.contracts.errors import (
    BusUnavailableError,
    CorruptionError,
    EngineFailedError,
    MismatchError,
    RefusedError,
    SdarError,
    WeightsUnavailableError,
)
from sdar.contracts.streams import Stream
from sdar.contracts.types import ModelIdentity, WeightsManifest
from sdar.in_process.memory_bus import MemoryBus
from sdar.weights.follower import PolicyFollower


def make_manifest(version: int, num_updates: int = 0) -> WeightsManifest:
    model = ModelIdentity("model", "template")
    return WeightsManifest("run", version, f"run/v{version:08d}", (), 0, model, 0.0, num_updates)


async def publish(bus: MemoryBus, *versions: int) -> None:
    encoded = [codec.encode_weights_manifest(make_manifest(version)) for version in versions]
    await bus.publish(Stream.POLICY_UPDATES, encoded)


async def accept(manifest: WeightsManifest) -> None:
    """An engine that can read everything."""


def refuse_with(error: SdarError, *versions: int):
    async def install(manifest: WeightsManifest) -> None:
        if manifest.policy_version in versions:
            raise error

    return install


async def follow(*versions: int, **options) -> PolicyFollower:
    bus = MemoryBus({})
    await publish(bus, *versions)
    follower = PolicyFollower(bus, **options)
    await follower.read()
    return follower


async def test_before_anything_is_published_the_newest_version_is_the_base() -> None:
    follower = await follow()
    assert (follower.newest, follower.newest_version, follower.find_usable()) == (None, 0, None)


async def test_the_newest_manifest_is_known_and_the_last_of_two_of_one_version_counts() -> None:
    bus = MemoryBus({})
    follower = PolicyFollower(bus)
    for num_updates in (6, 7):
        manifest = make_manifest(3, num_updates)
        await bus.publish(Stream.POLICY_UPDATES, [codec.encode_weights_manifest(manifest)])
    await follower.read()
    assert follower.newest == make_manifest(3, 7)


async def test_a_long_stream_is_read_to_its_end_and_what_comes_later_is_added() -> None:
    bus = MemoryBus({})
    await publish(bus, *range(1500))
    follower = PolicyFollower(bus, max_known=2)
    await follower.read()
    assert follower.newest_version == 1499
    await publish(bus, 1500)
    await follower.read()
    assert [version for version in range(1501) if version in follower] == [1499, 1500]


async def test_only_the_newest_versions_and_the_first_are_kept_in_mind() -> None:
    follower = await follow(*range(10), max_known=3)
    assert [version for version in range(10) if version in follower] == [0, 7, 8, 9]


async def test_of_a_long_page_no_more_is_decoded_than_is_kept() -> None:
    """What is between the base and the versions that are kept could not be decoded."""
    bus = MemoryBus({})
    await publish(bus, 0)
    await bus.publish(Stream.POLICY_UPDATES, [b"\xff\xff"] * 47)
    await publish(bus, 48, 49)
    follower = PolicyFollower(bus, max_known=2)
    with capture_logs() as events:
        await follower.read()
    assert events == []
    assert [version for version in range(50) if version in follower] == [0, 48, 49]


async def test_an_update_that_cannot_be_decoded_is_passed_over_for_the_one_before() -> None:
    bus = MemoryBus({})
    await publish(bus, 1, 2)
    await bus.publish(Stream.POLICY_UPDATES, [b"\xff\xff"])
    follower = PolicyFollower(bus)
    await follower.read()
    assert follower.newest_version == 2


@pytest.mark.parametrize(
    "error", [CorruptionError("torn"), WeightsUnavailableError("gone"), RefusedError("other model")]
)
async def test_a_version_that_cannot_be_read_is_refused_counted_and_the_one_before_is_next(
    error: SdarError,
) -> None:
    num_refused = 0

    def count() -> None:
        nonlocal num_refused
        num_refused += 1

    follower = await follow(1, 2, max_known=9, on_refused=count)
    assert await follower.load(1, accept)
    with capture_logs() as logged:
        assert not await follower.load(2, refuse_with(error, 2))
    assert (num_refused, follower.find_usable(), follower.find_usable(least=2)) == (1, 1, None)
    assert follower.get_refusal(2) is error
    [event] = logged
    assert (event["event"], event["policy_version"], event["serving"]) == ("policy_refused", 2, 1)


@pytest.mark.parametrize("error", [BusUnavailableError("away"), EngineFailedError("dead")])
async def test_a_fault_of_bus_or_engine_says_nothing_of_the_version(error: SdarError) -> None:
    follower = await follow(1)
    with pytest.raises(type(error)):
        await follower.load(1, refuse_with(error, 1))
    assert follower.find_usable() == 1


async def test_a_version_whose_manifest_is_not_at_hand_is_refused_without_a_load() -> None:
    follower = await follow(7, 8, 9)

    async def never(manifest: WeightsManifest) -> None:
        raise AssertionError

    assert not await follower.load(7, never)
    assert "not in the stream of updates any more" in str(follower.get_refusal(7))


async def test_a_refusal_lapses_after_its_time() -> None:
    follower = await follow(1, refusal_s=0.02)
    await follower.load(1, refuse_with(WeightsUnavailableError("away"), 1))
    assert follower.is_refused(1)
    await asyncio.sleep(0.03)
    assert not follower.is_refused(1)
    assert await follower.load(follower.find_usable(), accept)


async def test_a_refusal_without_a_time_lasts_until_it_is_forgiven() -> None:
    follower = await follow(1, 2, max_known=9)
    for version in (1, 2):
        await follower.load(version, refuse_with(CorruptionError("torn"), version))
    follower.forgive(1)
    assert [follower.is_refused(version) for version in (1, 2)] == [False, True]
    follower.forgive()
    assert follower.find_usable() == 2


async def test_a_version_is_waited_for_until_it_is_published() -> None:
    bus = MemoryBus({})
    follower = PolicyFollower(bus)
    waiting = asyncio.create_task(follower.wait_until(lambda: follower.newest_version >= 2))
    for version in (1, 2):
        assert not waiting.done()
        await publish(bus, version)
        await follower.read()
        await asyncio.sleep(0)
    await asyncio.wait_for(waiting, 5)


async def test_a_read_waits_for_the_next_publication() -> None:
    bus = MemoryBus({})
    follower = PolicyFollower(bus)
    reading = asyncio.create_task(follower.read(block_s=5.0))
    await asyncio.sleep(0.01)
    await publish(bus, 4)
    await reading
    assert follower.newest_version == 4


async def test_disproofs_are_counted_until_a_version_as_new_is_right() -> None:
    follower = await follow(1, 2, 3, max_known=9)
    wrong = refuse_with(MismatchError("off by 12 nats"), 2, 3)
    for version in (2, 3, 3):
        assert not await follower.load(version, wrong)
    # An older version, as an evaluation asks for it, says nothing of those.
    assert await follower.load(1, wrong)
    assert not await follower.load(2, refuse_with(CorruptionError("torn"), 2))
    assert follower.num_disproofs == 3
    assert await follower.load(3, accept)
    assert follower.num_disproofs == 0
