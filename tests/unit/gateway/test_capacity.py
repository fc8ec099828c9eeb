import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdar.bus.ledger import LedgerAccount
from sdar.config import TrainingConfig
from sdar.contracts.types import GroupOutcome
from services.gateway.capacity import compute_capacity, count_due_groups


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


def account(*, trained=0, buffered=0, running=0):
    ledger = LedgerAccount(num_issued=trained + buffered + running)
    ledger.closed[GroupOutcome.TRAINED] = trained
    ledger.open = {number: number < buffered for number in range(buffered + running)}
    return ledger


@pytest.mark.parametrize(
    ("ledger", "num_updates", "want"),
    [
        (account(), 0, 8),  # what staleness allows: (1 + 0 + 1) * 4
        (account(running=8), 0, 0),
        (account(trained=4, buffered=4), 1, 4),  # what the run still needs: 3 * 4 in all
        (account(trained=8), 1, 8),  # the effect of 4 is lost, so others replace them
        (account(trained=12), 3, 0),  # the run is complete
        (account(trained=2, buffered=2), 3, 0),
    ],
)
def test_due_are_the_groups_that_capacity_allows_and_the_run_still_needs(ledger, num_updates, want):
    training = TrainingConfig(num_updates=3, groups_per_update=4, group_size=2, max_staleness=1)
    due = count_due_groups(training, ledger, num_updates=num_updates, max_concurrent_groups=100)
    assert due == want
