"""Writes docs/metrics.md: every Prometheus metric of every service with its type, labels, unit and
meaning, read from the code.

Dashboards and alerts are checked against `list_metrics`: they may read no other metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import REGISTRY, CollectorRegistry

from sdar.process.gpu_time import GpuTime
from sdar.process.telemetry import build_registry

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "metrics.md"

_HEADER = """# Metrics

Written by `make docs` from the services' code; change it there. Each service answers `/metrics` on
its probe port, the gateway on its HTTP port. Names and labels are stable. Prometheus adds `run` and
`role` to each series ([scraping](operations.md#prometheus-and-grafana)). A histogram has the series
`_bucket`, `_sum` and `_count`.
"""
_EVERY_SERVICE = "Every service"
_TITLES = {
    "gateway": "The run as a whole; the sections below are about single services.",
    "rollout": "",
    "teacher": "",
    "learner": "Of rank 0. A value that was not measured, or that the method lacks, is NaN.",
    "envs": "Of any environment server, `sdar env serve` included.",
    "retriever": "Of `sdar retriever`, where Search-QA has one.",
}
_UNITS = {
    **dict.fromkeys(
        (
            "seconds",
            "bytes",
            "tokens",
            "groups",
            "entries",
            "episodes",
            "turns",
            "sessions",
            "versions",
        ),
        "",
    ),
    **dict.fromkeys(
        ("updates", "workers", "queries", "steps", "replicas", "letters", "events", "trajectories"),
        "",
    ),
    "successes": "episodes",
    "skills": "skills",
    "misses": "trajectories",
    "contexts": "trajectories",
    "prompts": "prompts",
    "policies": "publications",
    "results": "results",
    "share": "0 to 1",
    "fraction": "0 to 1",
    "drift": "0 to 1",
    "version": "version",
    "lag": "versions",
    "gap": "groups",
    "answers": "calls",
    "failures": "failures",
    "restarts": "processes",
    "opened": "sessions",
    "reaped": "sessions",
    "changes": "changes",
    "errors": "errors",
    "fds": "files",
    "state": "0 or 1",
    "phase": "0 or 1",
    "alarm": "0 or 1",
    "idle": "0 or 1",
    "entropy": "nats",
    "reward_mean": "reward",
    "staleness_mean": "updates",
    "staleness_max": "updates",
    "gate_mean": "0 to 1",
    "teacher_gap_mean": "nats",
    "teacher_gap_abs": "nats",
    "mismatch_abs": "nats",
    "behavior_gap_abs": "nats",
    "k3_kl": "nats",
    "loss": "1",
    "norm": "1",
    "rate": "1",
    "weight_mean": "1",
    "advantage_abs": "1",
}
"""Unit by how a name ends, the longest ending that fits; "" where the ending is the unit. A name
without one fails the test.
"""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric as Prometheus sees it. `role`: the service that has it, or every one."""

    role: str
    name: str
    kind: str
    labels: tuple[str, ...]
    meaning: str

    @property
    def unit(self) -> str:
        """Raises KeyError for a name that tells none."""
        base = self.name.removesuffix("_total")
        ending = max(
            (ending for ending in _UNITS if base.endswith(f"_{ending}")), key=len, default=base
        )
        return _UNITS[ending] or ending

    @property
    def series(self) -> dict[str, tuple[str, ...]]:
        """Names that a query may use, each with its labels."""
        if self.kind != "histogram":
            return {self.name: self.labels}
        parts = {f"{self.name}_{part}": self.labels for part in ("sum", "count")}
        return parts | {f"{self.name}_bucket": (*self.labels, "le")}


def list_metrics() -> list[Metric]:
    """The metrics of all services, in the order of their declaration."""
    import services.envs.search.batching
    import services.envs.service  # noqa: F401  modules that declare metrics at their import
    from services.gateway.metrics import GatewayMetrics
    from services.gateway.scaling.metrics import ScalingMetrics
    from services.learner.metrics import LearnerMetrics
    from services.rollout.metrics import RolloutMetrics
    from services.teacher.metrics import TeacherMetrics

    found = _read(_EVERY_SERVICE, build_registry())
    gpus = CollectorRegistry()
    gpus.register(GpuTime(0))
    roles = ("gateway", GatewayMetrics), ("gateway", ScalingMetrics), ("rollout", RolloutMetrics)
    for role, make in (*roles, ("teacher", TeacherMetrics), ("learner", LearnerMetrics)):
        registry = CollectorRegistry()
        make(registry)
        found += _read(role, registry) + (_read(role, gpus) if role != "gateway" else [])
    for role, prefix in (("envs", "sdar_env_"), ("retriever", "sdar_retriever_")):
        found += [metric for metric in _read(role, REGISTRY) if metric.name.startswith(prefix)]
    return found


def _read(role: str, registry: CollectorRegistry) -> list[Metric]:
    # Labels without a series yet are told by no public call.
    collectors = list(registry._collector_to_names)
    return [
        Metric(
            role,
            family.name + ("_total" if family.type == "counter" else ""),
            family.type,
            tuple(getattr(collector, "_labelnames", ())),
            " ".join(family.documentation.split()).rstrip(".") + ".",
        )
        for collector in collectors
        for family in collector.collect()
    ]


def render_page() -> str:
    """The whole page as Markdown."""
    metrics = list_metrics()
    parts = [
        _HEADER,
        _render(
            _EVERY_SERVICE, "", [metric for metric in metrics if metric.role == _EVERY_SERVICE]
        ),
    ]
    parts += [
        _render(f"`{role}`", text, [m for m in metrics if m.role == role])
        for role, text in _TITLES.items()
    ]
    return "\n".join(parts) + "\n"


def _render(title: str, text: str, metrics: Sequence[Metric]) -> str:
    rows = [
        f"| `{m.name}{'{' + ','.join(m.labels) + '}' if m.labels else ''}` | {m.kind} | {m.unit} | "
        f"{m.meaning} |"
        for m in metrics
    ]
    lines = [
        f"\n## {title}\n",
        *([f"{text}\n"] if text else []),
        "| metric | type | unit | meaning |",
        "|---|---|---|---|",
        *rows,
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(render_page(), encoding="utf-8")
    print(f"Wrote {PAGE}")
