"""A learner of two pods, DeepSpeed's ranks under torchrun, updates and publishes policies."""

from __future__ import annotations

from tests.kube.cluster import Cluster
from tests.kube.release import READY_TIMEOUT_S, Release, describe

NUM_UPDATES = 6


def test_a_learner_of_two_pods_trains_and_ends_with_a_closed_account(
    cluster: Cluster, evidence: list[str]
) -> None:
    with Release(cluster, "ranks") as release:
        release.install(
            learner__replicas=2,
            storage__accessModes=["ReadWriteMany"],
            run__training__num_ranks=2,
            run__training__num_updates=NUM_UPDATES,
            run__evaluation__num_tasks=8,
        )
        ready_s = release.wait_ready(
            {"learner": 2, "rollout": 1, "teacher": 1, "envs": 1, "gateway": 1}
        )
        status = release.wait_status(
            "its end", lambda status: status["phase"] == "finished", READY_TIMEOUT_S
        )
        evidence.append(f"ready after {ready_s:.0f} s; {describe(status)}")
        assert status["num_updates"] == NUM_UPDATES
        assert status["ledger_gap"] == 0
        assert release.lives().keys() >= {
            f"{release.fullname}-learner-{ordinal}" for ordinal in range(2)
        }
        assert all(num_restarts == 0 for _, num_restarts in release.lives().values())
