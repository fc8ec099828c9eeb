"""Progress by example.

A run reaches update 5, is killed, and resumes from its checkpoint of update 3 as version 6::

version   0 1 2 3 4 5 | 6 7
updates   0 1 2 3 4 5 | 3 4
"""

from __future__ import annotations

import pytest

from sdar.config import TrainingConfig
from sdar.contracts.errors import CorruptionError
from services.learner.progress import REMEMBERED_UPDATES, Progress


def after_updates(count):
    progress = Progress()
    for index in range(count):
        progress = progress.after_update([f"g{index}"])
    return progress


def test_versions_and_updates_count_alike_without_a_crash():
    progress = after_updates(3)
    assert (progress.num_updates, progress.policy_version) == (3, 3)
    assert [progress.compute_staleness(version) for version in range(4)] == [3, 2, 1, 0]


def test_after_a_crash_versions_go_on_and_staleness_is_counted_in_updates():
    resumed = after_updates(3).continue_after(5)
    assert (resumed.num_updates, resumed.policy_version) == (3, 6)
    assert [resumed.count_updates(version) for version in range(8)] == [0, 1, 2, 3, 4, 5, 3, 4]
    assert [resumed.compute_staleness(version) for version in range(7)] == [3, 2, 1, 0, 0, 0, 0]


def test_a_second_crash_adds_a_second_life():
    twice = after_updates(3).continue_after(5).after_update(["x"]).continue_after(9)
    assert (twice.num_updates, twice.policy_version) == (4, 10)
    assert [twice.count_updates(version) for version in (5, 6, 7, 10, 11)] == [5, 3, 4, 4, 5]


def test_json_round_trip_keeps_everything():
    progress = after_updates(3).continue_after(5)
    assert Progress.from_json(progress.to_json()) == progress


@pytest.mark.parametrize(
    "broken", [{}, {"num_updates": "x"}, {**Progress().to_json(), "lineage": 3}]
)
def test_unreadable_progress_is_corruption(broken):
    with pytest.raises(CorruptionError):
        Progress.from_json(broken)


def test_refused_groups_are_remembered_until_they_are_booked():
    progress = Progress().after_update(["a"], ["b"]).after_update(["c"], ["d"])
    assert progress.refused_groups == ("b", "d")
    assert progress.num_groups == 2
    assert Progress.from_json(progress.to_json()) == progress
    assert progress.after_booking().refused_groups == ()
    older = {name: value for name, value in progress.to_json().items() if "refused" not in name}
    assert Progress.from_json(older) == progress.after_booking()


def test_trained_ids_are_bounded():
    progress = after_updates(REMEMBERED_UPDATES + 5)
    assert len(progress.trained_groups) == REMEMBERED_UPDATES
    assert progress.trained_groups[-1] == (f"g{REMEMBERED_UPDATES + 4}",)


def test_no_id_is_forgotten_that_could_come_again_and_be_trained():
    """At most `checkpoint_every` unacknowledged; too stale `max_staleness` after a crash's loss."""
    fields = TrainingConfig.model_fields
    largest = [
        bound.le
        for name in ("checkpoint_every", "max_staleness")
        for bound in fields[name].metadata
        if hasattr(bound, "le")
    ]
    assert len(largest) == 2
    assert sum(largest) <= REMEMBERED_UPDATES


def test_each_update_is_known_by_the_version_it_led_to_in_the_life_that_made_it():
    twice = (
        after_updates(3)
        .continue_after(5)
        .after_update(["x"])
        .continue_after(9)
        .continue_after(12)
        .after_update(["y", "z"])
    )
    assert [twice.version_after(number) for number in range(1, 6)] == [1, 2, 3, 7, 14]
    assert twice.list_trained() == {"g0": 1, "g1": 2, "g2": 3, "x": 7, "y": 14, "z": 14}
    assert twice.policy_version == 14


def test_versions_of_groups_are_right_when_the_oldest_are_forgotten():
    trained = after_updates(REMEMBERED_UPDATES + 5).list_trained()
    assert trained["g5"] == 6
    assert "g4" not in trained
