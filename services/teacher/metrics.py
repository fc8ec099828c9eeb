"""Owns the teacher's measurements: Prometheus metrics and the record on the `metrics` stream. Never
decides anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

CounterName = Literal[
    "scored_trajectories",
    "scored_tokens",
    "context_tokens",
    "retrieval_misses",
    "swapped_contexts",
    "dropped_skills",
    "dead_letters",
    "reclaimed_entries",
    "late_results",
    "refused_policies",
]

_COUNTERS: dict[CounterName, str] = {
    "scored_trajectories": "Trajectories scored.",
    "scored_tokens": "Sampled tokens scored.",
    "context_tokens": "Tokens read to score them, privileged prompts included, padding not.",
    "retrieval_misses": "Trajectories for whose task nothing specific was retrieved.",
    "swapped_contexts": "Trajectories shown a wrong skill on purpose.",
    "dropped_skills": "Specific skills left out because the privileged prompt was too long.",
    "dead_letters": "Trajectories set aside.",
    "reclaimed_entries": (
        "Entries taken over from consumers that died, an earlier life of this one included."
    ),
    "late_results": "Scores refused because their entry was given to another teacher.",
    "refused_policies": "Times that a published policy could not be read.",
}

_SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class TeacherMetrics:
    """Names are documented in docs/metrics.md.

    Args:
        registry: none makes one of its own, so that several teachers fit into one process.
        clock: seconds, monotonic.
    """

    def __init__(
        self, registry: CollectorRegistry | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        registry = CollectorRegistry() if registry is None else registry
        self._counters = {
            name: Counter(f"sdar_teacher_{name}", text, registry=registry)
            for name, text in _COUNTERS.items()
        }
        self._scoring = Histogram(
            "sdar_teacher_scoring_seconds",
            "Time to score one batch.",
            buckets=_SECONDS_BUCKETS,
            registry=registry,
        )
        self._loading = Histogram(
            "sdar_teacher_weight_load_seconds",
            "Time to load new weights.",
            buckets=_SECONDS_BUCKETS,
            registry=registry,
        )
        self._waiting = Counter(
            "sdar_teacher_waiting_seconds",
            "Time in which there was nothing to score.",
            registry=registry,
        )
        self._version = Gauge(
            "sdar_teacher_version", "Policy version that scores.", registry=registry
        )
        self._lag = Gauge(
            "sdar_teacher_lag_versions",
            "Versions behind the newest policy at the last score.",
            registry=registry,
        )
        self._clock = clock
        self.totals: dict[CounterName, float] = dict.fromkeys(_COUNTERS, 0.0)
        self.teacher_version, self.lag = 0, 0
        self._waited_s = 0.0
        self._window_at, self._window_tokens, self._window_waited_s = clock(), 0.0, 0.0

    def count(self, name: CounterName, amount: float = 1.0) -> None:
        self._counters[name].inc(amount)
        self.totals[name] += amount

    def observe_scoring(self, duration_s: float) -> None:
        self._scoring.observe(duration_s)

    def observe_loading(self, duration_s: float) -> None:
        self._loading.observe(duration_s)

    def observe_version(self, teacher_version: int, lag: int) -> None:
        self.teacher_version, self.lag = teacher_version, lag
        self._version.set(teacher_version)
        self._lag.set(lag)

    def observe_waiting(self, duration_s: float) -> None:
        """Time in which there was nothing to score."""
        self._waiting.inc(duration_s)
        self._waited_s += duration_s

    def collect_window(self) -> dict[str, float]:
        """Values of a metric record: totals since start, rates since the last call."""
        now, tokens = self._clock(), self.totals["scored_tokens"]
        duration_s = max(now - self._window_at, 1e-9)
        rates = {
            "tokens_per_s": (tokens - self._window_tokens) / duration_s,
            "waiting_share": min(1.0, (self._waited_s - self._window_waited_s) / duration_s),
        }
        self._window_at, self._window_tokens, self._window_waited_s = now, tokens, self._waited_s
        totals = {
            f"num_{name}": total for name, total in self.totals.items() if name != "scored_tokens"
        }
        state = {"teacher_version": float(self.teacher_version), "lag": float(self.lag)}
        return {"num_tokens_scored": tokens, **rates, **state, **totals}
