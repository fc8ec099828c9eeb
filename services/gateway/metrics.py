"""Owns the gateway's Prometheus metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from sdar.bus.ledger import LedgerAccount
from sdar.bus.protocol import BusMemory, StreamLag
from sdar.config import TrainingConfig
from sdar.contracts.streams import Stream
from sdar.contracts.types import LedgerEvent
from sdar.process.telemetry import LabelBound

from .alarms import JUDGES, Alarm, BusState
from .evaluation import Evaluation
from .state import RunPhase

_TURN_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256)


class GatewayMetrics:
    """Names are documented in docs/metrics.md."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        registry = CollectorRegistry() if registry is None else registry
        self.groups = Gauge(
            "sdar_ledger_groups",
            "Training groups by state of their account.",
            ["state"],
            registry=registry,
        )
        self.gap = Gauge(
            "sdar_ledger_gap",
            "Groups the ledger cannot explain; anything but 0 is a defect.",
            registry=registry,
        )
        self.policy_version = Gauge(
            "sdar_policy_version", "Newest published policy version.", registry=registry
        )
        self.updates = Gauge("sdar_updates", "Optimizer updates so far.", registry=registry)
        self.target_updates = Gauge(
            "sdar_target_updates", "Updates that the run is for.", registry=registry
        )
        self.max_staleness = Gauge(
            "sdar_max_staleness_updates",
            "Bound of staleness (training.max_staleness).",
            registry=registry,
        )
        self.phase = Gauge(
            "sdar_run_phase", "1 for the phase that the run is in.", ["phase"], registry=registry
        )
        by_kind = ["sampling", "task_type"]
        self.evaluated = Gauge(
            "sdar_evaluation_episodes",
            "Episodes of the newest complete evaluation, sampled or greedy.",
            by_kind,
            registry=registry,
        )
        self.solved = Gauge(
            "sdar_evaluation_successes", "Those that solved their task.", by_kind, registry=registry
        )
        self.unreadable_events = Counter(
            "sdar_unreadable_events", "Events that could not be decoded.", registry=registry
        )
        self._bound = LabelBound()
        self.turns = Histogram(
            "sdar_episode_turns",
            "Turns of training episodes, by the outcome of their group.",
            ["outcome"],
            buckets=_TURN_BUCKETS,
            registry=registry,
        )
        self.length_drift = Gauge(
            "sdar_episode_length_drift",
            "Total variation distance of episode length, played to trained.",
            registry=registry,
        )
        self.stream_entries = Gauge(
            "sdar_stream_entries",
            "Entries a stream's consumers have not finished.",
            ["stream", "state"],
            registry=registry,
        )
        self.stream_age = Gauge(
            "sdar_stream_oldest_age_seconds",
            "Age of the oldest of them.",
            ["stream"],
            registry=registry,
        )
        self.dead_letters = Gauge("sdar_dead_letters", "Entries set aside.", registry=registry)
        self.memory = Gauge(
            "sdar_redis_memory_bytes", "Redis' memory: used, and most.", ["kind"], registry=registry
        )
        self.bus = Gauge(
            "sdar_bus_state", "1 for the state that the bus is in.", ["state"], registry=registry
        )
        self.alarms = Gauge("sdar_alarm", "1 while an alarm is up.", ["name"], registry=registry)

    def observe_lengths(self, event: LedgerEvent) -> None:
        """Count the lengths that a GENERATED or TRAINED event tells; others tell none."""
        for turns in event.episode_turns:
            self.turns.labels(event.outcome.value).observe(turns)

    def observe_run(
        self,
        ledger: LedgerAccount,
        evaluations: Sequence[Evaluation],
        *,
        ledger_gap: int,
        phase: RunPhase,
        policy_version: int,
        num_updates: int,
        training: TrainingConfig,
        length_drift: float,
    ) -> None:
        for state, number in ledger.counts().items():
            self.groups.labels(state).set(number)
        self.gap.set(ledger_gap)
        self.policy_version.set(policy_version)
        self.updates.set(num_updates)
        self.target_updates.set(training.num_updates)
        self.max_staleness.set(training.max_staleness)
        for other in RunPhase:
            self.phase.labels(other.value).set(other is phase)
        self.length_drift.set(length_drift)
        newest = {
            evaluation.is_greedy: evaluation for evaluation in evaluations if evaluation.is_complete
        }
        for evaluation in newest.values():
            self._observe_evaluation(evaluation)

    def _observe_evaluation(self, evaluation: Evaluation) -> None:
        sampling, counts = "greedy" if evaluation.is_greedy else "sampled", {"other": [0, 0]}
        for task_type, (solved, played) in evaluation.successes.items():
            kind = counts.setdefault(self._bound(task_type), [0, 0])
            kind[0] += solved
            kind[1] += played
        for task_type, (solved, played) in counts.items():
            if played:
                self.solved.labels(sampling, task_type).set(solved)
                self.evaluated.labels(sampling, task_type).set(played)

    def observe_bus(
        self,
        state: BusState,
        lags: Mapping[Stream, StreamLag],
        memory: BusMemory,
        num_dead_letters: int,
        alarms: Sequence[Alarm],
    ) -> None:
        for stream, lag in lags.items():
            self.stream_entries.labels(stream.value, "undelivered").set(lag.num_undelivered)
            self.stream_entries.labels(stream.value, "pending").set(lag.num_pending)
            self.stream_age.labels(stream.value).set(lag.oldest_age_s)
        self.memory.labels("used").set(memory.used_bytes)
        self.memory.labels("most").set(memory.max_bytes)
        self.dead_letters.set(num_dead_letters)
        for other in BusState:
            self.bus.labels(other.value).set(other is state)
        up = {alarm.name for alarm in alarms}
        for name in JUDGES:
            self.alarms.labels(name).set(name in up)


def build_metrics() -> GatewayMetrics:
    """The process's own metrics, on the default registry that /metrics serves."""
    return GatewayMetrics(REGISTRY)
