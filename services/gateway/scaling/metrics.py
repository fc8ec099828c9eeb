"""The scaler's Prometheus metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

from sdar.contracts.roles import SCALABLE


class ScalingMetrics:
    """Args: registry: none makes one of its own."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        registry = CollectorRegistry() if registry is None else registry
        self.replicas = Gauge(
            "sdar_scaling_replicas",
            "Replicas of a workload: current, and wanted by the gateway.",
            ["workload", "kind"],
            registry=registry,
        )
        self.changes = Counter(
            "sdar_scaling_changes",
            "Changes of a workload's size.",
            ["workload", "direction"],
            registry=registry,
        )
        self.errors = Counter(
            "sdar_scaling_errors",
            "What kept a look from scaling: the file, the cluster's API, Redis, somebody who acted "
            "meanwhile, a defect.",
            ["cause"],
            registry=registry,
        )
        self.idle = Gauge(
            "sdar_idle",
            "1 while the idle guard holds rollout, teacher and learner at zero replicas.",
            registry=registry,
        )
        for role in SCALABLE:
            for direction in ("up", "down"):
                self.changes.labels(role, direction)
        for cause in ("file", "cluster", "bus", "conflict", "defect"):
            self.errors.labels(cause)
