"""The main loop with a trainer that only counts: order of effects, resuming, finishing.

Three updates of two groups.
"""

from __future__ import annotations

import asyncio
import errno
import os

import pytest
import structlog

from sdar.bus.ledger import format_group_id
from sdar.contracts.errors import (
    BusUnavailableError,
    CapacityError,
    SupersededError,
    WeightsUnavailableError,
)
from sdar.contracts.streams import ConsumerGroup, Stream
from sdar.contracts.types import GroupOutcome
from services.learner.ingest import NOT_FINITE
from tests.support import until
from tests.unit.learner.builders import (
    CountingTrainer,
    count_pending,
    issue,
    make_bus,
    make_config,
    make_group,
    read_account,
    read_journal,
    read_ledger,
    send,
)
from tests.unit.learner.rig import Rig


@pytest.fixture
def rig(tmp_path):
    return Rig(tmp_path)


def groups(*names, **item):
    return [episode for name in names for episode in make_group(name, **item)]


async def test_version_0_is_published_before_anything_is_trained(rig):
    await rig.start()
    while await rig.announced() != [0]:  # noqa: ASYNC110  the bus offers no event
        await asyncio.sleep(0.01)
    assert rig.weight_of(0) == 0.0
    await rig.stop()


async def test_each_update_publishes_a_version_and_its_measurements(rig):
    await rig.start()
    await send(rig.bus, *groups("a", "b", "c", "d"))
    await rig.reach(2)
    await rig.stop()
    assert await rig.announced() == [0, 1, 2]
    assert [rig.weight_of(version) for version in (1, 2)] == [1.0, 2.0]
    assert [rig.weights.fetch_manifest(version).num_updates for version in (0, 1, 2)] == [0, 1, 2]
    turns = {
        labels: rig.registry.get_sample_value("sdar_learner_episode_turns_sum", {"outcome": labels})
        for labels in ("trained", "stale")
    }
    assert turns == {"trained": 4 * 2 * 2, "stale": None}
    first, second = await rig.records()
    assert (first.policy_version, second.policy_version) == (1, 2)
    assert first.values["success_mean"] == 0.5
    assert first.values["success_heat"] == 1.0
    assert first.values["num_episodes_heat"] == 2
    assert second.values["staleness_max"] == 1
    assert second.values["staleness_tokens_1"] == second.values["num_tokens"]


