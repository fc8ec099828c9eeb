"""What Prometheus sees of the run as a whole."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from sdar.bus.ledger import LedgerAccount
from services.gateway.evaluation import Evaluation
from services.gateway.metrics import GatewayMetrics
from services.gateway.state import RunPhase

from .fakes import build_config


def evaluate(
    *successes: tuple[str, int, int], is_greedy: bool = False, num_open: int = 0
) -> Evaluation:
    """An evaluation with (task type, successes, episodes)."""
    num_tasks = sum(played for _, _, played in successes)
    evaluation = Evaluation.begin(3, 7, is_greedy=is_greedy, num_tasks=num_tasks + num_open)
    evaluation.pending = list(range(num_open))
    evaluation.successes = {task_type: [solved, played] for task_type, solved, played in successes}
    return evaluation


def observe(*evaluations: Evaluation, phase: RunPhase = RunPhase.RUNNING) -> CollectorRegistry:
    registry = CollectorRegistry()
    GatewayMetrics(registry).observe_run(
        LedgerAccount(),
        evaluations,
        ledger_gap=0,
        phase=phase,
        policy_version=3,
        num_updates=7,
        training=build_config().training,
        length_drift=0.0,
    )
    return registry


def read(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"sdar_{name}", labels)


@pytest.mark.parametrize("phase", RunPhase)
def test_a_run_is_in_exactly_one_phase(phase: RunPhase) -> None:
    registry = observe(phase=phase)
    assert {other: read(registry, "run_phase", phase=other.value) for other in RunPhase} == {
        p: float(p is phase) for p in RunPhase
    }


def test_the_newest_complete_evaluation_is_shown_by_task_type_with_its_counts() -> None:
    old, newest = evaluate(("heat", 1, 4)), evaluate(("heat", 3, 4), ("cool", 0, 2))
    running, greedy = evaluate(("heat", 4, 4), num_open=1), evaluate(("heat", 2, 4), is_greedy=True)
    registry = observe(old, newest, greedy, running)
    assert read(registry, "evaluation_successes", sampling="sampled", task_type="heat") == 3
    assert read(registry, "evaluation_episodes", sampling="sampled", task_type="heat") == 4
    assert read(registry, "evaluation_successes", sampling="sampled", task_type="cool") == 0
    assert read(registry, "evaluation_successes", sampling="greedy", task_type="heat") == 2


def test_no_evaluation_makes_more_series_than_the_bound_and_none_is_lost() -> None:
    registry = observe(evaluate(*[(f"type {i}", 1, 2) for i in range(100)]))
    series = [
        sample
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "sdar_evaluation_episodes"
    ]
    assert len(series) == 65
    assert sum(sample.value for sample in series) == 200


def test_the_bounds_of_the_run_are_told_beside_what_they_bound() -> None:
    registry, training = observe(), build_config().training
    assert read(registry, "target_updates") == training.num_updates
    assert read(registry, "max_staleness_updates") == training.max_staleness
