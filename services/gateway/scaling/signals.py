"""What a run's numbers say about the size of each workload, and when a run is idle. Pure.

Each role has one signal, which the table of services names. Rollout: the share of its time that the
learner waits for data. Teacher: how much of what admission allows to be out waits for a score, and
for how long. Environments: episodes that wait for a session. Hysteresis is the governor's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from sdar.contracts.roles import ROLES, Role, Signal

from ..alarms import LEARNER_SILENCE_FACTOR, NO_PROGRESS_S, BusState
from ..state import RunPhase

Values = Mapping[str, float]

MOST_WAIT_SHARE = 0.2
"""A learner that waits longer than this for its data is fed too slowly."""
LEAST_WAIT_SHARE = 0.05
"""One that waits less never waits: a batch takes a moment to put together also when all of it is
there.
"""
LEAST_UPDATES = 2
"""Updates since the sizes last changed; the first of them may have begun before."""
HELD_BACK_SHARE = 0.3
"""Workers that are idle for longer while the learner waits are held back by something else than
their number.
"""
SPARE_WORKERS = 1.2
"""Idle time, in workers, beyond which one less still does the work, with a little to spare."""
MOST_LAG_SHARE = 0.3
"""Share of the episodes that admission allows to be out; more waiting in one place means that this
place is the narrow one.
"""
LEAST_LAG_SHARE = 0.05
MOST_LAG_AGE_S = 60.0
"""Half of what the alarm waits for: a score takes seconds."""
LEAST_WAITING_SESSIONS = 0.5
"""Episodes in the mean; one that waits now and then is no queue."""
SPARE_SESSION_SHARE = 0.8
"""Share of the sessions left after a step down that may be in use then."""


@dataclass(frozen=True, slots=True)
class Load:
    """What the signals judge, measured since the sizes last changed, and for no longer than a
    window back.

    Attributes:
        updates: values of the learner's newest records, one an update.
        workers: by service and instance, values of the records of each worker that lives.
        num_lagging: trajectories that wait for the teacher or are in its hands; their oldest is
            `lag_age_s` old.
        num_admitted: most episodes that may be out at once.
        sessions_per_replica: sessions that one replica of the environments holds.
    """

    updates: Sequence[Values] = ()
    workers: Mapping[str, Mapping[str, Sequence[Values]]] = field(default_factory=dict)
    num_lagging: int = 0
    lag_age_s: float = 0.0
    num_admitted: int = 1
    sessions_per_replica: int = 1

    def count_workers(self, service: str) -> int:
        return len(self.workers.get(service, {}))

    def sum_means(self, service: str, name: str) -> float:
        """The sum over a service's workers of each one's mean; a value that a record lacks counts
        as 0.
        """
        total = 0.0
        for records in self.workers.get(service, {}).values():
            if records:
                total += fmean(values.get(name, 0.0) for values in records)
        return total

    def compute_idle_share(self, service: str) -> float:
        return self.sum_means(service, "waiting_share") / max(1, self.count_workers(service))

    @property
    def lag_share(self) -> float:
        return self.num_lagging / self.num_admitted

    @property
    def num_waiting_sessions(self) -> float:
        return self.sum_means(Role.ROLLOUT, "waiting_sessions")

    @property
    def is_teacher_narrow(self) -> bool:
        return self.lag_share >= MOST_LAG_SHARE or (
            self.num_lagging > 0 and self.lag_age_s > MOST_LAG_AGE_S
        )


@dataclass(frozen=True, slots=True)
class Advice:
    """How many replicas the signal alone asks for, and the sentence that says why."""

    replicas: int
    reason: str


def advise(role: Role, load: Load, replicas: int) -> Advice:
    """What the workload's signal asks for, given the replicas that there are. Bounds are not looked
    at.
    """
    return _JUDGES[ROLES[role].signal](load, replicas)


def _keep(load: Load, replicas: int) -> Advice:
    return Advice(replicas, "Its size is fixed.")


def _follow_learner(load: Load, replicas: int) -> Advice:
    waits = [values["wait_share"] for values in load.updates if "wait_share" in values]
    if len(waits) < LEAST_UPDATES:
        return Advice(
            replicas,
            f"{len(waits)} updates since the last change; {LEAST_UPDATES} are needed to judge.",
        )
    # The median: an evaluation that holds one update up says nothing about the others.
    wait = median(waits)
    idle = load.sum_means(Role.ROLLOUT, "waiting_share")
    idle_share = load.compute_idle_share(Role.ROLLOUT)
    found = (
        f"The learner waits {wait:.0%} of its time for data, rollout workers are idle "
        f"{idle_share:.0%} of theirs"
    )
    if wait > MOST_WAIT_SHARE:
        # More rollout workers help only if nothing behind or before them is the narrow place.
        if narrow := _find_narrower_place(load, idle_share):
            return Advice(replicas, f"{found}; {narrow}")
        # Data come at (1 - wait) of the rate at which the learner would take them. At most twice as
        # many, since the wait is a rough guess of what is missing.
        wanted = min(2 * replicas, math.ceil(round(replicas / (1.0 - min(wait, 0.99)), 6)))
        return Advice(max(replicas + 1, wanted), f"{found}: more of them are needed.")
    if wait < LEAST_WAIT_SHARE and idle >= SPARE_WORKERS and replicas > 1:
        return Advice(replicas - 1, f"{found}: one less still feeds it.")
    return Advice(replicas, f"{found}.")


def _find_narrower_place(load: Load, idle_share: float) -> str:
    """What keeps data from the learner, if not too few rollout workers; empty if nothing."""
    if load.is_teacher_narrow:
        return f"{load.num_lagging} trajectories wait for the teacher, which is the narrow place."
    if load.num_waiting_sessions > LEAST_WAITING_SESSIONS:
        return "episodes wait for environment sessions, which are the narrow place."
    if idle_share > HELD_BACK_SHARE:
        return "admission holds them back (training.max_staleness), more would wait as well."
    return ""


def _follow_scores(load: Load, replicas: int) -> Advice:
    if not load.count_workers(Role.TEACHER):
        return Advice(replicas, "No teacher was heard from since the last change.")
    idle = load.sum_means(Role.TEACHER, "waiting_share")
    idle_share = load.compute_idle_share(Role.TEACHER)
    found = (
        f"{load.num_lagging} trajectories wait for their scores, {load.lag_share:.0%} of what "
        f"admission allows to be out, the oldest for {load.lag_age_s:.0f} s; teachers are idle "
        f"{idle_share:.0%} of their time"
    )
    if load.is_teacher_narrow:
        # Idle although work waits: one more would idle as well.
        if idle_share > HELD_BACK_SHARE:
            return Advice(replicas, f"{found}: it isn't their number that holds them back.")
        return Advice(replicas + 1, f"{found}: one more is needed.")
    if load.lag_share < LEAST_LAG_SHARE and idle >= SPARE_WORKERS and replicas > 1:
        return Advice(replicas - 1, f"{found}: one less still keeps up.")
    return Advice(replicas, f"{found}.")


def _follow_sessions(load: Load, replicas: int) -> Advice:
    if not load.count_workers(Role.ROLLOUT):
        return Advice(replicas, "No rollout worker was heard from since the last change.")
    capacity = load.sessions_per_replica
    waiting = load.num_waiting_sessions
    # Every running episode has a session or waits for one.
    demand = max(waiting, load.sum_means(Role.ROLLOUT, "running_episodes"))
    found = (
        f"{demand:.0f} episodes want a session, {waiting:.1f} of them wait for one; "
        f"{replicas * capacity} sessions fit"
    )
    if waiting > LEAST_WAITING_SESSIONS:
        # Others may use the environments too, so that some wait although all of ours would fit.
        return Advice(max(replicas + 1, math.ceil(demand / capacity)), f"{found}: more are needed.")
    if replicas > 1 and demand <= SPARE_SESSION_SHARE * (replicas - 1) * capacity:
        return Advice(replicas - 1, f"{found}: one less holds them.")
    return Advice(replicas, f"{found}.")


_JUDGES: Mapping[Signal, Callable[[Load, int], Advice]] = {
    Signal.NONE: _keep,
    Signal.LEARNER_WAITS: _follow_learner,
    Signal.SCORES_WAIT: _follow_scores,
    Signal.SESSIONS_WAIT: _follow_sessions,
}


@dataclass(frozen=True, slots=True)
class Stillness:
    """From what it is judged whether a run is idle. Times are Unix times.

    Attributes:
        detail: why a failed run gave up.
        finished_at_s, paused_at_s: 0 unless it is.
        progress_at_s: when anything last moved; for a run that was woken or restarted, since then.
        bus: whether Redis answers, for us to see, since `bus_since_s`; a run without Redis isn't
            idle but held up.
        learner_busy_s: the slowest of the learner's newest updates.
    """

    now_s: float
    phase: RunPhase
    detail: str
    finished_at_s: float
    paused_at_s: float
    progress_at_s: float
    bus: BusState
    bus_since_s: float
    learner_busy_s: float


def find_idleness(still: Stillness, idle_after_s: float) -> str:
    """Why the run is idle, for longer than it may be, and what wakes it; empty if it isn't."""
    if not idle_after_s:
        return ""
    patience_s = idle_after_s
    since_s = still.progress_at_s
    remedy = "`sdar resume` wakes it."
    match still.phase:
        case RunPhase.FINISHED:
            since_s = still.finished_at_s
            what = "The run has been finished"
            remedy = "It goes on when training.num_updates is raised."
        case RunPhase.FAILED:
            what = f"The run has failed ({still.detail}) and not moved"
        case RunPhase.PAUSED:
            since_s = max(since_s, still.paused_at_s)
            what = "The run is paused and has not moved"
        case _:
            if still.bus is not BusState.OK:
                return ""
            # While Redis was away nothing could move, and a slow update moves nothing either.
            since_s = max(since_s, still.bus_since_s)
            patience_s = max(
                patience_s, NO_PROGRESS_S, LEARNER_SILENCE_FACTOR * still.learner_busy_s
            )
            what = f"The run is stuck ({still.phase}): nothing was played, trained or evaluated"
    idle_s = still.now_s - since_s
    if idle_s < patience_s:
        return ""
    return f"{what} for {format_duration(idle_s)}. {remedy}"


def format_duration(duration_s: float) -> str:
    return f"{duration_s:.0f} s" if duration_s < 120 else f"{duration_s / 60:.0f} minutes"