async def test_entries_are_acknowledged_and_groups_booked_as_trained_only_with_a_checkpoint(rig):
    rig.config = make_config(checkpoint_every=2)
    await rig.start()
    await issue(rig.bus, range(2))
    await rig.reach(1)
    while len(await rig.records()) < 1:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert await count_pending(rig.bus) == 4
    assert await read_account(rig.bus) == {"issued": 2, "generated": 2, "buffered": 2}
    await issue(rig.bus, range(2, 4), version=1)
    while await count_pending(rig.bus):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert rig.checkpoints.find_newest().progress.num_updates == 2
    assert await read_account(rig.bus) == {"issued": 4, "generated": 4, "trained": 4}
    trained = [
        event for event in await read_journal(rig.bus) if event.outcome is GroupOutcome.TRAINED
    ]
    expected = [(format_group_id(number), 1 + number // 2) for number in range(4)]
    assert [(event.group_id, event.policy_version) for event in trained] == expected
    assert {(event.num_trajectories, event.episode_turns) for event in trained} == {(2, (2, 2))}
    await rig.stop()


async def test_being_stopped_makes_finished_updates_durable(rig):
    await rig.start()
    await send(rig.bus, *groups("a", "b"))
    await rig.reach(1)
    await rig.stop()
    assert await count_pending(rig.bus) == 0
    assert rig.learner.progress.trained_groups == (("a", "b"),)
    await rig.start()
    await send(rig.bus, *groups("c", "d", version=1))
    await rig.reach(2)
    await rig.stop()
    assert rig.trainer.batches == [["c", "d"]]
    assert await rig.announced() == [0, 1, 2], (
        "nothing was lost, so versions and updates still agree"
    )


async def test_after_a_kill_lost_updates_are_trained_again_under_new_versions(rig):
    rig.config = make_config(num_updates=4)  # update 3 is neither the last nor due for a checkpoint
    await rig.start()
    await send(rig.bus, *groups("a", "b", "c", "d"), *groups("e", "f", version=1))
    await rig.reach(3)
    await rig.kill()
    await rig.start()
    await rig.reach(3)
    await rig.stop()
    assert rig.learner.progress.num_updates == 3
    assert rig.learner.progress.trained_groups == (("a", "b"), ("c", "d"), ("e", "f"))
    versions = await rig.announced()
    assert len(versions) == len(set(versions))
    assert rig.weight_of(versions[-1]) == 3.0


BUS_CALLS = ["claim_role", "newest", "publish", "reclaim", "read", "take_snapshot", "commit"]


@pytest.mark.parametrize("failing", BUS_CALLS)
async def test_a_crash_between_any_two_steps_trains_every_group_exactly_once(rig, failing):
    """The bus fails once at each kind of call, at every place of the loop in turn."""
    ids = await issue(rig.bus, range(6))
    original = getattr(rig.bus, failing)
    for place in range(4):
        calls = iter(range(1000))

        async def fail_at_place(*args, calls=calls, place=place, **kwargs):
            if next(calls) == place:
                raise BusUnavailableError("gone")
            return await original(*args, **kwargs)

        setattr(rig.bus, failing, fail_at_place)
        await rig.start()
        await until(lambda: rig.task.done() or rig.learner.is_finished)
        await rig.kill()
    setattr(rig.bus, failing, original)
    await rig.start()
    await rig.reach(3)
    await rig.stop()
    trained = [
        group_id for group_ids in rig.learner.progress.trained_groups for group_id in group_ids
    ]
    assert sorted(trained) == ids
    assert rig.weight_of((await rig.announced())[-1]) == 3.0
    assert await read_account(rig.bus) == {"issued": 6, "generated": 6, "trained": 6}
    assert await count_pending(rig.bus) == 0


async def crash_before_acknowledging(rig):
    """Train on what was issued; the bus is gone when the checkpoint's entries are acknowledged."""
    original = rig.bus.commit

    async def fail_to_acknowledge(publications, acknowledgements=(), *rest, **kwargs):
        if acknowledgements:
            raise BusUnavailableError("gone")
        await original(publications, acknowledgements, *rest, **kwargs)

    rig.bus.commit = fail_to_acknowledge
    await rig.start()
    await until(rig.task.done)
    await rig.kill()
    rig.bus.commit = original


async def test_a_crash_between_checkpoint_and_acknowledgement_books_the_groups_at_the_next_start(
    rig,
):
    rig.config = make_config(num_updates=4)
    await issue(rig.bus, range(4))
    await crash_before_acknowledging(rig)
    assert await read_account(rig.bus) == {"issued": 4, "generated": 4, "buffered": 4}
    await rig.start()
    async with asyncio.timeout(5):
        while await count_pending(rig.bus):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await rig.stop()
    assert rig.trainer.batches == []
    assert await read_account(rig.bus) == {"issued": 4, "generated": 4, "trained": 4}
    trained = [
        event for event in await read_journal(rig.bus) if event.outcome is GroupOutcome.TRAINED
    ]
    assert [event.policy_version for event in trained] == [1, 1, 2, 2]
    assert {event.episode_turns for event in trained} == {(2, 2)}


async def test_a_batch_of_which_no_step_was_taken_is_no_update_and_its_groups_fail_at_once(rig):
    rig.config = make_config(num_updates=4)
    rig.poisoned = tuple(await issue(rig.bus, range(2)))
    await rig.start()
    async with asyncio.timeout(5):
        while len(await rig.records()) < 1:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert rig.learner.progress.num_updates == 0
    assert await rig.announced() == [0]
    assert await count_pending(rig.bus) == 0
    assert await read_account(rig.bus) == {"issued": 2, "generated": 2, "failed": 2}
    assert {event.reason for event in await read_journal(rig.bus) if event.reason} == {NOT_FINITE}
    await issue(rig.bus, range(2, 4))
    await rig.reach(1)
    await rig.stop()
    assert rig.learner.progress.trained_groups == ((format_group_id(2), format_group_id(3)),)
    assert await rig.announced() == [0, 1]
    skipped, trained = [record.values for record in await rig.records()]
    assert (skipped["num_skipped_steps"], skipped["num_skipped_steps_in_a_row"]) == (2, 2)
    assert "success_mean" not in skipped
    assert (trained["num_skipped_steps"], trained["num_skipped_steps_in_a_row"]) == (0, 0)
    assert trained["num_groups_failed"] == 2
    assert (trained["num_episodes"], trained["num_trajectories"]) == (8, 4)


async def test_groups_of_a_skipped_step_fail_with_the_checkpoint_of_their_update(rig):
    rig.config = make_config(num_updates=4, checkpoint_every=2)
    ids = await issue(rig.bus, range(4))
    rig.poisoned = (ids[1],)
    for is_killed in (True, False):
        await rig.start()
        await rig.reach(1 if is_killed else 2)
        if is_killed:
            await rig.kill()
            assert await read_account(rig.bus) == {"issued": 4, "generated": 4, "buffered": 4}
    async with asyncio.timeout(5):
        while await count_pending(rig.bus):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await rig.stop()
    assert rig.learner.progress.trained_groups == ((ids[0],), (ids[2], ids[3]))
    assert rig.learner.progress.refused_groups == ()
    account = {"issued": 4, "generated": 4, "trained": 3, "failed": 1}
    assert await read_account(rig.bus) == account
    closed = [event for event in await read_journal(rig.bus) if event.group_id == ids[1]]
    assert [event.outcome.value for event in closed] == ["generated", "failed"]
    assert rig.learner.progress.num_groups == 3


async def test_a_crash_between_checkpoint_and_acknowledgement_books_refused_groups_as_failed(rig):
    rig.config = make_config(num_updates=4)
    ids = await issue(rig.bus, range(4))
    rig.poisoned = (ids[1],)
    await crash_before_acknowledging(rig)
    await rig.start()
    async with asyncio.timeout(5):
        while await count_pending(rig.bus):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await rig.stop()
    assert rig.trainer.batches == []
    account = {"issued": 4, "generated": 4, "trained": 3, "failed": 1}
    assert await read_account(rig.bus) == account


async def test_a_learner_that_was_superseded_ends_and_has_published_nothing_since(rig):
    await rig.start()
    while await rig.announced() != [0]:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    successor = rig.bus.view()
    await successor.claim_role(ConsumerGroup.LEARNER)
    await issue(successor, range(4))
    await until(rig.task.done)
    with pytest.raises(SupersededError, match="learner"):
        await rig.stop()
    rig.checkpoints.close()
    assert await rig.announced() == [0]
    assert await rig.records() == []
    assert await read_account(rig.bus) == {"issued": 4, "generated": 4, "buffered": 4}


async def test_a_bus_that_lost_its_disk_is_restored_and_nothing_is_trained_twice(
    rig,
):
    """Update 2 is durable, 3 is not, and group 6 waited when the server came back empty."""
    rig.config = make_config(num_updates=4)
    await rig.bus.save_state("scheduler", b"cursor")
    await rig.start()
    await issue(rig.bus, range(7))
    await rig.reach(3)
    await rig.kill()
    rig.bus = make_bus(rig.config)
    await rig.start()
    while not await rig.announced():  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert await rig.bus.load_state("scheduler") == b"cursor", (
        "the gateway goes on when it sees the policy"
    )
    assert await read_account(rig.bus) == {
        "issued": 7,
        "generated": 7,
        "trained": 4,
        "cancelled": 3,
    }
    await issue(rig.bus, range(7, 11), version=2)
    await rig.reach(4)
    await rig.stop()
    trained = [
        group_id for group_ids in rig.learner.progress.trained_groups for group_id in group_ids
    ]
    assert trained == [format_group_id(number) for number in (0, 1, 2, 3, 7, 8, 9, 10)]
    assert rig.trainer.batches == [trained[4:6], trained[6:]]
    assert await read_account(rig.bus) == {
        "issued": 11,
        "generated": 11,
        "trained": 8,
        "cancelled": 3,
    }


async def test_groups_whose_checkpoint_was_damaged_after_they_were_booked_are_told_of(rig):
    rig.config = make_config(num_updates=4, checkpoint_every=1)
    await issue(rig.bus, range(4))
    await rig.start()
    await rig.reach(2)
    await rig.stop()
    with structlog.testing.capture_logs() as logs:
        await rig.start()
        await until(lambda: any(entry["event"] == "learner_ready" for entry in logs))
        await rig.stop()
        assert "trained_groups_lost" not in {entry["event"] for entry in logs}
        (rig.directory / "update-00000002" / "state.json").unlink()
        await rig.start()
        await until(lambda: [entry["event"] for entry in logs].count("learner_ready") == 2)
        await rig.stop()
    [lost] = [entry for entry in logs if entry["event"] == "trained_groups_lost"]
    assert (lost["num_groups"], lost["log_level"]) == (2, "error")
    assert rig.learner.progress.num_updates == 1


async def test_a_bus_that_kept_its_account_is_left_as_it_is(rig):
    await issue(rig.bus, range(2))
    await rig.start()
    await rig.reach(1)
    await rig.stop()
    await rig.bus.save_state("scheduler", b"later")
    await rig.start()
    await until(lambda: rig.health.is_ready)
    await rig.stop()
    assert await rig.bus.load_state("scheduler") == b"later"


async def test_a_full_disk_at_a_checkpoint_is_waited_out_and_said(rig):
    """Meanwhile nothing is acknowledged or trained; the learner lives and is not ready."""
    is_full = True

    def save(directory, original=CountingTrainer.save):
        if is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(rig.trainer, directory)

    await issue(rig.bus, range(6))
    await rig.start()
    rig.trainer.save = save
    await until(lambda: rig.health.blocked)
    assert "No space left on device" in rig.health.blocked
    assert "update-00000002" in rig.health.blocked
    assert rig.health.is_alive
    assert not rig.task.done()
    assert await count_pending(rig.bus) >= 8
    assert rig.learner.progress.num_updates == 2
    is_full = False
    await rig.reach(3)
    await rig.stop()
    assert rig.health.blocked == ""
    assert await read_account(rig.bus) == {"issued": 6, "generated": 6, "trained": 6}


async def test_a_learner_that_waits_for_room_on_the_disk_can_be_stopped_and_loses_nothing(rig):
    await issue(rig.bus, range(4))
    await rig.start()

    def save(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    rig.trainer.save = save
    await until(lambda: rig.health.blocked)
    with pytest.raises(CapacityError):
        await rig.stop()
    rig.checkpoints.close()
    assert await count_pending(rig.bus) == 8
    await rig.start()
    await rig.reach(2)
    await rig.stop()
    assert await read_account(rig.bus) == {"issued": 4, "generated": 4, "trained": 4}


async def test_a_weight_store_that_is_away_is_waited_out_and_said(rig):
    is_away, publish = True, rig.weights.publish

    def refuse(*args, **kwargs):
        if is_away:
            raise WeightsUnavailableError("The weight store is away.")
        return publish(*args, **kwargs)

    rig.weights.publish = refuse
    await rig.start()
    await until(lambda: rig.health.blocked)
    assert await rig.announced() == []
    is_away = False
    await until(lambda: rig.health.is_ready)
    await rig.stop()
    assert rig.health.blocked == ""
    assert await rig.announced() == [0]


async def test_a_finished_run_cancels_what_still_arrives_until_it_is_stopped(rig):
    await rig.start()
    await send(rig.bus, *groups("a", "b", "c", "d", "e", "f", "g"))
    await rig.reach(3)
    await send(rig.bus, *groups("h"))
    events = []
    async with asyncio.timeout(5):
        while len(events) < 8:
            events += await read_ledger(rig.bus)
            await asyncio.sleep(0.01)
    assert events[-2:] == [("g", "cancelled"), ("h", "cancelled")]
    assert not rig.task.done()
    await rig.stop()
    assert await count_pending(rig.bus) == 0


async def test_a_finished_run_cancels_what_a_reader_before_it_left_pending(rig):
    """Such as entries read by a superseded learner: the account closes without a restart."""
    await issue(rig.bus, range(6))
    await rig.start()
    await rig.reach(2)
    await issue(rig.bus, range(6, 7))
    assert len(await rig.bus.read(Stream.SCORED, ConsumerGroup.LEARNER, "superseded", 100)) == 2
    async with asyncio.timeout(5):
        while await count_pending(rig.bus):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await rig.stop()
    assert await read_account(rig.bus) == {
        "issued": 7,
        "generated": 7,
        "trained": 6,
        "cancelled": 1,
    }


async def test_a_finished_run_that_starts_again_trains_nothing(rig):
    await send(rig.bus, *groups("a", "b", "c", "d", "e", "f"))
    await rig.start()
    await rig.reach(3)
    await rig.stop()
    await rig.start()
    await send(rig.bus, *groups("g", version=3))
    await until(lambda: rig.learner.is_finished)
    async with asyncio.timeout(5):
        while await count_pending(rig.bus):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await rig.stop()
    assert rig.trainer.batches == []
    assert await rig.announced() == [0, 1, 2, 3]


async def test_old_versions_are_collected_and_version_0_stays(tmp_path):
    rig = Rig(tmp_path, num_updates=24, max_staleness=0, groups_per_update=1, checkpoint_every=30)
    await rig.start()
    for index in range(24):
        await send(rig.bus, *groups(f"g{index:02d}", version=index))
        await rig.reach(index + 1)
    await rig.stop()
    kept = rig.weights.list_versions()
    assert kept[0] == 0
    assert kept[1:] == list(range(17, 25))
