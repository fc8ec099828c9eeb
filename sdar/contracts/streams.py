"""The names of all streams, consumer groups and Redis keys. No other file spells one."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Stream(StrEnum):
    """What is sent between services; docs/architecture.md names writers, readers and payloads."""

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


# Streams whose entries are state or telemetry of the newest kind: readers tail them without a
# group, and old entries are dropped by count. All others keep every entry until each of their
# groups has acknowledged it.
BROADCAST_MAX_ENTRIES: dict[Stream, int] = {
    Stream.POLICY_UPDATES: 1_000,
    Stream.METRICS: 50_000,
    Stream.SKILL_EVENTS: 50_000,
}


@dataclass(frozen=True, slots=True)
class RunKeys:
    """All Redis keys of one run."""

    # In every key, so that runs can share a Redis and one of them can be deleted by its prefix.
    run_id: str

    def stream(self, stream: Stream) -> str:
        return f"sdar:{self.run_id}:stream:{stream.value}"

    def dead_letters(self) -> str:
        return f"sdar:{self.run_id}:dead_letters"

    def states(self) -> str:
        """Hash of the services' small durable states by name, such as the scheduler's cursor."""
        return f"sdar:{self.run_id}:states"

    def ledger(self) -> str:
        """Hash of the account's numbers."""
        return f"sdar:{self.run_id}:ledger"

    def open_groups(self) -> str:
        """Hash of the groups that are not closed: group number to where it stands."""
        return f"sdar:{self.run_id}:ledger:open"

    def closed_groups(self, outcome: str) -> str:
        """Bitmap of the group numbers closed by one outcome."""
        return f"sdar:{self.run_id}:ledger:{outcome}"

    def commit(self, commit_id: str) -> str:
        """Mark of a commit that was applied; expires."""
        return f"sdar:{self.run_id}:commit:{commit_id}"

    def tenure(self, group: ConsumerGroup) -> str:
        """Counter of the processes that have held a role only one may hold."""
        return f"sdar:{self.run_id}:tenure:{group.value}"

    def versions_in_use(self) -> str:
        """Hash of the policy versions that each reader of weights holds, with an expiry."""
        return f"sdar:{self.run_id}:versions_in_use"

    def versions_retired(self) -> str:
        """Set of the policy versions that no reader may begin to use."""
        return f"sdar:{self.run_id}:versions_retired"
