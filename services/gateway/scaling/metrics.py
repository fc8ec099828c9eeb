"""What the scaler measures: each declared here once. docs/metrics.md lists them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from sdar.contracts.roles import SCALABLE
from sdar.process.measurements import Counter, Declarations, Gauge, Label, Meters

_WORKLOAD = Label("workload", SCALABLE)
_DIRECTIONS = ("up", "down")
_CAUSES = ("file", "cluster", "bus", "conflict", "defect")

SCALING = Declarations()

REPLICAS = SCALING.declare(
    Gauge(
        "sdar_scaling_replicas",
        "replicas",
        "Replicas of a workload: current, and wanted by the gateway.",
        (_WORKLOAD, Label("kind", ("current", "wanted"))),
    )
)
CHANGES = SCALING.declare(
    Counter(
        "sdar_scaling_changes_total",
        "changes",
        "Changes of a workload's size.",
        (_WORKLOAD, Label("direction", _DIRECTIONS)),
    )
)
ERRORS = SCALING.declare(
    Counter(
        "sdar_scaling_errors_total",
        "errors",
        "What kept a look from scaling: the file, the cluster's API, Redis, somebody who acted "
        "meanwhile, a defect.",
        (Label("cause", _CAUSES),),
    )
)
IDLE = SCALING.declare(
    Gauge(
        "sdar_idle",
        "0 or 1",
        "1 while the idle guard holds rollout, teacher and learner at zero replicas.",
    )
)


class ScalingMetrics(Meters):
    """The scaler's meters.

    Args:
        registry: none makes one of its own.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        super().__init__(SCALING, registry)
        # There at 0, so that the first one is seen as an increase.
        for role in SCALABLE:
            for direction in _DIRECTIONS:
                self.count(CHANGES, 0, workload=role, direction=direction)
        for cause in _CAUSES:
            self.count(ERRORS, 0, cause=cause)
