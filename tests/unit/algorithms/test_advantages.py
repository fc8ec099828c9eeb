import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdar.algorithms.advantages import compute_advantages, has_signal, normalize_scores
from sdar.contracts.errors import ContractError

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
@pytest.mark.parametrize("low", [1e6, 1e7, 1e12, -1e6, 16_777_217.0, 1e6 + 0.5])
def test_a_difference_of_one_stays_signal_at_large_offsets(low, level):
    advantages = compute_advantages(make_group([(low, True)], [(low + 1, True)]), level)
    assert [a[0] for a in advantages] == pytest.approx([-(0.5**0.5), 0.5**0.5], abs=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e9])
def test_sums_that_differ_by_the_rounding_of_either_precision_are_not_signal(scale):
    for precision in (np.float32, np.float64):
        parts = [float(precision(part) * precision(scale)) for part in (0.1, 0.2, 0.3)]
        group = make_group([(parts[0], True), (parts[1], True)], [(parts[2], True)])
        assert not has_signal(compute_advantages(group))


@given(
    st.lists(st.integers(-100, 100), min_size=2, max_size=8),
    st.integers(-(2**40), 2**40),
)
def test_an_offset_that_float64_holds_changes_no_advantage(rewards, offset):
    """Rewards end in .25, which float32 does not hold behind a large offset: float64 sent them."""
    offset += 2**24 if offset >= 0 else -(2**24)
    plain, moved = (
        compute_advantages(make_group(*([(r + add + 0.25, True)] for r in rewards)))
        for add in (0, offset)
    )
    assert [a[0] for a in moved] == pytest.approx([a[0] for a in plain], abs=1e-5)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=2, max_size=8))
def test_every_finite_score_gives_finite_advantages(scores):
    with np.errstate(all="raise", under="ignore"):
        advantages = normalize_scores(np.array(scores))
    assert np.isfinite(advantages).all()
    assert np.abs(advantages).max() <= len(scores) ** 0.5


def test_the_largest_rewards_are_compared_and_not_squared():
    advantages = normalize_scores(np.array([1e308, 1e308, 0.0, 0.0]))
    assert advantages.tolist() == pytest.approx([0.75**0.5] * 2 + [-(0.75**0.5)] * 2)


def test_rewards_that_add_up_to_infinity_are_refused():
    group = make_group([(1e308, True), (1e308, True)], [(0.0, True)])
    with pytest.raises(ContractError, match="not all finite"):
        compute_advantages(group)


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
