"""Owns the gateway's Prometheus metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from sdar.contracts.streams import Stream
from sdar.contracts.types import LedgerEvent
from sdar.runtime.bus import BusMemory, StreamLag
from sdar.runtime.ledger import LedgerAccount

from .alarms import JUDGES, Alarm, BusState
from .evaluation import Evaluation

_TURN_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256)


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
        self.turns = Histogram(
            "sdar_episode_turns",
            "Turns of training episodes, by the outcome of their group.",
            ["outcome"],
            buckets=_TURN_BUCKETS,
            registry=registry,
        )
        self.length_drift = Gauge(
            "sdar_episode_length_drift", "Total variation distance of episode length, played to trained.", registry=registry
        )
        self.stream_entries = Gauge(
            "sdar_stream_entries", "Entries a stream's consumers have not finished.", ["stream", "state"], registry=registry
        )
        self.stream_age = Gauge("sdar_stream_oldest_age_seconds", "Age of the oldest of them.", ["stream"], registry=registry)
        self.dead_letters = Gauge("sdar_dead_letters", "Entries set aside.", registry=registry)
        self.memory = Gauge("sdar_redis_memory_bytes", "Redis' memory: used, and most.", ["kind"], registry=registry)
        self.bus = Gauge("sdar_bus_state", "1 for the state that the bus is in.", ["state"], registry=registry)
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
        policy_version: int,
        num_updates: int,
        length_drift: float,
    ) -> None:
        for state, number in ledger.counts().items():
            self.groups.labels(state).set(number)
        self.gap.set(ledger_gap)
        self.policy_version.set(policy_version)
        self.updates.set(num_updates)
        self.length_drift.set(length_drift)
        for evaluation in evaluations:
            if evaluation.is_complete:
                self.success.labels("greedy" if evaluation.is_greedy else "sampled").set(evaluation.success)

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
