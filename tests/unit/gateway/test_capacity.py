import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.capacity import compute_capacity


def capacity(**changes):
    arguments = {
        "max_concurrent_groups": 100,
        "max_staleness": 2,
        "groups_per_update": 4,
        "policy_version": 0,
        "num_accepted": 0,
        "num_running": 0,
    }
    return compute_capacity(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({}, 12),  # (2 + 0 + 1) * 4
        ({"max_staleness": 0}, 4),  # in step: one batch
        ({"num_accepted": 8, "num_running": 3}, 1),
        ({"policy_version": 3, "num_accepted": 20, "num_running": 4}, 0),  # 24 spent of 24
        ({"max_concurrent_groups": 5, "num_running": 3}, 2),
        ({"num_accepted": 50}, 0),  # never negative
    ],
)
def test_capacity_is_the_smaller_of_concurrency_and_staleness_budget(changes, want):
    assert capacity(**changes) == want


@given(st.integers(0, 4), st.integers(1, 5), st.data())
def test_admission_keeps_every_batch_within_the_bound_when_groups_finish_in_order(
    max_staleness, groups_per_update, data
):
    """Play admission, completion and training at random; first in, first trained."""
    version, waiting, running, num_trained, worst = 0, [], [], 0, 0
    for _ in range(60):
        action = data.draw(st.sampled_from(["admit", "finish", "train"]))
        room = compute_capacity(
            max_concurrent_groups=50,
            max_staleness=max_staleness,
            groups_per_update=groups_per_update,
            policy_version=version,
            num_accepted=num_trained + len(waiting),
            num_running=len(running),
        )
        if action == "admit" and room:
            running += [version] * room
        elif action == "finish" and running:
            waiting.append(running.pop(0))
        elif action == "train" and len(waiting) >= groups_per_update:
            batch, waiting = waiting[:groups_per_update], waiting[groups_per_update:]
            worst = max(worst, version - min(batch))
            num_trained, version = num_trained + groups_per_update, version + 1
    assert worst <= max_staleness
