from __future__ import annotations

import pytest

from sdar.contracts import codec
from sdar.contracts.errors import StaleError, WeightsUnavailableError
from sdar.contracts.streams import Stream
from sdar.in_process.memory_bus import MemoryBus
from services.teacher.metrics import (
    REFUSED_POLICIES,
    TeacherMetrics,
)
from tests.unit.teacher.builders import FakeScorer, build_follower, make_manifest


class Clock:
    """Time that passes only when told, and while the scorer loads."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class SlowScorer(FakeScorer):
    def __init__(self, clock: Clock, load_s: float) -> None:
        super().__init__()
        self._clock, self._load_s = clock, load_s

    async def update_weights(self, manifest):
        self._clock.now_s += self._load_s
        await super().update_weights(manifest)


async def publish(bus, *versions):
    await bus.publish(
        Stream.POLICY_UPDATES,
        [codec.encode_weights_manifest(make_manifest(version)) for version in versions],
    )


async def test_before_anything_is_published_the_base_scores_as_version_zero():
    scorer = FakeScorer()
    await build_follower(MemoryBus({}), scorer, max_lag=0).catch_up()
    assert (scorer.teacher_version, scorer.loaded) == (0, [])


async def test_the_newest_version_is_loaded_and_those_between_are_skipped():
    bus, scorer = MemoryBus({}), FakeScorer()
    await publish(bus, 1, 2, 3)
    follower = build_follower(bus, scorer, max_lag=2)
    await follower.catch_up()
    assert (scorer.loaded, follower.lag) == ([3], 0)


async def test_a_teacher_never_scores_past_its_lag_bound_however_slow_loading_is():
    """Loading takes 100 s, versions come every 10 s: each third unseen one is loaded."""
    clock = Clock()
    bus, scorer = MemoryBus({}), SlowScorer(clock, load_s=100.0)
    follower = build_follower(bus, scorer, max_lag=2, clock=clock)
    for version in range(1, 10):
        await publish(bus, version)
        await follower.catch_up()
        assert follower.lag <= 2
        clock.now_s += 10.0
    assert scorer.loaded == [1, 4, 7]


async def test_a_cheap_load_is_taken_before_it_is_due():
    clock = Clock()
    bus, scorer = MemoryBus({}), SlowScorer(clock, load_s=1.0)
    follower = build_follower(bus, scorer, max_lag=5, clock=clock)
    for version in range(1, 4):
        await publish(bus, version)
        await follower.catch_up()
        clock.now_s += 10.0
    assert scorer.loaded == [1, 2, 3]


async def test_an_asked_for_version_is_loaded_and_an_unpublished_one_refused():
    clock = Clock()
    bus, scorer = MemoryBus({}), SlowScorer(clock, load_s=100.0)
    follower = build_follower(bus, scorer, max_lag=5, clock=clock)
    await publish(bus, 1)
    await follower.catch_up()
    await publish(bus, 2)
    await follower.catch_up()
    assert scorer.teacher_version == 1
    await follower.catch_up(min_version=2)
    assert scorer.teacher_version == 2
    with pytest.raises(StaleError, match="up to 2, version 3 is asked for"):
        await follower.catch_up(min_version=3)


async def test_a_version_that_was_collected_meanwhile_has_a_successor():
    bus = MemoryBus({})

    class LateScorer(FakeScorer):
        async def update_weights(self, manifest):
            if manifest.policy_version == 1:
                await publish(bus, 2)
                raise WeightsUnavailableError("Version 1 is gone.")
            await super().update_weights(manifest)

    scorer = LateScorer()
    await publish(bus, 1)
    await build_follower(bus, scorer, max_lag=0).catch_up()
    assert scorer.loaded == [2]


async def test_a_version_that_cannot_be_read_is_an_error_only_when_it_is_due():
    bus, scorer = MemoryBus({}), FakeScorer()
    scorer.missing = {1}
    await publish(bus, 1)
    follower = build_follower(bus, scorer, max_lag=1)
    await follower.catch_up()
    assert follower.lag == 1
    with pytest.raises(WeightsUnavailableError):
        await build_follower(bus, scorer, max_lag=0).catch_up()


async def test_of_two_versions_within_the_lag_bound_the_one_that_can_be_read_is_taken():
    bus = MemoryBus({})
    scorer = FakeScorer()
    metrics = TeacherMetrics()
    scorer.corrupt, scorer.missing = {5}, {4}
    await publish(bus, 1, 2, 3, 4, 5)
    await build_follower(bus, scorer, max_lag=2, metrics=metrics).catch_up()
    assert (scorer.loaded, metrics.read(REFUSED_POLICIES)) == ([3], 2)


async def test_nothing_older_than_the_lag_bound_is_taken_in_place_of_what_cannot_be_read():
    bus, scorer = MemoryBus({}), FakeScorer()
    scorer.corrupt = {4, 5}
    await publish(bus, 1, 2, 3, 4, 5)
    with pytest.raises(WeightsUnavailableError, match="from 4 to 5 can be read: bad checksum"):
        await build_follower(bus, scorer, max_lag=1).catch_up()
    assert scorer.loaded == []


async def test_an_update_that_cannot_be_decoded_is_passed_over():
    bus, scorer = MemoryBus({}), FakeScorer()
    await publish(bus, 1)
    await bus.publish(Stream.POLICY_UPDATES, [b"\xff\xff"])
    await build_follower(bus, scorer, max_lag=1).catch_up()
    assert scorer.loaded == [1]


async def test_the_version_that_scores_and_the_one_being_loaded_are_in_use_and_no_other():
    bus = MemoryBus({})

    class WatchedScorer(FakeScorer):
        async def update_weights(self, manifest):
            self.could_retire = [
                await bus.retire_versions([version]) for version in (1, manifest.policy_version)
            ]
            await super().update_weights(manifest)

    scorer = WatchedScorer()
    follower = build_follower(bus, scorer, max_lag=0)
    for version in (1, 2):
        await publish(bus, version)
        await follower.catch_up()
    assert scorer.could_retire == [False, False]
    assert await bus.retire_versions([1])
    assert not await bus.retire_versions([2])


async def test_a_version_that_is_being_deleted_is_not_begun():
    bus, scorer = MemoryBus({}), FakeScorer()
    await publish(bus, 1)
    await bus.retire_versions([1])
    with pytest.raises(WeightsUnavailableError, match="being deleted"):
        await build_follower(bus, scorer, max_lag=0).catch_up()
    assert scorer.loaded == []


class PublishingScorer(FakeScorer):
    """While version 4 is read, version 6 is published; there is no 5, as after a learner that was
    killed between storing a version and announcing it. Neither can be read.
    """

    def __init__(self, bus):
        super().__init__()
        self.bus = bus
        self.corrupt = {4, 6}

    async def update_weights(self, manifest):
        if manifest.policy_version == 4:
            await publish(self.bus, 6)
        await super().update_weights(manifest)


async def test_what_is_loaded_in_place_of_an_unreadable_version_is_not_past_the_lag_bound():
    bus = MemoryBus({})
    scorer = PublishingScorer(bus)
    await publish(bus, 2, 3, 4)
    policy = build_follower(bus, scorer, max_lag=2)

    with pytest.raises(WeightsUnavailableError):
        await policy.catch_up()

    assert (scorer.loaded, scorer.teacher_version) == ([], 0)
