"""What a teacher measures: each declared here once, for Prometheus and its records.

docs/metrics.md lists them.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry

from sdar.process.measurements import (
    Counter,
    Declarations,
    Figure,
    Gauge,
    Histogram,
    Meters,
    Window,
)

TEACHER = Declarations()

SCORED_TRAJECTORIES = TEACHER.declare(
    Counter(
        "sdar_teacher_scored_trajectories_total",
        "trajectories",
        "Trajectories scored.",
        key="num_scored_trajectories",
    )
)
SCORED_TOKENS = TEACHER.declare(
    Counter(
        "sdar_teacher_scored_tokens_total",
        "tokens",
        "Sampled tokens scored.",
        key="num_tokens_scored",
    )
)
CONTEXT_TOKENS = TEACHER.declare(
    Counter(
        "sdar_teacher_context_tokens_total",
        "tokens",
        "Tokens read to score them, privileged prompts included, padding not.",
        key="num_context_tokens",
    )
)
RETRIEVAL_MISSES = TEACHER.declare(
    Counter(
        "sdar_teacher_retrieval_misses_total",
        "trajectories",
        "Trajectories for whose task nothing specific was retrieved.",
        key="num_retrieval_misses",
    )
)
SWAPPED_CONTEXTS = TEACHER.declare(
    Counter(
        "sdar_teacher_swapped_contexts_total",
        "trajectories",
        "Trajectories shown a wrong skill on purpose.",
        key="num_swapped_contexts",
    )
)
DROPPED_SKILLS = TEACHER.declare(
    Counter(
        "sdar_teacher_dropped_skills_total",
        "skills",
        "Specific skills left out because the privileged prompt was too long.",
        key="num_dropped_skills",
    )
)
DEAD_LETTERS = TEACHER.declare(
    Counter(
        "sdar_teacher_dead_letters_total",
        "letters",
        "Trajectories set aside.",
        key="num_dead_letters",
    )
)
RECLAIMED_ENTRIES = TEACHER.declare(
    Counter(
        "sdar_teacher_reclaimed_entries_total",
        "entries",
        "Entries taken over from consumers that died, an earlier life of this one included.",
        key="num_reclaimed_entries",
    )
)
LATE_RESULTS = TEACHER.declare(
    Counter(
        "sdar_teacher_late_results_total",
        "results",
        "Scores refused because their entry was given to another teacher.",
        key="num_late_results",
    )
)
REFUSED_POLICIES = TEACHER.declare(
    Counter(
        "sdar_teacher_refused_policies_total",
        "publications",
        "Times that a published policy could not be read, or was wrong in the scorer.",
        key="num_refused_policies",
    )
)
DISPROOFS = TEACHER.declare(
    Gauge(
        "sdar_teacher_disproofs",
        "publications",
        "Times that a policy was wrong in the scorer, since the last one that was right.",
        key="num_disproofs",
    )
)
SCORING_SECONDS = TEACHER.declare(
    Histogram("sdar_teacher_scoring_seconds", "seconds", "Time to score one batch.")
)
WEIGHT_LOAD_SECONDS = TEACHER.declare(
    Histogram("sdar_teacher_weight_load_seconds", "seconds", "Time to load new weights.")
)
WAITING_SECONDS = TEACHER.declare(
    Counter(
        "sdar_teacher_waiting_seconds_total",
        "seconds",
        "Time in which there was nothing to score.",
    )
)
VERSION = TEACHER.declare(
    Gauge(
        "sdar_teacher_version",
        "version",
        "Policy version that scores.",
        key="teacher_version",
    )
)
LAG = TEACHER.declare(
    Gauge(
        "sdar_teacher_lag_versions",
        "versions",
        "Versions behind the newest policy at the last score.",
        key="lag",
    )
)

# What only the records hold: Prometheus works rates and shares out for itself.

TOKENS_PER_S = TEACHER.declare(
    Figure("tokens_per_s", "tokens a second", "Sampled tokens scored since the record before.")
)
WAITING_SHARE = TEACHER.declare(
    Figure("waiting_share", "0 to 1", "Share of the time since then with nothing to score.")
)


class TeacherMetrics(Meters):
    """The teacher's meters, and what it measures from more than one value.

    Args:
        registry: none makes one of its own, so that several teachers fit into one process.
        clock: seconds, monotonic.
    """

    def __init__(
        self, registry: CollectorRegistry | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(TEACHER, registry)
        self._window = Window(self, clock)

    def observe_version(self, teacher_version: int, lag: int) -> None:
        """The version that scores, and how far it is behind."""
        self.set(VERSION, teacher_version)
        self.set(LAG, lag)

    def collect_record(self) -> dict[str, float]:
        """Values of a metric record: totals since start; rates and shares since the last call."""
        self._window.close()
        self.set(TOKENS_PER_S, self._window.rate(SCORED_TOKENS))
        # The two clocks are read one after the other, so the share may come out just over 1.
        self.set(WAITING_SHARE, min(1.0, self._window.rate(WAITING_SECONDS)))
        return self.take_record()
