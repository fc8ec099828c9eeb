"""What one update is reported as: each measurement declared here once, for Prometheus and records.

Names in the record: means end in `_mean`, counts begin with `num_`, seconds end in `_s`.
docs/metrics.md says what each is. Rates are given with their counts (`success_<type>` with
`num_episodes_<type>`), so that readers pool counts, not means.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain

import numpy as np
import structlog
from prometheus_client import CollectorRegistry

from sdar.algorithms.measurements import TOKEN_COUNTS, TOKEN_MEASUREMENTS
from sdar.contracts.types import GroupOutcome, ScoredTrajectory
from sdar.process.measurements import (
    TURNS_BUCKETS,
    Counter,
    Declarations,
    Figure,
    Gauge,
    Histogram,
    Label,
    LabelBound,
    Meters,
)
from services.learner.ingest import Group, IngestCounts
from services.learner.progress import Progress

log = structlog.get_logger()

# A teacher that sees the skill differs from the student by far more than this, in nats per token.
_LEAST_TEACHER_GAP = 0.01
_STALENESS_TOKENS = "staleness_tokens_"
_OUTCOMES = (
    GroupOutcome.TRAINED,
    GroupOutcome.SKIPPED,
    GroupOutcome.STALE,
    GroupOutcome.FAILED,
    GroupOutcome.CANCELLED,
)
_TASK_TYPE = Label("task_type")

LEARNER = Declarations()

# Counts and present values.

POLICY_VERSION = LEARNER.declare(
    Gauge("sdar_learner_policy_version", "version", "Newest published version.")
)
UPDATES = LEARNER.declare(
    Gauge(
        "sdar_learner_updates",
        "updates",
        "Optimizer updates done in the run.",
        key="num_updates",
    )
)
BUFFERED_GROUPS = LEARNER.declare(
    Gauge(
        "sdar_learner_buffered_groups",
        "groups",
        "Whole groups waiting.",
        key="num_groups_buffered",
    )
)
UNACKNOWLEDGED_ENTRIES = LEARNER.declare(
    Gauge(
        "sdar_learner_unacknowledged_entries",
        "entries",
        "Entries trained on that wait for a checkpoint: a restart trains them again.",
    )
)
TRAINED_TOKENS = LEARNER.declare(
    Counter(
        "sdar_learner_trained_tokens_total",
        "tokens",
        "Sampled tokens trained on, by their staleness in updates (at most "
        "training.max_staleness): its histogram.",
        (Label("staleness"),),
    )
)
GROUPS = LEARNER.declare(
    Counter(
        "sdar_learner_groups_total",
        "groups",
        "Groups by what became of them.",
        (Label("outcome", _OUTCOMES),),
    )
)
SKIPPED_STEPS = LEARNER.declare(
    Counter(
        "sdar_learner_skipped_steps_total",
        "steps",
        "Optimizer steps skipped because a loss or the gradient norm was no finite number.",
    )
)
TRAINED_EPISODES = LEARNER.declare(
    Counter(
        "sdar_learner_trained_episodes_total",
        "episodes",
        "Episodes trained on.",
        (_TASK_TYPE,),
    )
)
TRAINED_SUCCESSES = LEARNER.declare(
    Counter(
        "sdar_learner_trained_successes_total",
        "episodes",
        "Those that solved their task.",
        (_TASK_TYPE,),
    )
)
TASK_REWARD_MEAN = LEARNER.declare(
    Gauge(
        "sdar_learner_task_reward_mean",
        "reward",
        "Reward of the episodes in the newest update that had the type.",
        (_TASK_TYPE,),
    )
)
SECONDS = LEARNER.declare(
    Histogram(
        "sdar_learner_seconds",
        "seconds",
        "Wall time of an update by part: wait, step, publish, checkpoint.",
        (Label("part", ("wait", "step", "publish", "checkpoint")),),
    )
)
EPISODE_TURNS = LEARNER.declare(
    Histogram(
        "sdar_learner_episode_turns",
        "turns",
        "Turns of each episode trained, and of each dropped as stale.",
        (Label("outcome", (GroupOutcome.TRAINED, GroupOutcome.STALE)),),
        buckets=TURNS_BUCKETS,
    )
)


def _declare_value(key: str, unit: str, text: str) -> None:
    """A value of the newest update, shown as `sdar_learner_<key>`.

    NaN before its first, and for ever where the method does not have it.
    """
    LEARNER.declare(Gauge(f"sdar_learner_{key}", unit, text, key=key, initial=math.nan))


_declare_value("loss", "1", "Loss, mean over the update's optimizer steps.")
for _mean in TOKEN_MEASUREMENTS:
    _declare_value(_mean.name, _mean.unit, _mean.help)
_declare_value(
    "gradient_norm",
    "1",
    "Norm of the gradient before clipping, mean over the update's optimizer steps.",
)
_declare_value("learning_rate", "1", "Learning rate of the update.")
_declare_value("reward_mean", "reward", "Reward of the update's episodes.")
_declare_value("invalid_action_share", "0 to 1", "Share of turns without a valid action.")
_declare_value("staleness_mean", "updates", "Staleness over sampled tokens.")
_declare_value(
    "success_mean",
    "0 to 1",
    "Success in training: share of the episodes that solved their task, of all that came to the "
    "learner since the record before, trained or not.",
)
_declare_value(
    "trained_success_mean",
    "0 to 1",
    "The same of the episodes trained. With training.skip_zero_signal no group that solved all or "
    "nothing is among them, which keeps it away from 0 and 1.",
)
_declare_value(
    "num_skipped_steps_in_a_row",
    "steps",
    "Optimizer steps skipped in a row up to now; at 3 the gateway ends the run.",
)
_declare_value("staleness_max", "updates", "Staleness of the oldest sampled token.")
_declare_value("wait_share", "0 to 1", "Share of the update's time spent waiting for episodes.")

# What only the records hold.

for _name, _text in TOKEN_COUNTS.items():
    LEARNER.declare(Figure(_name, "tokens", _text))
LEARNER.declare(Figure("loss_<term>", "1", "One term of the loss over all tokens, unweighted."))
LEARNER.declare(
    Figure("staleness_tokens_<updates>", "tokens", "Tokens that were so many updates old.")
)
LEARNER.declare(
    Figure("num_policy_versions", "versions", "Policy versions that sampled the tokens.")
)
LEARNER.declare(Figure("num_episodes", "episodes", "Episodes that success_mean is over."))
LEARNER.declare(Figure("success_<task_type>", "0 to 1", "success_mean of one type of task."))
LEARNER.declare(Figure("num_episodes_<task_type>", "episodes", "num_episodes of one type of task."))
LEARNER.declare(Figure("num_trajectories", "episodes", "Episodes trained on."))
LEARNER.declare(
    Figure("num_skipped_steps", "steps", "Optimizer steps of the update that were skipped.")
)
LEARNER.declare(Figure("num_turns_mean", "turns", "Turns of an episode."))
LEARNER.declare(Figure("num_response_tokens_mean", "tokens", "Sampled tokens of an episode."))
LEARNER.declare(
    Figure(
        "specific_skill_share",
        "0 to 1",
        "Share of scored episodes for whose task a specific skill was found.",
    )
)
LEARNER.declare(Figure("num_groups_trained", "groups", "Groups trained on in the update."))
LEARNER.declare(
    Figure(
        "num_groups_skipped",
        "groups",
        "Groups left out since the record before because all episodes earned the same.",
    )
)
LEARNER.declare(Figure("num_groups_stale", "groups", "The same because they were too old."))
LEARNER.declare(
    Figure("num_groups_failed", "groups", "The same because an entry could not be trained on.")
)
LEARNER.declare(
    Figure("num_groups_cancelled", "groups", "The same because no update was left for them.")
)
LEARNER.declare(
    Figure("num_duplicate_entries", "entries", "Entries of episodes or groups seen before.")
)
LEARNER.declare(Figure("wait_s", "seconds", "Waiting for episodes."))
LEARNER.declare(Figure("step_s", "seconds", "The optimizer steps."))
LEARNER.declare(Figure("publish_s", "seconds", "Publishing the weights."))
LEARNER.declare(
    Figure("checkpoint_s", "seconds", "The checkpoint before the update; 0 if there was none.")
)
LEARNER.declare(Figure("total_s", "seconds", "Time since the end of the update before."))
LEARNER.declare(Figure("tokens_per_s", "tokens a second", "Tokens trained on in that time."))


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


class LearnerMetrics(Meters):
    """The learner's meters, and how an update's record is booked in them.

    Args:
        registry: none makes one of its own, so that several fit into one process.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        super().__init__(LEARNER, registry)
        self._bound = LabelBound()

    def observe_update(
        self, progress: Progress, record: dict[str, float], num_unacknowledged: int
    ) -> None:
        """Book one update's record.

        Args:
            progress: the one after the update.
        """
        self.show_record(record)
        self.set(POLICY_VERSION, progress.policy_version)
        self.set(UNACKNOWLEDGED_ENTRIES, num_unacknowledged)
        for outcome in _OUTCOMES:
            self.count(GROUPS, record[f"num_groups_{outcome}"], outcome=outcome)
        # A checkpoint only where there was one: its histogram would fill with zeros.
        for part in ("wait", "step", "publish"):
            self.observe(SECONDS, record[f"{part}_s"], part=part)
        if record["checkpoint_s"]:
            self.observe(SECONDS, record["checkpoint_s"], part="checkpoint")
        for key, value in record.items():
            if key.startswith(_STALENESS_TOKENS):
                self.count(TRAINED_TOKENS, value, staleness=key.removeprefix(_STALENESS_TOKENS))
        self.count(SKIPPED_STEPS, record["num_skipped_steps"])

    def observe_skipped(self, record: dict[str, float]) -> None:
        """Book the record of a batch of which every optimizer step was skipped."""
        self.show_record(record)
        self.count(SKIPPED_STEPS, record["num_skipped_steps"])

    def observe_episodes(self, groups: Sequence[Group], stale_turns: Sequence[int]) -> None:
        """The episodes of one update, and the lengths of those that came too late for it."""
        rewards: dict[str, list[float]] = {}
        for trajectory in (item.trajectory for group in groups for item in group.items):
            # Of an environment with any number of types only the first ones get series.
            task_type = self._bound(trajectory.task.task_type)
            rewards.setdefault(task_type, []).append(trajectory.episode_return)
            self.count(TRAINED_EPISODES, task_type=task_type)
            self.count(TRAINED_SUCCESSES, trajectory.is_success, task_type=task_type)
            self.observe(EPISODE_TURNS, len(trajectory.turns), outcome=GroupOutcome.TRAINED)
        for task_type, received in rewards.items():
            self.set(TASK_REWARD_MEAN, _average(received), task_type=task_type)
        for num_turns in stale_turns:
            self.observe(EPISODE_TURNS, num_turns, outcome=GroupOutcome.STALE)


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
    tokens = sum(item.trajectory.num_response_tokens for item in items)
    record = {
        **trained,
        **_measure_played(groups, counts),
        **_measure_episodes(items),
        **_measure_staleness(items, before),
        "num_groups_skipped": float(counts.num_skipped),
        "num_groups_stale": float(counts.num_stale),
        "num_groups_cancelled": float(counts.num_cancelled),
        "num_groups_failed": float(counts.num_failed),
        **asdict(timing),
        "num_updates": before.num_updates + 1.0,
        "num_tokens": float(tokens),
        "num_groups_trained": float(len(groups)),
        "num_groups_buffered": float(num_buffered),
        "num_duplicate_entries": float(counts.num_duplicates),
        "tokens_per_s": tokens / timing.total_s if timing.total_s > 0 else 0.0,
        "wait_share": timing.wait_s / timing.total_s if timing.total_s > 0 else 0.0,
    }
    _warn_of_a_blind_teacher(record)
    return record


