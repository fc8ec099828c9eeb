"""Owns what one update is reported as: the record on the `metrics` stream and the Prometheus
metrics. Never decides anything.

Names in the record: means end in `_mean`, counts begin with `num_`, seconds end in `_s`.
docs/metrics.md says what each is. Rates are given with their counts (`success_<type>` with
`num_trajectories_<type>`), so that readers pool counts, not means.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import prometheus_client
import structlog
from prometheus_client import Counter as PrometheusCounter
from prometheus_client import Gauge

from sdar.contracts.types import ScoredTrajectory
from sdar.process.telemetry import LabelBound
from services.learner.ingest import Group, IngestCounts
from services.learner.progress import Progress

log = structlog.get_logger()

# A teacher that sees the skill differs from the student by far more than this, in nats per token.
_LEAST_TEACHER_GAP = 0.01
_STALENESS_TOKENS = "staleness_tokens_"
_SECONDS_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
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


VALUES = {
    "loss": "Loss, mean over the update's optimizer steps.",
    "gate_mean": (
        "Gate over scored tokens; 0.5 with teacher_gap_abs at 0 means that the skills do "
        "not reach the teacher."
    ),
    "gate_open_share": "Share of scored tokens whose gate is over 0.5.",
    "teacher_gap_mean": "teacher_logprobs - policy_logprobs over scored tokens.",
    "teacher_gap_abs": "Absolute teacher gap over scored tokens.",
    "engine_mismatch_abs": (
        "|policy_logprobs - behavior_logprobs| of tokens sampled by the weights that are trained."
    ),
    "policy_behavior_gap_abs": "The same over all tokens, older ones included.",
    "k3_kl": "KL to the reference policy, k3 estimator; only with method.kl_coefficient above 0.",
    "entropy": "Entropy of the policy over sampled tokens.",
    "gradient_norm": (
        "Norm of the gradient before clipping, mean over the update's optimizer steps."
    ),
    "learning_rate": "Learning rate of the update.",
    "clip_fraction": "Share of tokens whose ratio is clipped.",
    "off_policy_weight_mean": "Off-policy weight of the policy term.",
    "off_policy_bounded_share": "Share of tokens whose off-policy weight is cut at its bound.",
    "advantage_abs": "Absolute advantage over tokens.",
    "reward_mean": "Reward of the update's episodes.",
    "invalid_action_share": "Share of turns without a valid action.",
    "staleness_mean": "Staleness over sampled tokens.",
    "staleness_max": "Staleness of the oldest sampled token.",
    "wait_share": "Share of the update's time spent waiting for episodes.",
}
"""Values of the record that have a Prometheus gauge `sdar_learner_<name>`, of the newest update."""


class LearnerMetrics:
    """Names are documented in docs/metrics.md.

    Args:
        registry: none makes one of its own, so that several fit into one process.
    """

    def __init__(self, registry: prometheus_client.CollectorRegistry | None = None) -> None:
        registry = registry or prometheus_client.CollectorRegistry()
        gauge, counter = (
            partial(Gauge, registry=registry),
            partial(PrometheusCounter, registry=registry),
        )
        self._version = gauge("sdar_learner_policy_version", "Newest published version.")
        self._updates = gauge("sdar_learner_updates", "Optimizer updates done in the run.")
        self._buffered = gauge("sdar_learner_buffered_groups", "Whole groups waiting.")
        self._unacknowledged = gauge(
            "sdar_learner_unacknowledged_entries",
            "Entries trained on that wait for a checkpoint: a restart trains them again.",
        )
        self._tokens = counter(
            "sdar_learner_trained_tokens",
            "Sampled tokens trained on, by their staleness in updates (at most "
            "training.max_staleness): its histogram.",
            ["staleness"],
        )
        self._groups = counter("sdar_learner_groups", "Groups by what became of them.", ["outcome"])
        self._episodes = counter(
            "sdar_learner_trained_episodes", "Episodes trained on.", ["task_type"]
        )
        self._successes = counter(
            "sdar_learner_trained_successes", "Those that solved their task.", ["task_type"]
        )
        self._rewards = gauge(
            "sdar_learner_task_reward_mean",
            "Reward of the episodes in the newest update that had the type.",
            ["task_type"],
        )
        self._seconds = prometheus_client.Histogram(
            "sdar_learner_seconds",
            "Wall time of an update by part: wait, step, publish, checkpoint.",
            ["part"],
            registry=registry,
            buckets=_SECONDS_BUCKETS,
        )
        self._turns = prometheus_client.Histogram(
            "sdar_learner_episode_turns",
            "Turns of each episode trained, and of each dropped as stale.",
            ["outcome"],
            registry=registry,
            buckets=_TURNS_BUCKETS,
        )
        self._values = {name: gauge(f"sdar_learner_{name}", text) for name, text in VALUES.items()}
        for value in self._values.values():
            value.set(math.nan)  # not measured yet, or never by this method
        self._bound = LabelBound()

    def observe(
        self,
        progress: Progress,
        values: dict[str, float],
        num_buffered: int,
        num_unacknowledged: int,
    ) -> None:
        """Book one update's record."""
        self._version.set(progress.policy_version)
        self._updates.set(progress.num_updates)
        self._buffered.set(num_buffered)
        self._unacknowledged.set(num_unacknowledged)
        for outcome in ("trained", "skipped", "stale", "failed", "cancelled"):
            self._groups.labels(outcome).inc(values[f"num_groups_{outcome}"])
        for part in ("wait", "step", "publish"):
            self._seconds.labels(part).observe(values[f"{part}_s"])
        if values["checkpoint_s"]:
            self._seconds.labels("checkpoint").observe(values["checkpoint_s"])
        for name, value in values.items():
            if name.startswith(_STALENESS_TOKENS):
                self._tokens.labels(name.removeprefix(_STALENESS_TOKENS)).inc(value)
            elif name in self._values:
                self._values[name].set(value)

    def observe_episodes(self, groups: Sequence[Group], stale_turns: Sequence[int]) -> None:
        """The episodes of one update, and the lengths of those that came too late for it."""
        rewards: dict[str, list[float]] = {}
        for trajectory in (item.trajectory for group in groups for item in group.items):
            task_type = self._bound(trajectory.task.task_type)
            rewards.setdefault(task_type, []).append(trajectory.episode_return)
            self._episodes.labels(task_type).inc()
            self._successes.labels(task_type).inc(trajectory.is_success)
            self._turns.labels("trained").observe(len(trajectory.turns))
        for task_type, received in rewards.items():
            self._rewards.labels(task_type).set(float(np.mean(received)))
        for num_turns in stale_turns:
            self._turns.labels("stale").observe(num_turns)


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
            hint=(
                "the skills do not reach the teacher's prompt, or the policy has learnt all of them"
            ),
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
        "num_response_tokens_mean": float(
            np.mean([trajectory.num_response_tokens for trajectory in trajectories])
        ),
        "invalid_action_share": float(np.mean([not turn.is_action_valid for turn in turns])),
    }
    for task_type, outcomes in sorted(by_type.items()):
        values[f"success_{task_type}"] = float(np.mean(outcomes))
        values[f"num_trajectories_{task_type}"] = float(len(outcomes))
    scores = [item.score for item in items if item.score is not None]
    if scores:
        values["specific_skill_share"] = float(
            np.mean([score.num_specific_skills > 0 for score in scores])
        )
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
    histogram = {
        f"{_STALENESS_TOKENS}{staleness}": float(count)
        for staleness, count in sorted(by_staleness.items())
    }
    return {
        "staleness_mean": sum(staleness * count for staleness, count in by_staleness.items())
        / max(1, total),
        "staleness_max": float(max(by_staleness, default=0)),
        "num_policy_versions": float(len(tokens)),
        **histogram,
    }
