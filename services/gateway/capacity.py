"""How many task groups may be issued now, so that training data does not get too old.

Admission paces generation (AReaL, arXiv:2505.24298, section 5.1) but promises nothing about one
slow group, so the learner also checks the staleness of each group when it assembles a batch.
"""

from __future__ import annotations

from sdar.bus.ledger import LedgerAccount
from sdar.config import TrainingConfig


def count_due_groups(
    training: TrainingConfig,
    ledger: LedgerAccount,
    *,
    num_updates: int,
    max_concurrent_groups: int,
) -> int:
    """Number of training groups to issue now: what capacity allows, and the run still needs.

    Groups that are trained and not yet durable count as buffered.

    Args:
        num_updates: optimizer updates in the newest policy.
        max_concurrent_groups: groups that the rollout workers can play at once.
    """
    if num_updates >= training.num_updates:
        return 0
    # A learner that began from an older checkpoint than the account knows (the newest was damaged)
    # has lost the effect of some groups that count as trained: others replace them.
    num_effective = min(ledger.num_trained, num_updates * training.groups_per_update)
    num_accepted = num_effective + ledger.num_buffered
    num_needed = training.num_updates * training.groups_per_update
    num_missing = num_needed - num_accepted - ledger.num_running
    capacity = compute_capacity(
        max_concurrent_groups=max_concurrent_groups,
        max_staleness=training.max_staleness,
        groups_per_update=training.groups_per_update,
        policy_version=num_updates,
        num_accepted=num_accepted,
        num_running=ledger.num_running,
    )
    return min(capacity, max(0, num_missing))


def count_waiting_groups(training: TrainingConfig, ledger: LedgerAccount, num_updates: int) -> int:
    """Groups that were played and that no update holds yet: some may be refused on their way.

    Args:
        num_updates: optimizer updates in the newest policy.
    """
    # Trained and not yet durable: buffered to the account, and nothing can refuse them any more.
    num_held = max(0, num_updates * training.groups_per_update - ledger.num_trained)
    return max(0, ledger.num_buffered - num_held)


def compute_capacity(
    *,
    max_concurrent_groups: int,
    max_staleness: int,
    groups_per_update: int,
    policy_version: int,
    num_accepted: int,
    num_running: int,
) -> int:
    """Number of task groups that may be issued now; 0 if none.

    Updates 0 .. policy_version have to be fed, and `max_staleness` more may be prepared ahead: with
    everything that is accepted or running, no more than `(max_staleness + policy_version + 1) *
    groups_per_update` groups may ever have been spent.

    Args:
        policy_version: newest published version, counted from 0 at the run's start.
        num_accepted: groups of this run that were, or wait to be, trained on. Groups that failed,
            went stale or were skipped are not among them: they feed no update, so their place is
            given out again.
        num_running: groups issued and not yet accepted.
    """
    by_concurrency = max_concurrent_groups - num_running
    num_spent = num_accepted + num_running
    by_staleness = (max_staleness + policy_version + 1) * groups_per_update - num_spent
    return max(0, min(by_concurrency, by_staleness))
