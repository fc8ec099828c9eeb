import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdar.algorithms.advantages import compute_advantages, has_signal, normalize_scores

from .builders import make_trajectory, make_turn


def make_group(*episodes):
    """Each episode is a list of (reward, is_action_valid), one per turn."""
    return [
        make_trajectory(
            *(make_turn(i, [1], [2], reward=r, valid=v) for i, (r, v) in enumerate(turns)),
            index=index,
        )
        for index, turns in enumerate(episodes)
    ]


def test_trajectory_level_compares_episodes_and_repeats_over_turns():
    """Returns 10 and 0: mean 5, deviation (ddof 1) sqrt(50)."""
    advantages = compute_advantages(make_group([(0, True), (10, True)], [(0, True)]))
    value = 5 / (math.sqrt(50) + 1e-6)
    assert [a.tolist() for a in advantages] == [[value, value], [-value]]


def test_trajectory_level_subtracts_the_penalty_once_an_episode():
    """Returns 10 - 0.1 (two invalid actions cost once), 10 and 0."""
    advantages = compute_advantages(
        make_group([(0, False), (10, False)], [(10, True)], [(0, True)]), invalid_action_penalty=0.1
    )
    scores = [9.9, 10.0, 0.0]
    mean, deviation = statistics.mean(scores), statistics.stdev(scores)
    assert [a[0] for a in advantages] == pytest.approx(
        [(s - mean) / (deviation + 1e-6) for s in scores]
    )


def test_turn_level_takes_rows_of_turns_each_with_its_own_penalty():
    """Rows: episode 0 (return 10, three turns, the second invalid) 10, 9.9, 10; episode 1 (one
    turn) 0.
    """
    group = make_group([(0, True), (0, False), (10, True)], [(0, True)])
    advantages = compute_advantages(group, "turn", invalid_action_penalty=0.1)
    rows = [10.0, 9.9, 10.0, 0.0]
    mean, deviation = statistics.mean(rows), statistics.stdev(rows)
    want = [(row - mean) / (deviation + 1e-6) for row in rows]
    assert advantages[0].tolist() == pytest.approx(want[:3])
    assert advantages[1].tolist() == pytest.approx(want[3:])


@pytest.mark.parametrize("level", ["trajectory", "turn"])
def test_equal_returns_give_exactly_zero(level):
    group = make_group([(0.1, True)] * 3, [(0.3, True)], [(0.15, True), (0.15, True)])
    assert [a.tolist() for a in compute_advantages(group, level)] == [[0.0] * 3, [0.0], [0.0, 0.0]]


def test_scores_that_differ_by_float32_rounding_are_not_signal():
    rounded = np.array([9.9, np.float32(9.9), 9.9], dtype=np.float64)
    assert np.ptp(rounded) > 0
    assert normalize_scores(rounded).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("level", ["trajectory", "turn"])
def test_group_of_one_is_zero(level):
    assert compute_advantages(make_group([(7, True)]), level)[0].tolist() == [0.0]


def test_signal_is_seen_only_where_an_advantage_is_not_zero():
    assert not has_signal(compute_advantages(make_group([(1, True)], [(1, True)])))
    assert has_signal(compute_advantages(make_group([(1, True)], [(0, True)])))


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=16))
def test_advantages_are_centred_and_of_unit_spread_or_all_zero(scores):
    advantages = normalize_scores(np.array(scores))
    assert advantages.sum() == pytest.approx(0, abs=1e-6)
    assert not advantages.any() or 0.4 < advantages.std(ddof=1) <= 1 + 1e-9
