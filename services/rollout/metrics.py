"""Owns the rollout worker's measurements: Prometheus metrics and the values of its record on
`metrics`. Decides nothing.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from sdar.contracts.types import Purpose, Trajectory
from sdar.process.telemetry import LabelBound
from services.rollout.engine import EngineStats
from services.rollout.episode import EpisodeClock

_EPISODE_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
_TURN_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 100)
_UPDATE_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60)


class RolloutMetrics:
    """Names are documented in docs/metrics.md.

    Args:
        registry: none makes one of its own, so that several workers fit into one process.
        now: seconds, monotonic.
    """

    def __init__(
        self, registry: CollectorRegistry | None = None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.registry = registry = CollectorRegistry() if registry is None else registry
        by_kind = ["purpose", "task_type"]
        self._episodes = Counter(
            "sdar_rollout_episodes",
            "Episodes of groups that were played.",
            by_kind,
            registry=registry,
        )
        self._successes = Counter(
            "sdar_rollout_successes", "Those that solved their task.", by_kind, registry=registry
        )
        self._tokens = Counter(
            "sdar_rollout_generated_tokens",
            "Tokens sampled, for outside callers too.",
            registry=registry,
        )
        self._prompt_tokens = Counter(
            "sdar_rollout_prompt_tokens",
            "Tokens of prompts given to the engine.",
            registry=registry,
        )
        self._cached_tokens = Counter(
            "sdar_rollout_cached_tokens",
            "Those of them that the engine's prefix cache held.",
            registry=registry,
        )
        self._failures = Counter(
            "sdar_rollout_failed_groups", "Groups given up.", ["purpose"], registry=registry
        )
        self._dead_letters = Counter(
            "sdar_rollout_dead_letters", "Tasks set aside.", registry=registry
        )
        self._reclaimed = Counter(
            "sdar_rollout_reclaimed_groups",
            "Groups taken over from a dead worker, an earlier life of this one included.",
            registry=registry,
        )
        self._retries = Counter(
            "sdar_rollout_retried_groups",
            "Groups played again because their environment failed.",
            registry=registry,
        )
        self._late_results = Counter(
            "sdar_rollout_late_results",
            "Results refused because the group was given to another attempt.",
            registry=registry,
        )
        self._repeated_tokens = Counter(
            "sdar_rollout_repeated_tokens",
            "Tokens sampled in attempts that were thrown away.",
            registry=registry,
        )
        self._refused_policies = Counter(
            "sdar_rollout_refused_policies",
            "Times that a published policy could not be read.",
            registry=registry,
        )
        self._turns = Histogram(
            "sdar_rollout_episode_turns",
            "Turns of a generated training episode.",
            buckets=_TURN_BUCKETS,
            registry=registry,
        )
        self._episode_s = Histogram(
            "sdar_rollout_episode_seconds",
            "Wall time of an episode.",
            buckets=_EPISODE_BUCKETS,
            registry=registry,
        )
        self._environment_s = Counter(
            "sdar_rollout_environment_wait_seconds",
            "Episode-seconds spent waiting for environments.",
            registry=registry,
        )
        self._engine_s = Counter(
            "sdar_rollout_engine_wait_seconds",
            "Episode-seconds spent waiting for the engine.",
            registry=registry,
        )
        self._shortened = Counter(
            "sdar_rollout_shortened_prompts",
            "Prompts that show fewer earlier turns than asked for.",
            registry=registry,
        )
        self._staging_s = Histogram(
            "sdar_rollout_weight_staging_seconds",
            "Reading new weights, beside generation.",
            buckets=_UPDATE_BUCKETS,
            registry=registry,
        )
        self._pause_s = Histogram(
            "sdar_rollout_weight_pause_seconds",
            "Generation held by an update.",
            buckets=_UPDATE_BUCKETS,
            registry=registry,
        )
        self._running = Gauge("sdar_rollout_running_groups", "Groups in hand.", registry=registry)
        self._running_episodes = Gauge(
            "sdar_rollout_running_episodes", "Episodes being played.", registry=registry
        )
        self._waiting_s = Counter(
            "sdar_rollout_waiting_seconds", "Time without a group in hand.", registry=registry
        )
        self._version = Gauge(
            "sdar_rollout_policy_version", "Version being sampled from.", registry=registry
        )
        self._lag = Gauge(
            "sdar_rollout_policy_lag", "Versions behind the newest published.", registry=registry
        )
        self._bound = LabelBound()
        self._now = now
        self.num_episodes = self.num_successes = self.num_failed_groups = 0
        self.num_reclaimed_groups = self.num_retried_groups = self.num_late_results = (
            self.num_repeated_tokens
        ) = 0
        self._num_running = 0
        self._idle_s, self._idle_since = 0.0, now()
        self._last_record = (now(), EngineStats(), EpisodeClock(), 0.0)
        self._last_seen = (EngineStats(), EpisodeClock())

    def observe_group(self, trajectories: Sequence[Trajectory]) -> None:
        for trajectory in trajectories:
            kind = trajectory.purpose.value, self._bound(trajectory.task.task_type)
            self._episodes.labels(*kind).inc()
            self._successes.labels(*kind).inc(trajectory.is_success)
            self._episode_s.observe(trajectory.duration_s)
            if trajectory.purpose is Purpose.TRAIN:
                self._turns.observe(len(trajectory.turns))
            self.num_episodes += 1
            self.num_successes += trajectory.is_success

    def observe_failure(self, purpose: str) -> None:
        self._failures.labels(purpose).inc()
        self.num_failed_groups += 1

    def observe_dead_letter(self) -> None:
        self._dead_letters.inc()

    def observe_reclaimed(self) -> None:
        self._reclaimed.inc()
        self.num_reclaimed_groups += 1

    def observe_retry(self) -> None:
        self._retries.inc()
        self.num_retried_groups += 1

    def observe_late_result(self) -> None:
        self._late_results.inc()
        self.num_late_results += 1

    def observe_repeated_tokens(self, number: int) -> None:
        self._repeated_tokens.inc(number)
        self.num_repeated_tokens += number

    def observe_refused_policy(self) -> None:
        self._refused_policies.inc()

    def observe_running(self, num_groups: int) -> None:
        """Called at every change; the time at zero is the worker's idle time."""
        if self._num_running == 0:
            self._idle_s += self._now() - self._idle_since
        self._num_running, self._idle_since = num_groups, self._now()
        self._running.set(num_groups)

    def observe_engine(
        self, stats: EngineStats, clock: EpisodeClock, policy_version: int, newest_version: int
    ) -> None:
        """Carry the engine's own counters and the episodes' clock over into Prometheus."""
        seen, seen_clock = self._last_seen
        if stats.num_weight_updates != seen.num_weight_updates:
            self._staging_s.observe(stats.weight_staging_s)
            self._pause_s.observe(stats.weight_pause_s)
        self._tokens.inc(stats.num_generated_tokens - seen.num_generated_tokens)
        self._prompt_tokens.inc(stats.num_prompt_tokens - seen.num_prompt_tokens)
        self._cached_tokens.inc(stats.num_cached_tokens - seen.num_cached_tokens)
        self._environment_s.inc(clock.environment_s - seen_clock.environment_s)
        self._engine_s.inc(clock.engine_s - seen_clock.engine_s)
        self._version.set(policy_version)
        self._lag.set(newest_version - policy_version)
        self._shortened.inc(clock.num_shortened_prompts - seen_clock.num_shortened_prompts)
        self._last_seen = stats, dataclasses.replace(clock)

    def collect_window(
        self, stats: EngineStats, clock: EpisodeClock, num_running_episodes: int
    ) -> dict[str, float]:
        """Values of a metric record: totals since start; rates and shares since the last call."""
        self.observe_running(self._num_running)
        now = self._now()
        then, old, old_clock, old_idle_s = self._last_record
        duration_s = max(now - then, 1e-9)
        engine_s, environment_s = (
            clock.engine_s - old_clock.engine_s,
            clock.environment_s - old_clock.environment_s,
        )
        episode_s = max(engine_s + environment_s, 1e-9)
        idle_s = self._idle_s
        self._last_record = now, stats, dataclasses.replace(clock), idle_s
        self._running_episodes.set(num_running_episodes)
        self._waiting_s.inc(idle_s - old_idle_s)
        return {
            "num_tokens_generated": float(stats.num_generated_tokens),
            "num_prompt_tokens": float(stats.num_prompt_tokens),
            "num_cached_tokens": float(stats.num_cached_tokens),
            "tokens_per_s": (stats.num_generated_tokens - old.num_generated_tokens) / duration_s,
            "num_episodes": float(self.num_episodes),
            "num_successes": float(self.num_successes),
            "num_failed_groups": float(self.num_failed_groups),
            "num_reclaimed_groups": float(self.num_reclaimed_groups),
            "num_retried_groups": float(self.num_retried_groups),
            "num_late_results": float(self.num_late_results),
            "num_repeated_tokens": float(self.num_repeated_tokens),
            "running_episodes": float(num_running_episodes),
            "waiting_share": min(1.0, (idle_s - old_idle_s) / duration_s),
            "environment_share": environment_s / episode_s,
            "engine_share": engine_s / episode_s,
            "num_weight_updates": float(stats.num_weight_updates),
            "weight_staging_s": stats.weight_staging_s,
            "weight_pause_s": stats.weight_pause_s,
        }
