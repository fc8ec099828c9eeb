from __future__ import annotations

import pytest

from services.gateway.evaluation import Evaluation, compute_change_interval, compute_wilson_interval

from .fakes import play
from .test_scheduler import evaluation_group


@pytest.mark.parametrize(
    ("num_successes", "num_trials", "low", "high"),
    [
        # Independently: Brown, Cai, DasGupta (2001), and by hand from the quadratic's roots.
        (0, 10, 0.0, 0.277533),
        (5, 10, 0.236593, 0.763407),
        (10, 10, 0.722467, 1.0),
        (48, 240, 0.154249, 0.255166),
    ],
)
def test_wilson_intervals_match_published_values(
    num_successes: int, num_trials: int, low: float, high: float
) -> None:
    got = compute_wilson_interval(num_successes, num_trials)
    # The roots of (p - k/n)^2 = z^2 p (1 - p) / n are the interval's ends.
    z2 = 1.959963984540054**2
    for end in got:
        if 0 < end < 1:
            assert (end - num_successes / num_trials) ** 2 == pytest.approx(
                z2 * end * (1 - end) / num_trials, rel=1e-9
            )
    assert got == pytest.approx((low, high), abs=5e-4)


def test_without_episodes_nothing_is_known() -> None:
    assert compute_wilson_interval(0, 0) == (0.0, 1.0)


def test_a_change_s_interval_matches_the_published_example() -> None:
    """Newcombe (1998), table II, example (a): 56 of 70 against 48 of 80; method 10 gives 0.0524 to
    0.3339.
    """
    before, after = compute_wilson_interval(48, 80), compute_wilson_interval(56, 70)
    assert compute_change_interval(48 / 80, before, 56 / 70, after) == pytest.approx(
        (0.0524, 0.3339), abs=5e-5
    )


def test_counts_are_pooled_over_tasks_not_averaged_over_types() -> None:
    evaluation = Evaluation.begin(3, 7, is_greedy=False, num_tasks=4)
    for index, (task_type, is_success) in enumerate(
        [("a", True), ("b", False), ("b", False), ("b", False)]
    ):
        trajectory = play(evaluation_group(task_type), 3, is_success=is_success)
        assert evaluation.add(index, trajectory)
    summary = evaluation.summary()
    assert summary["success"] == 0.25  # a mean of type means would say 0.5
    assert summary["by_task_type"] == {"a": (1, 1), "b": (0, 3)}


def test_reward_components_are_means_over_all_episodes_also_those_that_lack_one() -> None:
    evaluation = Evaluation.begin(3, 7, is_greedy=False, num_tasks=4)
    evaluation.add(
        0, play(evaluation_group("a"), 3, reward_components={"score": 1.0, "success": 10.0})
    )
    evaluation.add(1, play(evaluation_group("a"), 3, reward_components={"score": 0.5}))
    evaluation.add(2, play(evaluation_group("a"), 3))
    evaluation.add_failure(3, "a")
    assert evaluation.summary()["reward_components"] == {"score": 0.375, "success": 2.5}


def test_a_second_result_for_a_task_does_not_count() -> None:
    evaluation = Evaluation.begin(3, 7, is_greedy=True, num_tasks=1)
    trajectory = play(evaluation_group("a"), 3)
    assert evaluation.add(0, trajectory)
    assert not evaluation.add(0, trajectory)
    assert evaluation.summary()["num_episodes"] == 1


def test_an_unplayable_episode_is_no_success_and_is_counted_apart() -> None:
    evaluation = Evaluation.begin(3, 7, is_greedy=True, num_tasks=1)
    evaluation.add_failure(0, "a")
    summary = evaluation.summary()
    assert evaluation.is_complete
    assert (summary["success"], summary["num_episodes"], summary["num_failed"]) == (0.0, 1, 1)


@pytest.mark.parametrize(
    ("first", "last", "is_pinned"), [(3, 3, True), (3, 4, False), (4, 4, False)]
)
def test_an_episode_counts_only_if_all_its_tokens_are_of_the_pinned_version(
    first: int, last: int, is_pinned: bool
) -> None:
    evaluation = Evaluation.begin(3, 7, is_greedy=False, num_tasks=1)
    assert evaluation.is_pinned(play(evaluation_group("a"), first, last_version=last)) is is_pinned
