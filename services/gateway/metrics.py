"""Owns the gateway's Prometheus metrics."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from .evaluation import Evaluation
from .ledger import Ledger


class GatewayMetrics:
    """Names documented in docs/operations.md."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        registry = CollectorRegistry() if registry is None else registry
        self.groups = Gauge("sdar_ledger_groups", "Training groups by state of their account.", ["state"], registry=registry)
        self.gap = Gauge("sdar_ledger_gap", "Groups the ledger cannot explain; anything but 0 is a defect.", registry=registry)
        self.policy_version = Gauge("sdar_policy_version", "Newest published policy version.", registry=registry)
        self.updates = Gauge("sdar_updates", "Optimizer updates so far.", registry=registry)
        self.success = Gauge(
            "sdar_evaluation_success", "Pooled success on the held-out list, newest.", ["sampling"], registry=registry
        )
        self.unreadable_events = Counter("sdar_unreadable_events", "Events that could not be decoded.", registry=registry)

    def observe(self, ledger: Ledger, evaluations: Sequence[Evaluation], *, policy_version: int, num_updates: int) -> None:
        for state, number in ledger.counts().items():
            self.groups.labels(state).set(number)
        self.gap.set(ledger.find_gap())
        self.policy_version.set(policy_version)
        self.updates.set(num_updates)
        for evaluation in evaluations:
            if evaluation.is_complete:
                self.success.labels("greedy" if evaluation.is_greedy else "sampled").set(evaluation.success)


def build_metrics() -> GatewayMetrics:
    """The process's own metrics, on the default registry that /metrics serves."""
    return GatewayMetrics(REGISTRY)