def _warn_of_a_blind_teacher(record: dict[str, float]) -> None:
    """A gate that is open by half over a gap of 0 looks like distillation and is none."""
    if "gate_mean" in record and record.get("teacher_gap_abs", 1.0) < _LEAST_TEACHER_GAP:
        log.warning(
            "teacher_gap_vanished",
            gate_mean=record["gate_mean"],
            teacher_gap_abs=record["teacher_gap_abs"],
            hint=(
                "the skills do not reach the teacher's prompt, or the policy has learnt all of them"
            ),
        )


def _measure_episodes(items: Sequence[ScoredTrajectory]) -> dict[str, float]:
    trajectories = [item.trajectory for item in items]
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    returns = [trajectory.episode_return for trajectory in trajectories]
    successes = [trajectory.is_success for trajectory in trajectories]
    lengths = [trajectory.num_response_tokens for trajectory in trajectories]
    invalid = [not turn.is_action_valid for turn in turns]
    values = {
        "reward_mean": _average(returns),
        "trained_success_mean": float(np.mean(successes)),
        "num_trajectories": float(len(trajectories)),
        "num_turns_mean": len(turns) / len(trajectories),
        "num_response_tokens_mean": float(np.mean(lengths)),
        "invalid_action_share": float(np.mean(invalid)),
    }
    scores = [item.score for item in items if item.score is not None]
    if scores:
        has_specific = [score.num_specific_skills > 0 for score in scores]
        values["specific_skill_share"] = float(np.mean(has_specific))
    return values


