"""Owns every stream, consumer-group and key name. No other file spells one."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Stream(StrEnum):
    """A stream has one producer role; its payload type is named in docs/architecture.md."""

    TASKS = "tasks"
    TRAJECTORIES = "trajectories"
    SCORED = "scored"
    POLICY_UPDATES = "policy_updates"
    EVALUATIONS = "evaluations"
    LEDGER = "ledger"
    METRICS = "metrics"
    SKILL_EVENTS = "skill_events"


class ConsumerGroup(StrEnum):
    """Consumer groups are named after the role that reads; one role reads a stream at most once."""

    ROLLOUT = "rollout"
    TEACHER = "teacher"
    LEARNER = "learner"
    GATEWAY = "gateway"


# Streams whose entries are state or telemetry of the newest kind: readers tail them without a group, and old entries are
# dropped by count. All others keep every entry until each of their groups has acknowledged it.
BROADCAST_MAX_ENTRIES: dict[Stream, int] = {
    Stream.POLICY_UPDATES: 1_000,
    Stream.METRICS: 50_000,
    Stream.SKILL_EVENTS: 50_000,
}


@dataclass(frozen=True, slots=True)
class RunKeys:
    """All Redis keys of one run."""

    run_id: str

    def stream(self, stream: Stream) -> str:
        return f"sdar:{self.run_id}:stream:{stream.value}"

    def dead_letters(self) -> str:
        return f"sdar:{self.run_id}:dead_letters"

    def state(self, name: str) -> str:
        """Key of a service's small durable state (the gateway's scheduler cursor, for one)."""
        return f"sdar:{self.run_id}:state:{name}"
