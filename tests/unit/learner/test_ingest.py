"""Groups of two, two groups an update, staleness at most 2, teacher at most 1 later still."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace

import numpy as np
import pytest

from sdar.bus.ledger import format_group_id
from sdar.bus.protocol import Delivery
from sdar.contracts import codec
from sdar.contracts.errors import LeaseLostError
from sdar.contracts.streams import ConsumerGroup, Stream
from sdar.contracts.types import FailureStage, GroupOutcome, Purpose
from services.learner.ingest import (
    GroupBuffer,
    GroupSource,
    Verdict,
    _Remembered,
    compute_group_advantages,
)
from services.learner.progress import Progress
from tests.unit.learner.builders import (
    VOCABULARY,
    count_pending,
    issue,
    make_bus,
    make_config,
    make_group,
    make_item,
    read_account,
    read_journal,
    read_ledger,
    send,
)


class Rig:
    def __init__(self, **config):
        self.config = make_config(**config)
        self.bus = make_bus(self.config)
        self.source = self.make_source()

    def make_source(self):
        return GroupSource(self.config, self.bus, "learner", VOCABULARY)

    async def next_ids(self, num_updates=0, progress=None):
        """Ids of the next batch, None if there is no whole batch yet."""
        progress = progress or replace(
            Progress(), num_updates=num_updates, policy_version=num_updates
        )
        stopping, looks = asyncio.Event(), iter(range(100))

        def stop_at_third_look():
            if next(looks) == 2:
                stopping.set()

        groups = await self.source.next_batch(progress, stopping, stop_at_third_look)
        return None if groups is None else [group.group_id for group in groups]


@pytest.fixture
def rig():
    return Rig()


async def test_among_equally_urgent_groups_those_complete_first_are_served(rig):
    a = make_group("a")
    b = make_group("b")
    c = make_group("c")
    await send(rig.bus, a[0], b[0], b[1], c[0], c[1], a[1])
    assert await rig.next_ids() == ["b", "c"]
    assert await rig.next_ids() is None


async def test_episodes_of_a_group_come_in_the_order_of_their_index(rig):
    a, b = make_group("a"), make_group("b")
    await send(rig.bus, a[1], a[0], *b)
    groups = await rig.source.next_batch(Progress(), asyncio.Event())
    assert [item.trajectory.episode_index for item in groups[0].items] == [0, 1]
    assert [d.payload for d in groups[0].deliveries] == groups[0].payloads


async def test_groups_in_a_batch_stay_unacknowledged(rig):
    await send(rig.bus, *make_group("a"), *make_group("b"))
    assert await rig.next_ids() == ["a", "b"]
    assert await count_pending(rig.bus) == 4


async def test_a_repeated_entry_is_acknowledged_and_changes_nothing(rig):
    a = make_group("a")
    await send(rig.bus, a[0], a[0], a[1], a[1], *make_group("b"), a[0])
    assert await rig.next_ids() == ["a", "b"]
    assert await count_pending(rig.bus) == 4
    await send(rig.bus, *a)
    assert await rig.next_ids() is None
    assert await count_pending(rig.bus) == 4
    assert await read_ledger(rig.bus) == []


async def test_attempts_are_never_mixed_and_the_first_whole_one_wins(rig):
    first, second = make_group("a"), make_group("a", attempt=1)
    await send(rig.bus, first[0], second[1], second[0], first[1], *make_group("b"))
    groups = await rig.source.next_batch(Progress(), asyncio.Event())
    assert {item.trajectory.attempt for item in groups[0].items} == {1}
    assert await count_pending(rig.bus) == 4


async def test_a_stale_group_is_refused_as_a_whole_and_acknowledged(rig):
    old = make_item("a", 0, version=0, reward=1.0)
    await send(
        rig.bus,
        old,
        make_item("a", 1, version=3),
        *make_group("b", version=1),
        *make_group("c", version=3),
    )
    assert await rig.next_ids(num_updates=3) == ["b", "c"]
    assert await read_ledger(rig.bus) == [("a", "stale")]
    assert await count_pending(rig.bus) == 4
    assert rig.source.counts.take().num_stale == 1


async def test_a_group_that_goes_stale_while_it_waits_is_refused(rig):
    await send(rig.bus, *make_group("a", version=0))
    assert await rig.next_ids(num_updates=2) is None
    await send(rig.bus, *make_group("b", version=2), *make_group("c", version=2))
    assert await rig.next_ids(num_updates=3) == ["b", "c"]
    assert await read_ledger(rig.bus) == [("a", "stale")]


async def test_an_incomplete_group_is_given_up_when_it_could_no_longer_be_trained(rig):
    a = make_group("a")
    await send(rig.bus, a[0])
    assert await rig.next_ids(num_updates=2) is None
    assert await read_ledger(rig.bus) == []
    assert await rig.next_ids(num_updates=3) is None
    assert await read_ledger(rig.bus) == [("a", "stale")]
    await send(rig.bus, a[1])
    assert await rig.next_ids(num_updates=3) is None
    assert await count_pending(rig.bus) == 0


async def test_a_teacher_past_its_lag_makes_a_group_stale(rig):
    tokens_fresh_teacher_old = make_group("a", version=5, teacher_version=1)
    await send(rig.bus, *tokens_fresh_teacher_old, *make_group("b", version=5, teacher_version=2))
    assert await rig.next_ids(num_updates=5) is None
    assert await read_ledger(rig.bus) == [("a", "stale")]


async def test_staleness_counts_updates_of_the_life_that_sampled(rig):
    resumed = replace(Progress(), num_updates=3, policy_version=3).continue_after(20)
    await send(rig.bus, *make_group("a", version=2), *make_group("b", version=15))
    assert await rig.next_ids(progress=resumed) == ["a", "b"]


async def test_a_group_without_signal_is_skipped_by_a_method_without_distillation():
    rig = Rig(method="grpo")
    await send(
        rig.bus, *make_group("a", (1.0, 1.0), has_score=False), *make_group("b", has_score=False)
    )
    assert await rig.next_ids() is None
    assert await read_ledger(rig.bus) == [("a", "skipped")]
    assert await count_pending(rig.bus, Stream.TRAJECTORIES) == 2
    assert rig.source.counts.take().num_skipped == 1


async def test_a_group_without_signal_is_trained_on_where_the_run_wants_equal_data():
    rig = Rig(method="grpo", skip_zero_signal=False)
    await send(
        rig.bus, *make_group("a", (1.0, 1.0), has_score=False), *make_group("b", has_score=False)
    )
    assert await rig.next_ids() == ["a", "b"]


@pytest.mark.parametrize(("level", "has_advantage"), [("trajectory", False), ("turn", True)])
def test_an_invalid_action_is_penalised_by_the_learner_only_where_each_turn_is(
    level, has_advantage
):
    """The rollout takes an episode's penalty from its rewards; the learner does not again."""
    config = make_config()
    config = config.model_copy(
        update={"method": config.method.model_copy(update={"advantage_level": level})}
    )
    items = make_group("a", (0.0, 0.0))
    trajectory = items[0].trajectory
    turns = (replace(trajectory.turns[0], is_action_valid=False), *trajectory.turns[1:])
    items[0] = replace(items[0], trajectory=replace(trajectory, turns=turns))
    advantages = compute_group_advantages(config, items)
    assert any(values.any() for values in advantages) is has_advantage


