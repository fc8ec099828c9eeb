"""Values no run could use fail at `helm install`, with a sentence that names the key."""

from __future__ import annotations

import pytest

from tests.kube.cluster import CHART, Cluster, CommandError
from tests.kube.release import list_left

BAD_VALUES = {
    "unknown_key": (["--set", "run.training.num_update=3"], "num_update"),
    "unknown_key_of_the_chart": (["--set", "rollouts.replicas.max=3"], "rollouts"),
    "negative_staleness": (["--set", "run.training.max_staleness=-1"], "max_staleness"),
    "missing_model": (["--set", "run.model=null"], "model"),
    "more_gpus_than_the_engine_uses": (
        ["--set", "rollout.gpus=1", "--set", "run.rollout.tensor_parallel_size=4"],
        "rollout.gpus",
    ),
    "ranks_that_pods_cannot_share": (
        ["--set", "learner.replicas=2", "--set", "run.training.num_ranks=3"],
        "num_ranks",
    ),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_a_bad_value_fails_at_install_and_its_key_is_named(
    cluster: Cluster, evidence: list[str], name: str
) -> None:
    arguments, key = BAD_VALUES[name]
    with pytest.raises(CommandError) as failure:
        cluster.helm("install", "bad", str(CHART), *cluster.values, *arguments)
    told = [line.strip() for line in str(failure.value).splitlines() if key in line]
    assert told, str(failure.value)
    assert list_left(cluster, "bad") == {}
    evidence.append(told[-1])