def _average(values: Sequence[float]) -> float:
    """Finite for finite values, however large."""
    return sum(value / len(values) for value in values)


def _list_played(groups: Sequence[Group], counts: IngestCounts) -> list[tuple[str, bool]]:
    """Task type and success of each episode, of trained groups and of those that were dropped."""
    return [*chain.from_iterable(group.successes for group in groups), *counts.dropped]


def _measure_played(groups: Sequence[Group], counts: IngestCounts) -> dict[str, float]:
    by_type: dict[str, list[bool]] = {}
    for task_type, is_success in _list_played(groups, counts):
        by_type.setdefault(task_type, []).append(is_success)
    outcomes = list(chain.from_iterable(by_type.values()))
    values = {
        "success_mean": float(np.mean(outcomes)),
        "num_episodes": float(len(outcomes)),
    }
    for task_type, of_type in sorted(by_type.items()):
        values[f"success_{task_type}"] = float(np.mean(of_type))
        values[f"num_episodes_{task_type}"] = float(len(of_type))
    return values


def _count_tokens(items: Sequence[ScoredTrajectory]) -> collections.Counter[int]:
    """Sampled tokens by policy version: tokens are many, versions are few."""
    tokens: collections.Counter[int] = collections.Counter()
    for item in items:
        for turn in item.trajectory.turns:
            versions, counts = np.unique(turn.policy_versions, return_counts=True)
            tokens.update(dict(zip(versions.tolist(), counts.tolist(), strict=True)))
    return tokens


def _measure_staleness(items: Sequence[ScoredTrajectory], before: Progress) -> dict[str, float]:
    """Over sampled tokens, in updates; `staleness_tokens_<n>` is the histogram."""
    tokens = _count_tokens(items)
    # Several versions may be as stale: those of a life that was lost, and their successors.
    by_staleness: collections.Counter[int] = collections.Counter()
    for version, count in tokens.items():
        by_staleness[before.compute_staleness(version)] += count
    num_tokens = sum(by_staleness.values())
    summed = sum(staleness * count for staleness, count in by_staleness.items())
    values = {
        "staleness_mean": summed / max(1, num_tokens),
        "staleness_max": float(max(by_staleness, default=0)),
        "num_policy_versions": float(len(tokens)),
    }
    for staleness, count in sorted(by_staleness.items()):
        values[f"{_STALENESS_TOKENS}{staleness}"] = float(count)
    return values
