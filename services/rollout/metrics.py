"""What a rollout worker measures: each declared here once, for Prometheus and its records.

docs/metrics.md lists them.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry

from sdar.contracts.types import Purpose, Trajectory
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
    Window,
)
from services.rollout.engine import EngineStats
from services.rollout.episode import EpisodeClock, TextSource

_PURPOSE = Label("purpose", tuple(Purpose))
_TASK_TYPE = Label("task_type")
_SOURCE = Label("source", tuple(TextSource))

ROLLOUT = Declarations()

EPISODES = ROLLOUT.declare(
    Counter(
        "sdar_rollout_episodes_total",
        "episodes",
        "Episodes of groups that were played.",
        (_PURPOSE, _TASK_TYPE),
        key="num_episodes",
    )
)
SUCCESSES = ROLLOUT.declare(
    Counter(
        "sdar_rollout_successes_total",
        "episodes",
        "Those that solved their task.",
        (_PURPOSE, _TASK_TYPE),
        key="num_successes",
    )
)
GENERATED_TOKENS = ROLLOUT.declare(
    Counter(
        "sdar_rollout_generated_tokens_total",
        "tokens",
        "Tokens sampled, for outside callers too.",
        key="num_tokens_generated",
    )
)
PROMPT_TOKENS = ROLLOUT.declare(
    Counter(
        "sdar_rollout_prompt_tokens_total",
        "tokens",
        "Tokens of prompts given to the engine.",
        key="num_prompt_tokens",
    )
)
CACHED_TOKENS = ROLLOUT.declare(
    Counter(
        "sdar_rollout_cached_tokens_total",
        "tokens",
        "Those of them that the engine's prefix cache held.",
        key="num_cached_tokens",
    )
)
FAILED_GROUPS = ROLLOUT.declare(
    Counter(
        "sdar_rollout_failed_groups_total",
        "groups",
        "Groups given up.",
        (_PURPOSE,),
        key="num_failed_groups",
    )
)
DEAD_LETTERS = ROLLOUT.declare(
    Counter("sdar_rollout_dead_letters_total", "letters", "Tasks set aside.")
)
RECLAIMED_GROUPS = ROLLOUT.declare(
    Counter(
        "sdar_rollout_reclaimed_groups_total",
        "groups",
        "Groups taken over from a dead worker, an earlier life of this one included.",
        key="num_reclaimed_groups",
    )
)
RETRIED_GROUPS = ROLLOUT.declare(
    Counter(
        "sdar_rollout_retried_groups_total",
        "groups",
        "Groups played again because their environment failed.",
        key="num_retried_groups",
    )
)
LATE_RESULTS = ROLLOUT.declare(
    Counter(
        "sdar_rollout_late_results_total",
        "results",
        "Results refused because the group was given to another attempt.",
        key="num_late_results",
    )
)
REPEATED_TOKENS = ROLLOUT.declare(
    Counter(
        "sdar_rollout_repeated_tokens_total",
        "tokens",
        "Tokens sampled in attempts that were thrown away.",
        key="num_repeated_tokens",
    )
)
REFUSED_POLICIES = ROLLOUT.declare(
    Counter(
        "sdar_rollout_refused_policies_total",
        "publications",
        "Times that a published policy could not be read.",
    )
)
EPISODE_TURNS = ROLLOUT.declare(
    Histogram(
        "sdar_rollout_episode_turns",
        "turns",
        "Turns of a generated training episode.",
        buckets=TURNS_BUCKETS,
    )
)
EPISODE_SECONDS = ROLLOUT.declare(
    Histogram("sdar_rollout_episode_seconds", "seconds", "Wall time of an episode.")
)
ENVIRONMENT_WAIT_SECONDS = ROLLOUT.declare(
    Counter(
        "sdar_rollout_environment_wait_seconds_total",
        "seconds",
        "Episode-seconds spent waiting for environments.",
    )
)
ENGINE_WAIT_SECONDS = ROLLOUT.declare(
    Counter(
        "sdar_rollout_engine_wait_seconds_total",
        "seconds",
        "Episode-seconds spent waiting for the engine.",
    )
)
SHORTENED_PROMPTS = ROLLOUT.declare(
    Counter(
        "sdar_rollout_shortened_prompts_total",
        "prompts",
        "Prompts that show fewer earlier turns than asked for.",
    )
)
CONTROL_TEXTS = ROLLOUT.declare(
    Counter(
        "sdar_rollout_control_texts_total",
        "texts",
        "Texts of control tokens such as <|im_end|> in what prompts show, kept as text.",
        (_SOURCE,),
        key="num_control_texts",
    )
)
WEIGHT_STAGING_SECONDS = ROLLOUT.declare(
    Histogram(
        "sdar_rollout_weight_staging_seconds",
        "seconds",
        "Reading new weights, beside generation.",
    )
)
WEIGHT_PAUSE_SECONDS = ROLLOUT.declare(
    Histogram("sdar_rollout_weight_pause_seconds", "seconds", "Generation held by an update.")
)
RUNNING_GROUPS = ROLLOUT.declare(Gauge("sdar_rollout_running_groups", "groups", "Groups in hand."))
RUNNING_EPISODES = ROLLOUT.declare(
    Gauge(
        "sdar_rollout_running_episodes",
        "episodes",
        "Episodes being played.",
        key="running_episodes",
    )
)
WAITING_SECONDS = ROLLOUT.declare(
    Counter("sdar_rollout_waiting_seconds_total", "seconds", "Time without a group in hand.")
)
POLICY_VERSION = ROLLOUT.declare(
    Gauge("sdar_rollout_policy_version", "version", "Version being sampled from.")
)
POLICY_LAG = ROLLOUT.declare(
    Gauge("sdar_rollout_policy_lag", "versions", "Versions behind the newest published.")
)

# What only the records hold: Prometheus works rates and shares out for itself.

TOKENS_PER_S = ROLLOUT.declare(
    Figure("tokens_per_s", "tokens a second", "Tokens sampled since the record before.")
)
WAITING_SHARE = ROLLOUT.declare(
    Figure("waiting_share", "0 to 1", "Share of the time since then without a group in hand.")
)
ENVIRONMENT_SHARE = ROLLOUT.declare(
    Figure(
        "environment_share",
        "0 to 1",
        "Share of the episode-seconds since then that were spent waiting for environments.",
    )
)
ENGINE_SHARE = ROLLOUT.declare(
    Figure("engine_share", "0 to 1", "The same of waiting for the engine.")
)
WAITING_SESSIONS = ROLLOUT.declare(
    Figure(
        "waiting_sessions",
        "episodes",
        "Episodes that wait because all servers of environments are full or away.",
    )
)
NUM_WEIGHT_UPDATES = ROLLOUT.declare(
    Figure("num_weight_updates", "updates", "Weight updates that the engine has installed.")
)
WEIGHT_STAGING_S = ROLLOUT.declare(
    Figure("weight_staging_s", "seconds", "Reading of the newest weights, beside generation.")
)
WEIGHT_PAUSE_S = ROLLOUT.declare(
    Figure("weight_pause_s", "seconds", "Generation held by the newest update.")
)


class RolloutMetrics(Meters):
    """The worker's meters, and what it measures from more than one value.

    Args:
        registry: none makes one of its own, so that several workers fit into one process.
        now: seconds, monotonic.
    """

    def __init__(
        self, registry: CollectorRegistry | None = None, now: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(ROLLOUT, registry)
        self._bound = LabelBound()
        self._now = now
        self._window = Window(self, now)
        self._num_running = 0
        self._idle_since = now()
        self._last_stats = EngineStats()
        self._last_clock = EpisodeClock()

    def observe_group(self, trajectories: Sequence[Trajectory]) -> None:
        """Count the episodes of a group that was played."""
        for trajectory in trajectories:
            purpose = trajectory.purpose
            task_type = self._bound(trajectory.task.task_type)
            success = float(trajectory.is_success)
            self.count(EPISODES, purpose=purpose, task_type=task_type)
            self.count(SUCCESSES, success, purpose=purpose, task_type=task_type)
            self.observe(EPISODE_SECONDS, trajectory.duration_s)
            if purpose is Purpose.TRAIN:
                self.observe(EPISODE_TURNS, len(trajectory.turns))

    def observe_running(self, num_groups: int) -> None:
        """Called at every change; the time at zero is the worker's idle time."""
        now = self._now()
        # What has just ended was idle if nothing ran in it.
        if self._num_running == 0:
            self.count(WAITING_SECONDS, now - self._idle_since)
        self._num_running = num_groups
        self._idle_since = now
        self.set(RUNNING_GROUPS, num_groups)

    def observe_engine(
        self, stats: EngineStats, clock: EpisodeClock, policy_version: int, newest_version: int
    ) -> None:
        """Carry the engine's own counters and the episodes' clock over."""
        seen = self._last_stats
        if stats.num_weight_updates != seen.num_weight_updates:
            self.observe(WEIGHT_STAGING_SECONDS, stats.weight_staging_s)
            self.observe(WEIGHT_PAUSE_SECONDS, stats.weight_pause_s)
        self.count(GENERATED_TOKENS, stats.num_generated_tokens - seen.num_generated_tokens)
        self.count(PROMPT_TOKENS, stats.num_prompt_tokens - seen.num_prompt_tokens)
        self.count(CACHED_TOKENS, stats.num_cached_tokens - seen.num_cached_tokens)
        self.set(NUM_WEIGHT_UPDATES, stats.num_weight_updates)
        self.set(WEIGHT_STAGING_S, stats.weight_staging_s)
        self.set(WEIGHT_PAUSE_S, stats.weight_pause_s)
        self.set(POLICY_VERSION, policy_version)
        self.set(POLICY_LAG, newest_version - policy_version)
        self._observe_clock(clock)
        self._last_stats = stats

    def _observe_clock(self, clock: EpisodeClock) -> None:
        seen = self._last_clock
        self.count(ENVIRONMENT_WAIT_SECONDS, clock.environment_s - seen.environment_s)
        self.count(ENGINE_WAIT_SECONDS, clock.engine_s - seen.engine_s)
        self.count(SHORTENED_PROMPTS, clock.num_shortened_prompts - seen.num_shortened_prompts)
        for source, num_texts in clock.num_control_texts.items():
            self.count(CONTROL_TEXTS, num_texts - seen.num_control_texts[source], source=source)
        # The episodes' clock goes on; what was seen of it must not.
        self._last_clock = dataclasses.replace(
            clock, num_control_texts=collections.Counter(clock.num_control_texts)
        )

    def collect_record(
        self, num_running_episodes: int, num_waiting_sessions: int
    ) -> dict[str, float]:
        """Values of a metric record: totals since start; rates and shares since the last call."""
        # No change, but the idle time since the last one belongs into this record.
        self.observe_running(self._num_running)
        self._window.close()
        environment_s = self._window.growth(ENVIRONMENT_WAIT_SECONDS)
        engine_s = self._window.growth(ENGINE_WAIT_SECONDS)
        episode_s = max(engine_s + environment_s, 1e-9)
        self.set(RUNNING_EPISODES, num_running_episodes)
        self.set(WAITING_SESSIONS, num_waiting_sessions)
        self.set(TOKENS_PER_S, self._window.rate(GENERATED_TOKENS))
        # The two clocks are read one after the other, so the share may come out just over 1.
        self.set(WAITING_SHARE, min(1.0, self._window.rate(WAITING_SECONDS)))
        self.set(ENVIRONMENT_SHARE, environment_s / episode_s)
        self.set(ENGINE_SHARE, engine_s / episode_s)
        return self.take_record()