async def test_a_group_without_signal_is_kept_where_the_teacher_still_teaches(rig):
    await send(rig.bus, *make_group("a", (1.0, 1.0)), *make_group("b", (0.0, 0.0)))
    assert await rig.next_ids() == ["a", "b"]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"run_id": "other"}, "run_id"),
        ({"purpose": Purpose.EVALUATION}, "evaluation"),
        ({"has_score": False}, "teacher score"),
        ({"largest_token": 10_000}, "vocabulary"),
    ],
)
async def test_an_entry_that_would_poison_an_update_fails_its_group(rig, fault, reason):
    bad = make_item("a", 1, **fault)
    await send(rig.bus, make_item("a", 0))
    await rig.bus.publish(Stream.SCORED, [codec.encode_scored_trajectory(bad)])
    assert await rig.next_ids() is None
    (event,) = await read_journal(rig.bus)
    found = (event.group_id, event.outcome, event.stage)
    assert found == ("a", GroupOutcome.FAILED, FailureStage.LEARNER)
    assert reason in (await rig.bus.list_dead_letters())[0].reason
    assert await count_pending(rig.bus) == 0


async def test_finite_rewards_that_add_up_to_no_number_fail_their_group(rig):
    good, bad = make_group("a")
    turns = tuple(replace(turn, reward=1.2e308) for turn in bad.trajectory.turns)
    await send(rig.bus, good, replace(bad, trajectory=replace(bad.trajectory, turns=turns)))
    assert await rig.next_ids() is None
    assert await read_ledger(rig.bus) == [("a", "failed")]
    assert "add up to inf" in (await rig.bus.list_dead_letters())[0].reason


