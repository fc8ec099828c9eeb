from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdar.contracts.types import GroupOutcome, LedgerEvent
from services.gateway.lengths import KEPT_GROUPS, LEAST_GROUPS, EpisodeLengths, compute_length_drift


def close(lengths: EpisodeLengths, number: int, turns: int, outcome: GroupOutcome) -> None:
    """A group of two episodes of that many turns, from its playing to its end."""
    group_id = f"group-{number:08d}"
    lengths.apply(
        LedgerEvent("run", group_id, GroupOutcome.GENERATED, 2, 0, episode_turns=(turns, turns))
    )
    lengths.apply(LedgerEvent("run", group_id, outcome, 2, 0))


def test_the_distance_is_half_the_sum_of_differences_of_shares() -> None:
    # Played: 1/2 short, 1/2 long; trained: 3/4 short, 1/4 long.
    assert compute_length_drift(Counter({1: 4, 9: 4}), Counter({1: 3, 9: 1})) == pytest.approx(0.25)
    assert compute_length_drift(Counter({1: 4}), Counter({9: 4})) == 1.0


@given(st.dictionaries(st.integers(1, 50), st.integers(1, 100), min_size=1))
def test_distributions_that_are_equal_have_no_distance(counts: dict[int, int]) -> None:
    assert compute_length_drift(
        Counter(counts), Counter({n: 3 * k for n, k in counts.items()})
    ) == pytest.approx(0)


@given(
    st.lists(
        st.tuples(st.integers(1, 30), st.booleans()), min_size=LEAST_GROUPS, max_size=KEPT_GROUPS
    )
)
def test_the_drift_is_at_most_the_share_that_was_dropped(groups: list[tuple[int, bool]]) -> None:
    lengths = EpisodeLengths()
    for number, (turns, is_trained) in enumerate(groups):
        close(lengths, number, turns, GroupOutcome.TRAINED if is_trained else GroupOutcome.STALE)
    num_dropped = sum(not is_trained for _, is_trained in groups)
    assert lengths.compute_drift() <= num_dropped / len(groups) + 1e-9


def test_dropping_the_long_ones_first_is_a_drift_and_training_everything_is_none() -> None:
    fair, unfair = EpisodeLengths(), EpisodeLengths()
    for number in range(64):
        turns = 20 if number % 2 else 2
        close(fair, number, turns, GroupOutcome.TRAINED)
        close(unfair, number, turns, GroupOutcome.STALE if turns == 20 else GroupOutcome.TRAINED)
    assert fair.compute_drift() == 0
    assert unfair.compute_drift() == pytest.approx(0.5)


def test_groups_without_a_training_signal_are_no_part_of_the_comparison() -> None:
    lengths = EpisodeLengths()
    for number in range(64):
        close(
            lengths,
            number,
            20 if number % 2 else 2,
            GroupOutcome.SKIPPED if number % 2 else GroupOutcome.TRAINED,
        )
    assert lengths.compute_drift() == 0


def test_a_few_groups_say_nothing() -> None:
    lengths = EpisodeLengths()
    for number in range(LEAST_GROUPS - 1):
        close(lengths, number, number + 1, GroupOutcome.STALE if number else GroupOutcome.TRAINED)
    assert lengths.compute_drift() == 0
