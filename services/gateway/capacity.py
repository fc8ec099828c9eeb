"""Admission: how many task groups may be issued now, so that training data stays young enough.

Admission paces generation (AReaL, arXiv:2505.24298, section 5.1) but promises nothing about one
slow group, so the learner checks again when it assembles a batch (`services/learner/ingest.py`).
"""

from __future__ import annotations


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
    by_staleness = (max_staleness + policy_version + 1) * groups_per_update - (
        num_accepted + num_running
    )
    return max(0, min(by_concurrency, by_staleness))