async def test_rewards_as_large_as_they_can_be_are_trained_on(rig):
    """[1e308, 1e308, 0, 0] once gave advantages that were no numbers."""
    rig.config = make_config(group_size=4)
    await send(rig.bus, *make_group("a", rewards=(1e308, 1e308, 0.0, 0.0)))
    await send(rig.bus, *make_group("b", rewards=(1.7e308, -1.7e308, 0.0, 0.0)))
    assert await rig.next_ids() == ["a", "b"]


async def test_bytes_that_are_no_trajectory_are_set_aside(rig):
    await rig.bus.publish(Stream.SCORED, [b"\xff\xff"])
    await send(rig.bus, *make_group("a"), *make_group("b"))
    assert await rig.next_ids() == ["a", "b"]
    assert await rig.bus.count_dead_letters() == 1


async def test_after_a_restart_unacknowledged_groups_come_again(rig):
    await send(rig.bus, *make_group("a"), *make_group("b"), *make_group("c"))
    assert await rig.next_ids() == ["a", "b"]
    rig.source = rig.make_source()
    await rig.source.reclaim(Progress())
    assert await rig.next_ids() == ["a", "b"]


async def test_after_a_restart_groups_in_the_checkpoint_are_booked_as_trained_and_acknowledged(rig):
    """As many entries come again as fit into three pages, so groups are cut by their borders."""
    ids = await issue(rig.bus, range(6), make=lambda group_id: make_group(group_id, num_turns=3))
    assert await rig.next_ids() == ids[:2]
    rig.source = rig.make_source()
    await rig.source.reclaim(Progress().after_update(ids[:2]).after_update([ids[3]]))
    assert await count_pending(rig.bus) == 6
    assert await read_account(rig.bus) == {"issued": 6, "generated": 6, "trained": 3, "buffered": 3}
    trained = [
        event for event in await read_journal(rig.bus) if event.outcome is GroupOutcome.TRAINED
    ]
    found = [(event.group_id, event.policy_version) for event in trained]
    assert found == [(ids[0], 1), (ids[1], 1), (ids[3], 2)]
    assert {event.episode_turns for event in trained} == {(3, 3)}
    assert rig.source.buffer.num_complete == 3


async def test_each_way_out_is_booked_with_the_acknowledgement_of_the_groups_entries():
    rig = Rig(method="grpo")
    stale, skipped, failed, cancelled = ids = [format_group_id(number) for number in range(4)]
    await issue(rig.bus, range(1), has_score=False, version=0)
    await issue(
        rig.bus,
        range(1, 2),
        make=lambda group_id: make_group(group_id, (1.0, 1.0), has_score=False, version=3),
    )
    await issue(rig.bus, range(2, 3), has_score=False, largest_token=10_000, version=3)
    await issue(rig.bus, range(3, 4), has_score=False, version=3)
    assert await rig.next_ids(num_updates=3) is None
    await rig.source.cancel_all("run finished")
    outcomes = dict(await read_ledger(rig.bus))
    assert outcomes == {
        stale: "stale",
        skipped: "skipped",
        failed: "failed",
        cancelled: "cancelled",
    }
    assert sorted(outcomes) == ids
    assert await read_account(rig.bus) == {
        "issued": 4,
        "generated": 4,
        **dict.fromkeys(outcomes.values(), 1),
    }
    assert await count_pending(rig.bus, Stream.TRAJECTORIES) == 0


async def test_a_group_that_goes_stale_sooner_is_trained_before_fresher_ones_that_arrived_earlier(
    rig,
):
    """A long episode is under way for two updates: its group comes last, with the oldest tokens."""
    await send(rig.bus, *make_group("fresh", version=2), *make_group("fresher", version=3))
    await send(rig.bus, *make_group("long", version=1, num_turns=9))
    assert await rig.next_ids(num_updates=3) == ["long", "fresh"]


async def test_an_old_score_makes_a_group_urgent_like_an_old_token(rig):
    """Bound 2, teacher 1 later: scores of version 0 last to update 3, tokens of 2 to 4."""
    await send(rig.bus, *make_group("a", version=2), *make_group("b", version=2))
    await send(rig.bus, *make_group("c", version=3, teacher_version=0))
    assert await rig.next_ids(num_updates=3) == ["c", "a"]


async def test_all_that_has_arrived_is_seen_before_a_batch_is_chosen(rig):
    """Five pages of fresh groups lie before the urgent one."""
    await send(
        rig.bus, *[item for index in range(10) for item in make_group(f"f{index}", version=2)]
    )
    await send(rig.bus, *make_group("urgent", version=0))
    assert await rig.next_ids(num_updates=2) == ["urgent", "f0"]


