"""Owns what one update is reported as: the record on the `metrics` stream and the Prometheus metrics. Never decides anything.

Names in the record: means end in `_mean`, counts begin with `num_`, seconds end in `_s`; docs/operations.md says what each is.
Rates are given with their counts (`success_<type>` with `num_trajectories_<type>`), so that readers pool counts, not means.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import prometheus_client
import structlog

from sdar.contracts.types import ScoredTrajectory
from services.learner.ingest import Group, IngestCounts
from services.learner.progress import Progress

log = structlog.get_logger()

# A teacher that sees the skill differs from the student by far more than this, in nats per token.
_LEAST_TEACHER_GAP = 0.01
_TURNS_BUCKETS = (1, 2, 3, 5, 8, 12, 16, 20, 25, 30, 40, 50, 75, 100)


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the wall time of one update went, in seconds."""

    wait_s: float
    step_s: float
    publish_s: float
    checkpoint_s: float
    """Of the checkpoint before this update, 0 if there was none."""
    total_s: float
    """Since the end of the update before."""


class LearnerMetrics:
    """Prometheus metrics of one learner. Args: registry: none makes one of its own, so that several fit into one process."""

    def __init__(self, registry: prometheus_client.CollectorRegistry | None = None) -> None:
        registry = registry or prometheus_client.CollectorRegistry()
        self._version = prometheus_client.Gauge("sdar_learner_policy_version", "Newest published version.", registry=registry)
        self._updates = prometheus_client.Gauge("sdar_learner_updates", "Optimizer updates done in the run.", registry=registry)
        self._buffered = prometheus_client.Gauge("sdar_learner_buffered_groups", "Whole groups waiting.", registry=registry)
        self._unacknowledged = prometheus_client.Gauge(
            "sdar_learner_unacknowledged_entries", "Entries trained on that wait for a checkpoint.", registry=registry
        )
        self._tokens = prometheus_client.Counter("sdar_learner_trained_tokens", "Sampled tokens trained on.", registry=registry)
        self._groups = prometheus_client.Counter(
            "sdar_learner_groups", "Groups by what became of them.", ["outcome"], registry=registry
        )
        self._seconds = prometheus_client.Histogram(
            "sdar_learner_seconds", "Seconds of an update by part.", ["part"], registry=registry
        )
        self._turns = prometheus_client.Histogram(
            "sdar_learner_episode_turns",
            "Turns of each episode trained, and of each dropped as stale.",
            ["outcome"],
            registry=registry,
            buckets=_TURNS_BUCKETS,
        )
        self._values = prometheus_client.Gauge(
            "sdar_learner_value", "Last value of each training metric.", ["name"], registry=registry
        )

    def observe(self, progress: Progress, values: dict[str, float], num_buffered: int, num_unacknowledged: int) -> None:
        """Book one update's record."""
        self._version.set(progress.policy_version)
        self._updates.set(progress.num_updates)
        self._buffered.set(num_buffered)
        self._unacknowledged.set(num_unacknowledged)
        self._tokens.inc(values["num_tokens"])
        for outcome in ("trained", "skipped", "stale", "failed", "cancelled"):
            self._groups.labels(outcome).inc(values[f"num_groups_{outcome}"])
        for part in ("wait", "step", "publish"):
            self._seconds.labels(part).observe(values[f"{part}_s"])
        for name, value in values.items():
            self._values.labels(name).set(value)

    def observe_turns(self, trained: Sequence[int], stale: Sequence[int]) -> None:
        """Lengths of the episodes of one update, and of those that came too late for it."""
        for outcome, lengths in (("trained", trained), ("stale", stale)):
            for num_turns in lengths:
                self._turns.labels(outcome).observe(num_turns)


def build_record(
    groups: Sequence[Group],
    before: Progress,
    trained: dict[str, float],
    timing: Timing,
    counts: IngestCounts,
    num_buffered: int,
) -> dict[str, float]:
    """Everything measured about one update.

    Args:
        before: progress that the update began with; staleness is measured from it.
        trained: what the trainer measured over tokens.
    """
    items = [item for group in groups for item in group.items]
    dropped = {
        "num_groups_skipped": float(counts.num_skipped),
        "num_groups_stale": float(counts.num_stale),
        "num_groups_cancelled": float(counts.num_cancelled),
        "num_groups_failed": float(counts.num_failed),
    }
    tokens = sum(item.trajectory.num_response_tokens for item in items)
    record = {
        **trained,
        **_measure_episodes(items),
        **_measure_staleness(items, before),
        **dropped,
        **asdict(timing),
        "num_updates": before.num_updates + 1.0,
        "num_tokens": float(tokens),
        "num_groups_trained": float(len(groups)),
        "num_groups_buffered": float(num_buffered),
        "num_duplicate_entries": float(counts.num_duplicates),
        "tokens_per_s": tokens / timing.total_s if timing.total_s > 0 else 0.0,
        "wait_share": timing.wait_s / timing.total_s if timing.total_s > 0 else 0.0,
    }
    if "gate_mean" in record and record.get("teacher_gap_abs", 1.0) < _LEAST_TEACHER_GAP:
        log.warning(
            "teacher_gap_vanished",
            gate_mean=record["gate_mean"],
            teacher_gap_abs=record["teacher_gap_abs"],
            hint="the skills do not reach the teacher's prompt, or the policy has learnt all of them",
        )
    return record


def _measure_episodes(items: Sequence[ScoredTrajectory]) -> dict[str, float]:
    trajectories = [item.trajectory for item in items]
    by_type: dict[str, list[bool]] = {}
    for trajectory in trajectories:
        by_type.setdefault(trajectory.task.task_type, []).append(trajectory.is_success)
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    values = {
        "reward_mean": float(np.mean([trajectory.episode_return for trajectory in trajectories])),
        "success_mean": float(np.mean([trajectory.is_success for trajectory in trajectories])),
        "num_trajectories": float(len(trajectories)),
        "num_turns_mean": len(turns) / len(trajectories),
        "num_response_tokens_mean": float(np.mean([trajectory.num_response_tokens for trajectory in trajectories])),
        "invalid_action_share": float(np.mean([not turn.is_action_valid for turn in turns])),
    }
    for task_type, outcomes in sorted(by_type.items()):
        values[f"success_{task_type}"] = float(np.mean(outcomes))
        values[f"num_trajectories_{task_type}"] = float(len(outcomes))
    scores = [item.score for item in items if item.score is not None]
    if scores:
        values["specific_skill_share"] = float(np.mean([score.num_specific_skills > 0 for score in scores]))
    return values


def _measure_staleness(items: Sequence[ScoredTrajectory], before: Progress) -> dict[str, float]:
    """Over sampled tokens, in updates; `staleness_tokens_<n>` is the histogram."""
    tokens: Counter[int] = Counter()
    for item in items:
        for turn in item.trajectory.turns:
            versions, counts = np.unique(turn.policy_versions, return_counts=True)
            tokens.update(dict(zip(versions.tolist(), counts.tolist(), strict=True)))
    by_staleness: Counter[int] = Counter()
    for version, count in tokens.items():
        by_staleness[before.compute_staleness(version)] += count
    total = sum(by_staleness.values())
    histogram = {f"staleness_tokens_{staleness}": float(count) for staleness, count in sorted(by_staleness.items())}
    return {
        "staleness_mean": sum(staleness * count for staleness, count in by_staleness.items()) / max(1, total),
        "staleness_max": float(max(by_staleness, default=0)),
        "num_policy_versions": float(len(tokens)),
        **histogram,
    }