@pytest.mark.parametrize("page", [1, 3, 100])
async def test_batches_are_the_same_however_often_the_learner_starts_anew(page):
    """A batch depends on arrivals and checkpoint, not on pages nor on an earlier life."""

    async def play(restarts):
        rig = Rig(groups_per_update=2, max_staleness=6)
        progress = Progress()
        batches = []
        rig.source._max_count = page
        versions = np.random.default_rng(5).integers(0, 4, 12).tolist()
        for index, version in enumerate(versions):
            await send(rig.bus, *make_group(f"g{index:02d}", version=version))
        for _ in range(6):
            if restarts:
                rig.source = rig.make_source()
                rig.source._max_count = page
                await rig.source.reclaim(progress)
            batch = await rig.next_ids(progress=progress)
            batches.append(batch)
            progress = progress.after_update(batch)
        return batches

    assert await play(restarts=True) == await play(restarts=False)


def test_under_pressure_earliest_deadline_first_loses_fewer_groups_than_first_come():
    """One update takes one group, and a little more than one arrives.

    Half of them were long under way. A hundred histories.
    """
    num_better = 0
    for seed in range(100):
        by_deadline, by_arrival = (
            play_pressure(seed, is_by_deadline) for is_by_deadline in (True, False)
        )
        assert by_deadline <= by_arrival
        num_better += by_deadline < by_arrival
    assert num_better >= 90


def play_pressure(seed, is_by_deadline):
    """Number of groups that went stale in 40 updates."""
    rng = np.random.default_rng(seed)
    buffer = GroupBuffer()
    arrivals = itertools.count()
    num_stale = 0
    stale = Verdict(GroupOutcome.STALE, "")
    for num_updates in range(4, 44):
        for _ in range(rng.poisson(1.2)):
            number, delay = next(arrivals), int(rng.choice([0, 3]))
            for item in make_group(f"g{number}", version=num_updates - delay, num_turns=1, seed=0):
                entry_id = f"{number}-{item.trajectory.episode_index}"
                buffer.add(
                    item, Delivery(Stream.SCORED, ConsumerGroup.LEARNER, "learner", entry_id, b"")
                )
        num_stale += len(
            buffer.drop_where(
                lambda group, _, now=num_updates: stale if now - group.policy_version > 4 else None
            )
        )
        buffer.take(1, lambda group: group.policy_version if is_by_deadline else 0)
    return num_stale


async def test_lengths_of_stale_episodes_are_counted(rig):
    await send(
        rig.bus,
        *make_group("a", version=0, num_turns=4),
        *make_group("b", version=3),
        *make_group("c", version=3),
    )
    assert await rig.next_ids(num_updates=3) == ["b", "c"]
    assert rig.source.counts.take().stale_turns == [4, 4]
    assert rig.source.counts.take().stale_turns == []


async def test_many_dropped_groups_never_make_a_trained_one_be_forgotten(rig):
    remembered = _Remembered(3)
    remembered.add(["a", "b", "a", "c"])
    assert all(name in remembered for name in "abc")
    remembered.add(["d"])
    assert [name in remembered for name in "abcd"] == [False, True, True, True]
    rig.source._dropped = _Remembered(1)
    await send(rig.bus, *make_group("a", version=3), *make_group("b", version=3))
    assert await rig.next_ids(num_updates=3) == ["a", "b"]
    await send(
        rig.bus,
        *make_group("c"),
        *make_group("d"),
        *make_group("a", version=3),
        *make_group("b", version=3),
    )
    assert await rig.next_ids(num_updates=3) is None
    assert rig.source.counts.take().num_duplicates == 4


async def test_a_learner_that_was_followed_by_another_books_nothing(rig):
    """Its entries went to the successor: its results come too late."""
    await issue(rig.bus, range(1), version=0)
    assert await rig.next_ids() is None
    await GroupSource(rig.config, rig.bus, "successor", VOCABULARY).reclaim(Progress())
    with pytest.raises(LeaseLostError):
        await rig.next_ids(num_updates=3)
    assert await read_account(rig.bus) == {"issued": 1, "generated": 1, "buffered": 1}


async def test_cancelling_closes_each_group_once_and_takes_late_episodes(rig):
    a, b = make_group("a"), make_group("b")
    await send(rig.bus, *a, b[0])
    await rig.source.cancel_all("run finished")
    await send(rig.bus, b[1])
    await rig.source.cancel_all("run finished")
    assert await read_ledger(rig.bus) == [("a", "cancelled"), ("b", "cancelled")]
    assert await count_pending(rig.bus) == 0
